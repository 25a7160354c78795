"""`timm-branches predict`: let a model answer for images."""

import argparse
import csv
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from timm_branches.cli.augmentation import add_augmentation
from timm_branches.cli.calibrate import say_calibration, say_drift
from timm_branches.cli.journal import Journal, as_record, facts_of, names_folder, record_fields
from timm_branches.cli.text import printable, refuse, spare, write_output

if TYPE_CHECKING:
    from timm_branches.hierarchy.decode import Decoder
    from timm_branches.inference.predict import Predictions, Record
    from timm_branches.model import BranchModel

__all__ = ["add_parser", "run"]

FORMATS = ("text", "json", "csv")
_CLIP_FORMATS = (*FORMATS, "srt")


def add_parser(commands: Any) -> None:
    """Add the command and its flags."""
    from timm_branches.train.recipe_parser import add_short_help

    parser = commands.add_parser(
        "predict",
        add_help=False,
        help="let a model answer: classes, clips, masks or restored images",
        description="Let a model answer for images: a path through its tree each; for videos and "
        "folders of frames, if it reads clips; and pictures in a folder, if it answers for every "
        "pixel. What cannot be read is named on stderr and left out, and the exit status is 1.",
    )
    add_short_help(
        parser,
        ("model", "images", "format", "output", "decoder", "threshold", "picture", "overlay")
        + ("device", "batch_size", "workers"),
    )
    parser.add_argument(
        "model", help="model.safetensors, a folder in the Hub's layout, or hf-hub:user/name"
    )
    parser.add_argument(
        "images",
        nargs="+",
        help="files, folders (searched), tars of images, patterns such as '*.jpg', tables with a "
        "column of paths, or - for paths on standard input",
    )
    parser.add_argument(
        "--format",
        choices=_CLIP_FORMATS,
        help="text: a line an image. json: one array of objects. csv: a "
        "name and a probability per level. srt: subtitles of a video, from a model that answers "
        "frame by frame (default: by the output's ending, else text)",
    )
    parser.add_argument(
        "--output",
        metavar="PATH",
        help="a file to write to instead of stdout, in one piece at the end; or a folder, in "
        "which what is there already is kept and a stopped run goes on",
    )
    parser.add_argument(
        "--decoder",
        help="independent, top-down, best-path (default), leaf-marginal (default of "
        "flat models), crm or cost",
    )
    parser.add_argument(
        "--costs",
        metavar="FILE",
        help="of --decoder cost: what mistakes cost, a .csv with the columns answer, truth and "
        "cost, or tree-distance (default), lca-height, wu-palmer, information or hf",
    )
    parser.add_argument(
        "--threshold",
        type=float,
        metavar="P",
        help="stop at the deepest level that is at least this probable, from 0 to 1",
    )
    parser.add_argument(
        "--calibration",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="answer as finely as a calibrated model's promise allows (default: yes, unless a "
        "threshold or decoder is given)",
    )
    parser.add_argument(
        "--novel",
        action="store_true",
        help="say where a thing is of none of the known kinds: '(unknown fruit)'",
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
        "--overlay", action="store_true", help="of masks: draw them over the images, too"
    )
    parser.add_argument(
        "--head", help="of a model with labels and masks: the decoder that is to answer"
    )
    parser.add_argument(
        "--kind",
        choices=("masks", "images"),
        help="what the channels of a decoder are, where its file does not say",
    )
    parser.add_argument(
        "--tile",
        type=int,
        metavar="PIXELS",
        help="of masks and images: read images in tiles of this side, 0 whole (default: 512 for "
        "images of more than 2 million pixels)",
    )
    add_augmentation(parser)
    parser.add_argument("--frames", type=int, metavar="T", help="of clips: how many are looked at")
    parser.add_argument(
        "--sampling",
        help="of clips: uniform, dense, random or all (default, as for --frames and --stride: as "
        "in training; all for a model that answers frame by frame)",
    )
    parser.add_argument("--stride", type=int, help="of dense sampling: frames from one to the next")
    parser.add_argument("--rate", type=float, help="of videos: frames a second to choose among")
    parser.add_argument(
        "--strict",
        action="store_true",
        help="stop at the first image that cannot be read, status 2",
    )
    parser.add_argument("--device", help="cpu, cuda or cuda:1 (default: a GPU if there is one)")
    parser.add_argument(
        "-b", "--batch-size", type=int, help="images a batch, of classes (default: 64)"
    )
    parser.add_argument(
        "-j", "--workers", type=int, default=0, help="worker processes that read images"
    )


