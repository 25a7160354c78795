"""Answers that keep a promise: a temperature, and a threshold at which answers climb the tree.

A calibrated answer starts at the likeliest leaf and climbs its path to the first node whose
probability is above a threshold. The threshold is chosen on labelled data that training has not
seen, so that on data like these the answer is right as often as was asked.

Source: the climbing rule is that of Goren et al., "Hierarchical Selective Classification", NeurIPS
2024 (arXiv 2405.11533); the rank's correction is that of split conformal prediction (Vovk et al.
2005), by which the promise holds for any number of samples.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, NamedTuple

import torch

from timm_branches.hierarchy.ancestry import check_labels
from timm_branches.hierarchy.decode import in_order_of_levels
from timm_branches.hierarchy.depth import Prediction
from timm_branches.hierarchy.losses import marginal_loss
from timm_branches.hierarchy.nodes import LEAF_SCORES, leaf_log_posterior, node_tables
from timm_branches.hierarchy.tree_metrics import path_tables
from timm_branches.taxonomy.taxonomy import Taxonomy

__all__ = [
    "Calibration",
    "CalibratedAnswers",
    "climb",
    "fit_calibration",
    "fit_temperature",
    "fit_threshold",
    "information",
    "tight_thresholds",
]

_logger = logging.getLogger(__name__)

NO_ANSWER = math.inf  # the threshold that no probability is above
_MOST_CONFIDENCES = 1000


def fit_temperature(
    leaf_logits: torch.Tensor, labels: torch.Tensor, taxonomy: Taxonomy, steps: int = 60
) -> float:
    """The temperature T > 0 at which softmax(leaf_logits / T) has the least cross-entropy.

    In 1 / T that is convex, so halving the interval at the sign of the slope finds it. Source: Guo
    et al., "On Calibration of Modern Neural Networks", ICML 2017 (arXiv 1706.04599).

    Args:
        leaf_logits: (N, leaves), logits or log-probabilities of data that training has not seen.
        labels: (N, L); a coarse label counts by :func:`marginal_loss`, for which the cross-entropy
            need not be convex.
        taxonomy: The tree.
        steps: Of halving.

    Returns:
        T, between 1e-3 and 1e3.

    Raises:
        ValueError: Shapes or labels do not fit the taxonomy, no label is known, or a logit is not
            finite.
    """
    if not (labels >= 0).any():
        raise ValueError("No sample has a known label: there is no temperature to fit.")
    if not leaf_logits.isfinite().all():
        raise ValueError("leaf_logits must be finite to fit a temperature.")
    logits = leaf_logits.detach().double()
    check_labels(labels, taxonomy, len(logits))
    labels, logits = labels[(labels >= 0).any(1)], logits[(labels >= 0).any(1)]
    leaves = labels_to_leaves(labels, taxonomy)
    rises = _slope_of_marginal(logits, labels, taxonomy)
    if (leaves >= 0).all():
        rises = _slope_of_cross_entropy(logits, leaves)
    low, high = -math.log(1e3), math.log(1e3)  # of log(1 / T)
    for _ in range(steps):
        guess = (low + high) / 2
        if rises(guess) > 0:
            high = guess
        else:
            low = guess
    return math.exp(-(low + high) / 2)


def _slope_of_cross_entropy(
    logits: torch.Tensor, leaves: torch.Tensor
) -> Callable[[float], torch.Tensor]:
    """The sign of its slope in log(1 / T): that of mean(sum of p z - z of the label)."""
    own = logits.gather(1, leaves[:, None])[:, 0]

    def slope(guess: float) -> torch.Tensor:
        p = (logits * math.exp(guess)).softmax(1)
        return ((p * logits).sum(1) - own).mean()

    return slope


def _slope_of_marginal(
    logits: torch.Tensor, labels: torch.Tensor, taxonomy: Taxonomy
) -> Callable[[float], torch.Tensor]:
    def slope(guess: float) -> torch.Tensor:
        middle = torch.tensor(guess, dtype=torch.double, requires_grad=True)
        with torch.enable_grad():
            loss = marginal_loss(logits * middle.exp(), labels, taxonomy)
            [found] = torch.autograd.grad(loss, middle)
        return found

    return slope


def tight_thresholds(
    prediction: Prediction, labels: torch.Tensor, taxonomy: Taxonomy
) -> torch.Tensor:
    """The lowest threshold at which each answer is right, as far as it goes.

    Args:
        prediction: Paths whose probabilities never rise on the way down, as every decoder but
            'independent' gives them.
        labels: (N, L), true paths down to a leaf.
        taxonomy: The tree.

    Returns:
        (N,): the probability of the uppermost class that is wrong, which is where the answer must
        not stop; 0 where all of it is right.

    Raises:
        ValueError: Shapes differ, a leaf is not known, or probabilities rise on the way down.
    """
    _check_paths(prediction, labels, taxonomy)
    # what is below the first wrong class is wrong, too, and no likelier
    return _where_wrong(prediction, labels).amax(1)


def _where_wrong(prediction: Prediction, labels: torch.Tensor) -> torch.Tensor:
    """The probability (N, L) of each class that is wrong, 0 elsewhere."""
    predicted, probabilities = prediction
    return probabilities.where((predicted != labels) & (predicted >= 0), 0)


def _check_paths(prediction: Prediction, labels: torch.Tensor, taxonomy: Taxonomy) -> None:
    predicted, probabilities = prediction
    if predicted.shape != labels.shape or labels.shape[1:] != (taxonomy.num_levels,):
        raise ValueError(
            f"A prediction and labels must have shape (N, {taxonomy.num_levels}), got "
            f"{tuple(predicted.shape)} and {tuple(labels.shape)}."
        )
    leaf_known = path_tables(taxonomy, labels.device).is_leaf(labels).any(1)
    if not leaf_known.all():
        raise ValueError(
            f"Calibration needs samples whose leaf is known: {int((~leaf_known).sum())} of "
            f"{len(labels)} have none. Leave them out."
        )
    rise = probabilities.diff(dim=1)
    if (rise > 1e-5).any() or probabilities.isnan().any():
        raise ValueError(
            "Probabilities must not rise on the way down the path, nor be nan: take another "
            "decoder than 'independent'."
        )


def fit_threshold(
    prediction: Prediction, labels: torch.Tensor, taxonomy: Taxonomy, target: float
) -> float:
    """The threshold of :func:`climb` at which answers are right with probability `target`.

    It is the r-th smallest of the N samples' tight thresholds, r = ceil((N + 1) target): for a new
    sample that is exchangeable with these, P(right) >= r / (N + 1) >= target, over the draw of all
    N + 1. Without ties it is at most 1 / (N + 1) more.

    Args:
        prediction: As in :func:`tight_thresholds`, of data that training has not seen.
        labels: (N, L), true paths down to a leaf.
        taxonomy: The tree.
        target: The share of right answers that is asked for, in (0, 1). No answer is not wrong.

    Returns:
        The threshold; infinity, at which nothing is answered, where N is too small for the target.
        The latter is warned of.

    Raises:
        ValueError: As for :func:`tight_thresholds`, or the target is out of range.

    Example:
        >>> tree = Taxonomy(['animal/cat', 'animal/dog', 'transport/ship'])
        >>> probabilities = torch.tensor([[0.9, 0.6], [0.9, 0.8], [0.7, 0.5]])
        >>> said = Prediction(tree.expand([0, 1, 2]), probabilities)
        >>> threshold = fit_threshold(said, tree.expand([1, 1, 2]), tree, target=0.7)
        >>> climb(said, threshold).labels.tolist()
        [[0, -1], [0, 1], [1, -1]]
    """
    _check_target(target)
    threshold = threshold_at_rank(tight_thresholds(prediction, labels, taxonomy), target)
    if threshold == NO_ANSWER:
        _logger.warning(
            "%d samples are too few to promise %g %% right answers, which takes at least %d: "
            "nothing will be answered.",
            len(labels),
            100 * target,
            least_samples(target),
        )
    return threshold


def _check_target(target: Any) -> None:
    is_number = isinstance(target, (int, float)) and not isinstance(target, bool)
    if not is_number or not 0 < target < 1:
        raise ValueError(f"target must be a share between 0 and 1, such as 0.95, got {target}.")


def threshold_at_rank(thresholds: torch.Tensor, target: float) -> float:
    """The r-th smallest of N, r = ceil((N + 1) target); infinity where r > N."""
    count = len(thresholds)
    # (count + 1) * 0.9 may come out a rounding above a whole number
    rank = math.ceil((count + 1) * target - 1e-9)
    if rank > count:
        return NO_ANSWER
    return float(thresholds.detach().sort().values[rank - 1])


def least_samples(target: float) -> int:
    """How many samples a promise takes at least: r = ceil((N + 1) target) <= N."""
    return math.ceil(target / (1 - target) - 1e-9)


def climb(prediction: Prediction, threshold: float | torch.Tensor) -> Prediction:
    """Cut each answer at the deepest level down to which all probabilities are above the threshold.

    Args:
        prediction: As in :func:`tight_thresholds`.
        threshold: From :func:`fit_threshold`; or one for each level (L,), or each answer and level
            (N, L).

    Returns:
        The prediction with labels -1 and probabilities 0 below the cut; all of them if no level's
        probability is above the threshold.
    """
    labels, probabilities = prediction
    keep = ((probabilities > threshold) & (labels >= 0)).cumprod(1).bool()
    return Prediction(labels.where(keep, -1), probabilities.where(keep, 0))


def information(labels: torch.Tensor, taxonomy: Taxonomy) -> torch.Tensor:
    """How much of what a leaf says each answer says: I(node) / I(leaf), I = -log(share of leaves).

    Source: Goren et al. 2024, their coverage with equally likely leaves.

    Args:
        labels: (N, L), -1 below the answer's class.
        taxonomy: The tree.

    Returns:
        (N,) from 0, no answer, to 1, a leaf. A tree of one leaf has nothing to say: 1.

    Example:
        >>> tree = Taxonomy(['animal/cat', 'animal/dog', 'ship', 'car'])
        >>> information(torch.tensor([[0, 0], [0, -1], [-1, -1]]), tree).tolist()
        [1.0, 0.5, 0.0]
    """
    tables = node_tables(taxonomy, labels.device)
    below = tables.num_leaves[tables.nodes_of(labels)[:, -1]].double()
    if taxonomy.num_leaves == 1:
        return torch.ones_like(below)
    return 1 - below.log() / math.log(taxonomy.num_leaves)


class CalibratedAnswers(NamedTuple):
    """What a :class:`Calibration` makes of logits.

    Attributes:
        prediction: The answers, cut where they are not sure enough.
        whole: The same, down to the likeliest leaf.
        log_posterior: (N, leaves) that they were read off.
    """

    prediction: Prediction
    whole: Prediction
    log_posterior: torch.Tensor


@dataclass(frozen=True)
class Calibration:
    """A temperature and thresholds, with the promise that they keep and the data they came from.

    Three promises can be made, each over the draw of the calibration samples and of a new sample
    that is exchangeable with them:

    - P(the answer is right as far as it goes) >= target; one target, no `by`.
    - P(the same | the likeliest leaf lies below class c of level `by`) >= target, for every c
      ("Mondrian"); paths that end above that level are a group of their own.
    - P(the answer goes down to level l and is wrong there) <= 1 - target of l, for every level l
      that has a target; `targets` by level.

    No answer is never wrong.

    Attributes:
        targets: The share of right answers that is promised, by level; under '' for whole answers.
        decoder: What makes one distribution over the leaves, see :func:`leaf_log_posterior`.
        temperature: What its scores are divided by.
        thresholds: A row for each class of `by`, and one more; a number for each level.
        by: The level with a promise for each class, or None.
        count: How many samples they come from.
        absent: The leaves without a sample among them, as paths.
        right: The share of right answers on these samples themselves.
        information: The mean :func:`information` of the answers to them.
        confidences: Their likeliest leaves' probabilities in order, at most 1,000 of them.
        data: Where they were read.
        weights: A checksum of the model that was calibrated.
        tree: A checksum of its tree.
    """

    targets: Mapping[str, float]
    decoder: str
    temperature: float
    thresholds: Sequence[Sequence[float]]
    by: str | None = None
    count: int = 0
    absent: Sequence[str] = ()
    right: float = 0.0
    information: float = 0.0
    confidences: Sequence[float] = ()
    data: str = ""
    weights: str = ""
    tree: str = ""

    def answer(self, level_logits: Any, taxonomy: Taxonomy) -> CalibratedAnswers:
        """Answers to a batch.

        Args:
            level_logits: As for :func:`decode`; of a flat model what
                :func:`~timm_branches.hierarchy.sum_upwards` makes of its logits.
            taxonomy: The tree.
        """
        log_p = _posterior(level_logits, taxonomy, self.decoder, self.temperature)
        whole = whole_paths(log_p, taxonomy)
        table = torch.tensor(self.thresholds, dtype=log_p.dtype, device=log_p.device)
        rows = table[_groups(whole.labels, taxonomy, self.by)]
        return CalibratedAnswers(climb(whole, rows), whole, log_p)

    def promise(self) -> str:
        """What is promised, in words: 'right on 95 %'."""
        parts = []
        for level, target in self.targets.items():
            parts.append(f"{level} right on {100 * target:g} %".strip())
        return ", ".join(parts) + (f" of each {self.by}" if self.by else "")

    def to_dict(self) -> dict[str, Any]:
        """What JSON can hold: infinity, at which nothing is answered, becomes None."""
        rows = []
        for row in self.thresholds:
            rows.append([_finite(value) for value in row])
        return {**asdict(self), "thresholds": rows}

    @classmethod
    def from_dict(cls, described: Any, taxonomy: Taxonomy) -> Calibration:
        """What :meth:`to_dict` gave.

        Raises:
            ValueError: It is not that, or of another tree.
        """
        try:
            given = dict(described)
            rows = []
            for row in given["thresholds"]:
                rows.append(tuple(map(_threshold, row)))
            given["thresholds"] = tuple(rows)
            for name in ("absent", "confidences"):
                given[name] = tuple(given[name])
            known = {field.name: given.pop(field.name) for field in fields(cls)}
            result = cls(**known)
            _check_calibration(result, taxonomy)
            if result.tree != _digest(taxonomy):
                raise ValueError("it was made for a tree of other classes, or another order.")
        except KeyError as error:
            raise ValueError(f"This is no calibration of such a tree: it lacks {error}.") from error
        except ValueError as error:
            raise ValueError(f"This is no calibration of such a tree: {error}") from error
        except (AttributeError, TypeError) as error:
            raise ValueError("This is no calibration of such a tree.") from error
        if given:
            raise ValueError(f"A calibration has no {', '.join(map(str, given))}.")
        return result


def _digest(taxonomy: Taxonomy) -> str:
    text = json.dumps([taxonomy.levels, taxonomy.leaves, taxonomy.nodes])
    return hashlib.sha256(text.encode()).hexdigest()


def _finite(value: float) -> float | None:
    return None if value == NO_ANSWER else value


def _threshold(value: Any) -> float:
    return NO_ANSWER if value is None else float(value)


def _check_calibration(calibration: Calibration, taxonomy: Taxonomy) -> None:
    """Raise a ValueError unless it is such as :func:`fit_calibration` gives."""
    _check_targets(calibration.targets, calibration.by, taxonomy)
    if calibration.decoder not in LEAF_SCORES:
        raise ValueError(f"there is no decoder {calibration.decoder!r} of leaves.")
    for name, low, high in (("temperature", 1e-4, 1e4), ("right", 0, 1), ("information", 0, 1)):
        _check_range(name, getattr(calibration, name), low, high)
    if isinstance(calibration.count, bool) or not isinstance(calibration.count, int):
        raise ValueError(f"count must be a whole number, got {calibration.count!r}.")
    _check_range("count", calibration.count, 1, math.inf)
    texts = (calibration.data, calibration.weights, calibration.tree, *calibration.absent)
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("what is a name must be a text.")
    groups = 1
    if calibration.by is not None:
        groups += taxonomy.num_classes[taxonomy.level_index(calibration.by)]
    shape = [len(row) for row in calibration.thresholds]
    if shape != [taxonomy.num_levels] * groups:
        raise ValueError(f"there must be {groups} rows of {taxonomy.num_levels} thresholds.")
    for row in calibration.thresholds:
        for value in row:
            if value != NO_ANSWER:
                _check_range("a threshold", value, 0, 1)
    for value in calibration.confidences:
        _check_range("a confidence", value, 0, 1)
    if not calibration.confidences or list(calibration.confidences) != sorted(
        calibration.confidences
    ):
        raise ValueError("confidences must be numbers in order.")


def _check_targets(targets: Any, by: str | None, taxonomy: Taxonomy) -> None:
    """Raise a ValueError unless it is one target, or one each for some levels."""
    if not isinstance(targets, Mapping) or not targets:
        raise ValueError("there must be a target.")
    if "" in targets and len(targets) > 1 or by is not None and "" not in targets:
        raise ValueError("Give one target, or a level's name and its target each without by=.")
    for level, share in targets.items():
        _check_target(share)
        if level:
            taxonomy.level_index(level)


def _check_range(name: str, value: Any, low: float, high: float) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not low <= value <= high:
        raise ValueError(f"{name} must be a number from {low:g} to {high:g}, got {value!r}.")


def fit_calibration(
    level_logits: Any,
    labels: torch.Tensor,
    taxonomy: Taxonomy,
    target: float | Mapping[str, float] = 0.95,
    by: str | None = None,
    decoder: str = "best-path",
) -> Calibration:
    """A temperature, by cross-entropy, and the thresholds that keep a promise.

    Args:
        level_logits: Of data that training has not seen: a float tensor (N, num_classes[level]) a
            level, as for :func:`decode`.
        labels: (N, L). Samples whose leaf is not known are left out, and counted in a warning.
        taxonomy: The tree.
        target: The share of right answers, in (0, 1); or one for each level by name, where levels
            that are not named are promised nothing.
        by: Name of a level: the promise holds for each of its classes by itself.
        decoder: See :func:`leaf_log_posterior`.

    Returns:
        The :class:`Calibration`, which says what exactly is promised. Leaves without a sample, and
        classes with too few, are warned of.

    Raises:
        ValueError: Logits or labels do not fit the tree, no leaf is known, a target is out of
            range, or there is no such level or decoder; `by` beside several targets.

    Example:
        >>> tree = Taxonomy(['animal/cat', 'animal/dog', 'ship'])
        >>> logits = [torch.randn(500, k) for k in tree.num_classes]
        >>> labels = tree.expand(torch.randint(3, (500,)))
        >>> calibration = fit_calibration(logits, labels, tree, target=0.9)
        >>> calibration.answer(logits, tree).prediction.labels.shape
        torch.Size([500, 2])
    """
    targets = dict(target) if isinstance(target, Mapping) else {"": target}
    _check_targets(targets, by, taxonomy)
    log_p = _posterior(level_logits, taxonomy, decoder)
    if len(labels) != len(log_p):
        raise ValueError(f"There are {len(log_p)} rows of logits and {len(labels)} of labels.")
    known = path_tables(taxonomy, labels.device).is_leaf(labels).any(1)
    if not known.all():
        _logger.warning(
            "%d of %d samples have no known leaf and are left out of the calibration.",
            int((~known).sum()),
            len(known),
        )
    log_p, labels = log_p[known], labels[known]
    if not len(labels):
        raise ValueError("No sample has a known leaf: there is nothing to calibrate on.")
    temperature = fit_temperature(log_p, labels, taxonomy)
    whole = whole_paths((log_p / temperature).log_softmax(1), taxonomy)
    _check_paths(whole, labels, taxonomy)
    if "" in targets:
        thresholds = _thresholds_by_class(whole, labels, taxonomy, targets[""], by)
    else:
        thresholds = [_thresholds_by_level(whole, labels, taxonomy, targets)]
    draft = Calibration(targets, decoder, temperature, tuple(thresholds), by, len(labels))
    table = torch.tensor(thresholds, dtype=log_p.dtype, device=log_p.device)
    answers = climb(whole, table[_groups(whole.labels, taxonomy, by)]).labels
    sure = _leaf_probability(whole).sort().values
    at = torch.linspace(0, len(sure) - 1, min(len(sure), _MOST_CONFIDENCES)).round().long()
    seen = labels_to_leaves(labels, taxonomy).unique().tolist()
    absent = ["/".join(path) for leaf, path in enumerate(taxonomy.leaves) if leaf not in set(seen)]
    if absent:
        _logger.warning(
            "%d of %d leaves have no sample among those of the calibration, such as %s: what is "
            "promised holds for data like these alone.",
            len(absent),
            taxonomy.num_leaves,
            absent[0],
        )
    return replace(
        draft,
        tree=_digest(taxonomy),
        absent=tuple(absent),
        right=float((~is_wrong(answers, labels)).double().mean()),
        information=float(information(answers, taxonomy).mean()),
        confidences=tuple(round(value, 6) for value in sure[at].tolist()),
    )


def is_wrong(answers: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """(N,): whether a class of the answer (N, L) is not the label's; no answer is not wrong."""
    return ((answers != labels) & (answers >= 0)).any(1)


