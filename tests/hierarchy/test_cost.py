"""The answer that costs least, against loops over small trees and against 'crm'."""

from itertools import combinations

import pytest
import torch

from timm_branches.hierarchy import HierarchyEvaluator, Prediction, decode, sum_upwards
from timm_branches.hierarchy.cost import (
    COSTS,
    answer_costs,
    best_hf_nodes,
    cost_decoder,
    cost_matrix,
    least_cost,
)
from timm_branches.hierarchy.nodes import node_tables
from timm_branches.taxonomy import Taxonomy, cifar10, cifar100

EVEN = Taxonomy(["animal/cat", "animal/dog", "ship/sail", "ship/steam", "ship/oar"])
UNEVEN = Taxonomy(
    ["animal/pet/cat", "animal/pet/dog", "plant", "animal/bird", "transport/sea/ship"]
)
ONE = Taxonomy(["alone"])
CHAIN = Taxonomy(["a/b/c", "d"])
trees = pytest.mark.parametrize(
    "tree", [EVEN, UNEVEN, ONE, CHAIN], ids="even uneven one chain".split()
)


def names(tree):
    return [(), *(path for level in tree.nodes for path in level)]


def common(a, b):
    depth = 0
    while depth < min(len(a), len(b)) and a[depth] == b[depth]:
        depth += 1
    return depth


def height(tree, node):
    if not node:
        return tree.num_levels  # decoder 'crm' has the root there
    return max(len(leaf) for leaf in tree.leaves if leaf[: len(node)] == node) - len(node)


def leaves_below(tree, node):
    return sum(leaf[: len(node)] == node for leaf in tree.leaves)


def by_hand(tree, kind, node, leaf):
    depth = common(node, leaf)
    if kind == "tree-distance":
        return len(node) + len(leaf) - 2 * depth
    if kind == "lca-height":
        return height(tree, node[:depth])
    if kind == "wu-palmer":
        return 1 - 2 * (depth + 1) / (len(node) + 1 + len(leaf) + 1)
    if kind == "information":
        if depth < len(node):
            return 1
        bits = torch.tensor([leaves_below(tree, node), tree.num_leaves]).double().log()
        return float(bits[0] / bits[1]) if tree.num_leaves > 1 else 0
    precision = depth / len(node) if node else 0
    recall = depth / len(leaf)
    return 1 - 2 * precision * recall / (precision + recall) if depth else 1


def random_log_p(tree, rows=50):
    return (2 * torch.randn(rows, tree.num_leaves, dtype=torch.double)).log_softmax(1)


@trees
@pytest.mark.parametrize("kind", COSTS)
def test_matrix_by_hand(tree, kind):
    want = [[by_hand(tree, kind, node, leaf) for leaf in tree.leaves] for node in names(tree)]
    got = cost_matrix(kind, tree)
    if kind == "information" and tree is ONE:
        want[0] = [0]  # the root of a single leaf says all there is to say
    assert torch.allclose(got, torch.tensor(want, dtype=torch.double))


@trees
@pytest.mark.parametrize("kind", [*COSTS, "random"])
def test_least_cost_is_the_brute_forces(tree, kind):
    torch.manual_seed(0)
    nodes = names(tree)
    costs = torch.rand(len(nodes), tree.num_leaves) if kind == "random" else kind
    matrix = cost_matrix(costs, tree)
    log_p = random_log_p(tree)
    answer = least_cost(log_p, costs, tree)
    for row, labels, chances in zip(log_p.exp().tolist(), *answer, strict=True):
        expected = []
        for node in range(len(nodes)):
            expected.append(sum(p * float(c) for p, c in zip(row, matrix[node], strict=True)))
        best = [n for n in range(len(nodes)) if expected[n] <= min(expected) + 1e-12]
        best = max(best, key=lambda n: (len(nodes[n]), -n))
        path = nodes[best]
        assert labels.tolist() == node_tables(tree).labels[best].tolist()
        for depth, chance in enumerate(chances.tolist()):
            mass = 0.0
            if depth < len(path):
                mass = sum(
                    p
                    for p, leaf in zip(row, tree.leaves, strict=True)
                    if leaf[: depth + 1] == path[: depth + 1]
                )
            assert chance == pytest.approx(mass)


def leaves_only(tree):
    matrix = cost_matrix("lca-height", tree)
    inner = torch.ones(len(matrix), dtype=torch.bool)
    inner[node_tables(tree).leaves] = False
    matrix[inner] = torch.inf
    return matrix


