"""Whether half precision is worth while on a device.

On a processor without instructions for it a convolution under autocast is emulated, and takes 11 to
15 times as long as in float32 (measured on one with AVX2 alone).
"""

from collections.abc import Mapping
from typing import Any

import torch

__all__ = ["check_half_precision", "is_emulated", "preset_for"]


def is_emulated(device: torch.device, dtype: str = "bfloat16") -> bool:
    """Whether convolutions of this type are emulated, as torch's own flags say.

    Args:
        device: Where they run. An accelerator's are taken to be fast.
        dtype: 'bfloat16' or 'float16'.
    """
    if device.type != "cpu":
        return False
    name = {"bfloat16": "_is_mkldnn_bf16_supported", "float16": "_is_mkldnn_fp16_supported"}[dtype]
    try:
        return not getattr(torch.ops.mkldnn, name)()
    except (AttributeError, RuntimeError):  # a torch without oneDNN does not say
        return False


def preset_for(settings: Mapping[str, Any], device: str = "") -> tuple[dict[str, Any], str]:
    """A preset's settings for this device, and what is to be said of the change.

    Args:
        settings: Of the preset; `amp` is switched off where it would be emulated.
        device: As `--device` names it, a GPU if there is one by default.

    Returns:
        The settings, and a sentence, empty if they are as they were.
    """
    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = settings.get("amp_dtype", "bfloat16")
    if not settings.get("amp") or name.partition(":")[0] != "cpu":
        return dict(settings), ""
    if not is_emulated(torch.device("cpu"), dtype):
        return dict(settings), ""
    said = (
        f"the preset's mixed precision is left out: this processor has no {dtype} instructions and "
        "would take many times as long (--amp asks for it all the same)."
    )
    return {**settings, "amp": False}, said


def check_half_precision(device: torch.device, amp: bool, dtype: str) -> str:
    """What to say of mixed precision that was asked for here; empty if it is fast or off."""
    if not amp or not is_emulated(device, dtype):
        return ""
    return (
        f"amp: this processor has no {dtype} instructions and emulates them, which takes many "
        "times as long as float32: leave amp out here."
    )
