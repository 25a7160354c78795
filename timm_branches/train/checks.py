"""Stop a training that went wrong, before its checkpoint replaces a good one."""

import torch

from timm_branches.task import HeadsTask, base_model

__all__ = ["check_losses", "check_weights"]


def check_losses(pending: list[tuple[int, dict[str, torch.Tensor]]], epoch: int) -> None:
    """Raise a FloatingPointError if one of the losses is not finite.

    It names level, epoch and batch.

    Args:
        pending: Pairs of a batch's number and its losses by level.
        epoch: Number of the epoch, from 0.
    """
    names = [(index, name) for index, values in pending for name in values]
    values = torch.stack([v.float() for _, levels in pending for v in levels.values()])
    bad = (~values.isfinite()).nonzero()
    if len(bad):
        index, name = names[int(bad[0])]
        raise FloatingPointError(
            f"The loss of level {name!r} became {float(values[int(bad[0])])} in batch {index} of "
            f"epoch {epoch} (both counted from 0). Training stops; the files of the last good "
            "epoch stay. A smaller --lr, --clip-grad 1, or --amp-dtype bfloat16 instead of "
            "float16 help most often."
        )


def check_weights(task: HeadsTask, epoch: int) -> None:
    """Raise a FloatingPointError if a weight is not finite.

    The loss shows the update before; what the last one of an epoch did must not get into its
    checkpoint unseen.
    """
    model = base_model(task)
    parts = {
        "backbone": model.backbone,
        **{f"head {name!r}": model.head(name) for name in task.needed_heads()},
    }
    parameters = [
        (part, name, p) for part, module in parts.items() for name, p in module.named_parameters()
    ]
    finite = torch.stack([p.detach().isfinite().all() for *_, p in parameters]).tolist()
    bad = [
        f"{name} of {part}"
        for (part, name, _), ok in zip(parameters, finite, strict=True)
        if not ok
    ]
    if bad:
        raise FloatingPointError(
            f"{len(bad)} weights, among them {bad[0]}, became NaN or infinite in epoch {epoch} "
            "(counted from 0). Training stops; the files of the last good epoch stay. A smaller "
            "--lr or --clip-grad 1 help most often."
        )
