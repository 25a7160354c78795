"""Ready-made trees for well-known data sets.

The leaves are in the order of torchvision's (for `digits` scikit-learn's) class indices, so a data
set's label is a leaf index as it stands. The classes of the coarser levels are numbered as in the
sources.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from timm_branches.taxonomy.taxonomy import Taxonomy

__all__ = [
    "READERS",
    "TREES",
    "cifar10",
    "cifar100",
    "digits",
    "fashion_mnist",
    "get_taxonomy",
    "mnist",
    "register_taxonomy_reader",
]


def cifar10() -> Taxonomy:
    """B-CNN's tree for CIFAR-10: 2 / 7 / 10 classes.

    Source: Zhu and Bain, arXiv:1709.09890, and the authors' code (zhuxinqimac/B-CNN,
        CIFAR_10_keras_medium_dynamic.py).

    Example:
        >>> cifar10().num_classes
        (2, 7, 10)
    """
    return Taxonomy.from_parents(
        ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"],
        [[0, 2, 3, 5, 6, 5, 4, 6, 1, 2], [0, 0, 0, 1, 1, 1, 1]],
        names=[
            ["sky", "water", "road", "bird", "reptile", "pet", "medium animal"],
            ["transport", "animal"],
        ],
        levels=["coarse", "middle", "fine"],
    )


# CIFAR-100's own 20 superclasses in the order of its coarse labels, each with its five classes
# (Krizhevsky 2009, https://www.cs.toronto.edu/~kriz/cifar.html), and the one of B-CNN's 8 groups it
# belongs to
_CIFAR100 = (
    ("aquatic_mammals", 0, "beaver dolphin otter seal whale"),
    ("fish", 0, "aquarium_fish flatfish ray shark trout"),
    ("flowers", 1, "orchid poppy rose sunflower tulip"),
    ("food_containers", 2, "bottle bowl can cup plate"),
    ("fruit_and_vegetables", 1, "apple mushroom orange pear sweet_pepper"),
    ("household_electrical_devices", 2, "clock keyboard lamp telephone television"),
    ("household_furniture", 2, "bed chair couch table wardrobe"),
    ("insects", 3, "bee beetle butterfly caterpillar cockroach"),
    ("large_carnivores", 4, "bear leopard lion tiger wolf"),
    ("large_man-made_outdoor_things", 5, "bridge castle house road skyscraper"),
    ("large_natural_outdoor_scenes", 5, "cloud forest mountain plain sea"),
    ("large_omnivores_and_herbivores", 4, "camel cattle chimpanzee elephant kangaroo"),
    ("medium_mammals", 4, "fox porcupine possum raccoon skunk"),
    ("non-insect_invertebrates", 3, "crab lobster snail spider worm"),
    ("people", 6, "baby boy girl man woman"),
    ("reptiles", 4, "crocodile dinosaur lizard snake turtle"),
    ("small_mammals", 4, "hamster mouse rabbit shrew squirrel"),
    ("trees", 1, "maple_tree oak_tree palm_tree pine_tree willow_tree"),
    ("vehicles_1", 7, "bicycle bus motorcycle pickup_truck train"),
    ("vehicles_2", 7, "lawn_mower rocket streetcar tank tractor"),
)
# the groups are numbers in B-CNN's code; these names describe what each holds
_CIFAR100_GROUPS = (
    "water animals",
    "plants",
    "household objects",
    "invertebrates",
    "land animals",
    "outdoor scenes",
    "people",
    "vehicles",
)


def cifar100() -> Taxonomy:
    """B-CNN's tree for CIFAR-100: 8 / 20 / 100 classes; the 20 are the data set's own superclasses.

    Source: Zhu and Bain, arXiv:1709.09890, and the authors' code (zhuxinqimac/B-CNN,
    CIFAR_100_keras_vgg16_hierarchy_dynamic.py). The groups' names are ours, the code has numbers
    only.

    Example:
        >>> cifar100().num_classes
        (8, 20, 100)
    """
    parent: dict[str, str] = {}
    for superclass, _, members in _CIFAR100:
        parent |= dict.fromkeys(members.split(), superclass)
    superclasses = [superclass for superclass, _, _ in _CIFAR100]
    groups = [group for _, group, _ in _CIFAR100]
    return Taxonomy.from_parents(
        sorted(parent),  # CIFAR-100 numbers its classes alphabetically
        [parent, groups],
        names=[superclasses, _CIFAR100_GROUPS],
        levels=["coarse", "middle", "fine"],
    )


def fashion_mnist() -> Taxonomy:
    """H-CNN's tree for Fashion-MNIST: 2 / 6 / 10 classes.

    Source: Seo and Shin, "Hierarchical convolutional neural networks for fashion image
    classification", Expert Systems with Applications 116 (2019). The grouping is read from a public
    implementation (tasrif-khondaker/H-CapsNet).

    Example:
        >>> fashion_mnist().encode(['T-shirt/top', 'Bag']).tolist()
        [0, 8]
    """
    return Taxonomy.from_parents(
        [
            "T-shirt/top",
            "Trouser",
            "Pullover",
            "Dress",
            "Coat",
            "Sandal",
            "Shirt",
            "Sneaker",
            "Bag",
            "Ankle boot",
        ],
        [[0, 1, 0, 2, 3, 5, 0, 5, 4, 5], [0, 0, 0, 0, 1, 1]],
        names=[
            ["Tops", "Bottoms", "Dresses", "Outers", "Accessories", "Shoes"],
            ["Clothes", "Goods"],
        ],
        levels=["coarse", "middle", "fine"],
    )


def mnist() -> Taxonomy:
    """A tree of look-alikes for MNIST: 5 / 10 classes, the sizes of B-CNN's.

    {0, 6}, {2, 8}, {1, 7}, {4, 9} and {3, 5} share a parent.

    Source: the sizes are those of Zhu and Bain, arXiv:1709.09890, whose code for MNIST is not
    public; the grouping is the one of a public re-implementation (tasrif-khondaker/H-CapsNet).

    Example:
        >>> mnist().expand(7).tolist()
        [2, 7]
    """
    return Taxonomy.from_parents(
        [
            "0 - zero",
            "1 - one",
            "2 - two",
            "3 - three",
            "4 - four",
            "5 - five",
            "6 - six",
            "7 - seven",
            "8 - eight",
            "9 - nine",
        ],
        [[0, 2, 1, 4, 3, 4, 0, 2, 1, 3]],
        names=[["0 or 6", "2 or 8", "1 or 7", "4 or 9", "3 or 5"]],
        levels=["coarse", "fine"],
    )


def digits() -> Taxonomy:
    """A tree of strokes for scikit-learn's digits: 3 / 10 classes.

    Grouped by appearance: digits with a closed loop (0, 6, 8, 9), of open curves (2, 3, 5), and of
    straight strokes (1, 4, 7). The grouping is ours; unlike one by parity or size it is something
    the image shows.

    Example:
        >>> digits().classes[0]
        ('loop', 'straight', 'curve')
    """
    shape = {
        "0": "loop",
        "1": "straight",
        "2": "curve",
        "3": "curve",
        "4": "straight",
        "5": "curve",
        "6": "loop",
        "7": "straight",
        "8": "loop",
        "9": "loop",
    }
    return Taxonomy.from_parents(list(shape), [shape], levels=["shape", "digit"])


TREES: dict[str, Callable[[], Taxonomy]] = {
    "cifar10": cifar10,
    "cifar100": cifar100,
    "digits": digits,
    "fashion_mnist": fashion_mnist,
    "mnist": mnist,
}


READERS: dict[str, Callable[[Any], Taxonomy]] = {
    ".csv": Taxonomy.from_csv,
    ".tsv": Taxonomy.from_csv,
    ".parquet": Taxonomy.from_csv,
    ".json": Taxonomy.from_json,
}
"""Readers of trees by the ending of the file, with its dot, or by a prefix."""


def register_taxonomy_reader(key: str, reader: Callable[[Any], Taxonomy] | None = None) -> Any:
    """Make `get_taxonomy`, and with it `--taxonomy`, read another kind of tree.

    Args:
        key: The ending of files, with its dot (`'.obo'`), or a prefix (`'mytrees'` for
            `get_taxonomy('mytrees/rest')`).
        reader: A function of the file's path, or of what follows the prefix, that returns a
            :class:`Taxonomy`; left out, this is a decorator.

    Raises:
        ValueError: The key is empty, holds a slash, or is taken.

    Example:
        >>> @register_taxonomy_reader('doctest-letters')
        ... def read_letters(rest):
        ...     return Taxonomy(list(rest))
        >>> get_taxonomy('doctest-letters/abc').leaf_names
        ('a', 'b', 'c')
        >>> del READERS['doctest-letters']
    """
    if not key or "/" in key:
        raise ValueError(
            f"A reader's key is an ending ('.obo') or a word without slashes: {key!r}."
        )

    def register(function: Callable[[Any], Taxonomy]) -> Callable[[Any], Taxonomy]:
        known: Any = READERS.get(key, function)
        if (known.__module__, known.__qualname__) != (function.__module__, function.__qualname__):
            raise ValueError(
                f"The key {key!r} is taken by {known.__module__}.{known.__qualname__}."
            )
        READERS[key] = function
        return function

    return register if reader is None else register(reader)


def get_taxonomy(source: str | Path | Taxonomy) -> Taxonomy:
    """A taxonomy by what a user may write for one.

    Args:
        source: the name of a ready-made tree ('cifar10', 'cifar100', 'digits', 'fashion_mnist',
            'mnist'; a dash will do for the underscore), a .csv or .json file, a folder of class
            folders, or a taxonomy.

    Raises:
        ValueError: if it is none of these, with the names there are; or if the file does not hold a
            tree.

    Example:
        >>> get_taxonomy('fashion-mnist').levels
        ('coarse', 'middle', 'fine')
    """
    if isinstance(source, Taxonomy):
        return source
    name = str(source).lower().replace("-", "_")
    if name in TREES:
        return TREES[name]()
    prefix, _, remainder = str(source).partition("/")
    if prefix in READERS and not prefix.startswith("."):
        return READERS[prefix](remainder)
    path = Path(source)
    if path.is_dir():
        return Taxonomy.from_folders(path)
    reader = READERS.get(path.suffix.lower())
    if reader is not None and path.is_file():
        return reader(path)
    close = difflib.get_close_matches(name, TREES, n=1)
    raise ValueError(
        f"no taxonomy {str(source)!r}: it is neither an existing .csv or .json file, nor a folder, "
        "nor "
        f"one of {', '.join(TREES)}" + (f"; did you mean {close[0]!r}?" if close else "")
    )
