"""What the benchmarks share: the clock, the memory and the line that says what was measured on."""

import shlex
import statistics
import sys
import time
from collections.abc import Callable

import timm
import torch
from torch import nn

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
