"""Tables that follow from a tree: made once for a tree and device, and kept as long as the tree."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch.utils.weak import WeakIdKeyDictionary

from timm_branches.taxonomy.taxonomy import Taxonomy

__all__ = ["IndexTables", "TreeLevel", "index_tables", "kept_by_tree"]

T = TypeVar("T")
Made = TypeVar("Made", covariant=True)


class Kept(Protocol[Made]):
    """What :func:`kept_by_tree` returns."""

    def __call__(self, taxonomy: Taxonomy, device: torch.device | str = "cpu") -> Made:
        """The tables of the tree on the device."""
        ...


def kept_by_tree(build: Callable[[Taxonomy, torch.device], T]) -> Kept[T]:
    """A function that builds tables of a tree on a device, so that it builds them once.

    A step of training that finds its tables on the device copies nothing and waits for nothing.

    Args:
        build: From the tree and the device to its tables.

    Returns:
        The same function; from its second call for a tree and device on it returns what is there.
    """
    # keyed by one of the taxonomy's tensors: hashing the taxonomy itself means hashing every path
    kept: WeakIdKeyDictionary = WeakIdKeyDictionary()

    @torch.compiler.assume_constant_result  # a compiled graph holds the tables as constants
    def get(taxonomy: Taxonomy, device: torch.device | str = "cpu") -> T:
        by_device = kept.setdefault(taxonomy.tables.leaf, {})
        device = torch.device(device)
        if device not in by_device:
            with torch.inference_mode(False):  # else a later training step could not use them
                by_device[device] = build(taxonomy, device)
        return by_device[device]

    return get


class TreeLevel(NamedTuple):
    """Index tables of one level."""

    parents: torch.Tensor  # (K,): on the level above; 0, the root, on the first
    by_parent: torch.Tensor  # (K,): the level's nodes, sorted by parent
    first_child: torch.Tensor  # (nodes above,): where a node's children begin in `by_parent`
    num_children: torch.Tensor  # (nodes above,)
    max_children: int
    leaf_nodes: torch.Tensor  # the nodes that are leaves
    leaves: torch.Tensor  # their leaf indices
    inner_nodes: torch.Tensor  # the others
    drop: torch.Tensor  # (K,) float: height of the parent minus the node's own


class IndexTables(NamedTuple):
    """Index tables of a taxonomy."""

    levels: tuple[TreeLevel, ...]
    paths: torch.Tensor  # (leaves, L)
    # puts the levels' leaves, listed level by level, into order; None if they are
    order: torch.Tensor | None


@kept_by_tree
def index_tables(taxonomy: Taxonomy, device: torch.device) -> IndexTables:
    """The tables of a tree on a device."""
    paths, heights = taxonomy.leaf_table, taxonomy.heights
    depths = (paths >= 0).sum(1)
    levels, listed = [], []
    above = torch.tensor([taxonomy.num_levels], device="cpu")  # heights on the level above
    for depth, (parents, height) in enumerate(zip(taxonomy.parents, heights, strict=True)):
        parents = parents.clamp(min=0)
        counts = parents.bincount(minlength=len(above))
        ends_here = (depths == depth + 1).nonzero()[:, 0]
        leaf_nodes, order = paths[ends_here, depth].sort()
        listed.append(ends_here[order])
        levels.append(
            TreeLevel(
                parents=parents.to(device),
                by_parent=parents.argsort(stable=True).to(device),
                first_child=(counts.cumsum(0) - counts).to(device),
                num_children=counts.to(device),
                max_children=int(counts.max()),
                leaf_nodes=leaf_nodes.to(device),
                leaves=listed[-1].to(device),
                inner_nodes=height.nonzero()[:, 0].to(device),
                drop=(above[parents] - height).float().to(device),
            )
        )
        above = height
    order = torch.cat(listed).argsort()
    ordered = bool((order.diff() > 0).all())
    # a copy: what is kept must not hold on to the tensor that it is kept by
    own = paths.to(device, copy=True)
    return IndexTables(tuple(levels), own, None if ordered else order.to(device))
