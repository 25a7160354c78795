"""The papers' own networks and others for small images.

Importing this package registers them with timm.

Example:
    >>> import timm, timm_branches.backbones
    >>> timm.create_model('bcnn_b').num_classes
    10
"""

from timm_branches.backbones.bcnn import BCNN, BlockCfg, bcnn_a, bcnn_b, bcnn_vgg16
from timm_branches.backbones.cifar_resnet import resnet18_cifar, resnet34_cifar
from timm_branches.backbones.clip_cnn import ClipCNN, conv2_24x48
from timm_branches.backbones.fine_head import FlattenMlpHead
from timm_branches.backbones.rednet import RedNetEncoder, rednet_small

__all__ = [
    "BCNN",
    "BlockCfg",
    "ClipCNN",
    "FlattenMlpHead",
    "RedNetEncoder",
    "bcnn_a",
    "bcnn_b",
    "bcnn_vgg16",
    "conv2_24x48",
    "rednet_small",
    "resnet18_cifar",
    "resnet34_cifar",
]
