"""A picture of one prediction: the image beside its branch through the tree.

It shows what else was likely, too.

Matplotlib is imported when a picture is drawn.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from timm_branches.inference.predict import Record
from timm_branches.taxonomy import Taxonomy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_prediction", "prediction_figure"]

TOP = 5  # candidates drawn for each level
CHOSEN, PALE, BACK, GREY = "#0072B2", "#D3DCE4", "#F3F5F7", "#8A939B"
_WIDTH, _GAP, _ROW = 2.5, 0.55, 0.44  # of a level's column, between columns, of a class: inches


def plot_prediction(
    record: Record,
    image: Any,
    levels: Sequence[str],
    taxonomy: Taxonomy | None,
    path: "str | os.PathLike",
) -> Path:
    """Draw :func:`prediction_figure` into a PNG, atomically; returns its path."""
    from timm_branches.figures import save_figure

    return save_figure(prediction_figure(record, image, levels, taxonomy), path)


def prediction_figure(
    record: Record, image: Any, levels: Sequence[str], taxonomy: Taxonomy | None = None
) -> "Figure":
    """The image, and a column for each level with its most probable classes.

    They are joined as they are in the tree.

    The chosen branch is blue; where it breaks the tree (decoder 'independent') the joint is dashed.
    Bars and the numbers in them are what each level says by itself; above them stands the decoder's
    answer, which weighs all levels.

    Args:
        record: Made with `predict(..., top=5)`; five candidates a level are drawn, and the chosen
            one.
        image: uint8 array (H, W, C), C 1 or 3.
        levels: Names of the levels.
        taxonomy: The tree; None draws heads side by side.

    Returns:
        A matplotlib Figure.

    Raises:
        ValueError: The record has no candidates.

    Example:
        >>> found = predict(model, 'photos/', top=5)                               # doctest: +SKIP
        >>> for record, image in zip(found, found.images):                         # doctest: +SKIP
        ...     figure = prediction_figure(record, image, found.levels, found.taxonomy)
    """
    from timm_branches.figures import INK, new_figure

    if not record.candidates:
        raise ValueError(
            "the record has no candidates to draw: make it with predict(..., top=5)."
            if record.error is None
            else record.error
        )
    columns = _columns(record, taxonomy)
    # the level's name above, what is left out below, and what bars are
    rows = max(map(len, columns)) + 2.2
    height = max(rows * _ROW, 2.4)
    right = max(len(columns), 2) * (_WIDTH + _GAP)
    figure = new_figure(height + right + 0.5, height + 0.9)
    left_axes, axes = figure.subplots(1, 2, width_ratios=[height, right])
    small = max(image.shape[:2]) <= 64
    left_axes.imshow(
        image, cmap="gray", vmin=0, vmax=255, interpolation="nearest" if small else "antialiased"
    )
    left_axes.set_axis_off()
    left_axes.set_title(
        _short(os.path.basename(record.file.rstrip("/")) or record.file, 32),
        fontsize=10,
        color=INK,
        parse_math=False,
    )
    axes.set_axis_off()
    axes.set_title(
        _short(_answer(record, levels), int(13.5 * right)),
        fontsize=10,
        color=CHOSEN,
        weight="bold",
        parse_math=False,
    )
    axes.text(
        right / 2, 0, "bars: each level's own probabilities", fontsize=8, color=GREY, ha="center"
    )
    axes.set_xlim(0, right)
    axes.set_ylim(0, height)
    places = [
        _draw_level(axes, record, depth, shown, levels[depth], taxonomy, height)
        for depth, shown in enumerate(columns)
    ]
    if taxonomy is not None:
        for depth in range(1, len(columns)):
            _draw_joints(axes, record, depth, places, taxonomy)
    return figure


def _answer(record: Record, levels: Sequence[str]) -> str:
    """The decoder's answer in a line."""
    names = record.path or [
        f"{level}: class {label}" for level, label in zip(levels, record.labels, strict=False)
    ]
    steps = [f"{name} {p:.2f}" for name, p in zip(names, record.probabilities, strict=True)]
    if record.stopped:
        steps = [*steps, "(stopped)"]
    return (" > " if record.path else ", ").join(steps)


def _columns(record: Record, taxonomy: Taxonomy | None) -> list[list[tuple[int, float]]]:
    """What to draw on each level.

    Under their parents' order, so that joints do not cross, then by probability.
    """
    columns: list[list[tuple[int, float]]] = []
    for depth, candidates in enumerate(record.candidates):
        shown = list(candidates[:TOP])
        chosen = record.labels[depth] if depth < len(record.labels) else None
        if chosen is not None and chosen not in dict(shown):
            shown[-1] = (chosen, dict(candidates)[chosen])
        if taxonomy is not None and depth:
            parents = taxonomy.parents[depth].tolist()
            order = {label: i for i, (label, _) in enumerate(columns[-1])}
            shown.sort(key=lambda item: (order.get(parents[item[0]], len(order)), -item[1]))
        columns.append(shown)
    return columns


