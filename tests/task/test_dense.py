"""Dense and joint tasks against sums written by hand, and through the loop."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

from timm_branches import Taxonomy, UNetHead, create_branch_model, load_model, save_model
from timm_branches.data import create_loader
from timm_branches.dense import RestorationEvaluator, SegmentationEvaluator
from timm_branches.task import BranchTask, DenseTask, JointTask
from timm_branches.train import FitConfig, evaluate, fit

TREE = Taxonomy(["animal/cat", "animal/dog", "thing/car"], levels=["coarse", "fine"])


def decoder(num_classes=3, **kwargs):
    torch.manual_seed(0)
    return create_branch_model(
        "test_resnet",
        taps=[2, 3, 4, 5],
        head=UNetHead(channels=(8, 8, 8, 8, 8), **kwargs),
        num_classes=num_classes,
        names=["mask"],
        img_size=32,
    )


def joint_model():
    torch.manual_seed(0)
    return create_branch_model(
        "test_resnet",
        taps=[4, 5, (2, 3, 4, 5)],
        taxonomy=TREE,
        num_classes=[None, None, 3],
        head=["pool", "pool", UNetHead(channels=(8, 8, 8, 8, 8))],
        names=["coarse", "fine", "mask"],
        img_size=32,
    )


def batch(size=4):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(size, 3, 32, 32, generator=generator)
    masks = torch.randint(3, (size, 32, 32), generator=generator)
    masks[:, :8] = 11
    return images, masks, TREE.expand(torch.arange(size) % 3)


def masks_task(model, **kwargs):
    return DenseTask(
        model, "ce", partial(SegmentationEvaluator, 3, ignore_index=11), ignore_index=11, **kwargs
    )


def test_loss_of_a_mask_is_torchs():
    task = masks_task(decoder())
    task.trainable_module.eval()
    images, masks, _ = batch()
    want = F.cross_entropy(task.trainable_module(images)["mask"], masks, ignore_index=11)
    torch.testing.assert_close(task(images, masks)["loss"], want)


def test_deep_supervision_weighs_the_stages():
    task = masks_task(decoder(deep_supervision=True), schedule="0:0.1,0.2,0.3,0.4,1;1:0,0,0,0,1")
    assert task.names == ("mask_aux1", "mask_aux2", "mask_aux3", "mask_aux4", "mask")
    images, masks, _ = batch()
    torch.manual_seed(0)
    result = task(images, masks)
    losses = [
        F.cross_entropy(result["output"][name], masks, ignore_index=11) for name in task.names
    ]
    want = sum(w * loss for w, loss in zip((0.1, 0.2, 0.3, 0.4, 1), losses, strict=True))
    torch.testing.assert_close(result["loss"], want)
    task.set_epoch(1)
    result = task(images, masks)
    assert list(result["losses"]) == ["mask"]
    task.trainable_module.eval()
    task.set_epoch(0)
    assert list(task(images, masks)["losses"]) == ["mask"]


def level_decoder(shared, **kwargs):
    """A decoder that gives both levels of the masks' tree, or one for each."""
    torch.manual_seed(0)
    taps = [(2, 3, 4, 5)] if shared else [(2, 3, 4, 5), (3, 5)]
    return create_branch_model(
        "test_resnet", taps=taps, head=[UNetHead(**kwargs)] * len(taps), taxonomy=TREE, img_size=32
    )


def level_task(model, schedule=None, **kwargs):
    return DenseTask(
        model,
        "ce",
        partial(SegmentationEvaluator, 3, ignore_index=11, taxonomy=TREE),
        schedule=schedule,
        ignore_index=11,
        **kwargs,
    )


LEVELS = [[0, 0, 1], [0, 1, 2]]  # of TREE's leaves, by hand


def cross_entropy_of_level(logits, masks, level, weight=None):
    known = masks != 11
    labels = torch.tensor(LEVELS[level])[masks[known]]
    return F.cross_entropy(logits.movedim(1, -1)[known], labels, weight=weight)


