"""Weights of classes that have few or many samples, level by level."""

from collections.abc import Callable, Mapping, Sequence

import torch

from timm_branches.hierarchy.ancestry import check_labels
from timm_branches.taxonomy.taxonomy import Taxonomy

__all__ = ["SCHEMES", "class_counts", "class_weights"]

BETA = 0.9999  # of the effective number of samples, the paper's for long-tailed data


def class_weights(
    labels_or_counts: torch.Tensor | Mapping[str, torch.Tensor],
    taxonomy: Taxonomy,
    scheme: str = "inverse",
    levels: Sequence[str] = (),
) -> dict[str, torch.Tensor]:
    """Weights for each class of each level, as `BranchTask(class_weights=...)` takes them.

    With n_k samples of class k: `inverse` is 1 / n_k, `sqrt` is 1 / sqrt(n_k), `effective` is
    (1 - b) / (1 - b ** n_k) with b = 0.9999 (Cui et al. 2019, arXiv 1901.05555, equation 2). They
    are scaled so that the samples' mean weight is 1: the loss keeps its size. A class without a
    sample gets 0.

    Args:
        labels_or_counts: (N, L) class indices, -1 where unknown; or by the levels' names how many
            samples (K,) each class has.
        taxonomy: The tree that they refer to.
        scheme: 'inverse', 'sqrt' or 'effective'.
        levels: Names of the levels to weigh, all by default.

    Returns:
        For each level a tensor (K,).

    Raises:
        ValueError: An unknown scheme or level, labels or counts that do not fit the taxonomy, or a
            level without any sample.

    Example:
        >>> tree = Taxonomy(['cat', 'dog'], levels=['species'])
        >>> class_weights(torch.tensor([[0], [0], [0], [1]]), tree)['species']
        tensor([0.6667, 2.0000])
        >>> class_weights({'species': torch.tensor([3, 1])}, tree)['species']
        tensor([0.6667, 2.0000])
    """
    if scheme not in SCHEMES:
        names = ", ".join(map(repr, SCHEMES))
        raise ValueError(f"There is no scheme {scheme!r} of class weights; it is one of {names}.")
    if isinstance(labels_or_counts, Mapping):
        counts_by_level = labels_or_counts
    else:
        counts_by_level = class_counts(labels_or_counts, taxonomy)
    result = {}
    for level in levels or taxonomy.levels:
        expected = (taxonomy.num_classes[taxonomy.level_index(level)],)
        if level not in counts_by_level or tuple(counts_by_level[level].shape) != expected:
            raise ValueError(
                f"There must be a count for each of the {expected[0]} classes of level {level!r}; "
                f"got counts of {[(name, len(n)) for name, n in counts_by_level.items()]}."
            )
        counts = counts_by_level[level].double()
        if not counts.isfinite().all() or (counts < 0).any():
            raise ValueError(f"The counts of level {level!r} must be numbers from 0 upwards.")
        if not counts.any():
            raise ValueError(
                f"No sample has a label of level {level!r}: its classes have no weights."
            )
        weights = SCHEMES[scheme](counts).masked_fill(counts == 0, 0)
        mean = (weights * counts).sum() / counts.sum()
        result[level] = (weights / mean).float()
    return result


def class_counts(labels: torch.Tensor, taxonomy: Taxonomy) -> dict[str, torch.Tensor]:
    """How many samples each class of each level has.

    Args:
        labels: (N, L) class indices, -1 where unknown.
        taxonomy: The tree that they refer to.

    Returns:
        For each level a LongTensor (K,).

    Raises:
        ValueError: Labels do not fit the taxonomy.
    """
    check_labels(labels, taxonomy, len(labels))
    counts = {}
    for level, column in enumerate(labels.long().unbind(1)):
        classes = taxonomy.num_classes[level]
        counts[taxonomy.levels[level]] = column[column >= 0].bincount(minlength=classes)
    return counts


def _effective(counts: torch.Tensor) -> torch.Tensor:
    return (1 - BETA) / (1 - BETA**counts)


SCHEMES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "inverse": torch.reciprocal,
    "sqrt": torch.rsqrt,
    "effective": _effective,
}
