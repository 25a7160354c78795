r"""Train a U-Net or RED-Net on any timm backbone to label every pixel.

Beside it stands what a pixel's colour and place tell alone.

    # a scene inside scikit-image, some three minutes of a CPU
    python recipes/segment.py
    python recipes/segment.py camvid/ --classes 11 --ignore-index 11 --model resnet34 --pretrained
    python recipes/segment.py --images photos/ --masks labels/ --classes names.txt --input-skip
    # a map of each level, beside a flat one
    python recipes/segment.py camvid/ --taxonomy tree.csv --ignore-index 11
    python recipes/segment.py camvid/ --classes names.txt --ignore-index 11 \
        --deep-supervision --loss ce+dice
    torchrun --nproc-per-node 4 recipes/segment.py camvid/ --classes 11 --ignore-index 11 -b 8
    # beside segmentation_models_pytorch
    python recipes/segment.py camvid/ --classes 11 --ignore-index 11 --smp

A data folder holds train/ and trainannot/ (masks, named as their images), val/ and valannot/, and
test/ and testannot/ if there are any. With a test split the best epoch on validation is judged on
test. Without, the last epoch is judged on validation: an epoch that was chosen there would flatter
itself.
"""

import argparse
import json
import math
import shlex
import sys
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.data import resolve_model_data_config
from timm.optim import create_optimizer_v2
from timm.task import evaluation_sample_limit
from torch.utils.data import Subset

from timm_branches import (
    BranchModel,
    create_branch_model,
    list_taps,
    load_model,
)
from timm_branches.data import PairTransform, SegmentationDataset, create_loader
from timm_branches.dense import (
    PixelBaseline,
    SegmentationEvaluator,
    get_dense_loss,
    median_frequency_weights,
    package_segmentation,
    tiled_inference,
)
from timm_branches.figures import new_figure, save_figure
from timm_branches.files import replace_file
from timm_branches.heads import HEADS
from timm_branches.task import DenseTask
from timm_branches.taxonomy import Taxonomy, get_taxonomy
from timm_branches.train import (
    FitConfig,
    add_fit_arguments,
    fit,
    is_primary,
    setup_device,
    try_evaluation,
)
from timm_branches.train.arguments import (
    add_image_arguments,
    add_model_arguments,
    add_reading_arguments,
    image_options,
    reading_options,
    say_what_was_understood,
    try_images,
)
from timm_branches.train.compare import comparison_table
from timm_branches.train.lr import create_scheduler
from timm_branches.train.process import seed_everything
from timm_branches.train.recipe_parser import RecipeParser
from timm_branches.train.report import write_report
from timm_branches.train.script import hardware, new_output, run_script, slug

# what the comparison with segmentation_models_pytorch leaves out: it has no such thing, or its loop
# here has not
NOT_IN_SMP = (
    "attention",
    "deep_supervision",
    "input_skip",
    "resume",
    "layer_decay",
    "grad_accum_steps",
    "clip_grad",
    "torchcompile",
    "grad_checkpointing",
    "freeze_backbone",
    "sync_bn",
    "model_ema",
)


# -- arguments


# the decoders, as a table calls them
TITLES = {
    "unet": "U-Net",
    "rednet": "RED-Net",
    "lean": "lean decoder",
    "linear": "linear",
    "fpn": "FPN",
    "segformer": "SegFormer",
    "upernet": "UPerNet",
    "dpt": "DPT",
}
# the flags of its own that --help shows
COMMON = ("images", "masks", "classes", "ignore_index", "taxonomy", "crop", "head", "loss", "tile")


def make_parser() -> RecipeParser:
    """The arguments, with the defaults of own data."""
    parser = RecipeParser(__doc__, COMMON)
    parser.add_argument(
        "data",
        nargs="?",
        help="folder with train/, trainannot/, val/, valannot/ (default: the motorcycle scene "
        "inside scikit-image)",
    )
    data = parser.add_argument_group("data")
    add_mask_arguments(data)
    add_image_arguments(data)
    add_reading_arguments(data)
    add_loading_arguments(data)
    add_network_arguments(parser.add_argument_group("model"))
    add_fit_arguments(parser)
    parser.set_defaults(
        output="output/segment", opt="adamw", lr=1e-3, weight_decay=1e-2, epochs=40, warmup_epochs=1
    )
    return parser


