"""`fit`: our training loop, made of timm's parts; and `evaluate`."""

import logging
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from timm.optim import create_optimizer_v2
from timm.task import evaluation_sample_limit
from timm.utils import NativeScaler, dispatch_clip_grad, distribute_bn
from tqdm import tqdm

from timm_branches.data import HierarchicalDataset, label_names
from timm_branches.data.images import one_of_each_size
from timm_branches.files import replace_file
from timm_branches.model import BranchModel
from timm_branches.task import HeadsTask, base_model
from timm_branches.train.checkpoint import load_state, save_state
from timm_branches.train.checks import check_losses, check_weights
from timm_branches.train.config import FitConfig
from timm_branches.train.log import CsvLog, open_trackers
from timm_branches.train.lr import create_scheduler
from timm_branches.train.process import current_device, is_distributed, is_primary, seed_everything
from timm_branches.weights import save_model

_logger = logging.getLogger(__name__)

__all__ = ["FitResult", "evaluate", "fit", "try_evaluation"]


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
    """

    output: Path
    history: list[dict] = field(default_factory=list)
    best_epoch: int = -1
    best: dict[str, float | None] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def model_path(self) -> Path:
        """The best model's file."""
        return self.output / "model.safetensors"


@torch.no_grad()
def evaluate(
    task: HeadsTask,
    loader: Iterable,
    ema: bool = False,
    amp: Any = nullcontext,
    own_transform: bool = True,
    **options: Any,
) -> Any:
    """Run a task's evaluator over a loader of (images, labels (N, L)), exactly, over all processes.

    Args:
        task: The task.
        loader: Batches, as for :func:`fit`.
        ema: Evaluate the moving average of the weights.
        amp: Makes the context of the forward pass.
        own_transform: Give a data set of images that has no transform the model's own, as
            :func:`timm_branches.inference.model_transform` makes it; a model that was trained on
            normalised images would else be shown others.
        **options: What the evaluator takes, such as `decoder`.

    Raises:
        ValueError: The data set's labels mean other classes than the model's.

    Returns:
        The evaluator; `compute()` has been called with the processes joined, see
        `evaluator.metrics`.
    """
    model: Any = task.get_eval_model(ema=ema)
    was_training = model.training
    model.eval()
    evaluator = task.create_evaluator(max_samples=evaluation_sample_limit(loader), **options)
    translate = task.match_labels(label_names(loader))
    if own_transform:
        _use_own_transform(loader, base_model(task))
    for images, labels in loader:
        with amp():
            output = task.answer(model, _to(images, task.device, None))
        if translate is not None:
            labels = translate(labels)
        evaluator.update(output, _move(labels, task.device))
    model.train(was_training)
    evaluator.metrics = evaluator.compute(distributed=is_distributed())
    return evaluator


def _without_transform(loader: Any) -> list[Any]:
    """Our data sets below a loader that have no transform."""
    found = []
    waiting = [getattr(loader, "dataset", None)]
    while waiting:
        data = waiting.pop()
        if isinstance(data, HierarchicalDataset) and data.transform is None:
            found.append(data)
        inner = getattr(data, "datasets", None) or [getattr(data, "dataset", None)]
        waiting += [part for part in inner if part is not None]
    return found


def _use_own_transform(loader: Any, model: BranchModel) -> None:
    """Give data sets without a transform the model's own, unless it was trained without one."""
    from timm_branches.inference import model_transform

    if model.pretrained_cfg.get("raw_inputs"):
        return
    for data in _without_transform(loader):
        data.transform = model_transform(model)
        _logger.info("The data set has no transform: the model's own is used: %s", data.transform)


def _note_raw_inputs(loader: Any, model: BranchModel) -> None:
    """Keep with a model that it was trained on images in [0, 1] as they are."""
    if _without_transform(loader):
        zeros, ones = (0.0,) * model.in_chans, (1.0,) * model.in_chans
        model.pretrained_cfg.update(mean=zeros, std=ones, crop_pct=1.0, raw_inputs=True)


