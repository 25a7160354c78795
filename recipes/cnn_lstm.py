r"""Train a CNN+LSTM on clips, and say what it gains over the same CNN on the last frame alone.

    # counting digits, a minute on one CPU core
    python recipes/cnn_lstm.py
    python recipes/cnn_lstm.py videos/ --model resnet50 --pretrained --frames 16 --amp
    python recipes/cnn_lstm.py clips.csv --pretrained --freeze all --cache features/ --epochs 50
    python recipes/cnn_lstm.py videos/ --model resnet101 --pretrained --freeze all --layers 3 \
        --projection 300 --hidden 128 --rnn-output frame
    torchrun --nproc-per-node 4 recipes/cnn_lstm.py videos/ --model convnext_tiny --pretrained -b 8

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
"""

import argparse
import json
import re
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
from timm.data import resolve_model_data_config

from timm_branches import (
    BranchModel,
    GRUHead,
    LSTMHead,
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
from timm_branches.features import HeadsOnly, cache_features
from timm_branches.files import replace_file
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
    add_table_arguments,
    balance_options,
    image_options,
    say_what_was_understood,
    table_options,
    weights_of_classes,
)
from timm_branches.train.compare import comparison_table
from timm_branches.train.script import hardware, new_output, run_script

# the job without arguments: a network of two convolutions on digits of 16 pixels
DIGITS = {
    "model": "conv2_24x48",
    "img_size": [16],
    "in_chans": 1,
    "mean": [0.1],
    "std": [0.1],
    "hidden_size": 64,
    "epochs": 10,
}
RING = 3  # digits to count with


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Arguments; what has no effect is refused."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "data",
        nargs="?",
        default="digits",
        help="digits (default), a folder of class folders with videos or frame folders, or a CSV",
    )
    group = parser.add_argument_group("data")
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
    group.add_argument("--strict", action="store_true", help="stop at a clip that cannot be read")
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
    group = parser.add_argument_group("model")
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
    group = parser.add_argument_group("temporal head")
    group.add_argument("--head", choices=("lstm", "gru"), default="lstm")
    group.add_argument(
        "--hidden-size", type=int, default=256, help="width of the recurrence (digits: 64)"
    )
    group.add_argument("--layers", type=int, default=1, help="recurrent layers")
    group.add_argument("--bidirectional", action="store_true", help="read clips in both directions")
    group.add_argument(
        "--rnn-output",
        choices=("clip", "frame"),
        default="clip",
        help="one answer a clip, or one a frame: each is trained, their mean is judged",
    )
    group.add_argument(
        "--readout",
        choices=("last", "mean", "max", "attention"),
        default="last",
        help="what a clip's answer is read from",
    )
    group.add_argument(
        "--pool",
        choices=("avg", "max", "avgmax", "catavgmax", "attention", "flatten"),
        default="avg",
        help="how a frame's map becomes a vector",
    )
    group.add_argument(
        "--projection", type=int, help="width of a Linear between that vector and the recurrence"
    )
    group.add_argument("--activation", help="behind the projection, by timm's name")
    group.add_argument(
        "--hidden", type=int, nargs="+", default=[], help="widths of layers before the classifier"
    )
    group = parser.add_argument_group("what is done")
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
    if parser.parse_known_args(argv)[0].data == "digits":
        parser.set_defaults(**DIGITS)
    args = parser.parse_args(argv)
    if why := without_effect(args):
        parser.error(why)
    if args.freeze_backbone:
        args.freeze = "all"
    args.freeze_backbone = args.freeze == "all"
    if args.augment is None:
        args.augment = "none" if args.data == "digits" or args.cache else "auto"
    if args.frames is None and args.data != "digits" and args.sampling != "all":
        args.frames = 16
    return args


