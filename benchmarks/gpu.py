"""What this package does on a GPU, in pieces that can be run one by one and go on after a stop.

    python benchmarks/gpu.py                       # all that needs no data
    python benchmarks/gpu.py --data DATA           # and the trainings on data sets
    python benchmarks/gpu.py --pieces roof trees   # some of them
    python benchmarks/gpu.py --tiny --device cpu   # minutes on a CPU: does everything run?

Each piece writes its numbers at once into `benchmarks/results/<device>.json`, beside which lies the
same as a table, `<device>.md`; what is there is not run again without `--again`. A piece that fails
is named in the table, and the others go on. What was not run is a blank that says so.

DATA is a folder of what is there of `cifar10/` and `cifar100/` (train and test, of class folders),
`grocery/`, `camvid/`, `denoise/` and `tf_efficientnet_lite0.safetensors`. Nothing is downloaded.
"""

import argparse
import itertools
import json
import random
import re
import shlex
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from hierarchy import random_paths
from measure import count_operations, time_all
from torch.utils.flop_counter import FlopCounterMode

from timm_branches import create_branch_model
from timm_branches.dense import SegmentationEvaluator
from timm_branches.files import replace_file
from timm_branches.hierarchy import HierarchyEvaluator, decode, sum_upwards
from timm_branches.hierarchy.decode import DECODERS
from timm_branches.hierarchy.losses import (
    consistency_loss,
    hxe_loss,
    level_cross_entropy,
    marginal_loss,
    soft_label_loss,
    tree_path_kl,
)
from timm_branches.task import BranchTask, DenseTask, FlatTask
from timm_branches.task.base import HeadsTask
from timm_branches.taxonomy import Taxonomy
from timm_branches.train.script import hardware

ROOT = Path(__file__).resolve().parents[1]
Rows = list[dict[str, Any]]


class Setting(NamedTuple):
    """What all pieces are told."""

    device: torch.device
    tiny: bool
    repeats: int
    data: Path | None
    runs: Path  # folder of the trainings
    workers: int
    minutes: float  # of one training at most


class Piece(NamedTuple):
    """A question, and what answers it."""

    question: str
    run: Callable[[Setting], Rows]
    needs: tuple[str, ...] = ()  # what of the data


# -- the machine


def roof(setting: Setting) -> Rows:
    """How fast the machine itself multiplies and copies, to hold the rest against."""
    size, kind = (256, torch.float32) if setting.tiny else (8192, torch.bfloat16)
    a = torch.randn(size, size, device=setting.device, dtype=kind)
    b = torch.randn(size, size, device=setting.device, dtype=kind)
    source = torch.empty(size * size * 16, device=setting.device)
    target = torch.empty_like(source)
    seconds = time_all(
        {"product": lambda: a @ b, "copy": lambda: target.copy_(source)},
        setting.repeats,
        setting.device,
    )
    return [
        {
            "what": f"product of {size} x {size}, {str(kind).removeprefix('torch.')}",
            "TFLOP/s": 2 * size**3 / seconds["product"] / 1e12,
        },
        {"what": "copy", "GB/s": 2 * source.nbytes / seconds["copy"] / 1e9},
    ]


# -- steps of training


def train_step(
    loss_of: Callable[[], torch.Tensor], model: torch.nn.Module, device: torch.device
) -> Callable[[], None]:
    """One step as all are timed: forward in half precision, backward, fused update."""
    fused = device.type == "cuda"
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, fused=fused)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = loss_of()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


class Pair(NamedTuple):
    """The bare timm network and ours, each with its loss of one batch of the same images."""

    images: int
    bare: tuple[torch.nn.Module, Callable[[], torch.Tensor]]
    ours: tuple[torch.nn.Module, Callable[[], torch.Tensor]]


def compare_steps(make: Callable[[Setting, bool], Pair], compile: bool, setting: Setting) -> Rows:
    """Images a second of the bare timm network and of ours, timed in turns."""
    pair = make(setting, compile and setting.device.type == "cuda")
    # counted eagerly: a compiled network has no operations to see
    plain = make(setting, False) if compile else pair
    flops = [flops_of(loss) for _, loss in (plain.bare, plain.ours)]
    steps = {
        "bare timm": train_step(pair.bare[1], pair.bare[0], setting.device),
        "timm_branches": train_step(pair.ours[1], pair.ours[0], setting.device),
    }
    rows: Rows = []
    for name, step in steps.items():
        start = time.perf_counter()
        step()
        rows.append({"what": name, "first step, s": time.perf_counter() - start})
    seconds = time_all(steps, setting.repeats, setting.device)
    for row, step, flop in zip(rows, steps.values(), flops, strict=True):
        of_bare = seconds["bare timm"] / seconds[row["what"]]
        row["images/s"] = pair.images / seconds[row["what"]]
        row["of bare"] = of_bare
        row["of bare, arithmetic taken out"] = of_bare * flop / flops[0]
        row["TFLOP/s"] = 3 * flop / seconds[row["what"]] / 1e12
        if setting.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            step()
            row["peak, GiB"] = torch.cuda.max_memory_allocated() / 2**30
    return rows


