"""Two processes on the CPU train as one does.

This file is both: the tests, and the script that torchrun starts.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from timm.optim import create_optimizer_v2
from timm.utils import distribute_bn

from timm_branches import PoolHead, Taxonomy, create_branch_model, load_model
from timm_branches.data import create_loader
from timm_branches.data.datasets import HierarchicalDataset
from timm_branches.schedules import PRESETS, get_schedule
from timm_branches.task import BranchTask, FlatTask, base_model
from timm_branches.train import FitConfig, evaluate, fit, setup_device
from timm_branches.train.checkpoint import load_state

TREE = Taxonomy(["a/x/1", "a/x/2", "a/y/3", "b/z/4", "b/z/5"], levels=["coarse", "middle", "fine"])
PARITY = {
    f"{labels}_accumulate{steps}": (labels, steps)
    for labels in ("full", "partial")
    for steps in (1, 2)
}
SCHEDULES = {
    **{name: name for name in PRESETS},
    "on_and_off": "0:1,0,0;1:0,1,1;2:0.5,0.5,0;3:0,0,1;4:1,1,1",
}
TIMEOUT = 240


def make_dataset(size=42, partial=False):
    rng = np.random.default_rng(0)
    leaves = torch.arange(size) % TREE.num_leaves
    images = np.clip(
        rng.normal(40 * leaves[:, None, None].numpy() + 40, 20, (size, 16, 16)), 0, 255
    ).astype(np.uint8)
    labels = TREE.expand(leaves)
    if partial:
        labels[torch.from_numpy(rng.random((size, 3)) < 0.7)] = -1
    return HierarchicalDataset(images, labels, TREE)


def make_model(name="test_vit", hidden=()):
    torch.manual_seed(0)
    kwargs = {"patch_size": 4} if name == "test_vit" else {}
    return create_branch_model(
        name,
        taps=[3, 4, 5],
        head=PoolHead(hidden=hidden),
        taxonomy=TREE,
        in_chans=1,
        img_size=16,
        **kwargs,
    )


def settings(folder, **kwargs):
    return FitConfig(
        **{
            "output": str(folder),
            "epochs": 2,
            "device": "cpu",
            "lr": 0.05,
            "sched": "cosine",
            "weight_decay": 1e-3,
            "plots": False,
            "progress": False,
            **kwargs,
        }
    )


def run_parity(folder, labels, steps, batch_size):
    """Train, and return the weights and the log.

    5 batches an epoch, so that the last group is not complete.
    """
    data = make_dataset(partial=labels == "partial")
    task = BranchTask(make_model(), "0:0.5,0.3,0.2;1:0,0.4,0.6", verbose=False)
    result = fit(
        task,
        create_loader(data, batch_size, is_training=True),
        create_loader(make_dataset(13), batch_size),
        settings(folder, grad_accum_steps=steps),
    )
    return base_model(task).state_dict(), result


def run_schedule(text):
    """Plain loop through all weights of a schedule.

    Which heads moved, and which should have, in each phase.
    """
    schedule = get_schedule(text, num_levels=3)
    task = BranchTask(make_model("test_resnet", hidden=(8,)), schedule, verbose=False)
    optimizer = create_optimizer_v2(
        task.trainable_module, opt="sgd", lr=0.01, weight_decay=0.1, momentum=0.9
    )
    task.prepare_distributed()
    loader = create_loader(make_dataset(16), 4, is_training=True)
    phases = []
    for start in schedule.points:
        for epoch in (start, start + 0.5) if start else (0,):
            task.set_epoch(int(epoch))
            loader.set_epoch(len(phases))
            task.train()
            before = {
                name: {k: v.clone() for k, v in base_model(task).head(name).state_dict().items()}
                for name in task.names
            }
            for images, labels in loader:
                optimizer.zero_grad()
                task(images, labels)["loss"].backward()
                optimizer.step()
            # else the next forward pass gives the others the first one's statistics, of levels that
            # are off, too
            distribute_bn(task.get_trainable_module(), dist.get_world_size(), reduce=True)
            after = {name: base_model(task).head(name).state_dict() for name in task.names}
            moved = [
                any(not torch.equal(before[name][k], after[name][k]) for k in after[name])
                for name in task.names
            ]
            phases.append(
                {"epoch": int(epoch), "moved": moved, "on": [w > 0 for w in task.weights]}
            )
    return base_model(task).state_dict(), phases


def run_evaluation(flat=False):
    """13 samples in batches of 3 on each process."""
    torch.manual_seed(0)
    if flat:
        model = create_branch_model(
            "test_vit",
            taps=[5],
            num_classes=5,
            names=["leaf"],
            in_chans=1,
            img_size=16,
            patch_size=4,
        )
        task = FlatTask(model, TREE)
    else:
        task = BranchTask(make_model())
    evaluator = evaluate(task, create_loader(make_dataset(13, partial=True), 3))
    return {
        "metrics": evaluator.metrics,
        "again": evaluator.compute(distributed=dist.is_initialized()),
        "own": evaluator.num_samples,
        "matrices": [m.tolist() for m in evaluator.confusion_matrices()],
        "samples": evaluator.num_samples,
    }


def tensors(state):
    return {key: value.detach().contiguous().clone() for key, value in state.items()}


def worker(out):
    """What each of the processes does."""
    setup_device("cpu")
    rank = dist.get_rank()
    report = {"world": dist.get_world_size(), "parity": {}, "schedules": {}}
    for name, (labels, steps) in PARITY.items():
        state, result = run_parity(out / name / f"rank{rank}", labels, steps, 4)
        save_file(tensors(state), out / f"{name}.{rank}.safetensors")
        report["parity"][name] = result.history
    for name, text in SCHEDULES.items():
        state, phases = run_schedule(text)
        save_file(tensors(state), out / f"{name}.{rank}.safetensors")
        report["schedules"][name] = phases
    report["evaluation"] = [run_evaluation(), run_evaluation(flat=True)]

    # BatchNorm, moving average, plots, one folder for all
    data, val = make_dataset(20), make_dataset(13)
    folder = out / "shared"
    task = BranchTask(
        make_model("test_resnet", hidden=(8,)), "0:1,1,1;1:0,1,1;2:1,0,0", verbose=False
    )
    options = {"model_ema": True, "model_ema_decay": 0.5}
    fit(
        task,
        create_loader(data, 4, is_training=True),
        create_loader(val, 4),
        settings(folder, epochs=1, **options),
    )
    # every process may read the files at once
    report["saved"] = load_state(folder / "last.safetensors")["epoch"]
    # the checkpoint's schedule turns levels off, the one asked for does not
    task = BranchTask(make_model("test_resnet", hidden=(8,)), verbose=False)
    result = fit(
        task,
        create_loader(data, 4, is_training=True),
        create_loader(val, 4),
        settings(folder, epochs=4, resume="auto", plots=True, **options),
    )
    best = load_model(result.model_path)
    report["best"] = [
        result.best_epoch,
        result.best,
        dict(evaluate(BranchTask(best), create_loader(val, 4)).metrics),
    ]
    save_file(tensors(base_model(task).state_dict()), out / f"shared.{rank}.safetensors")
    save_file(
        tensors(base_model(task, ema=True).state_dict()), out / f"shared_ema.{rank}.safetensors"
    )
    (out / f"report.{rank}.json").write_text(json.dumps(report))
    dist.destroy_process_group()


if __name__ == "__main__":
    worker(Path(sys.argv[1]))


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """The folder that two processes have filled."""
    folder = tmp_path_factory.mktemp("ddp")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--standalone",
        __file__,
        str(folder),
    ]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:
        try:
            output, _ = process.communicate(timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            pytest.fail(f"the processes hang:\n{output[-3000:]}")
    assert process.returncode == 0, output[-5000:]
    return folder


@pytest.fixture(scope="module")
def reports(out):
    return [json.loads((out / f"report.{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("name", list(PARITY))
def test_two_processes_train_as_one_does(out, reports, name, tmp_path):
    labels, steps = PARITY[name]
    start = {key: value.clone() for key, value in make_model().state_dict().items()}
    want, result = run_parity(tmp_path, labels, steps, 8)
    got = load_file(out / f"{name}.0.safetensors")
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert max(float((want[key] - start[key]).abs().max()) for key in want) > 0.01
    for mine, theirs in zip(result.history, reports[0]["parity"][name], strict=True):
        for key in mine.keys() - {"seconds", "images_per_second"}:
            assert theirs[key] == pytest.approx(mine[key], rel=1e-4), key


def test_labels_were_unequally_known_to_the_processes():
    """What the test above rests on."""
    data = make_dataset(partial=True)
    counts = []
    for rank in (0, 1):
        loader = create_loader(data, 4, is_training=True, rank=rank, world_size=2)
        loader.set_epoch(0)
        counts.append([(labels >= 0).sum(0).tolist() for _, labels in loader])
    assert len(counts[0]) == 5
    assert sum(a != b for a, b in zip(*counts, strict=True)) >= 3
    assert any(0 in known for known in counts[0] + counts[1])


@pytest.mark.parametrize("name", [*PARITY, *SCHEDULES, "shared", "shared_ema"])
def test_the_processes_end_with_the_same_weights(out, name):
    first, second = (load_file(out / f"{name}.{rank}.safetensors") for rank in (0, 1))
    assert first.keys() == second.keys()
    assert not [key for key in first if not torch.equal(first[key], second[key])]


@pytest.mark.parametrize("name", list(SCHEDULES))
def test_every_transition_moves_just_the_levels_that_are_on(reports, name):
    for report in reports:
        phases = report["schedules"][name]
        points = get_schedule(SCHEDULES[name], num_levels=3).points
        assert [p["on"] for p in phases if p["epoch"] in points][-1] == [
            w > 0 for w in list(points.values())[-1]
        ]
        assert len({tuple(p["on"]) for p in phases}) == len(
            {tuple(w > 0 for w in ws) for ws in points.values()}
        )
        assert [p["moved"] for p in phases] == [p["on"] for p in phases]


@pytest.mark.parametrize("flat", [False, True])
def test_each_sample_is_evaluated_once(reports, flat):
    want = run_evaluation(flat)
    first, second = (report["evaluation"][flat] for report in reports)
    assert first["own"] + second["own"] == want["own"] == 13
    assert first["samples"] + second["samples"] == 13
    for got in (first, second):
        assert got["matrices"] == want["matrices"]
        assert got["metrics"] == pytest.approx(want["metrics"], rel=1e-6)
        assert got["again"] == got["metrics"]


def test_one_process_writes(out, reports):
    assert [report["world"] for report in reports] == [2, 2]
    for name in PARITY:
        assert [path.name for path in (out / name).iterdir()] == ["rank0"]
        files = {path.name for path in (out / name / "rank0").iterdir()}
        assert files == {"model.safetensors", "last.safetensors", "log.csv"}
    assert len((out / "shared" / "log.csv").read_text().splitlines()) == 5
    assert not list((out / "shared").glob(".*"))
    assert (out / "shared" / "confusion_fine.png").exists()


def test_files_are_there_for_all_when_fit_returns(reports):
    for report in reports:
        assert report["saved"] == 0
        epoch, metrics, judged = report["best"]
        assert epoch == reports[0]["best"][0]
        assert judged == pytest.approx(metrics, rel=1e-6)


def test_saved_weights_are_the_averaged_ones(out):
    state = load_state(out / "shared" / "last.safetensors")
    for key, name in (("state_dict", "shared"), ("state_dict_ema", "shared_ema")):
        want = load_file(out / f"{name}.0.safetensors")
        assert all(torch.equal(state[key][k], want[k]) for k in want)
