"""Sets of nodes that hold the true leaf as often as was asked: conformal prediction on a tree."""

from __future__ import annotations

import math

import torch

from timm_branches.hierarchy.calibration import labels_to_leaves, threshold_at_rank
from timm_branches.hierarchy.depth import Prediction
from timm_branches.hierarchy.nodes import NodeTables, node_tables
from timm_branches.taxonomy.taxonomy import Taxonomy

__all__ = [
    "answer_sets",
    "cover_exactly",
    "cover_with",
    "fit_leaf_sets",
    "leaf_scores",
    "leaf_sets",
    "node_set_metrics",
]

_KINDS = ("lac", "aps")
_ROWS = 512  # samples whose choices are kept at a time


def leaf_scores(
    log_posterior: torch.Tensor, kind: str = "lac", generator: torch.Generator | None = None
) -> torch.Tensor:
    """How little each leaf conforms to what a sample looks like.

    - 'lac': 1 - p(leaf). Sadinle et al. 2019: the smallest sets on average.
    - 'aps': the probability of all leaves that are likelier, and the leaf's own; with a generator
      only a random part u of the latter, u uniform for each sample. Romano et al. 2020: sets that
      grow where the model is unsure.

    Args:
        log_posterior: (N, leaves), see :func:`~timm_branches.hierarchy.nodes.leaf_log_posterior`.
        kind: 'lac' or 'aps'.
        generator: Draws u; without it all of the leaf's own counts.

    Returns:
        (N, leaves), in [0, 1], in float64.

    Raises:
        ValueError: There is no such kind, or a generator is given for 'lac'.

    Example:
        >>> leaf_scores(torch.tensor([[0.5, 0.3, 0.2]]).log(), 'aps').round(decimals=4).tolist()
        [[0.5, 0.8, 1.0]]
    """
    if kind not in _KINDS:
        raise ValueError(f"There are no sets of kind {kind!r}: choose lac or aps.")
    p = log_posterior.double().exp()
    if kind == "lac":
        if generator is not None:
            raise ValueError("generator= has no effect with kind='lac', which draws nothing.")
        return 1 - p
    ordered, order = torch.sort(p, dim=1, descending=True, stable=True)
    own = ordered
    if generator is not None:
        u = torch.rand(len(p), 1, generator=generator, dtype=p.dtype, device=generator.device)
        own = ordered * u.to(p.device)
    sums = ordered.cumsum(1) - ordered + own
    return torch.empty_like(p).scatter_(1, order, sums).clamp(max=1)


def fit_leaf_sets(
    log_posterior: torch.Tensor,
    labels: torch.Tensor,
    taxonomy: Taxonomy,
    target: float,
    kind: str = "lac",
    generator: torch.Generator | None = None,
) -> float:
    """The score up to which leaves belong to a sample's set.

    It is the r-th smallest of the N true leaves' scores, r = ceil((N + 1) target), so that the set
    of a new sample, exchangeable with these, holds its leaf with probability >= target.

    Args:
        log_posterior: (N, leaves), of data that training has not seen.
        labels: (N, L), down to a leaf.
        taxonomy: The tree.
        target: The share of sets that hold the true leaf, in (0, 1).
        kind: See :func:`leaf_scores`.
        generator: As there.

    Returns:
        The threshold; infinity, at which every leaf belongs, where N is too small.

    Raises:
        ValueError: The target is out of range, a leaf is not known, or as in :func:`leaf_scores`.

    Source: Vovk et al. 2005, split conformal prediction; on trees Mortier et al. (arXiv
    2501.19038).
    """
    if not 0 < target < 1:
        raise ValueError(f"target must be a share between 0 and 1, such as 0.95, got {target}.")
    truth = _known_leaves(labels, taxonomy)
    scores = leaf_scores(log_posterior, kind, generator)
    return threshold_at_rank(scores.gather(1, truth[:, None])[:, 0], target)


