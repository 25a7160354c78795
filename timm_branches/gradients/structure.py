"""Mistakes that the autograd graph of one pass shows.

Layers that collapse into one, and a softmax too many.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

__all__ = [
    "applies_log_softmax",
    "graph_nodes",
    "is_probability",
    "softmax_twice",
    "watch_linear_pairs",
]

_SHAPE = {
    "ViewBackward0",
    "UnsafeViewBackward0",
    "ReshapeAliasBackward0",
    "TBackward0",
    "TransposeBackward0",
    "PermuteBackward0",
    "CloneBackward0",
    "AliasBackward0",
    "SqueezeBackward0",
    "SqueezeBackward1",
    "UnsqueezeBackward0",
    "SelectBackward0",
    "SliceBackward0",
    "IndexBackward0",
    "ToCopyBackward0",
}
_NORM = {"NativeBatchNormBackward0", "CudnnBatchNormBackward0", "MiopenBatchNormBackward0"}
# with one operand that is a constant these are linear, too (dropout multiplies by its mask)
_LINEAR = _SHAPE | {"MulBackward0", "DivBackward0", "NativeDropoutBackward0", "MeanBackward1"}


@contextmanager
def watch_linear_pairs(model: nn.Module) -> Iterator[list[tuple[str, str]]]:
    """Collect pairs of Linear layers that one Linear could replace, of what is run inside.

    Two Linears with nothing non-linear between are W2 (W1 x + b1) + b2, a single Linear unless its
    rank, which is at most the width between them, is a restriction: a bottleneck narrower than both
    ends is left in peace. BatchNorm and dropout between them do not count, they are affine for a
    given batch.
    """
    pairs: list[tuple[str, str]] = []
    made: dict[Any, tuple[str, nn.Linear]] = {}

    def hook(name: str, layer: nn.Linear, args: Any, output: torch.Tensor) -> None:
        node = args[0].grad_fn if args and isinstance(args[0], torch.Tensor) else None
        while node is not None and node not in made:
            node = _linear_parent(node)
        if node is not None:
            before, first = made[node]
            if (
                first.out_features >= min(first.in_features, layer.out_features)
                and (before, name) not in pairs
            ):
                pairs.append((before, name))
        if output.grad_fn is not None:
            made[output.grad_fn] = (name, layer)

    handles = [
        module.register_forward_hook(lambda m, args, out, name=name: hook(name, m, args, out))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        yield pairs
    finally:
        for handle in handles:
            handle.remove()


def _linear_parent(node: Any) -> Any:
    """The node before this one, None if this one is not linear in exactly one tensor."""
    kind = type(node).__name__
    parents = [parent for parent, _ in node.next_functions]
    if kind in _NORM:
        return parents[0]
    live = [parent for parent in parents if parent is not None]
    return live[0] if kind in _LINEAR and len(live) == 1 else None


def graph_nodes(loss: torch.Tensor) -> Iterator[Any]:
    """The nodes of a loss's autograd graph."""
    seen, stack = set(), [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            stack.extend(parent for parent, _ in node.next_functions)


def applies_log_softmax(loss: torch.Tensor) -> bool:
    """Whether a log-softmax, the first half of cross-entropy, is part of a loss."""
    return any(type(node).__name__.startswith("LogSoftmaxBackward") for node in graph_nodes(loss))


def softmax_twice(loss: torch.Tensor) -> bool:
    """Whether a log-softmax of a loss is applied to a softmax."""
    for node in graph_nodes(loss):
        if type(node).__name__.startswith("LogSoftmaxBackward"):
            parent = node.next_functions[0][0]
            while parent is not None and type(parent).__name__ in _SHAPE:
                parent = parent.next_functions[0][0]
            if type(parent).__name__.startswith("SoftmaxBackward"):
                return True
    return False


def is_probability(output: Any) -> list[str]:
    """Names of the outputs whose classes are probabilities: not negative, and summing to 1."""
    named: Mapping[Any, Any] = {"output": output}
    if isinstance(output, Mapping):
        named = output
    elif isinstance(output, (tuple, list)):
        named = dict(enumerate(output))
    result = []
    for name, y in named.items():
        if not isinstance(y, torch.Tensor) or not y.is_floating_point() or y.ndim < 2:
            continue
        sums = [(y.float().sum(dim) - 1).abs() for dim in {1, y.ndim - 1} if y.shape[dim] > 1]
        if bool((y >= 0).all()) and any(bool(torch.all(s < 1e-3)) for s in sums):
            result.append(str(name))
    return result
