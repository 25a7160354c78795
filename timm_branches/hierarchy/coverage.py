"""How much is said at which risk: answers that climb the tree, over all thresholds at once.

Nothing here loops over samples or thresholds: each class on a sample's path is an event at its
probability, at which the answer gains information or becomes wrong, and sums over sorted events
are the curve.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from timm_branches.hierarchy.calibration import labels_to_leaves, whole_paths
from timm_branches.hierarchy.nodes import NodeTables, leaf_log_posterior, node_tables
from timm_branches.taxonomy.taxonomy import Taxonomy

__all__ = [
    "Coverage",
    "CoverageEvaluator",
    "OperatingCurve",
    "climbing_coverage",
    "leaf_coverage",
    "operating_curve",
    "plot_coverage",
]

# probabilities, and for each of several sums what is added to it there
Events = tuple[torch.Tensor, ...]

_ROWS = 1024  # samples at a time, whose nodes' probabilities fit into memory


class Coverage(NamedTuple):
    """A curve of information against risk, from answering nothing to answering all.

    Attributes:
        thresholds: (T,), falling; an answer goes down as long as probabilities are above it.
        information: (T,), the share of the leaves' information that is kept, from 0 to 1.
        risk: (T,), the share of all samples whose answer is wrong; it never falls.
    """

    thresholds: torch.Tensor
    information: torch.Tensor
    risk: torch.Tensor

    def information_at(self, right: float) -> float:
        """The most information that is kept where at least this share of answers is right."""
        good = (self.risk <= 1 - right + 1e-12).nonzero()
        return float(self.information[good[-1, 0]]) if len(good) else 0.0

    def area(self) -> float:
        """The area under the risk, over the information from 0 to 1 by trapezes; less is better.

        Where all that can be said says less than everything, the last risk goes on.
        """
        area = torch.trapezoid(self.risk, self.information)
        return float(area + self.risk[-1] * (1 - self.information[-1]))


class OperatingCurve(NamedTuple):
    """Precision, recall and correctness of the most specific node above each threshold.

    Attributes:
        thresholds: (T,), falling.
        precision: (T,), mean of I(common) / I(answer), 1 for the root.
        recall: (T,), mean of I(common) / I(truth).
        correct: (T,), share of answers that are the truth or above it.
        average_precision: Area under precision over recall.
        average_correct: Area under correctness over recall.
    """

    thresholds: torch.Tensor
    precision: torch.Tensor
    recall: torch.Tensor
    correct: torch.Tensor
    average_precision: float
    average_correct: float

    def recall_at(self, correct: float) -> float:
        """The largest recall at which this share of answers is correct, such as 0.95."""
        good = self.correct >= correct - 1e-12
        return float(self.recall[good].max()) if good.any() else 0.0


def climbing_coverage(
    log_posterior: torch.Tensor, labels: torch.Tensor, taxonomy: Taxonomy
) -> Coverage:
    """Risk against coverage of answers that climb from the likeliest leaf.

    Information of a node is I(node) = log(leaves) - log(leaves below it), and what is reported is
    the mean of I(answer) / I(leaf).

    Args:
        log_posterior: (N, leaves), see :func:`~timm_branches.hierarchy.nodes.leaf_log_posterior`.
        labels: (N, L), down to a leaf.
        taxonomy: The tree.

    Returns:
        The exact curve, one point for each probability at which something changes.

    Raises:
        ValueError: Shapes differ, or a leaf is not known.

    Source: Goren et al., "Hierarchical Selective Classification", NeurIPS 2024 (arXiv 2405.11533):
    hierarchical risk and coverage, with equally likely leaves. A wrong answer counts 1 whatever
    its depth, out of all samples.

    Example:
        >>> tree = Taxonomy(['animal/cat', 'animal/dog', 'ship', 'car'])
        >>> p = torch.tensor([[0.6, 0.3, 0.05, 0.05], [0.3, 0.5, 0.1, 0.1]])
        >>> curve = climbing_coverage(p.log(), tree.expand([0, 0]), tree)
        >>> curve.information.tolist(), curve.risk.tolist()
        ([0.0, 0.25, 0.5, 0.75, 1.0], [0.0, 0.0, 0.0, 0.0, 0.5])
    """
    return _curve(_climbing_events(log_posterior, labels, taxonomy), len(labels))


def _climbing_events(
    log_posterior: torch.Tensor, labels: torch.Tensor, taxonomy: Taxonomy
) -> Events:
    truth = _check(log_posterior, labels, taxonomy)
    whole = whole_paths(log_posterior.double(), taxonomy)
    tables = node_tables(taxonomy, labels.device)
    nodes = tables.nodes_of(whole.labels)  # (N, L + 1)
    gains = node_information(tables)[nodes].diff(dim=1)
    wrong = (whole.labels != taxonomy.expand(truth)).cummax(1).values & (whole.labels >= 0)
    becomes_wrong = wrong.double().diff(dim=1, prepend=torch.zeros_like(gains[:, :1]))
    answered = whole.labels >= 0
    return whole.probabilities[answered], gains[answered], becomes_wrong.clamp(min=0)[answered]


def leaf_coverage(
    log_posterior: torch.Tensor, labels: torch.Tensor, taxonomy: Taxonomy
) -> Coverage:
    """Risk against coverage of a classifier that names a leaf or nothing.

    Args:
        log_posterior: As for :func:`climbing_coverage`.
        labels: As there.
        taxonomy: The tree.
    """
    return _curve(_leaf_events(log_posterior, labels, taxonomy), len(labels))


def _leaf_events(log_posterior: torch.Tensor, labels: torch.Tensor, taxonomy: Taxonomy) -> Events:
    truth = _check(log_posterior, labels, taxonomy)
    sure, leaf = log_posterior.double().exp().max(1)
    return sure, torch.ones_like(sure), (leaf != truth).double()


def _check(log_posterior: torch.Tensor, labels: torch.Tensor, taxonomy: Taxonomy) -> torch.Tensor:
    """The leaves (N,) of the labels."""
    if log_posterior.shape != (len(labels), taxonomy.num_leaves) or labels.ndim != 2:
        raise ValueError(
            f"There must be log-probabilities (N, {taxonomy.num_leaves}) and labels "
            f"(N, {taxonomy.num_levels}), got {tuple(log_posterior.shape)} and "
            f"{tuple(labels.shape)}."
        )
    truth = labels_to_leaves(labels, taxonomy)
    if (truth < 0).any():
        raise ValueError(f"{int((truth < 0).sum())} samples have no known leaf: leave them out.")
    return truth


def node_information(tables: NodeTables) -> torch.Tensor:
    """I(node) / I(leaf) of each node; in a tree of one leaf 1 of all but the root."""
    total = tables.num_leaves[0].double().log()
    if total == 0:
        return (tables.depths > 0).double()
    return 1 - tables.num_leaves.double().log() / total


def _curve(events: Events, count: int) -> Coverage:
    """The curve of what is gained, and what becomes wrong, at which probability."""
    thresholds, [information, risk] = _sums(*events)
    return Coverage(thresholds, (information / max(count, 1)).clamp(max=1), risk / max(count, 1))


def _sums(at: torch.Tensor, *changes: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Thresholds, falling, and the sums of all changes at higher probabilities than each."""
    order = torch.argsort(at, descending=True, stable=True)
    at = at[order]
    # what happens at the same probability happens together
    last = torch.ones_like(at, dtype=torch.bool)
    last[:-1] = at[1:] != at[:-1]
    zero = at.new_zeros(1)
    totals = [torch.cat([zero, change[order].cumsum(0)[last]]) for change in changes]
    if not len(at):
        return zero + 1, totals
    # an event is past as soon as the threshold is below it: the next one is the lowest such
    return torch.cat([at[:1], at[last][1:], zero]), totals


