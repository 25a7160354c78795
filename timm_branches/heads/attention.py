"""Attention over the frames of a clip: a probe that pools, a transformer that knows their order.

Attentive pooling is the probe of V-JEPA (Bardes et al. 2024, https://arxiv.org/abs/2404.08471,
section 4): one learned query attends to all frames and positions. The transformer follows STEP
(Thiyakesan Ponbagavathi and Roitberg 2025, https://arxiv.org/abs/2503.24298): self-attention with
one learned position a frame, one CLS token a clip, and no feed-forward layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from timm.layers import Mlp, trunc_normal_
from torch import nn

from timm_branches.arguments import check_number
from timm_branches.heads.base import State, register_head
from timm_branches.heads.clip import (
    ClipClassifier,
    ClipHead,
    check_clip_options,
    frame_pool,
    last_valid,
)
from timm_branches.heads.folding import Clips
from timm_branches.taps.reader import TapInfo

__all__ = ["AttentionHead", "TransformerHead"]


def _check_heads(head: AttentionHead | TransformerHead) -> None:
    check_number("mlp_ratio=", head.mlp_ratio, 0, 100)
    if head.hidden_size % head.num_heads:
        raise ValueError(
            f"num_heads={head.num_heads} must divide hidden_size={head.hidden_size}: each head has "
            "as many of its channels."
        )


# ---- a query that pools


@register_head
@dataclass(frozen=True)
class AttentionHead(ClipHead):
    """Attentive pooling: a learned query attends to every position of every frame.

    It does not see in which order frames come. It streams in constant memory: a softmax over frames
    can be continued.

    Args:
        hidden_size: Width of the values and of what is pooled.
        num_heads: Attention heads.
        mlp_ratio: Width of the feed-forward layer behind the pooling, in multiples of
            `hidden_size`; 0 for none.
        drop_rate: Dropout before the classifier; None takes the model's, or 0.
        output: `'clip'` for one answer a clip (B, K), `'frame'` for one a frame (B, T, K), which
            attends to the frames so far.

    Raises:
        ValueError: A width below 1, heads that do not divide it, a rate outside [0, 1).

    Example:
        >>> AttentionHead(hidden_size=384, num_heads=6).kind
        'attention'
    """

    kind: ClassVar[str] = "attention"

    hidden_size: int = 256
    num_heads: int = 8
    mlp_ratio: float = 4.0
    drop_rate: float | None = None
    output: str = "clip"

    def __post_init__(self):
        check_clip_options(self)
        _check_heads(self)


class _AttentivePool(nn.Module):
    """One frame's share of the pooling: (N, C, H, W) -> (N, heads + width).

    For each head the logarithm of the sum of exp(score) over the positions, then their weighted
    mean. A learned query against keys, q W_k x, is one linear function of x for each head, and is
    kept as such.
    """

    def __init__(self, channels: int, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(channels)
        self.score = nn.Linear(channels, num_heads)
        self.value = nn.Linear(channels, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.norm(x.flatten(2).transpose(1, 2))  # (N, P, C)
        score = self.score(tokens)  # (N, P, heads)
        score = score.to(torch.promote_types(score.dtype, torch.float32))
        value = self.value(tokens).unflatten(2, (self.num_heads, -1))
        weight = score.softmax(1).to(value.dtype)
        mean = (weight[..., None] * value).sum(1).flatten(1)
        return torch.cat([score.logsumexp(1).to(mean.dtype), mean], 1)


class _AttentionClassifier(ClipClassifier):
    """Frames' shares joined by a softmax over time.

    State: that of all frames so far, (1, B, heads) logarithms and (1, B, width) means.
    """

    state_names = ("log_weight", "mean")
    spec: AttentionHead

    def __init__(self, spec: AttentionHead, tap: TapInfo, num_classes: int, drop_rate: float):
        width = spec.hidden_size
        pool = _AttentivePool(tap.channels, width, spec.num_heads)
        super().__init__(spec, pool, width, num_classes, drop_rate)
        self.proj = nn.Linear(width, width)
        self.norm: nn.Module = nn.Identity()
        self.mlp: nn.Module | None = None
        if spec.mlp_ratio:
            self.norm = nn.LayerNorm(width)
            self.mlp = Mlp(width, int(width * spec.mlp_ratio))
        self._add_readout(width, drop_rate)

    def over_time(
        self, y: torch.Tensor, clips: Clips, state: State | None
    ) -> tuple[torch.Tensor, State]:
        """What the query finds up to each frame (B, T, width)."""
        heads = self.spec.num_heads
        log_weight, mean = y[..., :heads], y[..., heads:]
        log_weight = log_weight.to(torch.promote_types(y.dtype, torch.float32))
        if state is not None:  # all frames before are as one
            log_weight = torch.cat([state[0].transpose(0, 1).to(log_weight), log_weight], 1)
            mean = torch.cat([state[1].transpose(0, 1).to(mean), mean], 1)
        earlier = log_weight.shape[1] - clips.shape[1]
        time = torch.arange(log_weight.shape[1], device=y.device)
        future = time > time[earlier:, None]  # (T, all frames)
        scores = log_weight.transpose(1, 2)[:, :, None]  # (B, heads, 1, all frames)
        scores = scores.masked_fill(future, float("-inf"))
        value = mean.unflatten(2, (heads, -1)).transpose(1, 2)  # (B, heads, all frames, d)
        pooled = (scores.softmax(-1).to(value.dtype) @ value).transpose(1, 2).flatten(2)
        # (B, heads, T) -> (B, T, heads)
        weights = scores.logsumexp(-1).transpose(1, 2)
        new = last_valid(weights, clips)[None], last_valid(pooled, clips)[None]
        out = self.proj(pooled)
        if self.mlp is not None:
            out = out + self.mlp(self.norm(out))
        return out, new

    def zero_state(self, batch_size: int) -> State:
        """No frame yet: no weight."""
        weight = torch.full((1, batch_size, self.spec.num_heads), float("-inf"))
        mean = self.place.new_zeros(1, batch_size, self.spec.hidden_size)
        return weight.to(self.place.device), mean


# ---- tokens that attend to each other


@register_head
@dataclass(frozen=True)
class TransformerHead(ClipHead):
    """Self-attention over the frames of a clip, which knows their order.

    Without `causal` all frames and one CLS token a clip attend to each other, and a learned
    position tells the frames apart; the clip's answer is read from CLS. With `causal` a frame
    attends to itself and the frames before it, by learned biases of their distance, and the clip's
    answer is read from its last frame: such a head streams, with a bounded cache.

    Args:
        hidden_size: Width of the tokens.
        num_layers: Layers of attention, one upon the other.
        num_heads: Attention heads.
        mlp_ratio: Width of feed-forward layers, in multiples of `hidden_size`; 0, the source's
            simplification, for none.
        causal: Whether a frame sees only what came before it.
        max_frames: The most frames that a clip may have; with `causal` the most that a frame
            attends to, itself counted, in clips of any length.
        drop_rate: Dropout of each layer's result and before the classifier; None takes the model's,
            or 0.
        pool_type: How a frame's map becomes a token, as in :class:`LSTMHead`; `'none'` makes each
            position of the map a token of its own (no stream then, and `'frame'` reads a frame's
            mean).
        output: `'clip'` for one answer a clip (B, K), `'frame'` for one a frame (B, T, K).

    Raises:
        ValueError: A width below 1, heads that do not divide it, a rate outside [0, 1), an unknown
            name; a clip of more than `max_frames` frames for a head that is not causal.

    Example:
        >>> TransformerHead(num_layers=2, causal=True, max_frames=32).kind
        'transformer'
    """

    kind: ClassVar[str] = "transformer"

    hidden_size: int = 256
    num_layers: int = 1
    num_heads: int = 8
    mlp_ratio: float = 0.0
    causal: bool = False
    max_frames: int = 64
    drop_rate: float | None = None
    pool_type: str = "avg"
    output: str = "clip"

    def __post_init__(self):
        check_clip_options(self, extra_pool="none")
        _check_heads(self)
        if self.causal and self.max_frames == 1:
            raise ValueError(
                "max_frames=1 with causal=True lets a frame see itself alone: take 2 or more, or "
                "head='mean'."
            )


class _Positions(nn.Module):
    """Every position of a map as a vector: (N, C, H, W) -> (N, H * W * C)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(2).transpose(1, 2).flatten(1)


