r"""Train a CNN+LSTM on clips, and say what it gains over the same CNN on the last frame alone.

    # counting digits, a minute on one CPU core
    python recipes/cnn_lstm.py
    python recipes/cnn_lstm.py videos/ --model resnet50 --pretrained --frames 16 --amp
    python recipes/cnn_lstm.py clips.csv --pretrained --freeze all --cache features/ --epochs 50
    python recipes/cnn_lstm.py videos/ --model resnet101 --pretrained --freeze all --layers 3 \
        --projection 300 --hidden 128 --rnn-output frame
    torchrun --nproc-per-node 4 recipes/cnn_lstm.py videos/ --model convnext_tiny --pretrained -b 8
    # every temporal head on four tasks of digits, or some of them on data of your own
    python recipes/cnn_lstm.py --compare --seeds 3
    python recipes/cnn_lstm.py videos/ --pretrained --freeze all --cache features/ \
        --compare mean lstm transformer

`videos/` holds a folder a class with videos, or with folders of frames; a CSV names clips and their
classes. Classes in nested folders, or in several columns, are levels: each has a temporal head of
its own.

Without arguments the clips are made of scikit-learn's digits, the backbone is conv2_24x48, and only
the order tells the classes apart: handwritten 0, 1 and 2 count up or down on a ring (... 0 1 2 0 1
... or ... 2 1 0 2 1 ...), 3 to 6 frames, each frame another picture. No single frame tells: the
last digit is drawn evenly, so each digit of the ring is equally likely at any place of a clip of
either class, and pictures and lengths are drawn without regard to the class. What is more, clips
come in pairs, one up and one down, that share their length and their very last frame. Whoever sees
only the last frame, and answers alike to the same picture, is right about exactly one of each pair:
exactly 50 %, whatever was learned.

`digits-first`, `digits-after` and `digits-majority` are harder: clips of up to 32 digits from 0 to
3, whose class is the first of them, the one behind a 9, or the most frequent one. `--compare` gives
every head the same clips, the same steps and the same frozen backbone, which has learned to read
single digits and whose features are computed once.
"""

import argparse
import json
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from timm.data import resolve_model_data_config

from timm_branches import (
    BranchModel,
    Head,
    PoolHead,
    StreamingClassifier,
    create_branch_model,
    load_model,
)
from timm_branches.data import (
    ClipDataset,
    ClipSubset,
    FrameSampler,
    collate_clips,
    create_clip_loader,
    create_clip_splits,
    create_loader,
    create_transform,
)
from timm_branches.data.clips.digits import DIGIT_TASKS, digit_clips, single_digits
from timm_branches.features import HeadsOnly, cache_features
from timm_branches.features.heads_only import feature_layout
from timm_branches.files import replace_file
from timm_branches.heads import HEADS
from timm_branches.task import BranchTask
from timm_branches.taxonomy import Taxonomy
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
from timm_branches.train.compare import comparison_table, paired_difference
from timm_branches.train.recipe_parser import RecipeParser
from timm_branches.train.report import Answers, examine, write_report
from timm_branches.train.script import hardware, nan_to_null, new_output, run_script, slug

