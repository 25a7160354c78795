"""From every level's logits to one path of the tree: decoders, and how one is added from outside.

Nothing here loops over samples or leaves: each level is a few operations on (N, classes) tensors
with index tables that are built once per taxonomy and device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from timm_branches.hierarchy.depth import (
    DepthAccuracy,
    Prediction,
    back_off,
    depth_accuracy_curve,
    plot_depth_accuracy,
)
from timm_branches.hierarchy.tables import IndexTables, TreeLevel, index_tables
from timm_branches.taxonomy.taxonomy import Taxonomy

__all__ = [
    "DECODERS",
    "Decoder",
    "DepthAccuracy",
    "Prediction",
    "back_off",
    "decode",
    "depth_accuracy_curve",
    "leaf_log_probs",
    "plot_depth_accuracy",
    "register_decoder",
]


def in_order_of_levels(
    level_logits: Sequence[torch.Tensor] | Mapping[str, torch.Tensor], taxonomy: Taxonomy
) -> list[torch.Tensor]:
    """Logits of each level from coarse to fine; a dict's are looked up by the levels' names."""
    if isinstance(level_logits, Mapping):
        missing = [level for level in taxonomy.levels if level not in level_logits]
        if missing:
            raise ValueError(
                f"level_logits lacks the levels {missing} of the taxonomy; it has "
                f"{list(level_logits)}. Of outputs under other names give the tensors from coarse "
                f"to fine, as list(logits.values()) does where they are in this order."
            )
        return [level_logits[level] for level in taxonomy.levels]
    if isinstance(level_logits, torch.Tensor):
        raise ValueError(
            "level_logits must be a sequence of tensors, one per level from coarse to fine, or a "
            "dict of them by the levels' names, got a Tensor."
        )
    return list(level_logits)


def _check(
    level_logits: Sequence[torch.Tensor] | Mapping[str, torch.Tensor], taxonomy: Taxonomy
) -> tuple[list[torch.Tensor], IndexTables]:
    """The logits as tensors of one dtype, at least float32.

    Each row has a finite maximum (or nan).
    """
    level_logits = in_order_of_levels(level_logits, taxonomy)
    shapes = [tuple(logits.shape) for logits in level_logits]
    rows = shapes[0][0] if shapes and shapes[0] else 0
    if shapes != [(rows, classes) for classes in taxonomy.num_classes]:
        expected = ", ".join(f"(N, {classes})" for classes in taxonomy.num_classes)
        raise ValueError(f"level_logits must have the shapes {expected}, got {shapes}.")
    dtype = torch.float32  # half precision would lose the small leaves of a large tree
    for level, logits in zip(taxonomy.levels, level_logits, strict=True):
        if not logits.is_floating_point():
            raise ValueError(
                f"The logits of level {level!r} must be floating point, got {logits.dtype}."
            )
        dtype = torch.promote_types(dtype, logits.dtype)
    return [_tame(logits.to(dtype)) for logits in level_logits], index_tables(
        taxonomy, level_logits[0].device
    )


def _tame(scores: torch.Tensor) -> torch.Tensor:
    """Scores that softmax can take.

    +inf becomes the largest number, rows of nothing but -inf become all equal.
    """
    top = scores.detach().amax(-1, keepdim=True)
    # a graph has no such question in it, and a device would have to be waited for
    asks = top.device.type == "cpu" and not torch.compiler.is_compiling()
    if not asks or not top.isfinite().all():
        scores = scores.clamp(max=torch.finfo(scores.dtype).max).masked_fill(top == -torch.inf, 0)
    return scores


def _to_leaves(by_level: list[torch.Tensor], tables: IndexTables) -> torch.Tensor:
    """(N, leaves) from the columns of each level's leaves."""
    columns = by_level[0]
    if len(by_level) > 1:
        columns = torch.cat(by_level, 1)
    if tables.order is None:
        return columns
    return columns.index_select(1, tables.order)


def _of_leaves(values: torch.Tensor, level: TreeLevel) -> torch.Tensor:
    """The columns of a level's leaves."""
    if not len(level.inner_nodes):
        return values
    return values.index_select(1, level.leaf_nodes)


