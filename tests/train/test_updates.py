"""One update of the training loop: accumulating, clipping, and the learning rates of each."""

import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import timm_branches.train.loop as loop
from tests.train.small_runs import loader_of, make_data, make_task, settings, weights_of
from timm_branches.train import FitConfig, PiecewiseLR, fit
from timm_branches.train.checkpoint import load_state

# -- one update
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["test_vit", "test_convnext"])
def test_accumulating_two_batches_equals_one_of_twice_the_size(tmp_path, name):
    data = make_data(24, 16 if name == "test_vit" else 32)
    tasks = []
    for batch, steps in ((8, 1), (4, 2)):
        task = make_task(name)
        start = weights_of(task)
        result = fit(
            task,
            loader_of(data, batch),
            None,
            settings(tmp_path / str(batch), grad_accum_steps=steps),
        )
        tasks.append((task, result))
    (one, a), (two, b) = tasks
    torch.testing.assert_close(weights_of(two), weights_of(one), rtol=1e-4, atol=1e-6)
    assert not torch.allclose(
        start["heads.fine.fc.weight"], weights_of(one)["heads.fine.fc.weight"], atol=1e-3
    )
    assert a.history[-1]["train_loss"] == pytest.approx(b.history[-1]["train_loss"], rel=1e-5)
    assert (
        load_state(a.output / "last.safetensors")["updates"]
        == load_state(b.output / "last.safetensors")["updates"]
    )


def test_the_last_incomplete_group_is_an_average_too(tmp_path):
    """5 batches in groups of 2: the updates of a hand-written loop over 2 + 2 + 1 batches."""
    data = make_data(20)
    task = make_task("test_vit")
    fit(
        task,
        loader_of(data, 4),
        None,
        settings(tmp_path, epochs=1, grad_accum_steps=2, momentum=0.0, opt="momentum"),
    )
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
    fit(
        task,
        loader_of(data),
        None,
        settings(
            tmp_path,
            epochs=1,
            opt="momentum",
            momentum=0.0,
            lr=lr,
            clip_grad=clip,
            clip_mode=mode,
            **amp,
        ),
    )
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
            g = g * (allowed / g.square().sum(dims, keepdim=True).sqrt().clamp(min=1e-6)).clamp(
                max=1
            )
        torch.testing.assert_close(
            weights_of(task)[name], before[name] - lr * g, rtol=1e-4, atol=2e-6
        )


# -- learning rates
# ------------------------------------------------------------------------------------------------


def test_piecewise_rates_are_exactly_the_papers():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=3e-3)
    scheduler = PiecewiseLR(
        optimizer, FitConfig(sched="piecewise", lr_steps="51:1e-4;0:3e-3;41:5e-4").lr_at()
    )
    rates = []
    for epoch in range(60):
        scheduler.step(epoch)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == [3e-3] * 41 + [5e-4] * 10 + [1e-4] * 9
    with pytest.raises(ValueError, match="epoch 0"):
        PiecewiseLR(optimizer, {3: 0.1})


def test_piecewise_rates_in_a_run(tmp_path):
    steps = "0:0.007;1:0.0013;3:0.00037"
    result = fit(
        make_task(),
        loader_of(make_data(8)),
        None,
        settings(tmp_path, epochs=4, lr=0.007, sched="piecewise", lr_steps=steps, opt="adamw"),
    )
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
    result = fit(
        task,
        loader_of(make_data(8)),
        None,
        settings(tmp_path, sched=sched, layer_decay=0.5, lr=0.003, weight_decay=0.01, **kwargs),
    )
    assert len(seen) == 2
    full = {"piecewise": [0.003, 0.0005], "constant": [0.003, 0.003], "cosine": [0.003, 0.0015]}[
        sched
    ]
    for groups, rate in zip(seen, full, strict=True):
        scales = {scale for _, scale in groups}
        assert max(scales) == 1
        assert len(scales) >= 3
        assert all(math.log2(scale) == int(math.log2(scale)) for scale in scales)
        assert [lr for lr, _ in groups] == pytest.approx(
            [rate * scale for _, scale in groups], rel=1e-12
        )
    assert [row["lr"] for row in result.history] == pytest.approx(full, rel=1e-12)


def test_cosine_and_warmup_go_by_updates(tmp_path, monkeypatch):
    seen = []
    original = loop._Run._backward
    monkeypatch.setattr(
        loop._Run,
        "_backward",
        lambda self, loss, step: (
            seen.append(self.optimizer.param_groups[0]["lr"]),
            original(self, loss, step),
        ),
    )
    fit(
        make_task(),
        loader_of(make_data(16), 4),
        None,
        settings(
            tmp_path, epochs=3, sched="cosine", lr=0.1, min_lr=0.01, warmup_epochs=1, warmup_lr=0.02
        ),
    )
    want = [0.02 + t * 0.08 / 4 for t in range(4)]
    want += [0.01 + 0.045 * (1 + math.cos(math.pi * t / 12)) for t in range(4, 12)]
    assert seen == pytest.approx(want, rel=1e-9)


def test_settings_without_effect_are_pointed_out(tmp_path):
    with pytest.warns(UserWarning, match="--warmup-epochs has no effect"):
        fit(
            make_task(),
            loader_of(make_data(8)),
            None,
            settings(tmp_path, epochs=1, sched="none", warmup_epochs=1),
        )
    with pytest.raises(ValueError, match="multistep and --decay-milestones"):
        fit(make_task(), loader_of(make_data(8)), None, settings(tmp_path / "b", sched="multistep"))
    with pytest.raises(ValueError, match="no effect without evaluation data"):
        fit(
            make_task(),
            loader_of(make_data(8)),
            None,
            settings(tmp_path / "b", eval_metric="full_path"),
        )
    with pytest.raises(ValueError, match="--sync-bn has no effect"):
        fit(make_task(), loader_of(make_data(8)), None, settings(tmp_path / "b", sync_bn=True))
    with pytest.raises(
        ValueError, match="choose one of loss, coarse_top1, fine_top1, full_path, consistency"
    ):
        fit(
            make_task(), loader_of(make_data(8)), None, settings(tmp_path / "b", eval_metric="top1")
        )
    with pytest.raises(ValueError, match="no batch"):
        fit(
            make_task(),
            DataLoader(make_data(4), batch_size=8, drop_last=True),
            None,
            settings(tmp_path / "b"),
        )
    assert not (tmp_path / "b").exists()
