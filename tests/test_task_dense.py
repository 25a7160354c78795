"""Dense and joint tasks against sums written by hand, and through the loop."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

from timm_branches import Taxonomy, UNetHead, create_branch_model, load_model
from timm_branches.data import create_loader
from timm_branches.dense import RestorationEvaluator, SegmentationEvaluator
from timm_branches.task import BranchTask, DenseTask, JointTask
from timm_branches.train import FitConfig, evaluate, fit

TREE = Taxonomy(["animal/cat", "animal/dog", "thing/car"], levels=["coarse", "fine"])


def decoder(num_classes=3, **kwargs):
    torch.manual_seed(0)
    return create_branch_model("test_resnet", taps=[2, 3, 4, 5], head=UNetHead(channels=(8, 8, 8, 8, 8), **kwargs),
                               num_classes=num_classes, names=["mask"], img_size=32)


def joint_model():
    torch.manual_seed(0)
    return create_branch_model("test_resnet", taps=[4, 5, (2, 3, 4, 5)], taxonomy=TREE, num_classes=[None, None, 3],
                               head=["pool", "pool", UNetHead(channels=(8, 8, 8, 8, 8))],
                               names=["coarse", "fine", "mask"], img_size=32)


def batch(size=4):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(size, 3, 32, 32, generator=generator)
    masks = torch.randint(3, (size, 32, 32), generator=generator)
    masks[:, :8] = 11
    return images, masks, TREE.expand(torch.arange(size) % 3)


def masks_task(model, **kwargs):
    return DenseTask(model, "ce", partial(SegmentationEvaluator, 3, ignore_index=11), ignore_index=11, **kwargs)


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
    losses = [F.cross_entropy(result["output"][name], masks, ignore_index=11) for name in task.names]
    want = sum(w * loss for w, loss in zip((0.1, 0.2, 0.3, 0.4, 1), losses, strict=True))
    torch.testing.assert_close(result["loss"], want)
    task.set_epoch(1)
    result = task(images, masks)
    assert list(result["losses"]) == ["mask"]
    task.trainable_module.eval()
    task.set_epoch(0)
    assert list(task(images, masks)["losses"]) == ["mask"]


def joint_task(weights=None, **kwargs):
    model = joint_model()
    return JointTask({"labels": BranchTask(model, [0.3, 0.7], **kwargs), "mask": masks_task(model)}, weights)


def test_joint_loss_is_the_weighted_sum_of_one_pass():
    task = joint_task({"mask": 0.5})
    task.trainable_module.eval()
    images, masks, labels = batch()
    output = task.trainable_module(images)
    want = 0.3 * F.cross_entropy(output["coarse"], labels[:, 0]) + 0.7 * F.cross_entropy(output["fine"], labels[:, 1]) \
        + 0.5 * F.cross_entropy(output["mask"], masks, ignore_index=11)
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
        image, mask = torch.randn(3, 32, 32, generator=generator) * 0.1, torch.zeros(32, 32, dtype=torch.long)
        x = 4 + 8 * (index % 3)
        image[:, x:x + 8, 8:16] += 2
        mask[x:x + 8, 8:16] = 1 + index % 2
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
    task = {"mask": lambda: masks_task(decoder()), "joint": joint_task,
            "image": lambda: DenseTask(decoder(residual=True), "l1", RestorationEvaluator)}[kind]()
    metric = {"mask": "miou", "image": "psnr", "joint": "fine_top1"}[kind]
    assert task.default_metric == metric
    config = FitConfig(output=str(tmp_path), epochs=3, opt="adamw", lr=3e-3, sched="none", progress=False, device="cpu")
    result = fit(task, create_loader(data, 4, is_training=True), create_loader(data, 4), config)
    losses = [row["train_loss"] for row in result.history]
    assert losses[-1] < losses[0]
    assert result.best[metric] == max(row[f"eval_{metric}"] for row in result.history)
    assert (tmp_path / "history.png").exists()
    assert (tmp_path / "confusion_pixel.png").exists() == (kind != "image")
    task.trainable_module = load_model(result.model_path)
    if kind != "joint":
        assert evaluate(task, create_loader(data, 5)).metrics[metric] == pytest.approx(result.best[metric], rel=1e-4)
