"""Metrics of segmentation against torchmetrics, scikit-learn, and pixels counted in plain
Python."""

import math

import pytest
import torch
import torch.nn.functional as F

from timm_branches.dense import SegmentationEvaluator, pixel_cross_entropy
from timm_branches.hierarchy import sum_upwards
from timm_branches.hierarchy.metrics import consistency, full_path_accuracy
from timm_branches.hierarchy.tree_metrics import hierarchical_distance
from timm_branches.taxonomy import Taxonomy

TREE = Taxonomy(["a/x", "a/y", "b/z", "b/w", "c/v"], levels=["coarse", "fine"])
UNEVEN = Taxonomy(["a/x", "a/y", "b"], levels=["coarse", "fine"])


def make(classes=5, ignored=255, images=6, seed=0, size=(7, 9)):
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(classes, (images, *size), generator=generator)
    logits = torch.randn(images, classes, *size, generator=generator) + 1.5 * F.one_hot(
        target, classes
    ).movedim(-1, 1)
    target[torch.rand(target.shape, generator=generator) < 0.2] = ignored
    return logits, target


def plain_iou(answers, target, classes, ignored):
    """IoU of each class by counting pixels one by one; None for a class in neither."""
    pairs = [
        (a, t)
        for a, t in zip(answers.flatten().tolist(), target.flatten().tolist(), strict=True)
        if t not in (ignored, -1)
    ]
    unions = [sum(k in pair for pair in pairs) for k in range(classes)]
    return [
        sum(pair == (k, k) for pair in pairs) / union if union else None
        for k, union in enumerate(unions)
    ]


@pytest.mark.parametrize("ignored", [-1, 11, 255])
def test_against_torchmetrics_and_scikit_learn(ignored):
    from sklearn.metrics import confusion_matrix
    from torchmetrics.functional.classification import multiclass_accuracy, multiclass_jaccard_index

    logits, target = make(ignored=ignored)
    evaluator = SegmentationEvaluator(5, ignored)
    for first in range(0, 6, 4):
        evaluator.update({"mask": logits[first : first + 4]}, target[first : first + 4])
    metrics = evaluator.compute()
    known = target != ignored
    answers = logits.argmax(1)
    assert (
        evaluator.confusion_matrices()[0].tolist()
        == confusion_matrix(target[known], answers[known]).tolist()
    )
    jaccard = multiclass_jaccard_index(logits, target, 5, ignore_index=ignored)
    accuracy = multiclass_accuracy(logits, target, 5, average="micro", ignore_index=ignored)
    assert metrics["miou"] == pytest.approx(100 * float(jaccard), abs=1e-4)
    assert metrics["pixel_accuracy"] == pytest.approx(100 * float(accuracy), abs=1e-4)
    assert metrics["loss"] == pytest.approx(
        float(pixel_cross_entropy(logits, target, ignored)), rel=1e-6
    )
    assert list(evaluator.class_iou()["pixel"].values()) == pytest.approx(
        [100 * iou for iou in plain_iou(answers, target, 5, ignored)]
    )


def test_absent_classes_are_left_out_and_answers_of_an_unlabelled_class_are_not():
    #                     labels 0 0 1 1, answers 0 0 1 2; class 3 is in neither
    evaluator = SegmentationEvaluator(["a", "b", "c", "d"])
    evaluator.update(
        9 * F.one_hot(torch.tensor([[[0, 0, 1, 2]]]), 4).movedim(-1, 1).float(),
        torch.tensor([[[0, 0, 1, 1]]]),
    )
    iou = evaluator.class_iou()["pixel"]
    assert {name: iou[name] for name in "abc"} == {"a": 100, "b": 50, "c": 0}
    assert math.isnan(iou["d"])
    assert evaluator.compute()["miou"] == 50
    assert evaluator.compute()["pixel_accuracy"] == 75


def test_the_split_into_batches_and_reset_do_not_matter():
    logits, target = make()
    together, apart = SegmentationEvaluator(5, 255), SegmentationEvaluator(5, 255)
    together.update(logits, target)
    apart.update(logits.flip(0) * 3, target)
    apart.reset()
    for i in range(6):
        apart.update(logits[i : i + 1], target[i : i + 1])
    assert dict(apart.compute()) == pytest.approx(dict(together.compute()), rel=1e-12)
    assert apart.num_samples == 6


def test_many_pixels_are_taken_in_parts(monkeypatch):
    logits, target = make()
    whole, parts = SegmentationEvaluator(5, 255, TREE), SegmentationEvaluator(5, 255, TREE)
    whole.update(logits, target)
    monkeypatch.setattr("timm_branches.dense.metrics._CHUNK", 50)
    parts.update(logits, target)
    assert dict(parts.compute()) == pytest.approx(dict(whole.compute()), rel=1e-12)


def test_padding_of_the_sampler_does_not_count():
    logits, target = make()
    limited, expected = SegmentationEvaluator(5, 255, max_samples=5), SegmentationEvaluator(5, 255)
    expected.update(logits[:5], target[:5])
    for first in (0, 4):
        limited.update(logits[first : first + 4], target[first : first + 4])
    limited.update(logits, target)
    assert limited.num_samples == 5
    assert dict(limited.compute()) == pytest.approx(dict(expected.compute()), rel=1e-12)


