"""The training loop, stopped and resumed: bit for bit the run that was never interrupted."""

import pytest
import torch

import timm_branches.train.loop as loop
from tests.train.small_runs import (
    assert_equal,
    digest,
    loader_of,
    make_data,
    make_task,
    settings,
    weights_of,
)
from timm_branches import PoolHead, create_branch_model, load_model
from timm_branches.data import HierarchicalMixup, create_loader, create_splits, create_transform
from timm_branches.task import BranchTask
from timm_branches.train import fit
from timm_branches.train.checkpoint import load_state


class Stopped(Exception):
    """Stands for a kill: nothing in the loop knows it."""


class StopsAt:
    """A loader that breaks off in the middle of an epoch."""

    def __init__(self, inner, epoch, batch, error):
        self.inner, self.at, self.error = inner, (epoch, batch), error

    def __len__(self):
        return len(self.inner)

    def set_epoch(self, epoch):
        self.epoch = epoch
        self.inner.set_epoch(epoch)

    def __iter__(self):
        for index, batch in enumerate(self.inner):
            if (self.epoch, index) == self.at:
                raise self.error
            yield batch


def digits_run(folder, stop=None, **kwargs):
    """A run with all that is random.

    Augmentation, mixup, dropout, shuffling; and all that has memory.
    """
    train, val, _ = create_splits("digits", in_chans=1)
    train.transform = create_transform(
        16, is_training=True, augment="light", mean=(0.5,), std=(0.5,), hflip=0.0
    )
    val.transform = create_transform(16, mean=(0.5,), std=(0.5,))
    train, val = train.limit(96), val.limit(50)
    tree = train.taxonomy
    torch.manual_seed(0)
    model = create_branch_model(
        "test_resnet",
        taps=[4, 5],
        taxonomy=tree,
        in_chans=1,
        img_size=16,
        head=PoolHead(hidden=(16,)),
        drop_rate=0.2,
    )
    task = BranchTask(model, "0:1,0;2:0.5,0.5;3:0,1", verbose=False)
    loader = create_loader(train, 16, is_training=True, seed=3)
    config = settings(
        folder,
        epochs=5,
        opt="adamw",
        lr=3e-3,
        weight_decay=0.05,
        sched="cosine",
        warmup_epochs=1,
        model_ema=True,
        model_ema_decay=0.9,
        model_ema_warmup=True,
        grad_accum_steps=2,
        clip_grad=1.0,
        seed=5,
        **kwargs,
    )
    mixup = HierarchicalMixup(0.2, 1.0, num_classes=tree.num_classes)
    if stop:
        loader = StopsAt(loader, *stop)
    return task, fit(task, loader, create_loader(val, 16), config, mixup)


def rows(result):
    return [
        {
            k: v
            for k, v in row.items()
            if k not in ("seconds", "images_per_second") and v is not None
        }
        for row in result.history
    ]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, *digits_run(folder)


@pytest.mark.parametrize(
    "stop", [(1, 0, Stopped()), (2, 3, KeyboardInterrupt()), (4, 5, Stopped())]
)
def test_resumed_is_bit_for_bit_the_uninterrupted(tmp_path, whole_run, stop):
    folder, task, result = whole_run
    with pytest.raises(type(stop[2])):
        digits_run(tmp_path, stop)
    assert load_state(tmp_path / "last.safetensors")["epoch"] == stop[0] - 1
    torch.manual_seed(99)  # another process has other generators
    resumed, other = digits_run(tmp_path, resume="auto")
    assert_equal(weights_of(task), weights_of(resumed))
    assert_equal(weights_of(task, ema=True), weights_of(resumed, ema=True))
    want, got = (load_state(path / "last.safetensors") for path in (folder, tmp_path))
    assert want["optimizer"]["param_groups"] == got["optimizer"]["param_groups"]
    assert want["optimizer"]["state"].keys() == got["optimizer"]["state"].keys()
    for key, state in want["optimizer"]["state"].items():
        assert_equal(state, got["optimizer"]["state"][key])
    assert rows(result) == rows(other)
    assert [row["epoch"] for row in other.history] == list(range(5))
    assert (result.best_epoch, result.best) == (other.best_epoch, other.best)
    assert_equal(
        load_model(result.model_path).state_dict(), load_model(other.model_path).state_dict()
    )


