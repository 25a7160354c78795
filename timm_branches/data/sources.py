"""Readers of what `create_dataset` accepts: named data sets, tables, folders and tars.

Each returns a :class:`Source`: the images, their labels on every level, and their splits. Others
join by :func:`register_reader`.
"""

import json
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain, takewhile
from operator import not_
from typing import Any

import numpy as np
import torch

from timm_branches.data.columns import choose_columns, resolve_paths
from timm_branches.data.folders import find_files, read_folder_names
from timm_branches.data.images import FileImages, is_image_name, open_tar
from timm_branches.data.splits import SPLIT_NAMES, split_of
from timm_branches.data.stratify import stratified_indices
from timm_branches.data.summary import DataSummary, listed
from timm_branches.taxonomy.field_files import category_paths, is_categories
from timm_branches.taxonomy.order import path_order, warnings_of_twins
from timm_branches.taxonomy.table_files import Table, read_table
from timm_branches.taxonomy.taxonomy import Taxonomy
from timm_branches.taxonomy.trees import get_taxonomy

__all__ = [
    "READERS",
    "Source",
    "node_labels",
    "read_categories",
    "read_csv",
    "read_digits",
    "read_folder",
    "read_tar",
    "read_torchvision",
    "register_reader",
]

TORCHVISION = {
    "cifar10": "CIFAR10",
    "cifar100": "CIFAR100",
    "fashion_mnist": "FashionMNIST",
    "mnist": "MNIST",
}
_logger = logging.getLogger(__name__)
Node = tuple[str, ...]


@dataclass
class Source:
    """Images (or clips) with what is known of them: what a reader returns.

    Attributes:
        images: A sequence of N arrays (H, W, C), read when they are asked for. It may have
            `identity(indices)`, a text that changes with the content of these images, by which
            caches know them again.
        labels: LongTensor (N, L), -1 where unknown.
        taxonomy: The tree that the labels refer to.
        splits: For each image 'train', 'val' or 'test'; None if the source knows no splits.
        groups: For each image the number of what it belongs to (a subject, a video), which is never
            divided between two splits; None if each stands alone.
        summary: What was understood and what was left out.
    """

    images: Any
    labels: torch.Tensor
    taxonomy: Taxonomy
    splits: np.ndarray | None = None
    groups: np.ndarray | None = None
    summary: DataSummary = field(default_factory=DataSummary)


READERS: dict[str, Callable[..., Source]] = {}
"""The registered readers by their prefix."""


def register_reader(prefix: str, reader: Callable[..., Source] | None = None) -> Any:
    """Make `create_dataset('prefix/rest')` call a reader, as timm's readers are chosen by prefix.

    Args:
        prefix: The word before the first slash.
        reader: A function of `(rest, split=, in_chans=, taxonomy=, **options)` that returns a
            :class:`Source`; left out, this is a decorator.

    Raises:
        ValueError: The prefix is empty, holds a slash, or is taken.

    Example:
        >>> @register_reader('doctest-blank')
        ... def read_blank(rest, split, in_chans, taxonomy, **options):
        ...     tree = Taxonomy(['black', 'white'])
        ...     images = np.zeros((int(rest), 8, 8), np.uint8)
        ...     return Source(images, torch.zeros(int(rest), 1, dtype=torch.long), tree)
        >>> from timm_branches.data import create_dataset
        >>> len(create_dataset('doctest-blank/3'))
        3
        >>> del READERS['doctest-blank']
    """
    if not prefix or "/" in prefix:
        raise ValueError(f"A reader's prefix is a word without slashes, got {prefix!r}.")

    def register(function: Callable[..., Source]) -> Callable[..., Source]:
        known = READERS.get(prefix, function)
        if (known.__module__, known.__qualname__) != (function.__module__, function.__qualname__):
            raise ValueError(f"The prefix {prefix!r} is taken by {known.__module__}.")
        READERS[prefix] = function
        return function

    return register if reader is None else register(reader)


# ---- names to labels


