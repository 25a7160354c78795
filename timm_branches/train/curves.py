"""Pictures of a run: accuracy per level over the loss-weight schedule, and confusion matrices."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from timm_branches.figures import COLOURS, FAINT, INK, new_figure, restrain, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "collapse_figure",
    "confusion_figure",
    "history_figure",
    "plot_collapse",
    "plot_confusion",
    "plot_history",
]


def plot_history(
    rows: Sequence[Mapping[str, Any]], path: str | os.PathLike, metric: str = ""
) -> Path:
    """Draw :func:`history_figure` into a PNG, atomically.

    Args:
        rows: One mapping an epoch, as `CsvLog.read()` returns them.
        path: The PNG; missing folders are made.
        metric: As in :func:`history_figure`.

    Returns:
        The path.

    Raises:
        ValueError: The rows name no level.
    """
    return save_figure(history_figure(rows, metric), path)


def history_figure(rows: Sequence[Mapping[str, Any]], metric: str = "") -> Figure:
    """Accuracy of each level by epoch, and below it, on the same axis, how the loss was weighted.

    Args:
        rows: One mapping an epoch with `epoch`, `eval_<level>_top1` (percent) and
            `weight_<level>`. Missing values are None, NaN or absent. Of two rows of one epoch the
            later counts, as after a resume.
        metric: What to show where no level has an accuracy, such as `'psnr'` (the key
            `eval_psnr`).

    Returns:
        A matplotlib Figure with one axes, or two where there are weights that change: constant
        ones are a line of text. Epochs are counted from 1, as on the console. Levels are those of
        `weight_<level>` in the order of the columns, then those that only have an accuracy.

    Raises:
        ValueError: There is no row, or none has a key `weight_<level>` or `eval_<level>_top1`.

    Example:
        >>> rows = [{'epoch': 0, 'eval_fine_top1': 40.0, 'weight_fine': 0.5}]
        >>> rows += [{'epoch': 1, 'eval_fine_top1': 60.0, 'weight_fine': 1.0}]
        >>> [axes.get_ylabel() for axes in history_figure(rows).axes]
        ['top-1 accuracy (%)', 'loss weight']
    """
    keys = list(dict.fromkeys(chain.from_iterable(rows)))
    weighted = [key.removeprefix("weight_") for key in keys if key.startswith("weight_")]
    if metric and f"eval_{metric}" in keys and not any(key.endswith("_top1") for key in keys):
        measured, weighted = [metric], []
        column, title = "eval_{}", metric
    else:
        measured = [key[5:-5] for key in keys if key.startswith("eval_") and key.endswith("_top1")]
        column, title = "eval_{}_top1", "top-1 accuracy (%)"
    # what has no curve comes last: a flat twin's levels bear the colours of its B-CNN's
    with_curve = [level for level in weighted if level in measured]
    levels = list(dict.fromkeys([*with_curve, *filter(None, measured), *weighted]))
    if not levels:
        raise ValueError(
            "There is nothing to plot: no row has a key weight_<level> or eval_<level>_top1. "
            f"The keys are {keys}."
        )
    by_epoch = {_value(row.get("epoch", i)): row for i, row in enumerate(rows)}
    by_epoch = {epoch: by_epoch[epoch] for epoch in sorted(filter(math.isfinite, by_epoch))}
    if not by_epoch:
        raise ValueError("There is nothing to plot: no row has an epoch.")
    epochs = [epoch + 1 for epoch in by_epoch]  # people count from 1
    weights = {level: _column(by_epoch, f"weight_{level}") for level in weighted}
    changing = any(map(_changes, weights.values()))

    figure = new_figure(7.2, 5.0 if changing else 3.8)
    if changing:
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1.1])
        _draw_weights(bottom, epochs, weights, levels)
        lowest = bottom
    else:
        top = lowest = figure.subplots()
        _write_weights(top, weights)
    _draw_accuracy(
        top, epochs, {lv: _column(by_epoch, column.format(lv)) for lv in levels}, levels, title
    )
    lowest.set_xlabel("epoch")
    lowest.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    top.set_xlim(epochs[0] - 0.5, epochs[-1] + 0.5)
    figure.align_ylabels()
    return figure


def plot_collapse(
    histories: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]],
    levels: Sequence[str],
    path: str | os.PathLike,
) -> Path:
    """Draw :func:`collapse_figure` into a PNG, atomically.

    Args:
        histories: For each of a few schedules the rows of each seed's run.
        levels: The levels, coarse to fine.
        path: The PNG; missing folders are made.

    Returns:
        The path.
    """
    return save_figure(collapse_figure(histories, levels), path)


def collapse_figure(
    histories: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]], levels: Sequence[str]
) -> Figure:
    """Accuracy by epoch under several loss-weight schedules, a panel a level.

    It shows what happens to heads that are turned off.

    Args:
        histories: For each schedule the rows (`epoch`, `eval_<level>_top1` in percent,
            `weight_<level>`) of each seed's run. The first schedule's epochs in which a level's
            weight is 0 are shaded in its panel.
        levels: The levels, coarse to fine.

    Returns:
        A matplotlib Figure with one axes a level; thin lines are seeds, the thick one is their
        mean.
    """
    figure = new_figure(3.1 * len(levels) + 0.6, 3.4)
    panels = figure.subplots(1, len(levels), squeeze=False)[0]
    names = list(histories)
    for axes, level in zip(panels, levels, strict=True):
        restrain(axes)
        axes.set_title(level, fontsize=11, color=INK, loc="left")
        axes.grid(axis="y", color=FAINT, linewidth=0.8)
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        for row in next(iter(histories.values()))[0]:
            if row[f"weight_{level}"] == 0:
                centre = row["epoch"] + 1
                axes.axvspan(centre - 0.5, centre + 0.5, color="#EEEEEE", linewidth=0, zorder=0)
        for name, runs in histories.items():
            colour = _colour(name, names)
            curves = []
            for run in runs:
                curves.append([_value(row[f"eval_{level}_top1"]) for row in run])
            epochs = [row["epoch"] + 1 for row in runs[0]]  # people count from 1
            for curve in curves if len(curves) > 1 else ():
                axes.plot(epochs, curve, color=colour, linewidth=0.7, alpha=0.4)
            mean = [sum(values) / len(values) for values in zip(*curves, strict=True)]
            axes.plot(epochs, mean, color=colour, linewidth=2, label=name)
    panels[0].set_ylabel("top-1 accuracy (%)")
    figure.legend(
        *panels[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=len(names),
        frameon=False,
        fontsize=9,
        labelcolor=INK,
    )
    figure.suptitle(
        "shaded: the level's weight is 0", fontsize=8, color="#777777", x=0.995, ha="right"
    )
    return figure


def _draw_accuracy(
    axes: Axes, epochs: list[float], values: dict[str, list[float]], levels: list[str], title: str
) -> None:
    restrain(axes)
    axes.set_ylabel(title)
    axes.grid(axis="y", color=FAINT, linewidth=0.8)
    seen = list(filter(math.isfinite, chain.from_iterable(values.values())))
    low, high = (min(seen), max(seen)) if seen else (0.0, 100.0)
    margin = max(1.0, 0.06 * (high - low))
    axes.set_ylim(max(0.0, low - margin), min(101.0, high + margin))
    marker = "o" if len(epochs) <= 20 else None
    ends = []
    for level, column in values.items():
        # a level that is not evaluated every epoch is still one line, so its gaps are left out, not
        # drawn
        points = [(e, v) for e, v in zip(epochs, column, strict=True) if math.isfinite(v)]
        if points:
            x, y = zip(*points, strict=True)
            axes.plot(
                x,
                y,
                color=_colour(level, levels),
                linewidth=2,
                marker=marker,
                markersize=4,
                label=level,
            )
            ends.append((y[-1], level))
    lower, upper = axes.get_ylim()
    heights = _apart(sorted(value for value, _ in ends), lower, upper)
    for (value, level), height in zip(sorted(ends), heights, strict=True):
        axes.annotate(
            f"{level}  {value:.1f}",
            (1.015, height),
            xycoords=("axes fraction", "data"),
            va="center",
            color=_colour(level, levels),
            fontsize=10,
            annotation_clip=False,
        )


def _draw_weights(
    axes: Axes, epochs: list[float], values: dict[str, list[float]], levels: list[str]
) -> None:
    restrain(axes)
    axes.set_ylabel("loss weight")
    # the weights of epoch e hold for all of it: a band from e - 1/2 to e + 1/2, under the point of
    # its accuracy
    edges = [e - 0.5 for e in epochs] + [epochs[-1] + 0.5]
    base = [0.0] * len(epochs)
    for level, column in values.items():
        heights = np.nan_to_num(column, nan=0.0, posinf=0.0, neginf=0.0)
        summit = (np.array(base) + heights).tolist()
        axes.fill_between(
            edges,
            base + base[-1:],
            summit + summit[-1:],
            step="post",
            linewidth=0,
            color=_colour(level, levels),
            alpha=0.85,
            label=level,
        )
        base = summit
    axes.set_ylim(min(0.0, *base), max(base) or 1.0)


def _changes(column: Sequence[float]) -> bool:
    known = [value for value in column if math.isfinite(value)]
    return bool(known) and min(known) < max(known)


def _write_weights(axes: Axes, weights: Mapping[str, Sequence[float]]) -> None:
    """A constant weight is a number, not a picture; a single one says nothing."""
    parts = []
    for level, column in weights.items():
        known = [value for value in column if math.isfinite(value)]
        if known:
            parts.append(f"{level} {known[0]:.3g}")
    if len(parts) > 1:
        words = f"loss weights of all epochs: {', '.join(parts)}"
        axes.set_title(words, fontsize=8, color="#777777", loc="right", parse_math=False)


def _apart(values: list[float], lower: float, upper: float) -> list[float]:
    """Heights for labels at ascending `values`.

    They are moved as little as lets none cover its neighbour.
    """
    step = 0.075 * (upper - lower)
    # [centre, labels]: labels that would overlap move together, about their mean
    groups: list[list[float]] = []
    for value in values:
        groups.append([value, 1])
        while (
            len(groups) > 1
            and groups[-1][0] - groups[-2][0] < step * (groups[-1][1] + groups[-2][1]) / 2
        ):
            (a, n), (b, m) = groups[-2:]
            groups[-2:] = [[(a * n + b * m) / (n + m), n + m]]
    places = []
    for centre, count in groups:
        places += [centre + step * (i - (count - 1) / 2) for i in range(int(count))]
    return places


def plot_confusion(
    matrix: Any, class_names: Sequence[str], path: str | os.PathLike, title: str = ""
) -> Path:
    """Draw :func:`confusion_figure` into a PNG, atomically.

    Args:
        matrix: Counts (K, K): rows are the true class, columns the predicted.
        class_names: K names.
        path: The PNG; missing folders are made.
        title: Above the picture, for instance the level.

    Returns:
        The path.

    Raises:
        ValueError: The matrix is not square, or has another size than there are names.
    """
    return save_figure(confusion_figure(matrix, class_names, title), path)


def confusion_figure(matrix: Any, class_names: Sequence[str], title: str = "") -> Figure:
    """Share of each true class that was predicted as each class.

    Numbers are in percent, for up to 12 classes.

    Args:
        matrix: Counts (K, K), rows true, columns predicted: tensor, array or lists. A row without
            samples stays grey.
        class_names: K names. Where they do not fit, only every n-th is written.
        title: Above the picture.

    Returns:
        A matplotlib Figure whose first axes holds the picture.

    Raises:
        ValueError: The matrix is not square, has another size than there are names, or holds a
            negative count.
    """
    counts = np.asarray(matrix.detach().cpu() if hasattr(matrix, "detach") else matrix, dtype=float)
    n = len(class_names)
    if counts.shape != (n, n) or n == 0:
        raise ValueError(
            f"{n} class names need a matrix of shape ({n}, {n}), n > 0, got {counts.shape}."
        )
    if (counts < 0).any():
        raise ValueError(f"A confusion matrix holds counts, got a negative one: {counts.min():g}.")
    total = counts.sum(1, keepdims=True)
    share = np.divide(counts, total, out=np.full_like(counts, np.nan), where=total > 0)

    side = min(max(0.62 * n, 2.6), 8.5)
    names = []
    for name in map(str, class_names):
        names.append(name if len(name) <= 22 else name[:21] + "…")
    longest = max(map(len, names)) * 0.075
    figure = new_figure(side + longest + 1.4, side + min(longest, 1.6) + 0.9)
    axes = figure.subplots()
    from matplotlib.colors import PowerNorm

    axes.set_facecolor(FAINT)  # shows through where a class has no samples
    # among many classes each confusion is a small share: the square root keeps it visible beside
    # the diagonal
    norm = PowerNorm(1.0 if n <= 12 else 0.5, vmin=0, vmax=1)
    image = axes.imshow(share, cmap="Blues", norm=norm, interpolation="nearest")
    axes.set_title(title, fontsize=12, color=INK, loc="left")
    axes.set_xlabel("predicted", color=INK)
    axes.set_ylabel("true", color=INK)
    every = math.ceil(9.5 / (72 * side / n))  # a name needs 9.5 points of height
    ticks = list(range(0, n, every))
    size = 10 if n <= 12 else 7
    axes.set_yticks(ticks, [names[i] for i in ticks], fontsize=size)
    flat = max(map(len, names)) * size * 0.62 < 72 * side / n  # fits side by side without turning
    turn: dict[str, Any] = (
        {} if flat else {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
    )
    if n > 12 and not flat:
        turn = {"rotation": 90}
    axes.set_xticks(ticks, [names[i] for i in ticks], fontsize=size, **turn)
    axes.tick_params(length=0, colors=INK)
    for spine in axes.spines.values():
        spine.set_visible(False)
    if n <= 12:
        for row in range(n):
            for column in range(n):
                if math.isfinite(share[row, column]):
                    axes.text(
                        column,
                        row,
                        f"{100 * share[row, column]:.0f}",
                        ha="center",
                        va="center",
                        fontsize=10,
                        color="white" if share[row, column] > 0.55 else INK,
                    )
        axes.text(
            1,
            1.02,
            "% of true class",
            transform=axes.transAxes,
            ha="right",
            fontsize=8,
            color="#777777",
        )
    else:
        bar = figure.colorbar(image, ax=axes, shrink=0.6, aspect=30, ticks=[0, 0.05, 0.2, 0.5, 1])
        bar.ax.set_yticklabels(["0", "5", "20", "50", "100 %"], fontsize=8, color=INK)
        bar.ax.tick_params(length=0)
        bar.outline.set_visible(False)
    return figure


def _colour(level: str, levels: list[str]) -> str:
    return COLOURS[levels.index(level) % len(COLOURS)]


def _value(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def _column(by_epoch: Mapping[float, Mapping[str, Any]], key: str) -> list[float]:
    return [_value(row.get(key)) for row in by_epoch.values()]
