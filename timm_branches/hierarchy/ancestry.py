"""Whether labels are what a taxonomy can have."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from timm_branches.taxonomy.taxonomy import Taxonomy

__all__ = [
    "check_label_range",
    "check_labels",
]


def check_labels(labels: torch.Tensor, taxonomy: Taxonomy, batch: int) -> None:
    """Raise a ValueError unless labels are (batch, L) indices of classes, or -1."""
    if labels.shape != (batch, taxonomy.num_levels) or labels.is_floating_point():
        raise ValueError(
            f"labels must be integers of shape ({batch}, {taxonomy.num_levels}), one column per "
            f"level, got {tuple(labels.shape)} of {labels.dtype}."
        )
    check_label_range(labels, taxonomy.levels, taxonomy.num_classes)


def check_label_range(
    labels: torch.Tensor, levels: Sequence[str], num_classes: Sequence[int]
) -> None:
    """Raise a ValueError if labels (N, L) are out of their level's range.

    Only on the CPU: elsewhere the check would wait for the device. A compiled graph has no place
    for it.
    """
    if labels.device.type != "cpu" or torch.compiler.is_compiling():
        return
    for label, level, classes in zip(labels.unbind(1), levels, num_classes, strict=True):
        wrong = label[(label < -1) | (label >= classes)]
        if len(wrong):
            raise ValueError(
                f"label {int(wrong[0])} of level {level!r} is out of range; legal are 0 to "
                f"{classes - 1}, and -1 for unknown."
            )
