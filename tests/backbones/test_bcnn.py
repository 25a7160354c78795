"""The B-CNN backbones against networks written out by hand, and against what timm asks of a
model."""

import pytest
import timm
import torch
from timm.data import resolve_data_config
from timm.models import load_checkpoint
from timm.optim import create_optimizer_v2
from torch import nn

from timm_branches.backbones import BCNN, BlockCfg
from timm_branches.backbones.bcnn import _vgg16_filter

# name: input, [(channels, reduction)], width after flatten, hidden width, classes
FACTS = {
    "bcnn_a": ((1, 28, 28), [(32, 2), (64, 4), (128, 8)], 128 * 3 * 3, 256, 10),
    "bcnn_b": ((3, 32, 32), [(64, 2), (128, 4), (256, 8), (512, 16)], 512 * 2 * 2, 1024, 10),
    "bcnn_vgg16": (
        (3, 32, 32),
        [(64, 2), (128, 4), (256, 8), (512, 16), (512, 16)],
        512 * 2 * 2,
        4096,
        100,
    ),
}
SMALL = [BlockCfg(4, 2), BlockCfg(6, 1), BlockCfg(8, 2, pool=False)]


def small(**kwargs) -> BCNN:
    torch.manual_seed(0)
    return BCNN(SMALL, **{"num_classes": 3, "img_size": 12, "hidden_size": 5, **kwargs})


def by_hand(in_chans: int = 3, in_width: int = 8 * 3 * 3, hidden: int = 5, classes: int = 3):
    """SMALL written out: three blocks and the head, with the layers in the paper's order."""

    def conv(a, b):
        return [
            nn.Conv2d(a, b, 3, padding=1),
            nn.ReLU(),
            nn.BatchNorm2d(b, eps=1e-3, momentum=0.01),
        ]

    def dense(a, b):
        return [
            nn.Linear(a, b),
            nn.ReLU(),
            nn.BatchNorm1d(b, eps=1e-3, momentum=0.01),
            nn.Dropout(0.5),
        ]

    return nn.ModuleList(
        [
            nn.Sequential(*conv(in_chans, 4), *conv(4, 4), nn.MaxPool2d(2)),
            nn.Sequential(*conv(4, 6), nn.MaxPool2d(2)),
            nn.Sequential(*conv(6, 8), *conv(8, 8)),
            nn.Sequential(
                nn.Flatten(),
                *dense(in_width, hidden),
                *dense(hidden, hidden),
                nn.Linear(hidden, classes),
            ),
        ]
    )


def copy_weights(source: nn.Module, target: nn.Module) -> None:
    """By order: both register their tensors in the order of computation."""
    values = list(source.state_dict().values())
    keys = list(target.state_dict())
    assert len(values) == len(keys)
    target.load_state_dict(dict(zip(keys, values, strict=True)))


def test_values_at_every_tap_are_those_of_the_network_by_hand():
    model, hand = small(), by_hand()
    copy_weights(model, hand)
    x = torch.randn(4, 3, 12, 12)
    # running statistics after a training step are part of the comparison
    for training in (True, False):
        model.train(training)
        hand.train(training)
        last, taps = model.forward_intermediates(x)
        want = x
        for tap, block in zip(taps, hand[:3], strict=True):
            want = block(want)
            torch.testing.assert_close(tap, want)
        torch.testing.assert_close(last, want)
    torch.testing.assert_close(model(x), hand[3](want))
    assert [tuple(t.shape[1:]) for t in taps] == [(4, 6, 6), (6, 3, 3), (8, 3, 3)]


@pytest.mark.parametrize("name", FACTS)
def test_registered_models_have_the_published_shapes(name):
    input_size, features, flat, hidden, classes = FACTS[name]
    model = timm.create_model(name).eval()
    assert model.num_classes == classes
    assert model.num_features == features[-1][0]
    assert model.head_hidden_size == hidden
    assert model.head.hidden.fc1.in_features == flat
    assert [(i["num_chs"], i["reduction"]) for i in model.feature_info] == features
    x = torch.randn(2, *input_size)
    with torch.no_grad():
        last, taps = model.forward_intermediates(x)
        assert model(x).shape == (2, classes)
        assert model.forward_head(last, pre_logits=True).shape == (2, hidden)
    for info, tap in zip(model.feature_info, taps, strict=True):
        side = input_size[1] // info["reduction"]
        assert tap.shape == (2, info["num_chs"], side, side)
        assert model.get_submodule(info["module"]) is not None
    cfg = resolve_data_config({}, model=model)
    assert cfg["input_size"] == input_size
    assert len(cfg["mean"]) == len(cfg["std"]) == input_size[0]
    assert model.pretrained_cfg["classifier"] + ".weight" in model.state_dict()
    assert model.pretrained_cfg["first_conv"] + ".weight" in model.state_dict()
    assert name in timm.list_models("bcnn_*")


