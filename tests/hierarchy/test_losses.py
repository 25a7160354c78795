"""Losses on a hierarchy, against sums in plain Python that follow the papers' equations, and
torch's own functions."""

import math

import pytest
import torch
import torch.nn.functional as F

from tests.hierarchy.labelled import SINGLE, TREES, UNEVEN, case, mean_of_known
from timm_branches.hierarchy.losses import (
    consistency_loss,
    hxe_loss,
    level_cross_entropy,
    marginal_loss,
    on_leaves,
    on_levels,
    soft_label_loss,
    tree_path_kl,
)
from timm_branches.hierarchy.path_losses import (
    ancestor_cross_entropy,
    masked_fixmatch_loss,
    parameter_sharing_loss,
    soft_margin_loss,
)
from timm_branches.taxonomy import Taxonomy, cifar10

LEAF_LOSSES = [marginal_loss, hxe_loss, soft_label_loss]


def level_logits(tree, batch, generator, dtype=torch.float32):
    return [
        torch.randn(batch, size, generator=generator, dtype=dtype).requires_grad_()
        for size in tree.num_classes
    ]


class TestTreePathKL:
    @pytest.mark.parametrize("tree", TREES, ids=range(len(TREES)))
    def test_the_equation(self, tree):
        labels, paths, generator = case(tree)
        logits = level_logits(tree, len(labels), generator, torch.double)
        costs = []
        for row, path in enumerate(paths):
            known = range(len(path or ()))
            e = [[math.exp(x) for x in logits[level][row].tolist()] for level in known]
            q = [e[level][int(labels[row, level])] / sum(map(sum, e)) for level in known]
            m = len(q)
            costs.append(sum(1 / m * math.log(1 / m / q_l) for q_l in q))
        result = tree_path_kl(logits, labels, tree)
        assert result.item() == pytest.approx(mean_of_known(costs, paths))

    def test_against_torch(self):
        tree = cifar10()
        generator = torch.Generator().manual_seed(0)
        logits = level_logits(tree, 10, generator)
        labels = tree.expand(range(10))
        target = (
            torch.cat(
                [F.one_hot(y, k) for y, k in zip(labels.unbind(1), tree.num_classes, strict=True)],
                1,
            )
            / 3
        )
        expected = F.kl_div(torch.cat(logits, 1).log_softmax(1), target, reduction="batchmean")
        torch.testing.assert_close(tree_path_kl(logits, labels, tree), expected)

    def test_a_gap_takes_no_part(self):
        generator = torch.Generator().manual_seed(0)
        logits = level_logits(UNEVEN, 1, generator)
        labels = UNEVEN.expand([0])
        labels[0, 1] = -1
        expected = F.kl_div(
            torch.cat([logits[0], logits[2]], 1).log_softmax(1),
            torch.tensor([[0.5, 0, 0, 0.5, 0, 0]]),
            reduction="batchmean",
        )
        result = tree_path_kl(logits, labels, UNEVEN)
        torch.testing.assert_close(result, expected)
        result.backward()
        assert not logits[1].grad.any()

    def test_gradcheck(self):
        labels, _, generator = case(UNEVEN, batch=4)
        logits = level_logits(UNEVEN, 4, generator, torch.double)
        assert torch.autograd.gradcheck(lambda *x: tree_path_kl(x, labels, UNEVEN), logits)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (
                lambda x, y: (x[:2], y),
                r"one \(N, K\) for each level, K in \(3, 3, 3\), got \[\(1, 3\), \(1, 3\)\]",
            ),
            (lambda x, y: ([], y), "for each level"),
            (lambda x, y: ([x[0], x[1][:, :2], x[2]], y), r"\(1, 2\)"),
            (lambda x, y: (x, torch.cat([y, y])), r"shape \(1, 3\)"),
            (lambda x, y: (x, y.clamp(max=0) + 3), "out of range"),
        ],
    )
    def test_wrong_arguments(self, change, message):
        logits, labels = change(level_logits(UNEVEN, 1, None), UNEVEN.expand([0]))
        with pytest.raises(ValueError, match=message):
            tree_path_kl(logits, labels, UNEVEN)


