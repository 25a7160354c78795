"""Accuracy on a hierarchy, by the standard definitions.

All is on label rows with one column per level.
-1 in a label is "unknown at this level": the level is left out for that sample, neither right nor
wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from timm_branches.hierarchy.tables import IndexTables, index_tables
from timm_branches.taxonomy.taxonomy import Taxonomy

__all__ = [
    "class_scores",
    "consistency",
    "expected_calibration_error",
    "format_class_report",
    "full_path_accuracy",
    "level_accuracy",
    "sum_upwards",
    "top_k_accuracy",
    "tree_inconsistency_error",
]


def check_pair(predictions: torch.Tensor, labels: torch.Tensor) -> None:
    """Raise a ValueError unless both are class indices (N, L), the labels from -1 upwards."""
    if predictions.ndim != 2 or predictions.shape != labels.shape:
        raise ValueError(
            f"predictions and labels must both have shape (N, L), one column per level, got "
            f"{tuple(predictions.shape)} and {tuple(labels.shape)}."
        )
    for name, tensor in (("predictions", predictions), ("labels", labels)):
        if tensor.is_floating_point() or tensor.is_complex():
            raise ValueError(
                f"{name} must be class indices (integers), got a tensor of {tensor.dtype}; take "
                f"the argmax of logits first."
            )
    if labels.numel() and int(labels.min()) < -1:
        lowest = int(labels.min())
        raise ValueError(f"labels must be class indices or -1 (unknown), got {lowest}.")


def level_accuracy(predictions: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Top-1 accuracy on each level.

    Args:
        predictions: LongTensor (N, L), class indices per level.
        labels: LongTensor (N, L), -1 where unknown.

    Returns:
        Double tensor (L,), fractions in [0, 1]; nan for a level on which no sample has a label
        (there is no accuracy to report, and 0 would claim one).

    Raises:
        ValueError: if the shapes differ or are not (N, L), or something else than class indices is
            given.

    Example:
        >>> level_accuracy(torch.tensor([[0, 1], [1, 3]]), torch.tensor([[0, 1], [1, 2]])).tolist()
        [1.0, 0.5]
    """
    check_pair(predictions, labels)
    return ratio(*level_counts(predictions, labels))


