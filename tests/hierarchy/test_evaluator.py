"""The evaluator against the metrics' functional forms on all samples at once, sklearn, and
itself in two processes."""

import json
import math
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.metrics import classification_report, confusion_matrix, recall_score

from timm_branches.hierarchy import consistency, full_path_accuracy, level_accuracy, sum_upwards
from timm_branches.hierarchy.decode import DECODERS, decode, leaf_log_probs
from timm_branches.hierarchy.evaluator import HierarchyEvaluator
from timm_branches.hierarchy.metric_registry import METRICS, register_metric
from timm_branches.hierarchy.metrics import (
    expected_calibration_error,
    format_class_report,
    top_k_accuracy,
)
from timm_branches.hierarchy.tree_metrics import (
    distance_at_k,
    hierarchical_distance,
    hierarchical_precision_recall_f1,
    mistake_severity,
)
from timm_branches.taxonomy import Taxonomy, cifar10, cifar100

UNEVEN = Taxonomy(
    [*(f"animal/pet/{name}" for name in "abcdef"), "plant", "animal/bird", "transport/sea/ship"],
    levels=["coarse", "middle", "fine"],
)
TREES = {"even": cifar10(), "uneven": UNEVEN, "large": cifar100()}
trees = pytest.mark.parametrize("tree", TREES.values(), ids=TREES)


def random_case(tree, size=41, seed=0):
    """Logits by level that know something, and labels of which some are unknown."""
    torch.manual_seed(seed)
    labels = tree.expand(torch.randint(tree.num_leaves, (size,)))
    logits = {
        name: 2 * torch.randn(size, k) + 4 * F.one_hot(labels[:, i].clamp(min=0), k)
        for i, (name, k) in enumerate(zip(tree.levels, tree.num_classes, strict=True))
    }
    labels[::5, 2:] = -1
    labels[7:9, 1:] = -1
    labels[11:13] = -1
    labels[13, 0] = -1
    return logits, labels


def make_evaluator(tree, **kwargs):
    return HierarchyEvaluator(tree.levels, tree.num_classes, tree, **kwargs)


def update_in_batches(evaluator, logits, labels, size=9):
    for start in range(0, len(labels), size):
        part = slice(start, start + size)
        evaluator.update({name: y[part] for name, y in logits.items()}, labels[part])
    return evaluator


def all_at_once(tree, logits, labels, decoder):
    """What the metrics' functional forms say."""
    answers, confidences = decode(list(logits.values()), tree, decoder)
    want, losses = {}, []
    for level, (name, y) in enumerate(logits.items()):
        label, known = labels[:, level], labels[:, level] >= 0
        losses.append(F.cross_entropy(y[known].double(), label[known], reduction="none"))
        want[f"{name}_top1"] = level_accuracy(answers, labels)[level] * 100
        if y.shape[1] > 5:
            want[f"{name}_top5"] = top_k_accuracy(y, label, 5) * 100
        known &= answers[:, level] >= 0
        right = answers[known, level] == label[known]
        want[f"{name}_ece"] = expected_calibration_error(confidences[known, level], right) * 100
    want["loss"] = torch.cat(losses).mean()
    want["full_path"] = full_path_accuracy(answers, labels) * 100
    want["consistency"] = consistency(answers, tree) * 100
    want["tice"] = 100 - want["consistency"]
    scores = hierarchical_precision_recall_f1(answers, labels, tree)
    want |= {name: score * 100 for name, score in zip(("hp", "hr", "hf"), scores, strict=True)}
    want["distance"] = hierarchical_distance(answers, labels, tree)
    for k in (5, 20):
        if k < tree.num_leaves:
            want[f"dist@{k}"] = distance_at_k(
                leaf_log_probs(list(logits.values()), tree), labels, tree, k
            )
    want["severity"], top1 = mistake_severity(answers, labels, tree)
    if (tree.leaf_table < 0).any():
        want["top1"] = top1 * 100
    else:
        assert want["fine_top1"] == top1 * 100
    return {name: float(value) for name, value in want.items()}


