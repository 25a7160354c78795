"""Tables of people: CSV in any dialect, TSV, Parquet, data frames, all read into the same form.

One parser serves trees (`Taxonomy.from_csv`) and data (`create_dataset`). It is linear in the rows,
and knows the line of each, so that a mistake can be named with its place.
"""

import codecs
import csv
import io
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Table", "is_table_name", "read_rows", "read_table"]

_DELIMITERS = ",;\t|"
# a row after the last one: it is part of another where a quotation mark was never closed
_END = "\x1fend of the table"
_ENDINGS = (".csv", ".tsv", ".txt", ".parquet", ".pq")


@dataclass
class Table:
    """The cells of a table as texts, column by column.

    Attributes:
        source: What it was read from, for messages.
        columns: The cells by the column's name, in the file's order; '' where empty.
        lines: The line of each row in the file (1-based), or its position in a data frame.
        nameless: How many columns without a name were left out (0 or 1).
        empty_rows: How many rows without any cell were left out.
        encoding: How the bytes were read as text, '' for what is no text.
        notes: What a person should know of the reading, in sentences.
    """

    source: str
    columns: dict[str, list[str]]
    lines: Sequence[int]
    nameless: int = 0
    empty_rows: int = 0
    encoding: str = ""
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.lines)

    @property
    def header(self) -> list[str]:
        """The columns' names."""
        return list(self.columns)

    def place(self, row: int) -> str:
        """Where a row stands, for a message."""
        if self.encoding:
            return f"{self.source}, line {self.lines[row]}"
        return f"row {self.lines[row]} of {self.source}"


def is_table_name(path: str) -> bool:
    """Whether a file's ending is that of a table."""
    return path.lower().endswith(_ENDINGS)


def read_table(source: Any) -> Table:
    """Read a table.

    Args:
        source: A file: .csv (with commas, semicolons, tabs or bars; UTF-8, UTF-16 or Windows-1252),
            .tsv or .txt (tabs), .parquet (needs pandas); or a data frame, a `datasets.Dataset`, or
            a mapping from column names to columns.

    Returns:
        The table. Cells are stripped. A column without a name (a saved index) and rows without any
        cell are left out and counted.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: No header, two columns of one name, or a row with more cells than the header
            has; the message names file, line and remedy.

    Example:
        >>> read_table({'path': ['1.jpg'], 'species': ['cat']}).columns['species']
        ['cat']
    """
    if isinstance(source, str | os.PathLike):
        path = os.fspath(source)
        if not os.path.isfile(path):
            raise FileNotFoundError(f"There is no table {path}.")
        if path.lower().endswith((".parquet", ".pq")):
            return _from_columns(_read_parquet(path), path)
        return _read_text(path)
    return _from_columns(source, "the data frame")


def _read_parquet(path: str) -> Any:
    try:
        import pandas
    except ImportError as error:
        raise ImportError(
            f"{path} is a Parquet file: reading it needs pandas and pyarrow "
            "(pip install pandas pyarrow)."
        ) from error
    return pandas.read_parquet(path)


# ---- text


def _read_text(path: str) -> Table:
    text, encoding = _decode(path)
    lines = _lines(text)
    delimiter = _delimiter(path, lines)
    rows = _rows(lines, delimiter, path)
    header: list[str] = []
    while not any(header):
        row, _ = next(rows, (None, 0))
        if row is None:
            raise ValueError(f"{path} is empty; its first row must name the columns.")
        header = [cell.strip() for cell in row]
    table = Table(path, {}, [], encoding=encoding)
    if encoding == "cp1252":
        table.notes.append(f"{path} is not UTF-8: it was read as Windows-1252.")
    if len(header) > 1 and not header[-1] and _ends_empty(lines, delimiter):
        header.pop()  # a delimiter at the end of every line is no column
    kept = _keep_columns(header, table)
    cells: list[list[str]] = [[] for _ in kept]
    places = [place for place, _ in kept]
    width = places[-1] + 1
    numbers: list[int] = []
    for row, line in rows:
        if not any(cell.strip() for cell in row):
            table.empty_rows += 1
            continue
        if len(row) > width:
            _refuse_surplus(row, header[:width], f"{path}, line {line}", delimiter)
        for column, place in zip(cells, places, strict=True):
            # equal cells are one object: a class's name is kept once, not once a row
            cell = row[place].strip() if place < len(row) else ""
            column.append(sys.intern(cell))
        numbers.append(line)
    table.lines = numbers
    table.columns = {name: column for (_, name), column in zip(kept, cells, strict=True)}
    return table


def read_rows(path: str | os.PathLike) -> Iterator[tuple[list[str], int]]:
    """The rows of a text file of cells, header or not, each with the line that it ends in.

    Args:
        path: A CSV in any dialect.

    Raises:
        ValueError: It is no such text.
    """
    path = os.fspath(path)
    lines = _lines(_decode(path)[0])
    for row, line in _rows(lines, _delimiter(path, lines), path):
        if any(cell.strip() for cell in row):
            yield [cell.strip() for cell in row], line


def _lines(text: str) -> list[str]:
    # not splitlines(), which also ends a line where a name holds U+2028 or the like
    return list(io.StringIO(text, newline=""))


