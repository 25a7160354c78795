"""The metrics that every evaluation of a hierarchy reports, as `Metric` objects.

Definitions and sources are at the functions of `hierarchy.metrics` and `hierarchy.tree_metrics`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F

from timm_branches.hierarchy.cost import look_up_costs
from timm_branches.hierarchy.metric_registry import (
    EvaluationBatch,
    Metric,
    Statistics,
    float_dtype,
)
from timm_branches.hierarchy.metrics import (
    calibration_bins,
    calibration_error,
    full_path_counts,
    level_counts,
    ratio,
    top_k_counts,
)
from timm_branches.hierarchy.nodes import node_tables
from timm_branches.hierarchy.tree_metrics import (
    f1_of,
    leaf_accuracy_of,
    mean_distance_of,
    mean_ranking_distance_of,
    precision_of,
    recall_of,
    severity_of,
)
from timm_branches.taxonomy.taxonomy import Taxonomy

__all__ = [
    "calibration_metrics",
    "cost_metric",
    "level_metrics",
    "lower_is_better",
    "tree_metrics",
]

NUM_BINS = 15  # of the calibration error, as in Guo et al. 2017
TOP_K = 5
NEAREST = (5, 20)  # leaves of dist@k, as in Bertinetto et al. 2020


def lower_is_better(name: str) -> bool:
    """Whether a standard metric of this name is the better the smaller it is."""
    if name in ("loss", "tice", "distance", "severity", "cost"):
        return True
    return name.startswith("dist@") or name.endswith("_ece")


def level_metrics(levels: Sequence[str], num_classes: Sequence[int]) -> list[Metric]:
    """What needs no tree: loss, accuracies, full path."""
    metrics = [_standard("loss", _loss_sums, _mean_loss, 1)]
    for level, name in enumerate(levels):
        metrics.append(_standard(f"{name}_top1", partial(_level_accuracy_counts, level), ratio))
    for level, name in enumerate(levels):
        # the top k of k classes are all of them, whatever the model says
        if num_classes[level] > TOP_K:
            metrics.append(_standard(f"{name}_top{TOP_K}", partial(_top_k_counts, level), ratio))
    metrics.append(_standard("full_path", _full_path_counts, ratio))
    return metrics


def calibration_metrics(levels: Sequence[str]) -> list[Metric]:
    """The calibration error of each level."""
    return [
        _standard(f"{name}_ece", partial(_calibration_sums, level), calibration_error)
        for level, name in enumerate(levels)
    ]


def tree_metrics(taxonomy: Taxonomy) -> list[Metric]:
    """What needs a tree: consistency, hierarchical scores and distances."""
    metrics = [
        _standard("consistency", _consistency_counts, ratio),
        _standard("tice", _consistency_counts, _inconsistency),
        _standard("hp", _overlap, precision_of),
        _standard("hr", _overlap, recall_of),
        _standard("hf", _overlap, f1_of),
        _standard("distance", _distances, mean_distance_of, 1),
    ]
    for k in NEAREST:
        if k < taxonomy.num_leaves:
            counts = partial(_ranking_counts, k)
            metrics.append(_standard(f"dist@{k}", counts, mean_ranking_distance_of, 1))
    if taxonomy.num_leaves != taxonomy.num_classes[-1]:  # else it is the last level's top1
        metrics.append(_standard("top1", _distances, leaf_accuracy_of))
    metrics.append(_standard("severity", _distances, severity_of, 1))
    return metrics


def cost_metric(costs: torch.Tensor, taxonomy: Taxonomy) -> Metric:
    """The mean cost of the answers, of a matrix (nodes, leaves)."""
    return _standard("cost", partial(_cost_sums, costs, taxonomy), _mean_loss, 1)


def _standard(
    name: str, statistics: Statistics, result: Callable[..., torch.Tensor], scale: float = 100
) -> Metric:
    return Metric(name, statistics, result, not lower_is_better(name), scale)


def _loss_sums(batch: EvaluationBatch) -> tuple[torch.Tensor, ...]:
    """The summed cross-entropy of all levels, and how many labels it is the sum of."""
    device = batch.labels.device
    total = torch.zeros((), dtype=float_dtype(device), device=device)
    for logits, label in zip(batch.logits, batch.labels.unbind(1), strict=True):
        losses = F.cross_entropy(logits, label.clamp(min=0), reduction="none")  # (B,)
        total += torch.where(label >= 0, losses, 0).sum(dtype=total.dtype)
    return total, (batch.labels >= 0).sum()


def _mean_loss(total: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    return total / count


def _level_accuracy_counts(level: int, batch: EvaluationBatch) -> tuple[torch.Tensor, ...]:
    column = slice(level, level + 1)
    right, known = level_counts(batch.predictions[:, column], batch.labels[:, column])
    return right[0], known[0]


def _top_k_counts(level: int, batch: EvaluationBatch) -> tuple[torch.Tensor, ...]:
    return top_k_counts(batch.logits[level], batch.labels[:, level], TOP_K)


def _full_path_counts(batch: EvaluationBatch) -> tuple[torch.Tensor, ...]:
    return full_path_counts(batch.predictions, batch.labels)


def _calibration_sums(level: int, batch: EvaluationBatch) -> tuple[torch.Tensor, ...]:
    label, prediction = batch.labels[:, level], batch.predictions[:, level]
    answered = (label >= 0) & (prediction >= 0)
    dtype = float_dtype(label.device)
    confidence = batch.confidences[:, level]
    return calibration_bins(confidence, label == prediction, answered, NUM_BINS, dtype)


def _cost_sums(
    costs: torch.Tensor, taxonomy: Taxonomy, batch: EvaluationBatch
) -> tuple[torch.Tensor, ...]:
    assert batch.tables is not None
    nodes = node_tables(taxonomy, batch.labels.device)
    of_answers = look_up_costs(batch.tables.end(batch.predictions), batch.labels, costs, nodes)
    counted = ~of_answers.isnan()
    dtype = float_dtype(of_answers.device)
    return of_answers.where(counted, 0).sum(dtype=dtype), counted.sum()


def _consistency_counts(batch: EvaluationBatch) -> tuple[torch.Tensor, ...]:
    assert batch.tables is not None
    consistent = batch.tables.consistent(batch.predictions, batch.predicted_paths).sum()
    return consistent, torch.full_like(consistent, len(batch.labels))


def _inconsistency(consistent: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
    return ratio(answers - consistent, answers)


def _overlap(batch: EvaluationBatch) -> tuple[torch.Tensor, ...]:
    return (batch.overlap,)


def _distances(batch: EvaluationBatch) -> tuple[torch.Tensor, ...]:
    return (batch.distances,)


def _ranking_counts(k: int, batch: EvaluationBatch) -> tuple[torch.Tensor, ...]:
    assert batch.tables is not None
    return (batch.tables.ranking_counts(batch.leaf_scores, batch.labels, k),)
