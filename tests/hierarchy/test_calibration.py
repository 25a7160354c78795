"""Temperature and threshold, on synthetic data whose true distribution is known."""

import math

import pytest
import torch

from timm_branches.hierarchy.calibration import (
    climb,
    fit_temperature,
    fit_threshold,
    tight_thresholds,
)
from timm_branches.hierarchy.decode import Prediction, decode
from timm_branches.hierarchy.metrics import sum_upwards
from timm_branches.taxonomy import Taxonomy, cifar10

UNEVEN = Taxonomy(
    ["animal/pet/cat", "animal/pet/dog", "plant", "animal/bird", "transport/sea/ship"]
)
trees = pytest.mark.parametrize("tree", [cifar10(), UNEVEN], ids=["even", "uneven"])


def synthetic(tree, size, scale=1.0, seed=0):
    """Leaf logits, and labels drawn from their softmax; the logits are then scaled."""
    g = torch.Generator().manual_seed(seed)
    logits = 2.5 * torch.randn(size, tree.num_leaves, generator=g, dtype=torch.double)
    leaf = torch.multinomial(logits.softmax(1), 1, generator=g)[:, 0]
    return logits * scale, tree.expand(leaf)


def right(answers, labels):
    """No answer is not wrong."""
    return ((answers.labels == labels) | (answers.labels < 0)).all(1)


@trees
@pytest.mark.parametrize("scale", [0.25, 1, 3])
def test_temperature_undoes_a_scale(tree, scale):
    logits, labels = synthetic(tree, 20_000, scale)
    assert fit_temperature(logits, labels, tree) == pytest.approx(scale, rel=0.05)


def test_temperature_is_the_best_of_a_grid():
    logits, labels = synthetic(UNEVEN, 300, 2.0)
    leaf = (labels[:, None] == UNEVEN.leaf_table).all(-1).long().argmax(1)

    def cross_entropy(temperature):
        return torch.nn.functional.cross_entropy(logits / temperature, leaf).item()

    best = fit_temperature(logits, labels, UNEVEN)
    grid = [best * 1.01**k for k in (-40, -3, -1, 1, 3, 40)]
    assert all(cross_entropy(best) < cross_entropy(temperature) for temperature in grid)


@trees
@pytest.mark.parametrize("target", [0.8, 0.9, 0.95])
def test_the_promise_is_kept_over_random_splits(tree, target):
    """Logits too sure of themselves: the promise does not rest on their calibration."""
    logits, labels = synthetic(tree, 1200, scale=1.7)
    said = decode(sum_upwards(logits, tree), tree, "leaf-marginal")
    assert right(said, labels).double().mean() < 0.8
    shares = []
    for seed in range(200):
        order = torch.randperm(1200, generator=torch.Generator().manual_seed(seed))
        fit, test = order[:400], order[400:]
        part = Prediction(said.labels[fit], said.probabilities[fit])
        threshold = fit_threshold(part, labels[fit], tree, target)
        answers = climb(Prediction(said.labels[test], said.probabilities[test]), threshold)
        shares.append(right(answers, labels[test]).double().mean().item())
    mean = sum(shares) / len(shares)
    # 200 means of splits of the same samples have a standard error of about 0.1 points
    assert target - 0.003 < mean < target + 0.015


@trees
def test_tight_thresholds_by_trying(tree):
    """The answer is right at its tight threshold and wrong just below it."""
    logits, labels = synthetic(tree, 200)
    said = decode(sum_upwards(logits, tree), tree, "leaf-marginal")
    thresholds = tight_thresholds(said, labels, tree)
    for i, threshold in enumerate(thresholds.tolist()):
        one = Prediction(said.labels[i : i + 1], said.probabilities[i : i + 1])
        assert right(climb(one, threshold), labels[i : i + 1])
        if threshold > 0:
            below = math.nextafter(threshold, 0)
            assert not right(climb(one, below), labels[i : i + 1])
        else:
            assert right(one, labels[i : i + 1])


def test_rank_by_hand():
    """Nine mistakes of known probabilities: at 10 samples' worth the 9th is 90 percent."""
    tree = Taxonomy(["a", "b"])
    probabilities = torch.arange(51, 60, dtype=torch.double)[:, None] / 100
    said = Prediction(torch.zeros(9, 1, dtype=torch.long), probabilities)
    labels = torch.ones(9, 1, dtype=torch.long)
    for target, want in ((0.1, 0.51), (0.5, 0.55), (0.51, 0.56), (0.8, 0.58), (0.9, 0.59)):
        assert fit_threshold(said, labels, tree, target) == want


def test_too_few_samples(caplog):
    logits, labels = synthetic(UNEVEN, 18)
    said = decode(sum_upwards(logits, UNEVEN), UNEVEN, "leaf-marginal")
    threshold = fit_threshold(said, labels, UNEVEN, 0.95)
    assert threshold == math.inf
    assert "18 samples are too few to promise 95 % right answers" in caplog.text
    assert "at least 19" in caplog.text
    assert (climb(said, threshold).labels == -1).all()
    logits, labels = synthetic(UNEVEN, 19)
    said = decode(sum_upwards(logits, UNEVEN), UNEVEN, "leaf-marginal")
    assert fit_threshold(said, labels, UNEVEN, 0.95) <= 1


def test_what_is_refused():
    logits, labels = synthetic(UNEVEN, 5)
    said = decode(sum_upwards(logits, UNEVEN), UNEVEN, "leaf-marginal")
    with pytest.raises(ValueError, match="between 0 and 1, such as 0.95, got 95"):
        fit_threshold(said, labels, UNEVEN, 95)
    coarse = labels.clone()
    coarse[0] = torch.tensor([0, -1, -1])
    with pytest.raises(ValueError, match="1 of 5 have none"):
        fit_threshold(said, coarse, UNEVEN, 0.9)
    rising = Prediction(said.labels, said.probabilities.flip(1))
    with pytest.raises(ValueError, match="must not rise on the way down"):
        fit_threshold(rising, labels, UNEVEN, 0.9)
    with pytest.raises(ValueError, match=r"\(5, 3\) and \(5, 2\)"):
        tight_thresholds(said, labels[:, :2], UNEVEN)
    with pytest.raises(ValueError, match="No sample has a known label"):
        fit_temperature(logits, torch.full_like(labels, -1), UNEVEN)
    with pytest.raises(ValueError, match="must be finite"):
        fit_temperature(logits * math.nan, labels, UNEVEN)
