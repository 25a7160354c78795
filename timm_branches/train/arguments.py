"""Flags that recipes share, beside those of `fit`: the data and the model."""

import argparse
import logging
import sys
from typing import Any

from timm_branches.data import DataSummary, summarize
from timm_branches.data.bad_images import describe_bad_images, find_bad_images
from timm_branches.hierarchy.class_balance import SCHEMES, class_weights
from timm_branches.taxonomy import Taxonomy
from timm_branches.train.process import is_primary

_logger = logging.getLogger(__name__)

__all__ = [
    "add_image_arguments",
    "add_model_arguments",
    "add_reading_arguments",
    "add_table_arguments",
    "balance_options",
    "image_options",
    "reading_options",
    "say_what_was_understood",
    "try_images",
    "table_options",
    "weights_of_classes",
]

_TABLE = ("levels", "path_column", "split_column", "group_column")


def add_model_arguments(group: Any, model: str) -> None:
    """The backbone: `--model --pretrained --checkpoint-path`, named as timm's.

    Args:
        group: A parser or a group of one.
        model: The recipe's own backbone.
    """
    group.add_argument("--model", default=model, help=f"any timm backbone (default: {model})")
    group.add_argument("--pretrained", action=argparse.BooleanOptionalAction, default=False)
    group.add_argument(
        "--checkpoint-path",
        default="",
        help="checkpoint to start from: timm's, or a branch model's, whose heads are loaded if "
        "their classes are the same",
    )


def add_image_arguments(group: Any) -> None:
    """How images are decoded: `--value-range`.

    Args:
        group: A parser or a group of one.
    """
    group.add_argument(
        "--value-range",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="values of black and white of images deeper than 8 bits, such as 0 4095",
    )


def add_table_arguments(group: Any) -> None:
    """How tables, deep images and unequal classes are read.

    Args:
        group: A parser or a group of one.
    """
    group.add_argument(
        "--levels",
        "--target-key",
        nargs="+",
        help="a table's columns of the levels, coarsest first (default: found)",
    )
    group.add_argument(
        "--path-column",
        "--input-key",
        help="a table's column of paths, or of the images of hfds/ and wds/ (default: found)",
    )
    group.add_argument("--split-column", help="a table's column of splits (default: found)")
    group.add_argument(
        "--group-column", help="a table's column of what splitting never divides (default: found)"
    )
    add_image_arguments(group)
    group.add_argument(
        "--class-weights",
        choices=SCHEMES,
        help="weigh rare classes more, on every level: by 1/n, 1/sqrt(n), or the effective number",
    )
    group.add_argument(
        "--sampler",
        choices=("balanced",),
        help="draw every class equally often (see --balance-level)",
    )
    group.add_argument(
        "--balance-level", help="the level whose classes --sampler balances (default: the finest)"
    )


def table_options(args: argparse.Namespace) -> dict[str, Any]:
    """What `create_splits` and its twin take of these flags, as far as they were given."""
    return {name: getattr(args, name) for name in _TABLE if getattr(args, name) is not None}


def image_options(args: argparse.Namespace) -> dict[str, Any]:
    """The stated range of values, if there is one."""
    return {} if args.value_range is None else {"value_range": tuple(args.value_range)}


def balance_options(args: argparse.Namespace, taxonomy: Taxonomy) -> dict[str, Any]:
    """What `create_loader` takes for balanced sampling.

    Raises:
        ValueError: A level without balanced sampling, or an unknown one.
    """
    if args.sampler is None:
        if args.balance_level is not None:
            raise ValueError("--balance-level has no effect without --sampler balanced.")
        return {}
    level = -1 if args.balance_level is None else taxonomy.level_index(args.balance_level)
    return {"sampler": "balanced", "balanced_level": level}


def weights_of_classes(args: argparse.Namespace, data: Any) -> dict[str, Any] | None:
    """The class weights that were asked for, from the labels of the training data."""
    if args.class_weights is None:
        return None
    return class_weights(data.labels, data.taxonomy, args.class_weights)


def add_reading_arguments(group: Any, on_bad_image: str = "stop") -> None:
    """Add the flags of images that cannot be read, and of the workers that read.

    Args:
        group: A parser or a group of one.
        on_bad_image: The default.
    """
    group.add_argument(
        "--on-bad-image",
        choices=("stop", "skip"),
        default=on_bad_image,
        help="what to do with an image that cannot be read: stop, or leave it out and name it in "
        f"bad_images.txt (above 1 %% of the data the run stops; default: {on_bad_image})",
    )
    group.add_argument(
        "--check-data",
        action="store_true",
        help="decode every image before training; by default only headers are looked at",
    )


def reading_options(args: argparse.Namespace) -> dict[str, Any]:
    """What `create_loader` takes of these flags."""
    return {"on_bad_image": args.on_bad_image}


def try_images(args: argparse.Namespace, **splits: Any) -> None:
    """Look for images that cannot be read, in one process, before anything is trained.

    Args:
        args: With the flags of :func:`add_reading_arguments`.
        **splits: The data sets by the name of their split; None is passed over.

    Raises:
        ValueError: There are some, and `--on-bad-image` is `stop`.
    """
    if not is_primary():
        return
    for split, data in splits.items():
        if data is None:
            continue
        bad = find_bad_images(data, decode=args.check_data, progress=sys.stderr.isatty())
        if not bad:
            continue
        text = f"{split}: {describe_bad_images(bad, len(data))}"
        if args.on_bad_image == "stop":
            raise ValueError(
                f"{text}. Mend or remove them, or leave them out: --on-bad-image skip."
            )
        _logger.warning("%s. They are left out.", text)


def say_what_was_understood(**splits: Any) -> DataSummary:
    """Log what was understood of the data, in one process, before anything is trained.

    Args:
        **splits: The data sets by the name of their split.

    Returns:
        The summary, to keep in the model's file as `model.data_summary`.
    """
    summary = summarize(**splits)
    if is_primary():
        _logger.info("%s", summary)
    return summary
