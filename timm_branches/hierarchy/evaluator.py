"""Metrics of a label hierarchy over a whole validation set, accumulated batch by batch.

They are exact over all batches and processes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist

from timm_branches.hierarchy.ancestry import check_label_range
from timm_branches.hierarchy.cost import Costs, cost_matrix
from timm_branches.hierarchy.decode import DECODERS, Decoder, decode
from timm_branches.hierarchy.metric_registry import (
    EvaluationBatch,
    Metric,
    float_dtype,
    registered_metrics,
)
from timm_branches.hierarchy.metrics import class_scores
from timm_branches.hierarchy.standard_metrics import (
    calibration_metrics,
    cost_metric,
    level_metrics,
    lower_is_better,
    tree_metrics,
)
from timm_branches.hierarchy.tree_metrics import path_tables
from timm_branches.taxonomy.taxonomy import Taxonomy

__all__ = ["HierarchyEvaluator"]

MAX_MATRIX_CLASSES = 1000  # a matrix of 1,000 classes takes 8 MB, one of 10,000 would take 800


class HierarchyEvaluator:
    """Accuracies, hierarchical scores and distances, and calibration on a label hierarchy.

    Definitions and sources are at the functions of `hierarchy.metrics` and
    `hierarchy.tree_metrics`. Everything is summed up as integers, or in float64, in memory that
    does not depend on the number of samples (torchmetrics keeps every sample's confidence for the
    calibration error). A metric without a sample is nan.

    ============== ======= ======================================================================
    name           unit    meaning
    ============== ======= ======================================================================
    loss           nats    mean cross-entropy over all levels and samples
    {level}_top1   percent accuracy of the decoder's answer
    {level}_top5   percent label among the five largest logits; of levels of more than 5 classes
    full_path      percent right on every known level
    consistency    percent answers that form a path of the tree
    tice           percent 100 - consistency
    hp, hr, hf     percent hierarchical precision, recall and F1, micro-averaged
    distance       levels  average hierarchical distance of the answer's leaf, where it is known
    dist@5, @20    levels  the same, mean over the best 5 and 20 leaves, of trees of more than that
    top1           percent accuracy of the answer's leaf; of trees of uneven depth (else it is the
                           last level's top1)
    severity       levels  mean distance of the mistakes; never to be read without top1
    cost           theirs  mean cost of the answers, where the leaf is known; with `costs`
    {level}_ece    percent expected calibration error of the answers, 15 bins
    ============== ======= ======================================================================

    Without a taxonomy there are only `loss`, `full_path` and those of each level. What
    :func:`register_metric` added follows behind these. An answer whose probability is nan is none.
    Where an answer stops above a leaf, what it leaves out counts as wrong for top1 and full path,
    lowers recall alone, and has no part in the calibration error; its distance is its node's
    height, so `severity` counts it among the mistakes.

    Args:
        levels: Names of the levels.
        num_classes: Classes of each level.
        taxonomy: The hierarchy of these levels.
        device: Where totals are kept.
        max_samples: Ignore what comes after this many samples (padding of a distributed sampler).
        to_levels: Turns a model's output into the levels' logits; by default a dict by level name
            is expected.
        decoder: How the levels' logits become one answer, see :func:`decode`. With
            `'independent'` each level answers for itself. The ranking of leaves for dist@k is the
            same for all: :func:`leaf_log_probs`.
        costs: What answers cost, see :func:`cost_matrix`: adds the metric `cost`, of any decoder.

    Attributes:
        metric_names: What :meth:`compute` returns, in this order.
        headline: The few of them that are worth a line each epoch.

    Raises:
        ValueError: The taxonomy has other classes, there is no such decoder, or it needs a
            taxonomy, as costs do, or a registered metric has the name of a standard one.

    Example:
        >>> paths = ['animal/cat', 'animal/dog', 'transport/ship']
        >>> tree = Taxonomy(paths, levels=['coarse', 'fine'])
        >>> evaluator = HierarchyEvaluator(tree.levels, tree.num_classes, tree)
        >>> coarse = torch.tensor([[2., 0.], [2., 0.]])
        >>> fine = torch.tensor([[2., 0., 0.], [0., 0., 2.]])
        >>> logits = {'coarse': coarse, 'fine': fine}
        >>> evaluator.update(logits, tree.expand([0, 0]))
        >>> metrics = evaluator.compute()
        >>> metrics['coarse_top1'], metrics['fine_top1'], metrics['severity']
        (100.0, 50.0, 2.0)
    """

    default_metric = "full_path"

    def __init__(
        self,
        levels: Sequence[str],
        num_classes: Sequence[int],
        taxonomy: Taxonomy | None = None,
        device: torch.device | str | None = None,
        *,
        max_samples: int | None = None,
        to_levels: Any = None,
        decoder: str | Decoder = "independent",
        costs: Costs | None = None,
    ) -> None:
        self.levels, self.num_classes = tuple(levels), tuple(num_classes)
        self.taxonomy = taxonomy
        self.device = torch.device(device or "cpu")
        self.max_samples = max_samples
        self.to_levels = to_levels or self._by_name
        self.decoder = decoder
        if taxonomy is not None and taxonomy.num_classes != self.num_classes:
            raise ValueError(
                f"The levels {list(self.levels)} have {list(self.num_classes)} classes, the "
                f"taxonomy's {list(taxonomy.num_classes)}: give one head per level of the taxonomy."
            )
        if taxonomy is not None and self.levels != taxonomy.levels:
            if sorted(self.levels) == sorted(taxonomy.levels):
                raise ValueError(
                    f"The levels {list(self.levels)} are the taxonomy's in another order: give "
                    f"them from coarse to fine, {list(taxonomy.levels)}."
                )
        if isinstance(decoder, str) and decoder not in DECODERS:
            raise ValueError(
                f"There is no decoder {decoder!r}: choose one of {', '.join(DECODERS)}."
            )
        if decoder != "independent" and taxonomy is None:
            raise ValueError(f"The decoder {decoder!r} needs a taxonomy.")
        self.costs: torch.Tensor | None = None
        if costs is not None:
            if taxonomy is None:
                raise ValueError("costs= needs a taxonomy.")
            self.costs = cost_matrix(costs, taxonomy).to(self.device, float_dtype(self.device))
        self.tables = None if taxonomy is None else path_tables(taxonomy, self.device)
        # where each level's classes begin among those of all levels side by side
        self.starts = torch.tensor([0, *self.num_classes[:-1]]).cumsum(0).to(self.device)
        self._metrics = self._choose_metrics()
        self.metric_names = tuple(self._metrics)
        self.metrics: dict[str, float] = {}
        headline = [f"{name}_top1" for name in self.levels]
        if len(self.levels) > 1:  # a single level is the whole path
            headline.append("full_path")
            if taxonomy is not None:
                headline.append("consistency")
        self.headline = tuple(headline)
        self.reset()

    def _by_name(self, output: Any) -> list[torch.Tensor]:
        missing = [name for name in self.levels if name not in output]
        if missing:
            raise ValueError(
                f"The output lacks the levels {missing}: evaluation takes a dict with the logits "
                f"of {list(self.levels)}, got {list(output)}."
            )
        return [output[name] for name in self.levels]

    def _choose_metrics(self) -> dict[str, Metric]:
        chosen = level_metrics(self.levels, self.num_classes)
        if self.taxonomy is not None:
            chosen += tree_metrics(self.taxonomy)
            if self.costs is not None:
                chosen.append(cost_metric(self.costs, self.taxonomy))
        chosen += calibration_metrics(self.levels)
        by_name = {metric.name: metric for metric in chosen}
        for metric in registered_metrics(with_taxonomy=self.taxonomy is not None):
            if metric.name in by_name:
                raise ValueError(
                    f"The registered metric {metric.name!r} has the name of a standard one; "
                    f"register it under a name other than {', '.join(by_name)}."
                )
            by_name[metric.name] = metric
        return by_name

    @staticmethod
    def higher_is_better(name: str) -> bool:
        """Whether a metric of this name is the better the larger it is."""
        for metric in registered_metrics():
            if metric.name == name:
                return metric.higher_is_better
        return not lower_is_better(name)

    @staticmethod
    def lower_is_better(name: str) -> bool:
        """Whether a metric of this name is the better the smaller it is."""
        return not HierarchyEvaluator.higher_is_better(name)

    def reset(self) -> None:
        """Forget all samples."""
        self.num_samples = 0
        empty = self._make_batch(
            [torch.zeros(0, k, device=self.device) for k in self.num_classes],
            torch.zeros(0, len(self.levels), dtype=torch.long, device=self.device),
        )
        # by metric: what it adds up. Without samples these are zeros of the right shapes, which
        # metrics that read the same counts share, so each takes a copy
        self._sums: dict[str, list[torch.Tensor]] = {}
        for name, metric in self._metrics.items():
            self._sums[name] = [value.clone() for value in metric.statistics(empty)]
        # by class of all levels side by side
        nodes = torch.zeros(sum(self.num_classes), dtype=torch.int64, device=self.device)
        self._classes = {name: nodes.clone() for name in ("labelled", "predicted", "right")}
        # by level: (K * K,), rows are labels; None for too many classes
        self._matrices: list[torch.Tensor | None] = []
        for k in self.num_classes:
            matrix = None
            if k <= MAX_MATRIX_CLASSES:
                matrix = torch.zeros(k * k, dtype=torch.int64, device=self.device)
            self._matrices.append(matrix)
        self._joined: list[torch.Tensor] | None = None

    # -- taking batches

    @torch.no_grad()
    def update(self, output: Any, target: torch.Tensor) -> None:
        """Take one batch.

        Args:
            output: What the model returned; `to_levels` makes logits (B, K) of every level of it.
            target: Labels (B, L), -1 for unknown.

        Raises:
            ValueError: Labels or logits have another shape, labels are not integers or, on the
                CPU, out of their level's range.
        """
        logits = self.to_levels(output)
        self._check(logits, target)
        keep = len(target)
        if self.max_samples is not None:
            keep = min(keep, max(0, self.max_samples - self.num_samples))
        kept = []
        for of_level in logits:
            # half precision would round confidences
            dtype = torch.promote_types(of_level.dtype, torch.float32)
            kept.append(of_level[:keep].to(self.device, dtype))
        target = target[:keep].to(self.device).long()
        self.num_samples += len(target)
        self._joined = None
        if not len(target):
            return
        batch = self._make_batch(kept, target)
        for name, metric in self._metrics.items():
            for total, value in zip(self._sums[name], metric.statistics(batch), strict=True):
                total += value
        self._count_classes(batch)

    def _check(self, logits: Sequence[torch.Tensor], target: torch.Tensor) -> None:
        if target.ndim != 2 or target.shape[1] != len(self.levels) or target.is_floating_point():
            raise ValueError(
                f"Evaluation takes labels (B, {len(self.levels)}) of integers, one column a level, "
                f"got {tuple(target.shape)} of {target.dtype}."
            )
        shapes = [tuple(of_level.shape) for of_level in logits]
        if shapes != [(len(target), k) for k in self.num_classes]:
            raise ValueError(
                f"Evaluation takes logits ({len(target)}, K) of {list(self.num_classes)} classes, "
                f"one for each of the levels {list(self.levels)}, got {shapes}."
            )
        check_label_range(target, self.levels, self.num_classes)

    def _make_batch(self, logits: list[torch.Tensor], labels: torch.Tensor) -> EvaluationBatch:
        predictions, confidences = self._decode(logits)
        # a network that has diverged answers nothing, instead of its first class
        predictions = predictions.masked_fill(confidences.isnan(), -1)
        return EvaluationBatch(
            logits, labels, predictions, confidences, self.levels, self.tables, self.taxonomy
        )

    def _decode(self, logits: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Answers (B, L), -1 for none, and their probabilities (B, L)."""
        if self.decoder != "independent":
            assert self.taxonomy is not None
            return decode(logits, self.taxonomy, self.decoder)
        best = [of_level.max(-1).indices for of_level in logits]
        sure = []
        for of_level, index in zip(logits, best, strict=True):
            sure.append(of_level.softmax(-1).gather(1, index[:, None])[:, 0])
        return torch.stack(best, 1), torch.stack(sure, 1)

    def _count_classes(self, batch: EvaluationBatch) -> None:
        """Add to the counts of each class, and to the matrices."""
        known = batch.labels >= 0
        answered = known & (batch.predictions >= 0)
        right = known & (batch.labels == batch.predictions)
        label, answer = batch.labels.clamp(min=0), batch.predictions.clamp(min=0)
        for name, index, counted in (
            ("labelled", label, known),
            ("predicted", answer, answered),
            ("right", label, right),
        ):
            nodes = (index + self.starts).flatten()
            self._classes[name].scatter_add_(0, nodes, counted.flatten().long())
        for level, matrix in enumerate(self._matrices):
            if matrix is not None:
                cell = label[:, level] * self.num_classes[level] + answer[:, level]
                matrix.scatter_add_(0, cell, answered[:, level].long())

    # -- results

    def compute(self, distributed: bool = False) -> OrderedDict[str, float]:
        """All metrics, by name.

        Args:
            distributed: Join the counts of all processes. This process's own stay, so that it may
                go on counting.
        """
        tensors = self._state()
        if distributed:
            tensors = self._joined = _sum_over_processes(tensors)
        tensors = [tensor.cpu() for tensor in tensors]
        results = OrderedDict()
        for name, metric in self._metrics.items():
            count = len(self._sums[name])
            results[name] = metric.compute(tensors[:count])
            tensors = tensors[count:]
        return results

    def _state(self) -> list[torch.Tensor]:
        """Everything that has been added up: the metrics' sums, the classes, the matrices."""
        tensors = list(chain.from_iterable(self._sums.values()))
        tensors += self._classes.values()
        tensors += [matrix for matrix in self._matrices if matrix is not None]
        return tensors

    def summary(self) -> OrderedDict[str, float]:
        """Metrics of this process so far, as timm's training loop shows them while it runs."""
        return self.compute()

    def confusion_matrices(self, joined: bool = True) -> list[torch.Tensor | None]:
        """Per level counts (K, K), of all processes once they are joined unless `joined` is false.

        Rows are labels and columns answers. None for a level of more than 1,000 classes;
        :meth:`class_report` knows each of its classes all the same. Samples with a label but no
        answer are not in the matrix.
        """
        shown = [matrix for matrix in self._matrices if matrix is not None]
        state = self._latest() if joined else self._state()
        counted = iter(state[-len(shown) :])
        matrices: list[torch.Tensor | None] = []
        for k, matrix in zip(self.num_classes, self._matrices, strict=True):
            if matrix is None:
                matrices.append(None)
            else:
                matrices.append(next(counted).cpu().view(k, k).clone())
        return matrices

    def class_report(self) -> list[dict[str, Any]]:
        """Precision, recall and F1 of every class, of all processes once these are joined.

        Returns:
            One dict per class, from the first level to the last: `level`, `class` (its name),
            `precision`, `recall` and `f1` in percent, `support` (samples with this label).
            :func:`format_class_report` makes a text of it. Precision is nan for a class never
            predicted, recall for one without samples.
        """
        first = sum(len(sums) for sums in self._sums.values())
        labelled, predicted, right = self._latest()[first : first + 3]
        precision, recall, f1 = class_scores(right, predicted, labelled)
        rows: list[dict[str, Any]] = []
        for level, name in self._class_names():
            node = len(rows)
            rows.append(
                {
                    "level": level,
                    "class": name,
                    "precision": 100 * float(precision[node]),
                    "recall": 100 * float(recall[node]),
                    "f1": 100 * float(f1[node]),
                    "support": int(labelled[node]),
                }
            )
        return rows

    def _class_names(self) -> list[tuple[str, str]]:
        """Level and name of the classes of all levels side by side."""
        names = []
        for level, (level_name, k) in enumerate(zip(self.levels, self.num_classes, strict=True)):
            classes: Sequence[str] = [str(index) for index in range(k)]
            if self.taxonomy is not None:
                classes = self.taxonomy.classes[level]
            names += [(level_name, name) for name in classes]
        return names

    def _latest(self) -> list[torch.Tensor]:
        tensors = self._state() if self._joined is None else self._joined
        return [tensor.cpu() for tensor in tensors]


def _sum_over_processes(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Each tensor added up over all processes, in one step for each type of number."""
    joined = list(tensors)
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        places = [i for i, tensor in enumerate(tensors) if tensor.dtype == dtype]
        total = torch.cat([tensors[i].flatten() for i in places])
        dist.all_reduce(total)
        sizes = [tensors[i].numel() for i in places]
        for i, part in zip(places, total.split(sizes), strict=True):
            joined[i] = part.view(tensors[i].shape)
    return joined
