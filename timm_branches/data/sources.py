"""Readers of what `create_dataset` accepts.

Each lists the images, their labels on every level, and their splits.
"""

import csv
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from timm_branches.data.images import FileImages, is_image_name, open_tar
from timm_branches.data.stratify import stratified_indices
from timm_branches.taxonomy.taxonomy import Taxonomy
from timm_branches.taxonomy.trees import get_taxonomy

__all__ = [
    "Source",
    "node_labels",
    "read_csv",
    "read_digits",
    "read_folder",
    "read_tar",
    "read_torchvision",
]

SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
TORCHVISION = {
    "cifar10": "CIFAR10",
    "cifar100": "CIFAR100",
    "fashion_mnist": "FashionMNIST",
    "mnist": "MNIST",
}
_PATH_COLUMNS = ("path", "image", "file", "filename", "filepath")
Node = tuple[str, ...]


@dataclass
class Source:
    """What a reader found.

    Attributes:
        images: N uint8 arrays HWC.
        labels: LongTensor (N, L), -1 where unknown.
        taxonomy: The tree that the labels refer to.
        splits: For each image 'train', 'val' or 'test'; None if the source knows no splits.
    """

    images: Any
    labels: torch.Tensor
    taxonomy: Taxonomy
    splits: np.ndarray | None = None


def node_labels(nodes: Sequence[Node], taxonomy: Taxonomy) -> torch.Tensor:
    """The labels of all levels for class names, each a whole path or the end of one.

    Args:
        nodes: For each sample the names on the way to its class, or the class's own name alone;
            empty is unknown.
        taxonomy: The tree to find them in.

    Returns:
        LongTensor (N, L), -1 below an inner node, and everywhere for an unknown one.

    Raises:
        ValueError: If names do not occur in the taxonomy, or fit several classes; all of them are
            listed.

    Example:
        >>> tree = Taxonomy(['animal/cat', 'animal/dog', 'transport/ship'])
        >>> node_labels([('ship',), ('animal', 'dog'), ('animal',), ()], tree).tolist()
        [[1, 2], [0, 1], [0, -1], [-1, -1]]
    """
    every = [node for level in taxonomy.nodes for node in level]
    whole = set(every)
    by_name: dict[str, list[Node]] = {}
    # A leaf wins over an inner node of the same name: folders are named after classes.
    leaves = set(taxonomy.leaves)
    for node in every:
        by_name.setdefault(node[-1], []).append(node)
    unknown: list[str] = []
    ambiguous: list[str] = []
    found: dict[Node, Node] = {}
    for node in dict.fromkeys(nodes):
        if not node:
            continue
        options = [node] if node in whole else by_name.get(node[-1], [])
        if len(options) > 1:  # the longest common end decides, then being a leaf
            options = [option for option in options if option[-len(node) :] == node] or options
            options = [option for option in options if option in leaves] or options
        if len(options) == 1:
            found[node] = options[0]
        else:
            (ambiguous if options else unknown).append("/".join(node))
    if unknown or ambiguous:
        message = ""
        if unknown:
            message += f"{len(unknown)} class names are not in the taxonomy: {_some(unknown)}. "
        if ambiguous:
            message += (
                f"{len(ambiguous)} class names fit several of its classes: {_some(ambiguous)}. "
            )
        raise ValueError(f"{message}Its leaves are {_some(taxonomy.leaf_names)}.")
    rows = taxonomy.encode_partial(found.values())
    table = torch.cat([rows, torch.full((1, taxonomy.num_levels), -1)])
    position = {node: i for i, node in enumerate(found)}
    return table[torch.tensor([position.get(node, -1) for node in nodes], dtype=torch.long)]


def _some(names: Iterable[str], limit: int = 20) -> str:
    names = list(names)
    return ", ".join(map(repr, names[:limit])) + (
        f" and {len(names) - limit} more" if len(names) > limit else ""
    )


