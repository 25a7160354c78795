"""Drawing samples so that every class keeps its share."""

import torch

__all__ = ["stratified_indices"]


def stratified_indices(labels: torch.Tensor, count: int, seed: int = 0) -> torch.Tensor:
    """Draw samples so that each class, or combination of labels, has its share.

    Args:
        labels: (N,) or (N, L).
        count: Samples to draw.
        seed: Which ones; the result depends on nothing else, least of all on global random states.

    Returns:
        LongTensor (count,), grouped by class.

    Raises:
        ValueError: If there are fewer than `count` samples.

    Example:
        >>> labels = torch.tensor([0] * 8 + [1] * 4)
        >>> labels[stratified_indices(labels, 6)].bincount().tolist()
        [4, 2]
    """
    if not 0 <= count <= len(labels):
        raise ValueError(f"cannot draw {count} of {len(labels)} samples")
    if not len(labels):
        return torch.empty(0, dtype=torch.long)
    generator = torch.Generator().manual_seed(seed)
    group = torch.unique(labels, dim=0, return_inverse=True)[1]
    sizes = group.bincount()
    share = sizes.double() * (count / len(labels))
    quota = share.floor().long()
    # Whole samples first, then the largest remainders; equal ones in random order, or the first
    # classes would gain.
    remainder = (
        share - quota + torch.rand(len(sizes), generator=generator, dtype=torch.double) * 1e-6
    )
    remainder[quota >= sizes] = -1
    quota[remainder.argsort(descending=True)[: count - int(quota.sum())]] += 1
    shuffled = torch.randperm(len(labels), generator=generator)
    shuffled = shuffled[group[shuffled].argsort(stable=True)]
    rank = torch.arange(len(labels)) - (sizes.cumsum(0) - sizes)[group[shuffled]]
    return shuffled[rank < quota[group[shuffled]]]