def add_mask_arguments(group: argparse._ArgumentGroup) -> None:
    """Where images and masks lie, and what the masks' values mean."""
    add = group.add_argument
    add("--images", help="a folder of images, instead of a data folder")
    add(
        "--masks",
        help="the folder of their masks: palette or grey, values are class indices, or what "
        "--mask-colors says",
    )
    add("--val-fraction", type=float, help="of --images set aside and judged (default: 0.2)")
    add("--classes", help="how many there are, or a text file with a name a line")
    add("--ignore-index", type=int, help="the masks' value for unlabelled pixels, such as 255")
    add(
        "--mask-colors",
        metavar="FILE",
        help="colours or values of the classes, a line each: '128 64 128 road', '255 object'",
    )
    add("--mask-suffix", default="", help="what the masks' names end with: _mask")
    add("--image-suffix", default="", help="what the images' names end with")
    add("--reduce-zero-label", action="store_true", help="0 is unlabelled, as in ADE20K")
    add(
        "--taxonomy",
        help="a tree of the classes (.csv, .json): its coarser levels are reported, too",
    )


def add_loading_arguments(group: argparse._ArgumentGroup) -> None:
    """Sizes, augmentation and batches."""
    add = group.add_argument
    add(
        "--resize",
        type=int,
        nargs=2,
        metavar=("H", "W"),
        help="bring images and masks to this size",
    )
    add(
        "--crop",
        type=int,
        nargs="+",
        help="side, or height and width, of training crops (default: 256, without data 224 128)",
    )
    add(
        "--scale",
        type=float,
        nargs=2,
        default=(0.75, 1.5),
        metavar=("LOW", "HIGH"),
        help="range of a random factor before the crop (default: 0.75 1.5)",
    )
    add("--hflip", type=float, default=0.5, help="chance of a flip")
    add(
        "--color-jitter",
        type=float,
        default=0.0,
        help="strength of changes in brightness, contrast and saturation (default: 0, without "
        "data 0.4)",
    )
    add("--repeats", type=int, help="crops of each image an epoch (default: 1, without data 32)")
    add(
        "-b",
        "--batch-size",
        type=int,
        default=8,
        help="batch size of one process (default: 8, without data 4)",
    )
    add("-j", "--workers", type=int, default=0, help="worker processes that load data")


