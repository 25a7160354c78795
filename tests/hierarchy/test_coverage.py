"""Risk and coverage over all thresholds, against trying each threshold on each sample."""

import math

import pytest
import torch

from timm_branches.hierarchy.calibration import information
from timm_branches.hierarchy.coverage import (
    CoverageEvaluator,
    climbing_coverage,
    leaf_coverage,
    operating_curve,
    plot_coverage,
)
from timm_branches.hierarchy.metrics import sum_upwards
from timm_branches.taxonomy import Taxonomy, cifar10

UNEVEN = Taxonomy(
    ["animal/pet/cat", "animal/pet/dog", "plant", "animal/bird", "transport/sea/ship"]
)
FLAT, ONE = Taxonomy(["a", "b", "c"]), Taxonomy(["only"])
trees = pytest.mark.parametrize(
    "tree", [cifar10(), UNEVEN, FLAT, ONE], ids=["even", "uneven", "flat", "one leaf"]
)


def case(tree, size=60, seed=0, ties=False):
    g = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(size, tree.num_leaves, generator=g, dtype=torch.double)
    if ties:
        logits = logits.round()
    leaf = torch.multinomial(logits.softmax(1), 1, generator=g)[:, 0]
    return logits.log_softmax(1), tree.expand(leaf), leaf


def nodes_of(tree):
    """Paths of all nodes, the root's is empty."""
    return [(), *(path for level in tree.nodes for path in level)]


def info(tree, path):
    below = sum(leaf[: len(path)] == path for leaf in tree.leaves)
    if tree.num_leaves == 1:
        return float(bool(path))
    return 1 - math.log(below) / math.log(tree.num_leaves)


def mass(tree, p, path):
    return sum(q for q, leaf in zip(p, tree.leaves, strict=True) if leaf[: len(path)] == path)


@trees
@pytest.mark.parametrize("ties", [False, True])
def test_climbing_by_trying(tree, ties):
    log_p, labels, leaf = case(tree, ties=ties)
    curve = climbing_coverage(log_p, labels, tree)
    assert curve.risk.diff().min() >= 0
    assert curve.information[0] == 0
    for t, kept, risk in zip(*(values.tolist() for values in curve), strict=True):
        if ((curve.thresholds - t).abs() < 1e-9).sum() > 1:
            continue  # equal but for a rounding
        said, wrong = [], []
        for p, true in zip(log_p.exp().tolist(), leaf.tolist(), strict=True):
            path = tree.leaves[max(range(len(p)), key=p.__getitem__)]
            # sums of floats in another order differ by a rounding
            while path and mass(tree, p, path) <= t + 1e-12:
                path = path[:-1]
            said.append(info(tree, path))
            wrong.append(tree.leaves[true][: len(path)] != path)
        assert kept == pytest.approx(sum(said) / len(said), abs=1e-9)
        assert risk == pytest.approx(sum(wrong) / len(wrong))


@trees
def test_leaf_or_nothing_by_trying(tree):
    log_p, labels, leaf = case(tree, ties=True)
    curve = leaf_coverage(log_p, labels, tree)
    p, guess = log_p.exp().max(1)
    for t, kept, risk in zip(*(values.tolist() for values in curve), strict=True):
        named = p > t
        assert kept == pytest.approx(named.double().mean().item())
        assert risk == pytest.approx((named & (guess != leaf)).double().mean().item())


@trees
def test_information_at(tree):
    log_p, labels, _ = case(tree, 200)
    curve = climbing_coverage(log_p, labels, tree)
    for right in (0, 0.5, 0.8, 0.95, 1):
        good = [
            k for k, r in zip(curve.information, curve.risk, strict=True) if 1 - r >= right - 1e-9
        ]
        assert curve.information_at(right) == pytest.approx(float(max(good)))


@pytest.mark.parametrize("tree", [cifar10(), UNEVEN], ids=["even", "uneven"])
def test_climbing_says_more_where_classes_near_each_other_are_mixed_up(tree):
    g = torch.Generator().manual_seed(0)
    leaf = torch.randint(tree.num_leaves, (500,), generator=g)
    noise = torch.randn(500, tree.num_leaves, generator=g, dtype=torch.double)
    log_p = (noise - 2.0 * tree.distances()[leaf]).log_softmax(1)
    labels = tree.expand(leaf)
    climbing = climbing_coverage(log_p, labels, tree)
    leaves = leaf_coverage(log_p, labels, tree)
    assert climbing.information_at(0.99) > leaves.information_at(0.99)
    assert climbing.area() < leaves.area()


