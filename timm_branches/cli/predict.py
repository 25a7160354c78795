"""`timm-branches predict`: let a model answer for images."""

import argparse
import csv
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from timm_branches.cli.text import printable

if TYPE_CHECKING:
    from timm_branches.inference.predict import Predictions, Record

__all__ = ["add_parser", "run"]

FORMATS = ("text", "json", "csv")


def add_parser(commands: Any) -> None:
    """Add the command and its flags."""
    parser = commands.add_parser(
        "predict",
        help="classify images on every level of a model's tree",
        description="Classify images on every level of a model's tree. Images that cannot be read "
        "are named on stderr and left out, and the exit status is 1.",
    )
    parser.add_argument(
        "model", help="model.safetensors, a folder in the Hub's layout, or hf-hub:user/name"
    )
    parser.add_argument(
        "images", nargs="+", help="image files, folders (searched for images), tars of images"
    )
    parser.add_argument(
        "--format",
        choices=FORMATS,
        help="text: a line an image. json: one array of objects. csv: a "
        "name and a probability per level (default: by the output's ending, else text)",
    )
    parser.add_argument(
        "--output", metavar="FILE", help="write here instead of to stdout, in one piece at the end"
    )
    parser.add_argument(
        "--decoder",
        help="independent, top-down, best-path (default), leaf-marginal (default of "
        "flat models) or crm",
    )
    parser.add_argument(
        "--threshold",
        type=float,
        metavar="P",
        help="stop at the deepest level that is at least this probable, from 0 to 1",
    )
    parser.add_argument(
        "--taxonomy",
        help="the tree of a model saved without one: a ready-made tree's name, a .csv or "
        ".json, or nested class folders",
    )
    parser.add_argument(
        "--picture",
        metavar="PNG",
        help="draw the image beside its branch through the tree: a .png "
        "for one image, else a folder",
    )
    parser.add_argument(
        "--strict",
        action="store_true",
        help="stop at the first image that cannot be read, status 2",
    )
    parser.add_argument("--device", help="cpu, cuda or cuda:1 (default: a GPU if there is one)")
    parser.add_argument(
        "-b", "--batch-size", type=int, default=64, help="images a batch (default: 64)"
    )
    parser.add_argument(
        "-j", "--workers", type=int, default=0, help="worker processes that read images"
    )


def run(args: argparse.Namespace) -> int:
    """Classify, and write what was found."""
    from timm_branches.files import replace_file
    from timm_branches.inference.predict import predict

    found = predict(
        args.model,
        args.images,
        args.taxonomy,
        args.decoder,
        args.threshold,
        args.batch_size,
        args.workers,
        args.device,
        args.strict,
        top=5 if args.picture else 0,
    )
    kind = args.format or next(
        (f for f in FORMATS if str(args.output).lower().endswith(f".{f}")), "text"
    )
    write = {"text": _write_text, "json": _write_json, "csv": _write_csv}[kind]
    picture = _Pictures(args.picture, found) if args.picture else None
    errors: list[str] = []
    records = _readable(found, errors, picture)
    if args.output:
        if os.path.isdir(args.output):
            raise ValueError(f"--output {args.output} is a folder: give a file.")
        _spare(args.output, [args.model, *args.images, *found.images.names])

        def write_file(temporary: str) -> None:
            # names of files need not be valid Unicode: the bytes come out as they came in
            with open(
                temporary, "w", encoding="utf-8", errors="surrogateescape", newline=""
            ) as file:
                write(records, found, file)

        replace_file(args.output, write_file)
    else:
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="backslashreplace")
        write(records, found, sys.stdout)
        sys.stdout.flush()
    if errors:
        print(
            f"timm-branches: {len(errors)} of {len(found)} images could not be read",
            file=sys.stderr,
        )
    return 1 if errors else 0


