"""Derived trees, against clustering by brute force in plain Python and SciPy's own cuts."""

import math
import random
import warnings

import numpy as np
import pytest
import torch
from scipy.cluster.hierarchy import cut_tree, fcluster, linkage
from scipy.spatial.distance import pdist

from timm_branches.taxonomy import (
    Taxonomy,
    class_prototypes,
    cut_linkage,
    linkage_from_confusion,
    linkage_from_embeddings,
)


def cluster(distance, count, join):
    """Merge the two nearest groups until `count` are left.

    Each class's group, numbered by first appearance.
    """
    groups = [[i] for i in range(len(distance))]
    while len(groups) > count:
        pairs = [
            (join([distance[i][j] for i in a for j in b]), a, b)
            for a in groups
            for b in groups
            if a < b
        ]
        _, a, b = min(pairs)
        groups = [group for group in groups if group not in (a, b)] + [a + b]
    return numbered(
        [next(k for k, group in enumerate(groups) if i in group) for i in range(len(distance))]
    )


def numbered(labels):
    order = list(dict.fromkeys(labels))
    return [order.index(label) for label in labels]


JOINS = {"average": lambda d: sum(d) / len(d), "single": min, "complete": max}


def random_counts(seed, size=8):
    rng = random.Random(seed)
    return [
        [rng.randint(50, 90) if i == j else rng.randint(0, 40) for j in range(size)]
        for i in range(size)
    ]


@pytest.mark.parametrize("seed", range(6))
class TestRandomData:
    @pytest.mark.parametrize("method", JOINS)
    def test_confusion(self, seed, method):
        counts = random_counts(seed)
        share = [[n / sum(row) for n in row] for row in counts]
        distance = [[1 - (share[i][j] + share[j][i]) / 2 for j in range(8)] for i in range(8)]
        cuts = cut_linkage(linkage_from_confusion(counts, method), range(2, 8))
        for column, count in zip(cuts.T.tolist(), range(2, 8), strict=True):
            assert column == cluster(distance, count, JOINS[method])

    @pytest.mark.parametrize("method", JOINS)
    @pytest.mark.parametrize("metric", ["cosine", "euclidean"])
    def test_embeddings(self, seed, metric, method):
        vectors = torch.randn(7, 3, generator=torch.Generator().manual_seed(seed))
        rows = vectors.tolist()

        def apart(a, b):
            if metric == "euclidean":
                return math.dist(a, b)
            return 1 - sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(
                *b
            )

        distance = [[apart(a, b) for b in rows] for a in rows]
        cuts = cut_linkage(linkage_from_embeddings(vectors, metric, method), [2, 4, 6])
        for column, count in zip(cuts.T.tolist(), [2, 4, 6], strict=True):
            assert column == cluster(distance, count, JOINS[method])

    @pytest.mark.parametrize("method", ["average", "weighted", "ward"])
    def test_cuts_are_those_of_scipy(self, seed, method):
        merges = linkage(np.random.default_rng(seed).normal(size=(30, 4)), method)
        cuts = cut_linkage(merges, [2, 5, 11, 29])
        for column, count in zip(cuts.T.tolist(), [2, 5, 11, 29], strict=True):
            assert column == numbered(fcluster(merges, count, "maxclust").tolist())

    def test_tree(self, seed):
        names = [f"class {i}" for i in range(8)]
        tree = Taxonomy.from_confusion(random_counts(seed), names, (2, 3, 6), ["a", "b", "c", "d"])
        assert tree.levels == ("a", "b", "c", "d")
        assert tree.num_classes == (2, 3, 6, 8)
        assert [leaf[-1] for leaf in tree.leaves] == names
        cuts = cut_linkage(linkage_from_confusion(random_counts(seed)), (2, 3, 6))
        assert torch.equal(tree.leaf_table[:, :3], cuts)
        for level in tree.nodes[:3]:
            for node in level:
                members = [leaf[-1] for leaf in tree.leaves if leaf[: len(node)] == node]
                assert node[-1].split("+")[0] == members[0]

    def test_embeddings_make_the_same_tree_as_their_linkage(self, seed):
        vectors = np.random.default_rng(seed).normal(size=(6, 3))
        names = list("abcdef")
        tree = Taxonomy.from_embeddings(vectors, names, [2, 4], metric="euclidean", method="ward")
        assert tree == Taxonomy.from_linkage(linkage(pdist(vectors), "ward"), names, [2, 4])
        turned = Taxonomy.from_embeddings(vectors, names, [2, 4])
        assert turned == Taxonomy.from_linkage(
            linkage(pdist(vectors, "cosine"), "average"), names, [2, 4]
        )


