"""Answering only as finely as one is sure: backing off, and what it does to depth and accuracy."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from timm_branches.hierarchy.metrics import check_pair

__all__ = ["DepthAccuracy", "Prediction", "back_off", "depth_accuracy_curve", "plot_depth_accuracy"]


class Prediction(NamedTuple):
    """What a decoder says.

    Attributes:
        labels: LongTensor (N, L), the class index on each level, -1 below the end of the path.
        probabilities: float tensor (N, L), the label's probability under that decoder, 0 where the
            label is -1.
    """

    labels: torch.Tensor
    probabilities: torch.Tensor


class DepthAccuracy(NamedTuple):
    """Accuracy and depth of the answers over the threshold.

    See :func:`depth_accuracy_curve`.

    Attributes:
        thresholds: tensor (T,).
        mean_depth: double tensor (T,), levels answered, on average over all samples; no answer
            counts as 0.
        accuracy: double tensor (T,), share of right ones among the answers; nan where nobody
            answers.
        shares: double tensor (T, L + 1), the share of samples whose answer has 0, 1, ... L levels.
    """

    thresholds: torch.Tensor
    mean_depth: torch.Tensor
    accuracy: torch.Tensor
    shares: torch.Tensor


def _check_prediction(prediction: Prediction) -> None:
    labels, probabilities = prediction
    if labels.ndim != 2 or labels.shape != probabilities.shape:
        raise ValueError(
            f"A prediction's labels and probabilities must both have shape (N, L), got "
            f"{tuple(labels.shape)} and {tuple(probabilities.shape)}."
        )


def _check_thresholds(thresholds: torch.Tensor) -> None:
    wrong = ~((thresholds >= 0) & (thresholds <= 1))  # catches nan too
    if wrong.any():
        first = float(thresholds[wrong].flatten()[0])
        raise ValueError(f"threshold must be a probability in [0, 1], got {first:g}.")


def back_off(prediction: Prediction, threshold: float | torch.Tensor) -> Prediction:
    """Cut each answer at the deepest level whose probability still reaches the threshold.

    A level stands if its probability, and that of every level above it, is at least the threshold.
    For decoders whose probabilities never rise down the path (all but 'independent') the second
    condition follows from the first.

    Args:
        prediction: from :func:`decode`.
        threshold: in [0, 1]: a number or tensor () for all levels, or a tensor (L,) with one for
            each.

    Returns:
        The prediction with labels -1 and probabilities 0 below the cut; all of them if not even
        level 0 reaches the threshold.

    Raises:
        ValueError: if a threshold is outside [0, 1] or has another shape.

    Example:
        >>> sure = Prediction(torch.tensor([[0, 3, 7]]), torch.tensor([[0.9, 0.8, 0.4]]))
        >>> back_off(sure, 0.5).labels.tolist()
        [[0, 3, -1]]
    """
    _check_prediction(prediction)
    labels, probabilities = prediction
    limit = torch.as_tensor(threshold, dtype=probabilities.dtype, device=probabilities.device)
    if limit.shape not in ((), (labels.shape[1],)):
        raise ValueError(
            f"threshold must be a number or have one value for each of the {labels.shape[1]} "
            f"levels, got shape {tuple(limit.shape)}."
        )
    _check_thresholds(limit)
    keep = ((probabilities >= limit) & (labels >= 0)).cumprod(1).bool()
    return Prediction(labels.where(keep, -1), probabilities.where(keep, 0))


def depth_accuracy_curve(
    prediction: Prediction, labels: torch.Tensor, thresholds: torch.Tensor | None = None
) -> DepthAccuracy:
    """How accurate the answers are, and how deep, when they back off at each of many thresholds.

    An answer is right if the deepest class it names is. A label of -1 there (the label is only
    known more coarsely, or the true class is a shallow leaf) leaves the judgement to the deepest
    level above that has a label; a sample without any label among the levels answered does not
    count for the accuracy. Neither does a sample without an answer: at high thresholds the accuracy
    is that of the few who still answer, so read it beside `mean_depth`.

    Args:
        prediction: from :func:`decode`.
        labels: LongTensor (N, L), the true class per level, -1 where unknown or below a shallow
            leaf.
        thresholds: tensor (T,) in [0, 1]; default 0, 0.01, ... 1.
            `prediction.probabilities.unique()` are all at which anything changes.

    Returns:
        A :class:`DepthAccuracy`; nan all over for N = 0.

    Raises:
        ValueError: if shapes differ, labels are no class indices, or a threshold is outside [0, 1].

    Source: the trade-off of accuracy against specificity is that of Deng et al., "Hedging your
    bets", CVPR 2012, with depth in place of their information gain.

    Example:
        >>> probabilities = torch.tensor([[0.9, 0.8], [0.7, 0.4]])
        >>> guess = Prediction(torch.tensor([[0, 1], [1, 2]]), probabilities)
        >>> labels = torch.tensor([[0, 1], [1, 3]])
        >>> curve = depth_accuracy_curve(guess, labels, torch.tensor([0.0, 0.5]))
        >>> curve.accuracy.tolist(), curve.mean_depth.tolist()
        ([0.5, 1.0], [2.0, 1.5])
    """
    _check_prediction(prediction)
    check_pair(prediction.labels, labels)
    if thresholds is None:
        # linspace's 0.29 is not the number 0.29
        thresholds = torch.arange(101, dtype=torch.double, device="cpu") / 100
    if thresholds.ndim != 1:
        raise ValueError(f"thresholds must have shape (T,), got {tuple(thresholds.shape)}.")
    _check_thresholds(thresholds)
    # (N, L): the highest threshold that each level's answer survives; it never rises down the path
    answered = prediction.probabilities.where(prediction.labels >= 0, -1)
    support = answered.nan_to_num(nan=-1).cummin(1).values
    limits = thresholds.to(support)
    count, levels = support.shape

    def at_least(values: torch.Tensor) -> torch.Tensor:
        """(T,): how many values reach each threshold."""
        return (len(values) - torch.searchsorted(values.sort().values, limits)).double()

    judged = torch.zeros(count, dtype=torch.bool, device=support.device)  # has a label so far
    right = judged.clone()
    reached = [at_least(support.new_ones(count))]  # by 0, 1, ... L levels; everyone has 0
    hits, answers = torch.zeros_like(reached[0]), torch.zeros_like(reached[0])
    for level in range(levels):
        known = (labels[:, level] >= 0) & (prediction.labels[:, level] >= 0)
        right = torch.where(known, prediction.labels[:, level] == labels[:, level], right)
        judged |= known
        for which, total in ((right, hits), (judged, answers)):
            total += at_least(support[which, level])
            if level + 1 < levels:  # those who go on are judged there
                total -= at_least(support[which, level + 1])
        reached.append(at_least(support[:, level]))
    by_depth = torch.stack(reached, 1)  # (T, L + 1): who answers at least so deep
    deeper = torch.cat([by_depth[:, 1:], torch.zeros_like(by_depth[:, :1])], 1)
    shares = (by_depth - deeper) / count
    mean_depth = by_depth[:, 1:].sum(1) / count
    return DepthAccuracy(thresholds, mean_depth, hits / answers, shares)


def plot_depth_accuracy(
    curves: DepthAccuracy | Mapping[str, DepthAccuracy], path: str | os.PathLike
) -> Path:
    """Draw accuracy and mean depth over the threshold, and one against the other.

    Args:
        curves: one curve, or several by name, such as one for each decoder.
        path: the PNG; missing folders are made.

    Returns:
        The path.

    Raises:
        ValueError: if there are no curves.
    """
    from timm_branches.figures import COLOURS, FAINT, INK, new_figure, restrain, save_figure

    by_name = {"": curves} if isinstance(curves, DepthAccuracy) else dict(curves)
    if not by_name:
        raise ValueError("There is nothing to plot: no curves are given.")
    figure = new_figure(10.5, 3.6)
    over_accuracy, over_depth, trade = figure.subplots(1, 3)
    for i, (name, curve) in enumerate(by_name.items()):
        thresholds, depth, accuracy, _ = (values.double().cpu().numpy() for values in curve)
        # dashes of different length show lines that lie upon each other
        dashes = (4, 1 + i / 2) if i else ()
        colour = COLOURS[i % len(COLOURS)]
        style = {"color": colour, "linewidth": 2, "label": name, "dashes": dashes}
        over_accuracy.plot(thresholds, 100 * accuracy, **style)
        over_depth.plot(thresholds, depth, **style)
        trade.plot(depth, 100 * accuracy, **style)
    for axes, x, y in (
        (over_accuracy, "threshold", "accuracy of the answers (%)"),
        (over_depth, "threshold", "mean depth (levels)"),
        (trade, "mean depth (levels)", "accuracy of the answers (%)"),
    ):
        restrain(axes)
        axes.grid(color=FAINT, linewidth=0.8)
        axes.set_xlabel(x, color=INK, fontsize=10)
        axes.set_ylabel(y, color=INK, fontsize=10)
    levels = max(curve.shares.shape[1] for curve in by_name.values()) - 1
    over_depth.set_ylim(0, 1.03 * levels)
    trade.set_xlim(0, 1.03 * levels)
    if set(by_name) != {""}:
        figure.legend(
            *trade.get_legend_handles_labels(),
            loc="outside upper center",
            ncols=len(by_name),
            frameon=False,
            handlelength=4,
            fontsize=9,
            labelcolor=INK,
        )
    return save_figure(figure, path)
