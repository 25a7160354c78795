"""Train a B-CNN on a label hierarchy, and its flat twin, and say which is better.

    # scikit-learn's digits, two minutes on two CPU cores
    python recipes/bcnn.py
    # Zhu and Bain 2017 (arXiv 1709.09890), CIFAR-10
    python recipes/bcnn.py --recipe bcnn-b-cifar10 --download
    python recipes/bcnn.py photos/ --model convnext_tiny --pretrained --taps 3 4 5 --amp
    torchrun --nproc-per-node 4 recipes/bcnn.py photos/ --model resnet50 -b 64
    # is it worth it? six methods at equal budget
    python recipes/bcnn.py --compare --seeds 3
    # what are coarsely labelled images worth?
    python recipes/bcnn.py --partial 0.5 0.9

The flat twin has the same backbone, budget and seed, but leaf labels only; its answers on the
coarser levels are its leaf probabilities summed upwards. A hierarchy that does not beat it does not
help.
"""

import argparse
import json
import re
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.distributed as dist
from timm.data import resolve_model_data_config
from timm.task import evaluation_sample_limit

from timm_branches import (
    BranchModel,
    FlattenHead,
    PoolHead,
    Tap,
    Taxonomy,
    create_branch_model,
    load_model,
)
from timm_branches.data import (
    HierarchicalDataset,
    HierarchicalMixup,
    Subset,
    coarsen_labels,
    create_loader,
    create_splits,
    create_transform,
)
from timm_branches.files import replace_file
from timm_branches.hierarchy import HierarchyEvaluator
from timm_branches.schedules import LossWeightSchedule, StepSchedule, get_schedule
from timm_branches.task import BranchTask, FlatTask, base_model
from timm_branches.train import (
    FitConfig,
    FitResult,
    add_fit_arguments,
    evaluate,
    fit,
    is_primary,
    setup_device,
)
from timm_branches.train.arguments import (
    add_model_arguments,
    add_table_arguments,
    balance_options,
    image_options,
    say_what_was_understood,
    table_options,
    weights_of_classes,
)
from timm_branches.train.compare import comparison_table, verdict
from timm_branches.train.script import hardware, new_output, run_script

