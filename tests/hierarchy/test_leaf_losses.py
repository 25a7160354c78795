"""Losses of one head of leaves, against sums in plain Python that follow the papers' equations."""

import math

import pytest
import torch
import torch.nn.functional as F

from tests.hierarchy.labelled import SINGLE, TREES, UNEVEN, case, mean_of_known
from timm_branches.hierarchy.losses import hxe_loss, marginal_loss, soft_label_loss, soft_labels
from timm_branches.taxonomy import Taxonomy, cifar10

LEAF_LOSSES = [marginal_loss, hxe_loss, soft_label_loss]


def p_of(tree, p, path):
    return sum(p[i] for i, leaf in enumerate(tree.leaves) if leaf[: len(path)] == path)


def height(tree, path):
    return max(len(leaf) for leaf in tree.leaves if leaf[: len(path)] == path) - len(path)


def lca(a, b):
    shared = 0
    while shared < min(len(a), len(b)) and a[shared] == b[shared]:
        shared += 1
    return a[:shared]


def plain_marginal(tree, p, path):
    return -math.log(p_of(tree, p, path))


def plain_hxe(tree, p, path, alpha):
    cost = 0
    for end in range(1, len(path) + 1):
        above = p_of(tree, p, path[: end - 1])  # 1 for the empty path
        cost -= math.exp(-alpha * height(tree, path[:end])) * math.log(
            p_of(tree, p, path[:end]) / above
        )
    return cost


def plain_soft(tree, p, path, beta):
    y = [math.exp(-beta * height(tree, lca(path, leaf)) / tree.num_levels) for leaf in tree.leaves]
    y = [value / sum(y) for value in y]
    below = [leaf[: len(path)] == path for leaf in tree.leaves]
    cost = -sum(value for value, inside in zip(y, below, strict=True) if inside) * math.log(
        p_of(tree, p, path)
    )
    return cost - sum(
        v * math.log(q) for v, q, inside in zip(y, p, below, strict=True) if not inside
    )


