"""Trees that are legal and unusual: one class on a level, seven levels, uneven depth, one leaf.

A level above all that has one class changes no answer: the oracle is the same tree without it.
"""

import math

import pytest
import torch

from timm_branches.hierarchy import class_weights, sum_upwards
from timm_branches.hierarchy.decode import DECODERS, decode, leaf_log_probs
from timm_branches.hierarchy.depth import back_off, depth_accuracy_curve
from timm_branches.hierarchy.evaluator import HierarchyEvaluator
from timm_branches.hierarchy.losses import (
    consistency_loss,
    hxe_loss,
    level_cross_entropy,
    marginal_loss,
    soft_label_loss,
    tree_path_kl,
)
from timm_branches.hierarchy.plots import plot_taxonomy
from timm_branches.taxonomy import Taxonomy

RANKS = ["kingdom", "phylum", "class", "order", "family", "genus", "species"]
SHORT = Taxonomy(["Aves/robin", "Aves/wren", "Mammalia/cat", "Mammalia/dog", "Mammalia/fox"])
KINGDOM = Taxonomy([("Animalia", *leaf) for leaf in SHORT.leaves])
# the middle level has one class below each of its parents
THIN = Taxonomy(["a/x/1", "a/x/2", "b/y/3"])
SEVEN = Taxonomy(
    [
        f"Animalia/Chordata/Aves/{o}/{o}{f}/{o}{f}{g}/{s}"
        for o in "PQ"
        for f in "ab"
        for g in "mn"
        for s in (f"{o}{f}{g}1", f"{o}{f}{g}2")
    ],
    levels=RANKS,
)
UNEVEN_SEVEN = Taxonomy(["A/B/C/D/E/F/G", "A/B/C/D/E/F/H", "A/B/I", "A/B/C/J", "A/B/C/D/K/L"])
TREES = {
    "kingdom": KINGDOM,
    "thin": THIN,
    "seven": SEVEN,
    "uneven seven": UNEVEN_SEVEN,
    "one leaf": Taxonomy(["Life/Animalia/cat"]),
    "one class": Taxonomy(["cat"]),
}
trees = pytest.mark.parametrize("tree", TREES.values(), ids=TREES)


def random_case(tree, size=12):
    g = torch.Generator().manual_seed(0)
    labels = tree.expand(torch.randint(tree.num_leaves, (size,), generator=g))
    logits = [2 * torch.randn(size, k, generator=g, dtype=torch.double) for k in tree.num_classes]
    return logits, labels


@pytest.mark.parametrize("method", DECODERS)
def test_a_kingdom_changes_no_answer(method):
    logits, labels = random_case(KINGDOM)
    got, want = decode(logits, KINGDOM, method), decode(logits[1:], SHORT, method)
    assert torch.equal(got.labels[:, 1:], want.labels)
    assert got.labels[:, 0].eq(0).all()
    torch.testing.assert_close(got.probabilities[:, 0], torch.ones(12, dtype=torch.double))
    if method != "best-path":  # whose probabilities are normalised powers of the depth
        torch.testing.assert_close(got.probabilities[:, 1:], want.probabilities)
    evaluators = []
    for tree, rows in ((KINGDOM, logits), (SHORT, logits[1:])):
        names = tree.levels if tree is SHORT else ("kingdom", *SHORT.levels)
        evaluator = HierarchyEvaluator(names, tree.num_classes, tree, decoder=method)
        evaluator.update(dict(zip(names, rows, strict=True)), labels[:, -len(rows) :])
        evaluators.append(evaluator.compute())
    got, want = evaluators
    assert got["kingdom_top1"] == 100
    assert got["kingdom_ece"] == pytest.approx(0, abs=1e-9)
    for name in ("level1_top1", "level2_top1", "full_path", "consistency", "distance", "severity"):
        assert got[name] == pytest.approx(want[name]), name
    # the kingdom costs nothing: the same sum over one level more
    assert got["loss"] * 3 == pytest.approx(want["loss"] * 2)


def test_a_level_of_one_class_costs_nothing():
    logits = torch.tensor([[3.0], [-40.0]], requires_grad=True)
    for settings in ({}, {"label_smoothing": 0.3}, {"class_weights": torch.tensor([2.0])}):
        loss = level_cross_entropy(logits, torch.tensor([0, -1]), **settings)
        assert loss.item() == 0
        assert torch.autograd.grad(loss, logits)[0].tolist() == [[0], [0]]


