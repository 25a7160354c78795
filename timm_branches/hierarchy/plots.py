"""Pictures of a taxonomy: the tree, with a value for each node or a path marked."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from timm_branches.figures import COLOURS, FAINT, INK, new_figure, save_figure
from timm_branches.taxonomy.tables import as_labels
from timm_branches.taxonomy.taxonomy import Taxonomy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from timm_branches.taxonomy.paths import NodePath

__all__ = ["plot_taxonomy", "taxonomy_figure", "text_width"]

# points: a leaf's row, between columns, around all, of the font
ROW, _GAP, _MARGIN, FONT_SIZE = 13.0, 26.0, 14.0, 8.5
_BAR = 90.0  # points that a colour bar takes
MOST_LEAVES = 2000  # Agg draws at most 2 ** 16 pixels


@dataclass(frozen=True)
class _Layout:
    """Where things stand, in points from the upper left corner."""

    columns: list[float]  # x of each level's nodes
    spots: dict[NodePath, tuple[float, float]]
    ends: dict[NodePath, float]  # x where each node's name ends
    head: float  # y of the first row
    width: float
    height: float


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
        values: see :func:`taxonomy_figure`.
        highlight: as there.
        title: as there.
        value_name: as there.

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
    """The tree from left to right, a column per level, a line per leaf.

    The picture is as large as its names need.

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
        raise ValueError(f"value_name {value_name!r} names values, but there are none.")
    if tree.num_leaves > MOST_LEAVES:
        raise ValueError(
            f"{tree.num_leaves} leaves are too many for a picture, at most {MOST_LEAVES}; prune "
            f"the tree first."
        )
    rows, children = _rows(tree)
    texts = _node_texts(rows, numbers)
    layout = _lay_out(tree, rows, texts, marked, title, with_bar=bool(numbers))
    figure = new_figure(layout.width / 72, layout.height / 72)
    figure.set_layout_engine("none")
    axes = figure.add_axes((0, 0, 1, 1))  # in points, so that names of known width fit
    axes.set(xlim=(0, layout.width), ylim=(layout.height, 0))
    axes.axis("off")
    if title:
        axes.text(_MARGIN, _MARGIN + ROW / 2, title, fontsize=12, color=INK, va="center")
    _draw_level_names(axes, tree, layout)
    _draw_edges(axes, layout, children, marked)
    dots = _draw_nodes(axes, layout, marked, coloured=not numbers)
    if numbers:
        ordered = [numbers[node] for node in layout.spots]
        _colour_by_value(figure, dots, ordered, value_name, layout)
    _draw_node_names(axes, layout, texts, marked)
    return figure


def _node_texts(rows: dict[NodePath, float], numbers: dict[NodePath, float]) -> dict[NodePath, str]:
    """Each node's name, with its value behind it where it has one."""
    texts = {}
    for node in rows:
        texts[node] = node[-1]
        value = numbers.get(node, math.nan)
        if math.isfinite(value):
            texts[node] += f"  {value:.2f}"
    return texts


def _lay_out(
    tree: Taxonomy,
    rows: dict[NodePath, float],
    texts: dict[NodePath, str],
    marked: set[NodePath],
    title: str,
    with_bar: bool,
) -> _Layout:
    head = _MARGIN + 1.6 * ROW
    if title:
        head += 2 * ROW
    left = _MARGIN
    columns = []
    spots: dict[NodePath, tuple[float, float]] = {}
    ends = {}
    for nodes, level_name in zip(tree.nodes, tree.levels, strict=True):
        columns.append(left)
        widest = text_width(level_name)
        for node in nodes:
            width = text_width(texts[node], node in marked)
            widest = max(widest, width)
            spots[node] = (left, head + rows[node] * ROW)
            ends[node] = left + 8 + width
        left += widest + _GAP
    width = left - _GAP + _MARGIN
    height = head + ROW * tree.num_leaves + _MARGIN
    if with_bar:
        width += _BAR
        height = max(height, 150.0)
    width = max(width, 1.5 * text_width(title) + 2 * _MARGIN)  # the title's font is larger
    return _Layout(columns, spots, ends, head, width, height)


def _draw_level_names(axes: Axes, tree: Taxonomy, layout: _Layout) -> None:
    for x, name in zip(layout.columns, tree.levels, strict=True):
        y = layout.head - ROW
        axes.text(x, y, name, fontsize=FONT_SIZE, color="#777777", va="center", style="italic")


def _draw_nodes(axes: Axes, layout: _Layout, marked: set[NodePath], coloured: bool) -> Any:
    fill = []
    rims = []
    for node in layout.spots:
        fill.append(COLOURS[1] if node in marked else COLOURS[0])
        rims.append(COLOURS[1] if node in marked else "none")
    xs, ys = zip(*layout.spots.values(), strict=True)
    colours = fill if coloured else None
    return axes.scatter(xs, ys, s=36, zorder=3, linewidths=1.5, c=colours, edgecolors=rims)


