"""Schedules that follow the training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from timm_branches.schedules.base import (
    LossWeightSchedule,
    Weights,
    check_epoch,
    check_weights,
    number,
)

__all__ = ["DynamicSchedule"]


class DynamicSchedule(LossWeightSchedule):
    """Weights that follow the levels' accuracies: the worse a level is, the more it counts.

    After each evaluation w_k = tau_k / sum_j tau_j with tau_k = b_k (1 - accuracy_k), b_k being the
    level's base weight. Until the first one, the weights are the base weights, divided by their
    sum.

    Source: Noor and Robles-Kelly, "H-CapsNet: A capsule network for hierarchical image
    classification", Pattern Recognition 147 (2024) 110135. They take training accuracies, and base
    weights by numbers of classes n_k: b_k in proportion to 1 - n_k / sum_j n_j. The floor is ours:
    without it a level without errors has no weight at all.

    Args:
        base: base weights, one per level, coarsest first, all positive.
        floor: errors 1 - accuracy below this count as this, so that no level's weight comes to 0:
            if all accuracies are known, it is at least `floor` times the level's share of the base
            weights. In (0, 1].

    Raises:
        ValueError: if weights are missing, not positive or not finite, or the floor is out of
            range.

    Example:
        >>> schedule = DynamicSchedule((1, 1))
        >>> schedule.update([0.9, 0.7], epoch=0)
        True
        >>> [round(w, 3) for w in schedule(1)]
        [0.25, 0.75]
    """

    kind = "dynamic"

    def __init__(self, base: Sequence[float], floor: float = 0.01) -> None:
        self.base = check_weights(base, "dynamic schedule")
        if not all(self.base):
            raise ValueError(
                f"dynamic schedule: each base weight must be positive, got {self.base}; with 0 a "
                f"level could never get another."
            )
        if isinstance(floor, bool) or not isinstance(floor, (int, float)) or not 0 < floor <= 1:
            raise ValueError(
                f"dynamic schedule: floor must be a number above 0 and at most 1, got {floor!r}."
            )
        self.floor = float(floor)
        # epoch -> weights from that epoch on; a later epoch is further down
        self._weights: dict[int, Weights] = {0: tuple(b / sum(self.base) for b in self.base)}

    @property
    def num_levels(self) -> int:
        """Number of weights, coarsest level first."""
        return len(self.base)

    def __call__(self, epoch: float) -> Weights:
        """The weights used during `epoch`.

        For past epochs those that were used, for later ones as they stand now.
        """
        epoch = check_epoch(epoch)
        return self._weights[max(start for start in self._weights if start <= epoch)]

    def update(self, accuracies: Sequence[float], epoch: int) -> bool:
        """Set the weights from epoch + 1 on. A level without an accuracy (NaN) keeps its weight."""
        start = check_epoch(epoch) + 1
        if start != int(start):
            raise ValueError(
                f"Accuracies are taken at the end of an epoch, a whole number; got {epoch!r}."
            )
        errors = [1 - float(accuracy) for accuracy in accuracies]
        if len(errors) != self.num_levels:
            raise ValueError(
                f"There must be one accuracy a level: got {len(errors)} accuracies for "
                f"{self.num_levels} levels."
            )
        if not all(0 <= error <= 1 or math.isnan(error) for error in errors):
            raise ValueError(
                f"Accuracies must be fractions between 0 and 1, not percent (or NaN: unknown), got "
                f"{list(accuracies)}."
            )
        # if training was taken up again at an earlier epoch, what came later is void
        for first in list(self._weights):
            if first >= start:
                del self._weights[first]
        old = self(epoch)
        known = [k for k, error in enumerate(errors) if not math.isnan(error)]
        tau = {k: self.base[k] * max(errors[k], self.floor) for k in known}
        # the levels without an accuracy keep their weight, the others share out the rest
        rest = sum(old[k] for k in known)
        total = sum(tau.values())
        new = list(old)
        for k in known:
            new[k] = rest * tau[k] / total
        self._weights[int(start)] = tuple(new)
        return True

    def table(self, epochs: int) -> list[Weights]:
        """The weights of epochs 0 to `epochs` - 1.

        They must not go beyond the epoch after the last evaluation.

        Raises:
            ValueError: also if they do: these weights depend on accuracies to come.
        """
        weights, known = super().table(epochs), max(self._weights) + 1
        if epochs > known:
            raise ValueError(
                f"A dynamic schedule follows the accuracies, so its weights are not known in "
                f"advance: only those of {known} epochs so far, not of {epochs}."
            )
        return weights

    def to_dict(self) -> dict[str, Any]:
        """Base weights, floor, and the weights of each epoch so far."""
        return {
            "kind": self.kind,
            "base": list(self.base),
            "floor": self.floor,
            "weights": [[start, list(weights)] for start, weights in self._weights.items()],
        }

    @classmethod
    def from_settings(cls, data: Mapping[str, Any]) -> DynamicSchedule:
        """The inverse of :meth:`to_dict`."""
        schedule = cls(data.get("base", ()), data.get("floor", 0.01))
        if "weights" not in data:
            return schedule
        stored: dict[int, Weights] = {}
        try:
            for start, weights in data["weights"]:
                stored[int(start)] = check_weights(weights, f"epoch {start}")
        except (TypeError, ValueError):
            stored = {}
        lengths = {len(weights) for weights in stored.values()}
        if 0 not in stored or lengths != {schedule.num_levels}:
            raise ValueError(
                f"'weights' of a 'dynamic' schedule must be pairs [epoch, [weight, ...]] from "
                f"epoch 0 on, with a weight for each of {schedule.num_levels} levels; got "
                f"{data['weights']!r}."
            )
        schedule._weights = stored
        return schedule

    @classmethod
    def from_text(cls, text: str) -> DynamicSchedule:
        """Read base weights `w,w,w`, or `w,w,w;floor=f`."""
        if not text:
            raise ValueError(
                "'dynamic:' does not say for how many levels: give base weights, as in "
                "'dynamic:1,1,1', or call get_schedule('dynamic', num_levels=3)."
            )
        weights, semicolon, option = text.partition(";")
        base: Any = weights.split(",")  # text numbers are read as numbers
        if not semicolon:
            return cls(base)
        name, _, value = option.partition("=")
        try:
            floor = float(value)
        except ValueError:
            name = ""
        if name.lower() != "floor":
            raise ValueError(
                f"cannot read {option!r} in the schedule {'dynamic:' + text!r}; the form is "
                f"'dynamic:w,w,...;floor=0.01'."
            )
        return cls(base, floor)

    @classmethod
    def for_levels(cls, num_levels: int) -> DynamicSchedule:
        """Equal base weights."""
        return cls([1 / num_levels] * num_levels)

    def __repr__(self) -> str:
        return f"DynamicSchedule({self.base}, floor={self.floor})"

    def __str__(self) -> str:
        """The compact text that :func:`parse_schedule` reads.

        The definition, not the weights of so far.
        """
        floor = "" if self.floor == 0.01 else f";floor={number(self.floor)}"
        return f"dynamic:{','.join(map(number, self.base))}{floor}"
