"""Sums over the leaves below classes, of trees of many blocks of leaves, against brute force."""

import gc
import random
import weakref

import pytest
import torch

from timm_branches.hierarchy import HierarchyEvaluator, decode, sum_upwards
from timm_branches.hierarchy import ranges as module
from timm_branches.hierarchy.decode import DECODERS
from timm_branches.hierarchy.losses import hxe_loss, marginal_loss, soft_label_loss, soft_labels
from timm_branches.hierarchy.ranges import leaf_log_sums, leaf_ranges
from timm_branches.taxonomy import Taxonomy


def make_tree(leaves, seed, shuffled=True):
    """Leaves of depth 1 to 4 below 5 classes; the first class holds one leaf in two."""
    rng = random.Random(seed)
    paths = []
    for leaf in range(leaves):
        top = "0" if leaf % 2 else str(rng.randrange(1, 5))
        path = (top, f"{top}.{rng.randrange(9)}", f"{top}.{leaf % 70}", f"leaf{leaf}")
        depth = rng.choice([2, 3, 4])
        paths.append((*path[: depth - 1], f"end{leaf}"))
    if shuffled:
        rng.shuffle(paths)
    else:
        paths.sort()
    return Taxonomy(paths)


@pytest.fixture(params=[(130, True), (64, True), (700, True), (300, False)], scope="module")
def tree(request):
    leaves, shuffled = request.param
    return make_tree(leaves, 0, shuffled)


