"""What a file says of itself is a claim, not an order: it is checked before anything is built.

A file from a stranger may say anything. Whatever names a source is refused, values are limited to
what networks have, and the network is built without memory first, so that its tensors can be
compared with those of the file before any is allocated.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import timm
import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from timm_branches.arguments import shown
from timm_branches.tensor_files import parse_json

__all__ = [
    "check_arguments",
    "check_computed_size",
    "check_preprocessing",
    "check_size",
    "check_tensors",
    "limited",
    "read_object",
]

_REQUIRED = ("model_name", "taps", "num_classes", "head", "names")
_SOURCES = {
    "cache_dir",
    "checkpoint_path",
    "file",
    "hf_hub_filename",
    "hf_hub_id",
    "pretrained",
    "source",
    "state_dict",
    "url",
}
# where a network is put is up to whoever loads it
_RUNTIME = {"device", "dtype"}
_INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming", "random")
_CROP_MODES = ("center", "squash", "border")
# no network has more layers, channels or pixels a side
_LARGEST_NUMBER = 65_536
_LONGEST_TEXT = 1_000
_LONGEST_LIST = 1_000
_DEEPEST_TREE = 100
_MOST_CLASSES = 2**24
# the largest network of timm registers 3,554 modules and parameters
_MOST_PARTS = 8_000
# of tensors that are computed, not saved, such as masks and tables of positions
_COMPUTED_BYTES = 64 * 2**20


def read_object(text: Any, what: str) -> dict[str, Any]:
    """A JSON object out of a file.

    Raises:
        ValueError: It is none.
    """
    if not isinstance(text, str):
        raise ValueError(f"{what} is missing.")
    try:
        value = parse_json(text)
    except ValueError as error:
        raise ValueError(f"{what} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{what} must be an object, got {shown(value)}.")
    return value


def check_arguments(arguments: Any) -> dict[str, Any]:
    """The arguments of `create_branch_model` that a file gives, if they can be trusted.

    Args:
        arguments: What the file says.

    Returns:
        The same arguments, but for the device.

    Raises:
        ValueError: One is missing, of a wrong type, beyond all measure, or names a place to load
            from.
    """
    if not isinstance(arguments, dict):
        raise ValueError(f"the model's arguments must be an object, got {shown(arguments)}.")
    missing = [name for name in _REQUIRED if name not in arguments]
    if missing:
        raise ValueError(f"the model's arguments lack {', '.join(missing)}.")
    for name, value in arguments.items():
        if name in _SOURCES:
            raise ValueError(f"{name}={shown(value)} is not for a file to say.")
        if not name.isidentifier():
            raise ValueError(f"{shown(name)} is not the name of an argument.")
        if name != "taxonomy":
            limit = _MOST_CLASSES if name == "num_classes" else _LARGEST_NUMBER
            _check_value(name, value, limit)
    name = arguments["model_name"]
    if not isinstance(name, str) or not timm.is_model(name.split(".")[0]):
        raise ValueError(f"model_name={shown(name)} is no architecture that timm knows.")
    _check_lists(arguments)
    _check_tree(arguments.get("taxonomy"))
    _check_sizes(arguments)
    return {name: value for name, value in arguments.items() if name not in _RUNTIME}


def _check_lists(arguments: dict[str, Any]) -> None:
    """Of each head its taps, classes, kind and name."""
    for name in ("taps", "num_classes", "head", "names"):
        value = arguments[name]
        if not isinstance(value, list) or not value:
            raise ValueError(f"{name} must be a list with an entry for each head, got {value!r}.")
    for count in arguments["num_classes"]:
        if isinstance(count, bool) or not isinstance(count, int) or count < 0:
            raise ValueError(f"num_classes must be whole numbers from 0, got {shown(count)}.")
    for head in arguments["head"]:
        if not isinstance(head, dict):
            raise ValueError(f"a head must be an object, got {shown(head)}.")
    for text in arguments["names"]:
        if not isinstance(text, str):
            raise ValueError(f"a head's name must be text, got {shown(text)}.")


def _check_tree(taxonomy: Any) -> None:
    if taxonomy is None:
        return
    if not isinstance(taxonomy, dict):
        raise ValueError(f"taxonomy must be an object, got {shown(taxonomy)}.")
    levels, leaves = taxonomy.get("levels"), taxonomy.get("leaves")
    if not isinstance(leaves, list):
        raise ValueError(f"taxonomy: leaves must be a list of paths, got {shown(leaves)}.")
    for names in ([] if levels is None else levels, *leaves):
        if not isinstance(names, list) or len(names) > _DEEPEST_TREE:
            raise ValueError(
                f"taxonomy: a path must be a list of at most {_DEEPEST_TREE} names, got "
                f"{shown(names)}."
            )
        for name in names:
            if not isinstance(name, str):
                raise ValueError(f"taxonomy: a name must be text, got {shown(name)}.")


def _check_sizes(arguments: dict[str, Any]) -> None:
    in_chans = arguments.get("in_chans")
    if in_chans is not None and not _is_whole(in_chans):
        raise ValueError(f"in_chans must be a whole number from 1, got {shown(in_chans)}.")
    size = arguments.get("img_size")
    if size is not None:
        pair = isinstance(size, list) and len(size) == 2 and all(_is_whole(side) for side in size)
        if not pair and not _is_whole(size):
            raise ValueError(f"img_size must be a side or [height, width], got {shown(size)}.")
    rate = arguments.get("drop_rate")
    if rate is not None and not (_is_number(rate) and 0 <= rate < 1):
        raise ValueError(f"drop_rate must be in [0, 1), got {shown(rate)}.")


def _check_value(name: str, value: Any, limit: int) -> None:
    """Refuse sources and excesses, wherever they stand in an argument."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key in _SOURCES:
                raise ValueError(f"{name}: {key}={shown(inner)} is not for a file to say.")
            _check_value(f"{name}: {key}", inner, limit)
    elif isinstance(value, list):
        if len(value) > _LONGEST_LIST:
            raise ValueError(
                f"{name} has {len(value):,} entries, beyond all networks (at most "
                f"{_LONGEST_LIST:,})."
            )
        for inner in value:
            _check_value(name, inner, limit)
    elif isinstance(value, str):
        if len(value) > _LONGEST_TEXT or "hf-hub:" in value or "local-dir:" in value:
            raise ValueError(f"{name}={shown(value)} is not for a file to say.")
    elif isinstance(value, (int, float)):
        check_size(f"{name}=", value, limit)


