"""Names of nodes: finding one by the end of its path, telling namesakes apart."""

import pytest

from timm_branches.taxonomy import Taxonomy


class TestNames:
    tree = Taxonomy(["a/x/1", "b/x/1", "b/y/2", ("b", "y", "3/4")])

    def test_display_names(self):
        assert self.tree.classes == (
            ("a", "b"),
            ("a/x", "b/x", "y"),
            ("a/x/1", "b/x/1", "2", "3/4"),
        )
        assert self.tree.leaf_names == ("a/x/1", "b/x/1", "2", "3/4")

    def test_encode(self):
        assert self.tree.encode(["3/4", "y/2", ("b", "x", "1"), ("y", "2")]).tolist() == [
            3,
            2,
            1,
            2,
        ]
        assert self.tree.encode("2").shape == ()
        assert self.tree.encode([]).shape == (0,)
        assert self.tree.encode_partial(["a", "y"]).tolist() == [[0, -1, -1], [1, 2, -1]]
        assert self.tree.encode_partial([]).shape == (0, 3)

    def test_a_whole_path_goes_before_an_end(self):
        assert Taxonomy(["x/a", "a"]).encode("a") == 1

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("1", "ambiguous.*2 nodes"),
            ("x", "inner node"),
            (("a", "x"), "inner node"),
            ("y/22", "mean 'y/2'"),
            (("a", "y", "2"), "no class"),
            (3, "a path is"),
        ],
    )
    def test_wrong_names(self, name, message):
        with pytest.raises(ValueError, match=message):
            self.tree.encode([name])

    def test_wrong_partial_name(self):
        with pytest.raises(ValueError, match="ambiguous"):
            self.tree.encode_partial(["x"])
