"""Accuracies and calibration, against counting by hand, torchmetrics and sums of plain
probabilities."""

import math
import random

import pytest
import torch
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_calibration_error,
    multiclass_f1_score,
    multiclass_precision,
    multiclass_recall,
)

from timm_branches.hierarchy import consistency, full_path_accuracy, level_accuracy, sum_upwards
from timm_branches.hierarchy.metrics import (
    class_scores,
    expected_calibration_error,
    top_k_accuracy,
    tree_inconsistency_error,
)
from timm_branches.taxonomy import Taxonomy, cifar10

UNEVEN = Taxonomy(
    ["animal/pet/cat", "animal/pet/dog", "plant", "animal/bird", "transport/sea/ship"]
)


@pytest.mark.parametrize("seed", range(10))
def test_accuracies_by_counting(seed):
    rng = random.Random(seed)
    rows = range(rng.randint(1, 40))
    predictions = [[rng.randrange(3) for _ in range(3)] for _ in rows]
    labels = [[rng.randrange(-1, 3) for _ in range(3)] for _ in rows]
    by_level = []
    for level in range(3):
        pairs = [
            (p[level], t[level]) for p, t in zip(predictions, labels, strict=True) if t[level] >= 0
        ]
        by_level.append(sum(p == t for p, t in pairs) / len(pairs) if pairs else math.nan)
    counted = [(p, t) for p, t in zip(predictions, labels, strict=True) if any(x >= 0 for x in t)]
    exact = [all(y in (-1, x) for x, y in zip(p, t, strict=True)) for p, t in counted]
    predictions, labels = torch.tensor(predictions), torch.tensor(labels)
    assert level_accuracy(predictions, labels).tolist() == pytest.approx(by_level, nan_ok=True)
    full = sum(exact) / len(exact) if exact else math.nan
    assert full_path_accuracy(predictions, labels).item() == pytest.approx(full, nan_ok=True)


def test_unknown_is_neither_right_nor_wrong():
    predictions = torch.tensor([[0, 1, 2], [0, 1, 2], [-1, -1, -1]])
    labels = torch.tensor([[0, -1, -1], [1, 1, -1], [-1, -1, -1]])  # -1 predicted for -1 is no hit
    accuracy = level_accuracy(predictions, labels)
    assert accuracy[:2].tolist() == [0.5, 1.0]
    assert accuracy[2].isnan()
    assert full_path_accuracy(predictions, labels) == 0.5
    assert full_path_accuracy(predictions[2:], labels[2:]).isnan()


def test_no_samples():
    nothing = torch.empty(0, 2, dtype=torch.long)
    assert level_accuracy(nothing, nothing).isnan().tolist() == [True, True]
    assert full_path_accuracy(nothing, nothing).isnan()
    assert consistency(nothing, Taxonomy(["a/b"])).isnan()
    assert tree_inconsistency_error(nothing, Taxonomy(["a/b"])).isnan()
    assert top_k_accuracy(torch.empty(0, 3), nothing[:, 0], 2).isnan()
    assert expected_calibration_error(torch.empty(0), torch.empty(0, dtype=torch.bool)).isnan()


@pytest.mark.parametrize("metric", [level_accuracy, full_path_accuracy])
@pytest.mark.parametrize(
    ("predictions", "labels", "message"),
    [
        (
            torch.zeros(3, 2, dtype=torch.long),
            torch.zeros(3, dtype=torch.long),
            r"\(3, 2\) and \(3,\)",
        ),
        (torch.zeros(3, dtype=torch.long), torch.zeros(3, dtype=torch.long), r"\(N, L\)"),
        (torch.zeros(3, 2), torch.zeros(3, 2, dtype=torch.long), "take the argmax"),
        (torch.zeros(3, 2, dtype=torch.long), torch.full((3, 2), -100), "got -100"),
    ],
)
def test_wrong_arguments(metric, predictions, labels, message):
    with pytest.raises(ValueError, match=message):
        metric(predictions, labels)


def test_consistency():
    tree = cifar10()
    rows = tree.expand(range(10))
    assert consistency(rows, tree) == 1
    rows[:3, 0] = 1 - rows[:3, 0]
    assert consistency(rows, tree).item() == pytest.approx(0.7)
    assert tree_inconsistency_error(rows, tree).item() == pytest.approx(0.3)
    shallow = torch.tensor([[1, 2, 2], [0, 2, 2]])  # plant is a leaf, animal is not
    assert consistency(shallow, UNEVEN) == 0.5


def random_level(size=200, classes=7):
    torch.manual_seed(0)
    labels = torch.randint(-1, classes, (size,))
    logits = torch.randn(size, classes, dtype=torch.double)
    logits[torch.arange(size), labels.clamp(min=0)] += 2 * (torch.rand(size) < 0.6)
    return logits, labels


@pytest.mark.parametrize("k", [1, 2, 5, 7])
def test_top_k_is_torchmetrics(k):
    logits, labels = random_level()
    want = multiclass_accuracy(logits, labels, 7, top_k=k, average="micro", ignore_index=-1)
    assert top_k_accuracy(logits, labels, k).item() == pytest.approx(want.item(), rel=1e-6)
    assert (want == 1) == (k == 7)


@pytest.mark.parametrize("k", [0, 8])
def test_top_k_beyond_the_classes(k):
    with pytest.raises(ValueError, match=f"between 1 and the 7 classes, got {k}"):
        top_k_accuracy(*random_level(), k)
    with pytest.raises(ValueError, match=r"got \(200, 7\) and \(199,\)"):
        top_k_accuracy(random_level()[0], random_level()[1][1:], 5)


