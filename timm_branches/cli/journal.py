"""Answers that are kept as they come, so that a stopped `predict` goes on where it was."""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from timm_branches.cli.text import place_of

if TYPE_CHECKING:
    from timm_branches.inference.clips import ClipPredictions
    from timm_branches.inference.predict import Predictions, Record

__all__ = ["Journal", "as_record", "begin_folder", "facts_of", "names_folder", "record_fields"]

_NOTE = "predict.json"
_ANSWERS = "answers.jsonl"


class Journal:
    """The answers in a folder: a line of JSON each, in `answers.jsonl`.

    Args:
        folder: The folder; it is made.
        facts: What answers depend on, JSON-safe: the model and the settings. They are kept in
            `predict.json`.

    Attributes:
        answers: By the image's place, what was answered.

    Raises:
        ValueError: The folder holds the answers of another model or with other settings, or a line
            that is no answer.
    """

    def __init__(self, folder: str | os.PathLike, facts: dict[str, Any]) -> None:
        self.folder = Path(folder)
        self.path = self.folder / _ANSWERS
        if self.path.exists() and not (self.folder / _NOTE).exists():
            raise ValueError(f"{self.path} is of unknown origin: give another folder.")
        begin_folder(self.folder / _NOTE, facts)
        self.answers = self._read()
        self._stamps: dict[str, list[int]] = {}

    def _read(self) -> dict[str, dict[str, Any]]:
        if not self.path.exists():
            return {}
        text = self.path.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        if whole != text:  # cut where the machine stopped
            os.truncate(self.path, len(whole))
        answers = {}
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                place, answer = json.loads(line)
                answers[str(place)] = dict(answer)
            except (ValueError, TypeError) as error:
                raise ValueError(
                    f"{self.path}, line {number} is no answer: take it out, or give another folder."
                ) from error
        return answers

    def pending(self, names: Sequence[str]) -> list[int]:
        """Which of the files have no answer yet, or have changed since; says how many have one.

        Of a file that has changed nothing is known any more.
        """
        todo = []
        for index, name in enumerate(names):
            place = place_of(name)
            self._stamps[place] = _stamp(place)
            if self.answers.get(place, {}).get("stamp") != self._stamps[place]:
                self.answers.pop(place, None)
                todo.append(index)
        if len(todo) < len(names):
            done = len(names) - len(todo)
            print(f"{done} of {len(names)} are there already in {self.folder}", file=sys.stderr)
        return todo

    def add(self, name: str, answer: dict[str, Any]) -> None:
        """Keep the answer for a file that was pending."""
        place = place_of(name)
        answer = {"stamp": self._stamps[place], **answer}
        with open(self.path, "a", encoding="ascii") as file:
            file.write(json.dumps([place, answer]) + "\n")
        self.answers[place] = answer

    def get(self, name: str) -> dict[str, Any] | None:
        """The answer for a file, None for one that could not be read."""
        return self.answers.get(place_of(name))


def begin_folder(note: Path, facts: dict[str, Any]) -> None:
    """Note in a folder what its answers are of; refuse to mix them with others.

    Raises:
        ValueError: The folder has answers of another model or with other settings.
    """
    from timm_branches.files import atomic_write

    if note.exists():
        try:
            before = json.loads(note.read_text(encoding="utf-8"))
        except ValueError:
            before = None
        if before != facts:
            raise ValueError(
                f"{note.parent} holds the answers of another model, or with other settings: give "
                "another folder."
            )
        return
    note.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(note, (json.dumps(facts, indent=2) + "\n").encode())


def names_folder(output: str | None) -> bool:
    """Whether an output is a folder, or is called so: it ends with a separator."""
    separators = tuple(filter(None, (os.sep, os.altsep)))
    return output is not None and (os.path.isdir(output) or output.endswith(separators))


def facts_of(found: "Predictions | ClipPredictions", settings: dict[str, Any]) -> dict[str, Any]:
    """What answers depend on: the model, its tree, calibration and preprocessing, and settings."""
    from timm_branches.tensor_files import digest_tensors

    tree: Any = list(found.levels)
    if found.taxonomy is not None:
        tree = found.taxonomy.to_dict()
    facts = {
        "model": digest_tensors(dict(found.model.state_dict()), {}),
        "tree": tree,
        "calibration": None,
        "preprocessing": [found.model.pretrained_cfg.get(key) for key in _PREPROCESSING],
        **settings,
    }
    if found.calibration is not None:
        facts["calibration"] = found.calibration.to_dict()
    return json.loads(json.dumps(facts, default=str))  # as a file gives them back


_PREPROCESSING = ("input_size", "mean", "std", "interpolation", "crop_pct", "value_range")


def record_fields(record: "Record") -> dict[str, Any]:
    """What is kept of an answer."""
    names = ("labels", "probabilities", "path", "stopped", "novelty")
    return {name: getattr(record, name) for name in names}


def as_record(name: str, fields: dict[str, Any]) -> "Record":
    """The answer that was kept."""
    from timm_branches.inference.predict import Record

    return Record(
        name,
        tuple(fields["labels"]),
        tuple(fields["probabilities"]),
        tuple(fields["path"]),
        fields["stopped"],
        fields["novelty"],
    )


def _stamp(place: str) -> list[int]:
    """What changes when a file, a frame of a folder, or an archive is written anew."""
    path = place if os.path.exists(place) else place.partition(":")[0]
    status = [os.stat(path)]
    if os.path.isdir(path):
        status += [entry.stat() for entry in os.scandir(path)]
    last = max(one.st_mtime_ns for one in status)
    return [len(status), sum(one.st_size for one in status), last]
