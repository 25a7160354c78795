"""Losses on a label hierarchy, for one head per level or for one head of leaves.

Labels are rows (N, L) as :meth:`Taxonomy.expand` gives them. -1 is "unknown": an image that is only
labelled coarsely has a known prefix and then -1, a leaf above the last level has -1 below it, where
its path is complete. A sample without any known level costs nothing and has no gradient, whatever
its logits are. Losses are means over the samples that count, computed in float32 at least, as
functions of logits.

A training task takes any function of the form that :class:`HierarchyLoss` states;
:func:`on_leaves` and :func:`on_levels` give the losses here that form.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F

from timm_branches.hierarchy.ancestry import check_labels
from timm_branches.hierarchy.decode import in_order_of_levels, leaf_log_probs
from timm_branches.hierarchy.ranges import LeafRanges, leaf_log_sums, leaf_ranges, log_sum_exp
from timm_branches.hierarchy.tables import index_tables
from timm_branches.taxonomy.taxonomy import Taxonomy

__all__ = [
    "HierarchyLoss",
    "consistency_loss",
    "hxe_loss",
    "level_cross_entropy",
    "marginal_loss",
    "on_leaves",
    "on_levels",
    "soft_label_loss",
    "soft_labels",
    "tree_path_kl",
]


LevelLogits = Sequence[torch.Tensor] | Mapping[str, torch.Tensor]


class HierarchyLoss(Protocol):
    """The form of a loss that `BranchTask(loss=...)` takes: any function like this, or a module."""

    def __call__(
        self,
        logits: Mapping[str, torch.Tensor],
        labels: torch.Tensor,
        taxonomy: Taxonomy | None,
        share: bool = False,
    ) -> Mapping[str, torch.Tensor]:
        """The loss of one batch, in parts.

        Args:
            logits: (N, K) by name, of the heads that were computed; of levels from coarse to fine.
            labels: (N, L) class indices, one column a level, -1 for unknown.
            taxonomy: The tree of the levels, or None.
            share: Average over the samples of all processes, so that DDP's mean over processes is
                the mean over the global batch.

        Returns:
            Scalars by name. The loss of a level, under its name, is multiplied by the level's
            weight of this epoch; what has another name is added as it is. All are logged.
        """
        ...


def on_leaves(loss: Callable[..., torch.Tensor], **settings: Any) -> HierarchyLoss:
    """A loss of leaf logits as a :class:`HierarchyLoss`.

    A single output is taken for the leaves' logits; the outputs of all levels for the leaves'
    distribution that :func:`leaf_log_probs` makes of them.

    Args:
        loss: :func:`marginal_loss`, :func:`hxe_loss`, :func:`soft_label_loss` or a function of
            the same form: (leaf_logits, labels, taxonomy, share=..., **settings) -> scalar.
        settings: Passed on, such as `alpha`.

    Example:
        >>> tree = Taxonomy(['animal/cat', 'animal/dog', 'transport/ship'])
        >>> logits = {'leaf': torch.tensor([[0.25, 0.25, 0.5]]).log()}
        >>> on_leaves(hxe_loss, alpha=1)(logits, tree.expand([0]), tree)
        {'hxe': tensor(0.9481)}
    """
    return partial(_on_leaves, loss, settings)


def on_levels(loss: Callable[..., torch.Tensor], **settings: Any) -> HierarchyLoss:
    """A loss of all levels' logits as a :class:`HierarchyLoss`.

    Args:
        loss: :func:`tree_path_kl` or a function of the same form: (level_logits, labels, taxonomy,
            share=..., **settings) -> scalar.
        settings: Passed on.

    Example:
        >>> tree = Taxonomy(['animal/cat', 'animal/dog', 'transport/ship'])
        >>> logits = {'level1': torch.tensor([[30., 0.]]), 'level2': torch.tensor([[30., 0., 0.]])}
        >>> on_levels(tree_path_kl)(logits, tree.expand([0]), tree)
        {'tree_path_kl': tensor(0.)}
    """
    return partial(_on_levels, loss, settings)


def _on_leaves(
    loss: Callable[..., torch.Tensor],
    settings: Mapping[str, Any],
    logits: Mapping[str, torch.Tensor],
    labels: torch.Tensor,
    taxonomy: Taxonomy | None,
    share: bool = False,
) -> dict[str, torch.Tensor]:
    name = _name_of(loss)
    if taxonomy is None:
        raise ValueError(f"The loss {name!r} needs a taxonomy.")
    if len(logits) == 1:
        [leaf_logits] = logits.values()
    else:
        leaf_logits = leaf_log_probs(_heads_of_levels(logits, taxonomy), taxonomy)
    return {name: loss(leaf_logits, labels, taxonomy, share=share, **settings)}


def _on_levels(
    loss: Callable[..., torch.Tensor],
    settings: Mapping[str, Any],
    logits: Mapping[str, torch.Tensor],
    labels: torch.Tensor,
    taxonomy: Taxonomy | None,
    share: bool = False,
) -> dict[str, torch.Tensor]:
    name = _name_of(loss)
    if taxonomy is None:
        raise ValueError(f"The loss {name!r} needs a taxonomy.")
    levels = _heads_of_levels(logits, taxonomy)
    return {name: loss(levels, labels, taxonomy, share=share, **settings)}


def _heads_of_levels(
    logits: Mapping[str, torch.Tensor], taxonomy: Taxonomy
) -> Mapping[str, torch.Tensor] | list[torch.Tensor]:
    """The levels' logits: by the taxonomy's names, or in order where heads have other names."""
    if all(level in logits for level in taxonomy.levels):
        return logits
    return list(logits.values())


def _name_of(loss: Callable[..., torch.Tensor]) -> str:
    name = getattr(loss, "__name__", type(loss).__name__)
    return name.removesuffix("_loss")


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
        ValueError: if `class_weights` is not of shape (K,) or, on the CPU, a class index is out of
            range.

    Example:
        >>> logits = torch.tensor([[0., 0.], [9., 1.]])
        >>> round(float(level_cross_entropy(logits, torch.tensor([1, -1]))), 4)
        0.6931
    """
    logits = at_least_float32(logits)
    if class_weights is not None:
        if class_weights.shape != logits.shape[1:]:
            raise ValueError(
                f"class_weights must hold one weight for each of the {logits.shape[1]} classes, "
                f"got shape {tuple(class_weights.shape)}."
            )
        class_weights = class_weights.to(logits.dtype)
    if target.is_floating_point():
        return _soft_cross_entropy(logits, target, class_weights, share)
    _check_targets(target, logits.shape[1])
    labelled = target >= 0
    total = F.cross_entropy(
        _only(labelled, logits),
        target.long(),
        class_weights,
        ignore_index=-1,
        reduction="sum",
        label_smoothing=label_smoothing,
    )
    weights = labelled
    if class_weights is not None:
        weights = labelled * class_weights[target.clamp(min=0)]
    return mean_of_counted(total, weights, share)


