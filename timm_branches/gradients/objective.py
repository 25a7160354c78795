"""What the tools here share.

A model with its losses on one batch, left as it was; and its parameters by stage.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from timm.task import TrainingTask
from torch import nn

from timm_branches.model import BranchModel
from timm_branches.taps.freezing import part_up_to
from timm_branches.task import base_model

__all__ = ["Evaluated", "Losses", "Objective", "group_by_stage", "reproducible"]

Losses = Callable[..., Any] | Mapping[str, Callable[..., Any]]
Groups = dict[str, dict[str, nn.Parameter]]

# what belongs where never changes
_STAGES: WeakKeyDictionary[nn.Module, dict[str, str]] = WeakKeyDictionary()


class Evaluated(NamedTuple):
    """The losses of one forward pass, their weighted sum, and what the model returned."""

    losses: dict[str, torch.Tensor]
    total: torch.Tensor
    output: Any


class Objective:
    """A model with its losses on one batch.

    A call computes them, with random numbers from a fixed seed.

    Args:
        model: A timm training task (whose `forward(input, target)` gives `loss` and, by name,
            `losses`), or any module.
        batch: Its input, or a pair of input and target. They are moved to the model's device.
        losses: For a module: a function of (output) or (output, target) that returns a scalar or a
            dict of scalars, or a dict of such functions by name.
        weights: Of these losses in the sum, 1 each by default.

    Raises:
        ValueError: No losses, losses or weights beside those of a task, a weight of no loss.
    """

    def __init__(
        self,
        model: nn.Module,
        batch: Any,
        losses: Losses | None = None,
        weights: Mapping[str, float] | None = None,
    ):
        self.task = model if isinstance(model, TrainingTask) else None
        self.module: nn.Module = base_model(self.task) if self.task else model
        if self.task and (losses is not None or weights is not None):
            raise ValueError(
                "losses= and weights= have no effect on a task, which has its own: give its model "
                "instead of it."
            )
        if self.task is None and losses is None:
            raise ValueError(
                "losses= is missing: give a function of the model's output (and the target) that "
                "returns a scalar or a dict of scalars; or a task in place of the model."
            )
        first = next(self.module.parameters(), None)
        self.device = torch.device("cpu") if first is None else first.device
        parts = batch if isinstance(batch, (tuple, list)) else (batch,)
        if self.task and len(parts) != 2:
            raise ValueError(f"a task takes a batch of (input, target), got {len(parts)} part(s).")
        moved = []
        for part in parts:
            moved.append(part.to(self.device) if isinstance(part, torch.Tensor) else part)
        self.input, *self.targets = moved
        self._losses, self._weights = losses, dict(weights or {})

    def __call__(self, module: nn.Module | None = None) -> Evaluated:
        """The losses of the batch, of the model or of a copy of it."""
        # networks may work in place
        x = self.input.clone() if isinstance(self.input, torch.Tensor) else self.input
        with reproducible(self.device):
            if self.task is not None:
                found = (self.task if module is None else module)(x, *self.targets)
                total = found["loss"]
                return Evaluated(
                    _scalars(found.get("losses") or {"loss": total}),
                    _scalar("loss", total),
                    found.get("output"),
                )
            output = (self.module if module is None else module)(x)
            if isinstance(self._losses, Mapping):
                values: Any = {
                    name: loss(output, *self.targets) for name, loss in self._losses.items()
                }
            else:
                assert self._losses is not None
                values = self._losses(output, *self.targets)
        losses = _scalars(values if isinstance(values, Mapping) else {"loss": values})
        if set(self._weights) - set(losses):
            raise ValueError(f"weights={self._weights}: the losses are {list(losses)}.")
        total = torch.stack(
            [self._weights.get(name, 1.0) * value for name, value in losses.items()]
        ).sum()
        return Evaluated(losses, total, output)

    def weights_of(self, found: Evaluated) -> dict[str, float]:
        """How much each loss counts at present.

        DL / dL_k, whatever made the sum (schedule, learned weights).
        """
        live = [name for name, loss in found.losses.items() if loss.requires_grad]
        weights = dict.fromkeys(found.losses, 0.0)
        if self.task is None:
            return {name: float(self._weights.get(name, 1.0)) for name in weights}
        if live and found.total.requires_grad:
            slopes = torch.autograd.grad(
                found.total,
                [found.losses[name] for name in live],
                retain_graph=True,
                allow_unused=True,
            )
            weights |= {
                name: float(slope)
                for name, slope in zip(live, slopes, strict=True)
                if slope is not None
            }
        return weights

    @property
    def off(self) -> tuple[str, ...]:
        """Levels of the task that the current loss weights leave out."""
        active = getattr(self.task, "active", None)
        if active is None:
            return ()
        names: Any = getattr(self.task, "names", ())
        return tuple(name for name in names if name not in active)

    @property
    def detached_heads(self) -> set[str]:
        """Heads of a branch model one of whose taps has `detach=True`.

        There a cut graph was asked for.
        """
        model = self.module
        if not isinstance(model, BranchModel):
            return set()
        names = set()
        for name, taps in zip(model.names, model.head_taps, strict=True):
            if any(model.taps[i].tap.detach for i in taps):
                names.add(name)
        return names

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Leave gradients, modes, buffers and random number generators as they were.

        Whatever happens inside.

        A task's DDP and compile wrappers are off inside: nothing here is to be reduced over
        processes or compiled.
        """
        held = [(m, m.training, dict(m._buffers)) for m in (self.task or self.module).modules()]
        values = {}
        for _, _, buffers in held:
            for buffer in buffers.values():
                if buffer is not None:
                    values[id(buffer)] = buffer.detach().clone()
        grads = [(p, p.grad) for p in (self.task or self.module).parameters()]
        task: Any = self.task
        wrapped = (
            (task.trainable_module, getattr(task, "distributed", False))
            if task is not None
            else None
        )
        try:
            if wrapped:
                task.trainable_module = self.module
                if wrapped[1]:
                    task.distributed = False
            for p, _ in grads:
                p.grad = None
            with reproducible(self.device), torch.enable_grad():
                yield
        finally:
            for module, training, buffers in held:
                module.training = training
                module._buffers.update(buffers)
            with torch.no_grad():
                for _, _, buffers in held:
                    for buffer in buffers.values():
                        if buffer is not None and not _same(buffer, values[id(buffer)]):
                            buffer.copy_(values[id(buffer)])
            for p, grad in grads:
                p.grad = grad
            if wrapped:
                task.trainable_module = wrapped[0]
                if wrapped[1]:
                    task.distributed = True


