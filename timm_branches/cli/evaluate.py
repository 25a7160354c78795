"""`timm-branches evaluate`: how good a model is on data whose answers are known."""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from timm_branches.cli.augmentation import add_augmentation
from timm_branches.cli.calibrate import ends
from timm_branches.cli.results import FORMATS, Results, write_results
from timm_branches.cli.text import refuse

if TYPE_CHECKING:
    from timm_branches.model import BranchModel
    from timm_branches.taxonomy import Taxonomy

__all__ = [
    "PIXEL_FLAGS",
    "add_parser",
    "add_pixel_arguments",
    "find_tree",
    "make_loader",
    "run",
]


def add_parser(commands: Any) -> None:
    """Add the command and its flags."""
    from timm_branches.train.recipe_parser import add_short_help

    parser = commands.add_parser(
        "evaluate",
        add_help=False,
        help="how often a model is right, by level and class",
        description="Measure a model on images, clips, masks or clean images whose answers are "
        "known, with its own transform and tree; labels are compared by name.",
    )
    add_short_help(
        parser,
        ("model", "data", "split", "targets", "ignore_index", "format", "output", "pictures")
        + ("decoder", "device", "batch_size", "workers"),
    )
    parser.add_argument("model", help="model.safetensors, a folder, or hf-hub:user/name")
    parser.add_argument(
        "data",
        help="class folders, a table, a tar, or the name of a data set; of masks and restored "
        "images a folder of images beside --targets, or one with test and testannot",
    )
    parser.add_argument("--split", default="test", help="train, val, test or all (default: test)")
    parser.add_argument("--taxonomy", help="the tree of a model that was saved without one")
    parser.add_argument(
        "--decoder", help="as for predict (default: best-path, of flat models leaf-marginal)"
    )
    parser.add_argument(
        "--calibration",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also ask whether a calibrated model keeps its promise (default: yes)",
    )
    parser.add_argument(
        "--costs",
        metavar="FILE",
        help="what mistakes cost, as for predict: reports the mean cost of any decoder's answers",
    )
    parser.add_argument("--format", choices=FORMATS, help="default: by the output's ending")
    parser.add_argument("--output", metavar="FILE", help="write here instead of to stdout")
    parser.add_argument(
        "--pictures",
        metavar="FOLDER",
        help="draw a confusion matrix for each level, and what is said at which risk",
    )
    parser.add_argument("--device", help="cpu, cuda or cuda:1 (default: a GPU if there is one)")
    parser.add_argument("-b", "--batch-size", type=int, help="images a batch (default: 64)")
    parser.add_argument("-j", "--workers", type=int, help="processes that read images")
    clips = parser.add_argument_group("clips (default: as in training)")
    clips.add_argument("--frames", type=int, metavar="T", help="how many are looked at")
    clips.add_argument("--sampling", help="uniform, dense or all")
    clips.add_argument("--stride", type=int, help="of dense sampling: frames to the next")
    clips.add_argument("--rate", type=float, help="frames a second of a video to choose among")
    add_pixel_arguments(parser)


def add_pixel_arguments(parser: argparse.ArgumentParser) -> None:
    """Where masks or clean images are, and how they are read."""
    pixels = parser.add_argument_group("masks and restored images")
    pixels.add_argument("--targets", metavar="FOLDER", help="the masks, or the clean images")
    pixels.add_argument("--mask-colors", metavar="FILE", help="a .csv or .json of colours")
    pixels.add_argument("--ignore-index", type=int, help="a mask's value for what does not count")
    pixels.add_argument("--kind", choices=("masks", "images"), help="as for predict")
    pixels.add_argument("--tile", type=int, metavar="PIXELS", help="as for predict")
    add_augmentation(pixels)


_CLIPS = ("frames", "sampling", "stride", "rate")
PIXEL_FLAGS = ("targets", "mask_colors", "ignore_index", "kind", "tile", "views", "scales")


def run(args: argparse.Namespace) -> int:
    """Evaluate, and write the table."""
    from timm_branches.cli.models import load_onto_device

    model = load_onto_device(args.model, args.device)
    if len(model.dense_heads) == len(model.names):
        from timm_branches.cli.evaluate_pixels import evaluate_pixels

        what = "answers for every pixel"
        refuse(args, what, "taxonomy", "decoder", "costs", "batch_size", "workers", *_CLIPS)
        results = evaluate_pixels(args, model)
    elif model.dense_heads:
        raise ValueError(
            f"the model has decoders, {list(model.dense_heads)}, beside heads for labels: evaluate "
            "is for models with heads of one kind."
        )
    elif model.temporal_heads:
        refuse(args, "reads clips", *PIXEL_FLAGS)
        results = _evaluate_labels(args, model, "clips")
    else:
        refuse(args, "classifies images", *PIXEL_FLAGS, *_CLIPS)
        results = _evaluate_labels(args, model, "images")
    write_results(results, args.output, args.format, args.pictures)
    return 0


