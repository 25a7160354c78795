"""Where the numbers of a run go: one CSV row an epoch, and optionally trackers.

The trackers are TensorBoard and Weights & Biases.

The CSV is the record that plots and comparisons read. A kill at any moment leaves it whole, a
resumed run drops the epochs it repeats, and a column that turns up late is added to the header
instead of being lost.
"""

from __future__ import annotations

import csv
import importlib
import io
import json
import math
import numbers
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from timm_branches.figures import MissingPackageError
from timm_branches.files import atomic_write

__all__ = ["CsvLog", "Trackers", "open_trackers"]

_WHOLE = re.compile(r"[+-]?\d+")


class CsvLog:
    """A table with one row an epoch, kept in a CSV file.

    Args:
        path: The file. Rows that it already holds stay, which is what a resumed run wants.
        keep_until_epoch: Drop the rows of this epoch and later ones, which the resumed run computes
            again.

    Raises:
        ValueError: The file exists and is not a CSV table with a header.

    Example:
        >>> import tempfile
        >>> log = CsvLog(tempfile.mkdtemp() + '/summary.csv')
        >>> log.append({'epoch': 0, 'train_loss': 2.5})
        >>> log.append({'epoch': 1, 'train_loss': 1.5, 'eval_fine_top1': 40.0})
        >>> log.read()[0]
        {'epoch': 0, 'train_loss': 2.5, 'eval_fine_top1': None}
    """

    def __init__(self, path: str | os.PathLike, keep_until_epoch: int | None = None):
        self.path = Path(path)
        self._columns: list[str] = []
        self._rows: list[dict[str, str]] = []
        if self.path.exists():
            self._load()
        if keep_until_epoch is not None:
            kept = [
                row for row in self._rows if not _at_least(row.get("epoch", ""), keep_until_epoch)
            ]
            if len(kept) < len(self._rows):
                self._rows = kept
                self._save()

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a row. Columns it lacks stay empty, columns it brings are added to the header.

        Args:
            row: Names and values; a one-element tensor counts as its number, None as missing.

        Raises:
            ValueError: The row is empty.
        """
        if not row:
            raise ValueError("A log row needs at least one value, got an empty one.")
        self._columns += [str(key) for key in row if str(key) not in self._columns]
        self._rows.append({str(key): _format(value) for key, value in row.items()})
        self._save()

    def read(self) -> list[dict[str, Any]]:
        """All rows with every column.

        Whole numbers as int, others as float, missing values as None, else text.
        """
        rows = []
        for row in self._rows:
            rows.append({column: _parse(row.get(column, "")) for column in self._columns})
        return rows

    def _load(self) -> None:
        text = self.path.read_text(encoding="utf-8")
        if not text:
            return
        header, *rows = csv.reader(io.StringIO(text, newline=""))
        if len(set(header)) != len(header) or any(len(row) > len(header) for row in rows):
            raise ValueError(
                f"{self.path} is not a log: a row has more values than the header {header} has "
                "names, or a name comes twice. Give another path, or move the file away."
            )
        self._columns = header
        self._rows = [dict(zip(header, row, strict=False)) for row in rows if row]

    def _save(self) -> None:
        # all of it every time: an epoch's row is small, and appending in place could be cut in the
        # middle
        out = io.StringIO(newline="")
        writer = csv.DictWriter(out, self._columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(self._rows)
        atomic_write(self.path, out.getvalue().encode())


def _number(value: Any) -> Any:
    """A tensor or array of one element as its Python number, everything else as it is."""
    return (
        value.item()
        if hasattr(value, "item") and getattr(value, "size", None) is not None
        else value
    )


def _format(value: Any) -> str:
    value = _number(value)
    if value is None:
        return ""
    return repr(value) if isinstance(value, float) else str(value)


def _parse(text: str) -> Any:
    if text == "":
        return None
    if _WHOLE.fullmatch(text):
        return int(text)
    try:
        return text if "_" in text else float(text)  # float() would read '1_5' as 15
    except ValueError:
        return text


def _at_least(text: str, epoch: int) -> bool:
    value = _parse(text)
    return isinstance(value, int | float) and value >= epoch


class Trackers:
    """The optional sinks of a run; without any it does nothing.

    Closes itself when used with `with`.

    Args:
        tensorboard: A `SummaryWriter`, or None.
        wandb: A run as `wandb.init` returns it, or None.
    """

    def __init__(self, tensorboard: Any = None, wandb: Any = None):
        self._tensorboard = tensorboard
        self._wandb = wandb

    def log(self, row: Mapping[str, Any], step: int) -> None:
        """Send the finite numbers of a row; text and missing values belong in the CSV only.

        Args:
            row: Names and values, as in :meth:`CsvLog.append`.
            step: Epoch (or update) that they belong to.
        """
        values = {key: _number(value) for key, value in row.items()}
        finite = {
            key: float(v)
            for key, v in values.items()
            if isinstance(v, numbers.Real) and math.isfinite(v)
        }
        if self._tensorboard is not None:
            for key, value in finite.items():
                self._tensorboard.add_scalar(key, value, step)
        if self._wandb is not None:
            self._wandb.log(finite, step=step)

    def close(self) -> None:
        """Write out what is pending. Closing twice is fine."""
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()
        self._tensorboard = self._wandb = None

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def open_trackers(
    tensorboard: bool = False,
    wandb: str | None = None,
    output: str | os.PathLike = ".",
    config: Mapping[str, Any] | None = None,
) -> Trackers:
    """Open the sinks that are asked for. Their packages are imported here and nowhere else.

    Args:
        tensorboard: Write event files to `<output>/tensorboard`.
        wandb: Project to log to, None for no Weights & Biases.
        output: Folder of the run.
        config: Settings of the run, stored with it.

    Returns:
        An object with `log(row, step)` and `close()`.

    Raises:
        MissingPackageError: A sink's package is not installed. It is both a ValueError and an
            ImportError.

    Example:
        >>> with open_trackers() as trackers:  # nothing asked for: the loop needs no 'if'
        ...     trackers.log({'train_loss': 0.5}, step=0)
    """
    # both packages before anything is opened, so that a missing one leaves nothing half open behind
    board = (
        _import("torch.utils.tensorboard", "tensorboard", "tensorboard") if tensorboard else None
    )
    service = _import("wandb", "wandb", "wandb") if wandb else None
    writer = None
    if board is not None:
        writer = board.SummaryWriter(str(Path(output) / "tensorboard"))
        if config:
            writer.add_text(
                "config", f"```json\n{json.dumps(dict(config), indent=2, default=str)}\n```"
            )
    run = None
    if service is not None:
        Path(output).mkdir(parents=True, exist_ok=True)
        run = service.init(project=wandb, dir=str(output), config=dict(config or {}))
    return Trackers(writer, run)


def _import(module: str, package: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingPackageError(
            f"Logging to {package} was asked for, but {package} is not installed ({error}). "
            f"Install it with: pip install 'timm_branches[{extra}]'."
        ) from error