def test_class_scores_are_torchmetrics():
    logits, labels = random_level()
    labels[labels == 3] = 4  # nobody is 3
    predictions = logits.argmax(1)
    predictions[predictions == 5] = 0  # and nothing is taken for 5
    known = labels >= 0
    counts = [(labels[known & (labels == predictions)]), predictions[known], labels[known]]
    scores = class_scores(*(count.bincount(minlength=7) for count in counts))
    for got, metric, undefined in zip(
        scores,
        (multiclass_precision, multiclass_recall, multiclass_f1_score),
        ([5], [3], []),
        strict=True,
    ):
        want = metric(predictions, labels, 7, average=None, ignore_index=-1)
        assert got.isnan().nonzero()[:, 0].tolist() == undefined
        torch.testing.assert_close(got.nan_to_num(0.0), want.double(), rtol=1e-6, atol=0)
    assert class_scores(*torch.zeros(3, 1, dtype=torch.long))[2].isnan().all()


@pytest.mark.parametrize("num_bins", [1, 4, 15])
def test_calibration_error_is_torchmetrics(num_bins):
    logits, labels = random_level()
    known = labels >= 0
    confidences, predictions = logits.softmax(1).max(1)
    want = multiclass_calibration_error(logits, labels, 7, n_bins=num_bins, ignore_index=-1)
    got = expected_calibration_error(confidences[known], (predictions == labels)[known], num_bins)
    assert want > 0.05
    assert got.item() == pytest.approx(want.item(), rel=1e-6)


@pytest.mark.parametrize(
    ("confidences", "right", "num_bins", "expected"),
    [
        ([1.0, 0.95], [False, True], 15, (1.95 - 1) / 2),  # 1 belongs to the last bin
        ([0.5, 0.4], [True, False], 2, (1 - 0.9) / 2),  # an upper edge belongs to its bin
        ([0.0, 0.5], [False, False], 2, 0.25),  # 0 to the first
        ([0.25, 0.75], [True, False], 2, 0.75),  # bins do not cancel each other out
        ([0.9, math.nan], [True, True], 15, math.nan),
    ],
)
def test_calibration_error_by_hand(confidences, right, num_bins, expected):
    got = expected_calibration_error(
        torch.tensor(confidences, dtype=torch.double), torch.tensor(right), num_bins
    )
    assert got.item() == pytest.approx(expected, nan_ok=True)


def test_calibration_error_of_other_shapes():
    with pytest.raises(ValueError, match=r"got \(3,\) and \(2,\)"):
        expected_calibration_error(torch.rand(3), torch.ones(2, dtype=torch.bool))


class TestSumUpwards:
    @pytest.mark.parametrize("tree", [cifar10(), UNEVEN])
    def test_against_plain_sums(self, tree):
        logits = torch.randn(
            2, 3, tree.num_leaves, dtype=torch.double, generator=torch.Generator().manual_seed(0)
        )
        p = logits.softmax(-1)
        levels = sum_upwards(logits, tree)
        assert [level.shape for level in levels] == [(2, 3, n) for n in tree.num_classes]
        for depth, (level, nodes) in enumerate(zip(levels, tree.nodes, strict=True)):
            for i, node in enumerate(nodes):
                members = [j for j, leaf in enumerate(tree.leaves) if leaf[: depth + 1] == node]
                torch.testing.assert_close(level[..., i].exp(), p[..., members].sum(-1))
            torch.testing.assert_close(level.exp(), p @ tree.leaf_to_level(depth).double())

    def test_stable(self):
        logits = torch.tensor([300.0, 299.0, -300.0])
        coarse, fine = sum_upwards(logits, Taxonomy(["a/x", "b/y", "b/z"]))
        norm = 300 + math.log1p(math.exp(-1))
        assert coarse.tolist() == pytest.approx([300 - norm, 299 - norm])
        # exp(-600) is 0 in float32
        assert fine.tolist() == pytest.approx([300 - norm, 299 - norm, -300 - norm])

    def test_half_precision(self):
        tree = Taxonomy([f"a/{i}" for i in range(1000)] + ["b/x"])
        logits = torch.zeros(1001)
        expected = sum_upwards(logits, tree)[0]
        result = sum_upwards(logits.bfloat16(), tree)[0]
        assert result.dtype == torch.float32
        torch.testing.assert_close(result, expected)
        assert result.exp().tolist() == pytest.approx([1000 / 1001, 1 / 1001], rel=1e-4)

    def test_gradient(self):
        logits = torch.randn(
            2, 5, dtype=torch.double, generator=torch.Generator().manual_seed(0), requires_grad=True
        )
        assert torch.autograd.gradcheck(lambda x: tuple(sum_upwards(x, UNEVEN)), logits)

    def test_masked_leaves(self):
        logits = torch.tensor([0.0, -torch.inf, 0.0, -torch.inf], requires_grad=True)
        coarse, fine = sum_upwards(logits, Taxonomy(["a/w", "b/x", "a/y", "b/z"]))
        assert coarse.tolist() == [pytest.approx(0.0, abs=1e-6), -math.inf]
        assert fine.tolist() == [
            pytest.approx(-math.log(2)),
            -math.inf,
            pytest.approx(-math.log(2)),
            -math.inf,
        ]
        (coarse[0] + fine[2]).backward()
        assert logits.grad.isfinite().all()

    @pytest.mark.parametrize(
        ("logits", "message"),
        [
            (torch.zeros(2, 9), r"shape \(..., 10\), got \(2, 9\)"),
            (torch.zeros(()), r"shape \(..., 10\)"),
            (torch.zeros(2, 10, dtype=torch.long), "floating point"),
        ],
    )
    def test_wrong_logits(self, logits, message):
        with pytest.raises(ValueError, match=message):
            sum_upwards(logits, cifar10())
