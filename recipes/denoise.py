"""Train a skip decoder to take noise or blur out of photographs, and hold it against classical
methods.

    python recipes/denoise.py                                # noise, then blur; under two minutes on two CPU cores
    python recipes/denoise.py data/denoise --recipe train400-sigma25   # DnCNN's task: train400/ and set12/ in there
    python recipes/denoise.py photos/ --colour --sigma 0 50 --test-sigma 15 25 50 --model resnet34
    --pretrained --amp python recipes/denoise.py photos/ --blur 1 2 --sigma 2 --tile 512 torchrun
    --nproc-per-node 4 recipes/denoise.py photos/ --epochs 50
    python recipes/denoise.py --overfit                      # what a network trained on one image makes of another

Noise is white, Gaussian, given on the scale of 0 to 255, not clipped, and in evaluation fixed by
the seed. PSNR and SSIM are means of the images' own values, for a data range of 1, and neither
rounded to 8 bits nor clipped. The classical method knows the noise's deviation or the blur; its
setting is the best on validation images.

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
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Subset

from timm_branches import BranchModel, RedNetHead, UNetHead, create_branch_model, load_model
from timm_branches.data import DenoisingDataset, create_loader
from timm_branches.dense import RestorationEvaluator, package_photographs, tiled_inference
from timm_branches.dense import peak_signal_noise_ratio as psnr_of
from timm_branches.files import replace_file
from timm_branches.task import DenseTask
from timm_branches.train import FitConfig, add_fit_arguments, fit, is_primary, setup_device
from timm_branches.train.compare import comparison_table
from timm_branches.train.script import hardware, new_output, run_script

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


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Arguments; a recipe's values are defaults that every flag overrides."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "data",
        nargs="?",
        help="a folder of images, or of the folders train, val and test "
        "(default: photographs inside scikit-image and scikit-learn)",
    )
    parser.add_argument("--recipe", choices=list(RECIPES), help="a setting in one word")
    group = parser.add_argument_group("data")
    for part in ("train", "val", "test"):
        group.add_argument(
            f"--{part}",
            help=f"folder of the {part} images within the data (default: {part}, if any)",
        )
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
        "--test-sigma", type=float, nargs="+", help="what is judged (default: the range's middle)"
    )
    group.add_argument(
        "--blur", type=float, nargs="+", help="deviation of a Gaussian blur in pixels, or a range"
    )
    colours = group.add_mutually_exclusive_group()
    colours.add_argument(
        "--grey", dest="in_chans", action="store_const", const=1, default=1, help="the default"
    )
    colours.add_argument("--colour", dest="in_chans", action="store_const", const=3)
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
    group.add_argument(
        "--model", default="rednet_small", help="any timm backbone (default: rednet_small)"
    )
    group.add_argument("--pretrained", action=argparse.BooleanOptionalAction, default=False)
    group.add_argument("--checkpoint-path", default="", help="timm checkpoint for the backbone")
    group.add_argument("--taps", nargs="+", help="the skips and the deepest map (default: 3 4 5)")
    group.add_argument("--head", choices=("unet", "rednet"), default="unet")
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
    own = parser.parse_known_args(argv)[0]
    recipe = own.recipe
    parser.set_defaults(**RECIPES.get(recipe, {}))
    if (
        own.model == "rednet_small"
        and own.head == "unet"
        and own.input_skip
        and not (own.data or recipe or own.taps or own.channels or own.overfit)
    ):
        # the job without arguments: small, so that a minute of a CPU is many steps
        parser.set_defaults(taps=["3", "4"], channels=[32, 16], lr=1e-2)
    args = parser.parse_args(argv)
    if max(len(args.sigma or ()), len(args.blur or ())) > 2:
        parser.error("--sigma and --blur take a number or a range of two")
    if args.overfit and (args.data or recipe):
        parser.error("--overfit has photographs of its own: leave out data and --recipe")
    if args.data is None and (
        given := [part for part in ("train", "val", "test") if getattr(args, part)]
    ):
        parser.error(
            f"--{given[0]} has no effect without a folder of data"
            + (f": --recipe {recipe} needs one that holds train400/ and set12/" if recipe else "")
        )
    args.taps = args.taps or ["3", "4", "5"]
    return args


class RestorationTask(DenseTask):
    """A decoder whose whole images are, where asked for, restored tile by tile."""

    def __init__(self, model: BranchModel, loss: str, tile: int | None = None):
        super().__init__(model, loss, RestorationEvaluator)
        self.tile, self.multiple = tile, max(int(info.stride) for info in model.taps)
        if tile is not None and (tile < 2 * self.multiple or tile % self.multiple):
            raise ValueError(
                f"--tile {tile} must be two or more times the coarsest tap's stride, {self.multiple}."
            )

    def answer(self, model: torch.nn.Module, input: torch.Tensor) -> dict[str, torch.Tensor]:
        """The model's answer, in tiles where a side was given."""
        if self.tile is None:
            return model(input)
        overlap = max(1, self.tile // 4 // self.multiple) * self.multiple
        return tiled_inference(model, input, self.tile, overlap, multiple=self.multiple)


class Bench:
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

        self.images = photographs() if args.data is None else folders(args)
        self.output = new_output(args.output, args.resume)

    def dataset(self, part: str, sigma: Any, blur: Any, **options: Any) -> Dataset:
        """The clean and degraded images of a part.

        Without a validation folder it is every n-th training image.
        """
        images = self.images.get(part, self.images["train"])
        data = DenoisingDataset(images, sigma, blur, in_chans=self.args.in_chans, **options)
        if "val" in self.images or part == "test":
            return data
        held = {round((k + 0.5) / self.args.val_fraction - 0.5) for k in range(len(data.images))}
        held = {i for i in held if i < len(data.images)} or {len(data.images) - 1}
        chosen = [i for i in range(len(data)) if (i // data.repeats in held) == (part == "val")]
        if not chosen:
            raise ValueError(
                f"{self.args.data}: one image is too few for training and validation; give --val."
            )
        return Subset(data, chosen)

    def fit(
        self, name: str, sigma: tuple[float, float], blur: tuple[float, float]
    ) -> tuple[RestorationTask, dict]:
        """Train; the model that comes back is that of the best epoch on validation."""
        args = self.args
        torch.manual_seed(args.seed)
        head = {"unet": UNetHead, "rednet": RedNetHead}[args.head](
            channels=args.channels, input_skip=args.input_skip, residual=True
        )
        # one decoder reads all taps
        model = create_branch_model(
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
        train = self.dataset(
            "train", sigma, blur, is_training=True, patch_size=args.patch_size, repeats=args.patches
        )
        val = self.dataset("val", middle(sigma), middle(blur))
        loader = create_loader(
            train,
            args.batch_size,
            is_training=True,
            num_workers=args.workers,
            seed=args.seed,
            pin_memory=self.device.type == "cuda",
        )
        if is_primary():
            millions = sum(p.numel() for p in model.parameters()) / 1e6
            patches, images = len(train), len(val)  # type: ignore[arg-type]
            print(
                f"\n{name}: {args.model}, {millions:.2f} M parameters, {patches} patches an epoch, "
                f"{images} images to validate",
                flush=True,
            )
        config = replace(
            self.config, output=str(self.output / name.replace(",", "").replace(" ", "_"))
        )
        run = fit(
            RestorationTask(model, args.loss, args.tile),
            loader,
            create_loader(val, 1),
            config,
            facts={"degradation": name, "seed": args.seed},
        )
        task = RestorationTask(load_model(run.model_path), args.loss, args.tile).to(self.device)
        return task, {"best_epoch": run.best_epoch, "seconds": round(run.seconds, 1)}

    @torch.no_grad()
    def judge(
        self, task: RestorationTask, sigma: float, blur: float
    ) -> tuple[dict[str, dict], dict[str, list]]:
        """Metrics of each method on the images that decide, and their images."""
        part = "test" if "test" in self.images else "val"
        model = task.trainable_module.eval()
        classical, setting = best_classical(self.dataset("val", sigma, blur), sigma, blur)
        methods: dict[str, Callable] = {
            "degraded": lambda x: x,
            setting: classical,
            "network": lambda x: task.answer(model, x.to(self.device))["image"].float().cpu(),
        }
        evaluators = {name: RestorationEvaluator() for name in methods}
        pictures: dict[str, list] = {"clean": []}
        for degraded, clean in create_loader(self.dataset(part, sigma, blur), 1):
            pictures["clean"].append(clean)
            for name, method in methods.items():
                pictures.setdefault(name, []).append(method(degraded))
                evaluators[name].update(pictures[name][-1], clean)
        return {name: dict(evaluator.compute()) for name, evaluator in evaluators.items()}, pictures


def main(args: argparse.Namespace) -> None:
    """Each degradation: train, judge, and show."""
    began = time.monotonic()
    if args.overfit:
        return overfit(args)
    bench = Bench(args)
    jobs = [(args.sigma or [0.0 if args.blur else 25.0], args.blur or [0.0])]
    if args.data is args.sigma is args.blur is None:
        jobs = [([25.0], [0.0]), ([2.0], [1.5])]
    results: dict[str, dict] = {}
    rows: list[tuple[str, dict[str, list]]] = []
    for sigma, blur in (((job[0][0], job[0][-1]), (job[1][0], job[1][-1])) for job in jobs):
        levels = args.test_sigma or [middle(sigma)]
        for level in levels:
            bench.dataset("val", level, middle(blur))  # refuses wrong values before the training
        task, facts = bench.fit(degradation(sigma, blur), sigma, blur)
        for level in levels if is_primary() else ():
            found, pictures = bench.judge(task, level, middle(blur))
            title = degradation((level,) * 2, (middle(blur),) * 2)
            results |= {f"{title}, {method}": values for method, values in found.items()}
            results[f"{title}, network"] |= facts
            rows.append((title, pictures))
    if not is_primary():
        return
    count, part = (
        len(rows[0][1]["clean"]),
        "test" if "test" in bench.images else "validation (there is no test folder)",
    )
    facts = {
        "command": shlex.join(["python", *sys.argv]),
        "seed": args.seed,
        "epochs": args.epochs,
        "images": count,
        "judged": part,
        "hardware": hardware(bench.device),
    }
    text = json.dumps({**facts, "results": results}, indent=2, default=str) + "\n"
    replace_file(bench.output / "results.json", lambda path: Path(path).write_text(text))
    if args.plots:
        draw(rows, bench.output / "pictures.png")
    print(
        "\n"
        + comparison_table(
            {name: [values] for name, values in results.items()},
            {"psnr": "PSNR (dB)", "ssim": "SSIM"},
        )
    )
    print(
        f"\nMeans over the {count} {part} image{'s' * (count > 1)}, network of the best epoch on validation. "
        f"Seed {args.seed}, {facts['hardware']}, {time.monotonic() - began:.0f} s. Files: {bench.output}"
    )


def best_classical(val: Dataset, sigma: float, blur: float, most: int = 4) -> tuple[Callable, str]:
    """The method and setting with the best mean PSNR on some validation images."""
    from skimage import restoration

    methods: dict[str, Callable] = {}
    if blur:
        reach = int(4 * blur) + 1
        line = np.exp(-((np.arange(-reach, reach + 1) / blur) ** 2) / 2)
        psf = np.outer(line, line) / line.sum() ** 2
        for count in (5, 10, 20, 40, 80):
            methods[f"Richardson-Lucy, {count} iterations"] = partial(
                by_channel,
                partial(restoration.richardson_lucy, psf=psf, num_iter=count, clip=False),
                4 * reach,
            )
    else:
        for factor in (0.4, 0.6, 0.8, 1.0):
            methods[f"non-local means, h = {factor:g} sigma"] = partial(
                whole,
                partial(
                    restoration.denoise_nl_means,
                    h=factor * sigma / 255,
                    sigma=sigma / 255,
                    patch_size=5,
                    patch_distance=6,
                    fast_mode=True,
                    channel_axis=-1,
                ),
            )

    def quality(method: Callable) -> float:
        pairs = [val[i] for i in range(min(most, len(val)))]  # type: ignore[arg-type]
        return sum(float(psnr_of(method(x[None]), y[None])) for x, y in pairs)

    best = max(methods, key=lambda name: quality(methods[name]))
    return methods[best], best


def whole(method: Callable, x: torch.Tensor) -> torch.Tensor:
    """A function of an array (H, W, C) on an image (1, C, H, W)."""
    array = method(x[0].permute(1, 2, 0).numpy())
    return torch.from_numpy(array.reshape(*x.shape[2:], -1)).permute(2, 0, 1)[None].float()


def by_channel(method: Callable, pad: int, x: torch.Tensor) -> torch.Tensor:
    """A function of a positive array (H, W), which is continued by reflection as the blur's was."""
    arrays = [np.pad(channel.numpy().clip(1e-4), pad, mode="reflect") for channel in x[0]]
    return torch.from_numpy(np.stack([method(array)[pad:-pad, pad:-pad] for array in arrays]))[
        None
    ].float()


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
            crop = middle_of(images[which][0].permute(1, 2, 0).clamp(0, 1), side)
            ax.imshow(crop.squeeze(2), cmap="gray", vmin=0, vmax=1)
            ax.set(xticks=[], yticks=[])
            ax.set_title(title if name == "degraded" else name, fontsize=9)
            if name != "clean":
                ax.set_xlabel(f"{float(psnr_of(images[which], clean)):.2f} dB", fontsize=9)
    replace_file(path, lambda temporary: figure.savefig(temporary, dpi=110, format="png"))
    plt.close(figure)


def overfit(args: argparse.Namespace) -> None:
    """Networks trained on one blurred photograph, shown another, a blank and noise.

    See the top of this file.
    """
    import cv2

    began, size = time.monotonic(), args.overfit_size
    if size < 16 or size % 8:
        raise ValueError(f"--overfit-size {size} must be a multiple of 8, from 16 on.")
    photos, blur = package_photographs(), middle(args.blur or [1.5])
    small = [
        cv2.resize(middle_of(photos[name], 300), (size, size), interpolation=cv2.INTER_AREA)
        for name in ("camera", "chelsea")
    ]
    pairs = [DenoisingDataset(small, 0, blur, in_chans=args.in_chans)[i] for i in (0, 1)]
    (blurred, target), (other, own) = ((x[None], y[None]) for x, y in pairs)
    blank, noise = (
        torch.full_like(blurred, 0.5),
        torch.rand(blurred.shape, generator=torch.manual_seed(args.seed)),
    )
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
        answers = model.eval()(torch.cat([blurred, other, blank, noise]))["image"].detach()
        psnr = psnr_of(answers, target.expand_as(answers)).tolist()
        results[name] = [
            {
                "train": psnr[0],
                "target": psnr[1],
                "own": float(psnr_of(answers[1:2], own)),
                "blank": psnr[2],
                "noise": psnr[3],
            }
        ]
    print(
        comparison_table(
            results,
            {
                "train": "trained image",
                "target": "other: to target",
                "own": "other: to its own",
                "blank": "blank: to target",
                "noise": "noise: to target",
            },
        )
    )
    print(
        f"\nPSNR in dB. The other image's blur is {float(psnr_of(other, own)):.2f} from its clean one, "
        f"which is {float(psnr_of(own, target)):.2f} from the target. {OVERFIT_STEPS} steps, "
        f"{size} px, seed {args.seed}, {time.monotonic() - began:.0f} s."
    )


def photographs() -> dict[str, Any]:
    """Of those inside installed packages.

    Textures, scans and micrographs are for training only, 256 px for judging.
    """
    found = {name: image for name, image in package_photographs().items() if name not in LEFT_OUT}
    parts = {
        part: [middle_of(found.pop(name), 256) for name in names if name in found]
        for part, names in (("val", VAL), ("test", TEST))
    }
    return {
        part: images for part, images in {**parts, "train": list(found.values())}.items() if images
    }


def middle_of(image: Any, side: int) -> Any:
    """The square of this side in the middle of an image (H, W, ...)."""
    top, left = (max(0, (n - side) // 2) for n in image.shape[:2])
    return image[top : top + side, left : left + side]


def folders(args: argparse.Namespace) -> dict[str, str]:
    """The folders of the parts; images that lie in no such folder are all for training."""
    root, found = Path(args.data), {}
    if not root.is_dir():
        raise ValueError(
            f"{root} is no folder. Give one of images, or one that holds the folders train and test."
        )
    for part in ("train", "val", "test"):
        path = root / (getattr(args, part) or part)
        if path.is_dir():
            found[part] = str(path)
        elif getattr(args, part):
            raise ValueError(f"--{part} {getattr(args, part)}: there is no folder {path}.")
    if "train" not in found and found:
        raise ValueError(
            f"{root} holds {' and '.join(found)}, but no images to train on: name them with --train."
        )
    return found or {"train": str(root)}


def middle(limits: Sequence[float]) -> float:
    """The middle of a range."""
    return (limits[0] + limits[-1]) / 2


def degradation(sigma: Sequence[float], blur: Sequence[float]) -> str:
    """What is done to the images, in words."""
    words = [
        f"{name} {'-'.join(dict.fromkeys(f'{value:g}' for value in limits))}"
        for name, limits in (("blur", blur), ("noise", sigma))
        if limits[-1]
    ]
    return ", ".join(words) or "nothing"


if __name__ == "__main__":
    run_script(lambda: main(parse_args()))
