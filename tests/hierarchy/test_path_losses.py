"""Losses of whole paths, against loops over samples, classes and leaves in plain Python."""

import math

import pytest
import torch

from timm_branches.hierarchy.decode import decode, path_sum_scores
from timm_branches.hierarchy.losses import marginal_loss
from timm_branches.hierarchy.path_losses import (
    ancestor_cross_entropy,
    masked_fixmatch_loss,
    parameter_sharing_loss,
    soft_margin_loss,
)
from timm_branches.taxonomy import Taxonomy, cifar10

UNEVEN = Taxonomy(
    ["animal/pet/cat", "animal/pet/dog", "plant", "animal/bird", "transport/sea/ship"]
)
FLAT = Taxonomy(["a", "b", "c"])
trees = pytest.mark.parametrize("tree", [cifar10(), UNEVEN, FLAT], ids=["even", "uneven", "flat"])


def draw(tree, size=12, seed=0):
    """Logits of leaves and levels, and labels some of which are coarse or unknown."""
    g = torch.Generator().manual_seed(seed)
    leaf_logits = torch.randn(size, tree.num_leaves, generator=g, dtype=torch.double)
    levels = [torch.randn(size, k, generator=g, dtype=torch.double) for k in tree.num_classes]
    labels = tree.expand(torch.randint(tree.num_leaves, (size,), generator=g))
    known = torch.randint(tree.num_levels + 1, (size,), generator=g)
    known[: size // 2] = tree.num_levels
    labels = labels.masked_fill(torch.arange(tree.num_levels) >= known[:, None], -1)
    return leaf_logits, levels, labels


def path_of(tree, row):
    known = [i for i in row.tolist() if i >= 0]
    return tree.nodes[len(known) - 1][known[-1]] if known else ()


def mass(tree, p, path):
    return sum(q for q, leaf in zip(p, tree.leaves, strict=True) if leaf[: len(path)] == path)


def mean(values):
    return sum(values) / len(values) if values else 0.0


def height(tree, path):
    """Steps down to the deepest leaf; the root's is the number of levels."""
    if not path:
        return tree.num_levels
    return max(len(leaf) for leaf in tree.leaves if leaf[: len(path)] == path) - len(path)


def path_scores(tree, levels, i):
    scores = []
    for leaf in tree.leaves:
        nodes = [leaf[: k + 1] for k in range(len(leaf))]
        scores.append(
            sum(float(levels[k][i, tree.nodes[k].index(node)]) for k, node in enumerate(nodes))
        )
    return scores


@trees
@pytest.mark.parametrize("smoothing", [0.0, 0.3, 0.9])
def test_ancestors(tree, smoothing):
    logits, _, labels = draw(tree)
    losses = []
    for row, label in zip(logits, labels, strict=True):
        path, p = path_of(tree, label), row.softmax(0).tolist()
        if not path:
            continue
        steps = [-math.log(mass(tree, p, path[:k])) for k in range(1, len(path) + 1)]
        above, own = steps[:-1], steps[-1]
        losses.append((1 - smoothing) * own + smoothing * mean(above) if above else own)
    got = ancestor_cross_entropy(logits, labels, tree, smoothing)
    assert got.item() == pytest.approx(mean(losses))
    if not smoothing:
        assert got.item() == pytest.approx(marginal_loss(logits, labels, tree).item())


@trees
@pytest.mark.parametrize("margin", [0.0, 1.0, 3.5])
def test_soft_margin(tree, margin):
    _, levels, labels = draw(tree)
    losses = []
    for i, label in enumerate(labels):
        path = path_of(tree, label)
        if not path:
            continue
        below, total = 0.0, 0.0
        for leaf, z in zip(tree.leaves, path_scores(tree, levels, i), strict=True):
            common = 0
            while common < min(len(leaf), len(path)) and leaf[common] == path[common]:
                common += 1
            distance = 0.0
            if common < len(path):
                distance = height(tree, leaf[:common]) / tree.num_levels
            else:
                below += math.exp(z)
            total += math.exp(z + margin * distance)
        losses.append(math.log(total) - math.log(below))
    got = soft_margin_loss(levels, labels, tree, margin)
    assert got.item() == pytest.approx(mean(losses))
    if not margin:
        assert got.item() == pytest.approx(parameter_sharing_loss(levels, labels, tree).item())


@trees
def test_parameter_sharing(tree):
    _, levels, labels = draw(tree)
    scores = path_sum_scores(levels, tree)
    for i in range(len(labels)):
        assert scores[i].tolist() == pytest.approx(path_scores(tree, levels, i))
    got = parameter_sharing_loss(dict(zip(tree.levels, levels, strict=True)), labels, tree)
    assert got.item() == pytest.approx(marginal_loss(scores, labels, tree).item())
    answers = decode(levels, tree, "path-sum")
    assert torch.equal(answers.labels, tree.expand(scores.argmax(1)))
    p = scores.softmax(1)
    for i, row in enumerate(answers.labels):
        path = path_of(tree, row)
        want = [mass(tree, p[i].tolist(), path[:k]) for k in range(1, len(path) + 1)]
        assert answers.probabilities[i, : len(path)].tolist() == pytest.approx(want)
    if tree is not UNEVEN:  # where all paths are as long it is the product of the levels' softmax
        torch.testing.assert_close(decode(levels, tree, "best-path"), answers)


@trees
@pytest.mark.parametrize("threshold", [0.0, 0.6, 1.0])
def test_masked_fixmatch(tree, threshold):
    weak, _, labels = draw(tree, 40)
    strong, _, _ = draw(tree, 40, seed=1)
    losses = []
    for w, s, label in zip(weak, strong, labels, strict=True):
        path = path_of(tree, label)
        below = [k for k, leaf in enumerate(tree.leaves) if leaf[: len(path)] == path]
        if not path or len(below) == 1:
            continue
        p = w[below].softmax(0)
        guess = below[int(p.argmax())]
        sure = p.max() >= threshold
        losses.append(-s.log_softmax(0)[guess].item() if sure else 0.0)
    weak.requires_grad_()
    got = masked_fixmatch_loss(weak, strong, labels, tree, threshold)
    assert got.item() == pytest.approx(mean(losses))
    assert not got.requires_grad
    strong.requires_grad_()
    masked_fixmatch_loss(weak, strong, labels, tree, threshold).backward()
    assert weak.grad is None
    known = (labels >= 0).all(1)
    assert (strong.grad[known] == 0).all()


LOSSES = [ancestor_cross_entropy, parameter_sharing_loss, soft_margin_loss]


@trees
@pytest.mark.parametrize("loss", LOSSES)
def test_gradients(tree, loss):
    leaf_logits, levels, labels = draw(tree, 5)
    if loss is ancestor_cross_entropy:
        leaf_logits.requires_grad_()
        assert torch.autograd.gradcheck(lambda x: loss(x, labels, tree), leaf_logits)
    else:
        levels = [level.requires_grad_() for level in levels]
        assert torch.autograd.gradcheck(lambda *x: loss(list(x), labels, tree), levels)


@trees
@pytest.mark.parametrize("loss", LOSSES)
def test_odd_input(tree, loss):
    leaf_logits, levels, labels = draw(tree)
    logits = leaf_logits if loss is ancestor_cross_entropy else levels

    def cast(dtype, rows=slice(None)):
        if loss is ancestor_cross_entropy:
            return logits.to(dtype)[rows]
        return [level.to(dtype)[rows] for level in logits]

    want = loss(logits, labels, tree)
    assert loss(cast(torch.bfloat16), labels, tree).dtype == torch.float32
    assert loss(cast(torch.bfloat16), labels, tree).item() == pytest.approx(want.item(), abs=0.05)
    assert loss(cast(torch.double, slice(0)), labels[:0], tree).item() == 0
    # what has no label costs nothing, whatever its logits are
    wild = cast(torch.double)
    unlabelled = labels.clone()
    unlabelled[0] = -1
    before = loss(wild, unlabelled, tree)
    for values in [wild] if loss is ancestor_cross_entropy else wild:
        values[0] = torch.inf
    assert loss(wild, unlabelled, tree).item() == pytest.approx(before.item())
    with pytest.raises(ValueError, match="labels must be integers of shape"):
        loss(logits, labels[:3], tree)


def test_refusals():
    leaf_logits, levels, labels = draw(UNEVEN)
    with pytest.raises(ValueError, match=r"smoothing must be in \[0, 1\)"):
        ancestor_cross_entropy(leaf_logits, labels, UNEVEN, smoothing=1)
    for margin in (-1, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="margin must be"):
            soft_margin_loss(levels, labels, UNEVEN, margin)
    with pytest.raises(ValueError, match="threshold must be"):
        masked_fixmatch_loss(leaf_logits, leaf_logits, labels, UNEVEN, threshold=2)
    with pytest.raises(ValueError, match="Both views"):
        masked_fixmatch_loss(leaf_logits, leaf_logits[:3], labels, UNEVEN)


def test_odd_input_of_fixmatch():
    weak, _, labels = draw(UNEVEN, 40)
    strong, _, _ = draw(UNEVEN, 40, seed=1)
    coarse = (labels >= 0).any(1) & (labels < 0).any(1)
    assert coarse.any()
    want = masked_fixmatch_loss(weak, strong, labels, UNEVEN, 0.5)
    half = masked_fixmatch_loss(weak, strong.bfloat16(), labels, UNEVEN, 0.5)
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(want.item(), abs=0.05)
    assert masked_fixmatch_loss(weak[:0], strong[:0], labels[:0], UNEVEN).item() == 0
    # what has no label costs nothing, whatever its logits are
    unknown = (labels < 0).all(1)
    assert unknown.any()
    wild = strong.masked_fill(unknown[:, None], torch.inf)
    assert masked_fixmatch_loss(weak, wild, labels, UNEVEN, 0.5).item() == pytest.approx(
        want.item()
    )
    assert torch.autograd.gradcheck(
        lambda x: masked_fixmatch_loss(weak, x, labels, UNEVEN, 0.5), strong.requires_grad_()
    )
