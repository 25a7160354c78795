"""Trees in the files of well-known collections: COCO, iNaturalist, Open Images, Darwin Core.

Sources: the COCO data format (cocodataset.org), which iNaturalist's competitions extend by ranks;
Open Images' `bbox_labels_600_hierarchy.json`; Darwin Core (dwc.tdwg.org/terms).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from timm_branches.taxonomy.paths import NodePath

__all__ = ["RANKS", "category_paths", "is_categories", "is_open_images", "open_images_paths"]

RANKS = ("kingdom", "phylum", "class", "order", "family", "genus")
"""The ranks above the species, coarsest first, as iNaturalist and Darwin Core spell them."""


def is_categories(content: Any) -> bool:
    """Whether JSON holds COCO's or iNaturalist's `categories`."""
    if not isinstance(content, Mapping):
        return False
    categories = content.get("categories")
    return (
        isinstance(categories, Sequence)
        and bool(categories)
        and all(isinstance(c, Mapping) and "name" in c and "id" in c for c in categories)
    )


def category_paths(content: Mapping[str, Any]) -> tuple[dict[Any, NodePath], list[str]]:
    """The path of each category by its id, in the order of the ids, and the levels' names.

    With ranks a path goes from kingdom (or the coarsest rank that all have) to the name; with
    `supercategory` it has two names; else one.

    Raises:
        ValueError: Two categories have one id, or ranks are missing in some categories only.

    Example:
        >>> content = {'categories': [{'id': 2, 'name': 'dog', 'supercategory': 'animal'}]}
        >>> category_paths(content)
        ({2: ('animal', 'dog')}, ['supercategory', 'name'])
    """
    categories = sorted(content["categories"], key=lambda category: category["id"])
    known = set().union(*categories)
    levels: list[str] = [rank for rank in RANKS if rank in known]
    if not levels and any("supercategory" in c for c in categories):
        levels = ["supercategory"]
    paths: dict[Any, NodePath] = {}
    for category in categories:
        missing = [level for level in levels if not str(category.get(level) or "").strip()]
        if missing:
            raise ValueError(
                f"The category {category['name']!r} (id {category['id']}) lacks "
                f"{', '.join(missing)}, which others have: fill it in, or leave it out everywhere."
            )
        if category["id"] in paths:
            raise ValueError(f"Two categories have the id {category['id']}.")
        above = [str(category[level]).strip() for level in levels]
        paths[category["id"]] = (*above, str(category["name"]).strip())
    return paths, [*levels, "species" if levels[:1] != ["supercategory"] and levels else "name"]


def is_open_images(content: Any) -> bool:
    """Whether JSON is Open Images' hierarchy."""
    return isinstance(content, Mapping) and "LabelName" in content


def open_images_paths(
    content: Mapping[str, Any], names: Mapping[str, str] | None = None
) -> list[NodePath]:
    """The leaves of Open Images' hierarchy; its root, which is above everything, is no class.

    `Subcategory` is "is a" and makes the tree; `Part` ("is a part of") does not.

    Args:
        content: The object with `LabelName` and `Subcategory`.
        names: The readable name of each label (`/m/0bt9lr` is 'Dog'), as the class descriptions
            give them; labels without one keep their own.

    Example:
        >>> children = [{'LabelName': '/m/1'}, {'LabelName': '/m/2'}]
        >>> tree = {'LabelName': '/m/0', 'Subcategory': children}
        >>> open_images_paths(tree, {'/m/1': 'Dog'})
        [('Dog',), ('/m/2',)]
    """
    names = names or {}
    leaves: list[NodePath] = []

    def visit(node: Mapping[str, Any], above: NodePath) -> None:
        for child in node.get("Subcategory", ()):
            path = (*above, names.get(child["LabelName"], child["LabelName"]))
            if child.get("Subcategory"):
                visit(child, path)
            else:
                leaves.append(path)

    visit(content, ())
    return list(dict.fromkeys(leaves))
