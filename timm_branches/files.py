"""Writing files so that a kill at any moment leaves either the old file or the new one, whole."""

import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows, which does not delete a file that is open
    fcntl = None  # type: ignore[assignment]

__all__ = ["atomic_write", "remove_abandoned", "replace_file"]

_SUFFIX = ".timm_branches.tmp"
_TEMPORARY = re.compile(rf"\..+\.[a-z0-9_]{{8}}{re.escape(_SUFFIX)}")


def replace_file(path: str | os.PathLike, write: Callable[[str], Any]) -> None:
    """Call `write(temporary)`, then put that file in the place of `path` at once.

    A symbolic link is followed. A file that is there keeps its mode, a new one has ordinary
    permissions. What a killed write of the same file left behind is removed.

    Args:
        path: The file; missing folders are made.
        write: Writes all of the file to the name that it is given.

    Raises:
        OSError: It cannot be written (the disk is full, the folder may not be written to): the
            message names `path`, and the old file is whole.
    """
    target = Path(os.path.realpath(path))
    try:
        if target.exists() and not target.is_file() and not target.is_dir():
            write(str(target))  # a pipe or a device, such as /dev/stdout
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(target.parent, target.name)
        handle, temporary = _locked_temporary(target)
    except OSError as error:
        raise _with_path(error, path) from error
    try:
        write(temporary)
        os.chmod(temporary, _mode_of(target))
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())  # the data must be on the disk before the name points to it
        os.replace(temporary, target)
    except OSError as error:
        Path(temporary).unlink(missing_ok=True)
        raise _with_path(error, path) from error
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    finally:
        os.close(handle)


def _locked_temporary(target: Path) -> tuple[int, str]:
    """An empty file beside the target, locked: the open file and its name."""
    while True:
        handle, temporary = tempfile.mkstemp(
            dir=target.parent, prefix=f".{target.name}.", suffix=_SUFFIX
        )
        # another process may have taken it for abandoned before it was locked
        if _lock(handle) is not False and os.fstat(handle).st_nlink:
            return handle, temporary
        os.close(handle)


def remove_abandoned(folder: str | os.PathLike[str], name: str = "") -> list[Path]:
    """Remove temporary files whose writer was killed; those that are being written stay.

    Args:
        folder: Where to look, without the folders in it.
        name: Of the file that was to be written; by default any.

    Returns:
        The files that were removed.
    """
    removed = []
    for entry in os.scandir(os.fspath(folder)):
        if not entry.name.startswith(f".{name}") or not _TEMPORARY.fullmatch(entry.name):
            continue
        try:
            handle = os.open(entry.path, os.O_RDWR)
        except OSError:  # another process was quicker, or it is not ours
            continue
        try:
            if _lock(handle):
                os.unlink(entry.path)
                removed.append(Path(entry.path))
        except OSError:
            continue
        finally:
            os.close(handle)
    return removed


def _lock(handle: int) -> bool | None:
    """Hold a file as long as it is open; False if another process holds it, None if none can tell.

    The system lets go of it when a process ends, however that was.
    """
    if fcntl is None:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return None
    return True


def _mode_of(target: Path) -> int:
    """The mode of a file that is there, or what the system gives a new one."""
    try:
        return os.stat(target).st_mode & 0o7777
    except FileNotFoundError:
        umask = os.umask(0)
        os.umask(umask)
        return 0o666 & ~umask


def _with_path(error: OSError, path: str | os.PathLike) -> OSError:
    """The same error, with the path that was asked for."""
    if error.errno is None:
        return OSError(f"{os.fspath(path)} cannot be written: {error}")
    return OSError(error.errno, f"cannot be written: {os.strerror(error.errno)}", os.fspath(path))


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
