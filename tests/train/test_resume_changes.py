"""Resuming with something changed: refused where it means something else, said where it is used."""

import re

import pytest
import torch

from tests.train.small_runs import TREE, settings
from timm_branches import PoolHead, Taxonomy, create_branch_model
from timm_branches.data import HierarchicalDataset, create_loader, create_transform
from timm_branches.task import BranchTask
from timm_branches.train import fit


def images(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 255, (count, 16, 16), generator=generator, dtype=torch.uint8).numpy()


def run(folder, **changes):
    """A small run in which everything can be changed; returns its task, optimizer and result."""
    tree = changes.pop("tree", TREE)
    count = changes.pop("count", 16)
    leaves = torch.arange(count) % 4
    if changes.pop("relabel", False):
        leaves[0] = 3
    data = HierarchicalDataset(images(count), tree.expand(leaves), tree)
    data.transform = create_transform(
        16,
        is_training=True,
        augment=changes.pop("augment", "light"),
        mean=changes.pop("mean", (0.5,)),
        std=(0.5,),
    )
    val = HierarchicalDataset(images(8, 1), tree.expand(torch.arange(8) % 4), tree)
    val.transform = create_transform(16, mean=(0.5,), std=(0.5,))
    val = val.subset(range(changes.pop("val_count", 8)))
    loader = create_loader(
        data,
        changes.pop("batch_size", 4),
        is_training=True,
        seed=0,
        sampler=changes.pop("sampler", None),
    )
    torch.manual_seed(0)
    model = create_branch_model(
        "test_resnet",
        taps=[4, 5],
        taxonomy=tree,
        in_chans=1,
        img_size=16,
        head=PoolHead(pool_type=changes.pop("pool_type", "avg")),
        drop_rate=changes.pop("drop_rate", 0.0),
        act_layer=changes.pop("act_layer", "relu"),
    )
    names = ("label_smoothing", "class_weights", "consistency", "marginal")
    options = {name: changes.pop(name) for name in names if name in changes}
    task = BranchTask(model, changes.pop("loss_weights", None), **options, verbose=False)
    own = {"epochs": 2, "opt": "momentum", "lr": 0.02, "momentum": 0.9, "weight_decay": 1e-4}
    own |= {"sched": "cosine", "log_interval": 7}
    return fit(task, loader, create_loader(val, 4), settings(folder, **{**own, **changes}))


