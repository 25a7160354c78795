"""Checkpoints that other programs wrote: their names made ours, and what fits of them loaded.

`torch.save`, timm's CheckpointSaver, accelerate, transformers' Trainer and Lightning all keep a
state dict. They differ in where it lies and in what stands before its names.
"""

import logging
import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from timm.models import adapt_input_conv, clean_state_dict, load_state_dict
from torch import nn

from timm_branches.model import BranchModel
from timm_branches.taxonomy import Taxonomy
from timm_branches.tensor_files import open_tensors

__all__ = ["Checkpoint", "read_state"]

_logger = logging.getLogger(__name__)

# what DDP, Lightning, smp, our tasks and hand-written loops put before a model's own names
_WRAPPERS = ("module.", "model.", "encoder.", "net.", "network.", "task.", "trainable_module.")
_SHOWN = 3


def read_state(path: str) -> dict[str, torch.Tensor]:
    """The state dict in a file of `torch.save` or safetensors; EMA weights if there are some.

    Args:
        path: The file.

    Raises:
        FileNotFoundError: No such file.
        ValueError: It cannot be read without running code of its own, or has no state dict.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"checkpoint_path={path!r}: there is no such file.")
    if path.endswith(".safetensors"):
        producer = open_tensors(path, with_tensors=False)[0].get("producer", "")
        if producer == "timm_branches.checkpoint":
            raise ValueError(
                f"checkpoint_path={path!r} is what a training resumes from: give the "
                "model.safetensors beside it, or resume with --resume."
            )
    try:
        read: Any = load_state_dict(path)
    except Exception as error:
        raise ValueError(
            f"checkpoint_path={path!r} cannot be read as a checkpoint: {error}"
        ) from error
    tensors = _tensors_of(read)
    if tensors:
        return tensors
    inner = {}
    for key, value in read.items():
        inner[key] = clean_state_dict(_tensors_of(value))
    found = [key for key, value in inner.items() if value]
    if len(found) != 1:
        raise ValueError(
            f"checkpoint_path={path!r} has no state dict that could be told: it holds "
            f"{list(read)[:10]}. Save the state dict alone, or as {{'state_dict': ...}}."
        )
    return inner[found[0]]


def _tensors_of(value: Any) -> dict[str, torch.Tensor]:
    if not isinstance(value, dict):
        return {}
    return {str(key): item for key, item in value.items() if isinstance(item, torch.Tensor)}


class Checkpoint:
    """A state dict under the names of a branch model.

    Args:
        state: Names and tensors as a file has them.
        backbone: The whole backbone, before anything is removed from it.
        path: The file, for messages.
        taxonomy: The tree that its heads know, where the file says so.

    Raises:
        ValueError: Two of its tensors have the same name, once what wrappers added is gone.
    """

    def __init__(
        self,
        state: Mapping[str, torch.Tensor],
        backbone: nn.Module,
        path: str,
        taxonomy: Taxonomy | None = None,
    ):
        self.path = path
        self.taxonomy = taxonomy
        self.of_backbone: dict[str, torch.Tensor] = {}
        self.of_heads: dict[str, torch.Tensor] = {}
        self.others: list[str] = []
        # as shapes, since parts of the backbone are removed later
        self._own = {name: value.shape for name, value in backbone.state_dict().items()}
        self._classifier, beside = _classifier_prefixes(backbone)
        self._unexpected: list[str] = []
        roots = {name.split(".")[0] for name in self._own}
        for key, value in state.items():
            name = self._own_name(key)
            bare = name.removeprefix("backbone.")
            if name.startswith("heads."):
                self._put(self.of_heads, name, value)
            elif bare in self._own:
                self._put(self.of_backbone, bare, value)
            elif bare.startswith(self._classifier):
                continue
            elif bare.split(".")[0] in roots and not bare.startswith(beside):
                self._unexpected.append(bare)
            else:
                self.others.append(key)

    def _own_name(self, key: str) -> str:
        """A name without what wrappers put before it."""
        name = key.replace("_orig_mod.", "")
        while True:
            bare = name.removeprefix("backbone.")
            known = bare in self._own or bare.startswith(self._classifier)
            wrapper = next(filter(name.startswith, _WRAPPERS), None)
            if known or name.startswith("heads.") or wrapper is None:
                return name
            name = name.removeprefix(wrapper)

    def _put(self, place: dict[str, torch.Tensor], name: str, value: torch.Tensor) -> None:
        if name in place:
            raise ValueError(
                f"{self.path} has several tensors for {name!r}, of several models perhaps: save "
                "the state dict of one."
            )
        place[name] = value

    def load_backbone(self, backbone: nn.Module, in_chans: int) -> None:
        """Fill a backbone from which everything that no tap needs was removed.

        The first convolution of a 3-channel checkpoint is adapted to other channels as timm does.

        Raises:
            ValueError: Tensors are missing, unexpected, or of another shape.
        """
        state = self._adapted(backbone, in_chans)
        own = backbone.state_dict()
        missing = []
        for name in own:
            # older checkpoints lack these counters, which no result depends on
            if name not in state and not name.endswith("num_batches_tracked"):
                missing.append(name)
        shapes = []
        for name, value in state.items():
            if value.shape != self._own[name]:
                shapes.append(f"{name} {tuple(value.shape)} for {tuple(self._own[name])}")
        if missing or shapes or self._unexpected:
            raise ValueError(
                f"{self.path} does not fit {type(backbone).__name__}: {len(missing)} tensors "
                f"missing {missing[:_SHOWN]}, {len(self._unexpected)} unexpected "
                f"{self._unexpected[:_SHOWN]}, {len(shapes)} of another shape {shapes[:_SHOWN]}"
                f"{self._hint()}."
            )
        backbone.load_state_dict({name: state[name] for name in own if name in state}, strict=False)

    def _hint(self) -> str:
        if self.of_backbone or not self.others:
            return ""
        return f"; none of its tensors, such as {self.others[0]!r}, is one of this backbone"

    def _adapted(self, backbone: nn.Module, in_chans: int) -> dict[str, torch.Tensor]:
        state = dict(self.of_backbone)
        for layer in _layers(backbone, "first_conv"):
            name = f"{layer}.weight"
            if name not in state or state[name].shape == self._own[name]:
                continue
            weight, own = state[name], self._own[name]
            # space-to-depth stems have several times the channels of an image
            from_colour = weight.ndim == 4 and weight.shape[1] * in_chans == 3 * own[1]
            if from_colour and in_chans != 3:
                state[name] = adapt_input_conv(in_chans, weight)
                _logger.info("%s: %s made for %d channels of 3.", self.path, name, in_chans)
        return state

    def load_heads(self, model: BranchModel, renamed: Iterable[str] = (), why: str = "") -> None:
        """Fill the heads that fit, and say what starts anew and what was left out.

        Args:
            model: The model.
            renamed: Heads whose classes are others than those of the file, whatever their number.
            why: What tells their classes apart.
        """
        anew: list[str] = []
        left_out = dict.fromkeys(self.others)
        of_heads = dict(self.of_heads)
        for name in model.names:
            prefix = f"{model.head_prefix(name)}."
            given = {}
            for key in list(of_heads):
                if key.startswith(prefix):
                    given[key.removeprefix(prefix)] = of_heads.pop(key)
            if self.of_heads:
                anew += _fill_head(model.head(name), name, given, name in set(renamed))
        heads = dict.fromkeys(".".join(key.split(".")[:2]) for key in of_heads)
        left_out |= heads
        parts = []
        if anew:
            parts.append(f"starts anew: {', '.join(anew)}")
        if left_out:
            names = list(left_out)
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            parts.append(f"left out of the file: {', '.join(names[:_SHOWN])}{more}")
        if parts:
            text = f"{self.path}: loaded what fits; {'; '.join(parts)}."
            _logger.warning("%s", f"{text} {why}".rstrip())


def _fill_head(
    head: nn.Module, name: str, given: dict[str, torch.Tensor], renamed: bool
) -> list[str]:
    """Load what fits of a head; the parts that do not, in words.

    A head is loaded but for its last layer if only that is of other classes.
    """
    own = head.state_dict()
    last = {key for key in own if key.startswith("fc.")}

    def fits(keys: Iterable[str]) -> bool:
        return all(key in given and given[key].shape == own[key].shape for key in keys)

    body = own.keys() - last
    # a tensor more than the head has: it is another kind of head
    if given.keys() - own.keys() or not fits(body) or not given:
        return [f"head {name!r}"]
    if renamed or not fits(last):
        head.load_state_dict({key: given[key] for key in body}, strict=False)
        return [f"the last layer of {name!r}" if body else f"head {name!r}"]
    head.load_state_dict(given)
    return []


def _layers(backbone: nn.Module, key: str) -> tuple[str, ...]:
    """Names of layers that timm's description of a backbone gives."""
    config = getattr(backbone, "pretrained_cfg", None) or {}
    value = config.get(key) or ()
    return (value,) if isinstance(value, str) else tuple(value)


def _classifier_prefixes(backbone: nn.Module) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """How tensors of a backbone's own classifier begin, and those that stand beside it."""
    layers = _layers(backbone, "classifier")
    beside = [layer.rpartition(".")[0] for layer in layers if "." in layer]
    own = tuple(f"{layer}." for layer in layers)
    return own, tuple(f"{parent}." for parent in beside)