def node_labels(nodes: Sequence[Node], taxonomy: Taxonomy) -> torch.Tensor:
    """The labels of all levels for class names, each a whole path or the end of one.

    Args:
        nodes: For each sample the names on the way to its class, or the class's own name alone;
            empty is unknown. Names above the last one must stand above it in the tree, too; levels
            between may be left out.
        taxonomy: The tree to find them in.

    Returns:
        LongTensor (N, L), -1 below an inner node, and everywhere for an unknown one.

    Raises:
        ValueError: If names do not occur in the taxonomy, contradict it, or fit several classes;
            all of them are listed.

    Example:
        >>> tree = Taxonomy(['animal/cat', 'animal/dog', 'transport/ship'])
        >>> node_labels([('ship',), ('animal', 'dog'), ('animal',), ()], tree).tolist()
        [[1, 2], [0, 1], [0, -1], [-1, -1]]
    """
    index = _NodeIndex(taxonomy)
    resolved: dict[Node, Node] = {}
    unknown: list[str] = []
    contradicting: list[str] = []
    ambiguous: list[str] = []
    for node in dict.fromkeys(nodes):
        if not node:
            continue
        options, known = index.find(node)
        if len(options) == 1:
            resolved[node] = options[0]
        elif options:
            ambiguous.append("/".join(node))
        elif known:
            contradicting.append(f"{'/'.join(node)} (in the tree {'/'.join(known[0])})")
        else:
            unknown.append("/".join(node))
    message = ""
    if unknown:
        message += f"{len(unknown)} class names are not in the taxonomy: {listed(unknown, 20)}. "
    if contradicting:
        message += (
            f"{len(contradicting)} classes have other parents in the taxonomy: "
            f"{listed(contradicting, 20)}. "
        )
    if ambiguous:
        message += (
            f"{len(ambiguous)} class names fit several of its classes: {listed(ambiguous, 20)}. "
        )
    if message:
        raise ValueError(f"{message}Its leaves are {listed(taxonomy.leaf_names, 20)}.")
    rows = taxonomy.encode_partial(resolved.values())
    table = torch.cat([rows, torch.full((1, taxonomy.num_levels), -1)])
    position = {node: i for i, node in enumerate(resolved)}
    return table[torch.tensor([position.get(node, -1) for node in nodes], dtype=torch.long)]


class _NodeIndex:
    """Finds the nodes of a tree by their names, each in one look."""

    def __init__(self, taxonomy: Taxonomy):
        self.whole: set[Node] = set()
        self.by_name: dict[str, list[Node]] = {}
        for level in taxonomy.nodes:
            for node in level:
                self.whole.add(node)
                self.by_name.setdefault(node[-1], []).append(node)
        self.leaves = set(taxonomy.leaves)

    def find(self, node: Node) -> tuple[list[Node], list[Node]]:
        """The nodes that a path may mean, and all of its last name whatever stands above."""
        if node in self.whole:
            return [node], [node]
        known = self.by_name.get(node[-1], [])
        options = [option for option in known if _in_order(node[:-1], option[:-1])]
        if len(options) > 1:  # the longest common end decides, then being a leaf
            options = [option for option in options if option[-len(node) :] == node] or options
            # folders are named after classes
            options = [option for option in options if option in self.leaves] or options
        return options, known

    def fit(self, cells: Node) -> list[Node]:
        """The nodes that a row of one cell a level may mean, '' standing for any name."""
        depth = max(i + 1 for i, cell in enumerate(cells) if cell)
        row = cells[:depth]
        if row in self.whole:
            return [row]
        if "" not in row:
            return []
        options = []
        for node in self.by_name.get(row[-1], []):
            fits = len(node) == depth
            if fits and all(cell in ("", name) for cell, name in zip(row, node, strict=True)):
                options.append(node)
        return options


def _in_order(names: Node, path: Node) -> bool:
    """Whether the names stand in the path in this order, others between them or not."""
    rest = iter(path)
    return all(name in rest for name in names)


