"""Do the branches pull the shared layers the same way?

A cheap number to follow over the course of training.
"""

from itertools import combinations
from typing import Any

from torch import nn

from timm_branches.gradients.objective import Losses, Objective, group_by_stage
from timm_branches.gradients.report import gradients, inner_products
from timm_branches.gradients.structure import graph_nodes

__all__ = ["branch_cosines"]


def branch_cosines(
    model: nn.Module, batch: Any, where: str | None = None, losses: Losses | None = None
) -> dict[tuple[str, str], float]:
    """The cosine between the gradients of each two levels, at the deepest parameters they share.

    cos(a, b) = <g_a, g_b> / (‖g_a‖ ‖g_b‖) with g_k = dL_k/dθ, unweighted. Below 0 the levels are in
    conflict: a small step that lowers one loss raises the other (Yu et al. 2020, arXiv 2001.06782,
    definition 1). Gradients at shallower stages all come through this one, so it is where conflicts
    are decided.

    The cost is one forward pass, and for each level a backward pass that ends at this stage. The
    model runs in the mode it is in and is left as it was, random numbers included, so it can be
    called in the midst of training.

    Args:
        model: A :class:`timm_branches.task.BranchTask`, or any module (with `losses`).
        batch: A pair of input and target.
        where: Name of the stage to look at, as :func:`gradient_report` names them, instead of that
            one.
        losses: For a module, as :func:`gradient_report` takes them.

    Returns:
        The cosine by pair `(a, b)`, for each two levels, in their order. Levels that are off, pairs
        of which one has a gradient of 0 or one that is not finite, and everything if nothing
        trainable is shared, are left out.

    Raises:
        ValueError: No stage `where`.

    Example:
        >>> import torch
        >>> from timm_branches import create_branch_model
        >>> from timm_branches.task import BranchTask
        >>> model = create_branch_model(
        ...     'test_resnet', taps=[3, 5], num_classes=[2, 4], names=['coarse', 'fine'])
        >>> batch = torch.randn(4, 3, 64, 64), torch.tensor([[0, 1], [0, 0], [1, 2], [1, 3]])
        >>> list(branch_cosines(BranchTask(model), batch))
        [('coarse', 'fine')]
    """
    objective = Objective(model, batch, losses)
    groups = group_by_stage(objective.module)
    if where is not None and where not in groups:
        raise ValueError(f"where={where!r}: the stages are {', '.join(groups)}.")
    with objective.undisturbed():
        found = objective().losses
        levels = getattr(objective.task, "names", None)
        names = [name for name in found if levels is None or name in levels]
        reached = [_reached(found[name]) for name in names]
        everywhere = set.intersection(*reached) if reached else set()
        shared: dict[str, list[nn.Parameter]] = {}
        for stage, group in groups.items():
            shared[stage] = [p for p in group.values() if id(p) in everywhere]
        if where is None:
            stages = [stage for stage in shared if shared[stage]]
        else:
            stages = [where]
        if len(names) < 2 or not stages or not shared[stages[-1]]:
            return {}
        gram = inner_products([gradients(found[name], shared[stages[-1]]) for name in names])
    norms = gram.diagonal().sqrt().tolist()
    return {
        (names[a], names[b]): float(gram[a, b]) / (norms[a] * norms[b])
        for a, b in combinations(range(len(names)), 2)
        if 0 < norms[a] * norms[b] < float("inf")
    }


def _reached(loss: Any) -> set[int]:
    """Ids of the parameters to which a path of the loss's graph leads."""
    return {id(node.variable) for node in graph_nodes(loss) if hasattr(node, "variable")}
