"""What all tasks share.

A branch model, the weights of its losses by epoch, and how processes train it together.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from timm.task import TrainingTask
from timm.utils import unwrap_model
from torch import nn

from timm_branches.data.bad_images import sample_name
from timm_branches.model import BranchModel
from timm_branches.schedules import ConstantSchedule, LossWeightSchedule, get_schedule
from timm_branches.task.evaluator import Evaluator
from timm_branches.taxonomy import Taxonomy
from timm_branches.taxonomy.matching import match_classes, match_taxonomies

__all__ = ["HeadsTask", "Schedule", "base_model", "name_of_function", "name_of_labels"]

Schedule = LossWeightSchedule | str | dict | Sequence[float] | None


class HeadsTask(TrainingTask):
    """Training task in timm's sense on the heads of a branch model; subclasses bring the losses.

    Args:
        model: The branch model.
        names: Names of the losses that the schedule weighs.
        schedule: Loss weights by epoch: a schedule, a preset's name, or None for equal weights.
        device: Where the task lives; None leaves the model where it is.
        dtype: As in timm.
        verbose: As in timm.

    Attributes:
        names: Names of the losses that the schedule weighs.
        weights: Their weights in this epoch.
        active: Names of those whose weight is not 0.

    Raises:
        ValueError: The schedule is for another number of losses.
    """

    heads_can_be_off = True  # whether a head may go without gradient because its weight is 0

    def __init__(
        self,
        model: BranchModel,
        names: Sequence[str],
        schedule: Schedule = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        verbose: bool = True,
    ):
        if device is not None:
            check_device(device)
        super().__init__(device=device, dtype=dtype, verbose=verbose)
        self.trainable_module: Any = model
        self.names = tuple(names)
        self.schedule: LossWeightSchedule = (
            ConstantSchedule((1.0,) * len(names))
            if schedule is None
            else get_schedule(schedule, num_levels=len(names))
        )
        self.distributed = False
        self.to(next(model.parameters()).device if device is None else device)
        self.set_epoch(0)

    # -- the schedule

    def set_epoch(self, epoch: int) -> None:
        """Take the loss weights of a 0-based epoch; call it when the epoch begins."""
        self.epoch = epoch
        self.weights = tuple(self.schedule(epoch))
        self.active = tuple(name for name, w in zip(self.names, self.weights, strict=True) if w > 0)

    def end_epoch(self, metrics: Mapping[str, float], epoch: int) -> None:
        """Take note of what an evaluation said.

        Weights that follow it act from the next epoch on.
        """

    def describe_schedule(self) -> str:
        """The loss weights as a person would write them."""
        return str(self.schedule)

    def describe_settings(self) -> dict[str, Any]:
        """What the loss is made of beside the schedule, JSON-safe, as a checkpoint keeps it."""
        return {"task": type(self).__name__}

    def check_targets(self, target: Any, loader: Any = None) -> None:
        """Refuse targets that are no classes; they are on the CPU, as a loader gives them.

        Args:
            target: The targets of a batch.
            loader: Where they come from, whose data set may know what its samples are called.

        Raises:
            ValueError: A target is outside its classes; level and value are named.
        """

    def parameters_of_loss(self) -> list[nn.Parameter]:
        """Parameters of the loss itself, for the optimizer, without weight decay."""
        return []

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        """The schedule and the epoch, for checkpoints."""
        return {"schedule": self.schedule.to_dict(), "epoch": self.epoch}

    def load_task_state(
        self,
        state: dict[str, Any] | None,
        strict: bool = True,
        module: nn.Module | None = None,
        ema: bool = False,
    ) -> None:
        """Continue with the checkpoint's schedule.

        Raises:
            ValueError: The checkpoint's schedule is for another number of losses.
        """
        if state:
            self.schedule = get_schedule(state["schedule"], num_levels=len(self.names))
            self.set_epoch(int(state["epoch"]))

    # -- timm's task

    def prepare_distributed(self, device_ids: list | None = None, **ddp_kwargs: Any) -> HeadsTask:
        """Wrap the model in DDP.

        It is told to look for parts without gradient if there can be any.
        """
        from torch.nn.parallel import DistributedDataParallel

        self.distributed = True
        for parameter in self.parameters_of_loss():  # they stand outside of DDP
            parameter.register_hook(_mean_over_processes)
        cut = any(info.tap.detach for info in base_model(self).taps)
        ddp_kwargs.setdefault("find_unused_parameters", cut or self._turns_levels_off())
        self.eval_model = getattr(self, "eval_model", self.trainable_module)
        self.trainable_module = DistributedDataParallel(
            self.trainable_module, device_ids=device_ids, **ddp_kwargs
        )
        return self

    def compile(  # type: ignore[override]  # nn.Module has another method of this name; timm's is meant
        self, backend: str = "inductor", mode: str | None = None, **compile_kwargs: Any
    ) -> nn.Module:
        """Compile the model.

        It is compiled anew for each set of levels that the schedule turns on.
        """
        self.trainable_module = torch.compile(
            self.trainable_module, backend=backend, mode=mode, **compile_kwargs
        )
        self.eval_model = self.trainable_module
        return self.trainable_module

    def get_clip_parameters(self, exclude_head: bool = False) -> list[nn.Parameter]:
        """Parameters to clip.

        Adaptive clipping leaves the heads out, as timm does with classifiers.
        """
        model = base_model(self)
        return list((model.backbone if exclude_head else model).parameters())

    def _turns_levels_off(self) -> bool:
        if not self.heads_can_be_off:
            return False
        points = getattr(self.schedule, "points", None)
        # between its points a schedule interpolates, so a 0 between them is a 0 at one; others may
        # do anything
        return points is None or any(0 in weights for weights in points.values())

    def forward(self, input: Any, target: Any) -> dict[str, Any]:
        """Forward pass and loss.

        Args:
            input: Images (B, C, H, W) or clips (B, T, C, H, W), or a pair of clips and their
                lengths (B,).
            target: What the losses compare with.

        Returns:
            `loss`, `output` of the heads that were needed, and `losses` by name, unweighted.
        """
        images, lengths = input if isinstance(input, tuple) else (input, None)
        heads = self.needed_heads()
        options: dict[str, Any] = {"heads": heads}
        if set(heads) == set(base_model(self).names):
            options["heads"] = None
        if lengths is not None:
            options["lengths"] = lengths
        output = self.trainable_module(images, **options)
        loss, losses = self.compare(
            output, target, lengths, share=self.distributed and self.training
        )
        return {"loss": loss, "output": output, "losses": losses}

    @abstractmethod
    def needed_heads(self) -> tuple[str, ...]:
        """The model's heads that are computed in training."""

    @abstractmethod
    def compare(
        self,
        output: dict[str, torch.Tensor],
        target: Any,
        lengths: torch.Tensor | None = None,
        share: bool = False,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The total loss, and the losses by name, unweighted.

        Args:
            output: Of the heads that are needed.
            target: What they are compared with.
            lengths: Valid frames of each clip.
            share: Average over the samples of all processes.
        """

    def answer(self, model: nn.Module, input: Any) -> dict[str, torch.Tensor]:
        """What a model says of a batch.

        Logits (B, K) by head, those of frames averaged over each clip's frames.
        """
        images, lengths = input if isinstance(input, tuple) else (input, None)
        output = model(images) if lengths is None else model(images, lengths=lengths)
        frames = images.shape[1] if lengths is None else lengths[:, None].to(images.device)
        # 0 behind the lengths
        means = dict(output)
        for name, y in output.items():
            if y.ndim == 3:  # (B, T, K)
                means[name] = y.sum(1) / frames
        return means

    # -- names

    def match_labels(self, names: Any) -> Callable[[Any], Any] | None:
        """Compare what a data set's labels mean with what the task's do, by name.

        Args:
            names: What :func:`timm_branches.data.label_names` says of the data set.

        Returns:
            What turns the data set's targets into the task's; None if they mean the same, or if one
            of the two has no names.

        Raises:
            ValueError: They differ in more than order or a missing part; the difference is named.
        """
        return None

    def describe_labels(self) -> dict[str, Any]:
        """The names behind the labels, JSON-safe, as a checkpoint keeps them; empty without any."""
        return {}

    def check_labels_of(self, described: Mapping[str, Any], source: str) -> None:
        """Compare the names that a checkpoint describes with the task's own.

        Raises:
            ValueError: The checkpoint's numbers mean other classes; the difference is named.
        """
        own = self.describe_labels()
        for key in ("taxonomy", "classes"):
            if key not in described or key not in own:
                continue
            try:
                _check_same(key, described[key], own[key], source)
            except ValueError as error:
                raise ValueError(
                    f"{source} was trained on other labels. {error} Give the data the same tree "
                    "and order, or begin a new run."
                ) from error

    # -- evaluation

    @property
    @abstractmethod
    def default_metric(self) -> str:
        """What the best epoch is chosen by."""

    @abstractmethod
    def create_evaluator(self, **kwargs: Any) -> Evaluator:
        """A fresh evaluator that takes the model's whole output and the targets."""

    def confusions(self, evaluator: Any) -> list[tuple[str, torch.Tensor, list[str]]]:
        """Confusion matrices to draw: title, counts (K, K), names of the classes."""
        return []


def _check_same(key: str, theirs: Any, ours: Any, source: str) -> None:
    """Raise a ValueError unless two descriptions number the same classes alike."""
    names = {"given_name": "the checkpoint", "expected_name": "this run"}
    if key == "taxonomy":
        given, expected = Taxonomy.from_dict(theirs), Taxonomy.from_dict(ours)
        if match_taxonomies(given, expected, subset=False, **names) is not None:
            raise ValueError("The classes are the same, in another order.")
    elif match_classes(theirs, ours, subset=False, **names) is not None:
        raise ValueError("The classes are the same, in another order.")


def check_device(device: Any) -> None:
    """Refuse what names no device.

    Raises:
        ValueError: It is something else, or torch knows no such device.
    """
    try:
        if torch.device(device).type == "cuda" and not torch.cuda.is_available():
            raise RuntimeError("torch sees no CUDA device on this machine.")
    except (RuntimeError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device={device!r}: {reason}. Write cpu, cuda or cuda:1.") from error


def name_of_function(function: Any) -> str:
    """What a function or a module of the user's is called, with what was bound to it."""
    if isinstance(function, partial):
        bound = [repr(value) for value in function.args if not callable(value)]
        bound += [name_of_function(value) for value in function.args if callable(value)]
        bound += [f"{key}={value!r}" for key, value in function.keywords.items()]
        return f"{name_of_function(function.func)}({', '.join(bound)})"
    name = getattr(function, "__qualname__", None)
    return type(function).__qualname__ if name is None else name


def name_of_labels(loader: Any, level: int, value: int) -> str:
    """Which sample of a loader's data set has a label, as ` of photos/a.jpg`; empty if unknown."""
    dataset = getattr(loader, "dataset", None)
    labels = getattr(dataset, "labels", None)
    if not isinstance(labels, torch.Tensor) or labels.ndim != 2:
        return ""
    rows = (labels[:, level] == value).nonzero()
    if not len(rows):
        return ""
    name = sample_name(dataset, int(rows[0]))
    return f" of sample {int(rows[0])}" if name is None else f" of {name}"


def _mean_over_processes(gradient: torch.Tensor) -> torch.Tensor:
    gradient = gradient.clone()
    dist.all_reduce(gradient)
    return gradient / dist.get_world_size()


def base_model(task: TrainingTask, ema: bool = False) -> BranchModel:
    """The plain branch model inside a task, free of DDP, compile and EMA wrappers."""
    return unwrap_model(task.get_eval_model(ema=ema))
