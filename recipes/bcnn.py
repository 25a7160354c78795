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
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.distributed as dist
from timm.data import resolve_model_data_config
from timm.task import evaluation_sample_limit
from torch.utils.data import DataLoader

from timm_branches import (
    BranchModel,
    FlattenHead,
    PoolHead,
    Tap,
    Taxonomy,
    create_branch_model,
    load_model,
    save_model,
)
from timm_branches.data import (
    HierarchicalDataset,
    HierarchicalMixup,
    HierarchicalSubset,
    coarsen_labels,
    create_loader,
    create_splits,
    create_transform,
)
from timm_branches.features import HeadsOnly, cache_features
from timm_branches.files import replace_file
from timm_branches.hierarchy import HierarchyEvaluator
from timm_branches.hierarchy.coverage import CoverageEvaluator
from timm_branches.hierarchy.losses import on_levels
from timm_branches.hierarchy.path_losses import (
    ancestor_cross_entropy,
    parameter_sharing_loss,
    soft_margin_loss,
)
from timm_branches.inference.calibrated import CalibratedEvaluator, model_calibration
from timm_branches.schedules import LossWeightSchedule, StepSchedule, get_schedule
from timm_branches.task import BranchTask, FlatTask, base_model
from timm_branches.train import (
    FitConfig,
    FitResult,
    add_fit_arguments,
    calibrate,
    evaluate,
    fit,
    is_primary,
    setup_device,
)
from timm_branches.train.arguments import (
    add_model_arguments,
    add_reading_arguments,
    add_table_arguments,
    balance_options,
    image_options,
    reading_options,
    say_what_was_understood,
    table_options,
    try_images,
    weights_of_classes,
)
from timm_branches.train.compare import comparison_table, verdict
from timm_branches.train.half_precision import preset_for
from timm_branches.train.recipe_parser import RecipeParser
from timm_branches.train.report import Answers, examine, write_report
from timm_branches.train.script import hardware, nan_to_null, new_output, run_script, slug

HEADS = {"pool": PoolHead, "flatten": FlattenHead}