@trees
@pytest.mark.parametrize("ties", [False, True])
def test_operating_curve_by_trying(tree, ties):
    log_p, labels, leaf = case(tree, 40, ties=ties)
    curve = operating_curve(log_p, labels, tree)
    nodes = nodes_of(tree)
    for at, *got in zip(*(values.tolist() for values in curve[:4]), strict=True):
        rows = []
        for p, true in zip(log_p.exp().tolist(), leaf.tolist(), strict=True):
            above = [n for n in nodes if mass(tree, p, n) > at + 1e-12 or not n]
            answer = max(above, key=lambda n: (round(info(tree, n), 9), mass(tree, p, n)))
            truth = tree.leaves[true]
            while truth[: len(answer)] != answer and answer:
                shared = [a == b for a, b in zip(truth, answer, strict=False)]
                depth = shared.index(False) if False in shared else len(shared)
                common = answer[:depth]
                break
            else:
                common = answer
            value = info(tree, answer)
            rows.append(
                (
                    info(tree, common) / value if answer else 1.0,
                    info(tree, common) / info(tree, truth),
                    float(common == answer),
                )
            )
        want = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
        if not ties:  # equally specific and equally likely nodes are a matter of choice
            assert got == pytest.approx(want, abs=1e-9)
        assert got[1] <= 1 + 1e-9
    assert 0 <= curve.average_precision <= 1 + 1e-9


def test_areas_by_hand():
    tree = Taxonomy(["a/b", "a/c", "d", "e"])
    p = torch.tensor([[0.6, 0.3, 0.05, 0.05], [0.3, 0.5, 0.1, 0.1]], dtype=torch.double)
    curve = climbing_coverage(p.log(), tree.expand([0, 0]), tree)
    # the risk is 0 up to three quarters, and 1/2 at the end
    assert curve.area() == pytest.approx(0.25 * 0.5 / 2)
    assert curve.information_at(0.95) == 0.75
    assert leaf_coverage(p.log(), tree.expand([0, 0]), tree).information_at(0.95) == 0.5


@trees
def test_evaluator(tree, tmp_path):
    log_p, labels, _ = case(tree, 100)

    def fed(rows, labels=labels):
        evaluator = CoverageEvaluator(tree, "leaf-marginal")
        for part in rows:
            evaluator.update(sum_upwards(log_p[part], tree), labels[part])
        return evaluator

    all_at_once = fed([slice(0, 100)])
    metrics = all_at_once.compute()
    assert fed([slice(0, 1), slice(1, 1), slice(1, 70), slice(70, 100)]).compute() == (
        pytest.approx(metrics)
    )
    climbing = climbing_coverage(log_p, labels, tree)
    assert metrics["information@95"] == pytest.approx(100 * climbing.information_at(0.95))
    assert metrics["leaf_risk_area"] == pytest.approx(
        100 * leaf_coverage(log_p, labels, tree).area()
    )
    unknown = labels.clone()
    unknown[50:] = -1
    assert fed([slice(0, 100)], unknown).compute() == pytest.approx(fed([slice(0, 50)]).compute())
    assert fed([]).compute() == {}
    assert plot_coverage(all_at_once.curves(), tmp_path / "coverage.png").stat().st_size > 5000


def test_information_agrees_with_that_of_answers():
    log_p, labels, _ = case(UNEVEN, 50)
    assert climbing_coverage(log_p, labels, UNEVEN).information[-1] == pytest.approx(
        information(labels, UNEVEN).mean().item()
    )


def test_refusals(tmp_path):
    log_p, labels, _ = case(UNEVEN, 10)
    with pytest.raises(ValueError, match="log-probabilities"):
        climbing_coverage(log_p[:, :3], labels, UNEVEN)
    with pytest.raises(ValueError, match="4 samples have no known leaf"):
        operating_curve(log_p, labels.where(torch.arange(10)[:, None] > 3, -1), UNEVEN)
    with pytest.raises(ValueError, match="nothing to plot"):
        plot_coverage({}, tmp_path / "a.png")
