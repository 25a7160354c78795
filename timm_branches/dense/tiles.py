"""Inference on images that are too large for one pass.

In overlapping tiles, whose results are blended.
"""

from collections.abc import Callable, Mapping
from itertools import product
from typing import Any

import torch

__all__ = ["tiled_inference"]

BLENDS = ("linear", "crop")


@torch.no_grad()
def tiled_inference(
    model_fn: Callable[[torch.Tensor], Any],
    image: torch.Tensor,
    tile: int = 256,
    overlap: int = 64,
    batch_size: int = 8,
    blend: str = "linear",
    multiple: int = 1,
    output_device: torch.device | str | None = None,
) -> Any:
    """Run a model tile by tile over images, and blend its dense outputs where tiles overlap.

    The model only ever sees batches of `tile` x `tile` pixels: the last tile of a row or column is
    shifted back to end with the image, and an image that is smaller than a tile is continued by
    reflection. The weights of all tiles sum to 1 at every pixel, so a model that looks at single
    pixels gives exactly what it gives on the whole image. A convolutional model does, up to
    rounding, where it sees no further than the margin that the blend cuts off, and its tiles begin
    at multiples of its stride; what it sees of the image's own edge stays as it is.

    Args:
        model_fn: Takes (N, C, tile, tile), returns (N, K, tile, tile) or a dict of such tensors, as
            a branch model with decoders does; put the model into eval mode. To run on a GPU while
            the image stays where it is: `lambda x: model(x.cuda())`.
        image: (B, C, H, W), any size.
        tile: Side of the tiles in pixels.
        overlap: How far neighbours overlap at least, from 0 to `tile` - 1.
        batch_size: Tiles a pass.
        blend: 'linear' cuts a quarter of the overlap off each edge and fades over the half in
            between; 'crop' cuts half of it off, without fading: exact for models that see up to
            `overlap` / 2 pixels far, with visible seams for others.
        multiple: Tiles begin at multiples of it, on an image that is continued by reflection up to
            one: the model's coarsest stride, such as 32. `tile` and `overlap` must be multiples of
            it.
        output_device: Where results are put together; None is the image's device.

    Returns:
        (B, K, H, W), or a dict of such tensors, of the model's dtype.

    Raises:
        ValueError: A setting is out of its range, or the model's output does not have the size of
            its tile.

    Example:
        >>> image = torch.rand(1, 3, 300, 500)
        >>> torch.equal(tiled_inference(torch.sqrt, image, tile=128, overlap=32), image.sqrt())
        True
    """
    _check(image, tile, overlap, batch_size, blend, multiple)
    height, width = image.shape[2:]
    tops, rows = (
        _starts(height, tile, overlap, multiple),
        _reflected(height, tile, multiple, image.device),
    )
    lefts, columns = (
        _starts(width, tile, overlap, multiple),
        _reflected(width, tile, multiple, image.device),
    )
    device = image.device if output_device is None else torch.device(output_device)
    vertical, horizontal = (_ramps(starts, tile, overlap, blend) for starts in (tops, lefts))
    places = list(product(range(len(image)), range(len(tops)), range(len(lefts))))
    means: dict[str, _RunningMean] = {}
    single = False
    for first in range(0, len(places), batch_size):
        batch = places[first : first + batch_size]
        areas = [
            (rows[tops[i] : tops[i] + tile], columns[lefts[j] : lefts[j] + tile])
            for _, i, j in batch
        ]
        output = model_fn(
            torch.stack(
                [
                    image[b].index_select(1, down).index_select(2, along)
                    for (b, _, _), (down, along) in zip(batch, areas, strict=True)
                ]
            )
        )
        single = not isinstance(output, Mapping)
        for name, maps in ({"": output} if single else output).items():
            if (
                not isinstance(maps, torch.Tensor)
                or maps.ndim != 4
                or maps.shape[2:] != (tile, tile)
            ):
                what = tuple(maps.shape) if isinstance(maps, torch.Tensor) else type(maps).__name__
                raise ValueError(
                    f"of a tile the model returned {name!r} of {what}; only dense outputs "
                    f"(N, K, {tile}, {tile}) can be put together: let model_fn return nothing else."
                )
            if name not in means:
                means[name] = _RunningMean(
                    (len(image), maps.shape[1], height, width), maps.dtype, device
                )
            for (b, i, j), part in zip(batch, maps, strict=True):
                means[name].add(
                    b, tops[i], lefts[j], part.to(device), vertical[i][:, None] * horizontal[j]
                )
    results = {name: mean.result() for name, mean in means.items()}
    return results[""] if single else results


