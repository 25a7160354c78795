"""What a loss-weight schedule is, and the checks of its numbers."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

__all__ = [
    "KINDS",
    "LossWeightSchedule",
    "Weights",
    "check_epoch",
    "check_levels",
    "check_weights",
    "number",
]

Weights = tuple[float, ...]
KINDS: dict[str, type[LossWeightSchedule]] = {}  # the classes by kind


def check_weights(weights: Any, where: str) -> Weights:
    """One set of weights as a tuple of floats, or a ValueError that says what is wrong with it."""
    if isinstance(weights, str) or not isinstance(weights, Sequence):
        raise ValueError(
            f"{where}: weights must be a sequence with one number per level, got {weights!r}."
        )
    try:
        values = tuple(float(w) for w in weights)
    except (TypeError, ValueError):
        raise ValueError(f"{where}: weights must be numbers, got {weights!r}.") from None
    if not values:
        raise ValueError(f"{where}: no weights given; there must be one per level.")
    if not all(map(math.isfinite, values)):
        raise ValueError(f"{where}: weights must be finite, got {values}.")
    if min(values) < 0:
        raise ValueError(
            f"{where}: weights must not be negative (the loss of that level would grow), got "
            f"{values}."
        )
    if not any(values):
        raise ValueError(
            f"{where}: all weights are 0, nothing would be learned; at least one must be positive."
        )
    return values


def check_epoch(epoch: Any, what: str = "epoch") -> float:
    """An epoch as a number from 0 upwards.

    Numeric strings (the keys of JSON objects) are read as numbers.
    """
    try:
        value = math.nan if isinstance(epoch, bool) else float(epoch)
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"{what} must be a finite number from 0 upwards, got {epoch!r}.")
    return int(value) if value == int(value) else value


def number(value: float) -> str:
    """The shortest text that reads back as exactly this number."""
    if value == int(value) and abs(value) < 1e15:
        return repr(int(value))
    return repr(float(value))


def check_levels(schedule: LossWeightSchedule, num_levels: int | None) -> LossWeightSchedule:
    """The schedule, or a ValueError if it is for another number of levels."""
    if num_levels is not None and schedule.num_levels != num_levels:
        raise ValueError(
            f"The schedule has weights for {schedule.num_levels} levels, but there are "
            f"{num_levels} levels here; give {num_levels} weights per epoch."
        )
    return schedule


def _origin(cls: type) -> tuple[str, str]:
    return cls.__module__, cls.__qualname__


class LossWeightSchedule(ABC):
    """The weights of the levels' losses as a function of the epoch.

    A subclass with a class attribute `kind` is registered under this name by being defined. It
    implements `__call__`, `num_levels`, `to_dict` and `from_settings`; a checkpoint needs the last
    two. With `from_text`, `--schedule 'kind:text'` makes one, with `for_levels`, `--schedule kind`.

    Raises:
        ValueError: When a subclass is defined whose kind another class has.

    Example:
        >>> class Decay(LossWeightSchedule):
        ...     kind = 'decay'
        ...     num_levels = 2
        ...
        ...     def __init__(self, rate):
        ...         self.rate = float(rate)
        ...
        ...     def __call__(self, epoch):
        ...         return (self.rate**epoch, 1.0)
        ...
        ...     def to_dict(self):
        ...         return {'kind': self.kind, 'rate': self.rate}
        ...
        ...     @classmethod
        ...     def from_settings(cls, data):
        ...         return cls(data['rate'])
        ...
        ...     @classmethod
        ...     def from_text(cls, text):
        ...         return cls(text)
        >>> from timm_branches.schedules import get_schedule
        >>> get_schedule('decay:0.5')(2)
        (0.25, 1.0)
    """

    kind: ClassVar[str] = ""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not cls.__dict__.get("kind"):
            return
        earlier = KINDS.get(cls.kind)
        # the same class again is a module or a notebook's cell that is run again
        if earlier is not None and _origin(earlier) != _origin(cls):
            raise ValueError(
                f"{earlier.__qualname__} is the schedule of kind {cls.kind!r} already; give "
                f"{cls.__qualname__} another kind."
            )
        KINDS[cls.kind] = cls

    @property
    @abstractmethod
    def num_levels(self) -> int:
        """Number of weights, coarsest level first."""

    @abstractmethod
    def __call__(self, epoch: float) -> Weights:
        """The weights used during `epoch`.

        Args:
            epoch: 0-based; 9 is the tenth epoch. A fraction is a point inside the epoch (8.5: half
                way through the ninth), which only schedules that change gradually tell apart from
                its beginning.

        Returns:
            One float per level, coarsest first.

        Raises:
            ValueError: if `epoch` is negative or not a finite number.
        """

    def update(self, accuracies: Sequence[float], epoch: int) -> bool:
        """Take note of an evaluation. Most schedules are fixed in advance and ignore it.

        Args:
            accuracies: one per level, coarsest first, fractions in [0, 1]; NaN for a level without
                labels. The same on all processes.
            epoch: the 0-based epoch after which they were measured.

        Returns:
            Whether the weights of later epochs may be others now.

        Raises:
            ValueError: if a schedule that makes use of them gets wrong numbers; it does not change
                then.
        """
        return False

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """The whole definition as JSON-safe data; :meth:`from_dict` is its inverse."""

    @classmethod
    @abstractmethod
    def from_settings(cls, data: Mapping[str, Any]) -> LossWeightSchedule:
        """The inverse of :meth:`to_dict` for this kind."""

    @classmethod
    def from_text(cls, text: str) -> LossWeightSchedule:
        """A schedule from what stands behind `kind:` on a command line.

        Args:
            text: Without blanks.

        Raises:
            ValueError: The text is not of this kind's form, or this kind has none.
        """
        raise ValueError(f"A schedule of kind {cls.kind!r} cannot be written as text.")

    @classmethod
    def for_levels(cls, num_levels: int) -> LossWeightSchedule:
        """The schedule that the bare name of this kind means for so many levels.

        Raises:
            ValueError: This kind needs more than that.
        """
        raise ValueError(
            f"A schedule of kind {cls.kind!r} needs settings: write it as {cls.kind + ':...'!r}."
        )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LossWeightSchedule:
        """Rebuild a schedule of any registered kind.

        Args:
            data: what :meth:`to_dict` returned, also after a trip through JSON.

        Raises:
            ValueError: if the kind is missing or unknown, or the definition is not valid.

        Example:
            >>> LossWeightSchedule.from_dict({'kind': 'step', 'points': [[0, [1, 0]], [3, [0, 1]]]})
            StepSchedule({0: (1.0, 0.0), 3: (0.0, 1.0)})
        """
        kind = data.get("kind") if isinstance(data, Mapping) else None
        if not isinstance(kind, str) or kind not in KINDS:
            raise ValueError(
                f"A schedule needs a 'kind', one of {', '.join(sorted(KINDS))}; got {data!r}. A "
                f"kind from elsewhere is known once the module that defines it is imported."
            )
        return KINDS[kind].from_settings(data)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must keep.

        JSON-safe. For schedules without memory this is their definition.
        """
        return self.to_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue with the schedule of a checkpoint.

        Raises:
            ValueError: if `state` is of another kind, or for another number of levels; nothing is
                changed then.
        """
        other = LossWeightSchedule.from_dict(state)
        if type(other) is not type(self):
            raise ValueError(
                f"The checkpoint holds a {other.kind!r} schedule, this is a {self.kind!r} "
                f"schedule; build it with LossWeightSchedule.from_dict(state) instead."
            )
        check_levels(other, self.num_levels)
        self.__dict__.update(other.__dict__)

    def table(self, epochs: int) -> list[Weights]:
        """The weights of epochs 0 to `epochs` - 1, to print or to plot.

        Raises:
            ValueError: if `epochs` is negative or not a whole number.
        """
        if isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 0:
            raise ValueError(f"epochs must be a whole number from 0 upwards, got {epochs!r}.")
        return [self(epoch) for epoch in range(epochs)]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, LossWeightSchedule):
            return NotImplemented
        return type(self) is type(other) and self.to_dict() == other.to_dict()

    # load_state_dict changes the object, so it must not be a dict key
    __hash__ = None  # type: ignore[assignment]
