import pytest
import timm
import torch
from torch import nn

import timm_branches


def test_it_is_timms_resnet_with_another_stem():
    """The same weights behind a hand-written stem give the same output."""
    torch.manual_seed(0)
    ours = timm.create_model("resnet18_cifar", num_classes=7).eval()
    plain = timm.create_model("resnet18", num_classes=7).eval()
    plain.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    plain.maxpool = nn.Identity()
    plain.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(ours(x), plain(x))


@pytest.mark.parametrize("name", ["resnet18_cifar", "resnet34_cifar"])
def test_strides_are_measured(name):
    model = timm_branches.create_branch_model(name, taps=[1, 2, 3, 4, 5], num_classes=3)
    maps = model.forward_taps(torch.randn(1, 3, 32, 32))
    assert [32 // y.shape[-1] for y in maps.values()] == [1, 1, 2, 4, 8]
    assert [tap.stride for tap in model.taps] == [1, 1, 2, 4, 8]


def test_one_channel():
    assert timm.create_model("resnet18_cifar", in_chans=1)(torch.randn(1, 1, 28, 28)).shape == (
        1,
        10,
    )
