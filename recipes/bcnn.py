"""Train a B-CNN on a label hierarchy, and its flat twin, and say which is better.

    python recipes/bcnn.py                                     # scikit-learn's digits, two minutes on two CPU cores
    python recipes/bcnn.py --recipe bcnn-b-cifar10 --download  # Zhu and Bain 2017 (arXiv 1709.09890), CIFAR-10
    python recipes/bcnn.py photos/ --model convnext_tiny --pretrained --taps 3 4 5 --amp
    torchrun --nproc-per-node 4 recipes/bcnn.py photos/ --model resnet50 -b 64

The flat twin has the same backbone, budget and seed, but leaf labels only; its answers on the coarser levels are its
leaf probabilities summed upwards. A hierarchy that does not beat it does not help.
"""

import argparse
import json
import platform
import shlex
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from timm.data import resolve_model_data_config
from timm.utils import get_outdir

from timm_branches import FlattenHead, PoolHead, Tap, Taxonomy, create_branch_model, load_model
from timm_branches.data import HierarchicalMixup, create_loader, create_splits, create_transform
from timm_branches.schedules import get_schedule
from timm_branches.task import BranchTask, FlatTask
from timm_branches.train import FitConfig, add_fit_arguments, evaluate, fit, is_primary, setup_device

# Published settings, in one word. Sources: the papers and, for what they leave out, the authors' code
# (github.com/zhuxinqimac/B-CNN). Epochs are 0-based, "from epoch".
_KERAS_SGD = {"opt": "sgd", "momentum": 0.9, "weight_decay": 0.0, "sched": "piecewise", "batch_size": 128,
              "augment": "none", "head": "flatten"}
