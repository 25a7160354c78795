"""`timm-branches check`: look for faults in a network, its data and its labels before training."""

import argparse
import os
import sys
from typing import TYPE_CHECKING, Any

from timm_branches.cli import recipes
from timm_branches.cli.evaluate import PIXEL_FLAGS, add_pixel_arguments
from timm_branches.cli.text import refuse

if TYPE_CHECKING:
    from timm_branches.model import BranchModel

__all__ = ["add_parser", "run"]


def add_parser(commands: Any) -> None:
    """Add the command and its flags."""
    parser = commands.add_parser(
        "check",
        help="look for faults in a network and its data before a long training",
        description="Look for common faults on one batch: labels that do not fit, losses that are "
        "not finite, parameters without a gradient, frames that are not seen, a network that does "
        "not learn. Of a recipe all its flags may follow: `timm-branches check bcnn photos/ "
        "--model vgg16_bn`.",
    )
    parser.add_argument("model", help="a recipe's name, a timm architecture, or a model's file")
    parser.add_argument("data", nargs="?", help="as for evaluate, or as the recipe takes it")
    parser.add_argument("--split", default="train", help="train, val, test or all (default: train)")
    parser.add_argument("--taxonomy", help="the tree of a model that was saved without one")
    parser.add_argument("-b", "--batch-size", type=int, default=8, help="samples (default: 8)")
    parser.add_argument("--device", help="cpu, cuda or cuda:1 (default: a GPU if there is one)")
    add_pixel_arguments(parser)


def run(arguments: list[str], parser: argparse.ArgumentParser) -> int:
    """Check, and print what was found.

    Args:
        arguments: What stands on the command line, from `check` on.
        parser: Of the whole command line.

    Returns:
        0 if all is well, 1 if there is a problem.
    """
    name = arguments[1] if len(arguments) > 1 else ""
    if name in recipes.list_recipes():
        recipes.run_recipe(name, [*arguments[2:], "--check-only"])
        return 0
    args = parser.parse_args(arguments)
    if args.data is None:
        raise ValueError("name the data whose labels the network is to learn.")
    from timm_branches.gradients import check_model

    task, loader = _task_and_loader(args)
    batch = next(iter(loader))
    result = check_model(task, batch, progress=_say)
    print(result)
    return 0 if result.ok else 1


def _say(name: str) -> None:
    print(f"checking: {name} ...", file=sys.stderr, flush=True)


def _task_and_loader(args: argparse.Namespace) -> tuple[Any, Any]:
    from timm_branches.cli.evaluate import find_tree, make_loader
    from timm_branches.train.calibrate import make_task

    if not os.path.exists(args.model) and not args.model.startswith("hf-hub:"):
        model = _new_model(args)
    else:
        from timm_branches.cli.models import load_onto_device

        model = load_onto_device(args.model, args.device)
    if model.dense_heads:
        from timm_branches.cli.evaluate_pixels import make_pixel_task

        refuse(args, "answers for every pixel", "taxonomy")
        return make_pixel_task(args, model)
    refuse(args, "answers with labels", *PIXEL_FLAGS)
    args.workers = args.frames = args.sampling = args.stride = None
    tree = find_tree(args, model)
    task, _ = make_task(model, tree)
    return task, make_loader(args, model, tree)


def _new_model(args: argparse.Namespace) -> "BranchModel":
    """An architecture with a head for each level of the data's tree, at its last stages."""
    import timm
    import torch

    from timm_branches import create_branch_model
    from timm_branches.data import create_dataset
    from timm_branches.inference.predict import find_device

    if not timm.is_model(args.model):
        names = ", ".join(recipes.list_recipes())
        raise ValueError(
            f"{args.model} is no file, no recipe ({names}) and no architecture of timm."
        )
    tree = create_dataset(args.data, args.split, args.taxonomy).taxonomy
    assert tree is not None
    args.taxonomy = None
    taps = [max(1, 6 - tree.num_levels + i) for i in range(tree.num_levels)]
    device = find_device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return create_branch_model(args.model, taps=[min(tap, 5) for tap in taps], taxonomy=tree).to(
        device
    )
