"""Answers that are kept as they come, so that a stopped `predict` goes on where it was."""

import json
import os
from pathlib import Path
from typing import Any

__all__ = ["Journal"]

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
        from timm_branches.files import atomic_write

        self.folder = Path(folder)
        note = self.folder / _NOTE
        self.path = self.folder / _ANSWERS
        if note.exists():
            try:
                before = json.loads(note.read_text(encoding="utf-8"))
            except ValueError:
                before = None
            if before != facts:
                raise ValueError(
                    f"{self.folder} holds the answers of another model, or with other settings: "
                    "give another folder."
                )
        elif self.path.exists():
            raise ValueError(f"{self.path} is of unknown origin: give another folder.")
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            atomic_write(note, (json.dumps(facts, indent=2) + "\n").encode())
        self.answers = self._read()

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

    def add(self, place: str, answer: dict[str, Any]) -> None:
        """Keep an answer."""
        with open(self.path, "a", encoding="ascii") as file:
            file.write(json.dumps([place, answer]) + "\n")
        self.answers[place] = answer
