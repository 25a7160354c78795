"""The training loop: resuming, accumulating, clipping, rates, precision, refusals and files."""

import argparse
import csv
import hashlib
import math
from dataclasses import asdict, fields

import pytest
import torch
from timm.task import TrainingTask
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import timm_branches.train.loop as loop
from timm_branches import PoolHead, Taxonomy, create_branch_model, load_model
from timm_branches.data import HierarchicalMixup, create_loader, create_splits, create_transform
from timm_branches.task import BranchTask, FlatTask, base_model
from timm_branches.train import FitConfig, PiecewiseLR, add_fit_arguments, evaluate, fit
from timm_branches.train.checkpoint import load_state

TREE = Taxonomy(["a/0", "a/1", "b/2", "b/3"], levels=["coarse", "fine"])


def make_task(name="test_resnet", schedule=None, hidden=(), size=16, seed=0, **kwargs):
    torch.manual_seed(seed)
    if name == "test_vit":
        kwargs = {"patch_size": 4, **kwargs}
    if name == "test_convnext":
        size = 32
    model = create_branch_model(name, taps=[4, 5], taxonomy=TREE, in_chans=1, img_size=size,
                                head=PoolHead(hidden=hidden), **kwargs)
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
    return FitConfig(**{"output": str(folder), "epochs": 2, "device": "cpu", "lr": 0.02, "sched": "constant",
                        "weight_decay": 0.0, "plots": False, "progress": False, **kwargs})


def weights_of(task, ema=False):
    return {k: v.clone() for k, v in base_model(task, ema=ema).state_dict().items()}


def assert_equal(a, b):
    assert a.keys() == b.keys()
    different = [key for key in a if not torch.equal(a[key], b[key])]
    assert not different


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


# -- resuming ------------------------------------------------------------------------------------------------------


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
    """A run with all that is random: augmentation, mixup, dropout, shuffling; and all that has memory."""
    train, val, _ = create_splits("digits", in_chans=1)
    train.transform = create_transform(16, is_training=True, augment="light", mean=(0.5,), std=(0.5,), hflip=0.0)
    val.transform = create_transform(16, mean=(0.5,), std=(0.5,))
    train, val = train.limit(96), val.limit(50)
    tree = train.taxonomy
    torch.manual_seed(0)
    model = create_branch_model("test_resnet", taps=[4, 5], taxonomy=tree, in_chans=1, img_size=16,
                                head=PoolHead(hidden=(16,)), drop_rate=0.2)
    task = BranchTask(model, "0:1,0;2:0.5,0.5;3:0,1", verbose=False)
    loader = create_loader(train, 16, is_training=True, seed=3)
    config = settings(folder, epochs=5, opt="adamw", lr=3e-3, weight_decay=0.05, sched="cosine", warmup_epochs=1,
                      model_ema=True, model_ema_decay=0.9, model_ema_warmup=True, grad_accum_steps=2, clip_grad=1.0,
                      seed=5, **kwargs)
    mixup = HierarchicalMixup(0.2, 1.0, num_classes=tree.num_classes)
    if stop:
        loader = StopsAt(loader, *stop)
    return task, fit(task, loader, create_loader(val, 16), config, mixup)


def rows(result):
    return [{k: v for k, v in row.items() if k not in ("seconds", "images_per_second") and v is not None}
            for row in result.history]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, *digits_run(folder)


@pytest.mark.parametrize("stop", [(1, 0, Stopped()), (2, 3, KeyboardInterrupt()), (4, 5, Stopped())])
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
    assert_equal(load_model(result.model_path).state_dict(), load_model(other.model_path).state_dict())