def level_counts(
    predictions: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """How many samples of (N, L) are right, and have a label, on each level (L,)."""
    known = labels >= 0
    right = (predictions == labels) & known
    return right.sum(0), known.sum(0)


def ratio(part: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """Counts over counts; nan where there are none. Doubles count exactly beyond 2 ** 24."""
    return part.double() / whole


def top_k_accuracy(logits: torch.Tensor, labels: torch.Tensor, k: int = 5) -> torch.Tensor:
    """Share of one level's samples whose class is among the k with the largest logits.

    Args:
        logits: float tensor (N, K).
        labels: LongTensor (N,), -1 where unknown.
        k: 1 to K.

    Returns:
        Double tensor (), a fraction in [0, 1]; nan if no label is known.

    Raises:
        ValueError: if there are fewer than `k` classes, or the shapes are others.

    Example:
        >>> logits = torch.tensor([[3., 2., 1.], [3., 2., 1.]])
        >>> float(top_k_accuracy(logits, torch.tensor([1, 2]), k=2))
        0.5
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(
            f"logits must be (N, K) and labels (N,), got {tuple(logits.shape)} and "
            f"{tuple(labels.shape)}."
        )
    if not 1 <= k <= logits.shape[1]:
        raise ValueError(f"k must be between 1 and the {logits.shape[1]} classes, got {k}.")
    return ratio(*top_k_counts(logits, labels, k))


def top_k_counts(
    logits: torch.Tensor, labels: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """How many of the N samples have their label (N,) among the k best, and how many have one."""
    right = (logits.topk(k).indices == labels[:, None]).any(1)
    return right.sum(), (labels >= 0).sum()


def full_path_accuracy(predictions: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Share of samples that are right on every level that is known (FPA, exact match).

    Source: Park et al., "Visually Consistent Hierarchical Image Classification", ICLR 2025
    (arXiv 2406.11608).

    Args:
        predictions: LongTensor (N, L), class indices per level.
        labels: LongTensor (N, L), -1 where unknown.

    Returns:
        Double tensor (), a fraction in [0, 1]. Samples without any known level are not counted; nan
        if all are such.

    Raises:
        ValueError: as for :func:`level_accuracy`.

    Example:
        >>> predictions, labels = torch.tensor([[0, 1], [1, 3]]), torch.tensor([[0, 1], [1, 2]])
        >>> float(full_path_accuracy(predictions, labels))
        0.5
    """
    check_pair(predictions, labels)
    return ratio(*full_path_counts(predictions, labels))


def full_path_counts(
    predictions: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """How many rows (N, L) are right on every known level, and how many have a known level."""
    known = labels >= 0
    labelled = known.any(1)
    right = ((predictions == labels) | ~known).all(1) & labelled
    return right.sum(), labelled.sum()


def consistency(predictions: torch.Tensor, taxonomy: Taxonomy) -> torch.Tensor:
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


def tree_inconsistency_error(predictions: torch.Tensor, taxonomy: Taxonomy) -> torch.Tensor:
    """Share of samples whose predictions form no path of the tree (TICE): 1 - :func:`consistency`.

    Source: Park et al., "Visually Consistent Hierarchical Image Classification", ICLR 2025
    (arXiv 2406.11608), where it is the tree-based inconsistency error rate.

    Args:
        predictions: LongTensor (N, L), class indices per level.
        taxonomy: the tree.

    Returns:
        Double tensor (), a fraction in [0, 1]; nan if there are no samples.

    Raises:
        ValueError: as for :func:`consistency`.

    Example:
        >>> tree = Taxonomy(['animal/cat', 'animal/dog', 'transport/ship'])
        >>> predictions = torch.tensor([[0, 1], [1, 1], [1, 2], [0, 0]])
        >>> float(tree_inconsistency_error(predictions, tree))
        0.25
    """
    return 1 - consistency(predictions, taxonomy)


def class_scores(
    right: torch.Tensor, predicted: torch.Tensor, labelled: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Precision, recall and F1 of each class, from counts.

    Args:
        right: (K,) how many samples of the class were found: the diagonal of a confusion matrix.
        predicted: (K,) how often the class was predicted: the matrix' column sums.
        labelled: (K,) how many samples have the class (support): the matrix' row sums.

    Returns:
        Three double tensors (K,), fractions in [0, 1]. Precision is nan for a class that was never
        predicted, recall for one without samples, F1 = 2 right / (predicted + labelled) for one
        that has neither.

    Example:
        >>> right, predicted, labelled = torch.tensor([[1, 0], [2, 0], [1, 1]])
        >>> precision, recall, f1 = class_scores(right, predicted, labelled)
        >>> precision.tolist(), recall.tolist()
        ([0.5, nan], [1.0, 0.0])
    """
    right = right.double()
    return right / predicted, right / labelled, 2 * right / (predicted + labelled)


def format_class_report(rows: Sequence[dict[str, Any]]) -> str:
    """The rows that :meth:`HierarchyEvaluator.class_report` gives as a table.

    Args:
        rows: dicts with `level`, `class`, `precision`, `recall` and `f1` in percent, and
            `support`.

    Example:
        >>> row = {'level': 'fine', 'class': 'cat', 'precision': 50.0, 'recall': 100.0,
        ...        'f1': 66.667, 'support': 1}
        >>> print(format_class_report([row]))
        level  class  precision   recall       f1  support
        fine   cat        50.00   100.00    66.67        1
    """
    level_width = max([len("level"), *(len(row["level"]) for row in rows)])
    class_width = max([len("class"), *(len(row["class"]) for row in rows)])
    names = f"{'level':<{level_width}}  {'class':<{class_width}}"
    lines = [f"{names}  precision   recall       f1  support"]
    for row in rows:
        names = f"{row['level']:<{level_width}}  {row['class']:<{class_width}}"
        scores = f"{row['precision']:9.2f}  {row['recall']:7.2f}  {row['f1']:7.2f}"
        lines.append(f"{names}  {scores}  {row['support']:7d}")
    return "\n".join(lines)


def expected_calibration_error(
    confidences: torch.Tensor, right: torch.Tensor, num_bins: int = 15
) -> torch.Tensor:
    """Expected calibration error (ECE), with bins of equal width.

    It says how far confidence is from accuracy:
    ECE = sum over bins B of |B| / n * |accuracy(B) - mean confidence(B)|, equation (3) of Guo et
    al., "On Calibration of Modern Neural Networks", ICML 2017 (arXiv 1706.04599). Bin m holds the
    confidences in ((m - 1) / M, m / M], as there; torchmetrics closes its bins on the other side
    and gives 1.0 a bin of its own.

    Args:
        confidences: float tensor (N,), the probability of the predicted class.
        right: bool tensor (N,), whether it is the label. Samples without a label are to be left out
            of both.
        num_bins: M.

    Returns:
        Double tensor (), a fraction in [0, 1]; nan if there are no samples or a confidence is nan.

    Raises:
        ValueError: if the shapes differ or are not (N,).

    Example:
        >>> confidences, right = torch.tensor([0.75, 0.75]), torch.tensor([True, False])
        >>> float(expected_calibration_error(confidences, right))
        0.25
    """
    if confidences.ndim != 1 or confidences.shape != right.shape:
        raise ValueError(
            f"confidences and right must both be (N,), got {tuple(confidences.shape)} and "
            f"{tuple(right.shape)}."
        )
    counted = torch.ones_like(right, dtype=torch.bool)
    sums = calibration_bins(confidences, right.bool(), counted, num_bins, torch.float64)
    return calibration_error(*sums)


def calibration_bins(
    confidences: torch.Tensor,
    right: torch.Tensor,
    counted: torch.Tensor,
    num_bins: int,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The sums over samples (N, ...) that are all that ECE needs.

    Batches and processes add up exactly, in memory that does not grow with N.

    Returns:
        Of each bin (..., M) how many samples are in it, how many of them are right, and the sum of
        their confidences.
    """
    device = confidences.device
    edges = torch.linspace(0, 1, num_bins + 1, device=device, dtype=confidences.dtype)
    bins = torch.bucketize(confidences.contiguous(), edges[1:-1])[..., None]
    inside = (bins == torch.arange(num_bins, device=device)) & counted[..., None]  # (N, ..., M)
    sums = torch.where(inside, confidences[..., None].to(dtype), 0).sum(0)
    return inside.sum(0), (inside & right[..., None]).sum(0), sums


def calibration_error(
    count: torch.Tensor, right: torch.Tensor, confidence: torch.Tensor
) -> torch.Tensor:
    """ECE from the sums over each bin (..., M)."""
    return (right - confidence).abs().sum(-1) / count.sum(-1)


def sum_upwards(leaf_logits: torch.Tensor, taxonomy: Taxonomy) -> list[torch.Tensor]:
    """Every level's log-probabilities from a flat classifier, by sums up the tree.

    This is what a flat baseline says about the coarse levels. It is computed as a log-sum-exp of
    the leaves' log-softmax, so nothing underflows however sure the classifier is.

    Args:
        leaf_logits: float tensor (..., num_leaves).
        taxonomy: the tree whose leaves the logits belong to.

    Returns:
        For each level a tensor (..., num_classes[level]), at least float32. On levels below a
        shallow leaf the probabilities sum to one minus that leaf's share.

    Raises:
        ValueError: if the last dimension is not the number of leaves, or the logits are not
            floating point.

    Example:
        >>> tree = Taxonomy(['animal/cat', 'animal/dog', 'transport/ship'])
        >>> levels = sum_upwards(torch.tensor([0.25, 0.25, 0.5]).log(), tree)
        >>> [level.exp().tolist() for level in levels]
        [[0.5, 0.5], [0.25, 0.25, 0.5]]
    """
    if leaf_logits.ndim < 1 or leaf_logits.shape[-1] != taxonomy.num_leaves:
        raise ValueError(
            f"leaf_logits must have one column per leaf, shape (..., {taxonomy.num_leaves}), got "
            f"{tuple(leaf_logits.shape)}."
        )
    if not leaf_logits.is_floating_point():
        raise ValueError(f"leaf_logits must be floating point, got {leaf_logits.dtype}.")
    # half precision would lose the small leaves of a large tree
    log_p = leaf_logits.to(torch.promote_types(leaf_logits.dtype, torch.float32)).log_softmax(-1)
    tables = index_tables(taxonomy, log_p.device)
    if log_p.device.type == "cpu" and not torch.compiler.is_compiling():
        levels = _by_sums_of_p(log_p, tables)
        if levels is not None:
            return levels
    # from the deepest level up: a class is the sum of its children, so the leaves themselves are
    # read only once
    levels = []
    for depth in reversed(range(taxonomy.num_levels)):
        level = tables.levels[depth]
        here, index = log_p.index_select(-1, level.leaves), level.leaf_nodes
        if levels:
            here = torch.cat([here, levels[0]], -1)
            index = torch.cat([index, tables.levels[depth + 1].parents])
        levels.insert(0, _log_sum_exp(here, index, taxonomy.num_classes[depth]))
    return levels


# a sum of probabilities that is larger than this has lost nothing to those too small for a float
LEAST_SUM = 1e-25


def _by_sums_of_p(log_p: torch.Tensor, tables: IndexTables) -> list[torch.Tensor] | None:
    """:func:`sum_upwards` by sums of probabilities, several times as quick as by logarithms.

    None where a sum is too small for it; to ask for that a device would have to be waited for.
    """
    p = log_p.exp()
    levels: list[torch.Tensor] = []
    sums = p[..., :0]
    for depth in reversed(range(len(tables.levels))):
        level = tables.levels[depth]
        leaves = log_p.index_select(-1, level.leaves)  # in the order of the level's classes
        if not len(level.inner_nodes):
            sums = p.index_select(-1, level.leaves)
            levels.insert(0, leaves)
            continue
        shape = (*p.shape[:-1], len(level.parents))
        sums = p.new_zeros(shape).index_add(-1, tables.levels[depth + 1].parents, sums)
        if len(level.leaves):
            sums = sums.index_copy(-1, level.leaf_nodes, p.index_select(-1, level.leaves))
        inner = sums.index_select(-1, level.inner_nodes)
        if not (inner > LEAST_SUM).all():
            return None
        of_level = sums.new_empty(shape).index_copy(-1, level.inner_nodes, inner.log())
        levels.insert(0, of_level.index_copy(-1, level.leaf_nodes, leaves))
    return levels


def _log_sum_exp(values: torch.Tensor, index: torch.Tensor, size: int) -> torch.Tensor:
    """Log of the sums of exp(values) (..., K) of equal index (K,), for each index (..., size)."""
    if size == len(index):  # no two of them: a permutation
        return values.index_select(-1, index.argsort())
    shape = (*values.shape[:-1], size)
    # each class's own maximum is taken out before exp; a class without any probability (all -inf)
    # takes out 0
    top = values.new_full(shape, -torch.inf).scatter_reduce(
        -1, index.expand(values.shape), values.detach(), "amax"
    )
    top = top.where(top.isfinite(), 0)
    total = values.new_zeros(shape).index_add(
        -1, index, (values - top.index_select(-1, index)).exp()
    )
    # log(0) is -inf as it should be, but its gradient is nan: keep log away from zeros
    some = total > 0
    return (total.where(some, 1).log() + top).where(some, -torch.inf)
