"""Two taxonomies made into one.

Documented at `Taxonomy.merge`, which calls :func:`merge_forests`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, zip_longest

from timm_branches.taxonomy.forest import Forest
from timm_branches.taxonomy.paths import NodePath

__all__ = ["merge_forests"]


def merge_forests(
    a: Forest, b: Forest, same_names: bool
) -> tuple[list[NodePath], list[str], list[list[NodePath]]]:
    """Leaves, level names and order of the union: what is in `a` first, then what only `b` has.

    Args:
        a: a forest.
        b: another.
        same_names: whether a leaf's name may stand at different paths in the two.
    """
    _check_kinds(a, b)
    if not same_names:
        _check_names(a, b)
    order = [
        list(dict.fromkeys(mine + theirs))
        for mine, theirs in zip_longest(a.nodes, b.nodes, fillvalue=())
    ]
    return list(dict.fromkeys(a.leaves + b.leaves)), _merge_levels(a.levels, b.levels), order


def _check_kinds(a: Forest, b: Forest) -> None:
    """No node may be a leaf of one and an inner node of the other."""
    for one, other, where in (
        (a, b, "this tree but has children in the other"),
        (b, a, "the other tree but has children in this one"),
    ):
        inner = set(chain.from_iterable(other.nodes)) - set(other.leaves)
        if both := [leaf for leaf in one.leaves if leaf in inner]:
            raise ValueError(f"cannot merge: {_shown(both)} is a leaf of {where}.")


def _check_names(a: Forest, b: Forest) -> None:
    """A class that both have, by its name, must stand at the same place."""
    only_a, only_b = set(a.leaves) - set(b.leaves), set(b.leaves) - set(a.leaves)
    mine = {leaf[-1]: leaf for leaf in a.leaves if leaf in only_a}
    if both := [leaf for leaf in b.leaves if leaf in only_b and leaf[-1] in mine]:
        raise ValueError(
            f"cannot merge: leaf {both[0][-1]!r} is {_shown([mine[both[0][-1]]])} in this tree and "
            f"{_shown(both[:1])} in the other ({len(both)} such names); if they are different "
            "classes, pass same_names=True."
        )


def _merge_levels(a: Sequence[str], b: Sequence[str]) -> list[str]:
    merged = []
    for i, (mine, theirs) in enumerate(zip_longest(a, b)):
        default = f"level{i + 1}"
        named = list(dict.fromkeys(name for name in (mine, theirs) if name not in (None, default)))
        if len(named) > 1:
            raise ValueError(
                f"cannot merge: level {i} is called {mine!r} in this tree and {theirs!r} in the "
                f"other; levels are {list(a)} and {list(b)}."
            )
        merged += named or [default]
    return merged


def _shown(paths: Sequence[NodePath]) -> str:
    return ", ".join(repr("/".join(path)) for path in paths[:5])
