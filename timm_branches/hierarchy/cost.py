"""The answer that costs least: any node of the tree, under any costs of mistakes.

A matrix says what each answer, a node, costs where each leaf is the truth. Under a distribution
over the leaves the best answer is the node of least expected cost: one product of matrices.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from itertools import chain

import torch

from timm_branches.hierarchy.decode import Decoder, register_decoder
from timm_branches.hierarchy.depth import Prediction
from timm_branches.hierarchy.nodes import NodeTables, leaf_log_posterior, node_tables
from timm_branches.taxonomy.table_files import read_rows
from timm_branches.taxonomy.taxonomy import Taxonomy

__all__ = [
    "COSTS",
    "answer_costs",
    "best_hf_nodes",
    "cost_decoder",
    "cost_matrix",
    "least_cost",
]

Costs = str | os.PathLike | torch.Tensor


def _common_depths(tables: NodeTables) -> torch.Tensor:
    """(nodes, leaves): the depth of the lowest node that lies above both, or is one of them."""
    return _down_the_tree(tables, lambda above, below, at: above + below)


def _common_heights(tables: NodeTables, heights: torch.Tensor) -> torch.Tensor:
    """(nodes, leaves): the height of that node."""
    top = heights[0]
    return _down_the_tree(
        tables, lambda above, below, at: torch.where(below, heights[at][:, None], above), top
    )


def _down_the_tree(
    tables: NodeTables,
    step: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    start: torch.Tensor | float = 0,
) -> torch.Tensor:
    """(nodes, leaves), level by level: from the parent's row, and which leaves lie below a node."""
    below = tables.descends()
    result = torch.zeros(below.shape, dtype=torch.double, device=below.device)
    result[0] = start
    for level in range(len(tables.starts)):
        at = (tables.depths == level + 1).nonzero()[:, 0]
        result[at] = step(result[tables.parents[at]], below[at], at)
    return result


def _depths(tables: NodeTables) -> tuple[torch.Tensor, torch.Tensor]:
    """The depths of the answers (nodes, 1), and of the true leaves (leaves,)."""
    depths = tables.depths.double()
    return depths[:, None], depths[tables.leaves]


def _tree_distance(taxonomy: Taxonomy) -> torch.Tensor:
    tables = node_tables(taxonomy)
    answer, truth = _depths(tables)
    return answer + truth - 2 * _common_depths(tables)


def _lca_height(taxonomy: Taxonomy) -> torch.Tensor:
    heights = [torch.tensor([taxonomy.num_levels], device="cpu"), *taxonomy.heights]
    return _common_heights(node_tables(taxonomy), torch.cat(heights).double())


def _wu_palmer(taxonomy: Taxonomy) -> torch.Tensor:
    tables = node_tables(taxonomy)
    answer, truth = _depths(tables)
    return 1 - 2 * (_common_depths(tables) + 1) / (answer + truth + 2)


def _information(taxonomy: Taxonomy) -> torch.Tensor:
    tables = node_tables(taxonomy)
    most = math.log(taxonomy.num_leaves)
    told = 1 - tables.num_leaves.double().log() / (most or 1)
    return 1 - tables.descends() * told[:, None]


def _hf(taxonomy: Taxonomy) -> torch.Tensor:
    tables = node_tables(taxonomy)
    answer, truth = _depths(tables)
    return 1 - 2 * _common_depths(tables) / (answer + truth)


# from a tree to what each answer costs (nodes, leaves), by name
COSTS: dict[str, Callable[[Taxonomy], torch.Tensor]] = {
    "tree-distance": _tree_distance,
    "lca-height": _lca_height,
    "wu-palmer": _wu_palmer,
    "information": _information,
    "hf": _hf,
}


