"""Answers that keep a promise: a temperature, and a threshold at which answers climb the tree.

A calibrated answer starts at the likeliest leaf and climbs its path to the first node whose
probability is above a threshold. The threshold is chosen on labelled data that training has not
seen, so that on data like these the answer is right as often as was asked.

Source: the climbing rule is that of Goren et al., "Hierarchical Selective Classification", NeurIPS
2024 (arXiv 2405.11533); the rank's correction is that of split conformal prediction (Vovk et al.
2005), by which the promise holds for any number of samples.
"""

from __future__ import annotations

import logging
import math

import torch

from timm_branches.hierarchy.depth import Prediction
from timm_branches.hierarchy.losses import marginal_loss
from timm_branches.hierarchy.tree_metrics import PathTables
from timm_branches.taxonomy.taxonomy import Taxonomy

__all__ = ["climb", "fit_temperature", "fit_threshold", "tight_thresholds"]

_logger = logging.getLogger(__name__)

NO_ANSWER = math.inf  # the threshold that no probability is above


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
    low, high = -math.log(1e3), math.log(1e3)  # of log(1 / T)
    for _ in range(steps):
        guess = (low + high) / 2
        middle = torch.tensor(guess, dtype=torch.double, requires_grad=True)
        with torch.enable_grad():
            loss = marginal_loss(logits * middle.exp(), labels, taxonomy)
            [slope] = torch.autograd.grad(loss, middle)
        if slope > 0:
            high = guess
        else:
            low = guess
    return math.exp(-(low + high) / 2)


def tight_thresholds(
    prediction: Prediction, labels: torch.Tensor, taxonomy: Taxonomy
) -> torch.Tensor:
    """The lowest threshold at which each answer is right.

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
    predicted, probabilities = prediction
    if predicted.shape != labels.shape or labels.shape[1:] != (taxonomy.num_levels,):
        raise ValueError(
            f"A prediction and labels must have shape (N, {taxonomy.num_levels}), got "
            f"{tuple(predicted.shape)} and {tuple(labels.shape)}."
        )
    leaf_known = PathTables(taxonomy, labels.device).is_leaf(labels).any(1)
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
    wrong = (predicted != labels) & (predicted >= 0)  # (N, L)
    # what is below the first wrong class is wrong, too, and no likelier
    return probabilities.where(wrong, 0).amax(1)


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
    if not 0 < target < 1:
        raise ValueError(f"target must be a share between 0 and 1, such as 0.95, got {target}.")
    thresholds = tight_thresholds(prediction, labels, taxonomy)
    count = len(thresholds)
    # (count + 1) * 0.9 may come out a rounding above a whole number
    rank = math.ceil((count + 1) * target - 1e-9)
    if rank > count:
        needed = math.ceil(target / (1 - target) - 1e-9)
        _logger.warning(
            "%d samples are too few to promise %g %% right answers, which takes at least %d: "
            "nothing will be answered.",
            count,
            100 * target,
            needed,
        )
        return NO_ANSWER
    return float(thresholds.sort().values[rank - 1])


def climb(prediction: Prediction, threshold: float) -> Prediction:
    """Cut each answer at the deepest level whose probability is above the threshold.

    Args:
        prediction: As in :func:`tight_thresholds`.
        threshold: From :func:`fit_threshold`.

    Returns:
        The prediction with labels -1 and probabilities 0 below the cut; all of them if no level's
        probability is above the threshold.
    """
    labels, probabilities = prediction
    keep = ((probabilities > threshold) & (labels >= 0)).cumprod(1).bool()
    return Prediction(labels.where(keep, -1), probabilities.where(keep, 0))