@pytest.fixture(params=[2**18, 1000], autouse=True)
def chunk(request, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", request.param)


def logits_of(kind, rows, leaves):
    torch.manual_seed(0)
    values = torch.randn(rows, leaves, dtype=torch.double)
    if kind == "large":
        return values * 3e3
    if kind == "far":  # most leaves lie e^200 and more below the top
        return values - 200 * torch.arange(leaves).remainder(3).double()
    if kind == "holes":
        return values.masked_fill(torch.rand(rows, leaves) < 0.7, -torch.inf)
    return values


def below(tree):
    """(classes of all levels, leaves): which leaves are below each class, by the paths' names."""
    rows = []
    for level, nodes in enumerate(tree.nodes):
        for node in nodes:
            rows.append([leaf[: level + 1] == node for leaf in tree.leaves])
    return torch.tensor(rows)


def brute_log_p(logits, inside):
    """Log p (N, classes) in float64."""
    log_p = logits.log_softmax(-1)[:, None].masked_fill(~inside, -torch.inf)
    return log_p.logsumexp(-1)


@pytest.mark.parametrize("kind", ["usual", "large", "far", "holes"])
def test_classes(tree, kind):
    exact = logits_of(kind, 9, tree.num_leaves)
    inside = below(tree)
    classes = torch.arange(len(inside)).expand(9, -1)
    log_p, _ = leaf_log_sums(exact.float(), classes, leaf_ranges(tree))
    expected = brute_log_p(exact.float().double(), inside)
    assert torch.equal(log_p.isinf(), expected.isinf())
    torch.testing.assert_close(log_p.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["usual", "large", "far", "holes"])
def test_gradient(tree, kind):
    rows, inside = 5, below(tree)
    exact = logits_of(kind, rows, tree.num_leaves).float().double().requires_grad_()
    given = exact.detach().float().requires_grad_()
    classes = torch.randint(len(inside), (rows, 6))
    weights = torch.rand(rows, 6, dtype=torch.double)
    log_p, _ = leaf_log_sums(given, classes, leaf_ranges(tree))
    possible = log_p > -torch.inf
    (torch.where(possible, log_p, 0) * weights.float()).sum().backward()
    if kind == "holes":  # the gradient of logsumexp is nan where a class is impossible
        sums = (exact.softmax(-1)[:, None] * inside[classes]).sum(-1)
        expected = torch.where(possible, sums, 1).log()
    else:
        expected = brute_log_p(exact, inside).gather(1, classes)
    (torch.where(possible, expected, 0) * weights).sum().backward()
    torch.testing.assert_close(given.grad.double(), exact.grad, rtol=1e-5, atol=5e-7)


def test_nothing_known_has_no_probability_and_no_gradient(tree):
    logits = torch.randn(3, tree.num_leaves, requires_grad=True)
    none = torch.full((3, 2), -1)
    log_p, _ = leaf_log_sums(logits, none, leaf_ranges(tree))
    assert (log_p == -torch.inf).all()
    torch.where(log_p > -torch.inf, log_p, 0).sum().backward()
    assert (logits.grad == 0).all()


@pytest.mark.parametrize("seed", range(3))
def test_ranges(tree, seed):
    torch.manual_seed(seed)
    tables = leaf_ranges(tree)
    exact = torch.randn(7, tree.num_leaves, dtype=torch.double, requires_grad=True)
    ends = torch.randint(tree.num_leaves + 1, (7, 11, 2)).sort(-1).values
    first, last = ends.unbind(-1)
    classes = torch.randint(sum(tree.num_classes), (7, 2))
    log_p, sums = leaf_log_sums(exact, classes, tables, first, last)
    ordered = exact.log_softmax(-1)[:, tables.order]
    place = torch.arange(tree.num_leaves)
    inside = (place >= first[..., None]) & (place < last[..., None])
    expected = (ordered[:, None] * inside).sum(-1)
    torch.testing.assert_close(sums, expected)
    weights = torch.rand_like(sums)
    both = (sums * weights).sum() + log_p.sum()
    [gradient] = torch.autograd.grad(both, exact)
    of_classes = brute_log_p(exact, below(tree)).gather(1, classes).sum()
    [wanted] = torch.autograd.grad((expected * weights).sum() + of_classes, exact)
    torch.testing.assert_close(gradient, wanted)


def test_gradcheck():
    tree = make_tree(130, 1)
    classes = torch.randint(sum(tree.num_classes), (2, 3))
    first, last = (
        torch.tensor([[0, 70, 5], [64, 3, 128]]),
        torch.tensor([[130, 71, 5], [128, 129, 130]]),
    )
    logits = torch.randn(2, 130, dtype=torch.double, requires_grad=True)

    def function(values):
        return leaf_log_sums(values, classes, leaf_ranges(tree), first, last)

    assert torch.autograd.gradcheck(function, logits)


def test_second_derivatives_are_refused():
    """They would be wrong."""
    tree = make_tree(130, 1)
    logits = torch.randn(2, 130, requires_grad=True)
    loss = marginal_loss(logits, tree.expand([3, 4]), tree)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(loss, logits, create_graph=True)


def test_tables_end_with_their_tree():
    tree = make_tree(70, 2)
    labels = tree.expand([3, 4])
    logits = [torch.randn(2, classes) for classes in tree.num_classes]
    for method in DECODERS:
        decode(logits, tree, method)
    marginal_loss(torch.randn(2, tree.num_leaves), labels, tree)
    evaluator = HierarchyEvaluator(tree.levels, tree.num_classes, tree)
    evaluator.update(dict(zip(tree.levels, logits, strict=True)), labels)
    kept = weakref.ref(tree.tables.leaf)
    del tree, evaluator
    gc.collect()
    assert kept() is None


def labels_of(tree, rows):
    """Leaves, coarse labels of every depth, and none."""
    labels = tree.expand(torch.randint(tree.num_leaves, (rows,)))
    cut = torch.randint(0, 2 * tree.num_levels, (rows,))
    return labels.masked_fill(torch.arange(tree.num_levels) >= cut[:, None], -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses(tree, dtype):
    """Of labels of all depths, against sums over the leaves one by one."""
    torch.manual_seed(0)
    labels = labels_of(tree, 40)
    assert (labels[:, 0] < 0).any()
    given = (4 * torch.randn(40, tree.num_leaves)).to(dtype)
    given[labels[:, 0] < 0] = torch.inf  # of no label, so of no account
    log_p = given.double().log_softmax(-1)
    inside = {}
    for level, nodes in enumerate(tree.nodes):
        for node in range(len(nodes)):
            inside[level, node] = inside_of(tree, level, node)
    table = soft_labels(tree, 7.0).double()
    marginal, hxe, soft = [], [], []
    for row, label in zip(log_p, labels.tolist(), strict=True):
        known = [(level, node) for level, node in enumerate(label) if node >= 0]
        if not known:
            continue
        steps = [0.0, *(row[inside[at]].logsumexp(0) for at in known)]
        marginal.append(-steps[-1])
        cost = 0.0
        for at, upper, lower in zip(known, steps[:-1], steps[1:], strict=True):
            height = int(tree.heights[at[0]][at[1]])
            cost -= torch.tensor(-0.4 * height, dtype=torch.double).exp() * (lower - upper)
        hxe.append(cost)
        own = inside[known[-1]]
        # a coarse label's distances are those of any of its leaves, and h(A) below itself
        outside = table[own][0].masked_fill(own, 0)
        heights = int(tree.heights[known[-1][0]][known[-1][1]]) / tree.num_levels
        near = torch.tensor(-7.0 * heights, dtype=torch.double).exp()
        leaf = own.nonzero()[0, 0]
        scale = table[leaf, leaf]  # exp(0) before it is divided
        unscaled = outside / scale
        total = near * own.sum() + unscaled.sum()
        cost = near * own.sum() * row[own].logsumexp(0) + (unscaled * row).sum()
        soft.append(-cost / total)
    for loss, expected in (
        (marginal_loss(given, labels, tree), marginal),
        (hxe_loss(given, labels, tree, alpha=0.4), hxe),
        (soft_label_loss(given, labels, tree, beta=7.0), soft),
    ):
        mean = torch.stack([torch.as_tensor(value) for value in expected]).mean()
        torch.testing.assert_close(loss.double(), mean, rtol=1e-6, atol=1e-6)


def inside_of(tree, level, node):
    path = tree.nodes[level][node]
    return torch.tensor([leaf[: level + 1] == path for leaf in tree.leaves])


@pytest.mark.parametrize("kind", ["usual", "large", "far", "holes"])
def test_sum_upwards(tree, kind):
    """Sums of probabilities where these are large enough, and of logarithms where they are not."""
    exact = logits_of(kind, 6, tree.num_leaves).float()
    levels = sum_upwards(exact, tree)
    expected = brute_log_p(exact.double(), below(tree)).split(list(tree.num_classes), 1)
    for level, of_level in zip(levels, expected, strict=True):
        assert torch.equal(level.isinf(), of_level.isinf())
        torch.testing.assert_close(level.double(), of_level, rtol=1e-6, atol=1e-6)


def test_sum_upwards_gradient(tree):
    given = torch.randn(4, tree.num_leaves, requires_grad=True)
    exact = given.detach().double().requires_grad_()
    weights = torch.rand(4, sum(tree.num_classes))
    (torch.cat(sum_upwards(given, tree), 1) * weights).sum().backward()
    (brute_log_p(exact, below(tree)) * weights.double()).sum().backward()
    torch.testing.assert_close(given.grad.double(), exact.grad, rtol=1e-5, atol=1e-5)
