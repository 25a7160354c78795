"""Skip decoders: heads that read several maps and answer for every pixel.

U-Net concatenates, RED-Net adds.

The decoder starts from the deepest map and about doubles it, stage by stage, until it has the size
of the image. Each further map enters as a skip at the stage that reaches its size. All sizes are
read off the tensors, so that odd ones fit as well.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from timm.layers import create_act_layer, get_act_layer
from torch import nn

from timm_branches.arguments import as_items, check_flag, check_number
from timm_branches.heads.base import Head, register_head
from timm_branches.heads.blocks import (
    LinearBottleneck,
    RedNetStage,
    UNetStage,
    Upsample,
    conv_norm_act,
    deepest_first,
    resize,
)
from timm_branches.taps.reader import TapInfo

__all__ = ["RedNetHead", "SkipDecoder", "UNetHead"]

_UPSAMPLE = ("nearest", "bilinear", "transposed", "shuffle")
_NORMS = ("batchnorm2d", "groupnorm", "groupnorm1", "layernorm2d", "rmsnorm2d")


@register_head
@dataclass(frozen=True)
class UNetHead(Head):
    """A decoder that concatenates its skips, U-Net (Ronneberger et al. 2015, arXiv 1505.04597).

    Takes any taps in any order, and images of any size that the backbone takes. Where all maps have
    one stride (a ViT) the deepest stays as it is and each shallower one is projected and enlarged
    twofold more, which makes a pyramid.

    Args:
        channels: Width of each decoder stage from the deepest on. By default 16 times the stage's
            stride, at most 256: (256, 128, 64, 32, 16) at strides 16, 8, 4, 2 and 1.
        norm: timm's name of the norm: `'batchnorm2d'`, `'groupnorm'`, `'groupnorm1'`,
            `'layernorm2d'`, `'rmsnorm2d'`; None for none.
        act: timm's name of the activation.
        upsample: `'nearest'`, `'bilinear'`, `'transposed'` or `'shuffle'`.
        attention: Put an attention gate on each skip (Oktay et al. 2018).
        input_skip: One more skip, at stride 1: a 3x3 convolution of the image. Without it a
            backbone whose first map has stride 4 has lost the fine detail.
        bottleneck: Size of a linear bottleneck at the deepest map, which binds the head to one
            image size.
        residual: Output is the image plus the prediction, for restoration; needs as many classes as
            channels.
        out_act: timm's names of activations applied to the prediction one after the other, such as
            `'sigmoid'`.
        deep_supervision: In training also answer from each stage before the last (Lee et al. 2014,
            arXiv 1409.5185).
        drop_rate: Dropout of channels before the last layer; None takes the model's, or 0.

    Raises:
        ValueError: An unknown norm, activation or upsampling, a width below 1, a rate outside [0,
            1).

    Example:
        >>> UNetHead(channels=[64, 32], act='gelu').channels
        (64, 32)
    """

    kind: ClassVar[str] = "unet"
    multi_tap: ClassVar[bool] = True
    dense: ClassVar[bool] = True
    additive: ClassVar[bool] = False

    channels: tuple[int, ...] | None = None
    norm: str | None = "batchnorm2d"
    act: str = "relu"
    upsample: str = "nearest"
    attention: bool = False
    input_skip: bool = False
    bottleneck: int | None = None
    residual: bool = False
    out_act: tuple[str, ...] = ()
    deep_supervision: bool = False
    drop_rate: float | None = None

    def __post_init__(self):
        out_act = self.out_act
        if isinstance(out_act, str):
            out_act = (out_act,)
        out_act = tuple(as_items("out_act=", out_act, "('relu', 'sigmoid')"))
        object.__setattr__(self, "out_act", out_act)
        if self.channels is not None:
            channels = tuple(as_items("channels=", self.channels, "(64, 32)"))
            object.__setattr__(self, "channels", channels)
            if not channels or not all(map(_is_count, channels)):
                raise ValueError(
                    f"channels= takes the widths of the decoder stages, such as (64, 32), got "
                    f"{self.channels!r}."
                )
        if self.bottleneck is not None and not _is_count(self.bottleneck):
            raise ValueError(
                "bottleneck= takes the size of the code, a whole number from 1, got "
                f"{self.bottleneck!r}."
            )
        check_norm_act(self.norm, self.act)
        _check_choice("upsample=", self.upsample, _UPSAMPLE)
        for name in out_act:
            _check_activation("out_act=", name)
        if self.drop_rate is not None:
            check_number("drop_rate= must be in [0, 1): it", self.drop_rate, 0, 1, below=True)
        for name in ("attention", "input_skip", "residual", "deep_supervision"):
            check_flag(f"{name}=", getattr(self, name))

    def build(
        self,
        taps: Sequence[TapInfo],
        num_classes: int,
        drop_rate: float | None = None,
        in_chans: int = 3,
    ) -> SkipDecoder:
        """The decoder for the maps at its taps and images of `in_chans` channels."""
        rate = self.drop_rate if self.drop_rate is not None else drop_rate or 0.0
        return SkipDecoder(self, taps, num_classes, rate, in_chans)


@register_head
@dataclass(frozen=True)
class RedNetHead(UNetHead):
    """A decoder that adds its skips, RED-Net (Mao et al. 2016, arXiv 1603.09056).

    A stage is one convolution that upsamples, the sum with the skip, and the activation. A skip is
    projected by a 1x1 convolution only where its channels are not the stage's. The last upsampling
    gives the output, unless a skip at stride 1 calls for a stage of its own. Differs from
    :class:`UNetHead` in two defaults, both those of the paper.

    Args:
        channels: As in :class:`UNetHead`, but by default a stage with a skip has the skip's
            channels (at most 256), and the last upsampling, whose width is the number of classes,
            does not count.
        norm: None by default.
        upsample: `'transposed'` by default.

    Raises:
        ValueError: As :class:`UNetHead`.

    Example:
        >>> RedNetHead(residual=True).upsample
        'transposed'
    """

    kind: ClassVar[str] = "rednet"
    additive: ClassVar[bool] = True

    norm: str | None = None
    upsample: str = "transposed"


class _Step(NamedTuple):
    """One stage.

    `halvings` doublings before the size of skip number `target` (of the image, if None).
    """

    stride: float
    skip: int | None  # which skip enters here
    target: int | None
    halvings: int
    double: bool


def _plan(strides: Sequence[float], input_skip: bool) -> list[_Step]:
    """Stages from the deepest map (the first stride) through the skips to the image's size."""
    # where a run of stages ends: its stride, the skip that enters there, the skip whose size it has
    ends: list[tuple[float, int | None, int | None]] = []
    for number, stride in enumerate(strides[1:]):
        ends.append((stride, number, number))
    if input_skip:
        ends.append((1, len(ends), None))
    elif strides[-1] > 1:
        ends.append((1, None, None))
    steps = []
    stride = strides[0]
    for end, skip, target in ends:
        doublings = round(math.log2(stride / end))
        # the first of several has the most halvings before it; the skip enters at the last
        for halvings in reversed(range(max(1, doublings))):
            entering = skip if halvings == 0 else None
            steps.append(_Step(end * 2**halvings, entering, target, halvings, doublings > 0))
        stride = end
    return steps


