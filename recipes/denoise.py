"""Train a skip decoder to take noise, blur or JPEG out of photographs, beside classical methods.

    # noise, then blur; under two minutes on two CPU cores
    python recipes/denoise.py
    # DnCNN's task: train400/ and set12/ in there
    python recipes/denoise.py data/denoise --recipe train400-sigma25
    python recipes/denoise.py photos/ --colour --sigma 0 50 --test-sigma 15 25 50 --model resnet34
    python recipes/denoise.py photos/ --blur 1 2 --sigma 2 --tile 512 --pretrained --amp
    python recipes/denoise.py photos/ --jpeg 10 40
    # your own pairs, matched by their names
    python recipes/denoise.py --noisy scans/noisy --clean scans/clean
    torchrun --nproc-per-node 4 recipes/denoise.py photos/ --epochs 50
    # what a network trained on one image makes of another
    python recipes/denoise.py --overfit

Noise is white, Gaussian, given on the scale of 0 to 255, not clipped, and in evaluation fixed by
the seed. PSNR and SSIM are means of the images' own values, for a data range of 1, and neither
rounded to 8 bits nor clipped. The classical method knows the noise's deviation or the blur (for own
pairs it is one that need not); its setting is the best on validation images.

Own pairs lie in two folders, --noisy and --clean. Each may hold train/, val/ and test/, or stand
in the folders train/, val/ and test/ of the data.

--overfit answers a common question: why does an autoencoder that learned to sharpen one image give
that same image for every other input? One target is learned most easily as a constant: the biases
of bottleneck and decoder draw it, and skips that pass the input on hardly change that, as nothing
in the loss asks for the input. Where to look: feed a blank image. If the answer stays, the network
ignores its input; train on many images, with residual=True and no bottleneck.
"""

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Subset

from timm_branches import BranchModel, RedNetHead, UNetHead, create_branch_model, load_model
from timm_branches.data import DataSummary, DenoisingDataset, RestorationDataset, create_loader
from timm_branches.dense import RestorationEvaluator, package_photographs, tiled_inference
from timm_branches.dense import peak_signal_noise_ratio as psnr_of
from timm_branches.files import replace_file
from timm_branches.task import DenseTask
from timm_branches.train import FitConfig, add_fit_arguments, fit, is_primary, setup_device
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
from timm_branches.train.half_precision import preset_for
from timm_branches.train.recipe_parser import RecipeParser
from timm_branches.train.report import write_report
from timm_branches.train.script import hardware, new_output, run_script

HEADS = {"unet": UNetHead, "rednet": RedNetHead}
SPLITS = ("train", "val", "test")
RECIPES: dict[str, dict] = {
    # DnCNN's grey task (Zhang et al. 2017, arXiv 1608.03981): 400 images of 180 px, noise of 25.
    # The network is ours: a U-Net on the first stages of DarkNet-21, at strides 2, 4 and 8, with a
    # skip from the image at stride 1
    "train400-sigma25": {
        "train": "train400",
        "test": "set12",
        "sigma": [25.0],
        "model": "darknet21",
        "taps": ["1", "2", "3"],
        "head": "unet",
        "channels": [128, 64, 32],
        "input_skip": True,
        "loss": "l1",
        "patch_size": 64,
        "patches": 64,
        "batch_size": 32,
        "epochs": 60,
        "opt": "adamw",
        "lr": 2e-3,
        "weight_decay": 1e-4,
        "sched": "cosine",
        "warmup_epochs": 1,
        "amp": True,
        "channels_last": True,
    },
}
# of the photographs inside scikit-image and scikit-learn: the others are for training; one of
# 'clock' is blurred itself
TEST, VAL, LEFT_OUT = ("astronaut", "camera", "chelsea", "flower"), ("coins", "rocket"), ("clock",)
OVERFIT_STEPS = 300


# -- arguments


# the flags of its own that --help shows
COMMON = ("recipe", "noisy", "clean", "sigma", "blur", "patch_size", "head")