def _derive(nodes: Iterable[Node], levels: Sequence[str] | None = None) -> Taxonomy:
    """The tree of the class paths that occur; an inner node with samples of its own is no leaf."""
    from timm.utils.misc import natural_key

    unique = {node for node in nodes if node}
    inner = {node[:depth] for node in unique for depth in range(1, len(node))}
    # Natural order ('2' before '10'), as timm numbers class folders.
    leaves = sorted(unique - inner, key=lambda node: [natural_key(name) for name in node])
    if not leaves:
        raise ValueError("no class is named at all, so no taxonomy can be derived")
    depth = max(map(len, leaves))
    return Taxonomy(leaves, levels[:depth] if levels else None)


def read_digits(taxonomy: Taxonomy | None = None) -> Source:
    """scikit-learn's 1,797 handwritten digits, 8x8 grey.

    A fixed stratified fifth is 'test', another 'val'.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "'digits' comes with scikit-learn: pip install timm_branches[recipes]"
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
                f"{name} is not (completely) in {os.path.abspath(root)}: {error} Pass download=True to fetch it "
                "there, or root=... if you have it elsewhere."
            ) from error
        parts.append(np.asarray(data.data))
        targets.append(torch.as_tensor(data.targets).long())
        splits.append(np.full(len(data), part))
    tree, labels = _ready_made(name, torch.cat(targets), taxonomy)
    images = parts[0] if len(parts) == 1 else np.concatenate(parts)
    return Source(images, labels, tree, np.concatenate(splits))


def _from_names(names: Sequence[str], images: Any, where: str, taxonomy: Taxonomy | None) -> Source:
    """Classes and splits out of the images' relative paths."""
    if not names:
        raise ValueError(
            f"no images in {where}; they are expected in one folder per class, e.g. cat/1.jpg"
        )
    folders: list[Node] = [tuple(name.split("/")[:-1]) for name in names]
    splits = None
    # Only if all top folders are splits: 'train' alone beside 'car' and 'bus' is a vehicle.
    if all(folder and folder[0].lower() in SPLITS for folder in folders):
        splits = np.array([SPLITS[folder[0].lower()] for folder in folders])
        folders = [folder[1:] for folder in folders]
    for name, folder in zip(names, folders, strict=True):
        if not folder:
            raise ValueError(
                f"{name} in {where} lies in no class folder; expected e.g. cat/{os.path.basename(name)}"
            )
    # From all splits together, so that class 3 of 'train' is class 3 of 'test' although 'test' may
    # lack a class.
    tree = _derive(folders) if taxonomy is None else taxonomy
    return Source(images, node_labels(folders, tree), tree, splits)


def read_folder(root: str, in_chans: int = 3, taxonomy: Taxonomy | None = None) -> Source:
    """A folder of class folders, nested where classes are; train, val(idation) and test folders may
    lie on top.

    timm's `ReaderImageFolder` is not used because it keeps one name per image, so that a hierarchy
    is lost.

    Args:
        root: The folder.
        in_chans: 3 for RGB, 1 for grey.
        taxonomy: The tree whose class names the folders bear; None derives it from the folders.

    Returns:
        The images, in natural order of their paths.

    Raises:
        ValueError: If there are no images, an image lies in no class folder, or folders do not
            match the taxonomy.
    """
    from timm.utils.misc import natural_key

    names = []
    for folder, below, files in os.walk(root, followlinks=True):
        below[:] = [name for name in below if not name.startswith(".")]
        rest = os.path.relpath(folder, root).replace(os.sep, "/")
        names += [file if rest == "." else f"{rest}/{file}" for file in files]
    names = sorted(filter(is_image_name, names), key=natural_key)
    images = FileImages([os.path.join(root, name) for name in names], in_chans)
    return _from_names(names, images, root, taxonomy)


