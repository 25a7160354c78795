"""Pictures of kernel gradients.

Filter by filter and channel by channel, and the causes of equal ones side by side.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from timm_branches.figures import INK, new_figure, save_figure
from timm_branches.gradients.kernels import KernelDiagnosis, diagnose_kernel_gradients

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "kernel_causes",
    "kernel_causes_figure",
    "kernel_gradients_figure",
    "plot_kernel_causes",
    "plot_kernel_gradients",
]

_COLOURS = "RdBu_r"  # diverging: white is 0


def plot_kernel_gradients(
    grad: torch.Tensor,
    file: str | os.PathLike,
    title: str = "",
    max_filters: int = 8,
    max_channels: int = 8,
) -> Path:
    """Draw :func:`kernel_gradients_figure` into a PNG, atomically.

    Args:
        grad: See :func:`kernel_gradients_figure`, like what follows.
        file: The PNG; missing folders are made.
        title: As there.
        max_filters: As there.
        max_channels: As there.

    Returns:
        The file's path.

    Raises:
        ValueError: As :func:`kernel_gradients_figure` does.
    """
    return save_figure(kernel_gradients_figure(grad, title, max_filters, max_channels), file)


def kernel_gradients_figure(
    grad: torch.Tensor, title: str = "", max_filters: int = 8, max_channels: int = 8
) -> Figure:
    """A row per filter and a column per channel, all on one symmetric scale.

    Equal pictures are equal gradients.

    Over each kernel stands its norm. Of a layer with more than the picture holds, the filters and
    the channels of the largest norm are drawn, in their order, and a map beside them holds the
    norms of all.

    Args:
        grad: (O, C / groups, kh, kw), as :func:`timm_branches.gradients.kernels.kernel_gradients`
            collects them.
        title: Above the picture.
        max_filters: How many are drawn at most.
        max_channels: As `max_filters`.

    Returns:
        A matplotlib Figure.

    Raises:
        ValueError: grad has another number of dimensions or is empty, holds nan or inf, or a limit
            is below 1.

    Example:
        >>> figure = kernel_gradients_figure(torch.randn(2, 3, 5, 5))
        >>> len(figure.axes)                # six kernels and a colour bar
        7
    """
    if grad.dim() != 4 or not grad.numel():
        raise ValueError(f"grad must be (O, C / groups, kh, kw), got {tuple(grad.shape)}.")
    if max_filters < 1 or max_channels < 1:
        raise ValueError(
            f"max_filters and max_channels must be at least 1, got {max_filters} and "
            f"{max_channels}."
        )
    grad = grad.detach().to("cpu", torch.float64)
    if not grad.isfinite().all():
        raise ValueError("grad holds nan or inf.")
    norms = grad.flatten(2).norm(dim=2)
    filters, channels = (
        _largest(norms.norm(dim=1), max_filters),
        _largest(norms.norm(dim=0), max_channels),
    )

    some = norms.numel() > len(filters) * len(channels)
    width = 0.75 * len(channels) + 1.3
    figure = new_figure(width + (3 if some else 0), max(0.8 * len(filters) + 0.6, 2.4))
    figure.set_layout_engine("constrained", w_pad=0.04, h_pad=0.04)
    parts: Any = figure.subfigures(1, 2, width_ratios=[width, 3]) if some else [figure]
    panels = parts[0].subplots(len(filters), len(channels), squeeze=False)
    image = _draw_kernels(panels, grad[filters][:, channels], norms[filters][:, channels])
    for row, o in zip(panels, filters, strict=True):
        row[0].set_ylabel(f"filter {o}", fontsize=7, color=INK)
    for panel, c in zip(panels[-1], channels, strict=True):
        panel.set_xlabel(f"channel {c}", fontsize=7, color=INK)
    _colour_bar(
        parts[0].colorbar(image, ax=panels, shrink=min(1, 2.2 / (0.85 * len(filters))), aspect=25),
        "dE/dW",
    )
    if some:
        axes = parts[1].subplots()
        square = 0.25 < norms.shape[0] / norms.shape[1] < 4
        shade = axes.imshow(
            norms,
            vmin=0,
            vmax=norms.max().item() or 1,
            aspect="equal" if square else "auto",
            cmap="viridis",
            interpolation="none",
        )
        axes.set_title(f"norms of all {norms.shape[0]} x {norms.shape[1]}", fontsize=8, color=INK)
        axes.set(xlabel="channel", ylabel="filter")
        for axis in (axes.xaxis, axes.yaxis):
            axis.label.set(fontsize=8, color=INK)
            axis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        axes.tick_params(length=0, labelsize=7, colors=INK)
        _colour_bar(parts[1].colorbar(shade, ax=axes, location="bottom", shrink=0.8), "")
    if title:
        figure.suptitle(title, fontsize=11, color=INK)
    return figure


def plot_kernel_causes(file: str | os.PathLike) -> Path:
    """Draw :func:`kernel_causes_figure` into a PNG, atomically.

    Args:
        file: The PNG; missing folders are made.

    Returns:
        The file's path.
    """
    return save_figure(kernel_causes_figure(), file)


def kernel_causes(seed: int = 0) -> dict[str, KernelDiagnosis]:
    """A small convolution, healthy and with each cause of equal, missing or wrong gradients.

    Args:
        seed: Of the smooth random picture, the weights and the target.

    Returns:
        Diagnoses by the case's name, (3, 3, 9, 9) gradients each.

    Example:
        >>> for name, diagnosis in kernel_causes().items():
        ...     print(f'{name}:', *diagnosis.findings)
        healthy:
        equal input channels: equal_inputs
        broadcast target: broadcast_target
        unused filter: unused_filters
        wrong backward: wrong_gradient
    """
    rng = torch.Generator().manual_seed(seed)
    x = F.interpolate(torch.randn(1, 3, 12, 12, generator=rng), (40, 40), mode="bicubic")
    target = F.interpolate(torch.randn(1, 3, 12, 12, generator=rng), (32, 32), mode="bicubic")
    layer = nn.Conv2d(3, 3, 9)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.uniform_(-0.06, 0.06, generator=rng)
    healthy = diagnose_kernel_gradients(layer, x, loss=F.mse_loss, target=target)
    return {
        "healthy": healthy,
        "equal input channels": diagnose_kernel_gradients(
            layer, x[:, :1].expand_as(x), loss=F.mse_loss, target=target
        ),
        # every output is below such a target, so the absolute difference has one slope for all
        # filters
        "broadcast target": diagnose_kernel_gradients(
            layer, x, loss=lambda y, t: (y - t).abs().mean(), target=target[:, :1] + 20
        ),
        "unused filter": diagnose_kernel_gradients(
            layer, x, loss=lambda y, t: F.mse_loss(y[:, ::2], t[:, ::2]), target=target
        ),
        "wrong backward": diagnose_kernel_gradients(
            layer,
            x,
            loss=F.mse_loss,
            target=target,
            grad=healthy.gradient.sum(1, keepdim=True).expand(3, 3, 9, 9),
        ),
    }


def kernel_causes_figure(seed: int = 0) -> Figure:
    """The gradients of :func:`kernel_causes` side by side, with what was found.

    Each case stands on its own symmetric scale.

    Args:
        seed: See :func:`kernel_causes`.

    Returns:
        A matplotlib Figure.
    """
    cases = kernel_causes(seed)
    figure = new_figure(2.0 * len(cases), 3.2)
    figure.set_layout_engine("constrained", w_pad=0.05, h_pad=0.05)
    parts: Any = figure.subfigures(1, len(cases))
    for part, (name, case) in zip(parts, cases.items(), strict=True):
        panels = part.subplots(3, 3)
        _draw_kernels(panels, case.gradient)
        for i in range(3):
            panels[i, 0].set_ylabel(
                f"filter {i}" if part is parts[0] else "", fontsize=7, color=INK
            )
            panels[-1, i].set_xlabel(f"channel {i}", fontsize=6.5, color=INK)
        part.suptitle(name, fontsize=10, color=INK)
        part.supxlabel(
            f"channels differ by {case.channel_deviation:.0%}\n"
            f"filters differ by {case.filter_deviation:.0%}",
            fontsize=7.5,
            color=INK,
        )
    figure.suptitle(
        "dE/dW of one convolution, 3 channels to 3 filters; a scale for each case, white is 0",
        fontsize=10,
        color=INK,
        x=0.01,
        ha="left",
    )
    return figure


def _largest(norms: torch.Tensor, most: int) -> list[int]:
    """The indices of the largest, in ascending order."""
    return sorted(norms.argsort(descending=True, stable=True)[:most].tolist())


def _draw_kernels(panels: Any, grad: torch.Tensor, norms: torch.Tensor | None = None) -> Any:
    """Kernels (O, C, kh, kw) on one symmetric scale into an array of axes.

    Norms are written above.
    """
    limit = grad.abs().max().item() or 1.0
    for o, row in enumerate(panels):
        for c, panel in enumerate(row):
            image = panel.imshow(
                grad[o, c], cmap=_COLOURS, vmin=-limit, vmax=limit, interpolation="none"
            )
            panel.set(xticks=[], yticks=[])
            for side in panel.spines.values():
                side.set(color="#999999", linewidth=0.5)
            if norms is not None:
                panel.set_title(f"{norms[o, c]:.2g}", fontsize=6.5, color=INK, pad=2)
    return image


def _colour_bar(bar: Any, name: str) -> None:
    bar.set_label(name, fontsize=8, color=INK)
    bar.ax.tick_params(length=0, labelsize=7, colors=INK)
    bar.outline.set_visible(False)