@torch.no_grad()
def try_evaluation(task: HeadsTask, loader: Any, amp: Any = nullcontext) -> None:
    """Evaluate one image of each size, before anything is trained; `fit` does it by itself.

    What a model cannot answer for (an odd size for a ViT) would otherwise show after an epoch, or
    after all of them. Nothing is changed by it: neither weights nor statistics nor the state of
    random numbers.

    Args:
        task: The task.
        loader: A DataLoader of evaluation data; anything else, and None, is passed over.
        amp: Makes the context of the forward pass.

    Raises:
        ValueError: The model cannot take an image.
    """
    data = getattr(loader, "dataset", None)
    collate = getattr(loader, "collate_fn", None)
    if data is None or collate is None or not hasattr(data, "__getitem__"):
        return
    translate = task.match_labels(label_names(loader))
    state = torch.get_rng_state()
    model: Any = task.get_eval_model()
    was_training = model.training
    model.eval()
    evaluator = task.create_evaluator()
    for index in one_of_each_size(data):
        images, labels = collate([data[index]])
        if translate is not None:
            labels = translate(labels)
        with amp():
            output = task.answer(model, _to(images, task.device, None))
        evaluator.update(output, _move(labels, task.device))
    model.train(was_training)
    torch.set_rng_state(state)


