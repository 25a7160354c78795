"""Where a map lies on its image: images are padded so that every map covers them exactly.

A stem or stage that floors drops the last pixels of an image that its stride does not divide, one
that pads adds some, and in either case the map stands for another area than the image's: what a
decoder makes of it is displaced, by more the further to the right and below. So an image for a
decoder is continued to the next multiple of the coarsest stride, by zeros to the right and below as
convolutions themselves continue it, and the answer is cut. Sizes that fit cost nothing.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

__all__ = ["common_multiple", "crop_to", "pad_to_multiple"]


def common_multiple(strides: Iterable[float]) -> int:
    """The least multiple of all strides; of the coarsest alone where that would be far larger.

    Example:
        >>> common_multiple([4, 8, 16, 32]), common_multiple([12, 16])
        (32, 48)
    """
    whole = [round(stride) for stride in strides if stride >= 1] or [1]
    multiple = math.lcm(*whole)
    return multiple if multiple <= 4 * max(whole) else max(whole)


def pad_to_multiple(x: torch.Tensor, multiple: int) -> torch.Tensor:
    """Images (B, C, H, W) continued by zeros, to the right and below, to a multiple; itself if fit.

    Example:
        >>> pad_to_multiple(torch.ones(1, 3, 95, 96), 32).shape
        torch.Size([1, 3, 96, 96])
    """
    height, width = x.shape[2:]
    if _is_symbolic(height, width):
        return _pad_symbolic(_pad_symbolic(x, 2, multiple), 3, multiple)
    # positive on the way, because compilers of dynamic sizes know no modulo of negative numbers
    below = (multiple - height % multiple) % multiple
    right = (multiple - width % multiple) % multiple
    if below == 0 and right == 0:
        return x
    return F.pad(x, (0, right, 0, below))


def _is_symbolic(*sizes: Any) -> bool:
    """Whether a graph of any size is being made (export, dynamic compile)."""
    return any(isinstance(size, torch.SymInt) for size in sizes)


def _pad_symbolic(x: torch.Tensor, dim: int, multiple: int) -> torch.Tensor:
    """The same along one dimension, without a question that a graph could answer for one size only.

    The most that can be needed is appended; what is taken of it depends on the size.
    """
    size = x.shape[dim]
    padded = (size + multiple - 1) // multiple * multiple
    shape = list(x.shape)
    shape[dim] = multiple - 1
    longer = torch.cat([x, x.new_zeros(shape)], dim)
    return longer.index_select(dim, torch.arange(padded, device=x.device))


def crop_to(output: Any, size: Sequence[int]) -> Any:
    """Maps (B, K, H', W'), or a dict of them, cut to the size (H, W) before padding."""
    if isinstance(output, dict):
        return {name: crop_to(y, size) for name, y in output.items()}
    if _is_symbolic(*size):
        rows = torch.arange(size[0], device=output.device)
        columns = torch.arange(size[1], device=output.device)
        return output.index_select(2, rows).index_select(3, columns)
    return output[:, :, : size[0], : size[1]]
