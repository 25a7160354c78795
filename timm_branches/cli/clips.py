"""`timm-branches predict` for models that read clips: an answer a clip, or runs of frames."""

import argparse
import csv
import json
import os
import sys
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

from tqdm import tqdm

from timm_branches.cli.calibrate import say_calibration, say_drift
from timm_branches.cli.journal import Journal, as_record, facts_of, names_folder, record_fields
from timm_branches.cli.text import printable, write_output

if TYPE_CHECKING:
    from timm_branches.inference.clips import ClipPredictions, ClipRecord
    from timm_branches.model import BranchModel

__all__ = ["run"]

FORMATS = ("text", "json", "csv", "srt")


def run(args: argparse.Namespace, model: "BranchModel") -> int:
    """Classify clips, and write what was found.

    Returns:
        The exit status, 1 if a clip could not be read.
    """
    from timm_branches.data.clips.sampling import FrameSampler
    from timm_branches.inference.clips import predict_clips

    if args.picture:
        raise ValueError("--picture has no effect on a model that reads clips.")
    sampler = None
    given = (args.frames, args.sampling, args.stride, args.rate)
    if any(value is not None for value in given):
        sampler = FrameSampler(args.frames, args.sampling, args.stride or 1, rate=args.rate)
    predictions = predict_clips(
        model,
        args.images,
        args.taxonomy,
        args.decoder,
        args.threshold,
        sampler,
        args.workers,
        strict=args.strict,
        calibrated=args.calibration,
    )
    say_calibration(model, predictions)
    kind = args.format or _format_of(args.output)
    if kind == "srt" and not (predictions.by_frame and len(predictions) == 1):
        raise ValueError("--format srt is for one video and a model that answers frame by frame.")
    errors: list[str] = []
    output = args.output
    if names_folder(output):
        kind = args.format or "csv"
        settings = {name: getattr(args, name) for name in ("decoder", "threshold")}
        # as it was called before it had a rate, so that older folders can be gone on with
        settings["sampler"] = str(predictions.sampler).replace(", rate=None", "")
        records = _kept(predictions, errors, Journal(output, facts_of(predictions, settings)))
        output = os.path.join(output, f"answers.{'txt' if kind == 'text' else kind}")
    else:
        records = _readable(predictions, len(predictions), errors)
    write = {"text": _write_text, "json": _write_json, "csv": _write_csv, "srt": _write_srt}[kind]
    write_output(
        output,
        [args.model, *predictions.files],
        lambda file: write(records, predictions, file),
    )
    say_drift(predictions)
    if errors:
        print(
            f"timm-branches: {len(errors)} of {len(predictions)} clips could not be read",
            file=sys.stderr,
        )
    return 1 if errors else 0


def _format_of(output: str | None) -> str:
    """The format that the ending of a file asks for, else text."""
    ending = os.path.splitext(output or "")[1].lower().removeprefix(".")
    return ending if ending in FORMATS else "text"


def _kept(
    predictions: "ClipPredictions", errors: list[str], journal: Journal
) -> Iterator["ClipRecord"]:
    """The records of all clips, of which those in the journal are not made again."""
    from timm_branches.inference.clips import ClipRecord

    todo = journal.pending(predictions.files)
    for record in _readable(predictions.records(todo), len(todo), errors):
        answers = list(map(record_fields, record.answers))
        kept = {"answers": answers, "frames": record.frames, "rate": record.rate}
        journal.add(record.file, kept)
    for file in predictions.files:
        kept_before = journal.get(file)
        if kept_before is not None:
            answers_before = tuple(as_record(file, fields) for fields in kept_before["answers"])
            yield ClipRecord(
                file, answers_before, tuple(kept_before["frames"]), kept_before["rate"]
            )


def _readable(
    records: "Iterable[ClipRecord]", count: int, errors: list[str]
) -> Iterator["ClipRecord"]:
    """The records of the clips that could be read; others are named on stderr."""
    hidden = not sys.stderr.isatty() or sys.stdout.isatty()
    for record in tqdm(records, total=count, unit="clip", dynamic_ncols=True, disable=hidden):
        if record.error is None:
            yield record
            continue
        errors.append(record.error)
        tqdm.write(f"timm-branches: {printable(record.error)}", file=sys.stderr)


class _Run(NamedTuple):
    """Frames one after the other that bear the same labels; of a clip's answer all."""

    first: int
    last: int
    names: tuple[Any, ...]
    probabilities: tuple[float, ...]  # means over the frames


