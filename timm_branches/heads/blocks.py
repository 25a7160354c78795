"""Parts of skip decoders.

Resizing, upsampling, the attention gate, the linear bottleneck, and the two stages.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.layers import create_act_layer, get_norm_act_layer
from torch import nn

from timm_branches.taps.reader import TapInfo

__all__ = [
    "AttentionGate",
    "LinearBottleneck",
    "RedNetStage",
    "UNetStage",
    "Upsample",
    "conv_norm_act",
    "deepest_first",
    "resize",
]


def deepest_first(taps: Sequence[TapInfo]) -> list[int]:
    """The numbers of the taps from the deepest map to the shallowest."""
    by_stage = all(tap.stage for tap in taps)

    def depth(number: int) -> tuple[float, int]:
        stage = taps[number].stage
        if by_stage and stage is not None:
            return taps[number].stride, stage.index
        return taps[number].stride, number

    return sorted(range(len(taps)), reverse=True, key=depth)


def resize(x: torch.Tensor, size: Sequence[int], mode: str = "bilinear") -> torch.Tensor:
    """A map (B, C, h, w) at the size (H, W); itself if it has that size."""
    if x.shape[2] == size[0] and x.shape[3] == size[1]:
        return x
    return F.interpolate(
        x, size=(size[0], size[1]), mode=mode, align_corners=None if mode == "nearest" else False
    )


def norm_act(channels: int, norm: str | None, act: str, inplace: bool = True) -> nn.Module:
    """Timm's norm and activation of these names, or the activation alone."""
    if norm is None:
        return create_act_layer(act, inplace=inplace)
    # timm's 32 groups do not divide every width
    groups = {"num_groups": math.gcd(32, channels)} if norm == "groupnorm" else {}
    return get_norm_act_layer(norm, act)(channels, **groups)


