"""Losses of decoders: masks of classes, and restored images."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from timm_branches.arguments import check_number, shown
from timm_branches.dense.losses import get_dense_loss
from timm_branches.model import BranchModel, answers_all_levels
from timm_branches.task.base import HeadsTask, Schedule, base_model, name_of_function
from timm_branches.taxonomy import Taxonomy
from timm_branches.taxonomy.matching import match_classes

__all__ = ["DenseTask"]


class DenseTask(HeadsTask):
    """A decoder of a branch model with a dense loss.

    Of a hierarchy of mask classes a weighted sum over its levels.

    With deep supervision each stage of a decoder adds its loss, too.

    Args:
        model: Branch model with a decoder (`head='unet'` or `'rednet'`). If decoders give the
            levels of its taxonomy (one gives all, or each gives one), the target is a mask of
            leaves and each level has its loss.
        loss: Name of a dense loss, see :func:`get_dense_loss`, or a function of (output, target)
            that gives a scalar.
        evaluator: Makes the evaluator, given `device=` and `max_samples=`: for masks
            `partial(SegmentationEvaluator, classes)`, for images :class:`RestorationEvaluator`.
        head: Name of the decoder, where the model has several that are not the levels of its
            taxonomy.
        schedule: The losses' weights by epoch: of the levels from coarse to fine, and with deep
            supervision of the stages from the deepest to the output itself (`mask_aux1`, ...,
            `mask`); None weighs all equally.
        device: Where the task lives; None leaves the model where it is.
        verbose: As in timm.
        **settings: Of the named loss: `ignore_index`, `class_weights` (with levels a dict of
            them), ...

    Raises:
        ValueError: There is no such decoder or more than one, the loss or a setting is unknown, the
            evaluator has another taxonomy, or a schedule is given where there is one loss or for
            another number of losses.

    Example:
        >>> from functools import partial
        >>> from timm_branches import create_branch_model
        >>> from timm_branches.dense import SegmentationEvaluator
        >>> model = create_branch_model(
        ...     'test_resnet', taps=[2, 3, 4, 5], head='unet', num_classes=3)
        >>> task = DenseTask(model, 'ce+dice', partial(SegmentationEvaluator, 3), ignore_index=255)
        >>> task(torch.randn(2, 3, 64, 64), torch.randint(3, (2, 64, 64)))['loss'].backward()
    """

    heads_can_be_off = False

    def __init__(
        self,
        model: BranchModel,
        loss: str | Callable[..., torch.Tensor],
        evaluator: Callable[..., Any],
        head: str | None = None,
        schedule: Schedule = None,
        device: torch.device | None = None,
        verbose: bool = True,
        **settings: Any,
    ):
        if not isinstance(model, BranchModel):
            raise ValueError(f"model= takes a model of create_branch_model, got {shown(model)}.")
        check_number("ignore_index=", settings.get("ignore_index", -1), whole=True)
        decoders = [
            name for name, spec in zip(model.names, model.head_specs, strict=True) if spec.dense
        ]
        self.levels = _levels(model, decoders) if head is None else {}
        if head is None and len(decoders) == 1:
            head = decoders[0]
        if head not in decoders and not self.levels:
            raise ValueError(
                f"head={head!r}: name one of the model's decoders, {decoders} among "
                f"{list(model.names)}."
            )
        self.sources = self.levels or {str(head): str(head)}  # the decoder that gives each output
        names = []
        for output, source in self.sources.items():
            names += [f"{output}_{key}" for key in getattr(model.head(source), "aux", {})]
            names.append(output)
        if schedule is not None and len(names) == 1:
            raise ValueError(
                "schedule= weighs the stages of a decoder with deep_supervision=True, or the "
                "levels of a taxonomy; this one has one loss."
            )
        super().__init__(model, names, schedule, device, verbose=verbose)
        self.shares = isinstance(loss, str)
        self.settings = {"loss": loss if isinstance(loss, str) else name_of_function(loss)}
        for name, value in settings.items():
            self.settings[name] = _plain(value)
        self.ignore_index = int(settings.get("ignore_index", -1))
        self.losses = _losses(loss, list(self.sources), settings, by_level=bool(self.levels))
        self.taxonomy = model.taxonomy if self.levels else None
        self.evaluator = evaluator
        if self.levels and getattr(self.create_evaluator(), "taxonomy", None) != self.taxonomy:
            raise ValueError(
                "the model answers for the levels of its taxonomy: give the evaluator the same, "
                "taxonomy=model.taxonomy."
            )

    def needed_heads(self) -> tuple[str, ...]:
        """The decoders whose loss counts."""
        on = {self._output(name) for name in self.active}
        return tuple(
            dict.fromkeys(source for output, source in self.sources.items() if output in on)
        )

    def _output(self, name: str) -> str:
        """The output that a loss belongs to: itself, or that of the stage."""
        return name if name in self.sources else name.rpartition("_aux")[0]

    def compare(
        self,
        output: dict[str, torch.Tensor],
        target: torch.Tensor,
        lengths: torch.Tensor | None = None,
        share: bool = False,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss of the output, and in training those of the decoder's other stages.

        Args:
            output: Maps (B, K, H, W) of the decoder, of clips (B, T, K, H, W).
            target: Masks (B, H, W) of class indices, or images (B, C, H, W); of clips with T in the
                second place.
            lengths: Valid frames of each clip; what stands behind them does not count.
            share: Average over the pixels of all processes, where the loss can.
        """
        output, target = frames_of_clips(output, target, lengths)
        shared = {"share": share} if self.shares else {}
        targets = dict.fromkeys(self.sources, target)
        if self.taxonomy is not None:
            known = torch.where(target == self.ignore_index, -1, target)
            targets = dict(zip(self.sources, self.taxonomy.expand(known).unbind(-1), strict=True))
        # in evaluation there are no other stages
        names = [name for name in self.active if name in output]
        losses = {
            name: self.losses[self._output(name)](
                output[name], targets[self._output(name)], **shared
            )
            for name in names
        }
        weights = dict(zip(self.names, self.weights, strict=True))
        return torch.stack([weights[name] * losses[name] for name in names]).sum(), losses

    def describe_settings(self) -> dict[str, Any]:
        """The loss and what it was given."""
        return {**super().describe_settings(), **self.settings}

    def check_targets(self, target: Any, loader: Any = None) -> None:
        """Refuse masks (B, H, W) with values that are no class and not the one to ignore."""
        if not isinstance(target, torch.Tensor) or target.is_floating_point():
            return
        if target.ndim == 4:  # of clips
            target = target.flatten(0, 1)
        if target.ndim != 3:
            return
        if self.taxonomy is not None:
            count = self.taxonomy.num_leaves
        else:
            head = next(iter(self.sources.values()))
            count = max(2, base_model(self).num_classes[head])  # one logit says yes or no
        bad = (target != self.ignore_index) & ((target < 0) | (target >= count))
        if bad.any():
            image, row, column = bad.nonzero()[0].tolist()
            raise ValueError(
                f"value {int(target[image, row, column])} in mask {image} of a batch, row {row}, "
                f"column {column} (counted from 0) is outside the {count} classes: masks hold 0 to "
                f"{count - 1}, and {self.ignore_index} for unlabelled."
            )

    def match_labels(self, names: Any) -> Callable[[Any], Any] | None:
        """As in :class:`HeadsTask`; targets are masks of class indices, -1 for no class."""
        own = self._class_names()
        if own is None or names is None:
            return None
        if isinstance(names, Taxonomy):
            names = [" / ".join(path) for path in names.leaves]
            if self.taxonomy is None:
                names = [name.rpartition(" / ")[2] for name in names]
        if _only_numbers(names):
            return None
        table = match_classes(names, own)
        if table is None:
            return None
        last = len(table)
        table = torch.cat([table, torch.tensor([-1])])
        ignored = self.ignore_index

        def translate(masks: torch.Tensor) -> torch.Tensor:
            known = torch.where(masks == ignored, -1, masks)
            if masks.device.type == "cpu" and not bool(((known >= -1) & (known < last)).all()):
                worst = known[(known < -1) | (known >= last)][0]
                raise ValueError(
                    f"value {int(worst)} in a mask is none of the {last} classes of the data set."
                )
            translated = table.to(masks.device)[known]
            return torch.where(known < 0, ignored, translated)

        return translate

    def describe_labels(self) -> dict[str, Any]:
        """The taxonomy, or the names of the masks' classes."""
        if self.taxonomy is not None:
            return {"taxonomy": self.taxonomy.to_dict()}
        names = self._class_names()
        return {} if names is None else {"classes": names}

    def _class_names(self) -> list[str] | None:
        """The names of the masks' classes in their order, where the evaluator was given them."""
        if self.taxonomy is not None:
            return [" / ".join(path) for path in self.taxonomy.leaves]
        classes = getattr(self.create_evaluator(), "classes", None)
        if not classes or _only_numbers(classes[-1]):
            return None
        return list(classes[-1])

    @property
    def default_metric(self) -> str:
        """The evaluator's own choice."""
        return self.create_evaluator().default_metric

    def create_evaluator(self, **kwargs: Any) -> Any:
        """A fresh evaluator that takes the model's whole output and the masks or images."""
        evaluator = self.evaluator(device=self.device, **kwargs)
        return _OfHeads(evaluator, tuple(self.sources))

    def confusions(self, evaluator: Any) -> list[tuple[str, torch.Tensor, list[str]]]:
        """A matrix for each level of a mask, none for images."""
        if not hasattr(evaluator, "confusion_matrices"):
            return []
        ious: Mapping[str, Mapping[str, float]] = evaluator.class_iou()
        return [
            (level, matrix, list(classes))
            for (level, classes), matrix in zip(
                ious.items(), evaluator.confusion_matrices(), strict=True
            )
        ]