# Published settings, in one word. Sources: the papers and, for what they leave out, the authors'
# code (github.com/zhuxinqimac/B-CNN). Epochs are 0-based, "from epoch".
KERAS_SGD = {
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
        KERAS_SGD,
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
        KERAS_SGD,
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
        KERAS_SGD,
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
        KERAS_SGD,
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


# -- arguments


# the flags of its own that --help shows
COMMON = ("recipe", "taxonomy", "augment", "checkpoint_path", "flat", "compare")


def make_parser() -> RecipeParser:
    """All flags."""
    parser = RecipeParser(__doc__, COMMON)
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
    add_data_arguments(parser.add_argument_group("data"))
    add_network_arguments(parser.add_argument_group("model"))
    add_hierarchy_arguments(parser.add_argument_group("hierarchy"))
    add_study_arguments(parser.add_argument_group("studies"))
    add_fit_arguments(parser)
    # the job without arguments: small, and good enough on digits
    parser.set_defaults(
        output="output/bcnn", epochs=15, lr=0.02, weight_decay=1e-4, warmup_epochs=1
    )
    return parser


def add_data_arguments(group: Any) -> None:
    """What is read, and what is done to it in training."""
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
    add_reading_arguments(group)


def add_network_arguments(group: Any) -> None:
    """The backbone, where it is tapped, and the heads."""
    add_model_arguments(group, "bcnn_a")
    group.add_argument(
        "--taps",
        nargs="+",
        help="one per level, coarse to fine (default: the last stages; with weights of a trained "
        "backbone the last one for all, see timm-branches suggest-taps)",
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


def add_hierarchy_arguments(group: Any) -> None:
    """The losses of the levels and of the flat twin."""
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
        help="coarsely labelled images teach the finer heads, too, by the classes below their "
        "label",
    )
    group.add_argument(
        "--uncertainty", action="store_true", help="learn the levels' weights (Kendall et al. 2018)"
    )
    group.add_argument(
        "--target",
        type=float,
        default=0.95,
        metavar="SHARE",
        help="how often answers are to be right that say only what the model is sure of "
        "(default: 0.95)",
    )
    group.add_argument(
        "--flat-loss",
        choices=FlatTask.losses,
        default="marginal",
        help="of the flat twin: marginal (cross-entropy), hxe or soft (Bertinetto et al. 2020)",
    )


def add_study_arguments(group: Any) -> None:
    """Comparisons over several seeds."""
    group.add_argument(
        "--compare",
        action="store_true",
        help="train six methods at equal budget over several seeds: is the hierarchy worth it?",
    )
    group.add_argument(
        "--methods",
        nargs="+",
        choices=(*METHODS, "all"),
        help="which of them: flat (always), bcnn, kept (no level's weight becomes 0), constant, "
        "detached, independent; hxe and soft (Bertinetto et al. 2020), ancestors (HACE), sharing "
        "and margin (Valmadre 2022) (default: the first six)",
    )
    group.add_argument(
        "--partial",
        type=float,
        nargs="+",
        metavar="SHARE",
        help="hide the finer labels of this share of the images; learn from these images or drop "
        "them",
    )
    group.add_argument(
        "--seeds",
        type=int,
        help="how many seeds a study trains (default: 3 to compare, 1 for partial)",
    )


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Arguments; a recipe's values are defaults that every flag overrides."""
    parser = make_parser()
    early = parser.parse_known_args(argv)[0]
    default_data = "digits"
    if early.recipe:
        default_data = RECIPES[early.recipe]["data"]
        preset, said = preset_for(RECIPES[early.recipe], early.device)
        if said:
            print(said, file=sys.stderr)
        parser.set_defaults(**{"warmup_epochs": 0, **preset})
    args = parser.parse_args(argv)
    check_args(parser, args)
    changes_images = args.mixup or args.cutmix or args.hflip is not None
    if args.freeze_backbone and args.augment == "auto" and not changes_images:
        args.augment = "none"
    args.data = args.data or default_data
    if args.lr_steps:
        args.lr = FitConfig.lr  # the rates are in the steps
    if args.seeds is None:
        args.seeds = 3 if args.compare else 1
    return args


def check_args(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse what has no effect together."""
    is_study = bool(args.compare or args.partial)
    if args.lr_steps and args.lr != parser.get_default("lr"):
        parser.error(
            "--lr has no effect beside --lr-steps: change the rates there, or give another --sched "
            "and --lr-steps ''"
        )
    if args.methods and not args.compare:
        parser.error("--methods has no effect without --compare")
    if args.compare and args.partial:
        parser.error("--compare and --partial are two studies: choose one")
    if args.seeds is not None and not is_study:
        parser.error(
            "--seeds has no effect without --compare or --partial; --seed is the seed of a single "
            "run"
        )
    if args.seeds is not None and args.seeds < 1:
        parser.error(f"--seeds must be above 0, got {args.seeds}")
    if is_study and not args.flat:
        parser.error(
            "--no-flat has no effect in a study: the flat twin is what the hierarchy is held "
            "against"
        )
    if not 0 < args.target < 1:
        parser.error(f"--target takes a share between 0 and 1, such as 0.95, got {args.target}")
    if args.hflip is not None and args.augment == "none":
        parser.error("--hflip has no effect with --augment none: choose another --augment")


# -- what all trainings of one call share


@dataclass
class Method:
    """What is trained, with which loss, on which images, and for how long.

    Attributes:
        make_model: A new network.
        make_task: Its losses.
        train: Images to train on.
        val: Images that choose the best epoch.
        epochs: How often all of `train` is seen.
        decoder: What makes a path of the tree of its answers.
    """

    make_model: Callable[[], BranchModel]
    make_task: Callable[[BranchModel], BranchTask]
    train: HierarchicalDataset
    val: HierarchicalDataset
    epochs: int
    decoder: str = "best-path"


class Experiment:
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
        RecipeParser.write(args, self.output)
        in_chans = channels_of(args)
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
        try_images(args, train=self.train, val=self.val, test=self.test)
        self.summary = say_what_was_understood(train=self.train, val=self.val, test=self.test)
        self.tree = hierarchy_of(self.train, args.data)
        self.taps = taps_of(args, self.tree)
        if args.taps is None and is_primary():
            print(f"taps: {' '.join(self.taps)}")
        self.heads = make_heads(args, self.tree.num_levels)
        self.balance = balance_options(args, self.tree)
        self.class_weights = weights_of_classes(args, self.train)
        self.options = {
            "pretrained": args.pretrained,
            "checkpoint_path": args.checkpoint_path,
            "in_chans": in_chans,
            "img_size": args.img_size,
            "drop_rate": args.drop,
        }
        if args.drop_path is not None:  # not every backbone takes it
            self.options["drop_path_rate"] = args.drop_path
        # a backbone that is never trained sees each image once, unless something changes images
        self.reads_features = bool(args.freeze_backbone) and args.augment == "none"
        self.reads_features &= not (args.mixup or args.cutmix)
        if args.freeze_backbone and is_primary():
            print(freezing(self.reads_features))
        # for the report: every training's log, and the first B-CNN
        self.histories: dict[str, list[dict]] = {}
        self.shown: BranchTask | None = None

    # -- what can be trained

    def bcnn(
        self,
        schedule: Any,
        train: HierarchicalDataset | None = None,
        epochs: int | None = None,
        detach: bool = False,
        marginal: bool = False,
        level_loss: Callable[..., torch.Tensor] | None = None,
    ) -> Method:
        """A head a level at its own depth, all trained together.

        With `level_loss` by one loss of all levels' logits, whose sums down the paths are answers.
        """
        args = self.args

        def make_model() -> BranchModel:
            taps = [Tap.parse(tap) for tap in self.taps]
            if detach or args.detach:
                taps[:-1] = [replace(tap, detach=True) for tap in taps[:-1]]
            return create_branch_model(
                args.model, taps=taps, head=self.heads, taxonomy=self.tree, **self.options
            )

        def make_task(model: BranchModel) -> BranchTask:
            if level_loss is not None:
                return BranchTask(model, loss=on_levels(level_loss), decoder="path-sum")
            return BranchTask(
                model,
                schedule,
                args.smoothing,
                self.class_weights,
                marginal=marginal or args.marginal,
                consistency=args.consistency,
                tree_path=args.tree_path,
                uncertainty=args.uncertainty,
            )

        return Method(
            make_model,
            make_task,
            train or self.train,
            self.val,
            epochs or args.epochs,
            decoder="best-path" if level_loss is None else "path-sum",
        )

    def flat(
        self,
        train: HierarchicalDataset | None = None,
        epochs: int | None = None,
        loss: str | Callable[..., torch.Tensor] | None = None,
    ) -> Method:
        """One head of leaves at the deepest tap."""
        args, tree = self.args, self.tree
        loss = loss or args.flat_loss

        def make_model() -> BranchModel:
            return create_branch_model(
                args.model,
                taps=self.taps[-1:],
                head=self.heads[-1:],
                num_classes=tree.num_leaves,
                names=["leaf"],
                **self.options,
            )

        def make_task(model: BranchModel) -> FlatTask:
            smoothing = args.smoothing if loss == "marginal" else 0.0
            return FlatTask(model, tree, smoothing, loss=loss)

        return Method(
            make_model,
            make_task,
            train or self.train,
            self.val,
            epochs or args.epochs,
            decoder="leaf-marginal",
        )

    def independent(self, level: int) -> Method:
        """One level by itself.

        A network that ends at its tap and has an equal share of the epochs.
        """
        args, tree = self.args, self.tree
        name = tree.levels[level]
        class_weights = None
        if self.class_weights is not None:
            class_weights = {name: self.class_weights[name]}

        def make_model() -> BranchModel:
            return create_branch_model(
                args.model,
                taps=[self.taps[level]],
                head=[self.heads[level]],
                num_classes=tree.num_classes[level],
                names=[name],
                **self.options,
            )

        def make_task(model: BranchModel) -> BranchTask:
            return BranchTask(model, None, args.smoothing, class_weights)

        epochs, left_over = divmod(args.epochs, tree.num_levels)
        if level < left_over:  # the coarsest levels get those that do not divide evenly
            epochs += 1
        return Method(
            make_model,
            make_task,
            one_level(self.train, level),
            one_level(self.val, level),
            max(1, epochs),
        )

    # -- training and evaluation

    def fit(
        self, name: str, method: Method, seed: int, folder: Path
    ) -> tuple[BranchTask, FitResult]:
        """Train; the model that comes back is that of the best epoch on validation."""
        args = self.args
        torch.manual_seed(seed)
        model = method.make_model()
        if args.freeze_backbone:
            model.freeze()
        self.set_transforms(method, model)
        model.pretrained_cfg.update(image_options(args))
        model.data_summary = self.summary.to_dict()
        if self.reads_features:
            model = HeadsOnly(model)
        batch_size = args.batch_size
        if args.partial:  # images that keep their fine label may be few
            batch_size = min(batch_size, len(method.train))
        loader = create_loader(
            self.inputs_of(model, method.train, "train"),
            batch_size,
            is_training=True,
            num_workers=args.workers,
            seed=seed,
            pin_memory=self.device.type == "cuda",
            **self.balance,
            **reading_options(args),
        )
        val_loader = self.eval_loader(model, method.val, "val", whole=False)
        task = method.make_task(model)
        mixup = self.make_mixup(task)
        if is_primary():
            millions = sum(p.numel() for p in model.parameters()) / 1e6
            print(
                f"\n{name}, seed {seed}: {args.model}, {millions:.1f} M parameters, "
                f"{len(method.train)} images to train on, {len(method.val)} to validate",
                flush=True,
            )
        config = replace(
            self.config,
            output=str(folder),
            seed=seed,
            epochs=method.epochs,
            lr_steps=stretched(self.config.lr_steps, method.epochs / args.epochs),
        )
        facts = {"data": str(args.data), "seed": seed}
        run = fit(task, loader, val_loader, config, mixup, facts=facts)
        self.histories[f"{name}, seed {seed}"] = run.history
        if self.shown is None and name.startswith("B-CNN"):
            self.shown = method.make_task(load_model(run.model_path)).to(self.device)
        best = load_model(run.model_path)
        if self.reads_features:
            best = HeadsOnly(best.freeze())
        best.to(self.device)
        if method.val.taxonomy is not None:  # else it is one level alone
            self.calibrate(best, method, run.model_path)
        return method.make_task(best), run

    def calibrate(self, model: BranchModel, method: Method, path: Path | str) -> None:
        """Let the model's answers keep a promise, by the images that chose its best epoch."""
        loader = self.eval_loader(model, method.val, "val")
        settings = {"data": "validation", "decoder": method.decoder}
        try:
            calibrate(model, loader, self.args.target, taxonomy=self.tree, **settings)
        except ValueError as error:
            print(f"not calibrated: {error}")
            return
        if is_primary():
            save_model(model, path)

    def inputs_of(self, model: BranchModel, data: HierarchicalDataset, split: str) -> Any:
        """Images, or of a frozen backbone its features, computed once and kept with the run."""
        if not self.reads_features:
            return data
        taps = "_".join(dict.fromkeys(slug(tap.module) for tap in model.taps))
        folder = self.output / "features" / f"{split}_{taps}"
        return cache_features(
            model.to(self.device),
            data,
            folder,
            batch_size=self.args.batch_size,
            num_workers=self.args.workers,
        )

    def eval_loader(
        self, model: BranchModel, data: HierarchicalDataset, split: str, whole: bool = True
    ) -> DataLoader:
        """Batches to evaluate a model on; of several processes each sees all, if `whole`."""
        args = self.args
        inputs = self.inputs_of(model, data, split)
        shares: dict[str, Any] = {"rank": 0, "world_size": 1} if whole else {}
        return create_loader(
            inputs, args.batch_size, num_workers=args.workers, **shares, **reading_options(args)
        )

    def set_transforms(self, method: Method, model: BranchModel) -> None:
        """Let the data be read as the network takes them, and the model's file say how."""
        args = self.args
        given = {}
        for name in ("mean", "std"):
            if getattr(args, name):
                given[name] = getattr(args, name)
        cfg = resolve_model_data_config(model, given)
        inputs = {key: cfg[key] for key in ("input_size", "mean", "std", "interpolation")}
        crop: dict[str, Any] = {"crop_pct": cfg["crop_pct"], "crop_mode": "center"}
        if max(cfg["input_size"][-2:]) <= 64:
            crop["crop_pct"] = 1.0  # small images are not cropped: there is nothing to spare
        hflip = args.hflip
        if hflip is None:  # a mirrored digit is none
            hflip = 0.0 if args.data in ("digits", "mnist") else 0.5
        method.train.transform = create_transform(
            **inputs, is_training=True, augment=args.augment, hflip=hflip
        )
        self.transform = create_transform(**inputs, **crop)
        method.val.transform = self.transform
        model.pretrained_cfg.update(mean=tuple(cfg["mean"]), std=tuple(cfg["std"]), **crop)

    def make_mixup(self, task: BranchTask) -> HierarchicalMixup | None:
        """Mixup and CutMix, if they are asked for."""
        args = self.args
        if not (args.mixup or args.cutmix):
            return None
        return HierarchicalMixup(
            args.mixup,
            args.cutmix,
            label_smoothing=args.smoothing,
            num_classes=task.level_classes,
        )

    def answers(self) -> Answers | None:
        """What the B-CNN, or the first of several, says of each image."""
        data = self.evaluation_data()
        data.transform = self.transform
        if self.shown is None:
            return None
        reading = reading_options(self.args)
        return examine(
            self.shown, data, self.args.batch_size, num_workers=self.args.workers, **reading
        )

    def evaluation_data(self) -> HierarchicalDataset:
        """The images that the results are of: test if there are any."""
        return self.val if self.test is None else self.test

    def evaluate(self, tasks: Sequence[BranchTask], decoder: str) -> dict[str, float]:
        """Metrics of a model, or of several with a level each."""
        data = self.evaluation_data()
        data.transform = self.transform
        loaders = [self.eval_loader(base_model(task), data, "judged") for task in tasks]
        if len(tasks) > 1:
            return self.evaluate_together(tasks, loaders, decoder)
        [task], [loader] = tasks, loaders
        calibration = model_calibration(base_model(task), self.tree)
        if decoder == "independent" or calibration is None:
            return dict(evaluate(task, loader, decoder=decoder).metrics)
        coverage = CoverageEvaluator(
            self.tree, calibration.decoder, calibration.temperature, task.level_logits
        )
        answers = CalibratedEvaluator(calibration, self.tree, task.level_logits)
        evaluator = evaluate(task, loader, decoder=decoder, also=[coverage, answers])
        return {**evaluator.metrics, **coverage.compute(), **answers.compute()}

    @torch.no_grad()
    def evaluate_together(
        self, tasks: Sequence[BranchTask], loaders: Sequence[DataLoader], decoder: str
    ) -> dict[str, float]:
        """Metrics of several models that answer as one, each on its level."""
        evaluator = HierarchyEvaluator(
            self.tree.levels,
            self.tree.num_classes,
            self.tree,
            self.device,
            max_samples=evaluation_sample_limit(loaders[0]),
            decoder=decoder,
        )
        models = [base_model(task).eval() for task in tasks]
        for batches in zip(*loaders, strict=True):
            logits: dict[str, torch.Tensor] = {}  # (B, K) of each level
            for model, (images, _) in zip(models, batches, strict=True):
                logits |= model(images.to(self.device))
            evaluator.update(logits, batches[0][1].to(self.device))
        return dict(evaluator.compute(distributed=dist.is_initialized()))


def freezing(reads_features: bool) -> str:
    """What becomes of the images of a frozen backbone, in words."""
    if reads_features:
        return (
            "The backbone is frozen and images are not augmented: its features are computed once "
            "and kept in the run's folder (with --augment light they are computed anew each epoch)."
        )
    return (
        "The backbone is frozen, but augmented images give other features each epoch, which takes "
        "the time of its forward pass (--augment none computes them once)."
    )


def channels_of(args: argparse.Namespace) -> int:
    """Channels of the images, for which each mean and deviation must have a value."""
    is_grey = args.data in ("digits", "mnist", "fashion_mnist")
    in_chans = args.in_chans or (1 if is_grey else 3)
    for name in ("mean", "std"):
        values = getattr(args, name)
        if values and len(values) not in (1, in_chans):
            raise ValueError(
                f"--{name} has {len(values)} values, but images have {in_chans} channels."
            )
    return in_chans


def hierarchy_of(data: HierarchicalDataset, name: str) -> Taxonomy:
    """The tree of the labels; without two levels there is nothing to branch."""
    tree = data.taxonomy
    if tree is None or tree.num_levels < 2:
        raise ValueError(
            f"{name} has one level of labels only: give its hierarchy with --taxonomy (a "
            "ready-made tree, a CSV, JSON or nested class folders)."
        )
    return tree


def taps_of(args: argparse.Namespace, tree: Taxonomy) -> list[str]:
    """One tap for each level."""
    is_trained = args.pretrained or args.checkpoint_path
    taps = args.taps or default_taps(tree.num_levels, bool(is_trained))
    if len(taps) != tree.num_levels:
        raise ValueError(
            f"--taps {' '.join(taps)}: the tree has {tree.num_levels} levels "
            f"{list(tree.levels)}; give one tap each."
        )
    return taps


def default_taps(levels: int, is_trained: bool) -> list[str]:
    """The last stages, one for each level; more than five levels share stages 1 to 5.

    A backbone that brings weights is read at its last stage: on one data set, earlier ones were
    worse there or no better (docs/hierarchy.md); `timm-branches suggest-taps` tries your own.
    """
    if is_trained:
        return ["5"] * levels
    if levels <= 5:
        return [str(stage) for stage in range(6 - levels, 6)]
    return [str(1 + round(4 * level / (levels - 1))) for level in range(levels)]


def make_heads(args: argparse.Namespace, levels: int) -> list:
    """One head a level."""
    if args.hidden and len(args.hidden) != levels:
        raise ValueError(f"--hidden {args.hidden}: give one width for each of the {levels} levels.")
    name = args.head
    if name is None:
        name = "flatten" if args.model.startswith("bcnn") else "pool"
    head = HEADS[name]
    if not args.hidden:
        return [head()] * levels
    return [head(hidden=(width, width)) for width in args.hidden]


def one_level(data: HierarchicalDataset, level: int) -> HierarchicalSubset:
    """The same images with the labels of one level alone."""
    subset = HierarchicalSubset(data, range(len(data)))
    subset.labels = subset.labels[:, level : level + 1]  # (N, 1)
    subset.taxonomy = None
    return subset


# -- studies

# the study's B-CNNs whose coarse weight becomes 0, and does not
WITH_AND_WITHOUT_ZEROS = ("B-CNN", "B-CNN, no level off")
# what --methods names, and its rows in the table
METHODS = {
    "flat": "flat",
    "bcnn": "B-CNN",
    "kept": "B-CNN, no level off",
    "constant": "constant weights",
    "detached": "detached branches",
    "independent": "independent branches",
    "hxe": "flat, HXE",
    "soft": "flat, soft labels",
    "ancestors": "flat, ancestors",
    "sharing": "parameter sharing",
    "margin": "soft margin",
}
USUAL_METHODS = ("flat", "bcnn", "kept", "constant", "detached", "independent")
# metrics of each method, one dict a seed; closing words
StudyResult = tuple[dict[str, list[dict[str, float]]], str]


def with_and_without(experiment: Experiment) -> StudyResult:
    """A B-CNN and its flat twin, once."""
    args, levels = experiment.args, experiment.tree.num_levels
    schedule = get_schedule(
        args.schedule or default_schedule(levels, args.epochs), num_levels=levels
    )
    task, run = experiment.fit(
        "B-CNN", experiment.bcnn(schedule), args.seed, experiment.output / "bcnn"
    )
    facts = {"best_epoch": run.best_epoch, "seconds": round(run.seconds, 1)}
    results = {
        "B-CNN": [experiment.evaluate([task], "independent") | facts],
        "B-CNN, best path": [experiment.evaluate([task], "best-path") | facts],
    }
    if not args.flat:
        return results, f"Loss weights: {schedule}."
    task, run = experiment.fit("flat", experiment.flat(), args.seed, experiment.output / "flat")
    facts = {"best_epoch": run.best_epoch, "seconds": round(run.seconds, 1)}
    results["flat"] = [experiment.evaluate([task], "leaf-marginal") | facts]
    gain = results["B-CNN, best path"][0]["full_path"] - results["flat"][0]["full_path"]
    lines = [
        f"The hierarchy changes full-path accuracy by {gain:+.2f} points in this one run (best "
        "path against flat). One seed is no proof either way: --compare trains several."
    ]
    for name in ("B-CNN, best path", "flat"):
        lines += what_it_is_sure_of(name, results[name][0], experiment)
    return results, "\n".join(lines)


def what_it_is_sure_of(
    name: str, metrics: Mapping[str, float], experiment: Experiment
) -> list[str]:
    """What a calibrated model answers, as a sentence; none if it is not calibrated."""
    if "answers_right" not in metrics:
        return []
    tree, parts = experiment.tree, []
    share = 0.0
    for level in reversed(tree.levels):  # who names a class on a level names those above
        share += metrics[f"answers_at_{level}"]
        parts.append(f"the {level} on {share:.1f} %")
    asked, right = 100 * experiment.args.target, metrics["answers_right"]
    return [
        f"{name}, asked to be right on {asked:g} %: sure of {', of '.join(parts)} of the images; "
        f"{right:.1f} % of these answers are right."
    ]


def compare(experiment: Experiment) -> StudyResult:
    """Is it worth it? Every method at equal budget, over several seeds.

    And what a weight of 0 does to coarse heads.
    """
    args, tree = experiment.args, experiment.tree
    paper = get_schedule(
        args.schedule or paper_schedule(tree.num_levels, args.epochs), num_levels=tree.num_levels
    )
    kept = without_zeros(paper)
    equal = get_schedule("equal", num_levels=tree.num_levels)
    available = {
        "flat": experiment.flat(),
        "bcnn": experiment.bcnn(paper),
        "kept": experiment.bcnn(kept),
        "constant": experiment.bcnn(equal),
        "detached": experiment.bcnn(paper, detach=True),
        "hxe": experiment.flat(loss="hxe"),
        "soft": experiment.flat(loss="soft"),
        "ancestors": experiment.flat(loss=ancestor_cross_entropy),
        "sharing": experiment.bcnn(equal, level_loss=parameter_sharing_loss),
        "margin": experiment.bcnn(equal, level_loss=soft_margin_loss),
    }
    if kept == paper:
        del available["kept"]
    asked = {"flat", *(args.methods or USUAL_METHODS)}
    if "all" in asked:
        asked |= set(METHODS)
    methods = {METHODS[key]: method for key, method in available.items() if key in asked}
    results: dict[str, list[dict[str, float]]] = {}
    histories: dict[str, list[list[dict]]] = {}
    for seed in range(args.seed, args.seed + args.seeds):
        folder = experiment.output / f"seed{seed}"
        trained = {}
        for name, method in methods.items():
            task, run = experiment.fit(name, method, seed, folder / slug(name))
            trained[name] = [task]
            histories.setdefault(name, []).append(run.history)
        if "independent" in asked:
            trained["independent branches"] = fit_independent(experiment, seed, folder)
        for name, tasks in trained.items():
            for decoder, row in decoders_of(name, methods.get(name)).items():
                metrics = experiment.evaluate(tasks, decoder)
                results.setdefault(row, []).append(metrics)
    lines = []
    for name in methods:
        if name != "flat":
            [*_, row] = decoders_of(name, methods[name]).values()
            baseline, metric = "flat, leaf-marginal", "full_path"
            lines.append(verdict(results, row, baseline, metric, "full-path accuracy"))
    if all(name in methods for name in WITH_AND_WITHOUT_ZEROS):
        lines.append(collapse(tree.levels[0], paper, histories))
        if is_primary() and args.plots:
            from timm_branches.train.curves import plot_collapse

            shown = {name: histories[name] for name in WITH_AND_WITHOUT_ZEROS}
            plot_collapse(shown, tree.levels, experiment.output / "collapse.png")
    lines.append(f"Loss weights of the B-CNN: {paper}.")
    return results, "\n".join(lines)


def fit_independent(experiment: Experiment, seed: int, folder: Path) -> list[BranchTask]:
    """A network for each level, which know nothing of each other."""
    tasks = []
    for level, name in enumerate(experiment.tree.levels):
        task, _ = experiment.fit(
            f"independent branch {name!r}",
            experiment.independent(level),
            seed,
            folder / f"alone_{slug(name)}",
        )
        tasks.append(task)
    return tasks


def decoders_of(name: str, method: Method | None) -> dict[str, str]:
    """The decoders that a method is evaluated with, and their rows in the table."""
    if name == "flat":
        return {"crm": "flat, CRM", "leaf-marginal": "flat, leaf-marginal"}
    if method is not None and method.decoder != "best-path":  # it has one distribution
        return {method.decoder: name}
    return {"independent": name, "best-path": f"{name}, best path"}


def collapse(
    level: str, schedule: LossWeightSchedule, histories: dict[str, list[list[dict]]]
) -> str:
    """What became of the coarsest head after its weight went to 0, in words."""
    metric = f"eval_{level}_top1"
    changes = []
    for name in WITH_AND_WITHOUT_ZEROS:
        runs = histories[name]
        epochs = [row["epoch"] for row in runs[0]]
        last_trained = max(epoch for epoch in epochs if schedule(epoch)[0] > 0)
        changes.append(fmean(run[-1][metric] - run[last_trained][metric] for run in runs))
    with_zeros, with_a_little = changes
    return (
        f"From the epoch before the weight of {level!r} becomes 0 to the last, its accuracy on "
        f"validation changes by {with_zeros:+.2f} points; with a little weight left by "
        f"{with_a_little:+.2f}."
    )


def partial_labels(experiment: Experiment) -> StudyResult:
    """What images are worth that carry their coarsest label only: learned from, or dropped.

    Dropping leaves fewer images an epoch. It is tried with as many epochs (a labelled image is seen
    as often, in less time) and with as many images in all (more epochs, the same time). Coarse
    labels teach all heads (the marginal loss): with the coarse head alone, the fine one would see
    few labels a batch.
    """
    args, levels = experiment.args, experiment.tree.num_levels
    results: dict[str, list[dict[str, float]]] = {}
    for fraction in args.partial:
        coarsened, labelled = coarsen_labels(experiment.train, fraction, seed=args.seed)
        longer = round(args.epochs * len(coarsened) / len(labelled))
        methods = {}
        for treatment, data, epochs in (
            ("learned from", coarsened, args.epochs),
            ("dropped", labelled, args.epochs),
            ("dropped, as many images", labelled, longer),
        ):
            title = f"{fraction:.0%} coarse, {treatment}"
            schedule = args.schedule or default_schedule(levels, epochs)
            methods[f"B-CNN, {title}"] = experiment.bcnn(schedule, data, epochs, marginal=True)
            methods[f"flat, {title}"] = experiment.flat(data, epochs)
        for seed in range(args.seed, args.seed + args.seeds):
            folder = experiment.output / f"seed{seed}"
            for name, method in methods.items():
                task, _ = experiment.fit(name, method, seed, folder / slug(name))
                metrics = experiment.evaluate([task], method.decoder)
                results.setdefault(name, []).append(metrics)
    lines = []
    for fraction in args.partial:
        for network in ("B-CNN", "flat"):
            title = f"{network}, {fraction:.0%} coarse"
            learned = f"{title}, learned from"
            for baseline in (f"{title}, dropped", f"{title}, dropped, as many images"):
                lines.append(verdict(results, learned, baseline, "full_path", "full-path accuracy"))
    return results, "\n".join(lines)


# -- schedules


def default_schedule(levels: int, epochs: int) -> str:
    """Weight moves from the coarsest to the finest level and leaves none behind.

    Linear over the first half.
    """
    start = weights_on(0, 0.6, levels)
    end = weights_on(levels - 1, 0.6, levels)
    return "linear:" + schedule_text({0: start, max(1, epochs // 2): end})


def paper_schedule(levels: int, epochs: int) -> str:
    """B-CNN's four phases on CIFAR-10, for any number of levels and epochs.

    There they have 9, 10, 10 and 31 of 60 epochs.
    """
    phases = [weights_on(0, 0.98, levels)]
    for level in range(1, levels):
        phases.append(weights_on(level, 0.8, levels))
    phases.append(weights_on(levels - 1, 1.0, levels))
    starts = [0]
    for k in range(levels):
        starts.append(round(epochs * (9 + 20 * k / (levels - 1)) / 60))
    # of phases that start together, as in a short training, the last counts
    return schedule_text(dict(zip(starts, phases, strict=True)))


def weights_on(level: int, share: float, levels: int) -> list[float]:
    """Loss weights that give one level this share and the others equal parts of the rest."""
    weights = [(1 - share) / (levels - 1)] * levels
    weights[level] = share
    return weights


def schedule_text(points: Mapping[int, Sequence[float]]) -> str:
    """Loss weights by epoch, as --schedule takes them."""
    steps = []
    for epoch, weights in points.items():
        numbers = ",".join(f"{weight:.6g}" for weight in weights)
        steps.append(f"{epoch}:{numbers}")
    return ";".join(steps)


def without_zeros(schedule: LossWeightSchedule, least: float = 0.05) -> LossWeightSchedule:
    """The same schedule with a little weight left on every level, so that no head goes stale."""
    if not isinstance(schedule, StepSchedule):
        return schedule
    points = {}
    for epoch, weights in schedule.points.items():
        if 0 in weights:
            weights = tuple(max(weight, least) for weight in weights)
        points[epoch] = weights
    return StepSchedule(points)


def stretched(lr_steps: str, factor: float) -> str:
    """Learning rates by epoch for a run of another length."""
    steps = []
    for step in lr_steps.split(";"):
        if step.strip():
            epoch, rate = step.split(":")
            steps.append(f"{round(int(epoch) * factor)}:{rate}")
    return ";".join(steps)


# -- the job


def main(args: argparse.Namespace) -> None:
    """The study that was asked for, its table and its files."""
    began = time.monotonic()
    experiment = Experiment(args)
    study = with_and_without
    if args.compare:
        study = compare
    elif args.partial:
        study = partial_labels
    results, closing = study(experiment)
    if not is_primary():
        return
    count = len(experiment.evaluation_data())
    split = "test"
    if experiment.test is None:
        split = "validation (there is no test split)"
    facts = {
        "command": shlex.join(["python", *sys.argv]),
        "seed": args.seed,
        "epochs": args.epochs,
        "train_images": len(experiment.train),
        "hardware": hardware(experiment.device),
        "images": count,
        "judged": split,
    }
    for_json = {name: list(map(nan_to_null, runs)) for name, runs in results.items()}
    text = json.dumps({**facts, "results": for_json}, indent=2) + "\n"
    replace_file(experiment.output / "results.json", lambda path: Path(path).write_text(text))
    seeds = f"Seed {args.seed}"
    if args.compare:
        seeds = f"Seeds {args.seed} to {args.seed + args.seeds - 1}"
    seconds = time.monotonic() - began
    print(f"\n{comparison_table(results, columns(experiment.tree))}\n\n{closing}")
    explained = (
        f"Percent, distances in levels, kept at 95 % what answers say at most of which 95 % are "
        f"right, on the {count} {split} images, models of the best epoch on validation. {seeds}, "
        f"{facts['hardware']}, {seconds:.0f} s."
    )
    print(f"{explained} Files: {experiment.output}")
    write_report(
        experiment.output,
        f"B-CNN on {args.data}",
        results,
        columns(experiment.tree),
        f"{closing}\n{explained}",
        experiment.histories,
        answers=experiment.answers,
        settings=args.settings,
        data=experiment.summary,
        device=experiment.device,
        plots=args.plots,
    )


def columns(tree: Taxonomy) -> dict[str, str]:
    """Which metrics the table shows, and their titles."""
    titles = {}
    for level, classes in zip(tree.levels, tree.num_classes, strict=True):
        titles[f"{level}_top1"] = f"{level} ({classes})"
    return titles | {
        "full_path": "full path",
        "consistency": "consistency",
        "hf": "hF",
        "distance": "distance",
        "severity": "severity",
        "information@95": "kept at 95 %",
    }


if __name__ == "__main__":
    run_script(lambda: main(parse_args()))
