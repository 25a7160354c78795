"""Settings of the training loop.

Refusals, warnings, the command line; weights that change, checks and conflicts.
"""

import argparse
from dataclasses import asdict, fields

import pytest
import torch

from tests.train.small_runs import (
    TREE,
    assert_equal,
    loader_of,
    make_data,
    make_task,
    settings,
    weights_of,
)
from timm_branches import create_branch_model
from timm_branches.task import BranchTask, FlatTask, base_model
from timm_branches.train import FitConfig, add_fit_arguments, fit


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"epochs": 0}, "--epochs must be above 0"),
        ({"lr": 0}, "--lr must be above 0"),
        ({"lr": float("nan")}, "--lr must be above 0"),
        ({"grad_accum_steps": 0}, "--grad-accum-steps must be above 0"),
        ({"log_interval": 0}, "--log-interval must be above 0"),
        ({"weight_decay": -1}, "--weight-decay must not be"),
        ({"min_lr": -1e-9}, "--min-lr must not be negative"),
        ({"warmup_epochs": -1}, "--warmup-epochs must not be"),
        ({"clip_grad": -1.0}, "--clip-grad must be above 0"),
        ({"clip_grad": 0.0}, "--clip-grad must be above 0"),
        ({"model_ema_decay": 1.0}, "--model-ema-decay must be in"),
        ({"model_ema_decay": -0.1}, "--model-ema-decay must"),
        ({"layer_decay": 0.0}, "--layer-decay must be in"),
        ({"layer_decay": 1.1}, "--layer-decay must be in"),
        ({"layer_decay": 0.5, "sched": "none"}, "--layer-decay has no effect"),
        ({"sched": "piecewise"}, "piecewise and --lr-steps go together"),
        ({"lr_steps": "0:0.1"}, "piecewise and --lr-steps go together"),
        ({"amp_dtype": "float64"}, "--amp-dtype must be one of bfloat16, float16"),
        ({"clip_mode": "nom"}, "--clip-mode must be one of norm, value, agc"),
        ({"sched": "piecewise", "lr_steps": "0=1"}, "write epoch:rate pairs"),
        ({"sched": "piecewise", "lr_steps": "0:1:2"}, "write epoch:rate pairs"),
        ({"sched": "piecewise", "lr_steps": "1:0.1"}, "epoch 0 must be given"),
        ({"sched": "piecewise", "lr_steps": "0:0.1;3:0"}, "rates be above 0"),
    ],
)
def test_settings_that_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        FitConfig(**kwargs)


def test_command_line_round_trip():
    parser = argparse.ArgumentParser()
    add_fit_arguments(parser)
    assert FitConfig.from_args(parser.parse_args([])) == FitConfig()
    text = {
        "output": "o",
        "resume": "auto",
        "device": "cpu",
        "opt": "adamw",
        "sched": "piecewise",
        "lr_steps": "0:0.1;2:0.05",
        "decay_milestones": "1,2",
        "clip_mode": "agc",
        "amp_dtype": "float16",
        "eval_metric": "loss",
        "wandb": "w",
    }
    numbers = {
        "epochs": 3,
        "seed": 4,
        "lr": 0.1,
        "weight_decay": 0.2,
        "momentum": 0.3,
        "layer_decay": 0.4,
        "min_lr": 0.01,
        "warmup_epochs": 2,
        "warmup_lr": 0.02,
        "decay_rate": 0.5,
        "grad_accum_steps": 4,
        "conflicts": 2,
        "clip_grad": 1.5,
        "model_ema_decay": 0.5,
        "log_interval": 7,
        "checkpoint_minutes": 1.5,
        "keep": 2,
        "max_skipped_steps": 3,
    }
    switched = {f.name: not f.default for f in fields(FitConfig) if isinstance(f.default, bool)}
    other = {**text, **numbers, **switched}
    assert set(other) == {f.name for f in fields(FitConfig)}
    line = []
    for name, value in other.items():
        assert value != getattr(FitConfig(), name), name
        flag = "--" + name.replace("_", "-")
        line += (
            [flag if value else f"--no-{flag[2:]}"]
            if isinstance(value, bool)
            else [flag, str(value)]
        )
    assert asdict(FitConfig.from_args(parser.parse_args(line))) == other
    switches = [name for name, value in other.items() if isinstance(value, bool)]
    off = parser.parse_args([f"--no-{name.replace('_', '-')}" for name in switches])
    assert not any(getattr(off, name) for name in switches)
    with pytest.raises(SystemExit):
        parser.parse_args(["--clip-mode", "nom"])
    assert "(default: 0.05)" in parser.format_help()