def labels_to_leaves(labels: torch.Tensor, taxonomy: Taxonomy) -> torch.Tensor:
    """The leaf (N,) of each true path (N, L) that goes down to one, -1 for others."""
    tables = node_tables(taxonomy, labels.device)
    of_node = torch.full((len(tables),), -1, device=labels.device)
    of_node[tables.leaves] = torch.arange(taxonomy.num_leaves, device=labels.device)
    return of_node[tables.nodes_of(labels)[:, -1]]


def _posterior(
    level_logits: Any, taxonomy: Taxonomy, decoder: str, temperature: float = 1.0
) -> torch.Tensor:
    """In float64: near certainty float32 knows one number only, 1."""
    levels = [logits.detach().double() for logits in in_order_of_levels(level_logits, taxonomy)]
    return leaf_log_posterior(levels, taxonomy, decoder, temperature)


def whole_paths(log_p: torch.Tensor, taxonomy: Taxonomy) -> Prediction:
    """The paths to the likeliest leaves, with the probability of each class on them."""
    tables = node_tables(taxonomy, log_p.device)
    labels = taxonomy.expand(log_p.argmax(1))
    nodes = tables.nodes_of(labels)[:, 1:]
    masses = tables.sums(log_p.exp()).gather(1, nodes).clamp(max=1)
    # sums of the same numbers may differ by a rounding, and a path's must not rise
    masses = masses.cummin(1).values
    return Prediction(labels, masses.masked_fill(labels < 0, 0))