def _soft_cross_entropy(
    logits: torch.Tensor, target: torch.Tensor, class_weights: torch.Tensor | None, share: bool
) -> torch.Tensor:
    """Of logits and soft labels (N, K) whose row sums are the known mass."""
    labelled = (target > 0).any(1)
    weighted = target if class_weights is None else target * class_weights
    log_p = _only(labelled, logits).log_softmax(-1)
    return mean_of_counted(-(weighted * log_p).sum(1), target.sum(1), share)


def _check_targets(target: torch.Tensor, classes: int) -> None:
    """Class indices (N,) must be from -1 to K - 1; elsewhere than on the CPU that would wait."""
    if target.device.type != "cpu":
        return
    wrong = target[(target < -1) | (target >= classes)]
    if len(wrong):
        raise ValueError(
            f"The label {int(wrong[0])} is out of range: the level has {classes} classes, so legal "
            f"are 0 to {classes - 1}, and -1 for unknown."
        )


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
    leaf_logits, path, ranges = leaf_inputs(leaf_logits, labels, taxonomy)
    deepest = path.gather(1, ((path >= 0).sum(1, keepdim=True) - 1).clamp(min=0))  # (N, 1)
    log_p, _ = leaf_log_sums(leaf_logits, deepest, ranges)
    labelled = deepest >= 0
    return mean_of_counted(torch.where(labelled, -log_p, 0), labelled, share)


