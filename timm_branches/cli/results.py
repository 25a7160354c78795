"""What `timm-branches evaluate` found: as text, JSON, CSV and pictures."""

import csv
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from timm_branches.cli.text import printable, write_output

__all__ = ["FORMATS", "Results", "write_results"]

FORMATS = ("text", "json", "csv")


@dataclass
class Results:
    """What was measured.

    Attributes:
        model: The model's file.
        data: What it was measured on.
        count: How many images, or clips.
        unit: What they are: 'images' or 'clips'.
        metrics: Numbers by name.
        columns: Which of them the table shows, and their titles.
        classes: For each level and class, how many of `class_unit` it has, and `measure`.
        class_unit: 'images', 'clips' or 'pixels'.
        measure: 'top1' or 'iou', in percent.
        facts: What else is to be known, by name, such as the decoder.
        matrices: A confusion matrix (K, K) for each level, None where there are too many classes.
        curves: Risk against coverage of answers, by name.
    """

    model: str
    data: str
    count: int
    unit: str
    metrics: Mapping[str, float]
    columns: Mapping[str, str]
    classes: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    class_unit: str = "images"
    measure: str = "top1"
    facts: dict[str, Any] = field(default_factory=dict)
    matrices: Sequence[Any] = ()
    curves: Mapping[str, Any] = field(default_factory=dict)


def write_results(
    results: Results, output: str | None, format: str | None, pictures: str | None
) -> None:
    """Write the table to a file or stdout, and the pictures into a folder.

    Args:
        results: What was measured.
        output: The file; None is stdout.
        format: 'text', 'json' or 'csv'; None goes by the file's ending.
        pictures: The folder; None draws nothing.

    Raises:
        ValueError: The output is a folder, or the model itself; `pictures` is a file.
    """
    if pictures:
        _draw(results, Path(pictures))
    ending = os.path.splitext(output or "")[1].lower().removeprefix(".")
    kind = format or (ending if ending in FORMATS else "text")
    write = {"text": _write_text, "json": _write_json, "csv": _write_csv}[kind]
    write_output(output, [results.model], lambda file: write(results, file))


def _write_text(results: Results, file: TextIO) -> None:
    from timm_branches.train.compare import comparison_table

    name = os.path.basename(results.model)
    print(comparison_table({name: [results.metrics]}, results.columns), file=file)
    for level, classes in results.classes.items():
        print(f"\n{printable(level)}", file=file)
        for label, row in classes.items():
            share = "-" if row[results.measure] is None else f"{row[results.measure]:.1f}"
            print(f"{share:>7}  {row[results.class_unit]:>6}  {printable(label)}", file=file)
    what = {"top1": "Percent right", "iou": "Intersection over union in percent"}
    facts = "".join(f"; {name} {value}" for name, value in results.facts.items())
    about = f"{results.count:,} {results.unit} ({results.data}){facts}"
    if not results.classes:
        print(f"\nOf {about}.", file=file)
        return
    print(f"\n{what[results.measure]}, and {results.class_unit}, of {about}.", file=file)
    if "distance" in results.columns:
        print("Distances in levels.", file=file)


def _write_json(results: Results, file: TextIO) -> None:
    from timm_branches.train.script import nan_to_null

    found = {
        "model": results.model,
        "data": results.data,
        results.unit: results.count,
        **results.facts,
        "metrics": nan_to_null(results.metrics),
        "classes": results.classes,
    }
    file.write(json.dumps(found, indent=2, allow_nan=False) + "\n")


def _write_csv(results: Results, file: TextIO) -> None:
    table = csv.writer(file, lineterminator="\n")
    if not results.classes:
        table.writerow(["metric", "value"])
        table.writerows(results.metrics.items())
        return
    table.writerow(["level", "class", results.class_unit, results.measure])
    for level, classes in results.classes.items():
        for label, row in classes.items():
            share = row[results.measure]
            text = "" if share is None else f"{share:.6g}"
            table.writerow([level, label, row[results.class_unit], text])


def _draw(results: Results, folder: Path) -> None:
    """A confusion matrix for each level, and what is said at which risk."""
    from timm_branches.hierarchy.coverage import plot_coverage
    from timm_branches.train.curves import plot_confusion
    from timm_branches.train.script import slug

    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--pictures {folder} is a file: give a folder.")
    if not results.matrices:
        raise ValueError("--pictures has no effect on a model that restores images.")
    for (level, classes), matrix in zip(results.classes.items(), results.matrices, strict=True):
        if matrix is not None:
            plot_confusion(matrix, list(classes), folder / f"confusion_{slug(level)}.png", level)
    if results.curves:
        plot_coverage(results.curves, folder / "coverage.png")
