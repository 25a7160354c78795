"""Where labels of two sources meet, they are compared by name, never by index.

Data, model, checkpoint, cache and task each bring a class list or a taxonomy. An index without its
tree means nothing: what is equal up to its order, or a subset, is translated; the rest is refused
with the difference in words.
"""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Sequence

import torch

from timm_branches.taxonomy.paths import NodePath
from timm_branches.taxonomy.taxonomy import Taxonomy

__all__ = ["LabelTranslation", "class_difference", "match_classes", "match_taxonomies"]

_SHOWN = 5  # names that a sentence lists


class LabelTranslation:
    """Labels of one tree as labels of another: its nodes are found again by their paths.

    Args:
        tables: For each level of the tree translated to, the level of the labels that it is read
            from, and for each class there (and -1 behind them) its class here.

    Example:
        >>> given = Taxonomy(['animal/dog', 'transport/ship'])
        >>> expected = Taxonomy(['animal/cat', 'animal/dog', 'transport/ship'])
        >>> match_taxonomies(given, expected)(torch.tensor([[0, 0], [1, 1], [0, -1]])).tolist()
        [[0, 1], [1, 2], [0, -1]]
    """

    def __init__(self, tables: Sequence[tuple[int, torch.Tensor]]):
        self.tables = tuple(tables)

    def __call__(self, labels: torch.Tensor) -> torch.Tensor:
        """Translate labels (..., L), one column a level; -1 stays unknown.

        Raises:
            ValueError: Another number of columns, or a label that its level does not have.
        """
        levels = max(level for level, _ in self.tables) + 1
        if labels.ndim == 0 or labels.shape[-1] < levels:
            raise ValueError(
                f"Labels have one column a level, here {levels}; got the shape "
                f"{tuple(labels.shape)}."
            )
        columns = []
        for level, table in self.tables:
            column = labels[..., level].long()
            if column.device.type == "cpu" and column.numel():
                self._check(column, len(table) - 1)
            columns.append(table.to(column.device)[column])
        return torch.stack(columns, -1)

    @staticmethod
    def _check(column: torch.Tensor, classes: int) -> None:
        lowest, highest = int(column.min()), int(column.max())
        if lowest < -1 or highest >= classes:
            wrong = lowest if lowest < -1 else highest
            raise ValueError(
                f"The label {wrong} is out of range: legal are 0 to {classes - 1}, and -1 for "
                "unknown."
            )


def class_difference(
    given: Sequence[str],
    expected: Sequence[str],
    given_name: str = "the data",
    expected_name: str = "the model",
) -> str:
    """What tells two class lists apart, in words; empty if they are equal, in the same order.

    Example:
        >>> class_difference(['cat', 'dgo'], ['cat', 'dog'])
        "'dgo' is only in the data, 'dog' only in the model ('dgo' may be 'dog')"
    """
    only_given = _without(given, expected)
    only_expected = _without(expected, given)
    parts = []
    if only_given:
        parts.append(f"{_listed(only_given)} only in {given_name}")
    if only_expected:
        parts.append(f"{_listed(only_expected)} only in {expected_name}")
    if not parts:
        if list(given) == list(expected):
            return ""
        return f"the order differs between {given_name} and {expected_name}"
    if len(parts) == 2:
        parts[1] = parts[1].replace(" is only", " only", 1).replace(" are only", " only", 1)
    return ", ".join(parts) + _renamed(only_given, only_expected)


def _without(names: Sequence[str], others: Sequence[str]) -> list[str]:
    known = set(others)
    return [name for name in names if name not in known]


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:_SHOWN])
    if len(names) == 1:
        return f"{shown} is"
    if len(names) > _SHOWN:
        return f"{shown} and {len(names) - _SHOWN} others are"
    return f"{shown} are"


def _renamed(given: Sequence[str], expected: Sequence[str]) -> str:
    """Names that differ by their spelling alone, or by little: perhaps the same class."""
    plain = {_plain(name): name for name in expected}
    for name in given[:_SHOWN]:
        meant = plain.get(_plain(name))
        if meant is None:
            close = difflib.get_close_matches(name, expected[:1000], n=1, cutoff=0.6)
            meant = close[0] if close else None
        if meant is not None:
            return f" ({name!r} may be {meant!r})"
    return ""


