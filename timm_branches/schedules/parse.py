"""Schedules from what a person writes: a preset's name, a short text, a dict or plain weights."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from timm_branches.schedules.adaptive import DynamicSchedule
from timm_branches.schedules.base import LossWeightSchedule, Weights, check_levels
from timm_branches.schedules.keyed import (
    ConstantSchedule,
    CosineSchedule,
    KeyedSchedule,
    LinearSchedule,
    StepSchedule,
)

__all__ = ["PRESETS", "get_schedule", "parse_schedule"]

# B-CNN's four phases; the official code uses these weights on CIFAR-10 and on CIFAR-100
_BCNN: tuple[Weights, ...] = ((0.98, 0.01, 0.01), (0.1, 0.8, 0.1), (0.1, 0.2, 0.7), (0.0, 0.0, 1.0))
# The last phase trains the fine head alone while the trunk moves on under the other two, which go
# stale: their accuracy and the consistency of the levels fall. '-keep' leaves them enough weight to
# follow.
_KEEP: tuple[Weights, ...] = (*_BCNN[:3], (0.05, 0.15, 0.8))
# name -> points of a step schedule. The official Keras code switches in on_epoch_end of epochs 8,
# 18, 28 (CIFAR-10) and 13, 23, 33 (CIFAR-100), so the new weights act one epoch later. The
# widespread PyTorch rewrite on VGG16-BN tests `epoch > 12` inside the epoch, and so switches one
# epoch earlier.
_STARTS = {
    "bcnn-cifar10": (0, 9, 19, 29),
    "bcnn-cifar100": (0, 14, 24, 34),
    "bcnn-vgg16-bn": (0, 13, 23, 33),
}
PRESETS: dict[str, dict[int, Weights]] = {
    name + suffix: dict(zip(starts, phases, strict=True))
    for suffix, phases in (("", _BCNN), ("-keep", _KEEP))
    for name, starts in _STARTS.items()
}
_ANY_LEVELS = ("equal", "constant", "dynamic")  # presets that fit any number of levels


def parse_schedule(text: str) -> LossWeightSchedule:
    """Read the compact text form, made for command lines.

    Args:
        text: `'[kind:]epoch:w,w,w;epoch:w,w,w'` with kind `step` (the default), `linear` or
            `cosine`; `'[constant:]w,w,w'`; or `'dynamic:w,w,w[;floor=f]'` with base weights. Blanks
            are ignored. `str(schedule)` writes this form.

    Raises:
        ValueError: if the text is not of this form, or the schedule it describes is not valid.

    Example:
        >>> parse_schedule('0:0.98,0.01,0.01; 9:0.1,0.8,0.1')
        StepSchedule({0: (0.98, 0.01, 0.01), 9: (0.1, 0.8, 0.1)})
        >>> parse_schedule('linear:0:1,0;10:0,1')(5)
        (0.5, 0.5)
    """
    form = "'[step|linear|cosine:]epoch:w,w,...;epoch:w,w,...' or '[constant:|dynamic:]w,w,...'"
    compact = "".join(text.split())
    kind, colon, rest = compact.partition(":")
    classes: dict[str, type[KeyedSchedule]] = {
        c.kind: c for c in (StepSchedule, LinearSchedule, CosineSchedule)
    }
    if kind == "dynamic":
        return _parse_dynamic(text, rest)
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


def _parse_dynamic(text: str, rest: str) -> DynamicSchedule:
    if not rest:
        raise ValueError(
            f"{text!r} does not say for how many levels: give base weights, as in 'dynamic:1,1,1', or "
            f"call get_schedule('dynamic', num_levels=3)"
        )
    weights, semicolon, option = rest.partition(";")
    name, _, value = option.partition("=")
    try:
        options = {"floor": float(value)} if semicolon else {}
    except ValueError:
        name = ""
    if semicolon and name != "floor":
        raise ValueError(
            f"cannot read {option!r} in the schedule {text!r}; the form is 'dynamic:w,w,...;floor=0.01'"
        )
    return DynamicSchedule(weights.split(","), **options)  # type: ignore[arg-type]  # text numbers are read as numbers


def get_schedule(
    schedule: str | LossWeightSchedule | Mapping[Any, Any] | Sequence[float],
    num_levels: int | None = None,
) -> LossWeightSchedule:
    """A schedule from whatever a user may write for one.

    Args:
        schedule: a schedule; the name of a preset: 'bcnn-cifar10', 'bcnn-cifar100' or
            'bcnn-vgg16-bn', the same with '-keep' (a last phase of .05, .15, .8 instead of 0, 0, 1,
            so that the coarse heads are not left behind), 'equal' = 'constant' (1/L for each of L
            levels, so that the weights add up to one as B-CNN's do) or 'dynamic'
            (:class:`DynamicSchedule` with such base weights); the text of :func:`parse_schedule`; a
            dict of :meth:`LossWeightSchedule.to_dict`, or of epoch -> weights for steps; or plain
            weights, which never change.
        num_levels: how many levels the model has, to be checked; 'equal', 'constant' and 'dynamic'
            need it.

    Raises:
        ValueError: if the name is unknown (the message lists the names), the schedule is for
            another number of levels, or its definition is not valid.

    Example:
        >>> get_schedule('bcnn-cifar10', num_levels=3)(29)
        (0.0, 0.0, 1.0)
        >>> get_schedule('equal', num_levels=2)
        ConstantSchedule((0.5, 0.5))
    """
    if isinstance(schedule, LossWeightSchedule):
        made = schedule
    elif isinstance(schedule, Mapping):
        made = (
            LossWeightSchedule.from_dict(schedule) if "kind" in schedule else StepSchedule(schedule)
        )
    elif isinstance(schedule, str):
        made = _named(schedule, num_levels)
    elif isinstance(schedule, Sequence):
        made = ConstantSchedule([*schedule])
    else:
        raise ValueError(
            f"a schedule is a name, a text, a dict, weights or a LossWeightSchedule, got {schedule!r}"
        )
    return check_levels(made, num_levels)


def _named(text: str, num_levels: int | None) -> LossWeightSchedule:
    name = text.strip().lower()
    if name in PRESETS:
        return StepSchedule(PRESETS[name])
    if name in _ANY_LEVELS:
        if num_levels is None or num_levels < 1:
            raise ValueError(
                f"{name!r} needs num_levels, the number of levels of the model, got {num_levels!r}"
            )
        equal = [1 / num_levels] * num_levels
        return DynamicSchedule(equal) if name == "dynamic" else ConstantSchedule(equal)
    if ":" in name or "," in name:
        return parse_schedule(name)
    close = difflib.get_close_matches(name, [*PRESETS, *_ANY_LEVELS], n=1)
    raise ValueError(
        f"unknown schedule {text!r}; the names are {', '.join([*PRESETS, *_ANY_LEVELS])}"
        + (f" (did you mean {close[0]!r}?)" if close else "")
        + "; or write one as '0:0.98,0.01,0.01;9:0.1,0.8,0.1'"
    )
