"""Several tasks on one pass of one model: labels of the whole image beside masks."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import nn

from timm_branches.model import BranchModel
from timm_branches.task.base import HeadsTask, base_model
from timm_branches.taxonomy import Taxonomy

__all__ = ["JointTask"]


class JointTask(HeadsTask):
    """The weighted sum of several tasks' losses.

    Computed from one pass of the model that they share.

    Targets are a dict with an entry for each task.

    Args:
        tasks: Tasks by name, all on the same model.
        weights: Weight of each task, by name; 1 where not given.
        verbose: As in timm.

    Raises:
        ValueError: The tasks do not share one model or compete for one head, or a weight is of no
            task or negative.

    Example:
        >>> from functools import partial
        >>> from timm_branches import Taxonomy, create_branch_model
        >>> from timm_branches.dense import SegmentationEvaluator
        >>> from timm_branches.task import BranchTask, DenseTask
        >>> tree = Taxonomy(['animal/cat', 'animal/dog', 'thing/car'], levels=['coarse', 'fine'])
        >>> model = create_branch_model(
        ...     'test_resnet', taps=[4, 5, (2, 3, 4, 5)], head=['pool', 'pool', 'unet'],
        ...     taxonomy=tree, num_classes=[None, None, 2])
        >>> mask = DenseTask(model, 'ce', partial(SegmentationEvaluator, 2))
        >>> task = JointTask({'labels': BranchTask(model), 'mask': mask}, weights={'mask': 0.5})
        >>> targets = {'labels': tree.expand([0, 2]), 'mask': torch.randint(2, (2, 64, 64))}
        >>> task(torch.randn(2, 3, 64, 64), targets)['loss'].backward()
    """

    def __init__(
        self,
        tasks: Mapping[str, HeadsTask],
        weights: Mapping[str, float] | None = None,
        verbose: bool = True,
    ):
        models = {id(base_model(task)) for task in tasks.values()}
        names = list(chain.from_iterable(task.names for task in tasks.values()))
        if len(models) != 1 or len(set(names)) < len(names):
            raise ValueError(
                f"tasks must share one model and have different heads, got {len(models)} models "
                f"and the losses {names}."
            )
        weights = dict(weights or {})
        if set(weights) - set(tasks) or not all(0 <= w < float("inf") for w in weights.values()):
            raise ValueError(
                f"weights= are finite numbers from 0 upwards, by task ({', '.join(tasks)}), got "
                f"{weights}."
            )
        first = next(iter(tasks.values()))
        model: BranchModel = base_model(first)
        self.heads_can_be_off = any(task.heads_can_be_off for task in tasks.values())
        super().__init__(model, names, device=first.device, verbose=verbose)
        # not submodules: each holds the model, which must not be counted once more
        self.tasks = dict(tasks)
        self.task_weights = {name: float(weights.get(name, 1.0)) for name in tasks}
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Each task's loss weights of a 0-based epoch, times the task's own."""
        self.epoch = epoch
        if not hasattr(self, "task_weights"):  # while the base class is built
            return super().set_epoch(epoch)
        for task in self.tasks.values():
            task.set_epoch(epoch)
        weights: list[float] = []
        for name, task in self.tasks.items():
            weights += [self.task_weights[name] * weight for weight in task.weights]
        self.weights = tuple(weights)
        self.active = tuple(name for name, w in zip(self.names, self.weights, strict=True) if w > 0)

    def _apply(self, fn: Any, recurse: bool = True) -> JointTask:
        super()._apply(fn, recurse)
        # tables and weights of their losses move along
        for task in getattr(self, "tasks", {}).values():
            task._apply(fn, recurse)
        return self

    def _turns_levels_off(self) -> bool:
        return (
            any(task._turns_levels_off() for task in self.tasks.values())
            or 0 in self.task_weights.values()
        )

    def end_epoch(self, metrics: Mapping[str, float], epoch: int) -> None:
        """Told to each task."""
        for task in self.tasks.values():
            task.end_epoch(metrics, epoch)

    def describe_schedule(self) -> str:
        """Each task's, by name."""
        return "; ".join(f"{name}: {task.describe_schedule()}" for name, task in self.tasks.items())

    def describe_settings(self) -> dict[str, Any]:
        """Each task's, and their weights."""
        settings: dict[str, Any] = {"task": type(self).__name__}
        for name, task in self.tasks.items():
            settings[name] = {**task.describe_settings(), "weight": self.task_weights[name]}
        return settings

    def check_targets(self, target: Any, loader: Any = None) -> None:
        """Task by task."""
        if isinstance(target, Mapping):
            for name, task in self.tasks.items():
                if name in target:
                    task.check_targets(target[name], loader)

    def parameters_of_loss(self) -> list[nn.Parameter]:
        """Those of all tasks."""
        parameters = (task.parameters_of_loss() for task in self.tasks.values())
        return list(chain.from_iterable(parameters))

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        """Each task's state."""
        return {
            "tasks": {name: task.get_task_state() for name, task in self.tasks.items()},
            "epoch": self.epoch,
        }

    def load_task_state(
        self,
        state: dict[str, Any] | None,
        strict: bool = True,
        module: nn.Module | None = None,
        ema: bool = False,
    ) -> None:
        """Each task's part of the state."""
        if state:
            for name, task in self.tasks.items():
                task.load_task_state(state["tasks"][name])
            self.set_epoch(int(state["epoch"]))

    def needed_heads(self) -> tuple[str, ...]:
        """Those of all tasks that count."""
        needed: set[str] = set()
        for name, task in self.tasks.items():
            if self.task_weights[name]:
                needed |= set(task.needed_heads())
        return tuple(name for name in base_model(self).names if name in needed)

    def compare(
        self,
        output: dict[str, torch.Tensor],
        target: Mapping[str, torch.Tensor],
        lengths: torch.Tensor | None = None,
        share: bool = False,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The weighted sum over tasks, and all their losses by name."""
        if set(target) != set(self.tasks):
            raise ValueError(
                f"targets are a dict with an entry for each of the tasks {list(self.tasks)}, got "
                f"{sorted(target)}."
            )
        total: torch.Tensor | None = None
        losses: dict[str, torch.Tensor] = {}
        for name, task in self.tasks.items():
            weight = self.task_weights[name]
            if not weight:
                continue
            loss, parts = task.compare(output, target[name], lengths, share)
            total = weight * loss if total is None else total + weight * loss
            losses |= parts
        assert total is not None
        return total, losses

    @property
    def default_metric(self) -> str:
        """That of the first task."""
        name, task = next(iter(self.tasks.items()))
        own = self.create_evaluator()
        return own.renamed[name, task.default_metric]

    def match_labels(self, names: Any) -> Callable[[Any], Any] | None:
        """As in :class:`HeadsTask`; `names` may be a dict of them by task, as targets are."""
        translations = {}
        for name, task in self.tasks.items():
            own = names.get(name) if isinstance(names, Mapping) else names
            # one answer for all tasks: a tree is that of the labels, a class list that of the masks
            has_tree = getattr(task, "taxonomy", None) is not None
            if not isinstance(names, Mapping) and isinstance(own, Taxonomy) != has_tree:
                continue
            translate = task.match_labels(own)
            if translate is not None:
                translations[name] = translate
        if not translations:
            return None

        def translate_all(targets: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            result = dict(targets)
            for name, translate in translations.items():
                result[name] = translate(targets[name])
            return result

        return translate_all

    def describe_labels(self) -> dict[str, Any]:
        """What each task describes."""
        return {name: task.describe_labels() for name, task in self.tasks.items()}

    def check_labels_of(self, described: Mapping[str, Any], source: str) -> None:
        """As in :class:`HeadsTask`, task by task."""
        for name, task in self.tasks.items():
            task.check_labels_of(described.get(name, {}), source)

    def create_evaluator(self, **kwargs: Any) -> _JointEvaluator:
        """The tasks' evaluators side by side."""
        return _JointEvaluator(
            {name: task.create_evaluator(**kwargs) for name, task in self.tasks.items()}
        )

    def confusions(self, evaluator: _JointEvaluator) -> list[tuple[str, torch.Tensor, list[str]]]:
        """Those of all tasks."""
        matrices = []
        for name, task in self.tasks.items():
            matrices += task.confusions(evaluator.parts[name])
        return matrices


class _JointEvaluator:
    """The tasks' evaluators side by side.

    A metric's name gets the task's before it where two have the same.
    """

    def __init__(self, parts: Mapping[str, Any]):
        self.parts = dict(parts)
        count = Counter(chain.from_iterable(part.metric_names for part in parts.values()))
        self.renamed: dict[tuple[str, str], str] = {}
        self._lower: dict[str, bool] = {}
        headline: list[str] = []
        for name, part in parts.items():
            for metric in part.metric_names:
                shown = f"{name}_{metric}" if count[metric] > 1 else metric
                self.renamed[name, metric] = shown
                self._lower[shown] = part.lower_is_better(metric)
            headline += [self.renamed[name, metric] for metric in part.headline]
        self.headline = tuple(headline)
        self.metric_names = tuple(self.renamed.values())
        self.metrics: dict[str, float] = {}

    @property
    def num_samples(self) -> int:
        return max(part.num_samples for part in self.parts.values())

    def lower_is_better(self, name: str) -> bool:
        return self._lower[name]

    def reset(self) -> None:
        for part in self.parts.values():
            part.reset()

    def update(self, output: Any, target: Mapping[str, torch.Tensor]) -> None:
        for name, part in self.parts.items():
            part.update(output, target[name])

    def compute(self, distributed: bool = False) -> OrderedDict[str, float]:
        found = {name: part.compute(distributed=distributed) for name, part in self.parts.items()}
        return OrderedDict(
            (new, found[name][metric]) for (name, metric), new in self.renamed.items()
        )

    def summary(self) -> OrderedDict[str, float]:
        return self.compute()