def without_effect(args: argparse.Namespace) -> str | None:
    """What was asked for in vain, or contradicts something else, in words."""
    frozen = args.freeze == "all" or bool(args.freeze_backbone)
    if args.data == "digits":
        for name in ("taxonomy", "val_fraction", "strict"):
            if getattr(args, name):
                return (
                    f"--{name.replace('_', '-')} has no effect on the digits: give data of your own"
                )
        if args.in_chans == 3:
            return "--in-chans 3 has no effect on the digits, which are grey"
    if (
        args.freeze_backbone is not None
        and args.freeze
        and args.freeze_backbone != (args.freeze == "all")
    ):
        switch = "--freeze-backbone" if args.freeze_backbone else "--no-freeze-backbone"
        return f"--freeze {args.freeze} and {switch} contradict each other"
    if frozen and args.grad_checkpointing:
        return (
            "--grad-checkpointing has no effect with --freeze all: no gradient goes through the "
            "backbone"
        )
    if args.cache and not frozen:
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
    if (
        args.hflip
        and (args.augment or ("none" if args.cache or args.data == "digits" else "auto")) == "none"
    ):
        return "--hflip has no effect with --augment none: choose another --augment"
    if args.rnn_output == "frame" and args.readout != "last":
        return (
            f"--readout {args.readout} has no effect with --rnn-output frame, which reads every "
            "frame"
        )
    if args.stream and (args.bidirectional or args.readout != "last"):
        return "--stream goes from frame to frame: leave out --bidirectional and --readout"
    if args.resume not in ("", "auto"):
        return (
            f"--resume {args.resume}: this recipe trains several models; give --output and "
            "--resume auto"
        )
    return None


@dataclass(frozen=True)
class LastFrame(FrameSampler):
    """Of the frames that would be taken, the last."""

    def __call__(self, count: int, key: Sequence[int] = (0, 0, 0)) -> np.ndarray:
        """The last of the frames that are drawn."""
        return super().__call__(count, key)[-1:]