def test_losses_below_a_kingdom():
    """Leaf losses see the leaves alone; HXE's step to the kingdom is certain and free."""
    logits, labels = random_case(KINGDOM)
    leaves = logits[-1]
    for loss in (marginal_loss, hxe_loss):
        got, want = loss(leaves, labels, KINGDOM), loss(leaves, labels[:, 1:], SHORT)
        assert got.item() == pytest.approx(want.item())
    # distances are divided by the height of the tree: 3 levels instead of 2
    got = soft_label_loss(leaves, labels, KINGDOM, beta=6)
    assert got.item() == pytest.approx(soft_label_loss(leaves, labels[:, 1:], SHORT, beta=4).item())
    # the kingdom agrees with whatever the classes say: one level pair more, which costs nothing
    got, want = consistency_loss(logits, KINGDOM), consistency_loss(logits[1:], SHORT)
    assert got.item() * 2 == pytest.approx(want.item())
    both = torch.cat(logits, 1).log_softmax(1)  # one softmax over all levels
    columns = torch.tensor([0, 1, 3]) + labels
    want = (-math.log(3) - both.gather(1, columns).mean(1)).mean()
    assert tree_path_kl(logits, labels, KINGDOM).item() == pytest.approx(want.item())


@trees
@pytest.mark.parametrize("method", DECODERS)
def test_every_decoder_and_metric(tree, method):
    logits, labels = random_case(tree)
    prediction = decode(logits, tree, method)
    if method != "independent":
        assert tree.valid_paths(prediction.labels).all()
        assert (prediction.labels >= 0).any(1).all()
    # a node that all leaves are below is certain
    certain = torch.tensor([k == 1 for k in tree.num_classes])
    shallowest = int((tree.leaf_table >= 0).sum(1).min())
    certain[shallowest:] = False
    sure = prediction.probabilities[:, certain]
    torch.testing.assert_close(sure, torch.ones_like(sure))
    evaluator = HierarchyEvaluator(tree.levels, tree.num_classes, tree, decoder=method)
    evaluator.update(dict(zip(tree.levels, logits, strict=True)), labels)
    metrics = evaluator.compute()
    nans = {name for name, value in metrics.items() if math.isnan(value)}
    allowed = {"severity"} if metrics["distance"] == 0 else set()
    for depth, level in enumerate(tree.levels):
        if not ((prediction.labels[:, depth] >= 0) & (labels[:, depth] >= 0)).any():
            allowed.add(f"{level}_ece")  # nobody who has a label there is answered there
    assert nans == allowed
    assert len(evaluator.class_report()) == sum(tree.num_classes)
    curve = depth_accuracy_curve(prediction, labels)
    assert curve.shares.sum(1).allclose(torch.ones(101, dtype=torch.double))
    assert torch.equal(back_off(prediction, 0).labels, prediction.labels)


@trees
def test_every_loss(tree):
    logits, labels = random_case(tree)
    leaves = leaf_log_probs(logits, tree)
    torch.testing.assert_close(leaves.exp().sum(1), torch.ones(12, dtype=torch.double))
    torch.testing.assert_close(leaf_log_probs(sum_upwards(leaves, tree), tree), leaves)
    leaf = (labels[:, None] == tree.leaf_table).all(-1).long().argmax(1)
    want = -leaves[torch.arange(12), leaf].mean().item()
    for loss, settings in (
        (marginal_loss, {}),
        (hxe_loss, {"alpha": 0}),
        (soft_label_loss, {"beta": 500.0}),
    ):
        assert loss(leaves, labels, tree, **settings).item() == pytest.approx(want, abs=1e-9)
    assert tree_path_kl(logits, labels, tree).isfinite()
    if tree.num_levels > 1:
        assert consistency_loss(sum_upwards(leaves, tree), tree).item() == pytest.approx(
            0, abs=1e-9
        )


@trees
def test_weights_and_pictures(tree, tmp_path):
    weights = class_weights(tree.leaf_table, tree)
    assert [len(weights[level]) for level in tree.levels] == list(tree.num_classes)
    for level, k in zip(tree.levels, tree.num_classes, strict=True):
        if k == 1:
            assert weights[level].tolist() == [1]
    values = [torch.rand(k) for k in tree.num_classes]
    assert plot_taxonomy(tree, tmp_path / "a.png", values, tree.expand(0)).exists()
