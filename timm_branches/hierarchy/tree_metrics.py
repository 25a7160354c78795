"""Metrics that know how far apart two classes are in the tree.

These are hP, hR, hF, the hierarchical distance and the severity of mistakes.
-1 in a label is "unknown at this level", except below a leaf, where the path has ended and there is
nothing to know. -1 in a prediction is "no answer on this level". What is predicted below a
predicted leaf does not count: a branch classifier has no class "none", see
:meth:`Taxonomy.valid_paths`.
"""

from __future__ import annotations

import torch

from timm_branches.hierarchy.metrics import check_pair
from timm_branches.hierarchy.tables import kept_by_tree
from timm_branches.taxonomy.tables import as_labels
from timm_branches.taxonomy.taxonomy import Taxonomy

__all__ = [
    "distance_at_k",
    "hierarchical_distance",
    "hierarchical_precision_recall_f1",
    "mistake_severity",
]


class PathTables:
    """The nodes of all levels side by side, for looking up whole batches on their device.

    The last node, which index -1 means, stands for "no node": it has an empty path, and the height
    of the root above all, which is what two paths have in common that share nothing.

    Args:
        taxonomy: the tree.
        device: where the tables, and the rows looked up in them, are.
    """

    def __init__(self, taxonomy: Taxonomy, device: torch.device | str = "cpu") -> None:
        depth, cpu = taxonomy.num_levels, torch.device("cpu")
        paths = [
            taxonomy.expand(torch.arange(k, device=cpu), level)
            for level, k in enumerate(taxonomy.num_classes)
        ]
        self.paths = torch.cat([*paths, torch.full((1, depth), -1, device=cpu)]).to(device)
        self.heights = torch.cat([*taxonomy.heights, torch.tensor([depth], device=cpu)]).to(device)
        # a copy, or a cache by this tensor would keep the tree for ever
        self.leaf_paths = taxonomy.leaf_table.to(device, copy=True)
        self.starts = torch.tensor([0, *taxonomy.num_classes[:-1]], device=cpu).cumsum(0).to(device)
        self.depths = torch.arange(1, depth + 1, device=device)
        self.root_height = depth

    def nodes(self, rows: torch.Tensor) -> torch.Tensor:
        """Label rows (..., L) as indices of nodes, -1 for none."""
        return torch.where(rows >= 0, rows + self.starts, -1)

    def is_leaf(self, rows: torch.Tensor) -> torch.Tensor:
        """Which classes of label rows (..., L) are leaves."""
        return self.heights[self.nodes(rows)] == 0

    def below_leaf(self, rows: torch.Tensor) -> torch.Tensor:
        """Which levels lie below the first leaf of each row (N, L)."""
        leaf = self.is_leaf(rows).long()
        return leaf.cumsum(1) > leaf

    def augment(self, rows: torch.Tensor) -> torch.Tensor:
        """The path (N, L, L) of each class of the rows (N, L), which end at their first leaf."""
        return self.paths[self.nodes(rows.masked_fill(self.below_leaf(rows), -1))]

    def end(self, rows: torch.Tensor) -> torch.Tensor:
        """The path (N, L) of the deepest class of each row, which ends at its first leaf."""
        rows = rows.masked_fill(self.below_leaf(rows), -1)
        deepest = ((rows >= 0) * self.depths).amax(1, keepdim=True)
        return self.paths[self.nodes(rows).gather(1, (deepest - 1).clamp(min=0))[:, 0]]

    def lca_height(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """As :meth:`Taxonomy.lca_height` for rows (..., L) that are paths.

        The height of the lowest node shared.
        """
        return torch.where(a == b, self.heights[self.nodes(a)], self.root_height).amin(-1)

    def consistent(self, rows: torch.Tensor, paths: torch.Tensor) -> torch.Tensor:
        """As :meth:`Taxonomy.valid_paths`, of rows (N, L) whose :meth:`augment` is `paths`."""
        rows = rows.masked_fill(self.below_leaf(rows), -1)[:, None]
        return ((paths == rows) | (paths < 0) | (rows < 0)).flatten(1).all(1)

    def overlap(self, paths: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The counts of :func:`hierarchical_precision_recall_f1`, summed over the samples.

        Args:
            paths: (N, L, L), predictions as :meth:`augment` gives them.
            labels: (N, L).

        Returns:
            LongTensor (3,): |predicted and true|, |predicted| and |true|.
        """
        known = labels >= 0
        right = ((paths == labels[:, None]).any(1) & known).sum()
        # classes that occur several times on a level count once: sorted, each is where the value
        # changes
        ordered = paths.sort(1).values
        new = torch.ones_like(ordered, dtype=torch.bool)
        new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
        told = known | self.below_leaf(labels)
        predicted = (new & (ordered >= 0) & told[:, None]).sum()
        return torch.stack([right, predicted, known.sum()])

    def distance_counts(self, predictions: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The counts of :func:`hierarchical_distance` and :func:`mistake_severity`.

        Args:
            predictions: (N, L), -1 for no answer.
            labels: (N, L).

        Returns:
            LongTensor (3,): samples whose leaf is known, mistakes among them, summed distance.
        """
        known = self.is_leaf(labels).any(1)
        distances = self.lca_height(self.end(labels), self.end(predictions)) * known
        return torch.stack([known.sum(), (distances > 0).sum(), distances.sum()])

    def ranking_counts(
        self, leaf_scores: torch.Tensor, labels: torch.Tensor, k: int
    ) -> torch.Tensor:
        """The counts of :func:`distance_at_k`.

        Args:
            leaf_scores: (N, leaves).
            labels: (N, L).
            k: how many of the best leaves.

        Returns:
            LongTensor (2,): leaves looked at, k for each sample whose leaf is known; and their
            summed distance.
        """
        known = self.is_leaf(labels).any(1)
        paths = self.leaf_paths[leaf_scores.topk(k).indices]  # (N, k, L)
        distances = self.lca_height(self.end(labels)[:, None], paths)
        return torch.stack([k * known.sum(), (distances * known[:, None]).sum()])


@kept_by_tree
def path_tables(taxonomy: Taxonomy, device: torch.device) -> PathTables:
    """The :class:`PathTables` of a tree on a device."""
    return PathTables(taxonomy, device)


# -- from counts, which add up over batches and processes, to the metrics


def precision_of(counts: torch.Tensor) -> torch.Tensor:
    """Of the counts (3,) of :meth:`PathTables.overlap`, hP."""
    right, predicted, _ = counts.double()
    return right / predicted


def recall_of(counts: torch.Tensor) -> torch.Tensor:
    """Of the counts (3,) of :meth:`PathTables.overlap`, hR."""
    right, _, true = counts.double()
    return right / true


def f1_of(counts: torch.Tensor) -> torch.Tensor:
    """Of the counts (3,) of :meth:`PathTables.overlap`, hF."""
    right, predicted, true = counts.double()
    return 2 * right / (predicted + true)


def mean_distance_of(counts: torch.Tensor) -> torch.Tensor:
    """Of the counts (3,) of :meth:`PathTables.distance_counts`, the mean over all samples."""
    known, _, total = counts.double()
    return total / known


def severity_of(counts: torch.Tensor) -> torch.Tensor:
    """Of the counts (3,) of :meth:`PathTables.distance_counts`, the mean over the mistakes."""
    _, mistakes, total = counts.double()
    return total / mistakes


def leaf_accuracy_of(counts: torch.Tensor) -> torch.Tensor:
    """Of the counts (3,) of :meth:`PathTables.distance_counts`, the share without a mistake."""
    known, mistakes, _ = counts.double()
    return (known - mistakes) / known


def mean_ranking_distance_of(counts: torch.Tensor) -> torch.Tensor:
    """Of the counts (2,) of :meth:`PathTables.ranking_counts`, the mean."""
    leaves, total = counts.double()
    return total / leaves


def _check(predictions: torch.Tensor, labels: torch.Tensor, taxonomy: Taxonomy) -> PathTables:
    check_pair(predictions, labels)
    _check_rows(predictions, taxonomy, "prediction")
    _check_rows(labels, taxonomy, "label")
    return path_tables(taxonomy, labels.device)


def _check_rows(rows: torch.Tensor, taxonomy: Taxonomy, what: str) -> None:
    if rows.ndim != 2 or rows.shape[1] != taxonomy.num_levels:
        raise ValueError(
            f"{what}s must have shape (N, {taxonomy.num_levels}), one column per level, got "
            f"{tuple(rows.shape)}."
        )
    for level, (name, count) in enumerate(zip(taxonomy.levels, taxonomy.num_classes, strict=True)):
        as_labels(rows[:, level], count, f"{what} of level {name!r}")


def hierarchical_precision_recall_f1(
    predictions: torch.Tensor, labels: torch.Tensor, taxonomy: Taxonomy
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hierarchical precision, recall and F1 (hP, hR, hF), micro-averaged.

    With P_i the classes predicted for sample i and all their ancestors, and T_i its true class and
    all its ancestors, both without the root above all:

        hP = sum |P_i and T_i| / sum |P_i|
        hR = sum |P_i and T_i| / sum |T_i|
        hF = 2 hP hR / (hP + hR)

    Source: Kiritchenko et al., "Learning and Evaluation in the Presence of Class Hierarchies",
    Canadian AI 2006; in this form Silla and Freitas, "A survey of hierarchical classification
    across different application domains", Data Mining and Knowledge Discovery 22, 2011.

    Predictions that contradict each other all enter P_i, each with its own ancestors, which costs
    precision. Levels on which the truth is unknown are left out of P_i and T_i; those below a known
    leaf are not unknown, and predictions there count as wrong. A prediction of -1 adds nothing to
    P_i, which costs recall only.

    Args:
        predictions: LongTensor (N, L), -1 for no answer.
        labels: LongTensor (N, L), -1 where unknown and below a leaf.
        taxonomy: the tree.

    Returns:
        hP, hR and hF as double tensors (), fractions in [0, 1]. hP is nan if nothing is predicted,
        hR if nothing is known, hF if neither.

    Raises:
        ValueError: if the shapes are not (N, L), or something else than class indices is given.

    Example:
        >>> tree = Taxonomy(['animal/cat', 'animal/dog', 'transport/ship'])
        >>> predictions = torch.tensor([[0, 1], [1, -1]])
        >>> scores = hierarchical_precision_recall_f1(predictions, tree.expand([0, 2]), tree)
        >>> [round(float(score), 3) for score in scores]
        [0.667, 0.5, 0.571]
    """
    tables = _check(predictions, labels, taxonomy)
    counts = tables.overlap(tables.augment(predictions), labels)
    return precision_of(counts), recall_of(counts), f1_of(counts)


def hierarchical_distance(
    predictions: torch.Tensor, labels: torch.Tensor, taxonomy: Taxonomy
) -> torch.Tensor:
    """Average hierarchical distance of the answers from the truth.

    The distance is the height of the lowest common ancestor (LCA) of truth and answer. The answer
    is the deepest class predicted, so the leaf where there is one. A right answer has distance 0,
    one in another tree of the forest L; a right answer that stops above the leaf has the height of
    the class it stops at.

    Source: Bertinetto et al., "Making Better Mistakes", CVPR 2020 (arXiv 1912.09393), "average
    hierarchical distance of top-k" for k = 1.

    Args:
        predictions: LongTensor (N, L), -1 for no answer.
        labels: LongTensor (N, L); samples whose leaf is unknown are left out.
        taxonomy: the tree.

    Returns:
        Double tensor (), in levels from 0 to L; nan if no leaf is known.

    Raises:
        ValueError: if the shapes are not (N, L), or something else than class indices is given.

    Example:
        >>> tree = Taxonomy(['animal/cat', 'animal/dog', 'transport/ship'])
        >>> float(hierarchical_distance(tree.expand([0, 1, 2]), tree.expand([0, 0, 0]), tree))
        1.0
    """
    counts = _check(predictions, labels, taxonomy).distance_counts(predictions, labels)
    return mean_distance_of(counts)


def mistake_severity(
    predictions: torch.Tensor, labels: torch.Tensor, taxonomy: Taxonomy
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean hierarchical distance of the mistakes only, and the leaf's top-1 accuracy beside it.

    A classifier that makes many more, but trivial, mistakes has the lower severity: it compares
    classifiers of equal top-1 only. hierarchical distance = severity * (1 - top-1).

    Source: Bertinetto et al. 2020 (arXiv 1912.09393), "hierarchical distance of a mistake"; on its
    misuse Karthik et al., "No Cost Likelihood Manipulation at Test Time for Making Better
    Mistakes", ICLR 2021 (arXiv 2104.00795).

    Args:
        predictions: as for :func:`hierarchical_distance`.
        labels: as there.
        taxonomy: the tree.

    Returns:
        Severity, in levels from 1 to L, and top-1, a fraction in [0, 1], as double tensors ().
        Severity is nan without a mistake, top-1 if no leaf is known.

    Raises:
        ValueError: as for :func:`hierarchical_distance`.

    Example:
        >>> tree = Taxonomy(['animal/cat', 'animal/dog', 'transport/ship'])
        >>> severity, top1 = mistake_severity(tree.expand([0, 1, 2]), tree.expand([0, 0, 0]), tree)
        >>> float(severity), round(float(top1), 3)
        (1.5, 0.333)
    """
    counts = _check(predictions, labels, taxonomy).distance_counts(predictions, labels)
    return severity_of(counts), leaf_accuracy_of(counts)


def distance_at_k(
    leaf_scores: torch.Tensor, labels: torch.Tensor, taxonomy: Taxonomy, k: int
) -> torch.Tensor:
    """dist@k: the mean distance of the truth and each of the k leaves with the largest scores.

    Source: Bertinetto et al. 2020 (arXiv 1912.09393), "average hierarchical distance of top-k".
    Less is better, and for k > 1 even a perfect ranking does not reach 0: the truth itself has
    distance 0, the other k - 1 have not.

    Args:
        leaf_scores: float tensor (N, num_leaves), probabilities or anything of their order.
        labels: LongTensor (N, L); samples whose leaf is unknown are left out.
        taxonomy: the tree.
        k: 1 to num_leaves.

    Returns:
        Double tensor (), in levels from 0 to L; nan if no leaf is known.

    Raises:
        ValueError: if the shapes are others, or there are fewer than `k` leaves.

    Example:
        >>> tree = Taxonomy(['animal/cat', 'animal/dog', 'transport/ship'])
        >>> float(distance_at_k(torch.tensor([[0.5, 0.3, 0.2]]), tree.expand([0]), tree, k=2))
        0.5
    """
    _check_rows(labels, taxonomy, "label")
    if leaf_scores.shape != (len(labels), taxonomy.num_leaves):
        raise ValueError(
            f"leaf_scores must be (N, {taxonomy.num_leaves}) for N = {len(labels)} labels, got "
            f"{tuple(leaf_scores.shape)}."
        )
    if not 1 <= k <= taxonomy.num_leaves:
        raise ValueError(f"k must be between 1 and the {taxonomy.num_leaves} leaves, got {k}.")
    counts = path_tables(taxonomy, labels.device).ranking_counts(leaf_scores, labels, k)
    return mean_ranking_distance_of(counts)
