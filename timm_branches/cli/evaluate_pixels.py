"""`timm-branches evaluate` for models that answer for every pixel: masks and restored images."""

import argparse
import os
import sys
from functools import partial
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from timm_branches.cli.augmentation import augmentation
from timm_branches.cli.results import Results
from timm_branches.cli.text import refuse

if TYPE_CHECKING:
    from timm_branches.inference.dense import DensePredictions
    from timm_branches.model import BranchModel

__all__ = ["evaluate_pixels", "image_and_target_folders", "make_pixel_task"]

_CROP = 64  # pixels a side, enough to look for faults on


def evaluate_pixels(args: argparse.Namespace, model: "BranchModel") -> Results:
    """Compare a model's masks with those of people, or its images with clean ones.

    Raises:
        ValueError: Folders are missing, files have no partner, or masks hold other values.
    """
    from timm_branches.data.pairs import match_files
    from timm_branches.inference.dense import predict_pixels

    images, targets = image_and_target_folders(args)
    names, partners = match_files(images, targets)
    predictions = predict_pixels(model, names, kind=args.kind, tile=args.tile, **augmentation(args))
    if predictions.kind == "masks":
        results = _evaluate_masks(args, predictions, images, targets)
    else:
        refuse(args, "restores images", "mask_colors", "ignore_index")
        results = _evaluate_images(args, predictions, partners)
    results.data = f"{images}, {targets}"
    return results


def image_and_target_folders(args: argparse.Namespace) -> tuple[str, str]:
    """The folder of the images and that of their masks or clean images.

    They are `data` and `targets`, or else `data/test` and `data/testannot`, by the split's name.

    Raises:
        ValueError: There is no such folder.
    """
    images, targets = args.data, args.targets
    if targets is None:
        images = os.path.join(args.data, args.split)
        targets = os.path.join(args.data, f"{args.split}annot")
        if not (os.path.isdir(images) and os.path.isdir(targets)):
            raise ValueError(
                f"{args.data} has no folders {args.split} and {args.split}annot: give --targets, "
                "the folder of the masks or clean images."
            )
    for folder in (images, targets):
        if not os.path.isdir(folder):
            raise ValueError(f"there is no folder {folder}.")
    return images, targets


def make_pixel_task(args: argparse.Namespace, model: "BranchModel") -> tuple[Any, Any]:
    """The loss of a model on crops of labelled images, and a loader of these.

    Raises:
        ValueError: Folders are missing, files have no partner, or masks hold other values.
    """
    from timm_branches.data import RestorationDataset, create_loader
    from timm_branches.data.pair_transform import PairTransform
    from timm_branches.data.pairs import match_files
    from timm_branches.dense import RestorationEvaluator, SegmentationEvaluator
    from timm_branches.inference.dense import predict_pixels
    from timm_branches.task import DenseTask

    images, targets = image_and_target_folders(args)
    names, _ = match_files(images, targets)
    predictions = predict_pixels(model, names, kind=args.kind)
    if predictions.kind == "masks":
        cfg = model.pretrained_cfg
        transform = PairTransform(_CROP, hflip=0, mean=cfg["mean"], std=cfg["std"])
        data: Any = _masks_of(args, predictions, images, targets, transform)
        evaluator = partial(
            SegmentationEvaluator, predictions.classes, taxonomy=predictions.model.taxonomy
        )
        task = DenseTask(model, "ce", evaluator, verbose=False)
    else:
        refuse(args, "restores images", "mask_colors", "ignore_index")
        data = RestorationDataset(
            images,
            targets,
            is_training=True,
            patch_size=_CROP,
            in_chans=model.in_chans,
            value_range=model.pretrained_cfg.get("value_range"),
        )
        task = DenseTask(model, "l1", RestorationEvaluator, verbose=False)
    return task, create_loader(data, args.batch_size, is_training=True)


