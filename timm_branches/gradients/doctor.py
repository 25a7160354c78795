"""A check-up before a long training.

A handful of tests, each with a sentence on what is wrong and what to do.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from timm_branches.gradients.behaviour import evaluation_problems, input_problems, learning_problems
from timm_branches.gradients.labels import label_problems
from timm_branches.gradients.objective import Evaluated, Losses, Objective, group_by_stage
from timm_branches.gradients.reasons import TOTAL
from timm_branches.gradients.report import GradientReport, gradients, measure
from timm_branches.gradients.structure import (
    applies_log_softmax,
    is_probability,
    softmax_twice,
    watch_linear_pairs,
)
from timm_branches.gradients.watch import Watch, watch

__all__ = ["Diagnosis", "check_model"]

# of the weights: even at a rate of 1 far below float32's resolution. More may be healthy, with Adam
_VANISHING = 1e-8


@dataclass
class Diagnosis:
    """Result of :func:`check_model`; `print` shows it as text.

    Attributes:
        problems: What is wrong and what to do, one sentence or two each.
        passed: Names of the checks without a problem.
        skipped: Names of the checks that could not be made because of a problem before them, or had
            nothing to check.
        report: The gradients, if it came so far.
    """

    problems: list[str] = field(default_factory=list)
    passed: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    report: GradientReport | None = None

    @property
    def ok(self) -> bool:
        """Whether there is no problem."""
        return not self.problems

    def __str__(self) -> str:
        lines = [f"problem: {problem}" for problem in self.problems]
        lines += [f"passed: {', '.join(self.passed)}"] if self.passed else []
        lines += [f"not checked: {', '.join(self.skipped)}"] if self.skipped else []
        return "\n".join(lines)


CHECKS = (
    "labels",
    "forward pass",
    "structure",
    "backward pass",
    "gradients",
    "frozen BatchNorm",
    "evaluation",
    "input",
    "learning",
)


def check_model(
    model: nn.Module,
    batch: Any,
    losses: Losses | None = None,
    steps: int = 10,
    progress: Callable[[str], None] | None = None,
) -> Diagnosis:
    """Check a model, its loss and a batch before training with them.

    The checks are: labels fit the heads and the taxonomy; losses are finite; cross-entropy gets
    logits and no two Linears collapse into one; every trainable parameter gets a finite gradient,
    from every loss that depends on it, through no dead ReLU; BatchNorm of a frozen part does not go
    on collecting statistics; evaluation is deterministic, and frame by frame as for the whole clip
    where a head streams; the output depends on the input, and on every frame of a clip; and a copy
    of the model learns this one batch.

    What was asked for is no problem: frozen parts, `Tap(detach=True)`, levels whose loss weight is
    0. The model is left as it was. All of it costs about as much as `steps` + 10 training steps,
    and the memory of a copy.

    Args:
        model: A task, such as :class:`timm_branches.task.BranchTask`, or any module.
        batch: A pair of input and target, as the task or `losses` takes them. A few samples are
            enough.
        losses: For a module, as :func:`gradient_report` takes them.
        steps: Training steps (Adam) for the last check; 0 leaves it out.
        progress: Called with the name of each check as it begins; on a large network they take a
            minute together.

    Returns:
        A :class:`Diagnosis`.

    Raises:
        ValueError: No losses for a module, or `losses` beside a task's own; `steps` below 0.

    Example:
        >>> from timm_branches import create_branch_model
        >>> from timm_branches.task import BranchTask
        >>> model = create_branch_model('test_resnet', taps=[4, 5], num_classes=[2, 4], img_size=64)
        >>> images = torch.randn(4, 3, 64, 64)
        >>> labels = torch.tensor([[0, 1], [0, 0], [1, 2], [1, 3]])
        >>> check_model(BranchTask(model), (images, labels)).ok
        True
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
        raise ValueError(f"steps= takes a whole number from 0, got {steps!r}.")
    objective = Objective(model, batch, losses)
    doctor = _Doctor(objective, steps, progress or (lambda name: None))
    with objective.undisturbed():
        doctor.examine()
    done = {*doctor.failed, *doctor.result.passed}
    doctor.result.skipped = [name for name in CHECKS if name not in done]
    return doctor.result


