"""Which frames of a clip are looked at."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from timm_branches.arguments import check_number

__all__ = ["SAMPLINGS", "BoundSampler", "FrameSampler"]

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
        rate: Frames a second, up to 1000, to choose among, whatever the video's own rate: for each
            moment 1 / rate apart the frame that is shown then, none twice. None chooses among all
            frames. Only videos have times.

    Raises:
        ValueError: For an unknown sampling, or a setting that it does not use.

    Example:
        >>> FrameSampler(4)(20).tolist()
        [2, 7, 12, 17]
        >>> FrameSampler(4, 'dense', stride=2)(20).tolist()
        [6, 8, 10, 12]
        >>> FrameSampler(rate=2)(5, times=[0, 0.4, 0.8, 1.2, 1.6]).tolist()
        [0, 1, 2, 3]
    """

    num_frames: int | None = None
    sampling: str | None = None
    stride: int = 1
    is_training: bool = False
    rate: float | None = None

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
        if self.rate is not None:
            check_number("rate=", self.rate, 0, 1000, above=True)

    def bound(self, key: Sequence[int]) -> "BoundSampler":
        """The sampler for one clip, as the clips' `read` takes it."""
        return BoundSampler(self, key)

    def __call__(
        self,
        count: int,
        key: Sequence[int] = (0, 0, 0),
        times: Sequence[float] | np.ndarray | None = None,
    ) -> np.ndarray:
        """Choose frames.

        Args:
            count: Frames of the clip, at least 1.
            key: (seed, epoch, sample), of which the choice is a function in training; without, only
                the sample counts.
            times: When each frame is shown, in seconds, ascending; needed for a `rate`.

        Returns:
            int64 array (T,), or less where the clip is shorter: ascending positions, none twice.

        Raises:
            ValueError: There is no frame, or times are missing.
        """
        if count < 1:
            raise ValueError(f"a clip needs at least 1 frame, not {count}.")
        if self.rate is None:
            return self._choose(count, key)
        if times is None:
            raise ValueError(f"rate={self.rate:g} needs the times of the frames: give a video.")
        moments = frames_at_rate(np.asarray(times, float), self.rate)
        return moments[self._choose(len(moments), key)]

    def _choose(self, count: int, key: Sequence[int]) -> np.ndarray:
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


class BoundSampler:
    """A sampler for one clip.

    Args:
        sampler: The sampler.
        key: As the sampler takes it.

    Attributes:
        needs_times: Whether it must be told when each frame is shown.
        chosen: The positions that it chose last.
    """

    def __init__(self, sampler: FrameSampler, key: Sequence[int]) -> None:
        self.sampler, self.key = sampler, key
        self.needs_times = sampler.rate is not None
        self.chosen: list[int] = []

    def __call__(self, count: int, times: np.ndarray | None = None) -> np.ndarray:
        """The positions, as the sampler chooses them."""
        positions = self.sampler(count, self.key, times)
        self.chosen = positions.tolist()
        return positions


def frames_at_rate(times: np.ndarray, rate: float) -> np.ndarray:
    """The positions of the frames that are shown at moments 1 / rate apart, none twice.

    Args:
        times: When each frame is shown, in seconds, ascending.
        rate: Moments a second; the first is that of the first frame.
    """
    # a hair later: a moment that is a frame's own, up to rounding, shows that frame
    moments = np.arange(int((times[-1] - times[0]) * rate + 1e-6) + 1) / rate + 1e-6 / rate
    return np.unique(np.searchsorted(times - times[0], moments, "right") - 1)
