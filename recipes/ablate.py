"""Which backbone, which taps, which loss? A recipe over a grid of its flags, as one table.

    # three small backbones and two sets of taps on scikit-learn's digits
    python recipes/ablate.py
    # any flag of any recipe; the rest of the line goes to the recipe
    python recipes/ablate.py bcnn photos/ --grid model=resnet18,convnext_atto taps=3-4-5,5-5-5 \
        --seeds 3 --epochs 20 --pretrained
    python recipes/ablate.py segment --grid head=unet,rednet lr=1e-3,3e-4
    # the same grid as a file, where values hold commas
    python recipes/ablate.py bcnn --grid grid.yaml
    # for a cluster: prints a job array, and what collects it
    python recipes/ablate.py --seeds 3 --slurm > jobs.sh

Each setting of the grid is trained with each seed: a cell, with a folder of its own below
`--output`. Cells that are done are skipped, one that was stopped goes on where it was, one that
fails is named and the others go on. The table (`ablation.md`, a line a cell in `ablation.csv`) has
mean and spread over seeds, what each setting costs, and which differences to the best are beyond
the noise, paired over seeds; `ablation.png` shows accuracy against cost.

In a grid the values of a flag that takes several are joined by dashes: `taps=3-4-5,5-5-5`. A YAML
file says the same as `taps: [[3, 4, 5], [5, 5, 5]]`.
"""

import argparse
import csv
import fcntl
import importlib.util
import itertools
import json
import os
import queue
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean, median
from types import ModuleType
from typing import Any

from timm_branches.files import replace_file
from timm_branches.train.compare import comparison_table, paired_difference
from timm_branches.train.recipe_parser import add_short_help
from timm_branches.train.script import run_script

# what decides, by recipe, and the row of its table where that is not the first
METHODS = {"bcnn": "B-CNN, best path"}
METRICS = {"bcnn": "full_path", "cnn_lstm": "top1", "segment": "miou", "denoise": "psnr"}
# what the table shows beside it, where a recipe has it
SHOWN = re.compile(r".+_top1|top1|full_path|consistency|distance|miou|psnr|ssim")
LOWER_IS_BETTER = ("distance", "severity", "loss", "tice", "cost")
COSTS = {
    "parameters": "parameters (M)",
    "macs": "multiply-adds (M)",
    "images_per_second": "img/s",
    "minutes": "minutes",
    "memory": "memory (MB)",
}
DEMO: dict[str, list[Any]] = {
    "model": ["test_resnet", "test_efficientnet", "test_convnext"],
    "taps": [["3", "5"], ["5", "5"]],
}
DEMO_FLAGS = shlex.split(
    "--img-size 32 --opt adamw --lr 3e-3 --epochs 8 --no-flat --no-plots --no-check"
)

