"""The ablation over a recipe that takes no time, and once over the real one."""

import contextlib
import csv
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple

import pytest

from tests.docs.test_pages import commands
from tests.recipes.script import RECIPES, read_table, run_recipe

RECIPE = RECIPES / "ablate.py"
ROOT = RECIPES.parent

# a recipe whose result is a formula; it keeps what it was started with
STUB = """
import argparse, json, os, sys, time
from pathlib import Path

def make_parser():
    parser = argparse.ArgumentParser()
    parser.add_argument("data", nargs="?", default="digits")
    parser.add_argument("--model", default="small", choices=["small", "large", "broken", "slow"])
    parser.add_argument("--taps", nargs="+", default=["5"])
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--mend", action=argparse.BooleanOptionalAction)
    parser.add_argument("--seed", type=int, default=0)
    for name in ("--output", "--resume", "--device", "--config"):
        parser.add_argument(name)
    parser.add_argument("--no-progress", action="store_true")
    return parser

def parse_args(argv=None):
    import yaml
    given = list(sys.argv[1:] if argv is None else argv)
    settings = yaml.safe_load(Path(given[given.index("--config") + 1]).read_text())
    from_file = []
    for name, value in settings.items():
        if isinstance(value, bool):
            from_file.append("--" + "no-" * (not value) + name)
        else:
            values = value if isinstance(value, list) else [value]
            from_file += ["--" + name, *map(str, values)]
    return make_parser().parse_args([*from_file, *given])

if __name__ == "__main__":
    args = parse_args()
    folder = Path(args.output)
    with open(folder / "runs.txt", "a") as file:
        file.write(f"{args.resume}\\n")
    if args.model == "slow" and not (folder.parent.parent / "quick").exists():
        time.sleep(60)
    if args.model == "broken" and not (folder.parent.parent / "mended").exists():
        print("the cable is out")
        sys.exit(3)
    value = 10 * len(args.taps) + 100 * args.lr + {"large": 3, "small": 0}.get(args.model, -20)
    value += [0.0, 0.4, -0.2, 0.3][args.seed]
    if args.model == "large":
        value += [0.1, 0.0, -0.1, 0.0][args.seed]
    row = {"full_path": value, "distance": value / 100, "note": None}
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES")
    text = json.dumps({"hardware": "a stand-in", "gpu": gpu, "results": {
        "B-CNN": [{"full_path": 1.0}], "B-CNN, best path": [row]}})
    (folder / "results.json").write_text(text)
"""


@pytest.fixture
def place(tmp_path):
    """A copy of the recipe with the stand-in beside it: recipes are scripts that people copy."""
    (tmp_path / "ablate.py").write_text(RECIPE.read_text())
    (tmp_path / "bcnn.py").write_text(STUB)
    return tmp_path


