"""Pictures of a taxonomy.

The tree, with a value for each node or a path marked, and the clustering it came from.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from timm_branches.figures import COLOURS, FAINT, INK, new_figure, save_figure
from timm_branches.taxonomy.derive import cut_linkage
from timm_branches.taxonomy.tables import as_labels
from timm_branches.taxonomy.taxonomy import Taxonomy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from timm_branches.taxonomy.paths import NodePath

__all__ = ["dendrogram_figure", "plot_dendrogram", "plot_taxonomy", "taxonomy_figure"]

# points: a leaf's row, between columns, around all, of the font
_ROW, _GAP, _MARGIN, _SIZE = 13.0, 26.0, 14.0, 8.5
_MOST_LEAVES = 2000  # Agg draws at most 2 ** 16 pixels


def plot_taxonomy(
    tree: Taxonomy,
    file: str | os.PathLike,
    values: Sequence[torch.Tensor] | None = None,
    highlight: torch.Tensor | Sequence[int] | None = None,
    title: str = "",
    value_name: str = "",
) -> Path:
    """Draw :func:`taxonomy_figure` into a PNG, atomically.

    Args:
        tree: what to draw.
        file: the PNG; missing folders are made.
        values, highlight, title, value_name: see :func:`taxonomy_figure`.

    Returns:
        The file's path.

    Raises:
        ValueError: as :func:`taxonomy_figure` does.
    """
    return save_figure(taxonomy_figure(tree, values, highlight, title, value_name), file)


def taxonomy_figure(
    tree: Taxonomy,
    values: Sequence[torch.Tensor] | None = None,
    highlight: torch.Tensor | Sequence[int] | None = None,
    title: str = "",
    value_name: str = "",
) -> Figure:
    """The tree from left to right, a column per level, a line per leaf; it is as large as its names
    need.

    Args:
        tree: what to draw, up to 2,000 leaves.
        values: a number for each node, such as accuracy or probability: one tensor
            (num_classes[l],) per level. It is written beside the node and colours it; nan leaves it
            grey.
        highlight: a label row (L,) as `expand` gives it, -1 for none: its nodes, and the edges
            between them, are marked. Predictions that contradict each other may be shown too: then
            the marked path is broken.
        title: above the picture.
        value_name: what the values are, written at the colour bar.

    Returns:
        A matplotlib Figure.

    Raises:
        ValueError: if values or the row do not fit the tree, or it has too many leaves.

    Example:
        >>> tree = Taxonomy(['animal/cat', 'animal/dog', 'plant'])
        >>> figure = taxonomy_figure(tree, highlight=tree.expand(1))
        >>> [text.get_text() for text in figure.axes[0].texts]
        ['level1', 'level2', 'animal', 'plant', 'cat', 'dog']
    """
    numbers = _check_values(tree, values)
    marked = _check_row(tree, highlight)
    if value_name and values is None:
        raise ValueError(f"value_name {value_name!r} names values, but there are none")
    if tree.num_leaves > _MOST_LEAVES:
        raise ValueError(
            f"{tree.num_leaves} leaves are too many for a picture, at most {_MOST_LEAVES}; prune the tree "
            f"first"
        )
    heights, children = _rows(tree)
    texts = {
        node: node[-1]
        + (f"  {numbers[node]:.2f}" if math.isfinite(numbers.get(node, math.nan)) else "")
        for node in heights
    }
    widths = [[_width(texts[node], node in marked) for node in level] for level in tree.nodes]
    left, columns = _MARGIN, []  # where each level's nodes stand
    for level, name in zip(widths, tree.levels, strict=True):
        columns.append(left)
        left += max(*level, _width(name), 0) + _GAP
    bar = 90.0 if numbers else 0.0
    head = _MARGIN + 1.6 * _ROW + (2 * _ROW if title else 0)
    width = max(left - _GAP + _MARGIN + bar, _width(title) * 1.5 + 2 * _MARGIN)
    height = head + _ROW * tree.num_leaves + _MARGIN
    if numbers:
        height = max(height, 150.0)
    figure = new_figure(width / 72, height / 72)
    figure.set_layout_engine("none")
    axes = figure.add_axes((0, 0, 1, 1))  # in points, so that names of known width fit
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    if title:
        axes.text(_MARGIN, _MARGIN + _ROW / 2, title, fontsize=12, color=INK, va="center")
    for x, name in zip(columns, tree.levels, strict=True):
        axes.text(
            x, head - _ROW, name, fontsize=_SIZE, color="#777777", va="center", style="italic"
        )
    ends = {
        node: columns[len(node) - 1] + 8 + width_of
        for level, row in zip(tree.nodes, widths, strict=True)
        for node, width_of in zip(level, row, strict=True)
    }
    spots = {node: (columns[len(node) - 1], head + row * _ROW) for node, row in heights.items()}
    edges = [(node, child) for node in heights for child in children[node]]
    _draw_edges(
        axes,
        [_elbow(ends[a], spots[a][1], *spots[b]) for a, b in edges],
        [a in marked and b in marked for a, b in edges],
    )
    fill = [COLOURS[1] if node in marked else COLOURS[0] for node in spots]
    xs, ys = zip(*spots.values(), strict=True)
    dots = axes.scatter(
        xs,
        ys,
        s=36,
        zorder=3,
        linewidths=1.5,
        c=None if numbers else fill,
        edgecolors=[COLOURS[1] if n in marked else "none" for n in spots],
    )
    if numbers:
        _colour_by_value(
            figure, dots, [numbers[node] for node in spots], value_name, width, height, head
        )
    for node, (x, y) in spots.items():
        axes.text(
            x + 6,
            y,
            texts[node],
            fontsize=_SIZE,
            color=INK,
            va="center",
            zorder=4,
            parse_math=False,
            weight="bold" if node in marked else "normal",
        )
    return figure


def _check_values(tree: Taxonomy, values: Sequence[torch.Tensor] | None) -> dict[NodePath, float]:
    """Each node's value."""
    if values is None:
        return {}
    shapes = [tuple(torch.as_tensor(level).shape) for level in values]
    if shapes != [(n,) for n in tree.num_classes]:
        raise ValueError(
            f"values must be one tensor per level with a number for each class, of shapes "
            f"{[(n,) for n in tree.num_classes]}; got {shapes}"
        )
    return {
        node: float(value)
        for nodes, level in zip(tree.nodes, values, strict=True)
        for node, value in zip(nodes, torch.as_tensor(level).tolist(), strict=True)
    }


