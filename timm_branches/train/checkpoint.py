"""Training checkpoints.

Nested state (models, optimizer, scaler, schedule) in one safetensors file, without pickle.
"""

import json
import logging
import os
import re
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch

from timm_branches.files import replace_file
from timm_branches.tensor_files import damaged, open_tensors, read_tensors, save_tensors

__all__ = ["Checkpoints", "load_state", "save_state"]

_logger = logging.getLogger(__name__)

_PRODUCER = "timm_branches.checkpoint"
_VERSION = 2
_FIRST_KEYS = {"producer", "state"}
_EARLIER = re.compile(r"checkpoint-([0-9]{4,})\.safetensors")


class Checkpoints:
    """The checkpoints of a run: `last.safetensors`, and some of earlier epochs.

    Args:
        folder: The run's folder.
        keep: How many of earlier epochs stay, as `checkpoint-0003.safetensors`.
    """

    def __init__(self, folder: Path, keep: int = 0):
        self.folder = folder
        self.keep = keep
        # the epoch that `last` is the end of; None if it was written inside one
        self._complete: int | None = None

    @property
    def last(self) -> Path:
        """The newest."""
        return self.folder / "last.safetensors"

    def earlier(self) -> list[Path]:
        """Those of earlier epochs, the newest first."""
        if not self.folder.is_dir():
            return []
        epochs = {}
        for path in self.folder.iterdir():
            match = _EARLIER.fullmatch(path.name)
            if match:
                epochs[path] = int(match.group(1))
        return sorted(epochs, key=epochs.__getitem__, reverse=True)

    def has(self, path: str) -> bool:
        """Whether a path is one of them."""
        if not path:
            return False
        return Path(path).resolve() in [own.resolve() for own in (self.last, *self.earlier())]

    def find(self, resume: str) -> tuple[str, dict[str, Any]] | None:
        """Path and state of the checkpoint to go on from; None to begin.

        Args:
            resume: A path; or 'auto' for the newest in the folder, or an earlier one where that is
                damaged; or ''.

        Raises:
            FileNotFoundError: No such file.
            ValueError: It is damaged, and so are all earlier ones.
        """
        if resume != "auto":
            return self._found(resume, load_state(resume)) if resume else None
        candidates = [self.last] if self.last.exists() else []
        failure: ValueError | None = None
        for path in candidates + self.earlier():
            try:
                state = load_state(path)
            except ValueError as error:
                failure = failure or error
                continue
            if failure is not None:
                _logger.warning("%s Going on from %s instead.", failure, path)
            return self._found(path, state)
        if failure is not None:
            raise failure
        return None

    def _found(self, path: str | Path, state: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        if Path(path).resolve() == self.last.resolve() and state.get("inside") is None:
            self._complete = state.get("epoch")
        return str(path), state

    def save(self, state: dict[str, Any]) -> None:
        """Write the newest one; the one before it is kept if it is that of a whole epoch.

        Args:
            state: Its `epoch` is the last complete one, its `inside` is None after a whole epoch.
        """
        if self.keep and self._complete is not None and self.last.exists():
            kept = self.folder / f"checkpoint-{self._complete:04d}.safetensors"
            kept.unlink(missing_ok=True)
            try:
                os.link(self.last, kept)
            except OSError:  # a file system without hard links
                replace_file(kept, partial(shutil.copyfile, self.last))
            for path in self.earlier()[self.keep :]:
                path.unlink(missing_ok=True)
        save_state(self.last, state)
        self._complete = state["epoch"] if state["inside"] is None else None


def save_state(path: str | os.PathLike, state: dict) -> None:
    """Write nested dicts, lists, numbers, strings and tensors to one file, atomically.

    Floats, integer keys and tensors come back bit for bit; tuples come back as lists.

    Raises:
        TypeError: Something that is none of these.
    """
    tensors: dict[str, torch.Tensor] = {}
    skeleton = _encode(state, tensors)
    metadata = {
        "producer": _PRODUCER,
        "version": str(_VERSION),
        "state": json.dumps(skeleton),
    }
    save_tensors(path, tensors, metadata)


def load_state(path: str | os.PathLike) -> dict:
    """Read what :func:`save_state` wrote; tensors are on the CPU.

    Raises:
        FileNotFoundError: No such file.
        ValueError: A cut or foreign file.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: there is no such checkpoint.")
    metadata, tensors = open_tensors(path, with_tensors=False)
    if metadata.keys() == _FIRST_KEYS and metadata["producer"] == _PRODUCER:
        # the first version had no checksum
        metadata, tensors = open_tensors(path)
    else:
        checked, tensors = read_tensors(path, _PRODUCER, _VERSION)
        if checked is None:
            raise ValueError(
                f"{path} is not a training checkpoint of timm_branches. (To start from a model's "
                "weights, give it as the checkpoint of a new run.)."
            )
        metadata = checked
    try:
        return _decode(json.loads(metadata["state"]), tensors)
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise damaged(path, f"its state cannot be read ({error!r})") from error


def _encode(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        name = f"t{len(tensors)}"
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {"tensor": name}
    if isinstance(value, dict):  # as pairs: JSON turns integer keys into strings
        for key in value:
            if not (key is None or isinstance(key, (bool, int, float, str))):
                raise TypeError(
                    f"a checkpoint cannot hold a dict with a key of type {type(key).__name__}: "
                    f"{key!r}."
                )
        return {"dict": [[k, _encode(v, tensors)] for k, v in value.items()]}
    if isinstance(value, (list, tuple)):
        return [_encode(v, tensors) for v in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"a checkpoint cannot hold {type(value).__name__}: {value!r}.")


def _decode(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, dict):
        if "tensor" in value:
            return tensors[value["tensor"]]
        return {k: _decode(v, tensors) for k, v in value["dict"]}
    if isinstance(value, list):
        return [_decode(v, tensors) for v in value]
    return value