class Done(NamedTuple):
    """How a run ended, and what it said."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def ablate(place, monkeypatch, capsys):
    """Run it in this process, where imports are paid for already."""

    def start(*args):
        argv = [place / "ablate.py", *args, "--output", place / "out"]
        monkeypatch.setattr(sys, "argv", list(map(str, argv)))
        try:
            runpy.run_path(str(place / "ablate.py"), run_name="__main__")
            status = 0
        except SystemExit as stop:
            status = stop.code
        return Done(status or 0, *capsys.readouterr())

    return start


def cells(place):
    return sorted(folder.name for folder in (place / "out" / "cells").iterdir())


def runs(place):
    """How often each cell was started."""
    counts = {}
    for name in cells(place):
        file = place / "out" / "cells" / name / "runs.txt"
        counts[name] = len(file.read_text().split()) if file.exists() else 0
    return counts


def test_grid(place, ablate):
    grid = ("--grid", "model=small,large", "taps=3-4-5,5")
    done = ablate(*grid, "--seeds", 3)
    assert done.returncode == 0, done.stderr
    assert len(cells(place)) == 12
    assert set(runs(place).values()) == {1}
    _, rows = read_table(done.stdout)
    # the formula of the stand-in; the best comes first
    values = [30 + 10 + 3 + 0.1, 30 + 10 + 3 + 0.4, 30 + 10 + 3 - 0.3]
    assert list(rows)[0] == "model=large, taps=3-4-5"
    assert rows["model=large, taps=3-4-5"][0] == round(fmean(values), 2)
    assert f"{fmean(values):.2f} ± {stdev(values):.2f}" in done.stdout
    with open(place / "out" / "ablation.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 12
    assert {line["taps"] for line in lines} == {"3-4-5", "5"}
    best = sorted(float(x["full_path"]) for x in lines if x["model"] == "large")[-3:]
    assert best == pytest.approx(sorted(values))
    assert float(lines[0]["memory"]) > 1
    # large is better by 3 in every seed but for a tenth, taps by 20 exactly
    assert "model=small, taps=3-4-5: +3.00" in done.stdout
    assert "beyond the noise" in done.stdout
    page = (place / "out" / "ablation.md").read_text()
    assert page.count("\n| model=") == 4
    assert "a stand-in" in page
    # all done: nothing is started again
    again = ablate(*grid, "--seeds", 3)
    assert "12 done already" in again.stdout
    assert set(runs(place).values()) == {1}
    # a wider grid keeps what is there
    ablate("--grid", "model=small,large", "taps=3-4-5,5", "--seeds", 4)
    assert len(cells(place)) == 16
    assert set(runs(place).values()) == {1}


def test_within_the_noise(place, ablate):
    done = ablate("--grid", "lr=0.1,0.1000001", "--seeds", 1)
    assert "One seed says nothing about the noise" in done.stdout
    done = ablate("--grid", "lr=0.1,0.1000001", "--seeds", 3)
    assert "within the noise" not in done.stdout  # the same noise in both: it is paired


def test_a_failing_cell(place, ablate):
    """It is named, the others are done, and it alone is tried again."""
    grid = ("--grid", "model=small,broken,large")
    done = ablate(*grid)
    assert done.returncode == 1
    assert "FAILED: model=broken, seed 0: the cable is out" in done.stdout
    assert "- model=broken, seed 0: the cable is out" in (place / "out/ablation.md").read_text()
    _, rows = read_table(done.stdout)
    assert list(rows) == ["model=large", "model=small"]
    (place / "out" / "mended").touch()
    done = ablate(*grid)
    assert done.returncode == 0, done.stdout
    assert runs(place) == {"model=broken__s0": 2, "model=large__s0": 1, "model=small__s0": 1}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_stopped_and_gone_on(place, ablate, number):
    command = [sys.executable, str(place / "ablate.py"), "--output", str(place / "out")]
    command += ["--grid", "model=slow,small", "--jobs", "1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    slow = place / "out" / "cells" / "model=slow__s0"
    for _ in range(600):
        if (slow / "runs.txt").exists():
            break
        time.sleep(0.1)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=30)
    (place / "out" / "quick").touch()
    done = ablate("--grid", "model=slow,small", "--jobs", 1)
    if number == signal.SIGKILL:
        # its child lives on, and nobody else may write there
        assert "left alone, another process trains it: model=slow, seed 0" in done.stdout
        assert done.returncode == 0
        assert runs(place)["model=slow__s0"] == 1
        subprocess.run(["pkill", "-f", str(slow)], check=False)
        time.sleep(0.5)
        done = ablate("--grid", "model=slow,small", "--jobs", 1)
    else:
        assert process.returncode == 128 + signal.SIGINT
        assert stderr.decode().strip().endswith("interrupted")
    assert done.returncode == 0, done.stdout + done.stderr
    assert runs(place) == {"model=slow__s0": 2, "model=small__s0": 1}
    assert (slow / "runs.txt").read_text().split() == ["auto", "auto"]


def test_give_up(place, ablate):
    done = ablate("--grid", "taps=5,3-4-5,4-5", "--seeds", 3, "--give-up", "15", "--jobs", 1)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("given up: taps=5, seed") == 2
    assert sum(runs(place).values()) == 7
    assert "taps=4-5: +10.00" in done.stdout


def test_a_yaml(place, ablate):
    (place / "grid.yaml").write_text("taps: [[3, 4, 5], [5, 5]]\nlr: 0.2\nmend: [true, false]\n")
    done = ablate("--grid", place / "grid.yaml")
    assert done.returncode == 0, done.stderr
    names = cells(place)
    assert len(names) == 4
    assert names[0] == "taps=3-4-5__lr=0.2__mend=false__s0"
    settings = (place / "out" / "cells" / names[0] / "settings.yaml").read_text()
    assert "mend: false" in settings


def test_gpus(place, ablate):
    done = ablate("--grid", "lr=0.1,0.2,0.3,0.4", "--gpus", "1", "3")
    assert "2 at a time" in done.stdout
    used = set()
    for name in cells(place):
        used.add(json.loads((place / "out/cells" / name / "results.json").read_text())["gpu"])
    assert used == {"1", "3"}


def test_job_array(place, ablate):
    grid = ("--grid", "model=small,large", "--seeds", 2)
    script = ablate(*grid, "--slurm").stdout
    assert "#SBATCH --array=0-3" in script
    [line] = [line for line in script.split("\n") if line.startswith("srun ")]
    assert not any(runs(place).values())
    for task in range(4):
        if task:
            assert ablate(*grid, "--cell", task).returncode == 0
            continue
        # srun is not here; what it starts is
        subprocess.run(
            line.replace("srun python", sys.executable),
            shell=True,
            cwd=place,
            env={**os.environ, "SLURM_ARRAY_TASK_ID": str(task)},
            check=True,
            capture_output=True,
        )
    assert set(runs(place).values()) == {1}
    table = ablate(*grid, "--table")
    assert table.returncode == 0
    assert len(read_table(table.stdout)[1]) == 2
    assert set(runs(place).values()) == {1}


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--grid", "width=3"], "no flag --width"),
        (["--grid", "model"], "NAME=A,B"),
        (["--grid", "model=small", "model=large"], "names model twice"),
        (["--grid", "model=small,small"], "a value of model twice"),
        (["--grid", "seed=1,2"], "sets it itself"),
        (["--grid", "output=a,b"], "sets it itself"),
        (["--grid", "model=huge"], "invalid choice: 'huge'"),
        (["--grid", "lr=much"], "invalid float value: 'much'"),
        (["--grid", "lr=0.1", "--lr", "0.2"], "--lr is given beside a grid that varies it"),
        (["--grid", "lr=0.1", "--widht", "3"], "--widht"),
        (["--grid", "lr=0.1", "--seeds", "0"], "--seeds must be 1 or more"),
        (["--grid", "lr=0.1", "--jobs", "0"], "--jobs must be 1 or more"),
        (["--grid", "lr=0.1", "--give-up", "3"], "no effect with --seeds 1"),
        (["--grid", "lr=0.1", "--cell", "1"], "--cell must be 0 to 0"),
        (["--grid", "lr=0.1", "--table"], "is done"),
        (["--grid", "missing.yaml"], "missing.yaml"),
        (["segment"], "--grid says which flags of segment"),
    ],
)
def test_refused(ablate, args, said):
    done = ablate(*args)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_refused_after_the_fact(place, ablate):
    assert ablate("--grid", "model=small").returncode == 0
    done = ablate("--grid", "model=small", "--lr", "0.3")
    assert done.returncode == 2
    assert "choose another --output" in done.stderr
    done = ablate("--grid", "model=small", "--metric", "psnr")
    assert "has full_path, distance" in done.stderr
    done = ablate("--grid", "model=small", "--method", "flat")
    assert "the recipe's table has B-CNN, B-CNN, best path" in done.stderr


def test_for_real(tmp_path):
    """Two cells of the real recipe, by the console's own command: sizes, speeds and a picture."""
    command = [sys.executable, "-m", "timm_branches", "ablate", "bcnn", "--limit", "200"]
    command += ["--epochs", "1", "--img-size", "32", "--no-flat", "--no-plots", "--no-check"]
    command += ["--grid", "model=test_resnet", "taps=3-5,5-5", "--output", str(tmp_path / "out")]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    titles, rows = read_table(done.stdout)
    by_title = dict(zip(titles, rows["model=test_resnet, taps=3-5"], strict=True))
    from timm_branches import load_model

    [path] = (tmp_path / "out/cells/model=test_resnet__taps=3-5__s0").rglob("model.safetensors")
    model = load_model(path)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    assert by_title["parameters (M)"] == pytest.approx(millions, abs=0.006)
    assert by_title["multiply-adds (M)"] > 0.1
    assert by_title["img/s"] > 1
    assert by_title["consistency"] == 100  # the best path is a path
    assert (tmp_path / "out" / "ablation.png").stat().st_size > 5000


