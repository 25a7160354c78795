"""`fit`: our training loop, made of timm's parts."""

import logging
import math
import re
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from timm.optim import create_optimizer_v2
from timm.utils import NativeScaler, dispatch_clip_grad, distribute_bn
from tqdm import tqdm

from timm_branches.data import label_names
from timm_branches.files import atomic_write, remove_abandoned, replace_file
from timm_branches.task import HeadsTask, base_model
from timm_branches.train.checkpoint import Checkpoints
from timm_branches.train.checks import bad_gradients, bad_pixel, check_losses, check_weights
from timm_branches.train.config import FitConfig
from timm_branches.train.evaluation import (
    evaluate,
    images_to,
    note_raw_inputs,
    targets_to,
    try_evaluation,
)
from timm_branches.train.facts import facts_of_inputs
from timm_branches.train.half_precision import check_half_precision
from timm_branches.train.log import CsvLog, open_trackers
from timm_branches.train.lr import create_scheduler
from timm_branches.train.process import (
    current_device,
    is_distributed,
    is_primary,
    random_state,
    seed_everything,
    set_random_state,
)
from timm_branches.train.resume import compare_runs, describe_run
from timm_branches.train.signals import StopSignals
from timm_branches.weights import save_model

_logger = logging.getLogger(__name__)

__all__ = ["FitResult", "fit"]

# what an optimizer's groups take from the settings; the rest is its memory
_SETTINGS_OF_GROUPS = ("lr", "initial_lr", "lr_scale", "weight_decay", "momentum")


@dataclass
class FitResult:
    """What a run gave.

    Attributes:
        output: Folder of the run: `model.safetensors` (the best), `last.safetensors` (to
            resume), `log.csv`.
        history: One dict per epoch, as in `log.csv`.
        best_epoch: 0-based epoch of `model.safetensors`.
        best: Its metrics; None where nothing could be measured (the severity of no mistakes).
        seconds: Time spent in this call.
        skipped_steps: Updates that were left out in this call because a number was not finite.
    """

    output: Path
    history: list[dict] = field(default_factory=list)
    best_epoch: int = -1
    best: dict[str, float | None] = field(default_factory=dict)
    seconds: float = 0.0
    skipped_steps: int = 0

    @property
    def model_path(self) -> Path:
        """The best model's file."""
        return self.output / "model.safetensors"


def fit(
    task: HeadsTask,
    train_loader: Any,
    eval_loader: Any = None,
    config: FitConfig | None = None,
    mixup: Callable | None = None,
    facts: dict | None = None,
) -> FitResult:
    """Train a task.

    On SIGINT (Ctrl-C) and SIGTERM the current batch is finished and everything is saved inside the
    epoch; with `resume='auto'` the run goes on from there, on a CPU bit for bit.

    Args:
        task: A task of `timm_branches.task` on the CPU or on its device.
        train_loader: Loader of (images (B, C, H, W), targets), or of (clips with their lengths,
            labels), with the targets that the task takes: labels (B, L) for a :class:`BranchTask`;
            `set_epoch` is called if it has one.
        eval_loader: The same for validation. Without it the last epoch counts as the best.
        config: Settings.
        mixup: Mixes a batch, as `timm_branches.data.HierarchicalMixup`.
        facts: JSON-safe facts to keep in the model's file (data set, command).

    Returns:
        A :class:`FitResult`. The folder `config.output` holds the files.

    Raises:
        FloatingPointError: More than `config.max_skipped_steps` updates had a loss or a gradient
            that is not finite; the message names level or layer, epoch and batch, and the pixel
            where the images were at fault. The checkpoint of the last good epoch stays.
        ValueError: A setting that cannot be honoured, or a checkpoint of another run.
        KeyboardInterrupt: After SIGINT, when everything is saved.
        SystemExit: After SIGTERM, with status 143, when everything is saved; with
            `config.check_only` after the check, with status 0.
    """
    config = config or FitConfig()
    began = time.monotonic()
    model = base_model(task)
    if model.calibration is not None:
        _logger.warning("The model is trained on: its calibration no longer fits, and goes.")
        model.calibration = None
    run = _Run(task, train_loader, eval_loader, config, mixup, facts or {})
    try:
        if config.check or config.check_only:
            run.check()
        if config.check_only:
            raise SystemExit(0)
        try_evaluation(task, eval_loader, run.amp)
        with StopSignals() as run.signals:
            for epoch in range(run.start_epoch, config.epochs):
                run.epoch(epoch)
    finally:
        run.close()
    run.finish()
    run.result.seconds = time.monotonic() - began
    return run.result


