"""hP, hR, hF, distances and severity, against hiclass and plain Python on paths of names."""

import random

import hiclass.metrics
import numpy as np
import pytest
import torch

from timm_branches.hierarchy.tree_metrics import (
    PathTables,
    distance_at_k,
    hierarchical_distance,
    hierarchical_precision_recall_f1,
    mistake_severity,
)
from timm_branches.taxonomy import Taxonomy, cifar10

UNEVEN = Taxonomy(
    [
        "animal/pet/cat",
        "animal/pet/dog",
        "plant",
        "animal/bird",
        "transport/sea/ship",
        "stone/gem",
        "animal/fish/flat/sole",
    ]
)
TREES = {"even": cifar10(), "uneven": UNEVEN, "one level": Taxonomy(["a", "b", "c"])}
trees = pytest.mark.parametrize("tree", TREES.values(), ids=TREES)


# -- by hand


def answered(tree, row):
    """Paths of the classes predicted, of which none below a leaf counts."""
    paths = []
    for level, i in enumerate(row):
        if i >= 0:
            paths.append(tree.nodes[level][i])
        if paths and paths[-1] in tree.leaves:
            break
    return paths


def lca_height(tree, a, b):
    shared = 0
    while shared < min(len(a), len(b)) and a[shared] == b[shared]:
        shared += 1
    return max(len(leaf) for leaf in tree.leaves if leaf[:shared] == a[:shared]) - shared


def distances_by_hand(tree, predictions, labels):
    result = []
    for row, label in zip(predictions, labels, strict=True):
        truth = [tree.nodes[level][i] for level, i in enumerate(label) if i >= 0]
        if truth and truth[-1] in tree.leaves:
            paths = answered(tree, row)
            result.append(lca_height(tree, truth[-1], paths[-1] if paths else ()))
    return result


def overlap_by_hand(tree, predictions, labels):
    counts = np.zeros(3, dtype=int)
    for row, label in zip(predictions, labels, strict=True):
        truth = {tree.nodes[level][i] for level, i in enumerate(label) if i >= 0}
        depths = {len(path) for path in truth}
        for path in truth & set(tree.leaves):
            depths |= set(range(len(path) + 1, tree.num_levels + 1))
        told = {path[:d] for path in answered(tree, row) for d in range(1, len(path) + 1)}
        told = {path for path in told if len(path) in depths}
        counts += len(told & truth), len(told), len(truth)
    return counts


def mean(values):
    return float(np.mean(values)) if len(values) else np.nan


def random_rows(tree, seed, size=60):
    """Labels that are partly unknown, and predictions.

    Paths, paths that stop early, and anything.
    """
    rng = random.Random(seed)
    table = tree.leaf_table.tolist()
    labels, predictions = [], []
    for _ in range(size):
        label, row = list(rng.choice(table)), list(rng.choice(table))
        if rng.random() < 0.4:
            row = list(label)
        if rng.random() < 0.3:
            row = [rng.randrange(-1, k) for k in tree.num_classes]
        elif rng.random() < 0.3:
            row[rng.randrange(tree.num_levels) :] = []
        if rng.random() < 0.3:
            label[rng.randrange(tree.num_levels) :] = []
        if rng.random() < 0.2 and label:
            label[0] = -1
        labels.append(label + [-1] * (tree.num_levels - len(label)))
        predictions.append(row + [-1] * (tree.num_levels - len(row)))
    return predictions, labels


@trees
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("size", [1, 60])
def test_against_plain_python(tree, seed, size):
    predictions, labels = random_rows(tree, seed, size)
    right, predicted, true = overlap_by_hand(tree, predictions, labels)
    distances = distances_by_hand(tree, predictions, labels)
    predictions, labels = torch.tensor(predictions), torch.tensor(labels)
    want = [
        np.divide(a, b) if b else np.nan
        for a, b in ((right, predicted), (right, true), (2 * right, predicted + true))
    ]
    got = hierarchical_precision_recall_f1(predictions, labels, tree)
    assert [x.item() for x in got] == pytest.approx(want, rel=1e-12, nan_ok=True)
    assert hierarchical_distance(predictions, labels, tree).item() == pytest.approx(
        mean(distances), nan_ok=True
    )
    severity, top1 = (x.item() for x in mistake_severity(predictions, labels, tree))
    assert severity == pytest.approx(mean([d for d in distances if d]), nan_ok=True)
    assert top1 == pytest.approx(mean([d == 0 for d in distances]), nan_ok=True)


@trees
@pytest.mark.parametrize("k", [1, 3])
def test_distance_at_k_against_plain_python(tree, k):
    torch.manual_seed(0)
    _, labels = random_rows(tree, 0)
    scores = torch.rand(len(labels), tree.num_leaves)
    want = []
    for row, label in zip(scores.tolist(), labels, strict=True):
        truth = [tree.nodes[level][i] for level, i in enumerate(label) if i >= 0]
        if truth and truth[-1] in tree.leaves:
            best = sorted(range(tree.num_leaves), key=lambda i: -row[i])[:k]
            want += [lca_height(tree, truth[-1], tree.leaves[i]) for i in best]
    got = distance_at_k(scores, torch.tensor(labels), tree, k)
    assert got.item() == pytest.approx(mean(want), rel=1e-12)


@trees
def test_distance_at_1_is_the_distance(tree):
    torch.manual_seed(0)
    scores, truth = torch.rand(50, tree.num_leaves), torch.randint(tree.num_leaves, (50,))
    labels = tree.expand(truth)
    predictions = tree.expand(scores.argmax(1))
    assert (
        distance_at_k(scores, labels, tree, 1)
        == hierarchical_distance(predictions, labels, tree)
        > 0
    )
    assert (
        hierarchical_distance(predictions, labels, tree)
        == tree.lca_height(labels, predictions).double().mean()
    )


