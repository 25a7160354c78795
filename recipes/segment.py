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
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

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
    RedNetHead,
    UNetHead,
    create_branch_model,
    list_taps,
    load_model,
)
from timm_branches.data import PairTransform, SegmentationDataset, create_loader
from timm_branches.dense import (
    PixelBaseline,
    SegmentationEvaluator,
    median_frequency_weights,
    package_segmentation,
    tiled_inference,
)
from timm_branches.figures import new_figure, save_figure
from timm_branches.files import replace_file
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
    image_options,
    say_what_was_understood,
)
from timm_branches.train.compare import comparison_table
from timm_branches.train.lr import create_scheduler
from timm_branches.train.process import seed_everything
from timm_branches.train.script import hardware, new_output, run_script

# what the comparison with segmentation_models_pytorch leaves out: it has no such thing, or its loop
# here has not
_NOT_SMP = (
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


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Arguments; without data those of the small job."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "data",
        nargs="?",
        help="folder with train/, trainannot/, val/, valannot/ (default: the "
        "motorcycle scene inside scikit-image)",
    )
    group = parser.add_argument_group("data")
    group.add_argument("--images", help="a folder of images, instead of a data folder")
    group.add_argument(
        "--masks",
        help="the folder of their masks: palette or grey, values are class indices, or what "
        "--mask-colors says",
    )
    group.add_argument(
        "--val-fraction", type=float, help="of --images set aside and judged (default: 0.2)"
    )
    group.add_argument("--classes", help="how many there are, or a text file with a name a line")
    group.add_argument(
        "--ignore-index", type=int, help="the masks' value for unlabelled pixels, such as 255"
    )
    group.add_argument(
        "--mask-colors",
        metavar="FILE",
        help="colours or values of the classes, a line each: '128 64 128 road', '255 object'",
    )
    group.add_argument("--mask-suffix", default="", help="what the masks' names end with: _mask")
    group.add_argument("--image-suffix", default="", help="what the images' names end with")
    group.add_argument(
        "--reduce-zero-label", action="store_true", help="0 is unlabelled, as in ADE20K"
    )
    add_image_arguments(group)
    group.add_argument(
        "--taxonomy",
        help="a tree of the classes (.csv, .json): its coarser levels are reported, too",
    )
    group.add_argument(
        "--resize",
        type=int,
        nargs=2,
        metavar=("H", "W"),
        help="bring images and masks to this size",
    )
    group.add_argument(
        "--crop",
        type=int,
        nargs="+",
        help="side, or height and width, of training crops (default: 256, without data 224 128)",
    )
    group.add_argument(
        "--scale",
        type=float,
        nargs=2,
        default=(0.75, 1.5),
        metavar=("LOW", "HIGH"),
        help="range of a random factor before the crop (default: 0.75 1.5)",
    )
    group.add_argument("--hflip", type=float, default=0.5, help="chance of a flip")
    group.add_argument(
        "--color-jitter",
        type=float,
        default=0.0,
        help="strength of changes in brightness, contrast "
        "and saturation (default: 0, without data 0.4)",
    )
    group.add_argument(
        "--repeats", type=int, help="crops of each image an epoch (default: 1, without data 32)"
    )
    group.add_argument(
        "-b",
        "--batch-size",
        type=int,
        default=8,
        help="batch size of one process (default: 8, without data 4)",
    )
    group.add_argument(
        "-j", "--workers", type=int, default=0, help="worker processes that load data"
    )
    group = parser.add_argument_group("model")
    add_model_arguments(group, "resnet18")
    group.add_argument(
        "--taps",
        nargs="+",
        help="maps that the decoder reads (default: all stages; 2 to 5 of a ViT)",
    )
    group.add_argument("--head", choices=("unet", "rednet"), default="unet")
    group.add_argument(
        "--channels", type=int, nargs="+", help="width of each decoder stage from the deepest on"
    )
    group.add_argument(
        "--attention", action="store_true", help="attention gates on the skips (Oktay et al. 2018)"
    )
    group.add_argument(
        "--input-skip", action="store_true", help="one more skip, from the image itself"
    )
    group.add_argument(
        "--deep-supervision", action="store_true", help="a loss at each stage (Lee et al. 2014)"
    )
    group.add_argument("--loss", choices=("ce", "dice", "ce+dice"), default="ce")
    group.add_argument(
        "--class-weights",
        nargs="+",
        help="of cross-entropy: a number a class, or 'auto' for median "
        "frequency balancing (Eigen and Fergus 2015)",
    )
    group.add_argument(
        "--tile", type=int, help="judge in overlapping tiles of this side: for large images"
    )
    group.add_argument(
        "--smp",
        action="store_true",
        help="also train segmentation_models_pytorch's Unet: same "
        "encoder and its first weights, data, schedule and seed",
    )
    add_fit_arguments(parser)
    parser.set_defaults(
        output="output/segment", opt="adamw", lr=1e-3, weight_decay=1e-2, epochs=40, warmup_epochs=1
    )
    own = parser.parse_known_args(argv)[0]
    small = not (own.data or own.images or own.masks)
    if small:  # the job without data
        parser.set_defaults(model="resnet10t", epochs=6, repeats=32, batch_size=4, color_jitter=0.4)
    args = parser.parse_args(argv)
    args.repeats = 1 if args.repeats is None else args.repeats
    args.crop = args.crop or ([224, 128] if small else [256])
    if (
        small
        and args.model == "resnet10t"
        and args.head == "unet"
        and not (args.taps or args.channels)
    ):
        args.channels = [64, 48, 32, 24, 16]  # quick, and enough for one scene
    if bool(args.images) != bool(args.masks) or (args.data and args.images):
        parser.error("give a data folder, or --images and --masks together")
    if args.val_fraction is not None and not args.images:
        parser.error("--val-fraction has no effect without --images: other data have their splits")
    for name in ("classes", "ignore_index", "taxonomy", "resize") if small else ():
        if getattr(args, name) is not None:
            parser.error(f"--{name.replace('_', '-')} has no effect without own data")
    if len(args.crop) > 2:
        parser.error("--crop takes one side, or height and width")
    if args.class_weights and args.loss == "dice":
        parser.error(
            "--class-weights has no effect with --loss dice, which counts all classes alike"
        )
    if args.smp:
        if args.head != "unet":
            parser.error("--smp compares U-Nets: leave out --head rednet")
        for name in _NOT_SMP:
            if getattr(args, name) != parser.get_default(name):
                parser.error(
                    f"--{name.replace('_', '-')} has no part in the comparison with --smp: leave "
                    "one out"
                )
        if args.amp and args.amp_dtype != "bfloat16":
            parser.error(
                "--amp-dtype float16 has no part in the comparison with --smp: leave one out"
            )
    return args


