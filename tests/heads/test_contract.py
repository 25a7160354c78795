"""Every head of the package, and heads as others would write them, held to the contract."""

import json
import sys
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from tests.heads.tester import HeadTester
from timm_branches import create_branch_model, heads, load_model, save_model
from timm_branches.heads import (
    HEADS,
    AttentionHead,
    FlattenHead,
    GRUHead,
    Head,
    LSTMHead,
    MeanHead,
    MinGRUHead,
    PoolHead,
    RedNetHead,
    TCNHead,
    TransformerHead,
    UNetHead,
    parse_head,
    register_head,
)
from timm_branches.weights import digest_tensors


class TestPoolHead(HeadTester):
    head = PoolHead(hidden=(8,))


class TestFlattenHead(HeadTester):
    head = FlattenHead(hidden=(8, 8))
    any_size = False


class TestLSTMHead(HeadTester):
    head = LSTMHead(hidden_size=5, num_layers=2)


class TestLSTMHeadOfFrames(HeadTester):
    head = LSTMHead(hidden_size=5, output="frame")
    answers = "frame"


class TestGRUHead(HeadTester):
    head = GRUHead(hidden_size=5, projection=6)


class TestAttentionReadout(HeadTester):
    head = GRUHead(hidden_size=5, readout="attention", bidirectional=True)
    streams = False


class TestMinGRUHead(HeadTester):
    head = MinGRUHead(hidden_size=5, num_layers=2)


class TestMinGRUHeadOfFrames(HeadTester):
    head = MinGRUHead(hidden_size=5, projection=6, output="frame")
    answers = "frame"


class TestMinGRUHeadBothWays(HeadTester):
    head = MinGRUHead(hidden_size=5, bidirectional=True, readout="mean")
    streams = False


class TestMeanHead(HeadTester):
    head = MeanHead()


class TestMeanHeadOfFrames(HeadTester):
    head = MeanHead(hidden=(7,), pool_type="max", output="frame")
    answers = "frame"


class TestAttentionHead(HeadTester):
    head = AttentionHead(hidden_size=8, num_heads=2)


class TestAttentionHeadOfFrames(HeadTester):
    head = AttentionHead(hidden_size=8, num_heads=4, mlp_ratio=0, output="frame")
    answers = "frame"


class TestTransformerHead(HeadTester):
    head = TransformerHead(hidden_size=8, num_heads=2, max_frames=4)
    streams = False


class TestTransformerHeadOfFrames(HeadTester):
    head = TransformerHead(hidden_size=8, num_heads=2, num_layers=2, mlp_ratio=2, output="frame")
    answers = "frame"
    streams = False


class TestTransformerHeadOfPositions(HeadTester):
    head = TransformerHead(hidden_size=8, num_heads=2, pool_type="none")
    streams = False


class TestCausalTransformerHead(HeadTester):
    head = TransformerHead(hidden_size=8, num_heads=2, num_layers=2, causal=True, max_frames=3)


class TestCausalTransformerHeadOfFrames(HeadTester):
    head = TransformerHead(hidden_size=8, num_heads=2, mlp_ratio=2, causal=True, output="frame")
    answers = "frame"


class TestCausalTransformerHeadOfPositions(HeadTester):
    head = TransformerHead(
        hidden_size=8, num_heads=2, causal=True, pool_type="none", output="frame"
    )
    answers = "frame"
    streams = False


class TestTCNHead(HeadTester):
    head = TCNHead(hidden_size=6, num_layers=2)


class TestTCNHeadOfFrames(HeadTester):
    head = TCNHead(hidden_size=6, kernel_size=2, output="frame", hidden=(5,))
    answers = "frame"


class TestTCNHeadOfAllFrames(HeadTester):
    head = TCNHead(hidden_size=6, readout="max")
    streams = False


class TestUNetHead(HeadTester):
    head = UNetHead(input_skip=True)


class TestRedNetHead(HeadTester):
    head = RedNetHead()


