"""What is read at the taps, against forward hooks on an untouched timm model with the same
weights."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from timm_branches import Tap, create_branch_model

SIZE = {
    "vgg11_bn": 64,
    "resnet18": 64,
    "test_resnet": 64,
    "convnext_atto": 64,
    "test_efficientnet": 64,
    "efficientnet_lite0": 64,
    "densenet121": 64,
    "hrnet_w18_small": 64,
    "resnetv2_18": 64,
    "hiera_tiny_224": 224,
    "swin_tiny_patch4_window7_224": 224,
    "vit_tiny_patch16_224": 224,
    "cait_xxs24_224": 224,
    "test_vit": 160,
    "test_convnext": 64,
    "crossvit_tiny_240": 240,
    "coat_tiny": 224,
    "levit_128s": 224,
}


def pair(name, taps, seed=0, **kwargs):
    """A branch model and a plain model with the same weights, not at their initial values."""
    torch.manual_seed(seed)
    plain = timm.create_model(name, num_classes=0, **kwargs).eval()
    with torch.no_grad():
        for parameter in plain.parameters():
            if parameter.ndim < 2:
                parameter.add_(0.2 * torch.randn_like(parameter))
    size = {} if kwargs.get("dynamic_img_size") else {"img_size": SIZE[name]}
    model = create_branch_model(name, taps=taps, num_classes=2, **size, **kwargs).eval()
    assert not any(t.is_meta for t in model.state_dict().values())
    state = plain.state_dict()
    model.backbone.load_state_dict(
        {key: state[key] for key in model.backbone.state_dict()}, strict=True
    )
    return model, plain


def images(name, batch=2, in_chans=3):
    return torch.randn(
        batch, in_chans, SIZE[name], SIZE[name], generator=torch.Generator().manual_seed(1)
    )


def hooked(plain, x, modules):
    """Outputs of modules in a pass of timm's own forward_features, copied before anything can
    overwrite them."""
    found, handles = {}, []
    for path in modules:
        handles.append(
            plain.get_submodule(path).register_forward_hook(
                lambda module, args, y, path=path: found.__setitem__(path, y.clone())
            )
        )
    plain.forward_features(x)
    for handle in handles:
        handle.remove()
    return [found[path] for path in modules]


def nhwc(y):
    return y.permute(0, 3, 1, 2)


def tokens(y):
    side = int(y.shape[1] ** 0.5)
    return y[:, y.shape[1] - side * side :].transpose(1, 2).reshape(y.shape[0], -1, side, side)


def same(y):
    return y


def pooled(y):
    return F.max_pool2d(y, 2)


# name, taps, modules of the plain model, how their outputs become maps
CASES = [
    ("resnet18", [1, 2, 3, 4, 5], ["act1", "layer1", "layer2", "layer3", "layer4"], same),
    ("resnet18", [5, 3], ["layer4", "layer2"], same),
    (
        "resnet18",
        ["layer2.1.conv2", "layer3.0.bn1", "layer1.0"],
        ["layer2.1.conv2", "layer3.0.bn1", "layer1.0"],
        same,
    ),
    ("resnet18", [2, "layer3.1.conv1", 3], ["layer1", "layer3.1.conv1", "layer2"], same),
    ("resnet18", ["layer2.0.conv1", 4], ["layer2.0.conv1", "layer3"], same),
    ("resnet18", ["maxpool", "bn1", 1], ["maxpool", "bn1", "act1"], same),
    # nothing needs what stands between the two: it goes, and what is left of it must not overwrite
    # the first
    (
        "resnet18",
        ["layer3.0.conv1", "layer3.0.downsample.0"],
        ["layer3.0.conv1", "layer3.0.downsample.0"],
        same,
    ),
    (
        "resnet18",
        ["layer4.1.bn2", "layer4.1.act2", 5],
        ["layer4.1.bn2", "layer4.1.act2", "layer4"],
        same,
    ),
    (
        "resnet18",
        ["layer1.0.act1", "layer1.0.bn1", "layer1.0.bn2"],
        ["layer1.0.act1", "layer1.0.bn1", "layer1.0.bn2"],
        same,
    ),
    (
        "resnetv2_18",
        [2, 3, "stages.3.blocks.0.conv1"],
        ["stages.0", "stages.1", "stages.3.blocks.0.conv1"],
        same,
    ),
    (
        "vgg11_bn",
        [1, 2, 3, 4, 5],
        ["features.3", "features.7", "features.14", "features.21", "features.28"],
        same,
    ),
    ("vgg11_bn", [3, "features.18"], ["features.14", "features.18"], same),
    (
        "vgg11_bn",
        ["features.11", "features.12", "features.13"],
        ["features.11", "features.12", "features.13"],
        same,
    ),
    (
        "vgg11_bn",
        [3, "features.15", "features.21"],
        ["features.14", "features.15", "features.21"],
        same,
    ),
    (
        "vit_tiny_patch16_224",
        [2, 3, 4, 5],
        ["blocks.2", "blocks.5", "blocks.8", "blocks.11"],
        tokens,
    ),
    (
        "vit_tiny_patch16_224",
        [3, "blocks.8.attn", "blocks.1"],
        ["blocks.5", "blocks.8.attn", "blocks.1"],
        tokens,
    ),
    ("vit_tiny_patch16_224", [5, "norm"], ["blocks.11", "norm"], tokens),
    ("cait_xxs24_224", [3, "blocks.14.norm1"], ["blocks.11", "blocks.14.norm1"], tokens),
    ("swin_tiny_patch4_window7_224", [3, 4, 5], ["layers.1", "layers.2", "layers.3"], nhwc),
    (
        "swin_tiny_patch4_window7_224",
        [3, "layers.2.blocks.1"],
        ["layers.1", "layers.2.blocks.1"],
        nhwc,
    ),
    ("convnext_atto", [2, 3, 4, 5], ["stages.0", "stages.1", "stages.2", "stages.3"], same),
    (
        "convnext_atto",
        [3, "stages.3.blocks.0.conv_dw"],
        ["stages.1", "stages.3.blocks.0.conv_dw"],
        same,
    ),
    ("test_efficientnet", [2, 3, 4, 5], None, same),
    (
        "efficientnet_lite0",
        [2, "blocks.3.1.conv_pw", 4],
        ["blocks.1", "blocks.3.1.conv_pw", "blocks.4"],
        same,
    ),
    ("efficientnet_lite0", [5, "conv_head"], ["blocks.6", "conv_head"], same),
    (
        "densenet121",
        [2, 3, 4],
        ["features.denseblock1", "features.denseblock2", "features.denseblock3"],
        same,
    ),
    (
        "densenet121",
        [3, "features.denseblock3.denselayer1.conv1"],
        ["features.denseblock2", "features.denseblock3.denselayer1.conv1"],
        same,
    ),
    ("crossvit_tiny_240", [3, 4], None, same),
]


@pytest.mark.parametrize(
    ("name", "taps", "modules", "to_map"),
    CASES,
    ids=lambda v: getattr(v, "__name__", str(v)) if v else "",
)
def test_same_as_hooks(name, taps, modules, to_map):
    model, plain = pair(name, taps)
    x = images(name)
    # where no module's output is the stage's map: timm's own intermediates, each on its own
    if modules is None:
        table = model.reader.table
        expected = [
            plain.forward_intermediates(x, indices=[table.get(k).index], intermediates_only=True)[0]
            for k in taps
        ]
    else:
        expected = [
            to_map(y) if y.ndim == 3 or to_map is not tokens else y
            for y in hooked(plain, x, modules)
        ]
    maps = list(model.forward_taps(x).values())
    assert [y.shape for y in maps] == [y.shape for y in expected]
    assert [(t.channels, *t.size) for t in model.taps] == [tuple(y.shape[1:]) for y in expected]
    for y, e in zip(maps, expected, strict=True):
        assert torch.equal(y, e)
        assert y.std() > 0
    # any subset, in whatever order it is asked for
    for heads in ([0], [len(taps) - 1], [0, len(taps) - 1][::-1]):
        seen = []
        handles = [
            model.head(n).register_forward_pre_hook(
                lambda head, args, seen=seen: seen.append(args[0])
            )
            for n in model.names
        ]
        logits = model(x, heads=[model.names[i] for i in heads])
        for handle in handles:
            handle.remove()
        assert list(logits) == [model.names[i] for i in sorted(set(heads))]
        for i, y in zip(sorted(set(heads)), seen, strict=True):
            assert torch.equal(y, expected[i])


@pytest.mark.parametrize(
    ("name", "taps", "stages"),
    [
        ("hrnet_w18_small", [2, 3, "stage4.0.branches.0"], [2, 3]),
        ("hiera_tiny_224", [3, 4, "blocks.11.norm1"], [3, 4]),
        ("levit_128s", [3, 4, "stages.2.blocks.0.attn"], [3, 4]),
    ],
)
def test_stages_before_a_module(name, taps, stages):
    """A stage's map is timm's, also where no module returns it and the pass goes on to a module
    behind it."""
    model, plain = pair(name, taps)
    x = images(name)
    maps = list(model.forward_taps(x).values())
    for stage, y in zip(stages, maps, strict=False):
        entry = model.reader.table.get(stage).index
        assert torch.equal(
            y, plain.forward_intermediates(x, indices=[entry], intermediates_only=True)[0]
        )


@pytest.mark.parametrize(
    ("name", "taps", "modules", "to_map"),
    [
        ("resnet18", [2, 3, "layer3.1.conv1"], ["layer1", "layer2", "layer3.1.conv1"], same),
        ("resnet18", ["layer2", "layer3.1.conv1"], ["layer2", "layer3.1.conv1"], same),
        ("resnet18", [3, "layer3.0.conv1"], ["layer2", "layer3.0.conv1"], same),
        (
            "resnet18",
            ["layer1.0.bn1", "layer1.0.bn2", 3],
            ["layer1.0.bn1", "layer1.0.bn2", "layer2"],
            same,
        ),
        ("vgg11_bn", ["features.12", 3], ["features.12", "features.14"], same),
        ("test_vit", ["blocks.2.attn", 5], ["blocks.2.attn", "blocks.5"], tokens),
        (
            "test_convnext",
            [3, "stages.2.blocks.0.conv_dw"],
            ["stages.1", "stages.2.blocks.0.conv_dw"],
            same,
        ),
        (
            "swin_tiny_patch4_window7_224",
            [3, "layers.2.blocks.0"],
            ["layers.1", "layers.2.blocks.0"],
            nhwc,
        ),
    ],
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients(name, taps, modules, to_map, checkpointing):
    model, plain = pair(name, taps)
    if checkpointing:
        if name.startswith("vgg"):
            pytest.skip("timm has no checkpointing for VGG")
        model.set_grad_checkpointing()
    x = images(name)
    for m in (model, plain):
        m.train()
        for module in m.modules():
            module.drop_prob = 0.0 if hasattr(module, "drop_prob") else None
    maps = list(model.forward_taps(x).values())
    expected = [to_map(y) for y in hooked(plain, x, modules)]
    weights = [
        torch.randn(y.shape, generator=torch.Generator().manual_seed(i)) for i, y in enumerate(maps)
    ]
    for ys, m in ((maps, model), (expected, plain)):
        sum((y * w).sum() for y, w in zip(ys, weights, strict=True)).backward()
        assert m is not None
    reference = {n: p.grad for n, p in plain.named_parameters()}
    for y, e in zip(maps, expected, strict=True):
        assert torch.equal(y, e)
    compared = 0
    for n, p in model.backbone.named_parameters():
        if p.requires_grad:
            assert p.grad is not None, n
            torch.testing.assert_close(
                p.grad, reference[n], rtol=1e-4, atol=1e-4 * reference[n].abs().max().item()
            )
            compared += 1
    assert compared == sum(
        g is not None for g in reference.values() if g is not None and g.abs().max() > 0
    )


class TestPruning:
    @pytest.mark.parametrize(
        ("name", "taps"),
        [
            ("resnet18", [3]),
            ("resnet18", [2, "layer3.0.conv1"]),
            ("vgg11_bn", [3, 4]),
            ("test_vit", [3]),
            ("vit_tiny_patch16_224", [3, "blocks.8.attn"]),
            ("convnext_atto", [2, 3, 4, 5]),
            ("test_efficientnet", [4]),
            ("densenet121", [3]),
            ("resnetv2_18", [3, 4]),
            ("swin_tiny_patch4_window7_224", [3, 4]),
            ("coat_tiny", [3]),
            ("hrnet_w18_small", [3]),
            ("levit_128s", [3, 5]),
            ("resnet18", [Tap(3), Tap(5, detach=True)]),
            ("crossvit_tiny_240", [3, 5]),
        ],
    )
    def test_every_trained_parameter_gets_a_gradient(self, name, taps):
        model = create_branch_model(name, taps=taps, num_classes=2).train()
        sum(y.square().sum() for y in model(images(name)).values()).backward()
        assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
        assert any(p.grad is not None for p in model.backbone.parameters())

    @pytest.mark.parametrize(
        ("name", "taps", "kept", "gone"),
        [
            ("resnet18", [3], "layer2.", ("layer3.", "layer4.", "fc.")),
            (
                "resnet18",
                ["layer3.0.conv1"],
                "layer3.0.conv1.",
                ("layer3.0.conv2", "layer3.1.", "layer4.", "fc."),
            ),
            ("vgg11_bn", [4], "features.18.", ("features.22.", "pre_logits.", "head.")),
            ("vgg11_bn", [5], "features.25.", ("pre_logits.", "head.")),
            ("vit_tiny_patch16_224", [4], "blocks.8.", ("blocks.9.", "norm.", "head.")),
            ("convnext_atto", [3], "stages.1.", ("stages.2.", "norm_pre.", "head.")),
            (
                "swin_tiny_patch4_window7_224",
                [3],
                "layers.1.",
                ("layers.2.", "layers.3.", "norm.", "head."),
            ),
        ],
    )
    def test_nothing_behind_the_last_tap_is_kept(self, name, taps, kept, gone):
        keys = list(create_branch_model(name, taps=taps, num_classes=2).backbone.state_dict())
        assert any(key.startswith(kept) for key in keys)
        assert [key for key in keys if key.startswith(gone)] == []
        assert set(keys) <= set(timm.create_model(name).state_dict())


class TestDetach:
    def test_stops_just_that_branch(self):
        x = images("resnet18")
        model, _ = pair("resnet18", [3, Tap(4, detach=True), 5])
        free, _ = pair("resnet18", [3, 4, 5])
        logits, wanted = model(x), free(x)
        assert logits["stage4"].grad_fn is not None
        for name in free.names:
            free.head(name).load_state_dict(model.head(name).state_dict())
        wanted = free(x)
        sum(y.square().sum() for y in logits.values()).backward()
        (wanted["stage3"].square().sum() + wanted["stage5"].square().sum()).backward()
        for (n, p), q in zip(
            model.backbone.named_parameters(), free.backbone.parameters(), strict=True
        ):
            torch.testing.assert_close(p.grad, q.grad, msg=n)
        assert model.head("stage4").fc.weight.grad.abs().sum() > 0

    def test_alone(self):
        model, _ = pair("resnet18", [Tap(3, detach=True)])
        model(images("resnet18"))["stage3"].sum().backward()
        assert all(p.grad is None for p in model.backbone.parameters())

    def test_same_map(self):
        model, _ = pair("resnet18", [3, Tap(module="layer2", detach=True)])
        a, b = model.forward_taps(images("resnet18")).values()
        assert torch.equal(a, b)
        assert a.requires_grad
        assert not b.requires_grad


class TestCopies:
    @pytest.mark.parametrize("taps", [[3, 5], [3, "layer3.0.conv1"]])
    def test_deepcopy_is_independent(self, taps):
        model, _ = pair("resnet18", taps)
        x = images("resnet18")
        before = model(x)
        twin = copy.deepcopy(model)
        for name, y in twin(x).items():
            assert torch.equal(y, before[name])
        with torch.no_grad():
            for p in twin.parameters():
                p.zero_()
        for name, y in model(x).items():
            assert torch.equal(y, before[name])
        assert all(y.abs().sum() == 0 for y in twin(x).values())
        assert model.reader.captured is None

    def test_backbone_alone_is_not_disturbed(self):
        """Whoever calls the backbone itself gets what timm gives.

        Nothing is captured and nothing is cut short.
        """
        model, plain = pair("resnet18", [2, "layer3.0.conv1", 5])
        x = images("resnet18")
        assert torch.equal(model.backbone.forward_features(x), plain.forward_features(x))
        assert model.reader.captured is None


class TestInput:
    def test_too_small(self):
        model = create_branch_model("vgg11_bn", taps=[3, 4, 5], num_classes=2).eval()
        with pytest.raises(ValueError, match=r"tap 'stage5' \(features.28\) of vgg11_bn .*3x28x28"):
            model(torch.randn(2, 3, 28, 28))
        assert model(torch.randn(2, 3, 28, 28), heads=["stage3", "stage4"])["stage4"].shape == (
            2,
            2,
        )
        # and one pixel is left here
        assert model(torch.randn(2, 3, 32, 32))["stage5"].shape == (2, 2)

    def test_too_small_when_made(self):
        with pytest.raises(ValueError, match=r"tap 'stage5'.*3x28x28"):
            create_branch_model("vgg11_bn", taps=[3, 4, 5], num_classes=2, img_size=28)

    def test_one_pixel(self):
        model = create_branch_model("resnet18", taps=[4, 5], num_classes=2, img_size=32)
        assert [t.size for t in model.taps] == [(2, 2), (1, 1)]
        assert model(torch.randn(2, 3, 32, 32))["stage5"].shape == (2, 2)

    @pytest.mark.parametrize(
        "shape", [(2, 1, 64, 64), (2, 4, 64, 64), (3, 64, 64), (2, 2, 2, 3, 64, 64)]
    )
    def test_not_images(self, shape):
        model = create_branch_model("resnet18", taps=[3], num_classes=2)
        with pytest.raises(ValueError, match=r"expected images \(B, 3, H, W\)"):
            model(torch.randn(shape))

    @pytest.mark.parametrize(
        ("name", "kwargs"),
        [
            ("resnet18", {}),
            ("vgg11_bn", {}),
            ("convnext_atto", {}),
            ("test_vit", {"dynamic_img_size": True}),
        ],
    )
    def test_not_square(self, name, kwargs):
        vit = name == "test_vit"
        taps = [3, "blocks.3.mlp" if vit else 4]
        model, plain = pair(name, taps, **kwargs)
        x = torch.randn(2, 3, 96, 160)
        maps = list(model.forward_taps(x).values())
        if vit:
            expected = [
                y[:, y.shape[1] - 60 :].transpose(1, 2).unflatten(2, (6, 10))
                for y in hooked(plain, x, ["blocks.2", "blocks.3.mlp"])
            ]
            assert maps[0].shape[2:] == (6, 10)
        else:
            indices = [model.reader.table.get(k).index for k in taps]
            expected = plain.forward_intermediates(x, indices=indices, intermediates_only=True)
            expected = [pooled(y) for y in expected] if name == "vgg11_bn" else expected
        for y, e in zip(maps, expected, strict=True):
            assert torch.equal(y, e)

    def test_vit_of_a_fixed_size(self):
        model = create_branch_model("vit_tiny_patch16_224", taps=[1, 3], num_classes=2, img_size=64)
        with pytest.raises(ValueError, match=r"tap 'stage1'.*3x96x96.*3x64x64"):
            model(torch.randn(2, 3, 96, 96))
        assert model(torch.randn(2, 3, 64, 64))["stage3"].shape == (2, 2)  # and it goes on working

    def test_an_error_of_the_program_is_not_blamed_on_the_images(self):
        model = create_branch_model("resnet18", taps=[3], num_classes=2)
        with pytest.raises(RuntimeError, match="dtype|type"):
            model(torch.randn(2, 3, 64, 64, dtype=torch.float64))


class TestRefused:
    @pytest.mark.parametrize(
        ("name", "path", "why"),
        [
            ("resnet18", "fc", "'fc' is not run"),
            ("resnet18", "global_pool", "'global_pool' is not run"),
            ("vit_tiny_patch16_224", "blocks.2.attn.q_norm", "'blocks.2.attn.q_norm'"),
            ("test_resnet", "layer2.0.downsample.9", "no module"),
            ("resnet50", "layer1.0.se", "no module"),
            ("legacy_seresnet18", "layer1.0.se_module.fc1", None),
            ("hrnet_w18_small", "stage3.0.fuse_act", "'stage3.0.fuse_act' is run 3 times"),
            ("hrnet_w18_small", "stage3.0", r"'stage3.0' \(list\) is not a feature map"),
        ],
    )
    def test_by_name(self, name, path, why):
        if why is None:  # a squeezed map of one pixel is a map
            assert create_branch_model(name, taps=[path], num_classes=2).taps[0].size == (1, 1)
            return
        with pytest.raises(ValueError, match=why):
            create_branch_model(name, taps=[path], num_classes=2)

    def test_vector(self):
        class Net(nn.Module):
            feature_info = [{"num_chs": 4, "reduction": 2, "module": "conv"}]

            def __init__(self):
                super().__init__()
                self.conv = nn.Conv2d(3, 4, 3, stride=2, padding=1)
                self.linear = nn.Linear(4, 5)

            def forward_intermediates(
                self,
                x,
                indices=None,
                stop_early=False,
                output_fmt="NCHW",
                intermediates_only=False,
                norm=False,
            ):
                y = self.conv(x)
                self.linear(y.mean((2, 3)))
                return [y] if intermediates_only else (y, [y])

            def prune_intermediate_layers(self, indices, prune_norm=False, prune_head=True):
                return indices

        from timm_branches.taps.reader import TapReader

        with pytest.raises(
            ValueError, match=r"'linear' \(shape \(2, 5\) for 2 images\) is not a feature map"
        ):
            TapReader(Net(), [Tap(module="linear")], (3, 8, 8))
