"""Losses of dense outputs: a class for each pixel (segmentation), or a value (restoration).

All are functions of logits or images (B, C, H, W), computed in float32 at least, and scalars that
are 0 with zero gradients, never NaN, where no pixel is labelled.
"""

import inspect
import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from timm_branches.hierarchy.losses import at_least_float32, level_cross_entropy

__all__ = [
    "boundary_loss",
    "charbonnier_loss",
    "dice_loss",
    "focal_loss",
    "get_dense_loss",
    "lovasz_loss",
    "median_frequency_weights",
    "ohem_loss",
    "pixel_cross_entropy",
]


def pixel_cross_entropy(
    logits: torch.Tensor,
    target: torch.Tensor,
    ignore_index: int = -1,
    class_weights: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
    share: bool = False,
) -> torch.Tensor:
    """Cross-entropy of each labelled pixel, averaged over them.

    torch's own is NaN where no pixel is labelled.

    One channel is a binary mask: its logit z counts as the logits (0, z) of background and
    foreground, which makes this the binary cross-entropy.

    Args:
        logits: (B, K, H, W).
        target: (B, H, W) class indices, for one channel 0 and 1.
        ignore_index: The value of pixels that do not count, such as 255 or 11 in some data sets; -1
            never does.
        class_weights: (K,) from 0 upwards, two for a binary mask; the mean is torch's weighted
            mean.
        label_smoothing: As torch's.
        share: Average over the labelled pixels of all processes, so that DDP's mean over processes
            is the mean over the global batch.

    Returns:
        A scalar.

    Raises:
        ValueError: Shapes do not fit, or, on the CPU (elsewhere the check would wait for the
            device), a value of the mask is neither a class nor ignored.

    Example:
        >>> logits = torch.tensor([[[[0., 9.]], [[0., 1.]]]])  # two classes, 1x2 pixels
        >>> mask = torch.tensor([[[1, 255]]])
        >>> round(float(pixel_cross_entropy(logits, mask, ignore_index=255)), 4)
        0.6931
    """
    labels = _labels(logits, target, ignore_index)
    if logits.shape[1] == 1:
        logits = torch.cat([torch.zeros_like(logits), logits], 1)
    rows = logits.movedim(1, -1).flatten(0, -2)
    return level_cross_entropy(rows, labels.flatten(), label_smoothing, class_weights, share)


def dice_loss(
    logits: torch.Tensor, target: torch.Tensor, ignore_index: int = -1, smooth: float = 1.0
) -> torch.Tensor:
    """Soft Dice loss: one minus the mean over classes of the overlap of probabilities and labels.

    L = 1 - mean over classes k of (2 sum p_k g_k + smooth) / (sum p_k + sum g_k + smooth), where p
    is the softmax, g is 1 at labelled pixels of class k and 0 at others, and sums run over all
    labelled pixels of the batch. One channel
    is a binary mask: p is its sigmoid, and the foreground the only class.

    A class that no pixel of the batch is labelled with is left out of the mean: it has no overlap
    to gain, and pixels that it is wrongly given are missing at the classes that they belong to. A
    binary mask has no such other class: of a batch without foreground the loss is 1 - smooth / (sum
    p + smooth), which pushes the foreground down.

    Sums are over this process's batch: under DDP the mean over processes is not the Dice loss of
    the global batch.

    Sources: Milletari et al., "V-Net", 3DV 2016 (arXiv 1606.04797), section 3, who square the terms
    of the denominator; without squares, and for classes, Sudre et al., "Generalised Dice overlap as
    a deep learning loss function for highly unbalanced segmentations", DLMIA 2017 (arXiv
    1707.03237), DL_2, here without class weights.

    Args:
        logits: (B, K, H, W).
        target: (B, H, W) class indices, for one channel 0 and 1.
        ignore_index: The value of pixels that do not count; -1 never does.
        smooth: Added to numerator and denominator, in pixels; from 0 upwards.

    Returns:
        A scalar in [0, 1].

    Raises:
        ValueError: As :func:`pixel_cross_entropy`, or if `smooth` is negative.

    Example:
        >>> logits = torch.tensor([[[[9., 0.]], [[0., 9.]]]]) * 9
        >>> float(dice_loss(logits, torch.tensor([[[0, 1]]])))
        0.0
    """
    if not 0 <= smooth < float("inf"):
        raise ValueError(f"smooth must be a finite number of pixels from 0 upwards, got {smooth}.")
    labels = _labels(logits, target, ignore_index)[:, None]
    known = labels >= 0
    # autocast would run sums and products of half precision inputs as they come
    logits = torch.where(known, at_least_float32(logits), 0)
    binary = logits.shape[1] == 1
    p = (logits.sigmoid() if binary else logits.softmax(1)) * known
    classes = (
        torch.arange(1, 2, device=p.device) if binary else torch.arange(p.shape[1], device=p.device)
    )
    g = (labels == classes.view(1, -1, 1, 1)).to(p.dtype)
    overlap, mass, size = (x.sum((0, 2, 3)) for x in (p * g, p, g))
    bottom = mass + size + smooth
    score = torch.where(bottom > 0, (2 * overlap + smooth) / torch.where(bottom > 0, bottom, 1), 1)
    counts = torch.ones_like(size) if binary else (size > 0).to(p.dtype)
    return ((1 - score) * counts).sum() / counts.sum().clamp(min=1)


