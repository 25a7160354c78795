"""Why a parameter gets no gradient, or a useless one."""

from dataclasses import dataclass

import torch
from torch import nn

from timm_branches.gradients.objective import Evaluated, Groups, Objective
from timm_branches.gradients.watch import watch

__all__ = ["TOTAL", "WHY", "Reasons", "Silent", "depends"]

TOTAL = "total"
# modules whose loss of gradient is looked into one by one; of more, stage by stage
_MOST_PARTS = 32

WHY = {
    "frozen": "frozen: requires_grad is False",
    "off": "off: only levels whose loss weight is 0 now need them",
    "unused": "unused: no loss depends on them",
    "detached": "detached: the loss depends on them, but the graph is cut on the way "
    "(detach(), torch.no_grad(), .data, .item() or numpy)",
    "tap": "detached, as Tap(detach=True) asks for",
    "dead": "dead: a ReLU on the way gives only zeros over the batch",
    "zero": "exactly 0: something on the way multiplies by 0, as a norm layer does whose weight "
    "starts at 0 (then it is over after the first step)",
    "vanishing": "vanishing",
    "not finite": "not finite: NaN or infinity",
}


@dataclass(frozen=True)
class Silent:
    """A parameter that the weighted sum does not train.

    Its stage, its name and the reason, a key of `WHY`.
    """

    stage: str
    parameter: str
    reason: str


class Reasons:
    """Finds out why gradients are missing; looks (a forward pass each) only where one is."""

    def __init__(
        self,
        objective: Objective,
        found: Evaluated,
        groups: Groups,
        grads: dict[str, dict[int, torch.Tensor | None]],
    ):
        self.objective, self.found, self.groups, self.grads = objective, found, groups, grads
        self._reach: dict[str, set[str]] = {}
        self._dead: list[str] | None = None

    @property
    def dead(self) -> list[str]:
        """Modules with a dead ReLU, if anyone asked."""
        return self._dead or []

    def _look_for_dead(self) -> list[str]:
        if self._dead is None:
            with torch.no_grad(), watch(self.objective.module) as seen:
                self.objective()
            self._dead = seen.dead
        return self._dead

    def status(
        self,
        head: str,
        stage: str,
        norm: float,
        relative: float | None,
        vanishing: float,
        weights: dict[str, float],
    ) -> str:
        """Why a gradient does not arrive at a parameter, or that it does."""
        live = [p for p in self.groups[stage].values() if p.requires_grad]
        if not live:
            return "frozen"
        heads = self._on(weights) if head == TOTAL else [head]
        given: list[torch.Tensor] = []
        for parameter in live:
            given += self._given(parameter, heads)
        if not given:
            if stage not in self._reach:
                self._reach[stage] = depends(self.objective, self.found, live)
            return "detached" if self._reach[stage] & set(heads) else "none"
        status = self._useless(given)
        if status is not None:
            return status
        if relative is not None and relative < vanishing:
            return "vanishing"
        return "ok"

    def silent(self, weights: dict[str, float]) -> list[Silent]:
        """Every parameter that the weighted sum does not train."""
        heads = self._on(weights)
        reasons: dict[str, tuple[str, str]] = {}  # stage and reason by the parameter's name
        without: dict[str, nn.Parameter] = {}
        for stage, group in self.groups.items():
            for name, parameter in group.items():
                given = self._given(parameter, heads)
                reason: str | None = None
                if not parameter.requires_grad:
                    reason = "frozen"
                elif given:
                    reason = self._useless(given)
                else:
                    reason = "unused"  # so far
                    without[name] = parameter
                if reason is not None:
                    reasons[name] = (stage, reason)
        stages = {name: stage for name, (stage, _) in reasons.items()}
        for names in _parts(list(without), stages):
            reason = self._without_gradient([without[name] for name in names], heads)
            for name in names:
                reasons[name] = (stages[name], reason)
        return [Silent(stage, name, reason) for name, (stage, reason) in reasons.items()]

    def _on(self, weights: dict[str, float]) -> list[str]:
        """Losses that count in the sum."""
        return [name for name in self.grads if weights[name]]

    def _given(self, parameter: nn.Parameter, heads: list[str]) -> list[torch.Tensor]:
        """The gradients that these losses give to a parameter."""
        if not parameter.requires_grad:
            return []
        grads = [self.grads[head][id(parameter)] for head in heads]
        return [grad for grad in grads if grad is not None]

    def _useless(self, given: list[torch.Tensor]) -> str | None:
        """Why gradients that are there train nothing, None if they do."""
        if not all(bool(grad.isfinite().all()) for grad in given):
            return "not finite"
        if any(bool(grad.any()) for grad in given):
            return None
        return "dead" if self._look_for_dead() else "zero"

    def _without_gradient(self, parameters: list[nn.Parameter], heads: list[str]) -> str:
        """Why no path of the graph leads to these parameters."""
        reached = depends(self.objective, self.found, parameters) & set(heads)
        if not reached:
            return "off" if self.objective.off else "unused"
        if reached <= self.objective.detached_heads:
            return "tap"
        return "detached"


def _parts(names: list[str], stages: dict[str, str]) -> list[list[str]]:
    """Names of parameters by the module that has them; of very many modules by stage."""
    by_module: dict[str, list[str]] = {}
    by_stage: dict[str, list[str]] = {}
    for name in names:
        by_module.setdefault(name.rpartition(".")[0], []).append(name)
        by_stage.setdefault(stages[name], []).append(name)
    parts = by_module if len(by_module) <= _MOST_PARTS else by_stage
    return list(parts.values())


@torch.no_grad()
def depends(objective: Objective, found: Evaluated, parameters: list[nn.Parameter]) -> set[str]:
    """Names of the losses whose values change when these parameters do.

    Whether or not autograd knows.
    """
    again = objective().losses
    # where a pass repeats to the last bit (on the CPU it does), so does the smallest change count
    exact = all(torch.equal(loss, again[name]) for name, loss in found.losses.items())
    kept = [p.detach().clone() for p in parameters]
    try:
        for p in parameters:
            spread = float(p.float().std(correction=0))
            p.add_(3 * torch.randn_like(p) * (spread if spread > 0 else 1.0))
        now = objective().losses
    finally:
        for p, value in zip(parameters, kept, strict=True):
            p.copy_(value)
    tolerance = 0 if exact else 1e-6
    changed = set()
    for name, loss in found.losses.items():
        if not torch.allclose(loss, now[name], rtol=tolerance, atol=0, equal_nan=True):
            changed.add(name)
    return changed
