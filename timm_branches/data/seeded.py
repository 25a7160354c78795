"""Data whose random part is a function of seed and epoch."""

import torch
from torch.utils.data import Dataset

__all__: list[str] = []


class SeededDataset(Dataset):
    """Keeps seed and epoch, from 0 on, in shared memory, where running workers see them change."""

    def __init__(self, seed: int = 0, epoch: int = 0) -> None:
        self._state = torch.tensor([seed, epoch]).share_memory_()

    @property
    def seed(self) -> int:
        """The seed of everything random."""
        return int(self._state[0])

    @property
    def epoch(self) -> int:
        """The epoch that augmentation and noise belong to."""
        return int(self._state[1])

    def set_seed(self, seed: int) -> None:
        """Choose another sequence of random numbers."""
        self._set(0, seed)

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch begins.

        What is random in training then differs from the epochs before.
        """
        self._set(1, epoch)

    def _set(self, index: int, value: int) -> None:
        if not self._state.is_shared():  # copy.deepcopy makes an ordinary tensor of a shared one
            self._state = self._state.share_memory_()
        self._state[index] = value
