"""What people give as arguments, checked at the edges: one way to say what was wrong."""

import math
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any

__all__ = ["as_items", "check_flag", "check_number", "shown"]


def check_number(
    name: str,
    value: Any,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    whole: bool = False,
    above: bool = False,
    below: bool = False,
) -> None:
    """Refuse what is not a finite number within limits.

    Args:
        name: What it is called, such as `drop_rate=`.
        value: What was given.
        low: The least that is allowed.
        high: The most that is allowed.
        whole: Only whole numbers.
        above: Only numbers above `low`.
        below: Only numbers below `high`.

    Raises:
        ValueError: It is something else.

    Example:
        >>> check_number('drop_rate=', 0.5, 0, 1, below=True)
    """
    kind_of_number = Integral if whole else Real
    good = isinstance(value, kind_of_number) and not isinstance(value, bool)
    good = good and math.isfinite(value)
    if good:
        good = low <= value <= high
        if (above and value == low) or (below and value == high):
            good = False
    if good:
        return
    kind = "a whole number" if whole else "a finite number"
    limits = []
    if low > -math.inf:
        limits.append(f"above {low:g}" if above else f"from {low:g}")
    # a limit that no sensible whole number comes near is only said where it is passed
    too_large = isinstance(value, (int, float)) and value > high
    if high < math.inf and (not whole or too_large):
        limits.append(f"below {high:g}" if below else f"up to {high:g}")
    text = " ".join([kind, *limits])
    raise ValueError(f"{name} takes {text}, got {shown(value)}.")


def check_flag(name: str, value: Any) -> None:
    """Refuse what is neither True nor False.

    Raises:
        ValueError: It is something else.
    """
    if not isinstance(value, bool):
        raise ValueError(f"{name} takes True or False, got {shown(value)}.")


def as_items(name: str, value: Any, example: str) -> list[Any]:
    """A sequence as a list.

    Args:
        name: What it is called.
        value: What was given: any iterable but text and bytes.
        example: What would be right.

    Raises:
        ValueError: It is something else.
    """
    items = None
    if isinstance(value, Iterable) and not isinstance(value, (str, bytes)):
        try:
            items = list(value)
        except TypeError:  # an array or a tensor of a single number
            items = None
    if items is None:
        raise ValueError(f"{name} takes a list, such as {example}, got {shown(value)}.")
    return items


def shown(value: Any) -> str:
    """A value for a message, cut where it is long."""
    if isinstance(value, (list, dict)) and len(value) > 20:
        return f"{type(value).__name__} of {len(value):,} entries"
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."