def focal_loss(
    logits: torch.Tensor,
    target: torch.Tensor,
    ignore_index: int = -1,
    gamma: float = 2.0,
    class_weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Cross-entropy that counts less where the network is right already, averaged over pixels.

    L = mean over labelled pixels of (1 - p)^gamma * w * -log p, with p the probability of the
    pixel's class and w the class's weight.

    Source: Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017 (arXiv 1708.02002),
    equation (5), here of a softmax; one channel is a binary mask, as in
    :func:`pixel_cross_entropy`.

    Args:
        logits: (B, K, H, W).
        target: (B, H, W) class indices, for one channel 0 and 1.
        ignore_index: The value of pixels that do not count; -1 never does.
        gamma: How much less what is right counts; 0 is the cross-entropy.
        class_weights: (K,) from 0 upwards, two for a binary mask: the source's alpha.

    Returns:
        A scalar.

    Raises:
        ValueError: As :func:`pixel_cross_entropy`, or if `gamma` is negative.

    Example:
        >>> logits, mask = torch.zeros(1, 2, 1, 1), torch.tensor([[[1]]])
        >>> round(float(focal_loss(logits, mask)), 4)            # 0.5^2 * ln 2
        0.1733
    """
    if not 0 <= gamma < float("inf"):
        raise ValueError(f"gamma must be a finite number from 0 upwards, got {gamma}.")
    loss, labels = _pixel_losses(logits, target, ignore_index)
    weight = (-torch.expm1(-loss)) ** gamma  # (1 - p)^gamma
    if class_weights is not None:
        weight = weight * class_weights.to(loss)[labels.clamp(min=0)]
    return (weight * loss).sum() / (labels >= 0).sum().clamp(min=1)


def ohem_loss(
    logits: torch.Tensor,
    target: torch.Tensor,
    ignore_index: int = -1,
    threshold: float = 0.7,
    min_kept: float = 0.0625,
) -> torch.Tensor:
    """Cross-entropy of the hard pixels alone: online hard example mining.

    The mean over pixels whose class has a probability below the threshold, and in any case over
    that share of the labelled pixels whose loss is largest.

    Source: Shrivastava et al., "Training Region-based Object Detectors with Online Hard Example
    Mining", CVPR 2016 (arXiv 1604.03540); for pixels with a threshold as in segmentation since Wu
    et al. 2016 (arXiv 1605.06885), section 3.3.

    Args:
        logits: (B, K, H, W).
        target: (B, H, W) class indices, for one channel 0 and 1.
        ignore_index: The value of pixels that do not count; -1 never does.
        threshold: Probability from which on a pixel is easy, in (0, 1].
        min_kept: Share of the batch's labelled pixels that count at least, in (0, 1].

    Returns:
        A scalar.

    Raises:
        ValueError: As :func:`pixel_cross_entropy`, or a number outside its range.

    Example:
        >>> logits = torch.tensor([[[[9., 0.]], [[0., 0.]]]])  # sure of one pixel, not of the other
        >>> round(float(ohem_loss(logits, torch.tensor([[[0, 0]]]))), 4)
        0.6931
    """
    for name, value in (("threshold", threshold), ("min_kept", min_kept)):
        if not 0 < value <= 1:
            raise ValueError(f"{name} must be in (0, 1], got {value}.")
    loss, labels = _pixel_losses(logits, target, ignore_index)
    loss, known = loss.flatten(), (labels >= 0).flatten()
    # unlabelled pixels come last; nothing is asked of the device
    order = torch.where(known, loss.detach(), -1).argsort(descending=True)
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    least = (known.sum() * min_kept).ceil()
    kept = known & ((loss.detach() > -math.log(threshold)) | (rank < least))
    return torch.where(kept, loss, 0).sum() / kept.sum().clamp(min=1)


def lovasz_loss(logits: torch.Tensor, target: torch.Tensor, ignore_index: int = -1) -> torch.Tensor:
    """A surrogate of one minus the mean IoU: the Lovász-softmax loss.

    For each class that occurs in the batch the pixels are sorted by their error `abs(g - p)`, which
    is weighed by what the Jaccard index loses if all pixels up to there are wrong; the mean over
    these classes. One channel is a binary mask: p is its sigmoid, and the foreground the only
    class.

    Source: Berman et al., "The Lovász-Softmax loss: A tractable surrogate for the optimization of
    the intersection-over-union measure in neural networks", CVPR 2018 (arXiv 1705.08790), equations
    (8) and (11).

    Sums are over this process's batch, as in :func:`dice_loss`.

    Args:
        logits: (B, K, H, W).
        target: (B, H, W) class indices, for one channel 0 and 1.
        ignore_index: The value of pixels that do not count; -1 never does.

    Returns:
        A scalar in [0, 1].

    Raises:
        ValueError: As :func:`pixel_cross_entropy`.

    Example:
        >>> logits = torch.tensor([[[[9., 0.]], [[0., 9.]]]]) * 9
        >>> round(float(lovasz_loss(logits, torch.tensor([[[0, 1]]]))), 4)
        0.0
    """
    labels = _labels(logits, target, ignore_index)
    known = (labels >= 0)[:, None]
    logits = torch.where(known, at_least_float32(logits), 0)
    binary = logits.shape[1] == 1
    p = logits.sigmoid() if binary else logits.softmax(1)
    classes = torch.arange(p.shape[1], device=p.device) + int(binary)
    g = (labels[:, None] == classes.view(1, -1, 1, 1)).to(p.dtype)
    # a pixel without a label has no error, and comes last without a weight
    errors = torch.where(known, (g - p).abs(), 0).transpose(0, 1).flatten(1)  # (classes, pixels)
    errors, order = errors.sort(1, descending=True)
    truth = g.transpose(0, 1).flatten(1).gather(1, order)
    counted = known.expand_as(g).transpose(0, 1).flatten(1).gather(1, order).to(p.dtype)
    size = truth.sum(1, keepdim=True)
    intersection = size - truth.cumsum(1)
    union = size + (counted - truth).cumsum(1)
    jaccard = 1 - intersection / union.clamp(min=1)
    steps = torch.cat([jaccard[:, :1], jaccard[:, 1:] - jaccard[:, :-1]], 1) * counted
    losses = (errors * steps).sum(1)
    present = (size[:, 0] > 0).to(p.dtype)
    if binary:
        present = torch.ones_like(present)
    return (losses * present).sum() / present.sum().clamp(min=1)


def boundary_loss(
    logits: torch.Tensor, target: torch.Tensor, ignore_index: int = -1
) -> torch.Tensor:
    """Probability weighed by how far outside of its class it is given: the boundary loss.

    The mean over labelled pixels and classes of p * d, d the signed distance to the class's border
    in the mask, below 0 inside, in parts of the image's diagonal (the source's are pixels). A class
    that an image does not have counts nothing there. It goes with another loss, as in
    'ce+boundary': alone it says nothing of an image that is all of one class.

    Source: Kervadec et al., "Boundary loss for highly unbalanced segmentation", MIDL 2019 (arXiv
    1812.07032), equation (5).

    Args:
        logits: (B, K, H, W).
        target: (B, H, W) class indices, for one channel 0 and 1. Distances are computed on the CPU.
        ignore_index: The value of pixels that do not count; -1 never does.

    Returns:
        A scalar in [-1, 1].

    Raises:
        ValueError: As :func:`pixel_cross_entropy`.
        ImportError: scipy is not installed.

    Example:
        >>> logits = torch.tensor([[[[9., 0.]], [[0., 9.]]]])
        >>> mask = torch.tensor([[[0, 1]]])
        >>> bool(boundary_loss(logits, mask) < boundary_loss(-logits, mask))
        True
    """
    labels = _labels(logits, target, ignore_index)
    known = (labels >= 0)[:, None]
    logits = torch.where(known, at_least_float32(logits), 0)
    binary = logits.shape[1] == 1
    p = logits.sigmoid() if binary else logits.softmax(1)
    distances = _signed_distances(labels, range(1, 2) if binary else range(p.shape[1]))
    total = (p * distances.to(p) * known).sum()
    return total / (known.sum() * p.shape[1]).clamp(min=1)


def _signed_distances(labels: torch.Tensor, classes: Iterable[int]) -> torch.Tensor:
    """(B, classes, H, W): to the border of each class, below 0 inside, over the diagonal."""
    from scipy.ndimage import distance_transform_edt

    diagonal = math.hypot(*labels.shape[1:])
    images = []
    for image in labels.cpu().numpy():
        maps = []
        for number in classes:
            inside = image == number
            distance = np.zeros(inside.shape)
            if inside.any() and not inside.all():
                distance = distance_transform_edt(~inside) - distance_transform_edt(inside)
            maps.append(torch.from_numpy(distance / diagonal))
        images.append(torch.stack(maps))
    return torch.stack(images)


def _pixel_losses(
    logits: torch.Tensor, target: torch.Tensor, ignore_index: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The cross-entropy of each pixel (B, H, W), 0 where it has no label, and the labels."""
    labels = _labels(logits, target, ignore_index)
    logits = torch.where((labels >= 0)[:, None], at_least_float32(logits), 0)
    if logits.shape[1] == 1:
        logits = torch.cat([torch.zeros_like(logits), logits], 1)
    return F.cross_entropy(logits, labels, ignore_index=-1, reduction="none"), labels


