"""What a model does when it is run.

In eval mode, on other inputs, and in a few steps of training.
"""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from timm_branches.gradients.frames import frame_gradients
from timm_branches.gradients.objective import Objective
from timm_branches.gradients.report import GradientReport
from timm_branches.model import BranchModel

__all__ = ["evaluation_problems", "input_problems", "learning_problems"]

_RATES = (1e-3, 1e-4)  # Adam's; a network that the first one throws off course gets a second try


def _tensors(output: Any) -> list[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        return [output]
    values: Iterable[Any] = ()
    if isinstance(output, dict):
        values = output.values()
    elif isinstance(output, (tuple, list)):
        values = output
    tensors = []
    for value in values:
        tensors += _tensors(value)
    return tensors


@torch.no_grad()
def evaluation_problems(module: nn.Module, x: torch.Tensor) -> list[str]:
    """Is the output in eval mode finite, and the same twice?"""
    results = []
    try:
        for seed in (1, 2):
            torch.manual_seed(seed)
            results.append(_tensors(module(x.clone())))
    except Exception as error:
        return [f"the forward pass fails in eval mode: {type(error).__name__}: {error}"]
    if not all(bool(y.isfinite().all()) for y in results[0]):
        return [
            "the output in eval mode is NaN or infinite, though it is finite in train mode: look "
            "at BatchNorm's running statistics."
        ]
    if any(not torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(*results, strict=True)):
        return [
            "two passes in eval mode differ: something random is left on (F.dropout without "
            "training=self.training, a dropout that never gets eval(), torch.rand in forward())."
        ]
    return stream_problems(module, x)


@torch.no_grad()
def stream_problems(module: nn.Module, x: torch.Tensor) -> list[str]:
    """Do temporal heads that go on from a state answer as for the whole clip?

    They do not if a frame's answer depends on frames to come, or if the state forgets.
    """
    if not isinstance(module, BranchModel) or x.ndim != 5 or x.shape[1] < 2:
        return []
    problems = []
    for name in module.temporal_heads:
        try:
            module.head(name).check_stream(name, x.shape[0])  # type: ignore[operator]
        except ValueError:  # it says itself that it cannot
            continue
        middle = x.shape[1] // 2
        first, state = module.forward_stream(x[:, :middle], heads=[name])
        rest, _ = module.forward_stream(x[:, middle:], state, heads=[name])
        whole = module(x, heads=[name])[name]
        last = rest[name]
        if last.ndim == 3:
            if not _close(whole[:, :middle], first[name]):
                problems.append(
                    f"the head {name!r} goes on from a state, but what it says of the frames 0 to "
                    f"{middle - 1} of a clip depends on the frames behind them: the future comes "
                    "in, look at its mask."
                )
                continue
            whole = whole[:, middle:]
        if not _close(whole, last):
            problems.append(
                f"the head {name!r} goes on from a state, but a clip in two pieces gets another "
                "answer than the same clip at once: its state does not hold all that it reads, or "
                "frames read what comes behind them."
            )
    return problems


def _close(a: torch.Tensor, b: torch.Tensor) -> bool:
    scale = float(b.abs().max().clamp(min=1e-6))
    return float((a - b).abs().max()) <= 1e-3 * scale


def input_problems(module: nn.Module, x: torch.Tensor) -> list[str]:
    """Does the output depend on the input, and on every frame of a clip?

    In eval mode, where samples do not mix.

    The gradient tells what a difference in float32 would not: an LSTM may have all but forgotten
    the first frames. Where none arrives (a frozen part run without autograd), the frame is replaced
    and the outputs are compared.
    """
    frames = list(range(x.shape[1])) if x.ndim == 5 else [None]
    leaf = x.clone().requires_grad_()
    outputs = [y for y in _tensors(module(leaf.clone())) if y.requires_grad]
    grad = None
    if outputs:
        total = torch.stack([(y * torch.randn_like(y)).sum() for y in outputs]).sum()
        try:
            (grad,) = torch.autograd.grad(total, leaf, allow_unused=True)
        except RuntimeError:  # a backward pass that fails is told of by another check
            pass
    seen = set()
    for frame in frames:
        if grad is None:
            continue
        part = grad if frame is None else grad[:, frame]
        if part.any():
            seen.add(frame)
    if isinstance(module, BranchModel) and x.ndim == 5 and len(seen) < len(frames):
        for name in module.temporal_heads:
            seen |= set(frame_gradients(module, x, lambda y: y.square().sum(), head=name).seen)
    unseen = [t for t in frames if t not in seen and not _changes(module, x, t)]
    if not unseen:
        return []
    if len(unseen) == len(frames):
        return [
            "the output does not depend on the input: it is the same for any other (a bias alone "
            "makes it, as behind a dead layer, or the input is not used)."
        ]
    return [
        f"the output does not depend on the frames {unseen} (counted from 0) of {len(frames)}: "
        "hand the recurrence's state from frame to frame, or give it all frames at once, and read "
        "out more than the last."
    ]


@torch.no_grad()
def _changes(module: nn.Module, x: torch.Tensor, frame: int | None) -> bool:
    other = x.clone()
    part = other if frame is None else other[:, frame]
    part.copy_(part.mean() + (part.std() + 1) * torch.randn_like(part))
    return any(
        not torch.equal(a, b)
        for a, b in zip(_tensors(module(x.clone())), _tensors(module(other)), strict=True)
    )


def learning_problems(objective: Objective, steps: int, report: GradientReport) -> list[str]:
    """Train a copy on the batch for a few steps; the dropout's masks are the same in each."""
    waiting = {item.parameter for item in report.silent if item.reason == "zero"}
    with torch.no_grad():
        # a model that keeps a result of its last pass can be copied only if that has no graph
        objective()
    for rate in _RATES:
        twin: Any = copy.deepcopy(
            objective.task if objective.task is not None else objective.module
        )
        module = twin.trainable_module if objective.task is not None else twin
        optimizer = torch.optim.Adam([p for p in twin.parameters() if p.requires_grad], lr=rate)
        named = dict(module.named_parameters())
        still, losses = set(waiting), []
        for step in range(steps + 1):
            loss = objective(twin).total
            losses.append(float(loss.detach()))
            if step == steps or losses[-1] != losses[-1]:
                break
            optimizer.zero_grad()
            loss.backward()
            still = {name for name in still if (g := named[name].grad) is None or not bool(g.any())}
            optimizer.step()
        if losses[-1] < losses[0]:
            break
    else:
        if losses[-1] != losses[-1]:
            return [
                f"the loss becomes NaN within {steps} steps of Adam (rate {_RATES[-1]:g}) on one "
                "batch: look for numbers that overflow, lower the learning rate, clip the "
                "gradient."
            ]
        if abs(losses[0]) > 1e-6:
            return [
                f"the loss does not fall on this one batch: {losses[0]:.4g} before and "
                f"{losses[-1]:.4g} after {steps} steps of Adam (rate {_RATES[-1]:g}). Look at the "
                "sign of the loss, at what the labels belong to, and at hooks or functions that "
                "change the gradient."
            ]
    if still and steps > 1:
        names = sorted(still)
        return [
            f"{len(names)} trainable parameters "
            f"({', '.join(names[:3])}{', ...' if len(names) > 3 else ''}) get a gradient of "
            f"exactly 0 in all of {steps} steps: something behind them multiplies by 0 or is "
            "saturated, or what they are applied to is always 0 (a recurrence that never gets its "
            "state)."
        ]
    return []
