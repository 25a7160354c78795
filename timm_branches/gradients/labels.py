"""Whether a batch's labels fit the levels: their number, their range, and who is whose parent."""

from collections.abc import Sequence
from itertools import permutations

import torch

from timm_branches.taxonomy import Taxonomy

__all__ = ["label_problems"]

_MOST_LEVELS = 6  # of more the orders of the columns are not tried, there are too many


def label_problems(
    labels: torch.Tensor, names: Sequence[str], classes: Sequence[int], taxonomy: Taxonomy | None
) -> tuple[list[str], bool]:
    """What is wrong with labels (B, L), in sentences.

    And whether a loss can be computed with them at all.

    Args:
        labels: Class indices, -1 for unknown.
        names: The L levels.
        classes: Their numbers of classes.
        taxonomy: Of these levels, if there is one: the known labels of a row must be one path in
            it.
    """
    if labels.is_floating_point():  # soft labels, whose shape the task checks
        return [], True
    if labels.ndim != 2 or labels.shape[1] != len(names):
        return [
            f"labels have the shape {tuple(labels.shape)}, the levels are {list(names)}: give one "
            f"column for each, (B, {len(names)})."
        ], False
    columns = list(labels.cpu().unbind(1))
    outside = [
        i
        for i, (column, count) in enumerate(zip(columns, classes, strict=True))
        if not _within(column, count)
    ]
    hint = _hint(columns, names, classes, taxonomy)
    if outside:
        which = "; ".join(
            f"those of {names[i]!r} go from {int(columns[i].min())} to {int(columns[i].max())}, "
            f"its head has {classes[i]} classes"
            for i in outside
        )
        return [
            f"labels are out of range: {which}. "
            f"{hint or 'Legal are 0 to classes - 1, and -1 for unknown.'}"
        ], False
    if taxonomy is None:
        return [], True
    for level in range(1, len(names)):
        wrong = _orphans(columns[level - 1], columns[level], taxonomy, level)
        if int(wrong.sum()):
            row = int(wrong.nonzero()[0])
            child, parent = int(columns[level][row]), int(columns[level - 1][row])
            right = int(taxonomy.parents[level][child])
            remedy = (
                hint or "Make the labels with taxonomy.expand(leaf), in the order of its leaves."
            )
            return [
                f"in {int(wrong.sum())} of {len(labels)} rows the label of {names[level]!r} does "
                f"not lie under that of {names[level - 1]!r}: row {row} has {child} under "
                f"{parent}, in the taxonomy its parent is {right}. {remedy}"
            ], True
    return [], True


def _within(column: torch.Tensor, count: int) -> bool:
    return not column.numel() or (int(column.min()) >= -1 and int(column.max()) < count)


def _orphans(
    above: torch.Tensor, below: torch.Tensor, taxonomy: Taxonomy, level: int
) -> torch.Tensor:
    """Rows (B,) whose two labels are known and are not parent and child."""
    parents = taxonomy.parents[level].cpu()
    return (above >= 0) & (below >= 0) & (parents[below.clamp(min=0)] != above)


def _fits(
    columns: Sequence[torch.Tensor],
    levels: Sequence[int],
    classes: Sequence[int],
    taxonomy: Taxonomy | None,
) -> bool:
    """Whether these columns can be the labels of these levels."""
    if not all(
        _within(column, classes[level]) for column, level in zip(columns, levels, strict=True)
    ):
        return False
    return taxonomy is None or not any(
        bool(_orphans(columns[i - 1], columns[i], taxonomy, levels[i]).any())
        for i in range(1, len(levels))
        if levels[i] == levels[i - 1] + 1
    )


def _hint(
    columns: list[torch.Tensor],
    names: Sequence[str],
    classes: Sequence[int],
    taxonomy: Taxonomy | None,
) -> str:
    """What the mistake seems to be; empty if nothing fits."""
    count = len(columns)
    every = range(count)
    if _fits(columns, every, classes, taxonomy):
        return ""
    known = [column[column >= 0] for column in columns]
    from_one = all(len(column) and int(column.min()) >= 1 for column in known)
    lowered = [column - 1 for column in columns]
    if from_one and _fits(lowered, every, classes, taxonomy):
        return "They seem to count from 1: subtract 1."
    orders = permutations(every) if 1 < count <= _MOST_LEVELS else ()
    for order in orders:
        if _fits([columns[i] for i in order], every, classes, taxonomy):
            return (
                "The columns fit in another order: "
                f"{', '.join(names[i] for i in _inverse(order))}; are heads or "
                "columns swapped?"
            )
    for shift, what in ((1, "coarser"), (-1, "finer")):
        taken = every[1:] if shift == 1 else every[:-1]
        levels = [i - shift for i in taken]
        if len(levels) and _fits([columns[i] for i in taken], levels, classes, taxonomy):
            return (
                f"They seem to be shifted by one level: column {taken[0]} fits "
                f"{names[levels[0]]!r}, the next "
                f"{what} level than that of its head."
            )
    return ""


def _inverse(order: Sequence[int]) -> list[int]:
    """What level each column is, where column order[k] is level k."""
    return sorted(range(len(order)), key=lambda level: order[level])
