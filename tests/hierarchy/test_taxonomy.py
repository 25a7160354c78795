"""Taxonomies, against brute-force walks over small random forests and tables written down by hand."""
import copy
import json
import pickle
import random

import numpy as np
import pytest
import torch

from timm_branches.hierarchy import TREES, Taxonomy, cifar10, cifar100, digits, fashion_mnist, get_taxonomy, mnist

UNEVEN = ["animal/pet/cat", "animal/pet/dog", "plant", "animal/bird", "transport/sea/ship"]


def random_paths(seed):
    """Leaves of a random forest, shuffled: depth 1 to 4, names that recur under different parents."""
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
            if leaf[:depth + 1] not in levels[depth]:
                levels[depth].append(leaf[:depth + 1])
    return levels


def walk_row(levels, path):
    return [levels[d].index(path[:d + 1]) if d < len(path) else -1 for d in range(len(levels))]


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
        labels = torch.randint(-1, len(leaves), (3, 4), generator=torch.Generator().manual_seed(seed))
        expanded = tree.expand(labels)
        assert expanded.shape == (3, 4, len(levels))
        assert expanded.dtype == torch.long
        for label, row in zip(labels.flatten().tolist(), expanded.flatten(0, 1).tolist(), strict=True):
            assert row == ([-1] * len(levels) if label < 0 else walk_row(levels, leaves[label]))
        for depth, nodes in enumerate(levels):
            rows = tree.expand(list(range(len(nodes))), level=depth)
            assert rows.tolist() == [walk_row(levels, node) for node in nodes]
            assert torch.equal(rows, tree.expand(torch.arange(len(nodes)), level=f"level{depth + 1}"))

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
            expected = [sum(p[i].item() for i, leaf in enumerate(leaves) if leaf[:depth + 1] == node) for node in nodes]
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
                if any(node[:len(other)] != other for other in named):
                    return False
                named.append(node)
                if node in leaves:
                    return True
            return True

        assert tree.valid_paths(torch.tensor(rows)).tolist() == [consistent(row) for row in rows]
        assert tree.valid_paths(tree.leaf_table).all()

    def test_round_trips(self, seed, tmp_path):
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


class TestShallowLeaves:
    tree = Taxonomy(UNEVEN, levels=["a", "b", "c"])

    def test_labels(self):
        assert self.tree.leaf_table.tolist() == [[0, 0, 0], [0, 0, 1], [1, -1, -1], [0, 1, -1], [2, 2, 2]]
        assert self.tree.expand(2).tolist() == [1, -1, -1]
        assert self.tree.expand(1, level="b").tolist() == [0, 1, -1]

    def test_what_is_predicted_below_a_leaf_is_ignored(self):
        rows = torch.tensor([
            [1, 2, 2],    # plant is a leaf: whatever follows does not count
            [0, 1, 2],    # bird is a leaf
            [0, 2, 2],    # sea is not an animal
            [0, 0, 2],    # a ship is not a pet
            [0, -1, 2],   # nor is it an animal, seen across the gap
            [0, -1, 0],   # a cat is
            [2, 1, 2],    # bird is a leaf, but not transport
            [-1, -1, -1],
        ])
        assert self.tree.valid_paths(rows).tolist() == [True, True, False, False, False, True, False, True]

    def test_sums_leave_the_shallow_leaf_out(self):
        assert self.tree.leaf_to_level("c").sum(1).tolist() == [1, 1, 0, 0, 1]

    def test_text(self):
        assert str(self.tree) == ("animal\n├─ pet\n│  ├─ cat [0]\n│  └─ dog [1]\n└─ bird [3]\n"
                                  "plant [2]\ntransport\n└─ sea\n   └─ ship [4]")
        assert repr(self.tree) == "Taxonomy(a: 3, b: 3, c: 3; 5 leaves)"


class TestNames:
    tree = Taxonomy(["a/x/1", "b/x/1", "b/y/2", ("b", "y", "3/4")])

    def test_display_names(self):
        assert self.tree.classes == (("a", "b"), ("a/x", "b/x", "y"), ("a/x/1", "b/x/1", "2", "3/4"))
        assert self.tree.leaf_names == ("a/x/1", "b/x/1", "2", "3/4")

    def test_encode(self):
        assert self.tree.encode(["3/4", "y/2", ("b", "x", "1"), ("y", "2")]).tolist() == [3, 2, 1, 2]
        assert self.tree.encode("2").shape == ()
        assert self.tree.encode([]).shape == (0,)
        assert self.tree.encode_partial(["a", "y"]).tolist() == [[0, -1, -1], [1, 2, -1]]
        assert self.tree.encode_partial([]).shape == (0, 3)

    def test_a_whole_path_goes_before_an_end(self):
        assert Taxonomy(["x/a", "a"]).encode("a") == 1

    @pytest.mark.parametrize(("name", "message"), [
        ("1", "ambiguous.*2 nodes"), ("x", "inner node"), (("a", "x"), "inner node"), ("y/22", "mean 'y/2'"),
        (("a", "y", "2"), "no class"), (3, "a path is"),
    ])
    def test_wrong_names(self, name, message):
        with pytest.raises(ValueError, match=message):
            self.tree.encode([name])

    def test_wrong_partial_name(self):
        with pytest.raises(ValueError, match="ambiguous"):
            self.tree.encode_partial(["x"])

    def test_reorder(self):
        tree = cifar10()
        names = sorted(tree.leaf_names, reverse=True)
        turned = tree.reorder(names)
        assert turned.leaf_names == tuple(names)
        assert set(turned.leaves) == set(tree.leaves)
        assert turned.levels == tree.levels
        with pytest.raises(ValueError, match="missing"):
            tree.reorder(names[1:])


