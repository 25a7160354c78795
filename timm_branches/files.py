"""Writing files so that a kill at any moment leaves either the old file or the new one, whole."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["atomic_write", "replace_file"]


def replace_file(path: "str | os.PathLike", write: Callable[[str], Any]) -> None:
    """Call `write(temporary)`, then put that file in the place of `path` at once.

    The file has ordinary permissions.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    try:
        write(temporary)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())  # the data must be on the disk before the name points to it
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def atomic_write(path: str | os.PathLike, data: bytes) -> Path:
    """Write a file of which all is known.

    Args:
        path: Where to; missing folders are made.
        data: All of the file.

    Returns:
        The path.
    """
    replace_file(path, lambda temporary: Path(temporary).write_bytes(data))
    return Path(path)