@pytest.mark.parametrize("tree", [cifar10(), cifar100(), UNEVEN], ids=["cifar10", "cifar100", "u"])
def test_crm_is_the_case_of_leaves(tree):
    torch.manual_seed(0)
    logits = [2 * torch.randn(200, k, dtype=torch.double) for k in tree.num_classes]
    decoder = cost_decoder(leaves_only(tree), tree)
    got, want = decode(logits, tree, decoder), decode(logits, tree, "crm")
    assert torch.equal(got.labels, want.labels)
    assert torch.allclose(got.probabilities, want.probabilities)


def test_of_equal_costs_the_deepest():
    tree = Taxonomy(["animal/cat", "animal/dog", "ship"])
    log_p = torch.tensor([[0.5, 0.5, 0]]).log()
    # cat, dog and animal all cost 1 step
    assert least_cost(log_p, "tree-distance", tree).labels.tolist() == [[0, 0]]
    log_p = torch.tensor([[1 / 3, 1 / 3, 1 / 3]]).log()
    assert least_cost(log_p, torch.ones(5, 3), tree).labels.tolist() == [[0, 0]]
    # rounding must not decide: float32 and float64 agree where all costs are equal
    wide = Taxonomy([f"{i % 7}/{i}" for i in range(300)])
    p = torch.rand(64, 300, dtype=torch.double).softmax(1)
    costs = torch.full((len(node_tables(wide)), 300), 0.1)
    for log_p in (p.log(), p.float().log()):
        assert (least_cost(log_p, costs, wide).labels == torch.tensor([0, 0])).all()


def test_the_registered_decoder_and_a_flat_model():
    torch.manual_seed(0)
    z = torch.randn(30, UNEVEN.num_leaves)
    levels = sum_upwards(z, UNEVEN)
    got = decode(levels, UNEVEN, "cost")
    want = least_cost(z.log_softmax(1), "tree-distance", UNEVEN)
    assert torch.equal(got.labels, want.labels)
    assert torch.allclose(got.probabilities, want.probabilities, atol=1e-6)
    assert (got.labels[:, 0] >= 0).any()
    assert (got.labels < 0).any()
    same = decode(levels, UNEVEN, cost_decoder("tree-distance", UNEVEN))
    assert torch.equal(same.labels, got.labels)


def test_cost_decoder_takes_scores_and_temperature():
    torch.manual_seed(0)
    logits = [3 * torch.randn(60, k) for k in UNEVEN.num_classes]
    sharp = decode(logits, UNEVEN, cost_decoder("wu-palmer", UNEVEN, "best-path", 0.01))
    assert torch.equal(sharp.labels, decode(logits, UNEVEN, "best-path").labels)
    vague = decode(logits, UNEVEN, cost_decoder("wu-palmer", UNEVEN, "best-path", 1e6))
    assert vague.labels.unique(dim=0).shape[0] == 1  # all leaves are equally likely
    with pytest.raises(ValueError, match="another tree"):
        decode(logits, UNEVEN, cost_decoder("hf", UNEVEN.reorder([*UNEVEN.leaves[::-1]])))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_and_no_samples(dtype):
    log_p = random_log_p(UNEVEN).to(dtype)
    answer = least_cost(log_p, "hf", UNEVEN)
    want = least_cost(log_p.double().log_softmax(1), "hf", UNEVEN)
    assert answer.probabilities.dtype == torch.float32
    assert (answer.labels == want.labels).all(1).double().mean() > 0.9
    empty = least_cost(log_p[:0], "hf", UNEVEN)
    assert empty.labels.shape == empty.probabilities.shape == (0, UNEVEN.num_levels)


def test_what_is_no_distribution():
    with pytest.raises(ValueError, match="sum to 1"):
        least_cost(torch.randn(3, 5), "hf", UNEVEN)
    with pytest.raises(ValueError, match=r"\(N, 5\)"):
        least_cost(torch.zeros(3, 4), "hf", UNEVEN)
    with pytest.raises(ValueError, match="floating point"):
        least_cost(torch.zeros(3, 5, dtype=torch.long), "hf", UNEVEN)


# -- costs of one's own


