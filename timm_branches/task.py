"""Training tasks in timm's sense: a model with its loss, usable from anyone's own loop, and their evaluator."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.task import TrainingTask
from timm.utils import unwrap_model
from torch import nn

from timm_branches.hierarchy import Taxonomy, sum_upwards
from timm_branches.model import BranchModel
from timm_branches.schedules import ConstantSchedule, LossWeightSchedule, get_schedule

__all__ = ["BranchTask", "FlatTask", "HierarchyEvaluator", "base_model", "level_cross_entropy"]


def level_cross_entropy(logits: torch.Tensor, target: torch.Tensor, label_smoothing: float = 0.0,
                        share: bool = False) -> torch.Tensor:
    """Cross-entropy of one level, averaged over the samples whose label is known.

    Args:
        logits: (B, K).
        target: (B,) class indices with -1 for unknown, or (B, K) soft labels whose row sums are the known mass.
        label_smoothing: For class indices; soft labels carry theirs.
        share: Average over the known samples of all processes, so that DDP's mean over processes is the
            mean over the global batch.

    Returns:
        A scalar; 0, with zero gradients, when no label is known.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    soft = target.is_floating_point()
    labelled = (target > 0).any(1) if soft else target >= 0
    # rows without a label leave the computation before the softmax: even an infinite logit there is harmless
    safe = torch.where(labelled[:, None], logits, torch.zeros_like(logits))
    if soft:
        total = -(target * F.log_softmax(safe, dim=-1)).sum()
        known = target.sum()
    else:
        known = labelled.sum().to(logits.dtype)
        losses = F.cross_entropy(safe, target.clamp(min=0), reduction="none", label_smoothing=label_smoothing)
        total = (losses * labelled).sum()
    if share and dist.is_available() and dist.is_initialized():
        known = known.detach().clone()
        dist.all_reduce(known)
        known = known / dist.get_world_size()
    return total / torch.where(known > 0, known, torch.ones_like(known))


