"""Dry runs on the meta device, and what they tell.

Which parts of a backbone a computation needs.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

__all__ = ["dry_run", "remove_unused_modules", "unused_parameters"]


@contextmanager
def _meta_weights(backbone: nn.Module, requires_grad: bool) -> Iterator[dict[int, torch.Tensor]]:
    """Meta tensors in place of a backbone's tensors, by the id of each.

    Not functional_call, which leaves its tensors behind in modules that are reached by two paths
    (CoaT's).
    """
    meta: dict[int, torch.Tensor] = {}
    held: list[tuple[dict, str, torch.Tensor]] = []
    try:
        for module in backbone.modules():
            stores: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
            for tensors in stores:
                for name, tensor in list(tensors.items()):
                    if tensor is None:
                        continue
                    if id(tensor) not in meta:
                        meta[id(tensor)] = (
                            tensor.detach()
                            .to("meta")
                            .requires_grad_(requires_grad and isinstance(tensor, nn.Parameter))
                        )
                    held.append((tensors, name, tensor))
                    tensors[name] = meta[id(tensor)]
        yield meta
    finally:
        for tensors, name, tensor in held:
            tensors[name] = tensor


def dry_run(
    backbone: nn.Module, input_size: Sequence[int], run: Callable, parameters: dict | None = None
):
    """`run(backbone, x)` for two blank images with meta tensors in place of the weights.

    Shapes, no arithmetic.
    """
    own = dict(backbone.named_parameters())
    was_training = [m for m in backbone.modules() if m.training]
    backbone.eval()
    try:
        with torch.set_grad_enabled(parameters is not None), torch.random.fork_rng(devices=[]):
            try:
                with _meta_weights(backbone, parameters is not None) as meta:
                    if parameters is not None:
                        parameters.update((name, meta[id(p)]) for name, p in own.items())
                    return run(backbone, torch.empty(2, *input_size, device="meta"))
            except Exception as error:
                if "meta" not in str(error).lower():
                    raise
                # a few networks look at values (.item()), which meta tensors have not
                if parameters is not None:
                    parameters.update(own)
                first = next(backbone.parameters())
                return run(
                    backbone, torch.zeros(2, *input_size, device=first.device, dtype=first.dtype)
                )
    finally:
        for m in was_training:
            m.training = True


def unused_parameters(backbone: nn.Module, input_size: Sequence[int], run: Callable) -> set[str]:
    """Names of the parameters from which autograd's graph does not lead to the outputs of `run`."""
    parameters: dict[str, torch.Tensor] = {}
    outputs = dry_run(backbone, input_size, run, parameters)
    seen, found = set(), set()
    stack = [y.grad_fn for y in outputs if y.grad_fn is not None]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        stack.extend(parent for parent, _ in node.next_functions if parent is not None)
    return {name for name, p in parameters.items() if id(p) not in found}


def remove_unused_modules(
    backbone: nn.Module, unused: set[str]
) -> list[tuple[nn.Module, str, nn.Module]]:
    """Put an Identity in place of every topmost module all of whose parameters are unused."""
    removed = []

    def visit(parent: nn.Module, prefix: str) -> None:
        for name, child in list(parent.named_children()):
            names = {f"{prefix}{name}.{n}" for n, _ in child.named_parameters()}
            if names and names <= unused:
                removed.append((parent, name, child))
                setattr(parent, name, nn.Identity())
            else:
                visit(child, f"{prefix}{name}.")

    visit(backbone, "")
    return removed
