"""Safetensors files with a checksum: the one place where files of tensors are written and read.

No pickle is ever read. Writes are atomic: a kill at any moment leaves the old file or the new one.
"""

import hashlib
import json
import os
import re
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from timm_branches.files import replace_file

__all__ = [
    "digest_tensors",
    "open_tensors",
    "parse_json",
    "damaged",
    "read_tensors",
    "save_tensors",
    "tensor_error",
]

# what a description may be: a tree of 65,000 species has 7 MB
MAX_JSON_LENGTH = 32 * 2**20
MAX_JSON_DEPTH = 64
_BRACKETS = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{}]', re.DOTALL)


def save_tensors(
    path: str | os.PathLike, tensors: dict[str, torch.Tensor], metadata: dict[str, str]
) -> None:
    """Write a file of tensors and of what is said of them, with a checksum of both.

    Args:
        path: The file.
        tensors: Contiguous tensors on the CPU, none of which shares memory with another.
        metadata: What to say of them; `producer` and `version` name the kind of the file.

    Raises:
        OSError: The file cannot be written; the old one stays whole.
    """
    # the format is what other readers of safetensors look for
    metadata = {"format": "pt", **metadata}
    metadata["sha256"] = digest_tensors(tensors, metadata)

    def write(temporary: str) -> None:
        try:
            save_file(tensors, temporary, metadata=metadata)
        except SafetensorError as error:
            raise _as_os_error(error) from error

    replace_file(path, write)


def _as_os_error(error: SafetensorError) -> OSError:
    """A failed write of safetensors with the system's number of the reason."""
    number = re.search(r"os error (\d+)", str(error))
    if number is None:
        return OSError(str(error))
    code = int(number.group(1))
    return OSError(code, os.strerror(code))


def open_tensors(
    path: str | os.PathLike, with_tensors: bool = True
) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """Metadata and tensors of one and the same file, even if another is put in its place meanwhile.

    The checksum is not looked at.

    Raises:
        FileNotFoundError: No such file.
        ValueError: Not a whole safetensors file.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: there is no such file.")
    # safetensors opens a file twice, by name: read again if it was replaced in between
    for _ in range(100):
        before, failure = _identity(path), None
        tensors: dict[str, torch.Tensor] = {}
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if with_tensors:
                    tensors = {name: file.get_tensor(name) for name in file.keys()}
        except PermissionError:
            raise
        # a flipped bit can name a type or a shape that torch does not know
        except (
            SafetensorError,
            AttributeError,
            KeyError,
            OSError,
            OverflowError,
            RuntimeError,
            TypeError,
            ValueError,
        ) as error:
            failure = error
        if before == _identity(path):
            break
    if failure is not None:
        raise tensor_error(path, failure)
    return metadata, tensors


def tensor_error(path: str | os.PathLike, reason: object) -> ValueError:
    """The error to raise for a file that is not a whole safetensors file."""
    return ValueError(
        f"{path} is damaged: it is not a whole safetensors file, it was cut, or is something else "
        f"({reason})."
    )


def _identity(path: str | os.PathLike) -> tuple[int, int, int]:
    stat = os.stat(path)
    return stat.st_ino, stat.st_mtime_ns, stat.st_size


def read_tensors(
    path: str | os.PathLike, producer: str, version: int
) -> tuple[dict[str, str] | None, dict[str, torch.Tensor]]:
    """Metadata and tensors of a file of ours, after its checksum was found to be right.

    Args:
        path: The file.
        producer: The kind of file that is expected.
        version: The latest version of that kind that is understood.

    Returns:
        The metadata, None for a safetensors file of another producer; and the tensors.

    Raises:
        FileNotFoundError: No such file.
        ValueError: A damaged file, or one of a later version.
    """
    metadata, tensors = open_tensors(path)
    if metadata.get("producer") != producer:
        if _was_ours(metadata, tensors, producer):
            raise damaged(path, "its producer is not what was saved")
        return None, tensors
    found = metadata.get("version", "")
    if not re.fullmatch("[0-9]{1,9}", found):
        raise damaged(path, f"it gives {found[:20]!r} for the version of its format")
    if int(found) > version:
        raise ValueError(
            f"{path} was written by a later timm_branches (format {found}, this one reads "
            f"{version}): please upgrade."
        )
    if not digest_matches(tensors, metadata):
        raise damaged(path, "it does not hold what was saved (the checksum differs)")
    return metadata, tensors


def _was_ours(metadata: dict[str, str], tensors: dict[str, torch.Tensor], producer: str) -> bool:
    """Whether a file would be whole with this producer: a flipped bit must not make it foreign.

    The bit may be one of the producer's name, or of the word before it.
    """
    if not {"sha256", "version"} & metadata.keys():
        return False
    words: list[str | None] = [None]
    words += [key for key in metadata if len(key) == len("producer")]
    for word in words:
        rest = {key: value for key, value in metadata.items() if key != word}
        if digest_matches(tensors, {**rest, "producer": producer}):
            return True
    return False


def damaged(path: str | os.PathLike, reason: str) -> ValueError:
    """The error to raise for a file that does not hold what was saved."""
    return ValueError(f"{path} is damaged: {reason}.")


def digest_matches(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> bool:
    """Whether a file's checksum is right."""
    return digest_tensors(tensors, metadata) == metadata.get("sha256")


def digest_tensors(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> str:
    """Checksum of everything in a file: what it says of itself and the bits of its tensors."""
    pairs = sorted((key, value) for key, value in metadata.items() if key != "sha256")
    digest = hashlib.sha256(json.dumps(pairs).encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def parse_json(text: str) -> Any:
    """Parse a description out of a file, which anybody may have written.

    Raises:
        ValueError: No JSON, longer or deeper than any description is, a number that is not finite,
            or a name that is given twice.
    """
    if len(text) > MAX_JSON_LENGTH:
        raise ValueError(
            f"it has {len(text):,} characters, a description at most {MAX_JSON_LENGTH:,}."
        )
    depth = 0
    for token in _BRACKETS.finditer(text):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(token.group(), 0)
        if depth > MAX_JSON_DEPTH:
            raise ValueError(f"it is nested deeper than {MAX_JSON_DEPTH} levels.")
    return json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_unique)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a finite number.")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in pairs:
        if name in result:
            raise ValueError(f"{name!r} is given twice.")
        result[name] = value
    return result