RECIPES: dict[str, dict] = {
    # B-CNN, CIFAR-10, model B
    "bcnn-b-cifar10": dict(
        _KERAS_SGD, data="cifar10", taxonomy="cifar10", model="bcnn_b", taps=["3", "4", "5"], hidden=[256, 512, 1024],
        schedule="bcnn-cifar10", epochs=60, lr_steps="0:3e-3;41:5e-4;51:1e-4"),
    # B-CNN, CIFAR-100, VGG16 whose convolutions start from ImageNet (pretrained, where weights can be downloaded)
    "bcnn-vgg16-cifar100": dict(
        _KERAS_SGD, data="cifar100", taxonomy="cifar100", model="bcnn_vgg16", pretrained=True, taps=["2", "3", "5"],
        hidden=[256, 1024, 4096], schedule="bcnn-cifar100", epochs=80, lr_steps="0:1e-3;56:2e-4;71:5e-5"),
    # H-CNN (Seo and Shin 2019), Fashion-MNIST, 28 px grey, read off a public implementation
    "hcnn-fashion-mnist": dict(
        _KERAS_SGD, data="fashion_mnist", taxonomy="fashion_mnist", model="bcnn_vgg16", in_chans=1, img_size=28,
        mean=[0.0], std=[1 / 255], taps=["2", "3", "5"], hidden=[256, 1024, 4096],
        schedule="0:0.98,0.01,0.01;16:0.1,0.8,0.1;26:0.1,0.2,0.7;36:0,0,1",
        epochs=60, lr_steps="0:1e-3;43:2e-4;53:5e-5"),
    # MNIST: B-CNN's levels (5/10). Its model A and schedule are not in the authors' code: these are ours
    "bcnn-a-mnist": dict(
        _KERAS_SGD, data="mnist", taxonomy="mnist", model="bcnn_a", taps=["4", "5"], hidden=[64, 256],
        schedule="0:0.98,0.02;6:0.5,0.5;12:0,1", epochs=20, lr_steps="0:3e-3;14:5e-4"),
    # Ours, from scratch at 32 px: a ResNet with a stem for small images, augmentation, moving average
    "modern-cifar10": {
        "data": "cifar10", "taxonomy": "cifar10", "model": "resnet18_cifar", "taps": ["3", "4", "5"], "head": "pool",
        "schedule": "linear:0:0.4,0.3,0.3;30:0.1,0.2,0.7", "augment": "cifar", "mixup": 0.2, "smoothing": 0.1,
        "opt": "sgd", "lr": 0.1, "weight_decay": 5e-4, "sched": "cosine", "warmup_epochs": 2, "epochs": 60,
        "batch_size": 256, "amp": True, "channels_last": True,
        "model_ema": True, "model_ema_decay": 0.999, "model_ema_warmup": True},
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Arguments; a recipe's values are defaults that every flag overrides."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", default=None,
                        help="digits (default), cifar10, cifar100, fashion_mnist, mnist; a folder or tar of class "
                             "folders; a CSV of image paths and labels")
    parser.add_argument("--recipe", choices=list(RECIPES), help="a published or own setting in one word")
    group = parser.add_argument_group("data")
    group.add_argument("--data-dir", default="data", help="where named data sets lie (default: data)")
    group.add_argument("--download", action="store_true", help="fetch a named data set")
    group.add_argument("--taxonomy", help="a ready-made tree's name, a .csv or .json, or nested class folders")
    group.add_argument("--val-fraction", type=float, default=0.1, help="training data set aside without a val split")
    group.add_argument("--limit", type=int, help="train on this many images only (stratified)")
    group.add_argument("-b", "--batch-size", type=int, default=64, help="batch size of one process")
    group.add_argument("-j", "--workers", type=int, default=0, help="worker processes that load data")
    group.add_argument("--augment", default="auto",
                       help="none, light, cifar, imagenet, auto, or an albumentations file")
    group.add_argument("--hflip", type=float, default=None, help="chance of a flip (default: 0.5, 0 for digits)")
    group.add_argument("--mean", type=float, nargs="+", help="mean of each channel (default: the backbone's)")
    group.add_argument("--std", type=float, nargs="+", help="standard deviation of each channel")
    group.add_argument("--mixup", type=float, default=0.0, help="mixup alpha")
    group.add_argument("--cutmix", type=float, default=0.0, help="cutmix alpha")
    group.add_argument("--smoothing", type=float, default=0.0, help="label smoothing")
    group = parser.add_argument_group("model")
    group.add_argument("--model", default="bcnn_a", help="any timm backbone (default: bcnn_a)")
    group.add_argument("--pretrained", action=argparse.BooleanOptionalAction, default=False)
    group.add_argument("--checkpoint-path", default="", help="timm checkpoint for the backbone")
    group.add_argument("--taps", nargs="+", help="one per level, coarse to fine (default: the last stages)")
    group.add_argument("--detach", action="store_true", help="stop the branches' gradients at all taps but the last")
    group.add_argument("--head", choices=("pool", "flatten"),
                       help="default: the papers' flatten for their own networks, pool for all others")
    group.add_argument("--hidden", type=int, nargs="+", help="width of the two hidden layers of each head")
    group.add_argument("--in-chans", type=int)
    group.add_argument("--img-size", type=int)
    group.add_argument("--drop", type=float, help="dropout rate")
    group.add_argument("--drop-path", type=float, help="stochastic depth rate")
    group = parser.add_argument_group("hierarchy")
    group.add_argument("--schedule", help="loss weights: a preset's name or '0:0.9,0.1;5:0,1', with linear: or cosine: "
                                          "before it for gradual change (default: from coarse to fine)")
    group.add_argument("--flat", action=argparse.BooleanOptionalAction, default=True, help="also train the flat twin")
    add_fit_arguments(parser)
    # the job without arguments: small, and good enough on digits
    parser.set_defaults(output="output/bcnn", epochs=15, lr=0.02, weight_decay=1e-4, warmup_epochs=1)
    recipe = parser.parse_known_args(argv)[0].recipe
    if recipe:
        parser.set_defaults(**{"warmup_epochs": 0, **RECIPES[recipe]})
    args = parser.parse_args(argv)
    args.data = args.data or (RECIPES[recipe]["data"] if recipe else "digits")
    if args.lr_steps:  # the rates are in there
        if args.lr != parser.get_default("lr"):
            parser.error("--lr has no effect beside --lr-steps: change the rates there, or give another --sched "
                         "and --lr-steps ''")
        args.lr = FitConfig.lr
    if args.hflip is not None and args.augment == "none":
        parser.error("--hflip has no effect with --augment none: choose another --augment")
    return args