def _masses(p: torch.Tensor, tables: IndexTables) -> list[torch.Tensor]:
    """Each node's probability (N, K), per level, from those of the leaves (N, leaves)."""
    masses: list[torch.Tensor] = []
    for depth in reversed(range(len(tables.levels))):
        level = tables.levels[depth]
        is_all = tables.order is None and len(level.leaves) == p.shape[1]
        leaves = p if is_all else p.index_select(1, level.leaves)
        if len(level.inner_nodes):
            mass = p.new_zeros(p.shape[0], len(level.parents)).index_add_(
                1, tables.levels[depth + 1].parents, masses[-1]
            )
            mass.index_copy_(1, level.leaf_nodes, leaves)
        else:
            mass = leaves
        masses.append(mass)
    return masses[::-1]


def _path(leaf: torch.Tensor, masses: list[torch.Tensor], tables: IndexTables) -> Prediction:
    """The path to each sample's leaf, with the probabilities of the nodes on it."""
    labels = tables.paths[leaf]
    columns = []
    for mass, label in zip(masses, labels.T, strict=True):
        columns.append(mass.gather(1, label.clamp(min=0)[:, None]))
    probabilities = torch.cat(columns, 1).clamp(max=1)  # (N, L)
    return Prediction(labels, probabilities.masked_fill(labels < 0, 0))


def leaf_log_probs(
    level_logits: Sequence[torch.Tensor] | Mapping[str, torch.Tensor], taxonomy: Taxonomy
) -> torch.Tensor:
    """The distribution over the leaves that the deepest answers give.

    On an even tree this is the log-softmax of the last level: the coarser heads have no say. Where
    branches end at different depths it walks down with the mass that is left: on each level the
    softmax is shared out between the leaves that end there, which keep their part, and the rest,
    which is handed to the levels below. From the output of
    :func:`~timm_branches.hierarchy.sum_upwards` it gives back the leaves' log-probabilities.

    Args:
        level_logits: one float tensor (N, num_classes[level]) per level, coarse to fine, or a dict
            of them by the levels' names: logits or log-probabilities.
        taxonomy: the tree.

    Returns:
        Tensor (N, num_leaves), at least float32; the probabilities of each row sum to 1. A row of
        logits that are all -inf says nothing and counts as uniform. Differentiable.

    Raises:
        ValueError: if there is not one floating point tensor of the right shape per level.

    Example:
        >>> tree = Taxonomy(['animal/cat', 'animal/dog', 'plant'])
        >>> logits = [torch.tensor([[3., 1.]]).log(), torch.tensor([[1., 2.]]).log()]
        >>> leaf_log_probs(logits, tree).exp()
        tensor([[0.2500, 0.5000, 0.2500]])
    """
    return _leaf_log_probs(*_check(level_logits, taxonomy))


def _leaf_log_probs(scores: list[torch.Tensor], tables: IndexTables) -> torch.Tensor:
    by_level: list[torch.Tensor] = []
    rest: torch.Tensor | None = None  # log of the mass that goes on below
    for values, level in zip(scores, tables.levels, strict=True):
        if not len(level.leaves):
            continue
        log_q = values.log_softmax(-1)
        if rest is not None:
            log_q = rest + log_q
        by_level.append(_of_leaves(log_q, level))
        if len(level.inner_nodes):
            # log(1 - the leaves' share), without the cancellation; where it is log(0) the gradient
            # would be nan
            inner = log_q.index_select(1, level.inner_nodes)
            none = inner.detach().amax(1, keepdim=True) == -torch.inf  # (N, 1)
            total = inner.masked_fill(none, 0).logsumexp(1, keepdim=True)
            rest = total.masked_fill(none, -torch.inf)
    return _to_leaves(by_level, tables)


Decoder = Callable[[list[torch.Tensor], Taxonomy], Prediction]

# what `decode` knows by name, in the order of registration
DECODERS: dict[str, Decoder] = {}


