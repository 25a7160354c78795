"""The order of names: natural, total, and the same in every process."""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from itertools import chain

__all__ = ["natural_order", "path_order", "twins", "warnings_of_twins"]

_NUMBER = re.compile(r"([0-9]+)")
Key = tuple[tuple[int | str, ...], str]


def natural_order(name: str) -> Key:
    """A key that sorts '2' before '10', as timm numbers class folders.

    Names that differ only by case or leading zeros ('Robin', 'robin'; '7', '07') are ties for
    timm's key, and then fall as a set or a directory happens to list them. Here the name itself
    decides, so that the order is total. Only ASCII digits are numbers ('10²' is a name).

    Example:
        >>> sorted(['10', 'robin', '07', 'Robin', '7'], key=natural_order)
        ['07', '7', '10', 'Robin', 'robin']
    """
    parts = _NUMBER.split(name.lower())
    # texts stand at even places and numbers at odd ones, so that like is compared with like
    parts[1::2] = map(int, parts[1::2])
    key = tuple(parts)
    return key, name


def path_order(path: Sequence[str]) -> list[Key]:
    """A key that sorts paths level by level in natural order."""
    return [natural_order(name) for name in path]


def twins(names: Iterable[str]) -> list[tuple[str, str]]:
    """Pairs of different names that a person would take for one.

    They differ by case, by the form of Unicode (NFC, NFD) or by spaces alone.

    Example:
        >>> twins(['Robin', 'robin', 'wren'])
        [('Robin', 'robin')]
    """
    first: dict[str, str] = {}
    pairs = []
    for name in dict.fromkeys(names):
        plain = " ".join(unicodedata.normalize("NFKC", name).casefold().split())
        other = first.setdefault(plain, name)
        if other != name:
            pairs.append((other, name))
    return pairs


def warnings_of_twins(leaves: Iterable[Sequence[str]]) -> list[str]:
    """A sentence for each pair of names in these class paths that a person would take for one."""
    names = sorted(set(chain.from_iterable(leaves)))
    return [
        f"{a!r} and {b!r} differ by case, spaces or the form of Unicode alone; they are two classes"
        for a, b in twins(names)
    ]