def cost_matrix(costs: Costs, taxonomy: Taxonomy) -> torch.Tensor:
    """What each answer, any node of the tree, costs where each leaf is the truth.

    ============= ===================================================================== ============
    name          cost of node n where leaf y is true, a their lowest common ancestor   unit
    ============= ===================================================================== ============
    tree-distance depth(n) + depth(y) - 2 depth(a)                                      steps
    lca-height    height(a); of leaves alone it is what the decoder 'crm' counts        levels
    wu-palmer     1 - 2 (depth(a) + 1) / (depth(n) + depth(y) + 2)                      0 to 1
    information   1 - I(n) / I(y) if y lies below n, else 1; I = log(leaves / below n)  0 to 1
    hf            1 - hF of the answer, 1 - 2 depth(a) / (depth(n) + depth(y))          0 to 1
    ============= ===================================================================== ============

    A file is a CSV that calls classes by their names, or by ends of their paths. It has either the
    columns `answer`, `truth` and `cost`, or a row an answer and a column a truth, with the truths
    in the first row. A truth that is no leaf stands for all leaves below it, as far as the file
    says nothing closer; `*` is the root, so as a truth all leaves, and as an answer none at all. A
    node that is no answer in the file is never answered; an answer has a cost for every truth.

    Args:
        costs: A name of `COSTS`, a file, or a tensor (nodes, leaves) in the order of
            :func:`~timm_branches.hierarchy.nodes.node_tables`: the root, then the levels' classes.
            A row of inf is a node that is never answered.
        taxonomy: The tree.

    Returns:
        Double tensor (nodes, leaves), finite but for the rows of inf.

    Raises:
        FileNotFoundError: There is no such file, or name.
        ValueError: Costs are negative, nan, missing, given twice, or of classes that the tree has
            not; a tensor has another shape; or nothing may be answered.

    Example:
        >>> tree = Taxonomy(['animal/cat', 'animal/dog', 'ship'])
        >>> cost_matrix('tree-distance', tree).tolist()[0]  # of the root, which says nothing
        [2.0, 2.0, 1.0]

    Source: Plaud et al., "To Each Metric Its Decoding", ICML 2025 (arXiv 2506.01552), of which we
    read the abstract: the sums are ours. Wu and Palmer, "Verb semantics and lexical selection", ACL
    1994, the root at depth 1; information: Deng et al., "Hedging your bets", CVPR 2012.
    """
    if isinstance(costs, torch.Tensor):
        return _check_matrix(costs.detach().double(), taxonomy)
    if costs in COSTS:
        return COSTS[os.fspath(costs)](taxonomy)
    if not os.path.isfile(costs):
        raise FileNotFoundError(
            f"There is no file {os.fspath(costs)!r} of costs; those by name are {', '.join(COSTS)}."
        )
    return _read_costs(os.fspath(costs), taxonomy)


def _check_matrix(matrix: torch.Tensor, taxonomy: Taxonomy) -> torch.Tensor:
    expected = (len(node_tables(taxonomy)), taxonomy.num_leaves)
    if tuple(matrix.shape) != expected:
        raise ValueError(
            f"A matrix of costs has a row for each node of the tree, the root first, and a column "
            f"for each leaf, {expected}; got {tuple(matrix.shape)}."
        )
    if not (matrix >= 0).all():
        raise ValueError("Costs must be 0 or more; the matrix has negative ones or nan.")
    never = matrix.isinf()
    if (never.any(1) != never.all(1)).any():
        raise ValueError("A cost of inf must fill its whole row: that node is never answered.")
    if never.all():
        raise ValueError("Each node costs inf, so nothing may be answered.")
    return matrix


# -- costs from a file

_ROOT = "*"
_Statement = tuple[str, str, str, int]  # answer, truth, cost, line