@pytest.mark.parametrize(
    ("kwargs", "needed"),
    [
        ({"amp_dtype": "float16"}, "--amp"),
        ({"model_ema_decay": 0.9}, "--model-ema"),
        ({"clip_mode": "agc"}, "--clip-grad"),
        ({"lr": 0.3, "sched": "piecewise", "lr_steps": "0:0.1"}, "--lr-steps"),
    ],
)
def test_a_setting_without_effect_is_warned_about(kwargs, needed):
    with pytest.warns(UserWarning, match=f"no effect .*{needed}"):
        FitConfig(**kwargs)


def test_settings_with_effect_are_not_warned_about(recwarn):
    FitConfig(
        amp=True,
        amp_dtype="float16",
        model_ema=True,
        model_ema_decay=0.9,
        clip_grad=1.0,
        clip_mode="agc",
    )
    FitConfig(lr=0.1, sched="piecewise", lr_steps="0:0.1")
    assert not recwarn.list


def test_dynamic_weights_follow_the_accuracies_and_survive_a_resume(tmp_path):
    data = loader_of(make_data(8))

    def run(folder, epochs, **kwargs):
        return fit(
            make_task(schedule="dynamic"),
            data,
            data,
            settings(tmp_path / folder, epochs=epochs, **kwargs),
        )

    whole = run("whole", 3).history
    assert [row["weight_coarse"] for row in whole][0] == 0.5
    for last, row in zip(whole, whole[1:], strict=False):
        errors = [max(1 - last[f"eval_{name}_top1"] / 100, 0.01) for name in ("coarse", "fine")]
        assert row["weight_coarse"] == pytest.approx(errors[0] / sum(errors))
    run("cut", 2)
    assert [row["weight_coarse"] for row in run("cut", 3, resume="auto").history] == [
        row["weight_coarse"] for row in whole
    ]


def test_learned_weights_are_trained_and_survive_a_resume(tmp_path):
    data = loader_of(make_data(8))

    def run(folder, epochs, **kwargs):
        task = BranchTask(base_model(make_task()), uncertainty=True)
        fit(
            task, data, None, settings(tmp_path / folder, epochs=epochs, sched="constant", **kwargs)
        )
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
        fit(
            task,
            loader_of(make_data(8)),
            None,
            settings(tmp_path / str(check), epochs=1, check=check),
        )
        weights.append(weights_of(task))
    assert_equal(*weights)


def test_conflicts_are_logged_and_change_nothing(tmp_path):
    from timm_branches.gradients import branch_cosines

    weights, data = [], loader_of(make_data(16), 4)
    for conflicts in (0, 2):
        task = make_task()
        torch.manual_seed(3)
        config = settings(
            tmp_path / str(conflicts), epochs=2, conflicts=conflicts, plots=conflicts > 0
        )
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
    model = create_branch_model(
        "test_resnet", taps=[5], num_classes=4, in_chans=1, img_size=16, names=["leaf"]
    )
    with pytest.raises(ValueError, match="--conflicts has no effect"):
        fit(FlatTask(model, TREE), loader_of(make_data(8)), None, settings(tmp_path, conflicts=1))
