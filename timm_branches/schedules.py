"""Loss-weight schedules: how much each level's loss counts in each epoch.

A branch network is trained on one loss, the weighted sum of its levels' losses. B-CNN's "branch training strategy"
moves the weight from the coarse level to the fine one as training proceeds. A schedule answers one question,
`schedule(epoch)`: the weights used *during* that epoch. Epochs count from 0, as timm's training loop does, and a
key in a schedule is the first epoch in which its weights act. Keras code that switches weights "at the end of
epoch 8", as B-CNN's does, is therefore written with key 9 here.

Nothing in this module needs torch: a schedule can be printed, plotted or stored anywhere.

Source: Zhu and Bain, "B-CNN: Branch Convolutional Neural Network for Hierarchical Classification", arXiv:1709.09890.
"""
from __future__ import annotations

import difflib
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

__all__ = ["PRESETS", "ConstantSchedule", "CosineSchedule", "LinearSchedule", "LossWeightSchedule", "StepSchedule",
           "get_schedule", "parse_schedule"]

Weights = tuple[float, ...]
_KINDS: dict[str, type[LossWeightSchedule]] = {}


def _check_weights(weights: Any, where: str) -> Weights:
    """One set of weights as a tuple of floats, or a ValueError that says what is wrong with it."""
    if isinstance(weights, str) or not isinstance(weights, Sequence):
        raise ValueError(f"{where}: weights must be a sequence with one number per level, got {weights!r}")
    try:
        values = tuple(float(w) for w in weights)
    except (TypeError, ValueError):
        raise ValueError(f"{where}: weights must be numbers, got {weights!r}") from None
    if not values:
        raise ValueError(f"{where}: no weights given; there must be one per level")
    if not all(map(math.isfinite, values)):
        raise ValueError(f"{where}: weights must be finite, got {values}")
    if min(values) < 0:
        raise ValueError(f"{where}: weights must not be negative (the loss of that level would grow), got {values}")
    if not any(values):
        raise ValueError(f"{where}: all weights are 0, nothing would be learned; at least one must be positive")
    return values


def _check_epoch(epoch: Any, what: str = "epoch") -> float:
    """An epoch as a number from 0 upwards; numeric strings (the keys of JSON objects) are read as numbers."""
    try:
        value = math.nan if isinstance(epoch, bool) else float(epoch)
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"{what} must be a finite number from 0 upwards, got {epoch!r}")
    return int(value) if value == int(value) else value


def _number(value: float) -> str:
    """The shortest text that reads back as exactly this number."""
    return repr(int(value)) if value == int(value) and abs(value) < 1e15 else repr(float(value))


class LossWeightSchedule(ABC):
    """The weights of the levels' losses as a function of the epoch.

    A subclass with a class attribute `kind` enters the registry that :meth:`from_dict` reads. It implements
    `__call__`, `num_levels`, `to_dict` and `_from_dict`; a checkpoint needs the last two.
    """
    kind: ClassVar[str] = ""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__dict__.get("kind"):
            _KINDS[cls.kind] = cls

    @property
    @abstractmethod
    def num_levels(self) -> int:
        """Number of weights, coarsest level first."""

    @abstractmethod
    def __call__(self, epoch: float) -> Weights:
        """The weights used during `epoch`.

        Args:
            epoch: 0-based; 9 is the tenth epoch. A fraction is a point inside the epoch (8.5: half way through the
                ninth), which only schedules that change gradually tell apart from its beginning.

        Returns:
            One float per level, coarsest first.

        Raises:
            ValueError: if `epoch` is negative or not a finite number.
        """

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """The whole definition as JSON-safe data; :meth:`from_dict` is its inverse."""

    @classmethod
    @abstractmethod
    def _from_dict(cls, data: Mapping[str, Any]) -> LossWeightSchedule:
        """The inverse of :meth:`to_dict` for this kind."""

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
        if not isinstance(kind, str) or kind not in _KINDS:
            raise ValueError(f"a schedule needs a 'kind', one of {', '.join(sorted(_KINDS))}; got {data!r}")
        return _KINDS[kind]._from_dict(data)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must keep; JSON-safe. For schedules without memory this is their definition."""
        return self.to_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue with the schedule of a checkpoint.

        Raises:
            ValueError: if `state` is of another kind, or for another number of levels; nothing is changed then.
        """
        other = LossWeightSchedule.from_dict(state)
        if type(other) is not type(self):
            raise ValueError(f"the checkpoint holds a {other.kind!r} schedule, this is a {self.kind!r} schedule; build "
                             f"it with LossWeightSchedule.from_dict(state) instead")
        _check_levels(other, self.num_levels)
        self.__dict__.update(other.__dict__)

    def table(self, epochs: int) -> list[Weights]:
        """The weights of epochs 0 to `epochs` - 1, to print or to plot.

        Raises:
            ValueError: if `epochs` is negative or not a whole number.
        """
        if isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 0:
            raise ValueError(f"epochs must be a whole number from 0 upwards, got {epochs!r}")
        return [self(epoch) for epoch in range(epochs)]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, LossWeightSchedule):
            return NotImplemented
        return type(self) is type(other) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]  # load_state_dict changes the object, so it must not be a dict key