# Published settings, in one word. Sources: the papers and, for what they leave out, the authors'
# code (github.com/zhuxinqimac/B-CNN). Epochs are 0-based, "from epoch".
_KERAS_SGD = {
    "opt": "sgd",
    "momentum": 0.9,
    "weight_decay": 0.0,
    "sched": "piecewise",
    "batch_size": 128,
    "augment": "none",
    "head": "flatten",
}
RECIPES: dict[str, dict] = {
    # B-CNN, CIFAR-10, model B
    "bcnn-b-cifar10": dict(
        _KERAS_SGD,
        data="cifar10",
        taxonomy="cifar10",
        model="bcnn_b",
        taps=["3", "4", "5"],
        hidden=[256, 512, 1024],
        schedule="bcnn-cifar10",
        epochs=60,
        lr_steps="0:3e-3;41:5e-4;51:1e-4",
    ),
    # B-CNN, CIFAR-100, VGG16 whose convolutions start from ImageNet (pretrained, where weights can
    # be downloaded)
    "bcnn-vgg16-cifar100": dict(
        _KERAS_SGD,
        data="cifar100",
        taxonomy="cifar100",
        model="bcnn_vgg16",
        pretrained=True,
        taps=["2", "3", "5"],
        hidden=[256, 1024, 4096],
        schedule="bcnn-cifar100",
        epochs=80,
        lr_steps="0:1e-3;56:2e-4;71:5e-5",
    ),
    # H-CNN (Seo and Shin 2019), Fashion-MNIST, 28 px grey, read off a public implementation
    "hcnn-fashion-mnist": dict(
        _KERAS_SGD,
        data="fashion_mnist",
        taxonomy="fashion_mnist",
        model="bcnn_vgg16",
        in_chans=1,
        img_size=28,
        mean=[0.0],
        std=[1 / 255],
        taps=["2", "3", "5"],
        hidden=[256, 1024, 4096],
        schedule="0:0.98,0.01,0.01;16:0.1,0.8,0.1;26:0.1,0.2,0.7;36:0,0,1",
        epochs=60,
        lr_steps="0:1e-3;43:2e-4;53:5e-5",
    ),
    # MNIST: B-CNN's levels (5/10). Its model A and schedule are not in the authors' code: these are
    # ours
    "bcnn-a-mnist": dict(
        _KERAS_SGD,
        data="mnist",
        taxonomy="mnist",
        model="bcnn_a",
        taps=["4", "5"],
        hidden=[64, 256],
        schedule="0:0.98,0.02;6:0.5,0.5;12:0,1",
        epochs=20,
        lr_steps="0:3e-3;14:5e-4",
    ),
    # Ours, from scratch at 32 px: a ResNet with a stem for small images, augmentation, moving
    # average
    "modern-cifar10": {
        "data": "cifar10",
        "taxonomy": "cifar10",
        "model": "resnet18_cifar",
        "taps": ["3", "4", "5"],
        "head": "pool",
        "schedule": "linear:0:0.4,0.3,0.3;30:0.1,0.2,0.7",
        "augment": "cifar",
        "mixup": 0.2,
        "smoothing": 0.1,
        "opt": "sgd",
        "lr": 0.1,
        "weight_decay": 5e-4,
        "sched": "cosine",
        "warmup_epochs": 2,
        "epochs": 60,
        "batch_size": 256,
        "amp": True,
        "channels_last": True,
        "model_ema": True,
        "model_ema_decay": 0.999,
        "model_ema_warmup": True,
    },
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Arguments; a recipe's values are defaults that every flag overrides."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "data",
        nargs="?",
        default=None,
        help="digits (default), cifar10, cifar100, fashion_mnist, mnist; a folder or tar of class "
        "folders; a CSV of image paths and labels",
    )
    parser.add_argument(
        "--recipe", choices=list(RECIPES), help="a published or own setting in one word"
    )
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data-dir", default="data", help="where named data sets lie (default: data)"
    )
    group.add_argument("--download", action="store_true", help="fetch a named data set")
    group.add_argument(
        "--taxonomy", help="a ready-made tree's name, a .csv or .json, or nested class folders"
    )
    group.add_argument(
        "--val-fraction",
        type=float,
        default=0.1,
        help="training data set aside without a val split",
    )
    group.add_argument("--limit", type=int, help="train on this many images only (stratified)")
    group.add_argument("-b", "--batch-size", type=int, default=64, help="batch size of one process")
    group.add_argument(
        "-j", "--workers", type=int, default=0, help="worker processes that load data"
    )
    group.add_argument(
        "--augment",
        default="auto",
        help="none, light, cifar, imagenet, auto, or an albumentations file",
    )
    group.add_argument(
        "--hflip", type=float, default=None, help="chance of a flip (default: 0.5, 0 for digits)"
    )
    group.add_argument(
        "--mean", type=float, nargs="+", help="mean of each channel (default: the backbone's)"
    )
    group.add_argument("--std", type=float, nargs="+", help="standard deviation of each channel")
    group.add_argument("--mixup", type=float, default=0.0, help="mixup alpha")
    group.add_argument("--cutmix", type=float, default=0.0, help="cutmix alpha")
    group.add_argument("--smoothing", type=float, default=0.0, help="label smoothing")
    add_table_arguments(group)
    group = parser.add_argument_group("model")
    add_model_arguments(group, "bcnn_a")
    group.add_argument(
        "--taps", nargs="+", help="one per level, coarse to fine (default: the last stages)"
    )
    group.add_argument(
        "--detach",
        action="store_true",
        help="stop the branches' gradients at all taps but the last",
    )
    group.add_argument(
        "--head",
        choices=("pool", "flatten"),
        help="default: the papers' flatten for their own networks, pool for all others",
    )
    group.add_argument(
        "--hidden", type=int, nargs="+", help="width of the two hidden layers of each head"
    )
    group.add_argument("--in-chans", type=int)
    group.add_argument("--img-size", type=int)
    group.add_argument("--drop", type=float, help="dropout rate")
    group.add_argument("--drop-path", type=float, help="stochastic depth rate")
    group = parser.add_argument_group("hierarchy")
    group.add_argument(
        "--schedule",
        help="loss weights: a preset's name or '0:0.9,0.1;5:0,1', with linear: or cosine: "
        "before it for gradual change (default: from coarse to fine)",
    )
    group.add_argument(
        "--flat",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also train the flat twin",
    )
    group.add_argument(
        "--consistency", type=float, default=0.0, help="weight of the parent/child divergence (JSD)"
    )
    group.add_argument(
        "--tree-path", type=float, default=0.0, help="weight of the tree-path KL divergence"
    )
    group.add_argument(
        "--marginal",
        action="store_true",
        help="coarsely labelled images teach the finer heads, too, by the classes below their label",
    )
    group.add_argument(
        "--uncertainty", action="store_true", help="learn the levels' weights (Kendall et al. 2018)"
    )
    group.add_argument(
        "--flat-loss",
        choices=FlatTask.losses,
        default="marginal",
        help="of the flat twin: marginal (cross-entropy), hxe or soft (Bertinetto et al. 2020)",
    )
    group = parser.add_argument_group("studies")
    group.add_argument(
        "--compare",
        action="store_true",
        help="train six methods at equal budget over several seeds: is the hierarchy worth it?",
    )
    group.add_argument(
        "--partial",
        type=float,
        nargs="+",
        metavar="SHARE",
        help="hide the finer labels of this share of the images; learn from these images or drop them",
    )
    group.add_argument(
        "--seeds",
        type=int,
        help="how many seeds a study trains (default: 3 to compare, 1 for partial)",
    )
    add_fit_arguments(parser)
    # the job without arguments: small, and good enough on digits
    parser.set_defaults(
        output="output/bcnn", epochs=15, lr=0.02, weight_decay=1e-4, warmup_epochs=1
    )
    recipe = parser.parse_known_args(argv)[0].recipe
    if recipe:
        parser.set_defaults(**{"warmup_epochs": 0, **RECIPES[recipe]})
    args = parser.parse_args(argv)
    args.data = args.data or (RECIPES[recipe]["data"] if recipe else "digits")
    if args.lr_steps:  # the rates are in there
        if args.lr != parser.get_default("lr"):
            parser.error(
                "--lr has no effect beside --lr-steps: change the rates there, or give another --sched "
                "and --lr-steps ''"
            )
        args.lr = FitConfig.lr
    if args.compare and args.partial:
        parser.error("--compare and --partial are two studies: choose one")
    if args.seeds is None:
        args.seeds = 3 if args.compare else 1
    elif not (args.compare or args.partial):
        parser.error(
            "--seeds has no effect without --compare or --partial; --seed is the seed of a single run"
        )
    elif args.seeds < 1:
        parser.error(f"--seeds must be above 0, got {args.seeds}")
    if (args.compare or args.partial) and not args.flat:
        parser.error(
            "--no-flat has no effect in a study: the flat twin is what the hierarchy is held against"
        )
    if args.hflip is not None and args.augment == "none":
        parser.error("--hflip has no effect with --augment none: choose another --augment")
    return args


