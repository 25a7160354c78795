"""Labels of all levels, against brute-force walks over small random forests and tables written
down by hand."""

import copy
import random

import numpy as np
import pytest
import torch

from tests.taxonomy.forests import UNEVEN, random_paths, walk, walk_row
from timm_branches.taxonomy import Taxonomy, cifar10


@pytest.mark.parametrize("seed", range(25))
class TestRandomForests:
    def test_tables(self, seed):
        leaves = random_paths(seed)
        tree, levels = Taxonomy(leaves), walk(leaves)
        assert tree.nodes == tuple(map(tuple, levels))
        assert tree.num_classes == tuple(map(len, levels))
        assert tree.leaf_table.tolist() == [walk_row(levels, leaf) for leaf in leaves]
        assert tree.depth == tree.num_levels == len(levels)
        assert tree.parents[0].tolist() == [-1] * len(levels[0])
        for depth in range(1, len(levels)):
            expected = [levels[depth - 1].index(node[:-1]) for node in levels[depth]]
            assert tree.parents[depth].tolist() == expected

    def test_expand(self, seed):
        leaves = random_paths(seed)
        tree, levels = Taxonomy(leaves), walk(leaves)
        labels = torch.randint(
            -1, len(leaves), (3, 4), generator=torch.Generator().manual_seed(seed)
        )
        expanded = tree.expand(labels)
        assert expanded.shape == (3, 4, len(levels))
        assert expanded.dtype == torch.long
        for label, row in zip(
            labels.flatten().tolist(), expanded.flatten(0, 1).tolist(), strict=True
        ):
            assert row == ([-1] * len(levels) if label < 0 else walk_row(levels, leaves[label]))
        for depth, nodes in enumerate(levels):
            rows = tree.expand(list(range(len(nodes))), level=depth)
            assert rows.tolist() == [walk_row(levels, node) for node in nodes]
            assert torch.equal(
                rows, tree.expand(torch.arange(len(nodes)), level=f"level{depth + 1}")
            )

    def test_names_lead_back(self, seed):
        leaves = random_paths(seed)
        tree = Taxonomy(leaves)
        everyone = list(range(len(leaves)))
        assert tree.encode(leaves).tolist() == everyone
        assert tree.encode(["/".join(leaf) for leaf in leaves]).tolist() == everyone
        for depth, (names, nodes) in enumerate(zip(tree.classes, tree.nodes, strict=True)):
            assert len(set(names)) == len(nodes)
            for name, node in zip(names, nodes, strict=True):
                assert "/".join(node).endswith(name)
                bare_is_clear = [other[-1] for other in nodes].count(node[-1]) == 1
                assert (name == node[-1]) == (bare_is_clear or depth == 0)
        rows = tree.encode_partial([node for level in tree.nodes for node in level]).tolist()
        assert rows == [walk_row(walk(leaves), node) for level in tree.nodes for node in level]

    def test_leaf_to_level(self, seed):
        leaves = random_paths(seed)
        tree = Taxonomy(leaves)
        p = torch.rand(len(leaves), generator=torch.Generator().manual_seed(seed))
        for depth, nodes in enumerate(tree.nodes):
            expected = [
                sum(p[i].item() for i, leaf in enumerate(leaves) if leaf[: depth + 1] == node)
                for node in nodes
            ]
            assert (p @ tree.leaf_to_level(depth)).tolist() == pytest.approx(expected)

    def test_valid_paths(self, seed):
        leaves = random_paths(seed)
        tree = Taxonomy(leaves)
        rng = random.Random(seed)
        rows = [[rng.randrange(-1, n) for n in tree.num_classes] for _ in range(200)]
        rows += tree.leaf_table.tolist()

        def consistent(row):
            named = []
            for depth, index in enumerate(row):
                if index < 0:
                    continue
                node = tree.nodes[depth][index]
                if any(node[: len(other)] != other for other in named):
                    return False
                named.append(node)
                if node in leaves:
                    return True
            return True

        assert tree.valid_paths(torch.tensor(rows)).tolist() == [consistent(row) for row in rows]
        assert tree.valid_paths(tree.leaf_table).all()