def test_keras_defaults():
    model = small(img_size=32, hidden_size=512)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            assert not module.bias.any()
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            assert (module.eps, module.momentum) == (1e-3, 0.01)
    weight = model.head.hidden.fc2.weight
    assert weight.abs().max() <= (6 / 1024) ** 0.5
    assert weight.std().item() == pytest.approx((2 / 1024) ** 0.5, rel=0.02)


def test_module_path_is_the_feature():
    model, seen = small().eval(), {}
    for info in model.feature_info:
        model.get_submodule(info["module"]).register_forward_hook(
            lambda _m, _i, out, path=info["module"]: seen.__setitem__(path, out)
        )
    taps = model.forward_intermediates(torch.randn(2, 3, 12, 12), intermediates_only=True)
    for info, tap in zip(model.feature_info, taps, strict=True):
        assert seen[info["module"]] is tap


def test_save_and_load_round_trip(tmp_path):
    a = timm.create_model("bcnn_a", num_classes=5).eval()
    torch.save(a.state_dict(), tmp_path / "a.pth")
    b = timm.create_model("bcnn_a", num_classes=5, checkpoint_path=str(tmp_path / "a.pth")).eval()
    c = timm.create_model("bcnn_a", num_classes=5).eval()
    load_checkpoint(c, str(tmp_path / "a.pth"))
    x = torch.randn(2, 1, 28, 28)
    torch.testing.assert_close(a(x), b(x))
    torch.testing.assert_close(a(x), c(x))


def test_no_classes_is_a_feature_extractor_of_any_size():
    pooled = timm.create_model("bcnn_a", num_classes=0).eval()
    assert pooled(torch.randn(2, 1, 40, 36)).shape == (2, pooled.num_features)
    assert not list(pooled.head.parameters())
    bare = timm.create_model("bcnn_a", num_classes=0, global_pool="").eval()
    assert bare(torch.randn(2, 1, 28, 28)).shape == (2, 128, 3, 3)


def test_reset_classifier():
    model, x = small(), torch.randn(2, 3, 12, 12)
    hidden = model.head.hidden
    model.reset_classifier(7)
    assert model(x).shape == (2, 7)
    assert model.head.hidden is hidden
    assert model.get_classifier().out_features == model.num_classes == 7
    model.reset_classifier(0)
    assert model(x).shape == (2, 5)
    assert model.head.hidden is hidden
    assert model.head_hidden_size == 5
    model.reset_classifier(4)
    assert model.head.hidden is hidden
    model.reset_classifier(0, "avg")
    assert model(x).shape == (2, model.num_features)
    assert model.head_hidden_size == model.num_features
    model.reset_classifier(0, "")
    assert model(x).shape == (2, 8, 3, 3)
    model.double().reset_classifier(4, "avg")
    assert model(torch.randn(2, 3, 20, 16).double()).shape == (2, 4)
    model.eval().reset_classifier(4, "flatten")
    assert not model.head.training
    assert model(x.double()).shape == (2, 4)


def test_prune_keeps_what_the_deepest_tap_needs():
    whole, model, x = small().eval(), small().eval(), torch.randn(2, 3, 12, 12)
    assert model.prune_intermediate_layers([0, 1]) == [0, 1]
    assert len(model.blocks) == 2
    assert not list(model.head.parameters())
    assert model.num_features == 6
    want = whole.forward_intermediates(x, [0, 1], intermediates_only=True, stop_early=True)
    for a, b in zip(
        model.forward_intermediates(x, [0, 1], intermediates_only=True), want, strict=True
    ):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(model(x), want[-1])
    model.reset_classifier(4, "flatten")  # a classifier on the shorter network, sized for its map
    assert model(x).shape == (2, 4)
    kept = small()
    kept.prune_intermediate_layers(1, prune_head=False)
    assert kept(x).shape == (2, 3)