class _KeyedSchedule(LossWeightSchedule):
    """A schedule given by weights at some epochs; subclasses say what holds between them."""
    whole_epochs: ClassVar[bool] = False

    def __init__(self, points: Mapping[Any, Sequence[float]]) -> None:
        """
        Args:
            points: epoch -> weights, one weight per level, coarsest first. Epoch 0 must be among them.

        Raises:
            ValueError: if there is no epoch 0, an epoch is not a number from 0 upwards, the numbers of weights
                differ, or weights are negative, not finite or all zero.
        """
        if not isinstance(points, Mapping):
            raise ValueError(f"points must map an epoch to weights, as {{0: (0.9, 0.1), 5: (0, 1)}}; got {points!r}")
        checked: dict[float, Weights] = {}
        for key, weights in points.items():
            epoch = _check_epoch(key, "the epoch of a point")
            if self.whole_epochs and epoch != int(epoch):
                raise ValueError(f"the epoch of a step must be a whole number (weights change between epochs): {key!r}")
            if epoch in checked:  # {'0': ..., 0: ...}: which of them was meant is anybody's guess
                raise ValueError(f"epoch {_number(epoch)} is given twice")
            checked[epoch] = _check_weights(weights, f"epoch {_number(epoch)}")
        if 0 not in checked:
            raise ValueError(f"no weights for epoch 0: epochs count from 0, and the keys given are {sorted(checked)}")
        if len({len(weights) for weights in checked.values()}) > 1:
            lengths = ", ".join(f"epoch {_number(e)}: {len(w)}" for e, w in sorted(checked.items()))
            raise ValueError(f"each epoch needs the same number of weights, one per level; got {lengths}")
        self._epochs = tuple(sorted(checked))
        self._weights = tuple(checked[epoch] for epoch in self._epochs)

    @property
    def points(self) -> dict[float, Weights]:
        """Epoch -> weights, in order of epochs."""
        return dict(zip(self._epochs, self._weights, strict=True))

    @property
    def num_levels(self) -> int:
        return len(self._weights[0])

    def __call__(self, epoch: float) -> Weights:
        epoch = _check_epoch(epoch)
        last = sum(key <= epoch for key in self._epochs) - 1  # the point in force; there always is one, at epoch 0
        if last == len(self._epochs) - 1 or epoch == self._epochs[last]:
            return self._weights[last]  # exactly the numbers given, without rounding
        start, stop = self._epochs[last], self._epochs[last + 1]
        share = self._share((epoch - start) / (stop - start))
        return tuple((1 - share) * a + share * b
                     for a, b in zip(self._weights[last], self._weights[last + 1], strict=True))

    def _share(self, progress: float) -> float:
        """The share of the next point's weights at `progress` (0 to 1) of the way to it."""
        return 0.0

    def to_dict(self) -> dict[str, Any]:
        # pairs rather than an object: JSON would turn the keys into strings
        return {"kind": self.kind, "points": [[epoch, list(weights)] for epoch, weights in self.points.items()]}

    @classmethod
    def _from_dict(cls, data: Mapping[str, Any]) -> LossWeightSchedule:
        points = data.get("points")
        if isinstance(points, Mapping):
            return cls(points)
        if not isinstance(points, Sequence) or not all(isinstance(p, Sequence) and len(p) == 2 for p in points):
            raise ValueError(f"a {cls.kind!r} schedule needs 'points', which must hold pairs [epoch, [weight, ...]]; "
                             f"got {data!r}")
        if len({str(epoch) for epoch, _ in points}) < len(points):
            raise ValueError(f"'points' gives an epoch twice: {[epoch for epoch, _ in points]}")
        return cls(dict(points))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.points})"

    def __str__(self) -> str:
        """The compact text that :func:`parse_schedule` reads."""
        parts = (f"{_number(e)}:{','.join(map(_number, w))}" for e, w in self.points.items())
        return f"{self.kind}:{';'.join(parts)}"