@trees
@pytest.mark.parametrize("decoder", DECODERS)
def test_batches_add_up(tree, decoder):
    logits, labels = random_case(tree)
    want = all_at_once(tree, logits, labels, decoder)
    for size in (1, 9, 41):
        evaluator = update_in_batches(make_evaluator(tree, decoder=decoder), logits, labels, size)
        evaluator.update({name: y[:0] for name, y in logits.items()}, labels[:0])
        metrics = evaluator.compute()
        assert tuple(metrics) == evaluator.metric_names
        assert metrics == pytest.approx(want, rel=1e-5)
        assert all(math.isfinite(value) for value in metrics.values())
    assert (metrics["consistency"] < 100) == (decoder == "independent")


def test_only_so_many_samples():
    tree = TREES["large"]
    logits, labels = random_case(tree)
    evaluator = update_in_batches(make_evaluator(tree, max_samples=30), logits, labels)
    want = update_in_batches(
        make_evaluator(tree), {name: y[:30] for name, y in logits.items()}, labels[:30]
    )
    assert evaluator.num_samples == want.num_samples == 30
    assert evaluator.compute() == pytest.approx(want.compute(), rel=1e-12)
    # as text nan is nan
    assert json.dumps(evaluator.class_report()) == json.dumps(want.class_report())


def test_half_precision_logits():
    logits, labels = random_case(cifar10())
    half = {name: y.bfloat16() for name, y in logits.items()}
    evaluator, want = make_evaluator(cifar10()), make_evaluator(cifar10())
    evaluator.update(half, labels)
    want.update({name: y.float() for name, y in half.items()}, labels)
    assert evaluator.compute() == want.compute()


@trees
def test_names(tree):
    evaluator = make_evaluator(tree)
    names = set(evaluator.metric_names)
    assert len(names) == len(evaluator.metric_names)
    for name, k in zip(tree.levels, tree.num_classes, strict=True):
        assert (f"{name}_top5" in names) == (k > 5)
    assert ("dist@5" in names, "dist@20" in names) == (True, tree is TREES["large"])
    assert ("top1" in names) == (tree is UNEVEN)
    assert evaluator.default_metric in names
    assert names > set(evaluator.headline)
    bare = HierarchyEvaluator(["a", "b"], [2, 7])
    assert bare.metric_names == (
        "loss",
        "a_top1",
        "b_top1",
        "b_top5",
        "full_path",
        "a_ece",
        "b_ece",
    )
    assert bare.headline == ("a_top1", "b_top1", "full_path")
    # as many classes and leaves as are looked at: all models would be equal
    small = Taxonomy([f"a/{i}" for i in range(5)])
    assert not {"level2_top5", "dist@5"} & set(make_evaluator(small).metric_names)


@trees
def test_which_way_is_better(tree):
    """A classifier that ranks all leaves as the tree does, beside one that knows nothing."""
    torch.manual_seed(0)
    truth = torch.randint(tree.num_leaves, (50,))
    labels = tree.expand(truth)
    good, bad = make_evaluator(tree), make_evaluator(tree)
    heights = tree.lca_height(labels[:, None], tree.leaf_table)
    for evaluator, leaf_logits in ((good, -20.0 * heights), (bad, torch.randn(heights.shape))):
        noise = [] if evaluator is good else [3 * torch.randn(50, k) for k in tree.num_classes]
        levels = noise or sum_upwards(leaf_logits, tree)
        evaluator.update(dict(zip(tree.levels, levels, strict=True)), labels)
    good, bad = good.compute(), bad.compute()
    assert math.isnan(good.pop("severity"))
    assert HierarchyEvaluator.lower_is_better("severity")
    for name, value in good.items():
        assert (value < bad[name]) == HierarchyEvaluator.lower_is_better(name), name
        assert value != bad[name]


