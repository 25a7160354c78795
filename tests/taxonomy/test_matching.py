"""Class lists and trees compared by name, against dictionaries of the names themselves."""

import random

import pytest
import torch

from tests.taxonomy.forests import UNEVEN, random_paths
from timm_branches.taxonomy import Taxonomy
from timm_branches.taxonomy.matching import class_difference, match_classes, match_taxonomies


class TestClasses:
    def test_equal(self):
        assert match_classes(["b", "a"], ["b", "a"]) is None

    def test_another_order(self):
        given, expected = ["dog", "cat", "ship"], ["ship", "dog", "cat"]
        table = match_classes(given, expected)
        assert [expected[i] for i in table.tolist()] == given

    def test_subset(self):
        assert match_classes(["ship", "cat"], ["cat", "dog", "ship"]).tolist() == [2, 0]
        with pytest.raises(ValueError, match="'dog' is only in the model"):
            match_classes(["ship", "cat"], ["cat", "dog", "ship"], subset=False)

    @pytest.mark.parametrize(
        ("given", "expected", "message"),
        [
            (["cat", "dgo"], ["cat", "dog"], "'dgo' is only in the data.*may be 'dog'"),
            (["Cat", "dog"], ["cat", "dog"], "'Cat' may be 'cat'"),
            (["caf\u00e9", "x"], ["cafe\u0301", "x"], "only in the data.*may be"),
            (["a", "a"], ["a", "b"], "only in the model"),
            ([f"c{i}" for i in range(9)], ["z"], "and 4 others are only in the data"),
        ],
    )
    def test_refused(self, given, expected, message):
        with pytest.raises(ValueError, match=message):
            match_classes(given, expected)

    def test_difference_names_both_sides(self):
        text = class_difference(["a", "b"], ["b", "c"], "the CSV", "the checkpoint")
        assert text == "'a' is only in the CSV, 'c' only in the checkpoint"


def by_path(tree, labels):
    """The path of the deepest known class of each row."""
    result = []
    for row in labels.tolist():
        known = [tree.nodes[level][label] for level, label in enumerate(row) if label >= 0]
        result.append(known[-1] if known else None)
    return result


class TestTaxonomies:
    def test_equal(self):
        tree = Taxonomy(UNEVEN)
        assert match_taxonomies(tree, Taxonomy(UNEVEN)) is None
        # names of levels are no classes
        other = Taxonomy(UNEVEN, levels=[f"other{i}" for i in range(tree.num_levels)])
        assert match_taxonomies(tree, other) is None

    @pytest.mark.parametrize("seed", range(5))
    def test_shuffled_subset(self, seed):
        rng = random.Random(seed)
        paths = random_paths(seed)
        expected = Taxonomy(paths)
        some = rng.sample(paths, (len(paths) + 1) // 2)
        given = Taxonomy(some)
        labels = given.leaf_table
        translate = match_taxonomies(given, expected)
        if translate is None:
            assert given.nodes == expected.nodes
            return
        assert by_path(expected, translate(labels)) == by_path(given, labels)
        assert translate(labels).shape == (len(some), expected.num_levels)

    def test_unknown_stays_unknown(self):
        given, expected = Taxonomy(["b/x", "a/y"]), Taxonomy(["a/y", "b/x"])
        labels = torch.tensor([[-1, -1], [0, -1]])
        assert match_taxonomies(given, expected)(labels).tolist() == [[-1, -1], [1, -1]]

    def test_out_of_range(self):
        translate = match_taxonomies(Taxonomy(["b/x", "a/y"]), Taxonomy(["a/y", "b/x"]))
        for label in (2, -2):
            with pytest.raises(ValueError, match=f"{label} is out of range"):
                translate(torch.tensor([[0, label]]))
        with pytest.raises(ValueError, match="one column a level"):
            translate(torch.tensor([0]))

    def test_fewer_levels(self):
        """Data that know the coarse classes only."""
        translate = match_taxonomies(Taxonomy(["b", "a"]), Taxonomy(["a/x", "a/y", "b/z"]))
        assert translate(torch.tensor([[0], [1], [-1]])).tolist() == [[1, -1], [0, -1], [-1, -1]]

    def test_more_levels(self):
        with pytest.raises(ValueError, match="the data have 2 levels"):
            match_taxonomies(Taxonomy(["a/x"]), Taxonomy(["a"]))

    def test_equal_sizes_other_names(self):
        with pytest.raises(ValueError, match=r"level 'level2' .* 'a / cat' only in the model"):
            match_taxonomies(Taxonomy(["a/dog", "b/x"]), Taxonomy(["a/cat", "b/x"]))

    def test_same_name_below_another_parent(self):
        """A homonym is another class."""
        plant, animal = Taxonomy(["plant/agathis"]), Taxonomy(["animal/agathis"])
        with pytest.raises(ValueError, match="'plant' is only in the data"):
            match_taxonomies(plant, animal)

    def test_no_subset(self):
        part, whole = Taxonomy(["a/x", "b/z"]), Taxonomy(["a/x", "a/y", "b/z"])
        with pytest.raises(ValueError, match="'a / y' is only in the model"):
            match_taxonomies(part, whole, subset=False)
