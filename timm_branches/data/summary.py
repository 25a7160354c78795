"""What a reader understood of people's data, said before anything is trained."""

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

__all__ = ["DataSummary", "listed", "summarize"]

_SHOWN = 5


def listed(names: Iterable[Any], limit: int = _SHOWN) -> str:
    """The first few of many names, and how many more there are.

    Example:
        >>> listed(['a', 'b', 'c'], 2)
        "'a', 'b' and 1 more"
    """
    names = list(names)
    shown = ", ".join(repr(name) for name in names[:limit])
    more = len(names) - limit
    return f"{shown} and {more} more" if more > 0 else shown


@dataclass
class DataSummary:
    """What was understood of a data set; `print` shows it as text.

    Attributes:
        source: Where the data come from.
        levels: The number of classes on each level, coarsest first.
        columns: Of a table, what each column was taken for.
        splits: For each split its number of `images`, and of `classes` of the finest level.
        left_out: What was not read, by reason, with counts.
        unlabelled: How many samples have no label on any level.
        warnings: What is probably a mistake, in sentences.
    """

    source: str = ""
    levels: dict[str, int] = field(default_factory=dict)
    columns: dict[str, str] = field(default_factory=dict)
    splits: dict[str, dict[str, int]] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)
    unlabelled: int = 0
    warnings: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "DataSummary":
        """The inverse of :meth:`to_dict`."""
        return cls(**data)

    def __str__(self) -> str:
        lines = []
        if self.columns:
            taken = ", ".join(f"{column} as {role}" for column, role in self.columns.items())
            lines.append(f"columns: {taken}")
        if self.levels:
            counts = ", ".join(f"{name} ({count})" for name, count in self.levels.items())
            lines.append(f"levels, with their classes: {counts}")
        for name, split in self.splits.items():
            text = f"{name}: {split['images']} image{'s' * (split['images'] != 1)}"
            if split["classes"]:
                text += f" of {split['classes']} class{'es' * (split['classes'] != 1)}"
            lines.append(text)
        if self.unlabelled:
            lines.append(f"without any label: {self.unlabelled}")
        for reason, count in self.left_out.items():
            lines.append(f"left out: {count} {reason}")
        lines += [f"warning: {warning}" for warning in self.warnings]
        return "\n".join(lines)


def summarize(**splits: Any) -> DataSummary:
    """What was understood of all splits together, and what looks wrong between them.

    Args:
        **splits: Data sets by the name of their split, `train=...`, `val=...`, `test=...`; None is
            left out.

    Returns:
        The summary. Its warnings name classes without a training image, classes that only
        validation or test have, equal files in two splits, and one image with two labels.

    Example:
        >>> from timm_branches.data import create_splits
        >>> train, val, test = create_splits('digits')
        >>> print(summarize(train=train, val=val, test=test))
        levels, with their classes: shape (3), digit (10)
        train: 1077 images of 10 classes
        val: 360 images of 10 classes
        test: 360 images of 10 classes
    """
    given = {name: data for name, data in splits.items() if data is not None}
    result = DataSummary()
    for data in given.values():
        own = getattr(_behind_subsets(data), "summary", None)
        if own is not None:
            result.levels = result.levels or dict(own.levels)
            result.source = result.source or own.source
            result.columns = result.columns or dict(own.columns)
            # parts of one source share what was left out
            result.left_out = {**result.left_out, **own.left_out}
            result.warnings += [text for text in own.warnings if text not in result.warnings]
    first = next(iter(given.values()), None)
    taxonomy = getattr(first, "taxonomy", None)
    if taxonomy is not None:
        result.levels = dict(zip(taxonomy.levels, taxonomy.num_classes, strict=True))
    classes = {}
    for name, data in given.items():
        labels = getattr(data, "labels", None)
        if labels is None:
            result.splits[name] = _count_pairs(data)
            continue
        rows = labels.reshape(-1, labels.shape[-1])
        classes[name] = set(_deepest(rows))
        known = classes[name] - {None}
        result.unlabelled += int((rows < 0).all(1).sum())
        result.splits[name] = {"images": len(data), "classes": len(known)}
    result.warnings += _missing_classes(classes, taxonomy)
    result.warnings += _equal_files(given)
    return result


def _behind_subsets(data: Any) -> Any:
    """The data set that torch's subsets choose from."""
    while isinstance(data, torch.utils.data.Subset):
        data = data.dataset
    return data