def _read_costs(path: str, taxonomy: Taxonomy) -> torch.Tensor:
    statements = _statements(path)
    if not statements:
        raise ValueError(f"{path} has no costs.")
    tables = node_tables(taxonomy)
    node_of = _nodes_by_name(path, statements, taxonomy)
    values: dict[tuple[int, int], float] = {}
    for answer, truth, text, line in statements:
        place = node_of[answer], node_of[truth]
        if place in values:
            raise ValueError(f"{path}, line {line}: {answer!r} for {truth!r} has a cost already.")
        values[place] = _cost(text, f"{path}, line {line}")
    given = torch.full((len(tables), len(tables)), torch.nan, dtype=torch.double, device="cpu")
    rows, columns = torch.tensor(list(values), device="cpu").T
    given[rows, columns] = torch.tensor(list(values.values()), dtype=torch.double, device="cpu")
    matrix = _to_leaves(given, tables)
    _refuse_gaps(path, matrix, taxonomy)
    return matrix.nan_to_num(nan=torch.inf)


def _statements(path: str) -> list[_Statement]:
    """What a file says, cell by cell, in either of its two forms."""
    rows = list(read_rows(path))
    if not rows:
        raise ValueError(f"{path} is empty; its first row must name answer, truth and cost.")
    header = rows[0][0]
    titles = [cell.lower() for cell in header]
    statements: list[_Statement] = []
    for row, line in rows[1:]:
        if len(row) != len(header):
            raise ValueError(
                f"{path}, line {line}: {len(row)} cells under a header of {len(header)}."
            )
        if sorted(titles) == ["answer", "cost", "truth"]:
            answer, truth, cost = (row[titles.index(t)] for t in ("answer", "truth", "cost"))
            statements.append((answer, truth, cost, line))
            continue
        for truth, cost in zip(header[1:], row[1:], strict=True):
            statements.append((row[0], truth, cost, line))
    return statements


def _nodes_by_name(
    path: str, statements: Sequence[_Statement], taxonomy: Taxonomy
) -> dict[str, int]:
    names = dict.fromkeys(chain.from_iterable(statement[:2] for statement in statements))
    known = [name for name in names if name != _ROOT]
    try:
        rows = taxonomy.encode_partial(known)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    nodes = node_tables(taxonomy).nodes_of(rows)[:, -1]
    return {_ROOT: 0, **dict(zip(known, nodes.tolist(), strict=True))}


def _cost(text: str, place: str) -> float:
    try:
        cost = float(text)
    except ValueError:
        cost = math.nan
    if not 0 <= cost < math.inf:
        raise ValueError(f"{place}: a cost is a number from 0 up, got {text!r}.")
    return cost


def _to_leaves(given: torch.Tensor, tables: NodeTables) -> torch.Tensor:
    """(nodes, leaves) of (nodes, nodes): what is said of a node holds below it, if no more is."""
    for level in range(len(tables.starts)):
        at = (tables.depths == level + 1).nonzero()[:, 0]
        above = given[:, tables.parents[at]]
        given[:, at] = torch.where(given[:, at].isnan(), above, given[:, at])
    return given[:, tables.leaves]


def _refuse_gaps(path: str, matrix: torch.Tensor, taxonomy: Taxonomy) -> None:
    missing = matrix.isnan() & ~matrix.isnan().all(1, keepdim=True)
    if not missing.any():
        return
    node, leaf = missing.nonzero()[0].tolist()
    answer = "/".join(node_tables(taxonomy).names[node]) or _ROOT
    truth = "/".join(taxonomy.leaves[leaf])
    raise ValueError(
        f"{path} lacks {int(missing.sum())} costs, such as that of the answer {answer!r} where "
        f"{truth!r} is true; a line {answer},*,COST is for all truths that are not named."
    )


# -- deciding


def _check_posterior(log_p: torch.Tensor, taxonomy: Taxonomy) -> torch.Tensor:
    """The distribution, at least float32."""
    if log_p.ndim != 2 or log_p.shape[1] != taxonomy.num_leaves or not log_p.is_floating_point():
        raise ValueError(
            f"A distribution over the leaves has the shape (N, {taxonomy.num_leaves}) and is "
            f"floating point, got {tuple(log_p.shape)} of {log_p.dtype}."
        )
    # 8 bits of a bfloat16 make an error of up to 0.4 %, times a log-probability of some size
    slack = 0.1 if log_p.element_size() < 4 else 1e-3
    log_p = log_p.to(torch.promote_types(log_p.dtype, torch.float32))
    if not (log_p.logsumexp(1).abs() < slack).all():
        raise ValueError(
            "The leaves' log-probabilities must sum to 1 in each row; give what "
            "leaf_log_posterior() makes of logits."
        )
    return log_p


