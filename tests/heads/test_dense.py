"""Decoders without skips: against segmentation_models_pytorch, against formulas, on ViTs."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from timm_branches import create_branch_model
from timm_branches.gradients import check_model, path_gradients
from timm_branches.heads import (
    DPTHead,
    FPNHead,
    LeanHead,
    LinearHead,
    SegformerHead,
    UPerNetHead,
)
from timm_branches.heads.dense import pyramid_scales
from timm_branches.inference.export import export_model

K = 5
CHANNELS = {4: 12, 8: 16, 16: 20, 32: 24}  # by stride
HEADS = {
    "linear": LinearHead(),
    "linear-norm": LinearHead(norm="batchnorm2d"),
    "lean": LeanHead(channels=8),
    "segformer": SegformerHead(channels=8),
    "fpn": FPNHead(channels=8, branch_channels=6),
    "upernet": UPerNetHead(channels=8),
    "dpt": DPTHead(channels=8, reassemble=(4, 5, 6, 7)),
}


def taps(strides=CHANNELS, size=64):
    """Taps with these strides, shallowest first."""
    found = []
    for number, stride in enumerate(strides):
        tap = SimpleNamespace(name=f"s{stride}")
        stage = SimpleNamespace(index=number + 2)
        found.append(
            SimpleNamespace(
                channels=CHANNELS.get(stride, 24),
                size=(size // stride, size // stride),
                stride=stride,
                tap=tap,
                stage=stage,
            )
        )
    return found


def maps(size=64, strides=CHANNELS):
    generator = torch.Generator().manual_seed(1)
    shapes = [(2, CHANNELS.get(s, 24), size // s, size // s) for s in strides]
    return [torch.randn(shape, generator=generator) for shape in shapes]


def build(head, num_classes=K, **options):
    torch.manual_seed(0)
    module = head.build(taps(**options), num_classes)
    for p in module.parameters():
        with torch.no_grad():
            p.add_(0.1 * torch.randn_like(p))
    return module


def copy_in_order(ours, theirs):
    """The tensors of ours, one after the other, into theirs."""
    state = theirs.state_dict()
    own = list(ours.state_dict().values())
    assert len(own) == len(state)
    for key, value in zip(state, own, strict=True):
        state[key] = value.reshape(state[key].shape)
    theirs.load_state_dict(state)


@pytest.fixture
def smp(monkeypatch):
    """Smp, whose FPN and DPT enlarge between corners; here between centres, as ours do."""
    module = pytest.importorskip("segmentation_models_pytorch")
    interpolate = F.interpolate

    def between_centres(*args, **kwargs):
        if kwargs.get("align_corners"):
            kwargs["align_corners"] = False
        return interpolate(*args, **kwargs)

    monkeypatch.setattr(F, "interpolate", between_centres)
    return module


def check_against(ours, theirs, features, training=True):
    """The map before the last layer, in training and in evaluation."""
    for mode in (training, False):
        ours.train(mode)
        theirs.train(mode)
        own = ours.decode(features[::-1])
        expected = theirs([x.clone() for x in features])
        torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-4)


class TestAgainstSmp:
    def test_segformer(self, smp):
        from segmentation_models_pytorch.decoders.segformer.decoder import SegformerDecoder

        ours = build(HEADS["segformer"])
        theirs = SegformerDecoder([3, 0, *CHANNELS.values()], segmentation_channels=8)
        copy_in_order(torch.nn.ModuleList([ours.lateral, ours.fuse]), theirs)
        ours.train()
        theirs.train()
        features = maps()
        image, empty = torch.zeros(2, 3, 64, 64), torch.zeros(2, 0, 32, 32)
        for mode in (True, False):
            ours.train(mode), theirs.train(mode)
            expected = theirs([image, empty, *features])
            torch.testing.assert_close(ours.decode(features[::-1]), expected, rtol=1e-4, atol=1e-4)

    def test_fpn(self, smp):
        from segmentation_models_pytorch.decoders.fpn.decoder import FPNDecoder

        ours = build(FPNHead(channels=8, branch_channels=32))
        theirs = FPNDecoder(
            [3, 4, *CHANNELS.values()], pyramid_channels=8, segmentation_channels=32, dropout=0
        )
        copy_in_order(torch.nn.ModuleList([ours.lateral, ours.branches]), theirs)
        check_against(ours, theirs, maps())

    def test_upernet(self, smp):
        from segmentation_models_pytorch.decoders.upernet.decoder import UPerNetDecoder

        ours = build(HEADS["upernet"])
        theirs = UPerNetDecoder([3, 4, *CHANNELS.values()], decoder_channels=8)
        # theirs begin with the shallowest map
        norms = torch.nn.ModuleList(list(ours.norms)[::-1])
        order = [norms, ours.pool, ours.lateral, ours.smooth, ours.fuse]
        copy_in_order(torch.nn.ModuleList(order), theirs)
        empty = [torch.zeros(2, 3, 64, 64), torch.zeros(2, 4, 32, 32)]
        features = maps()
        for mode in (True, False):
            ours.train(mode), theirs.train(mode)
            expected = theirs([*empty, *[x.clone() for x in features]])
            torch.testing.assert_close(ours.decode(features[::-1]), expected, rtol=1e-4, atol=1e-4)

    def test_dpt(self, smp):
        """Tokens of 16 pixels, four maps of one size."""
        from segmentation_models_pytorch.decoders.dpt.decoder import (
            DPTDecoder,
            DPTSegmentationHead,
        )

        strides = [16] * 4
        ours = build(HEADS["dpt"], strides=strides)
        theirs = DPTDecoder([20] * 4, strides, False, "ignore", (4, 5, 6, 7), 8)
        head = DPTSegmentationHead(8, K)
        with torch.no_grad():
            # theirs begin with the shallowest map
            reassemble = torch.nn.ModuleList(list(ours.reassemble)[::-1])
            copy_in_order(reassemble, theirs.reassemble_blocks)
            for number, block in enumerate(theirs.fusion_blocks):
                parts = [ours.refine[number], ours.fuse[number], ours.project[number]]
                copy_in_order(torch.nn.ModuleList(parts), block)
            copy_in_order(torch.nn.ModuleList([ours.last, ours.fc]), head)
        features = maps(strides=strides)
        image = torch.zeros(2, 3, 64, 64)
        for mode in (True, False):
            ours.train(mode), theirs.train(mode), head.train(mode)
            head.head[3].eval()  # dropout, which ours has on request
            expected = head(theirs(features, [None] * 4))
            own = ours(*features, image=image)
            torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-4)


class TestByHand:
    def test_linear(self):
        """The maps side by side at the size of the finest, one convolution, the image's size."""
        module = build(HEADS["linear"]).eval()
        features = maps()
        large = [F.interpolate(x, (16, 16), mode="bilinear") for x in features[::-1]]
        y = F.conv2d(torch.cat(large, 1), module.fc.weight, module.fc.bias)
        expected = F.interpolate(y, (64, 64), mode="bilinear")
        image = torch.zeros(2, 3, 64, 64)
        torch.testing.assert_close(module(*features, image=image), expected, rtol=1e-4, atol=1e-5)
        module.reset_classifier(0)
        own = module(*features, image=image)
        assert own.shape == (2, sum(CHANNELS.values()), 64, 64)
        expected = F.interpolate(torch.cat(large, 1), (64, 64), mode="bilinear")
        torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-5)

    def test_lean(self):
        module = build(HEADS["lean"]).eval()
        features = maps()
        total = 0
        for conv, x in zip(module.lateral, features[::-1], strict=True):
            total = total + conv(F.interpolate(x, (16, 16), mode="bilinear"))
        y = module.fc(module.fuse(total))
        expected = F.interpolate(y, (64, 64), mode="bilinear")
        image = torch.zeros(2, 3, 64, 64)
        torch.testing.assert_close(module(*features, image=image), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("strides", "expected"),
    [
        ([16] * 4, [0.5, 1, 2, 4]),
        ([14] * 4, [0.5, 1, 2, 4]),
        ([14] * 2, [2, 4]),
        ([8] * 3, [0.5, 1, 2]),
        ([16], [1]),
        ([4, 4], [1, 1]),
        ([32, 16, 8, 4], [1, 1, 1, 1]),
        ([32, 32, 16], [1, 1, 1]),
    ],
)
def test_pyramid(strides, expected):
    assert pyramid_scales([SimpleNamespace(stride=stride) for stride in strides]) == expected


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 1, 0, 2)])
def test_order_of_the_taps(kind, order):
    """Whatever the order they are named in, each map goes where it belongs."""
    sorted_taps = taps()
    torch.manual_seed(0)
    module = HEADS[kind].build([sorted_taps[i] for i in order], K).eval()
    torch.manual_seed(0)
    straight = HEADS[kind].build(sorted_taps, K).eval()
    features, image = maps(), torch.zeros(2, 3, 64, 64)
    y = module(*[features[i] for i in order], image=image)
    assert torch.equal(y, straight(*features, image=image))


