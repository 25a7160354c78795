"""Datasets with labels on several levels, their transforms, loaders and mixup.

Names are imported when they are first used, so that importing this package is cheap: what is not needed
(albumentations, scikit-learn, torchvision's datasets, OpenCV) is never loaded.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from timm_branches.data.clip_loader import ClipBatch, collate_clips, create_clip_loader
    from timm_branches.data.clip_sampling import FrameSampler
    from timm_branches.data.clips import (
        ClipDataset,
        ClipSubset,
        create_clip_dataset,
        create_clip_splits,
        split_clips,
    )
    from timm_branches.data.datasets import (
        HierarchicalDataset,
        Subset,
        coarsen_labels,
        create_dataset,
        create_splits,
        split_dataset,
    )
    from timm_branches.data.feature_heads import HeadsOnly
    from timm_branches.data.features import FeatureDataset, cache_features
    from timm_branches.data.loader import EpochSampler, Loader, create_loader
    from timm_branches.data.mixup import HierarchicalMixup, split_levels
    from timm_branches.data.pairs import DenoisingDataset, PairTransform, SegmentationDataset
    from timm_branches.data.transforms import SampleTransform, create_transform

__all__ = [
    "ClipBatch",
    "ClipDataset",
    "ClipSubset",
    "DenoisingDataset",
    "EpochSampler",
    "FeatureDataset",
    "FrameSampler",
    "HeadsOnly",
    "HierarchicalDataset",
    "HierarchicalMixup",
    "Loader",
    "PairTransform",
    "SampleTransform",
    "SegmentationDataset",
    "Subset",
    "cache_features",
    "coarsen_labels",
    "collate_clips",
    "create_clip_dataset",
    "create_clip_loader",
    "create_clip_splits",
    "create_dataset",
    "create_loader",
    "create_splits",
    "create_transform",
    "split_clips",
    "split_dataset",
    "split_levels",
]

_HOMES = {
    "clip_loader": ("ClipBatch", "collate_clips", "create_clip_loader"),
    "clip_sampling": ("FrameSampler",),
    "clips": ("ClipDataset", "ClipSubset", "create_clip_dataset", "create_clip_splits", "split_clips"),
    "datasets": ("HierarchicalDataset", "Subset", "coarsen_labels", "create_dataset", "create_splits",
                 "split_dataset"),
    "feature_heads": ("HeadsOnly",),
    "features": ("FeatureDataset", "cache_features"),
    "loader": ("EpochSampler", "Loader", "create_loader"),
    "mixup": ("HierarchicalMixup", "split_levels"),
    "pairs": ("DenoisingDataset", "PairTransform", "SegmentationDataset"),
    "transforms": ("SampleTransform", "create_transform"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