def test_csv_in_both_forms(tmp_path):
    tree = Taxonomy(["animal/cat", "animal/dog", "ship"])
    long = tmp_path / "long.csv"
    long.write_text(
        "truth,answer,cost\n*,*,3\nanimal,cat,2\ncat,cat,0\nship,cat,9\n"
        "*,ship,7\nship,ship,0\nanimal/dog,animal,.5\n*,animal,1\n"
    )
    inf = [torch.inf] * 3
    want = torch.tensor([[3, 3, 3], [1, 0.5, 1], [7, 7, 0], [0, 2, 9], inf])
    names = ["/".join(name) for name in node_tables(tree).names]
    assert names == ["", "animal", "ship", "animal/cat", "animal/dog"]
    assert cost_matrix(long, tree).tolist() == want.double().tolist()
    square = tmp_path / "square.csv"
    square.write_text("answer;cat;dog;ship\n*;3;3;3\nship;7;7;0\nanimal;1;0.5;1\ncat;0;2;9\n")
    assert cost_matrix(str(square), tree).tolist() == want.double().tolist()
    log_p = torch.tensor([[0.001, 0.998, 0.001]]).log()
    assert least_cost(log_p, long, tree).labels.tolist() == [[0, -1]]  # dog is no answer


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        ("answer,truth,cost\n", "no costs"),
        ("answer,truth,cost\ncat,dog,1\n", r"lacks 2 costs, .* 'animal/cat' where 'animal/cat'"),
        ("answer,truth,cost\ncat,*,-1\n", "line 2: a cost is a number from 0 up, got '-1'"),
        ("answer,truth,cost\ncat,*,nan\n", "got 'nan'"),
        ("answer,truth,cost\ncat,*,inf\n", "got 'inf'"),
        ("answer,truth,cost\ncat,*,\n", "got ''"),
        ("answer,truth,cost\ncat,*,1\nanimal/cat,*,1\n", "line 3: .* has a cost already"),
        ("answer,truth,cost\ncta,*,1\n", "no class 'cta' .*did you mean 'cat'"),
        ("answer,truth,cost\ncat,*\n", "line 2: 2 cells under a header of 3"),
        ("x,cat,dog\ncat,0,1\n", "lacks 1 costs, .*'ship'"),
    ],
)
def test_bad_files(tmp_path, text, message):
    file = tmp_path / "costs.csv"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        cost_matrix(file, Taxonomy(["animal/cat", "animal/dog", "ship"]))


def test_bad_matrices():
    good = torch.ones(9, 5)
    assert len(node_tables(UNEVEN)) == 10
    with pytest.raises(ValueError, match=r"\(10, 5\); got \(9, 5\)"):
        cost_matrix(good, UNEVEN)
    for bad in (-1, torch.nan):
        wrong = torch.ones(10, 5)
        wrong[3, 2] = bad
        with pytest.raises(ValueError, match="0 or more"):
            cost_matrix(wrong, UNEVEN)
    wrong[3, 2] = torch.inf
    with pytest.raises(ValueError, match="whole row"):
        cost_matrix(wrong, UNEVEN)
    with pytest.raises(ValueError, match="nothing may be answered"):
        cost_matrix(torch.full((10, 5), torch.inf), UNEVEN)
    with pytest.raises(FileNotFoundError, match="wu-palmer"):
        cost_matrix("wu-palmr", UNEVEN)


# -- what answers cost


@trees
def test_answer_costs_by_hand(tree):
    nodes = names(tree)
    for number, node in enumerate(nodes):
        answers = node_tables(tree).labels[number].expand(tree.num_leaves, -1)
        labels = tree.expand(torch.arange(tree.num_leaves))
        want = [by_hand(tree, "tree-distance", node, leaf) for leaf in tree.leaves]
        assert answer_costs(answers, labels, "tree-distance", tree).tolist() == want


def test_answer_costs_where_the_leaf_is_unknown():
    labels = torch.tensor([[0, -1, -1], [-1, -1, -1], [1, -1, -1]])
    costs = answer_costs(labels, labels, "tree-distance", UNEVEN)
    assert costs.isnan().tolist() == [True, True, False]  # plant is a leaf
    with pytest.raises(ValueError, match=r"\(N, 3\)"):
        answer_costs(labels[:2], labels, "hf", UNEVEN)


@pytest.mark.parametrize("decoder", ["cost", "independent", "best-path"])
def test_evaluator_reports_the_mean_cost(decoder):
    torch.manual_seed(0)
    logits = [torch.randn(40, k) for k in UNEVEN.num_classes]
    labels = UNEVEN.expand(torch.randint(5, (40,)))
    labels[3] = -1
    evaluator = HierarchyEvaluator(
        UNEVEN.levels, UNEVEN.num_classes, UNEVEN, decoder=decoder, costs="tree-distance"
    )
    for part in (slice(0, 13), slice(13, 40)):
        evaluator.update(
            {name: z[part] for name, z in zip(UNEVEN.levels, logits, strict=True)}, labels[part]
        )
    nodes = names(UNEVEN)
    total = 0.0
    for row, truth in zip(decode(logits, UNEVEN, decoder).labels, labels, strict=True):
        path = ()
        for level, label in enumerate(row.tolist()):
            if label >= 0 and path not in UNEVEN.leaves:
                path = UNEVEN.nodes[level][label]
        if truth[0] >= 0:
            leaf = max(UNEVEN.nodes[i][k] for i, k in enumerate(truth.tolist()) if k >= 0)
            total += by_hand(UNEVEN, "tree-distance", path, leaf)
    assert nodes
    assert evaluator.compute()["cost"] == pytest.approx(total / 39)
    assert not evaluator.higher_is_better("cost")


