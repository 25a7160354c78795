"""Label hierarchies.

The tree of classes, read from files, ready-made or derived. Labels and names; no network.
"""

from timm_branches.taxonomy.derive import (
    class_prototypes,
    cut_linkage,
    linkage_from_confusion,
    linkage_from_embeddings,
)
from timm_branches.taxonomy.matching import match_classes, match_taxonomies
from timm_branches.taxonomy.taxonomy import Taxonomy
from timm_branches.taxonomy.trees import (
    TREES,
    cifar10,
    cifar100,
    digits,
    fashion_mnist,
    get_taxonomy,
    mnist,
    register_taxonomy_reader,
)

__all__ = [
    "TREES",
    "Taxonomy",
    "cifar10",
    "cifar100",
    "class_prototypes",
    "cut_linkage",
    "digits",
    "fashion_mnist",
    "get_taxonomy",
    "linkage_from_confusion",
    "linkage_from_embeddings",
    "match_classes",
    "match_taxonomies",
    "mnist",
    "register_taxonomy_reader",
]
