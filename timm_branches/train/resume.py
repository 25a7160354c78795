"""What a run is made of, and what has changed in it since its checkpoint was written."""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any

import torch

from timm_branches.data.bad_images import TolerantDataset
from timm_branches.features.fingerprint import describe_preprocessing
from timm_branches.task import HeadsTask, base_model
from timm_branches.train.config import FitConfig

__all__ = ["compare_runs", "describe_run"]

_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
_PATHS_AT_ONCE = 100_000

# a run goes on whatever these are
_WITHOUT_MEANING = {
    "output",
    "resume",
    "device",
    "check",
    "check_only",
    "checkpoint_minutes",
    "keep",
    "tensorboard",
    "wandb",
    "plots",
    "progress",
    "log_interval",
}
# with another value the numbers in the checkpoint belong to other tensors or to another rule
_REFUSED_SETTINGS = {"opt", "layer_decay", "freeze_backbone"}
# the rest of an epoch must be cut as its beginning was
_FIXED_INSIDE_EPOCH = {"seed", "grad_accum_steps", "batch_size", "processes", "batches", "sampler"}


def describe_run(
    task: HeadsTask,
    loader: Any,
    eval_loader: Any,
    config: FitConfig,
    mixup: Any,
    processes: int,
) -> dict[str, Any]:
    """All that a run depends on, JSON-safe, as its checkpoint keeps it.

    Args:
        task: The task.
        loader: Training batches.
        eval_loader: Validation batches, or None.
        config: Settings.
        mixup: What mixes a batch, or None.
        processes: How many train together.
    """
    model = dict(base_model(task).config)
    model.pop("taxonomy", None)  # compared by name, with the labels
    settings = asdict(config)
    # these act in sums that the checkpoint does not hold
    settings |= task.describe_settings()
    settings |= {
        "batch_size": getattr(loader, "batch_size", None),
        "batches": len(loader),
        "processes": processes,
        "sampler": type(getattr(loader, "sampler", None)).__name__,
        "mixup": None if mixup is None else _described(mixup),
    }
    for name, batches in (("training", loader), ("validation", eval_loader)):
        dataset = getattr(batches, "dataset", None)
        if isinstance(dataset, TolerantDataset):
            dataset = dataset.dataset
        settings[f"{name} transform"] = _preprocessing(dataset)
    facts = {
        "model": model,
        "settings": settings,
        "data": {
            "training": fingerprint_of(loader),
            "validation": fingerprint_of(eval_loader),
        },
    }
    # as it is read back from a file
    return json.loads(_ADDRESS.sub("", json.dumps(facts, default=repr)))


def compare_runs(
    saved: dict[str, Any], asked: dict[str, Any], source: str, inside_epoch: bool
) -> list[str]:
    """What was changed since a checkpoint, a line each: what is asked for is used.

    Args:
        saved: What the checkpoint says of its run; parts that it lacks are passed over.
        asked: The same of this run.
        source: Where the checkpoint was asked for, for messages: `--resume path`.
        inside_epoch: Whether it was written inside an epoch.

    Raises:
        ValueError: The checkpoint means something else: other data, another network or optimizer;
            or an epoch that is cut into other batches.
    """
    for name, before in saved.get("data", {}).items():
        now = asked["data"][name]
        unknown = {"count": None}  # a loader that does not show its data set
        if before != now and unknown not in (before, now):
            raise ValueError(
                f"{source} was trained with other {name} data: {_shown(before)} in the checkpoint, "
                f"{_shown(now)} now. Give it the same data, or begin a new run from its weights."
            )
    lines = []
    differences = list(_differences(saved.get("model", {}), asked["model"]))
    for name, before, now in differences:
        if "drop" not in name:
            raise ValueError(
                f"{source} is of another model or optimizer: {name} is {_shown(before)} in the "
                f"checkpoint, {_shown(now)} is asked for."
            )
        lines.append(_line(name, before, now))
    for name, before, now in _differences(saved.get("settings", {}), asked["settings"]):
        key = name.split(":")[0]
        if key in _WITHOUT_MEANING:
            continue
        if key in _REFUSED_SETTINGS:
            raise ValueError(
                f"{source} is of another model or optimizer: {_flag(name)} is {_shown(before)} in "
                f"the checkpoint, {_shown(now)} is asked for."
            )
        if inside_epoch and key in _FIXED_INSIDE_EPOCH:
            raise ValueError(
                f"{source} was written inside an epoch, which must go on as it began: "
                f"{_flag(name)} is {_shown(before)} in the checkpoint, {_shown(now)} is asked for."
            )
        lines.append(_line(_flag(name), before, now))
    return lines


