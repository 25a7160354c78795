"""`evaluate`: a task's evaluator over a loader, exactly; and a trial of it before a training."""

import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from timm.task import evaluation_sample_limit

from timm_branches.data import HierarchicalDataset, label_names
from timm_branches.data.bad_images import TolerantDataset
from timm_branches.data.images import one_of_each_size
from timm_branches.model import BranchModel
from timm_branches.task import HeadsTask, base_model
from timm_branches.train.checks import BadOutputs
from timm_branches.train.process import is_distributed

_logger = logging.getLogger(__name__)

__all__ = ["evaluate", "images_to", "note_raw_inputs", "targets_to", "try_evaluation"]


@torch.no_grad()
def evaluate(
    task: HeadsTask,
    loader: Iterable,
    ema: bool = False,
    amp: Any = nullcontext,
    own_transform: bool = True,
    each_batch: Callable[[], None] | None = None,
    also: Sequence[Any] = (),
    **options: Any,
) -> Any:
    """Run a task's evaluator over a loader of (images, labels (N, L)), exactly, over all processes.

    Args:
        task: The task.
        loader: Batches, as for :func:`fit`.
        ema: Evaluate the moving average of the weights.
        amp: Makes the context of the forward pass.
        own_transform: Give a data set of images that has no transform the model's own, as
            :func:`timm_branches.inference.model_transform` makes it; a model that was trained on
            normalised images would else be shown others.
        each_batch: Called before each batch; what it raises ends the evaluation.
        also: Whatever else looks at outputs and labels in the same pass, by its `update`.
        **options: What the evaluator takes, such as `decoder`.

    Raises:
        ValueError: The data set's labels mean other classes than the model's.

    Returns:
        The evaluator; `compute()` has been called with the processes joined, see
        `evaluator.metrics`.
    """
    model: Any = task.get_eval_model(ema=ema)
    was_training = model.training
    model.eval()
    evaluator = task.create_evaluator(max_samples=evaluation_sample_limit(loader), **options)
    translate = task.match_labels(label_names(loader))
    if own_transform:
        _use_own_transform(loader, base_model(task))
    bad = BadOutputs()
    for images, labels in loader:
        if each_batch is not None:
            each_batch()
        with amp():
            output = task.answer(model, images_to(images, task.device, None))
        if translate is not None:
            labels = translate(labels)
        task.check_targets(labels, loader)
        bad.update(output)
        labels = targets_to(labels, task.device)
        for each in (evaluator, *also):
            each.update(output, labels)
    model.train(was_training)
    bad.warn()
    evaluator.metrics = evaluator.compute(distributed=is_distributed())
    return evaluator


def _without_transform(loader: Any) -> list[Any]:
    """Our data sets below a loader that have no transform."""
    found = []
    waiting = [getattr(loader, "dataset", None)]
    while waiting:
        data = waiting.pop()
        if isinstance(data, HierarchicalDataset) and data.transform is None:
            found.append(data)
        inner = getattr(data, "datasets", None) or [getattr(data, "dataset", None)]
        waiting += [part for part in inner if part is not None]
    return found


def _use_own_transform(loader: Any, model: BranchModel) -> None:
    """Give data sets without a transform the model's own, unless it was trained without one."""
    from timm_branches.inference import model_transform

    if model.pretrained_cfg.get("raw_inputs"):
        return
    for data in _without_transform(loader):
        data.transform = model_transform(model)
        _logger.info("The data set has no transform: the model's own is used: %s", data.transform)


def note_raw_inputs(loader: Any, model: BranchModel) -> None:
    """Keep with a model that it was trained on images in [0, 1] as they are."""
    if _without_transform(loader):
        zeros, ones = (0.0,) * model.in_chans, (1.0,) * model.in_chans
        model.pretrained_cfg.update(mean=zeros, std=ones, crop_pct=1.0, raw_inputs=True)


@torch.no_grad()
def try_evaluation(task: HeadsTask, loader: Any, amp: Any = nullcontext) -> None:
    """Evaluate one image of each size, before anything is trained; `fit` does it by itself.

    What a model cannot answer for (an odd size for a ViT) would otherwise show after an epoch, or
    after all of them. Nothing is changed by it: neither weights nor statistics nor the state of
    random numbers.

    Args:
        task: The task.
        loader: A DataLoader of evaluation data; anything else, and None, is passed over.
        amp: Makes the context of the forward pass.

    Raises:
        ValueError: The model cannot take an image.
    """
    data = getattr(loader, "dataset", None)
    collate = getattr(loader, "collate_fn", None)
    if data is None or collate is None or not hasattr(data, "__getitem__"):
        return
    translate = task.match_labels(label_names(loader))
    state = torch.get_rng_state()
    model: Any = task.get_eval_model()
    was_training = model.training
    model.eval()
    evaluator = task.create_evaluator()
    for index in one_of_each_size(data):
        batch = collate([data[index]])
        if isinstance(data, TolerantDataset):
            batch, _ = batch
            if batch is None:
                continue
        images, labels = batch
        if translate is not None:
            labels = translate(labels)
        with amp():
            output = task.answer(model, images_to(images, task.device, None))
        evaluator.update(output, targets_to(labels, task.device))
    model.train(was_training)
    torch.set_rng_state(state)


def images_to(images: Any, device: torch.device, memory_format: Any) -> Any:
    """Images, or clips beside their lengths, which the host reads, on a device."""
    if isinstance(images, tuple):
        clips, lengths = images
        return images_to(clips, device, memory_format), lengths
    if memory_format is not None and images.ndim < 4:
        raise ValueError(
            f"--channels-last has no effect on features of shape {tuple(images.shape)}: leave it "
            "out."
        )
    if memory_format is None or images.ndim != 4:
        return images.to(device, non_blocking=True)
    return images.to(device, non_blocking=True, memory_format=memory_format)


def targets_to(targets: Any, device: torch.device) -> Any:
    """Targets, or a dict of them, on a device."""
    if isinstance(targets, dict):
        return {name: targets_to(target, device) for name, target in targets.items()}
    return targets.to(device, non_blocking=True)
