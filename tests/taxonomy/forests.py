"""Small random forests, and the most pedestrian ways to number their nodes."""

import random

UNEVEN = ["animal/pet/cat", "animal/pet/dog", "plant", "animal/bird", "transport/sea/ship"]


def random_paths(seed):
    """Leaves of a random forest, shuffled.

    Depth 1 to 4, names that recur under different parents.
    """
    rng = random.Random(seed)
    leaves = []

    def grow(path):
        if path and (len(path) == 4 or rng.random() < 0.35):
            leaves.append(path)
            return
        for name in rng.sample("abcde", rng.randint(1, 3)):
            grow((*path, name))

    grow(())
    rng.shuffle(leaves)
    return leaves


def walk(leaves):
    """Per level the nodes in order of first appearance, by the most pedestrian means."""
    levels = []
    for leaf in leaves:
        for depth in range(len(leaf)):
            if depth == len(levels):
                levels.append([])
            if leaf[: depth + 1] not in levels[depth]:
                levels[depth].append(leaf[: depth + 1])
    return levels


def walk_row(levels, path):
    return [levels[d].index(path[: d + 1]) if d < len(path) else -1 for d in range(len(levels))]