def _line(name: str, before: Any, now: Any) -> str:
    return f"{name}: asked {_shown(now)}, used {_shown(now)} (the checkpoint: {_shown(before)})"


def _flag(name: str) -> str:
    """A setting as the command line has it."""
    known = name in FitConfig.__dataclass_fields__
    return f"--{name.replace('_', '-')}" if known else name


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 100 else f"{text[:60]} ... {text[-30:]}"


def _differences(before: Any, now: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Name, old and new value of each part in which two descriptions differ.

    A part that the older one lacks is passed over: its version did not know it.
    """
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted(before.keys() | now.keys()):
            if key in before or name:
                inner = f"{name}: {key}" if name else str(key)
                yield from _differences(before.get(key), now.get(key), inner)
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for old, new in zip(before, now, strict=True):
            yield from _differences(old, new, name)
    elif before != now:
        yield name, before, now


def _preprocessing(dataset: Any) -> Any:
    """What a data set does with its images, as far as that can be told."""
    if dataset is None:
        return None
    if hasattr(dataset, "images") and hasattr(dataset, "transform"):
        try:
            return describe_preprocessing(dataset)
        except ValueError:  # a function without a name
            return type(dataset.transform).__name__
    return _described(getattr(dataset, "transform", None))


def _described(value: Any) -> Any:
    """A part of a run as text: what its `repr` says, or its type and its plain attributes."""
    text = repr(value)
    if not _ADDRESS.search(text):
        return text
    plain = (bool, int, float, str, tuple, list)
    attributes = {
        key: item
        for key, item in sorted(getattr(value, "__dict__", {}).items())
        if isinstance(item, plain)
    }
    return f"{type(value).__name__}({attributes})"


def fingerprint_of(loader: Any) -> dict[str, Any] | None:
    """Count and checksum of the names and labels of a loader's samples; None without a loader.

    Files count as the same when they are called alike below the folder that holds them all, so
    that data may move.
    """
    if loader is None:
        return None
    dataset = getattr(loader, "dataset", None)
    if dataset is None or not hasattr(dataset, "__len__"):
        return {"count": None}
    if isinstance(dataset, TolerantDataset):
        dataset = dataset.dataset
    digest = hashlib.sha256()
    for piece in _pieces(dataset):
        digest.update(piece)
    return {"count": len(dataset), "sha256": digest.hexdigest()[:16]}


def _pieces(dataset: Any) -> Iterator[bytes]:
    """Names and labels of a data set, and of those that torch's wrappers hold."""
    inner = getattr(dataset, "datasets", None)
    if inner is None and hasattr(dataset, "dataset"):
        inner = [dataset.dataset]
        indices = torch.as_tensor(list(getattr(dataset, "indices", [])), dtype=torch.long)
        yield indices.numpy().tobytes()
    for part in inner or ():
        yield from _pieces(part)
    labels = getattr(dataset, "labels", getattr(dataset, "targets", None))
    if isinstance(labels, torch.Tensor):
        yield labels.detach().cpu().long().contiguous().numpy().tobytes()
    elif isinstance(labels, (list, tuple)):
        yield repr(labels).encode()
    yield from _names(dataset)


def _names(dataset: Any) -> Iterator[bytes]:
    images = getattr(dataset, "images", None)
    images = getattr(images, "images", images)
    names = getattr(images, "paths", getattr(images, "names", getattr(dataset, "names", None)))
    if names is None or callable(names):
        return
    ids: Iterable[int] = range(len(names))
    if getattr(dataset, "sample_ids", None) is not None:
        ids = dataset.sample_ids.tolist()
    ids = list(ids)
    common = len(_common_folder(names, ids))
    for start in range(0, len(ids), _PATHS_AT_ONCE):
        chunk = [str(names[index])[common:] for index in ids[start : start + _PATHS_AT_ONCE]]
        yield "\n".join(chunk).encode(errors="surrogateescape")


def _common_folder(names: Any, ids: list[int]) -> str:
    """The folder that holds all files: what their names begin with, up to a slash."""
    if not ids:
        return ""
    first = last = str(names[ids[0]])
    for index in ids:
        name = str(names[index])
        first, last = min(first, name), max(last, name)
    length = 0
    for a, b in zip(first, last, strict=False):
        if a != b:
            break
        length += 1
    return first[: first.rfind("/", 0, length) + 1]
