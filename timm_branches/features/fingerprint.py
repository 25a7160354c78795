"""What cached features depend on, so that stale ones are told from good ones."""

import hashlib
import json
import re
from typing import Any

import timm
import torch

from timm_branches.data.datasets import HierarchicalDataset
from timm_branches.data.transforms import SampleTransform
from timm_branches.features.heads_only import feature_layout
from timm_branches.model import BranchModel
from timm_branches.tensor_files import digest_tensors

__all__ = ["describe_preprocessing", "differences", "fingerprint", "may_augment"]

_FORMAT = 1  # of the files; another one makes what was written before stale
# taps are told apart by what is read
_OF_HEADS = ("taps", "head", "names", "num_classes", "taxonomy", "drop_rate")
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


def fingerprint(
    model: BranchModel, dataset: HierarchicalDataset, views: int, dtype: torch.dtype
) -> dict[str, Any]:
    """All that a sample's features depend on, JSON-safe. Labels and heads are not among it.

    Files count as the same as long as path, size and time of change are; what is in memory is read.

    Raises:
        ValueError: A transform that does not say what it does.
        FileNotFoundError: A file of the dataset is gone.
    """
    features, _ = feature_layout(model)
    tensors = {
        name: tensor.detach().cpu()
        for name, tensor in (*model.backbone.named_parameters(), *model.backbone.named_buffers())
    }
    options = {key: value for key, value in model.config.items() if key not in _OF_HEADS}
    ids = dataset.sample_ids.numpy()
    facts = {
        "format": _FORMAT,
        "timm": timm.__version__,
        "backbone": model.reader.architecture,
        "options": options,
        "structure": hashlib.sha256(_ADDRESS.sub("", repr(model.backbone)).encode()).hexdigest(),
        "weights": digest_tensors(tensors, {}),
        "taps": {key: feature.shape for key, feature in features.items()},
        "preprocessing": describe_preprocessing(dataset),
        "data": dataset.images.identity(ids.tolist()),
        "samples": [len(ids), hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest()],
        "seed": dataset.seed,
        "views": views,
        "dtype": str(dtype).removeprefix("torch."),
    }
    # as it is read back from a file
    return json.loads(_ADDRESS.sub("", json.dumps(facts, default=repr)))


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """In what two fingerprints differ, in words: with the values where they are short."""
    found = []
    for key in new:
        if (before := old.get(key)) != new[key]:
            short = isinstance(new[key], (int, str)) and len(f"{before}{new[key]}") < 60
            found.append(f"{key} ({before}, now {new[key]})" if short else key)
    return found


def may_augment(dataset: HierarchicalDataset) -> bool:
    """Whether samples can differ from epoch to epoch.

    As far as that can be told without reading any.
    """
    sampler = getattr(dataset, "sampler", None)
    draws = sampler is not None and sampler.is_training and sampler.num_frames is not None
    transform = dataset.transform
    return draws or (transform is not None and getattr(transform, "compose", transform) is not None)


def describe_preprocessing(dataset: HierarchicalDataset) -> dict[str, Any]:
    """What a data set does with an image before the network reads it.

    Raises:
        ValueError: A transform that does not say what it does.
    """
    transform: Any = dataset.transform
    facts: dict[str, Any] = {
        "frames": repr(getattr(dataset, "sampler", None)),
        "in_chans": getattr(dataset.images, "in_chans", None),
    }
    if isinstance(transform, SampleTransform):
        try:
            compose = None if transform.compose is None else transform.compose.to_dict()
        except (ValueError, NotImplementedError) as error:  # e.g. a Lambda without a name
            raise ValueError(
                f"the augmentation cannot be told from another one: {error}"
            ) from error
        facts |= {
            "size": transform.size,
            "mean": transform.mean.flatten().tolist(),
            "std": transform.std.flatten().tolist(),
            "keeps_exact": transform.keeps_exact,
            "geometry": repr(transform.geometry),
            "compose": compose,
        }
    else:
        facts["transform"] = repr(transform)
    if _ADDRESS.search(json.dumps(facts, default=repr)):
        raise ValueError(
            f"the transform {transform!r} cannot be told from another one in a later run: make it "
            "with create_transform, or give it a __repr__ that says what it does."
        )
    return facts
