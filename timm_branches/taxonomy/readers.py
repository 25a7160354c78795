"""What the constructors of a :class:`Taxonomy` read.

Tables, nested JSON, class folders, maps from child to parent.

Plain functions that return one path per leaf, in class order, and the level names or the order of
inner nodes where the source has them. They are documented at `Taxonomy.from_csv` and its
neighbours, which call them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import chain
from numbers import Integral
from pathlib import Path
from typing import Any

from timm_branches.taxonomy.paths import NodePath, hint
from timm_branches.taxonomy.table_files import Table, read_rows, read_table

__all__ = ["load_json", "read_csv", "read_dataframe", "read_folders", "read_json", "read_parents"]


def read_csv(
    file: str | Path, columns: Sequence[str] | None = None
) -> tuple[list[NodePath], list[str]]:
    """The leaves of a CSV file, one a row, and the columns they were read from."""
    return _leaves(read_table(file), columns)


def read_dataframe(
    frame: Any, columns: Sequence[Any] | None = None
) -> tuple[list[NodePath], list[str]]:
    """The leaves of a data frame, each once in order of appearance, and their columns."""
    if not hasattr(frame, "columns"):
        raise TypeError(f"a data frame has columns, as pandas' does; got {type(frame).__name__}.")
    paths, wanted = _leaves(read_table(frame), columns)
    return list(dict.fromkeys(paths)), wanted


def _leaves(table: Table, columns: Sequence[Any] | None) -> tuple[list[NodePath], list[str]]:
    wanted = [str(name) for name in _pick_columns(table.header, columns, table.source)]
    cells = zip(*(table.columns[name] for name in wanted), strict=True)
    paths = [_row_path(row, table.place(i)) for i, row in enumerate(cells) if any(row)]
    return paths, wanted


def _pick_columns(header: Sequence[Any], columns: Sequence[Any] | None, source: str) -> list[Any]:
    """The columns asked for, all by default, after making sure that each is there once."""
    wanted = list(header) if columns is None else list(map(str, columns))
    if unknown := [name for name in wanted if name not in header]:
        raise ValueError(f"{source} has no column {unknown[0]!r}; its columns are {header}.")
    if len(set(header)) < len(header) or not all(str(name).strip() for name in header):
        raise ValueError(f"{source}: each column needs a name of its own, got {header}.")
    if not wanted:
        raise ValueError(
            f"{source} needs at least one column for a level, got none; its columns are {header}."
        )
    return wanted


def _row_path(cells: Sequence[str], where: str) -> NodePath:
    """A row's path: its cells up to the first empty one, after which there may be no other."""
    names = tuple(cell for cell in cells if cell)
    if tuple(cells[: len(names)]) != names:
        raise ValueError(
            f"{where}: empty name above a class: {list(cells)}; only the last cells of a row may "
            "be empty."
        )
    return names


def load_json(file: str | Path) -> Any:
    """The content of a JSON file, in which no object may give a key twice."""
    return json.loads(Path(file).read_text(encoding="utf-8-sig"), object_pairs_hook=_no_doubles)


def _no_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """JSON's last-one-wins would drop a whole branch without a word."""
    keys = [key for key, _ in pairs]
    if len(set(keys)) < len(keys):
        raise ValueError(
            f"{next(key for key in keys if keys.count(key) > 1)!r} occurs twice in one JSON object."
        )
    return dict(pairs)


def read_names(names: Mapping[str, str] | str | Path | None) -> Mapping[str, str]:
    """Readable names by label, from a mapping or a CSV of two columns, with a header or without."""
    if names is None or isinstance(names, Mapping):
        return names or {}
    table: dict[str, str] = {}
    for row, line in read_rows(names):
        if len(row) < 2:
            continue
        label, name = row[:2]
        if table.setdefault(label, name) != name:
            raise ValueError(
                f"{names}, line {line}: {label!r} is called {name!r} here and {table[label]!r} "
                "before. Keep one of the two."
            )
    return table