def register_decoder(name: str, function: Decoder | None = None) -> Any:
    """Add a decoder, for :func:`decode`, evaluation, `predict` and the recipes' `--decoder`.

    Args:
        name: What it is called.
        function: From the logits of each level, a list of tensors (N, K) of one dtype, at least
            float32, without +inf or rows of nothing but -inf, and the taxonomy to a
            :class:`Prediction` (N, L). Rows are independent: it may be given any part of a batch.

    Returns:
        The function. Without one, a decorator that takes it.

    Raises:
        ValueError: Another function has this name already.

    Example:
        >>> @register_decoder('from-leaf')
        ... def from_leaf(level_logits, taxonomy):
        ...     probabilities, leaf = leaf_log_probs(level_logits, taxonomy).exp().max(-1)
        ...     labels = taxonomy.expand(leaf)
        ...     return Prediction(labels, probabilities[:, None].where(labels >= 0, 0))
        >>> tree = Taxonomy(['animal/cat', 'animal/dog', 'plant'])
        >>> logits = [torch.tensor([[3., 1.]]).log(), torch.tensor([[1., 2.]]).log()]
        >>> decode(logits, tree, 'from-leaf').labels
        tensor([[0, 1]])
        >>> del DECODERS['from-leaf']
    """
    if function is None:
        return partial(register_decoder, name)
    earlier = DECODERS.get(name)
    if earlier is not None:
        # the same function again is a module or a notebook's cell that is run again
        same = (earlier.__module__, earlier.__qualname__)
        if same != (function.__module__, function.__qualname__):
            raise ValueError(f"The decoder {name!r} is registered already; choose another name.")
    DECODERS[name] = function
    return function


@register_decoder("independent")
def _independent(scores: list[torch.Tensor], taxonomy: Taxonomy) -> Prediction:
    labels = torch.stack([values.max(-1).indices for values in scores], 1)
    columns = []
    for values, label in zip(scores, labels.T, strict=True):
        columns.append(values.softmax(-1).gather(1, label[:, None]))
    return Prediction(labels, torch.cat(columns, 1).clamp(max=1))


@register_decoder("top-down")
def _top_down(scores: list[torch.Tensor], taxonomy: Taxonomy) -> Prediction:
    tables = index_tables(taxonomy, scores[0].device)
    # the root above all
    node = torch.zeros(scores[0].shape[0], dtype=torch.long, device=scores[0].device)
    path = scores[0].new_ones(node.shape[0], 1)
    ended = torch.zeros_like(node, dtype=torch.bool)
    labels, probabilities = [], []
    for values, level in zip(scores, tables.levels, strict=True):
        slot = torch.arange(level.max_children, device=node.device)
        at = (level.first_child[node][:, None] + slot).clamp(max=len(level.by_parent) - 1)
        siblings = level.by_parent[at]  # (N, max_children), then those that there are
        missing = slot >= level.num_children[node][:, None]
        ended = ended | missing[:, 0]
        # where all that there are say -inf they are equally likely; the ones missing stay
        # impossible
        values = values.gather(1, siblings).masked_fill(missing, -torch.inf)
        values = _tame(values).masked_fill(missing, -torch.inf)
        best = values.max(-1).indices[:, None]
        path = path * values.softmax(-1).gather(1, best)
        node = siblings.gather(1, best)[:, 0].masked_fill(ended, 0)
        labels.append(node.masked_fill(ended, -1))
        probabilities.append(path[:, 0].masked_fill(ended, 0))
    return Prediction(torch.stack(labels, 1), torch.stack(probabilities, 1).clamp(max=1))


@register_decoder("best-path")
def _best_path(scores: list[torch.Tensor], taxonomy: Taxonomy) -> Prediction:
    tables = index_tables(taxonomy, scores[0].device)
    product = _best_path_scores(scores, tables)
    return _path(product.max(-1).indices, _masses(product.softmax(-1), tables), tables)


def best_path_scores(
    level_logits: Sequence[torch.Tensor] | Mapping[str, torch.Tensor], taxonomy: Taxonomy
) -> torch.Tensor:
    """Log of the product of the levels' probabilities (N, leaves) down to each leaf.

    A path of d < L levels counts as the geometric mean to the power L. Not normalised.
    """
    return _best_path_scores(*_check(level_logits, taxonomy))


