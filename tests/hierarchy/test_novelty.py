"""Where a thing stops being known, against walking the tree in plain Python."""

import math

import pytest
import torch

from timm_branches.hierarchy.metrics import sum_upwards
from timm_branches.hierarchy.nodes import node_tables
from timm_branches.hierarchy.novelty import (
    balanced_scores,
    nearest_node,
    reached,
    steps_between,
    stop_probabilities,
)
from timm_branches.taxonomy import Taxonomy, cifar10

UNEVEN = Taxonomy(
    ["animal/pet/cat", "animal/pet/dog", "plant", "animal/bird", "transport/sea/ship"]
)
TURNED = Taxonomy(["b/1", "a/1", "b/2", "a/2", "a/3"], order=[["b", "a"], None])
trees = pytest.mark.parametrize(
    "tree",
    [cifar10(), UNEVEN, TURNED, Taxonomy(["a", "b"]), Taxonomy(["only"])],
    ids=["even", "uneven", "turned", "flat", "one"],
)


def random_levels(tree, size=20, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [2 * torch.randn(size, k, generator=g, dtype=torch.double) for k in tree.num_classes]


def softmax(scores):
    top = max(scores.values())
    exps = {node: math.exp(score - top) for node, score in scores.items()}
    return {node: e / sum(exps.values()) for node, e in exps.items()}


def walk(tree, levels, i, kind):
    """P(stop) by path, node by node."""
    result = {}

    def visit(node, reach):
        depth = len(node)
        if node in tree.leaves:
            result[node] = reach
            return
        scores = dict(zip(tree.nodes[depth], levels[depth][i].tolist(), strict=True))
        children = {child: s for child, s in scores.items() if child[:-1] == node}
        chance = softmax(children)
        if kind == "mass":
            whole = softmax(scores)
            stop = 1 - sum(whole[child] for child in children)
        elif len(children) == 1:
            stop = 0.0
        else:
            stop = -sum(p * math.log(p) for p in chance.values()) / math.log(len(children))
        result[node] = reach * stop
        for child, p in chance.items():
            visit(child, reach * (1 - stop) * p)

    visit((), 1.0)
    return result


@trees
@pytest.mark.parametrize("kind", ["mass", "entropy"])
def test_by_walking(tree, kind):
    levels = random_levels(tree)
    p = stop_probabilities(dict(zip(tree.levels, levels, strict=True)), tree, kind)
    assert torch.allclose(p.sum(1), torch.ones(20, dtype=torch.double))
    names = node_tables(tree).names
    for i in range(20):
        want = walk(tree, levels, i, kind)
        assert p[i].tolist() == pytest.approx([want[name] for name in names], abs=1e-12)


def all_steps(tree):
    tables = node_tables(tree)
    nodes = torch.arange(len(tables))
    steps = steps_between(*torch.cartesian_prod(nodes, nodes).T, tables)
    return steps.view(len(tables), len(tables))


@trees
def test_distances(tree):
    names = node_tables(tree).names
    found = all_steps(tree)
    for i, a in enumerate(names):
        for j, b in enumerate(names):
            shared = 0
            while shared < min(len(a), len(b)) and a[shared] == b[shared]:
                shared += 1
            assert found[i, j] == len(a) + len(b) - 2 * shared


@trees
@pytest.mark.parametrize("kind", ["mass", "entropy"])
def test_nearest_by_trying(tree, kind):
    p = stop_probabilities(random_levels(tree), tree, kind)
    distances = all_steps(tree).double()
    names = node_tables(tree).names
    answer = nearest_node(p, tree)
    chances = reached(p, answer.labels, tree)
    for i, labels in enumerate(answer.labels.tolist()):
        depth = sum(label >= 0 for label in labels)
        path = tree.nodes[depth - 1][labels[depth - 1]] if depth else ()
        node = names.index(path)
        costs = [(p[i] * distances[k]).sum().item() for k in range(len(names))]
        assert costs[node] == pytest.approx(min(costs))
        # that is the deepest node which is reached with a probability of at least a half
        below = [
            sum(p[i, k].item() for k, n in enumerate(names) if n[: len(m)] == m) for m in names
        ]
        assert below[node] > 0.5 - 1e-9
        children = [below[k] for k, n in enumerate(names) if n[:-1] == path and n]
        is_new = path not in tree.leaves and p[i, node] >= max(children)
        assert bool(answer.is_new[i]) == is_new
        assert answer.probability[i] == p[i, node]
        for level in range(depth):
            assert chances[i, level].item() == pytest.approx(below[names.index(path[: level + 1])])
        assert (chances[i, depth:] == 0).all()


def test_what_is_new_is_told():
    """The coarse classifier is sure, and the fine one looks elsewhere."""
    tree = Taxonomy(["fruit/apple", "fruit/lime", "fruit/pear", "animal/cat", "animal/dog"])
    coarse = torch.tensor([[9.0, 0.0], [9.0, 0.0], [9.0, 0.0]])
    fine = torch.tensor([[9.0, 0, 0, 0, 0], [0, 0, 0, 3.0, 3.0], [9.0, 9.0, 9.0, 0, 0]])
    answer = nearest_node(stop_probabilities([coarse, fine], tree), tree)
    assert answer.labels.tolist() == [[0, 0], [0, -1], [0, -1]]
    # the last is one of three known fruits
    assert answer.is_new.tolist() == [False, True, False]
    # a flat network's levels agree always: its children's mass says nothing, their entropy does
    leaves = torch.tensor([[9.0, 0.0, 0.0, 0.0, 0.0], [3.0, 3.0, 3.0, 0.0, 0.0]])
    levels = sum_upwards(leaves, tree)
    by_entropy = nearest_node(stop_probabilities(levels, tree, "entropy"), tree)
    assert by_entropy.is_new.tolist() == [False, True]


def test_scores_by_hand():
    tree = Taxonomy(["a/b", "a/c", "d"])
    truths = torch.tensor([[0, 0], [0, 0], [0, -1], [1, -1]])
    answers = torch.tensor([[0, 0], [0, 1], [0, -1], [-1, -1]])
    scores = balanced_scores(answers, truths, tree)
    assert scores["known_accuracy"] == pytest.approx(100 * (0.5 + 0) / 2)
    assert scores["new_accuracy"] == 100
    assert scores["accuracy"] == pytest.approx(100 * (0.5 + 1 + 0) / 3)
    assert scores["known_distance"] == pytest.approx((1 + 1) / 2)
    assert scores["new_distance"] == 0
    assert math.isnan(balanced_scores(answers[:1], truths[:1], tree)["new_accuracy"])
    assert all(math.isnan(v) for v in balanced_scores(answers[:0], truths[:0], tree).values())


def test_odd_logits():
    wild = [torch.tensor([[0.0, -torch.inf, -torch.inf]]).double()]
    assert stop_probabilities(wild, Taxonomy(["a", "b", "c"])).isfinite().all()
    levels = [level.half() for level in random_levels(UNEVEN)]
    assert stop_probabilities(levels, UNEVEN).dtype == torch.double
    with pytest.raises(ValueError, match="no kind 'energy'"):
        stop_probabilities(levels, UNEVEN, "energy")
    with pytest.raises(ValueError, match="Logits must be one"):
        stop_probabilities([level[:, :1] for level in levels], UNEVEN)
