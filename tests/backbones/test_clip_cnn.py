import pytest
import timm
import torch
from torch import nn

from timm_branches import create_branch_model, list_taps


def test_against_plain_layers():
    torch.manual_seed(0)
    model = timm.create_model("conv2_24x48", num_classes=4).eval()
    plain = nn.Sequential(
        nn.Conv2d(1, 20, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(20, 50, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(50, 4),
    )
    plain.load_state_dict(dict(zip(plain.state_dict(), model.state_dict().values(), strict=True)))
    x = torch.randn(2, 1, 24, 48)
    torch.testing.assert_close(model(x), plain(x))
    assert torch.equal(model.forward_features(x), model.forward_intermediates(x)[0])
    torch.testing.assert_close(model.forward_features(x), plain[:6](x))


def test_taps():
    assert [(r.stage, r.module, r.channels, r.stride) for r in list_taps("conv2_24x48")] == [
        (4, "blocks.0", 20, 2),
        (5, "blocks.1", 50, 4),
    ]
    model = create_branch_model("conv2_24x48", taps=[4, 5], num_classes=[2, 3])
    maps = model.forward_taps(torch.randn(1, 1, 24, 48))
    assert [tuple(y.shape[1:]) for y in maps.values()] == [(20, 10, 22), (50, 3, 9)]
    assert [t.size for t in model.taps] == [(10, 22), (3, 9)]


@pytest.mark.parametrize("taps", [[4], [5], ["blocks.1.conv"]])
def test_nothing_unused_is_kept(taps):
    model = create_branch_model("conv2_24x48", taps=taps, num_classes=2)
    sum(y.sum() for y in model(torch.randn(2, 1, 24, 48)).values()).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


def test_timm_contract():
    model = timm.create_model("conv2_24x48", in_chans=3)
    model.reset_classifier(7, "max")
    assert model(torch.randn(2, 3, 24, 48)).shape == (2, 7)
    assert model.get_classifier().out_features == 7
    model.reset_classifier(0, "")
    assert model(torch.randn(2, 3, 24, 48)).shape == (2, 50, 3, 9)
    features = timm.create_model("conv2_24x48", features_only=True)
    assert [y.shape[1] for y in features(torch.randn(1, 1, 24, 48))] == [20, 50]
    assert [
        y.shape[1]
        for y in model.forward_intermediates(torch.randn(1, 3, 24, 48), 1, intermediates_only=True)
    ] == [50]
    with pytest.raises(ValueError, match="NCHW"):
        model.forward_intermediates(torch.randn(1, 3, 24, 48), output_fmt="NLC")


def test_grad_checkpointing():
    torch.manual_seed(0)
    model = timm.create_model("conv2_24x48")
    x = torch.randn(2, 1, 24, 48)
    grads = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(x).sum().backward()
        grads.append(model.blocks[0].conv.weight.grad.clone())
    assert grads[0].abs().sum() > 0
    torch.testing.assert_close(*grads)
