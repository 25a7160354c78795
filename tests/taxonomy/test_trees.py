"""Ready-made trees, against tables written down by hand and torchvision's class orders."""

import json

import pytest

from timm_branches.taxonomy import (
    TREES,
    Taxonomy,
    cifar10,
    cifar100,
    digits,
    fashion_mnist,
    get_taxonomy,
    mnist,
)


class TestReadyMadeTrees:
    def test_cifar10(self):
        # fine -> middle -> coarse as the paper's figure has them
        table = {
            "airplane": ("sky", "transport"),
            "automobile": ("road", "transport"),
            "bird": ("bird", "animal"),
            "cat": ("pet", "animal"),
            "deer": ("medium animal", "animal"),
            "dog": ("pet", "animal"),
            "frog": ("reptile", "animal"),
            "horse": ("medium animal", "animal"),
            "ship": ("water", "transport"),
            "truck": ("road", "transport"),
        }
        tree = cifar10()
        assert tree.leaves == tuple(
            (coarse, middle, fine) for fine, (middle, coarse) in table.items()
        )
        assert tree.classes[1] == (
            "sky",
            "water",
            "road",
            "bird",
            "reptile",
            "pet",
            "medium animal",
        )
        assert tree.expand(range(10)).tolist() == [
            [0, 0, 0],
            [0, 2, 1],
            [1, 3, 2],
            [1, 5, 3],
            [1, 6, 4],
            [1, 5, 5],
            [1, 4, 6],
            [1, 6, 7],
            [0, 1, 8],
            [0, 2, 9],
        ]

    def test_cifar100(self):
        tree = cifar100()
        assert tree.num_classes == (8, 20, 100)
        # the data set's own fine -> coarse labels, as its files have them
        assert tree.leaf_table[:, 1].tolist() == [
            4,
            1,
            14,
            8,
            0,
            6,
            7,
            7,
            18,
            3,
            3,
            14,
            9,
            18,
            7,
            11,
            3,
            9,
            7,
            11,
            6,
            11,
            5,
            10,
            7,
            6,
            13,
            15,
            3,
            15,
            0,
            11,
            1,
            10,
            12,
            14,
            16,
            9,
            11,
            5,
            5,
            19,
            8,
            8,
            15,
            13,
            14,
            17,
            18,
            10,
            16,
            4,
            17,
            4,
            2,
            0,
            17,
            4,
            18,
            17,
            10,
            3,
            2,
            12,
            12,
            16,
            12,
            1,
            9,
            19,
            2,
            10,
            0,
            1,
            16,
            12,
            9,
            13,
            15,
            13,
            16,
            19,
            2,
            4,
            6,
            19,
            5,
            5,
            8,
            19,
            18,
            1,
            2,
            15,
            6,
            0,
            17,
            8,
            14,
            13,
        ]
        assert tree.parents[1].tolist() == [
            0,
            0,
            1,
            2,
            1,
            2,
            2,
            3,
            4,
            5,
            5,
            4,
            4,
            3,
            6,
            4,
            4,
            1,
            7,
            7,
        ]
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