def _plain(value: Any) -> Any:
    """A setting as JSON knows it."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return value


def _only_numbers(names: Sequence[str]) -> bool:
    """Whether classes were only counted: they are called 0, 1, 2, ..."""
    return list(names) == [str(i) for i in range(len(names))]


class _OfHeads:
    """An evaluator that reads one output of the model, or those of the levels."""

    def __init__(self, evaluator: Any, names: Sequence[str]):
        self._evaluator, self._names = evaluator, names
        self.metrics: dict[str, float] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._evaluator, name)

    def update(self, output: Any, target: torch.Tensor) -> None:
        own = {name: output[name] for name in self._names}
        own, target = frames_of_clips(own, target, None)
        self._evaluator.update(own if len(own) > 1 else own[self._names[0]], target)


def frames_of_clips(
    output: dict[str, torch.Tensor], target: torch.Tensor, lengths: torch.Tensor | None
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Maps and targets of clips (B, T, ...) as those of their valid frames (N, ...).

    Those of images are returned as they are.

    Raises:
        ValueError: The targets are not one a frame.
    """
    clips = next((y for y in output.values() if y.ndim == 5), None)
    if clips is None:
        return output, target
    if target.shape[:2] != clips.shape[:2] or target.ndim not in (4, 5):
        raise ValueError(
            f"clips of {clips.shape[0]} x {clips.shape[1]} frames need a mask or an image for each "
            f"frame, (B, T, H, W) or (B, T, C, H, W), got {tuple(target.shape)}."
        )
    valid: torch.Tensor | None = None
    if lengths is not None:
        time = torch.arange(clips.shape[1], device=lengths.device)
        valid = (time < lengths[:, None]).flatten().nonzero()[:, 0].to(target.device)

    def fold(y: torch.Tensor) -> torch.Tensor:
        y = y.flatten(0, 1)
        return y if valid is None else y.index_select(0, valid)

    folded = dict(output)
    for name, y in output.items():
        if y.ndim == 5:
            folded[name] = fold(y)
    return folded, fold(target)