class TestLinearDecoder(HeadTester):
    head = heads.LinearHead()


class TestLinearDecoderWithNorm(HeadTester):
    head = heads.LinearHead(norm="batchnorm2d")
    taps = (5, 3, 4)


class TestLeanHead(HeadTester):
    head = heads.LeanHead(channels=8)


class TestSegformerHead(HeadTester):
    head = heads.SegformerHead(channels=8)
    taps = (2, 3, 4, 5)


class TestFPNHead(HeadTester):
    head = heads.FPNHead(channels=8, branch_channels=6)
    taps = (2, 3, 4, 5)


class TestFPNHeadOfOneMap(HeadTester):
    head = heads.FPNHead(channels=8)
    taps = (4,)


class TestUPerNetHead(HeadTester):
    head = heads.UPerNetHead(channels=8)
    taps = (5, 2, 3)


class TestDPTHead(HeadTester):
    head = heads.DPTHead(channels=8, reassemble=(4, 5))


# ---- from outside


class LinearModule(nn.Module):
    """A classifier: mean of the map, one Linear."""

    def __init__(self, channels, num_classes):
        super().__init__()
        self.channels = channels
        self.reset_classifier(num_classes)

    def reset_classifier(self, num_classes):
        self.num_classes = num_classes
        self.fc = nn.Linear(self.channels, num_classes)

    def forward(self, x):
        return self.fc(x.mean((2, 3)))


@register_head
@dataclass(frozen=True)
class LinearHead(Head):
    kind: ClassVar[str] = "test-linear"
    scale: float = 1.0

    def build(self, taps, num_classes, drop_rate=None, in_chans=3):
        return LinearModule(taps[0].channels, num_classes)


class TestOutsideClassifier(HeadTester):
    head = LinearHead(scale=2.0)


class RunningMean(nn.Module):
    """A temporal head: the mean of all frames so far; its state is sum, number and calls."""

    def __init__(self, channels, num_classes):
        super().__init__()
        self.channels = channels
        self.to_vector = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.reset_classifier(num_classes)

    def reset_classifier(self, num_classes):
        self.num_classes = num_classes
        self.fc = nn.Linear(self.channels, num_classes)

    def forward(self, x, clips, state=None):
        y = clips.unfold(self.to_vector(x))  # (B, T, C), 0 behind the lengths
        total, count, steps = self.zero_state(len(y)) if state is None else state
        lengths = torch.full((len(y),), y.shape[1]) if clips.lengths is None else clips.lengths
        total = total + y.sum(1)[None]
        count = count + lengths.to(y)[None, :, None]
        return self.fc((total / count)[0]), (total, count, steps + 1)

    def zero_state(self, batch_size):
        zeros = self.fc.weight.new_zeros
        one = zeros(1, batch_size, 1)
        return zeros(1, batch_size, self.channels), one, one.clone()

    def check_stream(self, name, batch_size, state=None):
        if state is not None and state[0].shape[1] != batch_size:
            raise ValueError("another batch")


@register_head
@dataclass(frozen=True)
class RunningMeanHead(Head):
    kind: ClassVar[str] = "test-running-mean"
    temporal: ClassVar[bool] = True

    def build(self, taps, num_classes, drop_rate=None, in_chans=3):
        return RunningMean(taps[0].channels, num_classes)


class TestOutsideTemporalHead(HeadTester):
    head = RunningMeanHead()

    def test_state_names(self):
        from timm_branches.inference import StreamingStep

        names = StreamingStep(self.make()).state_names
        assert names == ["stage5_state0", "stage5_state1", "stage5_state2"]


class SumDecoderModule(nn.Module):
    """A decoder: each map by a 1x1 convolution, resized to the image, summed."""

    def __init__(self, channels, num_classes):
        super().__init__()
        self.channels = channels
        self.reset_classifier(num_classes)

    def reset_classifier(self, num_classes):
        self.num_classes = num_classes
        self.fc = nn.ModuleList(nn.Conv2d(c, num_classes, 1) for c in self.channels)

    def forward(self, *maps, image):
        size = image.shape[2:]
        layers = [nn.functional.interpolate(f(x), size) for f, x in zip(self.fc, maps, strict=True)]
        return sum(layers)