def make_parser() -> RecipeParser:
    """All flags."""
    parser = RecipeParser(__doc__, COMMON)
    parser.add_argument(
        "data",
        nargs="?",
        help="a folder of images, or of the folders train, val and test "
        "(default: photographs inside scikit-image and scikit-learn)",
    )
    parser.add_argument("--recipe", choices=list(RECIPES), help="a setting in one word")
    group = parser.add_argument_group("data")
    for split in SPLITS:
        group.add_argument(
            f"--{split}",
            help=f"folder of the {split} images within the data (default: {split}, if any)",
        )
    group.add_argument("--noisy", metavar="FOLDER", help="your own degraded images")
    group.add_argument("--clean", metavar="FOLDER", help="the clean ones, named as these")
    group.add_argument("--noisy-suffix", default="", help="what the noisy images' names end with")
    group.add_argument("--clean-suffix", default="", help="what the clean images' names end with")
    group.add_argument(
        "--val-fraction",
        type=float,
        default=0.1,
        help="training images set aside without a val folder",
    )
    group.add_argument(
        "--sigma", type=float, nargs="+", help="deviation of the noise, or a range (default: 25)"
    )
    group.add_argument(
        "--test-sigma",
        type=float,
        nargs="+",
        help="noise of the evaluation (default: the range's middle)",
    )
    group.add_argument(
        "--blur", type=float, nargs="+", help="deviation of a Gaussian blur in pixels, or a range"
    )
    group.add_argument(
        "--jpeg", type=float, nargs="+", help="quality of a JPEG compression, or a range"
    )
    colours = group.add_mutually_exclusive_group()
    colours.add_argument(
        "--grey", dest="in_chans", action="store_const", const=1, default=1, help="the default"
    )
    colours.add_argument("--colour", dest="in_chans", action="store_const", const=3)
    add_image_arguments(group)
    add_reading_arguments(group)
    group.add_argument("--patch-size", type=int, default=40, help="side of the training patches")
    group.add_argument("--patches", type=int, default=48, help="patches of each image in an epoch")
    group.add_argument(
        "--tile", type=int, help="restore whole images in tiles of this side, for large ones"
    )
    group.add_argument("-b", "--batch-size", type=int, default=8, help="batch size of one process")
    group.add_argument(
        "-j", "--workers", type=int, default=0, help="worker processes that load data"
    )
    group = parser.add_argument_group("model")
    add_model_arguments(group, "rednet_small")
    group.add_argument("--taps", nargs="+", help="the skips and the deepest map (default: 3 4 5)")
    group.add_argument("--head", choices=list(HEADS), default="unet")
    group.add_argument(
        "--channels", type=int, nargs="+", help="width of each decoder stage from the deepest on"
    )
    group.add_argument(
        "--input-skip",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="a skip from the image itself, which keeps the detail that a strided backbone loses",
    )
    group.add_argument("--loss", choices=("charbonnier", "l1", "l2"), default="charbonnier")
    group = parser.add_argument_group("studies")
    group.add_argument(
        "--overfit", action="store_true", help="train on one blurred image, show another"
    )
    group.add_argument(
        "--overfit-size", type=int, default=64, help="side of its images, a multiple of 8"
    )
    add_fit_arguments(parser)
    parser.set_defaults(
        output="output/denoise", epochs=10, opt="adamw", lr=3e-3, weight_decay=1e-4, warmup_epochs=1
    )
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Arguments; a recipe's values are defaults that every flag overrides."""
    parser = make_parser()
    given = parser.parse_known_args(argv)[0]
    preset, said = preset_for(RECIPES.get(given.recipe, {}), given.device)
    if said:
        print(said, file=sys.stderr)
    parser.set_defaults(**preset)
    own_data = given.data or given.noisy or given.clean
    own_network = given.model != "rednet_small" or given.taps or given.channels
    plain_network = given.head == "unet" and given.input_skip and not own_network
    if plain_network and not (own_data or given.recipe or given.overfit):
        # the job without arguments: small, so that a minute of a CPU is many steps
        parser.set_defaults(taps=["3", "4"], channels=[32, 16], lr=1e-2)
    args = parser.parse_args(argv)
    check_args(parser, args)
    args.taps = args.taps or ["3", "4", "5"]
    return args