class StepSchedule(_KeyedSchedule):
    """Weights that jump: those given for epoch k act from epoch k until the next key. B-CNN's kind.

    Example:
        >>> schedule = StepSchedule({0: (0.98, 0.01, 0.01), 9: (0.1, 0.8, 0.1), 19: (0.1, 0.2, 0.7), 29: (0, 0, 1)})
        >>> schedule(8), schedule(9)
        ((0.98, 0.01, 0.01), (0.1, 0.8, 0.1))
    """
    kind = "step"
    whole_epochs = True


class LinearSchedule(_KeyedSchedule):
    """Weights on straight lines between the points given, constant after the last.

    Example:
        >>> LinearSchedule({0: (1, 0), 10: (0, 1)})(2.5)
        (0.75, 0.25)
    """
    kind = "linear"

    def _share(self, progress: float) -> float:
        return progress


class CosineSchedule(_KeyedSchedule):
    """Weights that leave each point and reach the next smoothly, along half a cosine; constant after the last.

    Example:
        >>> [round(w, 3) for w in CosineSchedule({0: (1, 0), 4: (0, 1)})(1)]
        [0.854, 0.146]
    """
    kind = "cosine"

    def _share(self, progress: float) -> float:
        return (1 - math.cos(math.pi * progress)) / 2


class ConstantSchedule(_KeyedSchedule):
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
        self.weights = _check_weights(weights, "constant schedule")
        super().__init__({0: self.weights})

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "weights": list(self.weights)}

    @classmethod
    def _from_dict(cls, data: Mapping[str, Any]) -> LossWeightSchedule:
        return cls(data.get("weights", ()))

    def __repr__(self) -> str:
        return f"ConstantSchedule({self.weights})"

    def __str__(self) -> str:
        return f"constant:{','.join(map(_number, self.weights))}"


# B-CNN's four phases; the official code uses these weights on CIFAR-10 and on CIFAR-100
_BCNN: tuple[Weights, ...] = ((0.98, 0.01, 0.01), (0.1, 0.8, 0.1), (0.1, 0.2, 0.7), (0.0, 0.0, 1.0))
# name -> points of a step schedule. The official Keras code switches in on_epoch_end of epochs 8, 18, 28 (CIFAR-10)
# and 13, 23, 33 (CIFAR-100), so the new weights act one epoch later.
PRESETS: dict[str, dict[int, Weights]] = {
    "bcnn-cifar10": dict(zip((0, 9, 19, 29), _BCNN, strict=True)),
    "bcnn-cifar100": dict(zip((0, 14, 24, 34), _BCNN, strict=True)),
    # the widespread PyTorch rewrite on VGG16-BN tests `epoch > 12` inside the epoch, and so switches one epoch earlier
    "bcnn-vgg16-bn": dict(zip((0, 13, 23, 33), _BCNN, strict=True)),
}
_EQUAL = ("equal", "constant")  # presets that fit any number of levels


