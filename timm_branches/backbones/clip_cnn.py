"""A small CNN for short clips of small one-channel frames: two 5x5 convolutions, each with ReLU and a 2x2 max-pool.

It is LeNet's feature extractor (LeCun et al. 1998) with 20 and 50 channels, as many CNN+LSTM tutorials use it: frames
of 24x48 become maps of 50x3x9, which a temporal head flattens (``LSTMHead(pool_type='flatten', projection=20)``).
"""

from collections import OrderedDict
from typing import Any

import torch
from timm.layers import ClassifierHead, get_device_dtype
from timm.models import build_model_with_cfg, checkpoint, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import nn

__all__ = ["ClipCNN"]

WIDTHS = (20, 50)


class ClipCNN(nn.Module):
    """Two blocks of 5x5 convolution without padding, ReLU and 2x2 max-pool; stages 4 and 5 of a branch model.

    Args:
        num_classes: Outputs; 0 for features without a classifier.
        in_chans: Channels of the frames.
        global_pool: timm's pooling before the classifier, '' for bare maps.
        drop_rate: Dropout before the classifier.
        device: Where the parameters are made.
        dtype: Of the parameters.

    Shape:
        - Input: (B, in_chans, H, W), H and W of 16 or more.
        - Output: (B, num_classes)

    Example:
        >>> ClipCNN(num_classes=2).forward_features(torch.rand(3, 1, 24, 48)).shape
        torch.Size([3, 50, 3, 9])
    """

    def __init__(self, num_classes: int = 2, in_chans: int = 1, global_pool: str = "avg", drop_rate: float = 0.0,
                 device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.grad_checkpointing = False
        blocks, chans = [], in_chans
        for width in WIDTHS:
            blocks.append(nn.Sequential(OrderedDict(
                conv=nn.Conv2d(chans, width, 5, **dd), act=nn.ReLU(), pool=nn.MaxPool2d(2))))
            chans = width
        self.blocks = nn.Sequential(*blocks)
        self.feature_info = [{"num_chs": width, "reduction": 2 ** (i + 1), "module": f"blocks.{i}"}
                             for i, width in enumerate(WIDTHS)]
        self.num_features = self.head_hidden_size = chans
        self.head = ClassifierHead(chans, num_classes, pool_type=global_pool, drop_rate=drop_rate, **dd)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layer groups for layer decay: a block each."""
        return {"stem": r"^blocks\.0", "blocks": r"^blocks\.(\d+)"}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the blocks' outputs for the backward pass and compute the rest again."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The last Linear, or Identity without classes."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Give the classifier other outputs, and another pooling unless ``global_pool`` is None."""
        self.num_classes = num_classes
        pool = self.head.global_pool.pool_type if global_pool is None else global_pool
        # the pruned head has no parameters that tell the device, the blocks always have
        self.head = ClassifierHead(self.num_features, num_classes, pool_type=pool, drop_rate=self.drop_rate,
                                   **get_device_dtype(self))

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[torch.Tensor] | tuple[torch.Tensor, list[torch.Tensor]]:
        """Maps of the blocks, each after its pool.

        Args:
            x: Frames (B, C, H, W).
            indices: The last n blocks if int, all if None, else the blocks named by index.
            norm: Nothing here (there is no norm), part of timm's signature.
            stop_early: Do not compute blocks deeper than the last one asked for.
            output_fmt: Only 'NCHW'.
            intermediates_only: Leave out the final features.

        Returns:
            (last map, list of maps), or the list alone if ``intermediates_only``.

        Raises:
            ValueError: ``output_fmt`` is not 'NCHW'.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be 'NCHW', got {output_fmt!r}.")
        take, deepest = feature_take_indices(len(self.feature_info), indices)
        intermediates = []
        for index, block in enumerate(self.blocks[:deepest + 1] if stop_early else self.blocks):
            x = checkpoint(block, x) if self.grad_checkpointing and torch.is_grad_enabled() else block(x)
            if index in take:
                intermediates.append(x)
        return intermediates if intermediates_only else (x, intermediates)

    def prune_intermediate_layers(self, indices: int | list[int] = 1, prune_norm: bool = False,
                                  prune_head: bool = True) -> list[int]:
        """Drop the blocks behind the deepest one asked for, and the classifier; returns the kept features' indices."""
        take, deepest = feature_take_indices(len(self.feature_info), indices)
        shortened = deepest + 1 < len(self.blocks)
        self.blocks = self.blocks[:deepest + 1]
        self.num_features = self.head_hidden_size = self.feature_info[deepest]["num_chs"]
        if prune_head or shortened:
            self.reset_classifier(0, "")
        return take

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> the last block's map."""
        return self.forward_intermediates(x, indices=[len(self.blocks) - 1])[0]

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """The last block's map -> (B, num_classes), or what goes into the last Linear if ``pre_logits``."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, num_classes)."""
        return self.forward_head(self.forward_features(x))


default_cfgs = generate_default_cfgs({
    "conv2_24x48.untrained": {
        "url": "", "num_classes": 2, "input_size": (1, 24, 48), "pool_size": (3, 9), "crop_pct": 1.0,
        "interpolation": "bilinear", "mean": (0.5,), "std": (0.5,), "first_conv": "blocks.0.conv",
        "classifier": "head.fc"},
})


@register_model
def conv2_24x48(pretrained: bool = False, **kwargs: Any) -> ClipCNN:
    """Two convolutions for 24x48x1 frames; the maps of stages 4 and 5 are 20x10x22 and 50x3x9."""
    out_indices = kwargs.pop("out_indices", (0, 1))
    return build_model_with_cfg(ClipCNN, "conv2_24x48", pretrained,
                                feature_cfg={"flatten_sequential": True, "out_indices": out_indices}, **kwargs)
