"""Settings of a training run, with timm's names, and their command line."""

from __future__ import annotations

import argparse
import math
import re
import warnings
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

__all__ = ["FitConfig", "add_fit_arguments"]


def _setting(default: Any, text: str, **kwargs: Any) -> Any:
    return field(default=default, metadata={"help": text, **kwargs})


@dataclass
class FitConfig:
    """What `fit` needs to know beside task and data.

    Names and meanings are those of timm's train.py.

    Raises:
        ValueError: A value outside its range, or settings that do not go together.

    Example:
        >>> FitConfig(epochs=3, opt='adamw', lr=1e-3).sched
        'cosine'
    """

    output: str = _setting("output", "folder for model, checkpoint, log and plots")
    epochs: int = _setting(20, "epochs to train")
    seed: int = _setting(0, "seed of everything random")
    device: str = _setting("", "cpu, cuda, ...; cuda if there is one")
    resume: str = _setting(
        "", "checkpoint to continue from, or 'auto' for the output folder's if there is one"
    )

    checkpoint_minutes: float = _setting(
        0.0, "minutes between checkpoints inside an epoch; 0 writes one after each epoch"
    )
    keep: int = _setting(
        0, "checkpoints of earlier epochs to keep; a good one is taken if the newest is damaged"
    )
    max_skipped_steps: int = _setting(
        0, "updates that may be skipped because a loss or gradient is not finite"
    )

    opt: str = _setting("sgd", "timm optimizer")
    lr: float = _setting(0.05, "learning rate")
    weight_decay: float = _setting(2e-5, "weight decay")
    momentum: float = _setting(0.9, "momentum")
    layer_decay: float | None = _setting(None, "layer-wise learning-rate decay")
    sched: str = _setting("cosine", "timm scheduler, or 'piecewise' with --lr-steps")
    lr_steps: str = _setting(
        "", "learning rate from given 0-based epochs on, such as '0:3e-3;41:5e-4' (piecewise)"
    )
    min_lr: float = _setting(0.0, "lowest learning rate")
    warmup_epochs: int = _setting(0, "epochs of linear warm-up")
    warmup_lr: float = _setting(1e-5, "learning rate at the start of warm-up")
    decay_rate: float = _setting(0.1, "factor of step and multistep schedulers")
    decay_milestones: str = _setting("", "epochs at which multistep decays, such as '30,60'")
    grad_accum_steps: int = _setting(1, "batches whose gradients are added up before a step")
    clip_grad: float | None = _setting(None, "gradient clipping")
    clip_mode: str = _setting("norm", "norm, value or agc", choices=("norm", "value", "agc"))

    amp: bool = _setting(False, "mixed precision")
    amp_dtype: str = _setting("bfloat16", "bfloat16 or float16", choices=("bfloat16", "float16"))
    channels_last: bool = _setting(False, "channels_last memory layout")
    torchcompile: bool = _setting(False, "compile the model")
    grad_checkpointing: bool = _setting(
        False, "recompute the backbone's activations in the backward pass"
    )
    freeze_backbone: bool = _setting(
        False, "train the heads only; BatchNorm of the backbone is fixed too"
    )
    sync_bn: bool = _setting(False, "BatchNorm over all GPUs (DDP)")

    model_ema: bool = _setting(
        False, "keep a moving average of the weights; it is what is evaluated and saved"
    )
    model_ema_decay: float = _setting(0.9998, "decay of the moving average")
    model_ema_warmup: bool = _setting(False, "smaller decay at the start")

    check: bool = _setting(
        False, "look for common faults in model and labels on one batch before training"
    )
    check_only: bool = _setting(False, "look for faults as --check does, and stop")
    conflicts: int = _setting(
        0, "times an epoch at which the cosines between the branches' gradients are logged"
    )
    eval_metric: str = _setting(
        "", "metric of the best model; by default the accuracy of the finest level"
    )
    tensorboard: bool = _setting(False, "log to TensorBoard")
    wandb: str = _setting("", "log to this wandb project")
    plots: bool = _setting(True, "draw curves and confusion matrices at the end")
    progress: bool = _setting(True, "show a progress bar")
    log_interval: int = _setting(50, "batches between checks for a finite loss on an accelerator")

    def __post_init__(self):
        self._check_types()
        positive = ("epochs", "lr", "grad_accum_steps", "log_interval")
        for name in positive:
            if not getattr(self, name) > 0:
                raise ValueError(f"{_flag(name)} must be above 0, got {getattr(self, name)!r}.")
        not_negative = (
            "weight_decay",
            "min_lr",
            "warmup_epochs",
            "conflicts",
            "checkpoint_minutes",
            "keep",
            "max_skipped_steps",
        )
        for name in not_negative:
            if not getattr(self, name) >= 0:
                raise ValueError(
                    f"{_flag(name)} must not be negative, got {getattr(self, name)!r}."
                )
        if self.clip_grad is not None and not self.clip_grad > 0:
            raise ValueError(
                f"--clip-grad must be above 0, got {self.clip_grad!r}: leave it out not to clip."
            )
        if not 0 <= self.model_ema_decay < 1:
            raise ValueError(f"--model-ema-decay must be in [0, 1), got {self.model_ema_decay!r}.")
        if self.layer_decay is not None and not 0 < self.layer_decay <= 1:
            raise ValueError(f"--layer-decay must be in (0, 1], got {self.layer_decay!r}.")
        if (self.sched == "piecewise") != bool(self.lr_steps):
            raise ValueError(
                "--sched piecewise and --lr-steps go together: "
                f"got --sched {self.sched} and --lr-steps {self.lr_steps!r}."
            )
        if self.sched == "none" and self.layer_decay is not None:
            raise ValueError("--layer-decay has no effect with --sched none: use --sched constant.")
        for name in ("amp_dtype", "clip_mode"):
            choices = next(f for f in fields(self) if f.name == name).metadata["choices"]
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{_flag(name)} must be one of {', '.join(choices)}, got "
                    f"{getattr(self, name)!r}."
                )
        steps = self.lr_at()
        if steps and self.lr not in (FitConfig.lr, steps[0]):
            warnings.warn(
                f"--lr {self.lr} has no effect beside --lr-steps {self.lr_steps!r}.", stacklevel=3
            )
        for name, needed in _NEEDS.items():
            if getattr(self, name) != getattr(FitConfig, name) and not getattr(self, needed):
                warnings.warn(f"{_flag(name)} has no effect without {_flag(needed)}.", stacklevel=3)

    def _check_types(self) -> None:
        """Refuse values of another type than the setting has."""
        for setting in fields(self):
            value = getattr(self, setting.name)
            kind = float if setting.default is None else type(setting.default)
            if value is None and setting.default is None:
                continue
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            # a rate may be written as a whole number
            good = number if kind is float else type(value) is kind
            if not good:
                raise ValueError(
                    f"{_flag(setting.name)} takes {_TYPES[kind]}, got {value!r} of type "
                    f"{type(value).__name__}."
                )
            if number and not math.isfinite(value):
                raise ValueError(f"{_flag(setting.name)} must be above 0 and finite, got {value}.")
        if self.device and not _DEVICE.fullmatch(self.device):
            raise ValueError(
                f"--device {self.device}: there is no such device. Write cpu, cuda or cuda:1."
            )

    def lr_at(self) -> dict[int, float]:
        """`--lr-steps` as {first epoch: learning rate}."""
        if not self.lr_steps:
            return {}
        try:
            pairs = [part.split(":") for part in self.lr_steps.split(";") if part.strip()]
            steps = {int(epoch): float(lr) for epoch, lr in pairs}
        except ValueError:
            raise ValueError(
                f"--lr-steps {self.lr_steps!r}: write epoch:rate pairs, such as '0:3e-3;41:5e-4'."
            ) from None
        if 0 not in steps or any(lr <= 0 for lr in steps.values()):
            raise ValueError(
                f"--lr-steps {self.lr_steps!r}: epoch 0 must be given and rates be above 0."
            )
        return dict(sorted(steps.items()))

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> FitConfig:
        """The settings out of parsed arguments."""
        return cls(**{f.name: getattr(args, f.name) for f in fields(cls)})


