"""Streams.

A temporal model over a video or a camera, frame after frame, and the step that is exported for it.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from torch import nn

from timm_branches.heads import State
from timm_branches.inference.predict import model_transform
from timm_branches.model import BranchModel

__all__ = ["StreamingClassifier", "StreamingStep", "detach_state"]


def detach_state(state: dict[str, State]) -> dict[str, State]:
    """The state's values without their history.

    Backpropagation ends here then (truncated BPTT).
    """
    return {name: tuple(map(torch.detach, tensors)) for name, tensors in state.items()}


class StreamingClassifier:
    """Answers for a camera or a long video, one frame at a time. The cost of a frame does not grow.

    Args:
        model: Model with a temporal head that can go on from a state. It runs in eval mode and
            without autograd here, and is left in the mode it was in.
        transform: Makes a tensor (C, H, W) of an uint8 frame (H, W, C); by default what the model's
            `pretrained_cfg` says, as in validation. Frames that are tensors are taken as they
            are.
        probabilities: Give softmax (sigmoid for a head of one class) instead of logits.
        heads: Names of the heads to compute, all by default.

    Raises:
        ValueError: The model has no temporal head, or one that cannot stream.

    Attributes:
        state: The state after the last frame, as `model.forward_stream` takes it; None before the
            first.

    Example:
        >>> from timm_branches import create_branch_model
        >>> model = create_branch_model('test_resnet', head='lstm', num_classes=3, img_size=32)
        >>> stream = StreamingClassifier(model, probabilities=True)
        >>> for answer in stream.run(np.zeros((2, 48, 64, 3), np.uint8)):
        ...     print(answer['stage5'].shape)
        torch.Size([3])
        torch.Size([3])
    """

    def __init__(
        self,
        model: BranchModel,
        transform: Callable[[np.ndarray], torch.Tensor] | None = None,
        probabilities: bool = False,
        heads: Sequence[str] | None = None,
    ):
        self.names = _streaming_heads(model, heads)
        self.model = model
        self.transform = transform
        self.probabilities = probabilities
        self.state: dict[str, State] | None = None

    def reset(self) -> None:
        """Forget all frames: the next one begins a new stream."""
        self.state = None

    def __call__(self, frame: "np.ndarray | torch.Tensor") -> dict[str, torch.Tensor]:
        """Take the next frame.

        Args:
            frame: uint8 array (H, W, C), or a prepared float tensor (C, H, W); of several streams
                (B, H, W, C) or (B, C, H, W), always the same number of them until :meth:`reset`.

        Returns:
            `{head: (K,)}`, of several streams `{head: (B, K)}`.

        Raises:
            ValueError: Not a frame, or another number of streams than before.
        """
        x = self._prepare(frame)
        with _evaluating(self.model), torch.no_grad():
            outputs, self.state = self.model.forward_stream(x[:, None], self.state, self.names)
        answers = {name: self._answer(name, y) for name, y in outputs.items()}
        if frame.ndim == 4:
            return answers
        return {name: y[0] for name, y in answers.items()}

    def run(
        self, frames: "Iterable[np.ndarray | torch.Tensor]"
    ) -> Iterator[dict[str, torch.Tensor]]:
        """Answers for frames as they come.

        From anything that gives one after the other (a camera, a decoder).
        """
        for frame in frames:
            yield self(frame)

    def _prepare(self, frame: Any) -> torch.Tensor:
        if not isinstance(frame, np.ndarray | torch.Tensor) or frame.ndim not in (3, 4):
            raise ValueError(
                "a frame is an uint8 array (H, W, C) or a float tensor (C, H, W), of several "
                "streams (B, H, W, C) or (B, C, H, W); got "
                f"{getattr(frame, 'shape', type(frame).__name__)}."
            )
        several = frame if frame.ndim == 4 else frame[None]
        if isinstance(several, np.ndarray):
            if several.dtype != np.uint8:
                raise ValueError(f"a frame that is an array must be uint8, got {several.dtype}.")
            if self.transform is None:
                self.transform = model_transform(self.model)
            x = torch.stack([self.transform(image) for image in several])
        elif not several.is_floating_point():
            raise ValueError(
                f"a frame that is a tensor must be prepared (float), got {several.dtype}: give "
                "uint8 frames as numpy arrays (H, W, C)."
            )
        else:
            x = several
        return x.to(next(self.model.parameters()))

    def _answer(self, name: str, y: torch.Tensor) -> torch.Tensor:
        if y.ndim == 3 or name in self.model.dense_heads:
            y = y[:, 0]  # the only frame
        if not self.probabilities or y.ndim != 2:
            return y
        return y.sigmoid() if y.shape[1] == 1 else y.softmax(1)


class StreamingStep(nn.Module):
    """One step of a stream with its state as plain inputs and outputs.

    It is made for `torch.export` and ONNX.

    Args:
        model: Model with a temporal head that can go on from a state.
        heads: Names of the heads to compute, all by default.

    Raises:
        ValueError: The model has no temporal head, or one that cannot stream.

    Attributes:
        state_names: Names of the states, in the order in which they are given and returned.
        input_names: Names of all inputs for ONNX: `frame`, then the states.
        output_names: Names of all outputs: the heads with `logits_` before them, then the states
            with `new_`.

    Example:
        >>> from timm_branches import create_branch_model
        >>> model = create_branch_model('test_resnet', head='lstm', num_classes=3, img_size=32)
        >>> step = StreamingStep(model.eval())
        >>> step.input_names, step.output_names
        (['frame', 'stage5_h', 'stage5_c'], ['logits_stage5', 'new_stage5_h', 'new_stage5_c'])
        >>> frame = torch.randn(1, 3, 32, 32)
        >>> program = torch.export.export(step, (frame, *step.initial_state(1)))
        >>> logits, *state = program.module()(frame, *step.initial_state(1))
    """

    def __init__(self, model: BranchModel, heads: Sequence[str] | None = None):
        super().__init__()
        self.names = _streaming_heads(model, heads)
        self.model = model
        self.training = model.training  # exporters set the model's mode by this one
        self.temporal = [name for name in self.names if name in model.temporal_heads]
        self.state_names = []
        for name, state in self._zeros(1).items():
            known = getattr(model.head(name), "state_names", None) or "hc"
            parts: Sequence[str] = known[: len(state)]
            if len(state) > len(known):
                parts = [f"state{i}" for i in range(len(state))]
            self.state_names += [f"{name}_{part}" for part in parts]
        self.input_names = ["frame", *self.state_names]
        self.output_names = [f"logits_{name}" for name in self.names]
        self.output_names += [f"new_{name}" for name in self.state_names]

    def initial_state(self, batch_size: int = 1) -> State:
        """The states before the first frame of `batch_size` streams."""
        return tuple(chain.from_iterable(self._zeros(batch_size).values()))

    def _zeros(self, batch_size: int) -> dict[str, State]:
        return {name: self.model.head(name).zero_state(batch_size) for name in self.temporal}  # type: ignore[operator]

    def forward(self, frame: torch.Tensor, *state: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Frames (B, C, H, W) of B streams and their states -> logits (B, K) of each head.

        The new states follow.
        """
        if len(state) != len(self.state_names):
            raise ValueError(
                f"{len(state)} states for {self.state_names}: initial_state() makes those of the "
                "start."
            )
        rest = iter(state)
        states = {name: tuple(islice(rest, len(z))) for name, z in self._zeros(1).items()}
        outputs, new = self.model.forward_stream(frame[:, None], states, self.names)
        logits = []
        for y in outputs.values():
            logits.append(y if y.ndim == 2 else y[:, 0])
        return (*logits, *chain.from_iterable(new[name] for name in self.temporal))


def _streaming_heads(model: BranchModel, heads: Sequence[str] | None) -> list[str]:
    """The heads to compute in tap order, all of which can stream."""
    names = [model.names[i] for i in model.head_indices(heads)]
    temporal = [name for name in names if name in model.temporal_heads]
    if not temporal:
        raise ValueError(
            f"None of the heads {names} is temporal: give the model head='lstm' or another "
            "that reads clips."
        )
    for name in temporal:
        model.head(name).check_stream(name, 1)  # type: ignore[operator]
    return names


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside, and every module's own mode again outside."""
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True