@dataclass
class _Progress:
    """How far an epoch has come.

    Attributes:
        batch: Batches that are behind us.
        counted: Those among them whose losses were finite.
        images: Samples in these.
        sums: Their losses by name, summed.
        cosines: Cosines between the branches' gradients, by pair.
        seconds: Time spent before this call.
        rate: The learning rate that the epoch began with; None before it began.
    """

    batch: int = 0
    counted: int = 0
    images: int = 0
    sums: dict[str, torch.Tensor] = field(default_factory=dict)
    cosines: dict[str, list[float]] = field(default_factory=dict)
    seconds: float = 0.0
    rate: float | None = None

    def add(self, losses: dict[str, torch.Tensor], images: int) -> None:
        """Count a batch with finite losses."""
        for name, value in losses.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.images += images
        self.counted += 1


class _Run:
    """State of one call of `fit`."""

    def __init__(
        self,
        task: HeadsTask,
        train_loader: Any,
        eval_loader: Any,
        config: FitConfig,
        mixup: Callable | None,
        facts: dict,
    ):
        self.task = task
        self.loader = train_loader
        self.eval_loader = eval_loader
        self.config = config
        self.mixup = mixup
        self.facts = {**facts_of_inputs(eval_loader or train_loader), **facts}
        self.primary = is_primary()
        self.device = current_device(config.device)
        self.rank = dist.get_rank() if is_distributed() else 0
        self.processes = dist.get_world_size() if is_distributed() else 1
        if len(train_loader) == 0:
            raise ValueError(
                "the training loader has no batch: the data set is smaller than a batch."
            )
        # before anything is trained: what the labels mean
        self.translate = task.match_labels(label_names(train_loader))
        if eval_loader is not None:
            task.match_labels(label_names(eval_loader))
        note_raw_inputs(train_loader, base_model(task))
        self.memory_format = torch.channels_last if config.channels_last else None
        self._prepare()
        self.updates_per_epoch = math.ceil(len(train_loader) / config.grad_accum_steps)
        self.scheduler = create_scheduler(self.optimizer, config, self.updates_per_epoch)
        self._choose_metric()
        if config.conflicts and len(task.names) < 2:
            raise ValueError(f"--conflicts has no effect: {list(task.names)} is a single loss.")
        self.result = FitResult(Path(config.output))
        self.checkpoints = Checkpoints(self.result.output, config.keep)
        self.start_epoch = 0
        self._epoch = 0
        self.updates = 0
        self.signals = StopSignals()
        self.progress = _Progress()
        self._random: dict[str, Any] = {}
        self._saved_at = time.monotonic()
        self._begin()
        self._open_logs()

    def _choose_metric(self) -> None:
        """What the best epoch is chosen by."""
        config = self.config
        evaluator = self.task.create_evaluator()
        self.metric = config.eval_metric or self.task.default_metric
        if self.metric not in evaluator.metric_names:
            raise ValueError(
                f"--eval-metric {self.metric!r}: choose one of {', '.join(evaluator.metric_names)}."
            )
        self.lower_is_better = evaluator.lower_is_better(self.metric)
        if config.eval_metric and self.eval_loader is None:
            raise ValueError("--eval-metric has no effect without evaluation data.")

    def _begin(self) -> None:
        """Look at the output folder, go on from a checkpoint, and join the other processes."""
        resume = self.config.resume
        if self.primary and self.result.output.is_dir():
            remove_abandoned(self.result.output)
        taken = self.checkpoints.last.exists() or self.result.model_path.exists()
        if taken and resume != "auto" and not self.checkpoints.has(resume):
            raise ValueError(
                f"{self.config.output} holds an earlier run: continue it with resume='auto' "
                "(--resume auto), or choose another output folder."
            )
        self.description = describe_run(
            self.task, self.loader, self.eval_loader, self.config, self.mixup, self.processes
        )
        self._resume()
        # after a resume, which may bring a schedule that turns levels off
        if is_distributed() and not self.task.distributed:
            devices = [self.device] if self.device.type == "cuda" else None
            self.task.prepare_distributed(device_ids=devices)

    def _open_logs(self) -> None:
        config = self.config
        self.log: CsvLog | None = None
        self.trackers: Any = None
        if self.primary:
            self.log = CsvLog(self.result.output / "log.csv", keep_until_epoch=self.start_epoch)
            self.result.history = self.log.read()
            self.trackers = open_trackers(
                config.tensorboard, config.wandb or None, str(self.result.output), asdict(config)
            )
        # in a file or a pipe, the line that each epoch prints is enough
        self.bar = tqdm(
            total=config.epochs * len(self.loader),
            initial=self.start_epoch * len(self.loader) + self.progress.batch,
            unit="batch",
            dynamic_ncols=True,
            disable=not (config.progress and self.primary and sys.stderr.isatty()),
        )

    def _prepare(self) -> None:
        """Model on its device, optimizer, averaging, compilation.

        In timm's order; DDP comes last.
        """
        config, task = self.config, self.task
        model = base_model(task)
        if config.freeze_backbone:
            model.freeze()
        if config.grad_checkpointing:
            model.set_grad_checkpointing(True)
        if config.sync_bn:
            if not is_distributed() or self.device.type == "cpu":
                raise ValueError("--sync-bn has no effect without several GPUs (torchrun).")
            from timm.layers import convert_sync_batchnorm

            task.trainable_module = convert_sync_batchnorm(model)
        task.to(device=self.device)
        if self.memory_format:
            model.to(memory_format=self.memory_format)
        self.optimizer = create_optimizer_v2(
            model,
            opt=config.opt,
            lr=config.lr_at().get(0, config.lr),
            weight_decay=config.weight_decay,
            momentum=config.momentum,
            layer_decay=config.layer_decay,
        )
        parameters_of_loss = list(task.parameters_of_loss())
        if parameters_of_loss:
            self.optimizer.add_param_group({"params": parameters_of_loss, "weight_decay": 0.0})
        slow = check_half_precision(self.device, config.amp, config.amp_dtype)
        if slow:
            warnings.warn(slow, stacklevel=3)
        self.scaler: NativeScaler | None = None
        if config.amp and config.amp_dtype == "float16":
            self.scaler = NativeScaler(device=self.device.type)
        if config.model_ema:
            task.setup_ema(decay=config.model_ema_decay, use_warmup=config.model_ema_warmup)
        if config.torchcompile:
            task.compile()

    @property
    def checks_each_step(self) -> bool:
        """Whether each update is looked at; an accelerator is waited for only every so often."""
        return self.device.type == "cpu" or self.config.max_skipped_steps > 0

    def amp(self):
        """Autocast, or nothing."""
        if not self.config.amp:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=getattr(torch, self.config.amp_dtype))

    # -- checkpoints

    def _resume(self) -> None:
        found = self.checkpoints.find(self.config.resume)
        if found is None:
            return
        path, state = found
        source = f"--resume {path}"
        inside = state.get("inside")
        self._check_state(state, source)
        lines = compare_runs(
            state.get("run", {"settings": state.get("config", {})}),
            self.description,
            source,
            inside_epoch=inside is not None,
        )
        asked = self.task.describe_schedule()
        self._load(state, path)
        if self.primary and self.task.describe_schedule() != asked:
            _logger.warning(
                "The checkpoint's loss-weight schedule is used, not the one asked for:\n%s\n"
                "(asked: %s)",
                self.task.describe_schedule(),
                asked,
            )
        for line in lines:
            if self.primary:
                _logger.warning("%s: %s", source, line)
        self.start_epoch = state["epoch"] + 1
        self.updates = state["updates"]
        self.result.best_epoch = state["best_epoch"]
        self.result.best = dict(state["best"])
        self._epoch = self.start_epoch
        if inside is not None:
            self._take_up(inside, source)
        self._set_rates()
        if Path(path).resolve().parent != self.result.output.resolve():
            self._bring(Path(path).parent)
        if self.start_epoch >= self.config.epochs and self.config.resume != "auto":
            raise ValueError(
                f"{source} is of epoch {state['epoch'] + 1}: nothing is left of "
                f"--epochs {self.config.epochs}."
            )

    def _check_state(self, state: dict[str, Any], source: str) -> None:
        """Refuse a checkpoint that lacks something, or is of other labels or another optimizer."""
        missing = [key for key in ("state_dict", "optimizer", "epoch") if key not in state]
        if not missing and self.config.model_ema and "state_dict_ema" not in state:
            missing = ["the moving average"]
        if missing:
            raise ValueError(f"{source}: the checkpoint lacks {', '.join(missing)}.")
        self.task.check_labels_of(state.get("labels", {}), source)
        trained_with = state.get("config", {}).get("opt", self.config.opt)
        # torch itself would take the state of another optimizer as it is
        if trained_with != self.config.opt:
            raise ValueError(
                f"{source} is of another optimizer: it was trained with --opt {trained_with}, not "
                f"{self.config.opt}."
            )

    def _load(self, state: dict[str, Any], path: str) -> None:
        """Weights and memories; what the settings say of the optimizer stays as it is asked for."""
        groups = self.optimizer.param_groups
        asked = []
        for group in groups:
            asked.append({key: group.get(key) for key in _SETTINGS_OF_GROUPS})
        try:
            self.task.load_checkpoint_state(state["state_dict"], state.get("task_state"))
            if self.config.model_ema:
                self.task.load_checkpoint_state(state["state_dict_ema"], ema=True)
            self.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise ValueError(
                f"--resume {path} is of another model or optimizer: {error}"
            ) from error
        for group, settings in zip(self.optimizer.param_groups, asked, strict=True):
            group.update({key: value for key, value in settings.items() if value is not None})
        if self.scaler and "scaler" in state:
            self.scaler.load_state_dict(state["scaler"])

    def _set_rates(self) -> None:
        """The learning rates of the place that the run has come to."""
        if self.scheduler is None:
            return
        if self.progress.batch:
            self.scheduler.step(self.start_epoch)
        self.scheduler.step_update(self._position())

    def _position(self) -> int:
        """Updates behind us as the rate counts them: a share of the epoch.

        So a run with another batch size or accumulation than before goes on at the same rate.
        """
        within = math.ceil(self.progress.batch / self.config.grad_accum_steps)
        return self._epoch * self.updates_per_epoch + within

    def _take_up(self, inside: dict[str, Any], source: str) -> None:
        """Go on inside an epoch."""
        position = inside["processes"][self.rank]
        if position["batch"] > len(self.loader):
            raise ValueError(
                f"{source} was written after batch {position['batch']} of an epoch; the training "
                f"loader has {len(self.loader)}."
            )
        self._random = position.pop("random")
        sums = {name: value.to(self.device) for name, value in position.pop("sums").items()}
        self.progress = _Progress(sums=sums, **position)

    def _bring(self, folder: Path) -> None:
        """Take over the best model and the log of a run in another folder."""
        if not (folder / "model.safetensors").exists():
            self.result.best_epoch = -1
            self.result.best = {}
        for name in ("model.safetensors", "log.csv"):
            if self.primary and (folder / name).exists():
                replace_file(self.result.output / name, partial(shutil.copyfile, folder / name))

    def _save(self, epoch: int, inside: dict[str, Any] | None = None) -> None:
        """Write the checkpoint; `epoch` is the last one that is complete."""
        state = {
            "epoch": epoch,
            "updates": self.updates,
            "optimizer": self.optimizer.state_dict(),
            "best_epoch": self.result.best_epoch,
            "best": dict(self.result.best),
            "config": asdict(self.config),
            "labels": self.task.describe_labels(),
            "run": self.description,
            "inside": inside,
            **self.task.get_checkpoint_state(),
        }
        if self.task.has_ema():
            state.update(self.task.get_checkpoint_state(ema=True))
        if self.scaler:
            state["scaler"] = self.scaler.state_dict()
        self.checkpoints.save(state)
        self._saved_at = time.monotonic()

    def _save_inside(self, epoch: int) -> None:
        """Write a checkpoint inside an epoch, with the place of every process in it."""
        position = asdict(self.progress)
        position["seconds"] += time.monotonic() - self._began
        position["random"] = random_state(self.device)
        positions: list[Any] = [position]
        if is_distributed():
            positions = [None] * self.processes
            dist.all_gather_object(positions, position)
        if self.primary:
            self._save(epoch - 1, {"processes": positions})

    # -- one epoch

    def check(self) -> None:
        """Ask the doctor before a long training.

        Raises:
            ValueError: It found something; the message says what, and what to do.
        """
        from timm_branches.gradients import check_model

        images, labels = next(iter(self.loader))
        if self.translate is not None:
            labels = self.translate(labels)
        batch = (images_to(images, self.device, None), targets_to(labels, self.device))
        progress = self._say_check if self.primary else None
        diagnosis = check_model(self.task, batch, progress=progress)
        if not diagnosis.ok:
            raise ValueError("--check found: " + " ".join(diagnosis.problems))
        if self.primary:
            _logger.info("--check: %d checks passed.", len(diagnosis.passed))

    def _unit(self) -> str:
        """What a sample is called in a line for people."""
        clips = getattr(base_model(self.task), "temporal_heads", ())
        return "clips" if clips else "img"

    @staticmethod
    def _say_check(name: str) -> None:
        _logger.info("--check: %s ...", name)

    def epoch(self, epoch: int) -> None:
        """Train, evaluate, log and save one epoch."""
        self._began = time.monotonic()
        # everything random in this epoch follows from (seed, epoch, rank): a resumed run needs no
        # generator's state, but inside an epoch
        seed_everything(self.config.seed, epoch, self.rank)
        self.task.set_epoch(epoch)
        self._set_loader_epoch(epoch)
        if self.scheduler:
            self.scheduler.step(epoch)
        if self.progress.rate is None:
            self.progress.rate = max(group["lr"] for group in self.optimizer.param_groups)
        rate = self.progress.rate
        losses, count = self._train(epoch)
        seconds = self.progress.seconds + time.monotonic() - self._began
        check_weights(self.task, epoch)
        if is_distributed():
            for ema in (False, True) if self.task.has_ema() else (False,):
                module = self.task.get_trainable_module(ema=ema)
                distribute_bn(module, dist.get_world_size(), reduce=True)
        metrics = self._evaluate(epoch)
        row: dict[str, Any] = {"epoch": epoch, "lr": rate, **losses}
        row |= {f"eval_{key}": value for key, value in metrics.items()}
        for name, weight in zip(self.task.names, self.task.weights, strict=True):
            row[f"weight_{name}"] = weight
        row |= {"seconds": round(seconds, 3), "images_per_second": round(count / seconds, 1)}
        if self.config.conflicts:
            row |= self._conflicts
        self.progress = _Progress()
        self._finish_epoch(epoch, row, metrics)
        if self._agree(self.signals.received is not None) and epoch + 1 < self.config.epochs:
            self._stop(f"after epoch {epoch + 1}")

    def _set_loader_epoch(self, epoch: int) -> None:
        # torch's DataLoader leaves it to its sampler
        shuffles: Any = self.loader
        if not hasattr(self.loader, "set_epoch"):
            shuffles = getattr(self.loader, "sampler", None)
        if hasattr(shuffles, "set_epoch"):
            shuffles.set_epoch(epoch)

    def _evaluate(self, epoch: int) -> dict[str, float | None]:
        """Metrics on the validation data; a signal is heeded there, too."""
        if self.eval_loader is None:
            return {}
        # as the training data are: the two transforms are the caller's
        self.evaluator = evaluate(
            self.task,
            self.eval_loader,
            ema=self.task.has_ema(),
            amp=self.amp,
            own_transform=False,
            each_batch=partial(self._stop_before_evaluation, epoch),
        )
        self.task.end_epoch(self.evaluator.metrics, epoch)
        metrics: dict[str, float | None] = dict(self.evaluator.metrics)
        for name, value in self.evaluator.metrics.items():
            # a metric without a sample (severity without a mistake) is None in logs and files: JSON
            # knows no NaN
            if math.isnan(value):
                metrics[name] = None
        return metrics

    def _finish_epoch(
        self, epoch: int, row: dict[str, Any], metrics: dict[str, float | None]
    ) -> None:
        """Note the epoch's row, and save the model if it is the best."""
        better = not metrics or self._is_better(metrics[self.metric])
        if better:
            self.result.best_epoch = epoch
            self.result.best = metrics
        if self.primary:
            assert self.log is not None
            if better:
                save_model(
                    base_model(self.task, ema=self.task.has_ema()),
                    self.result.model_path,
                    extra={"epoch": epoch, "metrics": metrics, **self.facts},
                )
            if hasattr(self.loader, "bad_images") and self.loader.bad_images:
                row["bad_images"] = len(self.loader.bad_images)
            self.log.append(row)
            self.trackers.log(row, epoch)
            self._save(epoch)
            if self.config.progress:
                headline = self.evaluator.headline if metrics else ()
                _logger.info(_line(row, self.config.epochs, headline, self._unit()))
        self.result.history.append(row)

    def _is_better(self, value: float | None) -> bool:
        best = self.result.best.get(self.metric)
        if best is None or value is None:
            return best is None
        return value < best if self.lower_is_better else value > best

    def _train(self, epoch: int) -> tuple[dict[str, float], int]:
        """Train one epoch, or what is left of it: the mean losses and the number of samples."""
        config, task, progress = self.config, self.task, self.progress
        self._epoch = epoch
        task.train()
        batches = len(self.loader)
        check_every = 1 if self.checks_each_step else config.log_interval
        pending: list[tuple[int, dict[str, torch.Tensor]]] = []
        self._problem: str | None = None
        self.optimizer.zero_grad()
        self.bar.set_description(f"epoch {epoch + 1}/{config.epochs}")
        for index, (images, labels) in self._batches(progress.batch):
            images, labels = self._to_device(images, labels)
            if self.config.conflicts:
                self._note_cosines(index, images, labels)
            if index % config.grad_accum_steps == 0:
                self._remember_buffers()
            last_of_group, group = self._group(index, batches)
            with nullcontext() if last_of_group else task.no_sync():
                with self.amp():
                    result = task(images, labels)
                losses = {name: loss.detach() for name, loss in result["losses"].items()}
                pending.append((index, losses))
                if len(pending) >= check_every or index + 1 == batches:
                    self._check(pending, images)
                    pending.clear()
                self._backward(result["loss"] / group, last_of_group)
            named = {f"train_loss_{name}": loss for name, loss in losses.items()}
            count = len(images[0] if isinstance(images, tuple) else images)
            progress.batch += 1
            if self._problem is None:
                progress.add({"train_loss": result["loss"].detach(), **named}, count)
            self.bar.update()
            if last_of_group:
                self._finish_update(pending)
        self._conflicts = {}
        for name, values in progress.cosines.items():
            self._conflicts[name] = sum(values) / len(values)
        counted = max(1, progress.counted)
        totals = {name: total.double() / counted for name, total in progress.sums.items()}
        if is_distributed():
            for total in totals.values():
                dist.all_reduce(total)
        means = {name: float(total) / self.processes for name, total in totals.items()}
        return means, progress.images * self.processes

    def _batches(self, start: int) -> Iterator[tuple[int, Any]]:
        """Number and content of the epoch's batches, from `start` on."""
        batches: Any = self.loader
        if start:
            skip = getattr(self.loader, "skip_batches", None)
            skipped = skip is not None and skip(start)
            batches = iter(self.loader)
            if not skipped:  # the same batches are drawn again, and left out
                for _ in islice(batches, start):
                    pass
            # from here on everything random goes on where it stood
            set_random_state(self._random, self.device)
        yield from enumerate(batches, start=start)

    def _group(self, index: int, batches: int) -> tuple[bool, int]:
        """Whether a batch is the last before an update, and how many batches that update has."""
        steps = self.config.grad_accum_steps
        rest = batches % steps
        last_of_group = (index + 1) % steps == 0 or index + 1 == batches
        return last_of_group, steps if index < batches - rest else rest

    def _to_device(self, images: Any, labels: Any) -> tuple[Any, Any]:
        """A batch as the task takes it: labels translated, on the device, mixed."""
        if self.translate is not None:
            labels = self.translate(labels)
        self.task.check_targets(labels, self.loader)
        images = images_to(images, self.device, self.memory_format)
        labels = targets_to(labels, self.device)
        if self.mixup is None:
            return images, labels
        if isinstance(images, tuple):
            raise ValueError("mixup and CutMix mix images, not clips: leave them out.")
        return self.mixup(images, labels)

    def _note_cosines(self, index: int, images: Any, labels: Any) -> None:
        """The angles between the branches' gradients, at some batches of an epoch."""
        if index % max(1, len(self.loader) // self.config.conflicts):
            return
        from timm_branches.gradients import branch_cosines

        with self.amp():
            for (a, b), value in branch_cosines(self.task, (images, labels)).items():
                self.progress.cosines.setdefault(f"cosine_{a}_{b}", []).append(value)

    def _backward(self, loss: torch.Tensor, step: bool) -> None:
        """Gradients, and with the last batch of a group the update."""
        config = self.config
        parameters = list(self.task.get_clip_parameters(exclude_head=config.clip_mode == "agc"))
        if self.scaler:
            # it leaves out updates whose gradients overflowed, and lowers its scale
            self.scaler(
                loss,
                self.optimizer,
                clip_grad=config.clip_grad,
                clip_mode=config.clip_mode,
                parameters=parameters,
                need_update=step,
            )
            return
        loss.backward()
        if not step or self._must_skip():
            return
        if config.clip_grad is not None:
            dispatch_clip_grad(parameters, config.clip_grad, mode=config.clip_mode)
        self.optimizer.step()

    def _finish_update(self, pending: list) -> None:
        """After the last batch of a group: averages, rates, and signals."""
        self.optimizer.zero_grad()
        if self._problem is None:
            self.updates += 1
            self.task.update_ema(step=self.updates)
        else:
            self._restore_buffers()
            self._problem = None
        if self.scheduler:
            self.scheduler.step_update(self._position())
        stop = self._agree(self.signals.received is not None)
        minutes = self.config.checkpoint_minutes
        due = minutes > 0 and time.monotonic() - self._saved_at >= 60 * minutes
        if not stop and not self._agree(due):
            return
        if pending:
            check_losses(pending, self._epoch)
            pending.clear()
        check_weights(self.task, self._epoch)
        self._save_inside(self._epoch)
        self._saved_at = time.monotonic()
        if stop:
            done = f"{self.progress.batch} of {len(self.loader)} batches"
            self._stop(f"after {done} of epoch {self._epoch + 1}")

    # -- what must not get into the weights

    def _remember_buffers(self) -> None:
        """Statistics before a forward pass that may spoil them."""
        self._buffers = []
        if self.checks_each_step:
            for buffer in base_model(self.task).buffers():
                self._buffers.append((buffer, buffer.clone()))

    def _restore_buffers(self) -> None:
        for buffer, value in self._buffers:
            buffer.copy_(value)

    def _check(self, pending: list, images: Any) -> None:
        """Look at the losses; one that is not finite stops the run, or makes the update be skipped.

        Raises:
            FloatingPointError: The limit is reached.
        """
        try:
            check_losses(pending, self._epoch)
        except FloatingPointError as error:
            index = pending[-1][0]
            cause = bad_pixel(images, index, self._name_of(index, images))
            message = str(error) if cause is None else f"{cause} {error}"
            self._skip_or_stop(message)

    def _must_skip(self) -> bool:
        """Whether this update is left out, because of its losses or gradients."""
        if not self.checks_each_step:
            return False
        if self._problem is None:
            names = bad_gradients(self.task)
            if names:
                self._skip_or_stop(
                    f"{len(names)} gradients, among them that of {names[0]}, became NaN or "
                    f"infinite in epoch {self._epoch + 1}, batch {self.progress.batch + 1}. "
                    "Training stops; the files of the last good epoch stay. A smaller "
                    "--lr or --clip-grad 1 help most often."
                )
        if not self.config.max_skipped_steps:
            return self._problem is not None
        skipped = self._agree(self._problem is not None)
        if skipped and self._problem is None:
            self._skip_or_stop("a loss in another process is not finite.")
        return skipped

    def _skip_or_stop(self, message: str) -> None:
        if self._problem is None:
            if self.result.skipped_steps >= self.config.max_skipped_steps:
                self._restore_buffers()
                raise FloatingPointError(message)
            self.result.skipped_steps += 1
            _logger.warning(
                "The update is skipped (%d of at most %d): %s",
                self.result.skipped_steps,
                self.config.max_skipped_steps,
                message.split(" Training stops")[0],
            )
        self._problem = message

    def _name_of(self, index: int, images: Any) -> str | None:
        """What the image with the first bad number is called, where the loader's order is known."""
        values = images[0] if isinstance(images, tuple) else images
        bad = (~values.isfinite()).flatten(1).any(1).nonzero()
        names = getattr(self.loader, "name_of_sample", None)
        if names is None or not len(bad):
            return None
        return names(index, int(bad[0]))

    # -- stopping

    def _agree(self, flag: bool) -> bool:
        """Whether it holds in any of the processes."""
        if not is_distributed():
            return flag
        shared = torch.tensor(int(flag), device=self.device)
        dist.all_reduce(shared, op=dist.ReduceOp.MAX)
        return bool(shared)

    def _stop_before_evaluation(self, epoch: int) -> None:
        """A signal during the evaluation: the epoch's training is saved, and evaluated later."""
        # several processes would have to agree before each batch
        if self.signals.received is not None and not is_distributed():
            self._save_inside(epoch)
            self._stop(f"in the evaluation of epoch {epoch + 1}")

    def _stop(self, where: str) -> None:
        if self.primary:
            _logger.warning(
                "Stopped %s. Everything is in %s: the same command with --resume "
                "auto goes on from there.",
                where,
                self.checkpoints.last,
            )
        raise self.signals.end()

    def _note_bad_images(self) -> None:
        """Write what the loaders left out to `bad_images.txt`, a name and a reason a line."""
        left_out: dict[str, str] = {}
        for loader in (self.loader, self.eval_loader):
            left_out |= getattr(loader, "bad_images", {})
        if not left_out:
            return
        # each process has its own part of the data
        name = "bad_images.txt" if self.rank == 0 else f"bad_images-{self.rank}.txt"
        path = self.result.output / name
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                image, _, reason = line.partition("\t")
                left_out.setdefault(image, reason)
        lines = [f"{image}\t{reason}\n" for image, reason in sorted(left_out.items())]
        atomic_write(path, "".join(lines).encode())

    def close(self) -> None:
        """Close logs, also those of a run that failed."""
        self._note_bad_images()
        self.bar.close()
        if self.trackers is not None:
            self.trackers.close()

    def finish(self) -> None:
        """Wait until the files are written, and draw the plots."""
        if is_distributed():
            dist.barrier()
        if not self.primary:
            return
        if not self.config.plots or self.start_epoch >= self.config.epochs:
            return
        try:
            from timm_branches.train.curves import plot_confusion, plot_history

            keys = set().union(*self.result.history)
            if any(key.startswith("cosine_") for key in keys):
                from timm_branches.gradients import plot_conflicts

                plot_conflicts(self.result.history, self.result.output / "conflicts.png")
            plot_history(self.result.history, self.result.output / "history.png", self.metric)
        except ImportError:
            _logger.warning(
                "No plots: matplotlib is not installed (pip install 'timm_branches[recipes]')."
            )
            return
        if self.eval_loader is None:
            return
        for level, matrix, classes in self.task.confusions(self.evaluator):
            safe = re.sub(r"[^\w-]", "_", level)
            plot_confusion(
                matrix,
                classes,
                self.result.output / f"confusion_{safe}.png",
                title=f"{level}: last epoch, validation",
            )


def _line(row: dict, epochs: int, headline: Iterable[str], unit: str) -> str:
    parts = [f"epoch {row['epoch'] + 1}/{epochs}", f"loss {row['train_loss']:.4f}"]
    for name in headline:
        value = row[f"eval_{name}"]
        if value is not None:
            parts.append(f"{name.removesuffix('_top1')} {value:.2f}")
    return "  ".join([*parts, f"lr {row['lr']:.2g}", f"{row['images_per_second']:.0f} {unit}/s"])
