"""Trees and labels on which the losses are tried."""

import random

import torch

from tests.taxonomy import forests
from timm_branches.taxonomy import Taxonomy, cifar10

UNEVEN = Taxonomy(forests.UNEVEN)
SINGLE = Taxonomy(["a", "b", "c"])
TREES = [
    UNEVEN,
    SINGLE,
    Taxonomy(["a/b/c"]),
    cifar10(),
    *(Taxonomy(forests.random_paths(seed)) for seed in range(8)),
]


def case(tree, seed=0, batch=12):
    """Labels of random nodes, coarse ones among them and one unknown, their paths (None.

    Unknown), and a generator.
    """
    generator = torch.Generator().manual_seed(seed)
    rng = random.Random(seed)
    nodes = [path for level in tree.nodes for path in level]
    paths = [None, *(rng.choice(nodes) for _ in range(batch - 1))]
    labels = torch.full((batch, tree.num_levels), -1)
    for row, path in enumerate(paths):
        for level in range(len(path or ())):
            labels[row, level] = tree.nodes[level].index(path[: level + 1])
    return labels, paths, generator


def mean_of_known(costs, paths):
    counted = [cost for cost, path in zip(costs, paths, strict=True) if path is not None]
    return sum(counted) / len(counted)
