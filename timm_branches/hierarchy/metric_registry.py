"""What a metric of a hierarchy is, and how one is added from outside.

A metric is a pair of functions: one turns a batch into sums, the other turns the sums over all
batches of all processes into a number. So it is exact whatever the batches are, and its memory does
not grow with the number of samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from timm_branches.hierarchy.decode import leaf_log_probs
from timm_branches.hierarchy.tree_metrics import PathTables
from timm_branches.taxonomy.taxonomy import Taxonomy

__all__ = ["METRICS", "EvaluationBatch", "Metric", "register_metric", "registered_metrics"]

Statistics = Callable[["EvaluationBatch"], tuple[torch.Tensor, ...]]


@dataclass(frozen=True)
class EvaluationBatch:
    """What a metric can read of a batch of B samples; what is computed is computed once.

    Attributes:
        logits: For each level (B, K), float32 or float64.
        labels: (B, L), -1 where unknown and below a shallow leaf.
        predictions: (B, L), the decoder's answers, -1 for none.
        confidences: (B, L), their probabilities.
        levels: The levels' names.
        tables: Look-ups in the tree on the batch's device, or None without a tree.
        taxonomy: The tree, or None.
    """

    logits: Sequence[torch.Tensor]
    labels: torch.Tensor
    predictions: torch.Tensor
    confidences: torch.Tensor
    levels: tuple[str, ...]
    tables: PathTables | None = None
    taxonomy: Taxonomy | None = None

    @cached_property
    def predicted_paths(self) -> torch.Tensor:
        """The path (B, L, L) of each class predicted."""
        assert self.tables is not None
        return self.tables.augment(self.predictions)

    @cached_property
    def overlap(self) -> torch.Tensor:
        """The counts (3,) of hP, hR and hF."""
        assert self.tables is not None
        return self.tables.overlap(self.predicted_paths, self.labels)

    @cached_property
    def distances(self) -> torch.Tensor:
        """The counts (3,) of distance, severity and the leaf's top-1."""
        assert self.tables is not None
        return self.tables.distance_counts(self.predictions, self.labels)

    @cached_property
    def leaf_scores(self) -> torch.Tensor:
        """The log-probabilities (B, leaves) that :func:`leaf_log_probs` gives."""
        assert self.taxonomy is not None
        return leaf_log_probs(self.logits, self.taxonomy)


@dataclass(frozen=True)
class Metric:
    """A number from sums over samples.

    Attributes:
        name: What it is called in logs, tables and `--eval-metric`.
        statistics: From a batch to tensors that add up over batches and processes; a batch without
            samples gives zeros of the same shapes.
        result: From the added tensors to a scalar tensor, nan where there is no sample.
        higher_is_better: Its direction.
        scale: What the result is multiplied by; 100 for percent.
    """

    name: str
    statistics: Statistics
    result: Callable[..., torch.Tensor]
    higher_is_better: bool = True
    scale: float = 1.0

    def compute(self, sums: Sequence[torch.Tensor]) -> float:
        """The metric of what has been added up."""
        return self.scale * float(self.result(*sums))


@dataclass(frozen=True)
class RegisteredMetric:
    """A metric from outside."""

    metric: Metric
    needs_taxonomy: bool
    function: Callable[..., Any]


# those added from outside, by name; `del METRICS[name]` takes one away again
METRICS: dict[str, RegisteredMetric] = {}


def register_metric(
    name: str,
    function: Callable[[EvaluationBatch], Any] | None = None,
    *,
    higher_is_better: bool = True,
    result: Callable[..., torch.Tensor] | None = None,
    needs_taxonomy: bool = False,
) -> Callable[..., Any]:
    """Add a metric to each :class:`HierarchyEvaluator` made from now on: to logs and tables.

    Args:
        name: What it is called, also by `--eval-metric`.
        function: From an :class:`EvaluationBatch` of B samples to values (B,), nan for samples
            that do not count: the metric is their mean. With `result`, from a batch to a tuple of
            tensors that add up over batches and processes.
        higher_is_better: Which way the best epoch is chosen.
        result: From the added tensors to the metric, a scalar tensor.
        needs_taxonomy: Leave it out where there is no tree.

    Returns:
        The function. Without one, a decorator that takes it.

    Raises:
        ValueError: Another function has this name already.

    Example:
        >>> @register_metric('far_off', higher_is_better=False, needs_taxonomy=True)
        ... def far_off(batch):
        ...     wrong_root = batch.predictions[:, 0] != batch.labels[:, 0]
        ...     return wrong_root.double().where(batch.labels[:, 0] >= 0, torch.nan)
        >>> tree = Taxonomy(['animal/cat', 'animal/dog', 'transport/ship'])
        >>> from timm_branches.hierarchy import HierarchyEvaluator
        >>> evaluator = HierarchyEvaluator(tree.levels, tree.num_classes, tree)
        >>> logits = {'level1': torch.eye(2), 'level2': torch.eye(3)[:2]}
        >>> evaluator.update(logits, tree.expand([0, 2]))
        >>> evaluator.compute()['far_off'], evaluator.higher_is_better('far_off')
        (0.0, False)
        >>> del METRICS['far_off']
    """
    if function is None:

        def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
            return register_metric(
                name,
                function,
                higher_is_better=higher_is_better,
                result=result,
                needs_taxonomy=needs_taxonomy,
            )

        return decorate
    earlier = METRICS.get(name)
    # the same function again is a module or a notebook's cell that is run again
    if earlier is not None and _origin(earlier.function) != _origin(function):
        raise ValueError(
            f"The metric {name!r} is registered already, by {earlier.function!r}; choose another "
            f"name."
        )
    if result is None:
        metric = Metric(name, _MeanOverSamples(name, function), _mean, higher_is_better)
    else:
        metric = Metric(name, function, result, higher_is_better)
    METRICS[name] = RegisteredMetric(metric, needs_taxonomy, function)
    return function


def registered_metrics(with_taxonomy: bool = True) -> list[Metric]:
    """The metrics added from outside, in the order in which they were added."""
    return [entry.metric for entry in METRICS.values() if with_taxonomy or not entry.needs_taxonomy]


def _origin(function: Callable[..., Any]) -> tuple[str, str]:
    module = getattr(function, "__module__", "")
    return module, getattr(function, "__qualname__", repr(function))


def _mean(total: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    return total / count


class _MeanOverSamples:
    """The sum and the number of a function's values (B,) that are not nan."""

    def __init__(self, name: str, function: Callable[[EvaluationBatch], torch.Tensor]) -> None:
        self.name, self.function = name, function

    def __call__(self, batch: EvaluationBatch) -> tuple[torch.Tensor, ...]:
        values = torch.as_tensor(self.function(batch), device=batch.labels.device)
        if values.shape != batch.labels.shape[:1]:
            raise ValueError(
                f"The metric {self.name!r} must give one value for each of the {len(batch.labels)} "
                f"samples, got the shape {tuple(values.shape)}. With result=, give a tuple of sums."
            )
        values = values.to(float_dtype(values.device))
        counted = ~values.isnan()
        return values.where(counted, 0).sum(), counted.sum()


def float_dtype(device: torch.device) -> torch.dtype:
    """What sums are kept in: float64, which Apple's GPUs lack."""
    return torch.float32 if device.type == "mps" else torch.float64
