"""``torch.compile`` without graph breaks, and ``torch.export``."""

import copy

import pytest
import torch

from timm_branches import PoolHead, Tap, create_branch_model

# the smallest variants, at the smallest size each takes
MODELS = {
    "test_resnet": 32,
    "vgg11": 32,
    "test_vit": 32,
    "test_convnext": 32,
    "test_efficientnet": 32,
    "swin_tiny_patch4_window7_224": 32,
}


def make(name, taps=(3, 5), **kwargs):
    torch.manual_seed(0)
    options = (
        {"window_size": 2, "depths": (1, 1, 1, 1), "drop_path_rate": 0.0}
        if name.startswith("swin")
        else {}
    )
    model = create_branch_model(
        name, taps=list(taps), num_classes=2, img_size=MODELS[name], **options, **kwargs
    )
    return model, torch.randn(4, 3, MODELS[name], MODELS[name])


def assert_close(a, b):
    assert list(a) == list(b)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-5)


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class TestCompile:
    @pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
    def test_eval(self, name):
        model, x = make(name)
        model.eval()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            assert_close(compiled(x), model(x))
            assert_close(compiled(x, heads=["stage3"]), model(x, heads=["stage3"]))

    @pytest.mark.parametrize("name", MODELS)
    def test_train(self, name):
        model, x = make(name, taps=[3, Tap(4, detach=True), 5], head=PoolHead((8,)))
        twin = copy.deepcopy(model)
        assert_close(
            compiled := torch.compile(model, fullgraph=True, backend="aot_eager")(x),
            eager := twin(x),
        )
        for logits in (compiled, eager):
            sum(y.square().sum() for y in logits.values()).backward()
        for (n, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None), n
            if p.grad is not None:
                torch.testing.assert_close(
                    p.grad, q.grad, rtol=1e-3, atol=1e-4 * max(1.0, q.grad.abs().max().item())
                )
        for (n, p), q in zip(model.named_buffers(), twin.buffers(), strict=True):
            torch.testing.assert_close(p, q, msg=n)

    @pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
    def test_frozen(self, name):
        model, x = make(name)
        model.freeze().train()
        twin = copy.deepcopy(model)
        logits = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
        assert_close(logits, twin(x))
        sum(y.sum() for y in logits.values()).backward()
        assert all(p.grad is None for p in model.backbone.parameters())
        assert all(p.grad is not None for p in model.heads.parameters())

    @pytest.mark.parametrize("taps", [[3, "layer3.0.act1", 5], ["layer2.0.act1", 4]])
    def test_module_inside_a_computed_stage(self, taps):
        model, x = make("test_resnet", taps)
        model.eval()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            assert_close(compiled(x), model(x))


class TestExport:
    @pytest.mark.parametrize("name", MODELS)
    def test_default(self, name):
        model, x = make(name)
        model.eval()
        program = torch.export.export(model, (x,))
        assert_close(program.module()(x), model(x))

    @pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext"])
    def test_some_heads(self, name):
        model, x = make(name)
        model.eval()
        program = torch.export.export(model, (x,), {"heads": ["stage3"]})
        assert_close(program.module()(x, heads=["stage3"]), model(x, heads=["stage3"]))
        kept = {n for n in program.state_dict if n.startswith("heads.")}
        calls = [n for n in program.graph.nodes if n.op == "call_function"]
        whole = [n for n in torch.export.export(model, (x,)).graph.nodes if n.op == "call_function"]
        assert len(calls) < len(whole)
        assert kept

    def test_batch_of_any_size(self):
        model, x = make("test_resnet")
        model.eval()
        program = torch.export.export(
            model, (x,), dynamic_shapes={"x": {0: torch.export.Dim("batch", min=2, max=64)}}
        )
        y = torch.randn(7, *x.shape[1:])
        assert_close(program.module()(y), model(y))

    def test_module_inside_a_computed_stage(self):
        model, x = make("test_resnet", [3, "layer3.0.act1", 5])
        model.eval()
        assert_close(torch.export.export(model, (x,)).module()(x), model(x))

    @pytest.mark.parametrize(
        ("name", "taps"),
        [("test_resnet", [3, "layer3.0.conv1"]), ("test_vit", ["blocks.1.attn", "blocks.3.mlp"])],
    )
    def test_last_tap_inside_a_stage(self, name, taps):
        """An exception ends that pass.

        Only the strict mode of export, which reads bytecode, follows it.
        """
        model, x = make(name, taps)
        model.eval()
        assert_close(torch.export.export(model, (x,), strict=True).module()(x), model(x))