def run(args: argparse.Namespace) -> int:
    """Classify, and write what was found."""
    from timm_branches.cli.inputs import expand_inputs
    from timm_branches.cli.models import load_onto_device
    from timm_branches.inference.predict import predict

    tables = [given for given in args.images if os.path.isfile(given)]
    args.images = expand_inputs(args.images)
    model = load_onto_device(args.model, args.device)
    if args.head is not None and args.head not in model.dense_heads:
        decoders = ", ".join(model.dense_heads) or "none"
        raise ValueError(f"--head {args.head}: choose a decoder of the model ({decoders}).")
    if args.head is not None or len(model.dense_heads) == len(model.names):
        from timm_branches.cli import dense

        flags = (
            "format",
            "decoder",
            "costs",
            "novel",
            "threshold",
            "taxonomy",
            "picture",
            "batch_size",
        )
        refuse(args, "answers for every pixel", *flags, "frames", "sampling", "stride", "rate")
        return dense.run(args, model)
    if model.temporal_heads:
        from timm_branches.cli import clips

        of_pixels = ("overlay", "kind", "tile", "views", "scales")
        refuse(args, "reads clips", *of_pixels, "batch_size", "costs", "novel")
        return clips.run(args, model)
    others = ("overlay", "kind", "tile", "views", "scales", "frames", "sampling", "stride", "rate")
    refuse(args, "classifies images", *others)
    if args.format == "srt":
        raise ValueError("--format srt is for a model that reads clips.")
    batch_size = 64 if args.batch_size is None else args.batch_size
    found = predict(
        model,
        args.images,
        args.taxonomy,
        _decoder(args, model),
        args.threshold,
        batch_size,
        args.workers,
        None,
        args.strict,
        top=5 if args.picture else 0,
        calibrated=args.calibration,
        novel=args.novel,
    )
    say_calibration(model, found)
    kind = args.format or next(
        (f for f in FORMATS if str(args.output).lower().endswith(f".{f}")), "text"
    )
    write = {"text": _write_text, "json": _write_json, "csv": _write_csv}[kind]
    picture = _Pictures(args.picture, found) if args.picture else None
    errors: list[str] = []
    output = args.output
    if names_folder(output):
        if picture:
            raise ValueError("--picture does not go with answers in a folder: give --output FILE.")
        kind = args.format or "csv"
        write = {"text": _write_text, "json": _write_json, "csv": _write_csv}[kind]
        records = _kept(found, errors, Journal(output, facts_of(found, _settings(args))))
        output = os.path.join(output, f"answers.{'txt' if kind == 'text' else kind}")
    else:
        records = _readable(found, len(found), errors, picture)
    write_output(
        output,
        [args.model, *tables, *args.images, *found.images.names],
        lambda file: write(records, found, file),
    )
    say_drift(found)
    if errors:
        print(
            f"timm-branches: {len(errors)} of {len(found)} images could not be read",
            file=sys.stderr,
        )
    return 1 if errors else 0


def _decoder(args: argparse.Namespace, model: "BranchModel") -> "str | Decoder | None":
    """The decoder that the flags ask for; that of costs uses a calibrated temperature."""
    if args.decoder != "cost":
        if args.costs is not None:
            raise ValueError("--costs has no effect without --decoder cost.")
        return args.decoder
    from timm_branches.hierarchy import cost_decoder
    from timm_branches.inference.calibrated import model_calibration
    from timm_branches.taxonomy import get_taxonomy
    from timm_branches.train.calibrate import make_task

    tree = model.taxonomy
    if tree is None and args.taxonomy is None:
        raise ValueError("--decoder cost needs a tree, and the model has none: give --taxonomy.")
    tree = get_taxonomy(args.taxonomy) if tree is None else tree
    scores, temperature = make_task(model, tree)[1], 1.0
    calibration = model_calibration(model, tree) if args.calibration else None
    if calibration is not None:
        scores, temperature = calibration.decoder, calibration.temperature
    return cost_decoder(args.costs or "tree-distance", tree, scores, temperature)


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """What the answers depend on beside the model."""
    settings = {name: getattr(args, name) for name in ("decoder", "threshold", "novel", "costs")}
    if args.costs is not None and os.path.isfile(args.costs):
        settings["costs"] = hashlib.sha256(Path(args.costs).read_bytes()).hexdigest()
    return settings


def _kept(found: "Predictions", errors: list[str], journal: Journal) -> Iterator["Record"]:
    """The records of all images, of which those in the journal are not made again."""
    todo = journal.pending(found.images.names)
    for record in _readable(found.records(todo), len(todo), errors, None):
        journal.add(record.file, record_fields(record))
    for name in found.images.names:
        answer = journal.get(name)
        if answer is not None:
            yield as_record(name, answer)


def _readable(
    records: "Iterable[Record]",
    count: int,
    errors: list[str],
    picture: "Callable[[int, Record], None] | None",
) -> Iterator["Record"]:
    """The records of the images that could be read; others are named on stderr."""
    from tqdm import tqdm

    # beside lines on the terminal a bar would be in the way
    hidden = not sys.stderr.isatty() or sys.stdout.isatty()
    bar = tqdm(records, total=count, unit="image", dynamic_ncols=True, disable=hidden)
    for i, record in enumerate(bar):
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
        if record.novelty is not None:
            kind = f"unknown {names[-1]}" if names else "unknown"
            steps.append(f"({kind} {record.novelty:.2f})")
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
        if found.novel:
            data["novelty"] = None if record.novelty is None else _digits(record.novelty)
        file.write(before + json.dumps(data, allow_nan=False))
        before = ",\n"
    file.write("[]\n" if before == "[\n" else "\n]\n")


def _write_csv(records: Iterator["Record"], found: "Predictions", file: TextIO) -> None:
    """A row an image.

    Its file, then name (or class index) and probability of every level; empty below the path.
    """
    table = csv.writer(file, lineterminator="\n")
    header = ["file"]
    for level in found.levels:
        header += [level, f"{level}_probability"]
    if found.novel:
        header.append("novelty")
    table.writerow(header)
    for record in records:
        pairs = zip(record.path or record.labels, map(_digits, record.probabilities), strict=True)
        cells: list[Any] = list(chain.from_iterable(pairs))
        cells += [""] * (2 * len(found.levels) - len(cells))
        if found.novel:
            cells.append("" if record.novelty is None else _digits(record.novelty))
        table.writerow([record.file, *cells])


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
            spare(path, found.images.names)

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


def _digits(probability: float) -> float:
    """What a float32 can tell apart, and no more."""
    return float(f"{probability:.6g}")
