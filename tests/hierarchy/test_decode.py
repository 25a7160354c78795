"""Decoders, against plain Python over small random forests.

Every node and leaf one by one, matrices of costs.
"""

import math
import random

import pytest
import torch

from timm_branches.hierarchy import sum_upwards
from timm_branches.hierarchy.decode import (
    DECODERS,
    DepthAccuracy,
    Prediction,
    back_off,
    decode,
    depth_accuracy_curve,
    leaf_log_probs,
    plot_depth_accuracy,
    register_decoder,
)
from timm_branches.hierarchy.evaluator import HierarchyEvaluator
from timm_branches.taxonomy import Taxonomy, cifar10

# 'cost' may stop above a leaf: test_cost.py
PATHS = [method for method in DECODERS if method not in ("independent", "cost")]
UNEVEN = Taxonomy(
    ["animal/pet/cat", "animal/pet/dog", "plant", "animal/bird", "transport/sea/ship"]
)


def random_tree(seed, uneven=True):
    """A random forest of 1 to 4 levels, leaves and nodes shuffled."""
    rng = random.Random(seed)
    depth = rng.randint(1, 4)
    leaves = []

    def grow(path):
        if len(path) == depth or (path and uneven and rng.random() < 0.3):
            leaves.append(path)
            return
        for name in rng.sample("abcde", rng.randint(1, 4)):
            grow((*path, name))

    grow(())
    rng.shuffle(leaves)
    nodes = Taxonomy(leaves).nodes
    return Taxonomy(leaves, order=[rng.sample(level, len(level)) for level in nodes])


def random_logits(tree, seed, n=5, dtype=torch.double):
    g = torch.Generator().manual_seed(seed)
    return [
        (3 * torch.randn(n, k, generator=g, dtype=torch.double)).to(dtype) for k in tree.num_classes
    ]


# ---- the oracles: one sample, dicts from node to probability


def softmax(scores):
    exps = {node: math.exp(score) for node, score in scores.items()}
    return {node: e / sum(exps.values()) for node, e in exps.items()}


def height(leaves, node):
    return max(len(leaf) - len(node) for leaf in leaves if leaf[: len(node)] == node)


def oracle_leaves(tree, scores):
    """Walk down with the mass that is left."""
    rest, p = 1.0, {}
    for level in scores:
        q = softmax(level)
        ends = [node for node in q if node in tree.leaves]
        p |= {node: rest * q[node] for node in ends}
        rest *= 1 - sum(q[node] for node in ends)
    return p


def oracle_path(tree, leaf, p):
    row = [
        (tree.nodes[d].index(leaf[: d + 1]), sum(p[j] for j in p if j[: d + 1] == leaf[: d + 1]))
        for d in range(len(leaf))
    ]
    return row + [(-1, 0.0)] * (tree.num_levels - len(leaf))


def oracle(tree, scores, method):
    """A list with (label, probability) for each level."""
    if method == "independent":
        best = [max(level, key=level.get) for level in scores]
        return [
            (tree.nodes[d].index(node), softmax(scores[d])[node]) for d, node in enumerate(best)
        ]
    if method == "top-down":
        node, path, row = (), 1.0, []
        for d, level in enumerate(scores):
            children = {child: score for child, score in level.items() if child[:-1] == node}
            if node in tree.leaves:
                row.append((-1, 0.0))
                continue
            q = softmax(children)
            node = max(q, key=q.get)
            path *= q[node]
            row.append((tree.nodes[d].index(node), path))
        return row
    if method == "best-path":
        q = [softmax(level) for level in scores]
        product = {
            leaf: math.prod(q[d][leaf[: d + 1]] for d in range(len(leaf))) for leaf in tree.leaves
        }
        mean = {leaf: product[leaf] ** (1 / len(leaf)) for leaf in tree.leaves}
        product = {leaf: m**tree.num_levels for leaf, m in mean.items()}
        p = {leaf: product[leaf] / sum(product.values()) for leaf in tree.leaves}
        return oracle_path(tree, max(mean, key=mean.get), p)
    if method == "path-sum":
        total = {}
        for leaf in tree.leaves:
            total[leaf] = sum(scores[d][leaf[: d + 1]] for d in range(len(leaf)))
        return oracle_path(tree, max(total, key=total.get), softmax(total))
    p = oracle_leaves(tree, scores)
    if method == "leaf-marginal":
        return oracle_path(tree, max(p, key=p.get), p)

    def cost(k, j):
        shared = max(d for d in range(min(len(k), len(j)) + 1) if k[:d] == j[:d])
        return height(tree.leaves, k[:shared]) if shared else tree.num_levels

    return oracle_path(tree, min(p, key=lambda k: sum(p[j] * cost(k, j) for j in p)), p)


