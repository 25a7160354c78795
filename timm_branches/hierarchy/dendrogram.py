"""Pictures of the clustering that a taxonomy was derived from."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from timm_branches.figures import COLOURS, INK, new_figure, save_figure
from timm_branches.hierarchy.plots import FONT_SIZE, MOST_LEAVES, ROW, text_width
from timm_branches.taxonomy.derive import cut_linkage

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["dendrogram_figure", "plot_dendrogram"]


def plot_dendrogram(
    linkage: Any,
    classes: Sequence[str],
    file: str | os.PathLike,
    num_classes: Sequence[int] = (),
    title: str = "",
) -> Path:
    """Draw :func:`dendrogram_figure` into a PNG, atomically.

    Args:
        linkage: see :func:`dendrogram_figure`.
        classes: as there.
        file: the PNG; missing folders are made.
        num_classes: as there.
        title: as there.

    Returns:
        The file's path.

    Raises:
        ValueError: as :func:`dendrogram_figure` does.
    """
    return save_figure(dendrogram_figure(linkage, classes, num_classes, title), file)


def dendrogram_figure(
    linkage: Any, classes: Sequence[str], num_classes: Sequence[int] = (), title: str = ""
) -> Figure:
    """An agglomerative clustering of classes: which merge, at what distance, where levels cut.

    Args:
        linkage: (K - 1, 4), what `Taxonomy.from_linkage` takes.
        classes: K names, up to 2,000.
        num_classes: number of classes on each level above the leaves, coarsest first; each cut is a
            dashed line, and the groups of the coarsest have a colour each.
        title: above the picture.

    Returns:
        A matplotlib Figure.

    Raises:
        ValueError: if the arguments make no tree, see `cut_linkage`, or there are too many classes.
    """
    from matplotlib.collections import LineCollection

    groups = cut_linkage(linkage, num_classes)
    total = len(groups)
    if len(classes) != total or total > MOST_LEAVES:
        raise ValueError(
            f"A clustering of {total} classes needs {total} names, got {len(classes)}; a picture "
            f"has at most {MOST_LEAVES}."
        )
    merges = [(int(a), int(b), float(height)) for a, b, height, _ in linkage]
    order = _leaf_order(merges, total)
    coarse = [0] * total
    shades = [INK] * total
    if len(num_classes):
        coarse = groups[:, 0].tolist()
        shades = _shades(coarse, order)
    lines, colours = _brackets(merges, order, coarse, shades)

    heights = [height for _, _, height in merges]
    high, low = max(heights, default=1.0), min(heights, default=0.0)
    right = 0.0
    if low < high:  # confusions leave all distances near 1
        right = max(0.0, low - 0.2 * (high - low))
    span = (high - right) or 1.0

    names = max(text_width(name) for name in classes)
    figure = new_figure((400 + names) / 72, (ROW * total + 90) / 72)
    axes = figure.subplots()
    axes.add_collection(LineCollection(lines, colors=colours, linewidths=1.4))
    axes.set(xlim=(high + 0.04 * span, right), ylim=(total - 0.5, -0.5), xlabel="distance")
    leaf_names = [classes[leaf] for leaf in order]
    _name_leaves(axes, leaf_names, [shades[leaf] for leaf in order])
    if title:
        figure.suptitle(title, fontsize=12, color=INK, x=0.02, ha="left")
    _draw_cuts(axes, heights, num_classes, span)
    return figure


def _leaf_order(merges: list[tuple[int, int, float]], total: int) -> list[int]:
    """The classes from top to bottom, so that no two lines cross."""
    members = {i: [i] for i in range(total)}
    for step, (a, b, _) in enumerate(merges):
        members[total + step] = members.pop(a) + members.pop(b)
    [order] = members.values()
    return order


def _shades(coarse: list[int], order: list[int]) -> list[str]:
    """The colour of each class: that of its group, by the groups' order from top to bottom."""
    groups = list(dict.fromkeys(coarse[leaf] for leaf in order))
    rank = {group: i for i, group in enumerate(groups)}
    return [COLOURS[rank[group] % len(COLOURS)] for group in coarse]


def _brackets(
    merges: list[tuple[int, int, float]], order: list[int], coarse: list[int], shades: list[str]
) -> tuple[list[list[tuple[float, float]]], list[str]]:
    """The line of each merge and its colour; grey where it joins several groups."""
    total = len(order)
    spots = {leaf: (0.0, float(y)) for y, leaf in enumerate(order)}
    first = {leaf: leaf for leaf in range(total)}  # a class out of each cluster
    lines, colours = [], []
    for step, (a, b, height) in enumerate(merges):
        (xa, ya), (xb, yb) = spots[a], spots[b]
        lines.append([(xa, ya), (height, ya), (height, yb), (xb, yb)])
        spots[total + step] = (height, (ya + yb) / 2)
        first[total + step] = first[a]
        same_group = coarse[first[a]] == coarse[first[b]]
        colours.append(shades[first[a]] if same_group else "#999999")
    return lines, colours


def _name_leaves(axes: Axes, names: list[str], colours: list[str]) -> None:
    axes.yaxis.tick_right()
    axes.set_yticks(range(len(names)), names, fontsize=FONT_SIZE, parse_math=False)
    for tick, colour in zip(axes.get_yticklabels(), colours, strict=True):
        tick.set_color(colour)
    axes.tick_params(length=0)
    axes.tick_params(axis="x", labelsize=FONT_SIZE, colors=INK)
    axes.xaxis.label.set(color=INK, fontsize=10)
    for side in ("top", "left", "right"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#999999")


def _draw_cuts(axes: Axes, heights: list[float], num_classes: Sequence[int], span: float) -> None:
    """A dashed line at each cut, with its number of classes above, in rows that do not overlap."""
    total = len(heights) + 1
    row_ends: list[float] = []  # where the last label of each row above the tree ends
    for classes in num_classes:
        at = (heights[total - classes - 1] + heights[total - classes]) / 2
        axes.axvline(at, color=INK, linewidth=0.9, linestyle=(0, (4, 3)), zorder=0)
        row = 0
        while row < len(row_ends) and row_ends[row] - at < 0.15 * span:
            row += 1
        row_ends[row : row + 1] = [at]
        axes.annotate(
            f"{classes} classes",
            (at, 1),
            (0, 3 + 11 * row),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha="center",
            fontsize=FONT_SIZE,
            color=INK,
        )
