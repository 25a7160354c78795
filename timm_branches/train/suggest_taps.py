"""At which stage can each level be read? Linear probes of a frozen backbone choose the taps."""

import logging
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tqdm import tqdm

from timm_branches.data import HierarchicalDataset, create_loader
from timm_branches.model import BranchModel
from timm_branches.taxonomy import Taxonomy

__all__ = [
    "TapSuggestion",
    "TreeAgreement",
    "adjusted_rand_index",
    "suggest_taps",
    "tree_agreement",
]

_logger = logging.getLogger(__name__)

# weight of the squared norm, the best of which is chosen on a part of the training images
_PENALTIES = (1e-4, 1e-2)


@dataclass(frozen=True)
class TapSuggestion:
    """How well each level can be read at each stage, and the taps that follow.

    Attributes:
        stages: Numbers of the stages.
        levels: Names of the levels, coarsest first.
        accuracy: (stages, levels), percent of the validation images.
        error: (stages, levels), their standard errors.
        count: How many validation images have a label, for each level.
        taps: A stage for each level.
        agreement: How far the tree is the one that the deepest stage sees.
    """

    stages: tuple[int, ...]
    levels: tuple[str, ...]
    accuracy: torch.Tensor
    error: torch.Tensor
    count: tuple[int, ...]
    taps: tuple[int, ...]
    agreement: "TreeAgreement"

    def __str__(self) -> str:
        width = max(12, *(len(level) for level in self.levels))
        lines = ["stage  " + "  ".join(level.rjust(width) for level in self.levels)]
        for stage, values, errors in zip(self.stages, self.accuracy, self.error, strict=True):
            cells = []
            for level, value, error in zip(self.levels, values, errors, strict=True):
                mark = " *" if self.taps[self.levels.index(level)] == stage else "  "
                cells.append(f"{value:.1f} ± {error:.1f}{mark}".rjust(width))
            lines.append(f"{stage:5}  " + "  ".join(cells))
        return "\n".join(lines)

    def plot(self, path: str | os.PathLike) -> Path:
        """Draw the table as a map of colours; the chosen taps are framed."""
        from matplotlib.patches import Rectangle

        from timm_branches.figures import INK, new_figure, save_figure

        figure = new_figure(1.6 + 1.3 * len(self.levels), 1.2 + 0.55 * len(self.stages))
        axes = figure.subplots()
        axes.imshow(self.accuracy.numpy(), cmap="Blues", vmin=0, vmax=140, aspect="auto")
        for row, values in enumerate(self.accuracy.tolist()):
            for column, value in enumerate(values):
                axes.text(column, row, f"{value:.1f}", ha="center", va="center", color=INK)
        for column, tap in enumerate(self.taps):
            corner = (column - 0.47, self.stages.index(tap) - 0.47)
            axes.add_patch(Rectangle(corner, 0.94, 0.94, fill=False, edgecolor=INK, linewidth=2))
        axes.set_xticks(range(len(self.levels)), self.levels, color=INK)
        axes.set_yticks(range(len(self.stages)), [f"stage {s}" for s in self.stages], color=INK)
        axes.set_title("linear probes, % of validation images", color=INK, fontsize=10)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        return save_figure(figure, path)


@dataclass(frozen=True)
class TreeAgreement:
    """How far a tree groups classes as a network's features do.

    Attributes:
        levels: Names of the levels above the leaves.
        index: The adjusted Rand index of each level's groups and as many clusters of the class
            means: 1 is equal, 0 what chance gives.
        chance: The 95 % quantile of the same for classes that are shuffled.
        elsewhere: Leaves whose nearest leaf is in another class of the first level, as pairs of
            paths, the nearest first.
        derived: The tree of the clusters.
    """

    levels: tuple[str, ...]
    index: tuple[float, ...]
    chance: tuple[float, ...]
    elsewhere: tuple[tuple[str, str], ...]
    derived: Taxonomy | None

    def __str__(self) -> str:
        parts = []
        for level, index, chance in zip(self.levels, self.index, self.chance, strict=True):
            parts.append(f"{level} {index:.2f} (shuffled classes: below {chance:.2f})")
        lines = [f"Agreement of the tree with the network's own: {', '.join(parts) or 'none'}."]
        for leaf, other in self.elsewhere[:5]:
            lines.append(f"{leaf} is seen next to {other}.")
        return "\n".join(lines)


