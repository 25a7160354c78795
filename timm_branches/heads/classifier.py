"""Branch classifiers: a head that turns the map at one tap into class logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from timm.layers import SelectAdaptivePool2d
from torch import nn

from timm_branches.arguments import as_items, check_number
from timm_branches.heads.base import Head, register_head
from timm_branches.taps.reader import TapInfo

__all__ = ["BranchClassifier", "FlattenHead", "PoolHead"]


def check_options(hidden: Sequence[int] | None, drop_rate: float | None) -> None:
    """Raise a ValueError for widths below 1 or a rate outside [0, 1)."""
    for width in hidden or ():
        if isinstance(width, bool) or not isinstance(width, int) or width < 1:
            raise ValueError(
                "hidden= takes the widths of the hidden layers, such as (256, 256), got "
                f"{hidden!r}."
            )
    if drop_rate is not None:
        check_number("drop_rate= must be in [0, 1): it", drop_rate, 0, 1, below=True)


@register_head
@dataclass(frozen=True)
class PoolHead(Head):
    """Pool the map to a vector, then hidden layers if any, then Linear. Takes images of any size.

    Args:
        hidden: Widths of hidden layers, each Linear -> ReLU -> BatchNorm -> Dropout. None by
            default.
        pool_type: timm's global pooling: `'avg'`, `'max'`, `'avgmax'`, `'catavgmax'`.
        drop_rate: Dropout behind each hidden layer and before the last Linear; None takes the
            model's, or 0.

    Raises:
        ValueError: A width below 1, a rate outside [0, 1), an unknown pooling.

    Example:
        >>> PoolHead(hidden=(256,)).kind
        'pool'
    """

    kind: ClassVar[str] = "pool"
    hidden: tuple[int, ...] = ()
    pool_type: str = "avg"
    drop_rate: float | None = None

    def __post_init__(self):
        object.__setattr__(self, "hidden", tuple(as_items("hidden=", self.hidden, "(256,)")))
        check_options(self.hidden, self.drop_rate)
        if self.pool_type not in ("avg", "max", "avgmax", "catavgmax"):
            raise ValueError(
                f"pool_type= must be 'avg', 'max', 'avgmax' or 'catavgmax', got {self.pool_type!r}."
            )

    def build(
        self,
        taps: Sequence[TapInfo],
        num_classes: int,
        drop_rate: float | None = None,
        in_chans: int = 3,
    ) -> BranchClassifier:
        """The head for the map at its one tap."""
        (tap,) = taps
        pool = SelectAdaptivePool2d(pool_type=self.pool_type, flatten=True)
        rate = self.drop_rate if self.drop_rate is not None else drop_rate or 0.0
        return BranchClassifier(
            pool,
            tap.channels * pool.feat_mult(),
            self.hidden,
            num_classes,
            rate,
            drop_before_last=not self.hidden,
        )


@register_head
@dataclass(frozen=True)
class FlattenHead(Head):
    """B-CNN's branch: Flatten, then twice (Linear, ReLU, BatchNorm, Dropout 0.5), then Linear.

    It is bound to one image size. At 224 px it has some 300 M parameters more than
    :class:`PoolHead`.

    Args:
        hidden: Widths of the hidden layers. By default two of twice the map's channels, which for
            B-CNN's networks on CIFAR gives the paper's 256, 512 and 1024 (Zhu and Bain 2017, arXiv
            1709.09890, figure 2).
        drop_rate: Dropout behind each hidden layer; None takes the model's, or the paper's 0.5.

    Raises:
        ValueError: A width below 1, a rate outside [0, 1).

    Example:
        >>> FlattenHead(hidden=(4096, 4096)).hidden
        (4096, 4096)
    """

    kind: ClassVar[str] = "flatten"
    hidden: tuple[int, ...] | None = None
    drop_rate: float | None = None

    def __post_init__(self):
        if self.hidden is not None:
            object.__setattr__(self, "hidden", tuple(as_items("hidden=", self.hidden, "(256,)")))
        check_options(self.hidden, self.drop_rate)

    def build(
        self,
        taps: Sequence[TapInfo],
        num_classes: int,
        drop_rate: float | None = None,
        in_chans: int = 3,
    ) -> BranchClassifier:
        """The head for the map at its one tap, whose size fixes the first Linear."""
        (tap,) = taps
        hidden = self.hidden
        if hidden is None:
            hidden = (2 * tap.channels, 2 * tap.channels)
        rate = self.drop_rate
        if rate is None:
            rate = drop_rate
        if rate is None:
            rate = 0.5  # the paper's
        height, width = tap.size
        features = tap.channels * height * width
        return BranchClassifier(FixedFlatten(tap), features, hidden, num_classes, rate)


class FixedFlatten(nn.Flatten):
    """Flatten that refuses a map of another size by name, not with a failing matrix product."""

    def __init__(self, tap: TapInfo):
        super().__init__()
        self.tap_name, self.size = tap.tap.name, tuple(tap.size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, C * H * W)."""
        if x.shape[2:] != self.size:
            raise ValueError(
                f"The 'flatten' head at tap {self.tap_name!r} was made for a map of "
                f"{self.size[0]}x{self.size[1]}, got {x.shape[2]}x{x.shape[3]}: give images of the "
                "size that the model was made for, set img_size=, or pool instead of flattening."
            )
        return super().forward(x)


class BranchClassifier(nn.Module):
    """Map to vector, hidden layers, classifier. Made by :class:`PoolHead` and :class:`FlattenHead`.

    Shapes: (B, C, H, W) -> (B, num_classes); (B, width) when `num_classes` is 0.
    """

    def __init__(
        self,
        to_vector: nn.Module,
        width: int,
        hidden: Sequence[int],
        num_classes: int,
        drop_rate: float,
        drop_before_last: bool = False,
    ):
        super().__init__()
        self.to_vector = to_vector
        layers: list[nn.Module] = []
        for size in hidden:
            linear = nn.Linear(width, size)
            nn.init.xavier_uniform_(linear.weight)  # as Keras initialises the authors' dense layers
            nn.init.zeros_(linear.bias)
            layers += [linear, nn.ReLU(), nn.BatchNorm1d(size), nn.Dropout(drop_rate)]
            width = size
        self.hidden = nn.Sequential(*layers)
        self.drop = nn.Dropout(drop_rate) if drop_before_last else nn.Identity()
        self.num_features = width
        self.fc: nn.Module = nn.Identity()
        self.reset_classifier(num_classes)

    def reset_classifier(self, num_classes: int) -> None:
        """A new last layer for `num_classes` classes; 0 leaves the features."""
        like: torch.Tensor | None = next(self.hidden.parameters(), None)
        if isinstance(self.fc, nn.Linear):
            like = self.fc.weight
        fc = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        if isinstance(fc, nn.Linear):
            nn.init.trunc_normal_(fc.weight, std=0.02)
            nn.init.zeros_(fc.bias)
        self.fc = fc if like is None else fc.to(device=like.device, dtype=like.dtype)
        self.num_classes = num_classes

    def forward(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Logits (B, K) of maps (B, C, H, W); with `pre_logits` what the last layer reads."""
        x = self.drop(self.hidden(self.to_vector(x)))
        return x if pre_logits else self.fc(x)