class TestShallowLeaves:
    tree = Taxonomy(UNEVEN, levels=["a", "b", "c"])

    def test_labels(self):
        assert self.tree.leaf_table.tolist() == [
            [0, 0, 0],
            [0, 0, 1],
            [1, -1, -1],
            [0, 1, -1],
            [2, 2, 2],
        ]
        assert self.tree.expand(2).tolist() == [1, -1, -1]
        assert self.tree.expand(1, level="b").tolist() == [0, 1, -1]

    def test_what_is_predicted_below_a_leaf_is_ignored(self):
        rows = torch.tensor(
            [
                [1, 2, 2],  # plant is a leaf: whatever follows does not count
                [0, 1, 2],  # bird is a leaf
                [0, 2, 2],  # sea is not an animal
                [0, 0, 2],  # a ship is not a pet
                [0, -1, 2],  # nor is it an animal, seen across the gap
                [0, -1, 0],  # a cat is
                [2, 1, 2],  # bird is a leaf, but not transport
                [-1, -1, -1],
            ]
        )
        assert self.tree.valid_paths(rows).tolist() == [
            True,
            True,
            False,
            False,
            False,
            True,
            False,
            True,
        ]

    def test_sums_leave_the_shallow_leaf_out(self):
        assert self.tree.leaf_to_level("c").sum(1).tolist() == [1, 1, 0, 0, 1]

    def test_text(self):
        assert str(self.tree) == (
            "animal\n├─ pet\n│  ├─ cat [0]\n│  └─ dog [1]\n└─ bird [3]\n"
            "plant [2]\ntransport\n└─ sea\n   └─ ship [4]"
        )
        assert repr(self.tree) == "Taxonomy(a: 3, b: 3, c: 3; 5 leaves)"


@pytest.mark.parametrize(
    ("label", "level", "message"),
    [
        (5, None, "leaf label 5 is out of range; legal are 0 to 4"),
        (-2, None, "leaf label -2"),
        ([0, 3], "level2", "label of level 'level2' 3 is out of range; legal are 0 to 2"),
        (torch.tensor([0.0]), None, "must be an integer"),
        (torch.tensor([True]), None, "must be an integer"),
        (0, "fine", "no level 'fine'; the levels are 'level1', 'level2', 'level3'"),
        (0, 3, "no level 3"),
        (0, -1, "no level -1"),
    ],
)
def test_wrong_labels(label, level, message):
    with pytest.raises(ValueError, match=message):
        Taxonomy(UNEVEN).expand(label, level)


def test_odd_labels():
    tree = Taxonomy(UNEVEN)
    assert tree.expand([]).shape == (0, 3)
    assert tree.expand(np.array([4], dtype=np.uint8)).tolist() == [[2, 2, 2]]
    assert tree.expand(torch.tensor(4, dtype=torch.int8)).tolist() == [2, 2, 2]
    with torch.device("meta"):  # as a model is built without memory
        assert Taxonomy(UNEVEN).expand([4]).tolist() == [[2, 2, 2]]


@pytest.mark.parametrize("shape", [(3,), (5, 2), (1, 5, 3)])
def test_wrong_predictions(shape):
    with pytest.raises(ValueError, match=r"shape \(N, 3\)"):
        Taxonomy(UNEVEN).valid_paths(torch.zeros(shape, dtype=torch.long))
    with pytest.raises(ValueError, match="prediction of level 'level1' 7"):
        Taxonomy(UNEVEN).valid_paths(torch.tensor([[7, 0, 0]]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([],), "at least one leaf"),
        ((["a/b", "a/b"],), "'a/b' is listed twice, as number 0 and 1"),
        ((["a", "a/b"],), "'a' is listed as a leaf, but is also the parent of 'a/b'"),
        ((["a/b/c", "a/b"],), "'a/b' is listed as a leaf"),
        ((["a//b"],), "empty name"),
        ((["a/ /b"],), "empty name"),
        (([""],), "empty name"),
        (([()],), "empty name"),
        (([("a", 1)],), "a path is"),
        ((["a/b"], ["x"]), "1 level names are given.*name 2 levels"),
        ((["a/b"], ["x", "y", "z"]), "level 'z' is empty"),
        ((["a/b"], ["x", "x"]), "must differ"),
        ((["a/b"], ["x", ""]), "not empty"),
        ((["a/b"], "xy"), "sequence of 2 names"),
        ((["a/b", "a/c"], None, [None]), "one entry per level"),
        ((["a/b", "a/c"], None, [None, ["a/b"]]), "list each of its 2 nodes once.*a/c"),
        ((["a/b", "a/c"], None, [None, ["a/b", "a/b"]]), "list each of its 2 nodes once"),
    ],
)
def test_what_is_no_tree(arguments, message):
    with pytest.raises(ValueError, match=message):
        Taxonomy(*arguments)


def test_value_semantics():
    tree, twin, other = cifar10(), cifar10(), Taxonomy(cifar10().leaves, cifar10().levels)
    assert tree == twin
    assert hash(tree) == hash(twin)
    assert tree != other  # same forest, but B-CNN numbers the middle classes in its own order
    assert tree != "tree"
    assert copy.deepcopy(tree) == tree
    assert Taxonomy.from_dict(tree.to_dict()) == tree
    with pytest.raises(AttributeError):
        tree.levels = ()
    with pytest.raises(AttributeError):
        del tree.levels
    tree.leaf_table.zero_()
    tree.parents[1].zero_()
    assert torch.equal(tree.leaf_table, twin.leaf_table)
    assert torch.equal(tree.parents[1], twin.parents[1])