def least_cost(leaf_log_posterior: torch.Tensor, costs: Costs, taxonomy: Taxonomy) -> Prediction:
    """The node of least expected cost, which may be any: a leaf, an inner node, or the root.

    Of nodes whose expected costs are equal, but for rounding, the deepest is taken, because it says
    the most for that price, and of equally deep ones the first.

    Args:
        leaf_log_posterior: Float tensor (N, leaves), log-probabilities as
            :func:`~timm_branches.hierarchy.nodes.leaf_log_posterior` gives them. Costs are weighed
            by them, so their temperature matters: calibrate it.
        costs: As for :func:`cost_matrix`.
        taxonomy: The tree.

    Returns:
        The path (N, L) down to the node, -1 below it, and the probability of each node on it. All
        -1 is the root: no answer.

    Raises:
        ValueError: The rows are no distributions over this tree's leaves, or as for
            :func:`cost_matrix`.

    Example:
        >>> tree = Taxonomy(['animal/cat', 'animal/dog', 'ship'])
        >>> log_p = torch.tensor([[.8, .1, .1], [.45, .4, .15], [.3, .1, .6]]).log()
        >>> least_cost(log_p, 'tree-distance', tree).labels.tolist()
        [[0, 0], [0, -1], [1, -1]]

    Source: Plaud et al., ICML 2025 (arXiv 2506.01552): candidates are the nodes.
    """
    log_p = _check_posterior(leaf_log_posterior, taxonomy)
    matrix = cost_matrix(costs, taxonomy).to(log_p.device, log_p.dtype)
    return _decide(log_p.exp(), matrix, node_tables(taxonomy, log_p.device))


def _decide(p: torch.Tensor, matrix: torch.Tensor, tables: NodeTables) -> Prediction:
    """The node of least expected cost, of probabilities (N, leaves)."""
    never = matrix[:, 0].isinf()
    finite = matrix.masked_fill(never[:, None], 0)
    expected = (p @ finite.T).masked_fill(never, torch.inf)  # (N, nodes)
    return _least(expected, finite.flatten().amax(0), tables.sums(p), tables)


def _least(
    expected: torch.Tensor, largest: torch.Tensor | float, masses: torch.Tensor, tables: NodeTables
) -> Prediction:
    """The node of least expected cost (N, nodes), where costs are up to `largest`."""
    # the order of summation makes equal costs unequal
    tie = 64 * torch.finfo(expected.dtype).eps * largest
    # nan is not hidden: all are least then, and the deepest node's probabilities are nan
    least = ~(expected > expected.amin(1, keepdim=True) + tie)
    node = (least * (tables.depths + 1)).max(1).indices
    return _path_to(node, masses, tables)


def _path_to(node: torch.Tensor, masses: torch.Tensor, tables: NodeTables) -> Prediction:
    """The path to each sample's node, with the probabilities (N, nodes) of the nodes on it."""
    labels = tables.labels[node]  # (N, L)
    on_path = tables.nodes_of(labels)[:, 1:]
    probabilities = masses.gather(1, on_path).clamp(max=1)
    return Prediction(labels, probabilities.masked_fill(labels < 0, 0))


