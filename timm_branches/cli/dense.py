"""`timm-branches predict` for models that answer for every pixel: a folder of pictures."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from timm_branches.cli.augmentation import augmentation
from timm_branches.cli.journal import begin_folder
from timm_branches.cli.text import place_of, printable
from timm_branches.files import replace_file

if TYPE_CHECKING:
    from timm_branches.inference.dense import DensePredictions, DenseRecord
    from timm_branches.model import BranchModel

__all__ = ["run"]

_NOTE = "predictions.json"
_SOURCES = "sources.jsonl"


def run(args: argparse.Namespace, model: "BranchModel") -> int:
    """Write a mask or a restored image for each image; what is there already is kept.

    Returns:
        The exit status, 1 if an image could not be read.
    """
    from timm_branches.inference.dense import predict_pixels

    if not args.output:
        raise ValueError("this model answers for every pixel: give --output FOLDER.")
    folder = Path(args.output)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output {folder} is a file: give a folder.")
    predictions = predict_pixels(
        model,
        args.images,
        args.head,
        kind=args.kind,
        tile=args.tile,
        num_workers=args.workers,
        strict=args.strict,
        **augmentation(args),
    )
    if args.overlay and predictions.kind == "images":
        raise ValueError("--overlay has no effect on a model that restores images.")
    targets = _targets(predictions.images.names, args.images)
    _begin(folder, predictions, args)
    sources = [place_of(name) for name in predictions.images.names]
    known = _read_sources(folder)
    todo = []
    for index, (name, source) in enumerate(zip(targets, sources, strict=True)):
        if os.path.realpath(folder / name) in sources:
            raise ValueError(f"{folder / name} is among what is read: write somewhere else.")
        if not (folder / name).exists():
            todo.append(index)
        elif known.get(name) != source:
            whose = f"the answer for {known[name]}" if name in known else "of unknown origin"
            raise ValueError(f"{folder / name} is {whose}, not for {source}: give another folder.")
    done = len(targets) - len(todo)
    if done:
        print(f"{done} of {len(targets)} are there already in {folder}", file=sys.stderr)
    errors = 0
    hidden = not sys.stderr.isatty()
    records = predictions.records(todo)
    for index, record in zip(
        todo, tqdm(records, total=len(todo), unit="image", disable=hidden), strict=True
    ):
        if record.error is not None:
            errors += 1
            tqdm.write(f"timm-branches: {printable(record.error)}", file=sys.stderr)
            continue
        _note_source(folder, targets[index], sources[index])
        _write(record, folder / targets[index], predictions, args.overlay)
    print(f"{len(todo) - errors} written to {folder}")
    if errors:
        print(
            f"timm-branches: {errors} of {len(targets)} images could not be read", file=sys.stderr
        )
    return 1 if errors else 0


def _begin(folder: Path, predictions: "DensePredictions", args: argparse.Namespace) -> None:
    """Note what the folder's answers are of; refuse to mix them with others.

    Raises:
        ValueError: The folder has answers of another model or with other settings.
    """
    from timm_branches.tensor_files import digest_tensors

    state = dict(predictions.model.state_dict())
    facts: dict[str, Any] = {
        "model": digest_tensors(state, {}),
        "heads": list(predictions.heads),
        "kind": predictions.kind,
        "tile": predictions.tile,
        "overlay": args.overlay,
        "classes": list(predictions.classes),
        "colors": [list(color) for color in predictions.colors],
    }
    if augmentation(args):
        facts["augmentation"] = [predictions.views, list(predictions.scales)]
    begin_folder(folder / _NOTE, facts)


def _read_sources(folder: Path) -> dict[str, str]:
    """Which image each answer in the folder is for."""
    path = folder / _SOURCES
    if not path.exists():
        return {}
    sources: dict[str, str] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            target, source = json.loads(line)
        except ValueError:  # cut where the machine stopped; the answer was not written either
            continue
        sources[target] = source
    return sources


def _note_source(folder: Path, target: str, source: str) -> None:
    """Add an answer's image to the list, before the answer itself."""
    with open(folder / _SOURCES, "a", encoding="utf-8") as file:
        # on a line of its own, whatever a stopped machine left of the last one
        file.write(f"\n{json.dumps([target, source])}\n")


def _targets(names: Sequence[str], inputs: Sequence[str]) -> list[str]:
    """The files to write, by the images' names below the folders that were given.

    Of two images that would have one, the later bears a number.
    """
    roots = []
    for given in inputs:
        # of a tar the names are 'images.tar:cat/1.jpg'
        roots.append(given.rstrip("/") + "/" if os.path.isdir(given) else f"{given}:")
    targets: list[str] = []
    taken: set[str] = set()
    for name in names:
        short = os.path.basename(name)
        for root in roots:
            if name.startswith(root):
                short = name[len(root) :]
        # below the folder whatever a tar says
        stem = os.path.splitext(os.path.normpath(f"/{short}"))[0].lstrip("/")
        target, count = f"{stem}.png", 1
        while target.lower() in taken:
            count += 1
            target = f"{stem}.{count}.png"
        taken.add(target.lower())
        targets.append(target)
    return targets


def _write(
    record: "DenseRecord", path: Path, predictions: "DensePredictions", overlay: bool
) -> None:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    if record.image is not None:
        pixels = record.image
        _save(Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels), path)
        return
    assert record.mask is not None
    mask = Image.fromarray(record.mask)
    if record.mask.dtype == np.uint8:
        mask.putpalette(list(chain.from_iterable(predictions.colors)))
    if overlay:
        _save(_overlay(record, predictions), path.with_suffix(".overlay.png"))
    _save(mask, path)  # last: with it the image counts as done


def _overlay(record: "DenseRecord", predictions: "DensePredictions") -> Any:
    """The image in grey under the colours of its classes."""
    from PIL import Image

    assert record.pixels is not None
    assert record.mask is not None
    pixels = record.pixels.astype(np.float32)
    if record.pixels.dtype != np.uint8:
        pixels = pixels * 255
    grey = pixels.mean(-1, keepdims=True)  # (H, W, 1)
    colors = np.array(predictions.colors, np.float32)[record.mask]  # (H, W, 3)
    return Image.fromarray((0.5 * grey + 0.5 * colors).round().astype(np.uint8))


def _save(image: Any, path: Path) -> None:
    replace_file(path, lambda temporary: image.save(temporary, format="PNG"))
