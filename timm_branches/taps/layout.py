"""How a module gives its feature map, and the same as (B, C, H, W)."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

__all__ = ["Layout", "as_map", "recognise_layout", "token_grid"]


class Layout(NamedTuple):
    """How a module gives its map.

    `NCHW`, `NHWC` or `NLC` (tokens, after `prefix_tokens` others).
    """

    name: str
    prefix_tokens: int


def token_grid(tokens: int, image: Sequence[int], module: str) -> tuple[int, int]:
    """Height and width of `tokens` tokens of an image.

    The grid whose cells are the most nearly square.
    """
    height, width = int(image[0]), int(image[1])
    tokens = int(tokens)
    ratio = height / width
    fits = [(h, tokens // h) for h in range(1, tokens + 1) if tokens % h == 0]
    if not fits:
        raise ValueError(
            f"the {tokens} tokens of {module!r} are no grid for an image of {height}x{width}."
        )
    best = min(fits, key=lambda hw: abs(hw[0] / hw[1] - ratio))
    if not 0.75 < (best[0] / best[1]) / ratio < 1.34:
        raise ValueError(
            f"the {tokens} tokens of {module!r} are no grid for an image of {height}x{width}."
        )
    return best


def recognise_layout(y: Any, image: Sequence[int], backbone: nn.Module, module: str) -> Layout:
    """Recognise NCHW, NHWC or tokens by the shape.

    What stays ambiguous is as the backbone says of itself.
    """
    if isinstance(y, torch.Tensor) and y.shape[0] == 2 and y.ndim == 4:
        _, a, b, c = y.shape
        ratio = image[1] / image[2]
        first, last = abs(b / max(c, 1) - ratio), abs(a / max(b, 1) - ratio)
        if min(first, last) < 0.34 * ratio:
            if abs(first - last) < 1e-9:
                return Layout(str(getattr(backbone, "output_fmt", "NCHW")), 0)
            return Layout("NCHW" if first < last else "NHWC", 0)
    if isinstance(y, torch.Tensor) and y.shape[0] == 2 and y.ndim == 3:
        ratio = image[1] / image[2]
        fits: dict[float, int] = {}
        for count in (int(getattr(backbone, "num_prefix_tokens", 0)), 0):
            try:
                height, width = token_grid(y.shape[1] - count, image[1:], module)
            except ValueError:
                continue
            fits.setdefault(abs(height / width - ratio), count)
        if fits:  # CaiT's blocks lack the class token it speaks of: the better grid tells
            return Layout("NLC", fits[min(fits)])
    what = (
        f"shape {tuple(y.shape)} for 2 images" if isinstance(y, torch.Tensor) else type(y).__name__
    )
    raise ValueError(
        f"the output of {module!r} ({what}) is not a feature map: tap a module that returns (B, C, "
        "H, W), (B, H, W, C) or (B, N, C) with N tokens in a grid."
    )


def as_map(y: torch.Tensor, layout: Layout, x: torch.Tensor) -> torch.Tensor:
    """A module's own output as (B, C, H, W)."""
    if layout.name == "NLC":
        height, width = token_grid(y.shape[1] - layout.prefix_tokens, x.shape[-2:], "tap")
        return (
            y[:, layout.prefix_tokens :]
            .transpose(1, 2)
            .reshape(y.shape[0], y.shape[2], height, width)
        )
    return y.permute(0, 3, 1, 2) if layout.name == "NHWC" else y
