"""Metrics of segmentation over a whole validation set, accumulated batch by batch.

They are exact over all processes.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from timm_branches.hierarchy import HierarchyEvaluator, sum_upwards
from timm_branches.taxonomy import Taxonomy

__all__ = ["SegmentationEvaluator"]

MAX_CLASSES = 1000  # up to here HierarchyEvaluator keeps the matrix of a level
_CHUNK = 2**17  # pixels at a time: the hierarchy's metrics take some 500 bytes for each


class SegmentationEvaluator:
    """Intersection over union and accuracy of masks.

    With a taxonomy of the classes, all metrics of the hierarchy, too.

    It has the interface of :class:`timm_branches.hierarchy.HierarchyEvaluator`.

    The IoU of a class is the number of pixels where label and answer both are it, divided by those
    where one of them is, over the whole set (not a mean over images). The mean IoU (Jaccard index)
    is over the classes that occur in labels or answers; a class in neither has no IoU, and is left
    out rather than counted as 0 or 1. (A class that does not occur in the labels but is answered
    somewhere has IoU 0, and counts.) Ignored pixels count nowhere. A metric without a pixel is nan.

    ============== ======= ======================================================================
    name           unit    what
    ============== ======= ======================================================================
    loss           nats    mean cross-entropy of the labelled pixels
    pixel_accuracy percent of the labelled pixels
    miou           percent mean IoU
    ece            percent expected calibration error of the pixels' answers, 15 bins
    {level}_miou   percent with a taxonomy, mean IoU of each level's classes, over the pixels that
                           have a label on it
    the others             with a taxonomy, of the labelled pixels what
                           :class:`HierarchyEvaluator` says of samples: {level}_top1 (pixel
                           accuracy), full_path, consistency, hp, hr, hf, distance, severity, ...
    ============== ======= ======================================================================

    Args:
        classes: The classes' names, or how many there are; the taxonomy's leaves if there is one.
            At most 1,000.
        ignore_index: The value of pixels that do not count; -1 never does.
        taxonomy: The hierarchy whose leaves the masks are labelled with. The model's output is then
            logits of every level, or logits of the leaves, whose probabilities are summed upwards.
        device: Where totals are kept.
        max_samples: Ignore the images that come after this many (padding of a distributed sampler).
        to_masks: Turns a model's output into logits (B, K, H, W), or into a list of these for each
            level. By default output is such a tensor, a dict with one, or a dict with one for each
            level's name.

    Attributes:
        metric_names: What :meth:`compute` returns, in this order.
        headline: The few of them that are worth a line each epoch.
        default_metric: What the best epoch is chosen by: `miou`, with a taxonomy that of the last
            level.

    Raises:
        ValueError: There are fewer than two classes or more than 1,000, they are not the
            taxonomy's, two have one name, or `ignore_index` is one of them.

    Example:
        >>> evaluator = SegmentationEvaluator(['sky', 'sea', 'ship'], ignore_index=255)
        >>> logits = torch.tensor([[[[9., 9., 0., 9.]], [[0., 0., 9., 0.]], [[0., 0., 0., 0.]]]])
        >>> evaluator.update(logits, torch.tensor([[[0, 0, 1, 255]]]))
        >>> metrics = evaluator.compute()
        >>> metrics['pixel_accuracy'], metrics['miou']
        (100.0, 100.0)
    """

    def __init__(
        self,
        classes: int | Sequence[str],
        ignore_index: int = -1,
        taxonomy: Taxonomy | None = None,
        device: torch.device | str | None = None,
        *,
        max_samples: int | None = None,
        to_masks: Callable[[Any], Any] | None = None,
    ) -> None:
        if isinstance(classes, int):
            classes = [str(number) for number in range(classes)]
        names = list(classes)
        if not 2 <= len(names) <= MAX_CLASSES or len(set(names)) < len(names):
            raise ValueError(
                f"a mask has 2 to {MAX_CLASSES} classes of different names, background included, "
                f"got {classes}."
            )
        if 0 <= ignore_index < len(names):
            raise ValueError(f"ignore_index={ignore_index} is one of the {len(names)} classes.")
        if taxonomy is not None and taxonomy.num_leaves != len(names):
            raise ValueError(
                f"{len(names)} classes are not the taxonomy's {taxonomy.num_leaves} leaves."
            )
        self.taxonomy, self.ignore_index, self.max_samples = taxonomy, ignore_index, max_samples
        self.num_leaves = len(names)
        self.to_masks = to_masks or self._find_masks
        self.levels = taxonomy.levels if taxonomy is not None else ("pixel",)
        self.num_classes = taxonomy.num_classes if taxonomy is not None else (len(names),)
        self.classes = taxonomy.classes if taxonomy is not None else (tuple(names),)
        # each pixel is a sample
        self.pixels = HierarchyEvaluator(
            self.levels, self.num_classes, taxonomy, device, to_levels=lambda rows: rows
        )
        self.device = self.pixels.device
        self.metrics: dict[str, float] = {}
        if taxonomy is None:
            self.metric_names: tuple[str, ...] = ("loss", "pixel_accuracy", "miou", "ece")
            self.headline: tuple[str, ...] = ("pixel_accuracy", "miou")
            self.default_metric = "miou"
        else:
            mious = tuple(f"{name}_miou" for name in self.levels)
            self.metric_names = (*self.pixels.metric_names, *mious)
            self.headline = (*mious, "full_path", "consistency")
            self.default_metric = mious[-1]
        self.reset()

    @staticmethod
    def lower_is_better(name: str) -> bool:
        """Whether a metric of this name is the better the smaller it is."""
        return name == "ece" or HierarchyEvaluator.lower_is_better(name)

    def reset(self) -> None:
        """Forget all images."""
        self.num_samples = 0
        self.pixels.reset()

    @torch.no_grad()
    def update(self, output: Any, target: torch.Tensor) -> None:
        """Take one batch.

        Args:
            output: What the model returned; `to_masks` makes logits of it. One channel is the
                logit of the second of two classes.
            target: Masks (B, H, W) of class indices.

        Raises:
            ValueError: Masks or logits have another shape or size, or masks hold other values than
                classes.
        """
        if target.ndim != 3 or target.is_floating_point():
            raise ValueError(
                f"evaluation takes masks (B, H, W) of integers, got {target.dtype} "
                f"{tuple(target.shape)}."
            )
        masks = self.to_masks(output)
        masks = [masks] if isinstance(masks, torch.Tensor) else list(masks)
        shapes = [tuple(m.shape) for m in masks]
        wanted = []
        for channels in self._accepted():
            wanted.append([(len(target), count, *target.shape[1:]) for count in channels])
        if shapes not in wanted:
            raise ValueError(
                f"evaluation of these masks takes logits {' or '.join(map(str, wanted))}, got "
                f"{shapes}."
            )
        keep = (
            len(target) if self.max_samples is None else max(0, self.max_samples - self.num_samples)
        )
        target = target[:keep].to(self.device).long()
        self.num_samples += len(target)
        known = (target != self.ignore_index) & (target != -1)
        labels = target[known]
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < self.num_leaves:
            raise ValueError(
                f"masks hold values from {int(labels.min())} to {int(labels.max())}, which are not "
                f"all classes from 0 to {self.num_leaves - 1}; ignore_index is {self.ignore_index}."
            )
        rows = [m[:keep].to(self.device).movedim(1, -1)[known] for m in masks]
        for first in range(0, len(labels), _CHUNK):
            part = slice(first, first + _CHUNK)
            self.pixels.update(*self._levels([row[part] for row in rows], labels[part]))

    def _accepted(self) -> list[list[int]]:
        """Channels of the outputs that :meth:`update` takes."""
        accepted = [[self.num_leaves]]
        if self.num_leaves == 2:
            accepted.append([1])
        if self.taxonomy is not None and list(self.num_classes) not in accepted:
            accepted.append(list(self.num_classes))
        return accepted

    def _levels(
        self, rows: list[torch.Tensor], labels: torch.Tensor
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Logits and labels of every level, of pixels (N,)."""
        if rows[0].shape[1] == 1 and len(rows) == 1:
            rows = [F.pad(rows[0], (1, 0))]  # the first class has logit 0
        if self.taxonomy is None:
            return rows, labels[:, None]
        if [row.shape[1] for row in rows] != list(self.num_classes):
            rows = sum_upwards(rows[0], self.taxonomy)
        return rows, self.taxonomy.expand(labels)

    def _find_masks(self, output: Any) -> Any:
        if not isinstance(output, Mapping):
            return output
        if self.taxonomy is not None and all(name in output for name in self.levels):
            return [output[name] for name in self.levels]
        if len(output) != 1:
            raise ValueError(
                f"which of the outputs {list(output)} is the mask? Say it with to_masks."
            )
        return next(iter(output.values()))

    def compute(self, distributed: bool = False) -> OrderedDict[str, float]:
        """All metrics, by name.

        Args:
            distributed: Join the counts of all processes. This process's own stay, so that it may
                go on counting.
        """
        found = dict(self.pixels.compute(distributed))
        found |= (
            {"pixel_accuracy": found["pixel_top1"], "ece": found["pixel_ece"]}
            if self.taxonomy is None
            else {}
        )
        # confusion_matrices() stays with the joined counts until the next update
        matrices = self.confusion_matrices(joined=distributed)
        for level, matrix in zip(self.levels, matrices, strict=True):
            found[f"{level}_miou"] = 100 * float(_intersection_over_union(matrix).nanmean())
        if self.taxonomy is None:
            found["miou"] = found["pixel_miou"]
        return OrderedDict((name, found[name]) for name in self.metric_names)

    def summary(self) -> OrderedDict[str, float]:
        """Metrics of this process so far, as timm's training loop shows them while it runs."""
        return self.compute()

    def confusion_matrices(self, joined: bool = True) -> list[torch.Tensor]:
        """Per level counts of pixels (K, K), rows are labels and columns answers.

        Of all processes once joined, unless `joined` is false.
        """
        matrices = self.pixels.confusion_matrices(joined)
        return [m for m in matrices if m is not None]  # there are no more than MAX_CLASSES classes

    def class_iou(self) -> dict[str, dict[str, float]]:
        """The IoU of every class in percent, by level (without a taxonomy 'pixel') and name.

        Nan where it has none.
        """
        return {
            level: dict(zip(names, (100 * _intersection_over_union(matrix)).tolist(), strict=True))
            for level, names, matrix in zip(
                self.levels, self.classes, self.confusion_matrices(), strict=True
            )
        }


def _intersection_over_union(matrix: torch.Tensor) -> torch.Tensor:
    """Of every class (K,), as fractions, from a confusion matrix (K, K)."""
    right = matrix.diagonal()
    return right.double() / (matrix.sum(0) + matrix.sum(1) - right)  # 0 / 0 is nan
