"""What losses need to know of labelled paths: heights, the leaves below, and sums over these."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from timm_branches.taxonomy.taxonomy import Taxonomy

__all__ = [
    "check_label_range",
    "check_labels",
    "complete_paths",
    "deepest",
    "path_heights",
    "path_log_probabilities",
    "soft_targets",
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

    Only on the CPU: elsewhere the check would wait for the device.
    """
    if labels.device.type != "cpu":
        return
    for label, level, classes in zip(labels.unbind(1), levels, num_classes, strict=True):
        wrong = label[(label < -1) | (label >= classes)]
        if len(wrong):
            raise ValueError(
                f"label {int(wrong[0])} of level {level!r} is out of range; legal are 0 to "
                f"{classes - 1}, and -1 for unknown."
            )


def complete_paths(labels: torch.Tensor, taxonomy: Taxonomy) -> torch.Tensor:
    """Label rows (N, L) with gaps above a known class filled in.

    A class determines its ancestors.
    """
    columns = list(labels.long().unbind(1))
    for level in range(taxonomy.num_levels - 1, 0, -1):
        parent = taxonomy.parents[level].to(labels.device)[columns[level].clamp(min=0)]
        columns[level - 1] = torch.where(columns[level] >= 0, parent, columns[level - 1])
    return torch.stack(columns, 1)


def path_heights(paths: torch.Tensor, taxonomy: Taxonomy) -> torch.Tensor:
    """The height of each class of the paths (N, L); of unknown ones, any."""
    heights = [height.to(paths.device) for height in taxonomy.heights]
    labels = paths.clamp(min=0).unbind(1)
    columns = [height[label] for height, label in zip(heights, labels, strict=True)]
    return torch.stack(columns, 1)


def deepest(values: torch.Tensor, paths: torch.Tensor) -> torch.Tensor:
    """The value (N,) of the deepest known class, of values (N, L) for the whole path."""
    depth = (paths >= 0).sum(1, keepdim=True)
    return values.gather(1, (depth - 1).clamp(min=0))[:, 0]


def path_log_probabilities(
    log_p: torch.Tensor, paths: torch.Tensor, taxonomy: Taxonomy
) -> torch.Tensor:
    """Log p of the classes of the paths (N, L); 0 where unknown.

    These are the sums of their leaves' probabilities. Only leaves below these classes are read,
    padded to the largest class of the level: at 10,000 leaves this is some twenty times quicker
    than sums over all leaves for every level.

    Args:
        log_p: (N, leaves).
        paths: (N, L), -1 where unknown.
        taxonomy: The tree.
    """
    table = taxonomy.leaf_table  # (leaves, L)
    device = log_p.device
    order = torch.arange(len(table), device="cpu")
    for column in table.T.flip(0):
        order = order[column[order].argsort(stable=True)]
    # depth first: the leaves below a class are neighbours now
    columns = []  # for each level (N, largest class): places of the leaves in this order
    inside = []  # which of these are leaves below the class
    for level, classes in enumerate(taxonomy.num_classes):
        reaches = (table[order, level] >= 0).nonzero()[:, 0]
        node = table[order[reaches], level]
        size = node.bincount(minlength=classes)
        first = torch.full((classes,), len(table), device="cpu").scatter_reduce(
            0, node, reaches, "amin"
        )
        label = paths[:, level].clamp(min=0)
        step = torch.arange(int(size.max()), device=device)
        columns.append((first.to(device)[label, None] + step).clamp(max=len(table) - 1))
        inside.append(step < size.to(device)[label, None])
    leaves = log_p.gather(1, order.to(device)[torch.cat(columns, 1)])
    leaves = leaves.masked_fill(~torch.cat(inside, 1), -torch.inf)
    widths = [mask.shape[1] for mask in inside]
    sums = [_log_sum_exp(of_level) for of_level in leaves.split(widths, 1)]
    return torch.where(paths >= 0, torch.stack(sums, 1), 0)


def _log_sum_exp(values: torch.Tensor) -> torch.Tensor:
    """As torch's over dim 1, but without a gradient of nan where all are -inf."""
    top = values.detach().amax(1)
    top = top.where(top.isfinite(), 0)
    total = (values - top[:, None]).exp().sum(1)
    log_total = total.where(total > 0, 1).log() + top
    return log_total.where(total > 0, -torch.inf)


def soft_targets(
    paths: torch.Tensor, taxonomy: Taxonomy, beta: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Soft labels of paths (N, L).

    Returns:
        The labels (N, leaves), and which leaves (N, leaves) are below the deepest known class.
    """
    # how many levels each leaf shares with the path
    shared = torch.zeros(len(paths), taxonomy.num_leaves, dtype=torch.uint8, device=paths.device)
    leaf_columns = taxonomy.leaf_table.T.to(paths.device, torch.int32)  # (L, leaves)
    for leaves, label in zip(leaf_columns, paths.int().unbind(1), strict=True):
        shared += leaves == label.masked_fill(label < 0, -2)[:, None]  # -1 is nobody's ancestor
    # the root above all comes first
    heights = F.pad(path_heights(paths, taxonomy), (1, 0), value=taxonomy.num_levels)
    depth = (paths >= 0).sum(1, keepdim=True)
    # heights above the label's own: the largest exponent is 0, however large beta is
    rise = (heights - heights.gather(1, depth)).to(dtype) / taxonomy.num_levels
    target = (-beta * rise).exp().gather(1, shared.long())
    return target / target.sum(1, keepdim=True), shared == depth