def test_stop_early_computes_no_deeper_block():
    model = small()
    run = []
    for index, block in enumerate(model.blocks):
        block.register_forward_hook(lambda *_, index=index: run.append(index))
    model.forward_intermediates(torch.randn(2, 3, 12, 12), [1], stop_early=True)
    assert run == [0, 1]


def test_grad_checkpointing_changes_nothing_but_memory():
    x = torch.randn(4, 3, 12, 12)
    results = []
    for enable in (False, True):
        model = small(drop_rate=0.0)
        model.set_grad_checkpointing(enable)
        out = model(x)
        model(x).sum().backward()
        taps = model.forward_intermediates(x, intermediates_only=True)
        results.append([out, *taps, *(p.grad for p in model.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("feature_cls", [None, "getter"])
def test_features_only(feature_cls):
    kwargs = {"feature_cls": feature_cls} if feature_cls else {}
    model = timm.create_model("bcnn_vgg16", features_only=True, **kwargs).eval()
    assert model.feature_info.channels() == [64, 128, 256, 512, 512]
    assert model.feature_info.reduction() == [2, 4, 8, 16, 16]
    with torch.no_grad():
        assert [t.shape[-1] for t in model(torch.randn(1, 3, 48, 48))] == [24, 12, 6, 3, 3]
    some = timm.create_model("bcnn_vgg16", features_only=True, out_indices=(1, 2), **kwargs)
    assert some.feature_info.channels() == [128, 256]


def test_layer_decay_reaches_every_depth():
    model = timm.create_model("bcnn_b")
    optimizer = create_optimizer_v2(model, "sgd", lr=0.1, layer_decay=0.7)
    scales = {g["lr_scale"] for g in optimizer.param_groups}
    assert len(scales) == 9  # eight convolutions and the head
    by_param = {id(p): g["lr_scale"] for g in optimizer.param_groups for p in g["params"]}
    assert by_param[id(model.head.fc.weight)] == 1
    assert (
        by_param[id(model.blocks[0].conv1.weight)]
        == by_param[id(model.blocks[0].norm1.weight)]
        == min(scales)
    )
    coarse = timm.models.group_parameters(model, model.group_matcher(coarse=True))
    assert len(coarse) == 5


def test_vgg16_takes_the_convolutions_of_an_imagenet_vgg16(tmp_path):
    vgg = timm.create_model("vgg16", num_classes=2)
    torch.save(
        {k: v for k, v in vgg.state_dict().items() if k.startswith("features.")},
        tmp_path / "vgg16.pth",
    )
    overlay = {"file": str(tmp_path / "vgg16.pth"), "hf_hub_id": None}
    model = timm.create_model(
        "bcnn_vgg16", pretrained=True, pretrained_cfg_overlay=overlay, in_chans=3
    )
    torch.testing.assert_close(model.blocks[0].conv2.weight, vgg.features[2].weight)
    torch.testing.assert_close(model.blocks[4].conv3.bias, vgg.features[28].bias)
    assert (model.blocks[0].norm1.weight == 1).all()
    grey = timm.create_model(
        "bcnn_vgg16", pretrained=True, pretrained_cfg_overlay=overlay, in_chans=1, num_classes=7
    )
    torch.testing.assert_close(
        grey.blocks[0].conv1.weight, vgg.features[0].weight.sum(1, keepdim=True)
    )
    own = model.state_dict()
    assert _vgg16_filter(own, model) is own


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match=r"too small.*at least 16x16"):
        timm.create_model("bcnn_b", img_size=8)
    with pytest.raises(ValueError, match="num_classes"):
        small(num_classes=-1)
    with pytest.raises(ValueError, match="leaves a map"):
        small(global_pool="")
    with pytest.raises(ValueError, match=r"flattens maps of 3x3, got 4x4"):
        small()(torch.randn(2, 3, 16, 16))
    with pytest.raises(ValueError, match="NCHW"):
        small().forward_intermediates(torch.randn(1, 3, 12, 12), output_fmt="NHWC")


def test_image_sizes_other_than_the_default():
    assert small(img_size=(12, 20))(torch.randn(2, 3, 12, 20)).shape == (2, 3)
    assert small(img_size=15)(torch.randn(2, 3, 15, 15)).shape == (2, 3)
    assert small(global_pool="avg")(torch.randn(2, 3, 30, 22)).shape == (2, 3)


def test_exports():
    model, x = small().eval(), torch.randn(2, 3, 12, 12)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), model(x))