def add_network_arguments(group: argparse._ArgumentGroup) -> None:
    """The network, its loss, and how it is evaluated."""
    add_model_arguments(group, "resnet18")
    add = group.add_argument
    add(
        "--taps",
        nargs="+",
        help="maps that the decoder reads (default: all stages, those of stride 4 and more without "
        "skips; 2 to 5 of a ViT)",
    )
    add("--head", choices=tuple(TITLES), default="unet")
    add(
        "--channels",
        type=int,
        nargs="+",
        help="width of the decoder; of a U-Net or RED-Net of each stage, from the deepest on",
    )
    add("--attention", action="store_true", help="attention gates on the skips (Oktay et al. 2018)")
    add("--input-skip", action="store_true", help="one more skip, from the image itself")
    add("--deep-supervision", action="store_true", help="a loss at each stage (Lee et al. 2014)")
    add(
        "--loss",
        default="ce",
        help="ce (default), dice, focal, ohem, lovasz, boundary, or a sum such as ce+lovasz",
    )
    add(
        "--class-weights",
        nargs="+",
        help="of cross-entropy: a number a class, or 'auto' for median frequency balancing "
        "(Eigen and Fergus 2015)",
    )
    add("--tile", type=int, help="judge in overlapping tiles of this side: for large images")
    add(
        "--smp",
        action="store_true",
        help="also train segmentation_models_pytorch's Unet: same encoder and its first weights, "
        "data, schedule and seed",
    )


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Arguments; without data those of the small job."""
    parser = make_parser()
    given = parser.parse_known_args(argv)[0]
    small = not (given.data or given.images or given.masks)
    if small:
        parser.set_defaults(model="resnet10t", epochs=6, repeats=32, batch_size=4, color_jitter=0.4)
    args = parser.parse_args(argv)
    if args.repeats is None:
        args.repeats = 1
    if args.crop is None:
        args.crop = [224, 128] if small else [256]
    own_network = args.model != "resnet10t" or args.head != "unet" or args.taps
    if small and args.channels is None and not own_network:
        args.channels = [64, 48, 32, 24, 16]  # quick, and enough for one scene
    complaint = args_complaint(args, small)
    if args.smp and complaint is None:
        complaint = smp_complaint(args, parser)
    if complaint:
        parser.error(complaint)
    return args


def args_complaint(args: argparse.Namespace, small: bool) -> str | None:
    """What does not go together, or None."""
    if bool(args.images) != bool(args.masks) or (args.data and args.images):
        return "give a data folder, or --images and --masks together"
    if args.val_fraction is not None and not args.images:
        return "--val-fraction has no effect without --images: other data have their splits"
    if small:
        for name in ("classes", "ignore_index", "taxonomy", "resize"):
            if getattr(args, name) is not None:
                return f"{flag(name)} has no effect without own data"
    options = HEADS[args.head].__dataclass_fields__
    for name in ("channels", "attention", "input_skip", "deep_supervision"):
        if getattr(args, name) and name not in options:
            return f"{flag(name)} has no effect on --head {args.head}"
    if args.channels and len(args.channels) > 1 and "upsample" not in options:
        return f"--channels takes one width for --head {args.head}, got {len(args.channels)}"
    if len(args.crop) > 2:
        return "--crop takes one side, or height and width"
    try:
        get_dense_loss(args.loss, **({"class_weights": None} if args.class_weights else {}))
    except ValueError as error:
        if "has no setting" in str(error):
            return f"--class-weights has no effect with --loss {args.loss}"
        return f"--loss {args.loss}: {error}"
    return None


def smp_complaint(args: argparse.Namespace, parser: argparse.ArgumentParser) -> str | None:
    """What the comparison with segmentation_models_pytorch cannot have, or None."""
    if args.head != "unet":
        return f"--smp compares U-Nets: leave out --head {args.head}"
    for name in NOT_IN_SMP:
        if getattr(args, name) != parser.get_default(name):
            return f"{flag(name)} has no part in the comparison with --smp: leave one out"
    if args.amp and args.amp_dtype != "bfloat16":
        return "--amp-dtype float16 has no part in the comparison with --smp: leave one out"
    return None


def flag(name: str) -> str:
    """An argument as it is written on the command line."""
    return f"--{name.replace('_', '-')}"


# -- data


class Splits(NamedTuple):
    """The data sets of one job; there may be no test split."""

    train: Any
    val: Any
    test: Any
    # the training images as they are: whole, each once
    plain: Any

    @property
    def evaluated(self) -> list[Any]:
        """Those that are evaluated."""
        return [data for data in (self.val, self.test) if data is not None]


def read_data(args: argparse.Namespace) -> Splits:
    """Training, validation and test data."""
    if args.images:
        return read_one_folder(args)
    if not args.data:
        plain, *_ = package_segmentation()
        return Splits(*package_segmentation(args.repeats), plain)
    root = Path(args.data)
    classes = read_classes(args)
    plain = read_pairs(args, root / "train", root / "trainannot", classes)
    val = read_pairs(args, root / "val", root / "valannot", classes)
    test: SegmentationDataset | None = None
    if (root / "test").is_dir():
        test = read_pairs(args, root / "test", root / "testannot", classes)
    return Splits(plain.repeated(args.repeats), val, test, plain)


def read_one_folder(args: argparse.Namespace) -> Splits:
    """The images of --images, of which a share is set aside."""
    data = read_pairs(args, Path(args.images), Path(args.masks), read_classes(args))
    fraction = 0.2 if args.val_fraction is None else args.val_fraction
    count = round(fraction * len(data))
    if not 0 < count < len(data):
        raise ValueError(
            f"--val-fraction {fraction} of {len(data)} images leaves nothing on one side."
        )
    # the same images whatever the seed of the training
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0)).tolist()
    val_indices, train_indices = sorted(order[:count]), sorted(order[count:])
    repeated_indices: list[int] = []
    for index in train_indices:
        first = index * args.repeats
        repeated_indices += range(first, first + args.repeats)
    train = Subset(data.repeated(args.repeats), repeated_indices)
    return Splits(train, Subset(data, val_indices), None, Subset(data, train_indices))


def read_classes(args: argparse.Namespace) -> int | list[str] | Taxonomy:
    """Number, names or tree of the classes."""
    tree = get_taxonomy(args.taxonomy) if args.taxonomy else None
    if args.classes is None:
        if tree is None:
            raise ValueError(
                "--classes is missing: how many classes the masks have, or a file with a name a "
                "line."
            )
        return tree
    if not args.classes.isdigit():
        lines = Path(args.classes).read_text().splitlines()
        names = [line.strip() for line in lines if line.strip()]
        return names if tree is None else tree.reorder(names)
    if tree is None:
        return int(args.classes)
    if tree.num_leaves != int(args.classes):
        raise ValueError(
            f"--classes {args.classes}: {args.taxonomy} has {tree.num_leaves} classes."
        )
    return tree


def read_pairs(
    args: argparse.Namespace, images: Path, masks: Path, classes: Any
) -> SegmentationDataset:
    """Images and masks of two folders; with --resize, made smaller one after the other."""
    for folder in (images, masks):
        if not folder.is_dir():
            raise ValueError(f"There is no folder {folder}.")
    data = SegmentationDataset(
        str(images),
        str(masks),
        classes,
        args.ignore_index,
        mask_colors=args.mask_colors,
        mask_suffix=args.mask_suffix,
        image_suffix=args.image_suffix,
        reduce_zero_label=args.reduce_zero_label,
        **image_options(args),
    )
    if not args.resize:
        return data
    import cv2

    height, width = args.resize
    small_images, small_masks = [], []
    for index in range(len(data)):
        image, mask = data.pixels(index)  # only one photograph is in memory at its full size
        small_images.append(cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA))
        small_masks.append(
            cv2.resize(
                mask.astype(np.int16), (width, height), interpolation=cv2.INTER_NEAREST_EXACT
            )
        )
    return SegmentationDataset(small_images, small_masks, classes)


def dataset_of(data: Any) -> SegmentationDataset:
    """The data set behind a subset, or itself."""
    return getattr(data, "dataset", data)


def class_weights(
    args: argparse.Namespace, data: Any, num_classes: int, tree: Taxonomy | None
) -> dict[str, torch.Tensor]:
    """The weights of the loss, if they are asked for.

    Of the classes as given, or by frequency; also of each level.
    """
    if args.class_weights is None:
        return {}
    if args.class_weights == ["auto"]:
        return frequency_weights(data, num_classes, tree)
    if tree is not None:
        raise ValueError(
            "--class-weights with --taxonomy: write auto, which weighs the classes of every level."
        )
    try:
        weights = torch.tensor([float(text) for text in args.class_weights])
    except ValueError:
        raise ValueError(
            f"--class-weights {' '.join(args.class_weights)}: write auto or numbers."
        ) from None
    if len(weights) != num_classes:
        raise ValueError(f"--class-weights has {len(weights)} numbers for {num_classes} classes.")
    return {"mask": weights}


def frequency_weights(
    data: Any, num_classes: int, tree: Taxonomy | None
) -> dict[str, torch.Tensor]:
    """Median frequency balancing of the classes, and of those of each level."""
    masks = [data[i][1] for i in range(len(data))]  # (H, W) each
    weights = {"mask": median_frequency_weights(masks, num_classes)}
    if tree is not None:
        labels = [tree.expand(mask) for mask in masks]  # (H, W, levels) each
        for i, level in enumerate(tree.levels):
            of_level = [label[..., i] for label in labels]
            weights[level] = median_frequency_weights(of_level, tree.num_classes[i])
    return weights


# -- model and task


def make_model(args: argparse.Namespace, num_classes: int, tree: Taxonomy | None) -> BranchModel:
    """A timm backbone and the decoder on all its stages, or on the taps asked for.

    With a tree it gives all levels.
    """
    torch.manual_seed(args.seed)
    head_class = HEADS[args.head]
    options: dict[str, Any] = {}
    for name in ("channels", "attention", "input_skip", "deep_supervision"):
        if getattr(args, name):
            options[name] = getattr(args, name)
    if args.channels and "upsample" not in head_class.__dataclass_fields__:
        (options["channels"],) = args.channels
    head = head_class(**options)
    return create_branch_model(
        args.model,
        taps=[tuple(args.taps or default_taps(args.model, args.head))],
        head=[head],
        names=["mask"],
        taxonomy=tree,
        num_classes=num_classes if tree is None else None,
        pretrained=args.pretrained,
        checkpoint_path=args.checkpoint_path,
        img_size=(args.crop[0], args.crop[-1]),
    )


def default_taps(model_name: str, head: str) -> list[int]:
    """All stages, of stride 4 and more for a decoder that answers at its finest map.

    Of a backbone whose maps have one size all but the first.
    """
    rows = list(list_taps(model_name))
    if len({row.stride for row in rows}) == 1:
        return [row.stage for row in rows if row.stage >= 2]
    finest = 1 if head in ("unet", "rednet") else min(4, rows[-1].stride)
    return [row.stage for row in rows if row.stride >= finest]


class SegmentTask(DenseTask):
    """A dense task that can answer in tiles."""

    tile: int | None = None

    def answer(self, model: torch.nn.Module, input: Any) -> dict[str, torch.Tensor]:
        """The model's answer, in tiles where a side was given."""
        return in_tiles(model, self.tile)(input)