@trees
def test_without_samples_nothing_is_claimed(tree):
    evaluator = make_evaluator(tree)
    assert all(math.isnan(value) for value in evaluator.compute().values())
    logits, labels = random_case(tree)
    evaluator.update(logits, torch.full_like(labels, -1))
    answered = evaluator.compute()
    assert [name for name, value in answered.items() if not math.isnan(value)] == [
        "consistency",
        "tice",
    ]
    evaluator.reset()
    labels[:, 1:] = -1
    coarse = tree.parents[1].bincount() > 0  # leaves of the first level would be known leaves
    labels[~coarse[labels[:, 0].clamp(min=0)], 0] = -1
    evaluator.update(logits, labels)
    unknown = {
        "middle_top1",
        "middle_top5",
        "middle_ece",
        "fine_top1",
        "fine_top5",
        "fine_ece",
        "distance",
        "dist@5",
        "dist@20",
        "top1",
        "severity",
    } & set(evaluator.metric_names)
    assert {name for name, value in evaluator.compute().items() if math.isnan(value)} == unknown


def test_levels_that_are_not_a_number():
    """A network that has diverged is not calibrated, and the loss says so."""
    logits, labels = random_case(cifar10())
    evaluator = make_evaluator(cifar10())
    evaluator.update({name: torch.full_like(y, math.nan) for name, y in logits.items()}, labels)
    metrics = evaluator.compute()
    assert math.isnan(metrics["loss"])
    assert math.isnan(metrics["fine_ece"])
    # it answers nothing, rather than its first class
    assert metrics["fine_top1"] == metrics["full_path"] == 0
    assert all(int(matrix.sum()) == 0 for matrix in evaluator.confusion_matrices())


# -- classes


@pytest.mark.parametrize("decoder", ["independent", "leaf-marginal"])
def test_class_report_is_sklearns(decoder):
    logits, labels = random_case(UNEVEN)
    labels[labels[:, 2] == 3] = -1
    evaluator = update_in_batches(make_evaluator(UNEVEN, decoder=decoder), logits, labels)
    answers = decode(list(logits.values()), UNEVEN, decoder).labels
    rows = evaluator.class_report()
    assert [(row["level"], row["class"]) for row in rows] == [
        (level, name)
        for level, names in zip(UNEVEN.levels, UNEVEN.classes, strict=True)
        for name in names
    ]
    matrices = evaluator.confusion_matrices()
    for i, (level, k) in enumerate(zip(UNEVEN.levels, UNEVEN.num_classes, strict=True)):
        known = labels[:, i] >= 0
        truth, guess = labels[known, i], answers[known, i]
        want = classification_report(
            truth, guess, labels=range(k), output_dict=True, zero_division=np.nan
        )
        for c, row in enumerate(row for row in rows if row["level"] == level):
            got = [row["precision"], row["recall"], row["f1"], row["support"]]
            wanted = [want[str(c)][key] for key in ("precision", "recall", "f1-score", "support")]
            assert got == pytest.approx(
                [*(100 * x for x in wanted[:3]), wanted[3]], rel=1e-12, nan_ok=True
            )
        np.testing.assert_array_equal(
            matrices[i].numpy(), confusion_matrix(truth, guess, labels=range(k))
        )
    assert any(math.isnan(row["recall"]) for row in rows)


def test_class_report_as_text():
    evaluator = HierarchyEvaluator(["kind"], [3])
    evaluator.update({"kind": torch.eye(3)[[0, 0, 1]]}, torch.tensor([[0], [1], [1]]))
    assert format_class_report(evaluator.class_report()).splitlines() == [
        "level  class  precision   recall       f1  support",
        "kind   0          50.00   100.00    66.67        1",
        "kind   1         100.00    50.00    66.67        2",
        "kind   2            nan      nan      nan        0",
    ]
    assert len(format_class_report([]).splitlines()) == 1


def test_no_matrix_of_very_many_classes():
    evaluator = HierarchyEvaluator(["a", "b", "c"], [1000, 1001, 2])
    labels = torch.tensor([[999, 1000, 1], [5, 1000, -1]])
    logits = [torch.randn(2, k) for k in (1000, 1001, 2)]
    logits[1][:, 1000] = 10
    evaluator.update(dict(zip("abc", logits, strict=True)), labels)
    shapes = [
        matrix if matrix is None else tuple(matrix.shape)
        for matrix in evaluator.confusion_matrices()
    ]
    assert shapes == [(1000, 1000), None, (2, 2)]
    row = evaluator.class_report()[2000]
    assert row == {
        "level": "b",
        "class": "1000",
        "precision": 100,
        "recall": 100,
        "f1": 100,
        "support": 2,
    }
    assert evaluator.compute()["b_top1"] == 100