def _plain(name: str) -> str:
    """A name without what writing alone changes: case, form of Unicode, spaces and their like."""
    text = unicodedata.normalize("NFKC", name).casefold()
    return " ".join(text.replace("_", " ").replace("-", " ").split())


def match_classes(
    given: Sequence[str],
    expected: Sequence[str],
    *,
    given_name: str = "the data",
    expected_name: str = "the model",
    subset: bool = True,
) -> torch.Tensor | None:
    """Compare two class lists by name.

    Args:
        given: Names in the order of the labels that come in.
        expected: Names in the order of the labels that are needed.
        given_name: What brings `given`, for a message.
        expected_name: What brings `expected`.
        subset: Whether `given` may lack some of `expected`.

    Returns:
        None if the lists are equal; else a LongTensor (len(given),) from given to expected index.

    Raises:
        ValueError: The classes are others; the difference is named.

    Example:
        >>> match_classes(['dog', 'cat'], ['cat', 'dog', 'ship']).tolist()
        [1, 0]
    """
    given, expected = list(given), list(expected)
    if given == expected:
        return None
    index = {name: i for i, name in enumerate(expected)}
    complete = subset or len(given) == len(expected)
    unique = len(index) == len(expected) and len(set(given)) == len(given)
    if not complete or not unique or any(name not in index for name in given):
        difference = class_difference(given, expected, given_name, expected_name)
        raise ValueError(
            f"The classes of {given_name} are not those of {expected_name}: {difference}."
        )
    return torch.tensor([index[name] for name in given])


def match_taxonomies(
    given: Taxonomy,
    expected: Taxonomy,
    *,
    given_name: str = "the data",
    expected_name: str = "the model",
    subset: bool = True,
) -> LabelTranslation | None:
    """Compare two trees by the paths of their nodes.

    Args:
        given: The tree of the labels that come in.
        expected: The tree of the labels that are needed.
        given_name: What brings `given`, for a message.
        expected_name: What brings `expected`.
        subset: Whether `given` may lack some of the nodes of `expected`.

    Returns:
        None if the trees number their classes alike; else what translates labels (..., L).

    Raises:
        ValueError: The trees differ in more than order or a missing part; the difference is named.
    """
    if given.nodes == expected.nodes:
        return None
    if given.num_levels > expected.num_levels:
        raise ValueError(
            f"The trees do not fit: {given_name} have {given.num_levels} levels "
            f"{list(given.levels)}, {expected_name} {expected.num_levels} {list(expected.levels)}."
        )
    if not subset and given.num_levels < expected.num_levels:
        raise ValueError(
            f"The trees do not fit: {expected_name} has the levels {list(expected.levels)}, "
            f"{given_name} only {list(given.levels)}."
        )
    tables = []
    for level in range(given.num_levels):
        tables.append(
            (level, _level_table(given, expected, level, given_name, expected_name, subset))
        )
    # levels below the deepest one of the data are unknown there
    last = given.num_levels - 1
    unknown = torch.full((len(given.nodes[last]) + 1,), -1)
    tables += [(last, unknown)] * (expected.num_levels - given.num_levels)
    return LabelTranslation(tables)


def _level_table(
    given: Taxonomy,
    expected: Taxonomy,
    level: int,
    given_name: str,
    expected_name: str,
    subset: bool,
) -> torch.Tensor:
    """From each class of a level (and -1 behind them) to the expected tree's class."""
    nodes, known = given.nodes[level], expected.nodes[level]
    index = {path: i for i, path in enumerate(known)}
    if any(path not in index for path in nodes) or (not subset and len(nodes) != len(known)):
        difference = class_difference(_texts(nodes), _texts(known), given_name, expected_name)
        raise ValueError(
            f"The classes of level {expected.levels[level]!r} are not the same: {difference}."
        )
    return torch.tensor([*(index[path] for path in nodes), -1])


def _texts(paths: Sequence[NodePath]) -> list[str]:
    return [" / ".join(path) for path in paths]