def _ends_empty(lines: Sequence[str], delimiter: str) -> bool:
    return all(not line.strip() or line.rstrip(" \r\n").endswith(delimiter) for line in lines)


def _rows(lines: Sequence[str], delimiter: str, path: str) -> Iterator[tuple[list[str], int]]:
    """Each row's cells, and the line of the file that it ends in."""
    reader = csv.reader([*lines, _END], delimiter=delimiter, skipinitialspace=True)
    began = 1
    try:
        for row in reader:
            if row == [_END]:
                return
            if row and row[-1].endswith(_END):
                raise ValueError(
                    f"{path}, line {began}: a quotation mark is opened there and never closed, so "
                    "that all rows after it would be one cell. Close it, or write it twice where "
                    "it belongs to a name."
                )
            yield row, reader.line_num
            began = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(
            f"{path}, line {reader.line_num}: the table cannot be read ({error})."
        ) from error


def _decode(path: str) -> tuple[str, str]:
    with open(path, "rb") as file:
        data = file.read()
    start = data[:1000]
    encodings = ["utf-8-sig", "cp1252"]
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encodings = ["utf-16"]
    # UTF-16 without its mark: every second byte of plain letters is 0
    elif start.count(0) > len(start) // 4:
        little = start[1::2].count(0) > start[::2].count(0)
        encodings = ["utf-16-le" if little else "utf-16-be"]
    for encoding in encodings:
        try:
            return data.decode(encoding), encoding.removesuffix("-sig")
        except UnicodeDecodeError as error:
            place = error.start
    raise ValueError(
        f"{path} is neither UTF-8 nor UTF-16 nor Windows-1252 text (byte {place}): save it as "
        "UTF-8."
    )


def _delimiter(path: str, lines: Sequence[str]) -> str:
    header = next((line for line in lines if line.strip()), "")
    if path.lower().endswith(".tsv"):
        return "\t"
    counts = {delimiter: header.count(delimiter) for delimiter in _DELIMITERS}
    best = max(_DELIMITERS, key=lambda delimiter: counts[delimiter])
    return best if counts[best] else ","


def _keep_columns(header: Sequence[str], table: Table) -> list[tuple[int, str]]:
    """Place and name of each column, but for a first one without a name: a saved index."""
    kept = list(enumerate(header))
    saved_index = ("", "Unnamed: 0") if table.encoding else ("Unnamed: 0", "__index_level_0__")
    if kept[0][1] in saved_index and len(kept) > 1:
        kept = kept[1:]
        table.nameless = 1
    names = [name for _, name in kept]
    if len(set(names)) < len(names) or "" in names:
        raise ValueError(
            f"{table.source}: each column needs a name of its own, got {list(header)}."
        )
    return kept


def _refuse_surplus(row: list[str], header: list[str], place: str, delimiter: str) -> None:
    surplus = row[len(header) :]
    if not any(cell.strip() for cell in surplus):
        return  # a delimiter at the end of the line
    raise ValueError(
        f"{place}: {len(row)} cells, but the header names {len(header)} columns. A name that holds "
        "a "
        f'{delimiter!r} must be quoted, as in "{delimiter.join(row[-2:])}".'
    )


# ---- columns


def _from_columns(frame: Any, source: str) -> Table:
    if isinstance(frame, Mapping):
        header = list(frame)
    else:
        header = list(getattr(frame, "column_names", getattr(frame, "columns", ())))
    if not header:
        raise TypeError(
            "A table is a file's path, a data frame, a datasets.Dataset or a mapping of columns; "
            f"got {type(frame).__name__}."
        )
    names = []
    for name in header:
        names.append("" if name is None else str(name).strip())
    table = Table(source, {}, [])
    kept = _keep_columns(names, table)
    cells = []
    for place, name in kept:
        values = frame[header[place]]
        class_names = _class_names(frame, name)
        if class_names is not None:
            numbers, values = values, []
            for number in numbers:
                known = number is not None and number >= 0
                values.append(class_names[number] if known else "")
        cells.append([cell_text(value) for value in values])
    filled = [number for number, row in enumerate(zip(*cells, strict=True)) if any(row)]
    table.empty_rows = len(cells[0]) - len(filled)
    for (_, name), column in zip(kept, cells, strict=True):
        if table.empty_rows:
            column = [column[row] for row in filled]
        table.columns[name] = column
    table.lines = filled
    return table


def _class_names(frame: Any, column: str) -> list[str] | None:
    """The names of a `datasets` column of class indices (ClassLabel)."""
    features = getattr(frame, "features", None)
    if not isinstance(features, Mapping):
        return None
    return getattr(features.get(column), "names", None)


def cell_text(value: Any) -> str:
    """A cell as text, '' if it is missing (None, NaN, NaT, NA)."""
    if isinstance(value, str):
        return sys.intern(value.strip())
    if isinstance(value, float) and value.is_integer():
        # pandas turns a column of integers to floats as soon as one is missing
        return str(int(value))
    text = str(value)
    return "" if text in ("None", "nan", "NaT", "<NA>") else sys.intern(text)
