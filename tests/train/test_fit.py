"""The training loop: precision, layout, freezing, losses that fail, the best epoch and files."""

import csv
import math

import pytest
import torch
from timm.task import TrainingTask
from torch import nn
from torch.utils.data import DataLoader

import timm_branches.train.loop as loop
from tests.train.small_runs import (
    TREE,
    assert_equal,
    digest,
    loader_of,
    make_data,
    make_task,
    settings,
    weights_of,
)
from timm_branches import create_branch_model, load_model
from timm_branches.task import BranchTask, FlatTask, base_model
from timm_branches.train import evaluate, fit
from timm_branches.train.checkpoint import load_state

# -- precision, layout, freezing
# -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"amp": True},
        {"amp": True, "amp_dtype": "float16"},
        {"channels_last": True},
        {"amp": True, "channels_last": True, "clip_grad": 1.0},
        {"grad_checkpointing": True},
    ],
)
def test_ways_to_compute_all_learn(tmp_path, options):
    # of maps of 1x1, some CPUs' bfloat16 convolutions with stride leave NaN in the gradient, in
    # torch itself
    name, size, epochs = (
        ("test_vit", 16, 12) if options.get("amp_dtype") == "float16" else ("test_resnet", 64, 5)
    )
    data = make_data(48, size)  # (convolutions in float16 are slow on a CPU)
    task = make_task(name, size=size)
    dtypes = set()
    head = base_model(task).head("fine").fc
    head.register_forward_hook(lambda m, x, y: dtypes.add(y.dtype))
    result = fit(
        task,
        loader_of(data),
        loader_of(data),
        settings(tmp_path, epochs=epochs, lr=0.05, **options),
    )
    assert result.best["fine_top1"] > 80
    assert result.history[-1]["train_loss"] < 0.5 * result.history[0]["train_loss"]
    expected = (
        getattr(torch, options.get("amp_dtype", "bfloat16"))
        if options.get("amp")
        else torch.float32
    )
    assert dtypes == {expected}
    assert all(p.dtype == torch.float32 for p in task.parameters())
    if options.get("channels_last"):
        convs = [
            m.weight for m in task.modules() if isinstance(m, nn.Conv2d) and m.weight.shape[1] > 1
        ]
        assert any(
            w.is_contiguous(memory_format=torch.channels_last) and not w.is_contiguous()
            for w in convs
        )
    if options.get("amp_dtype") == "float16":
        assert load_state(tmp_path / "last.safetensors")["scaler"]["scale"] > 0


def test_checkpointing_and_layout_change_nothing_but_rounding(tmp_path):
    data = loader_of(make_data(16, 32))
    results = []
    for i, options in enumerate(({}, {"grad_checkpointing": True}, {"channels_last": True})):
        task = make_task("test_convnext")
        fit(task, data, None, settings(tmp_path / str(i), **options))
        results.append(weights_of(task))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(results[2], results[0], rtol=1e-4, atol=1e-6)


def test_a_frozen_backbone_stays_bit_for_bit(tmp_path):
    task = make_task(hidden=(8,))
    before = weights_of(task)
    fit(
        task,
        loader_of(make_data()),
        None,
        settings(tmp_path, freeze_backbone=True, weight_decay=0.1, model_ema=True),
    )
    saved = load_model(tmp_path / "model.safetensors").state_dict()
    for after in (weights_of(task), saved):
        same = {key for key in before if torch.equal(before[key], after[key])}
        assert {key for key in before if key.startswith("backbone.")} == {
            k for k in same if k.startswith("backbone.")
        }
        assert "heads.fine.fc.weight" not in same
        assert "heads.fine.hidden.2.running_mean" not in same
    state = load_state(tmp_path / "last.safetensors")["optimizer"]
    heads = sum(1 for key, _ in base_model(task).named_parameters() if key.startswith("heads."))
    assert sum(len(group["params"]) for group in state["param_groups"]) == heads