def fit(
    task: HeadsTask,
    train_loader: Any,
    eval_loader: Any = None,
    config: FitConfig | None = None,
    mixup: Callable | None = None,
    facts: dict | None = None,
) -> FitResult:
    """Train a task.

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
        FloatingPointError: A level's loss became NaN or infinite; the message names level, epoch
            and batch. The checkpoint of the last good epoch stays.
        ValueError: A setting that cannot be honoured.
    """
    config = config or FitConfig()
    began = time.monotonic()
    run = _Run(task, train_loader, eval_loader, config, mixup, facts or {})
    try:
        if config.check:
            run.check()
        try_evaluation(task, eval_loader, run.amp)
        for epoch in range(run.start_epoch, config.epochs):
            run.epoch(epoch)
    finally:
        run.close()
    run.finish()
    run.result.seconds = time.monotonic() - began
    return run.result


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
        self.task, self.loader, self.eval_loader = task, train_loader, eval_loader
        self.config, self.mixup, self.facts = config, mixup, facts
        self.primary = is_primary()
        self.device = current_device(config.device)
        self.rank = dist.get_rank() if is_distributed() else 0
        if len(train_loader) == 0:
            raise ValueError(
                "the training loader has no batch: the data set is smaller than a batch."
            )
        # before anything is trained: what the labels mean
        self.translate = task.match_labels(label_names(train_loader))
        if eval_loader is not None:
            task.match_labels(label_names(eval_loader))
        _note_raw_inputs(train_loader, base_model(task))
        self.memory_format = torch.channels_last if config.channels_last else None
        self._prepare()
        self.updates_per_epoch = math.ceil(len(train_loader) / config.grad_accum_steps)
        self.scheduler = create_scheduler(self.optimizer, config, self.updates_per_epoch)
        self.metric = config.eval_metric or task.default_metric
        evaluator = task.create_evaluator()
        if self.metric not in evaluator.metric_names:
            raise ValueError(
                f"--eval-metric {self.metric!r}: choose one of {', '.join(evaluator.metric_names)}."
            )
        self.lower_is_better = evaluator.lower_is_better(self.metric)
        if config.conflicts and len(task.names) < 2:
            raise ValueError(f"--conflicts has no effect: {list(task.names)} is a single loss.")
        if config.eval_metric and eval_loader is None:
            raise ValueError("--eval-metric has no effect without evaluation data.")
        self.result = FitResult(Path(config.output))
        self.start_epoch, self.updates = 0, 0
        taken = self.checkpoint.exists() or self.result.model_path.exists()
        if taken and config.resume != "auto" and not _same_file(config.resume, self.checkpoint):
            raise ValueError(
                f"{config.output} holds an earlier run: continue it with resume='auto' (--resume "
                "auto), or choose another output folder."
            )
        self._resume()
        # after a resume, which may bring a schedule that turns levels off
        if is_distributed() and not task.distributed:
            task.prepare_distributed(
                device_ids=[self.device] if self.device.type == "cuda" else None
            )
        self.log = (
            CsvLog(self.result.output / "log.csv", keep_until_epoch=self.start_epoch)
            if self.primary
            else None
        )
        self.result.history = self.log.read() if self.log else []
        self.trackers = (
            open_trackers(
                config.tensorboard, config.wandb or None, str(self.result.output), asdict(config)
            )
            if self.primary
            else None
        )
        # in a file or a pipe, the line that each epoch prints is enough
        self.bar = tqdm(
            total=config.epochs * len(train_loader),
            initial=self.start_epoch * len(train_loader),
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
        if own := list(task.parameters_of_loss()):
            self.optimizer.add_param_group({"params": own, "weight_decay": 0.0})
        self.scaler = (
            NativeScaler(device=self.device.type)
            if config.amp and config.amp_dtype == "float16"
            else None
        )
        if config.model_ema:
            task.setup_ema(decay=config.model_ema_decay, use_warmup=config.model_ema_warmup)
        if config.torchcompile:
            task.compile()

    def amp(self):
        """Autocast, or nothing."""
        if not self.config.amp:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=getattr(torch, self.config.amp_dtype))

    # -- checkpoints

    @property
    def checkpoint(self) -> Path:
        return self.result.output / "last.safetensors"

    def _resume(self) -> None:
        path = self.config.resume
        if path == "auto":
            path = str(self.checkpoint) if self.checkpoint.exists() else ""
        if not path:
            return
        state = load_state(path)
        asked = self.task.describe_schedule()
        missing = [key for key in ("state_dict", "optimizer", "epoch") if key not in state]
        if missing or (self.config.model_ema and "state_dict_ema" not in state):
            raise ValueError(
                f"--resume {path}: the checkpoint lacks "
                f"{', '.join(missing or ['the moving average'])}."
            )
        self.task.check_labels_of(state.get("labels", {}), f"--resume {path}")
        trained_with = state.get("config", {}).get("opt", self.config.opt)
        # torch itself would take the state of another optimizer as it is
        if trained_with != self.config.opt:
            raise ValueError(
                f"--resume {path} is of another optimizer: it was trained with --opt "
                f"{trained_with}, not {self.config.opt}."
            )
        try:
            self.task.load_checkpoint_state(state["state_dict"], state.get("task_state"))
            if self.config.model_ema:
                self.task.load_checkpoint_state(state["state_dict_ema"], ema=True)
            self.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise ValueError(
                f"--resume {path} is of another model or optimizer: {error}"
            ) from error
        if self.task.describe_schedule() != asked and self.primary:
            _logger.warning(
                "The checkpoint's loss-weight schedule is used, not the one asked for:\n%s",
                self.task.describe_schedule(),
            )
        if self.scaler and "scaler" in state:
            self.scaler.load_state_dict(state["scaler"])
        self.start_epoch, self.updates = state["epoch"] + 1, state["updates"]
        self.result.best_epoch, self.result.best = state["best_epoch"], dict(state["best"])
        if not _same_file(path, self.checkpoint):
            self._bring(Path(path).parent)
        if self.start_epoch >= self.config.epochs and self.config.resume != "auto":
            raise ValueError(
                f"--resume {path} is of epoch {state['epoch']} (0-based): nothing is left of "
                f"--epochs {self.config.epochs}."
            )

    def _bring(self, folder: Path) -> None:
        """Take over the best model and the log of a run in another folder."""
        if not (folder / "model.safetensors").exists():
            self.result.best_epoch, self.result.best = -1, {}
        for name in ("model.safetensors", "log.csv"):
            if self.primary and (folder / name).exists():
                replace_file(self.result.output / name, partial(shutil.copyfile, folder / name))

    def _save(self, epoch: int) -> None:
        state = {
            "epoch": epoch,
            "updates": self.updates,
            "optimizer": self.optimizer.state_dict(),
            "best_epoch": self.result.best_epoch,
            "best": dict(self.result.best),
            "config": asdict(self.config),
            "labels": self.task.describe_labels(),
            **self.task.get_checkpoint_state(),
        }
        if self.task.has_ema():
            state.update(self.task.get_checkpoint_state(ema=True))
        if self.scaler:
            state["scaler"] = self.scaler.state_dict()
        save_state(self.checkpoint, state)

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
        diagnosis = check_model(
            self.task, (_to(images, self.device, None), _move(labels, self.device))
        )
        if not diagnosis.ok:
            raise ValueError("--check found: " + " ".join(diagnosis.problems))
        if self.primary:
            _logger.info("--check: %d checks passed.", len(diagnosis.passed))

    def epoch(self, epoch: int) -> None:
        """Train, evaluate, log and save one epoch."""
        began = time.monotonic()
        # everything random in this epoch follows from (seed, epoch, rank): a resumed run needs no
        # generator's state
        seed_everything(self.config.seed, epoch, self.rank)
        self.task.set_epoch(epoch)
        # torch's DataLoader leaves it to its sampler
        shuffles: Any = (
            self.loader
            if hasattr(self.loader, "set_epoch")
            else getattr(self.loader, "sampler", None)
        )
        if hasattr(shuffles, "set_epoch"):
            shuffles.set_epoch(epoch)
        if self.scheduler:
            self.scheduler.step(epoch)
        rate = max(group["lr"] for group in self.optimizer.param_groups)
        losses, count = self._train(epoch)
        seconds = time.monotonic() - began
        check_weights(self.task, epoch)
        row: dict[str, Any] = {"epoch": epoch, "lr": rate, **losses}
        if is_distributed():
            for ema in (False, True) if self.task.has_ema() else (False,):
                distribute_bn(
                    self.task.get_trainable_module(ema=ema), dist.get_world_size(), reduce=True
                )
        metrics: dict[str, float | None] = {}
        if self.eval_loader is not None:
            # as the training data are: the two transforms are the caller's
            self.evaluator = evaluate(
                self.task,
                self.eval_loader,
                ema=self.task.has_ema(),
                amp=self.amp,
                own_transform=False,
            )
            # a metric without a sample (severity without a mistake) is None in logs and files: JSON
            # knows no NaN
            metrics = {k: None if math.isnan(v) else v for k, v in self.evaluator.metrics.items()}
            self.task.end_epoch(self.evaluator.metrics, epoch)
        row |= {f"eval_{key}": value for key, value in metrics.items()}
        row |= {
            f"weight_{name}": w for name, w in zip(self.task.names, self.task.weights, strict=True)
        }
        row |= {"seconds": round(seconds, 3), "images_per_second": round(count / seconds, 1)}
        if self.config.conflicts:
            row |= self._conflicts
        better = not metrics or self._is_better(metrics[self.metric])
        if better:
            self.result.best_epoch, self.result.best = epoch, metrics
        if self.primary:
            assert self.log is not None
            assert self.trackers is not None
            if better:
                save_model(
                    base_model(self.task, ema=self.task.has_ema()),
                    self.result.model_path,
                    extra={"epoch": epoch, "metrics": metrics, **self.facts},
                )
            self.log.append(row)
            self.trackers.log(row, epoch)
            self._save(epoch)
            if self.config.progress:
                headline = self.evaluator.headline if metrics else ()
                _logger.info(_line(row, self.config.epochs, headline))
        self.result.history.append(row)

    def _is_better(self, value: float | None) -> bool:
        best = self.result.best.get(self.metric)
        if best is None or value is None:
            return best is None
        return value < best if self.lower_is_better else value > best

    def _train(self, epoch: int) -> tuple[dict[str, float], int]:
        config, task = self.config, self.task
        task.train()
        batches = len(self.loader)
        accumulate = config.grad_accum_steps
        check_every = 1 if self.device.type == "cpu" else config.log_interval
        cosines: dict[str, list[float]] = {}
        every = max(1, batches // config.conflicts) if config.conflicts else 0
        sums: dict[str, torch.Tensor] = {}
        pending: list[tuple[int, dict[str, torch.Tensor]]] = []
        count = 0
        self.optimizer.zero_grad()
        self.bar.set_description(f"epoch {epoch + 1}/{config.epochs}")
        for index, (images, labels) in enumerate(self.loader):
            images = _to(images, self.device, self.memory_format)
            if self.translate is not None:
                labels = self.translate(labels)
            labels = _move(labels, self.device)
            count += len(images[0] if isinstance(images, tuple) else images)
            if self.mixup is not None:
                if isinstance(images, tuple):
                    raise ValueError("mixup and CutMix mix images, not clips: leave them out.")
                images, labels = self.mixup(images, labels)
            if every and index % every == 0:
                from timm_branches.gradients import branch_cosines

                with self.amp():
                    for (a, b), value in branch_cosines(task, (images, labels)).items():
                        cosines.setdefault(f"cosine_{a}_{b}", []).append(value)
            last_of_group = (index + 1) % accumulate == 0 or index + 1 == batches
            group = accumulate if index < batches - batches % accumulate else batches % accumulate
            with nullcontext() if last_of_group else task.no_sync():
                with self.amp():
                    result = task(images, labels)
                values = {name: loss.detach() for name, loss in result["losses"].items()}
                pending.append((index, values))
                if len(pending) >= check_every or index + 1 == batches:
                    check_losses(pending, epoch)
                    pending.clear()
                self._backward(result["loss"] / group, last_of_group)
            for name, value in {
                "train_loss": result["loss"].detach(),
                **{f"train_loss_{k}": v for k, v in values.items()},
            }.items():
                sums[name] = sums[name] + value if name in sums else value
            if last_of_group:
                self.optimizer.zero_grad()
                self.updates += 1
                task.update_ema(step=self.updates)
                if self.scheduler:
                    self.scheduler.step_update(self.updates)
            self.bar.update()
        self._conflicts = {name: sum(values) / len(values) for name, values in cosines.items()}
        totals = {name: total.double() / batches for name, total in sums.items()}
        world = dist.get_world_size() if is_distributed() else 1
        if is_distributed():
            for total in totals.values():
                dist.all_reduce(total)
        return {name: float(total) / world for name, total in totals.items()}, count * world

    def _backward(self, loss: torch.Tensor, step: bool) -> None:
        config = self.config
        parameters = list(self.task.get_clip_parameters(exclude_head=config.clip_mode == "agc"))
        if self.scaler:
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
        if step:
            if config.clip_grad is not None:
                dispatch_clip_grad(parameters, config.clip_grad, mode=config.clip_mode)
            self.optimizer.step()

    def close(self) -> None:
        """Close logs, also those of a run that failed."""
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

            if any(key.startswith("cosine_") for row in self.result.history for key in row):
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
            safe = "".join(c if c.isalnum() or c in "-_" else "_" for c in level)
            plot_confusion(
                matrix,
                classes,
                self.result.output / f"confusion_{safe}.png",
                title=f"{level}: last epoch, validation",
            )


def _same_file(path: str, other: Path) -> bool:
    return bool(path) and Path(path).resolve() == other.resolve()


def _to(images: Any, device: torch.device, memory_format: Any) -> Any:
    """Images, or clips beside their lengths, which the host reads, on a device."""
    if isinstance(images, tuple):
        clips, lengths = images
        return _to(clips, device, memory_format), lengths
    if memory_format is not None and images.ndim < 4:
        raise ValueError(
            f"--channels-last has no effect on features of shape {tuple(images.shape)}: leave it "
            "out."
        )
    if memory_format is None or images.ndim != 4:
        return images.to(device, non_blocking=True)
    return images.to(device, non_blocking=True, memory_format=memory_format)


def _move(targets: Any, device: torch.device) -> Any:
    """Targets, or a dict of them, on a device."""
    if isinstance(targets, dict):
        return {name: _move(target, device) for name, target in targets.items()}
    return targets.to(device, non_blocking=True)


def _line(row: dict, epochs: int, headline: Iterable[str]) -> str:
    parts = [f"epoch {row['epoch'] + 1}/{epochs}", f"loss {row['train_loss']:.4f}"]
    parts += [
        f"{name.removesuffix('_top1')} {row[f'eval_{name}']:.2f}"
        for name in headline
        if row[f"eval_{name}"] is not None
    ]
    return "  ".join([*parts, f"lr {row['lr']:.2g}", f"{row['images_per_second']:.0f} img/s"])