def main(args: argparse.Namespace) -> None:
    """Data, model, task, fit: once for the B-CNN and once for its flat twin; then one table."""
    began = time.monotonic()
    config = FitConfig.from_args(args)
    device = setup_device(args.device)
    config.device = str(device)
    if args.limit is not None and args.limit < 1:
        raise ValueError(f"--limit must be above 0, got {args.limit}: leave it out to train on all images.")
    if args.resume not in ("", "auto"):
        raise ValueError(f"--resume {args.resume}: this recipe trains two models; give --output and --resume auto.")
    output = new_output(args)

    # data
    grey = args.data in ("digits", "mnist", "fashion_mnist")
    in_chans = args.in_chans or (1 if grey else 3)
    for name in ("mean", "std"):
        if (values := getattr(args, name)) and len(values) not in (1, in_chans):
            raise ValueError(f"--{name} has {len(values)} values, but images have {in_chans} channels.")
    train, val, test = create_splits(args.data, args.val_fraction, seed=0, taxonomy=args.taxonomy, root=args.data_dir,
                                     download=args.download, in_chans=in_chans)
    if args.limit is not None:
        train = train.limit(args.limit, seed=args.seed)
    tree = train.taxonomy
    if tree is None or tree.num_levels < 2:
        raise ValueError(f"{args.data} has one level of labels only: give its hierarchy with --taxonomy (a ready-made "
                         "tree, a CSV, JSON or nested class folders).")

    # models
    levels = tree.num_levels
    taps = args.taps or [str(stage) for stage in range(6 - levels, 6)]
    if len(taps) != levels:
        raise ValueError(f"--taps {' '.join(taps)}: the tree has {levels} levels {list(tree.levels)}; "
                         "give one tap each.")
    heads = make_heads(args, levels)
    options = {"pretrained": args.pretrained, "checkpoint_path": args.checkpoint_path, "in_chans": in_chans,
               "img_size": args.img_size, "drop_rate": args.drop}
    if args.drop_path is not None:
        options["drop_path_rate"] = args.drop_path

    def bcnn():
        where = [Tap.parse(tap) for tap in taps]
        if args.detach:
            where[:-1] = [replace(tap, detach=True) for tap in where[:-1]]
        return create_branch_model(args.model, taps=where, head=heads, taxonomy=tree, **options)

    def flat():
        return create_branch_model(args.model, taps=taps[-1:], head=heads[-1:], num_classes=tree.num_leaves,
                                   names=["leaf"], **options)

    schedule = get_schedule(args.schedule or default_schedule(levels, args.epochs), num_levels=levels)
    runs = {"B-CNN": (bcnn, lambda m: BranchTask(m, schedule, args.smoothing))}
    if args.flat:
        runs["flat"] = (flat, lambda m: FlatTask(m, tree, args.smoothing))

    # train and judge each
    results: dict[str, dict] = {}
    for name, (make_model, make_task) in runs.items():
        torch.manual_seed(args.seed)
        model = make_model()
        cfg = resolve_model_data_config(model, {k: v for k in ("mean", "std") if (v := getattr(args, k))})
        hflip = args.hflip if args.hflip is not None else 0.0 if args.data in ("digits", "mnist") else 0.5
        look = {k: cfg[k] for k in ("input_size", "mean", "std", "interpolation")}
        train.transform = create_transform(**look, is_training=True, augment=args.augment, hflip=hflip)
        val.transform = create_transform(**look)
        loader = create_loader(train, args.batch_size, is_training=True, num_workers=args.workers, seed=args.seed,
                               pin_memory=device.type == "cuda")
        val_loader = create_loader(val, args.batch_size, num_workers=args.workers)
        model.pretrained_cfg.update(mean=tuple(look["mean"]), std=tuple(look["std"]), crop_pct=1.0)
        task = make_task(model)
        mixup = None
        if args.mixup or args.cutmix:
            mixup = HierarchicalMixup(args.mixup, args.cutmix, label_smoothing=args.smoothing,
                                      num_classes=tree.num_classes)
        if is_primary():
            parameters = sum(p.numel() for p in model.parameters()) / 1e6
            print(f"\n{name}: {args.model}, {parameters:.1f} M parameters, {len(train)} images to train on, "
                  f"{len(val)} to validate", flush=True)
        folder = output / name.lower().replace("-", "")
        config.output = str(folder)
        run = fit(task, loader, val_loader, config, mixup, facts={"data": str(args.data), "seed": args.seed})
        best = make_task(load_model(run.model_path)).to(device)
        judged = test if test is not None else val
        judged.transform = val.transform
        metrics = evaluate(best, create_loader(judged, args.batch_size, num_workers=args.workers)).metrics
        results[name] = dict(metrics, best_epoch=run.best_epoch, seconds=round(run.seconds, 1))

    if is_primary():
        facts = {"command": shlex.join(["python", *sys.argv]), "seed": args.seed, "epochs": args.epochs,
                 "train_images": len(train), "hardware": hardware(device), "images": len(judged),
                 "judged": "test" if test is not None else "validation (there is no test split)",
                 "schedule": str(schedule)}
        (output / "results.json").write_text(json.dumps({**facts, "results": results}, indent=2) + "\n")
        print(f"\n{table(results, tree)}\n")
        print(f"Percent on the {len(judged)} {facts['judged']} images, model of the best epoch on validation. "
              f"Seed {args.seed}, {facts['hardware']}, {time.monotonic() - began:.0f} s. Files: {output}")