def _draw_node_names(
    axes: Axes, layout: _Layout, texts: dict[NodePath, str], marked: set[NodePath]
) -> None:
    for node, (x, y) in layout.spots.items():
        weight = "bold" if node in marked else "normal"
        axes.text(
            x + 6,
            y,
            texts[node],
            fontsize=FONT_SIZE,
            color=INK,
            va="center",
            zorder=4,
            parse_math=False,
            weight=weight,
        )


def _check_values(tree: Taxonomy, values: Sequence[torch.Tensor] | None) -> dict[NodePath, float]:
    """Each node's value."""
    if values is None:
        return {}
    tensors = [torch.as_tensor(level) for level in values]
    shapes = [tuple(level.shape) for level in tensors]
    expected = [(count,) for count in tree.num_classes]
    if shapes != expected:
        raise ValueError(
            f"values must be one tensor per level with a number for each class, of shapes "
            f"{expected}; got {shapes}."
        )
    numbers: dict[NodePath, float] = {}
    for nodes, level in zip(tree.nodes, tensors, strict=True):
        numbers.update(zip(nodes, level.double().tolist(), strict=True))
    return numbers


def _check_row(tree: Taxonomy, row: torch.Tensor | Sequence[int] | None) -> set[NodePath]:
    """The nodes of a label row."""
    if row is None:
        return set()
    indices = torch.as_tensor(row)
    if indices.shape != (tree.num_levels,):
        raise ValueError(
            f"highlight must be a label row of shape ({tree.num_levels},), got "
            f"{tuple(indices.shape)}."
        )
    marked = set()
    for level, nodes in enumerate(tree.nodes):
        name = f"label of level {tree.levels[level]!r}"
        label = int(as_labels(indices[level], len(nodes), name))
        if label >= 0:
            marked.add(nodes[label])
    return marked


def _rows(tree: Taxonomy) -> tuple[dict[NodePath, float], dict[NodePath, list[NodePath]]]:
    """At which line each node stands, and each node's children.

    Leaves stand on whole lines, parents amid their children.
    """
    nodes = list(chain.from_iterable(tree.nodes))
    children: dict[NodePath, list[NodePath]] = {node: [] for node in nodes}
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
    return {node: rows[node] for node in nodes}, children


def _draw_edges(
    axes: Axes,
    layout: _Layout,
    children: dict[NodePath, list[NodePath]],
    marked: set[NodePath],
) -> None:
    from matplotlib.collections import LineCollection

    plain = []
    strong = []  # between marked nodes
    for node, (_, y) in layout.spots.items():
        for child in children[node]:
            child_x, child_y = layout.spots[child]
            turn = child_x - _GAP / 2
            elbow = [(layout.ends[node], y), (turn, y), (turn, child_y), (child_x - 3, child_y)]
            if node in marked and child in marked:
                strong.append(elbow)
            else:
                plain.append(elbow)
    thin = LineCollection(plain, colors="#BBBBBB", linewidths=0.9, zorder=1)
    thick = LineCollection(strong, colors=COLOURS[1], linewidths=2.0, zorder=2)
    for lines in (thin, thick):
        axes.add_collection(lines, autolim=False)


def _colour_by_value(
    figure: Figure, dots: Any, values: list[float], name: str, layout: _Layout
) -> None:
    """Colour the dots, with a bar at the right that says what colours mean; grey is nan."""
    import numpy as np
    from matplotlib import colormaps

    known = [value for value in values if math.isfinite(value)] or [0.0]
    low, high = min(known), max(known)
    if 0 <= low and high <= 1:  # a share
        low, high = 0.0, 1.0
    if high == low:
        high = low + 1
    dots.set(array=np.ma.masked_invalid(values), cmap=colormaps["viridis"].with_extremes(bad=FAINT))
    dots.set_clim(low, high)
    width, height = layout.width, layout.height
    length = min(height - layout.head - _MARGIN, 160.0)
    bottom = 1 - (layout.head + length) / height
    place = figure.add_axes(((width - 66) / width, bottom, 9 / width, length / height))
    bar = figure.colorbar(dots, cax=place)
    bar.set_label(name, fontsize=FONT_SIZE, color=INK)
    bar.ax.tick_params(length=0, labelsize=FONT_SIZE - 1, colors=INK)
    bar.outline.set_visible(False)


def text_width(text: str, bold: bool = False) -> float:
    """The width of a text in points."""
    from matplotlib.backends.backend_agg import RendererAgg
    from matplotlib.font_manager import FontProperties

    font = FontProperties(size=FONT_SIZE, weight="bold" if bold else "normal")
    # 72 dpi rounds too much
    return RendererAgg(1, 1, 720).get_text_width_height_descent(text, font, False)[0] / 10