def test_another_seed_is_another_run(tmp_path, whole_run):
    """What the test above compares does depend on the generators."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            loop, "seed_everything", lambda seed, epoch, rank: torch.manual_seed(77 + epoch)
        )
        task, _ = digits_run(tmp_path)
    assert not torch.equal(
        weights_of(task)["heads.digit.fc.weight"], weights_of(whole_run[1])["heads.digit.fc.weight"]
    )


def test_levels_that_are_off_are_empty_in_the_log(whole_run):
    _, _, result = whole_run
    assert ["train_loss_digit" in row for row in rows(result)] == [False, False, True, True, True]
    assert ["train_loss_shape" in row for row in rows(result)] == [True, True, True, False, False]


def test_learns(tmp_path):
    task = make_task()
    data = make_data(64)
    result = fit(task, loader_of(data), loader_of(data), settings(tmp_path, epochs=5, lr=0.05))
    assert result.best["fine_top1"] > 80
    losses = [row["train_loss"] for row in result.history]
    assert losses[-1] < 0.5 * losses[0]


def test_a_finished_run_trains_nothing(tmp_path):
    data = loader_of(make_data())
    first = fit(make_task(), data, data, settings(tmp_path))
    before = {path.name: digest(path) for path in tmp_path.iterdir()}
    task = make_task(seed=1)
    again = fit(task, data, data, settings(tmp_path, resume="auto"))
    assert {path.name: digest(path) for path in tmp_path.iterdir()} == before
    assert (again.best_epoch, again.best) == (first.best_epoch, first.best)
    assert rows(again) == rows(first)
    assert_equal(weights_of(task), load_state(tmp_path / "last.safetensors")["state_dict"])
    with pytest.raises(ValueError, match="nothing is left of --epochs 2"):
        fit(make_task(), data, data, settings(tmp_path, resume=str(tmp_path / "last.safetensors")))
    more = fit(
        make_task(),
        data,
        data,
        settings(tmp_path, epochs=3, resume=str(tmp_path / "last.safetensors")),
    )
    assert [row["epoch"] for row in more.history] == [0, 1, 2]


def test_an_earlier_run_is_not_overwritten(tmp_path):
    data = loader_of(make_data())
    fit(make_task(), data, None, settings(tmp_path))
    before = {path.name: digest(path) for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="earlier run"):
        fit(make_task(), data, None, settings(tmp_path))
    (tmp_path / "other").mkdir()
    fit(make_task(), data, None, settings(tmp_path / "other", epochs=1))
    with pytest.raises(ValueError, match="earlier run"):  # nor by one that continues another
        fit(
            make_task(),
            data,
            None,
            settings(tmp_path, resume=str(tmp_path / "other" / "last.safetensors")),
        )
    (tmp_path / "last.safetensors").unlink()
    with pytest.raises(ValueError, match="earlier run"):  # a model alone is worth keeping, too
        fit(make_task(), data, None, settings(tmp_path))
    assert digest(tmp_path / "model.safetensors") == before["model.safetensors"]
    assert digest(tmp_path / "log.csv") == before["log.csv"]


def test_resuming_into_another_folder_brings_the_best_model_along(tmp_path, monkeypatch):
    data = loader_of(make_data())
    first = fit(make_task(), data, data, settings(tmp_path / "a", epochs=2))
    # the first run's best stays the best
    monkeypatch.setattr(loop._Run, "_is_better", lambda self, value: False)
    second = fit(
        make_task(),
        data,
        data,
        settings(tmp_path / "b", epochs=3, resume=str(first.output / "last.safetensors")),
    )
    assert second.best_epoch == first.best_epoch
    assert digest(second.model_path) == digest(first.model_path)
    assert [row["epoch"] for row in second.history] == [0, 1, 2]


def test_resuming_something_else_is_refused(tmp_path):
    data = loader_of(make_data())
    fit(make_task(), data, None, settings(tmp_path, epochs=1))
    with pytest.raises(ValueError, match="another model or optimizer"):
        fit(make_task("test_vit"), data, None, settings(tmp_path, resume="auto"))
    with pytest.raises(ValueError, match="trained with --opt sgd, not adamw"):
        fit(make_task(), data, None, settings(tmp_path, resume="auto", opt="adamw"))
    with pytest.raises(ValueError, match="another model or optimizer"):
        fit(make_task(), data, None, settings(tmp_path, resume="auto", freeze_backbone=True))
    with pytest.raises(ValueError, match="lacks the moving average"):
        fit(make_task(), data, None, settings(tmp_path, resume="auto", model_ema=True))
    with pytest.raises(FileNotFoundError):
        fit(make_task(), data, None, settings(tmp_path / "b", resume=str(tmp_path / "none")))
    with pytest.raises(ValueError, match="not a training checkpoint"):
        fit(
            make_task(),
            data,
            None,
            settings(tmp_path / "b", resume=str(tmp_path / "model.safetensors")),
        )
    assert load_state(tmp_path / "last.safetensors")["epoch"] == 0


def test_the_checkpoints_schedule_is_continued(tmp_path):
    data = loader_of(make_data())
    fit(make_task(schedule="0:1,0;1:0,1"), data, None, settings(tmp_path, epochs=1))
    task = make_task()
    result = fit(task, data, None, settings(tmp_path, resume="auto"))
    assert task.weights == (0.0, 1.0)
    assert result.history[-1]["weight_coarse"] == 0