@contextmanager
def reproducible(device: torch.device) -> Iterator[None]:
    """Torch's random numbers from a fixed seed inside, and as they were behind."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(0)
        yield


def group_by_stage(model: nn.Module, stages: Mapping[str, Any] | None = None) -> Groups:
    """Parameters by stage: `{stage: {name: parameter}}`.

    Args:
        model: The model.
        stages: For each stage a module of the model, or an iterable of its parameters. By default
            those of a branch model are `stage1` to `stage5` of the backbone (what the map of
            stage k needs and that of stage k - 1 does not) and `heads.<name>`; those of any other
            module its children, and `(own)` for parameters that belong to none.

    Raises:
        ValueError: A stage without parameters, or a parameter that is not the model's.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    if stages is not None:
        return {stage: _listed(stage, part, names) for stage, part in stages.items()}
    owner: dict[str, str] = {}
    if isinstance(model, BranchModel):
        owner = _branch_stages(model)
    else:
        for name in names.values():
            owner[name] = name.split(".")[0] if "." in name else "(own)"
    groups: Groups = {stage: {} for stage in dict.fromkeys(owner.values())}
    for name, p in model.named_parameters():
        groups[owner[name]][name] = p
    return groups


def _listed(
    stage: str, part: nn.Module | Iterable[nn.Parameter], names: dict[int, str]
) -> dict[str, nn.Parameter]:
    parameters = list(part.parameters() if isinstance(part, nn.Module) else part)
    if not parameters or any(id(p) not in names for p in parameters):
        raise ValueError(
            f"stages[{stage!r}] must be a module with parameters, or parameters, of the model "
            "itself."
        )
    return {names[id(p)]: p for p in parameters}


def _branch_stages(model: BranchModel) -> dict[str, str]:
    if model.backbone not in _STAGES:
        owner: dict[str, str] = {}
        for stage in model._stages():
            # in the order of the forward pass: the first stage that needs a parameter owns it
            for name in sorted(part_up_to(model.backbone, model.reader, stage).parameters):
                owner.setdefault(f"backbone.{name}", f"stage{stage}")
        _STAGES[model.backbone] = owner
    owner = dict(_STAGES[model.backbone])
    for name, _ in model.named_parameters():
        if name.startswith("heads."):
            owner[name] = ".".join(name.split(".")[:2])
    rest = {name: "(other)" for name, _ in model.named_parameters() if name not in owner}
    return owner | rest


def _scalars(losses: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    if not losses:
        raise ValueError("there is no loss: losses= must give at least one scalar.")
    return {name: _scalar(name, value) for name, value in losses.items()}


def _scalar(name: str, value: Any) -> torch.Tensor:
    if not isinstance(value, torch.Tensor) or value.numel() != 1:
        given = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
        raise ValueError(
            f"loss {name!r} must be a scalar tensor, got {given}: take its mean or sum."
        )
    return value if value.ndim == 0 else value.reshape(())


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)