def flops_of(loss: Callable[[], torch.Tensor]) -> int:
    """Multiply-adds of the forward pass, each counted as two."""
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        loss()
    return counter.get_total_flops()


def images_of(setting: Setting, *shape: int) -> torch.Tensor:
    """Noise, channels last."""
    images = torch.randn(*shape, device=setting.device)
    return images.to(memory_format=torch.channels_last) if len(shape) == 4 else images


def bcnn_pair(name: str, batch: int, setting: Setting, compile: bool) -> Pair:
    """A B-CNN of three levels beside the bare backbone with a leaf classifier."""
    name, batch, size = ("test_resnet", 2, 64) if setting.tiny else (name, batch, 224)
    tree = Taxonomy(random_paths(100, 3, 0.0, random.Random(0)))
    place = {"device": setting.device, "memory_format": torch.channels_last}
    plain = timm.create_model(name, num_classes=tree.num_leaves).to(**place)
    task = BranchTask(create_branch_model(name, taps=[3, 4, 5], taxonomy=tree).to(**place))
    images = images_of(setting, batch, 3, size, size)
    labels = tree.expand(torch.randint(tree.num_leaves, (batch,), device=setting.device))
    return pair_of(plain, task, images, images, labels, labels[:, -1], compile)


def clip_pair(setting: Setting, compile: bool) -> Pair:
    """An LSTM behind every frame's features, beside the bare backbone on as many images."""
    name, clips, frames, size = "resnet50", 16, 16, 224
    if setting.tiny:
        name, clips, frames, size = "test_resnet", 2, 3, 64
    plain = timm.create_model(name, num_classes=10).to(setting.device)
    model = create_branch_model(name, taps=[5], head="lstm", num_classes=10).to(setting.device)
    images = images_of(setting, clips, frames, 3, size, size)
    labels = torch.randint(10, (clips, 1), device=setting.device)
    each = labels.repeat_interleave(frames, 0)[:, 0]
    return pair_of(plain, BranchTask(model), images.flatten(0, 1), images, labels, each, compile)


def mask_pair(setting: Setting, compile: bool) -> Pair:
    """A U-Net beside its bare encoder."""
    name, batch, size, taps = "resnet34", 16, 512, [1, 2, 3, 4, 5]
    if setting.tiny:
        name, batch, size, taps = "test_resnet", 2, 64, [2, 3, 4, 5]
    place = {"device": setting.device, "memory_format": torch.channels_last}
    plain = timm.create_model(name, num_classes=12).to(**place)
    model = create_branch_model(name, taps=taps, head="unet", num_classes=12).to(**place)
    images = images_of(setting, batch, 3, size, size)
    masks = torch.randint(12, (batch, size, size), device=setting.device)
    task = DenseTask(model, "ce", partial(SegmentationEvaluator, 12))
    return pair_of(plain, task, images, images, masks, masks[:, 0, 0], compile)


def pair_of(
    plain: torch.nn.Module,
    task: HeadsTask,
    bare_images: torch.Tensor,
    images: torch.Tensor,
    target: torch.Tensor,
    bare_target: torch.Tensor,
    compile: bool,
) -> Pair:
    """The losses of both, compiled on request."""
    network = torch.compile(plain) if compile else plain
    model = task.trainable_module
    if compile:
        task.compile()
    batch = len(bare_images)
    return Pair(
        batch,
        (plain, lambda: F.cross_entropy(network(bare_images), bare_target)),
        (model, lambda: task(images, target)["loss"]),
    )


# -- the tree