OTHER_TREE = Taxonomy(["a/0", "a/1", "b/2", "b/4"], levels=["coarse", "fine"])
OTHER_ORDER = Taxonomy(["b/3", "a/0", "a/1", "b/2"], levels=["coarse", "fine"])
OTHER_LEVELS = Taxonomy(["a/0", "a/1", "b/2", "b/3"], levels=["kind", "fine"])
REFUSED = {
    "another name": ({"tree": OTHER_TREE}, "other labels"),
    "another order": ({"tree": OTHER_ORDER}, "other labels"),
    "more data": ({"count": 20}, "other training data"),
    "less data": ({"count": 12}, "other training data"),
    "another label": ({"relabel": True}, "other training data"),
    "other validation data": ({"val_count": 4}, "other validation data"),
    "another optimizer": ({"opt": "adamw"}, "--opt"),
    "layer decay": ({"layer_decay": 0.5}, "--layer-decay"),
    "frozen": ({"freeze_backbone": True}, "--freeze-backbone"),
    "another pooling": ({"pool_type": "max"}, "pool_type"),
    "another activation": ({"act_layer": "gelu"}, "act_layer"),
    "an average that is not there": ({"model_ema": True}, "moving average"),
}
SAID = {
    "epochs": ({"epochs": 4}, "--epochs: asked 4, used 4 (the checkpoint: 2)"),
    "rate": ({"lr": 0.01}, "--lr: asked 0.01, used 0.01 (the checkpoint: 0.02)"),
    "schedule": (
        {"sched": "none"},
        '--sched: asked "none", used "none" (the checkpoint: "cosine")',
    ),
    "warm-up": ({"warmup_epochs": 1}, "--warmup-epochs: asked 1"),
    "lowest rate": ({"min_lr": 1e-4}, "--min-lr: asked 0.0001"),
    "weight decay": ({"weight_decay": 0.01}, "--weight-decay: asked 0.01, used 0.01"),
    "momentum": ({"momentum": 0.5}, "--momentum: asked 0.5"),
    "clipping": ({"clip_grad": 1.0}, "--clip-grad: asked 1.0, used 1.0 (the checkpoint: null)"),
    "accumulation": ({"grad_accum_steps": 2}, "--grad-accum-steps: asked 2"),
    "batch": ({"batch_size": 8}, "batch_size: asked 8, used 8 (the checkpoint: 4)"),
    "sampler": ({"sampler": "balanced"}, 'sampler: asked "BalancedSampler"'),
    "precision": ({"amp": True, "amp_dtype": "float16"}, "--amp: asked true"),
    "seed": ({"seed": 3}, "--seed: asked 3"),
    "dropout": ({"drop_rate": 0.3}, "drop_rate: asked 0.3"),
    "smoothing": ({"label_smoothing": 0.1}, "label smoothing: asked 0.1"),
    "class weights": ({"class_weights": {"fine": [1, 2, 1, 1]}}, "class weights: fine"),
    "consistency": ({"consistency": 0.5}, "consistency: asked 0.5"),
    "marginal": ({"marginal": True}, "marginal: asked true"),
    "augmentation": ({"augment": "cifar"}, "training transform"),
    "normalisation": ({"mean": (0.4,)}, "training transform: mean: asked 0.4"),
    "loss weights": ({"loss_weights": "0:1,0"}, "schedule is used, not the one asked for"),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    run(folder)
    return folder


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED)
def test_what_means_something_else_is_refused(finished, tmp_path, changes, message):
    path = finished / "last.safetensors"
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        run(tmp_path / "run", **{"epochs": 3, **changes}, resume=str(path))
    assert "last.safetensors" in str(error.value)
    assert not (tmp_path / "run" / "last.safetensors").exists()


@pytest.mark.parametrize(("changes", "message"), SAID.values(), ids=SAID)
def test_what_is_used_is_said(finished, tmp_path, changes, message, caplog):
    path = finished / "last.safetensors"
    run(tmp_path / "run", **{"epochs": 3, **changes}, resume=str(path))
    assert message in caplog.text


def test_nothing_is_said_of_the_same(tmp_path, caplog):
    run(tmp_path)
    caplog.clear()
    run(tmp_path, resume="auto", log_interval=9, plots=False)
    assert "--resume" not in caplog.text


@pytest.mark.parametrize(
    ("changes", "rate"),
    [
        # half of four epochs is behind it; a finished cosine would be at 0
        ({"epochs": 4, "grad_accum_steps": 2}, 0.01),
        ({"epochs": 4, "batch_size": 8}, 0.01),
        ({"epochs": 3, "sched": "none", "lr": 0.005}, 0.005),
        ({"epochs": 3, "sched": "none"}, 0.02),
    ],
)
def test_the_rate_goes_on_where_the_epoch_is(finished, tmp_path, changes, rate):
    """Closed form of the cosine, by the share of the epochs that is behind the run."""
    path = finished / "last.safetensors"
    result = run(tmp_path / "run", **changes, resume=str(path))
    assert result.history[-1 if changes["epochs"] == 3 else 2]["lr"] == pytest.approx(rate)


def test_settings_of_the_optimizer_are_those_asked_for(finished, tmp_path):
    from timm_branches.train.checkpoint import load_state

    path = finished / "last.safetensors"
    run(tmp_path / "run", epochs=3, weight_decay=0.01, momentum=0.5, resume=str(path))
    groups = load_state(tmp_path / "run" / "last.safetensors")["optimizer"]["param_groups"]
    assert sorted({group["weight_decay"] for group in groups}) == [0.0, 0.01]
    assert {group["momentum"] for group in groups} == {0.5}
