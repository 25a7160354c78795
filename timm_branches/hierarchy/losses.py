"""Losses on a label hierarchy, for one head per level or for one head of leaves.

Labels are rows (N, L) as :meth:`Taxonomy.expand` gives them. -1 is "unknown": an image that is only
labelled coarsely has a known prefix and then -1, a leaf above the last level has -1 below it, where
its path is complete. A sample without any known level costs nothing and has no gradient, whatever
its logits are. Losses are means over the samples that count, computed in float32 at least, as
functions of logits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F

from timm_branches.hierarchy.ancestry import (
    check_labels,
    complete_paths,
    deepest,
    path_heights,
    path_log_probabilities,
    soft_targets,
)
from timm_branches.taxonomy.taxonomy import Taxonomy

__all__ = [
    "consistency_loss",
    "hxe_loss",
    "level_cross_entropy",
    "marginal_loss",
    "soft_label_loss",
    "soft_labels",
    "tree_path_kl",
]


def level_cross_entropy(
    logits: torch.Tensor,
    target: torch.Tensor,
    label_smoothing: float = 0.0,
    class_weights: torch.Tensor | None = None,
    share: bool = False,
) -> torch.Tensor:
    """Cross-entropy of one level, averaged over the samples whose label is known.

    With class weights it is torch's weighted mean: for class indices y_n sum_n l_n / sum_n w[y_n],
    where l_n is the weighted and smoothed loss of sample n. As in torch, soft labels are divided by
    their own mass instead.

    Args:
        logits: (N, K).
        target: (N,) class indices with -1 for unknown, or (N, K) soft labels whose row sums are the
            known mass.
        label_smoothing: for class indices; soft labels carry theirs.
        class_weights: (K,) from 0 upwards, on the logits' device. Samples of a class of weight 0 do
            not count.
        share: average over the known samples of all processes, so that DDP's mean over processes is
            the mean over the global batch.

    Returns:
        A scalar; 0, with zero gradients, when no label is known.

    Raises:
        ValueError: if `class_weights` is not of shape (K,).

    Example:
        >>> logits = torch.tensor([[0., 0.], [9., 1.]])
        >>> round(float(level_cross_entropy(logits, torch.tensor([1, -1]))), 4)
        0.6931
    """
    logits = _at_least_float32(logits)
    if class_weights is not None:
        if class_weights.shape != logits.shape[1:]:
            raise ValueError(
                f"class_weights must hold one weight for each of the {logits.shape[1]} classes, got shape "
                f"{tuple(class_weights.shape)}"
            )
        class_weights = class_weights.to(logits.dtype)
    soft = target.is_floating_point()
    labelled = (target > 0).any(1) if soft else target >= 0
    logits = _only(labelled, logits)
    if soft:
        weighted = target if class_weights is None else target * class_weights
        return _mean(-(weighted * logits.log_softmax(-1)).sum(1), target.sum(1), share)
    safe = target.clamp(min=0)
    losses = F.cross_entropy(
        logits, safe, class_weights, reduction="none", label_smoothing=label_smoothing
    )
    weights = labelled if class_weights is None else labelled * class_weights[safe]
    return _mean(losses * labelled, weights, share)


def marginal_loss(
    leaf_logits: torch.Tensor, labels: torch.Tensor, taxonomy: Taxonomy, share: bool = False
) -> torch.Tensor:
    """Cross-entropy of a flat classifier on the deepest class that is known.

    L = -log p(C), p(C) = sum of p(leaf) over the leaves below C: nothing is asked about what lies
    below a coarse label. For leaf labels this is cross-entropy.

    Args:
        leaf_logits: (N, num_leaves).
        labels: (N, L), -1 for unknown. A gap above a known class is filled in: a class determines
            its ancestors.
        taxonomy: the tree of the leaves.
        share: as in :func:`level_cross_entropy`.

    Returns:
        A scalar; 0, with zero gradients, when no label is known.

    Raises:
        ValueError: if the logits are not (N, num_leaves) or the labels not integers (N, L), or, on
            the CPU (elsewhere the check would wait for the device), a label is out of range.

    Example:
        >>> tree = Taxonomy(['animal/cat', 'animal/dog', 'transport/ship'])
        >>> leaf_logits = torch.tensor([[0.25, 0.25, 0.5]]).log()
        >>> round(float(marginal_loss(leaf_logits, torch.tensor([[0, -1]]), tree)), 4)
        0.6931
    """
    log_p, paths, labelled = _leaf_inputs(leaf_logits, labels, taxonomy)
    return _mean(-deepest(path_log_probabilities(log_p, paths, taxonomy), paths), labelled, share)


def hxe_loss(
    leaf_logits: torch.Tensor,
    labels: torch.Tensor,
    taxonomy: Taxonomy,
    alpha: float = 0.1,
    share: bool = False,
) -> torch.Tensor:
    """Hierarchical cross-entropy (HXE): each step of the path is a classification, and weighted by
    its height.

    L = -sum over the classes C of the path of lambda(C) log p(C | parent(C)), lambda(C) =
    exp(-alpha h(C)), where p(C | parent(C)) = p(C) / p(parent(C)), p(C) is the sum of p(leaf) below
    C, and the height h(C) is the steps down to C's deepest leaf (0 for a leaf). Of a coarse label
    only the known steps count. With alpha = 0 it is :func:`marginal_loss`, for leaf labels
    cross-entropy; the larger alpha, the more a leaf counts among its siblings and the less a coarse
    class.

    Source: Bertinetto et al., "Making Better Mistakes", CVPR 2020 (arXiv 1912.09393), section 3.1.

    Args:
        leaf_logits: (N, num_leaves).
        labels: (N, L), as in :func:`marginal_loss`.
        taxonomy: the tree of the leaves.
        alpha: from 0 upwards; the paper uses 0.1 to 0.9.
        share: as in :func:`level_cross_entropy`.

    Returns:
        A scalar; 0, with zero gradients, when no label is known.

    Raises:
        ValueError: as for :func:`marginal_loss`, or if alpha is negative or not finite.

    Example:
        >>> tree = Taxonomy(['animal/cat', 'animal/dog', 'transport/ship'])
        >>> leaf_logits = torch.tensor([[0.25, 0.25, 0.5]]).log()  # a half for animal, and a half of that for cat
        >>> round(float(hxe_loss(leaf_logits, tree.expand([0]), tree, alpha=1)), 4)  # log 2 * (exp(-1) + 1)
        0.9481
    """
    _check_from_zero("alpha", alpha)
    log_p, paths, labelled = _leaf_inputs(leaf_logits, labels, taxonomy)
    nodes = path_log_probabilities(log_p, paths, taxonomy)
    above = F.pad(nodes[:, :-1], (1, 0))  # the root above all has probability 1
    # an impossible class costs inf, not inf - inf
    steps = torch.where(nodes > -torch.inf, nodes - above, nodes)
    weights = torch.where(
        paths >= 0, (-alpha * path_heights(paths, taxonomy).to(steps.dtype)).exp(), 0
    )
    return _mean(-torch.where(weights > 0, weights * steps, 0).sum(1), labelled, share)


def soft_label_loss(
    leaf_logits: torch.Tensor,
    labels: torch.Tensor,
    taxonomy: Taxonomy,
    beta: float = 10.0,
    share: bool = False,
) -> torch.Tensor:
    """Cross-entropy of a flat classifier with soft labels that fall off with the distance in the
    tree.

    L = -sum over leaves B of y(B) log p(B), y(B) = exp(-beta d(A, B)) / sum over C of exp(-beta
    d(A, C)), where A is the label and d(A, B) the height of the lowest common ancestor of A and B,
    divided by the height of the tree, which is its number of levels L (the root above all counts).
    So d is between 0 and 1, and the paper's beta of 4 to 30 apply. A large beta gives
    cross-entropy.

    A coarse label A has the same distances, d = h(A) / L to each leaf below itself, but how its
    mass is spread over
    these leaves is left open: L = -y(A) log p(A) - sum over leaves B outside A of y(B) log p(B),
        where y(A) and p(A)
    are sums over the leaves below A. A large beta gives :func:`marginal_loss`.

    Source: Bertinetto et al., "Making Better Mistakes", CVPR 2020 (arXiv 1912.09393), section 3.2;
        coarse labels are
    ours.

    Args:
        leaf_logits: (N, num_leaves).
        labels: (N, L), as in :func:`marginal_loss`.
        taxonomy: the tree of the leaves.
        beta: from 0 upwards; 0 gives all leaves the same share.
        share: as in :func:`level_cross_entropy`.

    Returns:
        A scalar; 0, with zero gradients, when no label is known.

    Raises:
        ValueError: as for :func:`marginal_loss`, or if beta is negative or not finite.

    Example:
        >>> tree = Taxonomy(['animal/cat', 'animal/dog', 'transport/ship'])
        >>> round(float(soft_label_loss(torch.zeros(1, 3), tree.expand([0]), tree)), 4)  # log 3
        1.0986
    """
    _check_from_zero("beta", beta)
    log_p, paths, labelled = _leaf_inputs(leaf_logits, labels, taxonomy)
    target, below = soft_targets(paths, taxonomy, beta, log_p.dtype)
    inside = (target * below).sum(1) * deepest(
        path_log_probabilities(log_p, paths, taxonomy), paths
    )
    target = target.masked_fill_(below, 0)
    outside = torch.where(target > 0, target * log_p, 0).sum(1)  # 0 * -inf would be nan
    return _mean(-inside - outside, labelled, share)


def soft_labels(taxonomy: Taxonomy, beta: float = 10.0) -> torch.Tensor:
    """The soft labels of all leaves, to look at; :func:`soft_label_loss` says what they are.

    Args:
        taxonomy: the tree.
        beta: as in :func:`soft_label_loss`.

    Returns:
        Float tensor (num_leaves, num_leaves); row A is the target of a sample of leaf A and sums to
        1.

    Raises:
        ValueError: if beta is negative or not finite.

    Example:
        >>> tree = Taxonomy(['animal/cat', 'animal/dog', 'transport/ship'])
        >>> soft_labels(tree, beta=2 * math.log(2))[0]  # in proportions 1 : 1/2 : 1/4
        tensor([0.5714, 0.2857, 0.1429])
    """
    _check_from_zero("beta", beta)
    return soft_targets(taxonomy.leaf_table, taxonomy, beta, torch.float32)[0]


def tree_path_kl(
    level_logits: Sequence[torch.Tensor],
    labels: torch.Tensor,
    taxonomy: Taxonomy,
    share: bool = False,
) -> torch.Tensor:
    """Tree-path KL divergence: all levels' classes compete for one distribution, whose target is
    the labelled path.

    L = KL(y || q) = -log m - 1/m sum over known levels l of log q(l, label_l): q is *one* softmax
    over the logits of the sample's m known levels side by side, and y gives each of its m labels
    the mass 1/m. Levels whose label is unknown take no part. (With a softmax for each level,
    divided by m, the same divergence would be no more than the mean of the levels'
    cross-entropies.) It is meant to be added to these.

    Source: Park et al., "Visually Consistent Hierarchical Image Classification" (H-CAST), ICLR 2025
        (arXiv 2406.11608).

    Args:
        level_logits: for each level logits (N, num_classes[level]).
        labels: (N, L), -1 for unknown.
        taxonomy: the tree of the levels.
        share: as in :func:`level_cross_entropy`.

    Returns:
        A scalar; 0, with zero gradients, when no label is known.

    Raises:
        ValueError: if there is not one (N, num_classes[level]) for each level, or the labels are
            not integers (N, L), or, on the CPU, a label is out of range.

    Example:
        >>> tree = Taxonomy(['animal/cat', 'animal/dog', 'transport/ship'])
        >>> logits = [torch.tensor([[30., 0.]]), torch.tensor([[30., 0., 0.]])]
        >>> float(tree_path_kl(logits, tree.expand([0]), tree))  # a half for animal, a half for cat
        0.0
    """
    levels = _level_inputs(level_logits, taxonomy)
    check_labels(labels, taxonomy, len(levels[0]))
    known = labels >= 0
    count = known.sum(1)
    sizes = torch.tensor(taxonomy.num_classes, device=labels.device)
    # a row without labels takes part as zeros, or its softmax would be nan
    logits = _only(count > 0, torch.cat(levels, 1))
    takes_part = (
        known.repeat_interleave(sizes, 1, output_size=logits.shape[1]) | (count == 0)[:, None]
    )
    log_q = torch.where(takes_part, logits, -torch.inf).log_softmax(-1)
    columns = labels.clamp(min=0) + sizes.cumsum(0) - sizes
    total = torch.where(known, log_q.gather(1, columns), 0).sum(1)
    m = count.clamp(min=1)
    return _mean(-m.log() - total / m, count > 0, share)


def consistency_loss(
    level_logits: Sequence[torch.Tensor], taxonomy: Taxonomy, share: bool = False
) -> torch.Tensor:
    """How far each level's answer is from the next level's, summed upwards: their Jensen-Shannon
    divergence.

    L = mean over levels l < L - 1 of JSD(P_l, Q_l), JSD(P, Q) = (KL(P || M) + KL(Q || M)) / 2 with
    M = (P + Q) / 2. P_l is level l's softmax and Q_l the probability of its classes by level l + 1,
    whose softmax is summed to parents. Level l + 1 has no class for what ends on level l: such a
    leaf keeps its own P_l in Q_l, and the sums of the others are scaled by the rest of P_l. The
    divergence is symmetric, 0 only if P_l = Q_l, and at most log 2. Needs no label.

    The idea of a divergence between a level and the sums of the next is in Garg et al., "Learning
    Hierarchy Aware Features for Reducing Mistake Severity", ECCV 2022 (arXiv 2207.12646).

    Args:
        level_logits: for each level logits (N, num_classes[level]).
        taxonomy: the tree of the levels.
        share: average over the samples of all processes.

    Returns:
        A scalar.

    Raises:
        ValueError: if there is not one (N, num_classes[level]) for each level, or just one level.

    Example:
        >>> tree = Taxonomy(['animal/cat', 'animal/dog', 'transport/ship'])
        >>> logits = [torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.1, 0.4, 0.5]]).log()]
        >>> round(float(consistency_loss(logits, tree)), 4)
        0.0
    """
    if taxonomy.num_levels < 2:
        raise ValueError(f"consistency is between levels, and {taxonomy!r} has only one")
    p = [logits.softmax(-1) for logits in _level_inputs(level_logits, taxonomy)]
    total = torch.zeros_like(p[0][:, 0])
    for upper, lower, parents, heights in zip(
        p[:-1], p[1:], taxonomy.parents[1:], taxonomy.heights[:-1], strict=True
    ):
        ends = (heights == 0).to(upper.device)
        goes_on = upper.masked_fill(ends, 0).sum(1, keepdim=True)
        sums = torch.zeros_like(upper).index_add(1, parents.to(upper.device), lower)
        carried = torch.where(ends, upper, goes_on * sums)
        log_mean = _safe_log((upper + carried) / 2)
        total = total + sum((y * (_safe_log(y) - log_mean)).sum(1) for y in (upper, carried)) / 2
    return _mean(total / (len(p) - 1), torch.ones_like(total), share)


def _mean(losses: torch.Tensor, weights: torch.Tensor, share: bool) -> torch.Tensor:
    """Sum of the losses (N,) over the sum of the weights (N,), which is taken over all processes
    if `share`; or 0.
    """
    known = weights.sum().detach().to(losses.dtype)
    if share and dist.is_available() and dist.is_initialized():
        dist.all_reduce(known)
        known = known / dist.get_world_size()
    return losses.sum() / torch.where(known > 0, known, 1)


def _at_least_float32(logits: torch.Tensor) -> torch.Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _only(labelled: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Zeros for rows without a label, before any softmax.

    Even an infinite logit there is harmless.
    """
    return torch.where(labelled[:, None], logits, 0)


