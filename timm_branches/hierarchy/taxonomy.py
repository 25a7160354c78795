"""The label hierarchy: which class lies under which, and every level's label of a sample.

A :class:`Taxonomy` is a forest. It knows nothing of networks or images; it turns leaf labels into one label per level,
names into indices and leaf probabilities into level probabilities, all by looking up precomputed tables.
"""
from __future__ import annotations

import csv
import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ['Taxonomy']

NodePath = tuple[str, ...]
_FORMAT = 'timm_branches.taxonomy'


def _as_path(path: Any) -> NodePath:
    """A path given as 'a/b/c' or as a sequence of names; names in a sequence may contain slashes."""
    names = path.split('/') if isinstance(path, str) else path
    if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"a path is a text like 'animal/pet/cat' or a sequence of names, got {path!r}")
    if not names or not all(name.strip() for name in names):
        raise ValueError(f'empty name in path {path!r}: each level of a path needs a name')
    return tuple(names)


def _unique(items: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(items))


def _hint(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=3)
    return f'; did you mean {" or ".join(map(repr, close))}?' if close else ''


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
    __slots__ = ('_ancestors', '_index', '_is_leaf', '_leaf_table', '_parents', 'classes', 'leaves', 'levels', 'nodes')

    classes: tuple[tuple[str, ...], ...]
    leaves: tuple[NodePath, ...]
    levels: tuple[str, ...]
    nodes: tuple[tuple[NodePath, ...], ...]
    _ancestors: tuple[Tensor, ...]  # per level (nodes + 1, L): each node's own and ancestors' indices, last row -1
    _index: dict[NodePath, int]  # leaf -> its index
    _is_leaf: tuple[Tensor, ...]  # per level (nodes,) bool
    _leaf_table: Tensor  # (leaves + 1, L), last row -1
    _parents: tuple[Tensor, ...]  # per level (nodes,)

    def __init__(
        self,
        leaves: Iterable[str | Sequence[str]],
        levels: Sequence[str] | None = None,
        order: Sequence[Sequence[str | Sequence[str]] | None] | None = None,
    ) -> None:
        paths = [_as_path(path) for path in leaves]
        if not paths:
            raise ValueError('a taxonomy needs at least one leaf, got none')
        first: dict[NodePath, int] = {}
        for i, path in enumerate(paths):
            if path in first:
                raise ValueError(f'leaf {"/".join(path)!r} is listed twice, as number {first[path]} and {i}')
            first[path] = i
        for path in paths:
            for depth in range(1, len(path)):
                if path[:depth] in first:
                    raise ValueError(f'{"/".join(path[:depth])!r} is listed as a leaf, but is also the parent of '
                                     f'{"/".join(path)!r}; a node is either a leaf or has children')
        depth = max(map(len, paths))
        nodes = [_unique(path[:d + 1] for path in paths if len(path) > d) for d in range(depth)]
        put = object.__setattr__  # __setattr__ refuses, see there
        put(self, 'leaves', tuple(paths))
        put(self, 'levels', self._check_levels(levels, depth))
        put(self, 'nodes', self._check_order(nodes, order))
        put(self, 'classes', tuple(map(_display_names, self.nodes)))
        self._build_tables()

    @staticmethod
    def _check_levels(levels: Sequence[str] | None, depth: int) -> tuple[str, ...]:
        if levels is None:
            return tuple(f'level{i + 1}' for i in range(depth))
        if isinstance(levels, str) or not all(isinstance(name, str) and name.strip() for name in levels):
            raise ValueError(f'levels must be a sequence of {depth} names that are not empty, got {levels!r}')
        if len(levels) > depth:
            raise ValueError(f'level {levels[depth]!r} is empty: {len(levels)} level names are given, but the deepest '
                             f'leaf lies on level {depth}; name {depth} levels')
        if len(levels) < depth:
            raise ValueError(f'{len(levels)} level names are given, but the deepest leaf lies on level {depth}; '
                             f'name {depth} levels, coarsest first')
        if len(set(levels)) < depth:
            raise ValueError(f'level names must differ from each other, got {list(levels)}')
        return tuple(levels)

    def _check_order(self, nodes: list[list[NodePath]], order: Any) -> tuple[tuple[NodePath, ...], ...]:
        if order is None:
            return tuple(map(tuple, nodes))
        if len(order) != len(nodes):
            raise ValueError(f'order needs one entry per level ({len(nodes)}), got {len(order)}')
        ordered = []
        for level, found, given in zip(self.levels, nodes, order, strict=True):
            paths = found if given is None else [_as_path(path) for path in given]
            if len(paths) != len(found) or set(paths) != set(found):
                odd = sorted('/'.join(path) for path in set(paths) ^ set(found)) or 'a node twice'
                raise ValueError(f'order of level {level!r} must list each of its {len(found)} nodes once; it differs '
                                 f'in {odd}')
            ordered.append(tuple(paths))
        return tuple(ordered)

    def _build_tables(self) -> None:
        put = object.__setattr__
        index = [{path: i for i, path in enumerate(level)} for level in self.nodes]
        leaf_set = set(self.leaves)

        def rows(paths: Sequence[NodePath]) -> Tensor:
            # Paths are cut or filled to L entries. The extra last row makes index -1, "unknown", read as all -1.
            # device='cpu': a model built under torch.device('meta') must not take the tables along
            data = [[index[d][path[:d + 1]] if d < len(path) else -1 for d in range(self.num_levels)] for path in paths]
            return torch.tensor([*data, [-1] * self.num_levels], dtype=torch.long, device='cpu')

        put(self, '_index', {path: i for i, path in enumerate(self.leaves)})
        put(self, '_leaf_table', rows(self.leaves))
        put(self, '_ancestors', tuple(map(rows, self.nodes)))
        put(self, '_parents', tuple(
            table[:-1, max(level - 1, 0)] if level else torch.full((len(table) - 1,), -1, device='cpu')
            for level, table in enumerate(self._ancestors)))
        put(self, '_is_leaf', tuple(
            torch.tensor([path in leaf_set for path in level], device='cpu') for level in self.nodes))

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
        return _display_names(self.leaves)

    @property
    def parents(self) -> tuple[Tensor, ...]:
        """For each level l, a LongTensor (num_classes[l],) of the parents' indices on level l - 1; -1 for roots."""
        return tuple(table.clone() for table in self._parents)

    @property
    def leaf_table(self) -> Tensor:
        """LongTensor (num_leaves, L): each leaf's class index on each level, -1 below a shallow leaf's own level."""
        return self._leaf_table[:-1].clone()

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
            table, what = self._leaf_table, 'leaf label'
        else:
            depth = self.level_index(level)
            table, what = self._ancestors[depth], f'label of level {self.levels[depth]!r}'
        labels = _as_labels(labels, len(table) - 1, what)
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
        ends = _ends(self.leaves)
        indices = []
        for name in [names] if single else names:
            path = self._find(name, self.leaves, ends)
            indices.append(self._index[path])
        result = torch.tensor(indices, dtype=torch.long, device='cpu')
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
        ends = _ends(nodes)
        rows = []
        for name in paths:
            path = self._find(name, nodes, ends)
            depth = len(path) - 1
            rows.append(self._ancestors[depth][self.nodes[depth].index(path)])
        return torch.stack(rows) if rows else torch.empty(0, self.num_levels, dtype=torch.long, device='cpu')

    def _find(self, name: Any, nodes: Sequence[NodePath], ends: Mapping[str, list[NodePath]]) -> NodePath:
        if not isinstance(name, str):
            name = _as_path(name)
            found = [path for path in ends.get('/'.join(name), ()) if path[-len(name):] == name]
            found = [path for path in found if path == name] or found
            name = '/'.join(name)
        else:
            found = ends.get(name, [])
            whole = [path for path in found if '/'.join(path) == name]
            found = whole or found
        if len(found) == 1:
            return found[0]
        if found:
            options = ', '.join(repr(path) for path in found[:5])
            raise ValueError(f'{name!r} is ambiguous: it fits {len(found)} nodes, among them {options}; give the whole '
                             f'path as a tuple')
        inner = next((p for level in self.nodes for p in level if name in ('/'.join(p), p[-1])), None)
        if inner is not None:
            raise ValueError(f'{name!r} is not a leaf but an inner node; encode_partial takes those')
        raise ValueError(f'no class {name!r} among {len(nodes)} in this taxonomy{_hint(name, ends)}')

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
        columns = self._leaf_table[:-1, depth]
        return (columns[:, None] == torch.arange(self.num_classes[depth], device='cpu')).float()

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
            raise ValueError(f'predictions must have shape (N, {self.num_levels}), one column per level, got '
                             f'{tuple(predictions.shape)}')
        valid = torch.ones(len(predictions), dtype=torch.bool, device=predictions.device)
        still_open = valid.clone()  # no leaf has been predicted so far
        for depth, level in enumerate(self.levels):
            column = _as_labels(predictions[:, depth], self.num_classes[depth], f'prediction of level {level!r}')
            ancestors = self._ancestors[depth].to(column.device)[column]
            above = predictions[:, :depth]
            fits = ((ancestors[:, :depth] == above) | (above < 0)).all(1)
            valid &= fits | (column < 0) | ~still_open
            is_leaf = self._is_leaf[depth].to(column.device)
            still_open &= (column < 0) | ~is_leaf[column]
        return valid

    def reorder(self, names: Sequence[str | Sequence[str]]) -> Taxonomy:
        """The same forest with its leaves in another order, such as a dataset's own class order.

        Args:
            names: all leaves, written as for :meth:`encode`, in the order wanted.

        Raises:
            ValueError: if `names` is not each leaf once.
        """
        indices = self.encode(list(names)).tolist()
        if sorted(indices) != list(range(self.num_leaves)):
            missing = [self.leaf_names[i] for i in sorted(set(range(self.num_leaves)) - set(indices))]
            raise ValueError(f'names must list each of the {self.num_leaves} leaves once; got {len(indices)} names, '
                             f'missing {missing}')
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
        with open(file, newline='', encoding='utf-8-sig') as stream:
            reader = csv.reader(stream)
            rows = [(reader.line_num, [cell.strip() for cell in row]) for row in reader]
        rows = [(line, row) for line, row in rows if any(row)]
        if not rows:
            raise ValueError(f'{file} is empty; its first row must name the levels, coarsest first')
        header = rows.pop(0)[1]
        wanted = header if columns is None else list(columns)
        if unknown := [name for name in wanted if name not in header]:
            raise ValueError(f'{file} has no column {unknown[0]!r}; its columns are {header}')
        if len(set(header)) < len(header) or not all(header):
            raise ValueError(f'{file}: each column needs a name of its own, got {header}')
        paths = []
        for line, row in rows:
            if len(row) > len(header):
                raise ValueError(f'{file}, line {line}: {len(row)} cells, but the header names {len(header)}; quote '
                                 f'cells that contain a comma')
            cells = dict(zip(header, row + [''] * (len(header) - len(row)), strict=True))
            path = [cells[name] for name in wanted]
            names = [cell for cell in path if cell]
            if path[:len(names)] != names:
                raise ValueError(f'{file}, line {line}: empty name above a class: {path}; only the last cells of a row '
                                 f'may be empty')
            paths.append(tuple(names))
        return cls(paths, wanted)

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
            source = json.loads(Path(source).read_text(encoding='utf-8-sig'), object_pairs_hook=_no_doubles)
        if isinstance(source, Mapping) and source.get('format') == _FORMAT:
            return cls.from_dict(source)
        return cls(_walk_json(source, ()), levels)

    @classmethod
    def from_folders(cls, root: str | Path, levels: Sequence[str] | None = None) -> Taxonomy:
        """From nested class folders: a folder without sub-folders is a leaf. Sorted; hidden folders are ignored.

        Raises:
            ValueError: if `root` is not a folder, has no class folders, or a link makes a cycle.
        """
        root = Path(root)
        if not root.is_dir():
            raise ValueError(f'{root} is not a folder; give the folder that holds the class folders')
        leaves = _walk_folders(root, (), (root.resolve(),))
        if leaves == [()]:
            raise ValueError(f'{root} has no class folders')
        return cls(leaves, levels)

    @classmethod
    def from_parents(cls, classes: Sequence[str], maps: Any, names: Sequence[Sequence[str] | None] | None = None,
                     levels: Sequence[str] | None = None) -> Taxonomy:
        """From the classes and maps from child to parent.

        Args:
            classes: the leaves' names in class order.
            maps: either a *list of maps*, one for each step up: `[fine -> middle, middle -> coarse]`. All leaves then
                lie on the last level. A map is

                - a dict or a list of pairs of names: `{'cat': 'pet', ...}`. Parents are numbered by first appearance;
                - a dict of indices, or a list: `{0: 0, 1: 2, ...}` or `[0, 2, ...]`, the way B-CNN's code has it. The
                  parents keep the numbers given.

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
        classes = list(classes)
        if len(set(classes)) < len(classes):
            twice = next(name for name in classes if classes.count(name) > 1)
            raise ValueError(f'class {twice!r} is listed twice')
        if isinstance(maps, Mapping) or (maps and all(_is_pair(pair) for pair in maps)):
            edges = _as_map(maps)
            if not any(isinstance(key, Integral) for key in edges):
                if names is not None:
                    raise ValueError('names belong to a list of maps; a map of the whole forest names its parents')
                return cls(_climb(classes, edges), levels)
            maps = [maps]
        if names is not None and len(names) != len(maps):
            raise ValueError(f'names needs one entry per map ({len(maps)}), got {len(names)}')
        if levels is not None and len(levels) != len(maps) + 1:
            raise ValueError(f'{len(maps)} maps make {len(maps) + 1} levels, got {len(levels)} level names')
        rows = [classes]  # names per level, finest first
        steps = []  # for each map, the parent's name of each name
        for i, given in enumerate(maps):
            title = levels[len(maps) - 1 - i] if levels is not None else f'level{len(maps) - i}'
            parent, upper = _one_step(rows[-1], _as_map(given), names[i] if names else None, title)
            steps.append(parent)
            rows.append(upper)
        order: list[list[NodePath]] = [[(name,) for name in rows[-1]]]
        for row, parent in zip(rows[-2::-1], steps[::-1], strict=True):
            above = {path[-1]: path for path in order[-1]}
            order.append([(*above[parent[name]], name) for name in row])
        return cls(order[-1], levels, order)

    # ---- storing

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe data from which :meth:`from_dict` makes an equal taxonomy."""
        plain = Taxonomy(self.leaves, self.levels)
        order = [None if mine == theirs else [list(path) for path in mine]
                 for mine, theirs in zip(self.nodes, plain.nodes, strict=True)]
        data = {'format': _FORMAT, 'version': 1, 'levels': list(self.levels), 'leaves': [list(p) for p in self.leaves]}
        return {**data, 'order': order} if any(order) else data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Taxonomy:
        """The inverse of :meth:`to_dict`.

        Raises:
            ValueError: if `data` is not what `to_dict` returns, or of a later version.
        """
        if data.get('format') != _FORMAT or 'leaves' not in data:
            raise ValueError(f'not a stored taxonomy: it needs format {_FORMAT!r} and leaves, got keys {list(data)}')
        if data.get('version') != 1:
            raise ValueError(f'stored taxonomy of version {data.get("version")!r}; this release reads version 1')
        return cls(data['leaves'], data.get('levels'), data.get('order'))

    def save_json(self, file: str | Path) -> None:
        """Write :meth:`to_dict` to a file that :meth:`from_json` reads."""
        Path(file).write_text(json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + '\n', encoding='utf-8')

    # ---- being an immutable value

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f'a Taxonomy does not change; make a new one instead of setting {name!r}')

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f'a Taxonomy does not change; {name!r} cannot be deleted')

    def __reduce__(self) -> tuple[Any, ...]:
        return Taxonomy, (self.leaves, self.levels, self.nodes)  # pickle and deepcopy would set attributes

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Taxonomy):
            return NotImplemented
        return (self.leaves, self.levels, self.nodes) == (other.leaves, other.levels, other.nodes)

    def __hash__(self) -> int:
        return hash((self.leaves, self.levels, self.nodes))

    def __repr__(self) -> str:
        sizes = ', '.join(f'{name}: {n}' for name, n in zip(self.levels, self.num_classes, strict=True))
        return f'Taxonomy({sizes}; {self.num_leaves} leaves)'

    def __str__(self) -> str:
        """The tree as text; leaves with their index."""
        children: dict[NodePath, list[NodePath]] = {}
        for path in (path for level in self.nodes for path in level):
            children.setdefault(path[:-1], []).append(path)
        lines: list[str] = []

        def draw(path: NodePath, prefix: str, tee: str, stem: str) -> None:
            index = self._index.get(path)
            lines.append(prefix + tee + path[-1] + ('' if index is None else f' [{index}]'))
            below = children.get(path, [])
            for child in below:
                last = child is below[-1]
                draw(child, prefix + stem, '└─ ' if last else '├─ ', '   ' if last else '│  ')

        for root in self.nodes[0]:
            draw(root, '', '', '')
        return '\n'.join(lines)