class Bench:
    """Data and settings that all trainings of one call share."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.config = FitConfig.from_args(args)
        self.device = setup_device(args.device)
        self.config.device = str(self.device)
        for name in ("mean", "std"):
            if (values := getattr(args, name)) and len(values) not in (1, args.in_chans):
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
        self.temporal = {"lstm": LSTMHead, "gru": GRUHead}[args.head](
            hidden_size=args.hidden_size,
            num_layers=args.layers,
            bidirectional=args.bidirectional,
            pool_type=args.pool,
            projection=args.projection,
            activation=args.activation,
            output=args.rnn_output,
            readout=args.readout,
            hidden=args.hidden,
        )
        frames: dict[str, Any] = {
            "num_frames": args.frames,
            "sampling": args.sampling,
            "stride": args.stride,
        }
        if args.data == "digits":
            self.train, self.val, self.test = counting_digits(**frames)
        else:
            fraction = 0.1 if args.val_fraction is None else args.val_fraction
            self.train, self.val, test = create_clip_splits(
                args.data,
                fraction,
                taxonomy=args.taxonomy,
                in_chans=args.in_chans,
                strict=args.strict,
                **frames,
                **table_options(args),
                **image_options(args),
            )
            self.test = self.val if test is None else test
        if args.limit is not None:
            self.train = self.train.limit(args.limit, seed=args.seed)
        if args.cache and args.views == 1:  # the same frames in every epoch: those of evaluation
            self.train.sampler = replace(self.train.sampler, is_training=False)
        self.summary = say_what_was_understood(train=self.train, val=self.val, test=self.test)
        self.judged = "validation (there is no test split)" if self.test is self.val else "test"
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
        for part in (self.train, self.val, self.test):
            try:
                part[0]
            except RuntimeError as error:  # no clip at all can be read
                raise ValueError(str(error)) from error
        self.output = new_output(args.output, args.resume)

    def make_model(self, head: LSTMHead | PoolHead) -> BranchModel:
        """A network, the same for the same seed, frozen as far as was asked for."""
        args = self.args
        torch.manual_seed(args.seed)
        size = tuple(args.img_size) * (3 - len(args.img_size)) if args.img_size else None
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
        if args.freeze:
            model.freeze(
                None
                if args.freeze == "all"
                else int(args.freeze)
                if args.freeze.isdigit()
                else args.freeze
            )
        return model

    def fit(
        self, name: str, head: LSTMHead | PoolHead, last_frame: bool = False
    ) -> tuple[dict[str, Any], FitResult]:
        """Train, and judge the model of the best epoch on validation: its metrics."""
        args = self.args
        parts = [
            with_last_frame(part) if last_frame else part
            for part in (self.train, self.val, self.test)
        ]
        model = self.make_model(head)
        cfg = resolve_model_data_config(
            model, {k: v for k in ("mean", "std") if (v := getattr(args, k))}
        )
        look = {k: cfg[k] for k in ("input_size", "mean", "std", "interpolation")}
        crop: dict[str, Any] = {
            "crop_pct": 1.0 if max(cfg["input_size"][-2:]) <= 64 else cfg["crop_pct"],
            "crop_mode": "center",
        }
        augmented = args.augment != "none"
        parts[0].transform = (
            create_transform(**look, is_training=True, augment=args.augment, hflip=args.hflip)
            if augmented
            else create_transform(**look, **crop)
        )
        parts[1].transform = parts[2].transform = create_transform(**look, **crop)
        model.pretrained_cfg.update(mean=tuple(look["mean"]), std=tuple(look["std"]), **crop)
        model.pretrained_cfg.update(image_options(args))
        model.data_summary = self.summary.to_dict()
        loading = {"num_workers": args.workers}
        if args.cache:
            places = [Path(args.cache) / slug(name) / what for what in ("train", "val")]
            features = [
                cache_features(
                    model, part, place, views=views, batch_size=args.batch_size, **loading
                )
                for part, place, views in zip(parts[:2], places, (args.views, 1), strict=True)
            ]
            train, val = (
                create_loader(
                    part,
                    args.batch_size,
                    is_training=first,
                    seed=args.seed,
                    collate_fn=collate_clips,
                    **(self.balance if first else {}),
                    **loading,
                )
                for part, first in zip(features, (True, False), strict=True)
            )
            model = HeadsOnly(model)
        else:
            loading["pin_memory"] = self.device.type == "cuda"
            train = create_clip_loader(
                parts[0],
                args.batch_size,
                is_training=True,
                seed=args.seed,
                **self.balance,
                **loading,
            )
            val = create_clip_loader(parts[1], args.batch_size, **loading)
        if is_primary():
            parameters = sum(p.numel() for p in model.parameters()) / 1e6
            print(
                f"\n{name}: {args.model}, {parameters:.2f} M parameters, {len(parts[0])} clips to "
                "train on, "
                f"{len(parts[1])} to validate",
                flush=True,
            )
        run = fit(
            BranchTask(model, class_weights=self.class_weights),
            train,
            val,
            replace(self.config, output=str(self.output / slug(name))),
            facts={"data": str(args.data), "seed": args.seed},
        )
        best = load_model(run.model_path).to(self.device)
        best.frames_per_pass = args.frames_per_pass
        found = evaluate(
            BranchTask(best),
            create_clip_loader(parts[2], args.batch_size, num_workers=args.workers),
        )
        return {
            **found.metrics,
            "best_epoch": run.best_epoch,
            "seconds": round(run.seconds, 1),
        }, run


def main(args: argparse.Namespace) -> None:
    """Both networks, their table and files."""
    began = time.monotonic()
    bench = Bench(args)
    name = f"CNN+{args.head.upper()}"
    found, run = bench.fit(name, bench.temporal)
    results = {name: found}
    if args.baseline:
        pool = args.pool if args.pool in ("avg", "max", "avgmax", "catavgmax") else "avg"
        results["last frame alone"], _ = bench.fit(
            "last frame alone", PoolHead(tuple(args.hidden), pool), True
        )
    unreadable = count_unreadable((bench.train, bench.val, bench.test))
    if not is_primary():
        return
    results["chance"] = chance(bench.test, bench.tree)
    # JSON knows no NaN: what could not be measured is null
    plain = {
        name: {k: None if v != v else v for k, v in found.items()}
        for name, found in results.items()
    }
    facts = {
        "command": shlex.join(["python", *sys.argv]),
        "seed": args.seed,
        "epochs": args.epochs,
        "hardware": hardware(bench.device),
        "train_clips": len(bench.train),
        "clips": len(bench.test),
        "judged": bench.judged,
        "unreadable": unreadable,
    }
    text = json.dumps({**facts, "results": plain}, indent=2) + "\n"
    replace_file(bench.output / "results.json", lambda path: Path(path).write_text(text))
    columns = {
        f"{level}_top1": f"{level} ({k})"
        for level, k in zip(bench.tree.levels, bench.tree.num_classes, strict=True)
    }
    print(f"\n{comparison_table({name: [found] for name, found in results.items()}, columns)}\n")
    print(
        f"Percent, on the {len(bench.test)} {bench.judged} clips, models of the best epoch on "
        "validation; chance "
        f"is to name always the class that most clips have. Seed {args.seed}, {facts['hardware']}, "
        f"{time.monotonic() - began:.0f} s. Files: {bench.output}"
    )
    if args.data != "digits":
        print(
            f"{unreadable} clips could not be read"
            + ("; others took their places." if unreadable else ".")
        )
    if args.stream:
        stream(load_model(run.model_path).to(bench.device), bench.test, bench.tree)


def counting_digits(seed: int = 0, **frames: Any) -> tuple[ClipDataset, ClipDataset, ClipDataset]:
    """Clips of digits that count up or down on a ring, see above.

    Training, validation and test share no picture.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    rng = np.random.default_rng(seed)
    pictures = np.kron(digits.images, np.ones((2, 2))).astype(np.uint8) * 15  # 16 x 16 pixels
    tree = Taxonomy([("up",), ("down",)], ["order"])
    sampler = FrameSampler(**frames)
    by_digit = [rng.permutation(np.flatnonzero(digits.target == digit)) for digit in range(RING)]
    parts: list[ClipDataset] = []
    for pairs, start, end in ((500, 0.0, 0.6), (100, 0.6, 0.75), (300, 0.75, 1.0)):
        pool = [own[int(start * len(own)) : int(end * len(own))] for own in by_digit]
        clips, labels = [], []
        for _ in range(pairs):
            count, last = rng.integers(3, 7), rng.integers(RING)
            shared = rng.choice(pool[last])
            for label, step in enumerate((1, -1)):
                before = [
                    rng.choice(pool[(last - step * back) % RING])
                    for back in range(count - 1, 0, -1)
                ]
                clips.append(pictures[[*before, shared]])
                labels.append([label])
        training = sampler if parts else replace(sampler, is_training=True)
        parts.append(ClipDataset(clips, labels, tree, in_chans=1, sampler=training))
    return parts[0], parts[1], parts[2]


