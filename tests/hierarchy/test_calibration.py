"""Temperature and threshold, on synthetic data whose true distribution is known."""

import math

import pytest
import torch

from timm_branches.hierarchy.calibration import (
    _slope_of_cross_entropy,
    _slope_of_marginal,
    climb,
    fit_calibration,
    fit_temperature,
    fit_threshold,
    information,
    labels_to_leaves,
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


@trees
def test_temperature_of_leaves_in_closed_form(tree):
    """It is that of the marginal loss, which is taken where a label is coarse."""
    logits, labels = synthetic(tree, 400, 1.4)
    leaves = labels_to_leaves(labels, tree)
    for guess in (-1.0, 0.0, 0.7):
        closed = _slope_of_cross_entropy(logits, leaves)(guess)
        # by 1 / T, and by its logarithm
        marginal = _slope_of_marginal(logits, labels, tree)(guess) / math.exp(guess)
        assert closed.item() == pytest.approx(marginal.item())


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


def in_levels(logits, tree):
    return sum_upwards(logits, tree)


class TestPromises:
    """Over random splits: the mean of what is right is the target's, not less."""

    @staticmethod
    def shares(tree, measure, splits=60, **options):
        """`measure` of the answers to each split's other half: shares that are not wrong."""
        logits, labels = synthetic(tree, 3000, scale=1.7)
        found = []
        for seed in range(splits):
            order = torch.randperm(3000, generator=torch.Generator().manual_seed(seed))
            fit, test = order[:600], order[600:]
            levels = in_levels(logits[fit], tree)
            calibration = fit_calibration(
                levels, labels[fit], tree, decoder="leaf-marginal", **options
            )
            answers = calibration.answer(in_levels(logits[test], tree), tree)
            found.append(measure(answers, labels[test]))
        return torch.tensor(found).mean(0)

    @trees
    @pytest.mark.parametrize("target", [0.8, 0.95])
    def test_whole_answers(self, tree, target):
        def measure(answers, labels):
            return right(answers.prediction, labels).double().mean().item()

        mean = self.shares(tree, measure, target=target)
        assert target - 0.004 < mean < target + 0.015

    @trees
    def test_each_level(self, tree):
        targets = dict(zip(tree.levels, (0.99, 0.9, 0.8), strict=True))

        def measure(answers, labels):
            predicted = answers.prediction.labels
            wrong = (predicted != labels) & (predicted >= 0)
            return (1 - wrong.double().mean(0)).tolist()

        means = self.shares(tree, measure, target=targets)
        for mean, target in zip(means.tolist(), targets.values(), strict=True):
            # the levels above may hold an answer back, so that more is right than was asked
            assert target - 0.004 < mean

    @trees
    def test_each_class(self, tree):
        """A single threshold for all keeps the promise for some classes alone."""
        level = tree.levels[0]

        def measure(answers, labels):
            of_class = answers.whole.labels[:, 0]
            good = right(answers.prediction, labels).double()
            return [good[of_class == k].mean().item() for k in range(tree.num_classes[0])]

        means = self.shares(tree, measure, target=0.85, by=level)
        assert (means > 0.85 - 0.01).all()
        assert (means < 0.85 + 0.03).all()


@trees
def test_information(tree):
    for leaf, path in enumerate(tree.leaves):
        row = tree.expand(leaf)
        for depth in range(len(path) + 1):
            labels = row.masked_fill(torch.arange(len(row)) >= depth, -1)[None]
            below = sum(other[:depth] == path[:depth] for other in tree.leaves)
            want = 1 - math.log(below) / math.log(tree.num_leaves)
            assert information(labels, tree).item() == pytest.approx(want)
    assert information(torch.zeros(2, 1, dtype=torch.long), Taxonomy(["one"])).tolist() == [1, 1]


def test_ties_keep_the_promise():
    """All samples alike: either all are answered or none."""
    tree = Taxonomy(["a/b", "a/c", "d"])
    logits = torch.tensor([[2.0, 1.0, 0.0]], dtype=torch.double).expand(100, 3)
    labels = tree.expand(torch.tensor([0] * 70 + [1] * 20 + [2] * 10))
    levels = in_levels(logits, tree)
    for target, depth in ((0.6, 2), (0.85, 1), (0.95, 0)):
        found = fit_calibration(levels, labels, tree, target, decoder="leaf-marginal")
        answers = found.answer(levels, tree).prediction.labels
        assert ((answers >= 0).sum(1) == depth).all()
        assert found.right >= target


def test_certainty_beyond_float32():
    """Probabilities that float32 rounds to 1 are still told apart."""
    tree = Taxonomy(["a", "b"])
    margin = torch.linspace(20, 60, 100)
    logits = [torch.stack([margin, torch.zeros(100)], 1)]
    labels = (margin < 30).long()[:, None]
    found = fit_calibration(logits, labels, tree, 0.9, decoder="leaf-marginal")
    answers = found.answer(logits, tree).prediction.labels[:, 0]
    assert 0.1 < (answers >= 0).double().mean() < 1


def test_samples_without_a_leaf(caplog):
    logits, labels = synthetic(UNEVEN, 300)
    levels = in_levels(logits, UNEVEN)
    coarse = labels.clone()
    coarse[:50, 1:] = -1
    known = (coarse == labels).all(1)
    found = fit_calibration(levels, coarse, UNEVEN, 0.9, decoder="leaf-marginal")
    assert found.count == known.sum()
    assert "samples have no known leaf and are left out" in caplog.text
    with pytest.raises(ValueError, match="No sample has a known leaf"):
        fit_calibration(levels, torch.full_like(labels, -1), UNEVEN, 0.9)
    with pytest.raises(ValueError, match="300 rows of logits and 5 of labels"):
        fit_calibration(levels, labels[:5], UNEVEN, 0.9)


def test_absent_leaves(caplog):
    logits, labels = synthetic(UNEVEN, 300)
    keep = labels[:, 0] != 0
    levels = [level[keep] for level in in_levels(logits, UNEVEN)]
    found = fit_calibration(levels, labels[keep], UNEVEN, 0.9, decoder="leaf-marginal")
    assert found.absent == ("animal/pet/cat", "animal/pet/dog", "animal/bird")
    assert "3 of 5 leaves have no sample" in caplog.text
    caplog.clear()
    fit_calibration(levels, labels[keep], UNEVEN, 0.99, "level2", decoder="leaf-marginal")
    assert "answered by too few samples to promise 99 %" in caplog.text