def make_heads(args: argparse.Namespace, levels: int) -> list:
    """One head a level."""
    if args.hidden and len(args.hidden) != levels:
        raise ValueError(f"--hidden {args.hidden}: give one width for each of the {levels} levels.")
    kind = {"pool": PoolHead, "flatten": FlattenHead}[
        args.head or ("flatten" if args.model.startswith("bcnn") else "pool")]
    return [kind(hidden=(width, width)) for width in args.hidden] if args.hidden else [kind()] * levels


def default_schedule(levels: int, epochs: int) -> str:
    """Weight moves from the coarsest to the finest level and leaves none behind: linear over the first half."""
    start = [0.6 if i == 0 else 0.4 / (levels - 1) for i in range(levels)]
    end = [0.6 if i == levels - 1 else 0.4 / (levels - 1) for i in range(levels)]
    text = ";".join(f"{epoch}:" + ",".join(f"{w:.6g}" for w in weights)
                    for epoch, weights in ((0, start), (max(1, epochs // 2), end)))
    return f"linear:{text}"


def new_output(args: argparse.Namespace) -> Path:
    """The folder of this run: a new one beside an older run's, which stays as it is."""
    holder = [args.output]
    if is_primary() and args.resume != "auto" and any(Path(args.output).glob("*/log.csv")):
        path = Path(args.output)
        holder = [get_outdir(str(path.parent), path.name, inc=True)]
    if dist.is_initialized():
        dist.broadcast_object_list(holder)
    Path(holder[0]).mkdir(parents=True, exist_ok=True)
    return Path(holder[0])


def table(results: dict[str, dict], tree: Taxonomy) -> str:
    """Accuracy per level, full path and consistency of every run, side by side."""
    columns = [*(f"{level}_top1" for level in tree.levels), "full_path", "consistency"]
    titles = ["", *(f"{level} ({k})" for level, k in zip(tree.levels, tree.num_classes, strict=True)),
              "full path", "consistency"]
    rows = [titles] + [[name, *(f"{metrics[c]:.2f}" for c in columns)] for name, metrics in results.items()]
    widths = [max(len(row[i]) for row in rows) for i in range(len(titles))]
    lines = ["  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in
                       enumerate(zip(row, widths, strict=True))) for row in rows]
    lines.insert(1, "-" * len(lines[0]))
    if len(results) > 1:
        gain = results["B-CNN"]["full_path"] - results["flat"]["full_path"]
        lines.append(f"The hierarchy changes full-path accuracy by {gain:+.2f} points in this one run. "
                     "One seed is no proof either way.")
    return "\n".join(lines)


def hardware(device: torch.device) -> str:
    """What the numbers were made on."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    return f"{torch.get_num_threads()} CPU threads ({platform.machine()}), torch {torch.__version__}"


if __name__ == "__main__":
    try:
        main(parse_args())
    except (ValueError, OSError, FloatingPointError, ImportError) as error:
        # what a person got wrong, on one line; the table of taps in such a message has several
        print("bcnn.py:", " | ".join(" ".join(line.split()) for line in str(error).splitlines()), file=sys.stderr)
        sys.exit(2)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
