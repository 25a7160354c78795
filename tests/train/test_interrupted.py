"""A run that is told to stop saves inside the epoch, and goes on bit for bit."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.train.small_runs import assert_equal, weights_of
from timm_branches import PoolHead, create_branch_model
from timm_branches.data import HierarchicalMixup, create_loader, create_splits, create_transform
from timm_branches.task import BranchTask
from timm_branches.train import FitConfig, fit
from timm_branches.train.checkpoint import load_state

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def interrupts():
    """Ctrl-C as Python has it by default; a shell's background jobs begin with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Signals:
    """A mixup that sends this process a signal before some batch of a run."""

    def __init__(self, inner, at, number):
        self.inner, self.at, self.number = inner, at, number
        self.count = 0

    def __call__(self, images, labels):
        if self.count == self.at:
            os.kill(os.getpid(), self.number)
        self.count += 1
        return (images, labels) if self.inner is None else self.inner(images, labels)


def run(folder, at=None, number=signal.SIGTERM, workers=0, plain=False, mix=True, **settings):
    """Six batches an epoch, three epochs, with all that is random; perhaps a signal."""
    train, val, _ = create_splits("digits", in_chans=1)
    # of maps of 1x1, some CPUs' bfloat16 convolutions with stride leave NaN in the gradient
    size = 32 if settings.get("amp") else 16
    transform = create_transform(
        size, is_training=True, augment="light", mean=(0.5,), std=(0.5,), hflip=0.0
    )
    train.transform = transform
    val.transform = create_transform(size, mean=(0.5,), std=(0.5,))
    train, val = train.limit(96), val.limit(50)
    tree = train.taxonomy
    torch.manual_seed(0)
    model = create_branch_model(
        "test_resnet",
        taps=[4, 5],
        taxonomy=tree,
        in_chans=1,
        img_size=size,
        head=PoolHead(hidden=(16,)),
        drop_rate=0.2,
    )
    task = BranchTask(model, "0:1,0.2;2:0.5,1", verbose=False)
    if plain:  # torch's own loader, whose order is drawn from the global generator
        loader = torch.utils.data.DataLoader(train, 16, shuffle=True, num_workers=workers)
    else:
        loader = create_loader(train, 16, is_training=True, seed=3, num_workers=workers)
    mixup = HierarchicalMixup(0.2, 1.0, num_classes=tree.num_classes) if mix else None
    if at is not None:
        mixup = Signals(mixup, at, number)
    config = FitConfig(
        **{
            "output": str(folder),
            "epochs": 3,
            "device": "cpu",
            "opt": "adamw",
            "lr": 3e-3,
            "weight_decay": 0.05,
            "seed": 5,
            "plots": False,
            "progress": False,
            **settings,
        }
    )
    return task, fit(task, loader, create_loader(val, 16), config, mixup)


EVERYTHING = {
    "model_ema": True,
    "model_ema_decay": 0.9,
    "model_ema_warmup": True,
    "grad_accum_steps": 2,
    "clip_grad": 1.0,
    "warmup_epochs": 1,
}
CASES = {
    "ema and accumulation": EVERYTHING,
    "workers": {"workers": 2},
    "torch's loader": {"plain": True},
    "torch's loader with workers": {"plain": True, "workers": 2, "mix": False},
    "bfloat16": {"amp": True},
    "float16": {"amp": True, "amp_dtype": "float16"},
    "sgd, step": {"opt": "momentum", "sched": "step", "decay_rate": 0.5},
    "multistep": {"sched": "multistep", "decay_milestones": "1,2"},
    "piecewise": {"sched": "piecewise", "lr_steps": "0:3e-3;1:1e-3"},
    "polynomial": {"sched": "poly"},
    "no schedule": {"sched": "none", "conflicts": 2},
}


def rows(result):
    ignored = ("seconds", "images_per_second")
    return [{k: v for k, v in row.items() if k not in ignored} for row in result.history]


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_goes_on_bit_for_bit(tmp_path, options):
    task, whole = run(tmp_path / "whole", **options)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path / "stopped", at=9, **options)  # in the second epoch
    assert stopped.value.code == 143
    assert signal.getsignal(signal.SIGTERM) == before
    state = load_state(tmp_path / "stopped" / "last.safetensors")
    assert (state["epoch"], state["inside"]["processes"][0]["batch"]) == (0, 4)
    torch.manual_seed(99)  # another process has other generators
    other_task, other = run(tmp_path / "stopped", resume="auto", **options)
    assert_equal(weights_of(task), weights_of(other_task))
    if options.get("model_ema"):
        assert_equal(weights_of(task, ema=True), weights_of(other_task, ema=True))
    assert rows(whole) == rows(other)
    assert (whole.best_epoch, whole.best) == (other.best_epoch, other.best)
    wanted, got = (
        load_state(tmp_path / name / "last.safetensors") for name in ("whole", "stopped")
    )
    assert wanted["optimizer"]["param_groups"] == got["optimizer"]["param_groups"]
    for key, values in wanted["optimizer"]["state"].items():
        assert_equal(
            {k: torch.as_tensor(v) for k, v in values.items()},
            {k: torch.as_tensor(v) for k, v in got["optimizer"]["state"][key].items()},
        )


