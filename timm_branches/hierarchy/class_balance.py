"""Weights of classes that have few or many samples, level by level."""

from collections.abc import Sequence

import torch

from timm_branches.taxonomy.taxonomy import Taxonomy

__all__ = ["SCHEMES", "class_weights"]

SCHEMES = ("inverse", "sqrt", "effective")
_BETA = 0.9999  # of the effective number of samples, the paper's for long-tailed data


def class_weights(
    labels: torch.Tensor, taxonomy: Taxonomy, scheme: str = "inverse", levels: Sequence[str] = ()
) -> dict[str, torch.Tensor]:
    """Weights for each class of each level, as `BranchTask(class_weights=...)` takes them.

    With n_k samples of class k: `inverse` is 1 / n_k, `sqrt` is 1 / sqrt(n_k), `effective` is
    (1 - b) / (1 - b ** n_k) with b = 0.9999 (Cui et al. 2019, arXiv 1901.05555, equation 2). They are
    scaled so that the samples' mean weight is 1: the loss keeps its size. A class without a sample
    gets 0.

    Args:
        labels: (N, L) class indices, -1 where unknown.
        taxonomy: The tree that they refer to.
        scheme: 'inverse', 'sqrt' or 'effective'.
        levels: Names of the levels to weigh, all by default.

    Returns:
        For each level a tensor (K,).

    Raises:
        ValueError: An unknown scheme or level, or a level without any label.

    Example:
        >>> tree = Taxonomy(['cat', 'dog'], levels=['species'])
        >>> class_weights(torch.tensor([[0], [0], [0], [1]]), tree)['species']
        tensor([0.6667, 2.0000])
    """
    if scheme not in SCHEMES:
        raise ValueError(f"There is no scheme {scheme!r} of class weights; it is one of {SCHEMES}.")
    result = {}
    for level in levels or taxonomy.levels:
        index = taxonomy.level_index(level)
        known = labels[:, index][labels[:, index] >= 0]
        if not len(known):
            raise ValueError(
                f"No sample has a label of level {level!r}: its classes have no weights."
            )
        counts = known.bincount(minlength=taxonomy.num_classes[index]).double()
        if scheme == "inverse":
            weights = 1 / counts
        elif scheme == "sqrt":
            weights = counts.rsqrt()
        else:
            weights = (1 - _BETA) / (1 - _BETA**counts)
        weights[counts == 0] = 0
        mean = (weights * counts).sum() / counts.sum()
        result[level] = (weights / mean).float()
    return result
