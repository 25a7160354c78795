"""Training checkpoints.

Nested state (models, optimizer, scaler, schedule) in one safetensors file, without pickle.
"""

import json
import os
from typing import Any

import torch

from timm_branches.tensor_files import damaged, open_tensors, read_tensors, save_tensors

__all__ = ["load_state", "save_state"]

_PRODUCER = "timm_branches.checkpoint"
_VERSION = 2
_FIRST_KEYS = {"producer", "state"}


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
                "weights, give it as the checkpoint of a new run.)"
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
                    f"{key!r}"
                )
        return {"dict": [[k, _encode(v, tensors)] for k, v in value.items()]}
    if isinstance(value, (list, tuple)):
        return [_encode(v, tensors) for v in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"a checkpoint cannot hold {type(value).__name__}: {value!r}")


def _decode(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, dict):
        if "tensor" in value:
            return tensors[value["tensor"]]
        return {k: _decode(v, tensors) for k, v in value["dict"]}
    if isinstance(value, list):
        return [_decode(v, tensors) for v in value]
    return value