@pytest.mark.parametrize("kind", HEADS)
class TestEverywhere:
    @pytest.mark.parametrize(
        ("name", "taps"),
        [
            ("test_vit", [2, 3, 4, 5]),
            ("test_convnext", [2, 3, 4, 5]),
            ("test_resnet", [2, 3, 4, 5]),
            ("vit_tiny_patch16_224", [2, 3, 4, 5]),
        ],
    )
    def test_backbones(self, kind, name, taps):
        torch.manual_seed(0)
        options = {"img_size": 64} if "vit" in name else {}
        model = create_branch_model(name, taps=[taps], head=HEADS[kind], num_classes=K, **options)
        x = torch.randn(2, 3, 64, 64)
        (y,) = model(x).values()
        assert y.shape == (2, K, 64, 64)
        y.square().sum().backward()
        silent = [n for n, p in model.heads.named_parameters() if p.grad is None]
        assert not silent

    def test_onnx(self, kind, tmp_path):
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
        torch.manual_seed(0)
        model = create_branch_model(
            "test_convnext", taps=[[2, 3, 4, 5]], head=HEADS[kind], num_classes=K, img_size=64
        )
        written = export_model(model, tmp_path / "model.onnx")
        assert written.difference < 1e-4
        # means over regions need the size of the map
        assert (written.input[1][2] == "height") == (kind != "upernet")

    def test_doctor(self, kind):
        torch.manual_seed(0)
        model = create_branch_model(
            "test_resnet", taps=[[2, 3, 4, 5]], head=HEADS[kind], num_classes=K, img_size=64
        )
        x = torch.randn(2, 3, 64, 64)
        target = torch.randint(K, (2, 64, 64), generator=torch.Generator().manual_seed(0))

        def loss(output, y):
            (z,) = output.values()
            return F.cross_entropy(z, y)

        assert check_model(model, (x, target), loss).problems == []

    def test_tap_that_is_ignored(self, kind):
        """The routes of the gradient tell of a map that the decoder does not use."""
        torch.manual_seed(0)
        model = create_branch_model(
            "test_resnet", taps=[[2, 3, 4, 5]], head=HEADS[kind], num_classes=K, img_size=64
        )
        (name,) = model.names
        x, target = torch.randn(2, 3, 64, 64), torch.randint(K, (2, 64, 64))

        def loss(output, y):
            z = output[name] if isinstance(output, dict) else output
            return F.cross_entropy(z, y)

        sound = path_gradients(model, (x, target), loss)
        assert not [text for text in sound.findings if "stage3" in text]
        head = model.head(name)
        forward = head.forward
        head.forward = lambda *maps, image: forward(
            maps[0], torch.zeros_like(maps[1]), *maps[2:], image=image
        )
        found = path_gradients(model, (x, target), loss)
        assert any("stage3" in text for text in found.findings), found


@pytest.mark.parametrize(
    ("make_wrong", "words"),
    [
        (lambda: LeanHead(channels=0), "channels= takes"),
        (lambda: LinearHead(norm="batch"), "norm= must be None or one of"),
        (lambda: SegformerHead(act="reluu"), "act= takes timm's names"),
        (lambda: FPNHead(branch_channels=1.5), "branch_channels= takes"),
        (lambda: UPerNetHead(drop_rate=1), "drop_rate= must be"),
        (lambda: DPTHead(reassemble=256), "reassemble= takes a list"),
        (lambda: DPTHead(reassemble=(4, 0)), "reassemble= takes widths"),
        (lambda: DPTHead(reassemble=(4, 5)).build(taps(), K), "one width a tap, here 4"),
    ],
)
def test_refused(make_wrong, words):
    with pytest.raises(ValueError, match=words):
        make_wrong()