class _Layer(nn.Module):
    """Attention and, if any, a feed-forward layer, each behind a norm and beside a skip."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float, drop_rate: float):
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.drop = nn.Dropout(drop_rate)
        self.norm2: nn.Module = nn.Identity()
        self.mlp: nn.Module | None = None
        if mlp_ratio:
            self.norm2 = nn.LayerNorm(width)
            self.mlp = Mlp(width, int(width * mlp_ratio), drop=drop_rate)

    def forward(
        self, x: torch.Tensor, bias: torch.Tensor, cache: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens (B, N, D) after the layer, and keys beside values (B, M, 2 D) that were read.

        Args:
            x: The tokens.
            bias: What is added to their scores, (B or 1, heads or 1, N, M); -inf hides a token.
            cache: Keys beside values (B, M - N, 2 D) of tokens before these.
        """
        query, memory = self.qkv(self.norm1(x)).tensor_split([x.shape[2]], 2)
        if cache is not None:
            memory = torch.cat([cache.to(memory.dtype), memory], 1)
        key, value = (self._split(part) for part in memory.chunk(2, 2))
        y = F.scaled_dot_product_attention(self._split(query), key, value, bias.to(query.dtype))
        # a copy: exporters decide by the strides of one kernel, and run another
        y = y.transpose(1, 2).clone(memory_format=torch.contiguous_format).flatten(2)
        x = x + self.drop(self.proj(y))
        if self.mlp is not None:
            x = x + self.mlp(self.norm2(x))
        return x, memory

    def _split(self, x: torch.Tensor) -> torch.Tensor:
        """(B, N, D) -> (B, heads, N, D / heads)."""
        return x.unflatten(2, (self.num_heads, -1)).transpose(1, 2)