def trees(setting: Setting) -> Rows:
    """Losses, decoders and evaluation at 10,000 leaves, beside a step of resnet50."""
    leaves, batch = (50, 4) if setting.tiny else (10_000, 256)
    rows: Rows = []
    name, size = ("test_resnet", 64) if setting.tiny else ("resnet50", 224)
    plain = timm.create_model(name, num_classes=leaves).to(
        setting.device, memory_format=torch.channels_last
    )
    images = images_of(setting, batch, 3, size, size)
    answers = torch.randint(leaves, (batch,), device=setting.device)
    network = train_step(lambda: F.cross_entropy(plain(images), answers), plain, setting.device)
    for kind, early in (("even", 0.0), ("uneven", 0.2)):
        tree = Taxonomy(random_paths(leaves, 4 if setting.tiny else 7, early, random.Random(0)))
        steps = tree_steps(tree, batch, setting.device)
        for step in steps.values():  # tables are made at the first call
            step()
        seconds = time_all({name: network, **steps}, setting.repeats, setting.device)
        for what in steps:
            rows.append(
                {
                    "what": f"{what}, {kind} tree",
                    "ms": 1e3 * seconds[what],
                    f"% of a step of {name}": 100 * seconds[what] / seconds[name],
                }
            )
    return rows


def tree_steps(tree: Taxonomy, batch: int, device: torch.device) -> dict[str, Callable[[], object]]:
    """Every loss with its gradient, every decoder and the evaluator."""
    logits = [torch.randn(batch, k, device=device, requires_grad=True) for k in tree.num_classes]
    leaf = torch.randn(batch, tree.num_leaves, device=device, requires_grad=True)
    rows = tree.expand(torch.randint(tree.num_leaves, (batch,))).to(device)
    finest = rows[:, -1]
    losses: dict[str, Callable[[], torch.Tensor]] = {
        "cross_entropy of the leaves": lambda: F.cross_entropy(leaf, finest.clamp(min=0)),
        "level_cross_entropy": lambda: level_cross_entropy(logits[-1], finest),
        "marginal_loss": lambda: marginal_loss(leaf, rows, tree),
        "hxe_loss": lambda: hxe_loss(leaf, rows, tree),
        "soft_label_loss": lambda: soft_label_loss(leaf, rows, tree),
        "tree_path_kl": lambda: tree_path_kl(logits, rows, tree),
        "consistency_loss": lambda: consistency_loss(logits, tree),
    }

    def with_gradient(loss: Callable[[], torch.Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(loss(), [leaf, *logits], allow_unused=True)

    steps: dict[str, Callable[[], object]] = {}
    for name, loss in losses.items():
        steps[name] = with_gradient(loss)
    plain = [of_level.detach() for of_level in logits]
    steps["sum_upwards"] = partial(sum_upwards, leaf.detach(), tree)
    for decoder in DECODERS:
        steps[f"decode, {decoder}"] = partial(decode, plain, tree, decoder)
    evaluator = HierarchyEvaluator(tree.levels, tree.num_classes, tree, device)
    steps["HierarchyEvaluator.update"] = partial(
        evaluator.update, dict(zip(tree.levels, plain, strict=True)), rows
    )
    return steps


def operations(setting: Setting) -> Rows:
    """What each of these steps dispatches, counted on the meta device: the same on every GPU."""
    rows: Rows = []
    for kind, early in (("even", 0.0), ("uneven", 0.2)):
        tree = Taxonomy(random_paths(50, 4, early, random.Random(0)))
        for what, step in tree_steps(tree, 4, torch.device("meta")).items():
            count_operations(step)  # tables are made at the first call
            rows.append({"what": f"{what}, {kind} tree", **count_operations(step)._asdict()})
    return rows


def waits(setting: Setting) -> Rows:
    """Whether a step of training waits for the device, as CUDA itself sees it."""
    tree = Taxonomy(random_paths(50, 3, 0.2, random.Random(0)))
    model = create_branch_model("test_resnet", taps=[3, 4, 5], taxonomy=tree).to(setting.device)
    flat = create_branch_model("test_resnet", num_classes=tree.num_leaves).to(setting.device)
    images = images_of(setting, 4, 3, 64, 64)
    labels = tree.expand(torch.randint(tree.num_leaves, (4,), device=setting.device))
    tasks = {
        "BranchTask": BranchTask(model),
        "BranchTask, marginal": BranchTask(model, marginal=True),
        "BranchTask, consistency and tree path": BranchTask(model, consistency=1, tree_path=1),
    }
    for loss in ("marginal", "hxe", "soft"):
        named = {"marginal": marginal_loss, "hxe": hxe_loss, "soft": soft_label_loss}[loss]
        tasks[f"FlatTask, {loss}"] = FlatTask(flat, tree, loss=named)
    rows: Rows = []
    for name, task in tasks.items():
        step = train_step(
            lambda task=task: task(images, labels)["loss"], task.trainable_module, setting.device
        )
        step()
        rows.append({"what": name, "waits": said_to_wait(step, setting.device)})
    return rows


def said_to_wait(step: Callable[[], object], device: torch.device) -> str:
    """'no', or where CUDA's check says that the step waited."""
    if device.type != "cuda":
        return "not on CUDA"
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    except RuntimeError as error:
        own = [
            f for f in traceback.extract_tb(error.__traceback__) if "timm_branches" in f.filename
        ]
        return f"{own[-1].filename.split('/')[-1]}:{own[-1].lineno}" if own else str(error)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "no"


# -- trainings


def training(name: str, recipe: str, flags: str, setting: Setting) -> Rows:
    """A recipe as a person would run it; it goes on where it was stopped.

    A tiny one takes an epoch on the recipe's own embedded data.
    """
    folder = setting.runs / name
    command = [sys.executable, str(ROOT / "recipes" / f"{recipe}.py")]
    if setting.tiny:
        command += ["--epochs", "1"]
    else:
        command += shlex.split(flags.format(data=setting.data))
    command += ["--output", str(folder), "--resume", "auto", "--no-progress", "--no-plots"]
    command += ["--device", setting.device.type, "-j", str(setting.workers)]
    start = time.perf_counter()
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=60 * setting.minutes, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)}\n{(done.stdout + done.stderr)[-2000:]}")
    kept = json.loads((folder / "results.json").read_text())["results"]
    rows: Rows = []
    for name, of_seeds in kept.items():
        for metrics in of_seeds if isinstance(of_seeds, list) else [of_seeds]:
            rows.append({"what": name, **metrics})
    rows[0]["minutes"] = (time.perf_counter() - start) / 60
    return rows


