"""What timm asks of a model, asked of branch models."""

import pytest
import timm
import torch
from torch import nn

from timm_branches import create_branch_model, load_model, save_model
from timm_branches.heads import FlattenHead, LSTMHead, PoolHead, UNetHead


def small(**kwargs):
    torch.manual_seed(0)
    options = {"taps": [3, 5], "num_classes": [2, 7], "img_size": 64, **kwargs}
    return create_branch_model("test_resnet", **options).eval()


X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def close(found, wanted):
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value)


class TestForwardHead:
    @pytest.mark.parametrize("head", ["pool", "flatten", PoolHead(hidden=(6,), pool_type="max")])
    @torch.no_grad()
    def test_parts_make_the_whole(self, head):
        model = small(head=head)
        whole = model(X)
        close(model.forward_head(model.forward_taps(X)), whole)
        close(model.forward_head(model.forward_features(X)), {"stage5": whole["stage5"]})
        before = model.forward_head(model.forward_taps(X), pre_logits=True)
        assert {name: y.shape[1] for name, y in before.items()} == model.head_hidden_size
        for name, y in before.items():
            torch.testing.assert_close(model.head(name).fc(y), whole[name])
        model.reset_classifier(0)
        close(model(X), before)
        assert {name: y.shape[1] for name, y in before.items()} == model.head_hidden_size
        close(model.forward_head(model.forward_taps(X), pre_logits=True), before)

    def test_no_hook_stays(self):
        model = small()
        model.forward_head(model.forward_features(X), pre_logits=True)
        assert not any(module._forward_pre_hooks for module in model.heads.modules())

    def test_a_backbone_of_timm_says_the_same(self):
        """One head on the last stage is timm's own classifier, with the same numbers."""
        model = small(taps=[5], num_classes=4, head="pool")
        plain = timm.create_model("test_resnet", num_classes=4).eval()
        weights = {key.removeprefix("backbone."): v for key, v in model.state_dict().items()}
        weights["fc.weight"], weights["fc.bias"] = model.head("stage5").fc.parameters()
        plain.load_state_dict(
            {key: v for key, v in weights.items() if not key.startswith("heads.")}
        )
        features = plain.forward_features(X)
        torch.testing.assert_close(model.forward_head(features)["stage5"], plain(X))
        torch.testing.assert_close(
            model.forward_head(features, pre_logits=True)["stage5"],
            plain.forward_head(features, pre_logits=True),
        )
        assert model.head_hidden_size == {"stage5": plain.head_hidden_size}

    def test_refused(self):
        model = small()
        with pytest.raises(ValueError, match=r"heads=.*'nose'"):
            model.forward_head({"nose": X})
        unet = small(taps=[(3, 5)], head=UNetHead(), num_classes=2)
        with pytest.raises(ValueError, match="no head reads the map"):
            unet.forward_head(unet.forward_features(X))
        with pytest.raises(ValueError, match="call the model itself"):
            unet.forward_head(unet.forward_taps(X))
        lstm = small(taps=[5], head=LSTMHead(hidden_size=4), num_classes=2)
        with pytest.raises(ValueError, match=r"\['stage5'\] read clips"):
            lstm.forward_head(lstm.forward_features(X))


def test_sizes_and_pools_by_name():
    heads = [PoolHead(pool_type="catavgmax"), FlattenHead(hidden=(9,)), LSTMHead(hidden_size=4)]
    model = small(taps=[3, 4, 5], head=heads, num_classes=2, names=["a", "b", "c"])
    channels = model.taps[0].channels
    assert model.head_hidden_size == {"a": 2 * channels, "b": 9, "c": 4}
    assert model.global_pool == {"a": "catavgmax", "b": "flatten", "c": "avg"}
    unet = small(taps=[(3, 5)], head=UNetHead(), num_classes=2)
    fc = unet.head("unet").fc
    if isinstance(fc, nn.Conv2d):
        assert unet.head_hidden_size == {"unet": fc.in_channels}
    assert unet.global_pool == {"unet": ""}
    with pytest.raises(AttributeError):
        model.global_pool = "avg"


