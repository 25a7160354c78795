"""Test-time augmentation of dense outputs: the mean over mirrored, turned and resized images."""

from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F

from timm_branches.arguments import as_items, check_number

__all__ = ["VIEWS", "augmented_inference"]

# how often an image is turned by a quarter, and whether it is mirrored then
VIEWS = {
    "none": ((0, False),),
    "flip": ((0, False), (0, True)),
    "d4": tuple(product(range(4), (False, True))),
}
"""The ways to look at an image, by name."""


@torch.no_grad()
def augmented_inference(
    model_fn: Callable[[torch.Tensor], Any],
    image: torch.Tensor,
    views: str = "flip",
    scales: Sequence[float] = (1.0,),
    kind: str = "masks",
) -> Any:
    """Run a model on several views of images, and give the mean of what it says of each pixel.

    Of masks probabilities are averaged, and returned as logits: their logarithms, of a single
    channel log p - log(1 - p). Of restored images the values are averaged, the self-ensemble of
    Timofte et al. 2016 (arXiv 1511.02228, section 3.4) where all eight views are taken.

    Args:
        model_fn: Takes (B, C, H, W) of any size, returns (B, K, H, W) or a dict of such tensors, as
            a branch model with decoders does; put the model into eval mode.
        image: (B, C, H, W).
        views: 'flip': as it is and mirrored; 'd4': turned by quarters, too, for images without an
            up and down; 'none'.
        scales: The image is also read at these multiples of its size.
        kind: 'masks' for logits of classes, 'images' for restored images.

    Returns:
        What `model_fn` returns, of the image's size, float32 at least.

    Raises:
        ValueError: There is no such kind or view, or a scale is not above 0; the model's output
            does not have the size of what it was given.

    Example:
        >>> image = torch.rand(1, 3, 30, 50)
        >>> y = augmented_inference(lambda x: x.mean(1, keepdim=True), image, 'd4', kind='images')
        >>> torch.allclose(y, image.mean(1, keepdim=True))
        True
    """
    if views not in VIEWS:
        raise ValueError(f"views={views!r}: choose one of {', '.join(VIEWS)}.")
    if kind not in ("masks", "images"):
        raise ValueError(f"kind={kind!r}: choose masks or images.")
    factors = as_items("scales=", scales, "(0.75, 1.0, 1.25)")
    for factor in factors:
        check_number("scales= takes factors: each", factor, 0, 16, above=True)
    if not factors:
        raise ValueError("scales= is empty: give (1.0,) for the image's own size.")
    totals: dict[str, torch.Tensor] = {}
    single = False
    for factor in factors:
        size = [max(1, round(side * factor)) for side in image.shape[2:]]
        resized = _resize(image, size)
        for turns, mirrored in VIEWS[views]:
            view = _look(resized, turns, mirrored)
            output = model_fn(view)
            single = not isinstance(output, Mapping)
            named = {"": output} if single else output
            for name, maps in named.items():
                if maps.ndim != 4 or maps.shape[2:] != view.shape[2:]:
                    raise ValueError(
                        f"of {tuple(view.shape)} the model returned {name!r} of "
                        f"{tuple(maps.shape)}; only dense outputs of the image's size have a mean."
                    )
                back = _resize(_look_back(_value(maps, kind), turns, mirrored), image.shape[2:])
                totals[name] = totals[name] + back if name in totals else back
    count = len(factors) * len(VIEWS[views])
    means = {name: _unvalue(total / count, kind) for name, total in totals.items()}
    return means[""] if single else means


def _resize(x: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    if list(x.shape[2:]) == list(size):
        return x
    return F.interpolate(x, tuple(size), mode="bilinear", antialias=True)


def _look(x: torch.Tensor, turns: int, mirrored: bool) -> torch.Tensor:
    x = x.rot90(turns, (2, 3))
    return x.flip(3) if mirrored else x


def _look_back(x: torch.Tensor, turns: int, mirrored: bool) -> torch.Tensor:
    x = x.flip(3) if mirrored else x
    return x.rot90(-turns, (2, 3))


def _value(maps: torch.Tensor, kind: str) -> torch.Tensor:
    """What is averaged."""
    maps = maps.to(torch.promote_types(maps.dtype, torch.float32))
    if kind == "images":
        return maps
    return maps.sigmoid() if maps.shape[1] == 1 else maps.softmax(1)


def _unvalue(mean: torch.Tensor, kind: str) -> torch.Tensor:
    """The mean in the units of the model's output; finite where a probability is 0."""
    if kind == "images":
        return mean
    least = torch.finfo(mean.dtype).tiny
    if mean.shape[1] == 1:
        return mean.clamp(min=least).log() - (1 - mean).clamp(min=least).log()
    return mean.clamp(min=least).log()
