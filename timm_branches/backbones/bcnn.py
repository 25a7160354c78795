"""The networks of B-CNN, as timm models: plain conv blocks.

Each convolution is followed by ReLU and *then* BatchNorm.

Paper: `B-CNN: Branch Convolutional Neural Network for Hierarchical Classification` (Zhu & Bain
2017), https://arxiv.org/abs/1709.09890. Architecture and defaults are those of the authors' Keras
code, https://github.com/zhuxinqimac/B-CNN, which trains model B on CIFAR-10 and VGG16 (model C) on
CIFAR-100. It has no model A (MNIST): `bcnn_a` is model B made smaller for 28 px digits, not a
reproduction.

The code leaves Keras' defaults alone, and they are not torch's: weights are Glorot-uniform and
biases zero (its `he_normal` is imported, never used), BatchNorm has epsilon 1e-3 and keeps 0.99
of its running statistics, which torch calls `momentum=0.01`.

A feature is a block's output *with* its pool, because that is where the branches sit; the last
block of VGG16 has no pool. The classifier that comes with a model is the baseline of the paper, its
fine head.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from timm.layers import get_device_dtype
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from timm_branches.backbones.fine_head import KERAS_EPS, KERAS_MOMENTUM, FlattenMlpHead, init_keras
from timm_branches.backbones.layers import BlockNet

__all__ = ["BCNN", "BlockCfg"]


class BlockCfg(NamedTuple):
    """One block.

    `convs` 3x3 convolutions of `width` channels, then a 2x2 max-pool if `pool`.
    """

    width: int
    convs: int
    pool: bool = True


class BCNN(BlockNet):
    """Conv blocks of B-CNN with the paper's baseline classifier.

    Args:
        blocks: Width, number of convolutions and pool of each block.
        num_classes: Outputs; 0 for features without a classifier.
        in_chans: Channels of the image.
        img_size: Side of the image, or its (height, width); only the 'flatten' classifier depends
            on it.
        hidden_size: Width of the classifier's two hidden layers.
        global_pool: 'flatten' as in the paper; 'avg', 'max', ... to take any image size; '' for
            bare maps.
        drop_rate: Dropout of the classifier.
        bn_momentum: Share of a batch in BatchNorm's running statistics. Keras' value, the default,
            needs some hundreds of updates before the model can be judged.
        device: Where the parameters are made.
        dtype: Of the parameters.

    Shape:
        - Input: (B, in_chans, H, W)
        - Output: (B, num_classes)

    Raises:
        ValueError: The image is smaller than one pixel of the last map.

    Example:
        >>> blocks = [BlockCfg(8, 2), BlockCfg(16, 1)]
        >>> model = BCNN(blocks, num_classes=5, img_size=12, hidden_size=7)
        >>> model(torch.rand(2, 3, 12, 12)).shape
        torch.Size([2, 5])
        >>> [info['module'] for info in model.feature_info]
        ['blocks.0', 'blocks.1']
    """

    def __init__(
        self,
        blocks: Sequence[BlockCfg],
        num_classes: int = 10,
        in_chans: int = 3,
        img_size: int | tuple[int, int] = 32,
        hidden_size: int = 1024,
        global_pool: str = "flatten",
        drop_rate: float = 0.5,
        bn_momentum: float = KERAS_MOMENTUM,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.feature_info: list[dict[str, Any]] = []
        stages = []
        chans, stride = in_chans, 1
        for index, block in enumerate(blocks):
            stages.append(_conv_block(chans, block, dd))
            chans, stride = block.width, stride * 2 if block.pool else stride
            self.feature_info.append(
                {"num_chs": chans, "reduction": stride, "module": f"blocks.{index}"}
            )
        self.blocks = nn.Sequential(*stages)
        self.num_features = chans
        self.img_size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        if min(self.img_size) < stride:
            raise ValueError(
                f"img_size {self.img_size} is too small: {len(blocks)} blocks with a total stride "
                f"of {stride} need at least {stride}x{stride}."
            )
        self.head = FlattenMlpHead(
            chans, num_classes, hidden_size, self._map_size(-1), global_pool, drop_rate, **dd
        )
        self.head_hidden_size = self.head.num_features
        init_keras(self)
        self.bn_momentum = bn_momentum
        self._set_momentum()

    def _set_momentum(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                module.momentum = self.bn_momentum

    def _map_size(self, index: int) -> tuple[int, int]:
        # each pool drops an odd last row, and halving with rounding down k times is dividing by 2^k
        # rounding down
        stride = self.feature_info[index]["reduction"]
        return self.img_size[0] // stride, self.img_size[1] // stride

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layer groups for layer decay.

        A convolution with its norm, or a whole block if `coarse`.
        """
        if coarse:
            return {"stem": r"^blocks\.0", "blocks": r"^blocks\.(\d+)"}
        return {
            "stem": r"^blocks\.0\.(?:conv|norm)1",
            "blocks": r"^blocks\.(\d+)\.(?:conv|norm)(\d+)",
        }

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Give the classifier other outputs.

        Hidden layers stay with their weights where they fit.

        Args:
            num_classes: New number of outputs. 0 leaves what `forward_head(pre_logits=True)` gives,
                the hidden layers' output; with another pooling than before, pooled features.
            global_pool: New pooling, '' for bare maps; None keeps the one there is.
        """
        # a head without classes has no parameters that tell the device, the blocks always have
        self.head = self.head.reset(num_classes, global_pool, **get_device_dtype(self))
        self._set_momentum()
        self.num_classes = num_classes
        self.head_hidden_size = self.head.num_features

    def _shortened_to(self, deepest: int) -> None:
        self.num_features = self.feature_info[deepest]["num_chs"]
        self.head.in_features, self.head.map_size = self.num_features, self._map_size(deepest)


def _conv_block(chans: int, cfg: BlockCfg, dd: dict) -> nn.Sequential:
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for i in range(1, cfg.convs + 1):
        layers[f"conv{i}"] = nn.Conv2d(chans, cfg.width, 3, padding=1, **dd)
        layers[f"act{i}"] = nn.ReLU()
        layers[f"norm{i}"] = nn.BatchNorm2d(cfg.width, KERAS_EPS, KERAS_MOMENTUM, **dd)
        chans = cfg.width
    if cfg.pool:
        layers["pool"] = nn.MaxPool2d(2)
    return nn.Sequential(layers)


def _vgg16_filter(state_dict: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """The convolutions of a VGG16 without BatchNorm under this model's names.

    The authors load ImageNet weights by layer name, which fills the convolutions and leaves the
    norms, which VGG16 has not, and the classifier, whose layers they rename, as initialised.
    """
    if any(key.startswith("blocks.") for key in state_dict):
        return state_dict
    convs = iter(sorted({int(k.split(".")[1]) for k in state_dict if k.startswith("features.")}))
    out = dict(model.state_dict())
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            index = next(convs)
            out |= {
                f"{name}.{part}": state_dict[f"features.{index}.{part}"]
                for part in ("weight", "bias")
            }
    return out


def _cfg(**kwargs) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 10,
        "input_size": (3, 32, 32),
        "pool_size": (2, 2),
        "fixed_input_size": True,
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "first_conv": "blocks.0.conv1",
        "classifier": "head.fc",
        "origin_url": "https://github.com/zhuxinqimac/B-CNN",
        "paper_ids": "arXiv:1709.09890",
        **kwargs,
    }


# The code standardises with one mean and one deviation over all pixels and channels of the set.
# These are the training sets' (the code takes the test set's own for the test images, which a
# deployed model could not).
default_cfgs = generate_default_cfgs(
    {
        "bcnn_a.untrained": _cfg(
            input_size=(1, 28, 28), pool_size=(3, 3), mean=(0.1307,), std=(0.3081,)
        ),
        "bcnn_b.untrained": _cfg(mean=(0.4734,) * 3, std=(0.2516,) * 3),
        "bcnn_vgg16.tv_in1k": _cfg(
            num_classes=100,
            mean=(0.4782,) * 3,
            std=(0.2682,) * 3,
            hf_hub_id="timm/vgg16.tv_in1k",
            license="bsd-3-clause",
        ),
    }
)


def _create(
    variant: str,
    pretrained: bool,
    blocks: list[BlockCfg],
    hidden_size: int,
    filter_fn=None,
    **kwargs,
) -> BCNN:
    out_indices = kwargs.pop("out_indices", tuple(range(len(blocks))))
    return build_model_with_cfg(
        BCNN,
        variant,
        pretrained,
        pretrained_filter_fn=filter_fn,
        feature_cfg={"flatten_sequential": True, "out_indices": out_indices},
        **{"blocks": blocks, "hidden_size": hidden_size, **kwargs},
    )


@register_model
def bcnn_a(pretrained: bool = False, **kwargs) -> BCNN:
    """Model B with a block fewer and half its widths, for 28x28x1 digits.

    It has stages 3 to 5, up to three levels.

    The paper's model A has no published code; do not report numbers of this network as that
    model's. BatchNorm's momentum is torch's, because runs on digits have few updates.
    """
    kwargs.setdefault("bn_momentum", 0.1)
    return _create(
        "bcnn_a", pretrained, [BlockCfg(32, 2), BlockCfg(64, 2), BlockCfg(128, 2)], 256, **kwargs
    )


@register_model
def bcnn_b(pretrained: bool = False, **kwargs) -> BCNN:
    """Model B of B-CNN (CIFAR-10).

    Four blocks, stages 2 to 5. The branches sit at stages 3 and 4, the end is 5.
    """
    blocks = [BlockCfg(64, 2), BlockCfg(128, 2), BlockCfg(256, 2), BlockCfg(512, 2)]
    return _create("bcnn_b", pretrained, blocks, 1024, **kwargs)


@register_model
def bcnn_vgg16(pretrained: bool = False, **kwargs) -> BCNN:
    """VGG16 of B-CNN (CIFAR-100): stages 1 to 5, block 5 without a pool.

    The branches sit at 2 and 3, the end is 5.

    `pretrained` fills the convolutions from torchvision's VGG16 (ImageNet), as the authors did
    from Keras'.
    """
    blocks = [
        BlockCfg(64, 2),
        BlockCfg(128, 2),
        BlockCfg(256, 3),
        BlockCfg(512, 3),
        BlockCfg(512, 3, pool=False),
    ]
    return _create("bcnn_vgg16", pretrained, blocks, 4096, _vgg16_filter, **kwargs)