# -- several processes


def worker(rank, folder):
    """Each of two processes takes its share of the samples; shares differ in size."""
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=60),
    )
    result = {}
    for name, tree in TREES.items():
        logits, labels = random_case(tree)
        part = slice(0, 29) if rank else slice(29, 41)
        evaluator = make_evaluator(tree, decoder="top-down")
        update_in_batches(evaluator, {key: y[part] for key, y in logits.items()}, labels[part])
        own = evaluator.compute()
        result[name] = [
            evaluator.compute(distributed=True),
            evaluator.class_report(),
            own == evaluator.summary(),
            [matrix.tolist() for matrix in evaluator.confusion_matrices()],
        ]
    (folder / f"{rank}.json").write_text(json.dumps(result))
    dist.destroy_process_group()


def test_two_processes_count_as_one(tmp_path):
    torch.multiprocessing.spawn(worker, (tmp_path,), nprocs=2)
    for rank in (0, 1):
        for name, (metrics, report, own_stays, matrices) in json.loads(
            (tmp_path / f"{rank}.json").read_text()
        ).items():
            want = update_in_batches(
                make_evaluator(TREES[name], decoder="top-down"), *random_case(TREES[name])
            )
            assert metrics == pytest.approx(want.compute(), rel=1e-12)
            assert json.dumps(report) == json.dumps(want.class_report())  # as text nan is nan
            assert matrices == [matrix.tolist() for matrix in want.confusion_matrices()]
            assert own_stays


def test_an_update_ends_the_joined_count(monkeypatch):
    """Three processes that happen to hold the same.

    Classes and matrices are of all of them until counting goes on.
    """
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: tensor.mul_(3))
    logits, labels = random_case(cifar10())
    evaluator = make_evaluator(cifar10())
    known = int((labels >= 0).sum())

    def counted():
        matrices = sum(int(matrix.sum()) for matrix in evaluator.confusion_matrices())
        return [matrices, sum(row["support"] for row in evaluator.class_report())]

    evaluator.update(logits, labels)
    assert counted() == [known] * 2
    assert evaluator.compute(distributed=True) == evaluator.compute()
    assert counted() == [3 * known] * 2
    evaluator.update(logits, labels)
    assert counted() == [2 * known] * 2
    evaluator.compute(distributed=True)
    evaluator.reset()
    assert counted() == [0, 0]


# -- what is refused


def test_what_is_refused():
    with pytest.raises(ValueError, match="no decoder 'beam': choose one of independent, top-down"):
        make_evaluator(UNEVEN, decoder="beam")
    with pytest.raises(ValueError, match="'crm' needs a taxonomy"):
        HierarchyEvaluator(["a"], [3], decoder="crm")
    with pytest.raises(ValueError, match="one head per level"):
        HierarchyEvaluator(["a", "b"], [2, 3], UNEVEN)
    same_sizes = Taxonomy(["a/x", "b/y"], levels=["coarse", "fine"])
    with pytest.raises(ValueError, match="the taxonomy's in another order"):
        HierarchyEvaluator(["fine", "coarse"], [2, 2], same_sizes)
    evaluator = HierarchyEvaluator(["a"], [3])
    labels = torch.zeros(2, 1, dtype=torch.long)
    for wrong in (3, -2, -100):
        with pytest.raises(ValueError, match=f"label {wrong} of level 'a' is out of range"):
            evaluator.update({"a": torch.randn(2, 3)}, labels + wrong)
    with pytest.raises(ValueError, match=r"lacks the levels \['a'\]"):
        evaluator.update({"b": torch.randn(2, 3)}, labels)
    for bad in (labels[:, 0], labels.expand(2, 2), labels.float()):
        with pytest.raises(ValueError, match=r"labels \(B, 1\)"):
            evaluator.update({"a": torch.randn(2, 3)}, bad)
    for bad in (torch.randn(2, 4), torch.randn(3, 3), torch.randn(2, 3, 3)):
        with pytest.raises(ValueError, match=r"logits \(2, K\) of \[3\] classes"):
            evaluator.update({"a": bad}, labels)
    assert evaluator.num_samples == 0