def operating_curve(
    log_posterior: torch.Tensor, labels: torch.Tensor, taxonomy: Taxonomy
) -> OperatingCurve:
    """The trade-off of precision and recall over all thresholds on the nodes' probabilities.

    At each threshold the answer is the node of most information among those that are likelier than
    it, the likeliest of these; the root if there is none.

    Args:
        log_posterior: As for :func:`climbing_coverage`.
        labels: As there.
        taxonomy: The tree.

    Returns:
        The exact curve: O(N log N) in the samples, by each sample's Pareto set of nodes.

    Raises:
        ValueError: Shapes differ, or a leaf is not known.

    Source: Valmadre, "Hierarchical classification at multiple operating points", NeurIPS 2022
    (arXiv 2210.10929): the inference rule, the ordered Pareto set, and precision, recall and
    correctness by information, averaged over samples. Ours: the precision of the root is 1, and
    areas are those of trapezes from recall 0.

    Example:
        >>> tree = Taxonomy(['animal/cat', 'animal/dog', 'ship', 'car'])
        >>> p = torch.tensor([[0.6, 0.3, 0.05, 0.05], [0.3, 0.5, 0.1, 0.1]])
        >>> curve = operating_curve(p.log(), tree.expand([0, 0]), tree)
        >>> curve.recall_at(1.0), curve.recall_at(0.5)
        (0.75, 0.75)
    """
    return _operating_curve(_pareto_events(log_posterior, labels, taxonomy), len(labels))