def _best_path_scores(scores: list[torch.Tensor], tables: IndexTables) -> torch.Tensor:
    total: torch.Tensor | None = None
    by_level = []
    for depth, (values, level) in enumerate(zip(scores, tables.levels, strict=True)):
        log_p = values.log_softmax(-1)
        if total is not None:
            log_p = total.index_select(1, level.parents).add_(log_p)
        total = log_p  # (N, K): log of the product down to each node
        if len(level.leaves):
            leaves = _of_leaves(total, level)
            if depth + 1 < len(scores):  # the geometric mean, to the power of all levels
                leaves = leaves * (len(scores) / (depth + 1))
            by_level.append(leaves)
    return _tame(_to_leaves(by_level, tables))


@register_decoder("path-sum")
def _path_sum(scores: list[torch.Tensor], taxonomy: Taxonomy) -> Prediction:
    tables = index_tables(taxonomy, scores[0].device)
    total = _path_sum_scores(scores, tables)
    return _path(total.max(-1).indices, _masses(total.softmax(-1), tables), tables)


def path_sum_scores(
    level_logits: Sequence[torch.Tensor] | Mapping[str, torch.Tensor], taxonomy: Taxonomy
) -> torch.Tensor:
    """The sum of the levels' logits (N, leaves) down to each leaf.

    It is what :func:`timm_branches.hierarchy.path_losses.parameter_sharing_loss` trains. Where all
    leaves have the same depth its softmax is that of :func:`best_path_scores`.
    """
    return _path_sum_scores(*_check(level_logits, taxonomy))


def _path_sum_scores(scores: list[torch.Tensor], tables: IndexTables) -> torch.Tensor:
    total: torch.Tensor | None = None
    by_level = []
    largest = torch.finfo(scores[0].dtype).max / (2 * len(scores))  # sums must not be infinite
    for values, level in zip(scores, tables.levels, strict=True):
        values = values.clamp(max=largest)
        if total is not None:
            values = total.index_select(1, level.parents) + values
        total = values
        if len(level.leaves):
            by_level.append(_of_leaves(total, level))
    return _tame(_to_leaves(by_level, tables))


@register_decoder("leaf-marginal")
def _leaf_marginal(scores: list[torch.Tensor], taxonomy: Taxonomy) -> Prediction:
    tables = index_tables(taxonomy, scores[0].device)
    log_p = _leaf_log_probs(scores, tables)
    return _path(log_p.max(-1).indices, _masses(log_p.exp_(), tables), tables)


@register_decoder("crm")
def _crm(scores: list[torch.Tensor], taxonomy: Taxonomy) -> Prediction:
    """The leaf of least expected cost.

    The cost of leaf k is the root's height less drop * mass of each node above or at k.
    """
    tables = index_tables(taxonomy, scores[0].device)
    masses = _masses(_leaf_log_probs(scores, tables).exp_(), tables)
    saved: torch.Tensor | None = None
    by_level = []
    for mass, level in zip(masses, tables.levels, strict=True):
        if saved is None:
            above = torch.zeros_like(mass)
        else:
            above = saved.index_select(1, level.parents)
        saved = above.addcmul_(mass, level.drop.to(mass.dtype))
        if len(level.leaves):
            by_level.append(_of_leaves(saved, level))
    of_leaf = _to_leaves(by_level, tables)
    # equal costs come out unequal by the order of summation: what differs by rounding only is a tie
    tie = 8 * len(scores) * torch.finfo(of_leaf.dtype).eps
    leaf = (of_leaf >= of_leaf.amax(-1, keepdim=True) - tie).byte().max(-1).indices
    return _path(leaf, masses, tables)


# numbers: a CPU is twice as fast if what lies between logits and labels stays in its cache
_CACHED = 2**19


