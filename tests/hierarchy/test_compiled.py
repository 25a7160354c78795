"""Losses of a tree in a compiled graph: no break, the numbers of eager mode, the right tree."""

import pytest
import torch

from timm_branches.hierarchy.losses import (
    consistency_loss,
    hxe_loss,
    marginal_loss,
    soft_label_loss,
    tree_path_kl,
)
from timm_branches.taxonomy import Taxonomy

EVEN = Taxonomy(["x/1", "x/2", "y/3", "y/4"])
CROSSED = Taxonomy(["x/1", "y/2", "x/3", "y/4"])  # as many classes, other parents
UNEVEN = Taxonomy(["a/b/1", "a/b/2", "a/c", "d/e/3", "f"])
LOSSES = {
    "marginal": lambda logits, labels, tree: marginal_loss(logits[-1], labels, tree),
    "hxe": lambda logits, labels, tree: hxe_loss(logits[-1], labels, tree),
    "soft labels": lambda logits, labels, tree: soft_label_loss(logits[-1], labels, tree),
    "path": lambda logits, labels, tree: tree_path_kl(logits[:-1], labels, tree),
    "consistency": lambda logits, labels, tree: consistency_loss(logits[:-1], tree),
}


def sample(tree, seed=0):
    """Logits of the levels, then of the leaves, and labels of which some are unknown."""
    generator = torch.Generator().manual_seed(seed)
    logits = []
    for count in (*tree.num_classes, tree.num_leaves):
        logits.append(torch.randn(8, count, generator=generator).requires_grad_())
    leaves = torch.randint(tree.num_leaves, (8,), generator=generator)
    labels = tree.expand(leaves)
    labels[::3, 1:] = -1
    return logits, labels


def with_gradients(loss, tree):
    logits, labels = sample(tree)
    value = loss(logits, labels, tree)
    gradients = torch.autograd.grad(value, logits, allow_unused=True)
    return value, [g for g in gradients if g is not None]


@pytest.mark.parametrize("tree", [EVEN, UNEVEN], ids=["even", "uneven"])
@pytest.mark.parametrize("name", LOSSES)
def test_no_break_and_equal(name, tree):
    torch.compiler.reset()
    compiled = torch.compile(LOSSES[name], backend="aot_eager", fullgraph=True)
    value, gradients = with_gradients(LOSSES[name], tree)
    own, own_gradients = with_gradients(compiled, tree)
    torch.testing.assert_close(own, value)
    assert len(own_gradients) == len(gradients) > 0
    for a, b in zip(own_gradients, gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", LOSSES)
def test_another_tree_of_the_same_shape(name):
    """What a graph holds of one tree is not used for another."""
    torch.compiler.reset()
    loss = LOSSES[name]
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    values = []
    for tree in (EVEN, CROSSED, EVEN):
        value, gradients = with_gradients(loss, tree)
        own, own_gradients = with_gradients(compiled, tree)
        torch.testing.assert_close(own, value)
        for a, b in zip(own_gradients, gradients, strict=True):
            torch.testing.assert_close(a, b)
        values.append(float(value.detach()))
    assert values[0] == values[2]
    assert values[0] != values[1]


@pytest.mark.parametrize("name", LOSSES)
def test_a_tree_that_is_an_attribute(name):
    """As a task holds it, and exchanged between two steps."""

    class Holder(torch.nn.Module):
        def __init__(self, tree):
            super().__init__()
            self.tree = tree

        def forward(self, logits, labels):
            return LOSSES[name](logits, labels, self.tree)

    torch.compiler.reset()
    holder = Holder(EVEN)
    compiled = torch.compile(holder, backend="aot_eager", fullgraph=True)
    for tree in (EVEN, CROSSED):
        holder.tree = tree
        logits, labels = sample(tree)
        torch.testing.assert_close(compiled(logits, labels), holder(logits, labels))
