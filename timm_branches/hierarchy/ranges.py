"""Sums over the leaves below a class, for whole batches at once.

With the leaves in depth-first order those below a class are neighbours: a range. A range is summed
from blocks of leaves, which are summed once for all ranges, and from what it has of a block at
either end. So a sum over any number of classes reads the batch's logits about once, stays in the
log domain, where nothing underflows, and asks the device for no value.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from timm_branches.hierarchy.tables import kept_by_tree
from timm_branches.taxonomy.taxonomy import Taxonomy

__all__ = ["LeafRanges", "leaf_log_sums", "leaf_ranges", "log_sum_exp"]

BLOCK = 64  # leaves; 32 to 128 are about as quick
CHUNK = 2**18  # numbers that fit into a core's cache beside their results


class LeafRanges(NamedTuple):
    """The classes of all levels side by side, and where their leaves are in depth-first order.

    The last row of each table, which index -1 means, stands for "no class": it has no leaf.

    Attributes:
        paths: LongTensor (classes + 1, L), the path to each class.
        heights: LongTensor (classes + 1,); of "no class" that of the root above all.
        starts: LongTensor (L,), where each level's classes begin.
        depths: LongTensor (L,), 1 to L.
        first: LongTensor (classes + 1,), the place of the first leaf below each class.
        last: LongTensor (classes + 1,), the place behind the last one.
        order: LongTensor (leaves,), the leaf at each place.
        inverse: LongTensor (leaves,), the place of each leaf.
        in_order: Whether every leaf is in its place already.
    """

    paths: torch.Tensor
    heights: torch.Tensor
    starts: torch.Tensor
    depths: torch.Tensor
    first: torch.Tensor
    last: torch.Tensor
    order: torch.Tensor
    inverse: torch.Tensor
    in_order: bool

    def classes(self, rows: torch.Tensor) -> torch.Tensor:
        """Label rows (..., L) as indices of classes of all levels, -1 for none."""
        return torch.where(rows >= 0, rows + self.starts, -1)

    def deepest(self, rows: torch.Tensor) -> torch.Tensor:
        """The deepest known class (N,) of label rows (N, L), -1 without any."""
        depth = ((rows >= 0) * self.depths).amax(1, keepdim=True)
        # with no known class the first column is taken, which is -1
        return self.classes(rows).gather(1, (depth - 1).clamp(min=0))[:, 0]

    def complete(self, rows: torch.Tensor) -> torch.Tensor:
        """Label rows (N, L) with gaps above a known class filled in: it determines these."""
        return self.paths[self.deepest(rows.long())]


@kept_by_tree
def leaf_ranges(taxonomy: Taxonomy, device: torch.device) -> LeafRanges:
    """The tables of a tree on a device."""
    cpu = torch.device("cpu")
    levels, table = taxonomy.num_levels, taxonomy.leaf_table
    order = torch.arange(len(table), device=cpu)
    for column in table.T.flip(0):
        order = order[column[order].argsort(stable=True)]
    paths, first, last = [], [], []
    places = torch.arange(len(table), device=cpu)
    for level, classes in enumerate(taxonomy.num_classes):
        paths.append(taxonomy.expand(torch.arange(classes, device=cpu), level))
        node = table[order, level]
        below, node = places[node >= 0], node[node >= 0]
        none = torch.full((classes,), len(table), device=cpu)
        first.append(none.scatter_reduce(0, node, below, "amin"))
        last.append(torch.zeros_like(none).scatter_reduce(0, node, below + 1, "amax"))
    nobody = torch.zeros(1, dtype=torch.long, device=cpu)
    sizes = torch.tensor(taxonomy.num_classes, device=cpu)
    return LeafRanges(
        paths=torch.cat([*paths, torch.full((1, levels), -1, device=cpu)]).to(device),
        heights=torch.cat([*taxonomy.heights, nobody + levels]).to(device),
        starts=(sizes.cumsum(0) - sizes).to(device),
        depths=torch.arange(1, levels + 1, device=cpu).to(device),
        first=torch.cat([*first, nobody]).to(device),
        last=torch.cat([*last, nobody]).to(device),
        order=order.to(device),
        inverse=order.argsort().to(device),
        in_order=torch.equal(order, places),
    )


def leaf_log_sums(
    leaf_logits: torch.Tensor,
    classes: torch.Tensor,
    ranges: LeafRanges,
    first: torch.Tensor | None = None,
    last: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the softmax over the leaves: log-probabilities of classes, and sums of log-probabilities.

    Args:
        leaf_logits: (N, leaves), at least float32.
        classes: LongTensor (N, R), as :meth:`LeafRanges.classes` gives them.
        ranges: The tables of the tree.
        first: LongTensor (N, Q), places of the first leaves of ranges; by default Q is 0.
        last: LongTensor (N, Q), places behind their last leaves.

    Returns:
        Log-probabilities (N, R), log of the sum of p over the leaves below each class, -inf of
        "no class"; and the sums (N, Q) of log p over the leaves of each range.
    """
    if first is None or last is None:
        first, last = classes[:, :0], classes[:, :0]
    log_p, sums = _LogSums.apply(
        leaf_logits,
        ranges.first[classes],
        ranges.last[classes],
        first,
        last,
        ranges.order,
        ranges.inverse,
        ranges.in_order,
    )
    return log_p, sums


