"""Heights, lowest common ancestors and distances, against walks over the paths themselves."""

import random

import pytest
import torch

from tests.taxonomy.forests import UNEVEN, random_paths
from timm_branches.taxonomy import Taxonomy, cifar10


def shared(a, b):
    """How many names two paths share from the root on."""
    count = 0
    while count < min(len(a), len(b)) and a[count] == b[count]:
        count += 1
    return count


def height(node, leaves):
    """Steps down to the deepest leaf below a node, () being the root above all."""
    return max(len(leaf) for leaf in leaves if leaf[: len(node)] == node) - len(node)


@pytest.mark.parametrize("seed", range(25))
class TestRandomForests:
    def test_heights(self, seed):
        leaves = random_paths(seed)
        tree = Taxonomy(leaves)
        expected = [[height(node, leaves) for node in level] for level in tree.nodes]
        assert [level.tolist() for level in tree.heights] == expected
        assert height((), leaves) == tree.num_levels

    def test_pairs_of_nodes(self, seed):
        """Of inner nodes, too: a label may be known coarsely only."""
        leaves = random_paths(seed)
        tree = Taxonomy(leaves)
        nodes = [node for level in tree.nodes for node in level]
        rows = tree.encode_partial(nodes)
        depth = tree.common_depth(rows[:, None], rows[None])
        assert depth.tolist() == [[shared(a, b) for b in nodes] for a in nodes]
        distance = tree.lca_height(rows[:, None], rows[None])
        assert distance.tolist() == [
            [height(a[: shared(a, b)], leaves) for b in nodes] for a in nodes
        ]
        assert distance.dtype == torch.long

    def test_distances(self, seed):
        leaves = random_paths(seed)
        order = [random.Random(seed).sample(level, len(level)) for level in Taxonomy(leaves).nodes]
        tree = Taxonomy(leaves, order=order)  # class indices that are not those of first appearance
        expected = [
            [0 if a == b else height(a[: shared(a, b)], leaves) for b in leaves] for a in leaves
        ]
        assert tree.distances().tolist() == expected
        everyone = tree.expand(range(len(leaves)))
        assert tree.lca_height(everyone[:, None], everyone).tolist() == expected


def test_more_leaves_than_one_block():
    leaves = [(f"a{i % 7}", f"b{i % 35}", f"c{i}") for i in range(600)]
    distances = Taxonomy(leaves).distances()
    assert distances.shape == (600, 600)
    assert distances.dtype == torch.long
    for i in (0, 255, 256, 511, 512, 599):
        assert distances[i].tolist() == [3 - shared(leaves[i], leaf) for leaf in leaves]


def test_by_hand():
    tree = Taxonomy(UNEVEN)
    #                                      cat dog plant bird ship
    assert tree.distances().tolist() == [
        [0, 1, 3, 2, 3],
        [1, 0, 3, 2, 3],
        [3, 3, 0, 3, 3],
        [2, 2, 3, 0, 3],
        [3, 3, 3, 3, 0],
    ]
    assert [level.tolist() for level in tree.heights] == [[2, 0, 2], [1, 0, 1], [0, 0, 0]]


def test_shapes_broadcast():
    tree = cifar10()
    cat, everything = tree.expand(3), tree.expand([[3, 5, 8], [-1, 4, 3]])
    assert tree.common_depth(cat, everything).tolist() == [[3, 2, 0], [0, 1, 3]]
    assert tree.lca_height(cat, everything).tolist() == [[0, 1, 3], [3, 2, 0]]
    assert tree.lca_height(everything, cat).tolist() == [[0, 1, 3], [3, 2, 0]]


def test_what_is_returned_is_a_copy():
    tree = cifar10()
    for level in tree.heights:
        level.zero_()
    tree.distances().zero_()
    assert tree.heights[0].tolist() == [2, 2]
    assert tree.distances().max() == 3