class TestConfusion:
    def test_rows_are_shares(self):
        """Ten times the samples of one class do not make it ten times as similar."""
        counts = np.array(random_counts(0), dtype=float)
        more = counts.copy()
        more[3] *= 10
        np.testing.assert_allclose(linkage_from_confusion(more), linkage_from_confusion(counts))

    def test_the_transpose_is_another_matrix(self):
        # a is never mistaken, but a tenth of the many b and half of the few c are taken for a
        counts = [[10, 0, 0], [100, 900, 0], [0, 5, 5]]
        assert cut_linkage(linkage_from_confusion(counts), [2]).flatten().tolist() == [0, 1, 1]
        assert cut_linkage(
            linkage_from_confusion(np.transpose(counts)), [2]
        ).flatten().tolist() == [0, 0, 1]

    def test_class_without_samples(self):
        """Only where it was predicted is known.

        A tenth of b is more than 8 in 100 each way between b and c.
        """
        counts = [[0, 0, 0], [10, 82, 8], [0, 8, 92]]
        merges = linkage_from_confusion(counts)
        assert merges[0].tolist() == pytest.approx([0, 1, 0.9, 2])

    def test_class_never_seen_nor_predicted_is_far_from_all(self):
        merges = linkage_from_confusion([[0, 0, 0], [0, 9, 1], [0, 2, 8]])
        assert merges[:, :3].tolist() == [pytest.approx([1, 2, 0.85]), pytest.approx([0, 3, 1])]

    @pytest.mark.parametrize(
        "kind", [torch.tensor, np.array, list, lambda m: torch.tensor(m, dtype=torch.bfloat16)]
    )
    def test_kinds(self, kind):
        counts = [[8, 2, 0], [1, 9, 0], [0, 1, 9]]
        assert linkage_from_confusion(kind(counts))[0].tolist() == pytest.approx([0, 1, 0.85, 2])

    @pytest.mark.parametrize(
        ("matrix", "message"),
        [
            ([[1, 2, 3], [4, 5, 6]], r"square.*\(2, 3\)"),
            ([1, 2], "two dimensions"),
            (np.empty((0, 0)), "not empty"),
            ([[1, -2], [3, 4]], "negative one: -2"),
            ([[1, 2], [math.nan, 4]], "must be finite; row 1"),
            ([[1, math.inf], [3, 4]], "must be finite; row 0"),
            ([[5, 0], [0, 7]], "no class is confused"),
            ([[0, 0], [0, 0]], "no class is confused"),
        ],
    )
    def test_errors(self, matrix, message):
        with pytest.raises(ValueError, match=message):
            linkage_from_confusion(matrix)

    @pytest.mark.parametrize("method", ["ward", "centroid", "mean"])
    def test_methods(self, method):
        with pytest.raises(
            ValueError, match="method must be one of average, complete, single, weighted for a conf"
        ):
            linkage_from_confusion([[1, 1], [1, 1]], method)

    def test_a_single_class(self):
        assert linkage_from_confusion([[3]]).shape == (0, 4)
        assert Taxonomy.from_confusion([[3]], ["a"], []).leaves == (("a",),)
        with pytest.raises(ValueError, match="less than the 1 classes"):
            Taxonomy.from_confusion([[3]], ["a"], [1])