@register_head
@dataclass(frozen=True)
class SumDecoder(Head):
    kind: ClassVar[str] = "test-sum-decoder"
    multi_tap: ClassVar[bool] = True
    dense: ClassVar[bool] = True

    def build(self, taps, num_classes, drop_rate=None, in_chans=3):
        return SumDecoderModule([tap.channels for tap in taps], num_classes)


class TestOutsideDecoder(HeadTester):
    head = SumDecoder()


@dataclass(frozen=True)
class Unregistered(LinearHead):
    kind: ClassVar[str] = "test-unregistered"


class TestUnregistered(HeadTester):
    head = Unregistered()
    registered = False


# ---- registration


class TestRegister:
    def test_by_kind(self):
        model = create_branch_model("test_resnet", head="test-linear", num_classes=2)
        assert model.head_specs == (LinearHead(),)

    def test_taken_kind(self):
        @dataclass(frozen=True)
        class Other(Head):
            kind: ClassVar[str] = "pool"

        with pytest.raises(ValueError, match=r"'pool' is taken by timm_branches.*PoolHead"):
            register_head(Other)
        assert HEADS["pool"] is PoolHead

    @pytest.mark.parametrize("wrong", [PoolHead(), int, "pool", None])
    def test_no_head(self, wrong):
        with pytest.raises(ValueError, match="derives from Head"):
            register_head(wrong)

    def test_no_kind(self):
        @dataclass(frozen=True)
        class Nameless(Head):
            pass

        with pytest.raises(ValueError, match="Nameless has no name"):
            register_head(Nameless)

    def test_option_that_files_need(self):
        @dataclass(frozen=True)
        class Clash(Head):
            kind: ClassVar[str] = "test-clash"
            module: str = ""

        with pytest.raises(ValueError, match="'module'"):
            register_head(Clash)

    def test_defined_again(self, monkeypatch):
        """A notebook's cell is run twice."""

        def cell():
            @register_head
            @dataclass(frozen=True)
            class Again(Head):
                kind: ClassVar[str] = "test-again"

            return Again

        monkeypatch.setattr(sys.modules["timm_branches.heads.base"], "HEADS", dict(HEADS))
        first, second = cell(), cell()
        assert sys.modules["timm_branches.heads.base"].HEADS["test-again"] is second is not first

    def test_looks_like_a_head(self):
        class Duck:
            kind = "duck"

            def build(self, taps, num_classes):
                raise AssertionError

        with pytest.raises(ValueError, match="Duck has build.*derive from timm_branches.Head"):
            parse_head(Duck())

    def test_module_that_lacks_something(self):
        @dataclass(frozen=True)
        class Bare(Head):
            kind: ClassVar[str] = "test-bare"
            temporal: ClassVar[bool] = True

            def build(self, taps, num_classes, drop_rate=None, in_chans=3):
                return LinearModule(taps[0].channels, num_classes)

        with pytest.raises(TypeError, match="without check_stream, to_vector, zero_state"):
            create_branch_model("test_resnet", head=Bare(), num_classes=2)


def test_missing_import_is_named(tmp_path):
    path = save_model(
        create_branch_model("test_resnet", head=LinearHead(), num_classes=2), tmp_path / "m"
    )
    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata())
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    config = json.loads(metadata["config"])
    assert config["model"]["head"][0]["module"] == "tests.heads.test_contract"
    config["model"]["head"][0] |= {"kind": "gone", "module": "somebodys.heads"}
    metadata["config"] = json.dumps(config)
    metadata["sha256"] = digest_tensors(tensors, metadata)
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(ValueError, match="'gone'.*import somebodys.heads, which registers it"):
        load_model(path)
