"""Temporal heads: an LSTM or GRU over the frames of a clip (CNN+LSTM).

Source of the architecture: `Long-term Recurrent Convolutional Networks for Visual Recognition and
Description` (Donahue et al. 2015), https://arxiv.org/abs/1411.4389: a CNN shared by all frames, its
features into an LSTM. Attention pooling is that of Ilse et al. 2018
(https://arxiv.org/abs/1802.04712), equations (7) and (8).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from timm.layers import SelectAdaptivePool2d, get_act_layer
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from timm_branches.arguments import as_items, check_number
from timm_branches.heads.base import Head, State, register_head
from timm_branches.heads.classifier import BranchClassifier, FixedFlatten, check_options
from timm_branches.heads.folding import Clips
from timm_branches.taps.reader import TapInfo

__all__ = ["GRUHead", "LSTMHead", "TemporalClassifier"]

_POOLS = ("avg", "max", "avgmax", "catavgmax", "attention", "flatten")
_READOUTS = ("last", "mean", "max", "attention")
_ATTENTION_WIDTH = 128  # the source's


@register_head
@dataclass(frozen=True)
class LSTMHead(Head):
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
    temporal: ClassVar[bool] = True
    cell: ClassVar[type[nn.LSTM] | type[nn.GRU]] = nn.LSTM
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
        object.__setattr__(self, "hidden", tuple(as_items("hidden=", self.hidden, "(256,)")))
        check_options(self.hidden, self.drop_rate)
        for name in ("hidden_size", "num_layers", "projection"):
            value = getattr(self, name)
            if name == "projection" and value is None:
                continue
            most = 1_000 if name == "num_layers" else 65_536
            check_number(f"{name}=", value, 1, most, whole=True)
        if not isinstance(self.bidirectional, bool):
            raise ValueError(f"bidirectional= takes True or False, got {self.bidirectional!r}.")
        for name, known in (
            ("pool_type", _POOLS),
            ("output", ("clip", "frame")),
            ("readout", _READOUTS),
        ):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name}= must be one of {', '.join(map(repr, known))}, got "
                    f"{getattr(self, name)!r}."
                )
        if self.output == "frame" and self.readout != "last":
            raise ValueError(
                f"readout={self.readout!r} has no effect with output='frame', which reads every "
                "frame: leave it out, or choose output='clip'."
            )
        if self.activation is not None:
            if self.projection is None:
                raise ValueError(
                    f"activation={self.activation!r} stands behind the projection: give "
                    "projection=."
                )
            _activation(self.activation)

    def build(
        self,
        taps: Sequence[TapInfo],
        num_classes: int,
        drop_rate: float | None = None,
        in_chans: int = 3,
    ) -> TemporalClassifier:
        """The head for the maps at its one tap."""
        (tap,) = taps
        rate = drop_rate or 0.0
        if self.drop_rate is not None:
            rate = self.drop_rate
        return TemporalClassifier(self, tap, num_classes, rate)


@register_head
@dataclass(frozen=True)
class GRUHead(LSTMHead):
    """GRU over the frames of a clip, with the arguments of :class:`LSTMHead` and no cell state.

    Example:
        >>> GRUHead(hidden_size=64, output='frame').kind
        'gru'
    """

    kind: ClassVar[str] = "gru"
    cell: ClassVar[type[nn.LSTM] | type[nn.GRU]] = nn.GRU


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


class _AttentionPool(nn.Module):
    """Learned weighted average: w = softmax(u tanh(V h)), sum of w h. (B, N, C) -> (B, C)."""

    def __init__(self, width: int):
        super().__init__()
        self.score = nn.Sequential(
            nn.Linear(width, _ATTENTION_WIDTH),
            nn.Tanh(),
            nn.Linear(_ATTENTION_WIDTH, 1, bias=False),
        )

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        score = self.score(x)
        if mask is not None:
            score = score.masked_fill(~mask[:, :, None], float("-inf"))
        return (score.softmax(1) * x).sum(1)


class _MapAttention(_AttentionPool):
    """The same over the positions of a map. (N, C, H, W) -> (N, C)."""

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        return super().forward(x.flatten(2).transpose(1, 2), mask)


class TemporalClassifier(BranchClassifier):
    """Map to vector, recurrence, readout, classifier: what the temporal heads build.

    Shapes: frames' maps (N, C, H, W) of B clips -> (B, K) or (B, T, K); without classes the
    features that the classifier would read.
    """

    def __init__(self, spec: LSTMHead, tap: TapInfo, num_classes: int, drop_rate: float):
        pool: nn.Module
        width = tap.channels
        if spec.pool_type == "flatten":
            pool, width = FixedFlatten(tap), tap.channels * tap.size[0] * tap.size[1]
        elif spec.pool_type == "attention":
            pool = _MapAttention(width)
        else:
            pool = SelectAdaptivePool2d(pool_type=spec.pool_type, flatten=True)
            width *= pool.feat_mult()
        out = spec.hidden_size * (2 if spec.bidirectional else 1)
        super().__init__(pool, spec.hidden[-1] if spec.hidden else out, (), num_classes, drop_rate)
        self.spec = spec
        self.projection: nn.Module = nn.Identity()
        if spec.projection is not None:
            layers: list[nn.Module] = [nn.Linear(width, spec.projection)]
            if spec.activation is not None:
                layers.append(_activation(spec.activation)())
            self.projection, width = nn.Sequential(*layers), spec.projection
        self.rnn = spec.cell(
            width,
            spec.hidden_size,
            spec.num_layers,
            batch_first=True,
            dropout=drop_rate if spec.num_layers > 1 else 0.0,
            bidirectional=spec.bidirectional,
        )
        self.attention = _AttentionPool(out) if spec.readout == "attention" else None
        self.drop = nn.Dropout(drop_rate)
        hidden: list[nn.Module] = []
        for size in spec.hidden:
            hidden += [nn.Linear(out, size), nn.ReLU(), nn.Dropout(drop_rate)]
            out = size
        self.hidden = nn.Sequential(*hidden)

    def reset_classifier(self, num_classes: int) -> None:
        """A new last layer for `num_classes` classes; 0 leaves the features."""
        super().reset_classifier(num_classes)
        if "rnn" in self._modules:  # not yet while the head is made
            self.fc.to(next(self.rnn.parameters()))

    def forward(  # type: ignore[override]
        self, x: torch.Tensor, clips: Clips, state: State | None = None
    ) -> tuple[torch.Tensor, State]:
        """Answers for clips, and the state after their last frames.

        Args:
            x: Maps (N, C, H, W) of the clips' frames.
            clips: How these frames make up the clips.
            state: What to go on from: hidden state (layers, B, hidden_size), for an LSTM the cell
                state beside it.

        Returns:
            Logits (B, K) or, with `output='frame'`, (B, T, K); and the new state.
        """
        y = clips.unfold(self.projection(self.to_vector(x)))
        out, state = self._recur(y, clips, state)
        if self.spec.output == "frame":
            return clips.blank(self._classify(out)), state
        return self._classify(self._read_out(out, state, clips)), state

    def _recur(
        self, y: torch.Tensor, clips: Clips, state: State | None
    ) -> tuple[torch.Tensor, State]:
        """Outputs (B, T, width), 0 behind the lengths, and the state."""
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

    def _read_out(self, out: torch.Tensor, state: State, clips: Clips) -> torch.Tensor:
        """Outputs (B, T, width) to one vector a clip (B, width)."""
        mask = clips.mask  # (B, T)
        if self.attention is not None:
            return self.attention(out, mask)
        if self.spec.readout == "mean":
            if mask is None:
                return out.mean(1)
            frames = mask.sum(1, keepdim=True).to(out.dtype)  # (B, 1)
            return out.sum(1) / frames  # `out` is 0 behind the lengths
        if self.spec.readout == "max":
            if mask is not None:
                out = out.masked_fill(~mask[:, :, None], float("-inf"))
            return out.amax(1)
        if mask is not None and clips.exporting:  # there the state is that of the padding
            last = (mask.sum(1) - 1)[:, None, None].expand(-1, 1, out.shape[2])
            return out.gather(1, last)[:, 0]
        h = state[0]  # (layers * directions, B, hidden_size)
        if self.spec.bidirectional:
            return torch.cat([h[-2], h[-1]], 1)
        return h[-1]

    def _classify(self, y: torch.Tensor) -> torch.Tensor:
        return self.fc(self.hidden(self.drop(y)))

    def check_stream(self, name: str, batch_size: int, state: State | None = None) -> None:
        """Refuse a head whose answer needs frames that are gone or to come, and a wrong state.

        Raises:
            ValueError: The head is bidirectional or reads out all frames, or the state is not one
                of its own.
        """
        reads = ""
        if self.spec.bidirectional:
            reads = "reads the clip backwards too (bidirectional=True)"
        elif self.spec.readout != "last":
            reads = f"reads out all frames (readout={self.spec.readout!r})"
        if reads:
            raise ValueError(
                f"The head {name!r} {reads} and cannot go on from a state: use a unidirectional "
                "head with readout='last' or output='frame', or leave it out with heads=[...]."
            )
        if state is None:
            return
        given = [tuple(tensor.shape) for tensor in state]
        needed = [tuple(tensor.shape) for tensor in self.zero_state(batch_size)]
        if given != needed:
            raise ValueError(
                f"The state of head {name!r} has the shapes {given}, {batch_size} clips need "
                f"{needed}: begin a new stream with state=None."
            )

    def zero_state(self, batch_size: int) -> State:
        """The state before the first frame.

        Hidden state (layers, B, hidden_size), for an LSTM the cell state too.
        """
        like = next(self.rnn.parameters())
        hidden = like.new_zeros(self.spec.num_layers, batch_size, self.spec.hidden_size)
        if self.rnn.mode == "LSTM":
            return hidden, torch.zeros_like(hidden)
        return (hidden,)