def suggest_taps(
    model: BranchModel,
    train: HierarchicalDataset,
    val: HierarchicalDataset,
    batch_size: int = 64,
    num_workers: int = 0,
    seed: int = 0,
) -> TapSuggestion:
    """Read each level off each stage of a frozen backbone by a linear probe.

    Features are averaged over the map. A probe is multinomial logistic regression on standardised
    features; the weight of its penalty is chosen on a fifth of the training images. Each level's
    tap is the shallowest stage whose accuracy is within one standard error of the best (of the
    differences on the same images), and none is shallower than that of the level above.

    Args:
        model: Tapped once at each stage that is to be tried; its heads are not looked at.
        train: Images with labels on every level, prepared as for evaluation.
        val: Others to judge by; never test images, since taps are chosen by them.
        batch_size: Images a pass.
        num_workers: Processes that read images.
        seed: Of the split that chooses the penalty.

    Returns:
        The :class:`TapSuggestion`.

    Raises:
        ValueError: There is no tree, or a level has fewer than two classes among the images.

    Source: linear probes, Alain and Bengio 2016 (arXiv 1610.01644); the rule of one standard
    error, Breiman et al. 1984.

    Example:
        >>> from timm_branches import create_branch_model
        >>> from timm_branches.data import create_splits
        >>> train, val, _ = create_splits('digits', 0.2, in_chans=1)
        >>> train, val = train.limit(100), val.limit(60)
        >>> model = create_branch_model(
        ...     'test_resnet', taps=[3, 5], num_classes=2, in_chans=1, img_size=32)
        >>> suggestion = suggest_taps(model, train, val)
        >>> suggestion.accuracy.shape, len(suggestion.taps)
        (torch.Size([2, 2]), 2)
    """
    tree = train.taxonomy
    if tree is None:
        raise ValueError("The data have no tree, whose levels could be read: give one.")
    x, y = _features(model, train, batch_size, num_workers, "training images")
    x_val, y_val = _features(model, val, batch_size, num_workers, "validation images")
    stages = tuple(_stage_of(info) for info in model.taps)
    right = []  # for each stage and level which validation images are read rightly
    pairs = list(product(range(len(stages)), range(tree.num_levels)))
    for stage, level in tqdm(pairs, desc="probes", leave=False, disable=None):
        known, known_val = y[:, level] >= 0, y_val[:, level] >= 0
        if len(y[known, level].unique()) < 2 or not known_val.any():
            raise ValueError(
                f"Level {tree.levels[level]!r} has fewer than two classes among {int(known.sum())} "
                f"training images, or no label among {len(y_val)} others: there is nothing to read."
            )
        answers = _probe(
            x[stage][known],
            y[known, level],
            x_val[stage][known_val],
            tree.num_classes[level],
            seed,
        )
        right.append((answers == y_val[known_val, level]).double())
    table = [right[i : i + tree.num_levels] for i in range(0, len(right), tree.num_levels)]
    counts = tuple(map(len, table[0]))
    chosen = tuple(stages[index] for index in _choose(table))
    shape = (len(stages), tree.num_levels)
    accuracy = torch.tensor([100 * float(cell.mean()) for cell in right]).view(shape)
    error = torch.tensor([100 * _standard_error(cell) for cell in right]).view(shape)
    return TapSuggestion(
        stages,
        tree.levels,
        accuracy,
        error,
        counts,
        chosen,
        tree_agreement(x[-1], y, tree, seed),
    )


