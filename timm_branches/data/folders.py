"""Folders of class folders: what their names mean, and what in them is not read."""

import os
from collections.abc import Callable, Sequence
from itertools import chain

import numpy as np

from timm_branches.data.splits import split_of
from timm_branches.data.summary import DataSummary, count_endings, listed
from timm_branches.taxonomy.order import natural_order
from timm_branches.taxonomy.taxonomy import Taxonomy

__all__ = ["find_files", "read_folder_names", "walk"]

Node = tuple[str, ...]
_UNLABELLED = frozenset(
    ["unlabeled", "unlabelled", "unsup", "unsupervised", "unknown_labels", "nolabel", "no_label"]
)
_SYSTEM = frozenset(["thumbs.db", "desktop.ini"])


def walk(root: str):
    """Folders and their files in natural order; links are followed, no folder is read twice."""
    seen = {os.path.realpath(root)}
    for folder, below, files in os.walk(root, followlinks=True):
        kept = []
        for name in sorted(below, key=natural_order):
            place = os.path.realpath(os.path.join(folder, name))
            if name.startswith(".") or name == "__MACOSX" or place in seen:
                continue
            seen.add(place)
            kept.append(name)
        below[:] = kept
        relative = os.path.relpath(folder, root).replace(os.sep, "/")
        yield "" if relative == "." else relative, kept, sorted(files, key=natural_order)


def find_files(root: str, is_wanted: Callable[[str], bool]) -> tuple[list[str], DataSummary]:
    """The files of a folder that are wanted, and what the others are.

    Args:
        root: The folder.
        is_wanted: Whether a relative path is to be read.

    Returns:
        Their paths relative to the folder, with forward slashes, in natural order; and the summary
        with what was left out by its ending, and with class folders that have nothing to read.
    """
    summary = DataSummary(source=root)
    names, others = [], []
    for folder, below, files in walk(root):
        prefix = f"{folder}/" if folder else ""
        visible = [f for f in files if not f.startswith(".") and f.lower() not in _SYSTEM]
        wanted = [prefix + name for name in visible if is_wanted(prefix + name)]
        names += wanted
        others += [prefix + name for name in visible if not is_wanted(prefix + name)]
        if not below and not wanted and folder:
            endings = ", ".join(count_endings(visible)) or "it is empty"
            summary.warnings.append(f"the folder {folder} has nothing to read ({endings})")
    summary.left_out = count_endings(others)
    return sorted(names, key=natural_order), summary


def read_folder_names(
    names: Sequence[str], where: str, taxonomy: Taxonomy | None, summary: DataSummary
) -> tuple[list[Node], np.ndarray | None, list[int]]:
    """The class path and the split of each image, out of its relative path.

    Args:
        names: Paths with forward slashes.
        where: What they are relative to, for a message.
        taxonomy: The tree of the classes, if it is known: a folder named like one of its classes is
            a class.
        summary: Told what was left out and what may be a mistake.

    Returns:
        The class paths, the splits (None without), and the positions of the images that were kept.

    Raises:
        ValueError: An image lies in no class folder, or folders of splits and others are mixed.
    """
    folders: list[Node] = [tuple(name.split("/")[:-1]) for name in names]
    known: set[str] = set()
    if taxonomy is not None:
        known = {node[-1] for node in chain.from_iterable(taxonomy.nodes)}
    folders = _without_wrappers(folders, known, summary)
    kept = list(range(len(names)))
    splits: list[str] | None = None
    found = {folder[0]: split_of(folder[0]) for folder in folders if folder}
    found = {name: split for name, split in found.items() if name not in known or split}
    if _are_splits(found, known):
        splits, kept = _split_folders(folders, found, where, summary)
        folders = [folders[i][1:] for i in kept]
    elif all(folder and split_of(folder[-1]) for folder in folders):
        # cat/train/1.jpg
        inner = {split_of(folder[-1]) for folder in folders}
        if len(inner) > 1:
            splits = [str(split_of(folder[-1])) for folder in folders]
            folders = [folder[:-1] for folder in folders]
    for i, folder in zip(kept, folders, strict=True):
        if not folder:
            raise ValueError(
                f"{names[i]} in {where} lies in no class folder; expected e.g. "
                f"cat/{os.path.basename(names[i])}."
            )
    return folders, None if splits is None else np.array(splits), kept


def _without_wrappers(folders: list[Node], known: set[str], summary: DataSummary) -> list[Node]:
    """Paths without folders that lie on top of everything: as a class they would say nothing."""
    while True:
        tops = {folder[0] for folder in folders if folder}
        if len(tops) != 1 or any(len(folder) < 2 for folder in folders):
            return folders
        (top,) = tops
        if split_of(top) or top in known:
            return folders
        summary.warnings.append(
            f"the folder {top!r} lies on top of all others; it is taken for no level"
        )
        folders = [folder[1:] for folder in folders]


def _are_splits(found: dict[str, str | None], known: set[str]) -> bool:
    """Whether the top folders are splits: all of them, or 'train' with another one among them.

    'train' alone beside 'car' and 'bus' is a vehicle.
    """
    splits = {split for name, split in found.items() if split}
    if not splits:
        return False
    others = [name for name, split in found.items() if not split]
    named = [name for name, split in found.items() if split]
    if not others:
        return not set(named) <= known or len(splits) > 1
    if all(name.lower() in _UNLABELLED for name in others):
        return True
    return len(splits) > 1 and "train" in splits


def _split_folders(
    folders: list[Node], found: dict[str, str | None], where: str, summary: DataSummary
) -> tuple[list[str], list[int]]:
    others = [name for name, split in found.items() if not split]
    strange = [name for name in others if name.lower() not in _UNLABELLED]
    if strange:
        named = sorted(name for name, split in found.items() if split)
        raise ValueError(
            f"{where} holds folders of splits ({', '.join(named)}) beside others "
            f"({listed(sorted(strange))}): whether these are classes cannot be told. Move them "
            "away, or into the splits."
        )
    splits, kept = [], []
    for i, folder in enumerate(folders):
        split = found.get(folder[0]) if folder else None
        if split is None:
            continue
        splits.append(split)
        kept.append(i)
    left_out = len(folders) - len(kept)
    if left_out:
        summary.left_out[f"images in {', '.join(others) or 'no folder'}"] = left_out
    return splits, kept
