"""Recurrent heads: an LSTM, a GRU or a minGRU over the frames of a clip (CNN+LSTM).

Source of the architecture: `Long-term Recurrent Convolutional Networks for Visual Recognition and
Description` (Donahue et al. 2015), https://arxiv.org/abs/1411.4389: a CNN shared by all frames, its
features into an LSTM.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from timm.layers import get_act_layer
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from timm_branches.heads.base import State, register_head
from timm_branches.heads.clip import (
    ClipClassifier,
    ClipHead,
    check_clip_options,
    frame_pool,
    last_valid,
)
from timm_branches.heads.folding import Clips
from timm_branches.heads.min_gru import MinGRU
from timm_branches.taps.reader import TapInfo

__all__ = ["GRUHead", "LSTMHead", "MinGRUHead", "TemporalClassifier"]


@register_head
@dataclass(frozen=True)
class LSTMHead(ClipHead):
    """LSTM over the frames of a clip.

    Each frame's map becomes a vector; then the recurrence, a readout and the classifier.

    Args:
        hidden_size: Width of the recurrence, of each direction.
        num_layers: Recurrent layers, one upon the other.
        bidirectional: Read the clip in both directions; such a head cannot stream.
        drop_rate: Dropout between recurrent layers, behind the last of them and behind each hidden
            layer; None takes the model's, or 0.
        pool_type: How a frame's map becomes a vector: timm's global pooling `'avg'`, `'max'`,
            `'avgmax'`, `'catavgmax'`; `'attention'`, a learned average over the positions;
            `'flatten'`, the whole map, which binds the head to one image size.
        projection: Width of a Linear between that vector and the recurrence; None for none.
        activation: Behind the projection, by timm's name (`'relu'`, `'gelu'`); None for none.
        output: `'clip'` for one answer a clip (B, K), `'frame'` for one a frame (B, T, K).
        readout: What a clip's answer is read from: `'last'`, the state after its last valid frame
            (bidirectional: beside it the backward state after the first frame); `'mean'` or
            `'max'` over the outputs of all valid frames; `'attention'`, a learned average of
            them.
        hidden: Widths of hidden layers before the last Linear, each Linear -> ReLU -> Dropout.

    Raises:
        ValueError: A width below 1, a rate outside [0, 1), an unknown name, or options that exclude
            each other.

    Example:
        >>> LSTMHead(projection=300, num_layers=3, hidden=(128,)).kind
        'lstm'
    """

    kind: ClassVar[str] = "lstm"
    cell: ClassVar[Any] = nn.LSTM
    hidden_size: int = 256
    num_layers: int = 1
    bidirectional: bool = False
    drop_rate: float | None = None
    pool_type: str = "avg"
    projection: int | None = None
    activation: str | None = None
    output: str = "clip"
    readout: str = "last"
    hidden: tuple[int, ...] = ()

    def __post_init__(self):
        check_clip_options(self)
        if self.activation is not None:
            if self.projection is None:
                raise ValueError(
                    f"activation={self.activation!r} stands behind the projection: give "
                    "projection=."
                )
            _activation(self.activation)


@register_head
@dataclass(frozen=True)
class GRUHead(LSTMHead):
    """GRU over the frames of a clip, with the arguments of :class:`LSTMHead` and no cell state.

    Example:
        >>> GRUHead(hidden_size=64, output='frame').kind
        'gru'
    """

    kind: ClassVar[str] = "gru"
    cell: ClassVar[Any] = nn.GRU


@register_head
@dataclass(frozen=True)
class MinGRUHead(LSTMHead):
    """A gated linear recurrence over the frames of a clip, with the options of :class:`LSTMHead`.

    Gate and candidate depend on the frame alone, so all frames of a clip are computed at once, by
    a scan (minGRU, Feng et al. 2024, `Were RNNs All We Needed?`, https://arxiv.org/abs/2410.01201).
    A stream goes from frame to frame in constant memory, and a compiled model has no break in its
    graph.

    Example:
        >>> MinGRUHead(hidden_size=64, num_layers=2).kind
        'mingru'
    """

    kind: ClassVar[str] = "mingru"
    cell: ClassVar[Any] = MinGRU


def _activation(name: str) -> type[nn.Module]:
    try:
        layer: Any = get_act_layer(name)
    except (KeyError, AssertionError):
        layer = None
    if layer is None:
        raise ValueError(
            f"activation={name!r} is not one of timm's: write 'relu', 'gelu', 'tanh', ... or None."
        )
    return layer


class TemporalClassifier(ClipClassifier):
    """Map to vector, recurrence, readout, classifier: what the recurrent heads build.

    Shapes: frames' maps (N, C, H, W) of B clips -> (B, K) or (B, T, K); without classes the
    features that the classifier would read. The state is the hidden state (layers, B,
    hidden_size), for an LSTM the cell state beside it.
    """

    state_names = ("h", "c")
    spec: LSTMHead

    def __init__(self, spec: LSTMHead, tap: TapInfo, num_classes: int, drop_rate: float):
        pool, width = frame_pool(spec.pool_type, tap)
        out = spec.hidden_size * (2 if spec.bidirectional else 1)
        super().__init__(spec, pool, out, num_classes, drop_rate)
        if spec.projection is not None:
            layers: list[nn.Module] = [nn.Linear(width, spec.projection)]
            if spec.activation is not None:
                layers.append(_activation(spec.activation)())
            self.projection, width = nn.Sequential(*layers), spec.projection
        self.rnn: Any = spec.cell(
            width,
            spec.hidden_size,
            spec.num_layers,
            batch_first=True,
            dropout=drop_rate if spec.num_layers > 1 else 0.0,
            bidirectional=spec.bidirectional,
        )
        self._add_readout(out, drop_rate)

    def over_time(
        self, y: torch.Tensor, clips: Clips, state: State | None
    ) -> tuple[torch.Tensor, State]:
        """Outputs (B, T, width), 0 behind the lengths, and the state."""
        if isinstance(self.rnn, MinGRU):
            lengths = None if clips.mask is None else clips.mask.sum(1)
            out, new_hidden = self.rnn(y, None if state is None else state[0], lengths)
            return clips.blank(out), (new_hidden,)
        given: Any = state
        if state is not None and self.rnn.mode == "GRU":
            given = state[0]
        if clips.lengths is None:
            out, new = self.rnn(y, given)
        # packed sequences have no place in a graph: the state at the length is gathered instead
        elif clips.exporting:
            if self.spec.bidirectional:
                raise ValueError(
                    "a bidirectional head cannot be exported with lengths=: export clips of one "
                    "length, or use bidirectional=False."
                )
            out, new = self.rnn(y, given)
            out = clips.blank(out)
        else:
            packed = pack_padded_sequence(y, clips.lengths, batch_first=True, enforce_sorted=False)
            out, new = self.rnn(packed, given)
            out, _ = pad_packed_sequence(out, batch_first=True, total_length=clips.shape[1])
        new_state = new if isinstance(new, tuple) else (new,)
        return out, new_state

    def _last(self, out: torch.Tensor, state: State, clips: Clips) -> torch.Tensor:
        """The output of the last frame; of the backward direction that of the first."""
        is_packed = clips.exporting and not isinstance(self.rnn, MinGRU)
        if clips.mask is not None and is_packed:  # in an export the state is that of the padding
            return last_valid(out, clips)
        h = state[0]  # (layers * directions, B, hidden_size)
        if self.spec.bidirectional:
            return torch.cat([h[-2], h[-1]], 1)
        return h[-1]

    def obstacle(self) -> tuple[str, str]:
        """Why the head cannot stream and what could instead, empty if it can."""
        reads, remedy = super().obstacle()
        if self.spec.bidirectional:
            reads = "reads the clip backwards too (bidirectional=True)"
        if not reads:
            return "", ""
        return reads, "use a unidirectional head with readout='last' or output='frame'"

    def zero_state(self, batch_size: int) -> State:
        """The state before the first frame.

        Hidden state (layers, B, hidden_size), for an LSTM the cell state too.
        """
        like = next(self.rnn.parameters())
        hidden = like.new_zeros(self.spec.num_layers, batch_size, self.spec.hidden_size)
        if isinstance(self.rnn, nn.LSTM):
            return hidden, torch.zeros_like(hidden)
        return (hidden,)


# what each description builds; here, behind both
LSTMHead.module = TemporalClassifier