def parse_schedule(text: str) -> LossWeightSchedule:
    """Read the compact text form, made for command lines.

    Args:
        text: `'[kind:]epoch:w,w,w;epoch:w,w,w'` with kind `step` (the default), `linear` or `cosine`; or
            `'[constant:]w,w,w'`. Blanks are ignored. `str(schedule)` writes this form.

    Raises:
        ValueError: if the text is not of this form, or the schedule it describes is not valid.

    Example:
        >>> parse_schedule('0:0.98,0.01,0.01; 9:0.1,0.8,0.1')
        StepSchedule({0: (0.98, 0.01, 0.01), 9: (0.1, 0.8, 0.1)})
        >>> parse_schedule('linear:0:1,0;10:0,1')(5)
        (0.5, 0.5)
    """
    form = "'[step|linear|cosine:]epoch:w,w,...;epoch:w,w,...' or '[constant:]w,w,...'"
    compact = "".join(text.split())
    kind, colon, rest = compact.partition(":")
    classes: dict[str, type[_KeyedSchedule]] = {c.kind: c for c in (StepSchedule, LinearSchedule, CosineSchedule)}
    if not colon and kind not in classes:
        kind, rest = "constant", compact
    if kind == "constant":
        return ConstantSchedule(rest.split(","))  # type: ignore[arg-type]  # text numbers are read as numbers
    if kind not in classes:
        kind, rest = "step", compact
    points: dict[str, Sequence[Any]] = {}
    for part in filter(None, rest.split(";")):
        epoch, colon, weights = part.partition(":")
        if not colon or ":" in weights:
            raise ValueError(f"cannot read {part!r} in the schedule {text!r}; the form is {form}")
        if epoch in points:
            raise ValueError(f"epoch {epoch} is given twice in the schedule {text!r}")
        points[epoch] = weights.split(",")
    return classes[kind](points)


def _check_levels(schedule: LossWeightSchedule, num_levels: int | None) -> LossWeightSchedule:
    if num_levels is not None and schedule.num_levels != num_levels:
        raise ValueError(f"the schedule has weights for {schedule.num_levels} levels, but there are {num_levels} "
                         f"levels here; give {num_levels} weights per epoch")
    return schedule


def get_schedule(schedule: str | LossWeightSchedule | Mapping[Any, Any] | Sequence[float],
                 num_levels: int | None = None) -> LossWeightSchedule:
    """A schedule from whatever a user may write for one.

    Args:
        schedule: a schedule; the name of a preset ('bcnn-cifar10', 'bcnn-cifar100', 'bcnn-vgg16-bn', or
            'equal' = 'constant': 1/L for each of L levels, so that the weights add up to one as B-CNN's do); the text
            of :func:`parse_schedule`; a dict of :meth:`LossWeightSchedule.to_dict`, or of epoch -> weights for steps;
            or plain weights, which never change.
        num_levels: how many levels the model has, to be checked; 'equal' and 'constant' need it.

    Raises:
        ValueError: if the name is unknown (the message lists the names), the schedule is for another number of levels,
            or its definition is not valid.

    Example:
        >>> get_schedule('bcnn-cifar10', num_levels=3)(29)
        (0.0, 0.0, 1.0)
        >>> get_schedule('equal', num_levels=2)
        ConstantSchedule((0.5, 0.5))
    """
    if isinstance(schedule, LossWeightSchedule):
        made = schedule
    elif isinstance(schedule, Mapping):
        made = LossWeightSchedule.from_dict(schedule) if "kind" in schedule else StepSchedule(schedule)
    elif isinstance(schedule, str):
        made = _named(schedule, num_levels)
    elif isinstance(schedule, Sequence):
        made = ConstantSchedule([*schedule])
    else:
        raise ValueError(f"a schedule is a name, a text, a dict, weights or a LossWeightSchedule, got {schedule!r}")
    return _check_levels(made, num_levels)


def _named(text: str, num_levels: int | None) -> LossWeightSchedule:
    name = text.strip().lower()
    if name in PRESETS:
        return StepSchedule(PRESETS[name])
    if name in _EQUAL:
        if num_levels is None or num_levels < 1:
            raise ValueError(f"{name!r} needs num_levels, the number of levels of the model, got {num_levels!r}")
        return ConstantSchedule([1 / num_levels] * num_levels)
    if ":" in name or "," in name:
        return parse_schedule(name)
    close = difflib.get_close_matches(name, [*PRESETS, *_EQUAL], n=1)
    raise ValueError(f'unknown schedule {text!r}; the names are {", ".join([*PRESETS, *_EQUAL])}'
                     + (f" (did you mean {close[0]!r}?)" if close else "")
                     + "; or write one as '0:0.98,0.01,0.01;9:0.1,0.8,0.1'")