def test_another_seed_is_another_run(tmp_path, whole_run):
    """What the test above compares does depend on the generators."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "seed_everything", lambda seed, epoch, rank: torch.manual_seed(77 + epoch))
        task, _ = digits_run(tmp_path)
    assert not torch.equal(weights_of(task)["heads.digit.fc.weight"], weights_of(whole_run[1])["heads.digit.fc.weight"])


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
    more = fit(make_task(), data, data, settings(tmp_path, epochs=3, resume=str(tmp_path / "last.safetensors")))
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
        fit(make_task(), data, None, settings(tmp_path, resume=str(tmp_path / "other" / "last.safetensors")))
    (tmp_path / "last.safetensors").unlink()
    with pytest.raises(ValueError, match="earlier run"):  # a model alone is worth keeping, too
        fit(make_task(), data, None, settings(tmp_path))
    assert digest(tmp_path / "model.safetensors") == before["model.safetensors"]
    assert digest(tmp_path / "log.csv") == before["log.csv"]


def test_resuming_into_another_folder_brings_the_best_model_along(tmp_path, monkeypatch):
    data = loader_of(make_data())
    first = fit(make_task(), data, data, settings(tmp_path / "a", epochs=2))
    monkeypatch.setattr(loop._Run, "_is_better", lambda self, value: False)  # the first run's best stays the best
    second = fit(make_task(), data, data,
                 settings(tmp_path / "b", epochs=3, resume=str(first.output / "last.safetensors")))
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
        fit(make_task(), data, None, settings(tmp_path / "b", resume=str(tmp_path / "model.safetensors")))
    assert load_state(tmp_path / "last.safetensors")["epoch"] == 0


def test_the_checkpoints_schedule_is_continued(tmp_path):
    data = loader_of(make_data())
    fit(make_task(schedule="0:1,0;1:0,1"), data, None, settings(tmp_path, epochs=1))
    task = make_task()
    result = fit(task, data, None, settings(tmp_path, resume="auto"))
    assert task.weights == (0.0, 1.0)
    assert result.history[-1]["weight_coarse"] == 0


# -- one update ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["test_vit", "test_convnext"])
def test_accumulating_two_batches_equals_one_of_twice_the_size(tmp_path, name):
    data = make_data(24, 16 if name == "test_vit" else 32)
    tasks = []
    for batch, steps in ((8, 1), (4, 2)):
        task = make_task(name)
        start = weights_of(task)
        result = fit(task, loader_of(data, batch), None, settings(tmp_path / str(batch), grad_accum_steps=steps))
        tasks.append((task, result))
    (one, a), (two, b) = tasks
    torch.testing.assert_close(weights_of(two), weights_of(one), rtol=1e-4, atol=1e-6)
    assert not torch.allclose(start["heads.fine.fc.weight"], weights_of(one)["heads.fine.fc.weight"], atol=1e-3)
    assert a.history[-1]["train_loss"] == pytest.approx(b.history[-1]["train_loss"], rel=1e-5)
    assert load_state(a.output / "last.safetensors")["updates"] == load_state(b.output / "last.safetensors")["updates"]


def test_the_last_incomplete_group_is_an_average_too(tmp_path):
    """5 batches in groups of 2: the updates of a hand-written loop over 2 + 2 + 1 batches."""
    data = make_data(20)
    task = make_task("test_vit")
    fit(task, loader_of(data, 4), None, settings(tmp_path, epochs=1, grad_accum_steps=2, momentum=0.0,
                                                     opt="momentum"))
    reference = make_task("test_vit")
    reference.train()
    optimizer = torch.optim.SGD(reference.trainable_module.parameters(), lr=0.02)
    images, labels = data.tensors
    for part in (slice(0, 8), slice(8, 16), slice(16, 20)):
        optimizer.zero_grad()
        reference(images[part], labels[part])["loss"].backward()
        optimizer.step()
    torch.testing.assert_close(weights_of(task), weights_of(reference), rtol=1e-4, atol=1e-6)
    assert load_state(tmp_path / "last.safetensors")["updates"] == 3


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("mode", ["norm", "value", "agc"])
def test_gradients_are_clipped(tmp_path, mode, scaled, monkeypatch):
    """One plain SGD step moves each weight by lr times its clipped gradient."""
    data, lr, clip = make_data(8), 0.1, 0.01
    task = make_task("test_vit")
    before = weights_of(task)
    if scaled:  # the scaler's own arithmetic, without half precision
        monkeypatch.setattr(loop._Run, "amp", lambda self: torch.autocast("cpu", enabled=False))
    amp = {"amp": True, "amp_dtype": "float16"} if scaled else {}
    fit(task, loader_of(data), None, settings(tmp_path, epochs=1, opt="momentum", momentum=0.0, lr=lr, clip_grad=clip,
                                              clip_mode=mode, **amp))
    reference = make_task("test_vit")
    reference(*data.tensors)["loss"].backward()
    model = reference.trainable_module
    raw = {name: p.grad for name, p in model.named_parameters()}
    norm = torch.stack([g.square().sum() for g in raw.values()]).sum().sqrt()
    assert norm > 10 * clip
    for name, p in model.named_parameters():
        g = raw[name]
        if mode == "norm":
            g = g * clip / norm
        elif mode == "value":
            g = g.clamp(-clip, clip)
        elif name.startswith("backbone."):  # adaptive: each unit's gradient against its weights
            dims = tuple(range(1, p.ndim)) if p.ndim > 1 else (0,)
            allowed = p.detach().square().sum(dims, keepdim=True).sqrt().clamp(min=1e-3) * clip
            g = g * (allowed / g.square().sum(dims, keepdim=True).sqrt().clamp(min=1e-6)).clamp(max=1)
        torch.testing.assert_close(weights_of(task)[name], before[name] - lr * g, rtol=1e-4, atol=2e-6)


# -- learning rates ------------------------------------------------------------------------------------------------


def test_piecewise_rates_are_exactly_the_papers():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=3e-3)
    scheduler = PiecewiseLR(optimizer, FitConfig(sched="piecewise", lr_steps="51:1e-4;0:3e-3;41:5e-4").lr_at())
    rates = []
    for epoch in range(60):
        scheduler.step(epoch)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == [3e-3] * 41 + [5e-4] * 10 + [1e-4] * 9
    with pytest.raises(ValueError, match="epoch 0"):
        PiecewiseLR(optimizer, {3: 0.1})


def test_piecewise_rates_in_a_run(tmp_path):
    steps = "0:0.007;1:0.0013;3:0.00037"
    result = fit(make_task(), loader_of(make_data(8)), None,
                 settings(tmp_path, epochs=4, lr=0.007, sched="piecewise", lr_steps=steps, opt="adamw"))
    assert [row["lr"] for row in result.history] == [0.007, 0.0013, 0.0013, 0.00037]


@pytest.mark.parametrize("sched", ["piecewise", "cosine", "constant"])
def test_layer_decay_scales_every_rate(tmp_path, sched, monkeypatch):
    seen = []
    original = loop._Run._backward

    def spy(self, loss, step):
        seen.append([(g["lr"], g["lr_scale"]) for g in self.optimizer.param_groups])
        original(self, loss, step)

    monkeypatch.setattr(loop._Run, "_backward", spy)
    task = make_task("test_vit")
    kwargs = {"lr_steps": "0:0.003;1:0.0005"} if sched == "piecewise" else {}
    result = fit(task, loader_of(make_data(8)), None,
                 settings(tmp_path, sched=sched, layer_decay=0.5, lr=0.003, weight_decay=0.01, **kwargs))
    assert len(seen) == 2
    full = {"piecewise": [0.003, 0.0005], "constant": [0.003, 0.003],
            "cosine": [0.003, 0.0015]}[sched]
    for groups, rate in zip(seen, full, strict=True):
        scales = {scale for _, scale in groups}
        assert max(scales) == 1
        assert len(scales) >= 3
        assert all(math.log2(scale) == int(math.log2(scale)) for scale in scales)
        assert [lr for lr, _ in groups] == pytest.approx([rate * scale for _, scale in groups], rel=1e-12)
    assert [row["lr"] for row in result.history] == pytest.approx(full, rel=1e-12)


def test_cosine_and_warmup_go_by_updates(tmp_path, monkeypatch):
    seen = []
    original = loop._Run._backward
    monkeypatch.setattr(loop._Run, "_backward", lambda self, loss, step: (
        seen.append(self.optimizer.param_groups[0]["lr"]), original(self, loss, step)))
    fit(make_task(), loader_of(make_data(16), 4), None,
        settings(tmp_path, epochs=3, sched="cosine", lr=0.1, min_lr=0.01, warmup_epochs=1, warmup_lr=0.02))
    want = [0.02 + t * 0.08 / 4 for t in range(4)]
    want += [0.01 + 0.045 * (1 + math.cos(math.pi * t / 12)) for t in range(4, 12)]
    assert seen == pytest.approx(want, rel=1e-9)


def test_settings_without_effect_are_pointed_out(tmp_path):
    with pytest.warns(UserWarning, match="--warmup-epochs has no effect"):
        fit(make_task(), loader_of(make_data(8)), None, settings(tmp_path, epochs=1, sched="none", warmup_epochs=1))
    with pytest.raises(ValueError, match="multistep and --decay-milestones"):
        fit(make_task(), loader_of(make_data(8)), None, settings(tmp_path / "b", sched="multistep"))
    with pytest.raises(ValueError, match="no effect without evaluation data"):
        fit(make_task(), loader_of(make_data(8)), None, settings(tmp_path / "b", eval_metric="full_path"))
    with pytest.raises(ValueError, match="--sync-bn has no effect"):
        fit(make_task(), loader_of(make_data(8)), None, settings(tmp_path / "b", sync_bn=True))
    with pytest.raises(ValueError, match="choose one of loss, coarse_top1, fine_top1, full_path, consistency"):
        fit(make_task(), loader_of(make_data(8)), None, settings(tmp_path / "b", eval_metric="top1"))
    with pytest.raises(ValueError, match="no batch"):
        fit(make_task(), DataLoader(make_data(4), batch_size=8, drop_last=True), None, settings(tmp_path / "b"))
    assert not (tmp_path / "b").exists()


# -- precision, layout, freezing -----------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"amp": True}, {"amp": True, "amp_dtype": "float16"}, {"channels_last": True},
                                     {"amp": True, "channels_last": True, "clip_grad": 1.0},
                                     {"grad_checkpointing": True}])
def test_ways_to_compute_all_learn(tmp_path, options):
    # of maps of 1x1, some CPUs' bfloat16 convolutions with stride leave NaN in the gradient, in torch itself
    name, size, epochs = ("test_vit", 16, 12) if options.get("amp_dtype") == "float16" else ("test_resnet", 64, 5)
    data = make_data(48, size)  # (convolutions in float16 are slow on a CPU)
    task = make_task(name, size=size)
    dtypes = set()
    head = base_model(task).head("fine").fc
    head.register_forward_hook(lambda m, x, y: dtypes.add(y.dtype))
    result = fit(task, loader_of(data), loader_of(data), settings(tmp_path, epochs=epochs, lr=0.05, **options))
    assert result.best["fine_top1"] > 80
    assert result.history[-1]["train_loss"] < 0.5 * result.history[0]["train_loss"]
    expected = getattr(torch, options.get("amp_dtype", "bfloat16")) if options.get("amp") else torch.float32
    assert dtypes == {expected}
    assert all(p.dtype == torch.float32 for p in task.parameters())
    if options.get("channels_last"):
        convs = [m.weight for m in task.modules() if isinstance(m, nn.Conv2d) and m.weight.shape[1] > 1]
        assert any(w.is_contiguous(memory_format=torch.channels_last) and not w.is_contiguous() for w in convs)
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
    fit(task, loader_of(make_data()), None, settings(tmp_path, freeze_backbone=True, weight_decay=0.1, model_ema=True))
    saved = load_model(tmp_path / "model.safetensors").state_dict()
    for after in (weights_of(task), saved):
        same = {key for key in before if torch.equal(before[key], after[key])}
        assert {key for key in before if key.startswith("backbone.")} == {k for k in same if k.startswith("backbone.")}
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
    result = fit(task, data, data, settings(tmp_path, epochs=1, model_ema=True, model_ema_decay=0.8))
    saved = load_model(result.model_path)
    assert_equal(saved.state_dict(), weights_of(task, ema=True))
    assert not torch.equal(saved.state_dict()["heads.fine.fc.weight"], weights_of(task)["heads.fine.fc.weight"])
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
    fit(task, loader_of(make_data(), 4), None, settings(tmp_path, model_ema=True, model_ema_decay=0.8))
    assert len(trail) == 8
    average = trail[0]
    for value in trail[1:]:
        average = 0.8 * average + 0.2 * value
    torch.testing.assert_close(weights_of(task, ema=True)["heads.fine.fc.weight"], average)


# -- losses that fail ----------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(("value", "interval"), [(float("nan"), 50), (float("inf"), 50), (float("nan"), 1)])
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, value, interval):
    data = loader_of(make_data(16), 4)
    task = make_task("test_vit", schedule="0:1,0;1:0,1")
    config = settings(tmp_path, epochs=3, log_interval=interval)
    seen = {}

    class Watch(Poison):
        def set_epoch(self, epoch):
            super().set_epoch(epoch)
            seen.update({path.name: digest(path) for path in tmp_path.glob("*.*")})

    with pytest.raises(FloatingPointError, match=r"level 'fine' became nan in batch 2 of epoch 1 "):
        fit(task, Watch(data, 1, 2, value), data, config)
    assert seen.keys() == {"last.safetensors", "model.safetensors", "log.csv"}
    assert {path.name: digest(path) for path in tmp_path.iterdir()} == seen
    assert load_state(tmp_path / "last.safetensors")["epoch"] == 0
    load_model(tmp_path / "model.safetensors")
    assert all(p.isfinite().all() for p in task.parameters())  # on a CPU the update itself is prevented
    assert len(fit(make_task("test_vit"), data, data, settings(tmp_path, epochs=3, resume="auto")).history) == 3


@pytest.mark.parametrize(("every", "expected"), [(1, [1] * 5), (2, [2, 2, 1]), (50, [5])])
def test_how_often_the_loss_is_checked(tmp_path, monkeypatch, every, expected):
    """On an accelerator a check waits for the device, so several batches share one."""
    sizes = []
    original = loop.check_losses
    monkeypatch.setattr(loop, "check_losses", lambda pending, epoch: (sizes.append(len(pending)),
                                                                       original(pending, epoch)))
    run = loop._Run(make_task(), loader_of(make_data(20), 4), None, settings(tmp_path, log_interval=every), None, {})

    class Accelerator:
        type = "elsewhere"

    device, run.device = run.device, Accelerator()
    monkeypatch.setattr(loop, "_to", lambda images, *_: images)
    run.loader = [(images, Labels(labels)) for images, labels in run.loader]
    run._train(0)
    assert sizes == expected
    assert device.type == "cpu"
    pending = [(0, {"a": torch.tensor(1.0)}), (3, {"a": torch.tensor(2.0), "b": torch.tensor(float("inf"))})]
    with pytest.raises(FloatingPointError, match="level 'b' became inf in batch 3 of epoch 7"):
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
    with pytest.raises(FloatingPointError, match="weight of head 'fine', became NaN or infinite in epoch 1"):
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


# -- the best epoch ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("metric", "values", "best"), [
    ("", [10.0, 30.0, 30.0, 20.0], 1), ("loss", [2.0, 1.0, 1.5, 1.0], 1), ("full_path", [5.0, math.nan, 4.0, 6.0], 3),
    ("coarse_top1", [math.nan, math.nan, 3.0, 2.0], 2)])
def test_which_epoch_is_the_best(tmp_path, monkeypatch, metric, values, best):
    class Judge:
        def __init__(self, value):
            self.metrics = {"loss": 0.0, "coarse_top1": 0.0, "fine_top1": 0.0, "full_path": 0.0, "consistency": 0.0,
                            metric or "fine_top1": value}

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


# -- files ---------------------------------------------------------------------------------------------------------


def test_files_of_a_run(tmp_path, capsys):
    data = loader_of(make_data(16), 4)
    result = fit(make_task(), data, data, settings(tmp_path, epochs=3, plots=True, tensorboard=True, progress=True),
                 facts={"data": "made up"})
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"model.safetensors", "last.safetensors", "log.csv", "history.png", "confusion_coarse.png",
                     "confusion_fine.png", "tensorboard"}
    assert list((tmp_path / "tensorboard").glob("events*"))
    with open(tmp_path / "log.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [int(row["epoch"]) for row in table] == [0, 1, 2]
    own = {"epoch", "lr", "train_loss", "train_loss_coarse", "train_loss_fine", "weight_coarse", "weight_fine",
           "seconds", "images_per_second"}
    metrics = {f"eval_{name}" for name in make_task().create_evaluator().metric_names}
    assert {"eval_fine_top1", "eval_full_path", "eval_severity"} < metrics
    assert set(table[0]) == own | metrics
    assert table[-1]["eval_severity"] == ""  # there is no mistake left whose severity could be told
    assert float(table[-1]["eval_fine_top1"]) == result.history[-1]["eval_fine_top1"]
    for name in ("history.png", "confusion_fine.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.count("fine ") == 3


def test_plots_and_trackers_only_when_asked(tmp_path):
    data = loader_of(make_data(8))
    fit(make_task(), data, data, settings(tmp_path, epochs=1))
    assert {path.name for path in tmp_path.iterdir()} == {"model.safetensors", "last.safetensors", "log.csv"}


def test_logged_losses_are_means_over_batches(tmp_path):
    data = make_data(12)
    result = fit(make_task("test_vit"), loader_of(data, 4), None, settings(tmp_path, epochs=1, lr=1e-30))
    task = make_task("test_vit")
    parts = [task(images, labels) for images, labels in loader_of(data, 4)]
    for key, want in (("train_loss", [p["loss"] for p in parts]),
                      ("train_loss_fine", [p["losses"]["fine"] for p in parts])):
        assert result.history[0][key] == pytest.approx(torch.stack(want).mean().item(), rel=1e-6)


def test_flat_baseline_is_trained_and_judged_on_all_levels(tmp_path):
    torch.manual_seed(0)
    model = create_branch_model("test_resnet", taps=[5], num_classes=4, names=["leaf"], in_chans=1, img_size=16)
    data = loader_of(make_data(64))
    result = fit(FlatTask(model, TREE), data, data, settings(tmp_path, epochs=5, lr=0.05, plots=True))
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


# -- settings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kwargs", "message"), [
    ({"epochs": 0}, "--epochs must be above 0"), ({"lr": 0}, "--lr must be above 0"),
    ({"lr": float("nan")}, "--lr must be above 0"), ({"grad_accum_steps": 0}, "--grad-accum-steps must be above 0"),
    ({"log_interval": 0}, "--log-interval must be above 0"), ({"weight_decay": -1}, "--weight-decay must not be"),
    ({"min_lr": -1e-9}, "--min-lr must not be negative"), ({"warmup_epochs": -1}, "--warmup-epochs must not be"),
    ({"clip_grad": -1.0}, "--clip-grad must be above 0"), ({"clip_grad": 0.0}, "--clip-grad must be above 0"),
    ({"model_ema_decay": 1.0}, "--model-ema-decay must be in"), ({"model_ema_decay": -0.1}, "--model-ema-decay must"),
    ({"layer_decay": 0.0}, "--layer-decay must be in"), ({"layer_decay": 1.1}, "--layer-decay must be in"),
    ({"layer_decay": 0.5, "sched": "none"}, "--layer-decay has no effect"),
    ({"sched": "piecewise"}, "piecewise and --lr-steps go together"),
    ({"lr_steps": "0:0.1"}, "piecewise and --lr-steps go together"),
    ({"amp_dtype": "float64"}, "--amp-dtype must be one of bfloat16, float16"),
    ({"clip_mode": "nom"}, "--clip-mode must be one of norm, value, agc"),
    ({"sched": "piecewise", "lr_steps": "0=1"}, "write epoch:rate pairs"),
    ({"sched": "piecewise", "lr_steps": "0:1:2"}, "write epoch:rate pairs"),
    ({"sched": "piecewise", "lr_steps": "1:0.1"}, "epoch 0 must be given"),
    ({"sched": "piecewise", "lr_steps": "0:0.1;3:0"}, "rates be above 0"),
])
def test_settings_that_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        FitConfig(**kwargs)


def test_command_line_round_trip():
    parser = argparse.ArgumentParser()
    add_fit_arguments(parser)
    assert FitConfig.from_args(parser.parse_args([])) == FitConfig()
    text = {"output": "o", "resume": "auto", "device": "cpu", "opt": "adamw", "sched": "piecewise",
            "lr_steps": "0:0.1;2:0.05", "decay_milestones": "1,2", "clip_mode": "agc", "amp_dtype": "float16",
            "eval_metric": "loss", "wandb": "w"}
    numbers = {"epochs": 3, "seed": 4, "lr": 0.1, "weight_decay": 0.2, "momentum": 0.3, "layer_decay": 0.4,
               "min_lr": 0.01, "warmup_epochs": 2, "warmup_lr": 0.02, "decay_rate": 0.5, "grad_accum_steps": 4,
               "conflicts": 2, "clip_grad": 1.5, "model_ema_decay": 0.5, "log_interval": 7}
    switched = {f.name: not f.default for f in fields(FitConfig) if isinstance(f.default, bool)}
    other = {**text, **numbers, **switched}
    assert set(other) == {f.name for f in fields(FitConfig)}
    line = []
    for name, value in other.items():
        assert value != getattr(FitConfig(), name), name
        flag = "--" + name.replace("_", "-")
        line += [flag if value else f"--no-{flag[2:]}"] if isinstance(value, bool) else [flag, str(value)]
    assert asdict(FitConfig.from_args(parser.parse_args(line))) == other
    switches = [name for name, value in other.items() if isinstance(value, bool)]
    off = parser.parse_args([f"--no-{name.replace('_', '-')}" for name in switches])
    assert not any(getattr(off, name) for name in switches)
    with pytest.raises(SystemExit):
        parser.parse_args(["--clip-mode", "nom"])
    assert "(default: 0.05)" in parser.format_help()


@pytest.mark.parametrize(("kwargs", "needed"), [
    ({"amp_dtype": "float16"}, "--amp"),
    ({"model_ema_decay": 0.9}, "--model-ema"),
    ({"clip_mode": "agc"}, "--clip-grad"),
    ({"lr": 0.3, "sched": "piecewise", "lr_steps": "0:0.1"}, "--lr-steps"),
])
def test_a_setting_without_effect_is_warned_about(kwargs, needed):
    with pytest.warns(UserWarning, match=f"no effect .*{needed}"):
        FitConfig(**kwargs)


def test_settings_with_effect_are_not_warned_about(recwarn):
    FitConfig(amp=True, amp_dtype="float16", model_ema=True, model_ema_decay=0.9, clip_grad=1.0, clip_mode="agc")
    FitConfig(lr=0.1, sched="piecewise", lr_steps="0:0.1")
    assert not recwarn.list


def test_dynamic_weights_follow_the_accuracies_and_survive_a_resume(tmp_path):
    data = loader_of(make_data(8))

    def run(folder, epochs, **kwargs):
        return fit(make_task(schedule="dynamic"), data, data, settings(tmp_path / folder, epochs=epochs, **kwargs))

    whole = run("whole", 3).history
    assert [row["weight_coarse"] for row in whole][0] == 0.5
    for last, row in zip(whole, whole[1:], strict=False):
        errors = [max(1 - last[f"eval_{name}_top1"] / 100, 0.01) for name in ("coarse", "fine")]
        assert row["weight_coarse"] == pytest.approx(errors[0] / sum(errors))
    run("cut", 2)
    assert [row["weight_coarse"] for row in run("cut", 3, resume="auto").history] == \
        [row["weight_coarse"] for row in whole]


def test_learned_weights_are_trained_and_survive_a_resume(tmp_path):
    data = loader_of(make_data(8))

    def run(folder, epochs, **kwargs):
        task = BranchTask(base_model(make_task()), uncertainty=True)
        fit(task, data, None, settings(tmp_path / folder, epochs=epochs, sched="constant", **kwargs))
        return task.uncertainty.log_var.detach()

    whole = run("whole", 2)
    assert (whole != 0).all()
    run("cut", 1)
    assert torch.equal(run("cut", 2, resume="auto"), whole)


def test_check_stops_before_training(tmp_path):
    task, data = make_task(), make_data(8)
    with torch.no_grad():
        task.trainable_module.head("fine").fc.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="--check found: .*(NaN|finite)"):
        fit(task, loader_of(data), None, settings(tmp_path, check=True))
    assert not list(tmp_path.glob("*.safetensors"))


def test_check_changes_nothing_in_a_healthy_run(tmp_path):
    weights = []
    for check in (False, True):
        task = make_task()
        torch.manual_seed(3)
        fit(task, loader_of(make_data(8)), None, settings(tmp_path / str(check), epochs=1, check=check))
        weights.append(weights_of(task))
    assert_equal(*weights)


def test_conflicts_are_logged_and_change_nothing(tmp_path):
    from timm_branches.gradients import branch_cosines

    weights, data = [], loader_of(make_data(16), 4)
    for conflicts in (0, 2):
        task = make_task()
        torch.manual_seed(3)
        config = settings(tmp_path / str(conflicts), epochs=2, conflicts=conflicts, plots=conflicts > 0)
        result = fit(task, data, None, config)
        weights.append(weights_of(task))
    assert_equal(*weights)
    assert all(-1 <= row["cosine_coarse_fine"] <= 1 for row in result.history)
    assert (tmp_path / "2" / "conflicts.png").exists()
    task = make_task()
    result = fit(task, data, None, settings(tmp_path / "first", epochs=1, lr=1e-30, conflicts=1))
    images, labels = next(iter(data))
    want = branch_cosines(make_task(), (images, labels))["coarse", "fine"]
    assert result.history[0]["cosine_coarse_fine"] == pytest.approx(want, abs=1e-4)


def test_conflicts_of_a_single_loss(tmp_path):
    model = create_branch_model("test_resnet", taps=[5], num_classes=4, in_chans=1, img_size=16, names=["leaf"])
    with pytest.raises(ValueError, match="--conflicts has no effect"):
        fit(FlatTask(model, TREE), loader_of(make_data(8)), None, settings(tmp_path, conflicts=1))
