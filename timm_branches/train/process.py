"""This process among others: its device, its rank, its random numbers."""

import random
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

__all__ = [
    "current_device",
    "is_distributed",
    "is_primary",
    "random_state",
    "seed_everything",
    "set_random_state",
    "setup_device",
]


def setup_device(device: str = "") -> torch.device:
    """The device of this process; joins the process group when started by `torchrun`.

    Raises:
        ValueError: No such device.
    """
    from argparse import Namespace

    from timm.utils import init_distributed_device

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        if torch.device(device).type == "cuda" and not torch.cuda.is_available():
            raise RuntimeError("torch sees no CUDA device on this machine.")
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {device}: {reason}. Write cpu, cuda or cuda:1.") from None
    return init_distributed_device(Namespace(device=device, dist_backend=None, dist_url=None))


def is_primary() -> bool:
    """Whether this process is the one that writes and prints."""
    return not is_distributed() or dist.get_rank() == 0


def is_distributed() -> bool:
    """Whether several processes train together."""
    return dist.is_available() and dist.is_initialized()


def current_device(name: str = "") -> torch.device:
    """The device of this name, by default the CUDA device in use or else the CPU."""
    if name:
        return torch.device(name)
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def seed_everything(seed: int, epoch: int, rank: int) -> None:
    """Seed Python, numpy and torch with a function of (seed, epoch, rank)."""
    state = np.random.SeedSequence([seed, epoch, rank]).generate_state(3)
    random.seed(int(state[0]))
    np.random.seed(int(state[1]))  # timm's Mixup draws from numpy's global generator
    torch.manual_seed(int(state[2]))


def random_state(device: torch.device) -> dict[str, Any]:
    """The state of all generators of this process, as a checkpoint keeps it."""
    version, words, gauss = random.getstate()
    name, keys, place, has_gauss, cached = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": [version, list(words), gauss],
        "numpy": [name, torch.from_numpy(np.asarray(keys, np.int64)), place, has_gauss, cached],
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Put all generators of this process back to what :func:`random_state` gave."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, place, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), place, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
