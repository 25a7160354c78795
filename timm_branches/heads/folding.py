"""Clips (B, T, C, H, W) as one batch of frames for the backbone, and back."""

import warnings
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import nn

__all__ = ["Clips", "read_clips", "warn_of_batch_statistics"]


class Clips:
    """How the frames of a batch of clips are laid out in one batch of images.

    Frames behind a clip's length are left out, so that neither a result nor a statistic of
    BatchNorm depends on padding. In `torch.export` and ONNX, where the number of frames must not
    depend on values, they are computed and then blanked.

    Args:
        x: Clips (B, T, C, H, W).
        lengths: Valid frames of each clip, (B,) whole numbers from 1 to T; or a mask (B, T), true
            for valid frames.

    Raises:
        ValueError: Clips without frames, or lengths that do not fit them.

    Attributes:
        shape: B and T.
        lengths: (B,) on the CPU (in an export where the input is), None if all frames are valid.
        mask: (B, T) on the clips' device, None if all frames are valid.
        exporting: Whether a graph is being made.
    """

    def __init__(self, x: torch.Tensor, lengths: torch.Tensor | Sequence[int] | None = None):
        self.shape = (x.shape[0], x.shape[1])
        self.exporting = torch.compiler.is_exporting() or torch.jit.is_tracing()
        self.lengths: torch.Tensor | None = None
        self.mask: torch.Tensor | None = None
        self.index: torch.Tensor | None = None  # of the valid frames among all
        if not self.exporting and x.shape[1] < 1:
            raise ValueError(
                f"clips {tuple(x.shape)} have no frames: give (B, T, C, H, W) with T of 1 or more."
            )
        if lengths is not None:
            self.lengths = self._read(lengths, x)
            self.mask = (
                torch.arange(x.shape[1], device=x.device) < self.lengths.to(x.device)[:, None]
            )
            if not self.exporting:
                valid = torch.arange(x.shape[1]) < self.lengths[:, None]
                self.index = valid.flatten().nonzero()[:, 0].to(x.device)

    def _read(self, given: Any, x: torch.Tensor) -> torch.Tensor:
        batch, time = self.shape
        lengths = torch.as_tensor(given)
        if lengths.device.type != "cpu" and lengths.device != x.device:
            raise ValueError(
                f"lengths= is on {lengths.device}, the clips are on {x.device}: put it there, or "
                "on the CPU."
            )
        is_mask = lengths.ndim == 2
        right = (
            lengths.dtype == torch.bool if is_mask else lengths.dtype in (torch.int64, torch.int32)
        )
        if tuple(lengths.shape) != ((batch, time) if is_mask else (batch,)) or not right:
            raise ValueError(
                f"lengths= takes whole numbers ({batch},), or a bool mask ({batch}, {time}), for "
                f"clips {tuple(x.shape)}; got {lengths.dtype} {tuple(lengths.shape)}."
            )
        counts = lengths.sum(1) if is_mask else lengths.long()
        if self.exporting:
            return counts
        counts, mask = counts.cpu(), lengths.cpu()
        if is_mask and not torch.equal(mask, torch.arange(time) < counts[:, None]):
            raise ValueError(
                "the mask has holes: the valid frames of a clip must stand at its beginning, the "
                "padding behind them."
            )
        if counts.min() < 1 or counts.max() > time:
            raise ValueError(
                f"lengths must be from 1 to {time}, the number of frames in the clips; got "
                f"{counts.tolist()}."
            )
        return counts

    def fold(self, x: torch.Tensor) -> torch.Tensor:
        """The frames (N, C, H, W) to compute, of clips (B, T, C, H, W)."""
        x = x.flatten(0, 1)
        return x if self.index is None else x.index_select(0, self.index)

    def unfold(self, y: torch.Tensor) -> torch.Tensor:
        """(N, ...) by frame -> (B, T, ...), 0 behind the lengths."""
        if self.index is None:
            return self.blank(y.unflatten(0, self.shape))
        out = y.new_zeros(self.shape[0] * self.shape[1], *y.shape[1:])
        return out.index_copy(0, self.index, y).unflatten(0, self.shape)

    def blank(self, y: torch.Tensor) -> torch.Tensor:
        """(B, T, ...) with 0 behind the lengths, whatever was there."""
        if self.mask is None:
            return y
        return torch.where(
            self.mask.view(*self.mask.shape, *[1] * (y.ndim - 2)), y, torch.zeros_like(y)
        )


def read_clips(
    x: torch.Tensor, lengths: Any, in_chans: int, temporal: Collection[str]
) -> Clips | None:
    """How a model's input is laid out: None for images (B, C, H, W).

    Args:
        x: Images or clips (B, T, C, H, W).
        lengths: Of the clips, as :class:`Clips` takes them.
        in_chans: Channels that the model takes.
        temporal: Names of the heads to compute that need clips.

    Raises:
        ValueError: Clips of other channels, lengths without clips, or images for a head that needs
            clips.
    """
    if not isinstance(x, torch.Tensor):
        raise ValueError(
            f"a model takes a tensor of images (B, {in_chans}, H, W), got {type(x).__name__}."
        )
    if x.ndim == 5:
        if x.shape[2] != in_chans:
            hint = "; x.transpose(1, 2) puts the frames first." if x.shape[1] == in_chans else "."
            raise ValueError(f"expected clips (B, T, {in_chans}, H, W), got {tuple(x.shape)}{hint}")
        return Clips(x, lengths)
    if x.ndim == 4 and temporal:
        raise ValueError(
            f"the heads {sorted(temporal)} read clips (B, T, C, H, W), got {tuple(x.shape)}: give "
            "clips (one frame is a clip with T = 1, x[:, None]), or name other heads with "
            "heads=[...]."
        )
    if lengths is not None:
        raise ValueError(f"lengths= belongs to clips (B, T, C, H, W), got {tuple(x.shape)}.")
    return None


def warn_of_batch_statistics(backbone: nn.Module) -> None:
    """Say that BatchNorm in training sees parts of a batch, if there is such a layer."""
    if any(
        isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training for m in backbone.modules()
    ):
        warnings.warn(
            "frames_per_pass: BatchNorm of the backbone is in training and sees the statistics "
            "of a few frames at a time; freeze() the backbone, or set frames_per_pass = None.",
            stacklevel=2,
        )
