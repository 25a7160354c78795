"""Labels of a tree, an answer for the clip and a mask a frame, from one pass over one backbone."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from timm_branches import (
    LeanHead,
    LinearHead,
    LSTMHead,
    MinGRUHead,
    Taxonomy,
    TransformerHead,
    create_branch_model,
    load_model,
    save_model,
)
from timm_branches.dense import SegmentationEvaluator
from timm_branches.gradients import check_model
from timm_branches.inference.export import export_model
from timm_branches.task import BranchTask, DenseTask, JointTask

TREE = Taxonomy(["sport/jump", "sport/run", "rest/sit"], levels=["kind", "action"])
BACKBONES = ["test_vit", "test_convnext"]
B, T, SIZE, CLASSES = 2, 3, 64, 4
LENGTHS = torch.tensor([3, 2])


def make(name, clip="mean", second=None, mask=None):
    torch.manual_seed(0)
    options = {"img_size": SIZE} if "vit" in name else {}
    return create_branch_model(
        name,
        taps=[3, 5, (2, 3, 4, 5)],
        head=[clip, second or TransformerHead(hidden_size=16, causal=True), mask or LeanHead()],
        taxonomy=TREE,
        num_classes=[None, None, CLASSES],
        **options,
    )


def batch():
    generator = torch.Generator().manual_seed(1)
    clips = torch.randn(B, T, 3, SIZE, SIZE, generator=generator)
    masks = torch.randint(CLASSES, (B, T, SIZE, SIZE), generator=generator)
    return clips, {"labels": TREE.expand(torch.tensor([1, 2])), "masks": masks}


def make_task(model, **options):
    labels = BranchTask(model, schedule={"0": [0.7, 0.3], "5": [0.0, 1.0]})
    masks = DenseTask(model, "ce+dice", partial(SegmentationEvaluator, CLASSES))
    return JointTask({"labels": labels, "masks": masks}, **options)


@pytest.mark.parametrize("name", BACKBONES)
class TestMixed:
    def test_shapes(self, name):
        clips, _ = batch()
        outputs = make(name).eval()(clips, lengths=LENGTHS)
        shapes = {key: tuple(y.shape) for key, y in outputs.items()}
        assert shapes == {
            "kind": (B, 2),
            "action": (B, 3),
            "lean": (B, T, CLASSES, SIZE, SIZE),
        }
        assert not outputs["lean"][1, 2].any()

    def test_loss_is_the_sum_by_hand(self, name):
        model = make(name).eval()
        clips, target = batch()
        task = make_task(model, weights={"masks": 0.5})
        own = task((clips, LENGTHS), target)
        y = model(clips, lengths=LENGTHS)
        labels = target["labels"]
        kind = F.cross_entropy(y["kind"], labels[:, 0])
        action = F.cross_entropy(y["action"], labels[:, 1])
        valid = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
        logits = torch.stack([y["lean"][b, t] for b, t in valid])
        masks = torch.stack([target["masks"][b, t] for b, t in valid])
        p = logits.softmax(1)
        g = F.one_hot(masks, CLASSES).movedim(-1, 1)
        overlap = (2 * (p * g).sum((0, 2, 3)) + 1) / (p.sum((0, 2, 3)) + g.sum((0, 2, 3)) + 1)
        mask = F.cross_entropy(logits, masks) + 1 - overlap.mean()
        expected = 0.7 * kind + 0.3 * action + 0.5 * mask
        torch.testing.assert_close(own["loss"], expected, rtol=1e-4, atol=1e-5)

    def test_schedule_turns_a_head_off(self, name):
        model = make(name)
        task = make_task(model)
        assert task.needed_heads() == ("kind", "action", "lean")
        task.set_epoch(5)
        assert task.needed_heads() == ("action", "lean")
        clips, target = batch()
        task((clips, LENGTHS), target)["loss"].backward()
        assert all(p.grad is None for p in model.head("kind").parameters())

    def test_padding_is_not_learned(self, name):
        model = make(name)
        task = make_task(model)
        clips, target = batch()
        before = task((clips, LENGTHS), target)["loss"]
        clips[1, 2] = 1e3
        target["masks"][1, 2] = 0
        torch.testing.assert_close(task((clips, LENGTHS), target)["loss"], before)

    def test_frozen(self, name):
        model = make(name).freeze().train()
        clips, target = batch()
        make_task(model)((clips, LENGTHS), target)["loss"].backward()
        assert all(p.grad is None for p in model.backbone.parameters())
        assert all(p.grad is not None for p in model.heads.parameters())

    def test_file(self, name, tmp_path):
        model = make(name).eval()
        twin = load_model(save_model(model, tmp_path / "model.safetensors"))
        clips, _ = batch()
        for key, y in model(clips, lengths=LENGTHS).items():
            assert torch.equal(twin(clips, lengths=LENGTHS)[key], y)

    def test_some_heads(self, name):
        model = make(name).eval()
        clips, _ = batch()
        alone = model(clips, heads=["action"], lengths=LENGTHS)
        assert list(alone) == ["action"]
        torch.testing.assert_close(alone["action"], model(clips, lengths=LENGTHS)["action"])

    def test_stream(self, name):
        model = make(name).eval()
        clips, _ = batch()
        whole = model(clips)
        state = None
        for t in range(T):
            outputs, state = model.forward_stream(clips[:, t : t + 1], state)
            torch.testing.assert_close(
                outputs["lean"][:, 0], whole["lean"][:, t], rtol=1e-4, atol=1e-4
            )
        for level in ("kind", "action"):
            torch.testing.assert_close(outputs[level], whole[level], rtol=1e-4, atol=1e-4)

    def test_export(self, name, tmp_path):
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
        written = export_model(make(name), tmp_path / "model.onnx", frames=T)
        assert written.outputs == ("kind", "action", "lean")
        assert written.difference < 1e-3

    def test_evaluation(self, name):
        model = make(name).eval()
        clips, target = batch()
        task = make_task(model)
        target["masks"][1, 2] = -1
        evaluator = task.create_evaluator()
        with torch.no_grad():
            evaluator.update(task.answer(model, (clips, LENGTHS)), target)
        metrics = evaluator.compute()
        y = model(clips, lengths=LENGTHS)
        known = target["masks"] >= 0
        right = (y["lean"].argmax(2) == target["masks"])[known].float().mean()
        assert metrics["pixel_accuracy"] == pytest.approx(100 * float(right))
        hits = (y["action"].argmax(1) == target["labels"][:, 1]).float().mean()
        assert metrics["action_top1"] == pytest.approx(100 * float(hits))

    def test_doctor(self, name):
        clips, target = batch()
        task = make_task(make(name))
        found = check_model(task, (clips, target))
        assert found.problems == []


@pytest.mark.parametrize(
    ("clip", "second", "mask"),
    [
        ("pool", LSTMHead(hidden_size=8), "unet"),
        ("attention", MinGRUHead(hidden_size=8, output="frame"), LinearHead()),
        ("tcn", "gru", "segformer"),
    ],
)
def test_other_mixes(clip, second, mask):
    model = make("test_convnext", clip, second, mask)
    clips, target = batch()
    loss = make_task(model)((clips, LENGTHS), target)["loss"]
    loss.backward()
    assert torch.isfinite(loss)
    assert all(p.grad is not None for p in model.heads.parameters())


def test_masks_that_are_not_one_a_frame():
    task = make_task(make("test_convnext"))
    clips, target = batch()
    target["masks"] = target["masks"][:, 0]
    with pytest.raises(ValueError, match=r"2 x 3 frames need a mask .* for each frame.*\(2, 64"):
        task((clips, LENGTHS), target)
