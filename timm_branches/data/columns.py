"""Which column of a table is the path, which are levels: asked for, or found and said."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field

from timm_branches.data.images import is_image_name
from timm_branches.data.splits import SPLIT_NAMES, split_of
from timm_branches.taxonomy.table_files import Table
from timm_branches.taxonomy.taxonomy import Taxonomy

__all__ = ["Columns", "choose_columns", "find_path_column"]

_PATHS = (
    "path image file filename filepath file_path file_name image_path image_file img img_path "
    "identifier video video_path clip"
).split()
_SPLITS = ("split", "subset", "set", "partition")
_GROUPS = (
    "group group_id subject subject_id patient patient_id burst burst_id scene scene_id session "
    "session_id video_id"
).split()
# what tables of images hold beside labels
_NO_LEVEL = frozenset(
    "id image_id img_id uuid index idx row url uri link license licence author creator "
    "photographer user user_id owner date time timestamp datetime year month day fold folds kfold "
    "cv_fold width height size area x y w h xmin xmax ymin ymax bbox latitude longitude lat lon "
    "lng location count weight confidence score source md5 sha1 sha256 hash checksum caption "
    "description comment comments notes note remark camera device patient patient_id subject "
    "subject_id session "
    "session_id sex age gender".split()
)
_FEW = 10  # rows below which a column with another value in each may still be a level


@dataclass
class Columns:
    """What each column of a table is.

    Attributes:
        path: The column of paths.
        levels: The columns of the levels, coarsest first; one named column of class names counts.
        split: The column of splits, if there is one.
        group: The column of groups that belong together in splitting.
        ignored: Columns that are none of these, and why.
        warnings: What is probably a mistake, in sentences.
    """

    path: str
    levels: list[str]
    split: str | None = None
    group: str | None = None
    ignored: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def roles(self) -> dict[str, str]:
        """Each column with what it was taken for."""
        roles = {self.path: "path"}
        for number, level in enumerate(self.levels, start=1):
            roles[level] = f"level {number}"
        if self.split is not None:
            roles[self.split] = "split"
        if self.group is not None:
            roles[self.group] = "group"
        roles |= {name: f"no level ({why})" for name, why in self.ignored.items()}
        return roles


def choose_columns(
    table: Table,
    levels: Sequence[str] | None = None,
    path_column: str | None = None,
    split_column: str | None = None,
    group_column: str | None = None,
    taxonomy: Taxonomy | None = None,
    reserved: Sequence[str] = (),
) -> Columns:
    """Find the columns of path, levels, split and group, or take those that are asked for.

    Without `levels` a column is one if it nests: each of its values lies below one value of the
    level before it. What has another value in each row, or a usual name of something else (an
    index, `photographer`, `fold`, `url`), is none; the summary says what each column was taken
    for.

    Args:
        table: The table.
        levels: Columns of the levels, coarsest first.
        path_column: Column of the paths.
        split_column: Column of the splits.
        group_column: Column of what belongs together, such as a subject or a video.
        taxonomy: The tree to find the names in: columns named like its levels are its levels.
        reserved: Columns that mean something else here (`start`, `end` of clips).

    Raises:
        ValueError: A column that was asked for is missing, there is no path or no level, or what
            the levels are cannot be told.
    """
    _check_asked(table, [*(levels or ()), path_column, split_column, group_column])
    path = path_column or find_path_column(table)
    split = split_column or _by_name(table, _SPLITS, path)
    if split is not None and split_column is None and not _holds_splits(table, split):
        if split.lower() == "split":
            _refuse_splits(table, split)
        split = None
    group = group_column or _by_name(table, _GROUPS, path)
    result = Columns(path, [], split, group)
    taken = {path, split, group, *reserved}
    rest = [name for name in table.header if name not in taken]
    if levels is not None:
        result.levels = list(levels)
        result.ignored = {name: "not asked for" for name in rest if name not in levels}
        return result
    if taxonomy is not None and set(taxonomy.levels) <= set(rest):
        result.levels = list(taxonomy.levels)
        result.ignored = {
            name: "no level of the taxonomy" for name in rest if name not in taxonomy.levels
        }
        return result
    _detect_levels(table, rest, result)
    return result


def _check_asked(table: Table, names: Sequence[str | None]) -> None:
    for name in names:
        if name is not None and name not in table.columns:
            raise ValueError(
                f"{table.source} has no column {name!r}; its columns are {table.header}."
            )


def _by_name(table: Table, names: Sequence[str], path: str) -> str | None:
    for name in names:
        for column in table.header:
            if column.lower().replace(" ", "_") == name and column != path:
                return column
    return None


def find_path_column(table: Table) -> str:
    """The column of a table that names files, by its name or by what it holds.

    Raises:
        ValueError: There is none.
    """
    by_name = {column.lower().replace(" ", "_"): column for column in reversed(table.header)}
    for name in _PATHS:
        if name in by_name:
            return by_name[name]
    for column in table.header:  # or by what it holds
        cells = [cell for cell in table.columns[column][:100] if cell]
        named = [cell for cell in cells if is_image_name(cell.replace("\\", "/"))]
        if cells and len(named) == len(cells):
            return column
    raise ValueError(
        f"{table.source} has the columns {table.header} and {len(table)} rows; needed are a column "
        "'path' (or name it: path_column=, --path-column), then one column per level or one named "
        "'label', and at least one row."
    )


def _holds_splits(table: Table, column: str) -> bool:
    return all(split_of(value) for value in set(table.columns[column]))


def _refuse_splits(table: Table, column: str) -> None:
    for row, value in enumerate(table.columns[column]):
        if not split_of(value):
            raise ValueError(
                f"{table.place(row)}: {value!r} in the column {column!r} is no split; known are "
                f"{', '.join(sorted(SPLIT_NAMES))}."
            )


# ---- levels


def _detect_levels(table: Table, names: Sequence[str], result: Columns) -> None:
    candidates = []
    for name in names:
        why = _no_level(table, name)
        if why:
            result.ignored[name] = why
        else:
            candidates.append(name)
    if not candidates or not len(table):
        raise ValueError(
            f"{table.source} has the columns {table.header} and {len(table)} rows, and none of "
            "them is a level: needed are one column per level or one named 'label' (name them: "
            "levels=, --levels), and at least one row."
        )
    chain = _longest_chain(table, candidates)
    backwards = _longest_chain(table, candidates[::-1])
    if len(chain) == 1 < len(candidates) and len(backwards) == len(candidates):
        raise ValueError(
            f"The columns {candidates} of {table.source} stand from fine to coarse: give the "
            f"levels from coarse to fine, levels={backwards} (--levels {' '.join(backwards)})."
        )
    if len(chain) == 1 < len(candidates):
        raise ValueError(
            f"Which of the columns {candidates} of {table.source} are levels cannot be told: none "
            "nests in another (a child has one parent). Name them, coarsest first: levels= "
            "(--levels)."
        )
    for name in candidates:
        if name not in chain:
            result.ignored[name] = "does not nest between the levels"
            result.warnings.append(
                f"the column {name!r} is taken for no level, because its values do not nest; if it "
                "is one, name the levels"
            )
    result.levels = chain


def _no_level(table: Table, name: str) -> str:
    """Why a column is no level, by its name or its cells alone; '' if it may be one."""
    plain = name.lower().replace(" ", "_").replace("-", "_")
    if plain in _NO_LEVEL or plain.endswith(("_id", "_url", "_date")):
        return "by its name"
    cells = [cell for cell in table.columns[name] if cell]
    if not cells:
        return "empty"
    distinct = len(set(cells))
    if distinct == len(cells) >= _FEW:
        return "another value in each row"
    return ""


def _longest_chain(table: Table, names: Sequence[str]) -> list[str]:
    """The longest run of columns, in their order, each of which nests in the one before."""
    best: list[list[str]] = []
    for i, name in enumerate(names):
        longest = [name]
        for j in range(i):
            if len(best[j]) + 1 > len(longest) and _nests(table, best[j], name):
                longest = [*best[j], name]
        best.append(longest)
    return max(best, key=len)


def _nests(table: Table, above: Sequence[str], name: str) -> bool:
    """Whether nearly every value of a column lies below one value of the column above it.

    A few homonyms are legal (an 'other' under each parent); a column that cuts across is not.
    """
    parents: dict[str, set[str]] = {}
    for parent, child in zip(table.columns[above[-1]], table.columns[name], strict=True):
        if parent and child:
            parents.setdefault(child, set()).add(parent)
    several = sum(len(values) > 1 for values in parents.values())
    return bool(parents) and several <= len(parents) // 4


def resolve_paths(table: Table, column: str, folder: str) -> list[str]:
    """The files that a column names, relative to a folder, all of which exist.

    A path with the backslashes of Windows is found too. Folders are listed once each, so that
    millions of rows cost no look at each file.

    Raises:
        FileNotFoundError: Files are missing; the first is named with its line.
    """
    listings: dict[str, set[str]] = {}

    def exists(path: str) -> bool:
        parent, name = os.path.split(path)
        if parent not in listings:
            listings[parent] = set(os.listdir(parent)) if os.path.isdir(parent) else set()
        return name in listings[parent]

    paths = []
    missing: list[int] = []
    for row, cell in enumerate(table.columns[column]):
        if not cell:
            raise ValueError(f"{table.place(row)}: the column {column!r} is empty.")
        path = os.path.normpath(os.path.join(folder, cell))
        if "\\" in cell and not exists(path):
            path = os.path.normpath(os.path.join(folder, cell.replace("\\", "/")))
        if not exists(path):
            missing.append(row)
        paths.append(path)
    if missing:
        row = missing[0]
        raise FileNotFoundError(
            f"{table.place(row)}: there is no file {table.columns[column][row]!r} in {folder} "
            f"({len(missing)} of {len(table)} files are missing). Paths are relative to the "
            "table's folder; correct them, or remove the rows."
        )
    return paths
