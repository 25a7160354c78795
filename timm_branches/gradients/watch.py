"""Watching one forward pass.

Which ReLU is dead, and where the first number that is not finite appears.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Watch", "watch"]

_aten = torch.ops.aten
_RELUS = {
    _aten.relu,
    _aten.relu_,
    _aten.hardtanh,
    _aten.hardtanh_,
    _aten.threshold,
    _aten.threshold_,
}


class Watch(TorchDispatchMode):
    """Sees each operation below autograd, so that layers, functions and in-place forms all count.

    Attributes:
        failed: Path of the innermost module that an exception went through, if one went through all
            of them.
        dead: Paths of the modules in which a ReLU (or ReLU6) gave zeros only, over the whole batch.
        not_finite: Path of the module, and the operation, that first made NaN, or else infinity.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[str] = []  # the modules that are being run, the innermost last
        self.dead: list[str] = []
        self.failed: str | None = None
        self.nan: tuple[str, str] | None = None
        self.infinity: tuple[str, str] | None = None

    @property
    def not_finite(self) -> tuple[str, str] | None:
        """The first module with NaN, else with infinity, and which of them."""
        # a mask of -inf is common and harms nobody as long as it makes no NaN
        return self.nan or self.infinity

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        relu = func.overloadpacket in _RELUS and len(args) and isinstance(args[0], torch.Tensor)
        alive_before = relu and bool((args[0] != 0).any())
        out = func(*args, **(kwargs or {}))
        first = out[0] if isinstance(out, (tuple, list)) and out else out
        floats = isinstance(first, torch.Tensor) and first.is_floating_point()
        if self.stack and floats and first.numel():
            # zeros that stay zeros are not the ReLU's doing
            if alive_before and not first.any():
                self._note_dead(self.stack[-1])
            self._note_not_finite(func.overloadpacket.__name__, first)
        return out

    def _note_dead(self, module: str) -> None:
        if module not in self.dead:
            self.dead.append(module)

    def _note_not_finite(self, operation: str, y: torch.Tensor) -> None:
        if self.nan is not None or operation.startswith(("empty", "new_empty")):
            return  # or it is memory that nothing was written to
        here = (self.stack[-1], operation.strip("_"))
        if y.isnan().any():
            self.nan = here
        elif self.infinity is None and y.isinf().any():
            self.infinity = here


@contextmanager
def watch(model: nn.Module) -> Iterator[Watch]:
    """Watch what the modules of a model compute inside."""
    seen = Watch()
    names = {module: name or "the model's own forward" for name, module in model.named_modules()}
    handles = []
    for module in names:
        handles.append(
            module.register_forward_pre_hook(lambda m, args: seen.stack.append(names[m]))
        )
        handles.append(
            module.register_forward_hook(
                lambda m, args, out: _leave(seen, names[m], out), always_call=True
            )
        )
    try:
        with seen:
            yield seen
    finally:
        for handle in handles:
            handle.remove()


def _leave(seen: Watch, name: str, out: Any) -> None:
    if seen.stack:
        seen.stack.pop()
    # an exception leaves the modules from the innermost on, all without an output
    seen.failed = None if out is not None else seen.failed or name
