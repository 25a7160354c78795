"""Where taxonomies come from and how they are stored.

Files, folders, data frames, maps from child to parent.
"""

import json
import pickle

import numpy as np
import pytest

from tests.taxonomy.forests import UNEVEN, random_paths
from timm_branches.taxonomy import Taxonomy, cifar10, mnist
from timm_branches.taxonomy.readers import read_names


@pytest.mark.parametrize("seed", range(25))
def test_round_trips(seed, tmp_path):
    tree = Taxonomy(random_paths(seed))
    assert Taxonomy.from_dict(json.loads(json.dumps(tree.to_dict()))) == tree
    tree.save_json(tmp_path / "tree.json")
    assert Taxonomy.from_json(tmp_path / "tree.json") == tree
    assert pickle.loads(pickle.dumps(tree)) == tree
    rows = [",".join(leaf) + "," * (tree.num_levels - len(leaf)) for leaf in tree.leaves]
    (tmp_path / "tree.csv").write_text("\n".join([",".join(tree.levels), *rows]))
    assert Taxonomy.from_csv(tmp_path / "tree.csv") == tree
    for leaf in tree.leaves:
        (tmp_path / "tree" / "/".join(leaf)).mkdir(parents=True)
    assert Taxonomy.from_folders(tmp_path / "tree") == Taxonomy(sorted(tree.leaves))