def hxe_loss(
    leaf_logits: torch.Tensor,
    labels: torch.Tensor,
    taxonomy: Taxonomy,
    alpha: float = 0.1,
    share: bool = False,
) -> torch.Tensor:
    """Hierarchical cross-entropy (HXE): each step of the path is weighted by its height.

    Each step is a classification among siblings:
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
        >>> # a half for animal, and a half of that for cat: log 2 * (exp(-1) + 1)
        >>> leaf_logits = torch.tensor([[0.25, 0.25, 0.5]]).log()
        >>> round(float(hxe_loss(leaf_logits, tree.expand([0]), tree, alpha=1)), 4)
        0.9481
    """
    _check_from_zero("alpha", alpha)
    leaf_logits, path, ranges = leaf_inputs(leaf_logits, labels, taxonomy)
    log_p, _ = leaf_log_sums(leaf_logits, path, ranges)
    above = F.pad(log_p[:, :-1], (1, 0))  # the root above all has probability 1
    # an impossible class costs inf, not inf - inf
    steps = torch.where(log_p > -torch.inf, log_p - above, log_p)
    weights = torch.where(path >= 0, (-alpha * ranges.heights[path].to(steps.dtype)).exp(), 0)
    # 0 * -inf would be nan
    weighted = torch.where(weights > 0, weights * steps, 0)  # (N, L)
    return mean_of_counted(-weighted.sum(1), path[:, 0] >= 0, share)


