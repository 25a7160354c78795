"""Pictures of gradients.

Which loss reaches which stage, and how the branches get on with each other over training.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from itertools import chain, product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from timm_branches.figures import COLOURS, FAINT, INK, new_figure, restrain, save_figure
from timm_branches.gradients.reasons import TOTAL
from timm_branches.gradients.report import Cell, GradientReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["conflicts_figure", "plot_conflicts", "plot_report", "report_figure"]

_GREY = "#777777"


def plot_report(report: GradientReport, file: str | os.PathLike) -> Path:
    """Draw :func:`report_figure` into a PNG, atomically.

    Args:
        report: What :func:`gradient_report` returned.
        file: The PNG; missing folders are made.

    Returns:
        The path.
    """
    return save_figure(report_figure(report), file)


def report_figure(report: GradientReport) -> Figure:
    """Heatmap of the losses' gradients by stage, and of the cosines between the losses below it.

    The cosines stand there if any losses meet.

    Args:
        report: What :func:`gradient_report` returned.

    Returns:
        A matplotlib Figure. The colour is the norm relative to the weights, on a logarithmic scale;
        a cell says that norm and the share of the total, or why there is none.
    """
    from matplotlib.colors import LogNorm

    stages = report.stages
    heads = [*report.heads, TOTAL]
    pairs = [f"{first}, {second}" for first, second in report.cosines]
    heights = [0.55 * len(heads) + 0.2]
    height = heights[0] + 1.5
    if pairs:
        heights.append(0.55 * len(pairs) + 0.2)
        height += heights[1] + 0.5
    left = 0.085 * max(map(len, [*heads, *pairs]))
    figure = new_figure(max(5.5, 1.0 * len(stages) + left + 1.3), height)
    panels = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]

    values = []
    for head in heads:
        values.append([_or_nan(report.cell(head, stage).relative) for stage in stages])
    positive = []
    for row_of_values in values:
        positive += [value for value in row_of_values if math.isfinite(value) and value > 0]
    norm = LogNorm(min(positive, default=1e-3) / 1.5, max(positive, default=1.0) * 1.5)
    title = "gradient, relative to the weights"
    _heatmap(figure, panels[0], values, heads, stages, "viridis", norm, title)
    for row, head in enumerate(heads):
        for column, stage in enumerate(stages):
            value = values[row][column]
            has_number = math.isfinite(value) and value > 0
            dark = has_number and norm(value) < 0.55
            text = _cell_text(report.cell(head, stage), value)
            size = 8 if has_number else 7.5
            _write(panels[0], column, row, text, size, "white" if dark else INK)
    figure.supxlabel(
        "percent: share of the total gradient;  empty: the loss does not depend on the stage",
        fontsize=7.5,
        color=_GREY,
        x=0.995,
        ha="right",
    )
    if pairs:
        _draw_cosines(figure, panels[1], report, pairs)
    return figure


def _cell_text(cell: Cell, value: float) -> str:
    """The number of a cell and its share of the total, or why there is no number."""
    if not (math.isfinite(value) and value > 0):
        return "" if cell.status == "none" else cell.status
    if not cell.share or cell.head == TOTAL:
        return _short(value)
    share = round(cell.share, 2) + 0.0  # no -0%
    return f"{_short(value)}\n{share:.0%}"


def _draw_cosines(figure: Figure, axes: Axes, report: GradientReport, pairs: list[str]) -> None:
    cosines = []
    for by_stage in report.cosines.values():
        cosines.append([by_stage.get(stage, math.nan) for stage in report.stages])
    title = "cosine between losses"
    _heatmap(figure, axes, cosines, pairs, report.stages, "PuOr", (-1, 1), title)
    for row, line in enumerate(cosines):
        for column, value in enumerate(line):
            if math.isfinite(value):
                colour = "white" if abs(value) > 0.6 else INK
                _write(axes, column, row, f"{value:+.2f}", 8, colour)


def _write(axes: Axes, x: float, y: float, text: str, size: float, colour: str) -> None:
    axes.text(x, y, text, ha="center", va="center", fontsize=size, color=colour)


def _heatmap(
    figure: Figure,
    axes: Axes,
    values: list[list[float]],
    rows: list[str],
    columns: list[str],
    colours: str,
    norm: Any,
    title: str,
) -> None:
    axes.set_facecolor("#EEEEEE")  # shows through where there is nothing
    scale: dict[str, Any] = {"norm": norm}
    if isinstance(norm, tuple):
        scale = {"vmin": norm[0], "vmax": norm[1]}
    else:  # a logarithm takes no 0
        values = np.where(np.array(values) > 0, values, math.nan).tolist()
    image = axes.imshow(
        values,
        cmap=colours,
        aspect="auto",
        interpolation="nearest",
        **scale,
    )
    axes.set_title(title, fontsize=10, color=INK, loc="left")
    axes.set_yticks(range(len(rows)), rows, fontsize=9)
    turn: dict[str, Any] = {}
    if max(map(len, columns)) > 12:
        turn = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"}
    axes.set_xticks(range(len(columns)), columns, fontsize=8.5, **turn)
    axes.tick_params(length=0, colors=INK)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_xticks([i + 0.5 for i in range(len(columns) - 1)], minor=True)
    axes.set_yticks([i + 0.5 for i in range(len(rows) - 1)], minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="minor", length=0)
    bar = figure.colorbar(image, ax=axes, pad=0.015, aspect=12, fraction=0.04)
    bar.ax.tick_params(which="both", length=0, labelsize=7.5, colors=INK)
    bar.ax.minorticks_off()  # within one decade they would be labelled
    bar.outline.set_visible(False)


def plot_conflicts(rows: Sequence[Mapping[str, Any]], file: str | os.PathLike) -> Path:
    """Draw :func:`conflicts_figure` into a PNG, atomically.

    Args:
        rows: One mapping an epoch, as `CsvLog.read()` returns them.
        file: The PNG; missing folders are made.

    Returns:
        The path.

    Raises:
        ValueError: No row has a cosine.
    """
    return save_figure(conflicts_figure(rows), file)


def conflicts_figure(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Cosines between the branches' gradients by epoch, and below them the losses' weights.

    Both stand on the same axis.

    Args:
        rows: One mapping an epoch with `epoch`, `cosine_<a>_<b>` as :func:`branch_cosines`
            gives them and `weight_<level>`. Missing values (levels that are off) are None, NaN or
            absent.

    Returns:
        A matplotlib Figure with one axes, or two where there are weights that change. Epochs are
        counted from 1, as on the console.

    Raises:
        ValueError: No row has a cosine.

    Example:
        >>> epochs = [{'epoch': 0, 'cosine_coarse_fine': 0.3, 'weight_coarse': 1.0}]
        >>> epochs += [{'epoch': 1, 'cosine_coarse_fine': 0.1, 'weight_coarse': 0.5}]
        >>> figure = conflicts_figure(epochs)
        >>> [axes.get_ylabel() for axes in figure.axes]
        ['cosine of gradients', 'loss weight']
    """
    keys = list(dict.fromkeys(chain.from_iterable(rows)))
    pairs = [key for key in keys if key.startswith("cosine_")]
    levels = [key.removeprefix("weight_") for key in keys if key.startswith("weight_")]
    # people count from 1
    by_epoch = {float(row.get("epoch", i)) + 1: row for i, row in enumerate(rows)}
    epochs = sorted(by_epoch)
    measured = []
    for epoch in epochs:
        if any(math.isfinite(_or_nan(by_epoch[epoch].get(key))) for key in pairs):
            measured.append(epoch)
    if not measured:
        raise ValueError(
            "There is nothing to plot: no row has a number under cosine_<a>_<b>. The keys are "
            f"{keys}."
        )
    changing = False
    for level in levels:
        found = {_or_nan(row.get(f"weight_{level}")) for row in by_epoch.values()}
        changing |= len(set(filter(math.isfinite, found))) > 1
    figure = new_figure(7.2, 5.0 if changing else 3.8)
    if changing:
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1.1])
        _draw_weights(bottom, epochs, by_epoch, levels)
    else:
        top = bottom = figure.subplots()
    restrain(top)
    top.set_ylabel("cosine of gradients")
    top.grid(axis="y", color=FAINT, linewidth=0.8)
    top.axhline(0, color="#999999", linewidth=1)
    for i, key in enumerate(pairs):
        y = [_or_nan(by_epoch[e].get(key)) for e in measured]
        if any(map(math.isfinite, y)):  # drawn with the gaps of levels that were off
            top.plot(
                measured,
                y,
                color=COLOURS[-1 - i % len(COLOURS)],
                linewidth=2,
                marker="o",
                markersize=3.5,
                label=_pair(key, levels),
            )
    low, high = top.get_ylim()
    top.set_ylim(max(-1.05, min(low, -0.1)), min(1.05, max(high, 0.1)))
    top.annotate(
        "conflict",
        (1, 0),
        xycoords=("axes fraction", "data"),
        xytext=(-3, -3),
        textcoords="offset points",
        ha="right",
        va="top",
        fontsize=8,
        color=_GREY,
    )
    top.legend(
        frameon=False,
        fontsize=9,
        labelcolor=INK,
        loc="lower left",
        bbox_to_anchor=(0, 1.0),
        borderaxespad=0,
        ncols=max(1, min(len(pairs), 4)),
    )
    bottom.set_xlabel("epoch")
    bottom.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    top.set_xlim(epochs[0] - 0.5, epochs[-1] + 0.5)
    figure.align_ylabels()
    return figure


