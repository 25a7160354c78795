"""`timm-branches calibrate`: answers as fine as a promise allows."""

import argparse
import os
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from timm_branches.cli.text import printable

if TYPE_CHECKING:
    from timm_branches.model import BranchModel
    from timm_branches.taxonomy import Taxonomy

__all__ = ["add_parser", "ends", "run", "say_calibration", "say_drift"]


def add_parser(commands: Any) -> None:
    """Add the command and its flags."""
    parser = commands.add_parser(
        "calibrate",
        help="let a model say as much as it is sure of, with a promise",
        description="Fit a temperature and thresholds on labelled data that training has not seen, "
        "so that answers, which climb the tree until they are sure, are right as often as was "
        "asked; and keep both in the model's file, for predict and evaluate.",
    )
    parser.add_argument("model", help="model.safetensors, with a tree and heads for labels")
    parser.add_argument("data", help="as for evaluate: data like those that the model will meet")
    parser.add_argument("--split", default="val", help="train, val, test or all (default: val)")
    parser.add_argument(
        "--target",
        nargs="+",
        default=["0.95"],
        metavar="SHARE",
        help="the share of right answers (default: 0.95), or one a level: coarse=0.99 fine=0.9",
    )
    parser.add_argument(
        "--by", metavar="LEVEL", help="keep the promise for each class of this level by itself"
    )
    parser.add_argument("--taxonomy", help="the tree of a model that was saved without one")
    parser.add_argument(
        "--output", metavar="FILE", help="write the model here (default: into its own file)"
    )
    parser.add_argument("--device", help="cpu, cuda or cuda:1 (default: a GPU if there is one)")
    parser.add_argument("-b", "--batch-size", type=int, help="images a batch (default: 64)")
    parser.add_argument("-j", "--workers", type=int, help="processes that read images")


def run(args: argparse.Namespace) -> None:
    """Calibrate, write the model, and say what it will answer."""
    from timm_branches.cli.evaluate import find_tree, make_loader
    from timm_branches.cli.models import load_onto_device
    from timm_branches.inference.calibrated import CalibratedEvaluator
    from timm_branches.train import evaluate
    from timm_branches.train.calibrate import calibrate, make_task
    from timm_branches.train.script import setup_logging
    from timm_branches.weights import save_model

    setup_logging()
    target = targets_of(args.target)
    if args.output is None and not os.path.isfile(args.model):
        raise ValueError(f"{args.model} is no file to write into: give --output FILE.")
    model = load_onto_device(args.model, args.device)
    if model.dense_heads:
        raise ValueError("calibrate is for labels: the model answers for every pixel.")
    tree = find_tree(args, model)
    args.frames = args.sampling = args.stride = args.rate = None
    loader = make_loader(args, model, tree)
    where = f"{args.data}, {args.split}"
    found = calibrate(model, loader, target, args.by, tree, where)
    task, _ = make_task(model, tree)
    answers = CalibratedEvaluator(found, tree, task.level_logits)
    evaluate(task, loader, also=[answers])
    path = save_model(model, args.output or args.model)
    unit = "clips" if model.temporal_heads else "images"
    print(
        f"{found.promise()}; on these {found.count} {unit}: {ends(answers.compute(), tree, unit)}."
    )
    print(f"Temperature {found.temperature:.3g}, {found.decoder}. Written to {path}.")


def targets_of(given: list[str]) -> float | dict[str, float]:
    """One share, or one for each level.

    Raises:
        ValueError: It is neither.
    """
    shares: dict[str, float] = {}
    for text in given:
        level, _, share = text.rpartition("=")
        try:
            shares[level] = float(share)
        except ValueError:
            raise ValueError(
                f"--target {text}: give a share such as 0.95, or a level's, coarse=0.99."
            ) from None
    if "" not in shares:
        return shares
    if len(given) > 1:
        raise ValueError(f"--target {' '.join(given)}: give one share, or one a level.")
    return shares[""]


def ends(answers: Mapping[str, float], tree: "Taxonomy", unit: str) -> str:
    """Where answers end, in words."""
    parts = []
    for level in reversed(tree.levels):
        share = answers[f"answers_at_{level}"]
        parts.append(f"down to {level} for {share:.1f} %")
    parts.append(f"no answer for {answers['answers_none']:.1f} %")
    right = answers["answers_right"]
    return f"{', '.join(parts)} of the {unit}, {right:.1f} % right"


def say_calibration(model: "BranchModel", found: Any) -> None:
    """Say on stderr whether answers are calibrated, where a model is."""
    if found.calibration is not None:
        text = f"calibrated on {found.calibration.data or 'data'}: {found.calibration.promise()}"
    elif model.calibration is not None:
        text = "the model's calibration is not used"
    else:
        return
    print(f"timm-branches: {printable(text)}", file=sys.stderr)


def say_drift(found: Any) -> None:
    """Say on stderr if what was answered is unlike the data of the calibration."""
    drift = found.drift()
    if drift is not None:
        print(f"timm-branches: {drift}", file=sys.stderr)
