"""Stop a training that went wrong, before its checkpoint replaces a good one."""

import logging
from typing import Any

import torch
from torch import nn

from timm_branches.task import HeadsTask, base_model

_logger = logging.getLogger(__name__)

__all__ = [
    "BadOutputs",
    "bad_gradients",
    "bad_pixel",
    "check_losses",
    "check_weights",
]

_HELP = (
    "Training stops; the files of the last good epoch stay. A smaller --lr, --clip-grad 1, or "
    "--amp-dtype bfloat16 instead of float16 help most often."
)


def check_losses(pending: list[tuple[int, dict[str, torch.Tensor]]], epoch: int) -> None:
    """Raise a FloatingPointError if one of the losses is not finite.

    It names level, epoch and batch.

    Args:
        pending: Pairs of a batch's number and its losses by level.
        epoch: Number of the epoch, from 0.
    """
    names, losses = [], []
    for index, levels in pending:
        for name, loss in levels.items():
            names.append((index, name))
            losses.append(loss.float())
    values = torch.stack(losses)
    bad = (~values.isfinite()).nonzero()
    if len(bad):
        index, name = names[int(bad[0])]
        raise FloatingPointError(
            f"The loss of level {name!r} became {float(values[int(bad[0])])} in batch "
            f"{index + 1} of epoch {epoch + 1}. {_HELP}"
        )


def bad_pixel(images: Any, index: int, name: str | None = None) -> str | None:
    """Where the first number of a batch stands that is not finite, as a sentence; None without one.

    Args:
        images: Images (B, C, H, W), clips (B, T, C, H, W), or a pair of clips and lengths.
        index: The batch's number, from 0.
        name: What the image is called, if that is known.
    """
    values = images[0] if isinstance(images, tuple) else images
    bad = (~values.isfinite()).nonzero()
    if not len(bad):
        return None
    place = bad[0].tolist()
    axes = ("channel", "row", "column")[-(len(place) - 1) :]
    if len(place) == 5:
        axes = ("frame", *axes)
    where = ", ".join(f"{axis} {at}" for axis, at in zip(axes, place[1:], strict=True))
    called = "" if name is None else f" ({name})"
    return (
        f"Image {place[0] + 1} of batch {index + 1}{called} holds {float(values[tuple(place)])} at "
        f"{where} (counted from 0)."
    )


def bad_gradients(task: HeadsTask) -> list[str]:
    """Names of the parameters whose gradient is not finite, as `fc.weight of head 'fine'`.

    Their total norm is looked at first; each by itself only if that is not finite.
    """
    gradients = [p.grad for p in base_model(task).parameters() if p.grad is not None]
    gradients += [p.grad for p in task.parameters_of_loss() if p.grad is not None]
    if not gradients or bool(nn.utils.get_total_norm(gradients).isfinite()):
        return []
    names = []
    for part, name, tensor in _parts(task):
        gradient = getattr(tensor, "grad", None)
        if gradient is not None and not bool(gradient.isfinite().all()):
            names.append(f"{name} of {part}")
    for parameter in task.parameters_of_loss():
        if parameter.grad is not None and not bool(parameter.grad.isfinite().all()):
            names.append("a weight of the loss")
    return names


def check_weights(task: HeadsTask, epoch: int) -> None:
    """Raise a FloatingPointError if a weight or a buffer (BatchNorm's statistics) is not finite.

    The loss shows the update before; what the last one of an epoch did must not get into its
    checkpoint unseen.
    """
    parts = [entry for entry in _parts(task) if entry[2].is_floating_point()]
    flags = [tensor.detach().isfinite().all() for *_, tensor in parts]
    bad = []
    for (part, name, _), finite in zip(parts, torch.stack(flags).tolist(), strict=True):
        if not finite:
            bad.append(f"{name} of {part}")
    if bad:
        raise FloatingPointError(
            f"{len(bad)} weights, among them {bad[0]}, became NaN or infinite in epoch "
            f"{epoch + 1}. {_HELP}"
        )


def _parts(task: HeadsTask) -> list[tuple[str, str, torch.Tensor]]:
    """Part, name and tensor of all parameters and buffers of the backbone and the heads in use."""
    model = base_model(task)
    parts: dict[str, nn.Module] = {"backbone": model.backbone}
    for name in task.needed_heads():
        parts[f"head {name!r}"] = model.head(name)
    found = []
    for part, module in parts.items():
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            found.append((part, name, tensor))
    return found


class BadOutputs:
    """Counts answers that are not finite; they are read from the device once, at the end."""

    def __init__(self) -> None:
        self._counts: dict[str, torch.Tensor] = {}
        self._total = 0

    def update(self, output: dict[str, torch.Tensor]) -> None:
        """Count those of a batch: logits or maps (B, ...) by head."""
        for name, values in output.items():
            bad = (~values.isfinite()).flatten(1).any(1).sum()
            self._counts[name] = self._counts[name] + bad if name in self._counts else bad
        self._total += len(next(iter(output.values())))

    def warn(self) -> None:
        """Say how many there were, if there were any."""
        for name, bad in self._counts.items():
            count = int(bad)
            if count:
                _logger.warning(
                    "The answers of %r for %d of %d samples are NaN or infinite: they count as "
                    "some class, so the metrics are worth nothing.",
                    name,
                    count,
                    self._total,
                )