class TestEmbeddings:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (([[1.0, 0.0], [0.0, 0.0]],), "class 1 is zero"),
            (([[1.0], [math.nan]], "euclidean"), "must be finite; row 1"),
            (([1.0, 2.0],), "two dimensions"),
            (
                ([[1.0], [2.0]], "cityblock"),
                "metric must be 'cosine' or 'euclidean', got 'cityblock'",
            ),
            (([[1.0], [2.0]], "cosine", "ward"), "for cosine distances, got 'ward'"),
            (
                ([[1.0], [2.0]], "euclidean", "centroid"),
                "average, complete, single, weighted, ward for euclidean",
            ),
        ],
    )
    def test_errors(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            linkage_from_embeddings(*arguments)

    def test_zero_vectors_have_a_distance(self):
        assert linkage_from_embeddings([[0.0, 0.0], [3.0, 4.0]], "euclidean")[
            0, 2
        ] == pytest.approx(5)

    def test_equal_vectors(self):
        merges = linkage_from_embeddings([[1.0, 1e-3], [1.0, 1e-3], [0.0, 1.0]])
        assert merges[0].tolist() == pytest.approx([0, 1, 0, 2])
        assert (merges[:, 2] >= 0).all()

    def test_a_single_class(self):
        assert Taxonomy.from_embeddings(torch.ones(1, 4), ["a"], []).num_classes == (1,)

    def test_gradients_do_not_matter(self):
        vectors = torch.nn.Linear(3, 4).weight  # a classifier's rows
        assert Taxonomy.from_embeddings(vectors, list("abcd"), [2]).num_classes == (2, 4)


class TestPrototypes:
    def test_means(self):
        generator = torch.Generator().manual_seed(0)
        embeddings = torch.randn(50, 4, generator=generator)
        labels = torch.randint(-1, 5, (50,), generator=generator)
        expected = [
            [
                sum(embeddings[i, d].item() for i in range(50) if labels[i] == k)
                / labels.eq(k).sum().item()
                for d in range(4)
            ]
            for k in range(5)
        ]
        found = class_prototypes(embeddings, labels)
        assert found.tolist() == [pytest.approx(row, rel=1e-5, abs=1e-6) for row in expected]
        assert found.dtype == torch.float32

    def test_half_precision_is_summed_in_full(self):
        embeddings = torch.full((4096, 1), 1.0, dtype=torch.bfloat16)
        assert class_prototypes(embeddings, torch.zeros(4096, dtype=torch.long)).tolist() == [[1.0]]

    @pytest.mark.parametrize(
        ("shape", "labels", "count", "message"),
        [
            ((3, 2), [0, 2, 2], None, r"there is none of \[1\]"),
            ((3, 2), [0, 1, 1], 4, r"there is none of \[2, 3\]"),
            ((3, 2), [0, 1, 2], 2, "labels must be 0 to 1"),
            ((3, 2), [0, 1, -2], None, "got -2 to 1"),
            ((3, 2), [0, 1], None, r"got \(3, 2\) and \(2,\)"),
            ((3,), [0, 1, 1], None, r"shape \(N, D\)"),
            ((2, 2), [-1, -1], None, "needs a sample"),
            ((0, 2), [], None, "needs a sample"),
        ],
    )
    def test_errors(self, shape, labels, count, message):
        with pytest.raises(ValueError, match=message):
            class_prototypes(torch.zeros(shape), torch.tensor(labels, dtype=torch.long), count)


class TestCuts:
    # two pairs at distance 1, joined to each other and to a fifth class at distance 2
    tied = [[0, 1, 1, 2], [2, 3, 1, 2], [5, 6, 2, 4], [4, 7, 2, 5]]

    def test_ties_still_give_the_number_asked_for(self):
        with pytest.warns(
            UserWarning, match="cut into 2 classes falls between merges at the same distance"
        ):
            cut = cut_linkage(self.tied, [2])
        assert cut.flatten().tolist() == [0, 0, 0, 0, 1]
        with pytest.warns(UserWarning, match="cut into 4 classes"):
            assert Taxonomy.from_linkage(self.tied, list("abcde"), [4]).num_classes == (4, 5)

    @pytest.mark.filterwarnings("error")
    def test_no_warning_beside_a_tie(self):
        assert cut_linkage(self.tied, [3]).flatten().tolist() == [0, 0, 1, 1, 2]

    def test_no_level_above(self):
        assert cut_linkage(self.tied, []).shape == (5, 0)
        assert Taxonomy.from_linkage(self.tied, list("abcde"), [], ["only"]).num_classes == (5,)

    @pytest.mark.parametrize(
        "wanted", [[3, 2], [2, 2], [1, 2], [5], [0], [2.5], [np.float64(2)], "23", [[2, 3]]]
    )
    def test_wrong_numbers(self, wanted):
        with pytest.raises(
            ValueError, match="increasing whole numbers.*less than the 5 classes themselves"
        ):
            cut_linkage(self.tied, wanted)

    @pytest.mark.parametrize(
        "merges", [[], [[0, 1, 2]], [[0, 1, 1, 2], [0, 2, 1, 2]], [[0, 5, 1, 2]]]
    )
    def test_what_is_no_linkage(self, merges):
        with pytest.raises(ValueError, match="(?i)linkage"):
            cut_linkage(merges, [])

    @pytest.mark.parametrize("names", [list("abcd"), list("abcdef"), list("abcda")])
    def test_wrong_names(self, names):
        with pytest.raises(ValueError, match="classes must be 5 different names"):
            Taxonomy.from_linkage(self.tied, names, [3])

    def test_long_names_are_cut(self):
        names = [
            "ornithorhynchus",
            "echidna",
            "kangaroo",
            "koala",
            "a name that by itself is far too long for it",
        ]
        tree = Taxonomy.from_linkage(self.tied, names, [3])
        assert tree.classes[0] == ("ornithorhynchus+echidna", "kangaroo+koala", names[4])
        chain = [[0, 1, 1, 2], [2, 5, 2, 3], [3, 6, 3, 4], [4, 7, 4, 5]]
        assert Taxonomy.from_linkage(chain, names, [2]).classes[0] == (
            "ornithorhynchus+echidna+2 more",
            names[4],
        )

    def test_as_many_names_as_fit(self):
        chain = [[0, 1, 1, 2], *([i, 18 + i, i, i + 1] for i in range(2, 19)), [19, 37, 20, 20]]
        tree = Taxonomy.from_linkage(chain, [f"name{i}" for i in range(20)], [2])
        # name4 would make it 37 long
        assert tree.classes[0] == ("name0+name1+name2+name3+15 more", "name19")

    def test_names_that_hold_the_separator(self):
        tree = Taxonomy.from_linkage(self.tied, ["a", "b", "x", "y", "a+b"], [3])
        assert tree.num_classes == (3, 5)
        assert len(set(tree.classes[0])) == 3


def test_as_many_groups_as_asked_for_where_distances_fall():
    """Centroid linkage is not monotonic: SciPy's own cut miscounts some of these."""
    generator = np.random.default_rng(0)
    miscounted = 0
    for _ in range(60):
        count = int(generator.integers(5, 30))
        merges = linkage(generator.normal(size=(count, 3)), "centroid")
        wanted = sorted(set(generator.integers(2, count, size=3).tolist()))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            groups = cut_linkage(merges, wanted)
        assert [len(set(column.tolist())) for column in groups.T] == wanted
        theirs = cut_tree(merges, n_clusters=wanted).T
        miscounted += [len(set(column.tolist())) for column in theirs] != wanted
    assert miscounted > 0
