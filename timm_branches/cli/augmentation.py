"""Test-time augmentation on the command line: the same flags for `predict` and `evaluate`."""

import argparse
from typing import Any


def augmentation(args: argparse.Namespace) -> dict[str, Any]:
    """What was asked for of test-time augmentation, as `predict_pixels` takes it."""
    given = {"views": args.views, "scales": args.scales}
    return {name: value for name, value in given.items() if value is not None}


def add_augmentation(parser: argparse._ActionsContainer) -> None:
    """The flags of test-time augmentation."""
    parser.add_argument(
        "--views",
        choices=("flip", "d4"),
        help="of masks and images: average over the mirrored image, or over all eight views",
    )
    parser.add_argument(
        "--scales", type=float, nargs="+", help="of masks and images: read them in these sizes"
    )
