"""Hierarchical accuracies, against counting by hand and sums of plain probabilities."""
import math
import random

import pytest
import torch

from timm_branches.hierarchy import Taxonomy, cifar10, consistency, full_path_accuracy, level_accuracy, sum_upwards

UNEVEN = Taxonomy(["animal/pet/cat", "animal/pet/dog", "plant", "animal/bird", "transport/sea/ship"])


@pytest.mark.parametrize("seed", range(10))
def test_accuracies_by_counting(seed):
    rng = random.Random(seed)
    rows = range(rng.randint(1, 40))
    predictions = [[rng.randrange(3) for _ in range(3)] for _ in rows]
    labels = [[rng.randrange(-1, 3) for _ in range(3)] for _ in rows]
    by_level = []
    for level in range(3):
        pairs = [(p[level], t[level]) for p, t in zip(predictions, labels, strict=True) if t[level] >= 0]
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


@pytest.mark.parametrize("metric", [level_accuracy, full_path_accuracy])
@pytest.mark.parametrize(("predictions", "labels", "message"), [
    (torch.zeros(3, 2, dtype=torch.long), torch.zeros(3, dtype=torch.long), r"\(3, 2\) and \(3,\)"),
    (torch.zeros(3, dtype=torch.long), torch.zeros(3, dtype=torch.long), r"\(N, L\)"),
    (torch.zeros(3, 2), torch.zeros(3, 2, dtype=torch.long), "take the argmax"),
    (torch.zeros(3, 2, dtype=torch.long), torch.full((3, 2), -100), "got -100"),
])
def test_wrong_arguments(metric, predictions, labels, message):
    with pytest.raises(ValueError, match=message):
        metric(predictions, labels)


def test_consistency():
    tree = cifar10()
    rows = tree.expand(range(10))
    assert consistency(rows, tree) == 1
    rows[:3, 0] = 1 - rows[:3, 0]
    assert consistency(rows, tree).item() == pytest.approx(0.7)
    shallow = torch.tensor([[1, 2, 2], [0, 2, 2]])  # plant is a leaf, animal is not
    assert consistency(shallow, UNEVEN) == 0.5


class TestSumUpwards:
    @pytest.mark.parametrize("tree", [cifar10(), UNEVEN])
    def test_against_plain_sums(self, tree):
        logits = torch.randn(2, 3, tree.num_leaves, dtype=torch.double, generator=torch.Generator().manual_seed(0))
        p = logits.softmax(-1)
        levels = sum_upwards(logits, tree)
        assert [level.shape for level in levels] == [(2, 3, n) for n in tree.num_classes]
        for depth, (level, nodes) in enumerate(zip(levels, tree.nodes, strict=True)):
            for i, node in enumerate(nodes):
                members = [j for j, leaf in enumerate(tree.leaves) if leaf[:depth + 1] == node]
                torch.testing.assert_close(level[..., i].exp(), p[..., members].sum(-1))
            torch.testing.assert_close(level.exp(), p @ tree.leaf_to_level(depth).double())

    def test_stable(self):
        logits = torch.tensor([300.0, 299.0, -300.0])
        coarse, fine = sum_upwards(logits, Taxonomy(["a/x", "b/y", "b/z"]))
        norm = 300 + math.log1p(math.exp(-1))
        assert coarse.tolist() == pytest.approx([300 - norm, 299 - norm])
        assert fine.tolist() == pytest.approx([300 - norm, 299 - norm, -300 - norm])  # exp(-600) is 0 in float32

    def test_half_precision(self):
        tree = Taxonomy([f"a/{i}" for i in range(1000)] + ["b/x"])
        logits = torch.zeros(1001)
        expected = sum_upwards(logits, tree)[0]
        result = sum_upwards(logits.bfloat16(), tree)[0]
        assert result.dtype == torch.float32
        torch.testing.assert_close(result, expected)
        assert result.exp().tolist() == pytest.approx([1000 / 1001, 1 / 1001], rel=1e-4)

    def test_gradient(self):
        logits = torch.randn(2, 5, dtype=torch.double, generator=torch.Generator().manual_seed(0), requires_grad=True)
        assert torch.autograd.gradcheck(lambda x: tuple(sum_upwards(x, UNEVEN)), logits)

    def test_masked_leaves(self):
        logits = torch.tensor([0.0, -torch.inf, 0.0, -torch.inf], requires_grad=True)
        coarse, fine = sum_upwards(logits, Taxonomy(["a/w", "b/x", "a/y", "b/z"]))
        assert coarse.tolist() == [pytest.approx(0.0, abs=1e-6), -math.inf]
        assert fine.tolist() == [pytest.approx(-math.log(2)), -math.inf, pytest.approx(-math.log(2)), -math.inf]
        (coarse[0] + fine[2]).backward()
        assert logits.grad.isfinite().all()

    @pytest.mark.parametrize(("logits", "message"), [
        (torch.zeros(2, 9), r"shape \(..., 10\), got \(2, 9\)"),
        (torch.zeros(()), r"shape \(..., 10\)"),
        (torch.zeros(2, 10, dtype=torch.long), "floating point"),
    ])
    def test_wrong_logits(self, logits, message):
        with pytest.raises(ValueError, match=message):
            sum_upwards(logits, cifar10())