def _display_names(paths: Sequence[NodePath]) -> tuple[str, ...]:
    """Each path's shortest end that no other of the paths shares."""
    ends = _ends(paths)
    return tuple(
        next((end for end in ('/'.join(path[-k:]) for k in range(1, len(path))) if len(ends[end]) == 1), '/'.join(path))
        for path in paths)


def _ends(paths: Iterable[NodePath]) -> dict[str, list[NodePath]]:
    """Every end of every path as text ('c', 'b/c', 'a/b/c') -> the paths that have it."""
    ends: dict[str, list[NodePath]] = {}
    for path in paths:
        for k in range(1, len(path) + 1):
            ends.setdefault('/'.join(path[-k:]), []).append(path)
    return ends


def _as_labels(labels: Any, count: int, what: str) -> Tensor:
    """Labels as a LongTensor, all in [-1, count)."""
    labels = torch.as_tensor(labels, device='cpu') if not isinstance(labels, Tensor) else labels
    if labels.numel() == 0:  # an empty list has no integer type
        return labels.long()
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f'{what} must be an integer, got a tensor of {labels.dtype}')
    labels = labels.long()
    wrong = (labels < -1) | (labels >= count)
    if wrong.any():
        raise ValueError(f'{what} {int(labels[wrong][0])} is out of range; legal are 0 to {count - 1}, and -1 for '
                         f'unknown')
    return labels