def leaf_sets(
    log_posterior: torch.Tensor,
    threshold: float,
    kind: str = "lac",
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """The leaves whose score is at most the threshold.

    Args:
        log_posterior: (N, leaves).
        threshold: From :func:`fit_leaf_sets`, of the same kind.
        kind: As there.
        generator: As there.

    Returns:
        BoolTensor (N, leaves). A set may be empty where the model is unsure ('lac').
    """
    return leaf_scores(log_posterior, kind, generator) <= threshold


def answer_sets(prediction: Prediction, taxonomy: Taxonomy) -> torch.Tensor:
    """The single node that each answer is, the root for none: nested sets of ancestors.

    Args:
        prediction: Of :meth:`timm_branches.hierarchy.calibration.Calibration.answer`.
        taxonomy: The tree.

    Returns:
        BoolTensor (N, nodes), in the order of
        :func:`~timm_branches.hierarchy.nodes.node_tables`.
    """
    tables = node_tables(taxonomy, prediction.labels.device)
    nodes = tables.nodes_of(prediction.labels)[:, -1:]
    result = torch.zeros(len(nodes), len(tables), dtype=torch.bool, device=nodes.device)
    return result.scatter_(1, nodes, True)


def cover_exactly(leaves: torch.Tensor, taxonomy: Taxonomy) -> torch.Tensor:
    """The fewest nodes that stand for these leaves and no others.

    Args:
        leaves: BoolTensor (N, leaves).
        taxonomy: The tree.

    Returns:
        BoolTensor (N, nodes), the root among them as node 0.

    Example:
        >>> tree = Taxonomy(['animal/cat', 'animal/dog', 'ship'])
        >>> chosen = cover_exactly(torch.tensor([[True, True, False]]), tree)
        >>> [node_tables(tree).names[i] for i in chosen[0].nonzero()[:, 0]]
        [('animal',)]
    """
    tables = node_tables(taxonomy, leaves.device)
    full = tables.sums(leaves.double()) == tables.num_leaves
    return full & ~_inside(full, tables)


def _inside(chosen: torch.Tensor, tables: NodeTables) -> torch.Tensor:
    """Which nodes (N, nodes) have an ancestor among the chosen."""
    inside = torch.zeros_like(chosen)
    for depth in range(1, int(tables.depths.max()) + 1):
        at = (tables.depths == depth).nonzero()[:, 0]
        above = tables.parents[at]
        inside[:, at] = chosen[:, above] | inside[:, above]
    return inside


def cover_with(leaves: torch.Tensor, taxonomy: Taxonomy, max_nodes: int) -> torch.Tensor:
    """At most so many nodes that hold all of these leaves, and as few others as can be.

    Of covers with as few leaves that of the fewest nodes.

    Args:
        leaves: BoolTensor (N, leaves).
        taxonomy: The tree.
        max_nodes: r, at least 1.

    Returns:
        BoolTensor (N, nodes); none is below another, and there are none for an empty set.

    Raises:
        ValueError: `max_nodes` is below 1, or the shape is another.

    Source: Mortier et al., arXiv 2501.19038, sets of at most r nodes; dynamic programming from the
    leaves up over how many nodes a subtree may use.

    Example:
        >>> tree = Taxonomy(['animal/cat', 'animal/dog', 'animal/cow', 'ship', 'car'])
        >>> few = torch.tensor([[True, True, False, True, False]])
        >>> for r in (1, 2, 3):
        ...     chosen = cover_with(few, tree, r)[0].nonzero()[:, 0]
        ...     print(['/'.join(node_tables(tree).names[i]) for i in chosen])
        ['']
        ['animal', 'ship']
        ['ship', 'animal/cat', 'animal/dog']
    """
    if isinstance(max_nodes, bool) or not isinstance(max_nodes, int) or max_nodes < 1:
        raise ValueError(f"max_nodes= takes a whole number from 1, got {max_nodes!r}.")
    if leaves.ndim != 2 or leaves.shape[1] != taxonomy.num_leaves or leaves.dtype != torch.bool:
        raise ValueError(
            f"leaves must be bools of shape (N, {taxonomy.num_leaves}), got "
            f"{tuple(leaves.shape)} of {leaves.dtype}."
        )
    tables = node_tables(taxonomy, leaves.device)
    parts = [_cover_part(rows, tables, max_nodes) for rows in leaves.split(_ROWS)]
    return torch.cat(parts)


def _cover_part(leaves: torch.Tensor, tables: NodeTables, budget: int) -> torch.Tensor:
    count = len(leaves)
    needed = tables.sums(leaves.double()) > 0  # (N, nodes)
    parents = tables.parents.tolist()
    # leaves first, then nodes: a node costs its leaves, and a little
    scale = len(tables) + 1
    impossible = 10**9 * scale
    # costs[node]: (N, r + 1), the least cost of what is needed below with at most k nodes
    below: list[torch.Tensor | None] = [None] * len(tables)  # of the children merged so far
    given: list[torch.Tensor | None] = [None] * len(tables)  # what a child gets of its parent's k
    taken: list[torch.Tensor | None] = [None] * len(tables)
    for node in reversed(range(len(tables))):
        cost, taken[node] = _take_or_leave(
            below[node], needed[:, node], int(tables.num_leaves[node]) * scale + 1, budget
        )
        cost = cost.clamp(max=impossible)
        if node == 0:
            continue
        parent = parents[node]
        siblings = below[parent]
        if siblings is None:
            given[node] = torch.arange(budget + 1, device=leaves.device).expand(count, -1)
            below[parent] = cost
        else:
            below[parent], given[node] = _share(siblings, cost)
        below[node] = None  # it is not read again
    left = torch.full((count, len(tables)), 0, device=leaves.device)
    left[:, 0] = budget
    chosen = torch.zeros_like(needed)
    # each parent hands out its nodes to the child that was merged last first
    for node in range(len(tables)):
        mine = left[:, node : node + 1]
        if node:
            mine = _gather(given[node], left[:, parents[node]])
            left[:, parents[node]] -= mine[:, 0]
        own = _gather(taken[node], mine[:, 0])[:, 0] & needed[:, node]
        chosen[:, node] = own
        left[:, node] = torch.where(own, 0, mine[:, 0])
    return chosen & ~_inside(chosen, tables)


def _take_or_leave(
    below: torch.Tensor | None, needed: torch.Tensor, price: int, budget: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The least cost (N, r + 1) with at most k nodes, and whether the node itself is taken."""
    ks = torch.arange(budget + 1, device=needed.device)
    itself = torch.where(ks > 0, price, 10**9 * price).expand(len(needed), -1)
    others = itself if below is None else below
    take = (itself <= others) if below is None else (itself < others)
    cost = torch.where(needed[:, None], torch.minimum(itself, others), 0)
    return cost, take & (ks > 0)


def _share(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Least sums (N, r + 1) of two costs that share k nodes, and how many of them b gets."""
    costs, gifts = [], []
    for k in range(a.shape[1]):
        # for b from 0 to k
        options = a[:, : k + 1].flip(1) + b[:, : k + 1]
        least = options.min(1)
        costs.append(least.values)
        gifts.append(least.indices)
    return torch.stack(costs, 1), torch.stack(gifts, 1)


def _gather(table: torch.Tensor | None, at: torch.Tensor) -> torch.Tensor:
    assert table is not None
    return table.gather(1, at[:, None])


def node_set_metrics(
    nodes: torch.Tensor, labels: torch.Tensor, taxonomy: Taxonomy
) -> dict[str, float]:
    """How good sets of nodes are.

    Args:
        nodes: BoolTensor (N, nodes), none below another.
        labels: (N, L), down to a leaf.
        taxonomy: The tree.

    Returns:
        `coverage`, percent of the sets that hold the true leaf; `leaves` and `nodes`, how many each
        has on average.

    Raises:
        ValueError: A leaf is not known.
    """
    truth = _known_leaves(labels, taxonomy)
    tables = node_tables(taxonomy, nodes.device)
    holds = nodes.gather(1, tables.leaf_paths[truth]).any(1)
    leaves = (nodes * tables.num_leaves).sum(1)
    if not len(nodes):
        return dict.fromkeys(("coverage", "leaves", "nodes"), math.nan)
    return {
        "coverage": 100 * float(holds.double().mean()),
        "leaves": float(leaves.double().mean()),
        "nodes": float(nodes.sum(1).double().mean()),
    }


def _known_leaves(labels: torch.Tensor, taxonomy: Taxonomy) -> torch.Tensor:
    truth = labels_to_leaves(labels, taxonomy)
    if (truth < 0).any():
        raise ValueError(f"{int((truth < 0).sum())} samples have no known leaf: leave them out.")
    return truth
