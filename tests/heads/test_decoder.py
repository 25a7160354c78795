"""Skip decoders.

Against segmentation_models_pytorch, against decoders written by hand; options and files.
"""

import json

import pytest
import torch
import torch.nn.functional as F

from timm_branches import Tap, create_branch_model, load_model, save_model
from timm_branches.heads import HEADS, RedNetHead, UNetHead, head_to_dict, parse_head

KINDS = {"unet": UNetHead, "rednet": RedNetHead}


def make(taps=(2, 3, 5), head="unet", num_classes=3, name="test_resnet", img_size=32, **kwargs):
    torch.manual_seed(0)
    return create_branch_model(
        name, taps=taps, head=head, num_classes=num_classes, img_size=img_size, **kwargs
    )


def images(*size, chans=3):
    return torch.randn(2, chans, *size, generator=torch.Generator().manual_seed(1))


def answer(model, x):
    (y,) = model(x).values()
    return y


class TestAgainstSmp:
    """segmentation_models_pytorch's Unet on the same encoder, with our weights."""

    @pytest.mark.parametrize(("mode", "depth"), [("nearest", 5), ("bilinear", 5), ("nearest", 3)])
    def test_same_parameters_and_output(self, mode, depth):
        smp = pytest.importorskip("segmentation_models_pytorch")
        channels = (256, 128, 64, 32, 16)[5 - depth :]
        theirs = smp.Unet(
            "tu-resnet18",
            encoder_weights=None,
            encoder_depth=depth,
            decoder_channels=channels,
            classes=11,
            decoder_interpolation=mode,
        )
        ours = make(range(1, depth + 1), UNetHead(upsample=mode), 11, "resnet18")
        decoder = ours.head("unet")
        theirs.encoder.model.load_state_dict(ours.backbone.state_dict())
        for part, other in (
            (decoder.stages, theirs.decoder),
            (decoder.fc, theirs.segmentation_head),
        ):
            other.load_state_dict(
                dict(zip(other.state_dict(), part.state_dict().values(), strict=True))
            )
        assert sum(p.numel() for p in ours.parameters()) == sum(
            p.numel() for p in theirs.parameters()
        )
        x = images(64, 32)
        for mode in (True, False):
            torch.testing.assert_close(
                answer(ours.train(mode), x), theirs.train(mode)(x), rtol=1e-4, atol=1e-5
            )