def _no_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """JSON's last-one-wins would drop a whole branch without a word."""
    keys = [key for key, _ in pairs]
    if len(set(keys)) < len(keys):
        raise ValueError(f'{next(key for key in keys if keys.count(key) > 1)!r} occurs twice in one JSON object')
    return dict(pairs)


def _walk_json(node: Any, path: NodePath) -> list[NodePath]:
    where = '/'.join(path) or 'the top level'
    if isinstance(node, Mapping):
        leaves: list[NodePath] = []
        for name, below in node.items():
            here = (*path, name)
            leaves += [here] if below is None or below == {} else _walk_json(below, here)
        return leaves
    if isinstance(node, Sequence) and not isinstance(node, str):
        if not node and path:
            raise ValueError(f'{where} has an empty list of children; write null for a leaf')
        return [leaf for item in node
                for leaf in ([(*path, item)] if isinstance(item, str) else _walk_json_item(item, path, where))]
    raise ValueError(f'{where} holds {node!r}; expected an object of children, a list of leaf names, or null')


def _walk_json_item(item: Any, path: NodePath, where: str) -> list[NodePath]:
    if not isinstance(item, Mapping):
        raise ValueError(f'the list under {where} holds {item!r}; expected leaf names in quotes, or objects')
    return _walk_json(item, path)