def check_args(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse what has no effect together."""
    if max(len(given or ()) for given in (args.sigma, args.blur, args.jpeg)) > 2:
        parser.error("--sigma, --blur and --jpeg take a number or a range of two")
    pairs = bool(args.noisy or args.clean)
    if args.overfit and (args.data or args.recipe or pairs):
        parser.error("--overfit has photographs of its own: leave out data and --recipe")
    if bool(args.noisy) != bool(args.clean):
        parser.error("--noisy and --clean go together: a folder of each")
    if not pairs and (args.noisy_suffix or args.clean_suffix):
        parser.error("--noisy-suffix and --clean-suffix have no effect without --noisy and --clean")
    if pairs:
        for name in ("sigma", "test_sigma", "blur", "jpeg", "recipe"):
            if getattr(args, name) is not None:
                flag = name.replace("_", "-")
                parser.error(f"--{flag} has no effect on own pairs: they are degraded already")
    named = [split for split in SPLITS if getattr(args, split)]
    if args.data is None and named and not pairs:
        text = f"--{named[0]} has no effect without a folder of data"
        if args.recipe:
            text += f": --recipe {args.recipe} needs one that holds train400/ and set12/"
        parser.error(text)
    if args.value_range is not None and args.data is None and not pairs:
        parser.error("--value-range has no effect on the photographs inside packages")


# -- data


@dataclass(frozen=True)
class Degradation:
    """What is done to the images in training, and in evaluation.

    Attributes:
        sigma: Range of the noise's deviation; None for people's own pairs.
        blur: Range of the blur's deviation.
        jpeg: Range of the quality of a JPEG compression, 0 for none.
    """

    sigma: tuple[float, float] | None
    blur: tuple[float, float] = (0.0, 0.0)
    jpeg: tuple[float, float] = (0.0, 0.0)

    def fixed(self, sigma: float | None = None) -> "Degradation":
        """The middle of all ranges, for evaluation, or this noise."""
        if self.sigma is None:
            return self
        level = middle(self.sigma) if sigma is None else sigma
        return Degradation((level, level), (middle(self.blur),) * 2, (middle(self.jpeg),) * 2)

    def __str__(self) -> str:
        if self.sigma is None:
            return "own pairs"
        words = []
        kinds = {"blur": self.blur, "noise": self.sigma, "JPEG": self.jpeg}
        for name, limits in kinds.items():
            if limits[-1]:
                ends = dict.fromkeys(f"{value:g}" for value in limits)
                words.append(f"{name} {'-'.join(ends)}")
        return ", ".join(words) or "nothing"


def middle(limits: Sequence[float]) -> float:
    """The middle of a range."""
    return (limits[0] + limits[-1]) / 2


def middle_of(image: Any, side: int) -> Any:
    """The square of this side in the middle of an image (H, W, ...)."""
    height, width = image.shape[:2]
    top, left = max(0, (height - side) // 2), max(0, (width - side) // 2)
    return image[top : top + side, left : left + side]


def photographs() -> dict[str, Any]:
    """Of those inside installed packages, by split.

    Textures, scans and micrographs are for training only, 256 px for evaluation.
    """
    images = package_photographs()
    for name in LEFT_OUT:
        images.pop(name, None)
    splits = {}
    for split, names in (("val", VAL), ("test", TEST)):
        present = [name for name in names if name in images]
        splits[split] = [middle_of(images.pop(name), 256) for name in present]
    splits["train"] = list(images.values())
    return {split: pictures for split, pictures in splits.items() if pictures}


def folders(args: argparse.Namespace) -> dict[str, str]:
    """The folder of each split; images that lie in no such folder are all for training."""
    root = Path(args.data)
    if not root.is_dir():
        raise ValueError(
            f"{root} is no folder. Give one of images, or one that holds the folders train and "
            "test."
        )
    paths = {}
    for split in SPLITS:
        path = root / (getattr(args, split) or split)
        if path.is_dir():
            paths[split] = str(path)
        elif getattr(args, split):
            raise ValueError(f"--{split} {getattr(args, split)}: there is no folder {path}.")
    if paths and "train" not in paths:
        raise ValueError(
            f"{root} holds {' and '.join(paths)}, but no images to train on: "
            "name them with --train."
        )
    return paths or {"train": str(root)}


def pair_folders(args: argparse.Namespace) -> dict[str, tuple[str, str]]:
    """The noisy and the clean folder of each split; without splits all are for training.

    A split is a folder within both (noisy/train, clean/train), or holds both (train/noisy,
    train/clean).
    """
    root = Path(args.data or "")
    if args.data and not root.is_dir():
        raise ValueError(f"{root} is no folder.")
    for given in (args.noisy, args.clean):
        if args.data and Path(given).is_absolute():
            raise ValueError(f"{given} lies in no folder {root}: leave one of the two out.")
    pairs = {}
    for split in SPLITS:
        name = getattr(args, split) or split
        layouts = [(root / args.noisy / name, root / args.clean / name)]
        if args.data:
            layouts.append((root / name / args.noisy, root / name / args.clean))
        for noisy, clean in layouts:
            if noisy.is_dir() != clean.is_dir():
                there, missing = (noisy, clean) if noisy.is_dir() else (clean, noisy)
                raise ValueError(f"there is a folder {there}, but no {missing} for its partners.")
            if noisy.is_dir():
                pairs[split] = (str(noisy), str(clean))
        if getattr(args, split) and split not in pairs:
            raise ValueError(
                f"--{split} {name}: there is no folder of noisy images {layouts[0][0]}, nor any "
                "other of that name in the data."
            )
    if pairs and "train" not in pairs:
        raise ValueError(f"there are pairs for {' and '.join(pairs)}, but none to train on.")
    if pairs:
        return pairs
    noisy, clean = root / args.noisy, root / args.clean
    for path in (noisy, clean):
        if not path.is_dir():
            raise ValueError(f"{path} is no folder.")
    return {"train": (str(noisy), str(clean))}


class Experiment:
    """Images, device and settings that all degradations of one call share."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.config = args, FitConfig.from_args(args)
        self.device = setup_device(args.device)
        self.config.device = str(self.device)
        if args.resume not in ("", "auto"):
            raise ValueError(f"--resume {args.resume}: give --output and --resume auto.")
        if not 0 < args.val_fraction < 1:
            raise ValueError(f"--val-fraction must be between 0 and 1, got {args.val_fraction}.")
        import skimage.restoration  # noqa: F401  # if it is missing, say so before the training

        self.images: Mapping[str, Any] = self.find_images()
        self.output = new_output(args.output, args.resume)
        RecipeParser.write(args, self.output)
        # for the report: every training's log, and what was understood of the images
        self.histories: dict[str, list[dict]] = {}
        self.summary: DataSummary | None = None

    def find_images(self) -> Mapping[str, Any]:
        """Folders, pairs of folders or arrays, by split."""
        if self.args.noisy:
            return {split: self.match(*pair) for split, pair in pair_folders(self.args).items()}
        if self.args.data is not None:
            return folders(self.args)
        return photographs()

    def match(self, noisy: str, clean: str) -> tuple[list[str], list[str]]:
        """The files of two folders that belong together."""
        pairs = RestorationDataset(
            noisy,
            clean,
            degraded_suffix=self.args.noisy_suffix,
            clean_suffix=self.args.clean_suffix,
        )
        return pairs.names, pairs.clean_names

    def dataset(
        self,
        split: str,
        degradation: Degradation,
        is_training: bool = False,
        patch_size: int | None = None,
        repeats: int = 1,
    ) -> Dataset:
        """The degraded and clean images of a split.

        Without a validation folder it is every n-th training image.
        """
        images = self.images.get(split, self.images["train"])
        options: dict[str, Any] = {
            "in_chans": self.args.in_chans,
            "is_training": is_training,
            "patch_size": patch_size,
            "repeats": repeats,
            **image_options(self.args),
        }
        data: DenoisingDataset | RestorationDataset
        if degradation.sigma is None:
            noisy, clean = images
            data = RestorationDataset(noisy, clean, **options)
        else:
            options["jpeg"] = degradation.jpeg
            data = DenoisingDataset(images, degradation.sigma, degradation.blur, **options)
        if "val" in self.images or split == "test":
            return data
        for_validation = every_nth(len(data.images), self.args.val_fraction)
        wanted = []
        for index in range(len(data)):
            held_out = index // data.repeats in for_validation
            if held_out == (split == "val"):
                wanted.append(index)
        if not wanted:
            raise ValueError(
                f"{self.args.data or self.args.noisy}: one image is too few for training and "
                "validation; give --val."
            )
        return Subset(data, wanted)

    def make_model(self) -> BranchModel:
        """The backbone and one decoder that reads all taps."""
        args = self.args
        torch.manual_seed(args.seed)
        head = HEADS[args.head](channels=args.channels, input_skip=args.input_skip, residual=True)
        return create_branch_model(
            args.model,
            taps=[tuple(args.taps)],
            head=head,
            num_classes=args.in_chans,
            names=["image"],
            in_chans=args.in_chans,
            img_size=args.patch_size,
            pretrained=args.pretrained,
            checkpoint_path=args.checkpoint_path,
        )

    def fit(self, degradation: Degradation) -> tuple["RestorationTask", dict]:
        """Train; the model that comes back is that of the best epoch on validation."""
        args, name = self.args, str(degradation)
        model = self.make_model()
        train = self.dataset(
            "train",
            degradation,
            is_training=True,
            patch_size=args.patch_size,
            repeats=args.patches,
        )
        val = self.dataset("val", degradation.fixed())
        splits = {"train": train, "val": val}
        if "test" in self.images:
            splits["test"] = self.dataset("test", degradation.fixed())
        try_images(args, **splits)
        self.summary = say_what_was_understood(**splits)
        model.data_summary = self.summary.to_dict()
        model.pretrained_cfg.update(image_options(args))
        loader = create_loader(
            train,
            args.batch_size,
            is_training=True,
            num_workers=args.workers,
            seed=args.seed,
            pin_memory=self.device.type == "cuda",
            **reading_options(args),
        )
        if is_primary():
            millions = sum(p.numel() for p in model.parameters()) / 1e6
            patches = len(train)  # type: ignore[arg-type]
            print(
                f"\n{name}: {args.model}, {millions:.2f} M parameters, {patches} patches an epoch",
                flush=True,
            )
        folder = self.output / name.replace(",", "").replace(" ", "_")
        run = fit(
            RestorationTask(model, args.loss, args.tile),
            loader,
            create_loader(val, 1, **reading_options(args)),
            replace(self.config, output=str(folder)),
            facts={"degradation": name, "seed": args.seed},
        )
        self.histories[name] = run.history
        task = RestorationTask(load_model(run.model_path), args.loss, args.tile).to(self.device)
        return task, {"best_epoch": run.best_epoch, "seconds": round(run.seconds, 1)}

    @torch.no_grad()
    def evaluate(
        self, task: "RestorationTask", degradation: Degradation
    ) -> tuple[dict[str, dict], dict[str, list]]:
        """Metrics of each method on the test images (validation without), and their images."""
        split = "test" if "test" in self.images else "val"
        model = task.trainable_module.eval()
        classical, setting = best_classical(self.dataset("val", degradation), degradation)

        def network(x: torch.Tensor) -> torch.Tensor:
            return task.answer(model, x.to(self.device))["image"].float().cpu()

        methods: dict[str, Callable] = {
            "degraded": lambda x: x,
            setting: classical,
            "network": network,
        }
        evaluators = {name: RestorationEvaluator() for name in methods}
        pictures: dict[str, list] = {"clean": []}
        data = self.dataset(split, degradation)
        for degraded, clean in create_loader(data, 1, **reading_options(self.args)):
            pictures["clean"].append(clean)
            for name, method in methods.items():
                restored = method(degraded)
                pictures.setdefault(name, []).append(restored)
                evaluators[name].update(restored, clean)
        metrics = {name: dict(evaluator.compute()) for name, evaluator in evaluators.items()}
        return metrics, pictures


def every_nth(count: int, fraction: float) -> set[int]:
    """Evenly spaced positions, at least one, that make up this share of so many images."""
    spaced = set()
    for k in range(count):
        position = round((k + 0.5) / fraction - 0.5)
        if position < count:
            spaced.add(position)
    return spaced or {count - 1}


# -- model


class RestorationTask(DenseTask):
    """A decoder whose whole images are, where asked for, restored tile by tile."""

    def __init__(self, model: BranchModel, loss: str, tile: int | None = None):
        super().__init__(model, loss, RestorationEvaluator)
        self.tile, self.multiple = tile, max(int(info.stride) for info in model.taps)
        if tile is not None and (tile < 2 * self.multiple or tile % self.multiple):
            raise ValueError(
                f"--tile {tile} must be two or more times the coarsest tap's stride, "
                f"{self.multiple}."
            )

    def answer(self, model: torch.nn.Module, input: torch.Tensor) -> dict[str, torch.Tensor]:
        """The model's answer, in tiles where a side was given."""
        if self.tile is None:
            return model(input)
        overlap = max(1, self.tile // 4 // self.multiple) * self.multiple
        return tiled_inference(model, input, self.tile, overlap, multiple=self.multiple)


# -- classical methods


def best_classical(val: Dataset, degradation: Degradation, most: int = 4) -> tuple[Callable, str]:
    """The method and setting with the best mean PSNR on some validation images."""
    if degradation.sigma is None or degradation.jpeg[1]:
        methods = total_variation()
    elif degradation.blur[1]:
        methods = richardson_lucy(middle(degradation.blur))
    else:
        methods = non_local_means(middle(degradation.sigma))
    count = min(most, len(val))  # type: ignore[arg-type]
    pairs = [val[i] for i in range(count)]
    quality = {}
    for name, method in methods.items():
        quality[name] = sum(float(psnr_of(method(x[None]), y[None])) for x, y in pairs)
    best = max(quality, key=quality.__getitem__)
    return methods[best], best


def richardson_lucy(blur: float) -> dict[str, Callable]:
    """Richardson-Lucy deconvolution of a Gaussian blur, with several numbers of iterations."""
    from skimage import restoration

    reach = int(4 * blur) + 1
    line = np.exp(-((np.arange(-reach, reach + 1) / blur) ** 2) / 2)
    psf = np.outer(line, line) / line.sum() ** 2
    methods: dict[str, Callable] = {}
    for count in (5, 10, 20, 40, 80):
        method = partial(restoration.richardson_lucy, psf=psf, num_iter=count, clip=False)
        methods[f"Richardson-Lucy, {count} iterations"] = partial(by_channel, method, 4 * reach)
    return methods


def non_local_means(sigma: float) -> dict[str, Callable]:
    """Non-local means of noise with this deviation (of 255), with several strengths."""
    from skimage import restoration

    deviation = sigma / 255
    methods: dict[str, Callable] = {}
    for factor in (0.4, 0.6, 0.8, 1.0):
        method = partial(
            restoration.denoise_nl_means,
            h=factor * deviation,
            sigma=deviation,
            patch_size=5,
            patch_distance=6,
            fast_mode=True,
            channel_axis=-1,
        )
        methods[f"non-local means, h = {factor:g} sigma"] = partial(whole, method)
    return methods


def total_variation() -> dict[str, Callable]:
    """Total variation denoising, which need not know the noise, with several weights."""
    from skimage import restoration

    methods: dict[str, Callable] = {}
    for weight in (0.01, 0.02, 0.05, 0.1, 0.2):
        method = partial(restoration.denoise_tv_chambolle, weight=weight, channel_axis=-1)
        methods[f"total variation, weight {weight:g}"] = partial(whole, method)
    return methods


def whole(method: Callable, x: torch.Tensor) -> torch.Tensor:
    """A function of an array (H, W, C) on an image (1, C, H, W)."""
    array = method(x[0].permute(1, 2, 0).numpy())
    array = array.reshape(*x.shape[2:], -1)
    return torch.from_numpy(array).permute(2, 0, 1)[None].float()


def by_channel(method: Callable, pad: int, x: torch.Tensor) -> torch.Tensor:
    """A function of a positive array (H, W), which is continued by reflection as the blur's was."""
    channels = []
    for channel in x[0]:
        padded = np.pad(channel.numpy().clip(1e-4), pad, mode="reflect")
        channels.append(method(padded)[pad:-pad, pad:-pad])
    return torch.from_numpy(np.stack(channels))[None].float()


# -- the job


def main(args: argparse.Namespace) -> None:
    """Each degradation: train, evaluate, and show."""
    began = time.monotonic()
    if args.overfit:
        return overfit(args)
    experiment = Experiment(args)
    results: dict[str, dict] = {}
    rows: list[tuple[str, dict[str, list]]] = []
    for degradation in wanted_degradations(args):
        levels = [degradation.fixed(sigma) for sigma in args.test_sigma or [None]]
        for level in levels:
            experiment.dataset("val", level)  # refuses wrong values before the training
        task, facts = experiment.fit(degradation)
        if not is_primary():
            continue
        for level in levels:
            metrics, pictures = experiment.evaluate(task, level)
            for method, values in metrics.items():
                results[f"{level}, {method}"] = values
            results[f"{level}, network"] |= facts
            rows.append((str(level), pictures))
    if not is_primary():
        return
    split = "test"
    if "test" not in experiment.images:
        split = "validation (there is no test folder)"
    count = len(rows[0][1]["clean"])
    facts = {
        "command": shlex.join(["python", *sys.argv]),
        "seed": args.seed,
        "epochs": args.epochs,
        "images": count,
        "judged": split,
        "hardware": hardware(experiment.device),
    }
    text = json.dumps({**facts, "results": results}, indent=2, default=str) + "\n"
    replace_file(experiment.output / "results.json", lambda path: Path(path).write_text(text))
    if args.plots:
        draw(rows, experiment.output / "pictures.png")
    columns = {"psnr": "PSNR (dB)", "ssim": "SSIM"}
    table_rows = {name: [values] for name, values in results.items()}
    images = "image" if count == 1 else "images"
    seconds = time.monotonic() - began
    print(f"\n{comparison_table(table_rows, columns)}")
    explained = (
        f"Means over the {count} {split} {images}, network of the best epoch on validation. "
        f"Seed {args.seed}, {facts['hardware']}, {seconds:.0f} s."
    )
    print(f"\n{explained} Files: {experiment.output}")
    write_report(
        experiment.output,
        f"Restored images, {args.model}",
        table_rows,
        columns,
        explained,
        experiment.histories,
        "psnr",
        settings=args.settings,
        data=experiment.summary,
        device=experiment.device,
        plots=args.plots,
    )


def wanted_degradations(args: argparse.Namespace) -> list[Degradation]:
    """What is trained for, one after the other."""
    if args.noisy:
        return [Degradation(None)]
    given = (args.sigma, args.blur, args.jpeg)
    if args.data is None and all(value is None for value in given):
        return [Degradation((25.0, 25.0)), Degradation((2.0, 2.0), (1.5, 1.5))]
    blur = args.blur or [0.0]
    jpeg = args.jpeg or [0.0]
    sigma = args.sigma or [0.0 if args.blur or args.jpeg else 25.0]
    return [Degradation((sigma[0], sigma[-1]), (blur[0], blur[-1]), (jpeg[0], jpeg[-1]))]


def draw(rows: list[tuple[str, dict[str, list]]], path: Path, side: int = 128) -> None:
    """Clean, degraded, classical, network.

    The middle of one image of each degradation, PSNR of it all below.
    """
    import matplotlib.pyplot as plt

    figure, grid = plt.subplots(
        len(rows), 4, figsize=(8.4, 2.45 * len(rows)), squeeze=False, layout="constrained"
    )
    for axes, (title, pictures) in zip(grid, rows, strict=True):
        which = min(2, len(pictures["clean"]) - 1)
        clean = pictures["clean"][which]
        for ax, (name, images) in zip(axes, pictures.items(), strict=True):
            image = images[which][0].permute(1, 2, 0).clamp(0, 1)  # (H, W, C)
            ax.imshow(middle_of(image, side).squeeze(2), cmap="gray", vmin=0, vmax=1)
            ax.set(xticks=[], yticks=[])
            ax.set_title(title if name == "degraded" else name, fontsize=9)
            if name != "clean":
                ax.set_xlabel(f"{float(psnr_of(images[which], clean)):.2f} dB", fontsize=9)
    replace_file(path, lambda temporary: figure.savefig(temporary, dpi=110, format="png"))
    plt.close(figure)


# -- the study of overfitting


def overfit(args: argparse.Namespace) -> None:
    """Networks trained on one blurred photograph, shown another, a blank and noise.

    See the top of this file.
    """
    import cv2

    began, size = time.monotonic(), args.overfit_size
    if size < 16 or size % 8:
        raise ValueError(f"--overfit-size {size} must be a multiple of 8, from 16 on.")
    photos, blur = package_photographs(), middle(args.blur or [1.5])
    small = []
    for name in ("camera", "chelsea"):
        photo = middle_of(photos[name], 300)
        small.append(cv2.resize(photo, (size, size), interpolation=cv2.INTER_AREA))
    pairs = DenoisingDataset(small, 0, blur, in_chans=args.in_chans)
    blurred, target = (image[None] for image in pairs[0])  # (1, C, H, W)
    other, other_target = (image[None] for image in pairs[1])
    blank = torch.full_like(blurred, 0.5)
    noise = torch.rand(blurred.shape, generator=torch.manual_seed(args.seed))
    seed_head = partial(RedNetHead, bottleneck=128, act="leaky_relu")
    networks = {
        "bottleneck, no skips": ((5,), seed_head(out_act=("leaky_relu", "sigmoid"))),
        "bottleneck and skips": ((3, 4, 5), seed_head(out_act=("leaky_relu", "sigmoid"))),
        "skips, residual": ((3, 4, 5), RedNetHead(act="leaky_relu", residual=True)),
    }
    results = {}
    for name, (taps, head) in networks.items():
        torch.manual_seed(args.seed)
        model = create_branch_model(
            "rednet_small",
            taps=[taps],
            head=head,
            num_classes=args.in_chans,
            names=["image"],
            in_chans=args.in_chans,
            img_size=size,
        )
        optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
        for _ in range(OVERFIT_STEPS):
            optimizer.zero_grad()
            (model(blurred)["image"] - target).square().mean().backward()
            optimizer.step()
        inputs = torch.cat([blurred, other, blank, noise])
        answers = model.eval()(inputs)["image"].detach()  # (4, C, H, W)
        to_target = psnr_of(answers, target.expand_as(answers)).tolist()
        values = dict(zip(("train", "target", "blank", "noise"), to_target, strict=True))
        values["own"] = float(psnr_of(answers[1:2], other_target))
        results[name] = [values]
    columns = {
        "train": "trained image",
        "target": "other: to target",
        "own": "other: to its own",
        "blank": "blank: to target",
        "noise": "noise: to target",
    }
    print(comparison_table(results, columns))
    from_clean = float(psnr_of(other, other_target))
    from_target = float(psnr_of(other_target, target))
    print(
        f"\nPSNR in dB. The other image's blur is {from_clean:.2f} from its clean one, "
        f"which is {from_target:.2f} from the target. {OVERFIT_STEPS} steps, "
        f"{size} px, seed {args.seed}, {time.monotonic() - began:.0f} s."
    )


if __name__ == "__main__":
    run_script(lambda: main(parse_args()))
