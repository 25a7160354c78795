"""Losses of decoders: masks of classes, and restored images."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from timm_branches.dense.losses import get_dense_loss
from timm_branches.model import BranchModel
from timm_branches.task.base import HeadsTask, Schedule

__all__ = ["DenseTask"]


class DenseTask(HeadsTask):
    """One decoder of a branch model with a dense loss; with deep supervision, a weighted sum over its stages.

    Args:
        model: Branch model with a decoder (``head='unet'`` or ``'rednet'``).
        loss: Name of a dense loss, see :func:`get_dense_loss`, or a function of (output, target) that gives a scalar.
        evaluator: Makes the evaluator, given ``device=`` and ``max_samples=``: for masks
            ``partial(SegmentationEvaluator, classes)``, for images :class:`RestorationEvaluator`.
        head: Name of the decoder, where the model has several.
        schedule: With deep supervision the weights of its stages by epoch, from the deepest to the output itself
            (``mask_aux1``, ..., ``mask``); None weighs all equally.
        device: Where the task lives; None leaves the model where it is.
        verbose: As in timm.
        **settings: Of the named loss: ``ignore_index``, ``class_weights``, ...

    Raises:
        ValueError: There is no such decoder or more than one, the loss or a setting is unknown, or a schedule is given
            without deep supervision or for another number of stages.

    Example:
        >>> from functools import partial
        >>> from timm_branches import create_branch_model
        >>> from timm_branches.dense import SegmentationEvaluator
        >>> model = create_branch_model('test_resnet', taps=[2, 3, 4, 5], head='unet', num_classes=3)
        >>> task = DenseTask(model, 'ce+dice', partial(SegmentationEvaluator, 3), ignore_index=255)
        >>> task(torch.randn(2, 3, 64, 64), torch.randint(3, (2, 64, 64)))['loss'].backward()
    """

    heads_can_be_off = False

    def __init__(self, model: BranchModel, loss: str | Callable[..., torch.Tensor], evaluator: Callable[..., Any],
                 head: str | None = None, schedule: Schedule = None, device: torch.device | None = None,
                 verbose: bool = True, **settings: Any):
        decoders = [name for name, spec in zip(model.names, model.head_specs, strict=True) if spec.dense]
        if head is None and len(decoders) == 1:
            head = decoders[0]
        if head not in decoders:
            raise ValueError(f"head={head!r}: name one of the model's decoders, {decoders} among {list(model.names)}.")
        stages = [f"{head}_{key}" for key in getattr(model.head(head), "aux", {})]
        if schedule is not None and not stages:
            raise ValueError("schedule= weighs the stages of a decoder with deep_supervision=True; this one has one "
                             "loss.")
        super().__init__(model, [*stages, head], schedule, device, verbose=verbose)
        if isinstance(loss, str):
            loss = get_dense_loss(loss, **settings)
            self.shares = True
        elif settings:
            raise ValueError(f"{', '.join(settings)}: settings belong to a loss that is given by name.")
        else:
            self.shares = False
        self.head, self.loss, self.evaluator = head, loss, evaluator

    def needed_heads(self) -> tuple[str, ...]:
        return (self.head,)

    def compare(self, output: dict[str, torch.Tensor], target: torch.Tensor, lengths: torch.Tensor | None = None,
                share: bool = False) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss of the output, and in training those of the decoder's other stages.

        Args:
            output: Maps (B, K, H, W) of the decoder.
            target: Masks (B, H, W) of class indices, or images (B, C, H, W).
            lengths: Refused: decoders answer for images.
            share: Average over the pixels of all processes, where the loss can.
        """
        if lengths is not None:
            raise ValueError("a DenseTask trains on images, got clips with lengths.")
        shared = {"share": share} if self.shares else {}
        names = [name for name in self.active if name in output]  # in evaluation there is the output alone
        losses = {name: self.loss(output[name], target, **shared) for name in names}
        weights = dict(zip(self.names, self.weights, strict=True))
        return torch.stack([weights[name] * losses[name] for name in names]).sum(), losses

    @property
    def default_metric(self) -> str:
        return self.create_evaluator().default_metric

    def create_evaluator(self, **kwargs: Any) -> Any:
        """A fresh evaluator that takes the model's whole output and the masks or images."""
        evaluator = self.evaluator(device=self.device, **kwargs)
        return _OfHead(evaluator, self.head)

    def confusions(self, evaluator: Any) -> list[tuple[str, torch.Tensor, list[str]]]:
        if not hasattr(evaluator, "confusion_matrices"):
            return []
        ious: Mapping[str, Mapping[str, float]] = evaluator.class_iou()
        return [(level, matrix, list(classes)) for (level, classes), matrix in
                zip(ious.items(), evaluator.confusion_matrices(), strict=True)]


class _OfHead:
    """An evaluator that reads one head of the model's output."""

    def __init__(self, evaluator: Any, head: str):
        self._evaluator, self._head = evaluator, head
        self.metrics: dict[str, float] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._evaluator, name)

    def update(self, output: Any, target: torch.Tensor) -> None:
        self._evaluator.update(output[self._head], target)