def _check_row(tree: Taxonomy, row: torch.Tensor | Sequence[int] | None) -> set[NodePath]:
    """The nodes of a label row."""
    if row is None:
        return set()
    indices = torch.as_tensor(row)
    if indices.shape != (tree.num_levels,):
        raise ValueError(
            f"highlight must be a label row of shape ({tree.num_levels},), got {tuple(indices.shape)}"
        )
    labels = [
        int(as_labels(index, n, f"label of level {name!r}"))
        for index, n, name in zip(indices, tree.num_classes, tree.levels, strict=True)
    ]
    return {nodes[i] for nodes, i in zip(tree.nodes, labels, strict=True) if i >= 0}


def _rows(tree: Taxonomy) -> tuple[dict[NodePath, float], dict[NodePath, list[NodePath]]]:
    """At which line each node stands, leaves on whole ones and parents amid their children.

    And the children.
    """
    children: dict[NodePath, list[NodePath]] = {node: [] for level in tree.nodes for node in level}
    for level in tree.nodes[1:]:
        for node in level:
            children[node[:-1]].append(node)
    rows: dict[NodePath, float] = {}
    line = count()

    def place(node: NodePath) -> float:
        below = [place(child) for child in children[node]]
        rows[node] = (below[0] + below[-1]) / 2 if below else next(line) + 0.5
        return rows[node]

    for root in tree.nodes[0]:
        place(root)
    return {node: rows[node] for level in tree.nodes for node in level}, children


def _elbow(end: float, y: float, child_x: float, child_y: float) -> list[tuple[float, float]]:
    turn = child_x - _GAP / 2
    return [(end, y), (turn, y), (turn, child_y), (child_x - 3, child_y)]


def _draw_edges(axes: Axes, edges: list[list[tuple[float, float]]], marked: list[bool]) -> None:
    from matplotlib.collections import LineCollection

    for on, colour, width in ((False, "#BBBBBB", 0.9), (True, COLOURS[1], 2.0)):
        lines = [line for line, mark in zip(edges, marked, strict=True) if mark == on]
        axes.add_collection(
            LineCollection(lines, colors=colour, linewidths=width, zorder=1 + on), autolim=False
        )


def _colour_by_value(
    figure: Figure,
    dots: Any,
    values: list[float],
    name: str,
    width: float,
    height: float,
    top: float,
) -> None:
    """Colour the dots, with a bar at the right that says what colours mean; grey is nan."""
    import numpy as np
    from matplotlib import colormaps

    known = [value for value in values if math.isfinite(value)] or [0.0]
    low, high = (0.0, 1.0) if 0 <= min(known) and max(known) <= 1 else (min(known), max(known))
    dots.set(array=np.ma.masked_invalid(values), cmap=colormaps["viridis"].with_extremes(bad=FAINT))
    dots.set_clim(low, high if high > low else low + 1)
    long = min(height - top - _MARGIN, 160.0)
    place = figure.add_axes(
        ((width - 66) / width, 1 - (top + long) / height, 9 / width, long / height)
    )
    bar = figure.colorbar(dots, cax=place)
    bar.set_label(name, fontsize=_SIZE, color=INK)
    bar.ax.tick_params(length=0, labelsize=_SIZE - 1, colors=INK)
    bar.outline.set_visible(False)