def _safe_log(p: torch.Tensor) -> torch.Tensor:
    """Log p without -inf at 0: p log p and its gradient in the logits are 0 there."""
    return p.clamp(min=torch.finfo(p.dtype).tiny).log()


def _check_from_zero(name: str, value: float) -> None:
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} must be a finite number from 0 upwards, got {value}")


def _level_inputs(level_logits: Sequence[torch.Tensor], taxonomy: Taxonomy) -> list[torch.Tensor]:
    shapes = [tuple(logits.shape) for logits in level_logits]
    if not shapes or shapes != [(*shapes[0][:1], size) for size in taxonomy.num_classes]:
        raise ValueError(
            f"level_logits must be one (N, K) for each level, K in {taxonomy.num_classes}, got {shapes}"
        )
    return [_at_least_float32(logits) for logits in level_logits]


def _leaf_inputs(
    leaf_logits: torch.Tensor, labels: torch.Tensor, taxonomy: Taxonomy
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probabilities of leaves (N, leaves), paths (N, L) without gaps, and which samples have
    a label (N,).
    """
    if leaf_logits.ndim != 2 or leaf_logits.shape[1] != taxonomy.num_leaves:
        raise ValueError(
            f"leaf_logits must be (N, {taxonomy.num_leaves}), one column per leaf, got "
            f"{tuple(leaf_logits.shape)}"
        )
    check_labels(labels, taxonomy, len(leaf_logits))
    paths = complete_paths(labels, taxonomy)
    labelled = paths[:, 0] >= 0
    return _only(labelled, _at_least_float32(leaf_logits)).log_softmax(-1), paths, labelled