class TestForwardIntermediates:
    @torch.no_grad()
    def test_are_the_maps_at_the_taps(self):
        model = small(taps=[5, 3, "layer2"], num_classes=2)
        maps = list(model.forward_taps(X).values())
        last, found = model.forward_intermediates(X)
        torch.testing.assert_close(last, model.forward_features(X))
        torch.testing.assert_close(found, maps)
        assert [y.shape[1] for y in found] == [info["num_chs"] for info in model.feature_info]
        last, found = model.forward_intermediates(X, [1], stop_early=True)
        torch.testing.assert_close([last, *found], [maps[1], maps[1]])
        last, found = model.forward_intermediates(X, [1])
        torch.testing.assert_close([last, *found], [maps[0], maps[1]])
        alone = model.forward_intermediates(X, 2, intermediates_only=True)
        torch.testing.assert_close(alone, maps[1:])

    def test_refused(self):
        with pytest.raises(ValueError, match="NCHW"):
            small().forward_intermediates(X, output_fmt="NLC")
        with pytest.raises(ValueError, match="norm=True has no effect"):
            small().forward_intermediates(X, norm=True)


class TestInputSize:
    @torch.no_grad()
    def test_a_vit_as_timm_resizes_it(self, tmp_path):
        torch.manual_seed(0)
        model = create_branch_model("test_vit", taps=[3, 5], num_classes=2).eval()
        plain = timm.create_model("test_vit", num_classes=0).eval()
        plain.load_state_dict(model.backbone.state_dict(), strict=False)
        model.set_input_size((96, 64))
        plain.set_input_size(img_size=(96, 64))
        torch.testing.assert_close(model.backbone.pos_embed, plain.pos_embed)
        x = torch.randn(2, 3, 96, 64)
        outputs = model(x)
        assert model.input_size == model.pretrained_cfg["input_size"] == (3, 96, 64)
        assert [tap.size for tap in model.taps] == [(6, 4), (6, 4)]
        twin = load_model(save_model(model, tmp_path / "model.safetensors"))
        assert twin.input_size == (3, 96, 64)
        close(twin(x), outputs)

    @torch.no_grad()
    def test_others_change_the_nominal_size_alone(self):
        model = small(head=["pool", UNetHead()], taps=[3, (3, 5)], num_classes=2)
        before = model(X)
        model.set_input_size(96)
        close(model(X), before)
        assert model.config["img_size"] == [96, 96]
        fresh = small(head=["pool", UNetHead()], taps=[3, (3, 5)], num_classes=2, img_size=96)
        assert model.taps == fresh.taps
        assert model.pretrained_cfg == fresh.pretrained_cfg

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"head": "flatten"}, "flatten"),
            ({"head": ["pool", "flatten"]}, "flatten"),
            ({"head": LSTMHead(hidden_size=4, pool_type="flatten")}, "cannot take it"),
        ],
    )
    def test_bound_heads_refuse_and_nothing_changes(self, options, words):
        model = small(**options)
        before = dict(model.config), dict(model.pretrained_cfg), model.taps, model.input_size
        with pytest.raises(ValueError, match=words):
            model.set_input_size(96)
        assert before == (model.config, model.pretrained_cfg, model.taps, model.input_size)

    def test_bound_backbones(self):
        model = create_branch_model("mixer_s32_224", taps=[3], num_classes=2)
        with pytest.raises(ValueError, match="cannot take it"):
            model.set_input_size(256)
        assert model.input_size == (3, 224, 224)

    @pytest.mark.parametrize("size", [0, -1, True, 1.5, "x", (1, 2, 3), 1])
    def test_no_size(self, size):
        with pytest.raises(ValueError, match="img_size="):
            create_branch_model("test_vit", taps=[5], num_classes=2).set_input_size(size)


def test_new_classes_keep_the_preprocessing_of_the_file(tmp_path):
    model = small()
    model.pretrained_cfg["mean"] = (0.1, 0.2, 0.3)
    twin = load_model(save_model(model, tmp_path / "model.safetensors"))
    twin.reset_classifier([3, 4])
    assert tuple(twin.pretrained_cfg["mean"]) == (0.1, 0.2, 0.3)
    assert twin.pretrained_cfg["num_classes"] == 3
