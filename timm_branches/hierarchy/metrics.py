"""Accuracy on a hierarchy, by the standard definitions; all on label rows with one column per level.

-1 in a label is "unknown at this level": the level is left out for that sample, neither right nor wrong.
"""
from __future__ import annotations

import torch
from torch import Tensor

from .taxonomy import Taxonomy

__all__ = ["consistency", "full_path_accuracy", "level_accuracy", "sum_upwards"]


def _check_pair(predictions: Tensor, labels: Tensor) -> None:
    if predictions.ndim != 2 or predictions.shape != labels.shape:
        raise ValueError(f"predictions and labels must both have shape (N, L), one column per level, got "
                         f"{tuple(predictions.shape)} and {tuple(labels.shape)}")
    for name, tensor in (("predictions", predictions), ("labels", labels)):
        if tensor.is_floating_point() or tensor.is_complex():
            raise ValueError(f"{name} must be class indices (integers), got a tensor of {tensor.dtype}; take the "
                             f"argmax of logits first")
    if labels.numel() and int(labels.min()) < -1:
        raise ValueError(f"labels must be class indices or -1 (unknown), got {int(labels.min())}")


def level_accuracy(predictions: Tensor, labels: Tensor) -> Tensor:
    """Top-1 accuracy on each level.

    Args:
        predictions: LongTensor (N, L), class indices per level.
        labels: LongTensor (N, L), -1 where unknown.

    Returns:
        Double tensor (L,), fractions in [0, 1]; nan for a level on which no sample has a label (there is no accuracy to
        report, and 0 would claim one).

    Raises:
        ValueError: if the shapes differ or are not (N, L), or something else than class indices is given.

    Example:
        >>> level_accuracy(torch.tensor([[0, 1], [1, 3]]), torch.tensor([[0, 1], [1, 2]])).tolist()
        [1.0, 0.5]
    """
    _check_pair(predictions, labels)
    known = labels >= 0
    right = (predictions == labels) & known
    return right.sum(0).double() / known.sum(0)  # 0 / 0 is nan; double counts exactly beyond 2 ** 24 samples


def full_path_accuracy(predictions: Tensor, labels: Tensor) -> Tensor:
    """Share of samples that are right on every level that is known (FPA, exact match).

    Args:
        predictions: LongTensor (N, L), class indices per level.
        labels: LongTensor (N, L), -1 where unknown.

    Returns:
        Double tensor (), a fraction in [0, 1]. Samples without any known level are not counted; nan if all are such.

    Raises:
        ValueError: as for :func:`level_accuracy`.

    Example:
        >>> float(full_path_accuracy(torch.tensor([[0, 1], [1, 3]]), torch.tensor([[0, 1], [1, 2]])))
        0.5
    """
    _check_pair(predictions, labels)
    known = labels >= 0
    right = ((predictions == labels) | ~known).all(1) & known.any(1)
    return right.sum().double() / known.any(1).sum()


def consistency(predictions: Tensor, taxonomy: Taxonomy) -> Tensor:
    """Share of samples whose predictions form a path of the tree, right or wrong.

    What counts as a path, on uneven trees too, is said at :meth:`Taxonomy.valid_paths`.

    Args:
        predictions: LongTensor (N, L), class indices per level.
        taxonomy: the tree.

    Returns:
        Double tensor (), a fraction in [0, 1]; nan if there are no samples.

    Raises:
        ValueError: if the shape is not (N, L) or an index is out of range.

    Example:
        >>> tree = Taxonomy(['animal/cat', 'animal/dog', 'transport/ship'])
        >>> float(consistency(torch.tensor([[0, 1], [1, 1]]), tree))
        0.5
    """
    return taxonomy.valid_paths(predictions).double().mean()


def sum_upwards(leaf_logits: Tensor, taxonomy: Taxonomy) -> list[Tensor]:
    """Every level's log-probabilities from a flat classifier: leaf probabilities are summed up the tree.

    This is what a flat baseline says about the coarse levels. It is computed as a log-sum-exp of the leaves'
    log-softmax, so nothing underflows however sure the classifier is.

    Args:
        leaf_logits: float tensor (..., num_leaves).
        taxonomy: the tree whose leaves the logits belong to.

    Returns:
        For each level a tensor (..., num_classes[level]), at least float32. On levels below a shallow leaf the
        probabilities sum to one minus that leaf's share.

    Raises:
        ValueError: if the last dimension is not the number of leaves, or the logits are not floating point.

    Example:
        >>> tree = Taxonomy(['animal/cat', 'animal/dog', 'transport/ship'])
        >>> [level.exp().tolist() for level in sum_upwards(torch.tensor([0.25, 0.25, 0.5]).log(), tree)]
        [[0.5, 0.5], [0.25, 0.25, 0.5]]
    """
    if leaf_logits.ndim < 1 or leaf_logits.shape[-1] != taxonomy.num_leaves:
        raise ValueError(f"leaf_logits must have one column per leaf, shape (..., {taxonomy.num_leaves}), got "
                         f"{tuple(leaf_logits.shape)}")
    if not leaf_logits.is_floating_point():
        raise ValueError(f"leaf_logits must be floating point, got {leaf_logits.dtype}")
    # half precision would lose the small leaves of a large tree
    log_p = leaf_logits.to(torch.promote_types(leaf_logits.dtype, torch.float32)).log_softmax(-1)
    table = taxonomy.leaf_table.to(log_p.device)
    levels = []
    for depth, num_classes in enumerate(taxonomy.num_classes):
        reaches = table[:, depth] >= 0
        index = table[reaches, depth]
        leaves = log_p[..., reaches]
        shape = (*leaves.shape[:-1], num_classes)
        # each class's own maximum is taken out before exp; a class without any probability (all -inf) takes out 0
        top = leaves.new_full(shape, -torch.inf).scatter_reduce(-1, index.expand(leaves.shape), leaves.detach(), "amax")
        top = top.where(top.isfinite(), 0)
        total = leaves.new_zeros(shape).index_add(-1, index, (leaves - top[..., index]).exp())
        # log(0) is -inf as it should be, but its gradient is nan: keep log away from zeros
        some = total > 0
        levels.append((total.where(some, 1).log() + top).where(some, -torch.inf))
    return levels