def _evaluate_labels(args: argparse.Namespace, model: "BranchModel", unit: str) -> Results:
    from timm_branches.hierarchy import cost_decoder
    from timm_branches.hierarchy.coverage import CoverageEvaluator
    from timm_branches.inference.calibrated import CalibratedEvaluator, model_calibration
    from timm_branches.train import evaluate
    from timm_branches.train.calibrate import make_task

    tree = find_tree(args, model)
    task, default = make_task(model, tree)
    loader = make_loader(args, model, tree)
    calibrated = []
    temperature = 1.0
    calibration = model_calibration(model, tree) if args.calibration else None
    if calibration is not None:
        temperature = calibration.temperature
        calibrated.append(CalibratedEvaluator(calibration, tree, task.level_logits))
    coverage = CoverageEvaluator(tree, default, temperature, task.level_logits)
    decoder: Any = args.decoder or default
    facts = {"decoder": decoder}
    costs = args.costs
    if decoder == "cost":
        costs = costs or "tree-distance"
        decoder = cost_decoder(costs, tree, default, temperature)
    if costs is not None:
        facts["costs"] = costs
    beside = [coverage, *calibrated]
    evaluator = evaluate(task, loader, decoder=decoder, costs=costs, also=beside)
    matrices = evaluator.confusion_matrices()
    metrics = dict(evaluator.metrics) | coverage.compute()
    if "information@95" in metrics and tree.num_levels > 1:
        facts["information kept at 95 % right"] = (
            f"{metrics['information@95']:.1f} % by climbing the tree, "
            f"{metrics['leaf_information@95']:.1f} % by a leaf or nothing"
        )
    for each in calibrated:
        answers = each.compute()
        metrics |= answers
        facts["calibrated"] = f"{each.calibration.promise()}; {ends(answers, tree, unit)}"
        for warning in each.warnings():
            print(f"timm-branches: {warning}", file=sys.stderr)
    return Results(
        model=os.fspath(args.model),
        data=f"{args.data}, {args.split}",
        count=len(loader.dataset),
        unit=unit,
        metrics=metrics,
        columns=_columns(tree, costs is not None),
        classes=_by_class(evaluator.class_report(), tree, unit),
        class_unit=unit,
        facts=facts,
        matrices=matrices,
        curves=coverage.curves(),
    )


def find_tree(args: argparse.Namespace, model: "BranchModel") -> "Taxonomy":
    """The tree of the model, or the one that was given for it.

    Raises:
        ValueError: There is none, or there are two.
    """
    from timm_branches.taxonomy import get_taxonomy

    tree = model.taxonomy
    if args.taxonomy is not None:
        if tree is not None:
            raise ValueError("--taxonomy has no effect: the model's file has a tree.")
        tree = get_taxonomy(args.taxonomy)
    if tree is None:
        raise ValueError("the model was saved without a tree: give --taxonomy.")
    return tree


def make_loader(args: argparse.Namespace, model: "BranchModel", tree: "Taxonomy") -> Any:
    """Batches of labelled images or clips, prepared as the model takes them."""
    make = _clip_loader if model.temporal_heads else _image_loader
    return make(args, model, tree)


def _image_loader(args: argparse.Namespace, model: "BranchModel", tree: "Taxonomy") -> Any:
    from timm_branches.data import create_dataset, create_loader
    from timm_branches.inference.predict import model_transform

    data = create_dataset(
        args.data,
        args.split,
        tree,
        in_chans=model.in_chans,
        transform=model_transform(model),
        value_range=model.pretrained_cfg.get("value_range"),
    )
    batch_size = 64 if args.batch_size is None else args.batch_size
    return create_loader(data, batch_size, num_workers=args.workers or 0)


def _clip_loader(args: argparse.Namespace, model: "BranchModel", tree: "Taxonomy") -> Any:
    from timm_branches.data import create_clip_dataset, create_clip_loader
    from timm_branches.inference.clips import training_sampler
    from timm_branches.inference.predict import model_transform

    sampler = training_sampler(model)
    given = any(getattr(args, name) is not None for name in _CLIPS)
    frames = (args.frames, args.sampling, args.stride or 1)
    rate = args.rate
    if not given:
        frames = (sampler.num_frames, sampler.sampling, sampler.stride)
        rate = sampler.rate
    data = create_clip_dataset(
        args.data,
        args.split,
        tree,
        *frames,
        in_chans=model.in_chans,
        transform=model_transform(model),
        strict=True,
        value_range=model.pretrained_cfg.get("value_range"),
        rate=rate,
    )
    batch_size = 8 if args.batch_size is None else args.batch_size
    return create_clip_loader(data, batch_size, num_workers=args.workers or 0)


def _by_class(
    report: Sequence[Mapping[str, Any]], tree: "Taxonomy", unit: str
) -> dict[str, dict[str, dict[str, Any]]]:
    """For each level and class its samples and how many percent of them were named right."""
    levels: dict[str, dict[str, dict[str, Any]]] = {level: {} for level in tree.levels}
    for row in report:
        share = row["recall"] if row["support"] else None
        levels[row["level"]][row["class"]] = {unit: row["support"], "top1": share}
    return levels


def _columns(tree: "Taxonomy", with_costs: bool) -> Mapping[str, str]:
    titles = {f"{level}_top1": level for level in tree.levels}
    if with_costs:
        titles["cost"] = "mean cost"
    if tree.num_levels == 1:
        return titles
    titles |= {"full_path": "full path", "consistency": "consistency", "hf": "hF"}
    return titles | {"distance": "distance", "severity": "severity"}