def _stage_of(info: Any) -> int:
    stage = info.tap.stage
    if stage is None:
        raise ValueError(f"suggest_taps compares stages, not the module {info.module}.")
    return int(stage)


@torch.inference_mode()
def _features(
    model: BranchModel, data: HierarchicalDataset, batch_size: int, num_workers: int, what: str
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Of each stage the averaged features (N, C), and the labels (N, L)."""
    parameter = next(model.parameters())
    training = model.training
    model.eval()
    loader = create_loader(data, batch_size, num_workers=num_workers, persistent_workers=False)
    features: list[list[torch.Tensor]] = []
    labels = []
    try:
        for images, target in tqdm(loader, desc=what, leave=False, disable=None):
            maps = model.forward_taps(images.to(parameter.device, parameter.dtype))
            features.append([_averaged(y) for y in maps.values()])
            labels.append(target)
    finally:
        model.train(training)
    return [torch.cat(parts) for parts in zip(*features, strict=True)], torch.cat(labels)


def _averaged(y: Any) -> torch.Tensor:
    """(B, C) of a map (B, C, H, W)."""
    averaged: torch.Tensor = y.float().mean((2, 3)).cpu()
    return averaged


def _probe(
    x: torch.Tensor, y: torch.Tensor, x_val: torch.Tensor, classes: int, seed: int
) -> torch.Tensor:
    """The answers (M,) of a probe that was fitted on (N, C) features of classes (N,)."""
    mean, deviation = x.mean(0), x.std(0).clamp(min=1e-6)
    x, x_val = (x - mean) / deviation, (x_val - mean) / deviation
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    inner, outer = order[: len(x) // 5], order[len(x) // 5 :]
    best, best_right = _PENALTIES[-1], -1.0
    for penalty in _PENALTIES:
        weight, bias = _fit(x[outer], y[outer], classes, penalty)
        right = float(((x[inner] @ weight + bias).argmax(1) == y[inner]).float().mean())
        if right > best_right:
            best, best_right = penalty, right
    weight, bias = _fit(x, y, classes, best)
    return (x_val @ weight + bias).argmax(1)


def _fit(
    x: torch.Tensor, y: torch.Tensor, classes: int, penalty: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Multinomial logistic regression: least mean cross-entropy + penalty |W|^2 / 2."""
    weight = torch.zeros(x.shape[1], classes, requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=60, tolerance_change=1e-7, line_search_fn="strong_wolfe"
    )

    def loss() -> float:
        optimizer.zero_grad()
        value = F.cross_entropy(x @ weight + bias, y) + penalty / 2 * weight.square().sum()
        value.backward()
        return float(value.detach())

    with torch.enable_grad():
        optimizer.step(loss)
    return weight.detach(), bias.detach()


def _standard_error(values: torch.Tensor) -> float:
    return float(values.std(correction=0)) / math.sqrt(len(values))


def _choose(right: Sequence[Sequence[torch.Tensor]]) -> list[int]:
    """For each level the position of its stage, never above that of the level before."""
    chosen: list[int] = []
    for level in range(len(right[0])):
        cells = [row[level] for row in right]
        best = max(range(len(cells)), key=lambda stage: float(cells[stage].mean()))
        first = chosen[-1] if chosen else 0
        at = best
        for stage in range(best, -1, -1):
            loss = cells[best] - cells[stage]
            if float(loss.mean()) <= _standard_error(loss):
                at = stage
        chosen.append(max(first, at))
    return chosen


def tree_agreement(
    features: torch.Tensor, labels: torch.Tensor, tree: Taxonomy, seed: int = 0
) -> TreeAgreement:
    """Is this tree the one that the network sees?

    The leaves' mean features are clustered (:meth:`Taxonomy.from_embeddings`) into as many groups
    as each level of the tree has, and the groups are compared.

    Args:
        features: (N, C).
        labels: (N, L); images without a known leaf are left out.
        tree: The tree in question.
        seed: Of the shuffled classes.

    Returns:
        The :class:`TreeAgreement`; without indices where there are fewer than three leaves with
        images, or one level.
    """
    from timm_branches.hierarchy.calibration import labels_to_leaves

    leaf = labels_to_leaves(labels, tree)
    present = leaf[leaf >= 0].unique()
    sums = torch.zeros(tree.num_leaves, features.shape[1]).index_add_(
        0, leaf[leaf >= 0], features[leaf >= 0].float()
    )
    means = sums[present] / leaf[leaf >= 0].bincount(minlength=tree.num_leaves)[present, None]
    means = F.normalize(means - means.mean(0), dim=1)
    groups = tree.leaf_table[present]  # (P, L); below a shallow leaf it is a group of its own
    levels = [level for level in range(tree.num_levels - 1) if 1 < _count(groups, level)]
    counts = [_count(groups, level) for level in levels]
    usable: list[int] = []
    for level, count in zip(levels, counts, strict=True):
        if count < len(present) and (not usable or count > _count(groups, usable[-1])):
            usable.append(level)
    if len(present) < 3 or not usable:
        return TreeAgreement((), (), (), (), None)
    names = ["/".join(tree.leaves[i]) for i in present.tolist()]
    flat_names = [f"leaf{i}" for i in range(len(names))]
    derived = Taxonomy.from_embeddings(
        means.double().numpy(), flat_names, num_classes=tuple(_count(groups, k) for k in usable)
    )
    order = derived.encode(flat_names)
    generator = torch.Generator().manual_seed(seed)
    index, chance = [], []
    for place, level in enumerate(usable):
        given, found = _grouping(groups, level), derived.leaf_table[order, place]
        index.append(adjusted_rand_index(given, found))
        shuffled = []
        for _ in range(200):
            permutation = torch.randperm(len(given), generator=generator)
            shuffled.append(adjusted_rand_index(given[permutation], found))
        chance.append(float(torch.tensor(shuffled).quantile(0.95)))
    similar = means @ means.T
    similar.fill_diagonal_(-2)
    near, nearest = similar.max(1)
    other = groups[nearest, 0] != groups[:, 0]
    rank = near.masked_fill(~other, -2).argsort(descending=True)
    rank = rank[other[rank]]
    pairs = [
        (names[i], names[k]) for i, k in zip(rank.tolist(), nearest[rank].tolist(), strict=True)
    ]
    return TreeAgreement(
        tuple(tree.levels[level] for level in usable),
        tuple(index),
        tuple(chance),
        tuple(pairs),
        derived,
    )


def _grouping(groups: torch.Tensor, level: int) -> torch.Tensor:
    """The class (P,) of each leaf on a level; shallow leaves are classes of their own."""
    own = groups[:, level].clone()
    shallow = own < 0
    own[shallow] = 10**6 + torch.arange(int(shallow.sum()))
    return own


def _count(groups: torch.Tensor, level: int) -> int:
    return len(_grouping(groups, level).unique())


def adjusted_rand_index(a: torch.Tensor, b: torch.Tensor) -> float:
    """How far two groupings (N,) agree: 1 for the same groups, 0 on average by chance.

    Source: Hubert and Arabie, "Comparing partitions", 1985.
    """
    a, b = a.unique(return_inverse=True)[1], b.unique(return_inverse=True)[1]
    table = torch.zeros(int(a.max()) + 1, int(b.max()) + 1, dtype=torch.double)
    table.index_put_((a, b), torch.ones(len(a), dtype=torch.double), accumulate=True)

    def pairs(counts: torch.Tensor) -> float:
        return float((counts * (counts - 1) / 2).sum())

    together, of_a, of_b = pairs(table), pairs(table.sum(1)), pairs(table.sum(0))
    expected = of_a * of_b / max(len(a) * (len(a) - 1) / 2, 1)
    most = (of_a + of_b) / 2
    return 1.0 if most == expected else (together - expected) / (most - expected)