@pytest.mark.parametrize("shared", [True, False])
class TestLevels:
    def test_outputs_and_loss(self, shared):
        task = level_task(level_decoder(shared), schedule=[0.3, 0.7])
        images, masks, _ = batch()
        result = task(images, masks)
        assert {name: y.shape for name, y in result["output"].items()} == {
            "coarse": (4, 2, 32, 32),
            "fine": (4, 3, 32, 32),
        }
        coarse, fine = (
            cross_entropy_of_level(result["output"][name], masks, i)
            for i, name in enumerate(("coarse", "fine"))
        )
        torch.testing.assert_close(result["losses"], {"coarse": coarse, "fine": fine})
        torch.testing.assert_close(result["loss"], 0.3 * coarse + 0.7 * fine)
        result["loss"].backward()
        assert all(p.grad is not None for p in task.trainable_module.parameters())

    def test_a_level_of_weight_0_costs_nothing(self, shared):
        task = level_task(level_decoder(shared), schedule=[1.0, 0.0])
        images, masks, _ = batch()
        result = task(images, masks)
        torch.testing.assert_close(
            result["loss"], cross_entropy_of_level(result["output"]["coarse"], masks, 0)
        )
        assert ("fine" in result["output"]) == shared  # a decoder of its own is not computed

    def test_deep_supervision(self, shared):
        task = level_task(level_decoder(shared, deep_supervision=True))
        images, masks, _ = batch()
        result = task(images, masks)
        want = {
            name: cross_entropy_of_level(y, masks, name.startswith("fine"))
            for name, y in result["output"].items()
        }
        assert "coarse_aux1" in want
        assert "fine_aux1" in want
        torch.testing.assert_close(result["losses"], {name: want[name] for name in task.names})
        assert set(task.names) == set(want)

    def test_metrics_are_those_of_the_pixels(self, shared):
        task = level_task(level_decoder(shared))
        images, masks, _ = batch()
        evaluator = task.create_evaluator()
        output = task.trainable_module.eval()(images)
        evaluator.update(output, masks)
        metrics = evaluator.compute()
        known = masks != 11
        right = []
        for level, name in enumerate(("coarse", "fine")):
            labels = torch.tensor(LEVELS[level])[masks[known]]
            right.append(output[name].argmax(1)[known] == labels)
            assert metrics[f"{name}_top1"] == pytest.approx(100 * right[-1].double().mean().item())
        assert metrics["full_path"] == pytest.approx(
            100 * (right[0] & right[1]).double().mean().item()
        )
        assert [title for title, _, _ in task.confusions(evaluator)] == ["coarse", "fine"]

    def test_class_weights_by_level(self, shared):
        weights = torch.tensor([1.0, 5.0])
        task = level_task(level_decoder(shared), class_weights={"coarse": weights})
        images, masks, _ = batch()
        result = task(images, masks)
        torch.testing.assert_close(
            result["losses"]["coarse"],
            cross_entropy_of_level(result["output"]["coarse"], masks, 0, weights),
        )
        torch.testing.assert_close(
            result["losses"]["fine"], cross_entropy_of_level(result["output"]["fine"], masks, 1)
        )

    def test_refused(self, shared):
        model = level_decoder(shared)
        with pytest.raises(ValueError, match="give the evaluator the same"):
            DenseTask(model, "ce", partial(SegmentationEvaluator, 3))
        with pytest.raises(ValueError, match="a dict with weights for some"):
            level_task(model, class_weights=torch.ones(3))
        with pytest.raises(ValueError, match="for some of .'coarse', 'fine'., got .'middle'."):
            level_task(model, class_weights={"middle": torch.ones(3)})


def test_a_decoder_of_all_levels_is_saved_and_reset(tmp_path):
    model = level_decoder(True).eval()
    assert model.num_classes == {"unet": 5}
    path = save_model(model, tmp_path / "model.safetensors")
    images, _, _ = batch()
    again = load_model(path).eval()
    assert again.taxonomy == TREE
    torch.testing.assert_close(again(images), model(images))
    other = Taxonomy(["a/x/1", "a/x/2", "b/y/3", "b/z/4"], levels=["l1", "l2", "l3"])
    model.reset_classifier(sum(other.num_classes), taxonomy=other)
    assert {name: y.shape[1] for name, y in model(images).items()} == {"l1": 2, "l2": 3, "l3": 4}
    with pytest.raises(ValueError, match="the decoder gives the sum"):
        model.reset_classifier([2], taxonomy=TREE)
    model.reset_classifier(2)
    assert {name: y.shape[1] for name, y in model(images).items()} == {"unet": 2}
    with pytest.raises(ValueError, match="does not fit the taxonomy's"):
        create_branch_model("test_resnet", taps=[3, 5], head="unet", taxonomy=TREE, num_classes=3)


def joint_task(weights=None, **kwargs):
    model = joint_model()
    return JointTask(
        {"labels": BranchTask(model, [0.3, 0.7], **kwargs), "mask": masks_task(model)}, weights
    )