def soft_label_loss(
    leaf_logits: torch.Tensor,
    labels: torch.Tensor,
    taxonomy: Taxonomy,
    beta: float = 10.0,
    share: bool = False,
) -> torch.Tensor:
    """Cross-entropy of a flat classifier with soft labels that fall off along the tree.

    L = -sum over leaves B of y(B) log p(B), y(B) = exp(-beta d(A, B)) / sum over C of exp(-beta
    d(A, C)), where A is the label and d(A, B) the height of the lowest common ancestor of A and B,
    divided by the height of the tree, which is its number of levels L (the root above all counts).
    So d is between 0 and 1, and the paper's beta of 4 to 30 apply. A large beta gives
    cross-entropy.

    A coarse label A has the same distances, d = h(A) / L to each leaf below itself, but how its
    mass is spread over these leaves is left open: L = -y(A) log p(A) - sum over leaves B outside A
    of y(B) log p(B), where y(A) and p(A) are sums over the leaves below A. A large beta gives
    :func:`marginal_loss`.

    Source: Bertinetto et al., "Making Better Mistakes", CVPR 2020 (arXiv 1912.09393), section 3.2;
    coarse labels are ours.

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
    leaf_logits, path, ranges = leaf_inputs(leaf_logits, labels, taxonomy)
    depth = (path >= 0).sum(1, keepdim=True)
    label = path.gather(1, (depth - 1).clamp(min=0))  # (N, 1)
    # around the label lies a ring of leaves for each class of its path: those that have the class
    # above it, but not itself, in common with the label; in depth-first order one part of a ring
    # is before the class and one behind
    around = torch.where(path >= 0, path, label)
    first = F.pad(ranges.first[around], (1, 0))
    last = F.pad(ranges.last[around], (1, 0), value=taxonomy.num_leaves)
    log_p, sums = leaf_log_sums(
        leaf_logits,
        label,
        ranges,
        torch.cat([first[:, :-1], last[:, 1:]], 1),
        torch.cat([first[:, 1:], last[:, :-1]], 1),
    )
    sums = sums.unflatten(1, (2, -1)).sum(1)  # (N, L)
    size = last - first  # (N, L + 1)
    heights = F.pad(ranges.heights[around], (1, 0), value=taxonomy.num_levels)
    # heights above the label's own: the largest exponent is 0, however large beta is
    rise = (heights - ranges.heights[label]).to(sums.dtype) / taxonomy.num_levels
    share_of_leaf = (-beta * rise[:, :-1]).exp()  # (N, L), in each ring, as the label's own is 1
    total = size[:, -1:] + (share_of_leaf * -size.diff(dim=1)).sum(1, keepdim=True)
    # 0 * -inf would be nan
    outside = torch.where(share_of_leaf > 0, share_of_leaf * sums, 0).sum(1, keepdim=True)
    losses = -(size[:, -1:] * log_p + outside) / total
    labelled = label >= 0
    return mean_of_counted(torch.where(labelled, losses, 0), labelled, share)


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
    table = taxonomy.leaf_table
    # heights of the lowest common ancestors: a deeper class in common overwrites one above it
    heights = torch.full((len(table), len(table)), taxonomy.num_levels, device=table.device)
    for column, of_level in zip(table.unbind(1), taxonomy.heights, strict=True):
        together = (column[:, None] == column) & (column >= 0)
        heights = torch.where(together, of_level[column.clamp(min=0)], heights)
    target = (-beta * heights.float() / taxonomy.num_levels).exp()
    return target / target.sum(1, keepdim=True)


def tree_path_kl(
    level_logits: LevelLogits,
    labels: torch.Tensor,
    taxonomy: Taxonomy,
    share: bool = False,
) -> torch.Tensor:
    """Tree-path KL divergence: one distribution over all levels' classes, held to the path.

    L = KL(y || q) = -log m - 1/m sum over known levels l of log q(l, label_l): q is *one* softmax
    over the logits of the sample's m known levels side by side, and y gives each of its m labels
    the mass 1/m. Levels whose label is unknown take no part. (With a softmax for each level,
    divided by m, the same divergence would be no more than the mean of the levels'
    cross-entropies.) It is meant to be added to these.

    Source: Park et al., "Visually Consistent Hierarchical Image Classification" (H-CAST), ICLR 2025
        (arXiv 2406.11608).

    Args:
        level_logits: for each level logits (N, num_classes[level]), from coarse to fine, or a dict
            of them by the levels' names.
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
    own_logits, losses = [], []
    for logits, label in zip(levels, labels.long().unbind(1), strict=True):
        # what is not known takes no part, whatever its logits are
        logits = _only(label >= 0, logits)
        own_logits.append(logits.gather(1, label.clamp(min=0)[:, None])[:, 0])
        losses.append(F.cross_entropy(logits, label, reduction="none", ignore_index=-1))
    own, loss = torch.stack(own_logits, 1), torch.stack(losses, 1)  # (N, L)
    # a level's log-sum-exp is own + loss; less the largest, large logits lose nothing
    own = own - (own + loss).detach().masked_fill(~known, -torch.inf).amax(1, keepdim=True)
    own = own.masked_fill(~known, 0)
    # the softmax of all known levels has the sum of their sums below it
    norm = log_sum_exp((own + loss).masked_fill(~known, -torch.inf))
    total = (own - norm[:, None]).masked_fill(~known, 0).sum(1)
    count = known.sum(1)
    m = count.clamp(min=1)
    return mean_of_counted(-m.log() - total / m, count > 0, share)


