"""The lookup tables behind a :class:`Taxonomy`.

Every level's class index of each leaf and of each node.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from timm_branches.taxonomy.paths import NodePath

__all__ = ["LevelTables", "as_labels", "build_tables", "label_row"]


class LevelTables(NamedTuple):
    """Tensors that labels index. An extra last row makes index -1, "unknown", read as all -1."""

    leaf_index: dict[NodePath, int]  # leaf -> its index
    node_index: dict[NodePath, int]  # node -> its class index on its level
    leaf: torch.Tensor  # (leaves + 1, L)
    # per level (nodes + 1, L): each node's own and ancestors' indices
    ancestors: tuple[torch.Tensor, ...]
    is_leaf: tuple[torch.Tensor, ...]  # per level (nodes,) bool
    heights: tuple[torch.Tensor, ...]  # per level (nodes,): steps down to the deepest leaf


def build_tables(leaves: Sequence[NodePath], nodes: Sequence[Sequence[NodePath]]) -> LevelTables:
    """The tables of a forest with these leaves, and these nodes on each level."""
    node_index: dict[NodePath, int] = {}
    for level_paths in nodes:
        node_index |= {path: index for index, path in enumerate(level_paths)}
    leaf_index = {path: i for i, path in enumerate(leaves)}

    def rows(paths: Sequence[NodePath]) -> torch.Tensor:
        # device='cpu': a model built under torch.device('meta') must not take the tables along
        data = [label_row(path, node_index, len(nodes)) for path in paths]
        return torch.tensor([*data, [-1] * len(nodes)], dtype=torch.long, device="cpu")

    are_leaves = []
    for paths in nodes:
        flags = [path in leaf_index for path in paths]
        are_leaves.append(torch.tensor(flags, device="cpu"))
    is_leaf = tuple(are_leaves)
    leaf = rows(leaves)
    depth = (leaf >= 0).sum(1)
    heights = []
    for level, paths in enumerate(nodes):
        below = leaf[:, level] >= 0
        deepest = torch.zeros(len(paths), dtype=torch.long, device="cpu")
        heights.append(
            deepest.scatter_reduce(0, leaf[below, level], depth[below], "amax") - level - 1
        )
    return LevelTables(
        leaf_index, node_index, leaf, tuple(map(rows, nodes)), is_leaf, tuple(heights)
    )


def label_row(path: NodePath, node_index: Mapping[NodePath, int], num_levels: int) -> list[int]:
    """The class of a path on each level, -1 below its end."""
    row = [-1] * num_levels
    for depth in range(len(path)):
        row[depth] = node_index[path[: depth + 1]]
    return row


def as_labels(labels: Any, count: int, what: str) -> torch.Tensor:
    """Labels as a LongTensor, after making sure that all are in [-1, count)."""
    if not isinstance(labels, torch.Tensor):
        try:
            labels = torch.as_tensor(labels, device="cpu")
        except (RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"{what} must be an integer, got {labels!r}.") from error
    if labels.numel() == 0:  # an empty list has no integer type
        return labels.long()
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"{what} must be an integer, got a tensor of {labels.dtype}.")
    labels = labels.long()
    wrong = (labels < -1) | (labels >= count)
    if wrong.any():
        raise ValueError(
            f"{what} {int(labels[wrong][0])} is out of range; legal are 0 to {count - 1}, and -1 "
            "for unknown."
        )
    return labels
