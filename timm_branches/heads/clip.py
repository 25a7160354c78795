"""What all temporal heads share: a frame's map to a vector, the readout, the classifier.

Attention pooling is that of Ilse et al. 2018 (https://arxiv.org/abs/1802.04712), equations (7) and
(8). The mean over frames is the baseline of every comparison.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, ClassVar

import torch
from timm.layers import SelectAdaptivePool2d
from torch import nn

from timm_branches.arguments import as_items, check_flag, check_number
from timm_branches.heads.base import Head, State, register_head
from timm_branches.heads.classifier import BranchClassifier, FixedFlatten, check_options
from timm_branches.heads.folding import Clips
from timm_branches.taps.reader import TapInfo

__all__ = ["ClipClassifier", "MeanHead"]

_ATTENTION_WIDTH = 128  # the source's
_CHOICES = {
    "pool_type": ("avg", "max", "avgmax", "catavgmax", "attention", "flatten"),
    "output": ("clip", "frame"),
    "readout": ("last", "mean", "max", "attention"),
}
# whole numbers from 1, and the most that is sensible
_COUNTS = {
    "hidden_size": 65_536,
    "projection": 65_536,
    "num_layers": 1_000,
    "num_heads": 65_536,
    "kernel_size": 1_000,
    "max_frames": 65_536,
}


def check_clip_options(head: Any, extra_pool: str | None = None) -> None:
    """Check the options that temporal heads share, of those that this head has.

    Args:
        head: The description.
        extra_pool: A `pool_type` that only this head knows.

    Raises:
        ValueError: A width below 1, a rate outside [0, 1), an unknown name, or a readout that has
            no effect.
    """
    names = [field.name for field in fields(head)]
    if "hidden" in names:
        hidden = tuple(as_items("hidden=", head.hidden, "(256,)"))
        object.__setattr__(head, "hidden", hidden)
    check_options(getattr(head, "hidden", ()), head.drop_rate)
    for name in names:
        value = getattr(head, name)
        if name in _COUNTS and not (name == "projection" and value is None):
            check_number(f"{name}=", value, 1, _COUNTS[name], whole=True)
        elif name in ("bidirectional", "causal"):
            check_flag(f"{name}=", value)
    for name, known in _CHOICES.items():
        if name == "pool_type" and extra_pool is not None:
            known = (*known, extra_pool)
        if name in names and getattr(head, name) not in known:
            raise ValueError(
                f"{name}= must be one of {', '.join(map(repr, known))}, got "
                f"{getattr(head, name)!r}."
            )
    if "readout" in names and head.output == "frame" and head.readout != "last":
        raise ValueError(
            f"readout={head.readout!r} has no effect with output='frame', which reads every "
            "frame: leave it out, or choose output='clip'."
        )


class AttentionPool(nn.Module):
    """Learned weighted average: w = softmax(u tanh(V h)), sum of w h. (B, N, C) -> (B, C)."""

    def __init__(self, width: int):
        super().__init__()
        self.score = nn.Sequential(
            nn.Linear(width, _ATTENTION_WIDTH),
            nn.Tanh(),
            nn.Linear(_ATTENTION_WIDTH, 1, bias=False),
        )

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """The average (B, C) of (B, N, C), of those that the mask (B, N) leaves."""
        score = self.score(x)
        if mask is not None:
            score = score.masked_fill(~mask[:, :, None], float("-inf"))
        return (score.softmax(1) * x).sum(1)


class MapAttention(AttentionPool):
    """The same over the positions of a map. (N, C, H, W) -> (N, C)."""

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """The average (N, C) of a map's positions."""
        return super().forward(x.flatten(2).transpose(1, 2), mask)


def frame_pool(pool_type: str, tap: TapInfo) -> tuple[nn.Module, int]:
    """What turns a frame's map into a vector, and that vector's width."""
    if pool_type == "flatten":
        return FixedFlatten(tap), tap.channels * tap.size[0] * tap.size[1]
    if pool_type == "attention":
        return MapAttention(tap.channels), tap.channels
    pool = SelectAdaptivePool2d(pool_type=pool_type, flatten=True)
    return pool, tap.channels * pool.feat_mult()


