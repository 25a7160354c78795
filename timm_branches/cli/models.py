"""The model that a command is about."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from timm_branches.model import BranchModel

__all__ = ["load_onto_device"]


def load_onto_device(name: str, device: str | None) -> "BranchModel":
    """Load a model, and put it where it is to run.

    Args:
        name: What :func:`timm_branches.load_model` takes.
        device: As torch names it; None is a GPU if there is one.

    Raises:
        ValueError: There is no such file or device, or the file is no model's.
    """
    import torch

    from timm_branches.factory import load_model
    from timm_branches.inference.predict import find_device

    return load_model(name).to(
        find_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    )