def per_sample(tree, logits):
    return [
        [
            dict(zip(nodes, level[i].tolist(), strict=True))
            for nodes, level in zip(tree.nodes, logits, strict=True)
        ]
        for i in range(len(logits[0]))
    ]


@pytest.mark.parametrize("method", ["independent", *PATHS])
@pytest.mark.parametrize("uneven", [False, True])
def test_against_plain_python(method, uneven):
    for seed in range(40):
        tree = random_tree(seed, uneven)
        logits = random_logits(tree, seed)
        labels, probabilities = decode(logits, tree, method)
        rows = [oracle(tree, scores, method) for scores in per_sample(tree, logits)]
        assert labels.tolist() == [[label for label, _ in row] for row in rows]
        expected = torch.tensor([[p for _, p in row] for row in rows], dtype=torch.double)
        torch.testing.assert_close(probabilities, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("seed", range(20))
def test_leaf_distribution(seed):
    tree = random_tree(seed)
    logits = random_logits(tree, seed)
    p = leaf_log_probs(logits, tree).exp()
    expected = [
        [oracle_leaves(tree, scores)[leaf] for leaf in tree.leaves]
        for scores in per_sample(tree, logits)
    ]
    torch.testing.assert_close(p, torch.tensor(expected, dtype=torch.double))
    leaf_logits = torch.randn(
        4, tree.num_leaves, generator=torch.Generator().manual_seed(seed), dtype=torch.double
    )
    back = leaf_log_probs(sum_upwards(leaf_logits, tree), tree)
    torch.testing.assert_close(back, leaf_logits.log_softmax(-1))


def test_flat_model_agrees_with_its_own_sums():
    tree = random_tree(3)
    leaf_logits = torch.randn(
        50, tree.num_leaves, generator=torch.Generator().manual_seed(0), dtype=torch.double
    )
    levels = sum_upwards(leaf_logits, tree)
    labels, probabilities = decode(levels, tree, "leaf-marginal")
    assert torch.equal(labels, tree.expand(leaf_logits.argmax(-1)))
    for depth, level in enumerate(levels):
        has = labels[:, depth] >= 0
        torch.testing.assert_close(probabilities[has, depth], level.exp()[has, labels[has, depth]])


def test_remaining_mass_does_not_cancel():
    """After a shallow leaf that takes all but exp(-100), which is less than the rounding of 1."""
    tree = Taxonomy(["plant", "animal/cat", "animal/dog"])
    log_p = leaf_log_probs([torch.tensor([[100.0, 0.0]]), torch.tensor([[0.0, 0.0]])], tree)
    assert log_p[0].tolist() == pytest.approx([0.0, -100 - math.log(2), -100 - math.log(2)])


# ---- promises


def tangle(kind, tree, rng, n):
    """Logits no network should give."""

    def number():
        if kind == "half":
            return rng.choice([-65504.0, 65504.0, 0.0, rng.gauss(0, 10), -math.inf])
        if kind == "huge":
            return rng.choice([-3.4e38, 3.4e38, -1e38, 1e38, 0.0])
        if kind == "infinite":
            return rng.choice([-math.inf, math.inf, 0.0, rng.gauss(0, 3)])
        if kind == "masked":
            return rng.choice([-math.inf, -math.inf, -math.inf, rng.gauss(0, 3)])
        return rng.choice([0.0, 1.0])  # ties

    return [
        torch.tensor([[number() for _ in range(k)] for _ in range(n)]) for k in tree.num_classes
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["ties", "masked", "infinite", "huge", "half"])
def test_any_logits_give_a_path(kind, dtype):
    rng = random.Random(0)
    for seed in range(12):
        tree = random_tree(seed)
        logits = [level.to(dtype) for level in tangle(kind, tree, rng, 12)]
        log_p = leaf_log_probs(logits, tree)
        assert log_p.dtype == torch.float32
        torch.testing.assert_close(log_p.exp().sum(1), torch.ones(12))
        leaves = {tuple(row) for row in tree.leaf_table.tolist()}
        for method in DECODERS:
            labels, probabilities = decode(logits, tree, method)
            assert labels.dtype == torch.long
            assert probabilities.dtype == torch.float32
            assert ((probabilities >= 0) & (probabilities <= 1)).all()  # nan would fail
            if method != "independent":
                assert tree.valid_paths(labels).all()
            if method in PATHS:
                assert leaves.issuperset(map(tuple, labels.tolist()))
                assert (probabilities.diff(dim=1) <= 0).all()
                assert (probabilities[labels < 0] == 0).all()


@pytest.mark.parametrize("method", PATHS)
def test_what_is_impossible_is_not_chosen(method):
    """Cat is masked, so it is the dog, however unlikely it was and whatever other pets'
    relatives say."""
    logits = [
        torch.tensor([row]) for row in ([9.0, 0.0, 0.0], [9.0, 0.0, 0.0], [-torch.inf, -4.0, -9.0])
    ]
    assert decode(logits, UNEVEN, method).labels.tolist() == [[0, 0, 1]]


@pytest.mark.parametrize("method", DECODERS)
def test_silence_is_uniform(method):
    tree = cifar10()
    logits = [torch.full((2, k), -torch.inf) for k in tree.num_classes]
    zeros = [torch.zeros(2, k) for k in tree.num_classes]
    for mine, theirs in zip(decode(logits, tree, method), decode(zeros, tree, method), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("method", DECODERS)
def test_ties_go_to_the_lowest_index(method):
    """Leaf decoders to the lowest leaf, the others to the lowest node at each step.

    The coarse orders are turned.
    """
    leaves = [f"{a}/{a}{b}/{a}{b}{c}" for a in "xy" for b in "12" for c in "abcdefg"]
    tree = Taxonomy(leaves, order=[["y", "x"], ["y/y2", "x/x1", "x/x2", "y/y1"], None])
    first_leaf = [1, 1, 0]
    expected = {
        "independent": [0, 0, 0],
        "top-down": [0, 0, leaves.index("y/y2/y2a")],
        "cost": [0, -1, -1],  # as near to all leaves as the root is, and it says more
    }.get(method, first_leaf)
    for logit in (0.0, 0.1, 7.3):
        logits = [torch.full((3, k), logit) for k in tree.num_classes]
        assert decode(logits, tree, method).labels.tolist() == [expected] * 3


def test_ties_of_crm_outlast_rounding():
    """Two trees with the same leaf probabilities, turned round.

    Their sums are equal but for the last bit.
    """
    tree = Taxonomy([f"{a}/{i}" for a in "ab" for i in range(50)])
    half = torch.randn(200, 50, generator=torch.Generator().manual_seed(0))
    logits = sum_upwards(torch.cat([half, half.flip(1)], 1), tree)
    assert (decode(logits, tree, "crm").labels[:, 0] == 0).all()


def test_masked_siblings_are_equally_likely():
    """Both pets are masked; a transport with three kinds does not make them three."""
    tree = Taxonomy(
        ["animal/cat", "animal/dog", "transport/car", "transport/ship", "transport/train"]
    )
    logits = [torch.tensor([[2.0, 0.0]]), torch.tensor([[-torch.inf, -torch.inf, 1.0, 2.0, 3.0]])]
    labels, probabilities = decode(logits, tree, "top-down")
    assert labels.tolist() == [[0, 0]]
    torch.testing.assert_close(probabilities[0, 1], probabilities[0, 0] / 2)


def test_crm_hedges():
    """.35 on the best leaf, but .65 on the other tree: it pays to answer there."""
    tree = Taxonomy(["a/x", "b/y", "b/z", "b/w"])
    logits = sum_upwards(torch.tensor([[0.35, 0.3, 0.2, 0.15]]).log(), tree)
    assert decode(logits, tree, "leaf-marginal").labels.tolist() == [[0, 0]]
    labels, probabilities = decode(logits, tree, "crm")
    assert labels.tolist() == [[1, 1]]
    torch.testing.assert_close(probabilities, torch.tensor([[0.65, 0.3]]))


def test_short_paths_are_not_favoured():
    """.5 on one level against .6 * .6: the product prefers the short path, the mean does not."""
    tree = Taxonomy(["short", "long/x", "long/y"])
    logits = [torch.tensor([[0.4, 0.6]]).log(), torch.tensor([[0.6, 0.4]]).log()]
    labels, probabilities = decode(logits, tree, "best-path")
    assert labels.tolist() == [[1, 0]]
    products = torch.tensor([0.4**2, 0.6 * 0.6, 0.6 * 0.4])
    torch.testing.assert_close(
        probabilities, torch.stack([products[1:].sum(), products[1]])[None] / products.sum()
    )


@pytest.mark.parametrize("method", DECODERS)
@pytest.mark.parametrize(
    "tree", [cifar10(), UNEVEN, Taxonomy("abc"), Taxonomy(["a"]), Taxonomy(["a/b/c"])]
)
def test_few_samples(method, tree):
    for n in (0, 1):
        labels, probabilities = decode(random_logits(tree, 0, n), tree, method)
        assert labels.shape == probabilities.shape == (n, tree.num_levels)
        assert back_off(Prediction(labels, probabilities), 0.5).labels.shape == (n, tree.num_levels)
        assert leaf_log_probs(random_logits(tree, 0, n), tree).shape == (n, tree.num_leaves)
    logits = random_logits(tree, 1, 4)
    if tree.num_levels == 1:
        assert torch.equal(decode(logits, tree, method).labels, logits[0].argmax(-1, keepdim=True))
        torch.testing.assert_close(
            decode(logits, tree, method).probabilities[:, 0], logits[0].softmax(-1).amax(-1)
        )


@pytest.mark.parametrize("method", DECODERS)
def test_samples_do_not_depend_on_each_other(method):
    """In a batch larger than is worked on at once."""
    tree = Taxonomy([f"a/{i % 7}/{i}" for i in range(1500)] + [f"b/{i}" for i in range(500)])
    logits = random_logits(tree, 0, 600, torch.float32)
    order = torch.randperm(600, generator=torch.Generator().manual_seed(0))
    labels, probabilities = decode(logits, tree, method)
    turned = decode([level[order] for level in logits], tree, method)
    assert torch.equal(turned.labels, labels[order])
    torch.testing.assert_close(turned.probabilities, probabilities[order])
    alone = decode([level[97:98] for level in logits], tree, method)
    assert torch.equal(alone.labels, labels[97:98])


def test_gradient():
    tree = random_tree(7)
    assert len({len(leaf) for leaf in tree.leaves}) > 1
    with torch.inference_mode():  # what is kept from here must not spoil training
        decode(random_logits(tree, 0), tree, "crm")
    logits = [level.requires_grad_() for level in random_logits(tree, 0)]
    assert torch.autograd.gradcheck(lambda *levels: leaf_log_probs(levels, tree), logits)
    assert not decode(logits, tree, "crm").probabilities.requires_grad
    masked = [torch.zeros(2, k, requires_grad=True) for k in UNEVEN.num_classes]
    hidden = [level.masked_fill(torch.arange(level.shape[1]) != 1, -torch.inf) for level in masked]
    leaf_log_probs([hidden[0], torch.full_like(hidden[1], -torch.inf), hidden[2]], UNEVEN)[
        :, 2
    ].sum().backward()
    assert all(level.grad is None or level.grad.isfinite().all() for level in masked)


def test_nan_is_not_hidden():
    logits = random_logits(UNEVEN, 0, 2)
    for level in logits:
        level[0] = torch.nan
    for method in DECODERS:
        labels, probabilities = decode(logits, UNEVEN, method)
        assert probabilities[0, 0].isnan()
        assert probabilities[1].isfinite().all()
        assert torch.equal(labels[1], decode(logits, UNEVEN, method).labels[1])
        assert back_off(Prediction(labels, probabilities), 0.0).labels[0].tolist() == [-1, -1, -1]


@pytest.mark.parametrize(
    ("logits", "message"),
    [
        (
            [torch.zeros(2, 2), torch.zeros(2, 7)],
            r"shapes \(N, 2\), \(N, 7\), \(N, 10\), got \[\(2, 2\), \(2, 7\)\]",
        ),
        ([torch.zeros(2, 2), torch.zeros(2, 10), torch.zeros(2, 7)], "shapes"),
        ([torch.zeros(2, 2), torch.zeros(3, 7), torch.zeros(2, 10)], "shapes"),
        ([torch.zeros(2), torch.zeros(7), torch.zeros(10)], "shapes"),
        ([], r"got \[\]"),
        (
            [torch.zeros(2, 2), torch.zeros(2, 7), torch.zeros(2, 10, dtype=torch.long)],
            "'fine' must be floating point",
        ),
        (torch.zeros(3, 2), "sequence of tensors.*got a Tensor"),
        ({"coarse": torch.zeros(2, 2)}, r"lacks the levels \['middle', 'fine'\]"),
    ],
)
def test_wrong_logits(logits, message):
    with pytest.raises(ValueError, match=message):
        decode(logits, cifar10())
    with pytest.raises(ValueError, match=message):
        leaf_log_probs(logits, cifar10())


def test_wrong_method():
    with pytest.raises(
        ValueError, match="no decoder 'topdown'; there are 'independent', 'top-down'"
    ):
        decode(random_logits(UNEVEN, 0), UNEVEN, "topdown")


# ---- backing off


@pytest.mark.parametrize("method", DECODERS)
def test_back_off_by_hand(method):
    for seed in range(10):
        tree = random_tree(seed)
        prediction = decode(random_logits(tree, seed), tree, method)
        for threshold in (0, 0.3, 0.6, 1.0, float(prediction.probabilities[0, 0])):
            labels, probabilities = back_off(prediction, threshold)
            for i, (row, p) in enumerate(zip(*map(torch.Tensor.tolist, prediction), strict=True)):
                stands = 0
                while stands < len(row) and row[stands] >= 0 and p[stands] >= threshold:
                    stands += 1
                assert labels[i].tolist() == row[:stands] + [-1] * (len(row) - stands)
                assert probabilities[i].tolist() == p[:stands] + [0.0] * (len(row) - stands)


def test_back_off_limits():
    prediction = Prediction(
        torch.tensor([[1, 2, 3], [1, 2, -1]]), torch.tensor([[0.4, 0.9, 0.7], [0.8, 0.7, 0.0]])
    )
    # level 0 fails, so all below do
    assert back_off(prediction, 0.5).labels.tolist() == [[-1, -1, -1], [1, 2, -1]]
    # float32's 0.8 is its equal
    assert back_off(prediction, 0.9 - 0.1).labels.tolist() == [[-1, -1, -1], [1, -1, -1]]
    assert back_off(prediction, torch.tensor([0.4, 0.9, 0.8])).labels.tolist() == [
        [1, 2, -1],
        [1, -1, -1],
    ]
    assert (
        back_off(prediction, torch.tensor(0.4).double()).labels.tolist()
        == prediction.labels.tolist()
    )


@pytest.mark.parametrize(
    ("threshold", "message"),
    [
        (1.5, r"in \[0, 1\], got 1.5"),
        (-0.1, "got -0.1"),
        (math.nan, "got nan"),
        (torch.tensor([0.5, 0.5, 2.0]), "got 2"),
        (torch.tensor([0.5, 0.5]), r"3 levels, got shape \(2,\)"),
        (torch.zeros(4, 3), "3 levels"),
    ],
)
def test_wrong_threshold(threshold, message):
    with pytest.raises(ValueError, match=message):
        back_off(Prediction(torch.zeros(4, 3, dtype=torch.long), torch.ones(4, 3)), threshold)


def test_wrong_prediction():
    with pytest.raises(ValueError, match=r"\(4, 3\) and \(4, 2\)"):
        back_off(Prediction(torch.zeros(4, 3, dtype=torch.long), torch.ones(4, 2)), 0.5)


@pytest.mark.parametrize("method", ["independent", "crm"])
@pytest.mark.parametrize("seed", range(5))
def test_curve_by_counting(method, seed):
    tree, rng = random_tree(seed + 3), random.Random(seed)
    prediction = decode(random_logits(tree, seed, 30), tree, method)
    labels = tree.expand([rng.randrange(-1, tree.num_leaves) for _ in range(30)])
    labels[:, -1][torch.tensor([rng.random() < 0.3 for _ in range(30)])] = -1
    thresholds = torch.cat([prediction.probabilities.unique(), torch.tensor([0.0, 0.5, 1.0])])
    curve = depth_accuracy_curve(prediction, labels, thresholds)
    for t, threshold in enumerate(thresholds):
        answers = back_off(prediction, threshold).labels.tolist()
        depths = [sum(x >= 0 for x in row) for row in answers]
        judged = []
        for row, truth in zip(answers, labels.tolist(), strict=True):
            both = [(a, b) for a, b in zip(row, truth, strict=True) if a >= 0 and b >= 0]
            judged += [both[-1][0] == both[-1][1]] if both else []
        assert curve.mean_depth[t].item() == pytest.approx(sum(depths) / 30)
        assert curve.shares[t].tolist() == pytest.approx(
            [depths.count(d) / 30 for d in range(tree.num_levels + 1)]
        )
        expected = sum(judged) / len(judged) if judged else math.nan
        assert curve.accuracy[t].item() == pytest.approx(expected, nan_ok=True)


def test_default_thresholds_are_the_written_numbers():
    prediction = Prediction(torch.zeros(101, 1, dtype=torch.long), torch.arange(101)[:, None] / 100)
    curve = depth_accuracy_curve(prediction, torch.zeros(101, 1, dtype=torch.long))
    assert curve.thresholds.tolist() == [i / 100 for i in range(101)]
    assert curve.mean_depth.tolist() == pytest.approx([(101 - i) / 101 for i in range(101)])
    assert (curve.accuracy == 1).all()


def test_curve_leaves_nan_unanswered():
    nan = Prediction(
        torch.zeros(2, 2, dtype=torch.long), torch.tensor([[torch.nan, 0.5], [0.5, torch.nan]])
    )
    curve = depth_accuracy_curve(nan, torch.zeros(2, 2, dtype=torch.long), torch.tensor([0.0, 0.5]))
    assert curve.shares.tolist() == [[0.5, 0.5, 0.0]] * 2


def test_curve_without_samples():
    nothing = torch.zeros(0, 2, dtype=torch.long)
    curve = depth_accuracy_curve(Prediction(nothing, torch.zeros(0, 2)), nothing)
    assert curve.shares.shape == (101, 3)
    assert all(values.isnan().all() for values in curve[1:])


@pytest.mark.parametrize(
    ("labels", "thresholds", "message"),
    [
        (torch.zeros(2, 3, dtype=torch.long), None, r"\(2, 2\) and \(2, 3\)"),
        (torch.zeros(2, 2), None, "class indices"),
        (torch.zeros(2, 2, dtype=torch.long), torch.tensor([0.5, 1.1]), r"\[0, 1\], got 1.1"),
        (torch.zeros(2, 2, dtype=torch.long), torch.tensor(0.5), r"shape \(T,\), got \(\)"),
    ],
)
def test_wrong_curve_arguments(labels, thresholds, message):
    with pytest.raises(ValueError, match=message):
        depth_accuracy_curve(
            Prediction(torch.zeros(2, 2, dtype=torch.long), torch.ones(2, 2)), labels, thresholds
        )


class TestPlot:
    curve = DepthAccuracy(
        torch.tensor([0.0, 0.5, 1.0]),
        torch.tensor([3.0, 2.0, 0.0]),
        torch.tensor([0.5, 0.8, torch.nan]),
        torch.zeros(3, 4),
    )

    @pytest.mark.parametrize("several", [False, True])
    def test_draws(self, several, tmp_path):
        image = pytest.importorskip("matplotlib.image")
        curves = {"crm": self.curve, "top-down": self.curve} if several else self.curve
        file = plot_depth_accuracy(curves, tmp_path / "new" / "trade.png")
        assert [found.name for found in file.parent.iterdir()] == ["trade.png"]
        pixels = {
            tuple(pixel)
            for pixel in (255 * image.imread(file)).round().astype(int)[..., :3].reshape(-1, 3)
        }
        assert (0x00, 0x72, 0xB2) in pixels  # the first curve's colour
        assert ((0xD5, 0x5E, 0x00) in pixels) == several

    def test_nothing_to_draw(self, tmp_path):
        with pytest.raises(ValueError, match="no curves"):
            plot_depth_accuracy({}, tmp_path / "trade.png")


# ---- from outside


def test_a_dict_is_read_by_the_levels_names():
    tree = cifar10()
    logits = random_logits(tree, 0)
    by_name = dict(reversed(list(zip(tree.levels, logits, strict=True))))
    for method in DECODERS:
        assert torch.equal(
            decode(by_name, tree, method).labels, decode(logits, tree, method).labels
        )
    assert torch.equal(leaf_log_probs(by_name, tree), leaf_log_probs(logits, tree))


def most_cautious(level_logits, taxonomy):
    """Only the first level's answer."""
    labels = torch.full((len(level_logits[0]), taxonomy.num_levels), -1)
    labels[:, 0] = level_logits[0].argmax(-1)
    return Prediction(labels, (labels >= 0).to(level_logits[0].dtype))


@pytest.fixture
def cautious():
    register_decoder("cautious", most_cautious)
    yield
    del DECODERS["cautious"]


@pytest.mark.usefixtures("cautious")
def test_a_decoder_from_outside():
    tree = cifar10()
    logits = random_logits(tree, 0)
    labels = decode(logits, tree, "cautious").labels
    assert labels[:, 0].tolist() == logits[0].argmax(-1).tolist()
    assert (labels[:, 1:] == -1).all()
    evaluator = HierarchyEvaluator(tree.levels, tree.num_classes, tree, decoder="cautious")
    evaluator.update(dict(zip(tree.levels, logits, strict=True)), tree.expand([0] * 5))
    share = (logits[0].argmax(-1) == 0).double().mean()
    assert evaluator.compute()["coarse_top1"] == pytest.approx(100 * float(share))
    assert evaluator.compute()["fine_top1"] == 0
    register_decoder("cautious", most_cautious)  # again, as a notebook's cell does
    with pytest.raises(ValueError, match="'cautious' is registered already"):
        register_decoder("cautious", decode)


def test_a_decoder_that_breaks_the_contract():
    register_decoder(
        "short", lambda scores, tree: Prediction(*[x[:, 0] for x in most_cautious(scores, tree)])
    )
    try:
        with pytest.raises(ValueError, match="The decoder 'short' must give labels"):
            decode(random_logits(cifar10(), 0), cifar10(), "short")
    finally:
        del DECODERS["short"]