def trainings(of_recipes: dict[str, tuple[str, str, str, tuple[str, ...]]]) -> dict[str, Piece]:
    """Pieces that run recipes: by name the question, the recipe, its flags and what it needs."""
    pieces = {}
    for name, (question, recipe, flags, needs) in of_recipes.items():
        pieces[name] = Piece(question, partial(training, name, recipe, flags), needs)
    return pieces


LITE0 = """{data}/grocery --model tf_efficientnet_lite0
    --checkpoint-path {data}/tf_efficientnet_lite0.safetensors --img-size 224 --opt adamw --lr 5e-4
    --weight-decay 0.05 --smoothing 0.1 --channels-last --amp -b 32 --epochs 30
    --model-ema --model-ema-warmup"""
CIFAR100 = """{data}/cifar100 --model resnet18_cifar --taxonomy cifar100 --augment cifar --lr 0.1
    --epochs 60 -b 128 --sched cosine --weight-decay 5e-4 --amp --channels-last --compare"""

PIECES = {
    "roof": Piece("What does the machine reach?", roof),
    "waits": Piece("Does a step wait for the device?", waits),
    "operations": Piece("How many operations, copies and waits do these dispatch?", operations),
    "trees": Piece("What do tree losses, decoders and evaluation cost?", trees),
    "vgg16_bn": Piece(
        "B-CNN on vgg16_bn, 224 px",
        partial(compare_steps, partial(bcnn_pair, "vgg16_bn", 128), False),
    ),
    "resnet50": Piece(
        "B-CNN on resnet50, 224 px",
        partial(compare_steps, partial(bcnn_pair, "resnet50", 256), False),
    ),
    "clips": Piece(
        "CNN + LSTM on resnet50, 16 frames of 224 px", partial(compare_steps, clip_pair, False)
    ),
    "masks": Piece("U-Net on resnet34, 512 px", partial(compare_steps, mask_pair, False)),
    "resnet50-compiled": Piece(
        "B-CNN on resnet50, 224 px, compiled",
        partial(compare_steps, partial(bcnn_pair, "resnet50", 256), True),
    ),
    "clips-compiled": Piece(
        "CNN + LSTM on resnet50, compiled", partial(compare_steps, clip_pair, True)
    ),
    "masks-compiled": Piece(
        "U-Net on resnet34, 512 px, compiled", partial(compare_steps, mask_pair, True)
    ),
    **trainings(
        {
            "cifar10-paper": (
                "B-CNN of the paper on CIFAR-10",
                "bcnn",
                "{data}/cifar10 --recipe bcnn-b-cifar10 --amp --channels-last",
                ("cifar10",),
            ),
            "cifar10-modern": (
                "B-CNN of today on CIFAR-10",
                "bcnn",
                "{data}/cifar10 --recipe modern-cifar10 --amp --channels-last",
                ("cifar10",),
            ),
            "cifar100": (
                "resnet18_cifar from scratch on CIFAR-100, six methods",
                "bcnn",
                CIFAR100,
                ("cifar100",),
            ),
            "grocery": (
                "lite0 fine-tuned on Grocery, 224 px",
                "bcnn",
                LITE0,
                ("grocery", "tf_efficientnet_lite0.safetensors"),
            ),
            "camvid": (
                "U-Net on CamVid",
                "segment",
                "{data}/camvid --model resnet34 --epochs 100 --amp",
                ("camvid",),
            ),
            "denoise": (
                "RED-Net, sigma 25",
                "denoise",
                "{data}/denoise --recipe train400-sigma25 --amp",
                ("denoise",),
            ),
        }
    ),
}


