"""A small CNN for short clips of small one-channel frames.

Two 5x5 convolutions, each with ReLU and a 2x2 max-pool.

It is LeNet's feature extractor (LeCun et al. 1998) with 20 and 50 channels, as many CNN+LSTM
tutorials use it: frames of 24x48 become maps of 50x3x9, which a temporal head flattens
(`LSTMHead(pool_type='flatten', projection=20)`).
"""

from collections import OrderedDict
from typing import Any

from timm.layers import ClassifierHead
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from timm_branches.backbones.layers import BlockNet

__all__ = ["ClipCNN"]

WIDTHS = (20, 50)


class ClipCNN(BlockNet):
    """Two blocks of 5x5 convolution without padding, ReLU and 2x2 max-pool.

    They are stages 4 and 5 of a branch model.

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
        >>> import torch
        >>> ClipCNN(num_classes=2).forward_features(torch.rand(3, 1, 24, 48)).shape
        torch.Size([3, 50, 3, 9])
    """

    def __init__(
        self,
        num_classes: int = 2,
        in_chans: int = 1,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        blocks, chans = [], in_chans
        for width in WIDTHS:
            blocks.append(
                nn.Sequential(
                    OrderedDict(
                        conv=nn.Conv2d(chans, width, 5, **dd), act=nn.ReLU(), pool=nn.MaxPool2d(2)
                    )
                )
            )
            chans = width
        self.blocks = nn.Sequential(*blocks)
        self.feature_info = [
            {"num_chs": width, "reduction": 2 ** (i + 1), "module": f"blocks.{i}"}
            for i, width in enumerate(WIDTHS)
        ]
        self.num_features = self.head_hidden_size = chans
        self.head = ClassifierHead(
            chans, num_classes, pool_type=global_pool, drop_rate=drop_rate, **dd
        )


default_cfgs = generate_default_cfgs(
    {
        "conv2_24x48.untrained": {
            "url": "",
            "num_classes": 2,
            "input_size": (1, 24, 48),
            "pool_size": (3, 9),
            "crop_pct": 1.0,
            "interpolation": "bilinear",
            "mean": (0.5,),
            "std": (0.5,),
            "first_conv": "blocks.0.conv",
            "classifier": "head.fc",
        },
    }
)


@register_model
def conv2_24x48(pretrained: bool = False, **kwargs: Any) -> ClipCNN:
    """Two convolutions for 24x48x1 frames; the maps of stages 4 and 5 are 20x10x22 and 50x3x9."""
    out_indices = kwargs.pop("out_indices", (0, 1))
    return build_model_with_cfg(
        ClipCNN,
        "conv2_24x48",
        pretrained,
        feature_cfg={"flatten_sequential": True, "out_indices": out_indices},
        **kwargs,
    )