class ClipClassifier(BranchClassifier):
    """Map to vector, something over time, readout, classifier.

    What every temporal head of the package builds. A subclass makes its layers between
    `super().__init__` and :meth:`_add_readout`, and implements :meth:`over_time`; one that streams
    implements :meth:`zero_state`, one that does not says why in `stream_obstacle`.

    Shapes: frames' maps (N, C, H, W) of B clips -> (B, K) or (B, T, K); without classes the
    features that the classifier would read.
    """

    state_names: tuple[str, ...] | None = None  # of the tensors of a state, where they have names
    stream_obstacle = ""
    attention: AttentionPool | None
    place: torch.Tensor

    def __init__(
        self, spec: Any, to_vector: nn.Module, out: int, num_classes: int, drop_rate: float
    ):
        hidden = tuple(getattr(spec, "hidden", ()))
        super().__init__(to_vector, hidden[-1] if hidden else out, (), num_classes, drop_rate)
        self.spec = spec
        self.output, self.readout = spec.output, getattr(spec, "readout", "last")
        self.projection: nn.Module = nn.Identity()
        # where the head is and in which precision, whatever layers it has
        self.register_buffer("place", torch.zeros(()), persistent=False)

    def _add_readout(self, out: int, drop_rate: float) -> None:
        """What follows the outputs (B, T, out): readout, dropout and hidden layers."""
        self.attention = AttentionPool(out) if self.readout == "attention" else None
        self.drop = nn.Dropout(drop_rate)
        hidden: list[nn.Module] = []
        for size in getattr(self.spec, "hidden", ()):
            hidden += [nn.Linear(out, size), nn.ReLU(), nn.Dropout(drop_rate)]
            out = size
        self.hidden = nn.Sequential(*hidden)

    def reset_classifier(self, num_classes: int) -> None:
        """A new last layer for `num_classes` classes; 0 leaves the features."""
        super().reset_classifier(num_classes)
        if "place" in self._buffers:  # not yet while the head is made
            self.fc.to(device=self.place.device, dtype=self.place.dtype)

    def forward(  # type: ignore[override]
        self, x: torch.Tensor, clips: Clips, state: State | None = None
    ) -> tuple[torch.Tensor, State]:
        """Answers for clips, and the state after their last frames.

        Args:
            x: Maps (N, C, H, W) of the clips' frames.
            clips: How these frames make up the clips.
            state: What to go on from, as :meth:`zero_state` begins it.

        Returns:
            Logits (B, K) or, with `output='frame'`, (B, T, K); and the new state.
        """
        y = clips.unfold(self.projection(self.to_vector(x)))
        out, state = self.over_time(y, clips, state)
        if self.output == "frame":
            return clips.blank(self._classify(out)), state
        return self._classify(self._read_out(out, state, clips)), state

    def over_time(
        self, y: torch.Tensor, clips: Clips, state: State | None
    ) -> tuple[torch.Tensor, State]:
        """Outputs (B, T, width) for the frames' vectors (B, T, D), and the state after them.

        What stands behind a clip's length is not read.
        """
        raise NotImplementedError

    def _read_out(self, out: torch.Tensor, state: State, clips: Clips) -> torch.Tensor:
        """Outputs (B, T, width) to one vector a clip (B, width)."""
        mask = clips.mask  # (B, T)
        if self.attention is not None:
            return self.attention(out, mask)
        if self.readout == "mean":
            if mask is None:
                return out.mean(1)
            frames = mask.sum(1, keepdim=True).to(out.dtype)  # (B, 1)
            return clips.blank(out).sum(1) / frames
        if self.readout == "max":
            if mask is not None:
                out = out.masked_fill(~mask[:, :, None], float("-inf"))
            return out.amax(1)
        return self._last(out, state, clips)

    def _last(self, out: torch.Tensor, state: State, clips: Clips) -> torch.Tensor:
        """The output (B, width) at each clip's last valid frame."""
        return last_valid(out, clips)

    def _classify(self, y: torch.Tensor) -> torch.Tensor:
        return self.fc(self.hidden(self.drop(y)))

    def obstacle(self) -> tuple[str, str]:
        """Why the head cannot stream and what could instead, empty if it can."""
        if self.stream_obstacle:
            return self.stream_obstacle, "use a head that streams"
        if self.readout != "last":
            reads = f"reads out all frames (readout={self.readout!r})"
            return reads, "use readout='last' or output='frame'"
        return "", ""

    def check_stream(self, name: str, batch_size: int, state: State | None = None) -> None:
        """Refuse a head whose answer needs frames that are gone or to come, and a wrong state.

        Raises:
            ValueError: The head reads frames that a stream does not have, or the state is not one
                of its own.
        """
        reads, remedy = self.obstacle()
        if reads:
            raise ValueError(
                f"The head {name!r} {reads} and cannot go on from a state: {remedy}, or leave it "
                "out with heads=[...]."
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
        """The state before the first frame; nothing for a head that cannot stream."""
        return ()


def last_valid(out: torch.Tensor, clips: Clips) -> torch.Tensor:
    """What stands at each clip's last valid frame: (B, T, D) -> (B, D)."""
    if clips.mask is None:
        return out[:, -1]
    last = (clips.mask.sum(1) - 1)[:, None, None].expand(-1, 1, out.shape[2])
    return out.gather(1, last)[:, 0]


class ClipHead(Head):
    """The description of a temporal head of one tap; its `module` is a :class:`ClipClassifier`."""

    temporal: ClassVar[bool] = True
    module: ClassVar[Any]

    def build(
        self,
        taps: Sequence[TapInfo],
        num_classes: int,
        drop_rate: float | None = None,
        in_chans: int = 3,
    ) -> ClipClassifier:
        """The head for the maps at its one tap."""
        (tap,) = taps
        own: float | None = getattr(self, "drop_rate", None)
        return self.module(self, tap, num_classes, own if own is not None else drop_rate or 0.0)


@register_head
@dataclass(frozen=True)
class MeanHead(ClipHead):
    """The mean of all frames' vectors, then the classifier: the baseline without order.

    It does not see in which order frames come, so what a head of time gains over it is what the
    order tells. It streams: its state is the sum so far.

    Args:
        drop_rate: Dropout before the classifier and behind each hidden layer; None takes the
            model's, or 0.
        pool_type: How a frame's map becomes a vector, as in :class:`LSTMHead`.
        output: `'clip'` for one answer a clip (B, K), `'frame'` for one a frame (B, T, K), of the
            mean of the frames so far.
        hidden: Widths of hidden layers before the last Linear, each Linear -> ReLU -> Dropout.

    Raises:
        ValueError: A width below 1, a rate outside [0, 1), an unknown name.

    Example:
        >>> MeanHead(hidden=(128,)).kind
        'mean'
    """

    kind: ClassVar[str] = "mean"

    drop_rate: float | None = None
    pool_type: str = "avg"
    output: str = "clip"
    hidden: tuple[int, ...] = ()

    def __post_init__(self):
        check_clip_options(self)


class _MeanClassifier(ClipClassifier):
    """Mean over the frames so far. State: their sum (1, B, D) and number (1, B, 1), in float32."""

    state_names = ("sum", "frames")

    def __init__(self, spec: MeanHead, tap: TapInfo, num_classes: int, drop_rate: float):
        pool, width = frame_pool(spec.pool_type, tap)
        super().__init__(spec, pool, width, num_classes, drop_rate)
        self.width = width
        self._add_readout(width, drop_rate)

    def over_time(
        self, y: torch.Tensor, clips: Clips, state: State | None
    ) -> tuple[torch.Tensor, State]:
        """The mean up to each frame (B, T, D)."""
        total, count = self.zero_state(y.shape[0]) if state is None else state
        exact = torch.promote_types(y.dtype, torch.float32)
        sums = total[0][:, None] + y.to(exact).cumsum(1)
        one = torch.ones_like(sums[:, :, :1])
        counts = count[0][:, None] + one.cumsum(1)
        new = last_valid(sums, clips)[None], last_valid(counts, clips)[None]
        return (sums / counts).to(y.dtype), new

    def zero_state(self, batch_size: int) -> State:
        """No frame yet."""
        zeros = partial(torch.zeros, device=self.place.device)
        return zeros(1, batch_size, self.width), zeros(1, batch_size, 1)


# what each description builds; here, behind both
MeanHead.module = _MeanClassifier
