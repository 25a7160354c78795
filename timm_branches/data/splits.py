"""Names that people give to training, validation and test data."""

import re

__all__ = ["SPLITS", "SPLIT_NAMES", "split_of", "wanted_splits"]

SPLITS = ("train", "val", "test")
SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "trn": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "validate": "val",
    "dev": "val",
    "development": "val",
    "test": "test",
    "testing": "test",
    "tst": "test",
    "eval": "test",
    "evaluation": "test",
    "holdout": "test",
    "heldout": "test",
}
# what may stand beside them: train_images, test-set, train_mini, val2017, seg_train
_BESIDE = frozenset(
    ["", "set", "data", "dataset", "images", "imgs", "img", "mini", "full", "seg", "split", "out"]
)


def split_of(name: str) -> str | None:
    """The split that a name means, None if it means none.

    Example:
        >>> names = ('Training', 'train_mini', 'val2017', 'hold-out', 'trainer')
        >>> [split_of(name) for name in names]
        ['train', 'train', 'val', 'test', None]
    """
    plain = name.strip().lower()
    if plain.replace("-", "").replace("_", "").replace(" ", "") in ("holdout", "heldout"):
        return "test"
    words = re.split(r"[^a-z]+", plain)
    meant = {SPLIT_NAMES[word] for word in words if word in SPLIT_NAMES}
    rest = [word for word in words if word not in SPLIT_NAMES]
    if len(meant) == 1 and all(word in _BESIDE for word in rest):
        return meant.pop()
    return None


def wanted_splits(split: str) -> set[str]:
    """The splits that a user asks for.

    Raises:
        ValueError: No known split.
    """
    if not isinstance(split, str):
        raise ValueError(f"split= takes a text such as 'train', got {split!r}.")
    together = {"trainval": {"train", "val"}, "all": set(SPLITS)}
    if split in together:
        return together[split]
    if split.lower() in SPLIT_NAMES:
        return {SPLIT_NAMES[split.lower()]}
    raise ValueError(f"no split {split!r}; it is 'train', 'val', 'test', 'trainval' or 'all'.")
