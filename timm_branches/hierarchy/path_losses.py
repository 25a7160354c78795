"""Losses of recent papers that look at whole paths: all ancestors, or all nodes of the tree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from timm_branches.hierarchy.decode import path_sum_scores
from timm_branches.hierarchy.losses import leaf_inputs, marginal_loss, mean_of_counted
from timm_branches.hierarchy.ranges import leaf_log_sums, leaf_ranges
from timm_branches.taxonomy.taxonomy import Taxonomy

__all__ = [
    "ancestor_cross_entropy",
    "masked_fixmatch_loss",
    "parameter_sharing_loss",
    "soft_margin_loss",
]

LevelLogits = Sequence[torch.Tensor] | Mapping[str, torch.Tensor]


def ancestor_cross_entropy(
    leaf_logits: torch.Tensor,
    labels: torch.Tensor,
    taxonomy: Taxonomy,
    smoothing: float = 0.3,
    share: bool = False,
) -> torch.Tensor:
    """Cross-entropy on the label and all of its ancestors.

    L = -(1 - s) log p(C) - s (mean over the ancestors a of log p(a)), where p(a) is the sum
    of p(leaf) below a. Without ancestors (a class of the first level) it is -log p(C). With s = 0
    it is :func:`marginal_loss`. Of a coarse label C is the deepest class that is known.

    Source: HACE (arXiv 2605.06274), of which we know the outline alone: the leaf has the weight
    1 - s, the rest is spread up its path. That it is spread evenly, and the default of s, are ours.

    Args:
        leaf_logits: (N, num_leaves).
        labels: (N, L), as in :func:`marginal_loss`.
        taxonomy: The tree of the leaves.
        smoothing: s in [0, 1).
        share: As in :func:`level_cross_entropy`.

    Returns:
        A scalar; 0, with zero gradients, when no label is known.

    Raises:
        ValueError: As for :func:`marginal_loss`, or s is out of its range.

    Example:
        >>> tree = Taxonomy(['animal/cat', 'animal/dog', 'transport/ship'])
        >>> # 0.8 log 4 + 0.2 log 2
        >>> leaf_logits = torch.tensor([[0.25, 0.25, 0.5]]).log()
        >>> loss = ancestor_cross_entropy(leaf_logits, tree.expand([0]), tree, smoothing=0.2)
        >>> round(float(loss), 4)
        1.2477
    """
    if not 0 <= smoothing < 1:
        raise ValueError(f"smoothing must be in [0, 1), got {smoothing}.")
    leaf_logits, path, ranges = leaf_inputs(leaf_logits, labels, taxonomy)
    log_p, _ = leaf_log_sums(leaf_logits, path, ranges)  # (N, L)
    labelled = path[:, 0] >= 0
    ancestors = (path >= 0).sum(1) - 1
    own = log_p.gather(1, ancestors.clamp(min=0)[:, None])[:, 0]
    # an impossible class costs inf, and 0 * inf would be nan
    is_above = ranges.depths <= ancestors[:, None]
    above = torch.where(is_above, log_p, 0).sum(1) / ancestors.clamp(min=1)
    mixed = own
    if smoothing:
        mixed = torch.where(ancestors > 0, (1 - smoothing) * own + smoothing * above, own)
    return mean_of_counted(torch.where(labelled, -mixed, 0), labelled, share)


def parameter_sharing_loss(
    level_logits: LevelLogits, labels: torch.Tensor, taxonomy: Taxonomy, share: bool = False
) -> torch.Tensor:
    """Softmax over the leaves, whose scores are the sums of their nodes' scores.

    Classes share the parameters of their ancestors: z(leaf) = sum of theta(C) over the classes C on
    its path, p = softmax(z), L = -log p(label), of a coarse label that of all leaves below it. The
    heads of a branch model give theta, level by level. The decoder `'path-sum'` answers so.

    Source: Valmadre, "Hierarchical classification at multiple operating points", NeurIPS 2022
    (arXiv 2210.10929), parameter-sharing softmax; an earlier use is Salakhutdinov et al., CVPR
    2011.

    Args:
        level_logits: (N, num_classes[level]) for each level, or a dict of them.
        labels: (N, L), as in :func:`marginal_loss`.
        taxonomy: The tree.
        share: As in :func:`level_cross_entropy`.

    Returns:
        A scalar; 0, with zero gradients, when no label is known.

    Raises:
        ValueError: Logits or labels do not fit the tree.

    Example:
        >>> tree = Taxonomy(['animal/cat', 'animal/dog', 'ship'])
        >>> logits = [torch.tensor([[1., 0.]]), torch.tensor([[0., 0.]])]
        >>> # the leaves' scores are 1, 1 and 0
        >>> round(float(parameter_sharing_loss(logits, tree.expand([0]), tree)), 4)
        0.862
    """
    return marginal_loss(path_sum_scores(level_logits, taxonomy), labels, taxonomy, share)


def soft_margin_loss(
    level_logits: LevelLogits,
    labels: torch.Tensor,
    taxonomy: Taxonomy,
    margin: float = 1.0,
    share: bool = False,
) -> torch.Tensor:
    """:func:`parameter_sharing_loss` in which wrong leaves must lose by a margin.

    The farther off they are, the wider it is:
    L = -z(y) + log sum over the leaves k of exp(z(k) + m d(y, k)), where d is the height of the
    lowest common ancestor of leaf and label over that of the root; of a coarse label z(y) is the
    log-sum-exp over the leaves below it, which have d = 0. With m = 0 it is
    :func:`parameter_sharing_loss`.

    Source: Valmadre 2022 (see there), soft-max margin; there it is a margin of 0 and 1 or one by
    the tree, here the latter, on the leaves' scores. Softmax margin: Gimpel and Smith, NAACL 2010.

    Args:
        level_logits: As for :func:`parameter_sharing_loss`.
        labels: As there.
        taxonomy: The tree.
        margin: m, from 0 upwards.
        share: As in :func:`level_cross_entropy`.

    Returns:
        A scalar; 0, with zero gradients, when no label is known.

    Raises:
        ValueError: As there, or the margin is negative or not finite.

    Example:
        >>> tree = Taxonomy(['animal/cat', 'animal/dog', 'ship'])
        >>> logits = [torch.zeros(1, 2), torch.zeros(1, 2)]
        >>> # log(1 + exp(1 / 2) + exp(1))
        >>> round(float(soft_margin_loss(logits, tree.expand([0]), tree)), 4)
        1.6803
    """
    if not 0 <= margin < float("inf"):
        raise ValueError(f"margin must be a finite number from 0 upwards, got {margin}.")
    scores = path_sum_scores(level_logits, taxonomy)
    if labels.shape == (len(scores), taxonomy.num_levels):
        scores = scores + margin * _distances(labels, taxonomy).to(scores)
    return marginal_loss(scores, labels, taxonomy, share)


def _distances(labels: torch.Tensor, taxonomy: Taxonomy) -> torch.Tensor:
    """(N, leaves) from 0 to 1; 0 of leaves below the label, and of samples without one."""
    ranges = leaf_ranges(taxonomy, labels.device)
    label = ranges.deepest(labels.long())
    path = ranges.classes(ranges.paths[label])
    place = ranges.inverse  # (leaves,)
    common = torch.full_like(place.expand(len(label), -1), taxonomy.num_levels)
    for at in path.unbind(1):  # the deeper one overwrites
        below = (place >= ranges.first[at][:, None]) & (place < ranges.last[at][:, None])
        common = torch.where(below, ranges.heights[at][:, None], common)
    # below the label there is no mistake
    below = (place >= ranges.first[label][:, None]) & (place < ranges.last[label][:, None])
    below |= (label < 0)[:, None]
    return common.masked_fill(below, 0).double() / taxonomy.num_levels


def masked_fixmatch_loss(
    weak_logits: torch.Tensor,
    strong_logits: torch.Tensor,
    labels: torch.Tensor,
    taxonomy: Taxonomy,
    threshold: float = 0.95,
    share: bool = False,
) -> torch.Tensor:
    """FixMatch for images that carry a coarse label only: their leaf is guessed below it.

    The guess is the likeliest leaf below the known class, by the softmax of a weakly augmented view
    over these leaves alone; where its probability is at least the threshold, the strongly augmented
    view is trained on it: L = mean over all coarsely labelled samples of 1[p >= threshold] *
    CE(strong, guess). Samples whose leaf is known, and those without a label, cost nothing here.

    Source: Sohn et al., FixMatch, NeurIPS 2020 (arXiv 2001.07685), equation (4), with the mask of
    "Free-grain" (CVPR 2026), of which we know the outline alone; that the softmax is over the
    leaves below the label is ours.

    Args:
        weak_logits: (N, num_leaves), of the weakly augmented view; no gradient flows into them.
        strong_logits: (N, num_leaves), of the strongly augmented view.
        labels: (N, L), -1 below what is known.
        taxonomy: The tree of the leaves.
        threshold: In [0, 1].
        share: As in :func:`level_cross_entropy`.

    Returns:
        A scalar; 0, with zero gradients, when no sample has a coarse label.

    Raises:
        ValueError: Shapes differ, labels do not fit the tree, or the threshold is out of its range.

    Example:
        >>> tree = Taxonomy(['animal/cat', 'animal/dog', 'ship'])
        >>> weak, strong = torch.tensor([[5., 0., 9.]]), torch.zeros(1, 3)
        >>> coarse = torch.tensor([[0, -1]])  # an animal
        >>> round(float(masked_fixmatch_loss(weak, strong, coarse, tree)), 4)  # a cat: log 3
        1.0986
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold must be a probability in [0, 1], got {threshold}.")
    if weak_logits.shape != strong_logits.shape:
        raise ValueError(
            f"Both views must give logits (N, {taxonomy.num_leaves}), got "
            f"{tuple(weak_logits.shape)} and {tuple(strong_logits.shape)}."
        )
    strong_logits, path, _ = leaf_inputs(strong_logits, labels, taxonomy)
    log_p = strong_logits.log_softmax(-1)
    below = _distances(labels, taxonomy) == 0
    coarse = (path[:, 0] >= 0) & (below.sum(1) > 1)
    guesses = weak_logits.detach().to(log_p.dtype).masked_fill(~below, -torch.inf)
    sure, leaf = guesses.softmax(1).max(1)
    losses = -log_p.gather(1, leaf[:, None])[:, 0]
    return mean_of_counted(torch.where(coarse & (sure >= threshold), losses, 0), coarse, share)