def _leaf_probability(whole: Prediction) -> torch.Tensor:
    """The probability (N,) of the last class of each path."""
    depth = (whole.labels >= 0).sum(1, keepdim=True) - 1
    return whole.probabilities.gather(1, depth)[:, 0]


def _groups(labels: torch.Tensor, taxonomy: Taxonomy, by: str | None) -> torch.Tensor:
    """The row of the thresholds (N,) that each path has; the last where it has no class of `by`."""
    if by is None:
        return torch.zeros_like(labels[:, 0])
    level = taxonomy.level_index(by)
    return torch.where(labels[:, level] < 0, taxonomy.num_classes[level], labels[:, level])


def _thresholds_by_class(
    whole: Prediction, labels: torch.Tensor, taxonomy: Taxonomy, target: float, by: str | None
) -> list[tuple[float, ...]]:
    tight = tight_thresholds(whole, labels, taxonomy)
    groups = _groups(whole.labels, taxonomy, by)
    count = 1 if by is None else taxonomy.num_classes[taxonomy.level_index(by)] + 1
    order = groups.argsort(stable=True)
    parts = tight[order].split(groups.bincount(minlength=count).tolist())
    found = [threshold_at_rank(part, target) for part in parts]
    _warn_of_silence(found, [len(part) for part in parts], target, taxonomy, by)
    return [(threshold,) * taxonomy.num_levels for threshold in found]