@pytest.mark.slow
def test_torchcompile(tmp_path):
    data = loader_of(make_data())
    plain, compiled = make_task(schedule="0:1,0;1:0,1"), make_task(schedule="0:1,0;1:0,1")
    fit(plain, data, data, settings(tmp_path / "a"))
    result = fit(compiled, data, data, settings(tmp_path / "b", torchcompile=True))
    torch.testing.assert_close(weights_of(compiled), weights_of(plain), rtol=1e-3, atol=1e-4)
    assert load_model(result.model_path).names == ("coarse", "fine")


def test_the_moving_average_is_what_is_evaluated_and_saved(tmp_path):
    data = loader_of(make_data(), 4)
    task = make_task()
    result = fit(
        task, data, data, settings(tmp_path, epochs=1, model_ema=True, model_ema_decay=0.8)
    )
    saved = load_model(result.model_path)
    assert_equal(saved.state_dict(), weights_of(task, ema=True))
    assert not torch.equal(
        saved.state_dict()["heads.fine.fc.weight"], weights_of(task)["heads.fine.fc.weight"]
    )
    assert dict(evaluate(task, data, ema=True).metrics) == result.best
    assert dict(evaluate(BranchTask(saved), data).metrics) == result.best


def test_moving_average_by_hand(tmp_path, monkeypatch):
    """The first update is copied, each later one enters with 1 - decay."""
    trail = []
    original = TrainingTask.update_ema

    def spy(self, step=None):
        original(self, step)
        trail.append(base_model(self).state_dict()["heads.fine.fc.weight"].clone())

    monkeypatch.setattr(BranchTask, "update_ema", spy)
    task = make_task()
    fit(
        task,
        loader_of(make_data(), 4),
        None,
        settings(tmp_path, model_ema=True, model_ema_decay=0.8),
    )
    assert len(trail) == 8
    average = trail[0]
    for value in trail[1:]:
        average = 0.8 * average + 0.2 * value
    torch.testing.assert_close(weights_of(task, ema=True)["heads.fine.fc.weight"], average)


# -- losses that fail
# ----------------------------------------------------------------------------------------------


class Poison:
    """A loader whose image in one batch of one epoch is not finite."""

    def __init__(self, inner, epoch, batch, value):
        self.inner, self.at, self.value = inner, (epoch, batch), value

    def __len__(self):
        return len(self.inner)

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        for index, (images, labels) in enumerate(self.inner):
            yield (images + self.value if (self.epoch, index) == self.at else images), labels


@pytest.mark.parametrize(
    ("value", "interval"), [(float("nan"), 50), (float("inf"), 50), (float("nan"), 1)]
)
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, value, interval):
    data = loader_of(make_data(16), 4)
    task = make_task("test_vit", schedule="0:1,0;1:0,1")
    config = settings(tmp_path, epochs=3, log_interval=interval)
    seen = {}

    class Watch(Poison):
        def set_epoch(self, epoch):
            super().set_epoch(epoch)
            seen.update({path.name: digest(path) for path in tmp_path.glob("*.*")})

    with pytest.raises(FloatingPointError, match="fine' became nan in batch 3 of epoch 2"):
        fit(task, Watch(data, 1, 2, value), data, config)
    assert seen.keys() == {"last.safetensors", "model.safetensors", "log.csv"}
    assert {path.name: digest(path) for path in tmp_path.iterdir()} == seen
    assert load_state(tmp_path / "last.safetensors")["epoch"] == 0
    load_model(tmp_path / "model.safetensors")
    # on a CPU the update itself is prevented
    assert all(p.isfinite().all() for p in task.parameters())
    assert (
        len(
            fit(
                make_task("test_vit"), data, data, settings(tmp_path, epochs=3, resume="auto")
            ).history
        )
        == 3
    )