def _draw_weights(
    axes: Axes,
    epochs: list[float],
    by_epoch: Mapping[float, Mapping[str, Any]],
    levels: list[str],
) -> None:
    restrain(axes)
    axes.set_ylabel("loss weight")
    # the weights of epoch e hold for all of it: a band from e - 1/2 to e + 1/2
    edges = [e - 0.5 for e in epochs] + [epochs[-1] + 0.5]
    base = [0.0] * len(epochs)
    for i, level in enumerate(levels):
        found = [_or_nan(by_epoch[e].get(f"weight_{level}")) for e in epochs]
        heights = np.nan_to_num(found, nan=0.0, posinf=0.0, neginf=0.0)
        summit = (np.array(base) + heights).tolist()
        axes.fill_between(
            edges,
            base + base[-1:],
            summit + summit[-1:],
            step="post",
            linewidth=0,
            label=level,
            color=COLOURS[i % len(COLOURS)],
            alpha=0.85,
        )
        base = summit
    axes.set_ylim(min(0.0, *base), max(base) or 1.0)
    axes.legend(
        frameon=False,
        fontsize=8,
        labelcolor=INK,
        loc="center left",
        bbox_to_anchor=(1.0, 0.5),
        reverse=True,
        handlelength=1.0,
    )


def _pair(key: str, levels: list[str]) -> str:
    """'coarse, fine' of 'cosine_coarse_fine', where the levels' names tell where to cut."""
    text = key.removeprefix("cosine_")
    cuts = [pair for pair in product(levels, levels) if "_".join(pair) == text]
    return ", ".join(cuts[0]) if len(cuts) == 1 else text


def _short(value: float) -> str:
    return (
        f"{value:.2g}"
        if 0.01 <= value < 100
        else f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    )


def _or_nan(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan
