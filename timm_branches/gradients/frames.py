"""Which frames of a clip the loss sees.

A clip of frames x_1 ... x_T gives features f_t = CNN(x_t), which a recurrence reads. ‖dL/df_t‖ says
how much the loss sees of frame t; it is exactly 0 for a frame that the loss does not depend on.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from timm_branches.gradients.objective import Objective, reproducible
from timm_branches.gradients.report import table
from timm_branches.model import BranchModel

__all__ = ["FrameGradients", "frame_gradients"]

_FADED = 1e-3  # a frame with less than this part of the largest frame's gradient has faded


@dataclass
class FrameGradients:
    """Result of :func:`frame_gradients`; `print` shows it as text.

    Attributes:
        norms: ‖dL/df_t‖ for each frame t, over the batch (T,); None if no gradient arrives at any
            feature.
        norms_per_clip: The same for each clip (B, T).
        seen: Numbers of the frames with a gradient.
        findings: What is wrong, in sentences.
    """

    norms: torch.Tensor | None
    norms_per_clip: torch.Tensor | None
    seen: list[int]
    findings: list[str]

    def __str__(self) -> str:
        lines = []
        if self.norms is not None:
            columns = [str(frame) for frame in range(len(self.norms))]
            norms = [f"{float(norm):.1e}" for norm in self.norms]
            lines.append(table("frame", columns, [["gradient norm", *norms]]))
        return "\n".join([*lines, *(self.findings or ["the loss sees every frame."])])


def frame_gradients(
    model: nn.Module,
    batch: Any,
    loss: Callable[..., torch.Tensor],
    features: str | None = None,
    head: str | None = None,
    lengths: Any = None,
) -> FrameGradients:
    """Measure which frames of a clip the loss sees, and whether its gradient goes on into the CNN.

    The model runs in the mode it is in and is left as it was, as by :func:`gradient_report`.

    Args:
        model: A branch model with a temporal head, or any module that takes clips (B, T, ...).
        batch: The clips, or a pair of clips and target.
        loss: A function of (output) or (output, target) that returns a scalar; the output is that
            of the head.
        features: For another module: path of its part that turns frames into features. It may be
            called once for all frames, (B * T, ...) with the frames of a clip one after the other,
            or once for each time step, (B, ...).
        head: The branch model's head to look at, which may be left out if it has one temporal head.
        lengths: Valid frames of each clip, for a branch model.

    Returns:
        A :class:`FrameGradients`.

    Raises:
        ValueError: No such head or part, or a part that is not called in one of these two ways.

    Example:
        >>> from timm_branches import create_branch_model
        >>> model = create_branch_model('test_resnet', head='lstm', num_classes=2, img_size=32)
        >>> clips, labels = torch.randn(2, 4, 3, 32, 32), torch.tensor([0, 1])
        >>> frame_gradients(model, (clips, labels), torch.nn.functional.cross_entropy).seen
        [0, 1, 2, 3]
    """
    objective = Objective(model, batch, loss)
    clips = objective.input
    run, part, name, cnn = _frame_part(model, features, head, lengths)
    calls: list[tuple[torch.Tensor, bool]] = []

    def hook(module: nn.Module, args: Any, output: Any) -> torch.Tensor:
        if not isinstance(output, torch.Tensor):
            raise ValueError(
                f"{name!r} returns {type(output).__name__}: features= must name a part that "
                "returns one tensor."
            )
        leaf = output.detach().requires_grad_()
        calls.append((leaf, output.requires_grad))
        # a view of a leaf made under no_grad would not carry its gradient
        with torch.enable_grad():
            return leaf * 1

    with objective.undisturbed():
        handle = part.register_forward_hook(hook)
        try:
            with reproducible(objective.device):
                value = loss(run(clips.clone()), *objective.targets)
        finally:
            handle.remove()
        if not calls:
            raise ValueError(
                f"{name!r} is not run in the forward pass: name the part that makes the features."
            )
        leaves = [leaf for leaf, _ in calls]
        given: Sequence[torch.Tensor | None] = [None] * len(calls)
        if value.requires_grad:
            given = torch.autograd.grad(value, leaves, allow_unused=True)
    trained = [p for p in cnn.parameters() if p.requires_grad]
    attached = all(live for _, live in calls)
    valid = None
    if lengths is not None:
        lengths = torch.as_tensor(lengths).cpu()
        lengths = lengths.sum(1) if lengths.ndim == 2 else lengths
        valid = torch.arange(clips.shape[1]) < lengths[:, None]
    grads = []
    arrived = []
    for leaf, gradient in zip(leaves, given, strict=True):
        grads.append(leaf if gradient is None else gradient)
        arrived.append(gradient is not None)
    norms = _by_frame(grads, arrived, clips.shape[:2], valid, name)
    findings = []
    if trained and not attached:
        findings.append(
            f"{name} is run without autograd (torch.no_grad(), or its result is detached): the "
            f"loss does not train its {len(trained)} trainable parameters. Take the no_grad or "
            "detach away, or freeze them (requires_grad_(False)) if that is what you want."
        )
    if all(g is None for g in given):
        findings.append(
            "no gradient of the loss arrives at any frame's features: they are detached before "
            "the loss, or not used."
        )
        return FrameGradients(None, None, [], findings)
    over_batch = norms.square().sum(0).sqrt()
    seen = [t for t, v in enumerate(over_batch.tolist()) if v != 0]
    return FrameGradients(
        over_batch, norms, seen, findings + _judge_frames(over_batch, seen, valid)
    )


def _frame_part(
    model: nn.Module, features: str | None, head: str | None, lengths: Any
) -> tuple[Callable[[torch.Tensor], Any], nn.Module, str, nn.Module]:
    """How to run the model, the part that makes features, its name, and the CNN."""
    if isinstance(model, BranchModel) and features is None:
        temporal = model.temporal_heads
        if (head is None and len(temporal) != 1) or (head is not None and head not in temporal):
            raise ValueError(
                f"head={head!r}: the model's temporal heads are {list(temporal)}; name one of them."
            )
        chosen = temporal[0] if head is None else head
        part: Any = model.head(chosen).to_vector
        return (
            (lambda x: model(x, heads=[chosen], lengths=lengths)[chosen]),
            part,
            "backbone",
            model.backbone,
        )
    modules = dict(model.named_modules())
    if features is None or features not in modules or head is not None or lengths is not None:
        raise ValueError(
            f"features={features!r}: name the part of the model that turns frames into features "
            f"(and give no head= or lengths=), one of {list(modules)[1:6]} ..."
        )
    return model, modules[features], features, modules[features]


def _by_frame(
    grads: list[torch.Tensor],
    arrived: list[bool],
    shape: Sequence[int],
    valid: torch.Tensor | None,
    name: str,
) -> torch.Tensor:
    """Norms (B, T) of the gradients at the features of the calls."""
    batch, time = shape
    rows = []
    for gradient, here in zip(grads, arrived, strict=True):
        values = gradient if here else torch.zeros_like(gradient)
        rows.append(values.detach().flatten(1).norm(dim=1).cpu())
    count = batch * time if valid is None else int(valid.sum())
    if len(rows) == 1 and len(rows[0]) == count:
        if valid is None:
            return rows[0].view(batch, time)
        return torch.zeros(batch, time).masked_scatter(valid, rows[0].float())
    if len(rows) == time and all(len(row) == batch for row in rows):
        return torch.stack(rows, 1)
    raise ValueError(
        f"{name!r} is called {len(rows)} times with {sorted({len(r) for r in rows})} rows for "
        f"clips of {batch} x {time} frames: it must be called once with all {count} frames, or for "
        f"each of the {time} time steps with {batch}."
    )


def _judge_frames(norms: torch.Tensor, seen: list[int], valid: torch.Tensor | None) -> list[str]:
    expected = [t for t in range(len(norms)) if valid is None or bool(valid[:, t].any())]
    if not norms.isfinite().all():
        return ["the gradient of some frames is not finite (NaN or infinity)."]
    missing = [t for t in expected if t not in seen]
    if seen == [expected[-1]] and missing:
        return [
            f"the loss sees only the last frame ({seen[0]}, counted from 0) of {len(expected)}: "
            "the recurrence does not hand its state from frame to frame (out, state = lstm(x, "
            "state)), or only the last frame's features are read."
        ]
    if missing:
        return [f"the loss does not see the frames {missing} (counted from 0)."]
    largest = float(norms.max())
    faded = [t for t in expected if float(norms[t]) < _FADED * largest]
    if faded:
        return [
            f"the gradient fades over time: the frames {faded} get less than {_FADED:g} of the "
            "largest frame's."
        ]
    return []
