"""The page itself: what a run gave, section by section."""

import io
import logging
import math
import os
import platform
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch

from timm_branches.data import DataSummary
from timm_branches.files import atomic_write
from timm_branches.train.compare import Results
from timm_branches.train.report.answers import Answers
from timm_branches.train.report.html import (
    details,
    document,
    figure,
    read_png,
    section,
    table,
    text,
)
from timm_branches.train.report.tree import confusion_table, example_cards, tree_outline
from timm_branches.train.script import hardware

__all__ = ["report_page", "write_report"]

_logger = logging.getLogger(__name__)

MOST_CURVES = 12  # pictures of curves
MOST_LEFT_OUT = 100  # lines of what could not be read
_SHOWN_OF_LOG = ("_top1", "full_path", "miou", "psnr", "ssim")

History = Sequence[Mapping[str, Any]]


def write_report(output: str | os.PathLike, *args: Any, **kwargs: Any) -> Path | None:
    """Write :func:`report_page` to `report.html` in a run's folder, atomically.

    A report that cannot be made is warned about: what was trained is on the disk already.

    Args:
        output: The folder.
        *args: As for :func:`report_page`.
        **kwargs: As there.

    Returns:
        The file; None if it could not be made.
    """
    try:
        page = report_page(output, *args, **kwargs)
        return atomic_write(Path(output) / "report.html", page.encode())
    except Exception as error:  # whatever it is, hours of training are worth more
        _logger.warning("No report.html: %s: %s", type(error).__name__, error)
        return None


def report_page(
    output: str | os.PathLike,
    title: str,
    results: Results,
    columns: Mapping[str, str],
    closing: str = "",
    histories: Mapping[str, History] | None = None,
    metric: str = "",
    answers: Answers | Callable[[], Answers | None] | None = None,
    settings: Mapping[str, Any] | None = None,
    data: DataSummary | None = None,
    device: torch.device | None = None,
    plots: bool = True,
) -> str:
    """What a run gave, as one page that needs no other file, no network and no JavaScript.

    Args:
        output: The run's folder, whose pictures and `bad_images.txt` are taken in.
        title: Of the page.
        results: For each method one dict of metrics a seed.
        columns: Metric -> its title.
        closing: What the table means, in sentences.
        histories: For each training the rows of its `log.csv`.
        metric: Its curve is drawn where no level has an accuracy.
        answers: What :func:`examine` gave, or what calls it: the tree, mistakes and examples are
            shown of it.
        settings: The run's configuration.
        data: What was understood of the data.
        device: Where it was trained.
        plots: Draw curves, which needs matplotlib.

    Returns:
        The page's HTML. Names and paths are escaped, and a tree of many thousand leaves is shown in
        part.

    Example:
        >>> page = report_page('.', 'A run', {'B-CNN': [{'top1': 50.0}]}, {'top1': 'top-1'})
        >>> '<td>50.00</td>' in page
        True
    """
    folder = Path(output)
    histories = histories or {}
    if callable(answers):
        answers = answers()
    sections = [
        section("Results", [_results(results, columns), _sentences(closing)]),
        section("Curves", _curves(histories, metric, plots)),
    ]
    if answers is not None:
        what = f"{len(answers.labels)} samples"
        sections += [
            section(f"The tree by accuracy ({what})", [tree_outline(answers)]),
            section("Confusions that cost most", [confusion_table(answers)]),
            section("Examples", example_cards(answers)),
        ]
    sections += [
        section("Pictures", _pictures(folder)),
        section("Data", _data(folder, data, answers)),
        section("Configuration", _configuration(settings or {})),
        section("Versions", [table(_versions(device), words=True)]),
    ]
    return document(title, f"Files of this run: {folder}", sections)


def _results(results: Results, columns: Mapping[str, str]) -> str:
    """Means, and deviations over several seeds, as `comparison_table` has them."""
    rows = [["", *columns.values()]]
    for name, runs in results.items():
        row = [name]
        for metric in columns:
            row.append(_cell([run[metric] for run in runs if metric in run]))
        rows.append(row)
    return table(rows)


def _cell(values: Sequence[float]) -> str:
    known = [value for value in values if value is not None and not math.isnan(value)]
    if not known or len(known) < len(values):
        return "-"
    mean = fmean(known)
    if len(known) == 1:
        return f"{mean:.2f}"
    return f"{mean:.2f} ± {stdev(known):.2f}"


