"""Something new: at which class of the tree a thing stops being one of the known kinds.

Classifiers at several depths can disagree: a coarse one is sure of a fruit while a finer one
spreads over kinds of all sorts. So looks a thing that is a fruit, but none of the known ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from timm_branches.hierarchy.decode import in_order_of_levels
from timm_branches.hierarchy.nodes import NodeTables, node_tables
from timm_branches.taxonomy.taxonomy import Taxonomy

__all__ = ["NoveltyAnswer", "balanced_scores", "nearest_node", "reached", "stop_probabilities"]

_KINDS = ("mass", "entropy")


class NoveltyAnswer(NamedTuple):
    """Where each sample's path ends.

    Attributes:
        labels: (N, L), the classes down to the node, -1 below it; all -1 is the root.
        is_new: (N,), whether it is something new below the node: stopping there is at least as
            likely as each of the node's children. Else an inner node means that it is one of the
            known kinds, but not which.
        probability: (N,), of stopping there.
    """

    labels: torch.Tensor
    is_new: torch.Tensor
    probability: torch.Tensor


def stop_probabilities(
    level_logits: Sequence[torch.Tensor] | Mapping[str, torch.Tensor],
    taxonomy: Taxonomy,
    kind: str = "mass",
) -> torch.Tensor:
    """The probability that each node is where a thing stops being known; they sum to 1.

    P(n) = r(n) s(n), where s is the chance of stopping at n once there, 1 for a leaf, r(root) = 1
    and r(c) = r(n) (1 - s(n)) p(c | n) for the children c of n, p a softmax over siblings.

    - 'mass': s(n) = 1 - the share of the level below that lies on n's children, by that level's own
      softmax: what the finer classifier puts elsewhere speaks against all kinds of n. The root,
      whose children are the whole first level, is never stopped at.
    - 'entropy': s(n) = H(p(. | n)) / log(number of children), 0 for an only child: nothing speaks
      for one child rather than another. Of a flat network's levels, whose children always hold all
      of their parent's mass, this one says something.

    Args:
        level_logits: As for :func:`decode`; of a flat model what
            :func:`~timm_branches.hierarchy.sum_upwards` makes of its logits.
        taxonomy: The tree of the known classes.
        kind: 'mass' or 'entropy'.

    Returns:
        (N, nodes), in the order of :func:`~timm_branches.hierarchy.nodes.node_tables`, float64.

    Raises:
        ValueError: There is no such kind, or logits do not fit the tree.

    Source: after ProHOC (Wallin et al., CVPR 2025), of which we know the outline alone:
    classifiers at several depths, the probability of stopping from the children's mass or their
    entropy, and the answer by least expected distance. The formulas are ours.

    Example:
        >>> tree = Taxonomy(['fruit/apple', 'fruit/lime', 'animal/cat', 'animal/dog'])
        >>> sure = torch.tensor([[9., 0.]])  # a fruit
        >>> elsewhere = torch.tensor([[2., 2., 5., 0.]])  # but no kind of it
        >>> p = stop_probabilities([sure, elsewhere], tree)
        >>> node_tables(tree).names[int(p.argmax())]
        ('fruit',)
    """
    if kind not in _KINDS:
        raise ValueError(f"There is no kind {kind!r}: choose mass or entropy.")
    levels = [logits.detach().double() for logits in in_order_of_levels(level_logits, taxonomy)]
    shapes = [tuple(logits.shape) for logits in levels]
    if shapes != [(*shapes[0][:1], classes) for classes in taxonomy.num_classes]:
        raise ValueError(
            f"Logits must be one (N, K) for each level, K in {taxonomy.num_classes}, got {shapes}."
        )
    tables = node_tables(taxonomy, levels[0].device)
    count = len(levels[0])
    reach = torch.zeros(count, len(tables), dtype=torch.double, device=levels[0].device)
    reach[:, 0] = 1
    stop = torch.ones_like(reach)
    for level, logits in enumerate(levels):
        at = slice(int(tables.starts[level]), int(tables.starts[level]) + logits.shape[1])
        above = tables.parents[at]
        chance, share = _among_siblings(logits, above, len(tables))
        has_children = torch.zeros(len(tables), dtype=torch.bool, device=logits.device)
        has_children[above] = True
        if kind == "mass":
            ends = 1 - share
        else:
            ends = _entropy(chance, above, len(tables))
        stop = torch.where(has_children, ends.clamp(0, 1), stop)
        reach[:, at] = (reach * (1 - stop))[:, above] * chance
    return reach * stop


def _among_siblings(
    logits: torch.Tensor, above: torch.Tensor, nodes: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """p(c | parent) (N, K), and the share (N, nodes) of the level that lies below each node."""
    log_p = logits.log_softmax(1)
    index = above.expand(len(log_p), -1)
    top = torch.full((len(log_p), nodes), -torch.inf, dtype=log_p.dtype, device=log_p.device)
    top = top.scatter_reduce(1, index, log_p, "amax").clamp(min=torch.finfo(log_p.dtype).min)
    weights = (log_p - top.gather(1, index)).exp()
    total = torch.zeros_like(top).scatter_add(1, index, weights)
    share = torch.zeros_like(top).scatter_add(1, index, log_p.exp())
    return weights / total.gather(1, index), share


def _entropy(chance: torch.Tensor, above: torch.Tensor, nodes: int) -> torch.Tensor:
    """The entropy (N, nodes) of each node's children over its greatest."""
    index = above.expand(len(chance), -1)
    terms = -torch.xlogy(chance, chance)
    entropy = torch.zeros(len(chance), nodes, dtype=chance.dtype, device=chance.device)
    children = above.bincount(minlength=nodes)
    return entropy.scatter_add(1, index, terms) / children.clamp(min=2).double().log()