def check_size(name: str, value: Any, limit: int = _LARGEST_NUMBER) -> None:
    """Refuse a number beyond what networks have, which no file could bring back.

    Args:
        name: What it is called, such as `patch_size=`.
        value: Anything; what is no number passes.
        limit: The largest, whatever the sign.
    """
    if isinstance(value, (int, float)) and not abs(value) <= limit:
        raise ValueError(f"{name}{shown(value)} is beyond all networks (at most {limit:,}).")


def check_preprocessing(config: Any, in_chans: int) -> dict[str, Any]:
    """How images are prepared, if what a file says of it can be trusted; lists become tuples.

    Args:
        config: What the file says.
        in_chans: Channels of the model's images.

    Raises:
        ValueError: An unknown setting, or a value that makes no image.
    """
    if not isinstance(config, dict):
        raise ValueError(f"pretrained_cfg must be an object, got {shown(config)}.")
    result = {}
    for name, value in config.items():
        problem = _preprocessing_problem(name, value, in_chans)
        if problem is not None:
            raise ValueError(f"pretrained_cfg: {name}={shown(value)} {problem}.")
        result[name] = tuple(value) if isinstance(value, list) else value
    return result


def _preprocessing_problem(name: str, value: Any, in_chans: int) -> str | None:
    """What is wrong with a setting, or None."""
    numbers = isinstance(value, (list, tuple)) and all(_is_number(number) for number in value)
    if name == "input_size":
        sides = numbers and all(_is_whole(side) for side in value)
        return None if sides and len(value) == 3 else "must be channels, height and width"
    if name in ("mean", "std"):
        # those of colours may be kept by a model of grey images
        if not numbers or len(value) not in (1, 3, in_chans):
            return f"must be {in_chans} finite numbers"
        return "must be above 0" if name == "std" and min(value) <= 0 else None
    if name == "value_range":
        pair = value is None or (numbers and len(value) == 2 and value[0] < value[1])
        return None if pair else "must be the values of black and white"
    if name == "crop_pct":
        share = value is None or (_is_number(value) and 0 < value <= 10)
        return None if share else "must be a share above 0"
    if name == "raw_inputs":
        return None if isinstance(value, bool) else "must be true or false"
    choices = {"interpolation": _INTERPOLATIONS, "crop_mode": _CROP_MODES}.get(name)
    if choices is None:
        return "is not a setting of preprocessing"
    known = isinstance(value, str) and value in choices
    return None if known else f"must be one of {', '.join(choices)}"


