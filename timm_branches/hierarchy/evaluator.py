"""Metrics of a label hierarchy over a whole validation set, accumulated batch by batch, exact
over all processes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F

from timm_branches.hierarchy.decode import DECODERS, decode, leaf_log_probs
from timm_branches.hierarchy.metrics import calibration_bins, calibration_error, class_scores
from timm_branches.hierarchy.tree_metrics import PathTables
from timm_branches.taxonomy.taxonomy import Taxonomy

__all__ = ["HierarchyEvaluator"]

NUM_BINS = 15  # of the calibration error, as in Guo et al. 2017
MAX_MATRIX_CLASSES = 1000  # a matrix of 1,000 classes takes 8 MB, one of 10,000 would take 800
# one line each: full paths; consistent answers; hP, hR and hF; leaf answers
_COUNTS = (
    "full_right",
    "full_known",
    "consistent",
    "answers",
    "path_right",
    "path_predicted",
    "path_true",
    "leaves_known",
    "mistakes",
    "distance",
)


class _Totals(NamedTuple):
    """Views of the one tensor that holds all counts, so that processes are joined in one step."""

    counts: torch.Tensor  # as named by _COUNTS, then the summed distances of the top k leaves
    labelled: torch.Tensor  # of the classes of all levels side by side, as the next two
    predicted: torch.Tensor
    right: torch.Tensor
    top5: torch.Tensor  # (L,)
    bins: torch.Tensor  # (2, L, NUM_BINS): samples, and right ones
    matrices: list[torch.Tensor | None]  # (K * K,)


class HierarchyEvaluator:
    """Accuracies, consistency, hierarchical scores and distances, and calibration on a label
    hierarchy.

    The definitions and sources are at the functions of ``hierarchy.metrics`` and
    ``hierarchy.tree_metrics``. Everything is summed up as integers, or in float64, in memory that
    does not depend on the number of samples (torchmetrics keeps every sample's confidence for the
    calibration error). A metric without a sample is nan.

    ============== =======
    ========================================================================================
    name           unit    what
    ============== =======
    ========================================================================================
    loss           nats    mean cross-entropy over all levels and samples
    {level}_top1   percent accuracy of the decoder's answer
    {level}_top5   percent label among the five largest logits; on levels of more than 5 classes
    full_path      percent right on every known level
    consistency    percent answers that form a path of the tree
    tice           percent 100 - consistency
    hp, hr, hf     percent hierarchical precision, recall and F1, micro-averaged
    distance       levels  average hierarchical distance of the answer's leaf; where the leaf is known
    dist@5, @20    levels  the same, mean over the best 5 and 20 leaves; in trees of more than that
    top1           percent accuracy of the answer's leaf; in trees of uneven depth (else it is the last level's top1)
    severity       levels  mean distance of the mistakes; never to be read without top1
    {level}_ece    percent expected calibration error of the answers, 15 bins
    ============== =======
    ========================================================================================

    Without a taxonomy there are only ``loss``, ``full_path`` and those of each level.

    Args:
        levels: Names of the levels.
        num_classes: Classes of each level.
        taxonomy: The hierarchy of these levels.
        device: Where totals are kept.
        max_samples: Ignore what comes after this many samples (padding of a distributed sampler).
        to_levels: Turns a model's output into the levels' logits; by default a dict by level name
            is expected.
        decoder: How the levels' logits become one answer, see :func:`decode`. With
            ``'independent'`` each level answers for itself. The ranking of leaves for dist@k is the
            same for all: :func:`leaf_log_probs`.

    Attributes:
        metric_names: What :meth:`compute` returns, in this order.
        headline: The few of them that are worth a line each epoch.

    Raises:
        ValueError: The taxonomy has other classes, or there is no such decoder, or one that needs a
            taxonomy.

    Example:
        >>> tree = Taxonomy(['animal/cat', 'animal/dog', 'transport/ship'], levels=['coarse', 'fine'])
        >>> evaluator = HierarchyEvaluator(tree.levels, tree.num_classes, tree)
        >>> logits = {'coarse': torch.tensor([[2., 0.], [2., 0.]]), 'fine': torch.tensor([[2., 0., 0.], [0., 0., 2.]])}
        >>> evaluator.update(logits, tree.expand([0, 0]))
        >>> metrics = evaluator.compute()
        >>> metrics['coarse_top1'], metrics['fine_top1'], metrics['consistency'], metrics['severity']
        (100.0, 50.0, 50.0, 2.0)
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
        decoder: str = "independent",
    ) -> None:
        self.levels, self.num_classes = tuple(levels), tuple(num_classes)
        self.taxonomy = taxonomy
        self.device = torch.device(device or "cpu")
        self.max_samples = max_samples
        self.to_levels = to_levels or (lambda output: [output[name] for name in self.levels])
        self.decoder = decoder
        if taxonomy is not None and taxonomy.num_classes != self.num_classes:
            raise ValueError(
                f"the levels {list(self.levels)} have {list(self.num_classes)} classes, the taxonomy's "
                f"{list(taxonomy.num_classes)}: give one head per level of the taxonomy."
            )
        if decoder not in DECODERS:
            raise ValueError(f"no decoder {decoder!r}: choose one of {', '.join(DECODERS)}.")
        if decoder != "independent" and taxonomy is None:
            raise ValueError(f"decoder {decoder!r} needs a taxonomy.")
        self.tables = PathTables(taxonomy, self.device) if taxonomy is not None else None
        self.starts = torch.tensor([0, *self.num_classes[:-1]]).cumsum(0).to(self.device)
        # on a level, or in a tree, of no more than k classes the top k are all of them, whatever
        # the model says
        self.top5_levels = [level for level, k in enumerate(self.num_classes) if k > 5]
        leaves = taxonomy.num_leaves if taxonomy is not None else 0
        self.dist_at = [k for k in (5, 20) if k < leaves]
        self.metrics: dict[str, float] = {}
        top1 = [f"{name}_top1" for name in self.levels]
        self.metric_names = (
            "loss",
            *top1,
            *(f"{self.levels[level]}_top5" for level in self.top5_levels),
            "full_path",
        )
        if taxonomy is not None:
            uneven = leaves != self.num_classes[-1]
            self.metric_names += (
                "consistency",
                "tice",
                "hp",
                "hr",
                "hf",
                "distance",
                *(f"dist@{k}" for k in self.dist_at),
                *(["top1"] if uneven else []),
                "severity",
            )
        self.metric_names += tuple(f"{name}_ece" for name in self.levels)
        self.headline = (*top1, "full_path", *(["consistency"] if taxonomy is not None else []))
        self.reset()

    @staticmethod
    def lower_is_better(name: str) -> bool:
        """Whether a metric of this name is the better the smaller it is."""
        return (
            name in ("loss", "tice", "distance", "severity")
            or name.startswith("dist@")
            or name.endswith("_ece")
        )

    def reset(self) -> None:
        self.num_samples = 0
        depth, nodes = len(self.levels), sum(self.num_classes)
        self._sizes = [
            len(_COUNTS) + len(self.dist_at),
            nodes,
            nodes,
            nodes,
            depth,
            2 * depth * NUM_BINS,
            *(k * k if k <= MAX_MATRIX_CLASSES else 0 for k in self.num_classes),
        ]
        self._ints = torch.zeros(sum(self._sizes), dtype=torch.int64, device=self.device)
        # Apple's GPUs have no float64. The summed loss, then the summed confidences of each bin
        exact = torch.float32 if self.device.type == "mps" else torch.float64
        self._floats = torch.zeros(1 + depth * NUM_BINS, dtype=exact, device=self.device)
        self._totals = self._split(self._ints)
        self._joined: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def counts(self) -> torch.Tensor:
        """This process's own counts of samples, see _COUNTS."""
        return self._totals.counts

    def _split(self, ints: torch.Tensor) -> _Totals:
        counts, labelled, predicted, right, top5, bins, *matrices = ints.split(self._sizes)
        return _Totals(
            counts,
            labelled,
            predicted,
            right,
            top5,
            bins.view(2, -1, NUM_BINS),
            [m if len(m) else None for m in matrices],
        )

    # -- taking batches
    # --------------------------------------------------------------------------------------

    @torch.no_grad()
    def update(self, output: Any, target: torch.Tensor) -> None:
        """Take one batch.

        Args:
            output: What the model returned; ``to_levels`` makes logits (B, K) of every level of it.
            target: Labels (B, L), -1 for unknown.

        Raises:
            ValueError: Labels or logits have another shape, or labels are not integers.
        """
        logits = self.to_levels(output)
        if target.ndim != 2 or target.shape[1] != len(self.levels) or target.is_floating_point():
            raise ValueError(
                f"evaluation takes labels (B, {len(self.levels)}), got {tuple(target.shape)}."
            )
        if [tuple(y.shape) for y in logits] != [(len(target), k) for k in self.num_classes]:
            raise ValueError(
                f"evaluation takes logits ({len(target)}, K) of {list(self.num_classes)} classes, got "
                f"{[tuple(y.shape) for y in logits]}."
            )
        keep = (
            len(target) if self.max_samples is None else max(0, self.max_samples - self.num_samples)
        )
        # half precision would round confidences
        logits = [
            y[:keep].to(self.device, torch.promote_types(y.dtype, torch.float32)) for y in logits
        ]
        target = target[:keep].to(self.device)
        self.num_samples += len(target)
        self._joined = None
        if not len(target):
            return
        known = target >= 0
        for level, y in enumerate(logits):
            losses = F.cross_entropy(y, target[:, level].clamp(min=0), reduction="none")
            self._floats[0] += torch.where(known[:, level], losses, 0).sum(dtype=self._floats.dtype)
        answers, confidences = self._decode(logits)
        self._count_classes(logits, answers, confidences, target)
        full = ((answers == target) | ~known).all(1) & known.any(1)
        counts = [full.sum(), known.any(1).sum()]
        counts += (
            self._count_paths(logits, answers, target)
            if self.tables is not None
            else [torch.zeros_like(counts[0])] * (len(self.counts) - 2)
        )
        self.counts.add_(torch.stack(counts))

    def _decode(self, logits: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Answers (B, L), -1 for none, and their probabilities (B, L)."""
        if self.decoder != "independent":
            assert self.taxonomy is not None
            prediction = decode(logits, self.taxonomy, self.decoder)
            return prediction.labels, prediction.probabilities
        best = [y.argmax(-1) for y in logits]
        sure = [
            y.softmax(-1).gather(1, i[:, None])[:, 0] for y, i in zip(logits, best, strict=True)
        ]
        return torch.stack(best, 1), torch.stack(sure, 1)

    def _count_classes(
        self,
        logits: list[torch.Tensor],
        answers: torch.Tensor,
        confidences: torch.Tensor,
        target: torch.Tensor,
    ) -> None:
        """What concerns each level for itself."""
        totals = self._totals
        known, right = target >= 0, (target == answers) & (target >= 0)
        answered = known & (answers >= 0)
        label, answer = target.clamp(min=0), answers.clamp(min=0)
        for total, index, mask in (
            (totals.labelled, label, known),
            (totals.predicted, answer, answered),
            (totals.right, label, right),
        ):
            total.scatter_add_(0, (index + self.starts).flatten(), mask.long().flatten())
        for level, (matrix, classes) in enumerate(
            zip(totals.matrices, self.num_classes, strict=True)
        ):
            if matrix is not None:
                cell = label[:, level] * classes + answer[:, level]
                matrix.scatter_add_(0, cell, answered[:, level].long())
        for level in self.top5_levels:
            totals.top5[level] += (logits[level].topk(5).indices == target[:, level, None]).sum()
        samples, hits, sums = calibration_bins(
            confidences, right, answered, NUM_BINS, self._floats.dtype
        )
        totals.bins.add_(torch.stack([samples, hits]))
        self._floats[1:] += sums.flatten()

    def _count_paths(
        self, logits: list[torch.Tensor], answers: torch.Tensor, target: torch.Tensor
    ) -> list[torch.Tensor]:
        """What concerns paths: the counts from ``consistent`` on."""
        assert self.tables is not None
        assert self.taxonomy is not None
        tables = self.tables
        paths = tables.augment(answers)
        consistent = tables.consistent(answers, paths).sum()
        leaf_known = tables.is_leaf(target).any(1)
        truth = tables.end(target)
        distance = tables.lca_height(truth, tables.end(answers)) * leaf_known
        counts = [
            consistent,
            torch.full_like(consistent, len(target)),
            *tables.overlap(paths, target),
            leaf_known.sum(),
            (distance > 0).sum(),
            distance.sum(),
        ]
        if self.dist_at:
            ranking = leaf_log_probs(logits, self.taxonomy).topk(self.dist_at[-1]).indices
            distances = (
                tables.lca_height(truth[:, None], tables.leaf_paths[ranking]) * leaf_known[:, None]
            )
            counts += [distances[:, :k].sum() for k in self.dist_at]
        return counts

    # -- results
    # ---------------------------------------------------------------------------------------------

    def compute(self, distributed: bool = False) -> OrderedDict[str, float]:
        """All metrics, by name.

        Args:
            distributed: Join the counts of all processes. This process's own stay, so that it may
                go on counting.
        """
        if not distributed:
            return self._metrics(self._ints, self._floats)
        self._joined = self._ints.clone(), self._floats.clone()
        for total in self._joined:
            dist.all_reduce(total)
        return self._metrics(*self._joined)

    def summary(self) -> OrderedDict[str, float]:
        """Metrics of this process so far, as timm's training loop shows them while it runs."""
        return self.compute()

    def confusion_matrices(self) -> list[torch.Tensor | None]:
        """Per level counts (K, K), rows are labels and columns answers; of all processes once these
        are joined.

        None for a level of more than 1,000 classes; :meth:`class_report` knows each of its classes
        all the same. Samples with a label but no answer are not in the matrix.
        """
        matrices = self._latest().matrices
        return [
            m if m is None else m.view(k, k).clone()
            for m, k in zip(matrices, self.num_classes, strict=True)
        ]

    def class_report(self) -> list[dict[str, Any]]:
        """Precision, recall and F1 of every class, of all processes once these are joined.

        Returns:
            One dict per class, from the first level to the last: ``level``, ``class`` (its name),
                ``precision``,
            ``recall`` and ``f1`` in percent, ``support`` (samples with this label).
            :func:`format_class_report` makes a text of it. Precision is nan for a class never
            predicted, recall for one without samples.
        """
        totals = self._latest()
        scores = [
            score.tolist()
            for score in class_scores(totals.right, totals.predicted, totals.labelled)
        ]
        names = (
            self.taxonomy.classes
            if self.taxonomy is not None
            else [map(str, range(k)) for k in self.num_classes]
        )
        classes = [
            (level, name)
            for level, of_level in zip(self.levels, names, strict=True)
            for name in of_level
        ]
        return [
            {
                "level": level,
                "class": name,
                "precision": 100 * p,
                "recall": 100 * r,
                "f1": 100 * f,
                "support": n,
            }
            for (level, name), p, r, f, n in zip(
                classes, *scores, totals.labelled.tolist(), strict=True
            )
        ]

    def _latest(self) -> _Totals:
        return self._split((self._ints if self._joined is None else self._joined[0]).cpu())

    def _metrics(self, ints: torch.Tensor, floats: torch.Tensor) -> OrderedDict[str, float]:
        totals, floats = self._split(ints.cpu()), floats.cpu()
        n = dict(zip(_COUNTS, totals.counts.tolist(), strict=False))
        labelled, right = (
            [int(y.sum()) for y in x.split(self.num_classes)]
            for x in (totals.labelled, totals.right)
        )
        ece = calibration_error(
            totals.bins[0], totals.bins[1], floats[1:].view(-1, NUM_BINS)
        ).tolist()
        wrong = n["answers"] - n["consistent"]
        found = {
            "loss": _ratio(float(floats[0]), sum(labelled)),
            "full_path": 100 * _ratio(n["full_right"], n["full_known"]),
            "consistency": 100 * _ratio(n["consistent"], n["answers"]),
            "tice": 100 * _ratio(wrong, n["answers"]),
            "hp": 100 * _ratio(n["path_right"], n["path_predicted"]),
            "hr": 100 * _ratio(n["path_right"], n["path_true"]),
            "hf": 100 * _ratio(2 * n["path_right"], n["path_predicted"] + n["path_true"]),
            "distance": _ratio(n["distance"], n["leaves_known"]),
            "top1": 100 * _ratio(n["leaves_known"] - n["mistakes"], n["leaves_known"]),
            "severity": _ratio(n["distance"], n["mistakes"]),
        }
        for k, total in zip(self.dist_at, totals.counts[len(_COUNTS) :].tolist(), strict=True):
            found[f"dist@{k}"] = _ratio(total, k * n["leaves_known"])
        for level, name in enumerate(self.levels):
            found[f"{name}_top1"] = 100 * _ratio(right[level], labelled[level])
            found[f"{name}_top5"] = 100 * _ratio(int(totals.top5[level]), labelled[level])
            found[f"{name}_ece"] = 100 * ece[level]
        return OrderedDict((name, found[name]) for name in self.metric_names)


def _ratio(a: float, b: float) -> float:
    return a / b if b else float("nan")
