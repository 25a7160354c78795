"""An evaluation that cannot work fails before the first epoch, and trying it changes nothing."""

from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from timm_branches import create_branch_model
from timm_branches.data import PairTransform, SegmentationDataset, create_loader
from timm_branches.dense import SegmentationEvaluator
from timm_branches.task import DenseTask
from timm_branches.train import FitConfig, fit, try_evaluation


def photographs(folder, *sides):
    """Photographs of these sides and their masks, in files."""
    for i, side in enumerate(sides):
        mask = (np.indices((side, side)).sum(0) % 2).astype(np.uint8)
        for name, picture in (("images", np.dstack([mask] * 3) * 255), ("masks", mask)):
            (folder / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(folder / name / f"{i}.png")
    transform = PairTransform()
    return SegmentationDataset(str(folder / "images"), str(folder / "masks"), 2, None, transform)


def make_task(name="test_vit_relpos"):
    """A ViT takes images of one size only."""
    torch.manual_seed(0)
    model = create_branch_model(name, taps=[3, 5], head="unet", num_classes=2, img_size=32)
    return DenseTask(model, "ce", partial(SegmentationEvaluator, 2))


def test_one_size_among_many_is_found_before_training(tmp_path):
    train = create_loader(photographs(tmp_path / "train", 32, 32), 2, is_training=True)
    val = create_loader(photographs(tmp_path / "val", 32, 32, 32, 70), 1)
    task = make_task()
    before = {key: value.clone() for key, value in task.trainable_module.state_dict().items()}
    config = FitConfig(epochs=1, output=str(tmp_path / "run"), progress=False, plots=False)
    with pytest.raises(ValueError, match="for input 3x"):
        fit(task, train, val, config)
    assert not (tmp_path / "run" / "last.safetensors").exists()
    after = task.trainable_module.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_changes_nothing(tmp_path):
    task = make_task("test_resnet").train()
    model = task.trainable_module
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.get_rng_state()
    calls = []
    model.register_forward_pre_hook(lambda module, args: calls.append(tuple(args[0].shape[2:])))
    try_evaluation(task, create_loader(photographs(tmp_path, 32, 45, 32, 70), 1))
    assert calls == [(32, 32), (45, 45), (70, 70)]  # one of each size
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert model.training
