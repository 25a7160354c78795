"""Learning-rate schedules: timm's by name, and rates given outright."""

import warnings

import torch
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler

from timm_branches.train.config import FitConfig

__all__ = ["PiecewiseLR", "create_scheduler"]


class PiecewiseLR(Scheduler):
    """Learning rates given outright.

    `{0: 3e-3, 41: 5e-4}` is 5e-4 from the 0-based epoch 41 on.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, steps: dict[int, float]):
        if 0 not in steps:
            raise ValueError(f"the learning rate of epoch 0 must be given, got {steps}.")
        super().__init__(optimizer, "lr", initialize=True)
        self.steps = steps
        self.update_groups(self._get_lr(0))

    def _get_lr(self, t: int) -> list[float]:
        rate = next(lr for start, lr in sorted(self.steps.items(), reverse=True) if start <= t)
        first = self.base_values[0] if self.base_values else 1.0
        return [rate * (value / first) for value in self.base_values]


def create_scheduler(
    optimizer: torch.optim.Optimizer, config: FitConfig, updates_per_epoch: int
) -> Scheduler | None:
    """The scheduler that the settings ask for; None for `--sched none`.

    Raises:
        ValueError: multistep without milestones, or milestones without it.
    """
    if config.sched in ("piecewise", "none") and config.warmup_epochs:
        warnings.warn(f"--warmup-epochs has no effect with --sched {config.sched}.", stacklevel=2)
    if config.sched == "piecewise":
        return PiecewiseLR(optimizer, config.lr_at())
    milestones = [int(e) for e in config.decay_milestones.split(",") if e.strip()]
    if (config.sched == "multistep") != bool(milestones):
        raise ValueError("--sched multistep and --decay-milestones go together.")
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=config.sched,
        num_epochs=config.epochs,
        min_lr=config.min_lr,
        decay_rate=config.decay_rate,
        warmup_epochs=config.warmup_epochs,
        warmup_lr=config.warmup_lr,
        decay_milestones=milestones,
        step_on_epochs=False,
        updates_per_epoch=updates_per_epoch,
    )
    return scheduler