def plain_consistency(tree, rows):
    """The mean divergence of one sample, from its levels' logits, in plain Python."""
    p = []
    for row in rows:
        e = [math.exp(x) for x in row]
        p.append([x / sum(e) for x in e])
    total = 0
    for level in range(tree.num_levels - 1):
        ends = [path in tree.leaves for path in tree.nodes[level]]
        rest = sum(x for x, end in zip(p[level], ends, strict=True) if not end)
        q = [
            p[level][i]
            if end
            else rest
            * sum(
                x
                for x, child in zip(p[level + 1], tree.nodes[level + 1], strict=True)
                if child[:-1] == path
            )
            for i, (path, end) in enumerate(zip(tree.nodes[level], ends, strict=True))
        ]
        for a, b in ((p[level], q), (q, p[level])):
            total += sum(x * math.log(2 * x / (x + y)) for x, y in zip(a, b, strict=True)) / 2
    return total / (tree.num_levels - 1)


class TestConsistency:
    @pytest.mark.parametrize("tree", [tree for tree in TREES if tree.num_levels > 1])
    def test_the_equation(self, tree):
        logits = level_logits(tree, 6, torch.Generator().manual_seed(0), torch.double)
        expected = (
            sum(plain_consistency(tree, [x[row].tolist() for x in logits]) for row in range(6)) / 6
        )
        assert consistency_loss(logits, tree).item() == pytest.approx(expected, abs=1e-12)

    @pytest.mark.parametrize("tree", [tree for tree in TREES if tree.num_levels > 1])
    def test_0_if_consistent(self, tree):
        """Answers that come from one distribution of leaves agree, wherever the leaves end."""
        p = torch.rand(
            6, tree.num_leaves, dtype=torch.double, generator=torch.Generator().manual_seed(0)
        )
        logits = [
            (p @ tree.leaf_to_level(level).double()).log().requires_grad_() for level in tree.levels
        ]
        result = consistency_loss(logits, tree)
        result.backward()
        assert result.item() == pytest.approx(0, abs=1e-12)
        assert torch.cat([x.grad.flatten() for x in logits]).abs().max() < 1e-12

    def test_log_2_if_contradictory(self):
        tree = Taxonomy(["a/x", "a/y", "b/z"])
        logits = [
            torch.tensor([[1e4, -1e4]], requires_grad=True),
            torch.tensor([[-1e4, -1e4, 1e4]]),
        ]
        result = consistency_loss(logits, tree)
        result.backward()
        assert result.item() == pytest.approx(math.log(2))
        assert logits[0].grad.isfinite().all()

    def test_what_ends_above_asks_nothing_below(self):
        """Whatever the level below says, it is not about a plant."""
        tree = Taxonomy(["plant", "animal/cat", "mineral/gold"])
        for lower in ([30.0, 0.0], [0.0, 30.0]):
            logits = [torch.tensor([[40.0, 0.0, 0.0]]), torch.tensor([lower])]
            assert consistency_loss(logits, tree).item() == pytest.approx(0, abs=1e-9)

    def test_symmetric(self):
        """The same two distributions with their places exchanged."""
        tree = Taxonomy(["a/x", "b/y", "c/z"])
        logits = level_logits(tree, 5, torch.Generator().manual_seed(0))
        torch.testing.assert_close(
            consistency_loss(logits, tree), consistency_loss(logits[::-1], tree)
        )

    def test_gradcheck(self):
        logits = level_logits(UNEVEN, 3, torch.Generator().manual_seed(0), torch.double)
        assert torch.autograd.gradcheck(lambda *x: consistency_loss(x, UNEVEN), logits)

    def test_masked_classes(self):
        logits = [
            torch.tensor([[0.0, -math.inf, 0.0]], requires_grad=True),
            torch.tensor([[0.0, -math.inf, 0.0]], requires_grad=True),
            torch.zeros(1, 3),
        ]
        result = consistency_loss(logits, UNEVEN)
        result.backward()
        assert 0 < result.item() < math.log(2)
        assert logits[0].grad.isfinite().all()
        assert logits[1].grad.isfinite().all()

    def test_one_level(self):
        with pytest.raises(ValueError, match="between levels"):
            consistency_loss([torch.zeros(1, 3)], SINGLE)


