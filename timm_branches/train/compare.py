"""Is it worth it? Several seeds of several methods as one table, and a verdict.

The verdict is one that the numbers bear. Recipes are single files that people copy, so what all of
them use is in the package.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

__all__ = ["Difference", "comparison_table", "paired_difference", "verdict"]

Results = Mapping[str, Sequence[Mapping[str, float]]]  # method -> one dict of metrics a seed


@dataclass(frozen=True)
class Difference:
    """The mean of paired differences and its confidence interval.

    Attributes:
        mean: Mean difference.
        low: Lower end of the interval, -inf for a single pair.
        high: Upper end.
        count: Number of pairs.
    """

    mean: float
    low: float
    high: float
    count: int

    @property
    def measurable(self) -> bool:
        """Whether the interval leaves zero out."""
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        if math.isinf(self.low):
            return f"{self.mean:+.2f}"
        return f"{self.mean:+.2f} [{self.low:+.2f}, {self.high:+.2f}]"


def paired_difference(
    a: Sequence[float], b: Sequence[float], confidence: float = 0.95
) -> Difference:
    """Mean of a - b over seeds with Student's confidence interval; pairs share data and seed.

    mean +- t_{n-1} * s / sqrt(n), with s the standard deviation of the differences.

    Args:
        a: One value a seed.
        b: The other method's values of the same seeds.
        confidence: Of the interval, in (0, 1).

    Returns:
        The difference. One pair says nothing about the spread, so its interval is infinite.

    Raises:
        ValueError: The lengths differ, there is no pair, or the confidence is not in (0, 1).

    Example:
        >>> str(paired_difference([3.0, 4.0, 5.0], [1.0, 2.0, 4.0]))
        '+1.67 [+0.23, +3.10]'
    """
    if len(a) != len(b) or not a:
        raise ValueError(
            f"a paired difference needs as many values on either side, got {len(a)} and {len(b)}."
        )
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be in (0, 1), got {confidence}.")
    differences = [x - y for x, y in zip(a, b, strict=True)]
    count, mean = len(differences), fmean(differences)
    if count == 1:
        return Difference(mean, -math.inf, math.inf, 1)
    from scipy.stats import t

    half = float(t.ppf((1 + confidence) / 2, count - 1)) * stdev(differences) / math.sqrt(count)
    return Difference(mean, mean - half, mean + half, count)


def comparison_table(results: Results, columns: Mapping[str, str], decimals: int = 2) -> str:
    """Mean and standard deviation over seeds, a row a method.

    Args:
        results: For each method one dict of metrics a seed.
        columns: Metric -> its title; a metric that a method lacks is a dash.
        decimals: Digits behind the point.

    Returns:
        Text. One seed has no deviation, so it stands alone.
    """

    def cell(runs: Sequence[Mapping[str, float]], metric: str) -> str:
        values = [run[metric] for run in runs if metric in run]
        if not values:
            return "-"
        text = f"{fmean(values):.{decimals}f}"
        return f"{text} ± {stdev(values):.{decimals}f}" if len(values) > 1 else text

    rows = [["", *columns.values()]]
    for name, runs in results.items():
        rows.append([name, *(cell(runs, column) for column in columns)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        line = first.ljust(widths[0])
        for text, width in zip(others, widths[1:], strict=True):
            line += "  " + text.rjust(width)
        lines.append(line.rstrip())
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join(lines)


def verdict(
    results: Results,
    method: str,
    baseline: str,
    metric: str,
    title: str = "",
    lower_is_better: bool = False,
) -> str:
    """One sentence: whether a method beats another on a metric, as far as these seeds can tell.

    Args:
        results: For each method one dict of metrics a seed, the same seeds in the same order.
        method: The one in question.
        baseline: What it must beat.
        metric: The metric that decides; choose it before looking.
        title: The metric's name for people.
        lower_is_better: For distances.

    Returns:
        The sentence with the paired difference and its 95 % interval. It says "no measurable gain"
        whenever the interval holds zero, and "no verdict" for a single seed.

    Raises:
        ValueError: A method or metric is not among the results.
    """
    for name in (method, baseline):
        if name not in results or any(metric not in run for run in results[name]):
            raise ValueError(
                f"no {metric!r} of {name!r} among the results of {', '.join(results)}."
            )
    ours = [run[metric] for run in results[method]]
    theirs = [run[metric] for run in results[baseline]]
    difference = paired_difference(ours, theirs)
    what = f"{method} against {baseline}, {title or metric}: {difference}"
    if difference.count == 1:
        return f"No verdict from a single seed. {what}."
    seeds = f"95 % interval over {difference.count} seeds"
    if not difference.measurable:
        return f"No measurable gain. {what} ({seeds})."
    better = (difference.mean > 0) != lower_is_better
    return f"{'A measurable gain' if better else 'A measurable loss'}. {what} ({seeds})."