class BranchTask(TrainingTask):
    """Weighted sum of per-level cross-entropies, with weights that change by epoch (B-CNN's training strategy).

    L = sum over levels k of w_k(epoch) * CE_k, equation (1) of Zhu and Bain 2017 (arXiv 1709.09890). A level of
    weight 0 is off: its head is not computed in training, so no gradient, weight decay or BatchNorm update moves
    it and no infinite loss there can poison the sum.

    Args:
        model: Branch model with one head a level, from coarse to fine.
        schedule: Loss weights by epoch: a schedule, a preset's name, or None for equal weights.
        label_smoothing: Of every level's cross-entropy.
        device: Where the task lives.
        dtype: As in timm.
        verbose: As in timm.

    Raises:
        ValueError: The schedule is for another number of levels than the model has heads.

    Example:
        >>> task = BranchTask(model, schedule='bcnn-cifar10')            # doctest: +SKIP
        >>> task.set_epoch(0)                                            # doctest: +SKIP
        >>> task(images, labels)['loss'].backward()                      # doctest: +SKIP
    """

    def __init__(self, model: BranchModel, schedule: "LossWeightSchedule | str | dict | None" = None,
                 label_smoothing: float = 0.0, device: torch.device | None = None,
                 dtype: torch.dtype | None = None, verbose: bool = True):
        super().__init__(device=device, dtype=dtype, verbose=verbose)
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}.")
        self.trainable_module: Any = model
        self.names = tuple(model.names)
        self.level_names = self.names
        self.level_classes = tuple(model.num_classes.values())
        self.taxonomy: Taxonomy | None = model.taxonomy
        count = len(self.names)
        self.schedule = ConstantSchedule((1.0,) * count) if schedule is None else \
            get_schedule(schedule, num_levels=count)
        self.label_smoothing = label_smoothing
        self.distributed = False
        self.set_epoch(0)

    # -- the schedule ----------------------------------------------------------------------------------------

    def set_epoch(self, epoch: int) -> None:
        """Take the loss weights of a 0-based epoch; call it when the epoch begins."""
        self.epoch = epoch
        self.weights = tuple(self.schedule(epoch))
        self.active = tuple(name for name, w in zip(self.names, self.weights, strict=True) if w > 0)

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        """The schedule and the epoch, for checkpoints."""
        return {"schedule": self.schedule.to_dict(), "epoch": self.epoch}

    def load_task_state(self, state: dict[str, Any] | None, strict: bool = True, module: nn.Module | None = None,
                        ema: bool = False) -> None:
        """Continue with the checkpoint's schedule.

        Raises:
            ValueError: The checkpoint's schedule is for another number of levels.
        """
        if state:
            self.schedule = get_schedule(state["schedule"], num_levels=len(self.names))
            self.set_epoch(int(state["epoch"]))

    # -- timm's task -----------------------------------------------------------------------------------------

    def prepare_distributed(self, device_ids: list | None = None, **ddp_kwargs: Any) -> "BranchTask":
        """Wrap the model in DDP, which is told to look for parts without gradient if there can be any."""
        from torch.nn.parallel import DistributedDataParallel

        self.distributed = True
        cut = any(info.tap.detach for info in base_model(self).taps)
        ddp_kwargs.setdefault("find_unused_parameters", cut or self._turns_levels_off())
        self.eval_model = getattr(self, "eval_model", self.trainable_module)
        self.trainable_module = DistributedDataParallel(self.trainable_module, device_ids=device_ids, **ddp_kwargs)
        return self

    def compile(  # type: ignore[override]  # nn.Module has another method of this name; timm's is meant
            self, backend: str = "inductor", mode: str | None = None, **compile_kwargs: Any) -> nn.Module:
        """Compile the model; it is compiled anew for each set of levels that the schedule turns on."""
        self.trainable_module = torch.compile(self.trainable_module, backend=backend, mode=mode, **compile_kwargs)
        self.eval_model = self.trainable_module
        return self.trainable_module

    def get_clip_parameters(self, exclude_head: bool = False) -> list[nn.Parameter]:
        """Parameters to clip; adaptive clipping leaves the heads out, as timm does with classifiers."""
        model = base_model(self)
        return list((model.backbone if exclude_head else model).parameters())

    def _turns_levels_off(self) -> bool:
        points = getattr(self.schedule, "points", None)
        # between its points a schedule interpolates, so a 0 between them is a 0 at one; others may do anything
        return points is None or any(0 in weights for weights in points.values())

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> dict[str, Any]:
        """Forward pass and loss.

        Args:
            input: Images (B, C, H, W).
            target: Labels (B, L) with -1 for unknown, or soft labels (B, sum of classes) as mixup makes them.

        Returns:
            ``loss``, ``output`` (logits by level, of the levels that are on) and ``losses`` by level, unweighted.
        """
        targets = self._targets(target)
        only = None if len(self.active) == len(self.names) else self.active
        output = self.trainable_module(input, heads=only)
        losses = {name: level_cross_entropy(output[name], targets[name], self.label_smoothing,
                                            share=self.distributed and self.training)
                  for name in self.active}
        loss = torch.stack([w * losses[name] for name, w in zip(self.names, self.weights, strict=True)
                            if name in losses]).sum()
        return {"loss": loss, "output": output, "losses": losses}

    def _targets(self, target: torch.Tensor) -> dict[str, torch.Tensor]:
        if target.is_floating_point():
            if target.ndim != 2 or target.shape[1] != sum(self.level_classes):
                raise ValueError(f"soft labels must be (B, {sum(self.level_classes)}), the levels' classes "
                                 f"{list(self.level_classes)} side by side, got {tuple(target.shape)}.")
            return dict(zip(self.level_names, target.split(list(self.level_classes), dim=1), strict=True))
        if target.ndim != 2 or target.shape[1] != len(self.level_names):
            raise ValueError(f"labels must be (B, {len(self.level_names)}), one column per level "
                             f"{list(self.level_names)}, got {tuple(target.shape)}.")
        return dict(zip(self.level_names, target.unbind(1), strict=True))

    def level_logits(self, output: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        """Logits (B, K) of every level from the model's output."""
        return [output[name] for name in self.names]

    def create_evaluator(self, **kwargs: Any) -> "HierarchyEvaluator":
        """A fresh evaluator that takes the model's whole output and labels (B, L)."""
        return HierarchyEvaluator(self.level_names, self.level_classes, self.taxonomy, device=self.device,
                                  to_levels=self.level_logits, **kwargs)


class FlatTask(BranchTask):
    """The baseline that every hierarchy must beat: one head of leaves, level answers by summing upwards.

    Args:
        model: Branch model with a single head of ``taxonomy.num_leaves`` classes.
        taxonomy: The hierarchy whose levels are reported.
        label_smoothing: As in :class:`BranchTask`.
        device: Where the task lives.

    Raises:
        ValueError: The model has several heads, or another number of classes than leaves.
    """

    def __init__(self, model: BranchModel, taxonomy: Taxonomy, label_smoothing: float = 0.0,
                 device: torch.device | None = None):
        super().__init__(model, None, label_smoothing, device)
        if len(self.names) != 1 or model.num_classes[self.names[0]] != taxonomy.num_leaves:
            raise ValueError(f"a flat baseline has one head of the taxonomy's {taxonomy.num_leaves} leaves, "
                             f"got {model.num_classes}.")
        self.taxonomy = taxonomy
        self.level_names = tuple(taxonomy.levels)
        self.level_classes = tuple(taxonomy.num_classes)
        # where each leaf stands among the nodes of all levels side by side
        table = taxonomy.leaf_table
        depth = (table >= 0).sum(1) - 1
        starts = torch.tensor([0, *self.level_classes[:-1]]).cumsum(0)
        self.register_buffer("leaf_column", starts[depth] + table.gather(1, depth[:, None])[:, 0], persistent=False)
        self.to(self.device)

    def _targets(self, target: torch.Tensor) -> dict[str, torch.Tensor]:
        super()._targets(target)
        column: torch.Tensor = self.leaf_column  # type: ignore[assignment]
        if target.is_floating_point():
            return {self.names[0]: target[:, column]}
        leaf = torch.full((sum(self.level_classes),), -1, device=target.device)
        leaf[column] = torch.arange(len(column), device=target.device)
        result = torch.full_like(target[:, 0], -1)
        start = 0
        for level, classes in enumerate(self.level_classes):
            known = target[:, level] >= 0
            result = torch.where(known, leaf[start + target[:, level].clamp(min=0)], result)
            start += classes
        return {self.names[0]: result}

    def level_logits(self, output: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        """Log-probabilities (B, K) of every level: the leaves' probabilities, summed upwards."""
        assert self.taxonomy is not None
        return sum_upwards(output[self.names[0]].float(), self.taxonomy)


class HierarchyEvaluator:
    """Accumulates per-level accuracy, full-path accuracy and consistency exactly, over batches and processes.

    Args:
        levels: Names of the levels.
        num_classes: Classes of each level.
        taxonomy: The hierarchy, for consistency.
        device: Where totals are kept.
        max_samples: Ignore what comes after this many samples (padding of a distributed sampler).
        to_levels: Turns a model's output into the levels' logits; by default a dict by level name is expected.
    """

    default_metric = "full_path"

    def __init__(self, levels: Sequence[str], num_classes: Sequence[int], taxonomy: Taxonomy | None = None,
                 device: "torch.device | str | None" = None, *, max_samples: int | None = None, to_levels: Any = None):
        self.levels, self.num_classes = tuple(levels), tuple(num_classes)
        self.taxonomy = taxonomy
        self.device = torch.device(device or "cpu")
        self.max_samples = max_samples
        self.to_levels = to_levels or (lambda output: [output[name] for name in self.levels])
        self.metrics: dict[str, float] = {}
        self.metric_names = ("loss", *(f"{name}_top1" for name in self.levels), "full_path",
                             *(("consistency",) if taxonomy is not None else ()))
        self.reset()

    def reset(self) -> None:
        self.num_samples = 0
        self.confusion = [torch.zeros(k * k, dtype=torch.int64, device=self.device) for k in self.num_classes]
        # full paths right, of how many; consistent predictions, of how many
        self.counts = torch.zeros(4, dtype=torch.int64, device=self.device)
        # Apple's GPUs have no float64
        exact = torch.float32 if self.device.type == "mps" else torch.float64
        self.loss_sum = torch.zeros(2, dtype=exact, device=self.device)
        self._joined: list[torch.Tensor] | None = None

    @torch.no_grad()
    def update(self, output: Any, target: torch.Tensor) -> None:
        """Take one batch: the model's output and labels (B, L) with -1 for unknown."""
        logits = self.to_levels(output)
        if target.ndim != 2 or target.shape[1] != len(self.levels) or target.is_floating_point():
            raise ValueError(f"evaluation takes labels (B, {len(self.levels)}), got {tuple(target.shape)}.")
        if self.max_samples is not None:
            keep = max(0, self.max_samples - self.num_samples)
            logits, target = [y[:keep] for y in logits], target[:keep]
        count = target.shape[0]
        self.num_samples += count
        self._joined = None
        if not count:
            return
        predictions = torch.stack([y.argmax(-1) for y in logits], 1)
        for level, (y, classes) in enumerate(zip(logits, self.num_classes, strict=True)):
            label = target[:, level]
            known = label >= 0
            cell = torch.where(known, label * classes + predictions[:, level], 0)
            self.confusion[level].scatter_add_(0, cell, known.long())
            losses = F.cross_entropy(y.float(), label.clamp(min=0), reduction="none").to(self.loss_sum)
            self.loss_sum[0] += torch.where(known, losses, 0).sum()
            self.loss_sum[1] += known.sum()
        known = target >= 0
        right = ((predictions == target) | ~known).all(1) & known.any(1)
        self.counts[0] += right.sum()
        self.counts[1] += known.any(1).sum()
        if self.taxonomy is not None:
            self.counts[2] += int(self.taxonomy.valid_paths(predictions.cpu()).sum())
            self.counts[3] += count

    def compute(self, distributed: bool = False) -> "OrderedDict[str, float]":
        """Metrics in percent, and the mean cross-entropy over levels and samples as ``loss``.

        Args:
            distributed: Join the counts of all processes. This process's own stay, so that it may go on counting.
        """
        if distributed:
            self._joined = [total.clone() for total in (*self.confusion, self.counts, self.loss_sum)]
            for total in self._joined:
                dist.all_reduce(total)
            return self._metrics(*self._joined)
        return self._metrics(*self.confusion, self.counts, self.loss_sum)

    def summary(self) -> "OrderedDict[str, float]":
        """Metrics of this process so far, as timm's training loop shows them while it runs."""
        return self.compute()

    def confusion_matrices(self) -> list[torch.Tensor]:
        """Per level counts (K, K), rows are labels and columns predictions; of all processes once these are joined."""
        flat = self.confusion if self._joined is None else self._joined[:len(self.levels)]
        return [c.view(k, k).cpu().clone() for c, k in zip(flat, self.num_classes, strict=True)]

    def _metrics(self, *totals: torch.Tensor) -> "OrderedDict[str, float]":
        *confusion, counts, loss_sum = totals
        result = OrderedDict(loss=_ratio(loss_sum[0], loss_sum[1]))
        for name, flat, classes in zip(self.levels, confusion, self.num_classes, strict=True):
            result[f"{name}_top1"] = 100 * _ratio(flat.view(classes, classes).diagonal().sum(), flat.sum())
        result["full_path"] = 100 * _ratio(counts[0], counts[1])
        if self.taxonomy is not None:
            result["consistency"] = 100 * _ratio(counts[2], counts[3])
        return result


def _ratio(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(a) / float(b) if float(b) else float("nan")


def base_model(task: TrainingTask, ema: bool = False) -> BranchModel:
    """The plain branch model inside a task, free of DDP, compile and EMA wrappers."""
    return unwrap_model(task.get_eval_model(ema=ema))