def _operating_curve(events: Events, count: int) -> OperatingCurve:
    thresholds, totals = _sums(*events)
    # at first all say the root: precise, correct, and of no recall
    precision, recall, correct = (
        start + total / max(count, 1) for start, total in zip((1.0, 0.0, 1.0), totals, strict=True)
    )
    return OperatingCurve(
        thresholds,
        precision,
        recall,
        correct,
        float(torch.trapezoid(precision, recall)),
        float(torch.trapezoid(correct, recall)),
    )


def _pareto_events(log_posterior: torch.Tensor, labels: torch.Tensor, taxonomy: Taxonomy) -> Events:
    """When each sample's answer changes, and what that does to precision, recall, correctness."""
    truth = _check(log_posterior, labels, taxonomy)
    parts = []
    for rows in torch.arange(len(truth), device=labels.device).split(_ROWS):
        parts.append(_pareto_part(log_posterior[rows], truth[rows], taxonomy))
    return _joined(parts)


def _joined(parts: Sequence[Events]) -> Events:
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def _pareto_part(log_posterior: torch.Tensor, truth: torch.Tensor, taxonomy: Taxonomy) -> Events:
    tables = node_tables(taxonomy, truth.device)
    value = node_information(tables)
    masses = tables.sums(log_posterior.double().exp())
    # the likeliest first; of equally likely nodes the one that says most, then the first
    by_value = value.argsort(descending=True, stable=True)
    ranks = torch.argsort(masses[:, by_value], dim=1, descending=True, stable=True)
    order = by_value[ranks]
    said = value[order]
    best_before = said.cummax(1).values.roll(1, 1)
    best_before[:, 0] = 0
    row, place = (said > best_before).nonzero(as_tuple=True)
    node = order[row, place]
    path = tables.leaf_paths[truth[row]]  # (E, L + 1)
    own = tables.nodes_of(tables.labels[node])
    common = value[path.where(path == own, 0).amax(1)]
    measures = (common / value[node], common / value[path[:, -1]], (common == value[node]).double())
    changes = []
    for measure, start in zip(measures, (1.0, 0.0, 1.0), strict=True):
        before = measure.roll(1)
        new = torch.ones_like(row, dtype=torch.bool)
        new[1:] = row[1:] != row[:-1]
        changes.append(measure - before.where(~new, start))
    return (masses[row, node], *changes)


