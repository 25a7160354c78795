"""Drawing samples so that every class keeps its share."""

import numpy as np
import torch

__all__ = ["grouped_indices", "keep_one_of_each", "stratified_indices"]


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
        raise ValueError(f"cannot draw {count} of {len(labels)} samples.")
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


def keep_one_of_each(labels: torch.Tensor, held_out: torch.Tensor) -> torch.Tensor:
    """The samples to hold out, less one of each class that would have none left.

    Args:
        labels: (N,) or (N, L).
        held_out: Positions of what is to be held out.

    Returns:
        LongTensor of the positions that may be held out.

    Example:
        >>> keep_one_of_each(torch.tensor([0, 0, 1]), torch.tensor([1, 2])).tolist()
        [1]
    """
    group = torch.unique(labels, dim=0, return_inverse=True)[1]
    left = group.bincount()
    left -= group[held_out].bincount(minlength=len(left))
    given_back = set()
    for position in held_out.tolist():
        if left[group[position]] == 0:
            given_back.add(position)
            left[group[position]] = 1
    return torch.tensor([i for i in held_out.tolist() if i not in given_back], dtype=torch.long)


def grouped_indices(
    labels: torch.Tensor, groups: np.ndarray, count: int, seed: int = 0
) -> torch.Tensor:
    """Draw whole groups of samples until there are about `count`, none of them divided.

    In random order each group is taken if it brings the classes' shares closer to the whole's, and
    leaves every class a sample.

    Args:
        labels: (N,) or (N, L).
        groups: For each sample the number of its group.
        count: Samples to draw.
        seed: Which ones.

    Returns:
        LongTensor of positions, ascending.

    Example:
        >>> labels = torch.tensor([0, 0, 1, 1, 0, 1])
        >>> drawn = grouped_indices(labels, np.array([5, 5, 7, 7, 8, 8]), 2)
        >>> len({5, 7, 8} & set(np.array([5, 5, 7, 7, 8, 8])[drawn].tolist()))
        1
    """
    classes = torch.unique(labels, dim=0, return_inverse=True)[1]
    number = torch.from_numpy(np.unique(groups, return_inverse=True)[1].reshape(-1))
    table = torch.zeros(int(number.max()) + 1, int(classes.max()) + 1, dtype=torch.long)
    table.index_put_((number, classes), torch.ones_like(classes), accumulate=True)
    total = table.sum(0)
    wanted = total.double() * (count / len(classes))
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.zeros_like(total)
    taken = torch.zeros(len(table), dtype=torch.bool)
    for group in torch.randperm(len(table), generator=generator).tolist():
        after = drawn + table[group]
        leaves_none = ((total - after == 0) & (total > 0)).any()
        closer = (after - wanted).abs().sum() < (drawn - wanted).abs().sum()
        if closer and not leaves_none:
            drawn, taken[group] = after, True
    if not taken.any():  # groups larger than what is wanted: the smallest that may go
        for group in table.sum(1).argsort(stable=True).tolist():
            if not ((total - table[group] == 0) & (total > 0)).any():
                taken[group] = True
                break
    return taken[number].nonzero()[:, 0]