# -- data


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
        names = [
            line.strip() for line in Path(args.classes).read_text().splitlines() if line.strip()
        ]
        return names if tree is None else tree.reorder(names)
    if tree is None:
        return int(args.classes)
    if tree.num_leaves != int(args.classes):
        raise ValueError(
            f"--classes {args.classes}: {args.taxonomy} has {tree.num_leaves} classes."
        )
    return tree


def read_pair(
    args: argparse.Namespace, images: Path, masks: Path, classes: Any, repeats: int = 1
) -> SegmentationDataset:
    """Images and masks of two folders; with --resize, made smaller one after the other."""
    for folder in (images, masks):
        if not folder.is_dir():
            raise ValueError(f"no folder {folder}")
    data = SegmentationDataset(
        str(images),
        str(masks),
        classes,
        args.ignore_index,
        repeats=repeats,
        mask_colors=args.mask_colors,
        mask_suffix=args.mask_suffix,
        image_suffix=args.image_suffix,
        reduce_zero_label=args.reduce_zero_label,
        **image_options(args),
    )
    if not args.resize:
        return data
    import cv2

    size = (args.resize[1], args.resize[0])
    smaller, labels = [], []
    for index in range(len(data) // repeats):
        image, mask = data.pixels(index)  # only one photograph is in memory at its full size
        smaller.append(cv2.resize(image, size, interpolation=cv2.INTER_AREA))
        nearest = cv2.resize(mask.astype(np.int16), size, interpolation=cv2.INTER_NEAREST_EXACT)
        labels.append(nearest)
    return SegmentationDataset(smaller, labels, classes, repeats=repeats)


def read_data(args: argparse.Namespace) -> tuple[Any, Any, Any, Any]:
    """Training, validation and test data (None without).

    And a view of the training data as they are.
    """
    if not (args.data or args.images):
        train, val, test = package_segmentation(args.repeats)
        return train, val, test, package_segmentation()[0]
    classes = read_classes(args)
    if args.images:
        plain = read_pair(args, Path(args.images), Path(args.masks), classes)
        train = plain.repeated(args.repeats)
        fraction = 0.2 if args.val_fraction is None else args.val_fraction
        count = round(fraction * len(plain))
        if not 0 < count < len(plain):
            raise ValueError(
                f"--val-fraction {fraction} of {len(plain)} images leaves nothing on one side."
            )
        order = torch.randperm(len(plain), generator=torch.Generator().manual_seed(0)).tolist()
        kept = [i * args.repeats + k for i in sorted(order[count:]) for k in range(args.repeats)]
        return (
            Subset(train, kept),
            Subset(plain, sorted(order[:count])),
            None,
            Subset(plain, sorted(order[count:])),
        )
    root = Path(args.data)
    plain = read_pair(args, root / "train", root / "trainannot", classes)
    train = plain.repeated(args.repeats)
    val = read_pair(args, root / "val", root / "valannot", classes)
    held = (
        read_pair(args, root / "test", root / "testannot", classes)
        if (root / "test").is_dir()
        else None
    )
    return train, val, held, plain


def source(data: Any) -> SegmentationDataset:
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
        masks = [data[i][1] for i in range(len(data))]
        found = {"mask": median_frequency_weights(masks, num_classes)}
        if tree is not None:
            labels = [tree.expand(mask) for mask in masks]
            found |= {
                level: median_frequency_weights(
                    (label[..., i] for label in labels), tree.num_classes[i]
                )
                for i, level in enumerate(tree.levels)
            }
        return found
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


# -- what is compared


def make_model(args: argparse.Namespace, num_classes: int, tree: Taxonomy | None) -> BranchModel:
    """A timm backbone and the decoder on all its stages, or on the taps asked for.

    With a tree it gives all levels.
    """
    torch.manual_seed(args.seed)
    kind = {"unet": UNetHead, "rednet": RedNetHead}[args.head]
    head = kind(
        channels=args.channels,
        attention=args.attention,
        input_skip=args.input_skip,
        deep_supervision=args.deep_supervision,
    )
    rows = list(list_taps(args.model))
    pyramid = len({row.stride for row in rows}) > 1
    taps = args.taps or [row.stage for row in rows if pyramid or row.stage > 1]
    return create_branch_model(
        args.model,
        taps=[tuple(taps)],
        head=[head],
        names=["mask"],
        taxonomy=tree,
        num_classes=num_classes if tree is None else None,
        pretrained=args.pretrained,
        checkpoint_path=args.checkpoint_path,
        img_size=(args.crop[0], args.crop[-1]),
    )


def in_tiles(answer: Callable, tile: int | None) -> Callable:
    """The same answer, put together from overlapping tiles where a side is given."""
    return (
        answer if tile is None else partial(tiled_inference, answer, tile=tile, overlap=tile // 4)
    )


class SegmentTask(DenseTask):
    """A dense task that can answer in tiles."""

    tile: int | None = None

    def answer(self, model: torch.nn.Module, input: Any) -> dict[str, torch.Tensor]:
        """The model's answer, in tiles where a side was given."""
        return in_tiles(model, self.tile)(input)


def make_task(
    args: argparse.Namespace,
    model: BranchModel,
    evaluator: Callable,
    weights: dict[str, torch.Tensor],
    device: torch.device,
) -> SegmentTask:
    """The losses of the model's mask, or of its masks of all levels."""
    settings: dict[str, Any] = {}
    if weights and model.taxonomy:
        settings["class_weights"] = {
            level: weights[level].to(device) for level in model.taxonomy.levels
        }
    elif weights:
        settings["class_weights"] = weights["mask"].to(device)
    task = SegmentTask(model, args.loss, evaluator, device=device, **settings)
    task.tile = args.tile
    return task


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
            "--smp needs segmentation_models_pytorch: pip install segmentation-models-pytorch"
        ) from None
    torch.manual_seed(args.seed)
    widths = {"decoder_channels": tuple(args.channels)} if args.channels else {}
    unet = smp.Unet(f"tu-{args.model}", encoder_weights=None, classes=num_classes, **widths)
    if lacking := unet.encoder.model.load_state_dict(first, strict=False).missing_keys:
        raise ValueError(
            f"--smp: its encoder has tensors that the tapped backbone lacks, such as {lacking[0]}."
        )
    return unet


def train_smp(unet: torch.nn.Module, config: FitConfig, loader: Any, loss_fn: Callable) -> float:
    """Train it on the same batches in a loop of its own, a check of `fit` as well.

    The seconds that it took.
    """
    began, device = time.monotonic(), torch.device(config.device)
    look: dict[str, Any] = {"memory_format": torch.channels_last} if config.channels_last else {}
    unet.to(device, **look)
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
            with torch.autocast(device.type, torch.bfloat16, enabled=config.amp):
                loss = loss_fn(unet(images.to(device, **look)), masks.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()
            if scheduler:
                scheduler.step_update(epoch * len(loader) + index)
        if config.progress:
            print(
                f"smp epoch {epoch + 1}/{config.epochs}  loss {total / len(loader):.4f}", flush=True
            )
    unet.eval()
    return time.monotonic() - began


def smp_answer(unet: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Its logits; it takes multiples of 32 only, so images are continued and the answer is cut."""
    height, width = images.shape[2:]
    return unet(F.pad(images, (0, -width % 32, 0, -height % 32), mode="replicate"))[
        ..., :height, :width
    ]


# -- judging


@torch.no_grad()
def judge(
    answer: Callable, task: DenseTask, data: Any, batch_size: int, workers: int
) -> dict[str, float]:
    """Metrics of the answers of all processes, by the name of their row in the table."""
    loader = create_loader(data, batch_size, num_workers=workers)
    evaluator: SegmentationEvaluator = task.evaluator(
        device=task.device, max_samples=evaluation_sample_limit(loader)
    )
    for images, masks in loader:
        evaluator.update(answer(images.to(task.device)), masks.to(task.device))
    metrics = evaluator.compute(distributed=dist.is_initialized())
    if evaluator.taxonomy is None:
        rows = {"mIoU": metrics["miou"], "pixel accuracy": metrics["pixel_accuracy"]}
    else:
        rows = {f"{level} mIoU": metrics[f"{level}_miou"] for level in evaluator.levels}
        rows |= {f"{level} pixel accuracy": metrics[f"{level}_top1"] for level in evaluator.levels}
        rows |= {"full path": metrics["full_path"], "consistency": metrics["consistency"]}
    for level, ious in evaluator.class_iou().items():
        rows |= {
            f"IoU {name}" if evaluator.taxonomy is None else f"{level} IoU {name}": x
            for name, x in ious.items()
        }
    # a class that is nowhere has no IoU
    return {name: value for name, value in rows.items() if value == value}


@torch.no_grad()
def draw(
    path: Path, answer: Callable, data: Any, classes: Sequence[str], device: torch.device
) -> None:
    """Up to three images beside their labels and answers, as PNG."""
    from matplotlib import colormaps
    from matplotlib.patches import Patch

    count = min(3, len(data))
    colours = np.array(colormaps["tab20" if len(classes) > 10 else "tab10"].colors)  # type: ignore[attr-defined]
    colours = colours[np.arange(len(classes)) % len(colours)]
    picked = [data[i * (len(data) - 1) // max(1, count - 1)] for i in range(count)]
    height, width = picked[0][0].shape[1:]
    inches = min(3, 5 * width / height)  # of a panel's width
    figure = new_figure(max(5, 3 * inches), 0.9 + count * inches * height / width)
    axes = figure.subplots(count, 3, squeeze=False)
    look: Any = source(data).transform
    std, mean = (torch.tensor(values).view(-1, 1, 1) for values in (look.std, look.mean))
    for ax, title in zip(axes[0], ("image", "labels (white: none)", "prediction"), strict=True):
        ax.set_title(title, fontsize=10)
    for row, (image, mask) in zip(axes, picked, strict=True):
        logits = answer(image[None].to(device))
        # of the finest level
        logits = list(logits.values())[-1] if isinstance(logits, dict) else logits
        said = logits[0].argmax(0).cpu()
        shown = [
            (image * std + mean).clamp(0, 1).movedim(0, -1).numpy(),
            *(
                np.where((labels >= 0)[..., None], colours[labels.clamp(min=0)], 1)
                for labels in (mask, said)
            ),
        ]
        for ax, pixels in zip(row, shown, strict=True):
            ax.imshow(pixels, interpolation="nearest")
            ax.set_axis_off()
    figure.legend(
        handles=[
            Patch(color=colour, label=name) for colour, name in zip(colours, classes, strict=True)
        ],
        loc="outside lower center",
        ncols=min(6, len(classes)),
        frameon=False,
        fontsize=9,
    )
    save_figure(figure, path)


def main(args: argparse.Namespace) -> None:
    """Train, judge beside the baselines, print, write and draw."""
    began = time.monotonic()
    config = FitConfig.from_args(args)
    device = setup_device(args.device)
    config.device = str(device)
    if args.smp and dist.is_initialized():
        raise ValueError("--smp trains in one process: leave torchrun out.")
    if args.tile is not None and args.tile < 32:
        raise ValueError(f"--tile must be at least 32, backbones' usual stride, got {args.tile}.")
    train, val, test, plain = read_data(args)
    classes, tree = source(plain).classes, source(plain).taxonomy
    title = f"{'U-Net' if args.head == 'unet' else 'RED-Net'}, {args.model}"
    # a hierarchy is worth having only where it beats the same network on the leaves alone, summed
    # upwards
    models = (
        {title: make_model(args, len(classes), None)}
        if tree is None or tree.num_levels < 2
        else {
            f"{title}, all levels": make_model(args, len(classes), tree),
            f"{title}, flat": make_model(args, len(classes), None),
        }
    )
    cfg = resolve_model_data_config(next(iter(models.values())))
    look = {"mean": cfg["mean"], "std": cfg["std"]}
    for data in (plain, val, test):
        if data is not None:
            source(data).transform = PairTransform(**look)
    source(train).transform = PairTransform(
        (args.crop[0], args.crop[-1]), tuple(args.scale), args.hflip, args.color_jitter, **look
    )
    summary = say_what_was_understood(train=train, val=val, test=test)
    absent = source(plain).absent_classes(source(plain).count_pixels())
    if absent:
        summary.warnings.append(absent)
        if is_primary():
            print(f"warning: {absent}", flush=True)
    for model in models.values():
        model.data_summary = summary.to_dict()
        model.pretrained_cfg.update(image_options(args))
    weights = class_weights(args, plain, len(classes), tree)
    evaluator = partial(SegmentationEvaluator, classes, taxonomy=tree)
    tasks = {
        name: make_task(args, model, evaluator, weights, device) for name, model in models.items()
    }
    *_, (model, task) = zip(models.values(), tasks.values(), strict=True)  # of the leaves alone
    # before the training, so that what cannot work fails at once
    baselines = {
        "colour alone": PixelBaseline(plain, len(classes), height=False),
        "colour and height": PixelBaseline(plain, len(classes), height=True),
    }
    for data in (val, test):
        if data is not None:
            try_evaluation(task, create_loader(data, 1))
    unet = make_smp(args, model.backbone.state_dict(), len(classes)) if args.smp else None

    output = new_output(args.output, args.resume)
    make_loader = partial(
        create_loader,
        train,
        args.batch_size,
        is_training=True,
        num_workers=args.workers,
        seed=config.seed,
        pin_memory=device.type == "cuda",
    )
    batch = args.batch_size if args.resize else 1  # images of different sizes do not stack
    last = test is None or args.smp  # no epoch is chosen; smp's Unet has none to choose from
    seconds: dict[str, float] = {}
    answers: dict[str, Callable] = {}
    epochs: dict[str, int] = {}
    for name, model in models.items():
        if is_primary():
            print(
                f"{name}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, "
                f"{len(train)} crops an epoch of {len(plain)} images, {len(classes)} classes",
                flush=True,
            )
        own_output = (
            output if len(models) == 1 else output / name.rpartition(", ")[2].replace(" ", "_")
        )
        run = fit(
            tasks[name],
            make_loader(),
            None if last else create_loader(val, batch, num_workers=args.workers),
            replace(config, output=str(own_output)),
            facts={"data": str(args.data or args.images or "motorcycle"), "classes": list(classes)},
        )
        best = load_model(run.model_path).to(device).eval()
        seconds[name], epochs[name] = run.seconds, run.best_epoch
        answers[name] = partial(tasks[name].answer, best)
    if unet is not None:
        print(
            f"smp Unet: {sum(p.numel() for p in unet.parameters()) / 1e6:.2f} M parameters",
            flush=True,
        )
        seconds["smp Unet"] = train_smp(unet, config, make_loader(), task.losses["mask"])
        answers["smp Unet"] = in_tiles(partial(smp_answer, unet), args.tile)
    answers |= baselines
    judged, which = (val, "validation") if test is None else (test, "test")
    results = {
        name: judge(answer, task, judged, batch, args.workers) for name, answer in answers.items()
    }
    if not is_primary():
        return
    facts = {
        "command": shlex.join(["python", *sys.argv]),
        "seed": config.seed,
        "epochs": config.epochs,
        "epoch": epochs,
        "train_images": len(plain),
        "images": len(judged),
        "judged": which,
        "hardware": hardware(device),
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
    }
    text = json.dumps({**facts, "results": results}, indent=2) + "\n"
    replace_file(output / "results.json", lambda path: Path(path).write_text(text))
    rows = {
        row: [{name: found[row] for name, found in results.items() if row in found}]
        for row in dict.fromkeys(row for found in results.values() for row in found)
    }
    print(f"\n{comparison_table(rows, {name: name for name in results})}\n")
    chosen = ", ".join(str(epoch + 1) for epoch in epochs.values())
    print(
        f"Percent, on the pixels of the {len(judged)} {which} image{'s' * (len(judged) > 1)}; "
        f"model of {'the last epoch' if last else f'the best epoch on validation ({chosen})'}. "
        f"Baselines: logistic regression on single pixels. Seed {config.seed}, "
        f"{facts['hardware']}; training: "
        f"{', '.join(f'{name} {value:.0f} s' for name, value in seconds.items())}; in all "
        f"{time.monotonic() - began:.0f} s. Files: {output}"
    )
    if args.plots:
        draw(output / "pictures.png", next(iter(answers.values())), judged, classes, device)


if __name__ == "__main__":
    run_script(lambda: main(parse_args()))
