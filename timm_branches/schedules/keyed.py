"""Schedules that are written down in advance, as weights at some epochs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from timm_branches.schedules.base import (
    LossWeightSchedule,
    Weights,
    check_epoch,
    check_weights,
    number,
)

__all__ = ["ConstantSchedule", "CosineSchedule", "KeyedSchedule", "LinearSchedule", "StepSchedule"]


TEXT_FORM = "'[step|linear|cosine:]epoch:w,w,...;epoch:w,w,...' or '[constant:|dynamic:]w,w,...'"


class KeyedSchedule(LossWeightSchedule):
    """A schedule given by weights at some epochs; subclasses say what holds between them."""

    whole_epochs: ClassVar[bool] = False

    def __init__(self, points: Mapping[Any, Sequence[float]]) -> None:
        """Check and sort the points.

        Args:
            points: epoch -> weights, one weight per level, coarsest first. Epoch 0 must be among
                them.

        Raises:
            ValueError: if there is no epoch 0, an epoch is not a number from 0 upwards, the numbers
                of weights differ, or weights are negative, not finite or all zero.
        """
        if not isinstance(points, Mapping):
            raise ValueError(
                f"points must map an epoch to weights, as {{0: (0.9, 0.1), 5: (0, 1)}}; got "
                f"{points!r}."
            )
        checked: dict[float, Weights] = {}
        for key, weights in points.items():
            epoch = check_epoch(key, "the epoch of a point")
            if self.whole_epochs and epoch != int(epoch):
                raise ValueError(
                    f"the epoch of a step must be a whole number, as weights change between "
                    f"epochs: {key!r}."
                )
            if epoch in checked:  # {'0': ..., 0: ...}: which of them was meant is anybody's guess
                raise ValueError(f"epoch {number(epoch)} is given twice.")
            checked[epoch] = check_weights(weights, f"epoch {number(epoch)}")
        if 0 not in checked:
            raise ValueError(
                f"There are no weights for epoch 0: epochs count from 0, and the keys given are "
                f"{sorted(checked)}."
            )
        if len({len(weights) for weights in checked.values()}) > 1:
            lengths = [f"epoch {number(e)}: {len(w)}" for e, w in sorted(checked.items())]
            raise ValueError(
                f"Each epoch needs the same number of weights, one per level; got "
                f"{', '.join(lengths)}."
            )
        self._epochs = tuple(sorted(checked))
        self._weights = tuple(checked[epoch] for epoch in self._epochs)

    @property
    def points(self) -> dict[float, Weights]:
        """Epoch -> weights, in order of epochs."""
        return dict(zip(self._epochs, self._weights, strict=True))

    @property
    def num_levels(self) -> int:
        """Number of weights, coarsest level first."""
        return len(self._weights[0])

    def __call__(self, epoch: float) -> Weights:
        """The weights used during `epoch`."""
        epoch = check_epoch(epoch)
        # the point in force; there always is one, at epoch 0
        last = sum(key <= epoch for key in self._epochs) - 1
        if last == len(self._epochs) - 1 or epoch == self._epochs[last]:
            return self._weights[last]  # exactly the numbers given, without rounding
        start, stop = self._epochs[last], self._epochs[last + 1]
        share = self._share((epoch - start) / (stop - start))
        ends = zip(self._weights[last], self._weights[last + 1], strict=True)
        return tuple((1 - share) * a + share * b for a, b in ends)

    def _share(self, progress: float) -> float:
        """The share of the next point's weights at `progress` (0 to 1) of the way to it."""
        return 0.0

    def to_dict(self) -> dict[str, Any]:
        """The kind, and the points as pairs: JSON would turn the keys of an object into strings."""
        points = [[epoch, list(weights)] for epoch, weights in self.points.items()]
        return {"kind": self.kind, "points": points}

    @classmethod
    def from_settings(cls, data: Mapping[str, Any]) -> LossWeightSchedule:
        """The inverse of :meth:`to_dict`; the points may be a mapping, too."""
        points = data.get("points")
        if isinstance(points, Mapping):
            return cls(points)
        are_pairs = isinstance(points, Sequence) and all(
            isinstance(point, Sequence) and len(point) == 2 for point in points
        )
        if not are_pairs:
            raise ValueError(
                f"A {cls.kind!r} schedule needs 'points', which must hold pairs "
                f"[epoch, [weight, ...]]; got {data!r}."
            )
        assert points is not None
        epochs = [epoch for epoch, _ in points]
        if len({str(epoch) for epoch in epochs}) < len(epochs):
            raise ValueError(f"'points' gives an epoch twice: {epochs}.")
        return cls(dict(points))

    @classmethod
    def from_text(cls, text: str) -> LossWeightSchedule:
        """Read `epoch:w,w,w;epoch:w,w,w`."""
        points: dict[str, Sequence[Any]] = {}
        for part in filter(None, text.split(";")):
            epoch, colon, weights = part.partition(":")
            if not colon or ":" in weights:
                raise ValueError(
                    f"cannot read {part!r} in the schedule {text!r}; the form is {TEXT_FORM}."
                )
            if epoch in points:
                raise ValueError(f"epoch {epoch} is given twice in the schedule {text!r}.")
            points[epoch] = weights.split(",")
        return cls(points)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.points})"

    def __str__(self) -> str:
        """The compact text that :func:`parse_schedule` reads."""
        parts = (f"{number(e)}:{','.join(map(number, w))}" for e, w in self.points.items())
        return f"{self.kind}:{';'.join(parts)}"