class TestByHand:
    """The decoder's formulas, written out."""

    @pytest.mark.parametrize("upsample", ["nearest", "bilinear", "transposed", "shuffle"])
    def test_unet_stage(self, upsample):
        """Two maps.

        Up by the mode, attention gate, concatenation, two convolutions; then a stage without a
        skip.
        """
        model = make(
            ("layer1", "layer2"),
            UNetHead(norm=None, act="gelu", upsample=upsample, attention=True, channels=(12, 8, 6)),
        )
        x = images(32, 32)
        skip, deep = model.forward_taps(x)["unet"]
        w = {key.removeprefix("heads.unet."): value for key, value in model.state_dict().items()}

        def up(y, stage):
            name = f"stages.{stage}.up.conv"
            if upsample == "transposed":
                return F.conv_transpose2d(y, w[f"{name}.weight"], w[f"{name}.bias"], stride=2)
            if upsample == "shuffle":
                return F.pixel_shuffle(F.conv2d(y, w[f"{name}.0.weight"], w[f"{name}.0.bias"]), 2)
            return F.interpolate(y, scale_factor=2, mode=upsample)

        def convs(y, stage):
            for i in (1, 2):
                name = f"stages.{stage}.conv{i}.0"
                y = F.gelu(F.conv2d(y, w[f"{name}.weight"], w[f"{name}.bias"], padding=1))
            return y

        y = up(deep, 0)
        gate = "stages.0.gate."
        logit = F.relu(
            torch.einsum("kc,bchw->bkhw", w[gate + "skip.weight"][..., 0, 0], skip)
            + torch.einsum("kc,bchw->bkhw", w[gate + "gate.weight"][..., 0, 0], y)
            + w[gate + "gate.bias"].view(-1, 1, 1)
        )
        alpha = (
            torch.einsum("kc,bchw->bkhw", w[gate + "psi.weight"][..., 0, 0], logit)
            + w[gate + "psi.bias"]
        )
        y = convs(torch.cat([y, alpha.sigmoid() * skip], 1), 0)
        y = convs(up(convs(up(y, 1), 1), 2), 2)
        expected = F.conv2d(y, w["fc.weight"], w["fc.bias"], padding=1)
        assert expected.shape[2:] == x.shape[2:]
        torch.testing.assert_close(answer(model, x), expected, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("upsample", ["nearest", "bilinear", "transposed", "shuffle"])
    def test_rednet_stage(self, upsample):
        """A skip of the stage's width is added as it is, one of another width through a 1x1
        convolution."""
        model = make((3, 4, 5), RedNetHead(channels=(48, 20, 8, 8), upsample=upsample))
        x = images(32, 32)
        skip3, skip4, y = model.forward_taps(x)["rednet"]
        w = {key.removeprefix("heads.rednet."): value for key, value in model.state_dict().items()}
        chans = skip4.shape[1]
        assert ("stages.0.project.weight" in w) == (chans != 48)
        assert "stages.1.project.weight" in w

        def up(y, name):
            if upsample == "transposed":
                return F.conv_transpose2d(
                    y, w[f"{name}.weight"], w[f"{name}.bias"], stride=2, padding=1
                )
            if upsample == "shuffle":
                return F.pixel_shuffle(
                    F.conv2d(y, w[f"{name}.0.weight"], w[f"{name}.0.bias"], padding=1), 2
                )
            return F.conv2d(
                F.interpolate(y, scale_factor=2, mode=upsample),
                w[f"{name}.weight"],
                w[f"{name}.bias"],
                padding=1,
            )

        for stage, skip in enumerate((skip4, skip3, None, None)):
            y = up(y, f"stages.{stage}.up.conv")
            if skip is not None:
                name = f"stages.{stage}.project"
                y = y + (
                    F.conv2d(skip, w[f"{name}.weight"], w[f"{name}.bias"])
                    if f"{name}.weight" in w
                    else skip
                )
            y = F.relu(y)
        torch.testing.assert_close(answer(model, x), up(y, "fc.conv"), rtol=1e-4, atol=1e-5)

    def test_pyramid_of_a_vit(self):
        """Maps of one stride.

        The deepest stays, each shallower one is projected and enlarged twofold more.
        """
        model = make((3, 4, 5), UNetHead(norm=None), name="test_vit")
        x = images(32, 32)
        maps = model.forward_taps(x)["unet"]
        assert {tuple(y.shape[2:]) for y in maps} == {(2, 2)}
        decoder = model.head("unet")
        y = maps[2]
        for stage, lateral, skip, side in zip(
            decoder.stages[:2], decoder.lateral, (maps[1], maps[0]), (4, 8), strict=True
        ):
            skip = F.interpolate(F.relu(lateral[0](skip)), size=(side, side), mode="bilinear")
            y = stage.conv2(stage.conv1(torch.cat([F.interpolate(y, scale_factor=2), skip], 1)))
        for stage in decoder.stages[2:]:
            y = stage.conv2(stage.conv1(F.interpolate(y, scale_factor=2)))
        torch.testing.assert_close(answer(model, x), decoder.fc(y))


class TestSizes:
    @pytest.mark.parametrize(
        "head",
        [
            UNetHead(),
            UNetHead(upsample="transposed", input_skip=True),
            RedNetHead(),
            RedNetHead(upsample="shuffle", residual=True),
        ],
    )
    @pytest.mark.parametrize(
        "name", ["test_resnet", "test_convnext", "test_efficientnet", "rednet_small"]
    )
    def test_convolutional(self, name, head):
        model = make((3, 4, 5), head, name=name, img_size=64).eval()
        with torch.no_grad():
            # it needs 32 px
            for size in ((97, 131), (33, 40) if name == "test_convnext" else (33, 17), (40, 72)):
                assert answer(model, images(*size)).shape == (2, 3, *size)

    @pytest.mark.parametrize("size", [(48, 80), (97, 131)])
    @pytest.mark.parametrize("kind", KINDS)
    def test_vit_of_any_size(self, kind, size):
        model = make(
            (2, 3, 4, 5),
            kind,
            name="test_vit",
            img_size=160,
            dynamic_img_size=True,
            dynamic_img_pad=True,
        )
        assert answer(model.eval(), images(*size)).shape == (2, 3, *size)

    @pytest.mark.parametrize("kind", KINDS)
    def test_dilated_backbone(self, kind):
        """Maps of one stride among others are merged at that size."""
        model = make((1, 2, 3, 4, 5), kind, output_stride=8)
        assert answer(model, images(33, 47)).shape == (2, 3, 33, 47)
        assert [step.stride for step in model.head(kind).steps][:4] == [8, 8, 4, 2]

    @pytest.mark.parametrize("kind", KINDS)
    def test_one_tap_at_full_size(self, kind):
        model = make((2,), kind, name="resnet18_cifar")
        assert answer(model, images(17, 9)).shape == (2, 3, 17, 9)


class TestTaps:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize(
        "taps", [(5,), (1, 5), (2, 4), ("layer1.0.conv1", 3, 5), (1, 2, 3, 4, 5)]
    )
    def test_any_subset_in_any_order(self, kind, taps):
        model, turned = make(taps, kind), make(tuple(reversed(taps)), kind)
        turned.load_state_dict(model.state_dict())
        x = images(32, 32)
        torch.testing.assert_close(answer(model, x), answer(turned, x))

    def test_maps_of_one_stride_with_a_module_path_go_by_the_order_given(self):
        model = make(("layer2.0.conv1", 3, 5), UNetHead(channels=(8,) * 5 + (4,)), output_stride=32)
        decoder = model.head("unet")
        assert [(step.stride, step.skip) for step in decoder.steps][:3] == [
            (16, None),
            (8, 0),
            (8, 1),
        ]
        assert decoder.order == [2, 1, 0]
        assert make((3, "layer2.0.conv1", 5)).head("unet").order == [2, 1, 0]

    def test_order_of_vit_blocks_is_that_of_their_depth(self):
        model, turned = make((2, 3, 5), name="test_vit"), make((5, 2, 3), name="test_vit")
        turned.load_state_dict(model.state_dict())
        x = images(32, 32)
        torch.testing.assert_close(answer(model, x), answer(turned, x))

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("which", [0, 1, 2])
    def test_every_map_is_used(self, kind, which):
        model = make(head=kind).eval()
        x = images(32, 32)
        maps = model.forward_taps(x)[kind]
        before = model.head(kind)(*maps, image=x)
        maps[which] = maps[which] + 1
        assert not torch.allclose(before, model.head(kind)(*maps, image=x))

    def test_beside_classifiers(self):
        model = make(
            [3, 5, (1, 2, 3, 4, 5)],
            ["pool", "pool", "unet"],
            [2, 10, 11],
            names=["coarse", "fine", "mask"],
        ).eval()
        x = images(32, 32)
        y = model(x)
        assert {name: tuple(v.shape) for name, v in y.items()} == {
            "coarse": (2, 2),
            "fine": (2, 10),
            "mask": (2, 11, 32, 32),
        }
        assert torch.equal(model(x, heads=["mask"])["mask"], y["mask"])
        assert model.get_classifier()["mask"] is model.head("mask").fc
        model.reset_classifier({"mask": 4})
        assert model(x)["mask"].shape == (2, 4, 32, 32)

    def test_maps_of_other_heads_stay_as_they_are(self):
        """No activation of the decoder works in place on a map that someone else reads."""
        model = make(
            [3, (3, 4, 5), (3, 4, 5)], ["pool", "rednet", "unet"], 3, names=["a", "b", "c"]
        ).eval()
        x = images(32, 32)
        together = model(x)
        for name in model.names:
            assert torch.equal(model(x, heads=[name])[name], together[name])


class TestOptions:
    @pytest.mark.parametrize("kind", KINDS)
    def test_residual(self, kind):
        """Output minus image is what the same decoder without residual says."""
        model, plain = make(head=KINDS[kind](residual=True)), make(head=kind)
        plain.load_state_dict(model.state_dict())
        x = images(33, 47)
        torch.testing.assert_close(answer(model, x) - x, answer(plain, x), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("kind", KINDS)
    def test_residual_starts_as_almost_the_image(self, kind):
        """What is restored is at first the image; else training begins with unlearning noise."""
        x = images(48, 40)
        model = make(head=KINDS[kind](residual=True, input_skip=True, norm="batchnorm2d"))
        change = (answer(model, x) - x).square().mean().sqrt()
        assert 0 < change < 0.25 * x.std()
        model.reset_classifier(3)
        assert (answer(model, x) - x).square().mean().sqrt() < 0.25 * x.std()

    def test_residual_needs_the_images_channels(self):
        with pytest.raises(ValueError, match="num_classes must be its 3 channels, got 1"):
            make(head=UNetHead(residual=True), num_classes=1)
        model = make(head=UNetHead(residual=True), num_classes=1, in_chans=1)
        assert answer(model, images(32, 32, chans=1)).shape == (2, 1, 32, 32)
        with pytest.raises(ValueError, match="num_classes must be its 1 channels, got 2"):
            model.reset_classifier(2)

    @pytest.mark.parametrize("kind", KINDS)
    def test_output_activation(self, kind):
        model, plain = make(head=KINDS[kind](out_act=("tanh", "sigmoid"))), make(head=kind)
        plain.load_state_dict(model.state_dict())
        x = images(32, 32)
        torch.testing.assert_close(answer(model, x), answer(plain, x).tanh().sigmoid())

    @pytest.mark.parametrize("kind", KINDS)
    def test_input_skip(self, kind):
        """With it the decoder sees the pixels themselves; without, nothing but the maps."""
        for with_skip in (True, False):
            model = make(head=KINDS[kind](input_skip=with_skip)).eval()
            x = images(32, 32)
            maps = model.forward_taps(x)[kind]
            other = x.clone()
            other[:, :, 16, 16] += 1
            changed = (
                model.head(kind)(*maps, image=x) != model.head(kind)(*maps, image=other)
            ).any(1)
            assert changed.any() == with_skip
            assert changed[:, 16, 16].all() == with_skip  # where the pixel is, and not far from it
            assert not changed[:, :8].any()

    @pytest.mark.parametrize("kind", KINDS)
    def test_deep_supervision(self, kind):
        """In training an answer of each stage before the last, at the size of the image.

        The main one is as without.
        """
        head = KINDS[kind](deep_supervision=True, out_act="tanh")
        model, plain = make(head=head), make(head=KINDS[kind](out_act="tanh"))
        plain.load_state_dict({k: v for k, v in model.state_dict().items() if ".aux." not in k})
        x = images(33, 47)
        decoder, found = model.head(kind), []
        for stage in decoder.stages:
            stage.register_forward_hook(lambda module, args, y: found.append(y))
        y = model.train()(x)
        stages = len(decoder.stages)
        assert list(y) == [kind, *(f"{kind}_aux{i}" for i in range(1, stages))]
        torch.testing.assert_close(y[kind], answer(plain.train(), x))
        for i in range(1, stages):
            coarse = decoder.aux[f"aux{i}"](found[i - 1])
            # the images are continued to a multiple of the coarsest stride, and the answer cut
            expected = F.interpolate(coarse, size=(64, 64), mode="bilinear").tanh()
            torch.testing.assert_close(y[f"{kind}_aux{i}"], expected[:, :, :33, :47])
        assert list(model.eval()(x)) == [kind]

    def test_bottleneck_is_all_that_passes(self):
        """Without skips the output is a function of the code.

        Where that is constant, all images give one output.
        """
        model = make((5,), RedNetHead(bottleneck=2)).eval()
        decoder = model.head("rednet")
        assert (decoder.bottleneck.encode.out_features, decoder.bottleneck.decode.in_features) == (
            2,
            2,
        )
        x = images(32, 32)
        assert not torch.equal(*answer(model, x))
        with torch.no_grad():
            decoder.bottleneck.encode.weight.zero_()
        assert torch.equal(*answer(model, x))

    def test_bottleneck_is_bound_to_its_size(self):
        model = make(head=UNetHead(bottleneck=2))
        with pytest.raises(
            ValueError, match="'stage5' was made for a map of 1x1, got 2x2.*img_size="
        ):
            model(images(64, 64))

    @pytest.mark.parametrize(
        "norm", ["batchnorm2d", "groupnorm", "groupnorm1", "layernorm2d", "rmsnorm2d", None]
    )
    @pytest.mark.parametrize("kind", KINDS)
    def test_norms(self, kind, norm):
        """Of every width; those over one image do not depend on batch mates."""
        model = make(
            head=KINDS[kind](
                norm=norm, act="silu", channels=(24, 12, 10, 6, 6)[: 5 if kind == "unet" else 4]
            )
        )
        decoder, x = model.head(kind), images(32, 32)
        maps = model.eval().forward_taps(x)[kind]
        decoder.train()
        alone = decoder(*(y[:1] for y in maps), image=x[:1])
        same = torch.allclose(decoder(*maps, image=x)[:1], alone, rtol=1e-4, atol=1e-5)
        assert same == (norm != "batchnorm2d")

    @pytest.mark.parametrize("kind", KINDS)
    def test_dropout(self, kind):
        decoder = make(head=kind, drop_rate=0.25).head(kind)
        assert decoder.drop.p == 0.25
        assert make(head=KINDS[kind](drop_rate=0.5), drop_rate=0.25).head(kind).drop.p == 0.5

    @pytest.mark.parametrize("kind", KINDS)
    def test_no_classes(self, kind):
        model = make(head=kind, num_classes=0)
        assert answer(model, images(33, 47)).shape == (2, model.head(kind).num_features, 33, 47)
        model.double().reset_classifier(5)
        y = answer(model, images(33, 47).double())
        assert y.shape == (2, 5, 33, 47)
        assert y.dtype == torch.float64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"channels": (8, 8)},
            r"one width per decoder stage, here 5 \(at strides 16, 8, 4, 2, 1\), got \(8, 8\)",
        ),
        ({"channels": ()}, "widths of the decoder stages"),
        ({"channels": (8, 8, 0, 8, 8)}, "widths of the decoder stages"),
        ({"channels": (8, 8, True, 8, 8)}, "widths of the decoder stages"),
        ({"norm": "layernorm"}, "norm= must be None or one of 'batchnorm2d'"),
        ({"act": "rellu"}, "act= takes timm's names of activations.*'rellu'"),
        ({"act": ""}, "act= takes timm's names"),
        ({"out_act": ("sigmoid", None)}, "out_act= takes timm's names"),
        ({"upsample": "bicubic"}, "upsample= must be one of 'nearest', .*'bicubic'"),
        ({"bottleneck": 0}, "bottleneck= takes the size of the code.*got 0"),
        ({"bottleneck": 0.5}, "bottleneck= takes the size of the code"),
        ({"drop_rate": 1}, r"drop_rate= must be in \[0, 1\)"),
        ({"skips": True}, "unexpected keyword argument 'skips'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        make(head={"kind": "unet", **options})


@pytest.mark.parametrize(
    ("taps", "head", "message"),
    [
        ((5,), UNetHead(attention=True), "attention= has no effect on a decoder without skips"),
        (
            (1,),
            UNetHead(deep_supervision=True),
            "deep_supervision= has no effect on a decoder of fewer than two stages",
        ),
        ((1, 5), RedNetHead(channels=(8,) * 5), "here 4 "),
    ],
)
def test_options_without_effect(taps, head, message):
    with pytest.raises(ValueError, match=message):
        make(taps, head)


class TestFiles:
    HEAD = {
        "channels": [16, 8, 8, 4],
        "norm": "groupnorm",
        "act": "gelu",
        "upsample": "bilinear",
        "attention": True,
        "bottleneck": 4,
        "residual": True,
        "out_act": ["tanh"],
        "deep_supervision": True,
        "drop_rate": 0.5,
    }

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("options", [{}, HEAD, {"input_skip": True, "out_act": "sigmoid"}])
    def test_json(self, kind, options):
        head = KINDS[kind](**options)
        read = parse_head(json.loads(json.dumps(head_to_dict(head))))
        assert read == head
        assert type(read) is type(head) is HEADS[kind]
        assert hash(read) == hash(head)

    def test_round_trip(self, tmp_path):
        model = make(
            [4, (1, 5, Tap(3, detach=True))],
            ["pool", RedNetHead(**self.HEAD)],
            names=["label", "image"],
        )
        save_model(model, tmp_path / "model.safetensors")
        read = load_model(tmp_path / "model.safetensors")
        assert read.head_specs == model.head_specs
        x = images(32, 32)
        for name, y in model.eval()(x).items():
            assert torch.equal(read.eval()(x)[name], y)

    def test_names_of_parameters(self):
        """Files depend on them."""
        decoder = make(
            (4, 5),
            UNetHead(
                channels=(8,) * 5,
                upsample="transposed",
                attention=True,
                input_skip=True,
                bottleneck=2,
                deep_supervision=True,
            ),
        ).head("unet")
        conv = {"0.weight", "1.weight", "1.bias"}
        expected = {f"stem.{k}" for k in conv} | {"fc.weight", "fc.bias"}
        expected |= {
            f"bottleneck.{part}.{k}" for part in ("encode", "decode") for k in ("weight", "bias")
        }
        expected |= {f"aux.aux{i}.{k}" for i in range(1, 5) for k in ("weight", "bias")}
        for i in range(5):
            expected |= {f"stages.{i}.conv{c}.{k}" for c in (1, 2) for k in conv}
            expected |= {f"stages.{i}.up.conv.{k}" for k in ("weight", "bias")}
        for i in (0, 4):
            expected |= {
                f"stages.{i}.gate.{k}"
                for k in ("skip.weight", "gate.weight", "gate.bias", "psi.weight", "psi.bias")
            }
        assert {name for name, _ in decoder.named_parameters()} == expected


def test_frozen_backbone_trains_the_decoder():
    model = make().freeze().train()
    answer(model, images(32, 32)).sum().backward()
    assert all(p.grad is None for p in model.backbone.parameters())
    assert all(p.grad is not None for p in model.heads.parameters())
