"""What the numbers in a data set's labels mean: the tree or class list that travels with it."""

from collections.abc import Mapping, Sequence
from typing import Any

from timm_branches.taxonomy.taxonomy import Taxonomy

__all__ = ["label_names"]


def label_names(dataset: Any) -> Taxonomy | tuple[str, ...] | None:
    """The names behind a data set's labels, also where it is wrapped in others.

    Looked for are `taxonomy`, `classes` (torchvision's) and `class_to_idx` (timm's readers have
    it), through `Subset`, `ConcatDataset` and wrappers that keep what they wrap as `dataset`.

    Args:
        dataset: Any data set, or a loader of one.

    Returns:
        The taxonomy of labels (N, L), the names of class indices (N,), or None where nothing says.

    Raises:
        ValueError: The parts of a joined data set number their classes differently.

    Example:
        >>> from types import SimpleNamespace
        >>> label_names(SimpleNamespace(dataset=SimpleNamespace(class_to_idx={'dog': 1, 'cat': 0})))
        ('cat', 'dog')
    """
    own = _own_names(dataset)
    if own is not None:
        return own
    parts = getattr(dataset, "datasets", None)
    if isinstance(parts, Sequence) and len(parts):
        return _joined([label_names(part) for part in parts])
    inner = getattr(dataset, "dataset", None)
    return None if inner is None or inner is dataset else label_names(inner)


def _own_names(dataset: Any) -> Taxonomy | tuple[str, ...] | None:
    taxonomy = getattr(dataset, "taxonomy", None)
    if isinstance(taxonomy, Taxonomy):
        return taxonomy
    classes = getattr(dataset, "classes", None)
    if isinstance(classes, Sequence) and classes and all(isinstance(c, str) for c in classes):
        return tuple(classes)
    for holder in (dataset, getattr(dataset, "reader", None)):
        index = getattr(holder, "class_to_idx", None)
        if isinstance(index, Mapping) and sorted(index.values()) == list(range(len(index))):
            return tuple(sorted(map(str, index), key=lambda name: index[name]))
    return None


def _joined(names: list[Any]) -> Any:
    first = names[0]
    for other in names[1:]:
        same = other == first
        if isinstance(first, Taxonomy) and isinstance(other, Taxonomy):
            same = first.nodes == other.nodes
        if not same:
            raise ValueError(
                "The parts of this joined data set number their classes differently (or some say "
                "no names): give all of them the same taxonomy before they are joined."
            )
    return first