def _width(text: str, bold: bool = False) -> float:
    """The width of a text in points."""
    from matplotlib.backends.backend_agg import RendererAgg
    from matplotlib.font_manager import FontProperties

    font = FontProperties(size=_SIZE, weight="bold" if bold else "normal")
    # 72 dpi rounds too much
    return RendererAgg(1, 1, 720).get_text_width_height_descent(text, font, False)[0] / 10


def plot_dendrogram(
    linkage: Any,
    classes: Sequence[str],
    file: str | os.PathLike,
    num_classes: Sequence[int] = (),
    title: str = "",
) -> Path:
    """Draw :func:`dendrogram_figure` into a PNG, atomically.

    Args:
        file: the PNG; missing folders are made.
        linkage, classes, num_classes, title: see :func:`dendrogram_figure`.

    Returns:
        The file's path.

    Raises:
        ValueError: as :func:`dendrogram_figure` does.
    """
    return save_figure(dendrogram_figure(linkage, classes, num_classes, title), file)


def dendrogram_figure(
    linkage: Any, classes: Sequence[str], num_classes: Sequence[int] = (), title: str = ""
) -> Figure:
    """An agglomerative clustering of classes: which merge, at what distance, and where the levels
    cut.

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
    if len(classes) != total or total > _MOST_LEAVES:
        raise ValueError(
            f"a clustering of {total} classes needs {total} names, got {len(classes)}; a picture has "
            f"at most {_MOST_LEAVES}"
        )
    merges = [(int(a), int(b), float(height)) for a, b, height, _ in linkage]
    members = {i: [i] for i in range(total)}
    for step, (a, b, _) in enumerate(merges):
        members[total + step] = members.pop(a) + members.pop(b)
    [order] = members.values()
    spots = {leaf: (0.0, float(y)) for y, leaf in enumerate(order)}
    first = dict(enumerate(range(total)))  # a class out of each group
    coarse = groups[:, 0].tolist() if len(num_classes) else [0] * total
    ranks = {
        group: rank for rank, group in enumerate(dict.fromkeys(coarse[leaf] for leaf in order))
    }
    shades = [COLOURS[ranks[group] % len(COLOURS)] if len(num_classes) else INK for group in coarse]
    lines, colours = [], []
    for step, (a, b, height) in enumerate(merges):
        (xa, ya), (xb, yb) = spots[a], spots[b]
        lines.append([(xa, ya), (height, ya), (height, yb), (xb, yb)])
        spots[total + step], first[total + step] = (height, (ya + yb) / 2), first[a]
        colours.append(shades[first[a]] if coarse[first[a]] == coarse[first[b]] else "#999999")
    high, low = (
        max([x for _, _, x in merges], default=1.0),
        min([x for _, _, x in merges], default=0.0),
    )
    # confusions leave all distances near 1
    right = max(0.0, low - 0.2 * (high - low)) if low < high else 0.0
    span = (high - right) or 1.0

    names = max(map(_width, classes))
    figure = new_figure((400 + names) / 72, (_ROW * total + 90) / 72)
    axes = figure.subplots()
    axes.add_collection(LineCollection(lines, colors=colours, linewidths=1.4))
    axes.set(xlim=(high + 0.04 * span, right), ylim=(total - 0.5, -0.5), xlabel="distance")
    axes.yaxis.tick_right()
    axes.set_yticks(range(total), [classes[i] for i in order], fontsize=_SIZE, parse_math=False)
    for tick, leaf in zip(axes.get_yticklabels(), order, strict=True):
        tick.set_color(shades[leaf])
    axes.tick_params(length=0)
    axes.tick_params(axis="x", labelsize=_SIZE, colors=INK)
    axes.xaxis.label.set(color=INK, fontsize=10)
    for side in ("top", "left", "right"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#999999")
    if title:
        figure.suptitle(title, fontsize=12, color=INK, x=0.02, ha="left")
    taken: list[float] = []  # where the last label of each row above the tree ends
    for n in num_classes:
        at = (merges[total - n - 1][2] + merges[total - n][2]) / 2
        axes.axvline(at, color=INK, linewidth=0.9, linestyle=(0, (4, 3)), zorder=0)
        row = next((i for i, end in enumerate(taken) if end - at >= 0.15 * span), len(taken))
        taken[row : row + 1] = [at]
        axes.annotate(
            f"{n} classes",
            (at, 1),
            (0, 3 + 11 * row),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha="center",
            fontsize=_SIZE,
            color=INK,
        )
    return figure