@torch.no_grad()
def decode(
    level_logits: Sequence[torch.Tensor] | Mapping[str, torch.Tensor],
    taxonomy: Taxonomy,
    method: str | Decoder = "independent",
) -> Prediction:
    """One label per level from every level's logits.

    All methods but 'independent' promise a path of the tree, whatever the logits
    (:meth:`Taxonomy.valid_paths`), and all but 'cost' one that ends at a leaf:

    - 'independent': each level's argmax and its softmax probability, level by level. The answers
      may contradict each other, and none is ever -1.
    - 'top-down': the argmax of level 0, then at each step the argmax among the children of the node
      chosen. The probability is the product of the conditional ones, each a softmax over the
      siblings.
    - 'best-path': the leaf whose path has the greatest product of the levels' softmax
      probabilities. On uneven trees the geometric mean over a path's own levels is compared, so
      that short paths are not favoured. Probabilities: the products (a path of d < L levels counts
      as the geometric mean to the power L) are normalised over the leaves, a product of experts
      (Hinton 2002), and summed up the tree, so they never rise down the path.
    - 'path-sum': the leaf whose path has the greatest sum of logits; probabilities are the softmax
      of these sums over the leaves, summed up the tree. It is for heads that were trained by
      :func:`timm_branches.hierarchy.path_losses.parameter_sharing_loss`.
    - 'leaf-marginal': the path of the most probable leaf of :func:`leaf_log_probs`; each node's
      probability is that of the leaves below it. (What a flat baseline often reports instead, the
      most probable node of *each* level, is 'independent' on the output of
      :func:`~timm_branches.hierarchy.sum_upwards`. That need not be a path.)
    - 'crm': the leaf of least expected cost, the cost of k where j is true being the height of
      their lowest common ancestor (:meth:`Taxonomy.lca_height`), under the distribution of
      'leaf-marginal', and probabilities as there.
    - 'cost': the node, leaf or not, of least expected tree distance under that distribution; of
      other costs :func:`cost_decoder` makes a decoder.

    Of equal candidates the one of lowest index is taken, with 'cost' the deepest first.

    Args:
        level_logits: one float tensor (N, num_classes[level]) per level, coarse to fine, or a dict
            of them by the levels' names: logits or log-probabilities, such as `model(images)` or
            `sum_upwards(leaf_logits, taxonomy)`.
        taxonomy: the tree.
        method: one of `DECODERS`, which :func:`register_decoder` adds to, or such a function.

    Returns:
        A :class:`Prediction`: labels (N, L) with -1 below a shallow leaf, and their probabilities
        (N, L), at least float32. Where all candidates say -inf they are equally likely; +inf counts
        as the largest finite number; nan gives nan probabilities.

    Raises:
        ValueError: if there is no such method, or not one floating point tensor of the right shape
            per level.

    Example:
        >>> tree = Taxonomy(['animal/cat', 'animal/dog', 'transport/ship'])
        >>> logits = [torch.tensor([[.6, .4]]).log(), torch.tensor([[.1, .2, .7]]).log()]
        >>> decode(logits, tree).labels, decode(logits, tree, 'top-down').labels
        (tensor([[0, 2]]), tensor([[0, 1]]))
        >>> decode(logits, tree, 'best-path').labels
        tensor([[1, 2]])

    Source: 'crm' is Karthik et al., "No Cost Likelihood Manipulation at Test Time for Making Better
    Mistakes in Deep Networks", ICLR 2021, equation 1; computed along the tree, without the matrix
    of costs.
    """
    if isinstance(method, str) and method not in DECODERS:
        names = ", ".join(map(repr, DECODERS))
        raise ValueError(f"There is no decoder {method!r}; there are {names}.")
    decoder = DECODERS[method] if isinstance(method, str) else method
    scores, _ = _check(level_logits, taxonomy)
    rows = len(scores[0])
    if scores[0].device.type == "cpu" and method != "top-down":  # which looks at few of the classes
        rows = _CACHED // taxonomy.num_leaves
    pieces = [values.split(max(1, rows)) for values in scores]
    labels, probabilities = [], []
    for chunk in zip(*pieces, strict=True):
        prediction = decoder(list(chunk), taxonomy)
        _check_answer(prediction, method, len(chunk[0]), taxonomy)
        labels.append(prediction.labels)
        probabilities.append(prediction.probabilities)
    return Prediction(torch.cat(labels), torch.cat(probabilities))


def _check_answer(
    prediction: Prediction, method: str | Decoder, rows: int, taxonomy: Taxonomy
) -> None:
    """A decoder from outside must keep to the contract."""
    expected = (rows, taxonomy.num_levels)
    shapes = [tuple(values.shape) for values in prediction]
    if shapes != [expected, expected] or prediction[0].is_floating_point():
        raise ValueError(
            f"The decoder {method!r} must give labels (integers) and probabilities of the shape "
            f"{expected} each, got {shapes}."
        )