def _readable(
    found: "Predictions",
    errors: list[str],
    picture: "Callable[[int, Record], None] | None",
) -> Iterator["Record"]:
    """The records of the images that could be read; others are named on stderr."""
    from tqdm import tqdm

    # beside lines on the terminal a bar would be in the way
    hidden = not sys.stderr.isatty() or sys.stdout.isatty()
    for i, record in enumerate(tqdm(found, unit="image", dynamic_ncols=True, disable=hidden)):
        if record.error is not None:
            errors.append(record.error)
            tqdm.write(f"timm-branches: {printable(record.error)}", file=sys.stderr)
            continue
        if picture:
            picture(i, record)
        yield record


def _write_text(records: Iterator["Record"], found: "Predictions", file: TextIO) -> None:
    """A line an image: `a.jpg  animal 0.98 > pet 0.91 > cat 0.87`."""
    for record in records:
        names: tuple[Any, ...] = record.path or tuple(
            f"{level} {label}" for level, label in zip(found.levels, record.labels, strict=False)
        )
        steps = [f"{name} {p:.2f}" for name, p in zip(names, record.probabilities, strict=True)]
        steps += ["(stopped)"] if record.stopped else []
        line = (" > " if found.taxonomy is not None else ", ").join(steps)
        file.write(f"{printable(record.file)}  {printable(line)}\n")


def _write_json(records: Iterator["Record"], found: "Predictions", file: TextIO) -> None:
    """One array, written as images are classified."""
    before = "[\n"
    for record in records:
        names = record.path or [None] * len(record.labels)
        levels = [
            {"level": level, "class": label, "name": name, "probability": _digits(p)}
            for level, label, name, p in zip(
                found.levels, record.labels, names, record.probabilities, strict=False
            )
        ]
        data: dict[str, Any] = {"file": record.file, "levels": levels}
        if found.taxonomy is not None:
            data |= {"path": record.path, "stopped": record.stopped}
        file.write(before + json.dumps(data, allow_nan=False))
        before = ",\n"
    file.write("[]\n" if before == "[\n" else "\n]\n")


def _write_csv(records: Iterator["Record"], found: "Predictions", file: TextIO) -> None:
    """A row an image.

    Its file, then name (or class index) and probability of every level; empty below the path.
    """
    table = csv.writer(file, lineterminator="\n")
    table.writerow(
        ["file", *(cell for level in found.levels for cell in (level, f"{level}_probability"))]
    )
    for record in records:
        pairs = zip(record.path or record.labels, map(_digits, record.probabilities), strict=True)
        cells: list[Any] = [cell for pair in pairs for cell in pair]
        table.writerow([record.file, *cells, *[""] * (2 * len(found.levels) - len(cells))])


class _Pictures:
    """Where the pictures go: one file for one image, or a folder with a file for each."""

    def __init__(self, path: str, found: "Predictions") -> None:
        self.path, self.found, self.used = Path(path), found, set[str]()
        self.single = path.lower().endswith(".png") and not self.path.is_dir()
        if self.single and len(found) > 1:
            raise ValueError(
                f"--picture {path} is one file, and there are {len(found)} images: give a folder."
            )
        if not self.single and self.path.is_file():
            raise ValueError(
                f"--picture {path} is a file that does not end in .png: give a .png or a folder."
            )
        if self.single:
            _spare(path, found.images.names)

    def __call__(self, index: int, record: "Record") -> None:
        from timm_branches.inference.picture import plot_prediction

        path = self.path
        if not self.single:
            # an ending of its own, so that no image is overwritten; equal names of several folders
            # are numbered
            name = stem = os.path.basename(record.file)
            count = 1
            while name in self.used:
                count += 1
                name = f"{stem}.{count}"
            self.used.add(name)
            path = self.path / f"{name}.branch.png"
        plot_prediction(
            record, self.found.images[index], self.found.levels, self.found.taxonomy, path
        )


def _spare(path: str, inputs: list[str]) -> None:
    """Refuse to write over what is read."""
    if os.path.exists(path) and any(
        os.path.exists(name) and os.path.samefile(name, path) for name in inputs
    ):
        raise ValueError(f"{path} is among what is read: write somewhere else.")


def _digits(probability: float) -> float:
    """What a float32 can tell apart, and no more."""
    return float(f"{probability:.6g}")
