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


class TestTwins:
    """Names that a person would take for one are two classes, and whoever reads a tree is told."""

    pairs = [("Robin", "robin"), ("caf\u00e9", "cafe\u0301"), ("a b", "a  b")]

    @pytest.fixture(params=["csv", "json", "folders", "dataframe"])
    def read(self, request, tmp_path):
        def write_and_read(leaves):
            if request.param == "csv":
                rows = "".join(f"{a},{b}\n" for a, b in leaves)
                (tmp_path / "tree.csv").write_text("kind,name\n" + rows, encoding="utf-8")
                return Taxonomy.from_csv(tmp_path / "tree.csv")
            if request.param == "json":
                tree: dict[str, list[str]] = {}
                for a, b in leaves:
                    tree.setdefault(a, []).append(b)
                return Taxonomy.from_json(tree)
            if request.param == "dataframe":
                pandas = pytest.importorskip("pandas")
                return Taxonomy.from_dataframe(pandas.DataFrame(leaves, columns=["kind", "name"]))
            for a, b in leaves:
                (tmp_path / "tree" / a / b).mkdir(parents=True)
            return Taxonomy.from_folders(tmp_path / "tree")

        return write_and_read

    @pytest.mark.parametrize("pair", pairs)
    def test_they_are_said(self, read, pair):
        with pytest.warns(UserWarning, match="two classes") as caught:
            tree = read([("bird", pair[0]), ("bird", pair[1]), ("cat", "tom")])
        assert tree.num_leaves == 3
        assert len(caught) == 1
        assert all(repr(name) in str(caught[0].message) for name in pair)

    @pytest.mark.filterwarnings("error")
    def test_others_are_not(self, read):
        assert read([("bird", "robin"), ("bird", "robins"), ("cat", "7"), ("cat", "07")])
