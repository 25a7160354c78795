"""Small networks, data and settings for runs of :func:`fit`."""

import hashlib

import torch
from torch.utils.data import DataLoader, TensorDataset

from timm_branches import PoolHead, Taxonomy, create_branch_model
from timm_branches.task import BranchTask, base_model
from timm_branches.train import FitConfig

TREE = Taxonomy(["a/0", "a/1", "b/2", "b/3"], levels=["coarse", "fine"])


def make_task(name="test_resnet", schedule=None, hidden=(), size=16, seed=0, **kwargs):
    torch.manual_seed(seed)
    if name == "test_vit":
        kwargs = {"patch_size": 4, **kwargs}
    if name == "test_convnext":
        size = 32
    model = create_branch_model(
        name,
        taps=[4, 5],
        taxonomy=TREE,
        in_chans=1,
        img_size=size,
        head=PoolHead(hidden=hidden),
        **kwargs,
    )
    return BranchTask(model, schedule, verbose=False)


def make_data(count=16, size=16, seed=0):
    """Images whose brightness tells the leaf."""
    torch.manual_seed(seed)
    leaves = torch.arange(count) % 4
    images = torch.randn(count, 1, size, size) * 0.3 + leaves[:, None, None, None] - 1.5
    return TensorDataset(images, TREE.expand(leaves))


def loader_of(data, batch_size=8, shuffle=False):
    return DataLoader(data, batch_size=batch_size, shuffle=shuffle)


def settings(folder, **kwargs):
    return FitConfig(
        **{
            "output": str(folder),
            "epochs": 2,
            "device": "cpu",
            "lr": 0.02,
            "sched": "constant",
            "weight_decay": 0.0,
            "plots": False,
            "progress": False,
            **kwargs,
        }
    )


def weights_of(task, ema=False):
    return {k: v.clone() for k, v in base_model(task, ema=ema).state_dict().items()}


def assert_equal(a, b):
    assert a.keys() == b.keys()
    different = [key for key in a if not torch.equal(a[key], b[key])]
    assert not different


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()
