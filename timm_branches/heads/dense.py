"""Decoders that bring all maps to one size: linear, lean, FPN, UPerNet, DPT, SegFormer.

Unlike a skip decoder they stop at the finest map that they read and enlarge its logits to the
image. Any taps in any order, images of any size that the backbone takes, and backbones whose maps
have all one size (a ViT) as well as pyramids. All resizing is bilinear between centres of pixels
(`align_corners=False`), so that no map is displaced.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from timm.layers import LayerNorm2d
from torch import nn

from timm_branches.arguments import as_items, check_number
from timm_branches.heads.base import Head, register_head
from timm_branches.heads.blocks import conv_norm_act, deepest_first, norm_act, resize
from timm_branches.heads.decoder import check_norm_act
from timm_branches.taps.reader import TapInfo

__all__ = [
    "DPTHead",
    "FPNHead",
    "LeanHead",
    "LinearHead",
    "MapDecoder",
    "SegformerHead",
    "UPerNetHead",
]

_BINS = (1, 2, 3, 6)  # of pyramid pooling, the source's


class _DenseHead(Head):
    """What builds a decoder of several taps, its `module`."""

    multi_tap: ClassVar[bool] = True
    dense: ClassVar[bool] = True
    module: ClassVar[Any]
    drop_rate: float | None

    def __post_init__(self):
        if self.drop_rate is not None:
            check_number("drop_rate= must be in [0, 1): it", self.drop_rate, 0, 1, below=True)

    def build(
        self,
        taps: Sequence[TapInfo],
        num_classes: int,
        drop_rate: float | None = None,
        in_chans: int = 3,
    ) -> MapDecoder:
        """The decoder for the maps at its taps."""
        rate = self.drop_rate if self.drop_rate is not None else drop_rate or 0.0
        return self.module(self, taps, num_classes, rate)


@dataclass(frozen=True)
class _MapHead(_DenseHead):
    """Options that the decoders of one width have in common."""

    channels: int = 256
    norm: str | None = "batchnorm2d"
    act: str = "relu"
    drop_rate: float | None = None

    def __post_init__(self):
        super().__post_init__()
        check_number("channels=", self.channels, 1, 65_536, whole=True)
        check_norm_act(self.norm, self.act)


class MapDecoder(nn.Module):
    """Maps to one map, 1x1 convolution, enlarged to the image. What the decoders here build.

    A subclass makes its layers and sets `num_features` in :meth:`_make`, and implements
    :meth:`decode`.

    Args:
        spec: Its options.
        taps: The maps it reads, in the order in which it is given them.
        num_classes: Channels of the output; 0 gives the map that the last layer would read.
        drop_rate: Dropout of channels before the last layer.

    Shapes: maps (B, C_i, H_i, W_i) and image (B, C, H, W) -> (B, num_classes, H, W).
    """

    num_features: int

    def __init__(
        self, spec: Any, taps: Sequence[TapInfo], num_classes: int, drop_rate: float = 0.0
    ):
        super().__init__()
        self.order = deepest_first(taps)
        self.fc: nn.Module = nn.Identity()
        self.drop = nn.Dropout2d(drop_rate)
        self._make(spec, [taps[i] for i in self.order])
        for m in self.modules():
            if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d)):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
                if m.bias is not None:
                    nn.init.zeros_(m.bias)
        self.reset_classifier(num_classes)

    def _make(self, spec: Any, taps: Sequence[TapInfo]) -> None:
        """The layers for these taps, deepest first, and `num_features`."""
        raise NotImplementedError

    def decode(self, maps: Sequence[torch.Tensor]) -> torch.Tensor:
        """Maps, deepest first, to one map (B, num_features, h, w)."""
        raise NotImplementedError

    def reset_classifier(self, num_classes: int) -> None:
        """A new last layer for `num_classes` channels of output; 0 leaves the map it reads."""
        like: torch.Tensor | None = next(self.parameters(), None)
        self.fc = nn.Identity()
        if num_classes:
            fc = nn.Conv2d(self.num_features, num_classes, 1)
            nn.init.normal_(fc.weight, std=0.01)
            assert fc.bias is not None
            nn.init.zeros_(fc.bias)
            self.fc = fc if like is None else fc.to(device=like.device, dtype=like.dtype)
        self.num_classes = num_classes

    def forward(self, *maps: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        """Maps of the taps and the image -> (B, num_classes, H, W)."""
        x = self.decode([maps[i] for i in self.order])
        return resize(self.fc(self.drop(x)), image.shape[2:])


def pyramid_scales(taps: Sequence[TapInfo]) -> list[float]:
    """How much each map, deepest first, is enlarged so that the maps are a pyramid.

    Maps of different strides are one. Maps of a single stride, as a ViT's, become one whose finest
    has a stride of about 4, each deeper one half as large: 4, 2, 1 and 1/2 times the tokens of 14
    or 16 pixels (Ranftl et al. 2021, arXiv 2103.13413, section 3).
    """
    strides = [tap.stride for tap in taps]
    if len(taps) == 1 or max(strides) != min(strides) or strides[0] <= 4:
        return [1.0] * len(taps)
    finest = 2.0 ** round(math.log2(strides[0] / 4))
    return [finest / 2**i for i in reversed(range(len(taps)))]


def _rescale(x: torch.Tensor, scale: float) -> torch.Tensor:
    """A map that many times as large, rounded up."""
    if scale == 1:
        return x
    if scale > 1:
        return resize(x, (x.shape[2] * int(scale), x.shape[3] * int(scale)))
    part = int(1 / scale)
    # a mean over the pixels that fall together: resizing by a half reads only their middle
    return nn.functional.avg_pool2d(x, part, ceil_mode=True)


# ---- one layer


@register_head
@dataclass(frozen=True)
class LinearHead(_DenseHead):
    """One 1x1 convolution of the maps at the finest one's size: the probe of ViT papers.

    DINOv2 (Oquab et al. 2023, arXiv 2304.07193, section 7.4) reports it on the last layer, and on
    the last four side by side, behind a BatchNorm.

    Args:
        norm: timm's name of a norm of each map; None for none.
        drop_rate: Dropout of channels before the convolution; None takes the model's, or 0.

    Raises:
        ValueError: An unknown norm, a rate outside [0, 1).

    Example:
        >>> LinearHead(norm='batchnorm2d').kind
        'linear'
    """

    kind: ClassVar[str] = "linear"
    norm: str | None = None
    drop_rate: float | None = None

    def __post_init__(self):
        super().__post_init__()
        check_norm_act(self.norm, "identity")


class _LinearDecoder(MapDecoder):
    def _make(self, spec: LinearHead, taps: Sequence[TapInfo]) -> None:
        self.channels = [tap.channels for tap in taps]
        self.norms = nn.ModuleList()
        if spec.norm is not None:
            for channels in self.channels:
                self.norms.append(norm_act(channels, spec.norm, "identity"))
        self.num_features = sum(self.channels)

    def decode(self, maps: Sequence[torch.Tensor]) -> torch.Tensor:
        """All maps, side by side at the size of the finest."""
        size = maps[-1].shape[2:]
        return torch.cat([resize(x, size) for x in self._normed(maps)], 1)

    def _normed(self, maps: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        if not len(self.norms):
            return list(maps)
        return [norm(x) for norm, x in zip(self.norms, maps, strict=True)]

    def forward(self, *maps: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        """Maps of the taps and the image -> (B, num_classes, H, W)."""
        if not isinstance(self.fc, nn.Conv2d):
            return super().forward(*maps, image=image)
        # convolved before they are enlarged: as both are linear the sum is the same, and small
        ordered = self._normed([maps[i] for i in self.order])
        size = ordered[-1].shape[2:]
        total = self.fc.bias.view(1, -1, 1, 1)  # type: ignore[union-attr]
        for x, weight in zip(ordered, self.fc.weight.split(self.channels, 1), strict=True):
            total = total + resize(nn.functional.conv2d(self.drop(x), weight), size)
        return resize(total, image.shape[2:])


# ---- sums and MLPs


@register_head
@dataclass(frozen=True)
class LeanHead(_MapHead):
    """The cheapest decoder that reads all maps: narrow sums, then one 3x3 convolution.

    Each map passes a 1x1 convolution at its own size, is enlarged to the finest and added; one 3x3
    convolution, norm and activation follow. It is the pyramid of :class:`FPNHead` without its
    branches.

    Args:
        channels: Width of the sum.
        norm: timm's name of the norm; None for none.
        act: timm's name of the activation.
        drop_rate: Dropout of channels before the last layer; None takes the model's, or 0.

    Raises:
        ValueError: An unknown norm or activation, a width below 1, a rate outside [0, 1).

    Example:
        >>> LeanHead().channels
        64
    """

    kind: ClassVar[str] = "lean"
    channels: int = 64


class _LeanDecoder(MapDecoder):
    def _make(self, spec: _MapHead, taps: Sequence[TapInfo]) -> None:
        self.lateral = nn.ModuleList(nn.Conv2d(tap.channels, spec.channels, 1) for tap in taps)
        self.fuse = conv_norm_act(spec.channels, spec.channels, 3, spec.norm, spec.act)
        self.num_features = spec.channels

    def decode(self, maps: Sequence[torch.Tensor]) -> torch.Tensor:
        """The sum of all maps at the size of the finest, convolved."""
        layers = [conv(x) for conv, x in zip(self.lateral, maps, strict=True)]
        total = layers[-1]
        for x in layers[:-1]:
            total = total + resize(x, total.shape[2:])
        return self.fuse(total)


@register_head
@dataclass(frozen=True)
class SegformerHead(_MapHead):
    """SegFormer's all-MLP decoder (Xie et al. 2021, arXiv 2105.15203, section 3.2).

    Each map passes a Linear at its own size and is enlarged to the finest; side by side they pass a
    second Linear, norm and activation.

    Args:
        channels: Width of each Linear.
        norm: timm's name of the norm; None for none.
        act: timm's name of the activation.
        drop_rate: Dropout of channels before the last layer; None takes the model's, or 0.

    Raises:
        ValueError: An unknown norm or activation, a width below 1, a rate outside [0, 1).

    Example:
        >>> SegformerHead(channels=768).kind
        'segformer'
    """

    kind: ClassVar[str] = "segformer"


class _SegformerDecoder(MapDecoder):
    def _make(self, spec: _MapHead, taps: Sequence[TapInfo]) -> None:
        self.lateral = nn.ModuleList(nn.Conv2d(tap.channels, spec.channels, 1) for tap in taps)
        self.fuse = conv_norm_act(len(taps) * spec.channels, spec.channels, 1, spec.norm, spec.act)
        self.num_features = spec.channels

    def decode(self, maps: Sequence[torch.Tensor]) -> torch.Tensor:
        """All maps at the size of the finest, fused."""
        size = maps[-1].shape[2:]
        layers = []
        for conv, x in zip(self.lateral, maps, strict=True):
            layers.append(resize(conv(x), size))
        return self.fuse(torch.cat(layers, 1))


# ---- pyramids


@register_head
@dataclass(frozen=True)
class FPNHead(_MapHead):
    """A feature pyramid with the branch of Panoptic FPN (Kirillov et al. 2019, arXiv 1901.02446).

    From the deepest map downwards each one, projected by a 1x1 convolution, is added to the one
    above it, enlarged. Each level is then doubled, a 3x3 convolution, norm and activation at a
    time, until it has the size of the finest, where all are added.

    Args:
        channels: Width of the pyramid.
        branch_channels: Width of the convolutions behind it.
        norm: timm's name of the norm; None for none.
        act: timm's name of the activation.
        drop_rate: Dropout of channels before the last layer; None takes the model's, or 0.

    Raises:
        ValueError: An unknown norm or activation, a width below 1, a rate outside [0, 1).

    Example:
        >>> FPNHead(channels=128, branch_channels=64).norm
        'groupnorm'
    """

    kind: ClassVar[str] = "fpn"
    norm: str | None = "groupnorm"
    branch_channels: int = 128

    def __post_init__(self):
        super().__post_init__()
        check_number("branch_channels=", self.branch_channels, 1, 65_536, whole=True)


class _FPNDecoder(MapDecoder):
    def _make(self, spec: FPNHead, taps: Sequence[TapInfo]) -> None:
        self.scales = pyramid_scales(taps)
        self.lateral = nn.ModuleList(nn.Conv2d(tap.channels, spec.channels, 1) for tap in taps)
        self.branches = nn.ModuleList()
        width = spec.branch_channels
        for number in range(len(taps)):
            branch = nn.ModuleList()
            # the last convolution of a level is at the size of the second finest
            for place in range(max(1, len(taps) - 1 - number)):
                in_chs = width if place else spec.channels
                branch.append(conv_norm_act(in_chs, width, 3, spec.norm, spec.act))
            self.branches.append(branch)
        self.num_features = width

    def decode(self, maps: Sequence[torch.Tensor]) -> torch.Tensor:
        """The sum of all levels at the size of the finest."""
        levels: list[torch.Tensor] = []
        for conv, x, scale in zip(self.lateral, maps, self.scales, strict=True):
            x = conv(_rescale(x, scale))
            if levels:
                x = x + resize(levels[-1], x.shape[2:], "nearest")
            levels.append(x)
        total: torch.Tensor | None = None
        for number, (x, branch) in enumerate(zip(levels, self.branches, strict=True)):
            finer = [level.shape[2:] for level in levels[number + 1 :]]
            assert isinstance(branch, nn.ModuleList)
            for place, conv in enumerate(branch):
                x = conv(x)
                if place < len(finer):
                    x = resize(x, finer[place])
            total = x if total is None else total + x
        assert total is not None
        return total


@register_head
@dataclass(frozen=True)
class UPerNetHead(_MapHead):
    """UPerNet (Xiao et al. 2018, arXiv 1807.10221): pyramid pooling, then a feature pyramid.

    The deepest map is joined by means of itself over 1x1, 2x2, 3x3 and 6x6 regions (Zhao et al.
    2017, arXiv 1612.01105); downwards each map is added; all levels side by side at the size of the
    finest pass a 3x3 convolution. Each map passes a LayerNorm first, which a transformer's needs.
    (In training the mean over the whole map and the default norm need two images a batch.)

    Args:
        channels: Width of every layer; 512 in the paper.
        norm: timm's name of the norm; None for none.
        act: timm's name of the activation.
        drop_rate: Dropout of channels before the last layer; None takes the model's, or 0.

    Raises:
        ValueError: An unknown norm or activation, a width below 1, a rate outside [0, 1).

    Example:
        >>> UPerNetHead(channels=512, norm='groupnorm').kind
        'upernet'
    """

    kind: ClassVar[str] = "upernet"


class _PyramidPool(nn.Module):
    """A map beside its means over regions, convolved: (B, C, h, w) -> (B, out_chs, h, w)."""

    def __init__(self, in_chs: int, out_chs: int, norm: str | None, act: str):
        super().__init__()
        self.convs = nn.ModuleList(conv_norm_act(in_chs, out_chs, 1, norm, act) for _ in _BINS)
        self.fuse = conv_norm_act(in_chs + len(_BINS) * out_chs, out_chs, 3, norm, act)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = [x]
        for bins, conv in zip(_BINS, self.convs, strict=True):
            means = nn.functional.adaptive_avg_pool2d(x, bins)
            parts.append(resize(conv(means), x.shape[2:]))
        return self.fuse(torch.cat(parts, 1))


class _UPerNetDecoder(MapDecoder):
    def _make(self, spec: _MapHead, taps: Sequence[TapInfo]) -> None:
        self.scales = pyramid_scales(taps)
        self.norms = nn.ModuleList(LayerNorm2d(tap.channels, eps=1e-6) for tap in taps)
        width, options = spec.channels, (spec.norm, spec.act)
        self.pool = _PyramidPool(taps[0].channels, width, *options)
        self.lateral, self.smooth = nn.ModuleList(), nn.ModuleList()
        for tap in taps[1:]:
            self.lateral.append(conv_norm_act(tap.channels, width, 1, *options))
            self.smooth.append(conv_norm_act(width, width, 3, *options))
        self.fuse = conv_norm_act(len(taps) * width, width, 3, *options)
        self.num_features = width

    def decode(self, maps: Sequence[torch.Tensor]) -> torch.Tensor:
        """All levels at the size of the finest, fused."""
        scaled = []
        for norm, x, scale in zip(self.norms, maps, self.scales, strict=True):
            scaled.append(_rescale(norm(x), scale))
        levels = [self.pool(scaled[0])]
        for conv, x in zip(self.lateral, scaled[1:], strict=True):
            x = conv(x)
            levels.append(x + resize(levels[-1], x.shape[2:]))
        size = levels[-1].shape[2:]
        parts = [resize(levels[0], size)]
        for conv, x in zip(self.smooth, levels[1:], strict=True):
            parts.append(resize(conv(x), size))
        return self.fuse(torch.cat(parts[::-1], 1))


# ---- tokens


@register_head
@dataclass(frozen=True)
class DPTHead(_MapHead):
    """Dense prediction transformer's decoder (Ranftl et al. 2021, arXiv 2103.13413).

    Each map is reassembled: a 1x1 convolution, a transposed or strided one that makes the maps a
    pyramid, a 3x3 convolution. From the deepest on residual units refine a level, add the one
    before, enlarge it; the last is twice as fine as the finest level. Class and register tokens are
    not read (the source's `readout='ignore'`).

    Args:
        channels: Width of the refinement.
        reassemble: Width of each map while its size is changed, from the shallowest tap on. By
            default 96, doubled with each one, up to 768, as for the source's ViT-Base.
        norm: timm's name of the norm; None for none.
        act: timm's name of the activation.
        drop_rate: Dropout of channels before the last layer; None takes the model's, or 0.

    Raises:
        ValueError: An unknown norm or activation, a width below 1, a rate outside [0, 1), or
            another number of widths than taps.

    Example:
        >>> DPTHead(reassemble=(256, 512, 1024, 1024)).channels
        256
    """

    kind: ClassVar[str] = "dpt"
    reassemble: tuple[int, ...] | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.reassemble is not None:
            widths = tuple(as_items("reassemble=", self.reassemble, "(96, 192, 384, 768)"))
            object.__setattr__(self, "reassemble", widths)
            for width in widths:
                check_number("reassemble= takes widths: each", width, 1, 65_536, whole=True)


class _ResidualUnit(nn.Module):
    """Twice (activation, 3x3 convolution, norm), and the input added."""

    def __init__(self, channels: int, norm: str | None, act: str):
        super().__init__()
        self.conv1 = self._layers(channels, norm, act)
        self.conv2 = self._layers(channels, norm, act)

    def _layers(self, channels: int, norm: str | None, act: str) -> nn.Sequential:
        conv = nn.Conv2d(channels, channels, 3, padding=1, bias=norm is None)
        after = nn.Identity() if norm is None else norm_act(channels, norm, "identity")
        # not in place: the input is added in the end
        return nn.Sequential(norm_act(channels, None, act, inplace=False), conv, after)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv2(self.conv1(x))


class _DPTDecoder(MapDecoder):
    def _make(self, spec: DPTHead, taps: Sequence[TapInfo]) -> None:
        widths = spec.reassemble
        if widths is None:
            widths = tuple(min(96 * 2**i, 768) for i in range(len(taps)))
        if len(widths) != len(taps):
            raise ValueError(
                f"reassemble= takes one width a tap, here {len(taps)}, got {spec.reassemble!r}."
            )
        width, options = spec.channels, (spec.norm, spec.act)
        self.reassemble = nn.ModuleList()
        self.refine, self.fuse, self.project = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        scales = pyramid_scales(taps)
        for tap, scale, between in zip(taps, scales, reversed(widths), strict=True):
            layers: list[nn.Module] = [nn.Conv2d(tap.channels, between, 1)]
            if scale > 1:
                layers.append(nn.ConvTranspose2d(between, between, int(scale), int(scale)))
            elif scale < 1:
                layers.append(nn.Conv2d(between, between, 3, int(1 / scale), padding=1))
            layers.append(nn.Conv2d(between, width, 3, padding=1, bias=False))
            self.reassemble.append(nn.Sequential(*layers))
            self.refine.append(_ResidualUnit(width, *options))
            self.fuse.append(_ResidualUnit(width, *options))
            self.project.append(nn.Conv2d(width, width, 1))
        self.last = conv_norm_act(width, width, 3, *options)
        self.num_features = width

    def decode(self, maps: Sequence[torch.Tensor]) -> torch.Tensor:
        """The refined map, twice as fine as the finest level."""
        levels = [layers(x) for layers, x in zip(self.reassemble, maps, strict=True)]
        sizes = [x.shape[2:] for x in levels[1:]]
        sizes.append(torch.Size([2 * levels[-1].shape[2], 2 * levels[-1].shape[3]]))
        y: torch.Tensor | None = None
        for number, size in enumerate(sizes):
            x = self.refine[number](levels[number])
            y = self.fuse[number](x if y is None else x + y)
            y = self.project[number](resize(y, size))
        return self.last(y)


# what each description builds; here, behind both
LinearHead.module = _LinearDecoder
LeanHead.module = _LeanDecoder
SegformerHead.module = _SegformerDecoder
FPNHead.module = _FPNDecoder
UPerNetHead.module = _UPerNetDecoder
DPTHead.module = _DPTDecoder