def _walk_folders(folder: Path, path: NodePath, above: tuple[Path, ...]) -> list[NodePath]:
    below = sorted(child for child in folder.iterdir() if child.is_dir() and not child.name.startswith('.'))
    leaves = []
    for child in below:
        real = child.resolve()
        if real in above:
            raise ValueError(f'{child} links back to {real}, which contains it: a cycle')
        leaves += _walk_folders(child, (*path, child.name), (*above, real))
    return leaves or [path]


def _is_pair(item: Any) -> bool:
    """Whether it is (child, parent); a map written as a list never looks like that, as it holds indices or pairs."""
    return (isinstance(item, (tuple, list)) and len(item) == 2 and isinstance(item[0], str)
            and (item[1] is None or isinstance(item[1], str)))


def _as_map(given: Any) -> dict[Any, Any]:
    """A child -> parent dict out of a dict, a list of pairs or a list of indices."""
    given = given.tolist() if hasattr(given, 'tolist') else given
    if isinstance(given, Mapping):
        return dict(given)
    if isinstance(given, Sequence) and given and all(_is_pair(pair) for pair in given):
        edges: dict[Any, Any] = {}
        for child, parent in given:
            if edges.setdefault(child, parent) != parent:
                raise ValueError(f'{child!r} has a second parent: {edges[child]!r} and {parent!r}')
        return edges
    if isinstance(given, Sequence) and given and all(isinstance(index, Integral) for index in given):
        return dict(enumerate(given))
    raise ValueError(f'a map is a dict, a list of (child, parent) names, or a list of parent indices; got {given!r}')