def of_levels(logits, labels, tree):
    return tree_path_kl(logits.split(tree.num_classes, 1), labels, tree)


class TestUnknown:
    """What all losses with labels have in common."""

    @pytest.mark.parametrize("loss", [*LEAF_LOSSES, of_levels])
    @pytest.mark.parametrize("bad", [1e4, -1e4, math.inf, -math.inf, math.nan])
    def test_costs_nothing(self, loss, bad):
        columns = sum(UNEVEN.num_classes) if loss is of_levels else 5
        labels, paths, generator = case(UNEVEN, batch=4)
        logits = torch.randn(4, columns, generator=generator)
        alone = logits[1:].clone().requires_grad_()
        logits[0] = bad
        logits.requires_grad_()
        result, expected = loss(logits, labels, UNEVEN), loss(alone, labels[1:], UNEVEN)
        torch.testing.assert_close(result, expected)
        result.backward()
        expected.backward()
        assert paths[0] is None
        assert not logits.grad[0].any()
        torch.testing.assert_close(logits.grad[1:], alone.grad)

    @pytest.mark.parametrize("loss", [*LEAF_LOSSES, of_levels])
    @pytest.mark.parametrize("batch", [0, 1, 3])
    def test_nothing_known(self, loss, batch):
        columns = sum(UNEVEN.num_classes) if loss is of_levels else 5
        logits = torch.full((batch, columns), -math.inf, requires_grad=True)
        with torch.autograd.set_detect_anomaly(True):  # no nan on the way either
            result = loss(logits, torch.full((batch, 3), -1), UNEVEN)
            result.backward()
        assert result.item() == 0
        assert not logits.grad.any()

    @pytest.mark.parametrize("loss", [*LEAF_LOSSES, of_levels])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision(self, loss, dtype):
        columns = sum(UNEVEN.num_classes) if loss is of_levels else 5
        labels, _, generator = case(UNEVEN)
        logits = torch.randn(12, columns, generator=generator).to(dtype)
        result = loss(logits, labels, UNEVEN)
        assert result.dtype == torch.float32
        torch.testing.assert_close(result, loss(logits.float(), labels, UNEVEN), rtol=0, atol=0)

    def test_half_precision_without_labels(self):
        logits = [
            torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
            for _ in range(3)
        ]
        torch.testing.assert_close(
            consistency_loss(logits, UNEVEN),
            consistency_loss([x.float() for x in logits], UNEVEN),
            rtol=0,
            atol=0,
        )


def random_level(seed=0, batch=8, classes=5):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, classes, generator=generator, requires_grad=True)
    return (
        logits,
        torch.randint(classes, (batch,), generator=generator),
        torch.rand(classes, generator=generator),
    )