def read_json(node: Any, path: NodePath = ()) -> list[NodePath]:
    """The leaves of nested objects and lists below `path`."""
    where = "/".join(path) or "the top level"
    leaves: list[NodePath] = []
    if isinstance(node, Mapping):
        for name, below in node.items():
            here = (*path, name)
            if below is None or below == {}:
                leaves.append(here)
            else:
                leaves += read_json(below, here)
        return leaves
    if isinstance(node, Sequence) and not isinstance(node, str):
        if not node and path:
            raise ValueError(f"{where} has an empty list of children; write null for a leaf.")
        leaves = []
        for item in node:
            if isinstance(item, str):
                leaves.append((*path, item))
            elif isinstance(item, Mapping):
                leaves += read_json(item, path)
            else:
                raise ValueError(
                    f"the list under {where} holds {item!r}; expected leaf names in quotes, or "
                    "objects."
                )
        return leaves
    raise ValueError(
        f"{where} holds {node!r}; expected an object of children, a list of leaf names, or null."
    )


def read_folders(root: str | Path) -> list[NodePath]:
    """The leaves of nested class folders, sorted."""
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"{root} is not a folder; give the folder that holds the class folders.")
    leaves = _walk_folders(root, (), (root.resolve(),))
    if leaves == [()]:
        raise ValueError(f"{root} has no class folders.")
    return leaves


def _walk_folders(folder: Path, path: NodePath, above: tuple[Path, ...]) -> list[NodePath]:
    below = sorted(
        child for child in folder.iterdir() if child.is_dir() and not child.name.startswith(".")
    )
    leaves = []
    for child in below:
        real = child.resolve()
        if real in above:
            raise ValueError(f"{child} links back to {real}, which contains it: a cycle.")
        leaves += _walk_folders(child, (*path, child.name), (*above, real))
    return leaves or [path]


def read_parents(
    classes: Sequence[str],
    maps: Any,
    names: Sequence[Sequence[str] | None] | None,
    levels: Sequence[str] | None,
) -> tuple[list[NodePath], list[list[NodePath]] | None]:
    """The leaves of maps from child to parent, and the order of each level's nodes.

    The order is known where there is a map for each step.

    Args:
        classes: the leaves' names in class order.
        maps: a list of maps, one for each step up, or one map of names for the whole forest.
        names: for each map of a list the names of its parents, or None.
        levels: level names, coarsest first.
    """
    classes = list(classes)
    if len(set(classes)) < len(classes):
        twice = next(name for name in classes if classes.count(name) > 1)
        raise ValueError(f"class {twice!r} is listed twice.")
    if isinstance(maps, Mapping) or (maps and all(_is_pair(pair) for pair in maps)):
        edges = _as_map(maps)
        if not any(isinstance(key, Integral) for key in edges):
            if names is not None:
                raise ValueError(
                    "names belong to a list of maps; a map of the whole forest names its parents."
                )
            return _climb(classes, edges), None
        maps = [maps]
    if names is not None and len(names) != len(maps):
        raise ValueError(f"names needs one entry per map ({len(maps)}), got {len(names)}.")
    if levels is not None and len(levels) != len(maps) + 1:
        raise ValueError(
            f"{len(maps)} maps make {len(maps) + 1} levels, got {len(levels)} level names."
        )
    rows = [classes]  # names per level, finest first
    steps = []  # for each map, the parent's name of each name
    for i, given in enumerate(maps):
        title = f"level{len(maps) - i}"
        if levels is not None:
            title = levels[len(maps) - 1 - i]
        names_of_parents = names[i] if names else None
        parent, upper = _one_step(rows[-1], _as_map(given), names_of_parents, title)
        steps.append(parent)
        rows.append(upper)
    order = _paths_by_level(rows, steps)
    return order[-1], order


def _paths_by_level(
    rows: Sequence[Sequence[str]], steps: Sequence[Mapping[str, str]]
) -> list[list[NodePath]]:
    """The paths of each level's nodes, coarsest level first.

    Args:
        rows: Names of each level, finest first.
        steps: For each step up the parent's name of each name.
    """
    order: list[list[NodePath]] = [[(name,) for name in rows[-1]]]
    for row, parent in zip(rows[-2::-1], steps[::-1], strict=True):
        above = {path[-1]: path for path in order[-1]}
        order.append([(*above[parent[name]], name) for name in row])
    return order