def _warn_of_silence(
    thresholds: list[float], counts: list[int], target: float, taxonomy: Taxonomy, by: str | None
) -> None:
    """Say which classes have too few samples for any answer."""
    silent = [i for i, threshold in enumerate(thresholds) if threshold == NO_ANSWER]
    if by is None and silent:
        _logger.warning(
            "%d samples are too few to promise %g %% right answers, which takes at least %d: "
            "nothing will be answered.",
            counts[0],
            100 * target,
            least_samples(target),
        )
        return
    if by is None:
        return
    names = taxonomy.classes[taxonomy.level_index(by)]
    named = [names[i] for i in silent if i < len(names)]
    if named:
        _logger.warning(
            "%d of %d classes of level %r are answered by too few samples to promise %g %%, which "
            "takes at least %d, so there nothing will be answered: %s.",
            len(named),
            len(names),
            by,
            100 * target,
            least_samples(target),
            ", ".join(named[:5]) + (", ..." if len(named) > 5 else ""),
        )


def _thresholds_by_level(
    whole: Prediction, labels: torch.Tensor, taxonomy: Taxonomy, targets: Mapping[str, float]
) -> tuple[float, ...]:
    wrong = _where_wrong(whole, labels)
    result = [0.0] * taxonomy.num_levels
    for name, target in targets.items():
        level = taxonomy.level_index(name)
        result[level] = threshold_at_rank(wrong[:, level], target)
        if result[level] == NO_ANSWER:
            _logger.warning(
                "%d samples are too few to promise %g %% on level %r, which takes at least %d: "
                "it will not be answered, nor what is below.",
                len(labels),
                100 * target,
                name,
                least_samples(target),
            )
    return tuple(result)
