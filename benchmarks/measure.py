"""What the benchmarks share: the clock, the memory and the line that says what was measured on."""

import shlex
import statistics
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import timm
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from timm_branches.train.script import hardware


def print_header(device: torch.device, what: str) -> None:
    """The command, the hardware, the versions and `what` was run."""
    print(f"$ python {shlex.join(sys.argv)}\n{hardware(device)}, timm {timm.__version__}; {what}\n")


def time_all(
    steps: dict[str, Callable[[], object]],
    repeats: int,
    device: torch.device,
    limit: float = float("inf"),
) -> dict[str, float]:
    """Median seconds of each, taken in turns.

    What has had two turns and `limit` seconds is not repeated.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(repeats + 2):
        for name, step in steps.items():
            if len(times[name]) >= 2 and sum(times[name]) > limit:
                continue
            start = time.perf_counter()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if repeat >= 2:  # warm up
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def peak_bytes(step: Callable[[], object], model: nn.Module, device: torch.device) -> int:
    """Most memory that a step allocates beside what is there.

    On the CPU, what autograd keeps beside parameters.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(y: torch.Tensor) -> torch.Tensor:
        if y.untyped_storage().data_ptr() not in own:
            kept[y.untyped_storage().data_ptr()] = y.untyped_storage().nbytes()
        return y

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda y: y):
        step()
    return sum(kept.values())


class Operations(NamedTuple):
    """What a step asks of a device.

    Attributes:
        operations: Calls of operators that compute something: about as many kernels, or more.
        copies: Tensors brought from the host.
        waits: Results that the host must wait for.
    """

    operations: int
    copies: int
    waits: int


# what only looks at a tensor in another way, and starts nothing
_FREE = (
    "view",
    "expand",
    "slice",
    "select",
    "squeeze",
    "t.",
    "transpose",
    "permute",
    "detach",
    "split",
    "unbind",
    "alias",
    "as_strided",
    "unsqueeze",
    "diagonal",
    "empty",
    "sym_",
    "new_empty",
    "promote_types",
    "is_",
)
# the size or the value of what comes out is known to the host only when the device is done
_WAITS = ("nonzero", "masked_select", "unique", "bincount", "equal")


def count_operations(step: Callable[[], object]) -> Operations:
    """Count what a step on the meta device dispatches, its backward pass included.

    Nothing is computed there: a value that the host asks for counts as a wait and is taken for 1.
    What is computed on the host counts as an operation, too.
    """
    counts = {"operations": 0, "copies": 0, "waits": 0}

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func.name().removeprefix("aten::")
            device = args[0].device.type if args and isinstance(args[0], torch.Tensor) else ""
            if device == "meta" and name.startswith("_local_scalar_dense"):
                counts["waits"] += 1
                return 1
            result = func(*args, **(kwargs or {}))
            if device == "meta" and name.startswith(_WAITS):
                counts["waits"] += 1
            if device == "cpu" and _on_meta(result) and not _has_meta(args):
                counts["copies"] += 1
            elif not name.startswith(_FREE):
                counts["operations"] += 1
            return result

    with Count():
        step()
    return Operations(**counts)


def _on_meta(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type == "meta"


def _has_meta(args: tuple) -> bool:
    flat, _ = tree_flatten(args)
    return sum(map(_on_meta, flat)) > 0