@pytest.mark.parametrize(("every", "expected"), [(1, [1] * 5), (2, [2, 2, 1]), (50, [5])])
def test_how_often_the_loss_is_checked(tmp_path, monkeypatch, every, expected):
    """On an accelerator a check waits for the device, so several batches share one."""
    sizes = []
    original = loop.check_losses
    monkeypatch.setattr(
        loop,
        "check_losses",
        lambda pending, epoch: (sizes.append(len(pending)), original(pending, epoch)),
    )
    run = loop._Run(
        make_task(),
        loader_of(make_data(20), 4),
        None,
        settings(tmp_path, log_interval=every),
        None,
        {},
    )

    class Accelerator:
        type = "elsewhere"

    device, run.device = run.device, Accelerator()
    monkeypatch.setattr(loop, "images_to", lambda images, *_: images)
    run.loader = [(images, Labels(labels)) for images, labels in run.loader]
    run._train(0)
    assert sizes == expected
    assert device.type == "cpu"
    pending = [
        (0, {"a": torch.tensor(1.0)}),
        (3, {"a": torch.tensor(2.0), "b": torch.tensor(float("inf"))}),
    ]
    with pytest.raises(FloatingPointError, match="level 'b' became inf in batch 4 of epoch 8"):
        original(pending, 7)


class Labels:
    """Labels that stay where they are."""

    def __init__(self, labels):
        self.labels = labels

    def to(self, *args, **kwargs):
        return self.labels


def test_weights_ruined_by_an_epochs_last_update_are_not_saved(tmp_path):
    """The loss would only show it in the next epoch, when the good checkpoint were gone."""
    task = make_task("test_vit")
    data = loader_of(make_data(8))
    fit(task, data, data, settings(tmp_path, epochs=1))
    before = {path.name: digest(path) for path in tmp_path.iterdir()}
    task = make_task("test_vit")
    handle = base_model(task).head("fine").fc.weight.register_hook(lambda g: g * float("nan"))
    with pytest.raises(
        FloatingPointError, match="weight of head 'fine', became NaN or infinite in epoch 2"
    ):
        fit(task, data, data, settings(tmp_path, epochs=2, resume="auto"))
    handle.remove()
    assert {path.name: digest(path) for path in tmp_path.iterdir()} == before


def test_a_level_that_is_off_may_be_infinite(tmp_path):
    task = make_task(schedule=[0, 1])
    with torch.no_grad():
        base_model(task).head("coarse").fc.weight.fill_(float("nan"))
    data = loader_of(make_data())
    result = fit(task, data, data, settings(tmp_path))
    assert math.isfinite(result.history[-1]["train_loss"])
    assert math.isfinite(result.best["fine_top1"])


# -- the best epoch
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metric", "values", "best"),
    [
        ("", [10.0, 30.0, 30.0, 20.0], 1),
        ("loss", [2.0, 1.0, 1.5, 1.0], 1),
        ("full_path", [5.0, math.nan, 4.0, 6.0], 3),
        ("coarse_top1", [math.nan, math.nan, 3.0, 2.0], 2),
    ],
)
def test_which_epoch_is_the_best(tmp_path, monkeypatch, metric, values, best):
    class Judge:
        def __init__(self, value):
            self.metrics = {
                "loss": 0.0,
                "coarse_top1": 0.0,
                "fine_top1": 0.0,
                "full_path": 0.0,
                "consistency": 0.0,
                metric or "fine_top1": value,
            }

    queue = [Judge(value) for value in values]
    monkeypatch.setattr(loop, "evaluate", lambda *args, **kwargs: queue.pop(0))
    data = loader_of(make_data(8))
    result = fit(make_task(), data, data, settings(tmp_path, epochs=4, eval_metric=metric))
    assert result.best_epoch == best
    import json

    from timm_branches.weights import read_metadata

    assert json.loads(read_metadata(result.model_path)["extra"])["epoch"] == best


