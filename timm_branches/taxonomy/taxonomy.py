"""The label hierarchy: which class lies under which.

Where one comes from, how it is changed and stored.

What a :class:`Taxonomy` answers about labels is in `forest.py`, which it extends.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from timm_branches.arguments import as_items
from timm_branches.files import replace_file
from timm_branches.taxonomy import derive, readers
from timm_branches.taxonomy.edit import merge_forests
from timm_branches.taxonomy.field_files import (
    category_paths,
    is_categories,
    is_open_images,
    open_images_paths,
)
from timm_branches.taxonomy.forest import Forest
from timm_branches.taxonomy.order import warnings_of_twins
from timm_branches.taxonomy.paths import NodePath
from timm_branches.taxonomy.tables import as_labels
from timm_branches.taxonomy.wordnet import read_wordnet

__all__ = ["Taxonomy"]

_FORMAT = "timm_branches.taxonomy"


class Taxonomy(Forest):
    """An immutable forest of classes.

    A node is identified by its *path*, the names from the root down to it, so the same name may
    occur under two parents. Level l holds the nodes at depth l, 0 being the coarsest. A leaf is a
    node without children; branches may end at different depths. A leaf's index is the dataset's
    class index.

    Args:
        leaves: one path per leaf, in the order of the dataset's class indices: 'a/b/c' or a tuple
            of names.
        levels: a name for each level, coarsest first; default 'level1', 'level2', ...
        order: for each level None, or its nodes' paths in the order of their class indices. None is
            the order of first appearance in `leaves`. (B-CNN numbers CIFAR-10's middle classes in
            an order of its own.)

    Attributes:
        levels: the level names, L of them.
        nodes: for each level the paths of its nodes; a node's position is its class index on that
            level.
        classes: for each level the nodes' display names: the bare name, preceded by as many
            ancestors as it takes to tell it from its namesakes on that level.
        leaves: the leaves' paths.

    Raises:
        ValueError: if there are no leaves, a name is empty, a leaf occurs twice or is also the
            parent of another, the level names do not fit the depth, or `order` does not list
            exactly a level's nodes.

    Example:
        >>> leaves = ['animal/pet/cat', 'animal/pet/dog', 'transport/ship']
        >>> tree = Taxonomy(leaves, levels=['coarse', 'middle', 'fine'])
        >>> tree.num_classes
        (2, 2, 2)
        >>> tree.expand([1, 2]).tolist()
        [[0, 0, 1], [1, 1, -1]]
    """

    __slots__ = ()

    # ---- constructors

    @classmethod
    def from_paths(
        cls, paths: Iterable[str | Sequence[str]], levels: Sequence[str] | None = None
    ) -> Taxonomy:
        """From one path per leaf, in class order.

        'a/b/c', or tuples where names themselves contain slashes.
        """
        return cls(paths, levels)

    @classmethod
    def _read(
        cls,
        leaves: Sequence[NodePath],
        levels: Sequence[str] | None,
        order: Sequence[Sequence[str | Sequence[str]] | None] | None = None,
    ) -> Taxonomy:
        """The tree that a reader found; names that a person would take for one are said."""
        tree = cls(leaves, levels, order)
        for text in warnings_of_twins(tree.leaves):
            warnings.warn(f"{text}.", stacklevel=3)
        return tree

    @classmethod
    def from_csv(cls, file: str | Path, columns: Sequence[str] | None = None) -> Taxonomy:
        """From a CSV file with one row per leaf, in class order.

        Args:
            file: the header row names the levels, coarsest first; an empty cell ends a shallower
                leaf. Blank lines and a byte order mark are fine.
            columns: the header's columns to use, coarsest first; default all.

        Raises:
            ValueError: if a column is missing or doubled, or a row has a gap or more cells than the
                header.
        """
        return cls._read(*readers.read_csv(file, columns))

    @classmethod
    def from_dataframe(cls, frame: Any, columns: Sequence[Any] | None = None) -> Taxonomy:
        """From a pandas data frame with one row per leaf, or one per sample.

        Equal rows are one leaf.

        Args:
            frame: a column per level, a row per leaf or sample. A missing value (NaN, None, '')
                ends a shallower leaf; rows without any value are left out. Leaves are numbered in
                order of first appearance. Numbers become text, whole ones without '.0'.
            columns: the columns to use, coarsest first; default all.

        Raises:
            TypeError: if it is no data frame.
            ValueError: if a column is missing or doubled, a row has a gap, or a row names only an
                inner node of another (samples with a coarse label only: drop these rows, and
                encode_partial encodes them).

        Example:
            >>> columns = {'kind': ['a', 'p', 'a'], 'name': ['cat', None, 'cat']}
            >>> frame = pandas.DataFrame(columns)  # doctest: +SKIP
            >>> Taxonomy.from_dataframe(frame).leaves  # doctest: +SKIP
            (('a', 'cat'), ('p',))
        """
        return cls._read(*readers.read_dataframe(frame, columns))

    @classmethod
    def from_json(
        cls,
        source: str | Path | Mapping[str, Any] | Sequence[Any],
        levels: Sequence[str] | None = None,
        names: Mapping[str, str] | str | Path | None = None,
    ) -> Taxonomy:
        """From nested JSON, a file that :meth:`save_json` wrote, or one of the field's own.

        Those are COCO's and iNaturalist's (`categories` with `supercategory` or ranks; leaves are
        numbered in the order of the ids) and Open Images' hierarchy (`LabelName`, `Subcategory`).

        Args:
            source: a file's name, or the object itself: an object maps a name to its children
                (`null` or `{}`: a leaf), a list holds leaf names and such objects. Leaves are
                numbered in the order of the text.
            levels: level names, coarsest first.
            names: of Open Images' labels, or the CSV of its class descriptions.

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
        content: Any = source
        if is_open_images(content):
            return cls._read(open_images_paths(content, readers.read_names(names)), levels)
        if names is not None:
            raise ValueError("names= belongs to Open Images' hierarchy, and has no effect here.")
        if is_categories(content):
            paths, own_levels = category_paths(content)
            return cls._read(list(paths.values()), levels or own_levels)
        return cls._read(readers.read_json(source), levels)

    @classmethod
    def from_folders(cls, root: str | Path, levels: Sequence[str] | None = None) -> Taxonomy:
        """From nested class folders: a folder without sub-folders is a leaf.

        They are sorted; hidden folders are ignored.

        Raises:
            ValueError: if `root` is not a folder, has no class folders, or a link makes a cycle.
        """
        return cls._read(readers.read_folders(root), levels)

    @classmethod
    def from_parents(
        cls,
        classes: Sequence[str],
        maps: Any,
        names: Sequence[Sequence[str] | None] | None = None,
        levels: Sequence[str] | None = None,
    ) -> Taxonomy:
        """From the classes and maps from child to parent.

        Args:
            classes: the leaves' names in class order.
            maps: either a *list of maps*, one for each step up: `[fine -> middle, middle ->
                coarse]`. All leaves then lie on the last level. A map is a dict or a list of pairs
                of names, `{'cat': 'pet', ...}`, whose parents are numbered by first appearance; or
                a dict of indices or a list, `{0: 0, 1: 2, ...}` or `[0, 2, ...]`, as in B-CNN's
                code, whose parents keep the numbers given. Or *one* dict or list of pairs of names
                for the whole forest, `{'cat': 'pet', 'pet': 'animal', ...}`: a name without an
                entry (or with None) is a root, names must be unique, depths may differ.
            names: for each map of a list the names of its parents in order of their indices, or
                None. Unnamed parents of an index map are called '<level>_<index>'.
            levels: level names, coarsest first.

        Raises:
            ValueError: if a class has no parent or a second one, a name or index is unknown or
                unused, or names go round in a cycle.

        Example:
            >>> tree = Taxonomy.from_parents(
            ...     ['cat', 'ship', 'dog'], [[1, 0, 1]], names=[['transport', 'animal']])
            >>> tree.classes[0], tree.expand([0, 1]).tolist()
            (('transport', 'animal'), [[1, 0], [0, 1]])
        """
        leaves, order = readers.read_parents(classes, maps, names, levels)
        return cls._read(leaves, levels, order)

    @classmethod
    def from_wordnet(cls, classes: Iterable[Any], levels: Sequence[str] | None = None) -> Taxonomy:
        """From the hypernyms of words in WordNet, read with nltk and its data.

        Each class hangs below its shortest chain of hypernyms; nodes with a single child, the roots
        among them, are left out. Depths are uneven. Inner nodes are called by their first lemma, by
        their synset where siblings would share it. A class that is also above another is a leaf
        beside it, below the node of its own: 'dog' and 'poodle' are 'dog/dog' and 'dog/poodle'.

        Args:
            classes: in class order, each a word (its most frequent *noun* sense, so mind ambiguous
                ones: 'crane' is a person), a synset's name ('crane.n.04'), an ImageNet id
                ('n02084071', of WordNet 3.0), or a synset of nltk. A text is the leaf's name as it
                stands.
            levels: level names, coarsest first.

        Raises:
            ImportError: if nltk is not installed.
            LookupError: if WordNet's data is not there; `python -m nltk.downloader wordnet` gets
                it.
            ValueError: if WordNet does not have a class, or two classes are one synset.
        """
        return cls(read_wordnet(classes), levels)

    @classmethod
    def from_linkage(
        cls,
        linkage: Any,
        classes: Sequence[str],
        num_classes: Sequence[int],
        levels: Sequence[str] | None = None,
    ) -> Taxonomy:
        """From an agglomerative clustering of the classes, cut into levels.

        All leaves lie on the last level.

        Args:
            linkage: (K - 1, 4), from `linkage_from_confusion`, `linkage_from_embeddings` or SciPy;
                `dendrogram.plot_dendrogram` draws it.
            classes: the K leaves' names in class order.
            num_classes: number of classes of each level above the leaves, coarsest first:
                increasing, from 2 to K - 1. Exactly as many are made, also where merges are equally
                near.
            levels: names of these levels and of the leaves' own.

        Raises:
            ValueError: if there are not K different names, or two levels would be the same.

        Warns:
            UserWarning: if a cut falls between merges at the same distance, so that its grouping is
                arbitrary.

        Example:
            >>> linkage = [[0, 1, 0.2, 2], [3, 4, 0.3, 2], [2, 6, 0.5, 3], [5, 7, 0.9, 5]]
            >>> print(Taxonomy.from_linkage(linkage, ['cat', 'dog', 'bus', 'car', 'van'], [2, 3]))
            cat+dog
            └─ cat+dog
               ├─ cat [0]
               └─ dog [1]
            bus+car+van
            ├─ bus
            │  └─ bus [2]
            └─ car+van
               ├─ car [3]
               └─ van [4]
        """
        return cls(derive.linkage_paths(linkage, classes, num_classes), levels)

    @classmethod
    def from_confusion(
        cls,
        matrix: Any,
        classes: Sequence[str],
        num_classes: Sequence[int],
        levels: Sequence[str] | None = None,
        method: str = "average",
    ) -> Taxonomy:
        """From a model's confusion matrix: classes that it confuses come together.

        Args:
            matrix: counts (K, K), rows labels, columns predictions; see `linkage_from_confusion`.
            classes: the leaves' names in class order, see :meth:`from_linkage`.
            num_classes: how many classes each level above the leaves has.
            levels: names of the levels.
            method: 'average', 'complete', 'single' or 'weighted' linkage.

        Raises:
            ValueError: as `linkage_from_confusion` and :meth:`from_linkage` do.

        Example:
            >>> matrix = [[6, 4, 0, 0], [3, 7, 0, 0], [0, 1, 8, 1], [0, 0, 2, 8]]
            >>> Taxonomy.from_confusion(matrix, ['cat', 'dog', 'car', 'van'], [2]).classes[0]
            ('cat+dog', 'car+van')
        """
        return cls.from_linkage(
            derive.linkage_from_confusion(matrix, method), classes, num_classes, levels
        )

    @classmethod
    def from_embeddings(
        cls,
        embeddings: Any,
        classes: Sequence[str],
        num_classes: Sequence[int],
        levels: Sequence[str] | None = None,
        metric: str = "cosine",
        method: str = "average",
    ) -> Taxonomy:
        """From an embedding of each class: near classes come together.

        Args:
            embeddings: (K, D), such as `class_prototypes` of samples; see
                `linkage_from_embeddings`.
            classes: the leaves' names in class order, see :meth:`from_linkage`.
            num_classes: how many classes each level above the leaves has.
            levels: names of the levels.
            metric: 'cosine' or 'euclidean'.
            method: 'average', 'complete', 'single', 'weighted', or with euclidean distance 'ward'.

        Raises:
            ValueError: as `linkage_from_embeddings` and :meth:`from_linkage` do.
        """
        return cls.from_linkage(
            derive.linkage_from_embeddings(embeddings, metric, method), classes, num_classes, levels
        )

    # ---- storing

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe data from which :meth:`from_dict` makes an equal taxonomy."""
        plain = Taxonomy(self.leaves, self.levels)
        order: list[list[list[str]] | None] = []
        for mine, theirs in zip(self.nodes, plain.nodes, strict=True):
            order.append(None if mine == theirs else list(map(list, mine)))
        data = {
            "format": _FORMAT,
            "version": 1,
            "levels": list(self.levels),
            "leaves": [list(p) for p in self.leaves],
        }
        return {**data, "order": order} if any(order) else data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Taxonomy:
        """The inverse of :meth:`to_dict`.

        Raises:
            ValueError: if `data` is not what `to_dict` returns, or of a later version.
        """
        if not isinstance(data, Mapping):
            raise ValueError(f"not a stored taxonomy: it is a dict, got {data!r}.")
        if data.get("format") != _FORMAT or "leaves" not in data:
            raise ValueError(
                f"not a stored taxonomy: it needs format {_FORMAT!r} and leaves, got keys "
                f"{list(data)}."
            )
        if data.get("version") != 1:
            raise ValueError(
                f"stored taxonomy of version {data.get('version')!r}; this release reads version 1."
            )
        return cls(data["leaves"], data.get("levels"), data.get("order"))

    def save_json(self, file: str | Path) -> None:
        """Write :meth:`to_dict` to a file that :meth:`from_json` reads."""
        text = json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n"
        replace_file(file, lambda temporary: Path(temporary).write_text(text, encoding="utf-8"))

    # ---- other trees made of this one

    def reorder(self, names: Sequence[str | Sequence[str]]) -> Taxonomy:
        """The same forest with its leaves in another order, such as a dataset's own class order.

        Args:
            names: all leaves, written as for :meth:`encode`, in the order wanted.

        Raises:
            ValueError: if `names` is not each leaf once.
        """
        indices = self.encode(as_items("names", names, "['animal/cat', 'animal/dog']")).tolist()
        if sorted(indices) != list(range(self.num_leaves)):
            missing = [
                self.leaf_names[i] for i in sorted(set(range(self.num_leaves)) - set(indices))
            ]
            raise ValueError(
                f"names must list each of the {self.num_leaves} leaves once; got {len(indices)} "
                f"names, missing {missing}."
            )
        return Taxonomy([self.leaves[i] for i in indices], self.levels)

    def prune(self, classes: torch.Tensor | str | Iterable[Any]) -> Taxonomy:
        """The tree of only some leaves, such as those present in a dataset.

        Leaves and the classes of each level keep their order; nodes, and last levels, without
        leaves left go. Use :meth:`translate` to turn old leaf labels into the new tree's.

        Args:
            classes: the leaves to keep, in any order, repeated or not: names as for :meth:`encode`,
                or leaf indices, even all labels of a dataset (-1, "unknown", is none).

        Raises:
            ValueError: if a name or index is not that of a leaf, or no leaf is left.

        Example:
            >>> tree = Taxonomy(['animal/cat', 'animal/dog', 'transport/ship'])
            >>> small = tree.prune(['ship', 'dog'])
            >>> small.leaves, tree.translate([0, 1, 2], small).tolist()
            ((('animal', 'dog'), ('transport', 'ship')), [-1, 0, 1])
        """
        if not isinstance(classes, torch.Tensor):
            classes = [classes] if isinstance(classes, str) else list(classes)
            if any(isinstance(item, (str, Sequence)) for item in classes):
                classes = self.encode(classes)
        kept = as_labels(classes, self.num_leaves, "leaf label").unique().tolist()
        leaves = [self.leaves[i] for i in kept if i >= 0]
        if not leaves:
            raise ValueError(
                f"pruning would leave none of the {self.num_leaves} leaves; name those to keep."
            )
        used: set[NodePath] = set()
        for path in leaves:
            used |= {path[:depth] for depth in range(1, len(path) + 1)}
        order = []
        for level in self.nodes[: max(map(len, leaves))]:
            order.append([node for node in level if node in used])
        return Taxonomy(leaves, self.levels[: len(order)], order)

    def merge(self, other: Taxonomy, same_names: bool = False) -> Taxonomy:
        """The union of two trees.

        Leaves and classes of this one keep their indices, those of the other follow.

        A level's default name ('level2') gives way to a name of the other tree's.

        Args:
            other: the other tree.
            same_names: whether a leaf's name may stand at different paths in the two. By default
                that is refused: a 'cat' under 'pet' here and under 'mammal' there is nearly always
                one class, which would become two.

        Raises:
            ValueError: if a node is a leaf of one and has children in the other, level names
                differ, or a leaf name stands at different paths and `same_names` is not set.

        Example:
            >>> other = Taxonomy(['animal/dog', 'animal/cat'])
            >>> Taxonomy(['animal/cat', 'transport/ship']).merge(other).leaves
            (('animal', 'cat'), ('transport', 'ship'), ('animal', 'dog'))
        """
        return Taxonomy(*merge_forests(self, other, same_names))