def cost_decoder(
    costs: Costs, taxonomy: Taxonomy, scores: str = "leaf-marginal", temperature: float = 1.0
) -> Decoder:
    """A decoder for `decode`, evaluation and `predict` whose answers cost least.

    The decoder `'cost'` of :func:`decode` is this one with the costs 'tree-distance'.

    Args:
        costs: As for :func:`cost_matrix`.
        taxonomy: The tree, of which the decoder is.
        scores: Which decoder's distribution over the leaves is used, and its temperature, see
            :func:`~timm_branches.hierarchy.nodes.leaf_log_posterior`.
        temperature: As there.

    Returns:
        A function from the levels' logits and the tree to a :class:`Prediction`.

    Raises:
        ValueError: As for :func:`cost_matrix`; when called, also for another tree's logits.

    Example:
        >>> from timm_branches.hierarchy import decode
        >>> tree = Taxonomy(['animal/cat', 'animal/dog', 'ship'])
        >>> logits = [torch.tensor([[.85, .15]]).log(), torch.tensor([[.53, .47]]).log()]
        >>> decode(logits, tree, cost_decoder('tree-distance', tree)).labels.tolist()
        [[0, -1]]
    """
    matrix = cost_matrix(costs, taxonomy)
    on_device: dict[torch.device, torch.Tensor] = {}

    def answer(level_logits: list[torch.Tensor], tree: Taxonomy) -> Prediction:
        if tree.nodes != taxonomy.nodes:
            raise ValueError("The costs are of another tree than the logits.")
        p = leaf_log_posterior(level_logits, tree, scores, temperature).exp()
        if p.device not in on_device:
            on_device[p.device] = matrix.to(p.device)
        return _decide(p, on_device[p.device].to(p.dtype), node_tables(tree, p.device))

    return answer


@register_decoder("cost")
def _least_distance(scores: list[torch.Tensor], taxonomy: Taxonomy) -> Prediction:
    """The same as :func:`cost_decoder` of 'tree-distance', without its matrix (nodes, leaves).

    The expected distance of a node is its depth, plus that of the leaves, less twice the steps that
    both are expected to have in common: the sum of the probabilities on the way down to the node.
    """
    tables = node_tables(taxonomy, scores[0].device)
    p = leaf_log_posterior(scores, taxonomy, "leaf-marginal").exp()
    masses = tables.sums(p)
    expected = tables.depths - 2 * tables.sums_down(masses)
    return _least(expected, 2.0 * taxonomy.num_levels, masses, tables)


def answer_costs(
    predictions: torch.Tensor, labels: torch.Tensor, costs: Costs, taxonomy: Taxonomy
) -> torch.Tensor:
    """What each answer costs, now that the truth is known.

    Args:
        predictions: LongTensor (N, L), paths of the tree, -1 below the node answered.
        labels: LongTensor (N, L), the truth.
        costs: As for :func:`cost_matrix`.
        taxonomy: The tree.

    Returns:
        Double tensor (N,): nan where no leaf is known, inf for a node that the costs do not allow.

    Raises:
        ValueError: As for :func:`cost_matrix`, or shapes differ.

    Example:
        >>> tree = Taxonomy(['animal/cat', 'animal/dog', 'ship'])
        >>> answers = torch.tensor([[0, 1], [0, -1], [1, -1]])
        >>> answer_costs(answers, tree.expand([0, 0, 0]), 'tree-distance', tree).tolist()
        [2.0, 1.0, 3.0]
    """
    if predictions.shape != labels.shape or labels.shape[1:] != (taxonomy.num_levels,):
        raise ValueError(
            f"Answers and labels must both have the shape (N, {taxonomy.num_levels}), got "
            f"{tuple(predictions.shape)} and {tuple(labels.shape)}."
        )
    matrix = cost_matrix(costs, taxonomy).to(labels.device)
    return look_up_costs(predictions, labels, matrix, node_tables(taxonomy, labels.device))


def look_up_costs(
    predictions: torch.Tensor, labels: torch.Tensor, matrix: torch.Tensor, tables: NodeTables
) -> torch.Tensor:
    """As :func:`answer_costs`, of a matrix (nodes, leaves) that is there already."""
    answer = tables.nodes_of(predictions)[:, -1]
    truth = tables.nodes_of(labels)[:, -1]
    leaf_of = torch.full((len(tables),), -1, device=labels.device)
    leaf_of[tables.leaves] = torch.arange(len(tables.leaves), device=labels.device)
    leaf = leaf_of[truth]
    return matrix[answer, leaf.clamp(min=0)].where(leaf >= 0, torch.nan)