@dataclass
class Trial:
    """One training: what is trained, on which images, for how long."""

    make_model: Callable[[], BranchModel]
    make_task: Callable[[BranchModel], BranchTask]
    train: HierarchicalDataset
    val: HierarchicalDataset
    epochs: int


class Bench:
    """Data, models and settings that all trainings of one call share."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.config = FitConfig.from_args(args)
        self.device = setup_device(args.device)
        self.config.device = str(self.device)
        if args.limit is not None and args.limit < 1:
            raise ValueError(
                f"--limit must be above 0, got {args.limit}: leave it out to train on all images."
            )
        if args.resume not in ("", "auto"):
            raise ValueError(
                f"--resume {args.resume}: this recipe trains several models; give --output and "
                "--resume auto."
            )
        self.output = new_output(args.output, args.resume)
        grey = args.data in ("digits", "mnist", "fashion_mnist")
        in_chans = args.in_chans or (1 if grey else 3)
        for name in ("mean", "std"):
            if (values := getattr(args, name)) and len(values) not in (1, in_chans):
                raise ValueError(
                    f"--{name} has {len(values)} values, but images have {in_chans} channels."
                )
        self.train, self.val, self.test = create_splits(
            args.data,
            args.val_fraction,
            seed=0,
            taxonomy=args.taxonomy,
            root=args.data_dir,
            download=args.download,
            in_chans=in_chans,
            **table_options(args),
            **image_options(args),
        )
        if args.limit is not None:
            self.train = self.train.limit(args.limit, seed=args.seed)
        self.summary = say_what_was_understood(train=self.train, val=self.val, test=self.test)
        tree = self.train.taxonomy
        if tree is None or tree.num_levels < 2:
            raise ValueError(
                f"{args.data} has one level of labels only: give its hierarchy with --taxonomy (a "
                "ready-made tree, a CSV, JSON or nested class folders)."
            )
        self.tree: Taxonomy = tree
        self.taps = args.taps or default_taps(tree.num_levels)
        if len(self.taps) != tree.num_levels:
            raise ValueError(
                f"--taps {' '.join(self.taps)}: the tree has {tree.num_levels} levels "
                f"{list(tree.levels)}; give one tap each."
            )
        self.heads = make_heads(args, tree.num_levels)
        self.balance = balance_options(args, tree)
        self.class_weights = weights_of_classes(args, self.train)
        self.options = {
            "pretrained": args.pretrained,
            "checkpoint_path": args.checkpoint_path,
            "in_chans": in_chans,
            "img_size": args.img_size,
            "drop_rate": args.drop,
        }
        if args.drop_path is not None:
            self.options["drop_path_rate"] = args.drop_path

    # -- what can be trained

    def bcnn(
        self,
        schedule: Any,
        train: HierarchicalDataset | None = None,
        epochs: int | None = None,
        detach: bool = False,
        marginal: bool = False,
    ) -> Trial:
        """A head a level at its own depth, all trained together."""

        def make_model():
            taps = [Tap.parse(tap) for tap in self.taps]
            if detach or self.args.detach:
                taps[:-1] = [replace(tap, detach=True) for tap in taps[:-1]]
            return create_branch_model(
                self.args.model, taps=taps, head=self.heads, taxonomy=self.tree, **self.options
            )

        args = self.args
        return Trial(
            make_model,
            lambda model: BranchTask(
                model,
                schedule,
                args.smoothing,
                self.class_weights,
                marginal=marginal or args.marginal,
                consistency=args.consistency,
                tree_path=args.tree_path,
                uncertainty=args.uncertainty,
            ),
            train or self.train,
            self.val,
            epochs or args.epochs,
        )

    def flat(self, train: HierarchicalDataset | None = None, epochs: int | None = None) -> Trial:
        """One head of leaves at the deepest tap."""
        args, tree = self.args, self.tree
        return Trial(
            lambda: create_branch_model(
                args.model,
                taps=self.taps[-1:],
                head=self.heads[-1:],
                num_classes=tree.num_leaves,
                names=["leaf"],
                **self.options,
            ),
            lambda model: FlatTask(model, tree, args.smoothing, loss=args.flat_loss),
            train or self.train,
            self.val,
            epochs or args.epochs,
        )

    def alone(self, level: int) -> Trial:
        """One level by itself.

        A network that ends at its tap and has an equal part of the epochs.
        """
        args, tree = self.args, self.tree
        share = args.epochs // tree.num_levels + (level < args.epochs % tree.num_levels)
        return Trial(
            lambda: create_branch_model(
                args.model,
                taps=[self.taps[level]],
                head=[self.heads[level]],
                num_classes=tree.num_classes[level],
                names=[tree.levels[level]],
                **self.options,
            ),
            lambda model: BranchTask(model, None, args.smoothing, self.weights_of(level)),
            one_level(self.train, level),
            one_level(self.val, level),
            max(1, share),
        )

    def weights_of(self, level: int) -> dict[str, Any] | None:
        """The class weights of one level."""
        name = self.tree.levels[level]
        return None if self.class_weights is None else {name: self.class_weights[name]}

    # -- training and evaluation

    def fit(self, name: str, trial: Trial, seed: int, folder: Path) -> tuple[BranchTask, FitResult]:
        """Train; the model that comes back is that of the best epoch on validation."""
        args, device = self.args, self.device
        torch.manual_seed(seed)
        model = trial.make_model()
        cfg = resolve_model_data_config(
            model, {k: v for k in ("mean", "std") if (v := getattr(args, k))}
        )
        hflip = (
            args.hflip
            if args.hflip is not None
            else 0.0
            if args.data in ("digits", "mnist")
            else 0.5
        )
        look = {k: cfg[k] for k in ("input_size", "mean", "std", "interpolation")}
        # small images are not cropped: there is nothing to spare
        crop: dict[str, Any] = {
            "crop_pct": 1.0 if max(cfg["input_size"][-2:]) <= 64 else cfg["crop_pct"],
            "crop_mode": "center",
        }
        trial.train.transform = create_transform(
            **look, is_training=True, augment=args.augment, hflip=hflip
        )
        self.transform = trial.val.transform = create_transform(**look, **crop)
        # what is left may be few
        batch = min(args.batch_size, len(trial.train)) if args.partial else args.batch_size
        loader = create_loader(
            trial.train,
            batch,
            is_training=True,
            num_workers=args.workers,
            seed=seed,
            pin_memory=device.type == "cuda",
            **self.balance,
        )
        val_loader = create_loader(trial.val, args.batch_size, num_workers=args.workers)
        model.pretrained_cfg.update(mean=tuple(look["mean"]), std=tuple(look["std"]), **crop)
        model.pretrained_cfg.update(image_options(args))
        model.data_summary = self.summary.to_dict()
        task = trial.make_task(model)
        mixup = None
        if args.mixup or args.cutmix:
            mixup = HierarchicalMixup(
                args.mixup,
                args.cutmix,
                label_smoothing=args.smoothing,
                num_classes=task.level_classes,
            )
        if is_primary():
            parameters = sum(p.numel() for p in model.parameters()) / 1e6
            print(
                f"\n{name}, seed {seed}: {args.model}, {parameters:.1f} M parameters, {len(trial.train)} images to "
                f"train on, {len(trial.val)} to validate",
                flush=True,
            )
        config = replace(
            self.config,
            output=str(folder),
            seed=seed,
            epochs=trial.epochs,
            lr_steps=stretched(self.config.lr_steps, trial.epochs / args.epochs),
        )
        run = fit(
            task, loader, val_loader, config, mixup, facts={"data": str(args.data), "seed": seed}
        )
        return trial.make_task(load_model(run.model_path)).to(device), run

    def judged(self) -> HierarchicalDataset:
        """The images that decide: test if there are any."""
        return self.test if self.test is not None else self.val

    def judge(self, tasks: Sequence[BranchTask], decoder: str) -> dict[str, float]:
        """Metrics of a model, or of several with a level each, on the images that decide."""
        data = self.judged()
        data.transform = self.transform
        loader = create_loader(data, self.args.batch_size, num_workers=self.args.workers)
        if len(tasks) == 1:
            return dict(evaluate(tasks[0], loader, decoder=decoder).metrics)
        evaluator = HierarchyEvaluator(
            self.tree.levels,
            self.tree.num_classes,
            self.tree,
            self.device,
            max_samples=evaluation_sample_limit(loader),
            decoder=decoder,
        )
        models = [base_model(task).eval() for task in tasks]
        with torch.no_grad():
            for images, labels in loader:
                images = images.to(self.device)
                output = {name: y for model in models for name, y in model(images).items()}
                evaluator.update(output, labels.to(self.device))
        return dict(evaluator.compute(distributed=dist.is_initialized()))


def main(args: argparse.Namespace) -> None:
    """The study that was asked for, its table and its files."""
    began = time.monotonic()
    bench = Bench(args)
    study = compare if args.compare else partial_labels if args.partial else with_and_without
    results, closing = study(bench)
    if not is_primary():
        return
    count = len(bench.judged())
    which = "test" if bench.test is not None else "validation (there is no test split)"
    facts = {
        "command": shlex.join(["python", *sys.argv]),
        "seed": args.seed,
        "epochs": args.epochs,
        "train_images": len(bench.train),
        "hardware": hardware(bench.device),
        "images": count,
        "judged": which,
    }
    # JSON knows no NaN: what could not be measured (the severity of no mistakes) is null
    plain = {
        name: [{k: None if v != v else v for k, v in run.items()} for run in runs]
        for name, runs in results.items()
    }
    text = json.dumps({**facts, "results": plain}, indent=2) + "\n"
    replace_file(bench.output / "results.json", lambda path: Path(path).write_text(text))
    print(f"\n{comparison_table(results, columns(bench.tree))}\n\n{closing}")
    seeds = (
        f"Seed {args.seed}"
        if not args.compare
        else f"Seeds {args.seed} to {args.seed + args.seeds - 1}"
    )
    print(
        f"Percent, distances in levels, on the {count} {which} images, models of the best epoch on validation. "
        f"{seeds}, {facts['hardware']}, {time.monotonic() - began:.0f} s. Files: {bench.output}"
    )


# metrics of each method, one dict a seed; closing words
Study = tuple[dict[str, list[dict[str, float]]], str]


def with_and_without(bench: Bench) -> Study:
    """A B-CNN and its flat twin, once."""
    args, levels = bench.args, bench.tree.num_levels
    schedule = get_schedule(
        args.schedule or default_schedule(levels, args.epochs), num_levels=levels
    )
    task, run = bench.fit("B-CNN", bench.bcnn(schedule), args.seed, bench.output / "bcnn")
    facts = {"best_epoch": run.best_epoch, "seconds": round(run.seconds, 1)}
    results = {
        "B-CNN": [bench.judge([task], "independent") | facts],
        "B-CNN, best path": [bench.judge([task], "best-path") | facts],
    }
    if not args.flat:
        return results, f"Loss weights: {schedule}."
    task, run = bench.fit("flat", bench.flat(), args.seed, bench.output / "flat")
    facts = {"best_epoch": run.best_epoch, "seconds": round(run.seconds, 1)}
    results["flat"] = [bench.judge([task], "leaf-marginal") | facts]
    gain = results["B-CNN, best path"][0]["full_path"] - results["flat"][0]["full_path"]
    return results, (
        f"The hierarchy changes full-path accuracy by {gain:+.2f} points in this one run (best path "
        "against flat). One seed is no proof either way: --compare trains several."
    )


def compare(bench: Bench) -> Study:
    """Is it worth it? Every method at equal budget, over several seeds.

    And what a weight of 0 does to coarse heads.
    """
    args, tree = bench.args, bench.tree
    paper = get_schedule(
        args.schedule or paper_schedule(tree.num_levels, args.epochs), num_levels=tree.num_levels
    )
    kept = without_zeros(paper)
    equal = get_schedule("equal", num_levels=tree.num_levels)
    results: dict[str, list[dict[str, float]]] = {}
    histories: dict[str, list[list[dict]]] = {}
    for seed in range(args.seed, args.seed + args.seeds):
        folder = bench.output / f"seed{seed}"
        methods = {
            "flat": bench.flat(),
            "B-CNN": bench.bcnn(paper),
            "B-CNN, no level off": bench.bcnn(kept),
            "constant weights": bench.bcnn(equal),
            "detached branches": bench.bcnn(paper, detach=True),
        }
        if kept == paper:
            del methods["B-CNN, no level off"]
        trained = {}
        for name, trial in methods.items():
            task, run = bench.fit(name, trial, seed, folder / slug(name))
            trained[name] = [task]
            histories.setdefault(name, []).append(run.history)
        trained["independent branches"] = [
            bench.fit(
                f"independent branch {name!r}",
                bench.alone(level),
                seed,
                folder / f"alone_{slug(name)}",
            )[0]
            for level, name in enumerate(tree.levels)
        ]
        for name, tasks in trained.items():
            decoders = (
                {"leaf-marginal": "flat, leaf-marginal", "crm": "flat, CRM"}
                if name == "flat"
                else {"independent": name, "best-path": f"{name}, best path"}
            )
            for decoder, title in decoders.items():
                results.setdefault(title, []).append(bench.judge(tasks, decoder))
    lines = [
        verdict(
            results, "B-CNN, best path", "flat, leaf-marginal", "full_path", "full-path accuracy"
        )
    ]
    if kept != paper:
        lines.append(collapse(tree.levels[0], paper, histories))
        if is_primary() and args.plots:
            from timm_branches.train.curves import plot_collapse

            plot_collapse(
                {name: histories[name] for name in ("B-CNN", "B-CNN, no level off")},
                tree.levels,
                bench.output / "collapse.png",
            )
    lines.append(f"Loss weights of the B-CNN: {paper}.")
    return results, "\n".join(lines)


def collapse(
    level: str, schedule: LossWeightSchedule, histories: dict[str, list[list[dict]]]
) -> str:
    """What became of the coarsest head after its weight went to 0, in words."""

    def change(name: str) -> float:
        last = max(row["epoch"] for row in histories[name][0] if schedule(row["epoch"])[0] > 0)
        return fmean(
            run[-1][f"eval_{level}_top1"] - run[last][f"eval_{level}_top1"]
            for run in histories[name]
        )

    return (
        f"From the epoch before the weight of {level!r} becomes 0 to the last, its accuracy on validation changes "
        f"by {change('B-CNN'):+.2f} points; with a little weight left by {change('B-CNN, no level off'):+.2f}."
    )


def partial_labels(bench: Bench) -> Study:
    """What images are worth that carry their coarsest label only: learned from, or dropped.

    Dropping leaves fewer images an epoch. It is tried with as many epochs (a labelled image is seen
    as often, in less time) and with as many images in all (more epochs, the same time). Coarse
    labels teach all heads (the marginal loss): with the coarse head alone, the fine one would see
    few labels a batch.
    """
    args, levels = bench.args, bench.tree.num_levels
    results: dict[str, list[dict[str, float]]] = {}
    for fraction in args.partial:
        some, full = coarsen_labels(bench.train, fraction, seed=args.seed)
        longer = round(args.epochs * len(some) / len(full))
        trials = {}
        for what, data, epochs in (
            ("learned from", some, args.epochs),
            ("dropped", full, args.epochs),
            ("dropped, as many images", full, longer),
        ):
            schedule = args.schedule or default_schedule(levels, epochs)
            trials[f"B-CNN, {fraction:.0%} coarse, {what}"] = bench.bcnn(
                schedule, data, epochs, marginal=True
            )
            trials[f"flat, {fraction:.0%} coarse, {what}"] = bench.flat(data, epochs)
        for seed in range(args.seed, args.seed + args.seeds):
            for name, trial in trials.items():
                task, _ = bench.fit(name, trial, seed, bench.output / f"seed{seed}" / slug(name))
                decoder = "leaf-marginal" if isinstance(task, FlatTask) else "best-path"
                results.setdefault(name, []).append(bench.judge([task], decoder))
    lines = [
        verdict(
            results,
            f"{net}, {f:.0%} coarse, learned from",
            f"{net}, {f:.0%} coarse, {what}",
            "full_path",
            "full-path accuracy",
        )
        for f in args.partial
        for net in ("B-CNN", "flat")
        for what in ("dropped", "dropped, as many images")
    ]
    return results, "\n".join(lines)


def make_heads(args: argparse.Namespace, levels: int) -> list:
    """One head a level."""
    if args.hidden and len(args.hidden) != levels:
        raise ValueError(f"--hidden {args.hidden}: give one width for each of the {levels} levels.")
    kind = {"pool": PoolHead, "flatten": FlattenHead}[
        args.head or ("flatten" if args.model.startswith("bcnn") else "pool")
    ]
    return (
        [kind(hidden=(width, width)) for width in args.hidden] if args.hidden else [kind()] * levels
    )


def default_taps(levels: int) -> list[str]:
    """The last stages, one for each level; more than five levels share stages 1 to 5."""
    if levels <= 5:
        return [str(stage) for stage in range(6 - levels, 6)]
    return [str(1 + round(4 * level / (levels - 1))) for level in range(levels)]


def default_schedule(levels: int, epochs: int) -> str:
    """Weight moves from the coarsest to the finest level and leaves none behind.

    Linear over the first half.
    """
    start = [0.6 if i == 0 else 0.4 / (levels - 1) for i in range(levels)]
    end = [0.6 if i == levels - 1 else 0.4 / (levels - 1) for i in range(levels)]
    text = ";".join(
        f"{epoch}:" + ",".join(f"{w:.6g}" for w in weights)
        for epoch, weights in ((0, start), (max(1, epochs // 2), end))
    )
    return f"linear:{text}"


def paper_schedule(levels: int, epochs: int) -> str:
    """B-CNN's four phases on CIFAR-10 (9, 10, 10 and 31 of 60 epochs), for any number of levels
    and epochs.
    """
    rows = [[0.98 if i == 0 else 0.02 / (levels - 1) for i in range(levels)]]
    rows += [
        [0.8 if i == focus else 0.2 / (levels - 1) for i in range(levels)]
        for focus in range(1, levels)
    ]
    rows += [[float(i == levels - 1) for i in range(levels)]]
    starts = [round(epochs * (9 + 20 * k / (levels - 1)) / 60) for k in range(levels)]
    return ";".join(
        f"{epoch}:" + ",".join(f"{w:.6g}" for w in row)
        for epoch, row in dict(zip([0, *starts], rows, strict=True)).items()
    )


def without_zeros(schedule: LossWeightSchedule, least: float = 0.05) -> LossWeightSchedule:
    """The same schedule with a little weight left on every level, so that no head goes stale."""
    if not isinstance(schedule, StepSchedule):
        return schedule
    return StepSchedule(
        {
            epoch: [max(w, least) for w in weights] if 0 in weights else weights
            for epoch, weights in schedule.points.items()
        }
    )


def stretched(lr_steps: str, factor: float) -> str:
    """Learning rates by epoch for a run of another length."""
    pairs = [part.split(":") for part in lr_steps.split(";") if part.strip()]
    return ";".join(f"{round(int(epoch) * factor)}:{rate}" for epoch, rate in pairs)


def one_level(data: HierarchicalDataset, level: int) -> Subset:
    """The same images with the labels of one level alone."""
    subset = Subset(data, range(len(data)))
    subset.labels, subset.taxonomy = subset.labels[:, level : level + 1], None
    return subset


def slug(name: str) -> str:
    """A folder's name of a method's."""
    return "_".join(re.findall(r"\w+", name.lower()))


def columns(tree: Taxonomy) -> dict[str, str]:
    """Which metrics the table shows, and their titles."""
    levels = {
        f"{level}_top1": f"{level} ({k})"
        for level, k in zip(tree.levels, tree.num_classes, strict=True)
    }
    return {
        **levels,
        "full_path": "full path",
        "consistency": "consistency",
        "hf": "hF",
        "distance": "distance",
        "severity": "severity",
    }


if __name__ == "__main__":
    run_script(lambda: main(parse_args()))