Grid = dict[str, list[Any]]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The arguments; `rest` is the recipe's own."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
        usage="ablate.py [bcnn|cnn_lstm|segment|denoise] [DATA] [--grid NAME=A,B ...] [FLAGS]",
        allow_abbrev=False,
    )
    add_short_help(parser, ("grid", "seeds", "metric", "output", "jobs", "gpus", "cost", "table"))
    parser.add_argument(
        "--grid",
        nargs="+",
        metavar="NAME=A,B",
        help="flags of the recipe and their values, or a YAML file of them (default: three small "
        "backbones and two sets of taps)",
    )
    parser.add_argument("--seeds", type=int, default=1, help="of each setting (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="the first of them (default: 0)")
    parser.add_argument("--metric", help="what decides (default: of bcnn full_path, ...)")
    parser.add_argument(
        "--method",
        help="which row of the recipe's table counts (default: the first; of bcnn the best path)",
    )
    parser.add_argument(
        "--cost", choices=COSTS, default="macs", help="the picture's other axis (default: macs)"
    )
    parser.add_argument("--output", type=Path, default=Path("output/ablate"))
    parser.add_argument(
        "--jobs", type=int, help="cells at a time (default: one a GPU, without one 2)"
    )
    parser.add_argument("--gpus", nargs="+", metavar="ID", help="which GPUs (default: all)")
    parser.add_argument(
        "--give-up",
        type=float,
        metavar="POINTS",
        help="train no further seed of a setting whose first one is so much behind the best",
    )
    parser.add_argument("--slurm", action="store_true", help="print a job array, and stop")
    parser.add_argument("--cell", type=int, help="run this one only, as the job array does")
    parser.add_argument("--table", action="store_true", help="make the table of what is done")
    given = list(sys.argv[1:] if argv is None else argv)
    recipe = given.pop(0) if given[:1] and given[0] in METRICS else "bcnn"
    args, rest = parser.parse_known_args(given)
    args.recipe, args.rest = recipe, rest
    if not args.grid and recipe != "bcnn":
        parser.error(f"--grid says which flags of {recipe} to vary, such as model=A,B.")
    if args.seeds < 1:
        parser.error(f"--seeds must be 1 or more, got {args.seeds}.")
    if args.jobs is not None and args.jobs < 1:
        parser.error(f"--jobs must be 1 or more, got {args.jobs}.")
    if args.give_up is not None and args.seeds == 1:
        parser.error("--give-up leaves out further seeds: it has no effect with --seeds 1.")
    if not args.grid and not args.rest:
        args.rest = list(DEMO_FLAGS)
    return args


# -- the grid


def load_recipe(name: str) -> ModuleType:
    """The recipe's script as a module."""
    path = Path(__file__).resolve().parent / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"recipe_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def read_grid(given: Sequence[str] | None, parser: argparse.ArgumentParser) -> Grid:
    """By flag the values to try.

    Raises:
        ValueError: The recipe has no such flag, a flag is given twice or without values, or the
            file is no mapping of flags to lists.
    """
    if not given:
        return dict(DEMO)
    several = {action.dest: takes_several(action) for action in parser._actions}
    grid: Grid = {}
    if len(given) == 1 and given[0].endswith((".yaml", ".yml")):
        import yaml

        loaded = yaml.safe_load(Path(given[0]).read_text(encoding="utf-8"))
        if not isinstance(loaded, dict):
            raise ValueError(f"{given[0]}: a grid names flags and lists their values.")
        for name, values in loaded.items():
            grid[flag_of(str(name), several)] = values if isinstance(values, list) else [values]
    else:
        for text in given:
            name, equals, values = text.partition("=")
            if not equals or not values:
                raise ValueError(f"--grid takes NAME=A,B, got {text!r}.")
            dest = flag_of(name, several)
            if dest in grid:
                raise ValueError(f"--grid names {name} twice.")
            grid[dest] = []
            for value in values.split(","):
                grid[dest].append(value.split("-") if several[dest] else as_scalar(value))
    for name, values in grid.items():
        texts = list(map(text_of, values))
        if len(set(texts)) < len(texts):
            raise ValueError(f"--grid has a value of {name} twice: {', '.join(texts)}.")
    return grid


def flag_of(name: str, several: Mapping[str, bool]) -> str:
    """The setting that a flag's name means."""
    dest = name.lstrip("-").replace("-", "_")
    if dest in ("seed", "output", "resume", "config", "help", "help_all"):
        raise ValueError(f"--grid cannot vary {name}: the ablation sets it itself.")
    if dest not in several:
        raise ValueError(f"The recipe has no flag --{name.lstrip('-')} to vary.")
    return dest


def takes_several(action: argparse.Action) -> bool:
    """Whether a flag is followed by a list."""
    return action.nargs in ("+", "*") or (isinstance(action.nargs, int) and action.nargs > 0)


def as_scalar(text: str) -> Any:
    """True and false as such; all else as the recipe's own parser reads it."""
    return {"true": True, "false": False}.get(text.lower(), text)


def text_of(value: Any) -> str:
    """A value as the command line has it."""
    if isinstance(value, list | tuple):
        return "-".join(map(text_of, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


class Cell:
    """A setting of the grid with a seed, and its folder."""

    def __init__(self, setting: dict[str, Any], seed: int, output: Path) -> None:
        self.setting, self.seed = setting, seed
        texts = [f"{name}={text_of(value)}" for name, value in setting.items()]
        self.name = ", ".join(texts)
        self.folder = output / "cells" / re.sub(r"[^\w.=-]+", "_", "__".join([*texts, f"s{seed}"]))

    def __str__(self) -> str:
        return f"{self.name}, seed {self.seed}"

    @property
    def state(self) -> dict[str, Any]:
        """What is known of its run."""
        path = self.folder / "cell.json"
        return json.loads(path.read_text()) if path.exists() else {}

    @property
    def done(self) -> bool:
        """Whether its results are there."""
        return bool(self.state.get("done")) and (self.folder / "results.json").exists()

    def keep(self, state: Mapping[str, Any]) -> None:
        """Write what is known."""
        text = json.dumps(state, indent=1)
        replace_file(self.folder / "cell.json", lambda path: Path(path).write_text(text))


def make_cells(grid: Grid, args: argparse.Namespace) -> list[Cell]:
    """Seed by seed, so that a table of all settings is there early."""
    cells = []
    for seed in range(args.seed, args.seed + args.seeds):
        for values in itertools.product(*grid.values()):
            cells.append(Cell(dict(zip(grid, values, strict=True)), seed, args.output))
    return cells


def command_of(cell: Cell, args: argparse.Namespace) -> list[str]:
    """The recipe's command; its settings lie beside its results.

    Raises:
        ValueError: The folder holds a cell of other settings.
    """
    import yaml

    path = cell.folder / "settings.yaml"
    text = yaml.safe_dump({**cell.setting, "seed": cell.seed}, sort_keys=False)
    given = shlex.join(args.rest)
    state = cell.state
    if state and (state.get("flags") != given or state.get("recipe") != args.recipe):
        raise ValueError(
            f"{cell.folder} holds a run of {state.get('recipe')} {state.get('flags') or 'alone'}, "
            f"and this is {args.recipe} {given or 'alone'}: choose another --output."
        )
    cell.folder.mkdir(parents=True, exist_ok=True)
    replace_file(path, lambda at: Path(at).write_text(text, encoding="utf-8"))
    return [*args.rest, "--config", str(path), "--output", str(cell.folder), "--resume", "auto"]


def check_cells(cells: Sequence[Cell], recipe: ModuleType, args: argparse.Namespace) -> None:
    """Let the recipe's own parser read every cell before the first one starts.

    Raises:
        ValueError: A flag of the grid is given beside it, too.
    """
    for name in cells[0].setting:
        flag = "--" + name.replace("_", "-")
        if any(word.split("=")[0] == flag for word in args.rest):
            raise ValueError(f"{flag} is given beside a grid that varies it.")
    for cell in cells:
        recipe.parse_args(command_of(cell, args))  # says what is wrong, and stops


# -- running


class Pool:
    """Runs cells side by side; each GPU, or share of the cores, has one at a time."""

    def __init__(self, cells: Sequence[Cell], args: argparse.Namespace) -> None:
        self.cells, self.args = cells, args
        self.slots: queue.Queue[dict[str, str]] = queue.Queue()
        environments = slots_of(args)
        for environment in environments:
            self.slots.put(environment)
        self.jobs = len(environments)
        self.running: set[subprocess.Popen] = set()
        self.lock = threading.Lock()
        self.stopping = False

    def run(self) -> None:
        """All that are not done; an interruption stops them all."""
        # a cluster's notice stops the cells, too, which write what they have
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        with ThreadPoolExecutor(self.jobs) as threads:
            futures = [threads.submit(self._one, cell) for cell in self.cells if not cell.done]
            try:
                for future in futures:
                    future.result()
            except BaseException:
                self.stopping = True
                with self.lock:
                    for process in self.running:
                        process.send_signal(signal.SIGTERM)
                raise
        signal.signal(signal.SIGTERM, before)

    def _one(self, cell: Cell) -> None:
        if self.stopping:
            return
        if is_hopeless(cell, self.cells, self.args):
            print(f"given up: {cell}", flush=True)
            return
        environment = self.slots.get()
        try:
            self._train(cell, environment)
        finally:
            self.slots.put(environment)

    def _train(self, cell: Cell, environment: dict[str, str]) -> None:
        with open(cell.folder / "lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"left alone, another process trains it: {cell}", flush=True)
                return
            self._train_locked(cell, environment, lock.fileno())

    def _train_locked(self, cell: Cell, environment: dict[str, str], lock: int) -> None:
        script = Path(__file__).resolve().parent / f"{self.args.recipe}.py"
        command = [sys.executable, str(script), *command_of(cell, self.args), "--no-progress"]
        earlier = cell.state
        state = {
            "recipe": self.args.recipe,
            "flags": shlex.join(self.args.rest),
            "command": shlex.join(command),
            "minutes": earlier.get("minutes", 0.0),
        }
        cell.keep(state)
        start = time.monotonic()
        with open(cell.folder / "output.txt", "a", encoding="utf-8") as log:
            process = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
                start_new_session=True,  # an interruption reaches it through us alone
                pass_fds=[lock],  # it holds the lock as long as it lives, whatever becomes of us
            )
            with self.lock:
                self.running.add(process)
            # wait4 alone tells one child's memory from the others'
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            with self.lock:
                self.running.discard(process)
        state["minutes"] += (time.monotonic() - start) / 60
        state["memory"] = usage.ru_maxrss / 1024
        state["done"] = process.returncode == 0 and (cell.folder / "results.json").exists()
        if not state["done"] and not self.stopping:
            state["failed"] = last_line(cell.folder / "output.txt")
        cell.keep(state)
        if state["done"]:
            print(f"done: {cell}", flush=True)
        elif not self.stopping:
            print(f"FAILED: {cell}: {state['failed']}", flush=True)


def slots_of(args: argparse.Namespace) -> list[dict[str, str]]:
    """What each worker's processes find in their environment."""
    import torch

    gpus = args.gpus
    if gpus is None and torch.cuda.is_available():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        gpus = visible.split(",") if visible else list(map(str, range(torch.cuda.device_count())))
    if gpus:
        jobs = args.jobs or len(gpus)
        return [{"CUDA_VISIBLE_DEVICES": gpus[job % len(gpus)]} for job in range(jobs)]
    cores = len(os.sched_getaffinity(0))
    jobs = args.jobs or min(2, cores)
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, cores // jobs))
    return [{"OMP_NUM_THREADS": threads}] * jobs


def last_line(path: Path) -> str:
    """What a program said last."""
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    said = [line.strip() for line in lines if line.strip()]
    return said[-1][:300] if said else "it said nothing"


def is_hopeless(cell: Cell, cells: Sequence[Cell], args: argparse.Namespace) -> bool:
    """Whether the setting's first seed is so far behind that no other one is worth its time."""
    if args.give_up is None or cell.seed == args.seed:
        return False
    metric = metric_of(args)
    first = {}
    for other in cells:
        if other.seed == args.seed and other.done:
            first[other.name] = sign_of(metric) * read_metrics(other, args)[metric]
    return cell.name in first and max(first.values()) - first[cell.name] > args.give_up


# -- what came out


def metric_of(args: argparse.Namespace) -> str:
    """What decides."""
    return args.metric or METRICS[args.recipe]


def sign_of(metric: str) -> int:
    """1 if more is better, else -1."""
    return -1 if metric.endswith(LOWER_IS_BETTER) or metric.endswith("_ece") else 1


def read_metrics(cell: Cell, args: argparse.Namespace) -> dict[str, float]:
    """The row of the recipe's table that counts.

    Raises:
        ValueError: There is no such row, or no such metric in it.
    """
    rows = json.loads((cell.folder / "results.json").read_text())["results"]
    method = args.method or METHODS.get(args.recipe) or next(iter(rows))
    if method not in rows:
        raise ValueError(f"--method {method!r}: the recipe's table has {', '.join(rows)}.")
    metrics = rows[method]
    metrics = metrics[0] if isinstance(metrics, list) else metrics
    if not isinstance(metrics.get(metric_of(args)), int | float):
        known = [name for name, value in metrics.items() if isinstance(value, int | float)]
        raise ValueError(f"--metric {metric_of(args)!r}: {method} has {', '.join(known)}.")
    return {name: value for name, value in metrics.items() if isinstance(value, int | float)}


def read_costs(cell: Cell) -> dict[str, float]:
    """What the cell cost; what cannot be told is left out."""
    state = cell.state
    costs: dict[str, float] = {name: state[name] for name in ("minutes", "memory") if name in state}
    logs = sorted(cell.folder.rglob("log.csv"))
    if logs:
        with open(logs[0], newline="", encoding="utf-8") as file:
            speeds = [row.get("images_per_second") for row in csv.DictReader(file)]
        known = [float(speed) for speed in speeds if speed]
        if known:
            costs["images_per_second"] = median(known)
    models = sorted(cell.folder.rglob("model.safetensors"))
    if models:
        costs.update(size_of(models[0]))
    return costs


def size_of(path: Path) -> dict[str, float]:
    """Parameters and multiply-adds of an image, in millions."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from timm_branches import load_model

    model = load_model(path).eval()
    sizes = {"parameters": sum(p.numel() for p in model.parameters()) / 1e6}
    image = torch.zeros(1, *model.pretrained_cfg["input_size"])
    counter = FlopCounterMode(display=False)
    try:
        with counter, torch.no_grad():
            model(image)
    except (ValueError, RuntimeError):  # of clips: an image of theirs is one frame
        with counter, torch.no_grad():
            model(image[None])
    return {**sizes, "macs": counter.get_total_flops() / 2e6}


def collect(cells: Sequence[Cell], args: argparse.Namespace) -> None:
    """The table, the cells' lines and the picture.

    Raises:
        ValueError: No cell is done.
    """
    done = [cell for cell in cells if cell.done]
    if not done:
        raise ValueError(f"No cell of {args.output} is done.")
    results: dict[str, list[dict[str, float]]] = {}
    seeds: dict[str, list[int]] = {}
    lines = []
    for cell in done:
        row = {**read_metrics(cell, args), **read_costs(cell)}
        results.setdefault(cell.name, []).append(row)
        seeds.setdefault(cell.name, []).append(cell.seed)
        texts = {name: text_of(value) for name, value in cell.setting.items()}
        lines.append({**texts, "seed": cell.seed, **row})
    write_csv(args.output / "ablation.csv", lines)
    metric = metric_of(args)
    shown = [name for name in next(iter(results.values()))[0] if SHOWN.fullmatch(name)]
    columns = {name: name for name in dict.fromkeys([*shown, metric])} | COSTS
    by_rank = dict(
        sorted(results.items(), key=lambda item: -sign_of(metric) * mean_of(item[1], metric))
    )
    table = comparison_table(by_rank, columns)
    verdicts = differences(by_rank, seeds, metric)
    missing = [cell for cell in cells if not cell.done]
    print(f"\n{table}\n\n{verdicts}")
    title = f"{args.recipe}: {', '.join(cells[0].setting)}"
    text = f"# {title}\n\n{as_markdown(table)}\n\n{verdicts}\n"
    if missing:
        names = "\n".join(f"- {cell}: {cell.state.get('failed', 'not run')}" for cell in missing)
        print(f"\nNot in the table:\n{names}")
        text += f"\nNot in the table:\n\n{names}\n"
    text += f"\n`{shlex.join(['python', *sys.argv])}`, {hardware_of(done[0])}\n"
    replace_file(
        args.output / "ablation.md", lambda path: Path(path).write_text(text, encoding="utf-8")
    )
    plot(by_rank, metric, args.cost, args.output / "ablation.png")
    print(f"\nFiles: {args.output}")


def as_markdown(table: str) -> str:
    """The printed table, with bars."""
    lines = []
    for line in table.split("\n"):
        if set(line) != {"-"}:
            cells = re.split(r"\s{2,}", line)
            lines.append(f"| {' | '.join(cells)} |")
    lines.insert(1, "|" + " --- |" * lines[0].count(" | ") + " --- |")
    return "\n".join(lines)


def mean_of(rows: Sequence[Mapping[str, float]], name: str) -> float:
    """Over the seeds."""
    return fmean(row[name] for row in rows)


def hardware_of(cell: Cell) -> str:
    """Of the first cell that is done; others may have run elsewhere."""
    return str(json.loads((cell.folder / "results.json").read_text()).get("hardware", ""))


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """A line a row; what a row lacks is empty."""
    names = list(dict.fromkeys(itertools.chain.from_iterable(rows)))

    def write(at: str | os.PathLike) -> None:
        with open(at, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(rows)

    replace_file(path, write)


def differences(
    results: Mapping[str, Sequence[Mapping[str, float]]],
    seeds: Mapping[str, Sequence[int]],
    metric: str,
) -> str:
    """Which settings differ from the best by more than the noise, paired over the seeds they share.

    Intervals are for one comparison each; of many, some leave zero out by chance.
    """
    best, *others = results
    if not others:
        return f"One setting: {best}."
    lines = [f"Best by {metric}: {best}."]
    if max(map(len, seeds.values())) == 1:
        return f"{lines[0]} One seed says nothing about the noise: take --seeds 3 or more."
    lines.append(f"Less {metric} than it by (95 % interval over the seeds in common):")
    for name in others:
        common = [seed for seed in seeds[best] if seed in seeds[name]]
        if not common:
            continue
        values = {}
        for of_name in (best, name):
            rows = dict(zip(seeds[of_name], results[of_name], strict=True))
            values[of_name] = [rows[seed][metric] for seed in common]
        difference = paired_difference(values[best], values[name])
        if difference.count == 1:
            judgement = "one seed: no verdict"
        else:
            judgement = "beyond the noise" if difference.measurable else "within the noise"
        lines.append(f"- {name}: {difference}, {judgement}")
    if len(others) > 1:
        lines.append(
            f"Each interval is for one comparison; of {len(others)} some are beyond it by chance."
        )
    return "\n".join(lines)


def plot(
    results: Mapping[str, Sequence[Mapping[str, float]]], metric: str, cost: str, path: Path
) -> None:
    """Each setting's metric over its cost, and the front of those that none beats in both."""
    from timm_branches.figures import COLOURS, FAINT, INK, new_figure, restrain, save_figure

    points = []
    for name, rows in results.items():
        if all(cost in row for row in rows):
            values = [row[metric] for row in rows]
            points.append((mean_of(rows, cost), fmean(values), min(values), max(values), name))
    if not points:
        return
    figure = new_figure(7.5, 4.5)
    axes = figure.subplots()
    front, best = [], None
    # from the cheapest on; of equally cheap ones the best first
    points_by_cost = sorted(points, key=lambda point: -sign_of(metric) * point[1])
    points_by_cost.sort(key=lambda point: point[0], reverse=cost == "images_per_second")
    for point in points_by_cost:
        if best is None or sign_of(metric) * (point[1] - best) > 0:
            front.append(point)
            best = point[1]
    x_of_front, y_of_front, *_ = zip(*front, strict=True)
    axes.plot(x_of_front, y_of_front, color=FAINT, linewidth=2, zorder=1)
    for number, (x, y, low, high, name) in enumerate(points):
        colour, marker = COLOURS[number % len(COLOURS)], "osD^v"[number // len(COLOURS) % 5]
        axes.plot(x, y, marker, color=colour, label=name, zorder=3)
        if high > low:
            axes.vlines(x, low, high, color=colour, zorder=2)
    restrain(axes)
    axes.grid(color=FAINT, linewidth=0.6)
    axes.set_xlabel(COSTS[cost], color=INK)
    axes.set_ylabel(f"{metric}, mean and range over seeds", color=INK)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8, labelcolor=INK)
    save_figure(figure, path)


def job_array(cells: Sequence[Cell], args: argparse.Namespace) -> str:
    """A SLURM script: a job a cell; run it with sbatch, then the last line makes the table."""
    own = [word for word in sys.argv[1:] if word != "--slurm"]
    command = shlex.join(["python", sys.argv[0], *own])
    return "\n".join(
        [
            "#!/bin/bash",
            "#SBATCH --job-name=ablate",
            f"#SBATCH --array=0-{len(cells) - 1}",
            "#SBATCH --gpus-per-task=1",
            "#SBATCH --cpus-per-task=8",
            f'srun {command} --cell "$SLURM_ARRAY_TASK_ID"',
            f"# when all are done: {command} --table",
        ]
    )


def main(args: argparse.Namespace) -> None:
    """Run what is not done, then make the table.

    Raises:
        ValueError: The grid is none of the recipe's, or nothing was done.
    """
    recipe = load_recipe(args.recipe)
    cells = make_cells(read_grid(args.grid, recipe.make_parser()), args)
    if args.cell is not None and not 0 <= args.cell < len(cells):
        raise ValueError(f"--cell must be 0 to {len(cells) - 1}, got {args.cell}.")
    check_cells(cells, recipe, args)
    if args.slurm:
        print(job_array(cells, args))
        return
    if not args.table:
        wanted = cells if args.cell is None else [cells[args.cell]]
        done = sum(cell.done for cell in wanted)
        pool = Pool(wanted, args)
        print(f"{len(wanted)} cells, {done} done already; {pool.jobs} at a time.", flush=True)
        pool.run()
    failed = [cell for cell in cells if cell.state.get("failed")]
    if args.cell is None and not (failed and not any(cell.done for cell in cells)):
        collect(cells, args)
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    run_script(lambda: main(parse_args()))