# -- metrics from outside


@pytest.fixture
def metrics_from_outside():
    @register_metric("root_mistakes", higher_is_better=False)
    def root_mistakes(batch):
        """The mean over the samples whose root is known."""
        wrong = (batch.predictions[:, 0] != batch.labels[:, 0]).double()
        return wrong.where(batch.labels[:, 0] >= 0, math.nan)

    def found(batch):
        """By class of the last level: samples, and right ones."""
        label = batch.labels[:, -1]
        right = label[(label >= 0) & (label == batch.predictions[:, -1])]
        classes = batch.logits[-1].shape[1]
        return label[label >= 0].bincount(minlength=classes), right.bincount(minlength=classes)

    def mean_recall(known, right):
        return (right / known)[known > 0].mean()

    register_metric("mean_recall", found, result=mean_recall)
    register_metric(
        "needs_tree",
        lambda batch: batch.distances[:1],
        needs_taxonomy=True,
        result=lambda known: known.sum(),
    )
    yield
    for name in ("root_mistakes", "mean_recall", "needs_tree"):
        METRICS.pop(name, None)


@trees
@pytest.mark.usefixtures("metrics_from_outside")
def test_metrics_from_outside(tree):
    logits, labels = random_case(tree)
    assert not {"needs_tree"} & set(HierarchyEvaluator(["a"], [3]).metric_names)
    evaluator = update_in_batches(make_evaluator(tree), logits, labels)
    metrics = evaluator.compute()
    assert tuple(metrics)[-3:] == ("root_mistakes", "mean_recall", "needs_tree")
    first, last = list(logits.values())[0].argmax(1), list(logits.values())[-1].argmax(1)
    known = labels[:, 0] >= 0
    wrong = sum(int(a != b) for a, b in zip(first[known], labels[known, 0], strict=True))
    assert metrics["root_mistakes"] == pytest.approx(wrong / int(known.sum()))
    known = labels[:, -1] >= 0
    want = recall_score(
        labels[known, -1],
        last[known],
        average=None,
        zero_division=0.0,
        labels=labels[known, -1].unique(),
    )
    assert metrics["mean_recall"] == pytest.approx(want.mean())
    assert not HierarchyEvaluator.higher_is_better("root_mistakes")
    assert HierarchyEvaluator.lower_is_better("root_mistakes")
    assert HierarchyEvaluator.higher_is_better("mean_recall")
    empty = make_evaluator(tree).compute()
    assert math.isnan(empty["root_mistakes"])
    assert math.isnan(empty["mean_recall"])


@pytest.mark.usefixtures("metrics_from_outside")
def test_a_metric_from_outside_over_processes(monkeypatch):
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: tensor.mul_(3))
    logits, labels = random_case(cifar10())
    evaluator = make_evaluator(cifar10())
    evaluator.update(logits, labels)
    one, three = evaluator.compute(), evaluator.compute(distributed=True)
    assert three["mean_recall"] == one["mean_recall"]
    assert three["needs_tree"] == 3 * one["needs_tree"] > 0
    assert evaluator.compute() == one


@pytest.mark.usefixtures("metrics_from_outside")
def test_metrics_from_outside_that_are_refused():
    with pytest.raises(ValueError, match="'mean_recall' is registered already"):
        register_metric("mean_recall", len)
    METRICS.pop("root_mistakes")
    register_metric("root_mistakes", lambda batch: batch.labels)
    with pytest.raises(ValueError, match=r"one value for each of the 0 samples.*\(0, 3\)"):
        make_evaluator(cifar10())
    METRICS.pop("root_mistakes")
    register_metric("full_path", lambda batch: batch.labels[:, 0])
    try:
        with pytest.raises(ValueError, match="'full_path' has the name of a standard one"):
            make_evaluator(cifar10())
    finally:
        del METRICS["full_path"]