def _is_pair(item: Any) -> bool:
    """Whether it is (child, parent).

    A map written as a list never looks like that, as it holds indices or pairs.
    """
    return (
        isinstance(item, (tuple, list))
        and len(item) == 2
        and isinstance(item[0], str)
        and (item[1] is None or isinstance(item[1], str))
    )


def _as_map(given: Any) -> dict[Any, Any]:
    """A child -> parent dict out of a dict, a list of pairs or a list of indices."""
    given = given.tolist() if hasattr(given, "tolist") else given
    if isinstance(given, Mapping):
        return dict(given)
    if isinstance(given, Sequence) and given and all(_is_pair(pair) for pair in given):
        edges: dict[Any, Any] = {}
        for child, parent in given:
            if edges.setdefault(child, parent) != parent:
                raise ValueError(f"{child!r} has a second parent: {edges[child]!r} and {parent!r}.")
        return edges
    if (
        isinstance(given, Sequence)
        and given
        and all(isinstance(index, Integral) for index in given)
    ):
        return dict(enumerate(given))
    raise ValueError(
        "a map is a dict, a list of (child, parent) names, or a list of parent indices; got "
        f"{given!r}."
    )


def _climb(classes: Sequence[str], edges: Mapping[str, str | None]) -> list[NodePath]:
    paths = []
    for name in classes:
        path = [name]
        while (parent := edges.get(path[0])) is not None:
            if parent in path:
                raise ValueError(f"cycle: {' -> '.join([*path[::-1], parent])}.")
            path.insert(0, parent)
        paths.append(tuple(path))
    used = set(chain.from_iterable(paths))
    if unused := [name for name in edges if name not in used]:
        raise ValueError(
            f"{unused[0]!r} has a parent but is neither a class nor above "
            f"one{hint(unused[0], used)}"
        )
    return paths


def _one_step(
    row: Sequence[str],
    edges: Mapping[Any, Any],
    names: Sequence[str] | None,
    title: str,
) -> tuple[dict[str, str], list[str]]:
    """One map from a level to the next.

    The parent's name of each name, and the parents in order of their indices.
    """
    by_index = any(isinstance(key, Integral) for key in edges)
    keys: Sequence[Any] = range(len(row)) if by_index else row
    kind = "index" if by_index else "class"
    for key in keys:
        if edges.get(key) is None:
            raise ValueError(f"{kind} {key!r} has no parent on {title}.")
    known = set(keys)
    for key in edges:
        if key not in known:
            raise ValueError(
                f"{kind} {key!r} has a parent on {title}, but there is no such class"
                f"{hint(str(key), row)}"
            )
    parents = [edges[key] for key in keys]
    if not by_index:
        return dict(edges), _parents_by_name(parents, names, title)
    upper = _parents_by_index(parents, names, title)
    return {name: upper[index] for name, index in zip(row, parents, strict=True)}, upper


def _parents_by_name(parents: Sequence[str], names: Sequence[str] | None, title: str) -> list[str]:
    """The classes of the level above, in the order of `names` or of their first child."""
    if names is None:
        return list(dict.fromkeys(parents))
    if set(names) != set(parents) or len(set(names)) < len(names):
        raise ValueError(
            f"names of {title} must list each parent once: {sorted(map(str, set(parents)))}, got "
            f"{list(names)}."
        )
    return list(names)


def _parents_by_index(parents: Sequence[int], names: Sequence[str] | None, title: str) -> list[str]:
    """The names of the classes of the level above, in the order of their indices."""
    used = set(parents)
    if not all(isinstance(index, Integral) and int(index) >= 0 for index in used):
        raise ValueError(
            f"a map whose keys are indices must have indices from 0 as values too, got "
            f"{sorted(map(str, used))}."
        )
    count = max(used) + 1 if names is None else len(names)
    if used != set(range(count)):
        raise ValueError(
            f"{title} has {count} classes, so parents must be each of 0 to {count - 1}; got "
            f"{sorted(used)}: an index without children would be an empty class."
        )
    if names is None:
        return [f"{title}_{index}" for index in range(count)]
    if len(set(names)) < len(names):
        raise ValueError(f"names of {title} must differ from each other, got {list(names)}.")
    return list(names)
