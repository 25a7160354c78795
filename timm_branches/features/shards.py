"""The files of cached features.

Shards of rows in safetensors, and an index that is written when all are there.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save

from timm_branches.files import replace_file
from timm_branches.tensor_files import open_tensors

__all__ = ["INDEX", "ShardWriter", "check_shards", "damaged", "read_index", "read_shard"]

# of one file; about three times as much memory is needed while it is written
SHARD_BYTES = 256 * 1024**2
INDEX, _PARTIAL = "index.json", "partial.json"


class ShardWriter:
    """Writes rows of features, and the index at the end.

    What an interrupted one wrote is taken over.

    Args:
        place: Folder of the files.
        facts: The fingerprint.

    Attributes:
        index: The fingerprint, the width F of a row, and of each shard its file, samples, bytes and
            checksum.
    """

    def __init__(self, place: Path, facts: dict[str, Any]) -> None:
        self.place = place
        index = read_index(place / _PARTIAL, strict=False)
        taken_over = index is not None and index["fingerprint"] == facts
        self.index: dict[str, Any] = (
            index if index and taken_over else {"fingerprint": facts, "shards": []}
        )
        good = 0
        for shard in self.index["shards"]:
            path = place / shard["file"]
            if not path.is_file() or _sha256(path) != shard["sha256"]:
                break
            good += 1
        del self.index["shards"][good:]
        self._rows: list[torch.Tensor] = []
        self._lengths: list[int] = []
        self._items = 0

    @property
    def done(self) -> int:
        """Samples in files."""
        return sum(shard["items"] for shard in self.index["shards"])

    def add(self, rows: torch.Tensor, lengths: Sequence[int] | None = None) -> None:
        """Take the rows (N, F) of a batch: one a sample, or of clips as many as `lengths` says.

        A file ends between batches, so that a run that goes on there has the same ones.
        """
        if self._rows and sum(part.nbytes for part in self._rows) + rows.nbytes > SHARD_BYTES:
            self._write()
        self._rows.append(rows)
        self._lengths += lengths or []
        self._items += len(rows) if lengths is None else len(lengths)
        self.index["width"] = rows.shape[1]

    def close(self) -> None:
        """Write what is left, then the index: from now on the files count."""
        if self._rows:
            self._write()
        _write_json(self.place / INDEX, self.index)
        (self.place / _PARTIAL).unlink(missing_ok=True)

    def _write(self) -> None:
        tensors = {"features": torch.cat(self._rows)}
        if self._lengths:
            tensors["lengths"] = torch.tensor(self._lengths)
        data = save(tensors)
        sha256 = hashlib.sha256(data).hexdigest()
        shards = self.index["shards"]
        # named after its content: another process that computes the same cannot spoil what an index
        # lists
        name = f"{len(shards):05d}-{sha256[:8]}.safetensors"
        replace_file(self.place / name, lambda temporary: Path(temporary).write_bytes(data))
        shards.append({"file": name, "items": self._items, "bytes": len(data), "sha256": sha256})
        _write_json(self.place / _PARTIAL, self.index)
        self._rows, self._lengths, self._items = [], [], 0


def read_index(path: Path, strict: bool = True) -> dict[str, Any] | None:
    """What an index holds; None if there is none, or, where not `strict`, if it is damaged.

    Raises:
        ValueError: A damaged one.
    """
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        complete = {"fingerprint", "shards", "width"} <= index.keys()
    except FileNotFoundError:
        return None
    except (ValueError, AttributeError):
        complete = False
    if not complete and strict:
        raise damaged(path, "it is no index of features")
    return index if complete else None


def check_shards(place: Path, index: dict[str, Any], verify: bool) -> None:
    """Raise a ValueError that names the file if one is gone or has another size.

    On `verify` also if it has other content.
    """
    for shard in index["shards"]:
        path = place / shard["file"]
        _check_size(path, shard["bytes"])
        if verify and _sha256(path) != shard["sha256"]:
            raise damaged(path, "it does not hold what was written")


def read_shard(
    place: Path, shard: dict[str, Any], width: int
) -> tuple[torch.Tensor, np.ndarray | None]:
    """The rows (N, F) of a shard, mapped into memory.

    For clips also where each begins and the last one ends.

    Raises:
        ValueError: A damaged file.
    """
    path = place / shard["file"]
    _check_size(path, shard["bytes"])
    try:
        _, tensors = open_tensors(path)
        rows, lengths = tensors["features"], tensors.get("lengths")
    except (KeyError, OSError, ValueError) as error:
        raise damaged(path, str(error)) from error
    ends = None if lengths is None else np.cumsum([0, *lengths.tolist()])
    count = shard["items"] if ends is None else ends[-1]
    if rows.shape != (count, width) or (ends is not None and len(ends) != shard["items"] + 1):
        raise damaged(path, f"it holds features of the shape {tuple(rows.shape)}")
    return rows, ends


def damaged(path: Path, reason: str) -> ValueError:
    """The error to raise for a file."""
    return ValueError(
        f"{path} is damaged: {reason}. Delete the folder {path.parent}, and the features are "
        "computed anew."
    )


def _check_size(path: Path, size: int) -> None:
    if not path.is_file():
        raise damaged(path, "it is gone")
    if path.stat().st_size != size:
        raise damaged(path, f"it has {path.stat().st_size} bytes, {size} were written")


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_json(path: Path, index: dict[str, Any]) -> None:
    text = json.dumps(index, indent=1) + "\n"
    replace_file(path, lambda temporary: Path(temporary).write_text(text, encoding="utf-8"))