def charbonnier_loss(output: torch.Tensor, target: torch.Tensor, eps: float = 1e-3) -> torch.Tensor:
    """Charbonnier loss, an L1 loss that is smooth at 0.

    The mean of sqrt((output - target)^2 + eps^2).

    Source: Lai et al., "Deep Laplacian Pyramid Networks for Fast and Accurate Super-Resolution",
    CVPR 2017 (arXiv 1704.03915), equation (2), whose eps is the default; they sum over pixels, here
    it is their mean.

    Args:
        output: (B, C, H, W).
        target: The same shape.
        eps: Where the square turns into the straight line, on the images' scale; above 0, or there
            is no gradient at 0.

    Returns:
        A scalar; `eps` where output and target are equal.

    Raises:
        ValueError: Shapes differ, or `eps` is not above 0.

    Example:
        >>> charbonnier_loss(torch.zeros(1, 1, 2, 2), torch.full((1, 1, 2, 2), 3.), eps=4.)
        tensor(5.)
    """
    if not 0 < eps < float("inf"):
        raise ValueError(f"eps must be above 0, got {eps}; without it, it is torch's l1_loss.")
    return _compare(lambda a, b: ((a - b).square() + eps * eps).sqrt().mean(), output, target)


def _compare(
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    output: torch.Tensor,
    target: torch.Tensor,
) -> torch.Tensor:
    """A loss of two images.

    Torch would broadcast a grey one against a coloured one with a mere warning.
    """
    if output.shape != target.shape:
        raise ValueError(
            f"output {tuple(output.shape)} and target {tuple(target.shape)} must have one shape."
        )
    return loss(at_least_float32(output), at_least_float32(target))