def consistency_loss(
    level_logits: LevelLogits, taxonomy: Taxonomy, share: bool = False
) -> torch.Tensor:
    """Jensen-Shannon divergence of each level's answer and the next level's, summed upwards.

    L = mean over levels l < L - 1 of JSD(P_l, Q_l), JSD(P, Q) = (KL(P || M) + KL(Q || M)) / 2 with
    M = (P + Q) / 2. P_l is level l's softmax and Q_l the probability of its classes by level l + 1,
    whose softmax is summed to parents. Level l + 1 has no class for what ends on level l: such a
    leaf keeps its own P_l in Q_l, and the sums of the others are scaled by the rest of P_l. The
    divergence is symmetric, 0 only if P_l = Q_l, and at most log 2. Needs no label.

    The idea of a divergence between a level and the sums of the next is in Garg et al., "Learning
    Hierarchy Aware Features for Reducing Mistake Severity", ECCV 2022 (arXiv 2207.12646).

    Args:
        level_logits: for each level logits (N, num_classes[level]), from coarse to fine, or a dict
            of them by the levels' names.
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
        raise ValueError(f"Consistency is between levels, and {taxonomy!r} has only one.")
    p = [logits.softmax(-1) for logits in _level_inputs(level_logits, taxonomy)]
    total = torch.zeros_like(p[0][:, 0])
    tables = index_tables(taxonomy, p[0].device).levels
    for upper, lower, level, next_level in zip(p[:-1], p[1:], tables[:-1], tables[1:], strict=True):
        carried = torch.zeros_like(upper).index_add(1, next_level.parents, lower)
        if len(level.leaf_nodes):
            goes_on = upper.index_select(1, level.inner_nodes).sum(1, keepdim=True)
            ends = upper.index_select(1, level.leaf_nodes)
            carried = (goes_on * carried).index_copy(1, level.leaf_nodes, ends)
        else:
            carried = upper.sum(1, keepdim=True) * carried
        log_mean = _safe_log((upper + carried) / 2)
        for distribution in (upper, carried):
            divergence = (distribution * (_safe_log(distribution) - log_mean)).sum(1)  # (N,)
            total = total + divergence / 2
    return mean_of_counted(total / (len(p) - 1), torch.ones_like(total), share)


def mean_of_counted(losses: torch.Tensor, weights: torch.Tensor, share: bool) -> torch.Tensor:
    """Sum of the losses (N,) over the sum of the weights (N,); 0 without any weight.

    The weights are those of all processes if `share`.
    """
    known = weights.sum().detach().to(losses.dtype)
    if share and dist.is_available() and dist.is_initialized():
        dist.all_reduce(known)
        known = known / dist.get_world_size()
    return losses.sum() / torch.where(known > 0, known, 1)


def at_least_float32(logits: torch.Tensor) -> torch.Tensor:
    """Half precision as float32; what is more precise stays as it is."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _only(labelled: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Zeros for rows without a label, before any softmax.

    Even an infinite logit there is harmless.
    """
    looks = labelled.device.type == "cpu" and not torch.compiler.is_compiling()
    if looks and labelled.all():  # elsewhere the question would have to be waited for
        return logits
    return torch.where(labelled[:, None], logits, 0)


def _safe_log(p: torch.Tensor) -> torch.Tensor:
    """Log p without -inf at 0: p log p and its gradient in the logits are 0 there."""
    return p.clamp(min=torch.finfo(p.dtype).tiny).log()


def _check_from_zero(name: str, value: float) -> None:
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} must be a finite number from 0 upwards, got {value}.")


def _level_inputs(level_logits: LevelLogits, taxonomy: Taxonomy) -> list[torch.Tensor]:
    """The logits from coarse to fine, in float32 at least."""
    levels = in_order_of_levels(level_logits, taxonomy)
    shapes = [tuple(logits.shape) for logits in levels]
    if not shapes or shapes != [(*shapes[0][:1], size) for size in taxonomy.num_classes]:
        raise ValueError(
            f"level_logits must be one (N, K) for each level, K in {taxonomy.num_classes}, got "
            f"{shapes}."
        )
    return [at_least_float32(logits) for logits in levels]


def leaf_inputs(
    leaf_logits: torch.Tensor, labels: torch.Tensor, taxonomy: Taxonomy
) -> tuple[torch.Tensor, torch.Tensor, LeafRanges]:
    """What losses of leaves compute with.

    Logits (N, leaves), in float32 at least, zeros where no level is known; the classes (N, L) of
    each label's path, as the tables count them, without gaps, -1 below; the tables.
    """
    if leaf_logits.ndim != 2 or leaf_logits.shape[1] != taxonomy.num_leaves:
        raise ValueError(
            f"leaf_logits must be (N, {taxonomy.num_leaves}), one column per leaf, got "
            f"{tuple(leaf_logits.shape)}."
        )
    check_labels(labels, taxonomy, len(leaf_logits))
    ranges = leaf_ranges(taxonomy, leaf_logits.device)
    path = ranges.classes(ranges.complete(labels))
    return _only(path[:, 0] >= 0, at_least_float32(leaf_logits)), path, ranges