def test_evaluator_of_answers_that_stop():
    """An answer above the truth: right as far as it goes, a miss below, no part in calibration."""

    def stop(logits, tree):
        row = Prediction(torch.tensor([[0, 0, -1]]), torch.tensor([[0.9, 0.8, 0.0]]))
        return Prediction(*(values[: len(logits[0])] for values in row))

    evaluator = HierarchyEvaluator(
        UNEVEN.levels, UNEVEN.num_classes, UNEVEN, decoder=stop, costs="hf"
    )
    z = {name: torch.zeros(1, k) for name, k in zip(UNEVEN.levels, UNEVEN.num_classes, strict=True)}
    evaluator.update(z, UNEVEN.expand(torch.tensor([0])))
    found = evaluator.compute()
    first, second, third = UNEVEN.levels
    assert [found[f"{level}_top1"] for level in (first, second, third)] == [100, 100, 0]
    assert (found["full_path"], found["consistency"], found["top1"]) == (0, 100, 0)
    assert (found["hp"], found["hr"]) == (100, pytest.approx(200 / 3))
    assert found["cost"] == pytest.approx(0.2)
    assert (found["distance"], found["severity"]) == (1, 1)
    assert found[f"{first}_ece"] == pytest.approx(10)
    assert found[f"{third}_ece"] != found[f"{third}_ece"]  # nan: nothing was said


def test_costs_need_a_tree():
    with pytest.raises(ValueError, match="needs a taxonomy"):
        HierarchyEvaluator(["a"], [3], costs="hf")


# -- the best set


def best_set_by_hand(tree, p, beta):
    nodes = [name for name in names(tree) if name]
    best = (-1.0, 0, frozenset())
    for size in range(1, len(nodes) + 1):
        for chosen in combinations(nodes, size):
            kept = set(chosen)
            if any(node[:-1] and node[:-1] not in kept for node in kept):
                continue
            value = 0.0
            for chance, leaf in zip(p, tree.leaves, strict=True):
                path = {leaf[: k + 1] for k in range(len(leaf))}
                score = (1 + beta**2) * len(kept & path) / (len(kept) + beta**2 * len(path))
                value += chance * score
            if value > best[0] + 1e-12:
                best = (value, size, frozenset(kept))
    return best


@trees
@pytest.mark.parametrize("beta", [0.5, 1.0, 2.0])
def test_best_set_is_the_brute_forces(tree, beta):
    torch.manual_seed(1)
    log_p = random_log_p(tree, 12)
    chosen, value = best_hf_nodes(log_p, tree, beta)
    nodes = names(tree)
    for row, inside, got in zip(log_p.exp().tolist(), chosen.tolist(), value.tolist(), strict=True):
        want, _, kept = best_set_by_hand(tree, row, beta)
        assert inside[0]
        assert got == pytest.approx(want)
        assert {nodes[i] for i in range(1, len(nodes)) if inside[i]} == set(kept)


def test_best_set_is_closed_upwards_at_ties_and_beats_single_nodes():
    torch.manual_seed(0)
    tree = cifar100()
    log_p = (3 * torch.randn(200, 100)).log_softmax(1)
    log_p[:50] = torch.full((100,), 0.01).log()
    tables = node_tables(tree)
    chosen, value = best_hf_nodes(log_p, tree)
    assert (chosen <= chosen[:, tables.parents]).all()
    single = least_cost(log_p, "hf", tree)
    matrix = cost_matrix("hf", tree).float()
    at = tables.nodes_of(single.labels)[:, -1]
    assert (value >= 1 - (log_p.exp() * matrix[at]).sum(1) - 1e-5).all()
    assert (chosen.sum(1) > 4).any()  # some sets are no path
    # a chain, where a node is as likely as its only child
    chosen, _ = best_hf_nodes(torch.tensor([[0.9, 0.1], [0, 1]]).log(), CHAIN)
    assert (chosen <= chosen[:, node_tables(CHAIN).parents]).all()
    with pytest.raises(ValueError, match="beta"):
        best_hf_nodes(log_p, tree, 0)


def test_best_set_of_no_samples():
    chosen, value = best_hf_nodes(torch.zeros(0, 5), UNEVEN)
    assert chosen.shape == (0, 10)
    assert value.shape == (0,)
