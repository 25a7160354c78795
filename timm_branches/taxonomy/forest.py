"""The nodes of a label hierarchy, and every level's label of a sample.

All lookups are in precomputed tables.

It knows nothing of networks or images, nor of where a hierarchy comes from: that is `taxonomy.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from numbers import Integral
from typing import Any

import torch

from timm_branches.arguments import as_items
from timm_branches.taxonomy.paths import (
    NodePath,
    by_end,
    check_leaves,
    check_levels,
    check_order,
    display_names,
    draw,
    find,
)
from timm_branches.taxonomy.tables import LevelTables, as_labels, build_tables, label_row

__all__ = ["Forest"]


class Forest:
    """What can be asked of a :class:`Taxonomy`, where arguments and attributes are documented."""

    __slots__ = ("_ends", "tables", "classes", "leaves", "levels", "nodes")

    classes: tuple[tuple[str, ...], ...]
    leaves: tuple[NodePath, ...]
    levels: tuple[str, ...]
    nodes: tuple[tuple[NodePath, ...], ...]
    tables: LevelTables
    # what by_end says of leaves and of nodes, once asked
    _ends: dict[str, dict[str, list[NodePath]]]

    def __init__(
        self,
        leaves: Iterable[str | Sequence[str]],
        levels: Sequence[str] | None = None,
        order: Sequence[Sequence[str | Sequence[str]] | None] | None = None,
    ) -> None:
        paths = check_leaves(leaves)
        depth = max(map(len, paths))
        nodes = []
        for level in range(1, depth + 1):
            starts = (path[:level] for path in paths if len(path) >= level)
            nodes.append(list(dict.fromkeys(starts)))
        put = object.__setattr__  # __setattr__ refuses, see there
        put(self, "leaves", paths)
        put(self, "levels", check_levels(levels, depth))
        put(self, "nodes", check_order(self.levels, nodes, order))
        put(self, "classes", tuple(map(display_names, self.nodes)))
        put(self, "tables", build_tables(self.leaves, self.nodes))
        put(self, "_ends", {})

    # ---- what it is made of

    @property
    def num_levels(self) -> int:
        """Number of levels, L."""
        return len(self.levels)

    depth = num_levels

    @property
    def num_classes(self) -> tuple[int, ...]:
        """Number of nodes on each level: the sizes of the branch classifiers."""
        return tuple(map(len, self.nodes))

    @property
    def num_leaves(self) -> int:
        """Number of leaves: the number of the dataset's classes."""
        return len(self.leaves)

    @property
    def leaf_names(self) -> tuple[str, ...]:
        """The leaves' display names, told apart from each other across all levels."""
        return display_names(self.leaves)

    @property
    def parents(self) -> tuple[torch.Tensor, ...]:
        """For each level l, a LongTensor (num_classes[l],) of the parents' indices on level l - 1.

        -1 for roots.
        """
        return (
            torch.full((self.num_classes[0],), -1, device="cpu"),
            *(table[:-1, level].clone() for level, table in enumerate(self.tables.ancestors[1:])),
        )

    @property
    def leaf_table(self) -> torch.Tensor:
        """LongTensor (num_leaves, L).

        Each leaf's class index on each level, -1 below a shallow leaf's own level.
        """
        return self.tables.leaf[:-1].clone()

    @property
    def heights(self) -> tuple[torch.Tensor, ...]:
        """Each node's steps down to its deepest leaf, a LongTensor (num_classes[l],) a level.

        They are 0 for a leaf.

        The root above all, which joins the trees of the forest, has height L.
        """
        return tuple(height.clone() for height in self.tables.heights)

    def level_index(self, level: str | int) -> int:
        """The index of a level given by name or index.

        Raises:
            ValueError: if there is no such level; the message lists the levels.
        """
        if isinstance(level, str) and level in self.levels:
            return self.levels.index(level)
        if (
            isinstance(level, Integral)
            and not isinstance(level, bool)
            and 0 <= level < self.num_levels
        ):
            return int(level)
        raise ValueError(
            f"no level {level!r}; the levels are {', '.join(map(repr, self.levels))} "
            f"(indices 0 to {self.num_levels - 1})."
        )

    # ---- labels

    def expand(
        self, labels: torch.Tensor | Sequence[Any] | int, level: str | int | None = None
    ) -> torch.Tensor:
        """The labels of all levels.

        Args:
            labels: integers of any shape: leaf indices, or class indices on `level`. -1 is
                "unknown".
            level: name or index of the level that `labels` belong to; None if they are leaf
                indices.

        Returns:
            LongTensor (..., L) on the labels' device. -1 on levels below the label (below a shallow
            leaf, or below `level`), and everywhere where the label is -1.

        Raises:
            ValueError: if a label is not an integer or out of range, or there is no such level.

        Example:
            >>> from timm_branches import Taxonomy
            >>> tree = Taxonomy(['animal/cat', 'animal/dog', 'transport/ship'])
            >>> tree.expand([[0, 2], [1, -1]]).tolist()
            [[[0, 0], [1, 2]], [[0, 1], [-1, -1]]]
            >>> tree.expand(1, level=0).tolist()
            [1, -1]
        """
        if level is None:
            table, what = self.tables.leaf, "leaf label"
        else:
            depth = self.level_index(level)
            table, what = self.tables.ancestors[depth], f"label of level {self.levels[depth]!r}"
        labels = as_labels(labels, len(table) - 1, what)
        return table.to(labels.device)[labels]

    def encode(self, names: str | Iterable[str | Sequence[str]]) -> torch.Tensor:
        """Leaf indices of names.

        Args:
            names: leaves, each a path as a tuple of names or as 'a/b/c', or the end of a path ('c',
                'b/c') that fits one leaf only. A text that is some leaf's whole path means that
                leaf. A single text gives one index.

        Returns:
            LongTensor (N,), or () for a single text.

        Raises:
            ValueError: if a name is unknown, ambiguous or not a leaf; the message names what comes
                close.

        Example:
            >>> from timm_branches import Taxonomy
            >>> tree = Taxonomy(['animal/cat', 'animal/dog', 'transport/ship'])
            >>> tree.encode(['ship', 'animal/cat'])
            tensor([2, 0])
        """
        single = isinstance(names, str)
        at = self.tables.leaf_index
        items = [names] if single else as_items("names", names, "['animal/cat', 'animal/dog']")
        indices = [at[self._find(name, "leaves")] for name in items]
        result = torch.tensor(indices, dtype=torch.long, device="cpu")
        return result[0] if single else result

    def encode_partial(self, paths: Iterable[str | Sequence[str]]) -> torch.Tensor:
        """Label rows of nodes on any level, for samples whose label is only known coarsely.

        Args:
            paths: nodes, written as for :meth:`encode`; inner nodes are welcome.

        Returns:
            LongTensor (N, L): the class index on each level down to the node's own, -1 below.

        Raises:
            ValueError: if a name is unknown or ambiguous.

        Example:
            >>> from timm_branches import Taxonomy
            >>> tree = Taxonomy(['animal/cat', 'animal/dog', 'transport/ship'])
            >>> tree.encode_partial(['animal', 'ship']).tolist()
            [[0, -1], [1, 2]]
        """
        found = [self._find(name, "nodes") for name in paths]
        at = self.tables.node_index
        rows = [label_row(path, at, self.num_levels) for path in found]
        return torch.tensor(rows, dtype=torch.long, device="cpu").reshape(-1, self.num_levels)

    def _find(self, name: Any, kind: str) -> NodePath:
        """The path of the leaf or node ('leaves', 'nodes') that is meant by a name."""
        nodes = chain.from_iterable(self.nodes)
        if kind not in self._ends:
            self._ends[kind] = by_end(self.leaves if kind == "leaves" else nodes)
        return find(name, self._ends[kind], nodes)

    def translate(self, labels: torch.Tensor | Sequence[Any] | int, other: Forest) -> torch.Tensor:
        """Leaf labels of this tree as leaf labels of another with leaves in common.

        The other may be pruned, merged or reordered.

        Args:
            labels: leaf indices of this tree, integers of any shape; -1 is "unknown".
            other: the other tree. A leaf is the same if its path is.

        Returns:
            LongTensor of the same shape and device: leaf indices of `other`; -1 for a leaf that it
                does not have, and
            where the label is -1. With `range(tree.num_leaves)` as labels it is the table from old
            to new indices.

        Raises:
            ValueError: if a label is not an integer or out of range.

        Example:
            >>> from timm_branches import Taxonomy
            >>> tree = Taxonomy(['animal/cat', 'animal/dog', 'transport/ship'])
            >>> tree.translate([0, 1, 2, -1], tree.prune(['dog', 'ship'])).tolist()
            [-1, 0, 1, -1]
        """
        at = other.tables.leaf_index
        table = torch.tensor([*(at.get(path, -1) for path in self.leaves), -1], device="cpu")
        labels = as_labels(labels, self.num_leaves, "leaf label")
        return table.to(labels.device)[labels]

    # ---- between levels

    def leaf_to_level(self, level: str | int) -> torch.Tensor:
        """The 0/1 matrix that sums leaf probabilities up to a level.

        Args:
            level: name or index.

        Returns:
            Float tensor (num_leaves, num_classes[level]): `leaf_probabilities @ matrix` are the
                level's probabilities.
            A leaf that ends above the level has a row of zeros there, so on uneven trees they can
            sum to less than 1.
        """
        depth = self.level_index(level)
        return (
            self.tables.leaf[:-1, depth, None]
            == torch.arange(self.num_classes[depth], device="cpu")
        ).float()

    def valid_paths(self, predictions: torch.Tensor) -> torch.Tensor:
        """Whether each sample's predictions form a path of the tree.

        A prediction must have all the classes predicted above it as its ancestors. -1 is "no
        prediction", and binds nobody. Where branches end early: once a *leaf* is predicted the path
        is complete, so the predictions on the levels below it (which every branch classifier makes,
        having no class "none") are ignored.

        Args:
            predictions: LongTensor (N, L) of class indices per level, as the argmax of each level's
                logits.

        Returns:
            Bool tensor (N,).

        Raises:
            ValueError: if the shape is not (N, L) or an index is out of range.
        """
        if predictions.ndim != 2 or predictions.shape[1] != self.num_levels:
            raise ValueError(
                f"predictions must have shape (N, {self.num_levels}), one column per level, got "
                f"{tuple(predictions.shape)}."
            )
        valid = torch.ones(len(predictions), dtype=torch.bool, device=predictions.device)
        still_open = valid.clone()  # no leaf has been predicted so far
        for depth, level in enumerate(self.levels):
            column = as_labels(
                predictions[:, depth], self.num_classes[depth], f"prediction of level {level!r}"
            )
            ancestors = self.tables.ancestors[depth].to(column.device)[column]
            above = predictions[:, :depth]
            fits = ((ancestors[:, :depth] == above) | (above < 0)).all(1)
            valid &= fits | (column < 0) | ~still_open
            still_open &= (column < 0) | ~self.tables.is_leaf[depth].to(column.device)[column]
        return valid

    def common_depth(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """On how many levels two label rows share their path.

        This is the depth of their lowest common ancestor (LCA).

        Args:
            a: LongTensor (..., L) of label rows, as :meth:`expand` gives them.
            b: another, of a shape that broadcasts with `a`'s.

        Returns:
            LongTensor (...): 0 if they share nothing but the root above all, L if they are the same
                deepest leaf.

        Example:
            >>> from timm_branches import Taxonomy
            >>> tree = Taxonomy(['animal/cat', 'animal/dog', 'transport/ship'])
            >>> tree.common_depth(tree.expand(0), tree.expand([0, 1, 2])).tolist()
            [2, 1, 0]
        """
        return ((a == b) & (a >= 0)).long().cumprod(-1).sum(-1)

    def lca_height(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """The height of the lowest common ancestor of two nodes.

        The hierarchical distance of Bertinetto et al. 2020.

        Args:
            a: LongTensor (..., L) of label rows, as :meth:`expand` gives them.
            b: another, of a shape that broadcasts with `a`'s.

        Returns:
            LongTensor (...): 0 for the same leaf, L for leaves of different trees of the forest.

        Example:
            >>> from timm_branches import Taxonomy
            >>> tree = Taxonomy(['animal/cat', 'animal/dog', 'transport/ship'])
            >>> tree.lca_height(tree.expand(0), tree.expand([0, 1, 2])).tolist()
            [0, 1, 2]
        """
        depth = self.common_depth(a, b)
        # the root comes first
        starts = torch.tensor([0, 1, *self.num_classes], device=depth.device).cumsum(0)[:-1]
        above = a.expand(*depth.shape, self.num_levels).gather(
            -1, (depth - 1).clamp(min=0)[..., None]
        )[..., 0]
        root = torch.tensor([self.num_levels], device="cpu")
        heights = torch.cat([root, *self.tables.heights]).to(depth.device)
        return heights[torch.where(depth > 0, starts[depth] + above, 0)]

    def distances(self) -> torch.Tensor:
        """The height of the lowest common ancestor of each two leaves.

        As :meth:`lca_height` has it.

        Returns:
            LongTensor (num_leaves, num_leaves), symmetric, zero on the diagonal. It takes 8 bytes
            an entry: 8 MB for 1,000 leaves, 800 MB for 10,000.

        Example:
            >>> from timm_branches import Taxonomy
            >>> Taxonomy(['animal/cat', 'animal/dog', 'transport/ship']).distances().tolist()
            [[0, 1, 2], [1, 0, 2], [2, 2, 0]]
        """
        result = torch.full((self.num_leaves, self.num_leaves), self.num_levels, device="cpu")
        table = self.tables.leaf[:-1]
        # so that nothing else is as large
        for rows, part in zip(result.split(256), table.split(256), strict=True):
            for mine, column, heights in zip(part.T, table.T, self.tables.heights, strict=True):
                shared = (mine[:, None] == column) & (column >= 0)
                # the deepest shared level comes last
                rows.copy_(torch.where(shared, heights[mine][:, None], rows))
        return result

    # ---- being an immutable value

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(
            f"a Taxonomy does not change; make a new one instead of setting {name!r}."
        )

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"a Taxonomy does not change; {name!r} cannot be deleted.")

    def __reduce__(self) -> tuple[Any, ...]:
        # pickle and deepcopy would set attributes
        return type(self), (self.leaves, self.levels, self.nodes)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Forest):
            return NotImplemented
        return (self.leaves, self.levels, self.nodes) == (other.leaves, other.levels, other.nodes)

    def __hash__(self) -> int:
        return hash((self.leaves, self.levels, self.nodes))

    def __repr__(self) -> str:
        sizes = ", ".join(
            f"{name}: {n}" for name, n in zip(self.levels, self.num_classes, strict=True)
        )
        return f"Taxonomy({sizes}; {self.num_leaves} leaves)"

    def __str__(self) -> str:
        """The tree as text; leaves with their index."""
        return draw(list(chain.from_iterable(self.nodes)), self.tables.leaf_index)