@pytest.mark.parametrize(("label", "level", "message"), [
    (5, None, "leaf label 5 is out of range; legal are 0 to 4"),
    (-2, None, "leaf label -2"),
    ([0, 3], "level2", "label of level 'level2' 3 is out of range; legal are 0 to 2"),
    (torch.tensor([0.0]), None, "must be an integer"),
    (torch.tensor([True]), None, "must be an integer"),
    (0, "fine", "no level 'fine'; the levels are 'level1', 'level2', 'level3'"),
    (0, 3, "no level 3"),
    (0, -1, "no level -1"),
])
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


@pytest.mark.parametrize(("arguments", "message"), [
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
])
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


class TestFromParents:
    def test_both_spellings_agree(self):
        by_index = cifar10()
        middle, coarse = by_index.classes[1], by_index.classes[0]
        by_name = Taxonomy.from_parents(
            by_index.leaf_names,
            [{leaf[2]: leaf[1] for leaf in by_index.leaves}, [(path[1], path[0]) for path in by_index.nodes[1]]],
            names=[middle, coarse], levels=by_index.levels)
        assert by_name == by_index
        as_dicts = Taxonomy.from_parents(by_index.leaf_names, [
            dict(enumerate(by_index.expand(range(10))[:, 1].tolist())), by_index.parents[1]], [middle, coarse],
            by_index.levels)
        assert as_dicts == by_index

    def test_unnamed_parents(self):
        tree = Taxonomy.from_parents(["x", "y", "z"], [np.array([1, 0, 1])])
        assert tree.classes == (("level1_0", "level1_1"), ("x", "y", "z"))
        assert tree.leaf_table.tolist() == [[1, 0], [0, 1], [1, 2]]

    @pytest.mark.parametrize("kind", [dict, lambda pairs: pairs])
    def test_whole_forest(self, kind):
        edges = [("cat", "pet"), ("dog", "pet"), ("pet", "animal"), ("bird", "animal"), ("ship", "sea"),
                 ("sea", "transport"), ("animal", None)]
        tree = Taxonomy.from_parents(["cat", "dog", "plant", "bird", "ship"], kind(edges))
        assert tree == Taxonomy(UNEVEN)

    @pytest.mark.parametrize(("arguments", "message"), [
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
    ])
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

    @pytest.mark.parametrize(("text", "columns", "message"), [
        ("", None, "is empty"),
        ("a,b\n", None, "at least one leaf"),
        ("a,b\nx,y\n", ["a", "c"], "no column 'c'"),
        ("a,a\nx,y\n", None, "name of its own"),
        ("a,\nx,y\n", None, "name of its own"),
        ("a,b\nx,y,z\n", None, "line 2: 3 cells"),
        ("a,b\nx,y\n\n,z\n", None, "line 4: empty name above a class"),
        ("a,b\nx,\ny,\n", None, "level 'b' is empty"),
        ("a,b\nx,y\nx,y\n", None, "listed twice"),
    ])
    def test_wrong_csv(self, tmp_path, text, columns, message):
        with pytest.raises(ValueError, match=message):
            Taxonomy.from_csv(self.write(tmp_path, text), columns)

    def test_json(self, tmp_path):
        nested = {"animal": {"pet": ["cat", "dog"], "bird": {}}, "plant": None, "transport": [{"sea": ["ship"]}]}
        expected = Taxonomy(["animal/pet/cat", "animal/pet/dog", "animal/bird", "plant", "transport/sea/ship"])
        assert Taxonomy.from_json(nested) == expected
        assert Taxonomy.from_json(self.write(tmp_path, json.dumps(nested))) == expected
        assert Taxonomy.from_json(["a", "b"], levels=["only"]).levels == ("only",)

    @pytest.mark.parametrize(("text", "message"), [
        ('{"a": ["x"], "a": ["y"]}', "'a' occurs twice"),
        ('{"a": []}', "a has an empty list"),
        ("{}", "at least one leaf"),
        ("[]", "at least one leaf"),
        ('{"a": 3}', "a holds 3"),
        ('{"a": {"b": [1]}}', "list under a/b holds 1"),
        ('{"": ["x"]}', "empty name"),
        ('{"a": ["x", "x"]}', "listed twice"),
    ])
    def test_wrong_json(self, tmp_path, text, message):
        with pytest.raises(ValueError, match=message):
            Taxonomy.from_json(self.write(tmp_path, text))

    @pytest.mark.parametrize(("change", "message"), [
        ({"format": "x"}, "not a stored taxonomy"),
        ({"version": 2}, "version 2"),
        ({"leaves": []}, "at least one leaf"),
    ])
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


