"""What all pictures share: their figures, colours and files.

Figures are built on matplotlib's objects with an Agg canvas of their own, so drawing one neither
needs a display nor touches the backend, the style or the open figures of the program that asks for
it.
"""

import io
import os
from pathlib import Path
from typing import TYPE_CHECKING

from timm_branches.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "COLOURS",
    "FAINT",
    "INK",
    "MissingPackageError",
    "new_figure",
    "restrain",
    "save_figure",
]

# Okabe & Ito's colours (https://jfly.uni-koeln.de/color/), told apart with every kind of colour
# vision
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]
INK, FAINT = "#333333", "#DDDDDD"


class MissingPackageError(ValueError, ImportError):
    """An optional package was asked for and is not installed; the message says what to install."""


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure, in inches.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingPackageError(
            f"Plots need matplotlib, which is not installed ({error}). "
            "Install it with: pip install 'timm_branches[recipes]'."
        ) from error
    figure = Figure(figsize=(width, height), dpi=150, facecolor="white")
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.1)
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: "Figure", path: str | os.PathLike) -> Path:
    """Write a figure as PNG, atomically; missing folders are made."""
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return atomic_write(path, out.getvalue())


def restrain(axes: "Axes") -> None:
    """Take away what does not carry data."""
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#999999")
    axes.tick_params(length=0, colors=INK, labelsize=9)
    axes.yaxis.label.set(color=INK, fontsize=10)
    axes.xaxis.label.set(color=INK, fontsize=10)
    axes.set_axisbelow(True)
