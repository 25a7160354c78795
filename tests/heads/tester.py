"""The contract of heads as tests: derive from HeadTester and say how your head is made.

    class TestMine(HeadTester):
        head = MyHead(width=8)

It is not about what a head computes but about what everything else relies on.
"""

import json
from typing import Any

import pytest
import torch

from timm_branches import create_branch_model, load_model, save_model
from timm_branches.heads import (
    Head,
    HeadModule,
    TemporalHead,
    head_to_dict,
    parse_head,
)
from timm_branches.inference import StreamingClassifier, StreamingStep

BACKBONE = "test_resnet"
SIZE = 32
CLASSES = 3
BATCH, FRAMES = 2, 4


def missing_of(value, protocol):
    """What a value lacks of a protocol; isinstance() looks past nn.Module's way from 3.12 on."""
    names = {*getattr(protocol, "__annotations__", ()), *vars(protocol)}
    return {name for name in names if not name.startswith("_") and not hasattr(value, name)}


class HeadTester:
    head: Head
    taps: Any = (3, 5)  # of a decoder; other heads listen at stage 5
    answers = "clip"  # of a temporal head: 'clip' or 'frame'
    streams = True  # whether a temporal head can go on from a state
    any_size = True
    registered = True

    def make(self, num_classes=CLASSES, seed=0, **options):
        torch.manual_seed(seed)
        taps = list(self.taps) if self.head.multi_tap else [5]
        return create_branch_model(
            BACKBONE, taps=taps, head=self.head, num_classes=num_classes, img_size=SIZE, **options
        )

    def input(self, size=SIZE):
        torch.manual_seed(1)
        shape = (BATCH, FRAMES, 3, size, size) if self.head.temporal else (BATCH, 3, size, size)
        return torch.randn(shape)

    def answer(self, model, x):
        (y,) = model(x).values()
        return y

    def expected_shape(self, x, num_classes=CLASSES):
        if self.head.dense:
            return (BATCH, num_classes, *x.shape[-2:])
        if self.head.temporal and self.answers == "frame":
            return (BATCH, FRAMES, num_classes)
        return (BATCH, num_classes)

    # ---- the description

    def test_describes_itself(self):
        assert self.head.kind
        data = json.loads(json.dumps(head_to_dict(self.head)))
        if self.registered:
            assert parse_head(data) == self.head
            assert head_to_dict(parse_head(data)) == head_to_dict(self.head)

    def test_is_frozen(self):
        with pytest.raises(AttributeError):
            self.head.kind = "other"
        assert hash(self.head) == hash(self.head)

    def test_module_keeps_the_contract(self):
        model = self.make()
        (name,) = model.names
        contract = TemporalHead if self.head.temporal else HeadModule
        assert missing_of(model.head(name), contract) == set()
        assert model.temporal_heads == ((name,) if self.head.temporal else ())
        assert model.dense_heads == ((name,) if self.head.dense else ())

    # ---- the answers

    def test_shape(self):
        model = self.make().eval()
        x = self.input()
        assert self.answer(model, x).shape == self.expected_shape(x)

    def test_other_sizes(self):
        model = self.make().eval()
        x = self.input(SIZE + 13)
        if self.any_size:
            assert self.answer(model, x).shape == self.expected_shape(x)
        else:
            with pytest.raises(ValueError, match=str(SIZE + 13) + "|map"):
                model(x)

    def test_frames_of_clips(self):
        """A head that reads images answers for every frame of a clip."""
        if self.head.temporal:
            pytest.skip("reads clips")
        model = self.make().eval()
        x = self.input()
        (y,) = model(x[:, None].expand(-1, 2, -1, -1, -1)).values()
        torch.testing.assert_close(y[:, 1], self.answer(model, x), rtol=1e-4, atol=1e-5)

    def test_images_for_a_temporal_head(self):
        if not self.head.temporal:
            pytest.skip("reads images")
        with pytest.raises(ValueError, match="read clips"):
            self.make()(self.input()[:, 0])

    def test_samples_do_not_touch_each_other(self):
        model = self.make().eval()
        x = self.input()
        alone = self.answer(model, x[:1])
        torch.testing.assert_close(self.answer(model, x)[:1], alone, rtol=1e-4, atol=1e-5)

    def test_gradient_reaches_everything(self):
        model = self.make().train()
        total = sum(y.square().sum() for y in model(self.input()).values())
        total.backward()
        silent = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert not silent
        assert any(p.grad.any() for p in model.backbone.parameters())

    def test_classes_are_reset(self):
        model = self.make().eval()
        x = self.input()
        model.reset_classifier(CLASSES + 2)
        assert self.answer(model, x).shape == self.expected_shape(x, CLASSES + 2)
        assert set(model.num_classes.values()) == {CLASSES + 2}

    def test_padding_changes_nothing(self):
        if not self.head.temporal:
            pytest.skip("reads images")
        model = self.make().eval()
        x = self.input()
        (whole,) = model(x[:1, :2]).values()
        x[0, 2:] = 1e3
        (padded,) = model(x, lengths=[2, FRAMES]).values()
        if self.answers == "frame":
            assert not padded[0, 2:].any()
            padded = padded[:, :2]
        torch.testing.assert_close(padded[:1], whole, rtol=1e-4, atol=1e-5)

    # ---- what becomes of it

    def test_file(self, tmp_path):
        model = self.make().eval()
        if not self.registered:
            with pytest.raises(ValueError, match="register_head"):
                save_model(model, tmp_path / "model.safetensors")
            return
        twin = load_model(save_model(model, tmp_path / "model.safetensors"))
        x = self.input()
        assert twin.head_specs == (self.head,)
        assert torch.equal(self.answer(twin, x), self.answer(model, x))

    def test_compile(self):
        torch.compiler.reset()
        model = self.make().eval()
        x = self.input()
        compiled = torch.compile(model, backend="aot_eager")
        torch.testing.assert_close(
            self.answer(compiled, x), self.answer(model, x), rtol=1e-3, atol=1e-4
        )

    def test_export(self):
        model = self.make().eval()
        x = self.input()
        program = torch.export.export(model, (x,))
        (y,) = program.module()(x).values()
        torch.testing.assert_close(y, self.answer(model, x), rtol=1e-3, atol=1e-4)

    def test_stream(self):
        """Frame by frame equals the clip at once."""
        if not self.head.temporal:
            pytest.skip("reads images")
        model = self.make().eval()
        if not self.streams:
            with pytest.raises(ValueError, match="cannot go on"):
                StreamingClassifier(model)
            return
        x = self.input()
        stream = StreamingClassifier(model)
        answers = [next(iter(stream(x[:, t]).values())) for t in range(FRAMES)]
        whole = self.answer(model, x)
        last = whole[:, -1] if self.answers == "frame" else whole
        torch.testing.assert_close(answers[-1], last, rtol=1e-4, atol=1e-5)
        step = StreamingStep(model)
        logits, *state = step(x[:, 0], *step.initial_state(BATCH))
        torch.testing.assert_close(logits, answers[0], rtol=1e-4, atol=1e-5)
        assert len(state) == len(step.state_names)

    def test_frame_gradients(self):
        if not self.head.temporal:
            pytest.skip("reads images")
        from timm_branches.gradients import frame_gradients

        result = frame_gradients(self.make(), self.input(), lambda y: y.square().sum())
        assert result.seen == list(range(FRAMES))