class TestReadyMadeTrees:
    def test_cifar10(self):
        # fine -> middle -> coarse as the paper's figure has them
        table = {"airplane": ("sky", "transport"), "automobile": ("road", "transport"), "bird": ("bird", "animal"),
                 "cat": ("pet", "animal"), "deer": ("medium animal", "animal"), "dog": ("pet", "animal"),
                 "frog": ("reptile", "animal"), "horse": ("medium animal", "animal"), "ship": ("water", "transport"),
                 "truck": ("road", "transport")}
        tree = cifar10()
        assert tree.leaves == tuple((coarse, middle, fine) for fine, (middle, coarse) in table.items())
        assert tree.classes[1] == ("sky", "water", "road", "bird", "reptile", "pet", "medium animal")
        assert tree.expand(range(10)).tolist() == [[0, 0, 0], [0, 2, 1], [1, 3, 2], [1, 5, 3], [1, 6, 4], [1, 5, 5],
                                                   [1, 4, 6], [1, 6, 7], [0, 1, 8], [0, 2, 9]]

    def test_cifar100(self):
        tree = cifar100()
        assert tree.num_classes == (8, 20, 100)
        # the data set's own fine -> coarse labels, as its files have them
        assert tree.leaf_table[:, 1].tolist() == [
            4, 1, 14, 8, 0, 6, 7, 7, 18, 3, 3, 14, 9, 18, 7, 11, 3, 9, 7, 11, 6, 11, 5, 10, 7, 6, 13, 15, 3, 15,
            0, 11, 1, 10, 12, 14, 16, 9, 11, 5, 5, 19, 8, 8, 15, 13, 14, 17, 18, 10, 16, 4, 17, 4, 2, 0, 17, 4, 18, 17,
            10, 3, 2, 12, 12, 16, 12, 1, 9, 19, 2, 10, 0, 1, 16, 12, 9, 13, 15, 13, 16, 19, 2, 4, 6, 19, 5, 5, 8, 19,
            18, 1, 2, 15, 6, 0, 17, 8, 14, 13]
        assert tree.parents[1].tolist() == [0, 0, 1, 2, 1, 2, 2, 3, 4, 5, 5, 4, 4, 3, 6, 4, 4, 1, 7, 7]
        assert tree.leaf_table[:, 2].tolist() == list(range(100))
        assert tree.leaf_names[22] == "clock"
        assert tree.leaf_names[99] == "worm"

    def test_torchvision_class_order(self):
        datasets = pytest.importorskip("torchvision.datasets")
        assert list(fashion_mnist().leaf_names) == datasets.FashionMNIST.classes
        assert list(mnist().leaf_names) == datasets.MNIST.classes

    def test_the_others(self):
        assert fashion_mnist().num_classes == (2, 6, 10)
        assert fashion_mnist().leaf_table[:, 1].tolist() == [0, 1, 0, 2, 3, 5, 0, 5, 4, 5]
        assert [path[0] for path in fashion_mnist().nodes[1]] == ["Clothes"] * 4 + ["Goods"] * 2
        assert mnist().leaf_table[:, 0].tolist() == [0, 2, 1, 4, 3, 4, 0, 2, 1, 3]
        assert digits().leaf_names == tuple("0123456789")
        assert [leaf[1] for leaf in digits().leaves if leaf[0] == "loop"] == list("0689")

    @pytest.mark.parametrize("name", TREES)
    def test_by_name(self, name):
        assert get_taxonomy(name) == TREES[name]()
        assert get_taxonomy(name.upper().replace("_", "-")) == TREES[name]()
        assert Taxonomy.from_dict(json.loads(json.dumps(TREES[name]().to_dict()))) == TREES[name]()

    def test_by_file(self, tmp_path):
        tree = fashion_mnist()
        tree.save_json(tmp_path / "tree.json")
        (tmp_path / "tree.csv").write_text("a,b\nx,y\n")
        (tmp_path / "folder" / "x" / "y").mkdir(parents=True)
        assert get_taxonomy(tree) is tree
        assert get_taxonomy(str(tmp_path / "tree.json")) == tree
        assert get_taxonomy(tmp_path / "tree.csv").leaves == (("x", "y"),)
        assert get_taxonomy(tmp_path / "folder").leaves == (("x", "y"),)
        with pytest.raises(ValueError, match=r"'cifra10'.*cifar10, cifar100, .*mean 'cifar10'"):
            get_taxonomy("cifra10")
        with pytest.raises(ValueError, match="no taxonomy"):
            get_taxonomy(tmp_path / "missing.csv")