def _runs(record: "ClipRecord", predictions: "ClipPredictions") -> list[_Run]:
    if not predictions.by_frame:
        (answer,) = record.answers
        names = answer.path or answer.labels
        return [_Run(record.frames[0], record.frames[-1], names, answer.probabilities)]
    runs = []
    frames = list(zip(record.frames, record.answers, strict=True))
    for _, group in groupby(frames, key=lambda pair: pair[1].labels):
        members = list(group)
        answers = [answer for _, answer in members]
        columns = zip(*(answer.probabilities for answer in answers), strict=True)
        means = tuple(sum(column) / len(answers) for column in columns)
        names = answers[0].path or answers[0].labels
        runs.append(_Run(members[0][0], members[-1][0], names, means))
    return runs


def _write_text(
    records: Iterator["ClipRecord"], predictions: "ClipPredictions", file: TextIO
) -> None:
    """A line a clip, `1.mp4  sport 0.98 > jump 0.91`; by frames a line a run of equal labels."""
    for record in records:
        for run in _runs(record, predictions):
            where = f"  {run.first}-{run.last}" if predictions.by_frame else ""
            steps = _steps(run, predictions)
            file.write(f"{printable(record.file)}{where}  {printable(steps)}\n")


def _steps(run: _Run, predictions: "ClipPredictions") -> str:
    names = [str(name) for name in run.names]
    if predictions.taxonomy is None:
        pairs = zip(predictions.levels, names, strict=False)
        names = [f"{level} {name}" for level, name in pairs]
    steps = [f"{name} {p:.2f}" for name, p in zip(names, run.probabilities, strict=True)]
    return (" > " if predictions.taxonomy is not None else ", ").join(steps) or "(stopped)"


def _write_json(
    records: Iterator["ClipRecord"], predictions: "ClipPredictions", file: TextIO
) -> None:
    """One array with an object a clip; by frames with its runs of equal labels."""
    before = "[\n"
    for record in records:
        runs = []
        for run in _runs(record, predictions):
            levels = []
            for level, name, p in zip(
                predictions.levels, run.names, run.probabilities, strict=False
            ):
                levels.append({"level": level, "name": name, "probability": float(f"{p:.6g}")})
            runs.append({"first": run.first, "last": run.last, "levels": levels})
        data: dict[str, Any] = {"file": record.file, "rate": record.rate}
        if predictions.by_frame:
            data["runs"] = runs
        else:
            data |= {"frames": list(record.frames), "levels": runs[0]["levels"]}
        file.write(before + json.dumps(data, allow_nan=False))
        before = ",\n"
    file.write("[]\n" if before == "[\n" else "\n]\n")


def _write_csv(
    records: Iterator["ClipRecord"], predictions: "ClipPredictions", file: TextIO
) -> None:
    """A row a clip, by frames a row a frame; name (or class) and probability of every level."""
    table = csv.writer(file, lineterminator="\n")
    header = ["file", "frame", "seconds"] if predictions.by_frame else ["file"]
    for level in predictions.levels:
        header += [level, f"{level}_probability"]
    table.writerow(header)
    for record in records:
        for number, answer in enumerate(record.answers):
            row: list[Any] = [record.file]
            if predictions.by_frame:
                frame = record.frames[number]
                seconds = "" if record.rate is None else f"{frame / record.rate:.3f}"
                row += [frame, seconds]
            for name, p in zip(answer.path or answer.labels, answer.probabilities, strict=True):
                row += [name, float(f"{p:.6g}")]
            table.writerow(row + [""] * (len(header) - len(row)))


def _write_srt(
    records: Iterator["ClipRecord"], predictions: "ClipPredictions", file: TextIO
) -> None:
    """Subtitles: the labels of each run of frames, while these are shown."""
    for record in records:
        if record.rate is None:
            raise ValueError(f"{record.file} has no frame rate: --format srt needs a video.")
        for number, run in enumerate(_runs(record, predictions), start=1):
            begin = _srt_time(run.first / record.rate)
            end = _srt_time((run.last + 1) / record.rate)
            names = printable(" > ".join(map(str, run.names)))
            file.write(f"{number}\n{begin} --> {end}\n{names}\n\n")


def _srt_time(seconds: float) -> str:
    milliseconds = round(1000 * seconds)
    minutes, milliseconds = divmod(milliseconds, 60_000)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02}:{minutes:02}:{milliseconds // 1000:02},{milliseconds % 1000:03}"