# -- keeping the answers


def write(path: Path, kept: dict[str, Any]) -> None:
    """The JSON, and beside it the same as tables."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(kept, indent=1)
    replace_file(path, lambda at: Path(at).write_text(text))
    page = as_page(kept)
    replace_file(path.with_suffix(".md"), lambda at: Path(at).write_text(page))


def as_page(kept: dict[str, Any]) -> str:
    """Every piece as a table, or why there is none."""
    lines = [f"# {kept['hardware']}", ""]
    for name, piece in PIECES.items():
        lines += [f"## {name}: {piece.question}", ""]
        answer = kept["pieces"].get(name)
        if answer is None:
            lines += ["Not run.", ""]
            continue
        lines += [f"`{answer['command']}`, {answer['seconds']:.0f} s", ""]
        if "failed" in answer:
            lines += ["Failed:", "", "```text", answer["failed"], "```", ""]
            continue
        columns = list(dict.fromkeys(itertools.chain.from_iterable(answer["rows"])))
        lines += [f"| {' | '.join(columns)} |", "|" + " --- |" * len(columns)]
        for row in answer["rows"]:
            lines.append(f"| {' | '.join(shown(row.get(column)) for column in columns)} |")
        lines.append("")
    return "\n".join(lines)


def shown(value: Any) -> str:
    """A number in four digits."""
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def missing(piece: Piece, data: Path | None) -> list[str]:
    """What the piece needs and the folder of data lacks."""
    return [need for need in piece.needs if data is None or not (data / need).exists()]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pieces", nargs="+", choices=PIECES, default=list(PIECES), metavar="NAME")
    parser.add_argument("--data", type=Path, help="folder of data sets, for the trainings")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--runs", type=Path, default=Path("output/gpu"), help="of the trainings")
    parser.add_argument("--minutes", type=float, default=8, help="of one training at most")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("-j", "--workers", type=int, default=8)
    parser.add_argument("--tiny", action="store_true", help="does everything run?")
    parser.add_argument("--again", action="store_true", help="run what is there already, too")
    args = parser.parse_args()
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("there is no CUDA device here; --tiny --device cpu tries everything on a CPU")
    device = torch.device(args.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    path = args.output / f"{re.sub(r'[^a-z0-9]+', '-', name.lower())}.json"
    kept: dict[str, Any] = {"pieces": {}}
    if path.exists():
        kept = json.loads(path.read_text())
    kept["hardware"] = f"{hardware(device)}, timm {timm.__version__}"
    setting = Setting(
        device,
        args.tiny,
        2 if args.tiny else args.repeats,
        args.data,
        args.runs,
        args.workers,
        args.minutes,
    )
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
    for piece_name in args.pieces:
        piece = PIECES[piece_name]
        earlier = kept["pieces"].get(piece_name)
        if earlier and "failed" not in earlier and not args.again:
            print(f"{piece_name}: is there already")
            continue
        lacks = [] if args.tiny else missing(piece, args.data)
        if lacks:
            print(f"{piece_name}: not run, --data lacks {', '.join(lacks)}")
            continue
        start = time.perf_counter()
        answer: dict[str, Any] = {"command": f"python {shlex.join(sys.argv)}"}
        try:
            torch.manual_seed(0)
            answer["rows"] = piece.run(setting)
        except Exception as error:  # the others are to go on
            answer["failed"] = f"{type(error).__name__}: {error}"
            traceback.print_exc()
        answer["seconds"] = time.perf_counter() - start
        kept["pieces"][piece_name] = answer
        write(path, kept)
        print(f"{piece_name}: {answer['seconds']:.0f} s", flush=True)
        if device.type == "cuda":
            torch.compiler.reset()
            torch.cuda.empty_cache()
    print(path.with_suffix(".md").read_text() if path.exists() else "Nothing was run.")


if __name__ == "__main__":
    main()
