"""timm's ResNets with the stem that is usual for 32 px.

The stem is one 3x3 convolution of stride 1, without a pool.

timm's own stem leaves a 32 px image 8x8 before the first block; every timm option that changes the
stem keeps at least one stride. Source of the stem: He et al. 2016 (arXiv 1512.03385), section 4.2.
"""

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, ResNet
from torch import nn

__all__ = ["CifarResNet", "resnet18_cifar", "resnet34_cifar"]


class CifarResNet(ResNet):
    """timm's ResNet with strides 1, 1, 2, 4 and 8 at stages 1 to 5; arguments are timm's.

    Example:
        >>> import timm
        >>> [info['reduction'] for info in timm.create_model('resnet18_cifar').feature_info]
        [1, 1, 2, 4, 8]
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        old: Any = self.conv1
        stem = nn.Conv2d(
            old.in_channels,
            old.out_channels,
            3,
            stride=1,
            padding=1,
            bias=False,
            device=old.weight.device,
            dtype=old.weight.dtype,
        )
        nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
        self.add_module("conv1", stem)
        self.add_module("maxpool", nn.Identity())
        strides: list[dict[str, Any]] = self.feature_info
        for info in strides:
            info["reduction"] = max(1, info["reduction"] // 4)


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 10,
        "input_size": (3, 32, 32),
        "pool_size": (4, 4),
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "mean": (0.4914, 0.4822, 0.4465),
        "std": (0.2470, 0.2435, 0.2616),
        "first_conv": "conv1",
        "classifier": "fc",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {"resnet18_cifar.untrained": _cfg(), "resnet34_cifar.untrained": _cfg()}
)


def _create(variant: str, pretrained: bool, layers: tuple[int, ...], **kwargs: Any) -> CifarResNet:
    return build_model_with_cfg(
        CifarResNet, variant, pretrained, block=BasicBlock, layers=layers, **kwargs
    )


@register_model
def resnet18_cifar(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-18 for 32 px."""
    return _create("resnet18_cifar", pretrained, (2, 2, 2, 2), **kwargs)


@register_model
def resnet34_cifar(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-34 for 32 px."""
    return _create("resnet34_cifar", pretrained, (3, 4, 6, 3), **kwargs)
