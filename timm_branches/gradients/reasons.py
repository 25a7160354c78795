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
        heads = [name for name in self.grads if weights[name]] if head == TOTAL else [head]
        given = [g for name in heads for p in live if (g := self.grads[name][id(p)]) is not None]
        if not given:
            if stage not in self._reach:
                self._reach[stage] = depends(self.objective, self.found, live)
            return "detached" if self._reach[stage] & set(heads) else "none"
        if not all(bool(g.isfinite().all()) for g in given):
            return "not finite"
        if not any(bool(g.any()) for g in given):
            return "dead" if self._look_for_dead() else "zero"
        return "vanishing" if relative is not None and relative < vanishing else "ok"

    def silent(self, weights: dict[str, float]) -> list[Silent]:
        """Every parameter that the weighted sum does not train."""
        heads = [name for name in self.grads if weights[name]]
        cut: dict[str, dict[str, nn.Parameter]] = {}
        places: dict[str, str] = {}
        result: dict[str, tuple[str, str]] = {}
        for stage, group in self.groups.items():
            for name, p in group.items():
                given = [
                    g
                    for head in heads
                    if p.requires_grad and (g := self.grads[head][id(p)]) is not None
                ]
                if not p.requires_grad:
                    result[name] = (stage, "frozen")
                elif not given:
                    result[name], places[name] = (stage, "unused"), stage
                    cut.setdefault(name.rpartition(".")[0], {})[name] = p
                elif not all(bool(g.isfinite().all()) for g in given):
                    result[name] = (stage, "not finite")
                elif not any(bool(g.any()) for g in given):
                    result[name] = (stage, "dead" if self._look_for_dead() else "zero")
        if len(cut) > _MOST_PARTS:
            together: dict[str, dict[str, nn.Parameter]] = {}
            for parts in cut.values():
                for name, p in parts.items():
                    together.setdefault(places[name], {})[name] = p
            cut = together
        for parts in cut.values():
            reached = depends(self.objective, self.found, list(parts.values())) & set(heads)
            reason = (
                "tap"
                if reached and reached <= self.objective.detached_heads
                else "detached"
                if reached
                else "off"
                if self.objective.off
                else "unused"
            )
            for name in parts:
                result[name] = (result[name][0], reason)
        return [Silent(stage, name, reason) for name, (stage, reason) in result.items()]


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
    return {
        name
        for name, loss in found.losses.items()
        if not torch.allclose(loss, now[name], rtol=0 if exact else 1e-6, atol=0, equal_nan=True)
    }