def _draw_level(
    axes: "Axes",
    record: Record,
    depth: int,
    shown: list[tuple[int, float]],
    title: str,
    taxonomy: Taxonomy | None,
    height: float,
) -> dict[int, tuple[float, float]]:
    """Draw a column; returns where each class stands (its left end and its middle height)."""
    from matplotlib.patches import FancyBboxPatch, Rectangle

    from timm_branches.figures import INK

    left = depth * (_WIDTH + _GAP) + _GAP / 2
    chosen = record.labels[depth] if depth < len(record.labels) else None
    top = height / 2 + (len(shown) - 1) * _ROW / 2
    size = len(taxonomy.classes[depth]) if taxonomy is not None else None
    axes.text(
        left, top + 0.72 * _ROW, title, fontsize=10, color=INK, weight="bold", parse_math=False
    )
    places = {}
    for i, (label, probability) in enumerate(shown):
        middle, is_chosen = top - i * _ROW, label == chosen
        bottom, tall = middle - 0.38 * _ROW, 0.76 * _ROW
        box = FancyBboxPatch(
            (left, bottom),
            _WIDTH,
            tall,
            boxstyle="round,pad=0,rounding_size=0.07",
            linewidth=1.6,
            facecolor=BACK,
            edgecolor=CHOSEN if is_chosen else "none",
            zorder=3,
        )
        axes.add_patch(box)
        colour, alpha = (CHOSEN, 0.28) if is_chosen else (PALE, 1)
        bar = Rectangle(
            (left, bottom),
            _WIDTH * probability,
            tall,
            facecolor=colour,
            alpha=alpha,
            linewidth=0,
            zorder=4,
        )
        axes.add_patch(bar)
        bar.set_clip_path(box)
        ink, weight = (INK, "bold") if is_chosen else (GREY, "normal")
        name = taxonomy.classes[depth][label] if taxonomy is not None else f"class {label}"
        axes.text(
            left + 0.09,
            middle,
            _short(name, 24 if is_chosen else 26),
            fontsize=9,
            color=ink,
            weight=weight,
            va="center",
            zorder=5,
            parse_math=False,
        )
        axes.text(
            left + _WIDTH - 0.09,
            middle,
            _percent(probability),
            fontsize=9,
            color=ink,
            weight=weight,
            va="center",
            ha="right",
            zorder=5,
        )
        places[label] = (left, middle)
    foot = top - (len(shown) - 0.36) * _ROW
    notes = []
    if chosen is None:
        notes.append("stopped: not sure enough" if record.stopped else "the path ends above")
    if size is not None and size > len(shown):
        notes.append(f"{size - len(shown)} more")
    axes.text(
        left + 0.09, foot, ", ".join(notes), fontsize=8, color=GREY, va="center", style="italic"
    )
    return places


def _draw_joints(
    axes: "Axes",
    record: Record,
    depth: int,
    places: list[dict[int, tuple[float, float]]],
    taxonomy: Taxonomy,
) -> None:
    """Lines from a level to the one above: to each class's parent, and along the chosen branch."""
    parents = taxonomy.parents[depth].tolist()
    chosen = record.labels[depth] if depth < len(record.labels) else None
    for label, (x, y) in places[depth].items():
        parent = parents[label]
        if label == chosen:
            broken = parent != record.labels[depth - 1]
            parent = record.labels[depth - 1]
            style: dict[str, Any] = {
                "edgecolor": CHOSEN,
                "linewidth": 2.4,
                "zorder": 2,
                "linestyle": (0, (2, 1.5)) if broken else "-",
            }
        else:
            style = {"edgecolor": PALE, "linewidth": 1.1, "zorder": 1}
        if parent in places[depth - 1]:
            start, height = places[depth - 1][parent]
            axes.add_patch(_curve(start + _WIDTH, height, x, y, style))


def _curve(x0: float, y0: float, x1: float, y1: float, style: dict[str, Any]) -> Any:
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path as Line

    middle = (x0 + x1) / 2
    line = Line(
        [(x0, y0), (middle, y0), (middle, y1), (x1, y1)],
        [Line.MOVETO, Line.CURVE4, Line.CURVE4, Line.CURVE4],
    )
    return PathPatch(line, fill=False, **style)


def _percent(probability: float) -> str:
    return f"{100 * probability:.0f} %" if probability >= 0.01 else "<1 %"


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
