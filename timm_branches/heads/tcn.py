"""Dilated causal convolutions over the frames of a clip.

`An Empirical Evaluation of Generic Convolutional and Recurrent Networks for Sequence Modeling` (Bai
et al. 2018, https://arxiv.org/abs/1803.01271), section 3, with LayerNorm over a frame's channels in
place of weight normalisation: it depends on no other frame, and is saved as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from timm_branches.heads.base import State, register_head
from timm_branches.heads.clip import ClipClassifier, ClipHead, check_clip_options, frame_pool
from timm_branches.heads.folding import Clips
from timm_branches.taps.reader import TapInfo

__all__ = ["TCNHead"]


@register_head
@dataclass(frozen=True)
class TCNHead(ClipHead):
    """Temporal convolutional network: each layer looks twice as far back as the one before.

    A frame's output depends on the `1 + 2 (kernel_size - 1) (2**num_layers - 1)` frames up to it,
    29 by default. It streams: neither the cost of a frame nor the state grows.

    Args:
        hidden_size: Width of the convolutions.
        num_layers: Residual blocks of two convolutions each, with dilations 1, 2, 4, ...
        kernel_size: Frames that a convolution reads.
        drop_rate: Dropout behind each convolution and before the classifier; None takes the
            model's, or 0.
        pool_type: How a frame's map becomes a vector, as in :class:`LSTMHead`.
        output: `'clip'` for one answer a clip (B, K), `'frame'` for one a frame (B, T, K).
        readout: What a clip's answer is read from: the `'last'` valid frame's output, `'mean'`,
            `'max'` or `'attention'` over all of them.
        hidden: Widths of hidden layers before the last Linear, each Linear -> ReLU -> Dropout.

    Raises:
        ValueError: A width below 1, a rate outside [0, 1), an unknown name, or options that exclude
            each other.

    Example:
        >>> TCNHead(num_layers=4).kind
        'tcn'
    """

    kind: ClassVar[str] = "tcn"

    hidden_size: int = 256
    num_layers: int = 3
    kernel_size: int = 3
    drop_rate: float | None = None
    pool_type: str = "avg"
    output: str = "clip"
    readout: str = "last"
    hidden: tuple[int, ...] = ()

    def __post_init__(self):
        check_clip_options(self)
        if self.num_layers > 20:
            raise ValueError(
                f"num_layers={self.num_layers} would look {2**self.num_layers:,} frames back: take "
                "20 at most."
            )


class _CausalConv(nn.Module):
    """Dilated convolution of a frame and those before it, LayerNorm, ReLU, dropout.

    Attributes:
        past: Frames before the first that it needs.
    """

    def __init__(self, in_chs: int, out_chs: int, kernel_size: int, dilation: int, rate: float):
        super().__init__()
        self.past = (kernel_size - 1) * dilation
        self.conv = nn.Conv1d(in_chs, out_chs, kernel_size, dilation=dilation)
        self.norm = nn.LayerNorm(out_chs)
        self.drop = nn.Dropout(rate)

    def forward(self, x: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        """(B, T, C) and the frames before (B, past, C) -> (B, T, out_chs)."""
        y = self.conv(torch.cat([before, x], 1).transpose(1, 2)).transpose(1, 2)
        return self.drop(F.relu(self.norm(y)))


class _TCNClassifier(ClipClassifier):
    """Residual blocks of causal convolutions.

    State: for each convolution the last frames that it has read, (frames, B, channels).
    """

    spec: TCNHead

    def __init__(self, spec: TCNHead, tap: TapInfo, num_classes: int, drop_rate: float):
        pool, width = frame_pool(spec.pool_type, tap)
        super().__init__(spec, pool, spec.hidden_size, num_classes, drop_rate)
        self.widths: list[int] = []  # of what each convolution reads
        self.convs, self.skips = nn.ModuleList(), nn.ModuleList()
        for number in range(spec.num_layers):
            skip = nn.Linear(width, spec.hidden_size)
            self.skips.append(nn.Identity() if width == spec.hidden_size else skip)
            for _ in range(2):
                self.widths.append(width)
                self.convs.append(
                    _CausalConv(width, spec.hidden_size, spec.kernel_size, 2**number, drop_rate)
                )
                width = spec.hidden_size
        self._add_readout(width, drop_rate)

    def over_time(
        self, y: torch.Tensor, clips: Clips, state: State | None
    ) -> tuple[torch.Tensor, State]:
        """Outputs (B, T, width)."""
        if state is None:
            state = self.zero_state(clips.shape[0])
        new: list[torch.Tensor] = []
        for number, skip in enumerate(self.skips):
            x = y
            for place in (2 * number, 2 * number + 1):
                before = state[place].transpose(0, 1).to(x.dtype)
                new.append(_last_frames(torch.cat([before, x], 1), before.shape[1], clips))
                x = self.convs[place](x, before)
            y = F.relu(x + skip(y))
        return y, tuple(new)

    def zero_state(self, batch_size: int) -> State:
        """Zeros before the first frame, as a causal convolution is padded."""
        state = []
        for conv, width in zip(self.convs, self.widths, strict=True):
            assert isinstance(conv, _CausalConv)
            state.append(self.place.new_zeros(conv.past, batch_size, width))
        return tuple(state)


def _last_frames(x: torch.Tensor, past: int, clips: Clips) -> torch.Tensor:
    """The last `past` of (B, past + T, C) up to each clip's last valid frame, (past, B, C)."""
    if clips.mask is None:
        return x[:, x.shape[1] - past :].transpose(0, 1)
    index = clips.mask.sum(1)[:, None] + torch.arange(past, device=x.device)
    return x.gather(1, index[:, :, None].expand(-1, -1, x.shape[2])).transpose(0, 1)


# what each description builds; here, behind both
TCNHead.module = _TCNClassifier
