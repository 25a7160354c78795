"""Clips made of scikit-learn's digits, on which it is known what has to be remembered.

Training, validation and test share no picture. `order` is what the recipe trains on without
arguments; the others are harder, each in another way, so that heads of time differ.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from timm_branches.data.clips.dataset import ClipDataset
from timm_branches.data.clips.sampling import FrameSampler
from timm_branches.taxonomy import Taxonomy

__all__ = ["DIGIT_TASKS", "counting_digits", "digit_clips", "single_digits"]

RING = 3  # digits to count with
CLASSES = 4  # of the tasks of one digit among many
MARKER = 9
# pairs of clips in each split, and its share of the pictures
_SPLITS = ((500, 0.0, 0.6), (100, 0.6, 0.75), (300, 0.75, 1.0))
_Draw = Callable[[np.random.Generator], tuple[list[int], int]]


def _pictures() -> tuple[np.ndarray, np.ndarray]:
    """uint8 (N, 16, 16), and their digits."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return np.kron(digits.images, np.ones((2, 2))).astype(np.uint8) * 15, digits.target


def counting_digits(seed: int = 0, **frames: Any) -> tuple[ClipDataset, ClipDataset, ClipDataset]:
    """Clips of digits that count up or down on a ring (`order`).

    0, 1 and 2 count up or down, 3 to 6 frames, each frame another picture. Clips come in pairs, one
    up and one down, that share their length and their very last frame.

    Args:
        seed: Of what is drawn.
        frames: Settings of the :class:`FrameSampler`.

    Returns:
        Training, validation and test clips.
    """
    pictures, target = _pictures()
    rng = np.random.default_rng(seed)
    tree = Taxonomy([("up",), ("down",)], ["order"])
    sampler = FrameSampler(**frames)
    by_digit = [rng.permutation(np.flatnonzero(target == digit)) for digit in range(RING)]
    splits: list[ClipDataset] = []
    for pairs, start, end in _SPLITS:
        pool = [ids[int(start * len(ids)) : int(end * len(ids))] for ids in by_digit]
        clips, labels = [], []
        for _ in range(pairs):
            count = rng.integers(3, 7)
            last = rng.integers(RING)
            shared = rng.choice(pool[last])  # both clips of the pair end with this picture
            for label, step in enumerate((1, -1)):
                ids = []
                for back in range(count - 1, 0, -1):
                    ids.append(rng.choice(pool[(last - step * back) % RING]))
                clips.append(pictures[[*ids, shared]])
                labels.append([label])
        is_training = not splits
        data_sampler = replace(sampler, is_training=True) if is_training else sampler
        splits.append(ClipDataset(clips, labels, tree, in_chans=1, sampler=data_sampler))
    train, val, test = splits
    return train, val, test


def _first(rng: np.random.Generator) -> tuple[list[int], int]:
    """The first of 12 to 32 digits: a long time to remember it, all others distract."""
    digits = rng.integers(CLASSES, size=rng.integers(12, 33)).tolist()
    return digits, digits[0]


def _after(rng: np.random.Generator) -> tuple[list[int], int]:
    """The digit right behind the marker, anywhere in 8 to 24 frames."""
    digits = rng.integers(CLASSES, size=rng.integers(8, 25)).tolist()
    place = int(rng.integers(len(digits) - 1))
    digits[place] = MARKER
    return digits, digits[place + 1]


def _majority(rng: np.random.Generator) -> tuple[list[int], int]:
    """The most frequent of 8 to 24 digits, by one or more; their order says nothing."""
    while True:
        digits = rng.integers(CLASSES, size=rng.integers(8, 25))
        counts = np.bincount(digits, minlength=CLASSES)
        if np.sum(counts == counts.max()) == 1:
            return digits.tolist(), int(counts.argmax())


_DRAWS: dict[str, _Draw] = {"first": _first, "after": _after, "majority": _majority}
DIGIT_TASKS = ("order", *_DRAWS)
"""Names of the tasks, for :func:`digit_clips`."""


def digit_clips(
    task: str, seed: int = 0, **frames: Any
) -> tuple[ClipDataset, ClipDataset, ClipDataset]:
    """Clips of a task.

    Args:
        task: `'order'`: :func:`counting_digits`. Of the others, clips of the digits 0 to 3 in any
            order, the class is `'first'`: the first of 12 to 32 frames; `'after'`: the digit behind
            a 9, which stands once in 8 to 24 frames; `'majority'`: the most frequent digit of 8 to
            24 frames. Whoever always names one class is right in a quarter of them.
        seed: Of what is drawn.
        frames: Settings of the :class:`FrameSampler`.

    Returns:
        Training, validation and test clips: 1000, 200 and 600 of them.

    Raises:
        ValueError: There is no such task.

    Example:
        >>> train, val, test = digit_clips('first')
        >>> len(train), len(test), train.taxonomy.classes
        (1000, 600, (('0', '1', '2', '3'),))
    """
    if task == "order":
        return counting_digits(seed, **frames)
    if task not in _DRAWS:
        raise ValueError(f"there is no task {task!r}: choose one of {', '.join(DIGIT_TASKS)}.")
    tree = Taxonomy([(str(digit),) for digit in range(CLASSES)], ["digit"])
    pictures, target = _pictures()
    rng = np.random.default_rng(seed)
    splits = []
    for number, (pairs, pool) in enumerate(_pools(rng, target)):
        clips, labels = [], []
        for _ in range(2 * pairs):
            digits, label = _DRAWS[task](rng)
            clips.append(pictures[[rng.choice(pool[digit]) for digit in digits]])
            labels.append([label])
        sampler = FrameSampler(**frames)
        if number == 0:
            sampler = replace(sampler, is_training=True)
        splits.append(ClipDataset(clips, labels, tree, in_chans=1, sampler=sampler))
    train, val, test = splits
    return train, val, test


def single_digits(seed: int = 0) -> tuple[ClipDataset, ClipDataset, ClipDataset]:
    """Each picture of :func:`digit_clips` as a clip of one frame, its digit the class.

    A backbone that is to be frozen learns to read on the first.
    """
    tree = Taxonomy([(str(digit),) for digit in range(10)], ["digit"])
    pictures, target = _pictures()
    splits = []
    for _, pool in _pools(np.random.default_rng(seed), target):
        ids = np.concatenate(pool)
        labels = target[ids][:, None].tolist()
        splits.append(ClipDataset(list(pictures[ids][:, None]), labels, tree, in_chans=1))
    train, val, test = splits
    return train, val, test


def _pools(rng: np.random.Generator, target: np.ndarray) -> Iterator[tuple[int, list[np.ndarray]]]:
    """For each split its pairs of clips, and its pictures of each digit."""
    by_digit = [rng.permutation(np.flatnonzero(target == digit)) for digit in range(10)]
    for pairs, start, end in _SPLITS:
        yield pairs, [ids[int(start * len(ids)) : int(end * len(ids))] for ids in by_digit]
