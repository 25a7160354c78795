"""What dense outputs (segmentation, restoration) need beside a decoder head: losses, metrics, inference in tiles.

Names are imported when they are first used, as in :mod:`timm_branches.data`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from timm_branches.dense.baseline import PixelBaseline
    from timm_branches.dense.losses import (
        charbonnier_loss,
        dice_loss,
        get_dense_loss,
        median_frequency_weights,
        pixel_cross_entropy,
    )
    from timm_branches.dense.metrics import SegmentationEvaluator
    from timm_branches.dense.restoration import (
        RestorationEvaluator,
        peak_signal_noise_ratio,
        structural_similarity,
    )
    from timm_branches.dense.samples import package_photographs, package_segmentation
    from timm_branches.dense.tiles import tiled_inference

__all__ = [
    "PixelBaseline",
    "RestorationEvaluator",
    "SegmentationEvaluator",
    "charbonnier_loss",
    "dice_loss",
    "get_dense_loss",
    "median_frequency_weights",
    "package_photographs",
    "package_segmentation",
    "peak_signal_noise_ratio",
    "pixel_cross_entropy",
    "structural_similarity",
    "tiled_inference",
]

_HOMES = {
    "baseline": ("PixelBaseline",),
    "losses": ("charbonnier_loss", "dice_loss", "get_dense_loss", "median_frequency_weights", "pixel_cross_entropy"),
    "metrics": ("SegmentationEvaluator",),
    "restoration": ("RestorationEvaluator", "peak_signal_noise_ratio", "structural_similarity"),
    "samples": ("package_photographs", "package_segmentation"),
    "tiles": ("tiled_inference",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
