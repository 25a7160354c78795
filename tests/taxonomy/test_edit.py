"""Trees made of other trees, against set arithmetic on paths."""

import random

import numpy as np
import pytest
import torch

from tests.taxonomy.forests import UNEVEN, random_paths, walk
from timm_branches.taxonomy import Taxonomy, cifar10

LEVELS = ["a", "b", "c"]


def test_reorder():
    tree = cifar10()
    names = sorted(tree.leaf_names, reverse=True)
    turned = tree.reorder(names)
    assert turned.leaf_names == tuple(names)
    assert set(turned.leaves) == set(tree.leaves)
    assert turned.levels == tree.levels
    with pytest.raises(ValueError, match=r"9 names, missing \['truck'\]"):
        tree.reorder(names[1:])


@pytest.mark.parametrize("seed", range(25))
class TestRandomForests:
    def test_prune(self, seed):
        rng = random.Random(seed)
        leaves = random_paths(seed)
        turned = [rng.sample(level, len(level)) for level in walk(leaves)]
        tree = Taxonomy(leaves, order=turned)
        kept = rng.sample(range(len(leaves)), rng.randint(1, len(leaves)))
        small = tree.prune(kept)
        assert small.leaves == tuple(leaf for i, leaf in enumerate(leaves) if i in kept)
        above = [
            [node for node in level if any(leaf[: len(node)] == node for leaf in small.leaves)]
            for level in turned
        ]
        assert small.nodes == tuple(tuple(level) for level in above if level)
        assert small.levels == tree.levels[: len(small.nodes)]
        assert tree.prune([leaves[i] for i in kept]) == small
        table = [small.leaves.index(leaf) if leaf in small.leaves else -1 for leaf in leaves]
        assert tree.translate(range(len(leaves)), small).tolist() == table
        assert small.translate(range(len(kept)), tree).tolist() == sorted(kept)

    def test_merge(self, seed):
        a, b = random_paths(seed), random_paths(seed + 1000)
        inner_a, inner_b = (
            {leaf[:d] for leaf in leaves for d in range(1, len(leaf))} for leaves in (a, b)
        )
        tree, other = Taxonomy(a), Taxonomy(b)
        if inner_a & set(b) or inner_b & set(a):
            with pytest.raises(ValueError, match="cannot merge"):
                tree.merge(other, same_names=True)
            return
        merged = tree.merge(other, same_names=True)
        assert merged == Taxonomy(a + [leaf for leaf in b if leaf not in a])
        assert tree.translate(range(len(a)), merged).tolist() == list(range(len(a)))
        for mine, all_of_them in zip(tree.nodes, merged.nodes, strict=False):
            assert all_of_them[: len(mine)] == mine

    def test_parts_merge_into_the_whole(self, seed):
        tree = Taxonomy(random_paths(seed))
        cut = random.Random(seed).randint(1, tree.num_leaves)
        first = tree.prune(range(cut))
        assert first.merge(tree) == tree
        assert tree.merge(first) == tree


class TestPrune:
    tree = Taxonomy(UNEVEN, LEVELS)

    @pytest.mark.parametrize(
        "classes",
        [
            ["bird", "plant"],
            ("plant", "animal/bird"),
            [("animal", "bird"), ("plant",)],
            np.array(["bird", "plant"]),
            [2, 3],
            {3, 2},
            range(2, 4),
            torch.tensor([3, 2, 2, -1, 3]),
            np.array([2, 3]),
            iter([3, 2]),
        ],
    )
    def test_ways_to_name_leaves(self, classes):
        small = self.tree.prune(classes)
        assert small.leaves == (("plant",), ("animal", "bird"))
        assert small.levels == ("a", "b")  # nothing reaches the third
        assert small.nodes[0] == (("animal",), ("plant",))

    def test_one_name(self):
        assert self.tree.prune("ship").leaves == (("transport", "sea", "ship"),)

    @pytest.mark.parametrize(
        ("classes", "message"),
        [
            ([], "none of the 5 leaves"),
            ([-1], "none of the 5 leaves"),
            ([5], "leaf label 5 is out of range"),
            (["pet"], "inner node"),
            (["cot"], "mean 'cat'"),
            ([0, "cat"], "a path is"),
            ([0.0], "must be an integer"),
            (torch.ones(5, dtype=torch.bool), "must be an integer"),
        ],
    )
    def test_errors(self, classes, message):
        with pytest.raises(ValueError, match=message):
            self.tree.prune(classes)