class TestFromParents:
    def test_both_spellings_agree(self):
        by_index = cifar10()
        middle, coarse = by_index.classes[1], by_index.classes[0]
        by_name = Taxonomy.from_parents(
            by_index.leaf_names,
            [
                {leaf[2]: leaf[1] for leaf in by_index.leaves},
                [(path[1], path[0]) for path in by_index.nodes[1]],
            ],
            names=[middle, coarse],
            levels=by_index.levels,
        )
        assert by_name == by_index
        as_dicts = Taxonomy.from_parents(
            by_index.leaf_names,
            [dict(enumerate(by_index.expand(range(10))[:, 1].tolist())), by_index.parents[1]],
            [middle, coarse],
            by_index.levels,
        )
        assert as_dicts == by_index

    def test_unnamed_parents(self):
        tree = Taxonomy.from_parents(["x", "y", "z"], [np.array([1, 0, 1])])
        assert tree.classes == (("level1_0", "level1_1"), ("x", "y", "z"))
        assert tree.leaf_table.tolist() == [[1, 0], [0, 1], [1, 2]]

    @pytest.mark.parametrize("kind", [dict, lambda pairs: pairs])
    def test_whole_forest(self, kind):
        edges = [
            ("cat", "pet"),
            ("dog", "pet"),
            ("pet", "animal"),
            ("bird", "animal"),
            ("ship", "sea"),
            ("sea", "transport"),
            ("animal", None),
        ]
        tree = Taxonomy.from_parents(["cat", "dog", "plant", "bird", "ship"], kind(edges))
        assert tree == Taxonomy(UNEVEN)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((["a"], {"a": "b", "b": "c", "c": "b"}), "cycle: a -> b -> c -> b"),
            ((["a"], {"a": "a"}), "cycle: a -> a"),
            ((["a"], [("a", "b"), ("a", "c")]), "'a' has a second parent: 'b' and 'c'"),
            ((["a"], [[("a", "b"), ("a", "c")]]), "'a' has a second parent"),
            ((["cat", "dog"], {"cat": "pet", "dgo": "pet"}), "'dgo' has a parent but.*mean 'dog'"),
            ((["a", "b"], {"a": "b"}), "'b' is listed as a leaf, but"),
            ((["a", "a"], [[0, 0]]), "'a' is listed twice"),
            ((["a", "b"], [{"a": "x"}]), "class 'b' has no parent"),
            ((["a", "b"], [[0]]), "index 1 has no parent"),
            ((["a"], [[0, 0]]), "index 1 has a parent on level1, but there is no such class"),
            ((["a"], [{"a": "x", "b": "x"}]), "class 'b' has a parent"),
            ((["a", "b"], [[0, 2]]), "has 3 classes.*empty class"),
            ((["a", "b"], [[0, 0]], [["x", "y"]]), "has 2 classes"),
            ((["a", "b"], [[0, 1]], [["x", "x"]]), "must differ"),
            ((["a", "b"], [[0, -1]]), "indices from 0"),
            ((["a", "b"], [{0: "x", 1: 1}]), "indices from 0"),
            ((["a", "b"], [{"a": "x", "b": "y"}], [["x"]]), "must list each parent once"),
            ((["a"], [[0]], [["x"], ["y"]]), "one entry per map"),
            ((["a"], [[0]], None, ["x"]), "1 maps make 2 levels"),
            ((["a"], {"a": "b"}, [["b"]]), "belong to a list of maps"),
            ((["a", "b"], [0, 0]), "a map is"),
            (([], [[]]), "a map is"),
        ],
    )
    def test_errors(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            Taxonomy.from_parents(*arguments)


class TestFiles:
    def write(self, folder, text, name="tree.csv"):
        (folder / name).write_text(text, encoding="utf-8")
        return folder / name

    def test_csv(self, tmp_path):
        text = '\ufeffcoarse,note,fine\n\nanimal, x ,cat\n , ,\nplant,y\nanimal,,"dog, small"\n'
        tree = Taxonomy.from_csv(self.write(tmp_path, text), columns=["coarse", "fine"])
        assert tree.levels == ("coarse", "fine")
        assert tree.leaves == (("animal", "cat"), ("plant",), ("animal", "dog, small"))

    @pytest.mark.parametrize(
        ("text", "columns", "message"),
        [
            ("", None, "is empty"),
            ("a,b\n", None, "at least one leaf"),
            ("a,b\nx,y\n", ["a", "c"], "no column 'c'"),
            ("a,b\nx,y\n", [], "at least one column"),
            ("a,a\nx,y\n", None, "name of its own"),
            ("a,\nx,y\n", None, "name of its own"),
            ("a,b\nx,y,z\n", None, "line 2: 3 cells"),
            ("a,b\nx,y\n\n,z\n", None, "line 4: empty name above a class"),
            ("a,b\nx,\ny,\n", None, "level 'b' is empty"),
            ("a,b\nx,y\nx,y\n", None, "listed twice"),
        ],
    )
    def test_wrong_csv(self, tmp_path, text, columns, message):
        with pytest.raises(ValueError, match=message):
            Taxonomy.from_csv(self.write(tmp_path, text), columns)

    def test_json(self, tmp_path):
        nested = {
            "animal": {"pet": ["cat", "dog"], "bird": {}},
            "plant": None,
            "transport": [{"sea": ["ship"]}],
        }
        expected = Taxonomy(
            ["animal/pet/cat", "animal/pet/dog", "animal/bird", "plant", "transport/sea/ship"]
        )
        assert Taxonomy.from_json(nested) == expected
        assert Taxonomy.from_json(self.write(tmp_path, json.dumps(nested))) == expected
        assert Taxonomy.from_json(["a", "b"], levels=["only"]).levels == ("only",)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ('{"a": ["x"], "a": ["y"]}', "'a' occurs twice"),
            ('{"a": []}', "a has an empty list"),
            ("{}", "at least one leaf"),
            ("[]", "at least one leaf"),
            ('{"a": 3}', "a holds 3"),
            ('{"a": {"b": [1]}}', "list under a/b holds 1"),
            ('{"": ["x"]}', "empty name"),
            ('{"a": ["x", "x"]}', "listed twice"),
        ],
    )
    def test_wrong_json(self, tmp_path, text, message):
        with pytest.raises(ValueError, match=message):
            Taxonomy.from_json(self.write(tmp_path, text))

    def test_a_failed_write_leaves_the_old_file(self, tmp_path, monkeypatch):
        mnist().save_json(tmp_path / "new folder" / "tree.json")

        def fail(*_):
            raise OSError("disk full")

        monkeypatch.setattr("os.replace", fail)
        with pytest.raises(OSError, match="disk full"):
            cifar10().save_json(tmp_path / "new folder" / "tree.json")
        assert Taxonomy.from_json(tmp_path / "new folder" / "tree.json") == mnist()
        assert len(list((tmp_path / "new folder").iterdir())) == 1

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"format": "x"}, "not a stored taxonomy"),
            ({"version": 2}, "version 2"),
            ({"leaves": []}, "at least one leaf"),
        ],
    )
    def test_wrong_dict(self, change, message):
        with pytest.raises(ValueError, match=message):
            Taxonomy.from_dict({**mnist().to_dict(), **change})

    def test_folders(self, tmp_path):
        for name in ("b/y", "b/x", "a", ".git/objects", "b/x/.cache"):
            (tmp_path / name).mkdir(parents=True, exist_ok=True)
        self.write(tmp_path / "a", "", "image.png")
        assert Taxonomy.from_folders(tmp_path).leaves == (("a",), ("b", "x"), ("b", "y"))
        with pytest.raises(ValueError, match="is not a folder"):
            Taxonomy.from_folders(tmp_path / "c")
        with pytest.raises(ValueError, match="no class folders"):
            Taxonomy.from_folders(tmp_path / "a")
        (tmp_path / "b" / "z").symlink_to(tmp_path, target_is_directory=True)
        with pytest.raises(ValueError, match="a cycle"):
            Taxonomy.from_folders(tmp_path)