def derive_tree(
    nodes: Iterable[Node], levels: Sequence[str] | None = None, summary: DataSummary | None = None
) -> Taxonomy:
    """The tree of the class paths that occur; an inner node with samples of its own is no leaf.

    Raises:
        ValueError: No class is named.
    """
    unique = {node for node in nodes if node}
    inner: set[Node] = set()
    for node in unique:
        inner |= {node[:depth] for depth in range(1, len(node))}
    # natural order ('2' before '10'), as timm numbers class folders
    leaves = sorted(unique - inner, key=path_order)
    if not leaves:
        raise ValueError("no class is named at all, so no taxonomy can be derived.")
    if summary is not None:
        summary.warnings += warnings_of_twins(leaves)
    depth = max(map(len, leaves))
    return Taxonomy(leaves, levels[:depth] if levels else None)


# ---- data sets that have a name


def read_digits(taxonomy: Taxonomy | None = None) -> Source:
    """scikit-learn's 1,797 handwritten digits, 8x8 grey.

    A fixed stratified fifth is 'test', another 'val'.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "'digits' comes with scikit-learn: pip install timm_branches[recipes]."
        ) from error

    data = load_digits()
    images = np.round(data.images * (255 / 16)).astype(np.uint8)
    target = torch.from_numpy(data.target).long()
    splits = np.full(len(target), "train", dtype="<U5")
    # The seed is part of the definition of these splits: changing it would change what 'test'
    # means.
    held_out = stratified_indices(target, 720, seed=0)
    test = held_out[stratified_indices(target[held_out], 360, seed=0)]
    splits[held_out.numpy()] = "val"
    splits[test.numpy()] = "test"
    tree, labels = _ready_made("digits", target, taxonomy)
    return Source(images, labels, tree, splits)


def _ready_made(
    name: str, target: torch.Tensor, taxonomy: Taxonomy | None
) -> tuple[Taxonomy, torch.Tensor]:
    """Labels for class indices.

    Another taxonomy than the data set's own is matched by the classes' names.
    """
    own = get_taxonomy(name)
    if taxonomy is None:
        return own, own.expand(target)
    rows = node_labels([leaf[-1:] for leaf in own.leaves], taxonomy)
    return taxonomy, rows[target]


def read_torchvision(
    name: str, root: str, split: str, download: bool = False, taxonomy: Taxonomy | None = None
) -> Source:
    """CIFAR-10, CIFAR-100, Fashion-MNIST or MNIST as torchvision stores them on disk.

    Args:
        name: 'cifar10', 'cifar100', 'fashion_mnist' or 'mnist'.
        root: The folder that torchvision's own `root` would be.
        split: 'train' or 'test' to read only that half; otherwise both are read.
        download: Whether torchvision may fetch missing files.
        taxonomy: Another tree over the same class names.

    Returns:
        The images with the official splits.

    Raises:
        FileNotFoundError: If files are missing or damaged; the message says how to get them.
    """
    from torchvision import datasets

    parts, targets, splits = [], [], []
    for part in [split] if split in ("train", "test") else ["train", "test"]:
        try:
            data = getattr(datasets, TORCHVISION[name])(
                root, train=part == "train", download=download
            )
        except RuntimeError as error:
            if download:
                raise
            raise FileNotFoundError(
                f"{name} is not (completely) in {os.path.abspath(root)}: {error} Pass "
                "download=True to fetch it "
                "there, or root=... if you have it elsewhere."
            ) from error
        parts.append(np.asarray(data.data))
        targets.append(torch.as_tensor(data.targets).long())
        splits.append(np.full(len(data), part))
    tree, labels = _ready_made(name, torch.cat(targets), taxonomy)
    images = parts[0] if len(parts) == 1 else np.concatenate(parts)
    return Source(images, labels, tree, np.concatenate(splits))


# ---- folders and tars


def read_folder(root: str, in_chans: int = 3, taxonomy: Taxonomy | None = None) -> Source:
    """A folder of class folders, nested where classes are; folders of splits may lie on top.

    timm's `ReaderImageFolder` is not used because it keeps one name per image, so that a hierarchy
    is lost.

    Args:
        root: The folder.
        in_chans: 3 for RGB, 1 for grey.
        taxonomy: The tree whose class names the folders bear; None derives it from the folders.

    Returns:
        The images, in natural order of their paths.

    Raises:
        ValueError: If there are no images, an image lies in no class folder, folders of splits and
            others are mixed, or folders do not match the taxonomy.
    """
    names, summary = find_files(root, is_image_name)
    images = FileImages([os.path.join(root, name) for name in names], in_chans)
    return from_names(names, images, root, taxonomy, summary)


def read_tar(path: str, in_chans: int = 3, taxonomy: Taxonomy | None = None) -> Source:
    """A tar of what `read_folder` reads, compressed or not.

    Args:
        path: The tar.
        in_chans: 3 for RGB, 1 for grey.
        taxonomy: The tree whose class names the folders bear; None derives it from the folders.

    Returns:
        The images, in the archive's order.

    Raises:
        ValueError: As `read_folder`, or if the file is no complete tar.
    """
    names, images = open_tar(path, in_chans)
    return from_names(names, images, path, taxonomy, DataSummary(source=path))


def from_names(
    names: Sequence[str],
    images: Any,
    where: str,
    taxonomy: Taxonomy | None,
    summary: DataSummary,
) -> Source:
    """Classes and splits out of the images' relative paths."""
    if not names:
        left_out = ""
        if summary.left_out:
            found = ", ".join(f"{count} {what}" for what, count in summary.left_out.items())
            left_out = f" What is there cannot be read: {found}."
        raise ValueError(
            f"no images in {where}; they are expected in one folder per class, e.g. "
            f"cat/1.jpg.{left_out}"
        )
    folders, splits, kept = read_folder_names(names, where, taxonomy, summary)
    if len(kept) < len(names):
        images = images.select(kept)
    # from all splits together, so that class 3 of 'train' is class 3 of 'test' although 'test' may
    # lack a class
    tree = derive_tree(folders, summary=summary) if taxonomy is None else taxonomy
    return Source(images, node_labels(folders, tree), tree, splits, summary=summary)


