"""Streams.

Frame by frame, in chunks or at once, the answers are the same, and the cost of a frame does not
grow.
"""

import numpy as np
import pytest
import torch
from torch import nn

from timm_branches import create_branch_model
from timm_branches.heads import GRUHead, LSTMHead
from timm_branches.inference import StreamingClassifier, StreamingStep, detach_state


def video(batch=2, time=6, seed=0):
    return torch.randn(batch, time, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def make(seed=0, **kwargs):
    torch.manual_seed(seed)
    return create_branch_model(
        "test_resnet",
        taps=[3, 5, 5],
        names=["coarse", "clip", "frame"],
        num_classes=[2, 3, 1],
        head=[
            "pool",
            LSTMHead(hidden_size=6, num_layers=2),
            GRUHead(hidden_size=5, output="frame"),
        ],
        **{"img_size": 32, **kwargs},
    )


class TestForwardStream:
    @pytest.mark.parametrize("chunks", [[6], [1] * 6, [2, 3, 1]])
    def test_equals_the_whole(self, chunks):
        model, x = make().eval(), video()
        whole = model(x)
        state, frames, last, done = None, [], None, 0
        for chunk in x.split(chunks, dim=1):
            outputs, state = model.forward_stream(chunk, state)
            done += chunk.shape[1]
            # the answer for all so far
            torch.testing.assert_close(outputs["clip"], model(x[:, :done])["clip"])
            frames.append(outputs)
            last = outputs
        torch.testing.assert_close(last["clip"], whole["clip"])
        for name in ("coarse", "frame"):
            torch.testing.assert_close(torch.cat([y[name] for y in frames], 1), whole[name])
        assert {k: [tuple(s.shape) for s in v] for k, v in state.items()} == {
            "clip": [(2, 2, 6), (2, 2, 6)],
            "frame": [(1, 2, 5)],
        }

    def test_some_heads(self):
        model, x = make().eval(), video()
        outputs, state = model.forward_stream(x, heads=["frame"])
        assert list(outputs) == list(state) == ["frame"]
        torch.testing.assert_close(outputs["frame"], model(x)["frame"])

    @pytest.mark.parametrize(
        ("head", "message"),
        [
            (LSTMHead(bidirectional=True), "backwards too"),
            (GRUHead(bidirectional=True, output="frame"), "backwards too"),
            (LSTMHead(readout="mean"), r"readout='mean'"),
            (GRUHead(readout="attention"), "readout='attention'"),
        ],
    )
    def test_cannot_stream(self, head, message):
        model = create_branch_model(
            "test_resnet",
            head=[head, GRUHead(hidden_size=4)],
            taps=[5, 5],
            num_classes=2,
            names=["a", "b"],
            img_size=32,
        ).eval()
        for start in (
            lambda: model.forward_stream(video()),
            lambda: StreamingClassifier(model),
            lambda: StreamingStep(model),
        ):
            with pytest.raises(ValueError, match=f"head 'a' .*{message}"):
                start()
        assert list(StreamingClassifier(model, heads=["b"])(torch.zeros(3, 32, 32))) == ["b"]

    @pytest.mark.parametrize(("x", "heads"), [(video()[:, 0], None), (video(), ["coarse"])])
    def test_needs_clips_and_a_temporal_head(self, x, heads):
        with pytest.raises(ValueError, match="takes clips .* and needs a temporal head"):
            make().forward_stream(x, heads=heads)

    def test_wrong_state(self):
        model = make().eval()
        _, state = model.forward_stream(video())
        with pytest.raises(ValueError, match=r"shapes \[\(2, 2, 6\), \(2, 2, 6\)\], 3 clips need"):
            model.forward_stream(video(3), state)
        with pytest.raises(ValueError, match=r"state is that of the heads \['clip'\]"):
            model.forward_stream(video(), {"clip": state["clip"]})
        with pytest.raises(ValueError, match="shapes"):
            model.forward_stream(video(), {**state, "clip": state["clip"][:1]})


class TestTruncatedBackpropagation:
    def test_gradients(self):
        """Detached.

        The second chunk's gradient is that of a constant state. Not detached: that of the whole
        clip.
        """
        model, x = make().eval(), video(1, 4)
        _, state = model.forward_stream(x[:, :2])
        cut = detach_state(state)
        for name in state:
            for a, b in zip(cut[name], state[name], strict=True):
                assert torch.equal(a, b)
                assert a.grad_fn is None
                assert b.grad_fn is not None

        def gradient(start):
            model.zero_grad()
            model.forward_stream(x[:, 2:], start)[0]["clip"].sum().backward()
            return model.backbone.conv1[0].weight.grad.clone()

        truncated = gradient(cut)
        constant = {k: tuple(s.detach().clone() for s in v) for k, v in state.items()}
        torch.testing.assert_close(truncated, gradient(constant))
        linked = gradient(state)
        model.zero_grad()
        model(x)["clip"].sum().backward()
        torch.testing.assert_close(linked, model.backbone.conv1[0].weight.grad)
        assert not torch.allclose(linked, truncated)

    def test_graph_does_not_grow(self):
        """Chunk after chunk, the graph behind a loss has the same size."""
        model, state, sizes = make().train(), None, []
        for chunk in video(2, 6).split(2, dim=1):
            outputs, state = model.forward_stream(chunk, state)
            seen, stack = set(), [outputs["clip"].grad_fn]
            while stack:
                node = stack.pop()
                if node is not None and node not in seen:
                    seen.add(node)
                    stack.extend(parent for parent, _ in node.next_functions)
            sizes.append(len(seen))
            state = detach_state(state)
        assert sizes[1] == sizes[2]

    def test_it_learns(self):
        """The label is the first frame's sign, asked for at the end of a video that is seen in
        two chunks."""
        torch.manual_seed(0)
        model = create_branch_model(
            "conv2_24x48", head=LSTMHead(hidden_size=8, output="frame"), num_classes=2
        )
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        labels = torch.arange(16) % 2
        x = 0.1 * torch.randn(16, 4, 1, 24, 48)
        x[:, 0] += (2.0 * labels - 1).view(-1, 1, 1, 1)
        for _ in range(25):
            state = None
            for chunk in x.split(2, dim=1):
                outputs, state = model.forward_stream(chunk, state)
                loss = nn.functional.cross_entropy(
                    outputs["stage5"].flatten(0, 1), labels.repeat_interleave(2)
                )
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                state = detach_state(state)
        assert (model.eval()(x)["stage5"][:, -1].argmax(1) == labels).all()


class TestStreamingClassifier:
    def test_equals_the_whole(self):
        model, x = make().train(), video(1)
        stream = StreamingClassifier(model)
        answers = list(stream.run(iter(x[0])))
        assert model.training
        whole = model.eval()(x)
        assert {k: tuple(v.shape) for k, v in answers[0].items()} == {
            "coarse": (2,),
            "clip": (3,),
            "frame": (1,),
        }
        for t, answer in enumerate(answers):
            torch.testing.assert_close(answer["frame"], whole["frame"][0, t])
            torch.testing.assert_close(answer["coarse"], whole["coarse"][0, t])
            torch.testing.assert_close(answer["clip"], model(x[:, : t + 1])["clip"][0])
            assert not answer["clip"].requires_grad

    def test_the_models_modes_stay(self):
        model = make().freeze(stages=3).train()
        before = [m.training for m in model.modules()]
        statistics = model.backbone.layer4[0].bn1.running_mean.clone()
        stream = StreamingClassifier(model)
        stream(video()[0, 0])
        with pytest.raises(ValueError, match="cannot be computed"):
            stream(torch.zeros(3, 0, 0))
        assert [m.training for m in model.modules()] == before
        assert torch.equal(model.backbone.layer4[0].bn1.running_mean, statistics)
        assert torch.is_grad_enabled()

    def test_constant_cost(self):
        model, calls = make(), []
        model.backbone.conv1.register_forward_pre_hook(
            lambda m, args: calls.append(tuple(args[0].shape))
        )
        stream = StreamingClassifier(model)
        sizes = set()
        for _ in stream.run(video(1, 20)[0]):
            sizes.add(sum(s.untyped_storage().nbytes() for v in stream.state.values() for s in v))
        assert len(sizes) == 1
        assert calls == [(1, 3, 32, 32)] * 20

    def test_lazy(self):
        """A camera has no end: each answer comes before the next frame is asked for."""
        asked = []

        def camera():
            for number in range(10**9):
                asked.append(number)
                yield torch.zeros(3, 32, 32)

        answers = StreamingClassifier(make()).run(camera())
        next(answers)
        next(answers)
        assert asked == [0, 1]

    def test_several_streams(self):
        model, x = make(), video(3)
        stream = StreamingClassifier(model)
        for t in range(3):
            together = stream(x[:, t])
        for b in range(3):
            alone = list(StreamingClassifier(model).run(x[b, :3]))[-1]
            for name, y in alone.items():
                torch.testing.assert_close(together[name][b], y)
        with pytest.raises(ValueError, match="2 clips need"):
            stream(x[:2, 0])
        stream.reset()
        assert stream.state is None
        assert stream(x[:2, 0])["clip"].shape == (2, 3)

    def test_reset(self):
        stream, x = StreamingClassifier(make()), video(1)
        first = stream(x[0, 0])["clip"]
        assert not torch.allclose(stream(x[0, 0])["clip"], first)
        stream.reset()
        torch.testing.assert_close(stream(x[0, 0])["clip"], first)

    def test_probabilities(self):
        model, x = make(), video(2)
        logits, answer = (
            StreamingClassifier(model, probabilities=p)(x[:, 0]) for p in (False, True)
        )
        torch.testing.assert_close(
            answer["clip"], logits["clip"].exp() / logits["clip"].exp().sum(1, keepdim=True)
        )
        torch.testing.assert_close(answer["frame"], 1 / (1 + (-logits["frame"]).exp()))

    def test_camera_frames(self):
        """uint8 frames of any size are prepared as in validation."""
        from PIL import Image
        from timm.data import create_transform, resolve_model_data_config

        model = make(img_size=96)
        frames = np.random.default_rng(0).integers(0, 256, (2, 120, 160, 3), dtype=np.uint8)
        prepare = create_transform(**resolve_model_data_config(model))
        tensors = torch.stack([prepare(Image.fromarray(f)) for f in frames])
        for given, prepared in ((frames[0], tensors[0]), (frames, tensors)):
            a, b = StreamingClassifier(model)(given), StreamingClassifier(model)(prepared)
            for name in a:
                torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-5)

    def test_own_transform(self):
        model, x = make(), video(1)
        stream = StreamingClassifier(model, transform=lambda frame: x[0, int(frame[0, 0, 0])])
        answer = stream(np.full((4, 4, 3), 5, np.uint8))
        torch.testing.assert_close(answer["clip"], StreamingClassifier(model)(x[0, 5])["clip"])

    @pytest.mark.parametrize(
        ("frame", "message"),
        [
            (np.zeros((8, 8), np.uint8), r"a frame is .*got \(8, 8\)"),
            ([1, 2], "list"),
            (None, "NoneType"),
            (np.zeros((8, 8, 3), np.float32), "uint8"),
            (np.zeros((8, 8, 1), np.uint8), "uint8"),
            (torch.zeros(3, 8, 8, dtype=torch.uint8), "must be prepared"),
            (torch.zeros(1, 2, 3, 8, 8), "a frame is"),
            (torch.zeros(1, 32, 32), "expected clips"),
        ],
    )
    def test_not_a_frame(self, frame, message):
        stream = StreamingClassifier(make())
        with pytest.raises(ValueError, match=message):
            stream(frame)
        assert stream.state is None

    def test_needs_a_temporal_head(self):
        with pytest.raises(ValueError, match=r"None of the heads \['coarse'\] is temporal"):
            StreamingClassifier(make(), heads=["coarse"])


class TestStreamingStep:
    def test_equals_the_whole(self):
        model, x = make().eval(), video()
        step = StreamingStep(model)
        assert step.state_names == ["clip_h", "clip_c", "frame_h"]
        assert step.output_names == [
            "logits_coarse",
            "logits_clip",
            "logits_frame",
            "new_clip_h",
            "new_clip_c",
            "new_frame_h",
        ]
        state = step.initial_state(2)
        for t in range(6):
            coarse, clip, frame, *state = step(x[:, t], *state)
            whole = model(x[:, : t + 1])
            torch.testing.assert_close(clip, whole["clip"])
            torch.testing.assert_close(frame, whole["frame"][:, t])
            torch.testing.assert_close(coarse, whole["coarse"][:, t])

    def test_missing_state(self):
        step = StreamingStep(make())
        with pytest.raises(ValueError, match=r"1 states for \['clip_h', 'clip_c', 'frame_h'\]"):
            step(torch.zeros(1, 3, 32, 32), torch.zeros(2, 1, 6))

    def test_mode(self):
        model = make().eval()
        assert not StreamingStep(model).training
        assert StreamingStep(model.train()).training