class TestLevelCrossEntropy:
    @pytest.mark.parametrize("smoothing", [0.0, 0.1])
    @pytest.mark.parametrize("weighted", [False, True])
    def test_known_labels_give_torch(self, smoothing, weighted):
        logits, target, weights = random_level()
        weights = weights if weighted else None
        result = level_cross_entropy(logits, target, smoothing, weights)
        expected = F.cross_entropy(logits, target, weights, label_smoothing=smoothing)
        torch.testing.assert_close(result, expected)
        torch.testing.assert_close(*(torch.autograd.grad(y, logits)[0] for y in (result, expected)))

    @pytest.mark.parametrize("weighted", [False, True])
    def test_soft_labels_give_torch(self, weighted):
        logits, target, weights = random_level()
        soft = (5 * torch.rand(8, 5, generator=torch.Generator().manual_seed(1))).softmax(1)
        weights = weights if weighted else None
        torch.testing.assert_close(
            level_cross_entropy(logits, soft, class_weights=weights),
            F.cross_entropy(logits, soft, weights),
        )

    @pytest.mark.parametrize("smoothing", [0.0, 0.1])
    @pytest.mark.parametrize("weighted", [False, True])
    def test_unknown_labels_are_left_out(self, smoothing, weighted):
        logits, target, weights = random_level()
        weights = weights if weighted else None
        target[[0, 5]] = -1
        spoilt = logits.detach().clone()
        spoilt[0], spoilt[5] = math.inf, math.nan
        expected = F.cross_entropy(
            logits[target >= 0], target[target >= 0], weights, label_smoothing=smoothing
        )
        torch.testing.assert_close(
            level_cross_entropy(spoilt, target, smoothing, weights), expected
        )
        torch.testing.assert_close(  # torch has an index to ignore
            expected,
            F.cross_entropy(logits, target, weights, label_smoothing=smoothing, ignore_index=-1),
        )

    def test_partly_known_soft_labels(self):
        """Mixed with an unknown image, a label keeps its share of the mass and of the mean."""
        logits, _, _ = random_level(batch=2)
        target = torch.tensor([[0, 0.3, 0, 0, 0], [0, 0, 1, 0, 0]])
        log_p = logits.log_softmax(1)
        assert level_cross_entropy(logits, target).item() == pytest.approx(
            -(0.3 * log_p[0, 1] + log_p[1, 2]).item() / 1.3
        )

    @pytest.mark.parametrize(
        "target", [torch.tensor([-1, -1]), torch.zeros(2, 3), torch.tensor([1, 1])]
    )
    def test_nothing_counts(self, target):
        logits = torch.full((2, 3), 1.0 if target.max() > 0 else -math.inf, requires_grad=True)
        result = level_cross_entropy(logits, target, class_weights=torch.tensor([1.0, 0.0, 1.0]))
        result.backward()
        assert result.item() == 0
        assert not logits.grad.any()

    def test_half_precision(self):
        logits, target, weights = random_level()
        result = level_cross_entropy(logits.bfloat16(), target, 0.1, weights.bfloat16())
        expected = F.cross_entropy(
            logits.bfloat16().float(), target, weights.bfloat16().float(), label_smoothing=0.1
        )
        torch.testing.assert_close(result, expected)

    def test_wrong_weights(self):
        with pytest.raises(ValueError, match=r"each of the 5 classes, got shape \(4,\)"):
            level_cross_entropy(
                torch.zeros(2, 5), torch.tensor([0, 1]), class_weights=torch.ones(4)
            )


def test_a_level_loss_of_leaves_is_the_leaf_loss():
    """On a tree of one level, all leaf losses that have no more to say are the level's
    cross-entropy."""
    labels, _, generator = case(SINGLE)
    logits = torch.randn(12, 3, generator=generator)
    expected = level_cross_entropy(logits, labels[:, 0])
    for result in (
        marginal_loss(logits, labels, SINGLE),
        hxe_loss(logits, labels, SINGLE, alpha=3),
        tree_path_kl([logits], labels, SINGLE),
    ):
        torch.testing.assert_close(result, expected)


def all_losses(rows, **kwargs):
    """Every loss of some rows of one batch."""
    labels, _, generator = case(UNEVEN, batch=9)
    leaves, levels = torch.randn(9, 5, generator=generator), torch.randn(9, 9, generator=generator)
    split, labels = levels[rows].split(UNEVEN.num_classes, 1), labels[rows]
    return torch.stack(
        [
            *(loss(leaves[rows], labels, UNEVEN, **kwargs) for loss in LEAF_LOSSES),
            ancestor_cross_entropy(leaves[rows], labels, UNEVEN, **kwargs),
            parameter_sharing_loss(split, labels, UNEVEN, **kwargs),
            soft_margin_loss(split, labels, UNEVEN, **kwargs),
            masked_fixmatch_loss(leaves[rows], -leaves[rows], labels, UNEVEN, 0.0, **kwargs),
            tree_path_kl(split, labels, UNEVEN, **kwargs),
            consistency_loss(split, UNEVEN, **kwargs),
            level_cross_entropy(
                split[0], labels[:, 0], 0.1, torch.tensor([1.0, 2.0, 3.0]), **kwargs
            ),
        ]
    )