class _RunningMean:
    """A weighted mean of overlapping parts.

    It is updated so that the mean of equal values is exactly that value.
    """

    def __init__(
        self, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device
    ) -> None:
        self.dtype = dtype
        self.mean = torch.zeros(
            shape, dtype=torch.promote_types(dtype, torch.float32), device=device
        )
        self.weight = torch.zeros(shape[0], *shape[2:], device=device)

    def add(self, b: int, top: int, left: int, part: torch.Tensor, weight: torch.Tensor) -> None:
        height, width = self.mean.shape[2:]
        part = part[:, : height - top, : width - left].to(self.mean.dtype)
        area = (slice(top, top + part.shape[1]), slice(left, left + part.shape[2]))
        weight = weight[: part.shape[1], : part.shape[2]].to(self.weight.device)
        total = self.weight[b][area].add_(weight)
        mean = self.mean[b][:, *area]
        # mean + w / W * (part - mean); what has no weight stays out even if it is infinite
        step = weight / torch.where(total > 0, total, 1)
        mean += torch.where(step > 0, step * (part - mean), 0)

    def result(self) -> torch.Tensor:
        assert bool((self.weight > 0).all())  # tiles overlap by more than what is cut off
        return self.mean.to(self.dtype)


def _check(
    image: torch.Tensor, tile: int, overlap: int, batch_size: int, blend: str, multiple: int
) -> None:
    if image.ndim != 4 or 0 in image.shape:
        raise ValueError(
            f"image must be (B, C, H, W) with at least one pixel, got {tuple(image.shape)}."
        )
    if tile < 1 or batch_size < 1 or multiple < 1:
        raise ValueError(
            f"tile={tile}, batch_size={batch_size} and multiple={multiple} must be at least 1."
        )
    if not 0 <= overlap < tile:
        raise ValueError(f"overlap={overlap} must be from 0 to tile - 1 = {tile - 1}.")
    if blend not in BLENDS:
        raise ValueError(f"no blend {blend!r}: choose one of {', '.join(BLENDS)}.")
    if tile % multiple or overlap % multiple:
        raise ValueError(
            f"tile={tile} and overlap={overlap} must be multiples of multiple={multiple}."
        )


def _padded(size: int, tile: int, multiple: int) -> int:
    return max(tile, -(-size // multiple) * multiple)


def _starts(size: int, tile: int, overlap: int, multiple: int) -> list[int]:
    """Where tiles begin."""
    last = _padded(size, tile, multiple) - tile
    return [*range(0, last, tile - overlap), last]


def _reflected(size: int, tile: int, multiple: int, device: torch.device) -> torch.Tensor:
    """Indices of a line of pixels that goes on by reflection, as often as it takes."""
    period = max(1, 2 * (size - 1))
    index = torch.arange(_padded(size, tile, multiple), device=device) % period
    return torch.where(index < size, index, period - index)


def _ramps(starts: list[int], tile: int, overlap: int, blend: str) -> list[torch.Tensor]:
    """The weight of each tile's pixels along one direction.

    Edges without a neighbour are not cut.
    """
    depth = torch.arange(tile) + 0.5  # of a pixel's centre, from the edge
    if blend == "crop" or not overlap:
        ramp = (depth > overlap // 2).float()
    else:
        ramp = ((depth - overlap / 4) / (overlap / 2)).clamp(0, 1)
    ramps = []
    for i in range(len(starts)):
        before = ramp if i else torch.ones(tile)
        after = ramp.flip(0) if i + 1 < len(starts) else torch.ones(tile)
        ramps.append(torch.minimum(before, after))
    return ramps