# ---- tables


def read_csv(
    path: Any,
    in_chans: int = 3,
    taxonomy: Taxonomy | None = None,
    *,
    root: str | None = None,
    **columns: Any,
) -> Source:
    """A table with the image's path in each row, and one column a level, coarsest first.

    Instead of the levels there may be one column of class names, such as `label`. Columns of
    splits and of groups are optional. An empty cell is unknown on that level (-1). With a
    taxonomy, columns named like its levels are read.

    Args:
        path: The table: CSV, TSV, Parquet, or a data frame (see
            :func:`timm_branches.taxonomy.table_files.read_table`).
        in_chans: 3 for RGB, 1 for grey.
        taxonomy: The tree to find the names in; None derives it from the rows.
        root: The folder that paths are relative to; by default the table's own.
        **columns: `levels`, `path_column`, `split_column`, `group_column`: what to read instead of
            what is found, see :func:`timm_branches.data.columns.choose_columns`.

    Returns:
        The images in the order of the rows.

    Raises:
        FileNotFoundError: Images are missing; the line is named.
        ValueError: If columns are missing, do not fit the taxonomy, or names are unknown or
            ambiguous in it.
    """
    table = read_table(path)
    labelled = label_table(table, taxonomy, **columns)
    paths = resolve_paths(table, labelled.path_column, table_root(path, root))
    labelled.source.images = FileImages(paths, in_chans)
    _check_doubles(paths, labelled.source)
    return labelled.source


def table_root(path: Any, root: str | None) -> str:
    """The folder that a table's paths are relative to."""
    if root is not None:
        return os.path.abspath(root)
    if isinstance(path, str | os.PathLike):
        return os.path.dirname(os.path.abspath(path))
    return os.getcwd()


@dataclass
class LabelledTable:
    """A table's rows with their labels; the images are still to be found."""

    source: Source
    path_column: str