class _TransformerClassifier(ClipClassifier):
    """Layers of attention over the frames' tokens.

    State of a causal head: keys beside values of the last max_frames - 1 frames, (layers, B,
    frames, 2 width), and which of these frames there were, (1, B, frames).
    """

    state_names = ("keys_values", "seen")
    spec: TransformerHead

    def __init__(self, spec: TransformerHead, tap: TapInfo, num_classes: int, drop_rate: float):
        width = spec.hidden_size
        pool: nn.Module = _Positions()
        channels = tap.channels
        if spec.pool_type != "none":
            pool, channels = frame_pool(spec.pool_type, tap)
        super().__init__(spec, pool, width, num_classes, drop_rate)
        self.channels = channels
        # frames and positions begin at one scale, whatever the backbone's, or order is not learned
        self.embed = nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, width))
        # of each frame's distance to those before it, or of its place in the clip
        shape = (spec.num_heads, spec.max_frames) if spec.causal else (spec.max_frames, width)
        self.positions = nn.Parameter(torch.zeros(shape))
        if spec.causal:
            # heads begin to look back differently far, as ALiBi's (Press et al. 2022, arXiv
            # 2108.12409) but from the very frame before on, or some never compare neighbours
            slopes = 2.0 ** (2 - 8 * torch.arange(spec.num_heads) / spec.num_heads)
            with torch.no_grad():
                self.positions.copy_(-slopes[:, None] * torch.arange(spec.max_frames))
        self.cls: nn.Parameter | None = None
        if not spec.causal:
            trunc_normal_(self.positions, std=0.5)
            if spec.output == "clip":
                self.cls = nn.Parameter(torch.zeros(1, 1, width))
                trunc_normal_(self.cls, std=0.02)
        self.layers = nn.ModuleList()
        for _ in range(spec.num_layers):
            self.layers.append(_Layer(width, spec.num_heads, spec.mlp_ratio, drop_rate))
        self.norm = nn.LayerNorm(width)
        self._add_readout(width, drop_rate)
        if not spec.causal:
            self.stream_obstacle = "attends to frames to come (causal=False)"
        elif spec.pool_type == "none":
            self.stream_obstacle = "reads all positions of each frame (pool_type='none')"

    def over_time(
        self, y: torch.Tensor, clips: Clips, state: State | None
    ) -> tuple[torch.Tensor, State]:
        """Tokens (B, T, width) after the layers; CLS alone (B, 1, width) where it is read."""
        x = self.embed(y.unflatten(2, (-1, self.channels)))  # (B, T, positions of a map, width)
        if self.spec.causal:
            return self._causal(x, clips, state)
        # in a graph of any number of frames the table's own end says so
        if isinstance(x.shape[1], int) and x.shape[1] > self.spec.max_frames:
            raise ValueError(
                f"a clip has {x.shape[1]} frames, the 'transformer' head has positions for "
                f"max_frames={self.spec.max_frames}: take fewer frames of a clip, or build the "
                "head with more."
            )
        each = x.shape[2]
        frame = torch.arange(x.shape[1], device=x.device)
        x = (x + self.positions[frame][:, None]).flatten(1, 2)
        valid = torch.ones_like(x[:, :, 0], dtype=torch.bool)
        if clips.mask is not None:
            valid = clips.mask.repeat_interleave(each, 1)
        if self.cls is not None:
            x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1)
            valid = torch.cat([valid[:, :1], valid], 1)  # a clip has at least one frame
        bias = torch.zeros_like(valid, dtype=x.dtype).masked_fill(~valid, float("-inf"))
        for layer in self.layers:
            x, _ = layer(x, bias[:, None, None])
        if self.cls is not None:
            return self.norm(x[:, :1]), ()
        return self.norm(x).unflatten(1, (-1, each)).mean(2), ()

    def _causal(
        self, x: torch.Tensor, clips: Clips, state: State | None
    ) -> tuple[torch.Tensor, State]:
        """Frame by frame, each with those before it, which may stand in the state."""
        batch, time, each = x.shape[:3]
        x = x.flatten(1, 2)
        caches: Sequence[torch.Tensor | None] = [None] * len(self.layers)
        before = 0
        if state is not None:
            caches, before = state[0].unbind(0), self.spec.max_frames - 1
        frame = torch.arange(before + time, device=x.device)
        distance = frame[before:, None] - frame  # (T, frames before and now)
        near = (distance >= 0) & (distance < self.spec.max_frames)
        bias = self.positions[:, distance.clamp(0, self.spec.max_frames - 1)][None]
        bias = bias.masked_fill(~near, float("-inf"))
        if state is not None:
            seen = torch.cat([state[1][0] > 0, torch.ones_like(x[:, :time, 0]) > 0], 1)
            bias = bias.masked_fill(~seen[:, None, None], float("-inf"))
        if each > 1:
            bias = bias.repeat_interleave(each, 2).repeat_interleave(each, 3)
        memories: list[torch.Tensor] = []
        for layer, cache in zip(self.layers, caches, strict=True):
            x, memory = layer(x, bias, cache)
            memories.append(memory)
        out = self.norm(x).unflatten(1, (-1, each)).mean(2)
        if self.stream_obstacle:
            return out, ()
        return out, self._remember(memories, state, clips)

    def _remember(self, memories: list[torch.Tensor], state: State | None, clips: Clips) -> State:
        """The last frames of each clip, for the next call."""
        keep = self.spec.max_frames - 1
        if state is None:
            state = self.zero_state(clips.shape[0])
            memories = [
                torch.cat([empty.to(memory.dtype), memory], 1)
                for empty, memory in zip(state[0].unbind(0), memories, strict=True)
            ]
        one = torch.ones_like(memories[0][:, :, 0])[:, keep:]
        seen = torch.cat([state[1][0], one.to(state[1].dtype)], 1)
        lengths = one.new_full((one.shape[0],), one.shape[1], dtype=torch.long)
        if clips.mask is not None:
            lengths = clips.mask.sum(1)
        which = lengths[:, None] + torch.arange(keep, device=one.device)  # (B, keep)
        kept = torch.stack(memories)  # (layers, B, frames, 2 width)
        index = which[None, :, :, None].expand(kept.shape[0], -1, -1, kept.shape[3])
        return kept.gather(2, index), seen.gather(1, which)[None]

    def _last(self, out: torch.Tensor, state: State, clips: Clips) -> torch.Tensor:
        """CLS, or the last valid frame."""
        return out[:, 0] if self.cls is not None else last_valid(out, clips)

    def zero_state(self, batch_size: int) -> State:
        """No frame yet; nothing for a head that cannot stream."""
        if self.stream_obstacle:
            return ()
        keep = self.spec.max_frames - 1
        shape = (self.spec.num_layers, batch_size, keep, 2 * self.spec.hidden_size)
        return self.place.new_zeros(shape), self.place.new_zeros(1, batch_size, keep)


# what each description builds; here, behind both
AttentionHead.module = _AttentionClassifier
TransformerHead.module = _TransformerClassifier