def _masks_of(
    args: argparse.Namespace,
    predictions: "DensePredictions",
    images: str,
    targets: str,
    transform: Any = None,
) -> Any:
    """Images and masks, whose values or colours are those of the model's classes."""
    from timm_branches.data import SegmentationDataset

    model = predictions.model
    colors: Any = args.mask_colors
    if colors is None and "colors" in model.extra:
        colors = dict(zip(predictions.colors, predictions.classes, strict=True))
    return SegmentationDataset(
        images,
        targets,
        model.taxonomy or list(predictions.classes),
        args.ignore_index,
        transform,
        mask_colors=colors,
        in_chans=model.in_chans,
        value_range=model.pretrained_cfg.get("value_range"),
    )


def _evaluate_masks(
    args: argparse.Namespace, predictions: "DensePredictions", images: str, targets: str
) -> Results:
    import numpy as np
    import torch

    from timm_branches.dense import SegmentationEvaluator

    tree = predictions.model.taxonomy
    data = _masks_of(args, predictions, images, targets)
    evaluator = SegmentationEvaluator(predictions.classes, taxonomy=tree)
    for index in _progress(len(data)):
        pixels, mask = data.pixels(index)  # (H, W, C) and (H, W), -1 is unknown
        labels = torch.from_numpy(mask.astype(np.int64))[None]
        evaluator.update(predictions.outputs(pixels, predictions.images.names[index]), labels)
    metrics = dict(evaluator.compute())
    matrices = evaluator.confusion_matrices()
    classes = _by_class(evaluator.class_iou(), matrices)
    columns = {"miou": "mIoU", "pixel_accuracy": "pixel accuracy"}
    if tree is not None:
        columns = {f"{level}_miou": f"{level} mIoU" for level in tree.levels}
        columns |= {"full_path": "full path", "consistency": "consistency"}
    return Results(
        os.fspath(args.model),
        "",
        len(data),
        "images",
        metrics,
        columns,
        classes,
        class_unit="pixels",
        measure="iou",
        matrices=matrices,
    )


def _by_class(
    ious: dict[str, dict[str, float]], matrices: Any
) -> dict[str, dict[str, dict[str, Any]]]:
    """For each level and class its pixels and its intersection over union; None if nowhere."""
    levels: dict[str, dict[str, dict[str, Any]]] = {}
    for (level, of_level), matrix in zip(ious.items(), matrices, strict=True):
        counts = matrix.sum(1).tolist()
        levels[level] = {}
        for (name, iou), count in zip(of_level.items(), counts, strict=True):
            known = iou == iou
            levels[level][name] = {"pixels": int(count), "iou": iou if known else None}
    return levels


def _evaluate_images(
    args: argparse.Namespace, predictions: "DensePredictions", clean: list[str]
) -> Results:
    from timm_branches.data.datasets import to_unit_tensor
    from timm_branches.data.image_list import ImageList
    from timm_branches.dense import RestorationEvaluator

    model = predictions.model
    targets = ImageList(clean, model.in_chans, model.pretrained_cfg.get("value_range"))
    evaluator, before = RestorationEvaluator(), RestorationEvaluator()
    for index in _progress(len(targets)):
        name = predictions.images.names[index]
        pixels = predictions.images[index]
        target = to_unit_tensor(targets[index])[None]  # (1, C, H, W)
        given = to_unit_tensor(pixels)[None]
        if given.shape != target.shape:
            raise ValueError(
                f"{name} is {given.shape[3]} x {given.shape[2]} pixels and {targets.names[index]} "
                f"is {target.shape[3]} x {target.shape[2]}: a clean image has the same size."
            )
        evaluator.update(predictions.restored(pixels, name), target)
        before.update(given, target)
    metrics = dict(evaluator.compute())
    columns = {name: name.upper() for name in metrics}
    for name, value in before.compute().items():
        metrics[f"input_{name}"] = value
        columns[f"input_{name}"] = f"input {name.upper()}"
    return Results(os.fspath(args.model), "", len(targets), "images", metrics, columns)


def _progress(count: int) -> Any:
    return tqdm(range(count), unit="image", dynamic_ncols=True, disable=not sys.stderr.isatty())