_TYPES = {bool: "True or False", int: "a whole number", float: "a number", str: "a text"}
_DEVICE = re.compile(r"(cpu|cuda|mps|xpu|hpu|mtia|xla|meta)(:[0-9]{1,3})?")

# settings that do nothing unless another is on
_NEEDS = {
    "amp_dtype": "amp",
    "model_ema_decay": "model_ema",
    "model_ema_warmup": "model_ema",
    "clip_mode": "clip_grad",
    "warmup_lr": "warmup_epochs",
}


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def add_fit_arguments(parser: argparse.ArgumentParser) -> None:
    """Add a flag for every setting of :class:`FitConfig`; switches also come as `--no-...`."""
    group = parser.add_argument_group("training (timm's names)")
    for f in fields(FitConfig):
        assert f.default is not MISSING
        # None is the default of "float | None" only
        convert = float if f.default is None else type(f.default)
        if convert is bool:
            group.add_argument(
                _flag(f.name),
                action=argparse.BooleanOptionalAction,
                default=f.default,
                help=f.metadata["help"],
            )
        else:
            group.add_argument(
                _flag(f.name),
                type=convert,
                default=f.default,
                choices=f.metadata.get("choices"),
                # a recipe may have another
                help=f"{f.metadata['help'].replace('%', '%%')} (default: %(default)s)",
                metavar=None if f.metadata.get("choices") else convert.__name__.upper(),
            )