@contextmanager
def limited(count: int) -> Iterator[None]:
    """Build a network without memory for its tensors, and give up on one without end.

    Args:
        count: Tensors that the file has.

    Raises:
        ValueError: The network has far more parts.
    """
    most = _MOST_PARTS + 10 * count
    parts = 0

    def register(*_: Any) -> None:
        nonlocal parts
        parts += 1
        if parts > most:
            raise ValueError(f"its network has more than {most:,} parts; the file has {count}.")

    hooks = [
        register_module_parameter_registration_hook(register),
        register_module_module_registration_hook(register),
    ]
    try:
        with torch.device("meta"):
            yield
    finally:
        for hook in hooks:
            hook.remove()


def check_tensors(model: nn.Module, tensors: Mapping[str, torch.Tensor], path: Any) -> None:
    """Refuse tensors that are not those of a model: other names, shapes or kinds of numbers.

    Args:
        model: The model; it may be without memory (on the meta device).
        tensors: What a file has.
        path: The file, for the message.

    Raises:
        ValueError: They do not fit.
    """
    own = model.state_dict()
    missing = sorted(own.keys() - tensors.keys())
    unexpected = sorted(tensors.keys() - own.keys())
    shapes, kinds = [], []
    for name in sorted(own.keys() & tensors.keys()):
        given, expected = tensors[name], own[name]
        if given.shape != expected.shape:
            shapes.append(
                f"{name}: {tuple(given.shape)} in the file, {tuple(expected.shape)} in the model"
            )
        # any floating-point type is fine: a model may be kept in half precision
        floating = given.is_floating_point() and expected.is_floating_point()
        if given.dtype != expected.dtype and not floating:
            kinds.append(f"{name}: {given.dtype} in the file, {expected.dtype} in the model")
    if missing or unexpected or shapes or kinds:
        raise ValueError(
            f"{path} does not fit this model: {len(missing)} tensors missing {missing[:3]}, "
            f"{len(unexpected)} unexpected {unexpected[:3]}, {len(shapes)} of another shape "
            f"{shapes[:3]}, {len(kinds)} of another type {kinds[:3]}."
        )


def check_computed_size(model: nn.Module, tensors: Mapping[str, torch.Tensor], path: Any) -> None:
    """Refuse a model that computes far more than its file has.

    Args:
        model: The model, without memory (on the meta device).
        tensors: What the file has.
        path: The file, for the message.

    Raises:
        ValueError: It does.
    """
    saved = sum(tensor.nbytes for tensor in tensors.values())
    own = model.state_dict()
    computed = sum(buffer.nbytes for name, buffer in model.named_buffers() if name not in own)
    if computed > 4 * saved + _COMPUTED_BYTES:
        raise ValueError(
            f"{path} describes a model that computes {computed:,} bytes of tables beside the "
            f"{saved:,} bytes of its tensors."
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
