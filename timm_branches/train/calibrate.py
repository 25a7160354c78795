"""`calibrate`: fit a model's temperature and thresholds, and keep them with it."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch

from timm_branches.hierarchy.calibration import Calibration, fit_calibration
from timm_branches.inference.clips import answers_by_frame
from timm_branches.model import BranchModel
from timm_branches.task import BranchTask, FlatTask
from timm_branches.taxonomy import Taxonomy
from timm_branches.train.evaluation import evaluate
from timm_branches.weights import digest_weights

__all__ = ["LevelOutputs", "calibrate", "make_task"]


def calibrate(
    model: BranchModel,
    val_loader: Iterable,
    target: float | Mapping[str, float] = 0.95,
    by: str | None = None,
    taxonomy: Taxonomy | None = None,
    data: str = "",
    decoder: str | None = None,
) -> Calibration:
    """Let a model answer only as finely as it is sure, so that it is right as often as is asked.

    Its answers then begin at the likeliest leaf and climb the tree to the first class whose
    probability is above a threshold; see :class:`timm_branches.hierarchy.calibration.Calibration`
    for what is promised. `predict` and `evaluate` answer so by default, and
    :func:`timm_branches.save_model` keeps it in the model's file. Training goes on without it.

    Args:
        model: A model with a head for each level of its tree, or with one head of leaves.
        val_loader: Batches of (images, labels (B, L)) that training has not seen, of the kind that
            the model will meet; `test` data cannot be judged afterwards.
        target: The share of right answers, in (0, 1), or one for each level by its name.
        by: Name of a level: the promise then holds for each of its classes by itself.
        taxonomy: The tree of a model that has none of its own.
        data: What the samples are, in words, to be kept with the model.
        decoder: What makes one distribution over the leaves, see
            :func:`timm_branches.hierarchy.nodes.leaf_log_posterior`; by default 'best-path', of one
            head of leaves 'leaf-marginal'.

    Returns:
        What was fitted, which is also `model.calibration`.

    Raises:
        ValueError: The model has no tree or other heads, or answers frame by frame; labels mean
            other classes; as :func:`timm_branches.hierarchy.calibration.fit_calibration`.

    Source: Goren et al., NeurIPS 2024 (arXiv 2405.11533), with the rank of split conformal
    prediction (Vovk et al. 2005). The temperature is one number fitted on the same samples, which
    the proof does not cover; in simulations it makes no difference (tests).

    Example:
        >>> from timm_branches import create_branch_model
        >>> tree = Taxonomy(['animal/cat', 'animal/dog', 'transport/ship'])
        >>> model = create_branch_model('test_resnet', taps=[4, 5], taxonomy=tree, img_size=32)
        >>> images, labels = torch.randn(40, 3, 32, 32), tree.expand(torch.randint(3, (40,)))
        >>> calibrate(model, [(images, labels)], target=0.8).promise()
        'right on 80 %'
    """
    tree = model.taxonomy if taxonomy is None else taxonomy
    if tree is None:
        raise ValueError("The model has no tree: give taxonomy=.")
    if model.temporal_heads and answers_by_frame(model, model.names):
        raise ValueError(
            "The model answers frame by frame, and the frames of a clip are not independent of "
            "each other: there is no promise to be made for them."
        )
    replicas = getattr(getattr(val_loader, "sampler", None), "num_replicas", 1)
    if replicas > 1:
        raise ValueError(
            f"The loader gives this process one of {replicas} parts of the samples; let each see "
            "all: create_loader(..., rank=0, world_size=1)."
        )
    task, usual = make_task(model, tree)
    decoder = decoder or usual
    seen = LevelOutputs(task)
    evaluate(task, val_loader, also=[seen])
    if not seen.labels:
        raise ValueError("There are no samples to calibrate on.")
    found = fit_calibration(seen.levels(), torch.cat(seen.labels), tree, target, by, decoder)
    found = replace(found, data=data, weights=digest_weights(model))
    model.calibration = found.to_dict()
    return found


def make_task(model: BranchModel, tree: Taxonomy) -> tuple[Any, str]:
    """What evaluates a model, and how it is decoded by default.

    Raises:
        ValueError: Its heads are not those of the tree.
    """
    classes = tuple(model.num_classes[name] for name in model.names)
    if model.taxonomy is not None and classes == tuple(tree.num_classes):
        return BranchTask(model, verbose=False), "best-path"
    if len(classes) == 1 and classes[0] == tree.num_leaves:
        return FlatTask(model, tree), "leaf-marginal"
    raise ValueError(
        f"the tree has {list(tree.num_classes)} classes on its levels and {tree.num_leaves} "
        f"leaves; the model's heads have {model.num_classes}."
    )


class LevelOutputs:
    """Keeps the logits of all levels, and the labels."""

    def __init__(self, task: Any) -> None:
        self.task = task
        self.logits: list[list[torch.Tensor]] = []
        self.labels: list[torch.Tensor] = []

    def update(self, output: Any, target: torch.Tensor) -> None:
        """Take a batch."""
        self.logits.append([logits.float().cpu() for logits in self.task.level_logits(output)])
        self.labels.append(target.cpu())

    def levels(self) -> list[torch.Tensor]:
        """(N, K) of each level."""
        return [torch.cat(parts) for parts in zip(*self.logits, strict=True)]