def test_shared_means_are_those_of_the_global_batch(monkeypatch):
    """Two processes, one after the other.

    A first pass notes what they would add up, a second one gets the sums.
    """
    noted, sums = [], []
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    batches = slice(0, 3), slice(3, 9)  # of unequal size, one with the unknown sample
    monkeypatch.setattr("torch.distributed.all_reduce", lambda x: noted.append(x.clone()))
    for rows in batches:
        all_losses(rows, share=True)
    half = len(noted) // 2
    monkeypatch.setattr("torch.distributed.all_reduce", lambda x: x.copy_(sums.pop(0)))
    found = []
    for rows in batches:
        sums[:] = [a + b for a, b in zip(noted[:half], noted[half:], strict=True)]
        found.append(all_losses(rows, share=True))
    mean = torch.stack(found).mean(0)  # what DDP does with gradients
    torch.testing.assert_close(mean, all_losses(slice(None), share=False))
    assert not torch.allclose(torch.stack([all_losses(rows) for rows in batches]).mean(0), mean)


# -- as training tasks take them


def labelled_logits(tree):
    torch.manual_seed(0)
    labels = tree.expand(torch.randint(tree.num_leaves, (6,)))
    sizes = zip(tree.levels, tree.num_classes, strict=True)
    return {name: torch.randn(6, k) for name, k in sizes}, labels


def test_losses_of_leaves_and_levels_as_contract():
    tree = cifar10()
    logits, labels = labelled_logits(tree)
    by_level = list(logits.values())
    turned = dict(reversed(logits.items()))
    for given in (logits, turned):
        [(name, loss)] = on_levels(tree_path_kl)(given, labels, tree).items()
        assert name == "tree_path_kl"
        assert torch.equal(loss, tree_path_kl(by_level, labels, tree))
    # on an even tree the last level's softmax is the leaves'
    [(name, loss)] = on_leaves(hxe_loss, alpha=0.7)(turned, labels, tree).items()
    assert name == "hxe"
    torch.testing.assert_close(loss, hxe_loss(by_level[-1], labels, tree, 0.7))
    renamed = {"x": logits["coarse"], "y": logits["middle"], "z": logits["fine"]}
    assert torch.equal(on_leaves(hxe_loss, alpha=0.7)(renamed, labels, tree)["hxe"], loss)
    for wrapped in (on_leaves(hxe_loss), on_levels(tree_path_kl)):
        with pytest.raises(ValueError, match="needs a taxonomy"):
            wrapped(logits, labels, None)


def test_levels_in_another_order_are_found_by_name():
    tree = cifar10()
    logits, labels = labelled_logits(tree)
    turned = dict(reversed(logits.items()))
    by_level = list(logits.values())
    assert torch.equal(consistency_loss(turned, tree), consistency_loss(by_level, tree))
    assert torch.equal(tree_path_kl(turned, labels, tree), tree_path_kl(by_level, labels, tree))
    with pytest.raises(ValueError, match=r"lacks the levels \['coarse'\]"):
        consistency_loss({name: y for name, y in logits.items() if name != "coarse"}, tree)


@pytest.mark.parametrize("label", [3, -2, -100])
def test_labels_out_of_range(label):
    with pytest.raises(ValueError, match=f"label {label} is out of range: the level has 3 classes"):
        level_cross_entropy(torch.zeros(2, 3), torch.tensor([0, label]))
