"""What timm's own tests ask of every model, asked of every backbone of ours."""

import math

import pytest
import timm
import torch

NAMES = [
    "bcnn_a",
    "bcnn_b",
    "bcnn_vgg16",
    "conv2_24x48",
    "rednet_small",
    "resnet18_cifar",
    "resnet34_cifar",
]


def test_all_of_ours_are_named():
    ours = [
        name
        for name in timm.list_models()
        if timm.model_entrypoint(name).__module__.startswith("timm_branches.")
    ]
    assert sorted(ours) == NAMES


def made(name, **kwargs):
    torch.manual_seed(0)
    model = timm.create_model(name, **kwargs).eval()
    return model, torch.randn(2, *model.default_cfg["input_size"])


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_features_and_heads(name):
    model, x = made(name)
    cfg, pool = model.default_cfg, tuple(model.default_cfg["pool_size"])
    assert cfg is model.pretrained_cfg
    assert model.in_chans == cfg["input_size"][0]
    assert model.num_classes == cfg["num_classes"] >= 0
    weights = model.state_dict()
    assert f"{cfg['first_conv']}.weight" in weights
    assert (f"{cfg['classifier']}.weight" in weights) is (model.num_classes > 0)
    features = model.forward_features(x)
    assert features.shape == (2, model.num_features, *pool)
    before = model.forward_head(features, pre_logits=True)
    assert before.shape == (2, model.head_hidden_size)
    torch.testing.assert_close(model.forward_head(features), model(x))
    torch.testing.assert_close(model.get_classifier()(before), model(x))
    model.reset_classifier(0)
    assert (model.num_classes, model.head_hidden_size) == (0, before.shape[1])
    assert isinstance(model.get_classifier(), torch.nn.Identity)
    torch.testing.assert_close(model(x), before)
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), before)
    model.reset_classifier(6)
    assert model(x).shape == (2, 6)
    assert model.get_classifier().out_features == 6
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), before)
    model.reset_classifier(0, "")
    torch.testing.assert_close(model(x), features)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_made_without_classifier(name):
    model, x = made(name, num_classes=0)
    assert model(x).shape == (2, model.head_hidden_size)
    model, x = made(name, num_classes=0, global_pool="")
    assert model(x).shape == (2, model.num_features, *model.default_cfg["pool_size"])


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_maps(name):
    model, x = made(name)
    last, maps = model.forward_intermediates(x)
    torch.testing.assert_close(last, model.forward_features(x))
    reductions = [info["reduction"] for info in model.feature_info]
    assert reductions == sorted(reductions)
    assert [y.shape[1] for y in maps] == [info["num_chs"] for info in model.feature_info]
    for y, stride in zip(maps, reductions, strict=True):
        for side, pixels in zip(y.shape[2:], x.shape[2:], strict=True):
            assert side <= math.ceil(pixels / stride) + 1
    paths = dict(model.named_modules())
    assert all(info["module"] in paths for info in model.feature_info)
    some = model.forward_intermediates(x, [-2], stop_early=True, intermediates_only=True)
    torch.testing.assert_close(some, maps[-2:-1])
    extractor = timm.create_model(name, features_only=True).eval()
    found = extractor(x)
    assert extractor.feature_info.channels() == [y.shape[1] for y in found]
    assert [y.shape for y in found] == [y.shape for y in maps]


@pytest.mark.parametrize("in_chans", [1, 4])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_channels_of_the_images(name, in_chans):
    model, x = made(name, in_chans=in_chans, num_classes=3)
    images = x[:, :1].expand(-1, in_chans, -1, -1)
    assert model.in_chans == in_chans
    assert model(images).shape == (2, 3)
    assert model.get_submodule(model.default_cfg["first_conv"]).in_channels == in_chans


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_is_trained(name):
    model, x = made(name, num_classes=3)
    model.train()(x).mean().backward()
    assert [key for key, p in model.named_parameters() if p.grad is None] == []
