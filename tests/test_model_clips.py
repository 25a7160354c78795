"""Clips through a branch model: one backbone pass, padding that changes nothing, mixed heads."""

import copy
import warnings

import pytest
import torch

from timm_branches import UNetHead, create_branch_model
from timm_branches.heads import GRUHead, LSTMHead


def clips(batch=3, time=4, seed=0):
    return torch.randn(batch, time, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def mixed(seed=0, **kwargs):
    torch.manual_seed(seed)
    return create_branch_model(
        "test_resnet",
        taps=[3, 5, 5, 5],
        names=["coarse", "clip", "both", "frame"],
        num_classes=[2, 3, 4, 5],
        head=[
            "pool",
            LSTMHead(hidden_size=6, num_layers=2),
            GRUHead(hidden_size=5, bidirectional=True),
            GRUHead(hidden_size=7, output="frame"),
        ],
        img_size=32,
        **kwargs,
    )


def backbone_calls(model):
    sizes = []
    model.backbone.conv1.register_forward_pre_hook(lambda m, args: sizes.append(len(args[0])))
    return sizes


class TestShapes:
    def test_mixed_heads(self):
        model = mixed().eval()
        sizes = backbone_calls(model)
        assert {k: tuple(v.shape) for k, v in model(clips()).items()} == {
            "coarse": (3, 4, 2),
            "clip": (3, 3),
            "both": (3, 4),
            "frame": (3, 4, 5),
        }
        assert sizes == [12]  # all frames of all clips in one pass

    def test_frames_of_an_image_head(self):
        model = mixed().eval()
        x = clips()
        y = model(x)["coarse"]
        for t in range(4):
            torch.testing.assert_close(y[:, t], model(x[:, t], heads=["coarse"])["coarse"])

    def test_as_deep_as_needed(self):
        model = mixed().eval()
        ran = []
        model.backbone.layer4.register_forward_hook(lambda *args: ran.append(1))
        assert list(model(clips(), heads=["coarse"])) == ["coarse"]
        assert not ran
        assert list(model(clips(), heads=["frame", "coarse"])) == ["coarse", "frame"]
        assert ran

    @pytest.mark.parametrize("name", ["test_vit", "test_convnext", "test_efficientnet"])
    def test_other_backbones(self, name):
        torch.manual_seed(0)
        size = 160 if name == "test_vit" else 32
        model = create_branch_model(
            name, taps=[3, 5], head=["pool", LSTMHead(hidden_size=4)], num_classes=2
        ).eval()
        x = torch.randn(2, 3, 3, size, size)
        y = model(x, lengths=[3, 1])
        assert [tuple(v.shape) for v in y.values()] == [(2, 3, 2), (2, 2)]
        torch.testing.assert_close(y["stage5"][1:], model(x[1:, :1])["stage5"])

    def test_statistics_in_training(self):
        """In training, too, all frames share one batch.

        BatchNorm's statistics are those of all frames.
        """
        model, twin = mixed().train(), mixed().train()
        x = clips()
        model(x)
        twin.forward_taps(x.flatten(0, 1))
        assert torch.equal(model.backbone.bn1.running_mean, twin.backbone.bn1.running_mean)


class TestRefused:
    @pytest.mark.parametrize(
        ("shape", "message"),
        [
            ((2, 3, 32, 32), r"heads \['both', 'clip', 'frame'\] read clips .*x\[:, None\]"),
            ((2, 3, 4, 32, 32), r"expected clips \(B, T, 3, H, W\).*transpose\(1, 2\)"),
            ((2, 4, 1, 32, 32), r"expected clips \(B, T, 3, H, W\), got \(2, 4, 1, 32, 32\)"),
            ((2, 0, 3, 32, 32), "have no frames"),
            ((3, 32, 32), r"expected images \(B, 3, H, W\)"),
        ],
    )
    def test_shape(self, shape, message):
        with pytest.raises(ValueError, match=message):
            mixed()(torch.zeros(shape))

    @pytest.mark.parametrize(
        ("lengths", "message"),
        [
            (torch.tensor([0, 1, 2]), r"from 1 to 4.*got \[0, 1, 2\]"),
            (torch.tensor([5, 1, 2]), "from 1 to 4"),
            (torch.tensor([-1, 1, 2]), "from 1 to 4"),
            (torch.tensor([1, 2]), r"\(3,\).*int64 \(2,\)"),
            (torch.tensor([1.0, 2.0, 3.0]), "float32"),
            (torch.tensor([True, True, False]), "bool"),
            (torch.ones(3, 4), r"float32 \(3, 4\)"),
            (torch.ones(3, 5, dtype=torch.bool), r"bool \(3, 5\)"),
            (torch.tensor([[True, False, True, False]] * 3), "holes"),
            (torch.tensor([[False, True, True, True]] * 3), "holes"),
            (torch.zeros(3, 4, dtype=torch.bool), "from 1 to 4"),
            (torch.ones(3, dtype=torch.int64, device="meta"), "is on meta, the clips are on cpu"),
        ],
    )
    def test_lengths(self, lengths, message):
        with pytest.raises(ValueError, match=message):
            mixed()(clips(), lengths=lengths)

    def test_lengths_of_images(self):
        with pytest.raises(ValueError, match="lengths= belongs to clips"):
            mixed()(torch.zeros(2, 3, 32, 32), heads=["coarse"], lengths=[1, 1])

    @pytest.mark.parametrize("value", [0, -1, 1.5, True])
    def test_frames_per_pass(self, value):
        with pytest.raises(ValueError, match="frames_per_pass"):
            mixed().frames_per_pass = value


class TestPadding:
    LENGTHS = [4, 1, 3]

    @pytest.mark.parametrize(
        "given",
        [
            LENGTHS,
            torch.tensor(LENGTHS, dtype=torch.int32),
            torch.arange(4) < torch.tensor(LENGTHS)[:, None],
        ],
    )
    def test_each_clip_alone(self, given):
        """Whatever lies behind the length, NaN included, and whoever shares the batch."""
        model = mixed().eval()
        x = clips()
        for b, n in enumerate(self.LENGTHS):
            x[b, n:] = float("nan")
        y = model(x, lengths=given)
        for b, n in enumerate(self.LENGTHS):
            alone = model(x[b : b + 1, :n])
            for name in ("clip", "both"):
                torch.testing.assert_close(y[name][b], alone[name][0])
            for name in ("coarse", "frame"):
                torch.testing.assert_close(y[name][b, :n], alone[name][0])
                assert torch.equal(y[name][b, n:], torch.zeros(4 - n, y[name].shape[2]))

    def test_padding_is_not_computed(self):
        model = mixed().eval()
        sizes = backbone_calls(model)
        model(clips(), lengths=self.LENGTHS)
        assert sizes == [8]

    def test_training(self):
        """Statistics and gradients do not see the padding either."""
        model = mixed().train()
        twin = copy.deepcopy(model)
        x = clips()
        for m, padding in ((model, 0.0), (twin, 100.0)):
            z = x.clone()
            for b, n in enumerate(self.LENGTHS):
                z[b, n:] = padding
            sum(y.square().sum() for y in m(z, lengths=self.LENGTHS).values()).backward()
        for (name, a), b in zip(model.named_buffers(), twin.buffers(), strict=True):
            assert torch.equal(a, b), name
        for (name, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
            assert torch.equal(a.grad, b.grad), name
            assert a.grad.isfinite().all(), name

    def test_whole_clips(self):
        model = mixed().eval()
        y = model(clips(), lengths=[4, 4, 4])
        for name, expected in model(clips()).items():
            torch.testing.assert_close(y[name], expected)

    def test_gradient_reaches_valid_frames_only(self):
        model = mixed().eval()
        x = clips().requires_grad_()
        model(x, lengths=self.LENGTHS)["clip"].sum().backward()
        reached = x.grad.flatten(2).abs().sum(2) > 0
        assert torch.equal(reached, torch.arange(4) < torch.tensor(self.LENGTHS)[:, None])


class TestFramesPerPass:
    @pytest.mark.parametrize(
        ("per_pass", "sizes"), [(5, [5, 3]), (1, [1] * 8), (8, [8]), (100, [8])]
    )
    def test_same_result(self, per_pass, sizes):
        model = mixed().eval()
        expected = model(clips(), lengths=[4, 1, 3])
        model.frames_per_pass = per_pass
        seen = backbone_calls(model)
        y = model(clips(), lengths=[4, 1, 3])
        assert seen == sizes
        for name in expected:
            torch.testing.assert_close(y[name], expected[name])

    def test_batch_statistics(self):
        model = mixed().train()
        model.frames_per_pass = 3
        with pytest.warns(UserWarning, match="BatchNorm of the backbone is in training"):
            model(clips())
        model.freeze()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(clips())


def test_dense_heads_get_the_images():
    """A dense head is called with the folded frames beside its map, and its maps are unfolded."""
    from dataclasses import dataclass
    from typing import ClassVar

    from timm_branches import heads

    @dataclass(frozen=True)
    class Sum(heads.Head):
        kind: ClassVar[str] = "sum"
        dense: ClassVar[bool] = True

        def build(self, taps, num_classes, drop_rate=None, in_chans=0):
            assert in_chans == 3
            return SumModule()

    class SumModule(torch.nn.Module):
        num_classes = 3
        fc = torch.nn.Identity()

        def reset_classifier(self, num_classes):
            raise AssertionError

        def forward(self, y, image):
            return image + y.mean((1, 2, 3), keepdim=True)

    model = create_branch_model(
        "test_resnet",
        taps=[5, 5],
        names=["map", "clip"],
        num_classes=3,
        head=[Sum(), LSTMHead(hidden_size=4)],
    ).eval()
    x = clips()
    y = model(x, lengths=[4, 1, 3])["map"]
    assert y.shape == x.shape
    assert not y[1, 1:].any()
    image = model(x[:, 0], heads=["map"])["map"]
    torch.testing.assert_close(y[:, 0], image)
    torch.testing.assert_close(
        image - x[:, 0],
        model.forward_taps(x[:, 0])["map"].mean((1, 2, 3), keepdim=True).expand_as(image),
    )


def test_autocast():
    model = mixed().eval()
    with torch.autocast("cpu", torch.bfloat16):
        y = model(clips(), lengths=[4, 1, 3])
    for name, expected in model(clips(), lengths=[4, 1, 3]).items():
        torch.testing.assert_close(y[name].float(), expected, rtol=0.1, atol=0.05)


def test_deep_supervision_on_clips():
    model = create_branch_model(
        "test_resnet", taps=[3, 4, 5], head=UNetHead(deep_supervision=True), num_classes=2
    )
    x = torch.randn(2, 3, 3, 64, 64)
    outputs = model.train()(x, lengths=[3, 1])
    # a stage for each doubling from stride 32
    assert set(outputs) == {"unet", *(f"unet_aux{i}" for i in range(1, 5))}
    for y in outputs.values():
        assert y.shape == (2, 3, 2, 64, 64)
        assert not y[1, 1:].any()
    assert list(model.eval()(x)) == ["unet"]