class _LogSums(torch.autograd.Function):
    """The function and its gradient, which reads each logit about twice.

    With block b of scores x, e = exp(x - max of the block): a class' sum is made of whole blocks'
    log-sum-exps and of single leaves at both ends, and the gradient of a block's leaves is e times
    one number a block.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        first: torch.Tensor,
        last: torch.Tensor,
        plain_first: torch.Tensor,
        plain_last: torch.Tensor,
        order: torch.Tensor,
        inverse: torch.Tensor,
        in_order: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        count, leaves = logits.shape
        blocks = -(-leaves // BLOCK)
        # less the largest: log-sum-exps of large logits would lose what they differ by
        top = _finite(logits.amax(1, keepdim=True))
        exp = logits.new_empty(count, blocks, BLOCK)
        inner = logits.new_empty(count, blocks)  # sums of exp
        outer = torch.empty_like(inner)  # log-sum-exps of the blocks
        plain = torch.empty_like(inner) if plain_first.shape[1] else None  # sums of the scores
        for rows in _chunks(logits):
            x = logits[rows] if in_order else logits[rows].index_select(1, order)
            x = F.pad(x - top[rows], (0, -leaves % BLOCK), value=-torch.inf)
            x = x.view(-1, blocks, BLOCK)
            if plain is not None:
                # what is missing of the last block counts nothing
                torch.sum(
                    F.pad(x.flatten(1)[:, :leaves], (0, -leaves % BLOCK)).view_as(x),
                    -1,
                    out=plain[rows],
                )
            most = _finite(x.amax(-1))
            torch.sub(x, most[..., None], out=exp[rows]).exp_()
            torch.sum(exp[rows], -1, out=inner[rows])
            torch.add(inner[rows].log(), most, out=outer[rows])
        norm = _log_sum_exp(outer)[:, None]

        places, inside, whole = _split(first, last, blocks)
        ends = (logits.gather(1, order[places.flatten(1)]) - top).view_as(places)
        ends = ends.masked_fill_(~inside, -torch.inf)
        middle = outer[:, None].masked_fill(~whole, -torch.inf)
        sums = _log_sum_exp(torch.cat([ends, middle], -1))
        of_plain = plain_first.to(norm.dtype)
        parts: tuple[torch.Tensor, ...] = (places[:0], inside[:0], whole[:0])
        if plain is not None:
            parts = _split(plain_first, plain_last, blocks)
            single = (logits.gather(1, order[parts[0].flatten(1)]) - top).view_as(parts[0])
            of_plain = single.masked_fill_(~parts[1], 0).sum(-1)
            of_plain += plain[:, None].masked_fill(~parts[2], 0).sum(-1)
            of_plain -= (plain_last - plain_first) * norm
        ctx.save_for_backward(
            exp,
            inner,
            outer,
            norm,
            sums,
            ends,
            places,
            whole,
            *parts,
            plain_last - plain_first,
            inverse,
        )
        ctx.leaves, ctx.in_order = leaves, in_order
        return sums - norm, of_plain

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        # what was kept has forgotten that it came from the logits
        if torch.is_grad_enabled():
            raise RuntimeError(
                "Losses of leaves on a tree have no second derivatives: create_graph=True would "
                "give wrong ones."
            )
        (
            exp,
            inner,
            outer,
            norm,
            sums,
            ends,
            places,
            whole,
            plain_places,
            plain_inside,
            plain_whole,
            plain_counts,
            inverse,
        ) = ctx.saved_tensors
        of_sums, of_plain = gradients
        # of an impossible class no leaf has any part
        below = sums.masked_fill(sums == -torch.inf, torch.inf)[..., None]
        by_block = (outer[:, None] - below).exp().masked_fill_(~whole, 0)  # (N, R, blocks)
        by_block = (by_block * of_sums[..., None]).sum(1)
        has_plain = plain_counts.shape[1] > 0
        total = of_sums.sum(1, keepdim=True)
        if has_plain:
            total += (of_plain * plain_counts).sum(1, keepdim=True)
        by_block -= total * (outer - norm).exp()
        # of a block of nothing but -inf every exp is 0
        by_block /= inner.clamp(min=torch.finfo(inner.dtype).tiny)
        by_leaf = (ends - below).exp() * of_sums[..., None]  # (N, R, 2 BLOCK)
        result = exp.new_empty(len(exp), ctx.leaves)
        if has_plain:
            same = (plain_whole * of_plain[..., None]).sum(1)  # (N, blocks)
            single = (plain_inside * of_plain[..., None]).flatten(1)
        for rows in _chunks(result):
            g = exp[rows] * by_block[rows][..., None]
            if has_plain:
                g += same[rows][..., None]
            g = g.flatten(1)
            g.scatter_add_(1, places[rows].flatten(1), by_leaf[rows].flatten(1))
            if has_plain:
                g.scatter_add_(1, plain_places[rows].flatten(1), single[rows])
            if ctx.in_order:
                result[rows] = g[:, : ctx.leaves]
            else:
                torch.index_select(g, 1, inverse, out=result[rows])
        return (result, *[None] * 7)


def _chunks(values: torch.Tensor) -> list[slice]:
    """On the CPU as many rows at a time as fit its cache; elsewhere all."""
    count, columns = values.shape
    size = count
    if values.device.type == "cpu":
        size = max(1, CHUNK // max(1, columns))
    return [slice(start, start + size) for start in range(0, count, max(1, size))]


def _split(
    first: torch.Tensor, last: torch.Tensor, blocks: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What ranges [first, last) (N, R) are made of.

    Returns:
        Places (N, R, 2 BLOCK) at both ends, which of them are inside the range, and which blocks
        (N, R, blocks) lie wholly in it.
    """
    # there may be no whole block, and then `stop` is not above `begin`
    begin, stop = (first + BLOCK - 1) // BLOCK, last // BLOCK
    step = torch.arange(BLOCK, device=first.device)
    left, right = first[..., None] + step, (stop * BLOCK)[..., None] + step
    of_left = left < torch.minimum(last, begin * BLOCK)[..., None]
    of_right = (right < last[..., None]) & (stop >= begin)[..., None]
    inside = torch.cat([of_left, of_right], -1)
    # a place that is not inside may not exist
    places = torch.where(inside, torch.cat([left, right], -1), 0)
    block = torch.arange(blocks, device=first.device)
    return places, inside, (block >= begin[..., None]) & (block < stop[..., None])


def log_sum_exp(values: torch.Tensor) -> torch.Tensor:
    """As torch's over the last dimension, but without a gradient of nan where all are -inf."""
    top = _finite(values.detach().amax(-1, keepdim=True))
    total = (values - top).exp().sum(-1)
    # log(0) is -inf as it should be, but its gradient is nan: keep log away from zeros
    none = total == 0
    return (total.masked_fill(none, 1).log() + top[..., 0]).masked_fill(none, -torch.inf)


def _log_sum_exp(values: torch.Tensor) -> torch.Tensor:
    """The same without a gradient."""
    top = _finite(values.amax(-1, keepdim=True))
    return (values - top).exp_().sum(-1).log_().add_(top[..., 0])


def _finite(values: torch.Tensor) -> torch.Tensor:
    """The nearest finite numbers: infinity less infinity would be nan."""
    limits = torch.finfo(values.dtype)
    return values.clamp(limits.min, limits.max)