# -- hiclass


def texts(tree, row):
    return ["/".join(tree.nodes[level][i]) if i >= 0 else "" for level, i in enumerate(row)]


def scores_of_hiclass(true, predicted):
    return [
        metric(np.array(true), np.array(predicted))
        for metric in (hiclass.metrics.precision, hiclass.metrics.recall, hiclass.metrics.f1)
    ]


@trees
def test_paths_score_as_in_hiclass(tree):
    torch.manual_seed(0)
    labels, predictions = (tree.expand(torch.randint(tree.num_leaves, (50,))) for _ in range(2))
    want = scores_of_hiclass(
        *([texts(tree, row) for row in rows.tolist()] for rows in (labels, predictions))
    )
    got = hierarchical_precision_recall_f1(predictions, labels, tree)
    assert [x.item() for x in got] == pytest.approx(want, rel=1e-12)


def test_contradictions_score_as_several_paths_in_hiclass():
    """hiclass takes several paths of one sample: those of each level's answer."""
    tree = cifar10()
    torch.manual_seed(0)
    labels = tree.expand(torch.randint(10, (50,)))
    predictions = torch.stack([torch.randint(k, (50,)) for k in tree.num_classes], 1)
    predictions[::3, 2] = -1
    several = [
        [texts(tree, tree.expand(i, level).tolist()) for level, i in enumerate(row)]
        for row in predictions.tolist()
    ]
    truth = [[texts(tree, row)] * 3 for row in labels.tolist()]
    got = hierarchical_precision_recall_f1(predictions, labels, tree)
    assert [x.item() for x in got] == pytest.approx(scores_of_hiclass(truth, several), rel=1e-12)
    assert not tree.valid_paths(predictions).all()


# -- edges


@pytest.mark.parametrize(
    ("row", "scores"),
    [
        ([0, 0, 0, -1], (1, 1, 1)),  # animal, pet, cat
        ([0, 0, -1, -1], (1, 2 / 3, 4 / 5)),  # no answer costs recall only
        ([-1, -1, -1, -1], (np.nan, 0, 0)),
        ([-1, -1, 0, -1], (1, 1, 1)),  # a class stands for its ancestors too
        ([0, 0, 2, -1], (2 / 5, 2 / 3, 1 / 2)),  # a ship brings transport and sea with it
        ([1, 0, 0, 0], (0, 0, 0)),  # plant is a leaf: what is said below it does not count
        ([0, 0, 0, 0], (1, 1, 1)),  # and cat
    ],
)
def test_answers_for_a_cat(row, scores):
    got = hierarchical_precision_recall_f1(torch.tensor([row]), UNEVEN.expand([0]), UNEVEN)
    assert [x.item() for x in got] == pytest.approx(scores, nan_ok=True)


def test_below_a_leaf_nothing_is_unknown():
    plant, cat = UNEVEN.expand([2]), UNEVEN.expand([0])
    assert hierarchical_precision_recall_f1(cat, plant, UNEVEN)[0] == 0
    animal = UNEVEN.encode_partial(["animal"])  # here all below is unknown
    assert hierarchical_precision_recall_f1(cat, animal, UNEVEN) == (1, 1, 1)


@trees
def test_nothing_known(tree):
    for count in (0, 3):
        nothing = torch.full((count, tree.num_levels), -1)
        rows = tree.expand(torch.arange(count))
        assert all(x.isnan() for x in hierarchical_precision_recall_f1(rows, nothing, tree))
        assert hierarchical_distance(rows, nothing, tree).isnan()
        assert all(x.isnan() for x in mistake_severity(rows, nothing, tree))
        assert distance_at_k(torch.rand(count, tree.num_leaves), nothing, tree, 2).isnan()


@trees
@pytest.mark.parametrize("seed", range(5))
def test_tables_say_what_the_taxonomy_says(tree, seed):
    predictions, labels = (torch.tensor(rows) for rows in random_rows(tree, seed))
    tables = PathTables(tree)
    assert torch.equal(
        tables.consistent(predictions, tables.augment(predictions)), tree.valid_paths(predictions)
    )
    a, b = tables.end(predictions), tables.end(labels)
    assert torch.equal(tables.lca_height(a, b), tree.lca_height(a, b))


def test_what_is_refused():
    tree, row = cifar10(), torch.zeros(1, 3, dtype=torch.long)
    for metric in (hierarchical_precision_recall_f1, hierarchical_distance, mistake_severity):
        with pytest.raises(ValueError, match="take the argmax"):
            metric(row.float(), row, tree)
        with pytest.raises(ValueError, match=r"shape \(N, 3\)"):
            metric(row[:, :2], row[:, :2], tree)
        with pytest.raises(ValueError, match="prediction of level 'middle' 7 is out of range"):
            metric(torch.tensor([[0, 7, 0]]), row, tree)
        with pytest.raises(ValueError, match="label of level 'coarse' 2 is out of range"):
            metric(row, torch.tensor([[2, 0, 0]]), tree)
    with pytest.raises(ValueError, match="10 leaves, got 11"):
        distance_at_k(torch.rand(1, 10), row, tree, 11)
    with pytest.raises(ValueError, match=r"must be \(N, 10\) for N = 1 labels, got \(1, 9\)"):
        distance_at_k(torch.rand(1, 9), row, tree, 1)