def label_table(
    table: Table, taxonomy: Taxonomy | None, reserved: Sequence[str] = (), **columns: Any
) -> LabelledTable:
    """The labels, splits and groups of a table's rows."""
    chosen = choose_columns(table, taxonomy=taxonomy, reserved=reserved, **columns)
    summary = DataSummary(source=table.source, columns=chosen.roles())
    summary.warnings += [*table.notes, *chosen.warnings]
    if table.nameless:
        summary.left_out["columns without a name"] = table.nameless
    if table.empty_rows:
        summary.left_out["empty rows"] = table.empty_rows
    if len(chosen.levels) == 1:
        nodes, tree = _single_column(table, chosen.levels[0], taxonomy, summary)
        labels = node_labels(nodes, tree)
    else:
        labels, tree = _level_columns(table, chosen.levels, taxonomy, summary)
    source = Source(None, labels, tree, summary=summary)
    if chosen.split is not None:
        source.splits = _splits(table, chosen.split)
    if chosen.group is not None:
        number: dict[str, int] = {}
        groups = [number.setdefault(cell, len(number)) for cell in table.columns[chosen.group]]
        source.groups = np.array(groups)
    return LabelledTable(source, chosen.path)


def _splits(table: Table, column: str) -> np.ndarray:
    cells = table.columns[column]
    meant = {cell: split_of(cell) for cell in set(cells)}
    for row, cell in enumerate(cells):
        if meant[cell] is None:
            raise ValueError(
                f"{table.place(row)}: {cell!r} in the column {column!r} is no split; known are "
                f"{', '.join(sorted(SPLIT_NAMES))}."
            )
    return np.array([meant[cell] for cell in cells])


def _single_column(
    table: Table, column: str, taxonomy: Taxonomy | None, summary: DataSummary
) -> tuple[list[Node], Taxonomy]:
    """Class names in one column: names, or paths if all of them are."""
    cells = table.columns[column]
    names = {cell for cell in cells if cell}
    node_of: dict[str, Node] = {"": ()}
    if taxonomy is not None:
        own = {node[-1] for node in chain.from_iterable(taxonomy.nodes)}
        for name in names:
            node_of[name] = (name,) if name in own else tuple(name.split("/"))
    else:
        # 'AC/DC' among others is a name; if every one has a slash, they are paths
        paths = bool(names) and all("/" in name.strip("/") for name in names)
        if paths:
            summary.columns[column] = "paths of classes, a level between two slashes"
        for name in names:
            node_of[name] = tuple(name.strip("/").split("/")) if paths else (name,)
    nodes = [node_of[cell] for cell in cells]
    if taxonomy is None:
        nested = any(len(node) > 1 for node in nodes)
        levels = None if nested else [column]
        if column == "label":
            levels = None
        return nodes, derive_tree(nodes, levels, summary)
    return nodes, taxonomy


def _level_columns(
    table: Table, levels: list[str], taxonomy: Taxonomy | None, summary: DataSummary
) -> tuple[torch.Tensor, Taxonomy]:
    """Labels of rows with one cell a level."""
    if taxonomy is not None and len(levels) != taxonomy.num_levels:
        raise ValueError(
            f"{table.source} has the level columns {levels}, the taxonomy the levels "
            f"{list(taxonomy.levels)}."
        )
    cells: list[Node] = list(zip(*(table.columns[level] for level in levels), strict=True))
    distinct = dict.fromkeys(cells)
    tree = taxonomy
    if tree is None:
        starts = [tuple(takewhile(bool, row)) for row in distinct]
        tree = derive_tree(starts, levels, summary)
        _warn_of_homonyms(tree, summary)
    index = _NodeIndex(tree)
    nodes = {row: _row_node(row, index, tree, table, cells) for row in distinct}
    labels = node_labels(list(nodes.values()), tree)
    # a gap in a row stays unknown, although the tree would tell it
    gaps = [list(map(not_, row[: tree.num_levels])) for row in distinct]
    labels = labels.masked_fill(torch.tensor(gaps), -1)
    position = {row: i for i, row in enumerate(distinct)}
    return labels[torch.tensor([position[row] for row in cells])], tree


