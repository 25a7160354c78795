"""The papers' own networks and ResNets for 32 px; importing this package registers them with timm.

Example:
    >>> import timm, timm_branches.backbones
    >>> timm.create_model('bcnn_b').num_classes
    10
"""

from .bcnn import BCNN, BlockCfg, bcnn_a, bcnn_b, bcnn_vgg16
from .cifar_resnet import resnet18_cifar, resnet34_cifar
from .fine_head import FlattenMlpHead

__all__ = ["BCNN", "BlockCfg", "FlattenMlpHead", "bcnn_a", "bcnn_b", "bcnn_vgg16", "resnet18_cifar",
           "resnet34_cifar"]
