"""Clip models and streaming steps outside of eager Python.

``torch.export``, ONNX, ``torch.compile``.
"""

import importlib.util
import warnings

import pytest
import torch

from timm_branches import create_branch_model
from timm_branches.heads import (
    AttentionHead,
    GRUHead,
    LSTMHead,
    MeanHead,
    MinGRUHead,
    TCNHead,
    TransformerHead,
)
from timm_branches.inference import StreamingStep
from timm_branches.inference.export import export_model

STREAMING = [
    MeanHead(output="frame"),
    AttentionHead(hidden_size=8, num_heads=2),
    TransformerHead(hidden_size=8, num_heads=2, num_layers=2, causal=True, max_frames=3),
    TCNHead(hidden_size=6, num_layers=2),
    MinGRUHead(hidden_size=5, num_layers=2),
]
WHOLE = [
    TransformerHead(hidden_size=8, num_heads=2),
    TransformerHead(hidden_size=8, num_heads=2, pool_type="none", output="frame"),
    TCNHead(hidden_size=6, readout="attention"),
    MinGRUHead(hidden_size=5, num_layers=2, bidirectional=True),
]
BATCH = torch.export.Dim("batch", min=1, max=64)


def make(name="test_resnet", seed=0):
    torch.manual_seed(seed)
    return create_branch_model(
        name,
        taps=[3, 5, 5],
        names=["coarse", "clip", "frame"],
        num_classes=[2, 3, 4],
        img_size=32,
        head=[
            "pool",
            LSTMHead(hidden_size=6, num_layers=2),
            GRUHead(hidden_size=5, output="frame"),
        ],
    ).eval()


def clips(batch=3, time=4):
    return torch.randn(batch, time, 3, 32, 32, generator=torch.Generator().manual_seed(batch))


def assert_close(a, b):
    for y, expected in zip(a, b, strict=True):
        torch.testing.assert_close(torch.as_tensor(y), expected, rtol=1e-4, atol=1e-5)


class TestExport:
    def test_fixed(self):
        model, x = make(), clips()
        program = torch.export.export(model, (x,))
        assert_close(program.module()(x).values(), model(x).values())

    @pytest.mark.parametrize("name", ["test_resnet", "test_convnext"])
    def test_batch_of_any_size(self, name):
        model = make(name)
        program = torch.export.export(model, (clips(),), dynamic_shapes={"x": {0: BATCH}})
        for batch in (1, 5):
            x = clips(batch)
            assert_close(program.module()(x).values(), model(x).values())

    def test_lengths(self):
        """The graph gathers at the lengths what eager mode packs.

        There, too, the padding does not matter.
        """
        model = make()
        program = torch.export.export(
            model,
            (clips(), None, torch.tensor([4, 2, 1])),
            dynamic_shapes={"x": {0: BATCH}, "heads": None, "lengths": {0: BATCH}},
        )
        x, lengths = clips(5), torch.tensor([1, 4, 3, 2, 4])
        x[0, 1:] = float("nan")
        assert_close(
            program.module()(x, None, lengths).values(), model(x, lengths=lengths).values()
        )

    @pytest.mark.parametrize("readout", ["mean", "max", "attention"])
    def test_readouts_with_a_mask(self, readout):
        torch.manual_seed(0)
        model = create_branch_model(
            "test_resnet", head=GRUHead(hidden_size=4, readout=readout), num_classes=2, img_size=32
        ).eval()
        mask = torch.arange(4) < torch.tensor([[4], [2], [1]])
        program = torch.export.export(model, (clips(), None, mask.clone()))
        other = torch.arange(4) < torch.tensor([[1], [4], [3]])
        assert_close(
            program.module()(clips(), None, other).values(), model(clips(), lengths=other).values()
        )

    @pytest.mark.parametrize("head", [*STREAMING, *WHOLE], ids=lambda head: head.kind)
    def test_other_heads_with_lengths(self, head):
        """One program for every batch and all lengths."""
        torch.manual_seed(0)
        model = create_branch_model("test_resnet", head=head, num_classes=3, img_size=32).eval()
        program = torch.export.export(
            model,
            (clips(), None, torch.tensor([4, 2, 1])),
            dynamic_shapes={"x": {0: BATCH}, "heads": None, "lengths": {0: BATCH}},
        )
        x, lengths = clips(5), torch.tensor([1, 4, 3, 2, 4])
        x[0, 1:] = float("nan")
        assert_close(
            program.module()(x, None, lengths).values(), model(x, lengths=lengths).values()
        )

    def test_bidirectional(self):
        torch.manual_seed(0)
        model = create_branch_model(
            "test_resnet",
            head=LSTMHead(hidden_size=4, bidirectional=True),
            num_classes=2,
            img_size=32,
        ).eval()
        assert_close(
            torch.export.export(model, (clips(),)).module()(clips()).values(),
            model(clips()).values(),
        )
        with pytest.raises(ValueError, match="bidirectional head cannot be exported with lengths="):
            torch.export.export(model, (clips(), None, torch.tensor([4, 2, 1])))

    def test_step(self):
        step, x = StreamingStep(make()), clips(5)
        frame, state = clips()[:, 0], step.initial_state(3)
        program = torch.export.export(
            step,
            (frame, *state),
            dynamic_shapes={"frame": {0: BATCH}, "state": tuple({1: BATCH} for _ in state)},
        )
        assert_close(program.module()(frame, *state), step(frame, *state))
        mine, own = step.initial_state(5), step.initial_state(5)
        for t in range(3):
            answer, expected = program.module()(x[:, t], *mine), step(x[:, t], *own)
            assert_close(answer, expected)
            mine, own = answer[3:], expected[3:]


