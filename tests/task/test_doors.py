"""Losses and evaluators from outside."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from tests.heads.tester import missing_of
from timm_branches import create_branch_model
from timm_branches.dense import RestorationEvaluator, SegmentationEvaluator
from timm_branches.hierarchy import HierarchyEvaluator
from timm_branches.hierarchy.losses import hxe_loss, on_levels, tree_path_kl
from timm_branches.task import BranchTask, DenseTask, Evaluator, FlatTask, JointTask
from timm_branches.taxonomy import Taxonomy

TREE = Taxonomy(["animal/cat", "animal/dog", "plant/moss"], levels=["kind", "species"])
LABELS = torch.tensor([[0, 0], [0, 1], [1, 2], [1, -1], [-1, -1]])


def make(**options):
    torch.manual_seed(0)
    return create_branch_model("test_resnet", taps=[4, 5], taxonomy=TREE, **options)


def images():
    return torch.randn(len(LABELS), 3, 32, 32, generator=torch.Generator().manual_seed(1))


def cross_entropies(logits, labels, taxonomy, share=False):
    """The task's own loss, written as somebody else's."""
    pairs = zip(logits.items(), labels.unbind(1), strict=True)
    return {level: F.cross_entropy(z, y, ignore_index=-1) for (level, z), y in pairs}


class TestLoss:
    def test_equals_the_built_in_one(self):
        """Same losses, same gradients, weighed by the same schedule."""
        results = []
        for loss in (None, cross_entropies):
            task = BranchTask(make(), [0.3, 0.7], loss=loss, verbose=False).eval()
            result = task(images(), LABELS)
            result["loss"].backward()
            parameters = task.trainable_module.named_parameters()
            grads = {name: p.grad for name, p in parameters if p.grad is not None}
            results.append((result, grads))
        (own, own_grads), (outside, grads) = results
        torch.testing.assert_close(own["loss"], outside["loss"])
        assert list(outside["losses"]) == ["kind", "species"]
        for name, grad in own_grads.items():
            torch.testing.assert_close(grad, grads[name])

    def test_levels_that_are_off_do_not_count(self):
        """Not even if their loss is infinite; what is no level is added as it is."""

        def loss(logits, labels, taxonomy, share=False):
            assert list(logits) == ["kind", "species"]
            assert taxonomy == TREE
            kind = logits["kind"].sum() * float("inf")
            return {"kind": kind, "species": torch.tensor(2.0), "penalty": torch.tensor(5.0)}

        task = BranchTask(make(), "0:0,0.5", loss=loss, verbose=False)
        result = task(images(), LABELS)
        assert result["loss"] == 0.5 * 2 + 5
        assert list(result["losses"]) == ["species", "penalty"]

    def test_those_of_the_package(self):
        """tree_path_kl as the only loss, through the adapter, against the function."""
        task = BranchTask(make(), loss=on_levels(tree_path_kl), verbose=False).eval()
        x = images()
        logits = list(task.trainable_module(x).values())
        torch.testing.assert_close(task(x, LABELS)["loss"], tree_path_kl(logits, LABELS, TREE))

    @pytest.mark.parametrize("answer", [torch.tensor(1.0), {}, None])
    def test_wrong_answer(self, answer):
        task = BranchTask(make(), loss=lambda *args, share: answer, verbose=False)
        with pytest.raises(ValueError, match="must return a dict of scalars"):
            task(images(), LABELS)

    @pytest.mark.parametrize(
        "setting",
        [{"label_smoothing": 0.1}, {"class_weights": {"kind": [1.0, 2.0]}}, {"marginal": True}],
    )
    def test_settings_without_effect(self, setting):
        with pytest.raises(ValueError, match="no effect beside loss="):
            BranchTask(make(), loss=cross_entropies, **setting)

    def test_flat(self):
        torch.manual_seed(0)
        model = create_branch_model("test_resnet", num_classes=3).eval()
        own = FlatTask(model, TREE, loss="hxe", strength=0.3)
        outside = FlatTask(model, TREE, loss=lambda z, y, tree: hxe_loss(z, y, tree, 0.3))
        x = images()
        torch.testing.assert_close(own(x, LABELS)["loss"], outside(x, LABELS)["loss"])
        with pytest.raises(ValueError, match="strength= has no effect"):
            FlatTask(model, TREE, loss=cross_entropies, strength=0.3)


def test_all_evaluators_keep_the_contract():
    mask = DenseTask(
        create_branch_model("test_resnet", taps=[3, 5], head="unet", num_classes=2),
        "ce",
        partial(SegmentationEvaluator, 2),
    )
    model = create_branch_model(
        "test_resnet",
        taps=[4, 5, (3, 5)],
        head=["pool", "pool", "unet"],
        taxonomy=TREE,
        num_classes=[None, None, 2],
    )
    joint = JointTask(
        {
            "labels": BranchTask(model),
            "mask": DenseTask(model, "ce", partial(SegmentationEvaluator, 2)),
        }
    )
    evaluators = [
        HierarchyEvaluator(TREE.levels, TREE.num_classes, TREE),
        SegmentationEvaluator(2),
        RestorationEvaluator(),
        BranchTask(make()).create_evaluator(),
        mask.create_evaluator(),
        joint.create_evaluator(),
    ]
    for evaluator in evaluators:
        assert missing_of(evaluator, Evaluator) == set()
        assert set(evaluator.headline) <= set(evaluator.metric_names)
        assert list(evaluator.compute()) == list(evaluator.metric_names)
        for name in evaluator.metric_names:
            assert isinstance(evaluator.lower_is_better(name), bool)