# -- the best set of nodes


def best_hf_nodes(
    leaf_log_posterior: torch.Tensor, taxonomy: Taxonomy, beta: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """The set of nodes with the greatest expected hF-beta, which need not be a single path.

    A set S holds with each node all nodes above it. Where y is true and T is its path, both without
    the root, hF-beta = (1 + beta^2) n(S and T) / (n(S) + beta^2 n(T)), n being the number of nodes.
    Among the sets of k nodes its expectation is a sum over the nodes of S, of

        w_k(n) = sum over the leaves y below n of p(y) (1 + beta^2) / (k + beta^2 depth(y)),

    so the k nodes of largest w_k are the best. w_k never rises on the way down, so these hold the
    nodes above them, and the best k is the answer: exact, on uneven trees too. Sizes k that cannot
    beat the best single node are not looked at.

    Args:
        leaf_log_posterior: As for :func:`least_cost`.
        taxonomy: The tree.
        beta: Above 1 recall counts more, and sets become larger; below 1 precision.

    Returns:
        BoolTensor (N, nodes), which nodes are in the set, the root always; and the expectation
        (N,), a mean over samples (the evaluator's `hf` is micro-averaged).

    Raises:
        ValueError: beta is not above 0, or the rows are no distributions over the leaves.

    Example:
        >>> tree = Taxonomy(['animal/cat', 'animal/dog', 'ship'])
        >>> nodes, value = best_hf_nodes(torch.tensor([[.5, .4, .1]]).log(), tree)
        >>> nodes.tolist(), round(float(value), 3)  # the root, animal, cat and dog
        ([[True, True, False, True, True]], 0.72)

    Source: the score is Kiritchenko et al. 2006's; Plaud et al., ICML 2025 (arXiv 2506.01552)
    maximise it over sets of nodes. We read their abstract; the argument above is ours.
    """
    if not 0 < beta < math.inf:
        raise ValueError(f"beta must be a number above 0, got {beta}.")
    log_p = _check_posterior(leaf_log_posterior, taxonomy)
    tables = node_tables(taxonomy, log_p.device)
    by_depth = _mass_by_depth(log_p.double().exp(), tables)
    best = torch.zeros(len(log_p), dtype=torch.double, device=log_p.device)
    chosen = torch.zeros(len(log_p), len(tables) - 1, dtype=torch.bool, device=log_p.device)
    for size in range(1, len(tables)):
        # a set of this size cannot be worth more than one that holds every truth
        limit = (1 + beta**2) * len(by_depth) / (size + beta**2 * len(by_depth))
        if not (best < limit).any():
            break
        weights = torch.zeros_like(by_depth[0])
        for depth, mass in enumerate(by_depth, 1):
            weights += mass * ((1 + beta**2) / (size + beta**2 * depth))
        # of equal nodes the one above comes first
        top = weights.sort(dim=1, descending=True, stable=True)
        value = top.values[:, :size].sum(1)
        better = value > best + 1e-12
        found = torch.zeros_like(chosen).scatter_(1, top.indices[:, :size], True)
        best, chosen = torch.where(better, value, best), torch.where(better[:, None], found, chosen)
    root = torch.ones_like(chosen[:, :1])
    return torch.cat([root, chosen], 1), best.to(log_p.dtype)


def _mass_by_depth(p: torch.Tensor, tables: NodeTables) -> list[torch.Tensor]:
    """For each depth of leaves, the mass (N, nodes - 1) of those of that depth below a node."""
    of_leaves = tables.depths[tables.leaves]
    masses = []
    for depth in range(1, len(tables.starts) + 1):
        masses.append(tables.sums(p * (of_leaves == depth))[:, 1:])
    return masses
