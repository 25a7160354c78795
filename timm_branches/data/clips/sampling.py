"""Which frames of a clip are looked at."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["SAMPLINGS", "FrameSampler"]

SAMPLINGS = ("uniform", "dense", "random", "all")


@dataclass(frozen=True)
class FrameSampler:
    """Chooses frames of a clip, at random in training and always the same ones in evaluation.

    A clip with fewer frames than wanted gives those it has, each once.

    Args:
        num_frames: Frames wanted, T; None with 'all' only.
        sampling: 'uniform': the clip is cut into T equal segments with one frame of each, at its
            centre or anywhere in it (TSN, Wang et al. 2016, arXiv 1608.00859); 'dense': T frames
            `stride` apart, in the middle of the clip or from anywhere on; 'random': any T frames,
            in their order; 'all': every frame. None is 'uniform' where num_frames is given, else
            'all'.
        stride: Distance between two frames of 'dense'; 1 takes consecutive ones.
        is_training: Whether to draw at random. Otherwise even 'random' draws the same frames each
            time.

    Raises:
        ValueError: For an unknown sampling, or a setting that it does not use.

    Example:
        >>> FrameSampler(4)(20).tolist()
        [2, 7, 12, 17]
        >>> FrameSampler(4, 'dense', stride=2)(20).tolist()
        [6, 8, 10, 12]
    """

    num_frames: int | None = None
    sampling: str | None = None
    stride: int = 1
    is_training: bool = False

    def __post_init__(self) -> None:
        if self.sampling is None:
            object.__setattr__(self, "sampling", "all" if self.num_frames is None else "uniform")
        if self.sampling not in SAMPLINGS:
            raise ValueError(f"no sampling {self.sampling!r}; it is one of {', '.join(SAMPLINGS)}.")
        if (self.num_frames is None) != (self.sampling == "all"):
            raise ValueError(
                f"sampling={self.sampling!r} does not go with num_frames={self.num_frames}; 'all' "
                "takes every frame, the others need to know how many."
            )
        if self.num_frames is not None and self.num_frames < 1:
            raise ValueError(f"num_frames must be at least 1, not {self.num_frames}.")
        if self.stride < 1:
            raise ValueError(f"stride must be at least 1, not {self.stride}.")
        if self.stride > 1 and self.sampling != "dense":
            raise ValueError(
                f"stride={self.stride} has no effect with sampling={self.sampling!r}, only with "
                "'dense'."
            )

    def __call__(self, count: int, key: Sequence[int] = (0, 0, 0)) -> np.ndarray:
        """Choose frames.

        Args:
            count: Frames of the clip, at least 1.
            key: (seed, epoch, sample), of which the choice is a function in training; without, only
                the sample counts.

        Returns:
            int64 array (T,), or less where the clip is shorter: ascending positions, none twice.
        """
        if count < 1:
            raise ValueError(f"a clip needs at least 1 frame, not {count}.")
        if self.num_frames is None:
            return np.arange(count)
        if not self.is_training:
            key = (0, 0, key[-1])
        rng = np.random.default_rng([number % 2**63 for number in key])
        wanted = min(self.num_frames, count)
        if self.sampling == "random":
            return np.sort(rng.choice(count, wanted, replace=False))
        if self.sampling == "dense":
            wanted = min(self.num_frames, -(-count // self.stride))
            last_start = count - 1 - (wanted - 1) * self.stride
            start = rng.integers(last_start + 1) if self.is_training else last_start // 2
            return start + self.stride * np.arange(wanted)
        segment = np.arange(wanted)
        if self.is_training:
            # Rounded borders: each frame is in exactly one segment, so that none is drawn twice or
            # never.
            return rng.integers(segment * count // wanted, (segment + 1) * count // wanted)
        return (2 * segment + 1) * count // (2 * wanted)