def _row_node(
    row: Node, index: _NodeIndex, tree: Taxonomy, table: Table, cells: Sequence[Node]
) -> Node:
    if not any(row):
        return ()
    options = index.fit(row)
    if len(options) == 1:
        return options[0]
    what = f"{len(options)} classes fit" if options else "no class fits"
    given = dict(zip(tree.levels, row, strict=False))
    raise ValueError(
        f"{table.place(cells.index(row))}: {what} the row {given}; fill in more of its levels, or "
        "add it to the taxonomy."
    )


def _warn_of_homonyms(tree: Taxonomy, summary: DataSummary) -> None:
    for level, nodes in zip(tree.levels, tree.nodes, strict=True):
        parents: dict[str, list[str]] = {}
        for node in nodes:
            parents.setdefault(node[-1], []).append("/".join(node[:-1]))
        several = {name: above for name, above in parents.items() if len(above) > 1}
        for name, above in list(several.items())[:5]:
            summary.warnings.append(
                f"{name!r} of level {level!r} lies below {len(above)} parents "
                f"({listed(above, 3)}): each is a class of its own"
            )


def _check_doubles(paths: Sequence[str], source: Source) -> None:
    """One file in two rows: with one label a repetition, with two a mistake."""
    first: dict[str, int] = {}
    repeated, contradicting = 0, []
    for row, path in enumerate(paths):
        other = first.setdefault(path, row)
        if other == row:
            continue
        repeated += 1
        if not torch.equal(source.labels[other], source.labels[row]):
            contradicting.append(path)
    if contradicting:
        source.summary.warnings.append(
            f"{len(contradicting)} files have two labels, such as {contradicting[0]}"
        )
    elif repeated:
        source.summary.warnings.append(f"{repeated} rows repeat a file that another row has")


# ---- COCO and iNaturalist


def read_categories(
    path: str, in_chans: int = 3, taxonomy: Taxonomy | None = None, root: str | None = None
) -> Source:
    """COCO's and iNaturalist's JSON: `images`, `annotations` and `categories`, a class an image.

    Args:
        path: The JSON file.
        in_chans: 3 for RGB, 1 for grey.
        taxonomy: Another tree to find the categories' names in; None takes that of the file.
        root: The folder that `file_name` is relative to; by default the file's own.

    Returns:
        The images in the order of the file; those without an annotation are unlabelled.

    Raises:
        FileNotFoundError: Images are missing.
        ValueError: It is no such file, an annotation is of no known image or category, or an image
            has several classes.
    """
    with open(path, encoding="utf-8-sig") as file:
        content = json.load(file)
    if not is_categories(content) or "images" not in content or "annotations" not in content:
        raise ValueError(
            f"{path} holds no images with classes: expected `images`, `annotations` and "
            "`categories`, as COCO and iNaturalist have them."
        )
    paths, levels = category_paths(content)
    tree = Taxonomy(list(paths.values()), levels) if taxonomy is None else taxonomy
    number = {image["id"]: i for i, image in enumerate(content["images"])}
    nodes: list[Node] = [()] * len(number)
    for annotation in content["annotations"]:
        image, category = annotation["image_id"], annotation["category_id"]
        if image not in number or category not in paths:
            raise ValueError(
                f"{path}: the annotation {annotation.get('id')} is of image {image} and category "
                f"{category}, one of which the file lacks."
            )
        known, node = nodes[number[image]], paths[category]
        if known and known != node:
            raise ValueError(
                f"{path}: the image {image} has several classes, {'/'.join(known)} and "
                f"{'/'.join(node)}; one an image is needed."
            )
        nodes[number[image]] = node
    table = Table(path, {"file_name": []}, list(range(1, len(number) + 1)))
    table.columns["file_name"] = [image["file_name"] for image in content["images"]]
    files = resolve_paths(table, "file_name", table_root(path, root))
    summary = DataSummary(source=path)
    return Source(FileImages(files, in_chans), node_labels(nodes, tree), tree, summary=summary)