def nearest_node(probabilities: torch.Tensor, taxonomy: Taxonomy) -> NoveltyAnswer:
    """The node of least expected distance, in steps along the tree.

    That is the deepest one at or below which a thing stops with a probability of at least 1/2: a
    step down brings all that lies below nearer by one, and the rest farther by one.

    Args:
        probabilities: (N, nodes), from :func:`stop_probabilities`.
        taxonomy: The tree.

    Returns:
        The answer; of equally near nodes the deepest.

    Example:
        >>> tree = Taxonomy(['fruit/apple', 'fruit/lime', 'animal/cat'])
        >>> logits = [torch.tensor([[9., 0.]]), torch.tensor([[9., 0., 0.]])]
        >>> answer = nearest_node(stop_probabilities(logits, tree), tree)
        >>> answer.labels.tolist(), answer.is_new.tolist()
        ([[0, 0]], [False])
    """
    tables = node_tables(taxonomy, probabilities.device)
    reach = _reach(probabilities, tables)
    likely = reach >= 0.5 - 64 * torch.finfo(reach.dtype).eps  # but for rounding
    node = (likely * (tables.depths + 1)).max(1).indices
    is_leaf = torch.zeros(len(tables), dtype=torch.bool, device=node.device)
    is_leaf[tables.leaves] = True
    chance = probabilities.gather(1, node[:, None])[:, 0]
    index = tables.parents[1:].expand(len(probabilities), -1)
    of_children = torch.zeros_like(probabilities)
    of_children.scatter_reduce_(1, index, reach[:, 1:], "amax")
    is_new = ~is_leaf[node] & (chance >= of_children.gather(1, node[:, None])[:, 0])
    return NoveltyAnswer(tables.labels[node], is_new, chance)


def reached(probabilities: torch.Tensor, labels: torch.Tensor, taxonomy: Taxonomy) -> torch.Tensor:
    """The probability (N, L) of going down to each class of paths (N, L), 0 below their ends."""
    tables = node_tables(taxonomy, labels.device)
    total = _reach(probabilities, tables)
    return total.gather(1, tables.nodes_of(labels)[:, 1:]).masked_fill(labels < 0, 0).clamp(max=1)


def _reach(probabilities: torch.Tensor, tables: NodeTables) -> torch.Tensor:
    """The probability (N, nodes) of stopping at each node or below."""
    total = probabilities.clone()
    for depth in range(int(tables.depths.max()), 0, -1):
        at = (tables.depths == depth).nonzero()[:, 0]
        total.index_add_(1, tables.parents[at], total[:, at])
    return total


def steps_between(a: torch.Tensor, b: torch.Tensor, tables: NodeTables) -> torch.Tensor:
    """The steps (N,) up from nodes (N,) to what they share with others (N,), and down to these."""
    own, other = tables.labels[a], tables.labels[b]
    shared = ((own == other) & (own >= 0)).sum(1)
    return tables.depths[a] + tables.depths[b] - 2 * shared


def balanced_scores(
    answers: torch.Tensor, truths: torch.Tensor, taxonomy: Taxonomy
) -> dict[str, float]:
    """How well known and new things are told, each true node counting the same.

    Args:
        answers: (N, L), -1 below the node that was answered.
        truths: (N, L), -1 below the node where what is known ends: a leaf, or the lowest known node
            above a held-out class.
        taxonomy: The tree of the known classes.

    Returns:
        `accuracy`, percent of answers that are the node; `distance`, mean steps from it; means over
        nodes of the means over their samples, of all nodes, of the leaves (`known_...`) and of the
        others (`new_...`); nan where there are none.
    """
    tables = node_tables(taxonomy, truths.device)
    said, true = tables.nodes_of(answers)[:, -1], tables.nodes_of(truths)[:, -1]
    distance = steps_between(said, true, tables).double()
    counts = true.bincount(minlength=len(tables)).double()
    mean_right = true.bincount((said == true).double(), minlength=len(tables)) / counts
    mean_distance = true.bincount(distance, minlength=len(tables)) / counts
    is_leaf = torch.zeros(len(tables), dtype=torch.bool, device=true.device)
    is_leaf[tables.leaves] = True
    result: dict[str, float] = {}
    for name, which in (("", counts > 0), ("known_", is_leaf), ("new_", ~is_leaf)):
        seen = which & (counts > 0)
        none = not bool(seen.any())
        result[f"{name}accuracy"] = math.nan if none else 100 * float(mean_right[seen].mean())
        result[f"{name}distance"] = math.nan if none else float(mean_distance[seen].mean())
    return result
