"""All nodes of a tree in one numbering, against the taxonomy's own tables and a brute force."""

import pytest
import torch

from timm_branches.hierarchy.decode import decode
from timm_branches.hierarchy.nodes import LEAF_SCORES, leaf_log_posterior, node_tables
from timm_branches.taxonomy import Taxonomy, cifar10, cifar100

UNEVEN = Taxonomy(
    ["animal/pet/cat", "animal/pet/dog", "plant", "animal/bird", "transport/sea/ship"]
)
trees = pytest.mark.parametrize(
    "tree", [cifar10(), cifar100(), UNEVEN], ids=["cifar10", "cifar100", "uneven"]
)


@trees
def test_numbering(tree):
    tables = node_tables(tree)
    assert tables is node_tables(tree)
    names = [(), *(path for level in tree.nodes for path in level)]
    assert list(tables.names) == names
    for node, path in enumerate(names):
        assert names[tables.parents[node]] == path[:-1]
        assert tables.depths[node] == len(path)
        below = sum(leaf[: len(path)] == path for leaf in tree.leaves)
        assert tables.num_leaves[node] == below
        row = [i for i in tables.labels[node].tolist() if i >= 0]
        assert [tree.nodes[level][i] for level, i in enumerate(row)] == [
            path[: depth + 1] for depth in range(len(path))
        ]
    for leaf, path in enumerate(tree.leaves):
        nodes = [names[node] for node in tables.leaf_paths[leaf]]
        assert nodes == [path[:k] for k in range(tree.num_levels + 1)]
        assert names[tables.leaves[leaf]] == path


@trees
def test_sums(tree):
    values = torch.rand(5, tree.num_leaves, dtype=torch.double)
    tables = node_tables(tree)
    want = torch.zeros(5, len(tables), dtype=torch.double)
    for node, path in enumerate(tables.names):
        for leaf, of_leaf in enumerate(tree.leaves):
            if of_leaf[: len(path)] == path:
                want[:, node] += values[:, leaf]
                assert tables.descends()[node, leaf]
    assert torch.allclose(tables.sums(values), want)
    assert tables.descends().sum() == tables.num_leaves.sum()


@trees
@pytest.mark.parametrize("decoder", LEAF_SCORES)
def test_posterior_is_the_decoders(tree, decoder):
    logits = [torch.randn(40, k, dtype=torch.double) for k in tree.num_classes]
    log_p = leaf_log_posterior(logits, tree, decoder)
    assert torch.allclose(log_p.exp().sum(1), torch.ones(40, dtype=torch.double))
    labels, probabilities = decode(logits, tree, decoder)
    assert torch.equal(tree.expand(log_p.argmax(1)), labels)
    tables = node_tables(tree)
    masses = tables.sums(log_p.exp()).gather(1, tables.nodes_of(labels))[:, 1:]
    assert torch.allclose(masses.masked_fill(labels < 0, 0), probabilities)
    hot = leaf_log_posterior(logits, tree, decoder, temperature=1e6)
    assert hot.std() < 1e-3


def test_refusals():
    logits = [torch.zeros(1, k) for k in UNEVEN.num_classes]
    with pytest.raises(ValueError, match="gives the leaves no distribution"):
        leaf_log_posterior(logits, UNEVEN, "crm")
    for temperature in (0, -1, float("nan")):
        with pytest.raises(ValueError, match="temperature must be above 0"):
            leaf_log_posterior(logits, UNEVEN, temperature=temperature)