class CoverageEvaluator:
    """What answers that climb the tree keep, beside naming a leaf or nothing; batch by batch.

    Args:
        taxonomy: The tree.
        decoder: What makes one distribution over the leaves, see
            :func:`~timm_branches.hierarchy.nodes.leaf_log_posterior`.
        temperature: As there.
        to_levels: From a model's output to the logits of each level; by default it gives them.

    Example:
        >>> tree = Taxonomy(['animal/cat', 'animal/dog', 'ship', 'car'])
        >>> evaluator = CoverageEvaluator(tree, 'leaf-marginal')
        >>> p = torch.tensor([[0.6, 0.3, 0.05, 0.05], [0.3, 0.5, 0.1, 0.1]])
        >>> from timm_branches.hierarchy import sum_upwards
        >>> evaluator.update(sum_upwards(p.log(), tree), tree.expand([0, 0]))
        >>> metrics = evaluator.compute()
        >>> metrics['information@95'], metrics['leaf_information@95']
        (75.0, 50.0)
    """

    def __init__(
        self,
        taxonomy: Taxonomy,
        decoder: str = "best-path",
        temperature: float = 1.0,
        to_levels: Callable[[Any], Sequence[torch.Tensor]] = list,
    ) -> None:
        self.taxonomy, self.decoder, self.temperature = taxonomy, decoder, temperature
        self.to_levels = to_levels
        self.count = 0
        self._events: dict[str, list[Events]] = {"climbing": [], "leaf": [], "nodes": []}

    def update(self, output: Any, target: torch.Tensor) -> None:
        """Take a batch: the model's output, and labels (B, L); known leaves count."""
        known = labels_to_leaves(target, self.taxonomy) >= 0
        levels = [logits[known].double() for logits in self.to_levels(output)]
        log_p = leaf_log_posterior(levels, self.taxonomy, self.decoder, self.temperature)
        labels = target[known]
        self.count += len(labels)
        for name, function in (
            ("climbing", _climbing_events),
            ("leaf", _leaf_events),
            ("nodes", _pareto_events),
        ):
            if len(labels):
                found = function(log_p, labels, self.taxonomy)
                self._events[name].append(tuple(values.cpu() for values in found))

    def curves(self) -> dict[str, Coverage]:
        """The curves for :func:`plot_coverage`; empty without samples."""
        if not self.count:
            return {}
        return {
            "climbing the tree": _curve(_joined(self._events["climbing"]), self.count),
            "a leaf or nothing": _curve(_joined(self._events["leaf"]), self.count),
        }

    def compute(self) -> OrderedDict[str, float]:
        """The metrics, in percent; none without samples.

        `information@90`, `@95`, `@99`, kept where so many answers are right, by climbing, and
        `leaf_information@...` by leaf or nothing; `risk_area` and `leaf_risk_area`;
        `average_precision` and `recall@95correct` of :func:`operating_curve`.
        """
        result: OrderedDict[str, float] = OrderedDict()
        for name, curve in zip(("", "leaf_"), self.curves().values(), strict=False):
            for right in (90, 95, 99):
                result[f"{name}information@{right}"] = 100 * curve.information_at(right / 100)
            result[f"{name}risk_area"] = 100 * curve.area()
        if self.count:
            trade = _operating_curve(_joined(self._events["nodes"]), self.count)
            result["average_precision"] = 100 * trade.average_precision
            result["recall@95correct"] = 100 * trade.recall_at(0.95)
        return result


def plot_coverage(curves: Mapping[str, Coverage], path: str | os.PathLike) -> Path:
    """Draw how much is right over how much is said.

    Args:
        curves: By name, such as 'climbing' and 'leaf or nothing'.
        path: The PNG; missing folders are made.

    Returns:
        The path.

    Raises:
        ValueError: There are no curves.
    """
    from timm_branches.figures import COLOURS, FAINT, INK, new_figure, restrain, save_figure

    if not curves:
        raise ValueError("There is nothing to plot: no curves are given.")
    figure = new_figure(5.6, 3.8)
    axes = figure.subplots()
    lowest = 100.0
    for i, (name, curve) in enumerate(curves.items()):
        information, right = 100 * curve.information.cpu(), 100 * (1 - curve.risk.cpu())
        lowest = min(lowest, float(right.min()))
        axes.plot(
            information.numpy(),
            right.numpy(),
            color=COLOURS[i % len(COLOURS)],
            linewidth=2,
            label=name,
        )
    axes.axhline(95, color=FAINT, linewidth=1.2, zorder=0)
    restrain(axes)
    axes.grid(color=FAINT, linewidth=0.8)
    axes.set_xlim(0, 101)
    axes.set_ylim(min(lowest, 94) - 1, 100.5)
    axes.set_xlabel("information kept (% of that of leaves)", color=INK, fontsize=10)
    axes.set_ylabel("answers that are right (%)", color=INK, fontsize=10)
    axes.legend(frameon=False, fontsize=9, labelcolor=INK, loc="lower left")
    return save_figure(figure, path)
