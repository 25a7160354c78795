"""Schedules from what a person writes: a preset's name, a short text, a dict or plain weights."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from timm_branches.schedules.base import KINDS, LossWeightSchedule, Weights, check_levels
from timm_branches.schedules.keyed import ConstantSchedule, StepSchedule

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
PRESETS: dict[str, dict[int, Weights]] = {}
for _suffix, _phases in (("", _BCNN), ("-keep", _KEEP)):
    for _name, _starts in _STARTS.items():
        PRESETS[_name + _suffix] = dict(zip(_starts, _phases, strict=True))
_EQUAL = "equal"  # another name of 'constant' for any number of levels


def parse_schedule(text: str) -> LossWeightSchedule:
    """Read the compact text form, made for command lines.

    Args:
        text: `'[kind:]epoch:w,w,w;epoch:w,w,w'` with kind `step` (the default), `linear` or
            `cosine`; `'[constant:]w,w,w'`; `'dynamic:w,w,w[;floor=f]'` with base weights; or
            `'kind:...'` of any other registered kind. Blanks are ignored. `str(schedule)` writes
            this form.

    Raises:
        ValueError: if the text is not of this form, or the schedule it describes is not valid.

    Example:
        >>> parse_schedule('0:0.98,0.01,0.01; 9:0.1,0.8,0.1')
        StepSchedule({0: (0.98, 0.01, 0.01), 9: (0.1, 0.8, 0.1)})
        >>> parse_schedule('linear:0:1,0;10:0,1')(5)
        (0.5, 0.5)
    """
    compact = "".join(text.split())
    kind, colon, settings = compact.partition(":")
    kind = kind.lower()
    if kind in KINDS:
        return KINDS[kind].from_text(settings)
    if not colon:
        return ConstantSchedule.from_text(compact)
    return StepSchedule.from_text(compact)


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
        if "kind" in schedule:
            made = LossWeightSchedule.from_dict(schedule)
        else:
            made = StepSchedule(schedule)
    elif isinstance(schedule, str):
        made = _named(schedule, num_levels)
    elif isinstance(schedule, Sequence):
        made = ConstantSchedule([*schedule])
    else:
        raise ValueError(
            f"A schedule is a name, a text, a dict, weights or a LossWeightSchedule, got "
            f"{schedule!r}."
        )
    return check_levels(made, num_levels)


def _named(text: str, num_levels: int | None) -> LossWeightSchedule:
    name = text.strip().lower()
    if name in PRESETS:
        return StepSchedule(PRESETS[name])
    kind = ConstantSchedule.kind if name == _EQUAL else name
    if kind in KINDS:
        if num_levels is None or num_levels < 1:
            raise ValueError(
                f"{name!r} needs num_levels, the number of levels of the model, got {num_levels!r}."
            )
        return KINDS[kind].for_levels(num_levels)
    if ":" in name or "," in name:
        return parse_schedule(text)
    names = [*PRESETS, _EQUAL, *KINDS]
    close = difflib.get_close_matches(name, names, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    raise ValueError(
        f"Unknown schedule {text!r}; the names are {', '.join(names)}{hint}. Or write one as "
        f"'0:0.98,0.01,0.01;9:0.1,0.8,0.1'."
    )