class TestLeafLosses:
    """The losses of one head of leaves."""

    @pytest.mark.parametrize("tree", TREES, ids=range(len(TREES)))
    @pytest.mark.parametrize(
        ("loss", "plain", "more"),
        [
            (marginal_loss, plain_marginal, ()),
            (hxe_loss, plain_hxe, (0.1,)),
            (hxe_loss, plain_hxe, (2.0,)),
            (soft_label_loss, plain_soft, (0.0,)),
            (soft_label_loss, plain_soft, (10.0,)),
        ],
    )
    def test_the_equation(self, tree, loss, plain, more):
        labels, paths, generator = case(tree)
        logits = 3 * torch.randn(
            len(labels), tree.num_leaves, dtype=torch.double, generator=generator
        )
        p = logits.softmax(1).tolist()
        expected = mean_of_known(
            [
                0 if path is None else plain(tree, q, path, *more)
                for q, path in zip(p, paths, strict=True)
            ],
            paths,
        )
        assert loss(logits, labels, tree, *more).item() == pytest.approx(
            expected, rel=1e-9, abs=1e-12
        )

    @pytest.mark.parametrize("tree", TREES, ids=range(len(TREES)))
    @pytest.mark.parametrize(
        ("loss", "more"), [(marginal_loss, ()), (hxe_loss, (0.0,)), (soft_label_loss, (2000.0,))]
    )
    def test_leaf_labels_give_cross_entropy(self, tree, loss, more):
        leaf = torch.arange(20) % tree.num_leaves
        logits = torch.randn(
            20, tree.num_leaves, generator=torch.Generator().manual_seed(0), requires_grad=True
        )
        result = loss(logits, tree.expand(leaf), tree, *more)
        expected = F.cross_entropy(logits, leaf)
        torch.testing.assert_close(result, expected)
        torch.testing.assert_close(*(torch.autograd.grad(y, logits)[0] for y in (result, expected)))

    @pytest.mark.parametrize(("loss", "more"), [(hxe_loss, (0.0,)), (soft_label_loss, (5000.0,))])
    def test_coarse_labels_give_the_marginal(self, loss, more):
        labels, _, generator = case(UNEVEN, batch=40)
        logits = torch.randn(40, 5, generator=generator)
        torch.testing.assert_close(
            loss(logits, labels, UNEVEN, *more), marginal_loss(logits, labels, UNEVEN)
        )

    def test_beta_0_is_label_smoothing_of_1(self):
        tree, leaf = cifar10(), torch.arange(10)
        logits = torch.randn(10, 10, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(
            soft_label_loss(logits, tree.expand(leaf), tree, beta=0),
            F.cross_entropy(logits, leaf, label_smoothing=1.0),
        )

    def test_soft_label_loss_is_cross_entropy_with_the_table(self):
        tree = TREES[5]
        leaf = torch.arange(tree.num_leaves)
        logits = torch.randn(len(leaf), len(leaf), generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(
            soft_label_loss(logits, tree.expand(leaf), tree, beta=4),
            F.cross_entropy(logits, soft_labels(tree, beta=4)),
        )

    @pytest.mark.parametrize("tree", TREES, ids=range(len(TREES)))
    def test_soft_labels(self, tree):
        table = soft_labels(tree, beta=3)
        for i, a in enumerate(tree.leaves):
            row = [math.exp(-3 * height(tree, lca(a, b)) / tree.num_levels) for b in tree.leaves]
            assert table[i].tolist() == pytest.approx([y / sum(row) for y in row])

    def test_soft_labels_of_equal_depth_by_lca_height(self):
        tree = cifar10()  # distances 0, 1/3, 2/3, 1
        distance = tree.lca_height(tree.leaf_table[:, None], tree.leaf_table[None]) / 3
        torch.testing.assert_close(soft_labels(tree, beta=7), (-7 * distance).softmax(1))

    @pytest.mark.parametrize("loss", LEAF_LOSSES)
    def test_a_gap_is_filled_in(self, loss):
        full = UNEVEN.expand([0, 1, 3, 4])
        gaps = full.clone()
        gaps[0, 0] = gaps[1, 1] = gaps[2, 0] = -1
        gaps[3, :2] = -1
        logits = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
        assert loss(logits, gaps, UNEVEN) == loss(logits, full, UNEVEN)

    @pytest.mark.parametrize("loss", LEAF_LOSSES)
    def test_gradcheck(self, loss):
        for tree in (UNEVEN, TREES[4], SINGLE):
            labels, _, generator = case(tree, batch=5)
            logits = torch.randn(
                5, tree.num_leaves, dtype=torch.double, generator=generator, requires_grad=True
            )
            assert torch.autograd.gradcheck(lambda x, y=labels, t=tree: loss(x, y, t), logits)

    @pytest.mark.parametrize("loss", LEAF_LOSSES)
    def test_large_logits(self, loss):
        logits = torch.tensor([[1e4, -1e4, 0, 0, 0], [1e4, -1e4, 0, 0, 0]], requires_grad=True)
        result = loss(logits, UNEVEN.expand([0, 1]), UNEVEN, *((0,) if loss is hxe_loss else ()))
        result.backward()
        # cross-entropy of (0, 20000); soft labels add the shares of the other leaves
        assert (
            result.item() == pytest.approx(1e4)
            if loss is not soft_label_loss
            else 5e3 < result.item() < 1.5e4
        )
        assert logits.grad.isfinite().all()

    @pytest.mark.parametrize(
        ("label", "cost"), [("animal", math.log(2)), ("cat", math.inf), ("pet", math.inf)]
    )
    def test_impossible_leaves(self, label, cost):
        # plant or bird
        logits = torch.tensor([[-math.inf, -math.inf, 0, 0, -math.inf]], requires_grad=True)
        labels = UNEVEN.encode_partial([label])
        for loss in (marginal_loss, hxe_loss):
            result = loss(logits, labels, UNEVEN, *((0,) if loss is hxe_loss else ()))
            assert result.item() == pytest.approx(cost)
            (gradient,) = torch.autograd.grad(result, logits)
            assert not gradient.isnan().any()

    def test_soft_labels_of_a_class_with_an_impossible_leaf(self):
        """How a coarse label's mass is spread below it is left open, also if one leaf gets
        nothing."""
        logits = torch.tensor([[-math.inf, 0.5, 0, 1, 0]], requires_grad=True)
        result = soft_label_loss(logits, UNEVEN.encode_partial(["pet"]), UNEVEN, beta=2)
        assert result.item() == pytest.approx(
            plain_soft(UNEVEN, logits.softmax(1)[0].tolist(), ("animal", "pet"), 2)
        )
        result.backward()
        assert logits.grad.isfinite().all()

    @pytest.mark.parametrize(
        ("loss", "message"),
        [
            (
                lambda x, y, t: hxe_loss(x, y, t, alpha=-1),
                "alpha must be a finite number from 0 upwards, got -1",
            ),
            (lambda x, y, t: hxe_loss(x, y, t, alpha=math.nan), "alpha"),
            (
                lambda x, y, t: soft_label_loss(x, y, t, beta=-0.5),
                "beta must be a finite number from 0 upwards, got -0.5",
            ),
            (lambda x, y, t: soft_labels(t, beta=math.inf), "beta"),
            (
                lambda x, y, t: marginal_loss(x[:, :4], y, t),
                r"leaf_logits must be \(N, 5\).*got \(2, 4\)",
            ),
            (
                lambda x, y, t: marginal_loss(x, y[:, :2], t),
                r"labels must be integers of shape \(2, 3\).*got \(2, 2\)",
            ),
            (lambda x, y, t: marginal_loss(x, y.float(), t), "got .*float32"),
            (
                lambda x, y, t: marginal_loss(x, y + 3, t),
                "label 3 of level 'level1' is out of range; legal are 0 to 2",
            ),
            (lambda x, y, t: hxe_loss(x, y - 2, t), "label -2 of level"),
        ],
    )
    def test_wrong_arguments(self, loss, message):
        with pytest.raises(ValueError, match=message):
            loss(torch.zeros(2, 5), UNEVEN.expand([0, 1]), UNEVEN)


@pytest.mark.parametrize("loss", LEAF_LOSSES)
def test_the_order_of_leaves_does_not_matter(loss):
    order = [3, 1, 4, 0, 2]
    other = UNEVEN.reorder([UNEVEN.leaves[i] for i in order])
    logits = torch.randn(5, 5, generator=torch.Generator().manual_seed(0))
    leaf = torch.arange(5)
    torch.testing.assert_close(
        loss(logits, UNEVEN.expand(leaf[order]), UNEVEN),
        loss(logits[:, order], other.expand(leaf), other),
    )


def test_hxe_prefers_mistakes_within_the_class():
    tree = Taxonomy(["a/x", "a/y", "b/z"])
    sibling, stranger = torch.tensor([[0.2, 0.7, 0.1]]).log(), torch.tensor([[0.2, 0.1, 0.7]]).log()
    label = tree.expand([0])
    assert hxe_loss(sibling, label, tree, alpha=0) == pytest.approx(
        hxe_loss(stranger, label, tree, alpha=0).item()
    )
    assert soft_label_loss(sibling, label, tree, beta=2) < soft_label_loss(
        stranger, label, tree, beta=2
    )