@pytest.mark.parametrize("at", [0, 5, 6, 17])
def test_wherever_it_stops(tmp_path, at):
    """The first batch, the last of an epoch, the first of the next, the last of all."""
    options = {"epochs": 3, "mix": False}
    task, whole = run(tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", at=at, number=signal.SIGINT, **options)
    other_task, other = run(tmp_path / "stopped", resume="auto", **options)
    assert_equal(weights_of(task), weights_of(other_task))
    assert rows(whole) == rows(other)


def test_several_times(tmp_path):
    task, whole = run(tmp_path / "whole", **EVERYTHING)
    with pytest.raises(SystemExit):
        run(tmp_path / "stopped", at=2, **EVERYTHING)
    for at in (1, 3, 5):
        with pytest.raises(SystemExit):
            run(tmp_path / "stopped", at=at, resume="auto", **EVERYTHING)
    other_task, other = run(tmp_path / "stopped", resume="auto", **EVERYTHING)
    assert_equal(weights_of(task), weights_of(other_task))
    assert rows(whole) == rows(other)


def test_an_evaluation_is_interrupted(tmp_path, monkeypatch):
    """What was trained is kept, and is evaluated when the run goes on."""
    task, whole = run(tmp_path / "whole", mix=False)
    answer = BranchTask.answer
    count = 0

    def signals(self, *args):
        nonlocal count
        count += 1
        if count == 7:  # one is tried first, an epoch has four
            os.kill(os.getpid(), signal.SIGTERM)
        return answer(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(BranchTask, "answer", signals)
        with pytest.raises(SystemExit):
            run(tmp_path / "stopped", mix=False)
    state = load_state(tmp_path / "stopped" / "last.safetensors")
    assert (state["epoch"], state["inside"]["processes"][0]["batch"]) == (0, 6)
    other_task, other = run(tmp_path / "stopped", mix=False, resume="auto")
    assert_equal(weights_of(task), weights_of(other_task))
    assert rows(whole) == rows(other)


def test_checkpoints_by_the_clock(tmp_path, monkeypatch):
    """Each update is later than the shortest time, so each writes one; the run is the same."""
    import timm_branches.train.loop as loop

    written = []
    original = loop._Run._save_inside
    monkeypatch.setattr(
        loop._Run,
        "_save_inside",
        lambda self, epoch: (written.append(epoch), original(self, epoch)),
    )
    task, _ = run(tmp_path / "often", checkpoint_minutes=1e-9, epochs=2)
    assert written == [0] * 6 + [1] * 6
    other, _ = run(tmp_path / "never", epochs=2)
    assert len(written) == 12
    assert_equal(weights_of(task), weights_of(other))


def test_other_batches_inside_an_epoch_are_refused(tmp_path):
    with pytest.raises(SystemExit):
        run(tmp_path, at=9)
    for change in ({"seed": 6}, {"grad_accum_steps": 2}, {"plain": True}):
        with pytest.raises(ValueError, match="inside an epoch"):
            run(tmp_path, resume="auto", **change)


def test_a_good_one_is_taken_when_the_newest_is_damaged(tmp_path, caplog):
    task, whole = run(tmp_path / "whole", epochs=4, sched="constant")
    run(tmp_path / "kept", epochs=3, keep=2, sched="constant")
    folder = tmp_path / "kept"
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    assert names == [
        "checkpoint-0000.safetensors",
        "checkpoint-0001.safetensors",
        "last.safetensors",
        "model.safetensors",
    ]
    for damaged, epoch in (("last", 1), ("checkpoint-0001", 0)):
        path = folder / f"{damaged}.safetensors"
        data = bytearray(path.read_bytes())
        data[-5] ^= 4
        path.write_bytes(data)
        from timm_branches.train.checkpoint import Checkpoints

        found, state = Checkpoints(folder).find("auto")
        assert state["epoch"] == epoch
        assert "last.safetensors is damaged" in caplog.text
        assert f"Going on from {found}" in caplog.text
    other_task, other = run(folder, epochs=4, keep=2, resume="auto", sched="constant")
    assert_equal(weights_of(task), weights_of(other_task))
    assert rows(whole) == rows(other)
    assert sorted(path.name for path in folder.glob("checkpoint*")) == [
        "checkpoint-0001.safetensors",
        "checkpoint-0002.safetensors",
    ]


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_recipe_says_how_to_go_on(tmp_path, number, status, workers):
    """As a terminal and a cluster do it: the signal goes to the whole group."""
    command = [
        sys.executable,
        str(ROOT / "recipes" / "bcnn.py"),
        "digits",
        *("--model", "test_resnet", "--taps", "4", "5", "--epochs", "2000", "--device", "cpu"),
        *("--output", str(tmp_path / "run"), "--no-plots", "-j", str(workers)),
    ]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        try:
            deadline = time.monotonic() + 120
            while not list(tmp_path.rglob("last.safetensors")):
                assert process.poll() is None, process.stderr.read()
                assert time.monotonic() < deadline
                time.sleep(0.1)
            os.killpg(process.pid, number)
            out, err = process.communicate(timeout=60)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == status, err
    assert "Traceback" not in out + err
    assert "--resume auto" in out
    assert "last.safetensors" in out
    [path] = tmp_path.rglob("last.safetensors")
    load_state(path)
    assert not [name for name in path.parent.iterdir() if name.name.endswith(".tmp")]