def test_without_evaluation_the_last_epoch_is_the_best(tmp_path):
    task = make_task()
    result = fit(task, loader_of(make_data(8)), None, settings(tmp_path, epochs=3))
    assert result.best_epoch == 2
    assert_equal(load_model(result.model_path).state_dict(), weights_of(task))


# -- files
# -------------------------------------------------------------------------------------------------


def test_files_of_a_run(tmp_path, caplog):
    caplog.set_level("INFO", logger="timm_branches")
    data = loader_of(make_data(16), 4)
    result = fit(
        make_task(),
        data,
        data,
        settings(tmp_path, epochs=3, plots=True, tensorboard=True, progress=True),
        facts={"data": "made up"},
    )
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {
        "model.safetensors",
        "last.safetensors",
        "log.csv",
        "history.png",
        "confusion_coarse.png",
        "confusion_fine.png",
        "tensorboard",
    }
    assert list((tmp_path / "tensorboard").glob("events*"))
    with open(tmp_path / "log.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [int(row["epoch"]) for row in table] == [0, 1, 2]
    own = {
        "epoch",
        "lr",
        "train_loss",
        "train_loss_coarse",
        "train_loss_fine",
        "weight_coarse",
        "weight_fine",
        "seconds",
        "images_per_second",
    }
    metrics = {f"eval_{name}" for name in make_task().create_evaluator().metric_names}
    assert {"eval_fine_top1", "eval_full_path", "eval_severity"} < metrics
    assert set(table[0]) == own | metrics
    assert table[-1]["eval_severity"] == ""  # there is no mistake left whose severity could be told
    assert float(table[-1]["eval_fine_top1"]) == result.history[-1]["eval_fine_top1"]
    for name in ("history.png", "confusion_fine.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert caplog.text.count("fine ") == 3


def test_plots_and_trackers_only_when_asked(tmp_path):
    data = loader_of(make_data(8))
    fit(make_task(), data, data, settings(tmp_path, epochs=1))
    assert {path.name for path in tmp_path.iterdir()} == {
        "model.safetensors",
        "last.safetensors",
        "log.csv",
    }


def test_logged_losses_are_means_over_batches(tmp_path):
    data = make_data(12)
    result = fit(
        make_task("test_vit"), loader_of(data, 4), None, settings(tmp_path, epochs=1, lr=1e-30)
    )
    task = make_task("test_vit")
    parts = [task(images, labels) for images, labels in loader_of(data, 4)]
    for key, want in (
        ("train_loss", [p["loss"] for p in parts]),
        ("train_loss_fine", [p["losses"]["fine"] for p in parts]),
    ):
        assert result.history[0][key] == pytest.approx(torch.stack(want).mean().item(), rel=1e-6)


def test_flat_baseline_is_trained_and_judged_on_all_levels(tmp_path):
    torch.manual_seed(0)
    model = create_branch_model(
        "test_resnet", taps=[5], num_classes=4, names=["leaf"], in_chans=1, img_size=16
    )
    data = loader_of(make_data(64))
    result = fit(
        FlatTask(model, TREE), data, data, settings(tmp_path, epochs=5, lr=0.05, plots=True)
    )
    assert result.best["coarse_top1"] >= result.best["fine_top1"] > 80
    assert "train_loss_leaf" in result.history[0]
    assert (tmp_path / "confusion_coarse.png").exists()


def test_a_distributed_samplers_epoch_is_set(tmp_path):
    """torch's own loader leaves it to the sampler, which repeats one order if nobody tells it."""
    from torch.utils.data.distributed import DistributedSampler

    data = make_data()
    sampler = DistributedSampler(data, num_replicas=1, rank=0)
    fit(make_task(), DataLoader(data, batch_size=8, sampler=sampler), None, settings(tmp_path))
    assert sampler.epoch == 1


def test_evaluate_leaves_the_mode_as_it_was():
    task = make_task()
    for mode in (True, False):
        task.train(mode)
        evaluate(task, loader_of(make_data(8)))
        assert task.trainable_module.training is mode