def _sentences(words: str) -> str:
    lines = [f"<p>{text(line, 2000)}</p>" for line in words.splitlines() if line.strip()]
    return "\n".join(lines)


def _curves(histories: Mapping[str, History], metric: str, plots: bool) -> list[str]:
    """A picture of each training over its weight schedule, and its numbers below."""
    parts = []
    for number, (name, rows) in enumerate(histories.items()):
        if not rows:
            continue
        if number == MOST_CURVES:
            more = len(histories) - MOST_CURVES
            parts.append(f"<p>{more} more trainings have their curves in their own folders.</p>")
            break
        parts.append(f"<h3>{text(name)}</h3>")
        if plots:
            parts.append(_curve(rows, metric, name))
        parts.append(details("epoch by epoch", table(_log(rows))))
    return parts


def _curve(rows: History, metric: str, name: str) -> str:
    try:
        from timm_branches.train.curves import history_figure

        out = io.BytesIO()
        history_figure(rows, metric).savefig(out, format="png")
    except ImportError:
        return "<p>There is no curve: matplotlib is not installed.</p>"
    except ValueError as error:  # nothing to draw
        return f"<p>{text(error)}</p>"
    return figure(out.getvalue(), f"{name}: by epoch, on validation")


def _log(rows: History, most: int = 200) -> list[list[Any]]:
    """The numbers of each epoch, counted from 1; of a long training the last ones."""
    keys = list(dict.fromkeys(chain.from_iterable(rows)))
    if sum(key.startswith("eval_") and key.endswith("_top1") for key in keys) == 1:
        keys = [key for key in keys if key != "eval_full_path"]  # one level is the whole path
    shown = []
    for key in keys:
        measured = key.startswith("eval_") and key.endswith(_SHOWN_OF_LOG)
        if measured or key in ("train_loss", "lr") or key.startswith("weight_"):
            shown.append(key)
    table_rows: list[list[Any]] = [["epoch", *(_title(key) for key in shown)]]
    for row in rows[-most:]:
        table_rows.append([row["epoch"] + 1, *(_number(row.get(key)) for key in shown)])
    return table_rows


def _title(key: str) -> str:
    return key.removeprefix("eval_").removesuffix("_top1").replace("_", " ")


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else "-"


def _pictures(folder: Path) -> list[str]:
    """What the recipe drew: examples of masks and restored images, a study's curves."""
    parts = []
    for name, caption in (
        ("pictures.png", "Examples"),
        ("collapse.png", "What becomes of a level whose weight is 0"),
    ):
        picture = read_png(folder / name)
        if picture is not None:
            parts.append(figure(picture, caption))
    return parts


def _data(folder: Path, data: DataSummary | None, answers: Answers | None) -> list[str]:
    """What was understood, and what was left out."""
    parts = []
    if data is not None:
        parts += [f"<p>{text(line, 2000)}</p>" for line in str(data).splitlines()]
    left_out: dict[str, str] = {}
    for path in sorted(folder.rglob("bad_images*.txt")):
        for line in path.read_text(encoding="utf-8").splitlines():
            image, _, reason = line.partition("\t")
            left_out[image] = reason
    if answers is not None:
        left_out |= answers.left_out
    if left_out:
        named = list(left_out.items())[:MOST_LEFT_OUT]
        rows = [("left out", "why"), *named]
        title = f"{len(left_out)} could not be read and were left out"
        if len(named) < len(left_out):
            title += f", of which the first {MOST_LEFT_OUT}"
        parts.append(details(title, table(rows, words=True), opened=len(left_out) <= 10))
    return parts


def _configuration(settings: Mapping[str, Any]) -> list[str]:
    command = shlex.join(["python", *sys.argv])
    parts = [f"<pre>{text(command, 4000)}</pre>"]
    if settings:
        rows = [("setting", "value"), *settings.items()]
        parts.append(details("all settings", table(rows, words=True)))
    return parts


def _versions(device: torch.device | None) -> list[tuple[str, str]]:
    from importlib.metadata import version

    rows = [
        ("", "version"),
        ("Python", platform.python_version()),
        ("torch", torch.__version__),
        ("timm", version("timm")),
        ("timm_branches", version("timm_branches")),
        ("system", platform.platform()),
    ]
    if device is not None:
        rows.append(("device", hardware(device)))
    return rows
