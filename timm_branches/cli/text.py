"""Text for a terminal or a file."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import TextIO

__all__ = ["place_of", "printable", "refuse", "spare", "write_output"]


def printable(text: str) -> str:
    """On one line whatever a file is called: control characters and broken Unicode as escapes."""
    shown = ""
    for character in text:
        if not character.isprintable():
            character = character.encode("unicode_escape").decode()
        shown += character
    return shown


def write_output(path: str | None, inputs: Sequence[str], write: Callable[[TextIO], None]) -> None:
    """Write text to a file, in one piece at the end, or else to stdout.

    Args:
        path: The file, None for stdout.
        inputs: What is read, which is not written over.
        write: Writes to an open file.

    Raises:
        ValueError: The path is a folder, or among the inputs.
    """
    if not path:
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="backslashreplace")
        write(sys.stdout)
        sys.stdout.flush()
        return
    from timm_branches.files import replace_file

    if os.path.isdir(path):
        raise ValueError(f"--output {path} is a folder: give a file.")
    spare(path, inputs)

    def write_file(temporary: str) -> None:
        # names of files need not be valid Unicode: the bytes come out as they came in
        with open(temporary, "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
            write(file)

    replace_file(path, write_file)


def place_of(name: str) -> str:
    """An image's place, wherever the command is called from; of a tar `/photos.tar:cat/1.jpg`."""
    archive, colon, member = name.partition(":")
    if not os.path.exists(name) and os.path.isfile(archive):
        return os.path.realpath(archive) + colon + member
    return os.path.realpath(name)


def spare(path: str, inputs: Sequence[str]) -> None:
    """Refuse to write over what is read.

    Raises:
        ValueError: The path is among the inputs.
    """
    if not os.path.exists(path):
        return
    for name in inputs:
        if os.path.exists(name) and os.path.samefile(name, path):
            raise ValueError(f"{path} is among what is read: write somewhere else.")


def refuse(args: argparse.Namespace, what: str, *names: str) -> None:
    """Say which flags that were given have no effect on a model.

    Raises:
        ValueError: One was given.
    """
    for name in names:
        value = getattr(args, name)
        if value is not None and value is not False:
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(f"{flag} has no effect on a model that {what}.")