def _count_pairs(data: Any) -> dict[str, int]:
    """Images, however often each counts in an epoch, and classes of data without labels."""
    indices = list(range(len(data)))
    inner = data
    while isinstance(inner, torch.utils.data.Subset):
        indices = [inner.indices[index] for index in indices]
        inner = inner.dataset
    repeats = getattr(inner, "repeats", 1)
    images = {index // repeats for index in indices}
    return {"images": len(images), "classes": len(getattr(inner, "classes", ()))}


def _deepest(rows: torch.Tensor) -> list[tuple[int, int] | None]:
    """Level and class of the deepest label of each distinct row."""
    result: list[tuple[int, int] | None] = []
    for row in torch.unique(rows, dim=0).tolist():
        known = [(level, label) for level, label in enumerate(row) if label >= 0]
        result.append(known[-1] if known else None)
    return result


def _missing_classes(classes: Mapping[str, set], taxonomy: Any) -> list[str]:
    if taxonomy is None or "train" not in classes:
        return []
    trained = set()
    for node in classes["train"]:
        if node is not None:
            trained.add(taxonomy.nodes[node[0]][node[1]])
    warnings = []
    without = [leaf for leaf in taxonomy.leaves if leaf not in trained]
    if without:
        warnings.append(
            f"{len(without)} of {taxonomy.num_leaves} classes have no training image: "
            f"{listed(' / '.join(leaf) for leaf in without)}"
        )
    for split in classes:
        if split == "train":
            continue
        only = []
        for node in sorted(node for node in classes[split] if node is not None):
            path = taxonomy.nodes[node[0]][node[1]]
            if path in without:
                only.append(" / ".join(path))
        if only:
            warnings.append(f"{len(only)} classes occur in {split} only: {listed(only)}")
    return warnings


def _equal_files(splits: Mapping[str, Any]) -> list[str]:
    """Files that two splits share, and files with two labels: by their content."""
    by_size: dict[int, list[tuple[str, str, tuple[int, ...]]]] = defaultdict(list)
    for split, data in splits.items():
        images = getattr(data, "images", None)
        paths = getattr(getattr(images, "images", images), "paths", None)
        if paths is None or not hasattr(data, "sample_ids"):
            continue
        rows = data.labels.reshape(len(data), -1).tolist()
        for sample, row in zip(data.sample_ids.tolist(), rows, strict=True):
            path = str(paths[sample])
            try:
                size = os.stat(path).st_size
            except OSError:
                continue
            by_size[size].append((split, path, tuple(row)))
    shared: list[tuple[str, str]] = []
    contradicting: list[tuple[str, str]] = []
    for entries in _alike(by_size.values()):
        first: dict[str, tuple[str, str, tuple[int, ...]]] = {}
        digests: dict[str, str] = {}
        for entry in entries:
            split, path, row = entry
            if path not in digests:
                digests[path] = _digest(path)
            other = first.setdefault(digests[path], entry)
            if other is entry:
                continue
            if other[0] != split:
                shared.append((other[1], path))
            if other[2] != row:
                contradicting.append((other[1], path))
    warnings = []
    if shared:
        a, b = shared[0]
        warnings.append(f"{len(shared)} files are the same in two splits, such as {a} and {b}")
    if contradicting:
        a, b = contradicting[0]
        warnings.append(
            f"{len(contradicting)} files are the same under two labels, such as {a} and {b}"
        )
    return warnings


def _alike(groups: Iterable[list]) -> Iterator[list]:
    """Of files of one size those whose ends are equal, too: few are left to be read as a whole."""
    for entries in groups:
        if len(entries) < 2:
            continue
        by_ends: dict[bytes, list] = defaultdict(list)
        for entry in entries:
            by_ends[_ends(entry[1])].append(entry)
        for alike in by_ends.values():
            if len(alike) > 1:
                yield alike


def _ends(path: str, count: int = 4096) -> bytes:
    """The first and last bytes of a file; of a folder its name."""
    if not os.path.isfile(path):
        return path.encode()
    with open(path, "rb") as file:
        first = file.read(count)
        file.seek(max(0, os.fstat(file.fileno()).st_size - count))
        return first + file.read(count)


def _digest(path: str) -> str:
    if not os.path.isfile(path):
        return path
    with open(path, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


def count_endings(names: Sequence[str]) -> dict[str, int]:
    """How many of the files have each ending, as reasons for having been left out."""
    endings: Counter[str] = Counter()
    for name in names:
        ending = os.path.splitext(name)[1].lower()
        endings[f"files {ending}" if ending else "files without an ending"] += 1
    return dict(sorted(endings.items()))
