"""All nodes of a tree in one numbering, and how likely each is.

The root, which says nothing, is node 0; the classes of the levels follow, coarse to fine. An answer
is a node: the deeper it lies, the more it says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from timm_branches.hierarchy.decode import best_path_scores, leaf_log_probs, path_sum_scores
from timm_branches.hierarchy.tables import kept_by_tree
from timm_branches.taxonomy.taxonomy import Taxonomy

__all__ = ["LEAF_SCORES", "NodeTables", "leaf_log_posterior", "node_tables"]

# which decoders rank the leaves, and so give them a distribution; the names are those of `decode`
LEAF_SCORES = {
    "best-path": best_path_scores,
    "leaf-marginal": leaf_log_probs,
    "path-sum": path_sum_scores,
}


class NodeTables:
    """The nodes of a tree, one number each. :func:`node_tables` keeps one per tree and device.

    Attributes:
        labels: LongTensor (nodes, L): the classes on the way down to each node, -1 below it.
        parents: LongTensor (nodes,), of the root 0 itself.
        depths: LongTensor (nodes,): steps down from the root.
        leaves: LongTensor (num_leaves,): the node that each leaf is.
        num_leaves: LongTensor (nodes,): how many leaves are below each node, 1 for a leaf.
        leaf_paths: LongTensor (num_leaves, L + 1): the nodes from the root to each leaf; a shallow
            leaf's is repeated.
        names: '' for the root, else the node's path, as ('animal', 'cat').
    """

    def __init__(self, taxonomy: Taxonomy, device: torch.device | str = "cpu") -> None:
        cpu = torch.device("cpu")
        depth = taxonomy.num_levels
        counts = torch.tensor(taxonomy.num_classes, device=cpu)
        starts = 1 + counts.cumsum(0) - counts  # (L,): the first node of each level
        labels = [torch.full((1, depth), -1, device=cpu)]
        parents = [torch.zeros(1, dtype=torch.long, device=cpu)]
        for level, of_level in enumerate(taxonomy.parents):
            labels.append(taxonomy.expand(torch.arange(len(of_level), device=cpu), level))
            above = starts[level - 1] if level else 1
            parents.append(of_level + above)
        own_labels = torch.cat(labels)
        self.labels = own_labels.to(device)
        self.parents = torch.cat(parents).to(device)
        self.depths = (self.labels >= 0).sum(1)
        self.starts = starts.to(device)
        # of each level, the deepest first: an exported program has no search in it
        self._by_depth = []
        for level in reversed(range(depth)):
            of_level = ((own_labels >= 0).sum(1) == level + 1).nonzero()[:, 0]
            self._by_depth.append(of_level.to(device))
        self.leaf_paths = self.nodes_of(taxonomy.leaf_table.to(device))
        self.leaves = self.leaf_paths[:, -1]
        self.num_leaves = self.sums(torch.ones(1, taxonomy.num_leaves, device=device))[0].long()
        self.names: tuple[tuple[str, ...], ...] = ((), *sum(taxonomy.nodes, ()))

    def __len__(self) -> int:
        return len(self.parents)

    def nodes_of(self, labels: torch.Tensor) -> torch.Tensor:
        """The nodes (N, L + 1) on the way down label rows (N, L), which are paths of the tree.

        The root comes first; where a row has ended its last node is repeated.
        """
        nodes = [torch.zeros_like(labels[:, 0])]
        for label, start in zip(labels.unbind(1), self.starts.unbind(0), strict=True):
            nodes.append(torch.where(label >= 0, label + start, nodes[-1]))
        return torch.stack(nodes, 1)

    def sums(self, leaf_values: torch.Tensor) -> torch.Tensor:
        """Sums (N, nodes) of the leaves' values (N, leaves) over the leaves below each node."""
        result = leaf_values.new_zeros(leaf_values.shape[0], len(self))
        result = result.index_copy(1, self.leaves, leaf_values)
        # deepest first, so that a node is complete before it is added to its parent
        for at in self._by_depth:
            result = result.index_add(1, self.parents[at], result.index_select(1, at))
        return result

    def sums_down(self, values: torch.Tensor) -> torch.Tensor:
        """Sums (N, nodes) of the nodes' values (N, nodes) on the way down to each, but the root."""
        result = values.index_fill(1, self.parents[:1], 0)
        for at in reversed(self._by_depth):
            down = result.index_select(1, at) + result.index_select(1, self.parents[at])
            result = result.index_copy(1, at, down)
        return result

    def descends(self) -> torch.Tensor:
        """BoolTensor (nodes, leaves): which leaves lie below each node, or are it."""
        return self.sums(torch.eye(len(self.leaves), device=self.leaves.device)).T > 0


@kept_by_tree
def node_tables(taxonomy: Taxonomy, device: torch.device) -> NodeTables:
    """The :class:`NodeTables` of a tree on a device, built at its first use there."""
    return NodeTables(taxonomy, device)


def leaf_log_posterior(
    level_logits: Sequence[torch.Tensor] | Mapping[str, torch.Tensor],
    taxonomy: Taxonomy,
    decoder: str = "best-path",
    temperature: float = 1.0,
) -> torch.Tensor:
    """One distribution over the leaves from every level's logits.

    Args:
        level_logits: As for :func:`decode`.
        taxonomy: The tree.
        decoder: `'best-path'`, the normalised product of the levels' probabilities,
            `'leaf-marginal'`, :func:`leaf_log_probs`, or `'path-sum'`, the softmax of the sums of
            logits.
        temperature: The scores of the leaves are divided by it.

    Returns:
        Log-probabilities (N, leaves). The likeliest leaf is the one that `decode` answers with.

    Raises:
        ValueError: The decoder gives the leaves no distribution, the temperature is not above 0,
            or the logits do not fit the tree.

    Example:
        >>> tree = Taxonomy(['animal/cat', 'animal/dog', 'ship'])
        >>> logits = [torch.tensor([[.75, .25]]).log(), torch.tensor([[.5, .5]]).log()]
        >>> leaf_log_posterior(logits, tree, 'leaf-marginal').exp()
        tensor([[0.3750, 0.3750, 0.2500]])
    """
    if decoder not in LEAF_SCORES:
        raise ValueError(
            f"The decoder {decoder!r} gives the leaves no distribution; choose one of "
            f"{', '.join(LEAF_SCORES)}."
        )
    if not temperature > 0:
        raise ValueError(f"A temperature must be above 0, got {temperature}.")
    scores = LEAF_SCORES[decoder](level_logits, taxonomy)
    return (scores / temperature).log_softmax(1)