def _climb(classes: Sequence[str], edges: Mapping[str, str | None]) -> list[NodePath]:
    paths = []
    for name in classes:
        path = [name]
        while (parent := edges.get(path[0])) is not None:
            if parent in path:
                raise ValueError(f'cycle: {" -> ".join([*path[::-1], parent])}')
            path.insert(0, parent)
        paths.append(tuple(path))
    used = {name for path in paths for name in path}
    if unused := [name for name in edges if name not in used]:
        raise ValueError(f'{unused[0]!r} has a parent but is neither a class nor above one{_hint(unused[0], used)}')
    return paths


def _one_step(
    row: Sequence[str], edges: Mapping[Any, Any], names: Sequence[str] | None, title: str,
) -> tuple[dict[str, str], list[str]]:
    """One map from a level to the next: the parent's name of each name, and the parents in order of their indices."""
    by_index = any(isinstance(key, Integral) for key in edges)
    keys: Sequence[Any] = range(len(row)) if by_index else row
    kind = 'index' if by_index else 'class'
    for key in keys:
        if edges.get(key) is None:
            raise ValueError(f'{kind} {key!r} has no parent on {title}')
    if unknown := [key for key in edges if key not in keys]:
        raise ValueError(f'{kind} {unknown[0]!r} has a parent on {title}, but there is no such class'
                         f'{_hint(str(unknown[0]), row)}')
    if not by_index:
        upper = list(names) if names is not None else _unique(edges[key] for key in keys)
        if set(upper) != {edges[key] for key in keys} or len(set(upper)) < len(upper):
            raise ValueError(f'names of {title} must list each parent once: '
                             f'{sorted(map(str, {edges[key] for key in keys}))}, got {upper}')
        return dict(edges), upper
    used = {edges[key] for key in keys}
    if not all(isinstance(index, Integral) and int(index) >= 0 for index in used):
        raise ValueError(f'a map whose keys are indices must have indices from 0 as values too, got '
                         f'{sorted(map(str, used))}')
    count = max(used) + 1 if names is None else len(names)
    if used != set(range(count)):
        raise ValueError(f'{title} has {count} classes, so parents must be each of 0 to {count - 1}; got '
                         f'{sorted(used)}: an index without children would be an empty class')
    upper = list(names) if names is not None else [f'{title}_{i}' for i in range(count)]
    if len(set(upper)) < len(upper):
        raise ValueError(f'names of {title} must differ from each other, got {upper}')
    return {name: upper[edges[i]] for i, name in enumerate(row)}, upper