class StepSchedule(KeyedSchedule):
    """Weights that jump: those given for epoch k act from epoch k until the next key. B-CNN's kind.

    Example:
        >>> schedule = StepSchedule({0: (0.98, 0.01, 0.01), 9: (0.1, 0.8, 0.1), 19: (0, 0, 1)})
        >>> schedule(8), schedule(9)
        ((0.98, 0.01, 0.01), (0.1, 0.8, 0.1))
    """

    kind = "step"
    whole_epochs = True


class LinearSchedule(KeyedSchedule):
    """Weights on straight lines between the points given, constant after the last.

    Example:
        >>> LinearSchedule({0: (1, 0), 10: (0, 1)})(2.5)
        (0.75, 0.25)
    """

    kind = "linear"

    def _share(self, progress: float) -> float:
        return progress


class CosineSchedule(KeyedSchedule):
    """Weights on half a cosine from each point to the next, constant after the last.

    Example:
        >>> [round(w, 3) for w in CosineSchedule({0: (1, 0), 4: (0, 1)})(1)]
        [0.854, 0.146]
    """

    kind = "cosine"

    def _share(self, progress: float) -> float:
        return (1 - math.cos(math.pi * progress)) / 2


class ConstantSchedule(KeyedSchedule):
    """The same weights in every epoch.

    Args:
        weights: one per level, coarsest first.

    Raises:
        ValueError: if weights are missing, negative, not finite or all zero.

    Example:
        >>> ConstantSchedule((0.2, 0.3, 0.5))(17)
        (0.2, 0.3, 0.5)
    """

    kind = "constant"

    def __init__(self, weights: Sequence[float]) -> None:
        self.weights = check_weights(weights, "constant schedule")
        super().__init__({0: self.weights})

    def to_dict(self) -> dict[str, Any]:
        """The kind and the weights."""
        return {"kind": self.kind, "weights": list(self.weights)}

    @classmethod
    def from_settings(cls, data: Mapping[str, Any]) -> LossWeightSchedule:
        """The inverse of :meth:`to_dict`."""
        return cls(data.get("weights", ()))

    @classmethod
    def from_text(cls, text: str) -> LossWeightSchedule:
        """Read `w,w,w`."""
        return cls(text.split(","))  # type: ignore[arg-type]  # text numbers are read as numbers

    @classmethod
    def for_levels(cls, num_levels: int) -> LossWeightSchedule:
        """1/L for each of L levels, so that the weights add up to one as B-CNN's do."""
        return cls([1 / num_levels] * num_levels)

    def __repr__(self) -> str:
        return f"ConstantSchedule({self.weights})"

    def __str__(self) -> str:
        return f"constant:{','.join(map(number, self.weights))}"