_MASK_LOSSES: dict[str, Callable[..., torch.Tensor]] = {
    "ce": pixel_cross_entropy,
    "dice": dice_loss,
    "focal": focal_loss,
    "ohem": ohem_loss,
    "lovasz": lovasz_loss,
    "boundary": boundary_loss,
}
_IMAGE_LOSSES: dict[str, Callable[..., torch.Tensor]] = {
    "l1": partial(_compare, F.l1_loss),
    "l2": partial(_compare, F.mse_loss),
    "charbonnier": charbonnier_loss,
}


def get_dense_loss(name: str, **settings: Any) -> Callable[..., torch.Tensor]:
    """A dense loss by name.

    Args:
        name: 'ce', 'dice', 'focal', 'ohem', 'lovasz' or 'boundary' for segmentation; 'l1', 'l2'
            (the mean square) or 'charbonnier' for restoration; or the sum of several, such as
            'ce+dice'.
        **settings: What the loss takes: `ignore_index`, `class_weights`, `label_smoothing`,
            `smooth`, `gamma`, `threshold`, `min_kept`, `eps`. Those of a sum go to all parts that
            take them.

    Returns:
        A function of (output, target), and of `share=True` for cross-entropy under DDP, which gives
        a scalar.

    Raises:
        ValueError: There is no such loss, or it has no such setting, or parts of a sum do not go
            together.

    Example:
        >>> loss = get_dense_loss('ce+dice', ignore_index=255)
        >>> float(loss(torch.randn(1, 3, 4, 4), torch.full((1, 4, 4), 255)))
        0.0
    """
    known = {**_MASK_LOSSES, **_IMAGE_LOSSES}
    names = str(name).split("+")
    of_masks = [part in _MASK_LOSSES for part in names]
    if not all(part in known for part in names) or len(set(names)) < len(names):
        raise ValueError(
            f"no dense loss {name!r}: choose one of {', '.join(known)}, or a sum of different "
            "ones, such as 'ce+dice'."
        )
    if len(set(of_masks)) > 1:
        raise ValueError(f"the dense loss {name!r} adds one of masks to one of images.")
    parts = []
    for function in map(known.__getitem__, names):
        options = set(inspect.signature(function).parameters) - {"logits", "output", "target"}
        parts.append(
            (
                function,
                "share" in options,
                {key: settings[key] for key in settings if key in options - {"share"}},
            )
        )
    taken = set().union(*(takes for _, _, takes in parts))
    unused = [key for key in settings if key not in taken]
    if unused:
        raise ValueError(f"the dense loss {name!r} has no setting {', '.join(map(repr, unused))}.")

    def loss(output: torch.Tensor, target: torch.Tensor, share: bool = False) -> torch.Tensor:
        values = []
        for function, shares, takes in parts:
            given = {**takes, "share": share} if shares else takes
            values.append(function(output, target, **given))
        return torch.stack(values).sum()

    return loss


