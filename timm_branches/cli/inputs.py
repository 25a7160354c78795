"""What a command is asked to read: files, folders, patterns, tables of paths, standard input."""

import glob
import os
import sys
from collections.abc import Sequence

from timm_branches.taxonomy.order import natural_order

__all__ = ["expand_inputs"]


def expand_inputs(inputs: Sequence[str]) -> list[str]:
    """The files and folders that the arguments of a command mean.

    Args:
        inputs: Files and folders, which stay as they are; patterns with `*`, `?`, `[...]` or `**`;
            tables (.csv, .tsv, .txt with tabs, .parquet) with a column of paths, relative to the
            table's folder; `-` for paths in standard input, one a line, or ended by NUL as
            `find -print0` writes them.

    Raises:
        FileNotFoundError: A pattern matches nothing, or a table names a file that is missing.
        ValueError: A table has no column of paths, or standard input is empty.

    Example:
        >>> expand_inputs(['.'])
        ['.']
    """
    found: list[str] = []
    for given in inputs:
        if given == "-":
            found += _from_stdin()
        elif os.path.isfile(given) and _is_table(given):
            found += _from_table(given)
        elif os.path.lexists(given) or not glob.has_magic(given):
            found.append(given)
        else:
            matches = sorted(glob.glob(given, recursive=True), key=natural_order)
            if not matches:
                raise FileNotFoundError(f"{given}: no file has such a name.")
            found += matches
    return found


def _is_table(path: str) -> bool:
    from timm_branches.taxonomy.table_files import is_table_name

    return is_table_name(path)


def _from_table(path: str) -> list[str]:
    from timm_branches.data.columns import find_path_column, resolve_paths
    from timm_branches.taxonomy.table_files import read_table

    table = read_table(path)
    return resolve_paths(table, find_path_column(table), os.path.dirname(path))


def _from_stdin() -> list[str]:
    if sys.stdin is None:
        raise ValueError("- reads paths from standard input, and there is none.")
    text = os.fsdecode(sys.stdin.buffer.read())
    # names may hold anything but NUL, and even ends of lines where NUL divides them
    paths = text.split("\0") if "\0" in text else text.splitlines()
    paths = [path for path in paths if path]
    if not paths:
        raise ValueError("- reads paths from standard input, and there was none.")
    return paths
