"""Paths of a forest's nodes: written, shortened, found by a name, drawn.

A path holds the names from a root down to a node. What a :class:`Taxonomy` does with names rather
than numbers is here.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from timm_branches.arguments import as_items

__all__ = [
    "NodePath",
    "as_path",
    "by_end",
    "check_leaves",
    "check_levels",
    "check_order",
    "display_names",
    "draw",
    "find",
    "hint",
]

NodePath = tuple[str, ...]


def as_path(path: Any) -> NodePath:
    """A path given as 'a/b/c' or as a sequence of names.

    Names in a sequence may contain slashes.
    """
    names = path.split("/") if isinstance(path, str) else path
    if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise ValueError(
            f"a path is a text like 'animal/pet/cat' or a sequence of names, got {path!r}."
        )
    if not names or not all(name.strip() for name in names):
        raise ValueError(f"empty name in path {path!r}: each level of a path needs a name.")
    return tuple(names)


def hint(word: str, known: Iterable[str]) -> str:
    """The end of an error message: what may have been meant."""
    close = difflib.get_close_matches(word, list(known), n=3)
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else "."


def check_leaves(leaves: Iterable[Any]) -> tuple[NodePath, ...]:
    """The leaves' paths, after making sure that each is one."""
    items = leaves  # a text stands for its letters
    if not isinstance(leaves, str):
        items = as_items("leaves", leaves, "['animal/cat', 'animal/dog']")
    paths = tuple(as_path(path) for path in items)
    if not paths:
        raise ValueError("a taxonomy needs at least one leaf, got none.")
    first: dict[NodePath, int] = {}
    for i, path in enumerate(paths):
        if path in first:
            raise ValueError(
                f"leaf {'/'.join(path)!r} is listed twice, as number {first[path]} and {i}."
            )
        first[path] = i
    for path in paths:
        for depth in range(1, len(path)):
            if path[:depth] in first:
                raise ValueError(
                    f"{'/'.join(path[:depth])!r} is listed as a leaf, but is also the parent of "
                    f"{'/'.join(path)!r}; a node is either a leaf or has children."
                )
    return paths


def check_levels(levels: Sequence[str] | None, depth: int) -> tuple[str, ...]:
    """The level names, or default ones, after making sure that they fit the depth."""
    if levels is None:
        return tuple(f"level{i + 1}" for i in range(depth))
    names = list(levels) if isinstance(levels, (list, tuple)) else []
    if not names or not all(isinstance(name, str) and name.strip() for name in names):
        raise ValueError(
            f"levels must be a sequence of {depth} names that are not empty, got {levels!r}."
        )
    if len(levels) > depth:
        raise ValueError(
            f"level {levels[depth]!r} is empty: {len(levels)} level names are given, but the "
            f"deepest leaf lies on level {depth}; name {depth} levels."
        )
    if len(levels) < depth:
        raise ValueError(
            f"{len(levels)} level names are given, but the deepest leaf lies on level {depth}; "
            f"name {depth} levels, coarsest first."
        )
    if len(set(levels)) < depth:
        raise ValueError(f"level names must differ from each other, got {list(levels)}.")
    return tuple(levels)


def check_order(
    levels: Sequence[str], nodes: list[list[NodePath]], order: Any
) -> tuple[tuple[NodePath, ...], ...]:
    """Each level's nodes in the order given, after making sure that it lists exactly them."""
    if order is None:
        return tuple(map(tuple, nodes))
    order = as_items("order", order, "[['animal', 'thing'], None]")
    if len(order) != len(nodes):
        raise ValueError(f"order needs one entry per level ({len(nodes)}), got {len(order)}.")
    ordered = []
    for level, found, given in zip(levels, nodes, order, strict=True):
        paths = found
        if given is not None:
            paths = [as_path(path) for path in as_items("order", given, "['animal', 'thing']")]
        if len(paths) != len(found) or set(paths) != set(found):
            odd = sorted("/".join(path) for path in set(paths) ^ set(found)) or "a node twice"
            raise ValueError(
                f"order of level {level!r} must list each of its {len(found)} nodes once; it "
                f"differs in {odd}."
            )
        ordered.append(tuple(paths))
    return tuple(ordered)


def by_end(paths: Iterable[NodePath]) -> dict[str, list[NodePath]]:
    """Every end of every path as text ('c', 'b/c', 'a/b/c') -> the paths that have it."""
    ends: dict[str, list[NodePath]] = {}
    for path in paths:
        for k in range(1, len(path) + 1):
            ends.setdefault("/".join(path[-k:]), []).append(path)
    return ends


def display_names(paths: Sequence[NodePath]) -> tuple[str, ...]:
    """Each path's shortest end that no other of the paths shares."""
    ends = by_end(paths)
    names = []
    for path in paths:
        length = 1
        while length < len(path) and len(ends["/".join(path[-length:])]) > 1:
            length += 1
        names.append("/".join(path[-length:]))
    return tuple(names)


def find(name: Any, ends: Mapping[str, list[NodePath]], nodes: Iterable[NodePath]) -> NodePath:
    """The path that a user means by `name`, a whole path or the end of one.

    Args:
        name: 'a/b/c' or a sequence of names.
        ends: what :func:`by_end` returned for the paths to choose from.
        nodes: all paths of the forest, to say of an inner node that it is one.
    """
    if not isinstance(name, str):
        name = as_path(name)
        found = [path for path in ends.get("/".join(name), ()) if path[-len(name) :] == name]
        found = [path for path in found if path == name] or found
        name = "/".join(name)
    else:
        found = ends.get(name, [])
        found = [path for path in found if "/".join(path) == name] or found
    if len(found) == 1:
        return found[0]
    if found:
        options = ", ".join(repr(path) for path in found[:5])
        raise ValueError(
            f"{name!r} is ambiguous: it fits {len(found)} nodes, among them {options}; give the "
            "whole path as a tuple."
        )
    if any(name in ("/".join(path), path[-1]) for path in nodes):
        raise ValueError(f"{name!r} is not a leaf but an inner node; encode_partial takes those.")
    count = len(set().union(*ends.values()))
    raise ValueError(f"no class {name!r} among {count} in this taxonomy{hint(name, ends)}")


def draw(nodes: Iterable[NodePath], index: Mapping[NodePath, int]) -> str:
    """The forest as text, leaves with their index."""
    children: dict[NodePath, list[NodePath]] = {}
    for path in nodes:
        children.setdefault(path[:-1], []).append(path)
    lines: list[str] = []

    def draw_below(path: NodePath, prefix: str, tee: str, stem: str) -> None:
        lines.append(prefix + tee + path[-1] + (f" [{index[path]}]" if path in index else ""))
        below = children.get(path, [])
        for child in below:
            last = child is below[-1]
            branch, line = ("└─ ", "   ") if last else ("├─ ", "│  ")
            draw_below(child, prefix + stem, branch, line)

    for root in children[()]:
        draw_below(root, "", "", "")
    return "\n".join(lines)
