"""Batches of clips of any lengths."""

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import default_collate

from timm_branches.data.clips.dataset import ClipDataset
from timm_branches.data.loader import Loader, create_loader

__all__ = ["ClipBatch", "collate_clips", "create_clip_loader"]


class ClipBatch(NamedTuple):
    """The input of a temporal model.

    Attributes:
        clips: (B, T, C, H, W), zero after a clip's last frame.
        lengths: (B,) frames of each clip.
    """

    clips: torch.Tensor
    lengths: torch.Tensor


def collate_clips(
    samples: Sequence[tuple[torch.Tensor, torch.Tensor]],
) -> tuple[ClipBatch, torch.Tensor]:
    """Make a batch of clips of any lengths, padded with zeros to the longest.

    Args:
        samples: Frames (T, C, H, W) and labels of each clip.

    Returns:
        The clips with their lengths, and the labels (B,) or (B, L).

    Raises:
        ValueError: If frames of two clips differ in size.

    Example:
        >>> samples = [(torch.ones(t, 1, 2, 2), torch.tensor(0)) for t in (3, 5)]
        >>> (clips, lengths), labels = collate_clips(samples)
        >>> clips.shape, lengths.tolist()
        (torch.Size([2, 5, 1, 2, 2]), [3, 5])
    """
    frames, labels = zip(*samples, strict=True)
    shapes = sorted({tuple(clip.shape[1:]) for clip in frames})
    if len(shapes) > 1:
        raise ValueError(
            f"frames of different clips in a batch have the shapes {shapes}; a transform makes "
            "them equal."
        )
    lengths = torch.tensor([len(clip) for clip in frames])
    return ClipBatch(pad_sequence(list(frames), batch_first=True), lengths), default_collate(
        list(labels)
    )


def create_clip_loader(
    dataset: ClipDataset, batch_size: int, is_training: bool = False, **kwargs: Any
) -> Loader:
    """A loader of clips that repeats exactly, whatever the number of workers and ranks.

    It is `create_loader` for clips.

    Args:
        dataset: The clips.
        batch_size: Clips a batch, on each rank.
        is_training: Shuffle and drop the last batch, or go through all clips in order.
        **kwargs: What else :func:`create_loader` takes.

    Returns:
        The loader; its batches are those of :func:`collate_clips`, ((clips, lengths), labels).

    Raises:
        ValueError: As `create_loader`.

    Example:
        >>> import numpy as np
        >>> data = ClipDataset(np.zeros((4, 30, 8, 8), np.uint8), [0, 1, 0, 1])
        >>> (clips, lengths), labels = next(iter(create_clip_loader(data, 2)))
        >>> clips.shape
        torch.Size([2, 30, 1, 8, 8])
    """
    if dataset.sampler.is_training and not is_training:
        warnings.warn(
            "evaluation of a dataset that draws frames at random; make it with is_training=False, "
            "or set its sampler",
            stacklevel=2,
        )
    return create_loader(
        dataset, batch_size, is_training, **{"collate_fn": collate_clips, **kwargs}
    )