def test_commands_shown(tmp_path, monkeypatch, capsys):
    """Every command in pages and help is one that the recipes' parsers read, cell by cell."""
    shown = [command for command in commands() if command[1].endswith("ablate.py")]
    assert len(shown) > 5
    monkeypatch.chdir(tmp_path)
    (tmp_path / "grid.yaml").write_text("taps: [[3, 4, 5], [5, 5, 5]]\n")
    for page, _, arguments in shown:
        if ">" in arguments:
            arguments = arguments[: arguments.index(">")]
        monkeypatch.setattr(sys, "argv", [str(RECIPE), *arguments, "--slurm"])
        with contextlib.suppress(SystemExit):  # without a job array there was a fault
            runpy.run_path(str(RECIPE), run_name="__main__")
        assert "#SBATCH --array=0-" in capsys.readouterr().out, (page, arguments)


def test_help(place):
    done = run_recipe(RECIPE, "--help", cwd=place)
    assert done.returncode == 0
    assert len(done.stdout.split("\n")) <= 41
    assert "--grid" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["--help"], 0, "--grid"),
        (["--grid", "width=3"], 2, "no flag --width"),
        (["segment"], 2, "--grid says which flags"),
    ],
)
def test_as_a_command(arguments, status, said, tmp_path, monkeypatch, capsys):
    """Its first word may be a flag."""
    from timm_branches.cli import main

    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["ablate", *arguments])
    assert (stop.value.code or 0) == status
    found = capsys.readouterr()
    assert said in found.out + found.err


def test_no_cell_is_done(place, ablate):
    done = ablate("--grid", "model=broken")
    assert done.returncode == 1
    assert "FAILED: model=broken, seed 0: the cable is out" in done.stdout
    assert done.stderr == ""


def test_is_a_recipe_by_name():
    done = subprocess.run(
        [sys.executable, "-m", "timm_branches", "recipes", "list"],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path.home(),
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert "ablate" in done.stdout