class _Doctor:
    def __init__(self, objective: Objective, steps: int, begin: Callable[[str], None]):
        self.objective, self.steps, self.begin = objective, steps, begin
        self.root: Any = objective.task or objective.module
        self.result = Diagnosis()
        self.failed: set[str] = set()

    def _note(self, check: str, problems: list[str]) -> bool:
        self.result.problems += problems
        if problems:
            self.failed.add(check)
        else:
            self.result.passed.append(check)
        return not problems

    def examine(self) -> None:
        objective = self.objective
        task: Any = objective.task
        if task is not None and hasattr(task, "level_classes"):
            self.begin("labels")
            problems, computable = label_problems(
                objective.targets[0], task.level_names, task.level_classes, task.taxonomy
            )
            self._note("labels", problems)
            if not computable:
                return
        self.root.train()
        statistics = _statistics(objective.module)
        self.begin("forward pass")
        found, seen, pairs, problems = self._forward()
        if not self._note("forward pass", problems) or found is None:
            return
        self.begin("structure")
        self._note("structure", _structure_problems(found, pairs))
        self._note("frozen BatchNorm", _moved_statistics(objective.module, statistics))
        self.begin("backward pass")
        if self._note("backward pass", _backward_problems(found, objective.module)):
            del found
            self.begin("gradients")
            report = self.result.report = measure(
                objective, group_by_stage(objective.module), _VANISHING
            )
            self._note("gradients", _gradient_problems(report, objective, seen.dead))
        self.root.eval()
        x = objective.input
        if isinstance(x, torch.Tensor) and x.is_floating_point():
            self.begin("evaluation")
            # cuDNN's LSTM has no backward pass in eval
            with torch.backends.cudnn.flags(enabled=False):
                if self._note("evaluation", evaluation_problems(objective.module, x)):
                    self.begin("input")
                    self._note("input", input_problems(objective.module, x[:2]))
        if self.steps and self.result.report is not None:
            self.root.train()
            self.begin("learning")
            self._note("learning", learning_problems(objective, self.steps, self.result.report))

    def _forward(self) -> tuple[Evaluated | None, Watch, list[tuple[str, str]], list[str]]:
        """A training pass under observation."""
        module, x = self.objective.module, self.objective.input
        if isinstance(x, torch.Tensor) and x.is_floating_point() and not x.isfinite().all():
            return (
                None,
                Watch(),
                [],
                [
                    "the batch's input itself holds NaN or infinity: look at how it is loaded and "
                    "normalised."
                ],
            )
        with watch_linear_pairs(module) as pairs, watch(module) as seen:
            try:
                found = self.objective()
            except Exception as error:
                where = f" in {seen.failed}" if seen.failed else ""
                return (
                    None,
                    seen,
                    pairs,
                    [f"the forward pass fails{where}: {type(error).__name__}: {error}"],
                )
        bad = [name for name, loss in found.losses.items() if not loss.isfinite()]
        if bad or not found.total.isfinite():
            where = (
                f" NaN or infinity first comes out of {seen.not_finite[1]} in {seen.not_finite[0]}."
                if seen.not_finite
                else " The model's output is finite, so it is the loss function that makes it."
            )
            return found, seen, pairs, [f"the loss {', '.join(bad) or TOTAL} is not finite.{where}"]
        if not found.total.requires_grad:
            return (
                found,
                seen,
                pairs,
                [
                    "the loss has no gradient at all: it does not depend on any trainable "
                    "parameter, or is detached (no_grad, detach, .item()) from all of them."
                ],
            )
        return found, seen, pairs, []