def _widths(spec: UNetHead, steps: Sequence[_Step], skip_chs: Sequence[int]) -> list[int]:
    """Channels of each stage: those asked for, or 16 times the stride, at most 256.

    A stage that adds a skip has the skip's own.
    """
    if spec.channels is not None:
        if len(spec.channels) != len(steps):
            strides = ", ".join(f"{step.stride:g}" for step in steps)
            raise ValueError(
                f"channels= takes one width per decoder stage, here {len(steps)} (at strides "
                f"{strides}), got {spec.channels!r}."
            )
        return list(spec.channels)
    widths = []
    for step in steps:
        width = max(1, int(16 * step.stride))
        if spec.additive and step.skip is not None and step.skip < len(skip_chs):
            width = skip_chs[step.skip]
        widths.append(min(256, width))
    return widths


class SkipDecoder(nn.Module):
    """Decoder with skips. Made by :class:`UNetHead` and :class:`RedNetHead`.

    Args:
        spec: Its options.
        taps: The maps it reads, in the order in which it is given them. Maps of one stride count as
            deeper the later their stage, or, if one of all the taps is a module path, the later
            they are given.
        num_classes: Channels of the output; 0 gives the last stage's map.
        drop_rate: Dropout of channels before the last layer.
        in_chans: Channels of the image.

    Shapes: maps (B, C_i, H_i, W_i) and image (B, in_chans, H, W) -> (B, num_classes, H, W). In
    training with deep supervision `{'main': ..., 'aux1': ..., ...}`, all of that shape, 'aux1' from
    the deepest stage.

    Raises:
        ValueError: `channels` of another number than there are stages, `residual` without as
            many classes as channels, options that have no effect on these taps; maps that do not
            fit the bottleneck.
    """

    def __init__(
        self,
        spec: UNetHead,
        taps: Sequence[TapInfo],
        num_classes: int,
        drop_rate: float = 0.0,
        in_chans: int = 3,
    ):
        super().__init__()
        self.residual = spec.residual
        self.deep_supervision = spec.deep_supervision
        self.in_chans = in_chans
        self.upsample = spec.upsample
        self.order = deepest_first(taps)
        deepest, *skips = (taps[i] for i in self.order)
        strides: list[float] = [tap.stride for tap in (deepest, *skips)]
        # maps of one stride, as a ViT's: each shallower one is enlarged twofold more
        enlarge = len(skips) > 0 and strides[0] == strides[-1] > 1
        if enlarge:
            strides = [max(1, stride / 2**i) for i, stride in enumerate(strides)]
        self.steps = _plan(strides, spec.input_skip)
        # RED-Net's last deconvolution gives the output
        self.last: _Step | None = None
        if spec.additive and self.steps and self.steps[-1].skip is None:
            self.last = self.steps.pop()

        skip_chs = [tap.channels for tap in skips]
        widths = _widths(spec, self.steps, [] if enlarge else skip_chs)
        self.lateral = nn.ModuleList()
        if enlarge:
            by_skip = {step.skip: width for step, width in zip(self.steps, widths, strict=True)}
            for number, chs in enumerate(skip_chs):
                self.lateral.append(conv_norm_act(chs, by_skip[number], 1, spec.norm, spec.act))
            skip_chs = [by_skip[number] for number in range(len(skips))]
        self.stem: nn.Module | None = None
        if spec.input_skip:
            self.stem = conv_norm_act(in_chans, widths[-1], 3, spec.norm, spec.act)
            skip_chs.append(widths[-1])
        self._refuse_without_effect(spec, skip_chs)

        self.bottleneck: nn.Module | None = None
        if spec.bottleneck is not None:
            self.bottleneck = LinearBottleneck(deepest, spec.bottleneck)
        self.stages = self._make_stages(spec, deepest.channels, skip_chs, widths)
        self._init_weights()
        self.drop = nn.Dropout2d(drop_rate)
        self.num_features = widths[-1] if widths else deepest.channels
        self.aux_chs = widths[:-1]
        self.out_act = nn.Sequential(*(create_act_layer(name) for name in spec.out_act))
        self.fc: nn.Module = nn.Identity()
        self.aux = nn.ModuleDict()
        self.reset_classifier(num_classes)

    def _make_stages(
        self, spec: UNetHead, chs: int, skip_chs: Sequence[int], widths: Sequence[int]
    ) -> nn.ModuleList:
        """The decoder's stages, from the map with `chs` channels on."""
        stage = RedNetStage if spec.additive else UNetStage
        stages = nn.ModuleList()
        for step, width in zip(self.steps, widths, strict=True):
            entering = 0 if step.skip is None else skip_chs[step.skip]
            stages.append(
                stage(
                    chs,
                    entering,
                    width,
                    spec.upsample,
                    step.double,
                    spec.norm,
                    spec.act,
                    spec.attention,
                )
            )
            chs = width
        return stages

    def _init_weights(self) -> None:
        for part in (self.lateral, self.stem, self.stages):
            if part is None:
                continue
            for module in part.modules():
                if not isinstance(module, nn.Conv2d):
                    continue
                # by what goes in: a map and its skip are concatenated
                nn.init.kaiming_uniform_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def _refuse_without_effect(self, spec: UNetHead, skip_chs: Sequence[int]) -> None:
        if spec.attention and not skip_chs:
            raise ValueError(
                "attention= has no effect on a decoder without skips: give several taps, or "
                "input_skip=."
            )
        if spec.deep_supervision and len(self.steps) < 2:
            raise ValueError(
                "deep_supervision= has no effect on a decoder of fewer than two stages: tap deeper."
            )

    def reset_classifier(self, num_classes: int) -> None:
        """New last layers for `num_classes` channels of output; 0 leaves the last stage's map."""
        if self.residual and num_classes != self.in_chans:
            raise ValueError(
                "residual=True adds the prediction to the image: num_classes must be its "
                f"{self.in_chans} channels, got {num_classes}."
            )
        like: torch.Tensor | None = next(self.parameters(), None)
        fc: nn.Module = nn.Identity()
        aux: dict[str, nn.Module] = {}
        if num_classes and self.last is not None:
            fc = Upsample(
                self.num_features, num_classes, self.upsample, self.last.double, with_conv=True
            )
        elif num_classes:
            fc = nn.Conv2d(self.num_features, num_classes, 3, padding=1)
        if num_classes and self.deep_supervision:
            for number, chs in enumerate(self.aux_chs, start=1):
                aux[f"aux{number}"] = nn.Conv2d(chs, num_classes, 1)
        self.fc, self.aux = fc, nn.ModuleDict(aux)
        for layer in (self.fc, self.aux):
            for m in layer.modules():
                if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d)):
                    self._init_output(m)
        if like is not None:
            self.fc.to(device=like.device, dtype=like.dtype)
            self.aux.to(device=like.device, dtype=like.dtype)
        self.num_classes = num_classes

    def _init_output(self, conv: nn.Conv2d | nn.ConvTranspose2d) -> None:
        """A residual decoder starts as almost the identity.

        Its first answer is the image, not noise upon it.
        """
        if self.residual:
            nn.init.normal_(conv.weight, std=0.01)
        else:
            nn.init.xavier_uniform_(conv.weight)
        if conv.bias is not None:
            nn.init.zeros_(conv.bias)

    def forward(
        self, *maps: torch.Tensor, image: torch.Tensor
    ) -> torch.Tensor | dict[str, torch.Tensor]:
        """Maps of the taps and the image -> (B, num_classes, H, W), see the class."""
        height, width = image.shape[2:]
        x = maps[self.order[0]]
        skips = [maps[number] for number in self.order[1:]]
        if len(self.lateral):
            skips = self._enlarge(skips, x.shape[2:], (height, width))
        if self.stem is not None:
            skips.append(self.stem(image))
        if self.bottleneck is not None:
            x = self.bottleneck(x)
        outputs = []
        for step, stage in zip(self.steps, self.stages, strict=True):
            h, w = height, width
            if step.target is not None:
                h, w = skips[step.target].shape[2:]
            # halved, rounded up
            size = (-(-h // 2**step.halvings), -(-w // 2**step.halvings))
            skip = None if step.skip is None else skips[step.skip]
            x = stage(x, skip, size)  # (B, width of the stage, *size)
            outputs.append(x)
        x = self.drop(x)
        if isinstance(self.fc, Upsample):
            x = self.fc(x, (height, width))
        else:
            x = self.fc(x)
        if not (self.training and len(self.aux)):
            return self._finish(x, image)
        answers = {"main": self._finish(x, image)}
        for (name, conv), y in zip(self.aux.items(), outputs, strict=False):
            answers[name] = self._finish(conv(y), image)
        return answers

    def _enlarge(
        self, skips: Sequence[torch.Tensor], size: Sequence[int], image_size: Sequence[int]
    ) -> list[torch.Tensor]:
        """Maps of one size as a pyramid: each one twice as large as the one before it."""
        enlarged = []
        h, w = size
        for conv, y in zip(self.lateral, skips, strict=True):
            h, w = 2 * h, 2 * w
            y = conv(y)
            enlarged.append(resize(y, (min(h, image_size[0]), min(w, image_size[1]))))
        return enlarged

    def _finish(self, x: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        """The answer at the size of the image."""
        x = self.out_act(resize(x, image.shape[2:]))
        return image + x if self.residual else x


def check_norm_act(norm: object, act: object) -> None:
    """Refuse what is no norm or activation that a decoder takes.

    Raises:
        ValueError: An unknown name.
    """
    if norm is not None:
        _check_choice("norm=", norm, _NORMS, "None or ")
    _check_activation("act=", act)


def _check_choice(name: str, value: object, choices: Sequence[str], first: str = "") -> None:
    if value not in choices:
        raise ValueError(
            f"{name} must be {first}one of {', '.join(map(repr, choices))}, got {value!r}."
        )


def _check_activation(name: str, value: object) -> None:
    try:
        known = isinstance(value, str) and get_act_layer(value) is not None
    except KeyError:
        known = False
    if not known:
        raise ValueError(
            f"{name} takes timm's names of activations, such as 'relu', 'leaky_relu', 'gelu', "
            f"'silu' or 'sigmoid', got {value!r}."
        )


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= 65_536