def test_joint_loss_is_the_weighted_sum_of_one_pass():
    task = joint_task({"mask": 0.5})
    task.trainable_module.eval()
    images, masks, labels = batch()
    output = task.trainable_module(images)
    want = (
        0.3 * F.cross_entropy(output["coarse"], labels[:, 0])
        + 0.7 * F.cross_entropy(output["fine"], labels[:, 1])
        + 0.5 * F.cross_entropy(output["mask"], masks, ignore_index=11)
    )
    passes = []
    task.trainable_module.backbone.register_forward_pre_hook(lambda *_: passes.append(1))
    result = task(images, {"labels": labels, "mask": masks})
    torch.testing.assert_close(result["loss"], want)
    assert list(result["losses"]) == ["coarse", "fine", "mask"]
    result["loss"].backward()
    assert all(p.grad is not None for p in task.trainable_module.parameters() if p.requires_grad)


def test_a_task_of_weight_0_is_off():
    task = joint_task({"mask": 0.0})
    images, masks, labels = batch()
    task(images, {"labels": labels, "mask": masks})["loss"].backward()
    assert all(p.grad is None for p in task.trainable_module.head("mask").parameters())
    assert task.needed_heads() == ("coarse", "fine")


def test_state_of_a_joint_task():
    model = joint_model()
    task = JointTask({"labels": BranchTask(model, "dynamic"), "mask": masks_task(model)})
    task.end_epoch({"coarse_top1": 90.0, "fine_top1": 70.0}, 0)
    task.set_epoch(1)
    assert task.weights == pytest.approx((0.25, 0.75, 1))
    other = JointTask({"labels": BranchTask(model, "dynamic"), "mask": masks_task(model)})
    other.load_task_state(task.get_task_state())
    assert (other.epoch, other.weights) == (1, task.weights)


def test_what_is_refused():
    with pytest.raises(ValueError, match="without classes of whole images"):
        BranchTask(decoder())
    with pytest.raises(ValueError, match="one of the model's decoders, \\[\\]"):
        masks_task(create_branch_model("test_resnet", num_classes=2))
    with pytest.raises(ValueError, match="deep_supervision=True"):
        masks_task(decoder(), schedule=[1.0])
    with pytest.raises(ValueError, match="has no setting 'eps'"):
        DenseTask(decoder(), "ce", SegmentationEvaluator, eps=1.0)
    with pytest.raises(ValueError, match="share one model"):
        JointTask({"labels": BranchTask(joint_model()), "mask": masks_task(joint_model())})
    with pytest.raises(ValueError, match="by task"):
        joint_task({"masks": 1.0})
    images, masks, _ = batch()
    with pytest.raises(ValueError, match="an entry for each of the tasks"):
        joint_task()(images, {"mask": masks})


class Squares(Dataset):
    """Bright squares on noise: class, mask."""

    def __len__(self):
        return 12

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        image, mask = (
            torch.randn(3, 32, 32, generator=generator) * 0.1,
            torch.zeros(32, 32, dtype=torch.long),
        )
        x = 4 + 8 * (index % 3)
        image[:, x : x + 8, 8:16] += 2
        mask[x : x + 8, 8:16] = 1 + index % 2
        return image, {"labels": TREE.expand(index % 3), "mask": mask}


class Masks(Squares):
    def __getitem__(self, index):
        image, target = super().__getitem__(index)
        return image, target["mask"]


class Images(Squares):
    def __getitem__(self, index):
        image, _ = super().__getitem__(index)
        return image + 0.1, image


@pytest.mark.parametrize("kind", ["mask", "image", "joint"])
def test_fit(tmp_path, kind):
    data = {"mask": Masks, "image": Images, "joint": Squares}[kind]()
    task = {
        "mask": lambda: masks_task(decoder()),
        "joint": joint_task,
        "image": lambda: DenseTask(decoder(residual=True), "l1", RestorationEvaluator),
    }[kind]()
    metric = {"mask": "miou", "image": "psnr", "joint": "fine_top1"}[kind]
    assert task.default_metric == metric
    config = FitConfig(
        output=str(tmp_path),
        epochs=3,
        opt="adamw",
        lr=3e-3,
        sched="none",
        progress=False,
        device="cpu",
    )
    result = fit(task, create_loader(data, 4, is_training=True), create_loader(data, 4), config)
    losses = [row["train_loss"] for row in result.history]
    assert losses[-1] < losses[0]
    assert result.best[metric] == max(row[f"eval_{metric}"] for row in result.history)
    assert (tmp_path / "history.png").exists()
    assert (tmp_path / "confusion_pixel.png").exists() == (kind != "image")
    task.trainable_module = load_model(result.model_path)
    if kind != "joint":
        assert evaluate(task, create_loader(data, 5)).metrics[metric] == pytest.approx(
            result.best[metric], rel=1e-4
        )