def _structure_problems(found: Evaluated, pairs: list[tuple[str, str]]) -> list[str]:
    problems = [
        f"{first!r} and {second!r} are Linear layers with nothing non-linear between them, so both "
        f"together are no more than one: put an activation (nn.ReLU()) behind {first!r}, or take "
        "one of them away."
        for first, second in pairs
    ]
    with torch.no_grad():
        outputs = is_probability(found.output) if applies_log_softmax(found.total) else []
    twice = [
        name
        for name, loss in found.losses.items()
        if loss.grad_fn is not None and softmax_twice(loss)
    ]
    if outputs or twice:
        problems.append(
            f"{', '.join(outputs or twice)}: cross-entropy is given probabilities, not logits (a "
            "softmax before a loss that has one): take the softmax out of the model, or of the "
            "loss."
        )
    return problems


def _statistics(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: m.running_mean.clone()
        for name, m in model.named_modules()
        if isinstance(m, nn.modules.batchnorm._NormBase) and m.running_mean is not None
    }


def _moved_statistics(model: nn.Module, before: dict[str, torch.Tensor]) -> list[str]:
    """BatchNorms of a frozen part that collected statistics in the training pass."""
    modules = dict(model.named_modules())
    moved = []
    for name, mean in before.items():
        part = name
        while part and not any(True for _ in modules[part].parameters()):
            part = part.rpartition(".")[0]  # one without weights is frozen if what it stands in is
        frozen = not any(p.requires_grad for p in modules[part].parameters())
        if frozen and not torch.equal(modules[name].running_mean, mean):
            moved.append(name)
    if not moved:
        return []
    which = ", ".join(moved[:3]) + (", ..." if len(moved) > 3 else "")
    return [
        f"{len(moved)} BatchNorm layers ({which}) are frozen, but their running statistics still "
        "change in train mode: freeze with model.freeze(), or put them in eval() after every "
        "train()."
    ]


def _backward_problems(found: Evaluated, module: nn.Module) -> list[str]:
    try:
        gradients(found.total, [p for p in module.parameters() if p.requires_grad])
    except RuntimeError as error:
        text = str(error).split(" Hint:")[0]
        if "inplace" in text:
            return [
                "the backward pass fails because an in-place operation (x += y, "
                "ReLU(inplace=True), x[i] = ...) "
                "overwrote a tensor that it needs: write it out of place (x = x + y). torch says: "
                f"{text}"
            ]
        return [f"the backward pass fails: {text}"]
    return []


_ADVICE = {
    "unused": "are not used by any loss: give their head a loss, use them in forward(), "
    "or remove them",
    "detached": "get no gradient although the loss depends on them: take away the detach(), "
    "no_grad(), .data or .item() on the way, or freeze them if they shall not learn",
    "not finite": "get a gradient that is NaN or infinite: look for a square root, division "
    "or log of 0 behind them",
}


def _gradient_problems(report: GradientReport, objective: Objective, dead: list[str]) -> list[str]:
    problems = []
    if dead:
        problems.append(
            f"the ReLU in {', '.join(dead[:3])}{', ...' if len(dead) > 3 else ''} gives only zeros "
            "over the whole batch, so nothing before it learns: look at the bias and the scale of "
            "what comes in, lower the learning rate, or use a leaky ReLU."
        )
    groups: dict[tuple[str, str], list[str]] = {}
    for item in report.silent:
        groups.setdefault((item.stage, item.reason), []).append(item.parameter)
    for (stage, reason), names in groups.items():
        if reason in _ADVICE:
            which = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            problems.append(
                f"{stage}: {len(names)} trainable parameters ({which}) {_ADVICE[reason]}."
            )
    lost = {stage for stage, reason in groups if reason == "detached"}
    for cell in report.cells:
        if (
            cell.status == "detached"
            and cell.head != TOTAL
            and cell.stage not in lost
            and cell.head not in objective.detached_heads
        ):
            problems.append(
                f"{cell.stage}: {cell.head} depends on it, but its gradient does not reach it: "
                "take away the detach() or no_grad() on the way, or ask for it with "
                "Tap(detach=True)."
            )
        elif cell.status == "vanishing" and cell.head == TOTAL:
            problems.append(
                f"{cell.stage}: the gradient is only {cell.relative:.1e} of the weights, too "
                "little to move them: look at the initialisation, the normalisation, and "
                "saturated activations."
            )
    return problems
