"""The label hierarchy: which class lies under which, and every level's label of a sample.

A :class:`Taxonomy` is a forest. It knows nothing of networks or images; it turns leaf labels into one label per level,
names into indices and leaf probabilities into level probabilities, all by looking up precomputed tables.
"""
from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import readers
from .paths import NodePath, by_end, check_leaves, check_levels, check_order, display_names, draw, find
from .tables import LevelTables, as_labels, build_tables

__all__ = ["Taxonomy"]

_FORMAT = "timm_branches.taxonomy"


class Taxonomy:
    """An immutable forest of classes.

    A node is identified by its *path*, the names from the root down to it, so the same name may occur under two
    parents. Level l holds the nodes at depth l, 0 being the coarsest. A leaf is a node without children; branches may
    end at different depths. A leaf's index is the dataset's class index.

    Args:
        leaves: one path per leaf, in the order of the dataset's class indices: 'a/b/c' or a tuple of names.
        levels: a name for each level, coarsest first; default 'level1', 'level2', ...
        order: for each level None, or its nodes' paths in the order of their class indices. None is the order of
            first appearance in `leaves`. (B-CNN numbers CIFAR-10's middle classes in an order of its own.)

    Attributes:
        levels: the level names, L of them.
        nodes: for each level the paths of its nodes; a node's position is its class index on that level.
        classes: for each level the nodes' display names: the bare name, preceded by as many ancestors as it takes to
            tell it from its namesakes on that level.
        leaves: the leaves' paths.

    Raises:
        ValueError: if there are no leaves, a name is empty, a leaf occurs twice or is also the parent of another, the
            level names do not fit the depth, or `order` does not list exactly a level's nodes.

    Example:
        >>> tree = Taxonomy(['animal/pet/cat', 'animal/pet/dog', 'transport/ship'], levels=['coarse', 'middle', 'fine'])
        >>> tree.num_classes
        (2, 2, 2)
        >>> tree.expand([1, 2]).tolist()
        [[0, 0, 1], [1, 1, -1]]
    """
    __slots__ = ("_tables", "classes", "leaves", "levels", "nodes")

    classes: tuple[tuple[str, ...], ...]
    leaves: tuple[NodePath, ...]
    levels: tuple[str, ...]
    nodes: tuple[tuple[NodePath, ...], ...]
    _tables: LevelTables

    def __init__(self, leaves: Iterable[str | Sequence[str]], levels: Sequence[str] | None = None,
                 order: Sequence[Sequence[str | Sequence[str]] | None] | None = None) -> None:
        paths = check_leaves(leaves)
        depth = max(map(len, paths))
        nodes = [list(dict.fromkeys(path[:d + 1] for path in paths if len(path) > d)) for d in range(depth)]
        put = object.__setattr__  # __setattr__ refuses, see there
        put(self, "leaves", paths)
        put(self, "levels", check_levels(levels, depth))
        put(self, "nodes", check_order(self.levels, nodes, order))
        put(self, "classes", tuple(map(display_names, self.nodes)))
        put(self, "_tables", build_tables(self.leaves, self.nodes))

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
    def parents(self) -> tuple[Tensor, ...]:
        """For each level l, a LongTensor (num_classes[l],) of the parents' indices on level l - 1; -1 for roots."""
        return (torch.full((self.num_classes[0],), -1, device="cpu"),
                *(table[:-1, level].clone() for level, table in enumerate(self._tables.ancestors[1:])))

    @property
    def leaf_table(self) -> Tensor:
        """LongTensor (num_leaves, L): each leaf's class index on each level, -1 below a shallow leaf's own level."""
        return self._tables.leaf[:-1].clone()

    @property
    def heights(self) -> tuple[Tensor, ...]:
        """For each level a LongTensor (num_classes[l],): each node's steps down to its deepest leaf, 0 for a leaf.

        The root above all, which joins the trees of the forest, has height L.
        """
        return tuple(height.clone() for height in self._tables.heights)

    def level_index(self, level: str | int) -> int:
        """The index of a level given by name or index.

        Raises:
            ValueError: if there is no such level; the message lists the levels.
        """
        if isinstance(level, str) and level in self.levels:
            return self.levels.index(level)
        if isinstance(level, Integral) and not isinstance(level, bool) and 0 <= level < self.num_levels:
            return int(level)
        raise ValueError(f'no level {level!r}; the levels are {", ".join(map(repr, self.levels))} '
                         f'(indices 0 to {self.num_levels - 1})')

    # ---- labels

    def expand(self, labels: Tensor | Sequence[Any] | int, level: str | int | None = None) -> Tensor:
        """The labels of all levels.

        Args:
            labels: integers of any shape: leaf indices, or class indices on `level`. -1 is "unknown".
            level: name or index of the level that `labels` belong to; None if they are leaf indices.

        Returns:
            LongTensor (..., L) on the labels' device. -1 on levels below the label (below a shallow leaf, or below
            `level`), and everywhere where the label is -1.

        Raises:
            ValueError: if a label is not an integer or out of range, or there is no such level.

        Example:
            >>> tree = Taxonomy(['animal/cat', 'animal/dog', 'transport/ship'])
            >>> tree.expand([[0, 2], [1, -1]]).tolist()
            [[[0, 0], [1, 2]], [[0, 1], [-1, -1]]]
            >>> tree.expand(1, level=0).tolist()
            [1, -1]
        """
        if level is None:
            table, what = self._tables.leaf, "leaf label"
        else:
            depth = self.level_index(level)
            table, what = self._tables.ancestors[depth], f"label of level {self.levels[depth]!r}"
        labels = as_labels(labels, len(table) - 1, what)
        return table.to(labels.device)[labels]

    def encode(self, names: str | Iterable[str | Sequence[str]]) -> Tensor:
        """Leaf indices of names.

        Args:
            names: leaves, each a path as a tuple of names or as 'a/b/c', or the end of a path ('c', 'b/c') that fits
                one leaf only. A text that is some leaf's whole path means that leaf. A single text gives one index.

        Returns:
            LongTensor (N,), or () for a single text.

        Raises:
            ValueError: if a name is unknown, ambiguous or not a leaf; the message names what comes close.

        Example:
            >>> Taxonomy(['animal/cat', 'animal/dog', 'transport/ship']).encode(['ship', 'animal/cat'])
            tensor([2, 0])
        """
        single = isinstance(names, str)
        ends, nodes = by_end(self.leaves), [path for level in self.nodes for path in level]
        indices = [self._tables.leaf_index[find(name, ends, nodes)] for name in ([names] if single else names)]
        result = torch.tensor(indices, dtype=torch.long, device="cpu")
        return result[0] if single else result

    def encode_partial(self, paths: Iterable[str | Sequence[str]]) -> Tensor:
        """Label rows of nodes on any level, for samples whose label is only known coarsely.

        Args:
            paths: nodes, written as for :meth:`encode`; inner nodes are welcome.

        Returns:
            LongTensor (N, L): the class index on each level down to the node's own, -1 below.

        Raises:
            ValueError: if a name is unknown or ambiguous.

        Example:
            >>> Taxonomy(['animal/cat', 'animal/dog', 'transport/ship']).encode_partial(['animal', 'ship']).tolist()
            [[0, -1], [1, 2]]
        """
        nodes = [path for level in self.nodes for path in level]
        ends = by_end(nodes)
        found = [find(name, ends, nodes) for name in paths]
        rows = [self._tables.ancestors[len(p) - 1][self.nodes[len(p) - 1].index(p)] for p in found]
        return torch.stack(rows) if rows else torch.empty(0, self.num_levels, dtype=torch.long, device="cpu")

    # ---- between levels

    def leaf_to_level(self, level: str | int) -> Tensor:
        """The 0/1 matrix that sums leaf probabilities up to a level.

        Args:
            level: name or index.

        Returns:
            Float tensor (num_leaves, num_classes[level]): `leaf_probabilities @ matrix` are the level's probabilities.
            A leaf that ends above the level has a row of zeros there, so on uneven trees they can sum to less than 1.
        """
        depth = self.level_index(level)
        return (self._tables.leaf[:-1, depth, None] == torch.arange(self.num_classes[depth], device="cpu")).float()

    def valid_paths(self, predictions: Tensor) -> Tensor:
        """Whether each sample's predictions form a path of the tree.

        A prediction must have all the classes predicted above it as its ancestors. -1 is "no prediction", and binds
        nobody. Where branches end early: once a *leaf* is predicted the path is complete, so the predictions on the
        levels below it (which every branch classifier makes, having no class "none") are ignored.

        Args:
            predictions: LongTensor (N, L) of class indices per level, as the argmax of each level's logits.

        Returns:
            Bool tensor (N,).

        Raises:
            ValueError: if the shape is not (N, L) or an index is out of range.
        """
        if predictions.ndim != 2 or predictions.shape[1] != self.num_levels:
            raise ValueError(f"predictions must have shape (N, {self.num_levels}), one column per level, got "
                             f"{tuple(predictions.shape)}")
        valid = torch.ones(len(predictions), dtype=torch.bool, device=predictions.device)
        still_open = valid.clone()  # no leaf has been predicted so far
        for depth, level in enumerate(self.levels):
            column = as_labels(predictions[:, depth], self.num_classes[depth], f"prediction of level {level!r}")
            ancestors = self._tables.ancestors[depth].to(column.device)[column]
            above = predictions[:, :depth]
            fits = ((ancestors[:, :depth] == above) | (above < 0)).all(1)
            valid &= fits | (column < 0) | ~still_open
            still_open &= (column < 0) | ~self._tables.is_leaf[depth].to(column.device)[column]
        return valid

    def common_depth(self, a: Tensor, b: Tensor) -> Tensor:
        """On how many levels two label rows share their path: the depth of their lowest common ancestor (LCA).

        Args:
            a: LongTensor (..., L) of label rows, as :meth:`expand` gives them.
            b: another, of a shape that broadcasts with `a`'s.

        Returns:
            LongTensor (...): 0 if they share nothing but the root above all, L if they are the same deepest leaf.

        Example:
            >>> tree = Taxonomy(['animal/cat', 'animal/dog', 'transport/ship'])
            >>> tree.common_depth(tree.expand(0), tree.expand([0, 1, 2])).tolist()
            [2, 1, 0]
        """
        return ((a == b) & (a >= 0)).long().cumprod(-1).sum(-1)

    def lca_height(self, a: Tensor, b: Tensor) -> Tensor:
        """The height of the lowest common ancestor of two nodes, the hierarchical distance of Bertinetto et al. 2020.

        Args:
            a: LongTensor (..., L) of label rows, as :meth:`expand` gives them.
            b: another, of a shape that broadcasts with `a`'s.

        Returns:
            LongTensor (...): 0 for the same leaf, L for leaves of different trees of the forest.

        Example:
            >>> tree = Taxonomy(['animal/cat', 'animal/dog', 'transport/ship'])
            >>> tree.lca_height(tree.expand(0), tree.expand([0, 1, 2])).tolist()
            [0, 1, 2]
        """
        depth = self.common_depth(a, b)
        starts = torch.tensor([0, 1, *self.num_classes], device=depth.device).cumsum(0)[:-1]  # the root comes first
        above = a.expand(*depth.shape, self.num_levels).gather(-1, (depth - 1).clamp(min=0)[..., None])[..., 0]
        root = torch.tensor([self.num_levels], device="cpu")
        heights = torch.cat([root, *self._tables.heights]).to(depth.device)
        return heights[torch.where(depth > 0, starts[depth] + above, 0)]

    def reorder(self, names: Sequence[str | Sequence[str]]) -> Taxonomy:
        """The same forest with its leaves in another order, such as a dataset's own class order.

        Args:
            names: all leaves, written as for :meth:`encode`, in the order wanted.

        Raises:
            ValueError: if `names` is not each leaf once.
        """
        indices = self.encode(list(names)).tolist()
        if sorted(indices) != list(range(self.num_leaves)):
            missing = [name for i, name in enumerate(self.leaf_names) if i not in indices]
            raise ValueError(f"names must list each of the {self.num_leaves} leaves once; got {len(indices)} names, "
                             f"missing {missing}")
        return Taxonomy([self.leaves[i] for i in indices], self.levels)

    # ---- constructors

    @classmethod
    def from_paths(cls, paths: Iterable[str | Sequence[str]], levels: Sequence[str] | None = None) -> Taxonomy:
        """From one path per leaf, in class order: 'a/b/c', or tuples where names themselves contain slashes."""
        return cls(paths, levels)

    @classmethod
    def from_csv(cls, file: str | Path, columns: Sequence[str] | None = None) -> Taxonomy:
        """From a CSV file with one row per leaf, in class order.

        Args:
            file: the header row names the levels, coarsest first; an empty cell ends a shallower leaf. Blank lines and
                a byte order mark are fine.
            columns: the header's columns to use, coarsest first; default all.

        Raises:
            ValueError: if a column is missing or doubled, or a row has a gap or more cells than the header.
        """
        return cls(*readers.read_csv(file, columns))

    @classmethod
    def from_json(cls, source: str | Path | Mapping[str, Any] | Sequence[Any],
                  levels: Sequence[str] | None = None) -> Taxonomy:
        """From nested JSON, or from a file that :meth:`save_json` wrote.

        Args:
            source: a file's name, or the object itself: an object maps a name to its children (`null` or `{}`: a leaf),
                a list holds leaf names and such objects. Leaves are numbered in the order of the text.
            levels: level names, coarsest first.

        Raises:
            ValueError: if a key occurs twice in one object, or something else than these is found.

        Example:
            >>> Taxonomy.from_json({'animal': ['cat', 'dog'], 'transport': {'ship': None}}).leaves
            (('animal', 'cat'), ('animal', 'dog'), ('transport', 'ship'))
        """
        if isinstance(source, (str, Path)):
            source = readers.load_json(source)
        if isinstance(source, Mapping) and source.get("format") == _FORMAT:
            return cls.from_dict(source)
        return cls(readers.read_json(source), levels)

    @classmethod
    def from_folders(cls, root: str | Path, levels: Sequence[str] | None = None) -> Taxonomy:
        """From nested class folders: a folder without sub-folders is a leaf. Sorted; hidden folders are ignored.

        Raises:
            ValueError: if `root` is not a folder, has no class folders, or a link makes a cycle.
        """
        return cls(readers.read_folders(root), levels)

    @classmethod
    def from_parents(cls, classes: Sequence[str], maps: Any, names: Sequence[Sequence[str] | None] | None = None,
                     levels: Sequence[str] | None = None) -> Taxonomy:
        """From the classes and maps from child to parent.

        Args:
            classes: the leaves' names in class order.
            maps: either a *list of maps*, one for each step up: `[fine -> middle, middle -> coarse]`. All leaves then
                lie on the last level. A map is a dict or a list of pairs of names, `{'cat': 'pet', ...}`, whose parents
                are numbered by first appearance; or a dict of indices or a list, `{0: 0, 1: 2, ...}` or `[0, 2, ...]`,
                as in B-CNN's code, whose parents keep the numbers given.
                Or *one* dict or list of pairs of names for the whole forest, `{'cat': 'pet', 'pet': 'animal', ...}`:
                a name without an entry (or with None) is a root, names must be unique, depths may differ.
            names: for each map of a list the names of its parents in order of their indices, or None. Unnamed parents
                of an index map are called '<level>_<index>'.
            levels: level names, coarsest first.

        Raises:
            ValueError: if a class has no parent or a second one, a name or index is unknown or unused, or names go
                round in a cycle.

        Example:
            >>> tree = Taxonomy.from_parents(['cat', 'ship', 'dog'], [[1, 0, 1]], names=[['transport', 'animal']])
            >>> tree.classes[0], tree.expand([0, 1]).tolist()
            (('transport', 'animal'), [[1, 0], [0, 1]])
        """
        leaves, order = readers.read_parents(classes, maps, names, levels)
        return cls(leaves, levels, order)

    # ---- storing

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe data from which :meth:`from_dict` makes an equal taxonomy."""
        plain = Taxonomy(self.leaves, self.levels)
        order = [None if mine == theirs else [list(path) for path in mine]
                 for mine, theirs in zip(self.nodes, plain.nodes, strict=True)]
        data = {"format": _FORMAT, "version": 1, "levels": list(self.levels), "leaves": [list(p) for p in self.leaves]}
        return {**data, "order": order} if any(order) else data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Taxonomy:
        """The inverse of :meth:`to_dict`.

        Raises:
            ValueError: if `data` is not what `to_dict` returns, or of a later version.
        """
        if data.get("format") != _FORMAT or "leaves" not in data:
            raise ValueError(f"not a stored taxonomy: it needs format {_FORMAT!r} and leaves, got keys {list(data)}")
        if data.get("version") != 1:
            raise ValueError(f'stored taxonomy of version {data.get("version")!r}; this release reads version 1')
        return cls(data["leaves"], data.get("levels"), data.get("order"))

    def save_json(self, file: str | Path) -> None:
        """Write :meth:`to_dict` to a file that :meth:`from_json` reads."""
        Path(file).write_text(json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    # ---- being an immutable value

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"a Taxonomy does not change; make a new one instead of setting {name!r}")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"a Taxonomy does not change; {name!r} cannot be deleted")

    def __reduce__(self) -> tuple[Any, ...]:
        return Taxonomy, (self.leaves, self.levels, self.nodes)  # pickle and deepcopy would set attributes

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Taxonomy):
            return NotImplemented
        return (self.leaves, self.levels, self.nodes) == (other.leaves, other.levels, other.nodes)

    def __hash__(self) -> int:
        return hash((self.leaves, self.levels, self.nodes))

    def __repr__(self) -> str:
        sizes = ", ".join(f"{name}: {n}" for name, n in zip(self.levels, self.num_classes, strict=True))
        return f"Taxonomy({sizes}; {self.num_leaves} leaves)"

    def __str__(self) -> str:
        """The tree as text; leaves with their index."""
        return draw([path for level in self.nodes for path in level], self._tables.leaf_index)
