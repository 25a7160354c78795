"""A small strided RED-Net encoder, as a timm model.

Three 3x3 convolutions of stride 2, each followed by LeakyReLU.

RED-Net (Mao et al. 2016, arXiv 1603.09056) keeps the size of the image; small autoencoders after it
halve the image at each convolution and end in a linear bottleneck. This is the encoder of such a
one. Its widths are 16, 32 and 64, so that a 512 px image becomes a map of 64x64x64, from which one
linear layer makes the code and another the map again.

Stages 3, 4 and 5 are the three convolutions with their activations, at strides 2, 4 and 8. The
whole autoencoder:

Example:
    >>> import torch
    >>> from timm_branches import create_branch_model
    >>> from timm_branches.heads import RedNetHead
    >>> head = RedNetHead(bottleneck=128, act='leaky_relu', out_act=('leaky_relu', 'sigmoid'))
    >>> model = create_branch_model(
    ...     'rednet_small', taps=[3, 4, 5], head=head, num_classes=3, img_size=64)
    >>> model(torch.rand(2, 3, 64, 64))['rednet'].shape
    torch.Size([2, 3, 64, 64])
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from timm.layers import ClassifierHead
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from timm_branches.backbones.layers import BlockNet

__all__ = ["RedNetEncoder", "rednet_small"]


class RedNetEncoder(BlockNet):
    """Strided convolutions, each with LeakyReLU (slope 0.01).

    Where there are classes, pooling and a Linear follow.

    Args:
        widths: Channels of each convolution.
        num_classes: Outputs; 0 for pooled features.
        in_chans: Channels of the image.
        global_pool: timm's pooling of the classifier; '' for bare maps.
        drop_rate: Dropout before the classifier.
        device: Where the parameters are made.
        dtype: Of the parameters.

    Shape:
        - Input: (B, in_chans, H, W)
        - Output: (B, num_classes)

    Example:
        >>> import torch
        >>> model = RedNetEncoder([8, 16], num_classes=5)
        >>> x = torch.rand(1, 3, 33, 17)
        >>> maps = model.forward_intermediates(x, intermediates_only=True)
        >>> [tuple(y.shape) for y in maps]
        [(1, 8, 17, 9), (1, 16, 9, 5)]
    """

    def __init__(
        self,
        widths: Sequence[int] = (16, 32, 64),
        num_classes: int = 0,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_classes, self.in_chans, self.drop_rate = num_classes, in_chans, drop_rate
        self.feature_info = [
            {"num_chs": width, "reduction": 2**i, "module": f"blocks.{i - 1}"}
            for i, width in enumerate(widths, start=1)
        ]
        self.blocks = nn.Sequential(
            *(
                nn.Sequential(
                    OrderedDict(
                        conv=nn.Conv2d(chs, width, 3, stride=2, padding=1, **dd), act=nn.LeakyReLU()
                    )
                )
                for chs, width in zip((in_chans, *widths), widths, strict=False)
            )
        )
        self.num_features = self.head_hidden_size = widths[-1]
        self.head = ClassifierHead(self.num_features, num_classes, global_pool, drop_rate, **dd)


default_cfgs = generate_default_cfgs(
    {
        "rednet_small.untrained": {
            "url": "",
            "num_classes": 0,
            "input_size": (3, 512, 512),
            "pool_size": (64, 64),
            "crop_pct": 1.0,
            "interpolation": "bilinear",
            "mean": (0.0, 0.0, 0.0),
            "std": (1.0, 1.0, 1.0),
            "first_conv": "blocks.0.conv",
            "classifier": "head.fc",
            "paper_ids": "arXiv:1603.09056",
        }
    }
)


@register_model
def rednet_small(pretrained: bool = False, **kwargs: Any) -> RedNetEncoder:
    """Three strided convolutions of 16, 32 and 64 channels.

    Stages 3, 4 and 5. Images are left in [0, 1].
    """
    return build_model_with_cfg(
        RedNetEncoder,
        "rednet_small",
        pretrained,
        feature_cfg={
            "flatten_sequential": True,
            "out_indices": kwargs.pop("out_indices", (0, 1, 2)),
        },
        **kwargs,
    )
