"""Trees derived from data: from a confusion matrix, or from class embeddings.

Agglomerative clustering merges the two nearest groups of classes until one is left; stopping early
at n groups gives a level of n classes. All levels are stops of one such run (a *linkage*, in
SciPy's form), so each lies within the next.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch

from timm_branches.taxonomy.paths import NodePath

if TYPE_CHECKING:
    import numpy as np

__all__ = ["class_prototypes", "cut_linkage", "linkage_from_confusion", "linkage_from_embeddings"]

# centroid and median linkage are left out: a later merge may be nearer than an earlier one, and
# cuts lose their meaning
_METHODS = ("average", "complete", "single", "weighted")
_NAME_WIDTH = 32


def linkage_from_confusion(matrix: Any, method: str = "average") -> np.ndarray:
    """Agglomerative clustering of classes by how often a model confuses them.

    The similarity of classes i and j is (p(j | i) + p(i | j)) / 2, their distance 1 minus that,
    where p(j | i) is the share of class i's samples that were predicted as j. Of a class without
    samples only the other direction counts.

    Source: the affinity is that of Bengio, Weston and Grangier, "Label embedding trees for large
    multi-class tasks", NeurIPS 2010; they split it with spectral clustering.

    Args:
        matrix: counts (K, K), rows labels, columns predictions: tensor, array or lists.
        method: 'average', 'complete', 'single' or 'weighted', see
            `scipy.cluster.hierarchy.linkage`.

    Returns:
        Array (K - 1, 4) in the form of `scipy.cluster.hierarchy.linkage`.

    Raises:
        ValueError: if the matrix is not square, or holds a negative or infinite number or NaN; if
            no class is confused with any other, so that there is nothing to go by; or if there is
            no such method.

    Example:
        >>> linkage = linkage_from_confusion([[8, 2, 0], [1, 9, 0], [0, 0, 10]])
        >>> cut_linkage(linkage, [2]).flatten().tolist()
        [0, 0, 1]
    """
    import numpy as np
    from scipy.cluster.hierarchy import linkage
    from scipy.spatial.distance import squareform

    counts = _as_matrix(matrix, "a confusion matrix")
    if counts.shape[0] != counts.shape[1]:
        raise ValueError(
            "a confusion matrix is square, one row and one column per class; got shape "
            f"{counts.shape}."
        )
    if (counts < 0).any():
        raise ValueError(f"a confusion matrix holds counts, got a negative one: {counts.min():g}.")
    _check_method(method, _METHODS, "a confusion matrix")
    if len(counts) == 1:
        return np.empty((0, 4))
    total = counts.sum(1, keepdims=True)
    share = np.divide(counts, total, out=np.zeros_like(counts), where=total > 0)
    known = (total > 0).astype(float)
    similarity = (share + share.T) / np.maximum(known + known.T, 1)
    np.fill_diagonal(similarity, 1)
    if np.count_nonzero(similarity) == len(counts):
        raise ValueError(
            "no class is confused with any other, so nothing says which belong together; use a "
            "weaker model's confusion matrix, or embeddings."
        )
    return linkage(squareform(1 - similarity, checks=False), method)


def linkage_from_embeddings(
    embeddings: Any, metric: str = "cosine", method: str = "average"
) -> np.ndarray:
    """Agglomerative clustering of classes by the distance of their embeddings.

    Args:
        embeddings: one vector per class (K, D), such as :func:`class_prototypes`, a classifier's
            weight rows or text embeddings of the class names: tensor, array or lists.
        metric: 'cosine' or 'euclidean'.
        method: 'average', 'complete', 'single', 'weighted', or with euclidean distance 'ward'.

    Returns:
        Array (K - 1, 4) in the form of `scipy.cluster.hierarchy.linkage`.

    Raises:
        ValueError: if the shape is not (K, D), a number is not finite, a vector is zero (it has no
            cosine), or there is no such metric or method.

    Example:
        >>> linkage = linkage_from_embeddings([[1., 0.], [0., 1.], [3., 0.1]])
        >>> cut_linkage(linkage, [2]).flatten().tolist()
        [0, 1, 0]
    """
    import numpy as np
    from scipy.cluster.hierarchy import linkage
    from scipy.spatial.distance import pdist

    vectors = _as_matrix(embeddings, "embeddings (K, D)")
    if metric not in ("cosine", "euclidean"):
        raise ValueError(f"metric must be 'cosine' or 'euclidean', got {metric!r}.")
    _check_method(
        method, (*_METHODS, "ward") if metric == "euclidean" else _METHODS, f"{metric} distances"
    )
    if metric == "cosine" and not vectors.any(1).all():
        raise ValueError(
            f"the embedding of class {int(np.argmin(vectors.any(1)))} is zero, so it has no cosine."
        )
    if len(vectors) == 1:
        return np.empty((0, 4))
    return linkage(np.maximum(pdist(vectors, metric), 0), method)  # a cosine may be 1 + 1e-16


def class_prototypes(
    embeddings: torch.Tensor, labels: torch.Tensor, num_classes: int | None = None
) -> torch.Tensor:
    """The mean embedding of each class.

    Args:
        embeddings: (N, D), floating point.
        labels: LongTensor (N,), -1 is "unknown" and left out.
        num_classes: K; default the largest label + 1.

    Returns:
        Tensor (K, D) of the embeddings' dtype.

    Raises:
        ValueError: if the shapes do not fit, a label is out of range, or a class has no sample.

    Example:
        >>> class_prototypes(torch.tensor([[0.], [2.], [5.]]), torch.tensor([0, 0, 1])).tolist()
        [[1.0], [5.0]]
    """
    if embeddings.ndim != 2 or labels.shape != embeddings.shape[:1]:
        raise ValueError(
            f"embeddings must have shape (N, D) and labels (N,), got {tuple(embeddings.shape)} and "
            f"{tuple(labels.shape)}."
        )
    known = labels >= 0
    count = int(labels.max()) + 1 if num_classes is None and len(labels) else num_classes or 0
    if len(labels) and not -1 <= int(labels.min()) <= int(labels.max()) < count:
        raise ValueError(
            f"labels must be 0 to {count - 1}, or -1 for unknown; got {int(labels.min())} to "
            f"{int(labels.max())}."
        )
    samples = labels[known].bincount(minlength=count)
    if not count or not samples.all():
        raise ValueError(
            "each class needs a sample; there is none of "
            f"{(samples == 0).nonzero().flatten().tolist()}."
        )
    sums = embeddings.new_zeros(count, embeddings.shape[1], dtype=torch.float64)
    sums.index_add_(0, labels[known], embeddings[known].double())
    return (sums / samples[:, None]).to(embeddings.dtype)


def cut_linkage(linkage: Any, num_classes: Sequence[int]) -> torch.Tensor:
    """The groups of classes after stopping a clustering at given numbers of groups.

    The cut counts merges, so it has exactly as many groups as asked for even where merges are
    equally near, or nearer than the ones before. (SciPy's `cut_tree` gives another number there.)

    Args:
        linkage: (K - 1, 4), from :func:`linkage_from_confusion`, :func:`linkage_from_embeddings` or
            SciPy.
        num_classes: number of groups on each level, coarsest first: increasing, from 2 to K - 1.

    Returns:
        LongTensor (K, len(num_classes)): each class's group on each level, numbered in order of
        first appearance.

    Raises:
        ValueError: if it is no linkage, or the numbers are not increasing (two levels would be the
            same) or out of range.

    Warns:
        UserWarning: if a cut falls between merges at the same distance: other groupings would be
            just as good.
    """
    import numpy as np

    merges = np.asarray(linkage, dtype=float)
    if merges.ndim != 2 or merges.shape[1] != 4:
        raise ValueError(
            f"a linkage has shape (K - 1, 4), as scipy.cluster.hierarchy.linkage returns; got "
            f"{merges.shape}."
        )
    count, wanted = len(merges) + 1, list(num_classes)
    in_range = all(isinstance(n, Integral) and 2 <= n < count for n in wanted)
    if not in_range or wanted != sorted(set(wanted)):
        raise ValueError(
            "num_classes must be increasing whole numbers, coarsest level first, each at least 2 "
            f"and less than the {count} classes themselves; got {wanted}."
        )
    groups = {i: [i] for i in range(count)}
    cuts = {}
    for step, (a, b) in enumerate(merges[:, :2].astype(int).tolist()):
        if a == b or a not in groups or b not in groups:
            raise ValueError(
                f"row {step} of the linkage merges {a} and {b}, which are not two groups at that "
                "point."
            )
        if len(groups) in wanted:
            cuts[len(groups)] = sorted(groups.values(), key=min)
            if step and np.isclose(merges[step, 2], merges[step - 1, 2], rtol=1e-9, atol=1e-12):
                warnings.warn(
                    f"the cut into {len(groups)} classes falls between merges at the same distance "
                    f"({merges[step, 2]:.4g}): what it groups there is arbitrary",
                    stacklevel=2,
                )
        groups[count + step] = groups.pop(a) + groups.pop(b)
    result = torch.empty(count, len(wanted), dtype=torch.long, device="cpu")
    for column, n in enumerate(wanted):
        for index, members in enumerate(cuts[n]):
            result[members, column] = index
    return result


def linkage_paths(
    linkage: Any, classes: Sequence[str], num_classes: Sequence[int]
) -> list[NodePath]:
    """The leaves of the tree that :func:`cut_linkage` makes, groups called by their members."""
    cuts = cut_linkage(linkage, num_classes)
    if len(classes) != len(cuts) or len(set(classes)) < len(classes):
        raise ValueError(
            f"classes must be {len(cuts)} different names, one per class; got {len(classes)}, "
            f"{len(set(classes))} of them different: {list(classes)[:10]}."
        )
    columns = []
    for column in cuts.T.tolist():
        members: dict[int, list[str]] = {}
        for name, group in zip(classes, column, strict=True):
            members.setdefault(group, []).append(name)
        names: dict[str, None] = {}
        for group_members in members.values():  # in order of their numbers
            name = _group_name(group_members)
            while name in names:  # {'a', 'b'} beside {'a+b'}
                name += "'"
            names[name] = None
        columns.append([list(names)[group] for group in column])
    return list(zip(*columns, classes, strict=True))


def _group_name(members: Sequence[str]) -> str:
    """'cat+dog', or 'cat+dog+7 more' where all names would be too long."""
    name = "+".join(members)
    kept = len(members)
    while len(name) > _NAME_WIDTH and kept > 1:
        kept -= 1
        name = f"{'+'.join(members[:kept])}+{len(members) - kept} more"
    return name


def _as_matrix(data: Any, what: str) -> np.ndarray:
    import numpy as np

    matrix = np.asarray(
        data.detach().cpu().double() if isinstance(data, torch.Tensor) else data, dtype=float
    )
    if matrix.ndim != 2 or not matrix.size:
        raise ValueError(f"{what} has two dimensions and is not empty, got shape {matrix.shape}.")
    if not np.isfinite(matrix).all():
        raise ValueError(
            f"{what} must be finite; row {int(np.argmin(np.isfinite(matrix).all(1)))} is not."
        )
    return matrix


def _check_method(method: str, legal: Sequence[str], what: str) -> None:
    if method not in legal:
        raise ValueError(f"method must be one of {', '.join(legal)} for {what}, got {method!r}.")
