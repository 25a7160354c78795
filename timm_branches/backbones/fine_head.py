"""Classifier of the B-CNN backbones and the Keras defaults it shares with their blocks.

Source: the fine head in https://github.com/zhuxinqimac/B-CNN, facts only.
"""

from collections import OrderedDict

import torch
from timm.layers import SelectAdaptivePool2d
from timm.models import register_notrace_module
from torch import nn

__all__ = ["KERAS_EPS", "KERAS_MOMENTUM", "FlattenMlpHead", "init_keras"]

KERAS_EPS = 1e-3
KERAS_MOMENTUM = 0.01  # Keras' momentum .99 is the share that stays, torch's the share that changes


@register_notrace_module  # the check of the map's size is control flow, which fx cannot trace
class FlattenMlpHead(nn.Module):
    """Fine head of B-CNN: flatten, twice (Linear, ReLU, BatchNorm, Dropout), Linear.

    (B, C, H, W) -> (B, classes).

    Made without classes it has no hidden layers either, only the pooling: a feature extractor
    should not carry 25 million parameters that nothing trains. One whose classes are taken away
    (:meth:`reset`) keeps them, because they are trained and their output is what timm calls
    `pre_logits`.

    Args:
        in_features: Channels C of the map.
        num_classes: Outputs; 0 leaves pooled features (B, C), or the map itself where `pool_type`
            is ''.
        hidden_size: Width of both hidden layers.
        map_size: Height and width of the map, which 'flatten' has to know.
        pool_type: 'flatten' as in the paper, or a pooling of timm ('avg', 'max', ...) that takes
            any image size. Where there are no classes 'flatten' means 'avg'.
        drop_rate: Dropout of both hidden layers.
        device: Where the parameters are made.
        dtype: Of the parameters.

    Raises:
        ValueError: `num_classes` is negative, or is not 0 without any pooling.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        hidden_size: int,
        map_size: tuple[int, int] = (1, 1),
        pool_type: str = "flatten",
        drop_rate: float = 0.5,
        device=None,
        dtype=None,
    ):
        super().__init__()
        if num_classes < 0:
            raise ValueError(f"num_classes must be 0 (no classifier) or more, got {num_classes}.")
        if num_classes and not pool_type:
            raise ValueError(
                "global_pool='' leaves a map, which cannot be classified into "
                f"num_classes={num_classes}. "
                "Choose 'flatten' or 'avg', or num_classes=0."
            )
        dd = {"device": device, "dtype": dtype}
        self.in_features = in_features
        self.hidden_size = hidden_size
        self.map_size = map_size
        self.pool_type = pool_type
        self.drop_rate = drop_rate
        self.flatten = pool_type == "flatten" and num_classes > 0
        pool = "avg" if pool_type == "flatten" else pool_type
        if self.flatten:
            self.global_pool: nn.Module = nn.Flatten(1)
            self.in_width = in_features * map_size[0] * map_size[1]
        else:
            adaptive = SelectAdaptivePool2d(pool_type=pool, flatten=bool(pool))
            self.global_pool = adaptive
            self.in_width = in_features * adaptive.feat_mult()
        width = self.in_width
        self.hidden: nn.Module = nn.Identity()
        if num_classes:
            self.hidden = nn.Sequential(
                OrderedDict(
                    fc1=nn.Linear(width, hidden_size, **dd),
                    act1=nn.ReLU(),
                    norm1=nn.BatchNorm1d(hidden_size, KERAS_EPS, KERAS_MOMENTUM, **dd),
                    drop1=nn.Dropout(drop_rate),
                    fc2=nn.Linear(hidden_size, hidden_size, **dd),
                    act2=nn.ReLU(),
                    norm2=nn.BatchNorm1d(hidden_size, KERAS_EPS, KERAS_MOMENTUM, **dd),
                    drop2=nn.Dropout(drop_rate),
                )
            )
            width = hidden_size
        self.num_features = width
        self.fc: nn.Module = nn.Linear(width, num_classes, **dd) if num_classes else nn.Identity()

    def reset(
        self, num_classes: int, pool_type: str | None = None, device=None, dtype=None
    ) -> "FlattenMlpHead":
        """A head with other outputs and pooling.

        Hidden layers that still fit are kept with their weights; without classes they are the
        output, unless the pooling changes.
        """
        if num_classes == 0 and pool_type in (None, self.pool_type):
            self.fc = nn.Identity()
            return self
        head = FlattenMlpHead(
            self.in_features,
            num_classes,
            self.hidden_size,
            self.map_size,
            self.pool_type if pool_type is None else pool_type,
            self.drop_rate,
            device,
            dtype,
        )
        init_keras(head)
        if (
            num_classes
            and isinstance(self.hidden, nn.Sequential)
            and head.in_width == self.in_width
        ):
            head.hidden = self.hidden
        return head.train(self.training)

    def forward(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """(B, C, H, W) -> (B, classes), or what goes into the last Linear if `pre_logits`."""
        if self.flatten and (x.shape[2] != self.map_size[0] or x.shape[3] != self.map_size[1]):
            raise ValueError(
                f"The classifier flattens maps of {self.map_size[0]}x{self.map_size[1]}, got "
                f"{x.shape[2]}x{x.shape[3]}: make the model with img_size of your images, or with "
                "global_pool='avg' for any size."
            )
        x = self.hidden(self.global_pool(x))
        return x if pre_logits else self.fc(x)


def init_keras(module: nn.Module) -> None:
    """Keras' default initialisation of every convolution and Linear.

    Glorot-uniform weights, zero biases.
    """
    for m in module.modules():
        if isinstance(m, nn.Conv2d | nn.Linear):
            nn.init.xavier_uniform_(m.weight)
            if m.bias is not None:
                nn.init.zeros_(m.bias)