class TestTranslate:
    def test_shapes(self):
        tree = Taxonomy(UNEVEN)
        small = tree.prune(["ship", "dog"])
        assert tree.translate([[4, 0], [-1, 1]], small).tolist() == [[1, -1], [-1, 0]]
        assert tree.translate(4, small).tolist() == 1
        assert tree.translate(4, small).dtype == torch.long
        assert tree.translate([], small).shape == (0,)
        turned = tree.reorder(tree.leaf_names[::-1])
        assert tree.translate(range(5), turned).tolist() == [4, 3, 2, 1, 0]

    def test_error(self):
        with pytest.raises(ValueError, match="leaf label 5 is out of range"):
            Taxonomy(UNEVEN).translate([5], cifar10())


class TestMerge:
    def test_class_indices_stay(self):
        extra = Taxonomy(
            ["machine/train", "transport/road/tram", "animal/pet/hamster"], cifar10().levels[:3]
        )
        merged = cifar10().merge(extra)
        assert merged.levels == ("coarse", "middle", "fine")
        assert merged.classes[0] == ("transport", "animal", "machine")
        assert merged.classes[1] == (*cifar10().classes[1], "train")
        assert torch.equal(merged.expand(range(10)), cifar10().expand(range(10)))
        assert merged.leaf_names[10:] == ("train", "tram", "hamster")

    @pytest.mark.parametrize(
        ("two", "three", "levels"),
        [
            (["a", "b"], ["a", "b", "c"], ("a", "b", "c")),
            (None, ["a", "b", "c"], ("a", "b", "c")),
            (["a", "b"], None, ("a", "b", "level3")),
            (None, None, ("level1", "level2", "level3")),
            (["level1", "b"], ["a", "level2", "c"], ("a", "b", "c")),
        ],
    )
    def test_levels(self, two, three, levels):
        shallow, deep = Taxonomy(["x/y"], two), Taxonomy(["u/v/w"], three)
        assert shallow.merge(deep).levels == levels
        assert deep.merge(shallow).levels == levels

    @pytest.mark.parametrize(
        ("mine", "theirs", "message"),
        [
            (
                (["a/b"],),
                (["a/b/c"],),
                "'a/b' is a leaf of this tree but has children in the other",
            ),
            (
                (["a/b/c", "x"],),
                (["x", "a"],),
                "'a' is a leaf of the other tree but has children in this one",
            ),
            (
                (["a/x"],),
                (["b/x", "b/y"],),
                r"leaf 'x' is 'a/x' in this tree and 'b/x' in the other \(1 such",
            ),
            (
                (["a/x"], ["coarse", "fine"]),
                (["a/y"], ["kind", "fine"]),
                "level 0 is called 'coarse' .* 'kind'",
            ),
            (
                (["a/x"], ["coarse", "fine"]),
                (["a/y/z"], ["coarse", "middle", "fine"]),
                "level 1 is called 'fine'",
            ),
            (
                (["a/x"], ["kind", "level1"]),
                (["b/y"], ["level1", "fine"]),
                "level 1 is called 'level1'",
            ),
        ],
    )
    def test_refused(self, mine, theirs, message):
        with pytest.raises(ValueError, match=message):
            Taxonomy(*mine).merge(Taxonomy(*theirs))

    def test_same_names(self):
        a, b = Taxonomy(["a/x"]), Taxonomy(["b/x"])
        assert a.merge(b, same_names=True).leaf_names == ("a/x", "b/x")
        # one of the trees tells the two apart itself, so they are two classes
        both = Taxonomy(["a/x", "b/x"])
        assert a.merge(both) == both.merge(a) == both