def conv_norm_act(
    in_chs: int, out_chs: int, kernel_size: int, norm: str | None, act: str
) -> nn.Sequential:
    """Convolution that keeps the size, norm, activation.

    The norm's bias stands for the convolution's.
    """
    conv = nn.Conv2d(in_chs, out_chs, kernel_size, padding=kernel_size // 2, bias=norm is None)
    return nn.Sequential(conv, norm_act(out_chs, norm, act))


class Upsample(nn.Module):
    """Brings a map to a given size: (B, C, h, w) -> (B, out_chs, H, W).

    Args:
        in_chs: Channels C.
        out_chs: Channels of the result, where there is a convolution.
        mode: `'nearest'` and `'bilinear'` interpolate; `'transposed'` (Zeiler et al. 2010)
            and `'shuffle'` (sub-pixel convolution, Shi et al. 2016, arXiv 1609.05158) learn to
            double, and interpolate what is left to an odd size.
        double: Whether the map is to be about doubled; if not, it is only resized.
        with_conv: Whether this is all that a stage does: it then convolves with overlapping kernels
            (3x3, and 4x4 for `'transposed'`) in every mode. Else only as the mode needs, and
            convolutions follow.

    Attributes:
        out_chs: Channels of the result, `in_chs` where there is no convolution.
    """

    def __init__(self, in_chs: int, out_chs: int, mode: str, double: bool, with_conv: bool):
        super().__init__()
        self.learned = double and mode in ("transposed", "shuffle")
        self.mode = "nearest" if mode == "nearest" else "bilinear"
        self.out_chs = out_chs if self.learned or with_conv else in_chs
        self.conv: nn.Module = nn.Identity()
        if self.learned and mode == "transposed":
            self.conv = (
                nn.ConvTranspose2d(in_chs, out_chs, 4, 2, 1)
                if with_conv
                else nn.ConvTranspose2d(in_chs, out_chs, 2, 2)
            )
        elif self.learned:
            kernel = 3 if with_conv else 1
            self.conv = nn.Sequential(
                nn.Conv2d(in_chs, 4 * out_chs, kernel, padding=kernel // 2), nn.PixelShuffle(2)
            )
        elif with_conv:
            self.conv = nn.Conv2d(in_chs, out_chs, 3, padding=1)

    def forward(self, x: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
        """(B, C, h, w) -> (B, out_chs, H, W) for the size (H, W)."""
        if self.learned:
            return resize(self.conv(x), size, self.mode)
        return self.conv(resize(x, size, self.mode))


class AttentionGate(nn.Module):
    """Weighs each pixel of a skip by how it fits the decoder's map.

    (B, S, H, W), (B, G, H, W) -> (B, S, H, W).

    `skip * sigmoid(psi(relu(W_x skip + W_g gate)))`, additive attention of Oktay et al. 2018
    (arXiv 1804.03999), equations 1 and 2, computed at the size of the skip.
    """

    def __init__(self, skip_chs: int, gate_chs: int):
        super().__init__()
        width = max(1, skip_chs // 2)
        self.skip = nn.Conv2d(skip_chs, width, 1, bias=False)
        self.gate = nn.Conv2d(gate_chs, width, 1)
        self.psi = nn.Conv2d(width, 1, 1)

    def forward(self, skip: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        """The skip (B, S, H, W), weighed pixel by pixel."""
        return skip * torch.sigmoid(
            self.psi(F.relu(self.skip(skip) + self.gate(gate), inplace=True))
        )


class LinearBottleneck(nn.Module):
    """Flatten, Linear to the code, Linear back, unflatten.

    (B, C, H, W) -> (B, C, H, W), for one size H x W.
    """

    def __init__(self, tap: TapInfo, code_size: int):
        super().__init__()
        self.tap_name, self.shape = tap.tap.name, (tap.channels, *tap.size)
        self.encode = nn.Linear(math.prod(self.shape), code_size)
        self.decode = nn.Linear(code_size, math.prod(self.shape))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> the same shape, through the code."""
        if x.shape[1:] != self.shape:
            raise ValueError(
                f"the decoder's bottleneck at tap {self.tap_name!r} was made for a map of "
                f"{self.shape[1]}x{self.shape[2]}, got {x.shape[2]}x{x.shape[3]}: give images of "
                "the size that the model was made for, set img_size=, or leave out bottleneck=."
            )
        return self.decode(self.encode(x.flatten(1))).unflatten(1, self.shape)


class UNetStage(nn.Module):
    """Upsample, concatenate the skip, twice (3x3 convolution, norm, activation).

    As U-Net does (arXiv 1505.04597).
    """

    def __init__(
        self,
        in_chs: int,
        skip_chs: int,
        out_chs: int,
        upsample: str,
        double: bool,
        norm: str | None,
        act: str,
        attention: bool,
    ):
        super().__init__()
        self.up = Upsample(in_chs, out_chs, upsample, double, with_conv=False)
        self.gate = AttentionGate(skip_chs, self.up.out_chs) if attention and skip_chs else None
        self.conv1 = conv_norm_act(self.up.out_chs + skip_chs, out_chs, 3, norm, act)
        self.conv2 = conv_norm_act(out_chs, out_chs, 3, norm, act)

    def forward(
        self, x: torch.Tensor, skip: torch.Tensor | None, size: Sequence[int]
    ) -> torch.Tensor:
        """A map (B, C, h, w) and its skip, if any -> (B, out_chs, H, W)."""
        x = self.up(x, size)
        if skip is not None:
            skip = skip if self.gate is None else self.gate(skip, x)
            x = torch.cat([x, skip], 1)
        return self.conv2(self.conv1(x))


class RedNetStage(nn.Module):
    """Upsample with a convolution, add the skip, norm, activation.

    As RED-Net does (arXiv 1603.09056).

    The skip passes a 1x1 convolution only where its channels differ from the stage's.
    """

    def __init__(
        self,
        in_chs: int,
        skip_chs: int,
        out_chs: int,
        upsample: str,
        double: bool,
        norm: str | None,
        act: str,
        attention: bool,
    ):
        super().__init__()
        self.up = Upsample(in_chs, out_chs, upsample, double, with_conv=True)
        self.gate = AttentionGate(skip_chs, out_chs) if attention and skip_chs else None
        self.project = (
            nn.Conv2d(skip_chs, out_chs, 1) if skip_chs not in (0, out_chs) else nn.Identity()
        )
        self.norm_act = norm_act(out_chs, norm, act)

    def forward(
        self, x: torch.Tensor, skip: torch.Tensor | None, size: Sequence[int]
    ) -> torch.Tensor:
        """A map (B, C, h, w) and its skip, if any -> (B, out_chs, H, W)."""
        x = self.up(x, size)
        if skip is not None:
            skip = skip if self.gate is None else self.gate(skip, x)
            x = x + self.project(skip)
        return self.norm_act(x)