def _levels(model: BranchModel, decoders: Sequence[str]) -> dict[str, str]:
    """The decoder that gives each level of the model's taxonomy.

    Empty if decoders do not give them.
    """
    tree = model.taxonomy
    if tree is None or tree.num_levels < 2:
        return {}
    if answers_all_levels(model.head_specs, tree):
        return dict.fromkeys(tree.levels, decoders[0])
    heads = model.names[: tree.num_levels]
    if not set(heads) <= set(decoders):
        return {}
    return {name: name for name in heads}


def _losses(
    loss: str | Callable[..., torch.Tensor],
    outputs: Sequence[str],
    settings: dict[str, Any],
    by_level: bool,
) -> dict[str, Callable[..., torch.Tensor]]:
    """The loss of each output.

    Those of levels have their own class weights, and read -1 for unlabelled.
    """
    if not isinstance(loss, str):
        if settings:
            raise ValueError(
                f"{', '.join(settings)}: settings belong to a loss that is given by name."
            )
        return dict.fromkeys(outputs, loss)
    if not by_level:
        return {output: get_dense_loss(loss, **settings) for output in outputs}
    settings = {key: value for key, value in settings.items() if key != "ignore_index"}
    weights = settings.pop("class_weights", {})
    if not isinstance(weights, Mapping) or set(weights) - set(outputs):
        raise ValueError(
            f"class_weights= of levels is a dict with weights for some of {list(outputs)}, got "
            f"{list(weights) if isinstance(weights, Mapping) else weights!r}."
        )
    own: dict[str, dict[str, Any]] = {output: {} for output in outputs}
    for output in outputs:
        if output in weights:
            own[output]["class_weights"] = weights[output]
    return {output: get_dense_loss(loss, **settings, **own[output]) for output in outputs}