def with_last_frame(data: ClipDataset) -> ClipSubset:
    """The same clips, of which only the last frame is read."""
    part = ClipSubset(data, range(len(data)))
    part.sampler = LastFrame(
        **{f.name: getattr(data.sampler, f.name) for f in fields(FrameSampler)}
    )
    return part


def chance(data: ClipDataset, tree: Taxonomy) -> dict[str, float]:
    """Accuracy on each level of always naming the class that most clips have."""
    found = {}
    for name, labels in zip(tree.levels, data.labels.T, strict=True):
        known = labels[labels >= 0]
        found[f"{name}_top1"] = (
            100 * float(known.bincount().max()) / len(known) if len(known) else float("nan")
        )
    return found


def count_unreadable(parts: Sequence[ClipDataset]) -> int:
    """Clips that could not be read, of all parts.

    Of several processes the one that met most of them says it.
    """
    found: list[Any] = [sum(part.errors for part in set(parts))]
    if dist.is_initialized():
        mine, found = found[0], [None] * dist.get_world_size()
        dist.all_gather_object(found, mine)
    return max(found)


def stream(model: BranchModel, data: ClipDataset, tree: Taxonomy) -> None:
    """Print what a model says of a clip after each of its frames."""
    clip, labels = data[0]
    classes, level = tree.classes[-1], tree.num_levels - 1
    truth = classes[int(labels[level])] if labels[level] >= 0 else "unknown"
    print(f"\nThe answer after each frame of a clip whose {tree.levels[level]} is {truth}:")
    for number, answer in enumerate(StreamingClassifier(model, probabilities=True).run(clip), 1):
        share, best = answer[tree.levels[level]].max(-1)
        print(f"  frame {number}: {classes[int(best)]} {100 * float(share):.0f} %")


def slug(name: str) -> str:
    """A folder's name of a method's."""
    return "_".join(re.findall(r"\w+", name.lower()))


if __name__ == "__main__":
    run_script(lambda: main(parse_args()))