def in_tiles(predict: Callable, tile: int | None) -> Callable:
    """The same function of images, put together from overlapping tiles where a side is given."""
    if tile is None:
        return predict
    return partial(tiled_inference, predict, tile=tile, overlap=tile // 4)


# -- segmentation_models_pytorch


def make_smp(
    args: argparse.Namespace, first: dict[str, torch.Tensor], num_classes: int
) -> torch.nn.Module:
    """segmentation_models_pytorch's Unet.

    Its encoder starts from the weights `first` of the backbone.
    """
    try:
        import segmentation_models_pytorch as smp
    except ImportError:
        raise ImportError(
            "--smp needs segmentation_models_pytorch: pip install segmentation-models-pytorch."
        ) from None
    torch.manual_seed(args.seed)
    widths = {"decoder_channels": tuple(args.channels)} if args.channels else {}
    unet = smp.Unet(f"tu-{args.model}", encoder_weights=None, classes=num_classes, **widths)
    missing = unet.encoder.model.load_state_dict(first, strict=False).missing_keys
    if missing:
        raise ValueError(
            f"--smp: its encoder has tensors that the tapped backbone lacks, such as {missing[0]}."
        )
    return unet


def train_smp(unet: torch.nn.Module, config: FitConfig, loader: Any, loss_fn: Callable) -> float:
    """Train it on the same batches in a loop of its own, a check of `fit` as well.

    The seconds that it took.
    """
    began = time.monotonic()
    device = torch.device(config.device)
    layout = torch.channels_last if config.channels_last else torch.preserve_format
    unet.to(device).to(memory_format=layout)
    optimizer = create_optimizer_v2(
        unet,
        opt=config.opt,
        lr=config.lr_at().get(0, config.lr),
        weight_decay=config.weight_decay,
        momentum=config.momentum,
    )
    scheduler = create_scheduler(optimizer, config, len(loader))
    for epoch in range(config.epochs):
        seed_everything(config.seed, epoch, 0)
        loader.set_epoch(epoch)
        if scheduler:
            scheduler.step(epoch)
        unet.train()
        total = 0.0
        for index, (images, masks) in enumerate(loader, start=1):
            images = images.to(device, memory_format=layout)
            with torch.autocast(device.type, torch.bfloat16, enabled=config.amp):
                loss = loss_fn(unet(images), masks.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()
            if scheduler:
                scheduler.step_update(epoch * len(loader) + index)
        if config.progress:
            mean = total / len(loader)
            print(f"smp epoch {epoch + 1}/{config.epochs}  loss {mean:.4f}", flush=True)
    unet.eval()
    return time.monotonic() - began


def smp_answer(unet: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Its logits; it takes multiples of 32 only, so images are continued and the answer is cut."""
    height, width = images.shape[2:]
    padded = F.pad(images, (0, -width % 32, 0, -height % 32), mode="replicate")
    return unet(padded)[..., :height, :width]


# -- the job


class Experiment:
    """Data, networks and baselines of one job, checked before anything is trained.

    Raises:
        ValueError: The data cannot be read, or the network cannot be evaluated on them.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.config = FitConfig.from_args(args)
        self.device = setup_device(args.device)
        self.config.device = str(self.device)
        if args.smp and dist.is_initialized():
            raise ValueError("--smp trains in one process: leave torchrun out.")
        if args.tile is not None and args.tile < 32:
            raise ValueError(
                f"--tile must be at least 32, backbones' usual stride, got {args.tile}."
            )
        self.data = read_data(args)
        self.classes = dataset_of(self.data.plain).classes
        self.tree = dataset_of(self.data.plain).taxonomy
        self.models = self.make_models()
        self.set_transforms()
        self.describe_data()
        self.tasks = self.make_tasks()
        # before the training, so that what cannot work fails at once
        self.baselines = {
            "colour alone": PixelBaseline(self.data.plain, len(self.classes), height=False),
            "colour and height": PixelBaseline(self.data.plain, len(self.classes), height=True),
        }
        for data in self.data.evaluated:
            for task in self.tasks.values():
                try_evaluation(task, create_loader(data, 1))
        self.unet: torch.nn.Module | None = None
        if args.smp:
            first = self.flat_model.backbone.state_dict()
            self.unet = make_smp(args, first, len(self.classes))
        # images of different sizes do not stack
        self.eval_batch = args.batch_size if args.resize else 1
        # without a test split no epoch is chosen; smp's Unet has none to choose from
        self.last_epoch = self.data.test is None or args.smp
        self.output = new_output(args.output, args.resume)
        RecipeParser.write(args, self.output)
        # by the name of a method
        self.seconds: dict[str, float] = {}
        self.epochs: dict[str, int] = {}
        self.methods: dict[str, Callable] = {}
        # for the report: every training's log
        self.histories: dict[str, list[dict]] = {}

    def make_models(self) -> dict[str, BranchModel]:
        """The network; on a tree of several levels also the same network on the leaves alone.

        A hierarchy is worth having only where it beats the flat network, summed upwards.
        """
        title = f"{TITLES[self.args.head]}, {self.args.model}"
        flat = make_model(self.args, len(self.classes), None)
        if self.tree is None or self.tree.num_levels < 2:
            return {title: flat}
        hierarchical = make_model(self.args, len(self.classes), self.tree)
        return {f"{title}, all levels": hierarchical, f"{title}, flat": flat}

    @property
    def flat_model(self) -> BranchModel:
        """The network of the leaves alone."""
        return list(self.models.values())[-1]

    @property
    def flat_task(self) -> SegmentTask:
        """Its task."""
        return list(self.tasks.values())[-1]

    def set_transforms(self) -> None:
        """Crops and changes for training, whole images for the rest."""
        args = self.args
        cfg = resolve_model_data_config(self.flat_model)
        statistics = {"mean": cfg["mean"], "std": cfg["std"]}
        for data in (self.data.plain, *self.data.evaluated):
            dataset_of(data).transform = PairTransform(**statistics)
        crop = (args.crop[0], args.crop[-1])
        dataset_of(self.data.train).transform = PairTransform(
            crop, tuple(args.scale), args.hflip, args.color_jitter, **statistics
        )

    def describe_data(self) -> None:
        """Say how the data were understood, and keep it in the models' files."""
        data = self.data
        try_images(self.args, train=data.plain, val=data.val, test=data.test)
        summary = say_what_was_understood(train=data.train, val=data.val, test=data.test)
        plain = dataset_of(data.plain)
        absent = plain.absent_classes(plain.count_pixels())
        if absent:
            summary.warnings.append(absent)
            say(f"warning: {absent}")
        self.summary = summary
        for model in self.models.values():
            model.data_summary = summary.to_dict()
            model.pretrained_cfg.update(image_options(self.args))

    def make_tasks(self) -> dict[str, SegmentTask]:
        """The loss of each model's mask, or of its masks of all levels."""
        weights = class_weights(self.args, self.data.plain, len(self.classes), self.tree)
        evaluator = partial(SegmentationEvaluator, self.classes, taxonomy=self.tree)
        tasks = {}
        for name, model in self.models.items():
            settings: dict[str, Any] = {}
            if weights and model.taxonomy:
                settings["class_weights"] = {
                    level: weights[level].to(self.device) for level in model.taxonomy.levels
                }
            elif weights:
                settings["class_weights"] = weights["mask"].to(self.device)
            task = SegmentTask(model, self.args.loss, evaluator, device=self.device, **settings)
            task.tile = self.args.tile
            tasks[name] = task
        return tasks

    def train_loader(self) -> Any:
        """Batches of crops; the same again each time."""
        return create_loader(
            self.data.train,
            self.args.batch_size,
            is_training=True,
            num_workers=self.args.workers,
            seed=self.config.seed,
            pin_memory=self.device.type == "cuda",
            **reading_options(self.args),
        )

    def val_loader(self) -> Any:
        """Validation images by which an epoch is chosen, if one is."""
        if self.last_epoch:
            return None
        return self.eval_loader(self.data.val)

    def eval_loader(self, data: Any) -> Any:
        """Whole images in their order."""
        args = self.args
        return create_loader(
            data, self.eval_batch, num_workers=args.workers, **reading_options(args)
        )

    def train(self) -> None:
        """Train the networks, one after the other."""
        for name, model in self.models.items():
            say(
                f"{name}: {count_parameters(model):.2f} M parameters, {len(self.data.train)} crops "
                f"an epoch of {len(self.data.plain)} images, {len(self.classes)} classes"
            )
            output = self.output
            if len(self.models) > 1:
                output = output / slug(name.rpartition(", ")[2])
            source = self.args.data or self.args.images or "motorcycle"
            run = fit(
                self.tasks[name],
                self.train_loader(),
                self.val_loader(),
                replace(self.config, output=str(output)),
                facts={"data": str(source), "classes": list(self.classes)},
            )
            best = load_model(run.model_path).to(self.device).eval()
            self.histories[name] = run.history
            self.seconds[name] = run.seconds
            self.epochs[name] = run.best_epoch
            self.methods[name] = partial(self.tasks[name].answer, best)
        if self.unet is not None:
            say(f"smp Unet: {count_parameters(self.unet):.2f} M parameters")
            loss_fn = self.flat_task.losses["mask"]
            self.seconds["smp Unet"] = train_smp(
                self.unet, self.config, self.train_loader(), loss_fn
            )
            predict = partial(smp_answer, self.unet)
            self.methods["smp Unet"] = in_tiles(predict, self.args.tile)
        self.methods |= self.baselines

    @torch.no_grad()
    def evaluate(self, predict: Callable, data: Any) -> dict[str, float]:
        """Metrics over the images of all processes, by the name of their row in the table."""
        loader = self.eval_loader(data)
        evaluator: SegmentationEvaluator = self.flat_task.evaluator(
            device=self.device, max_samples=evaluation_sample_limit(loader)
        )
        for images, masks in loader:
            evaluator.update(predict(images.to(self.device)), masks.to(self.device))
        return table_rows(evaluator, distributed=dist.is_initialized())


def table_rows(evaluator: SegmentationEvaluator, distributed: bool) -> dict[str, float]:
    """What the table shows of an evaluator's metrics."""
    metrics = evaluator.compute(distributed=distributed)
    if evaluator.taxonomy is None:
        rows = {"mIoU": metrics["miou"], "pixel accuracy": metrics["pixel_accuracy"]}
    else:
        rows = {f"{level} mIoU": metrics[f"{level}_miou"] for level in evaluator.levels}
        for level in evaluator.levels:
            rows[f"{level} pixel accuracy"] = metrics[f"{level}_top1"]
        rows["full path"] = metrics["full_path"]
        rows["consistency"] = metrics["consistency"]
    for level, ious in evaluator.class_iou().items():
        prefix = "" if evaluator.taxonomy is None else f"{level} "
        for name, iou in ious.items():
            rows[f"{prefix}IoU {name}"] = iou
    # a class that is nowhere has no IoU
    return {name: value for name, value in rows.items() if not math.isnan(value)}


def say(text: str) -> None:
    """Print a line, of the first process alone."""
    if is_primary():
        print(text, flush=True)


def count_parameters(model: torch.nn.Module) -> float:
    """In millions."""
    return sum(parameter.numel() for parameter in model.parameters()) / 1e6


@torch.no_grad()
def draw(
    path: Path,
    methods: Mapping[str, Callable],
    data: Any,
    classes: Sequence[str],
    device: torch.device,
) -> None:
    """Up to three images beside their labels and what each method says, as PNG."""
    from matplotlib import colormaps
    from matplotlib.patches import Patch

    count = min(3, len(data))
    last = max(1, count - 1)
    samples = [data[i * (len(data) - 1) // last] for i in range(count)]
    palette = colormaps["tab20" if len(classes) > 10 else "tab10"]
    colours = np.array(palette.colors)  # type: ignore[attr-defined]
    colours = colours[np.arange(len(classes)) % len(colours)]  # (classes, 3)

    titles = ["image", "labels (white: none)"]
    titles += [textwrap.fill(name, 20) for name in methods]
    # in inches: panels as wide and high as the images, so that no area is left over
    sides = [image.shape[1] / image.shape[2] for image, _ in samples]  # height of width 1
    panel_width = max(1.5, min(3.0, 4.5 / max(sides)))
    lines = 1 + max(title.count("\n") for title in titles)
    height = panel_width * sum(sides) + 0.2 * lines + 0.2 * count + 0.5
    figure = new_figure((panel_width + 0.1) * len(titles), height)
    axes = figure.subplots(count, len(titles), squeeze=False, height_ratios=sides)
    for ax, title in zip(axes[0], titles, strict=True):
        ax.set_title(title, fontsize=9, parse_math=False)
    transform: Any = dataset_of(data).transform
    mean = torch.tensor(transform.mean).view(-1, 1, 1)
    std = torch.tensor(transform.std).view(-1, 1, 1)
    for row, (image, mask) in zip(axes, samples, strict=True):
        photograph = (image * std + mean).clamp(0, 1).movedim(0, -1).numpy()
        panels = [photograph, painted(mask, colours)]
        for predict in methods.values():
            prediction = finest(predict(image[None].to(device)))[0].argmax(0).cpu()  # (H, W)
            panels.append(painted(prediction, colours))
        for ax, pixels in zip(row, panels, strict=True):
            ax.imshow(pixels, interpolation="nearest")
            ax.set_axis_off()
    handles = []
    for colour, name in zip(colours, classes, strict=True):
        handles.append(Patch(color=colour, label=name))
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=min(6, len(classes)),
        frameon=False,
        fontsize=9,
    )
    save_figure(figure, path)


def finest(logits: Any) -> torch.Tensor:
    """Logits (B, K, H, W) of the finest level, of a method that may answer on several."""
    return list(logits.values())[-1] if isinstance(logits, dict) else logits


def painted(labels: torch.Tensor, colours: np.ndarray) -> np.ndarray:
    """Labels (H, W) in the colours (H, W, 3) of their classes, white where there is none."""
    labelled = (labels >= 0)[..., None]
    return np.where(labelled, colours[labels.clamp(min=0)], 1)


def main(args: argparse.Namespace) -> None:
    """Train, evaluate beside the baselines, print, write and draw."""
    began = time.monotonic()
    experiment = Experiment(args)
    experiment.train()
    data, split = experiment.data.test, "test"
    if data is None:
        data, split = experiment.data.val, "validation"
    results = {}
    for name, predict in experiment.methods.items():
        results[name] = experiment.evaluate(predict, data)
    if not is_primary():
        return
    write_results(experiment, results, split, len(data))
    images = f"{len(data)} {split} image{'s' * (len(data) > 1)}"
    explained = print_table(experiment, results, images)
    print(f"In all {time.monotonic() - began:.0f} s. Files: {experiment.output}")
    if args.plots:
        path = experiment.output / "pictures.png"
        draw(path, experiment.methods, data, experiment.classes, experiment.device)
    report(experiment, results, explained)


def write_results(
    experiment: Experiment, results: dict[str, dict[str, float]], split: str, count: int
) -> None:
    """Write results.json: the metrics and how they came about."""
    facts = {
        "command": shlex.join(["python", *sys.argv]),
        "seed": experiment.config.seed,
        "epochs": experiment.config.epochs,
        "epoch": experiment.epochs,
        "train_images": len(experiment.data.plain),
        "images": count,
        "judged": split,
        "hardware": hardware(experiment.device),
        "seconds": {name: round(value, 1) for name, value in experiment.seconds.items()},
        "results": results,
    }
    text = json.dumps(facts, indent=2) + "\n"
    replace_file(experiment.output / "results.json", lambda path: Path(path).write_text(text))


def report(experiment: Experiment, results: dict[str, dict[str, float]], explained: str) -> None:
    """Write report.html: a row for each metric that any method has, a column for each method."""
    write_report(
        experiment.output,
        f"Masks, {experiment.args.model}",
        rows_by_metric(results),
        {name: name for name in results},
        explained,
        experiment.histories,
        "miou",
        settings=experiment.args.settings,
        data=experiment.summary,
        device=experiment.device,
        plots=experiment.args.plots,
    )


def rows_by_metric(results: dict[str, dict[str, float]]) -> dict[str, list[dict[str, float]]]:
    """For each metric its value by method."""
    rows: dict[str, list[dict[str, float]]] = {}
    for method, metrics in results.items():
        for row, value in metrics.items():
            rows.setdefault(row, [{}])[0][method] = value
    return rows


def print_table(experiment: Experiment, results: dict[str, dict[str, float]], images: str) -> str:
    """A column for each method, a row for each metric that any has, and what they are.

    The last is returned.
    """
    columns = {name: name for name in results}
    print(f"\n{comparison_table(rows_by_metric(results), columns)}\n")
    chosen = "the last epoch"
    if not experiment.last_epoch:
        epochs = ", ".join(str(epoch + 1) for epoch in experiment.epochs.values())
        chosen = f"the best epoch on validation ({epochs})"
    seconds = ", ".join(f"{name} {value:.0f} s" for name, value in experiment.seconds.items())
    explained = (
        f"Percent, on the pixels of the {images}; model of {chosen}. "
        "Baselines: logistic regression on single pixels. "
        f"Seed {experiment.config.seed}, {hardware(experiment.device)}; training: {seconds}."
    )
    print(explained)
    return explained


if __name__ == "__main__":
    run_script(lambda: main(parse_args()))