def read_tar(path: str, in_chans: int = 3, taxonomy: Taxonomy | None = None) -> Source:
    """A tar of what `read_folder` reads, compressed or not, with or without the folder itself on
    top.

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
    # `tar -cf data.tar data` puts the folder itself on top of every path; as a class it would say
    # nothing.
    tops = {name.split("/")[0] for name in names}
    if len(tops) == 1 and all(name.count("/") > 1 for name in names) and not tops & set(SPLITS):
        names = [name.split("/", 1)[1] for name in names]
    return _from_names(names, images, path, taxonomy)


def read_csv(path: str, in_chans: int = 3, taxonomy: Taxonomy | None = None) -> Source:
    """A CSV with a header: the image's path (relative to the CSV), then one column a level,
    coarsest first.

    Instead of the levels there may be one column `label` with class names. A column `split` is
    optional. An empty cell is unknown on that level (-1). With a taxonomy, columns named like its
    levels are read and further ones left out.

    Args:
        path: The CSV.
        in_chans: 3 for RGB, 1 for grey.
        taxonomy: The tree to find the names in; None derives it from the rows.

    Returns:
        The images in the order of the rows.

    Raises:
        ValueError: If columns are missing, do not fit the taxonomy, or names are unknown or
            ambiguous in it.
    """
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file, skipinitialspace=True)
        columns = list(reader.fieldnames or [])
        rows = [{key: (value or "").strip() for key, value in row.items() if key} for row in reader]
    image_column = next((column for column in _PATH_COLUMNS if column in columns), None)
    levels = [column for column in columns if column not in (image_column, "split")]
    if image_column is None or not levels or not rows:
        raise ValueError(
            f"{path} has the columns {columns} and {len(rows)} rows; needed are a column 'path', then one column per "
            "level or one named 'label', and at least one row"
        )
    if taxonomy is not None and levels != ["label"]:
        if set(taxonomy.levels) <= set(levels):
            levels = list(taxonomy.levels)
        elif len(levels) != taxonomy.num_levels:
            raise ValueError(
                f"{path} has the level columns {levels}, the taxonomy the levels {list(taxonomy.levels)}"
            )
    cells = [tuple(row[level] for level in levels) for row in rows]
    if levels == ["label"]:
        nodes = [tuple(cell.split("/")) if cell else () for (cell,) in cells]
        tree = _derive(nodes) if taxonomy is None else taxonomy
        labels = node_labels(nodes, tree)
    else:
        tree = _derive(map(_known_start, cells), levels) if taxonomy is None else taxonomy
        labels = _cell_labels(cells, tree, path)
    splits = None
    if "split" in columns:
        given = [row["split"].lower() for row in rows]
        if wrong := sorted(set(given) - set(SPLITS)):
            raise ValueError(f"{path} has the splits {_some(wrong)}; known are {_some(SPLITS)}")
        splits = np.array([SPLITS[name] for name in given])
    folder = os.path.dirname(os.path.abspath(path))
    return Source(
        FileImages([os.path.join(folder, row[image_column]) for row in rows], in_chans),
        labels,
        tree,
        splits,
    )


def _known_start(cells: Node) -> Node:
    return cells[: cells.index("")] if "" in cells else cells


def _cell_labels(cells: Sequence[Node], tree: Taxonomy, where: str) -> torch.Tensor:
    """Labels of rows with one cell a level.

    A row with gaps takes the only node that fits what it does say.
    """
    resolved: dict[Node, Node] = {}
    for row in dict.fromkeys(cells):
        depth = max((i + 1 for i, cell in enumerate(row) if cell), default=0)
        if not depth:
            resolved[row] = ()
            continue
        nodes = tree.nodes[depth - 1] if depth <= tree.num_levels else ()
        fits = [
            node
            for node in nodes
            if all(name in ("", own) for name, own in zip(row[:depth], node, strict=True))
        ]
        if len(fits) != 1:
            what = f"{len(fits)} classes fit" if fits else "no class fits"
            raise ValueError(
                f"{where}: {what} the row {dict(zip(tree.levels, row, strict=False))}, first in line "
                f"{cells.index(row) + 2}; fill in more of its levels, or add it to the taxonomy"
            )
        resolved[row] = fits[0]
    labels = node_labels([resolved[row] for row in cells], tree)
    empty = torch.tensor([[not cell for cell in row[: tree.num_levels]] for row in cells])
    return labels.masked_fill(empty, -1)