def test_unknown_pixels_never_count_beside_an_ignore_index():
    logits, target = make()
    unknown, ignored = SegmentationEvaluator(5, 255), SegmentationEvaluator(5, 255)
    unknown.update(logits, torch.where(target == 2, -1, target))
    ignored.update(logits, torch.where(target == 2, 255, target))
    assert unknown.compute() == ignored.compute()


def test_one_channel_is_the_logit_of_the_second_class():
    logits, target = make(2)
    one, two = (
        SegmentationEvaluator(["sky", "sea"], 255),
        SegmentationEvaluator(["sky", "sea"], 255),
    )
    difference = logits[:, 1:] - logits[:, :1]
    one.update(difference, target)
    two.update(logits, target)
    assert dict(one.compute()) == pytest.approx(dict(two.compute()), rel=1e-5)
    assert one.confusion_matrices()[0].tolist() == two.confusion_matrices()[0].tolist()


@pytest.mark.parametrize("tree", [TREE, UNEVEN], ids=["even", "uneven"])
@pytest.mark.parametrize("flat", [True, False])
def test_hierarchy_per_pixel(tree, flat):
    logits, target = make(tree.num_leaves)
    known = target != 255
    rows = logits.movedim(1, -1)[known]
    levels = sum_upwards(rows, tree)
    generator = torch.Generator().manual_seed(3)
    output = logits
    if not flat:  # heads that contradict each other
        output = {
            name: torch.randn(len(target), k, *target.shape[1:], generator=generator)
            for name, k in zip(tree.levels, tree.num_classes, strict=True)
        }
        levels = [maps.movedim(1, -1)[known] for maps in output.values()]
    answers = torch.stack([level.argmax(-1) for level in levels], 1)
    labels = tree.expand(target[known])
    evaluator = SegmentationEvaluator(tree.num_leaves, 255, tree)
    evaluator.update(output, target)
    metrics = evaluator.compute()
    assert tuple(metrics) == evaluator.metric_names
    assert metrics["full_path"] == pytest.approx(100 * float(full_path_accuracy(answers, labels)))
    assert metrics["consistency"] == pytest.approx(100 * float(consistency(answers, tree)))
    assert metrics["distance"] == pytest.approx(float(hierarchical_distance(answers, labels, tree)))
    for level, (name, k) in enumerate(zip(tree.levels, tree.num_classes, strict=True)):
        ious = [
            iou for iou in plain_iou(answers[:, level], labels[:, level], k, -1) if iou is not None
        ]
        assert metrics[f"{name}_miou"] == pytest.approx(100 * sum(ious) / len(ious))
        told = labels[:, level] >= 0
        right = (answers[:, level] == labels[:, level])[told].double().mean()
        assert metrics[f"{name}_top1"] == pytest.approx(100 * float(right))
    assert list(evaluator.class_iou()) == list(tree.levels)
    assert set(evaluator.headline) <= set(evaluator.metric_names)
    assert evaluator.default_metric == "fine_miou"


def test_without_a_labelled_pixel_all_is_nan():
    evaluator = SegmentationEvaluator(3, 255)
    assert all(math.isnan(value) for value in evaluator.compute().values())
    evaluator.update(torch.zeros(2, 3, 4, 4), torch.full((2, 4, 4), 255))
    assert all(math.isnan(value) for value in evaluator.compute().values())
    assert evaluator.num_samples == 2


def test_half_precision_and_to_masks():
    logits, target = make()
    plain, cut = (
        SegmentationEvaluator(5, 255),
        SegmentationEvaluator(5, 255, to_masks=lambda output: output["x"][0]),
    )
    plain.update(logits.bfloat16().float(), target)
    cut.update({"x": [logits.bfloat16()], "y": None}, target)
    assert cut.compute() == plain.compute()


def test_direction():
    assert [
        name
        for name in SegmentationEvaluator(3).metric_names
        if SegmentationEvaluator.lower_is_better(name)
    ] == ["loss", "ece"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SegmentationEvaluator(1), "2 to 1000"),
        (lambda: SegmentationEvaluator(["a", "a"]), "different names"),
        (lambda: SegmentationEvaluator(3, ignore_index=2), "one of the 3"),
        (lambda: SegmentationEvaluator(3, taxonomy=TREE), "5 leaves"),
        (
            lambda: SegmentationEvaluator(3).update(
                torch.zeros(1, 3, 4, 4), torch.zeros(1, 2, 2).long()
            ),
            "got",
        ),
        (
            lambda: SegmentationEvaluator(3).update(
                torch.zeros(1, 4, 4, 4), torch.zeros(1, 4, 4).long()
            ),
            "got",
        ),
        (
            lambda: SegmentationEvaluator(3).update(torch.zeros(1, 3, 4, 4), torch.zeros(1, 4, 4)),
            "integers",
        ),
        (
            lambda: SegmentationEvaluator(3).update(
                torch.zeros(1, 3, 4, 4), torch.full((1, 4, 4), 255)
            ),
            "255",
        ),
        (
            lambda: SegmentationEvaluator(3).update({"a": 1, "b": 2}, torch.zeros(1, 4, 4).long()),
            "to_masks",
        ),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