def onnx_session(model, args, path, dynamo, inputs, outputs, **kwargs):
    ort = pytest.importorskip("onnxruntime")
    if dynamo and importlib.util.find_spec("onnxscript") is None:
        pytest.skip("torch's newer exporter needs onnxscript")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model,
            args,
            path,
            dynamo=dynamo,
            input_names=inputs,
            output_names=outputs,
            verbose=False,
            **kwargs,
        )
    session = ort.InferenceSession(path)
    return lambda *values: session.run(
        None, {n: v.numpy() for n, v in zip(inputs, values, strict=True)}
    )


@pytest.mark.parametrize("dynamo", [True, False])
class TestOnnx:
    def test_clips(self, dynamo, tmp_path):
        model = make()
        # the older exporter fixes the batch
        shapes = {"dynamic_shapes": {"x": {0: BATCH}}} if dynamo else {}
        run = onnx_session(
            model, (clips(),), tmp_path / "m.onnx", dynamo, ["x"], list(model.names), **shapes
        )
        for batch in (3, 5) if dynamo else (3,):
            assert_close(run(clips(batch)), model(clips(batch)).values())

    def test_lengths(self, dynamo, tmp_path):
        model = make()
        shapes = (
            {"dynamic_shapes": {"x": {0: BATCH}, "heads": None, "lengths": {0: BATCH}}}
            if dynamo
            else {}
        )
        run = onnx_session(
            model,
            (clips(), None, torch.tensor([4, 2, 1])),
            tmp_path / "m.onnx",
            dynamo,
            ["x", "lengths"],
            list(model.names),
            **shapes,
        )
        for values in ([1, 4, 3], [2, 4, 3, 1, 1]) if dynamo else ([1, 4, 3],):
            x, lengths = clips(len(values)), torch.tensor(values)
            assert_close(run(x, lengths), model(x, lengths=lengths).values())

    def test_step(self, dynamo, tmp_path):
        step, x = StreamingStep(make()), clips()
        state = own = step.initial_state(3)
        shapes = (
            {"dynamic_shapes": {"frame": {0: BATCH}, "state": tuple({1: BATCH} for _ in state)}}
            if dynamo
            else {}
        )
        run = onnx_session(
            step,
            (x[:, 0], *state),
            tmp_path / "s.onnx",
            dynamo,
            step.input_names,
            step.output_names,
            **shapes,
        )
        for t in range(4):
            answer, expected = run(x[:, t], *state), step(x[:, t], *own)
            assert_close(answer, expected)
            state, own = [torch.from_numpy(y) for y in answer[3:]], expected[3:]
        assert_close(
            expected[:2], [v if v.ndim == 2 else v[:, -1] for v in list(step.model(x).values())[:2]]
        )


@pytest.mark.parametrize("head", [*STREAMING, *WHOLE], ids=lambda head: head.kind)
def test_onnx_of_other_heads(head, tmp_path):
    """Written, and compared on two batches in onnxruntime, by the command itself."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    model = create_branch_model("test_resnet", head=head, num_classes=3, img_size=32)
    assert export_model(model, tmp_path / "model.onnx", frames=4).difference < 1e-4


@pytest.mark.parametrize("head", STREAMING, ids=lambda head: head.kind)
def test_onnx_step_of_other_heads(head, tmp_path):
    torch.manual_seed(0)
    model = create_branch_model("test_resnet", head=head, num_classes=3, img_size=32).eval()
    step, x = StreamingStep(model), clips(time=6)
    state = step.initial_state(3)
    shapes = {"frame": {0: BATCH}, "state": tuple({1: BATCH} for _ in state)}
    run = onnx_session(
        step,
        (x[:, 0], *state),
        tmp_path / "s.onnx",
        True,
        step.input_names,
        step.output_names,
        dynamic_shapes=shapes,
    )
    own = state
    for t in range(6):
        answer, expected = run(x[:, t], *state), step(x[:, t], *own)
        assert_close(answer, expected)
        state, own = [torch.from_numpy(y) for y in answer[1:]], expected[1:]


def test_compile():
    """nn.LSTM breaks the graph, so not ``fullgraph``.

    The results are those of eager mode, BatchNorm's included.
    """
    torch.compiler.reset()
    model, twin, x = make().train(), make().train(), clips()
    lengths = torch.tensor([4, 2, 1])
    y = torch.compile(model, backend="aot_eager")(x, lengths=lengths)
    assert_close(y.values(), twin(x, lengths=lengths).values())
    for (name, a), b in zip(model.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=name)
    torch.compiler.reset()