class Frame(dict):
    """What is used of a pandas data frame: its columns, by name."""

    @property
    def columns(self):
        return list(self)


def pandas_frame(columns):
    return pytest.importorskip("pandas").DataFrame(columns)


@pytest.mark.parametrize("frame", [Frame, pandas_frame])
class TestDataFrame:
    def test_one_row_per_sample(self, frame):
        table = frame(
            {
                "file": ["1.png", "2.png", "3.png", "4.png", "5.png", "6.png"],
                "kind": ["animal", "plant", "animal", " animal ", None, "animal"],
                "name": ["cat", float("nan"), "dog", "cat", None, "nan"],
                "age": [3, 1, 2, 3, 4, 5],
            }
        )
        tree = Taxonomy.from_dataframe(table, ["kind", "name"])
        assert tree.levels == ("kind", "name")
        assert tree.leaves == (("animal", "cat"), ("plant",), ("animal", "dog"), ("animal", "nan"))
        assert Taxonomy.from_dataframe(table, ["age", "kind"]).leaves[:2] == (
            ("3", "animal"),
            ("1", "plant"),
        )

    def test_all_columns(self, frame):
        tree = Taxonomy.from_dataframe(frame({"a": ["x", "x", ""], 7: [1.0, 2.5, None]}))
        assert tree.levels == ("a", "7")
        assert tree.leaves == (("x", "1"), ("x", "2.5"))

    @pytest.mark.parametrize(
        ("columns", "wanted", "message"),
        [
            ({"a": ["x"], "b": ["y"]}, ["a", "c"], r"no column 'c'; its columns are \['a', 'b'\]"),
            ({"a": ["x"], "b": ["y"]}, [], "at least one column"),
            ({"a": ["x"], " ": ["y"]}, None, "name of its own"),
            (
                {"a": ["x", None], "b": ["y", "z"]},
                None,
                "row 1 of the data frame: empty name above a class",
            ),
            (
                {"a": ["x", "x"], "b": ["y", None]},
                None,
                "'x' is listed as a leaf, but is also the parent of 'x/y'",
            ),
            ({"a": ["x"], "b": [None]}, None, "level 'b' is empty"),
            ({"a": [None]}, None, "at least one leaf"),
            ({"a": ["x"]}, ["a", "a"], "must differ|level 'a' is empty"),
        ],
    )
    def test_errors(self, frame, columns, wanted, message):
        with pytest.raises(ValueError, match=message):
            Taxonomy.from_dataframe(frame(columns), wanted)


def test_what_is_no_data_frame():
    with pytest.raises(TypeError, match="got list"):
        Taxonomy.from_dataframe([["a", "b"]])


@pytest.mark.parametrize("dtype", ["Int64", "string", "category", "datetime64[ns]"])
def test_missing_values_of_pandas(dtype):
    pandas = pytest.importorskip("pandas")
    values = {"Int64": [1, None], "datetime64[ns]": ["2020-01-01", None]}.get(dtype, ["1", None])
    tree = Taxonomy.from_dataframe(
        pandas.DataFrame({"a": ["x", "y"], "b": pandas.Series(values, dtype=dtype)})
    )
    assert [len(leaf) for leaf in tree.leaves] == [2, 1]


def test_doubled_columns_of_pandas():
    pandas = pytest.importorskip("pandas")
    with pytest.raises(ValueError, match="name of its own"):
        Taxonomy.from_dataframe(pandas.DataFrame([["x", "y"]], columns=["a", "a"]))


def test_readable_names_that_contradict(tmp_path):
    (tmp_path / "names.csv").write_text("n1;Katze\nn2;Hund\nn1;Katze\n", encoding="utf-8")
    assert read_names(tmp_path / "names.csv") == {"n1": "Katze", "n2": "Hund"}
    (tmp_path / "names.csv").write_text("n1;Katze\nn1;Hund\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"names\.csv, line 2: 'n1' is called 'Hund'"):
        read_names(tmp_path / "names.csv")