# the job without arguments: a network of two convolutions on digits of 16 pixels
DIGITS = {
    "model": "conv2_24x48",
    "img_size": [16],
    "in_chans": 1,
    "mean": [0.1],
    "std": [0.1],
    "epochs": 10,
}
DIGIT_DATA = ("digits", *(f"digits-{task}" for task in DIGIT_TASKS))
TEMPORAL = ("lstm", "gru", "mingru", "tcn", "transformer", "attention", "mean")
# how a table calls them
TITLES = {"lstm": "LSTM", "gru": "GRU", "mingru": "minGRU", "tcn": "TCN"}
# the flags that describe a temporal head, and the options they stand for
HEAD_FLAGS = {
    "hidden_size": "hidden_size",
    "layers": "num_layers",
    "bidirectional": "bidirectional",
    "rnn_output": "output",
    "readout": "readout",
    "pool": "pool_type",
    "projection": "projection",
    "activation": "activation",
    "hidden": "hidden",
    "num_heads": "num_heads",
    "mlp_ratio": "mlp_ratio",
    "causal": "causal",
    "max_frames": "max_frames",
    "kernel_size": "kernel_size",
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Arguments; what has no effect is refused."""
    parser = make_parser()
    early = parser.parse_known_args(argv)[0]
    if early.data in DIGIT_DATA:
        parser.set_defaults(**DIGITS)
        if early.compare is not None:
            parser.set_defaults(**COMPARE)
    args = parser.parse_args(argv)
    complaint = without_effect(args)
    if complaint:
        parser.error(complaint)
    args.head = args.head or "lstm"
    if args.freeze_backbone:
        args.freeze = "all"
    args.freeze_backbone = args.freeze == "all"
    if args.compare is not None and args.freeze_backbone:
        args.cache = args.cache or str(Path(args.output) / "features")
    args.augment = resolved_augment(args)
    if args.frames is None and args.data not in DIGIT_DATA and args.sampling != "all":
        args.frames = 16
    return args


def resolved_augment(args: argparse.Namespace) -> str:
    """The augmentation that was asked for, or what suits the data."""
    if args.augment is not None:
        return args.augment
    if args.data in DIGIT_DATA or args.cache:
        return "none"
    return "auto"


# --compare on digits: the backbone reads digits and is frozen
COMPARE = {"freeze": "all", "epochs": 30, "batch_size": 32, "lr": 3e-3}

# the flags of its own that --help shows
COMMON = (
    "frames",
    "sampling",
    "checkpoint_path",
    "head",
    "hidden_size",
    "rnn_output",
    "freeze",
    "cache",
    "compare",
)


def make_parser() -> RecipeParser:
    """All flags, in groups."""
    parser = RecipeParser(__doc__, COMMON)
    parser.add_argument(
        "data",
        nargs="?",
        default="digits",
        help="digits (default), digits-first, digits-after, digits-majority, a folder of class "
        "folders with videos or frame folders, or a CSV",
    )
    add_data_arguments(parser.add_argument_group("data"))
    add_network_arguments(parser.add_argument_group("model"))
    add_head_arguments(parser.add_argument_group("temporal head"))
    add_job_arguments(parser.add_argument_group("what is done"))
    add_fit_arguments(parser)
    parser.set_defaults(
        output="output/cnn_lstm",
        opt="adamw",
        lr=1e-3,
        weight_decay=1e-4,
        warmup_epochs=1,
        clip_grad=1.0,
        freeze_backbone=None,
    )
    return parser


def add_data_arguments(group: argparse._ArgumentGroup) -> None:
    """Which clips, which of their frames, and what is done with their pixels."""
    group.add_argument(
        "--taxonomy", help="tree of the class names (default: as folders or columns say)"
    )
    group.add_argument(
        "--val-fraction",
        type=float,
        help="training clips set aside without a val split (default: 0.1)",
    )
    group.add_argument("--limit", type=int, help="train on this many clips only (stratified)")
    group.add_argument("--frames", type=int, help="frames of a clip (default: 16, for digits all)")
    group.add_argument(
        "--sampling",
        choices=("uniform", "dense", "random", "all"),
        help="which frames (default: one of each of equal segments)",
    )
    group.add_argument(
        "--stride", type=int, default=1, help="distance between two frames of --sampling dense"
    )
    group.add_argument("--rate", type=float, help="frames a second of a video to choose among")
    group.add_argument(
        "--strict",
        action="store_const",
        dest="on_bad_image",
        const="stop",
        default=argparse.SUPPRESS,
        help="the same as --on-bad-image stop",
    )
    group.add_argument(
        "-b", "--batch-size", type=int, default=16, help="clips in a batch of one process"
    )
    group.add_argument(
        "-j", "--workers", type=int, default=0, help="worker processes that load data"
    )
    group.add_argument(
        "--augment",
        help="none (for digits and --cache), light, cifar, imagenet, auto (else), or an "
        "albumentations file; all frames of a clip alike",
    )
    group.add_argument(
        "--hflip", type=float, default=0.0, help="chance to mirror a clip (left becomes right)"
    )
    group.add_argument(
        "--mean", type=float, nargs="+", help="mean of each channel (default: the backbone's)"
    )
    group.add_argument("--std", type=float, nargs="+", help="standard deviation of each channel")
    add_table_arguments(group)
    add_reading_arguments(group, on_bad_image="skip")


def add_network_arguments(group: argparse._ArgumentGroup) -> None:
    """Which backbone, where it is tapped, how much of it is trained."""
    add_model_arguments(group, "resnet18")
    group.add_argument(
        "--in-chans", type=int, choices=(1, 3), default=3, help="3 for RGB (default), 1 for grey"
    )
    group.add_argument("--img-size", type=int, nargs="+", help="side, or height and width")
    group.add_argument("--taps", nargs="+", help="where each level's head reads (default: stage 5)")
    group.add_argument(
        "--frames-per-pass",
        type=int,
        help="frames that go through the backbone at once (default: all)",
    )
    group.add_argument("--drop", type=float, help="dropout rate")
    group.add_argument(
        "--freeze",
        metavar="STAGE",
        help="all, or the last stage of the backbone that is not trained",
    )
    group.add_argument(
        "--cache",
        metavar="FOLDER",
        help="compute the features of --freeze all once, and keep them here",
    )
    group.add_argument(
        "--views", type=int, default=1, help="augmented views of each clip in the cache"
    )


def add_head_arguments(group: argparse._ArgumentGroup) -> None:
    """What is attached."""
    group.add_argument(
        "--head", choices=TEMPORAL, metavar="HEAD", help=f"{', '.join(TEMPORAL)} (default: lstm)"
    )
    group.add_argument("--hidden-size", type=int, help="width (default: 256, of digits 64)")
    group.add_argument("--layers", type=int, help="of the head (default: 1, of a tcn 3)")
    group.add_argument(
        "--bidirectional", action="store_true", default=None, help="read clips in both directions"
    )
    group.add_argument(
        "--rnn-output",
        choices=("clip", "frame"),
        help="one answer a clip (default), or one a frame: each is trained, their mean is judged",
    )
    group.add_argument(
        "--readout",
        choices=("last", "mean", "max", "attention"),
        help="what a clip's answer is read from (default: last)",
    )
    group.add_argument(
        "--pool",
        choices=("avg", "max", "avgmax", "catavgmax", "attention", "flatten", "none"),
        help="how a frame's map becomes a vector (default: avg; none, of a transformer: each "
        "position is a token)",
    )
    group.add_argument(
        "--projection", type=int, help="width of a Linear between that vector and the recurrence"
    )
    group.add_argument("--activation", help="behind the projection, by timm's name")
    group.add_argument(
        "--hidden", type=int, nargs="+", help="widths of layers before the classifier"
    )
    group.add_argument("--num-heads", type=int, help="of attention (default: 8)")
    group.add_argument("--mlp-ratio", type=float, help="of feed-forward layers beside attention")
    group.add_argument(
        "--causal", action="store_true", default=None, help="a frame attends to those before it"
    )
    group.add_argument("--max-frames", type=int, help="that a transformer can tell apart")
    group.add_argument("--kernel-size", type=int, help="frames that a tcn's convolution reads")


def add_job_arguments(group: argparse._ArgumentGroup) -> None:
    """What is done beside training."""
    group.add_argument(
        "--baseline",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also train on the last frame alone",
    )
    group.add_argument(
        "--stream",
        action="store_true",
        help="at the end, show a clip's class after each of its frames",
    )
    group.add_argument(
        "--compare",
        nargs="*",
        metavar="HEAD",
        help="train several heads at equal budget instead (default: all of --head)",
    )
    group.add_argument("--seeds", type=int, default=1, help="of each head of --compare")


def without_effect(args: argparse.Namespace) -> str | None:
    """What was asked for in vain, or contradicts something else, in words."""
    checks = (
        compare_complaint,
        digits_complaint,
        freeze_complaint,
        cache_complaint,
        augment_complaint,
        head_complaint,
        resume_complaint,
    )
    for check in checks:
        complaint = check(args)
        if complaint:
            return complaint
    return None


def digits_complaint(args: argparse.Namespace) -> str | None:
    """What the embedded digits do not take."""
    if args.data not in DIGIT_DATA:
        return None
    if args.on_bad_image != "skip":
        return "--on-bad-image stop, or --strict has no effect on the digits"
    for name in ("taxonomy", "val_fraction", "rate"):
        if getattr(args, name):
            flag = "--" + name.replace("_", "-")
            return f"{flag} has no effect on the digits: give data of your own"
    if args.in_chans == 3:
        return "--in-chans 3 has no effect on the digits, which are grey"
    return None


def compare_complaint(args: argparse.Namespace) -> str | None:
    """What does not go with a comparison of heads, or needs one."""
    if args.compare is None:
        return "--seeds has no effect without --compare" if args.seeds != 1 else None
    if args.seeds < 1:
        return f"--seeds must be 1 or more, got {args.seeds}"
    unknown = [kind for kind in args.compare if kind not in TEMPORAL]
    if unknown:
        return f"--compare {unknown[0]}: choose among {', '.join(TEMPORAL)}"
    if len(set(args.compare)) < len(args.compare):
        return "--compare names a head twice"
    given = {"--head": args.head, "--stream": args.stream, "--no-baseline": not args.baseline}
    for flag in filter(given.get, given):
        return f"{flag} has no effect with --compare"
    if args.resume:
        return "--resume has no effect with --compare: its cells are short"
    return None


def is_frozen(args: argparse.Namespace) -> bool:
    """Whether nothing of the backbone is trained."""
    return args.freeze == "all" or bool(args.freeze_backbone)


def freeze_complaint(args: argparse.Namespace) -> str | None:
    """What contradicts the freezing that was asked for."""
    both_given = args.freeze_backbone is not None and args.freeze
    if both_given and args.freeze_backbone != (args.freeze == "all"):
        switch = "--freeze-backbone" if args.freeze_backbone else "--no-freeze-backbone"
        return f"--freeze {args.freeze} and {switch} contradict each other"
    if is_frozen(args) and args.grad_checkpointing:
        return (
            "--grad-checkpointing has no effect with --freeze all: no gradient goes through the "
            "backbone"
        )
    return None


def cache_complaint(args: argparse.Namespace) -> str | None:
    """What does not go with cached features, or needs them."""
    if args.cache and not is_frozen(args):
        return (
            "--cache has no effect without --freeze all: features of a backbone that is trained "
            "change"
        )
    if args.views != 1 and not args.cache:
        return "--views has no effect without --cache"
    if args.cache and args.views == 1 and args.augment not in (None, "none"):
        return (
            f"--augment {args.augment} with --cache needs --views: a single view is the same clip "
            "in every epoch"
        )
    return None


def augment_complaint(args: argparse.Namespace) -> str | None:
    """What has no effect where nothing is augmented."""
    if args.hflip and resolved_augment(args) == "none":
        return "--hflip has no effect with --augment none: choose another --augment"
    return None


def head_complaint(args: argparse.Namespace) -> str | None:
    """What the temporal head cannot do together."""
    kinds = [args.head or "lstm"] if args.compare is None else args.compare or TEMPORAL
    for flag, option in HEAD_FLAGS.items():
        if getattr(args, flag) is None:
            continue
        having = [kind for kind in kinds if option in HEADS[kind].__dataclass_fields__]
        if not having:
            of = "any of these heads" if len(kinds) > 1 else f"the head {kinds[0]!r}"
            return f"--{flag.replace('_', '-')} has no effect on {of}"
    if args.rnn_output == "frame" and args.readout not in (None, "last"):
        return (
            f"--readout {args.readout} has no effect with --rnn-output frame, which reads every "
            "frame"
        )
    if args.stream and (args.bidirectional or args.readout not in (None, "last")):
        return "--stream goes from frame to frame: leave out --bidirectional and --readout"
    if args.stream and args.head == "transformer" and not args.causal:
        return "--stream goes from frame to frame: a transformer needs --causal"
    return None


def resume_complaint(args: argparse.Namespace) -> str | None:
    """Why a run cannot go on from there."""
    if args.resume not in ("", "auto"):
        return (
            f"--resume {args.resume}: this recipe trains several models; give --output and "
            "--resume auto"
        )
    return None


@dataclass(frozen=True)
class LastFrame(FrameSampler):
    """Of the frames that would be taken, the last."""

    def __call__(
        self,
        count: int,
        key: Sequence[int] = (0, 0, 0),
        times: Sequence[float] | np.ndarray | None = None,
    ) -> np.ndarray:
        """The last of the frames that are drawn."""
        return super().__call__(count, key, times)[-1:]


class Experiment:
    """Data and settings that all trainings of one call share."""

    def __init__(self, args: argparse.Namespace, splits: Sequence[ClipDataset] | None = None):
        check_sizes(args)
        self.args = args
        self.config = FitConfig.from_args(args)
        self.device = setup_device(args.device)
        self.config.device = str(self.device)
        self.train, self.val, self.test = splits or make_data(args)
        if args.limit is not None:
            self.train = self.train.limit(args.limit, seed=args.seed)
        if args.cache and args.views == 1:  # the same frames in every epoch: those of evaluation
            self.train.sampler = replace(self.train.sampler, is_training=False)
        try_images(args, train=self.train, val=self.val, test=self.test)
        self.summary = say_what_was_understood(train=self.train, val=self.val, test=self.test)
        self.evaluated_on = "test"
        if self.test is self.val:
            self.evaluated_on = "validation (there is no test split)"
        assert self.train.taxonomy is not None
        self.tree: Taxonomy = self.train.taxonomy
        self.balance = balance_options(args, self.tree)
        self.class_weights = weights_of_classes(args, self.train)
        self.taps = args.taps or ["5"] * self.tree.num_levels
        if len(self.taps) != self.tree.num_levels:
            raise ValueError(
                f"--taps {' '.join(self.taps)}: the classes have {self.tree.num_levels} levels "
                f"{list(self.tree.levels)}; give one tap each."
            )
        for split in (self.train, self.val, self.test):
            try:
                split[0]
            except RuntimeError as error:  # no clip at all can be read
                raise ValueError(str(error)) from error
        self.output = new_output(args.output, args.resume)
        RecipeParser.write(args, self.output)
        # for the report: every training's log
        self.histories: dict[str, list[dict]] = {}

    def make_model(self, head: Head) -> BranchModel:
        """A network, the same for the same seed, frozen as far as was asked for."""
        args = self.args
        torch.manual_seed(args.seed)
        size = None
        if args.img_size:
            size = tuple(args.img_size) * (3 - len(args.img_size))  # one side stands for both
        model = create_branch_model(
            args.model,
            taps=self.taps,
            head=head,
            taxonomy=self.tree,
            img_size=size,
            pretrained=args.pretrained,
            checkpoint_path=args.checkpoint_path,
            in_chans=args.in_chans,
            drop_rate=args.drop,
        )
        model.frames_per_pass = args.frames_per_pass
        if args.freeze == "all":
            model.freeze()
        elif args.freeze:
            stage = int(args.freeze) if args.freeze.isdigit() else args.freeze
            model.freeze(stage)
        return model

    def prepare(self, model: BranchModel, splits: Sequence[ClipDataset]) -> None:
        """Give the splits the model's transforms; the model's file will say what they were."""
        args = self.args
        given = {name: getattr(args, name) for name in ("mean", "std") if getattr(args, name)}
        data_config = resolve_model_data_config(model, given)
        names = ("input_size", "mean", "std", "interpolation")
        pixels = {name: data_config[name] for name in names}
        is_small = max(data_config["input_size"][-2:]) <= 64
        crop: dict[str, Any] = {
            "crop_pct": 1.0 if is_small else data_config["crop_pct"],  # small frames stay whole
            "crop_mode": "center",
        }
        train, val, test = splits
        val.transform = test.transform = create_transform(**pixels, **crop)
        if args.augment == "none":
            train.transform = create_transform(**pixels, **crop)
        else:
            train.transform = create_transform(
                **pixels, is_training=True, augment=args.augment, hflip=args.hflip
            )
        model.pretrained_cfg.update(mean=tuple(pixels["mean"]), std=tuple(pixels["std"]), **crop)
        model.pretrained_cfg.update(image_options(args))
        model.data_summary = self.summary.to_dict()

    def clip_loaders(self, train: ClipDataset, val: ClipDataset) -> tuple[Any, Any]:
        """Loaders of clips for training and validation."""
        args = self.args
        loading = {
            "num_workers": args.workers,
            "pin_memory": self.device.type == "cuda",
            **reading_options(args),
        }
        train_loader = create_clip_loader(
            train, args.batch_size, is_training=True, seed=args.seed, **self.balance, **loading
        )
        return train_loader, create_clip_loader(val, args.batch_size, **loading)

    def feature_loaders(
        self, model: BranchModel, name: str, train: ClipDataset, val: ClipDataset
    ) -> tuple[Any, Any]:
        """The same of the frozen backbone's features, which are computed once and kept."""
        args = self.args
        folder = Path(args.cache) / slug(name)
        if args.compare is not None:  # heads that read the same share it
            features, _ = feature_layout(model)
            folder = Path(args.cache) / slug(str(args.data)) / slug(" ".join(features))
        loading = {"batch_size": args.batch_size, "num_workers": args.workers}
        train_features = cache_features(model, train, folder / "train", views=args.views, **loading)
        val_features = cache_features(model, val, folder / "val", views=1, **loading)
        options = {"seed": args.seed, "collate_fn": collate_clips, **loading}
        train_loader = create_loader(train_features, is_training=True, **self.balance, **options)
        return train_loader, create_loader(val_features, is_training=False, **options)

    def fit(
        self, name: str, head: Head, last_frame: bool = False
    ) -> tuple[dict[str, Any], FitResult]:
        """Train, and evaluate the model of the epoch that was best on validation.

        Args:
            name: What the method is called in the table; its files lie in a folder of that name.
            head: What is attached at each tap.
            last_frame: Read the last frame of each clip alone.

        Returns:
            Its metrics, and what `fit` returned.
        """
        args = self.args
        splits = [self.train, self.val, self.test]
        if last_frame:
            splits = [with_last_frame(split) for split in splits]
        train, val, test = splits
        model = self.make_model(head)
        self.prepare(model, splits)
        trained: Any = model
        if args.cache:
            train_loader, val_loader = self.feature_loaders(model, name, train, val)
            trained = HeadsOnly(model)
        else:
            train_loader, val_loader = self.clip_loaders(train, val)
        if is_primary():
            parameters = sum(p.numel() for p in trained.parameters()) / 1e6
            print(
                f"\n{name}: {args.model}, {parameters:.2f} M parameters, {len(train)} clips to "
                f"train on, {len(val)} to validate",
                flush=True,
            )
        run = fit(
            BranchTask(trained, class_weights=self.class_weights),
            train_loader,
            val_loader,
            replace(self.config, output=str(self.output / slug(name))),
            facts={"data": str(args.data), "seed": args.seed},
        )
        self.histories[name] = run.history
        best = load_model(run.model_path).to(self.device)
        best.frames_per_pass = args.frames_per_pass
        test_loader = create_clip_loader(test, args.batch_size, num_workers=args.workers)
        evaluation = evaluate(BranchTask(best), test_loader)
        metrics: dict[str, Any] = dict(evaluation.metrics)
        metrics["best_epoch"] = run.best_epoch
        metrics["head_parameters"] = sum(p.numel() for p in model.heads.parameters())
        metrics["seconds"] = round(run.seconds, 1)
        return metrics, run


def check_sizes(args: argparse.Namespace) -> None:
    """Refuse numbers that fit neither frames nor clips.

    Raises:
        ValueError: As many values as there are no channels or sides, or a limit below 1.
    """
    for name in ("mean", "std"):
        values = getattr(args, name)
        if values and len(values) not in (1, args.in_chans):
            raise ValueError(
                f"--{name} has {len(values)} values, but frames have {args.in_chans} channels."
            )
    if args.img_size and len(args.img_size) > 2:
        raise ValueError(
            f"--img-size takes a side, or height and width, got {len(args.img_size)} numbers."
        )
    if args.limit is not None and args.limit < 1:
        raise ValueError(
            f"--limit must be above 0, got {args.limit}: leave it out to train on all clips."
        )


def make_temporal_head(args: argparse.Namespace, kind: str) -> Head:
    """The head of this kind that the flags describe, as far as they are for it."""
    options = {}
    for flag, option in HEAD_FLAGS.items():
        value = getattr(args, flag)
        if value is None and flag == "hidden_size" and args.data in DIGIT_DATA:
            value = 64  # small pictures
        if value is not None and option in HEADS[kind].__dataclass_fields__:
            options[option] = value
    return HEADS[kind](**options)


def make_data(args: argparse.Namespace) -> tuple[ClipDataset, ClipDataset, ClipDataset]:
    """Training, validation and test data; without a test split the validation data stand in."""
    frames: dict[str, Any] = {
        "num_frames": args.frames,
        "sampling": args.sampling,
        "stride": args.stride,
        "rate": args.rate,
    }
    if args.data in DIGIT_DATA:
        return digit_clips(args.data.removeprefix("digits").lstrip("-") or "order", **frames)
    train, val, test = create_clip_splits(
        args.data,
        0.1 if args.val_fraction is None else args.val_fraction,
        taxonomy=args.taxonomy,
        in_chans=args.in_chans,
        strict=args.on_bad_image == "stop",
        **frames,
        **table_options(args),
        **image_options(args),
    )
    return train, val, val if test is None else test


def main(args: argparse.Namespace) -> None:
    """Both networks, their table and files."""
    if args.compare is not None:
        compare(args)
        return
    began = time.monotonic()
    head = make_temporal_head(args, args.head)
    experiment = Experiment(args)
    name = f"CNN+{TITLES.get(args.head, args.head)}"
    metrics, run = experiment.fit(name, head)
    results = {name: metrics}
    if args.baseline:
        # a single frame is pooled as the clips' are, where a plain head can
        pool = args.pool if args.pool in ("max", "avgmax", "catavgmax") else "avg"
        single = PoolHead(tuple(args.hidden or ()), pool)
        results["last frame alone"], _ = experiment.fit("last frame alone", single, last_frame=True)
    unreadable = count_unreadable((experiment.train, experiment.val, experiment.test))
    if not is_primary():
        return
    results["chance"] = chance(experiment.test, experiment.tree)
    write_results(experiment, results, unreadable)
    explained = print_table(experiment, results, seconds=time.monotonic() - began)
    report(experiment, results, run, explained)
    if args.data not in DIGIT_DATA:
        without = "; they were left out." if unreadable else "."
        print(f"{unreadable} clips could not be read{without}")
    if args.stream:
        best = load_model(run.model_path).to(experiment.device)
        stream(best, experiment.test, experiment.tree)


def compare(args: argparse.Namespace) -> None:
    """Every head on the same clips with the same steps, a column a task, and who is ahead where."""
    began = time.monotonic()
    kinds = args.compare or TEMPORAL
    heads = {TITLES.get(kind, kind): make_temporal_head(args, kind) for kind in kinds}
    output = new_output(args.output, args.resume)
    args.output = str(output)
    if args.data in DIGIT_DATA and not args.checkpoint_path:
        args.checkpoint_path = str(read_digits(args))
    tasks = DIGIT_DATA[1:] if args.data == "digits" else (args.data,)
    results: dict[str, list[dict[str, Any]]] = {}
    for name in heads:
        results[name] = [{} for _ in range(args.seeds)]
    titles = {}
    for task in tasks:
        own = {"data": task, "output": str(output / slug(task))}  # else each finds the other's runs
        experiment = Experiment(argparse.Namespace(**{**vars(args), **own}))
        metric_of = columns(experiment.tree)
        if len(tasks) > 1:
            (metric,) = metric_of
            metric_of = {metric: task.removeprefix("digits-")}
        for number in range(args.seeds):
            experiment.args.seed = experiment.config.seed = args.seed + number
            for name, head in heads.items():
                metrics, _ = experiment.fit(f"{name} seed {args.seed + number}", head)
                row = results[name][number]
                for metric, title in metric_of.items():
                    titles[title] = title
                    row[title] = metrics[metric]
                row["k parameters"] = metrics["head_parameters"] / 1e3
                row["seconds"] = row.get("seconds", 0.0) + metrics["seconds"]
    if not is_primary():
        return
    shown = {**titles, "k parameters": "k parameters", "seconds": "seconds"}
    print(f"\n{comparison_table(results, shown, decimals=1)}\n")
    for title in titles:
        print(f"{title}: {ahead(results, title)}")
    print(
        f"\nPercent, on the test clips (chance: 1 of the classes), {args.epochs} epochs each, "
        f"{args.seeds} seed(s) from {args.seed}, {hardware(setup_device(args.device))}, "
        f"{time.monotonic() - began:.0f} s. Files: {output}"
    )
    facts = {"command": shlex.join(["python", *sys.argv]), "results": results}
    text = json.dumps(facts, indent=2) + "\n"
    replace_file(output / "compare.json", lambda path: Path(path).write_text(text))


def ahead(results: dict[str, list[dict[str, Any]]], title: str) -> str:
    """Which head is best in a column, and which others are not measurably behind it."""
    values = {}
    for name, runs in results.items():
        values[name] = [run[title] for run in runs]
    best = max(values, key=lambda name: sum(values[name]))
    if len(values[best]) == 1:
        return f"{best} (one seed says nothing about the noise: take --seeds 3 or more)"
    near = []
    for name in values:
        if name != best and not paired_difference(values[best], values[name]).measurable:
            near.append(name)
    return f"{best}, not measurably behind it: {', '.join(near) or 'none'}"


def read_digits(args: argparse.Namespace) -> Path:
    """Train a backbone to read single digits; the file of its weights."""
    single = argparse.Namespace(**vars(args))
    single.data, single.freeze, single.cache, single.compare = "digits", None, None, None
    single.output = str(Path(args.output) / "reading_digits")
    experiment = Experiment(single, single_digits())
    experiment.config.epochs = 30
    metrics, run = experiment.fit("reading digits", PoolHead())
    print(f"the backbone reads {metrics['digit_top1']:.1f} % of single digits; it is frozen now")
    path = Path(args.output) / "backbone.safetensors"
    weights = load_model(run.model_path).backbone.state_dict()
    replace_file(path, lambda file: save_file(weights, file))
    return path


def write_results(
    experiment: Experiment, results: dict[str, dict[str, Any]], unreadable: int
) -> None:
    """All metrics with what is needed to repeat them, as `results.json`."""
    facts = {
        "command": shlex.join(["python", *sys.argv]),
        "seed": experiment.args.seed,
        "epochs": experiment.args.epochs,
        "hardware": hardware(experiment.device),
        "train_clips": len(experiment.train),
        "clips": len(experiment.test),
        "judged": experiment.evaluated_on,
        "unreadable": unreadable,
    }
    plain = {name: nan_to_null(metrics) for name, metrics in results.items()}
    text = json.dumps({**facts, "results": plain}, indent=2) + "\n"
    replace_file(experiment.output / "results.json", lambda path: Path(path).write_text(text))


def report(
    experiment: Experiment, results: dict[str, dict[str, Any]], run: FitResult, explained: str
) -> None:
    """Write report.html, with what the network with time says of each clip."""

    def answers() -> Answers:
        args = experiment.args
        task = BranchTask(load_model(run.model_path).to(experiment.device))
        loading = {"num_workers": args.workers, **reading_options(args)}
        return examine(
            task, experiment.test, args.batch_size, make_loader=create_clip_loader, **loading
        )

    write_report(
        experiment.output,
        f"CNN+{TITLES.get(experiment.args.head, experiment.args.head)} on {experiment.args.data}",
        {name: [metrics] for name, metrics in results.items()},
        columns(experiment.tree),
        explained,
        experiment.histories,
        answers=answers,
        settings=experiment.args.settings,
        data=experiment.summary,
        device=experiment.device,
        plots=experiment.args.plots,
    )


def columns(tree: Taxonomy) -> dict[str, str]:
    """Which metrics the table shows, and their titles."""
    titles = {}
    for level, num_classes in zip(tree.levels, tree.num_classes, strict=True):
        titles[f"{level}_top1"] = f"{level} ({num_classes})"
    return titles


def print_table(experiment: Experiment, results: dict[str, dict[str, Any]], seconds: float) -> str:
    """The methods' accuracy on each level, and what the numbers are, which is returned."""
    rows = {name: [metrics] for name, metrics in results.items()}
    print(f"\n{comparison_table(rows, columns(experiment.tree))}\n")
    explained = (
        f"Percent, on the {len(experiment.test)} {experiment.evaluated_on} clips, models of the "
        "best epoch on validation; chance is to name always the class that most clips have. "
        f"Seed {experiment.args.seed}, {hardware(experiment.device)}, {seconds:.0f} s."
    )
    print(f"{explained} Files: {experiment.output}")
    return explained


def with_last_frame(data: ClipDataset) -> ClipSubset:
    """The same clips, of which only the last frame is read."""
    same = ClipSubset(data, range(len(data)))
    settings = {field.name: getattr(data.sampler, field.name) for field in fields(FrameSampler)}
    same.sampler = LastFrame(**settings)
    return same


def chance(data: ClipDataset, tree: Taxonomy) -> dict[str, float]:
    """Accuracy on each level of always naming the class that most clips have."""
    accuracy = {}
    for level, labels in zip(tree.levels, data.labels.T, strict=True):
        known = labels[labels >= 0]
        accuracy[f"{level}_top1"] = float("nan")
        if len(known):
            accuracy[f"{level}_top1"] = 100 * float(known.bincount().max()) / len(known)
    return accuracy


def count_unreadable(splits: Sequence[ClipDataset]) -> int:
    """Clips that could not be read, of all splits.

    Of several processes the one that met most of them says it.
    """
    errors = sum(split.errors for split in set(splits))
    if not dist.is_initialized():
        return errors
    of_all_ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_all_ranks, errors)
    return max(of_all_ranks)


def stream(model: BranchModel, data: ClipDataset, tree: Taxonomy) -> None:
    """Print what a model says of a clip after each of its frames."""
    clip, labels = data[0]
    classes = tree.classes[-1]
    level = tree.levels[-1]
    label = int(labels[-1])
    truth = classes[label] if label >= 0 else "unknown"
    print(f"\nThe answer after each frame of a clip whose {level} is {truth}:")
    classifier = StreamingClassifier(model, probabilities=True)
    for number, probabilities in enumerate(classifier.run(clip), 1):
        probability, best = probabilities[level].max(-1)
        print(f"  frame {number}: {classes[int(best)]} {100 * float(probability):.0f} %")


if __name__ == "__main__":
    run_script(lambda: main(parse_args()))