def median_frequency_weights(masks: Iterable[torch.Tensor], num_classes: int) -> torch.Tensor:
    """Weights of classes for cross-entropy that let rare ones count: median frequency balancing.

    The weight of class k is median(f) / f_k. The frequency f_k is the number of its pixels divided
    by that of all labelled pixels in the masks where it occurs. A class that occurs nowhere has
    weight 0.

    Source: Eigen and Fergus, "Predicting Depth, Surface Normals and Semantic Labels with a Common
    Multi-Scale Convolutional Architecture", ICCV 2015 (arXiv 1411.4734), section 4.3.2.

    Args:
        masks: Class indices (H, W), below 0 for unlabelled pixels.
        num_classes: How many classes there are.

    Returns:
        (num_classes,), float32.

    Example:
        >>> masks = [torch.tensor([[0, 0, 0, 1]])]  # shares 3/4, 1/4, never; the median is 1/4
        >>> median_frequency_weights(masks, 3).tolist()
        [0.3333333432674408, 1.0, 0.0]
    """
    counts, seen = torch.zeros(num_classes), torch.zeros(num_classes)
    for mask in masks:
        found = torch.bincount(mask[mask >= 0], minlength=num_classes)
        counts += found
        seen += (found > 0) * found.sum()
    frequency = counts / seen  # 0 / 0 is nan
    return (frequency.nanmedian() / frequency).nan_to_num(0)


def _labels(logits: torch.Tensor, target: torch.Tensor, ignore_index: int) -> torch.Tensor:
    """Labels (B, H, W) whose ignored pixels are -1."""
    if logits.ndim != 4 or target.shape != (len(logits), *logits.shape[2:]):
        raise ValueError(
            f"logits must be (B, K, H, W) and the mask (B, H, W), got {tuple(logits.shape)} and "
            f"{tuple(target.shape)}."
        )
    if target.is_floating_point():
        raise ValueError(f"the mask must hold class indices (integers), got {target.dtype}.")
    classes = max(2, logits.shape[1])
    if 0 <= ignore_index < classes:
        raise ValueError(f"ignore_index={ignore_index} is one of the {classes} classes.")
    labels = target.long()
    labels = torch.where(labels == ignore_index, -1, labels)
    if labels.device.type == "cpu" and labels.numel():
        low, high = (int(value) for value in labels.aminmax())
        if high >= classes or low < -1:
            raise ValueError(
                f"the mask holds {high if high >= classes else low}: neither one of the {classes} "
                f"classes from 0 on, nor -1, nor ignore_index={ignore_index}."
            )
    return labels
