"""Losses of label hierarchies: a head a level, weighted by epoch; and the flat baseline."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import nn

from timm_branches.arguments import check_flag, check_number, shown
from timm_branches.hierarchy import HierarchyEvaluator, sum_upwards
from timm_branches.hierarchy.losses import (
    HierarchyLoss,
    consistency_loss,
    hxe_loss,
    level_cross_entropy,
    marginal_loss,
    soft_label_loss,
    tree_path_kl,
)
from timm_branches.model import BranchModel
from timm_branches.task.base import HeadsTask, Schedule, name_of_function, name_of_labels
from timm_branches.task.uncertainty import UncertaintyWeighting
from timm_branches.taxonomy import Taxonomy
from timm_branches.taxonomy.matching import match_classes, match_taxonomies

__all__ = ["BranchTask", "FlatTask", "two_classes"]


class BranchTask(HeadsTask):
    """Weighted sum of per-level cross-entropies, with weights that change by epoch.

    This is B-CNN's training strategy.

    L = sum over levels k of w_k(epoch) * CE_k, equation (1) of Zhu and Bain 2017 (arXiv
    1709.09890), plus the terms below where they are asked for. A level of weight 0 is off: its head
    is not computed in training, so no gradient, weight decay or BatchNorm update moves it and no
    infinite loss there can poison the sum. (`consistency` and `tree_path` read all levels, so with
    them every head is computed.)

    Args:
        model: Branch model with one head a level, from coarse to fine. Other heads (decoders, and
            what stands behind the levels of its taxonomy) are left alone.
        schedule: Loss weights by epoch: a schedule, a preset's name, or None for equal weights.
        label_smoothing: Of every level's cross-entropy, or one for each level.
        class_weights: Weight of each class, by level: `{'fine': tensor (K,)}`; torch's weighted
            mean.
        decoder: How the answers of the levels become one when the task is evaluated, also for the
            best epoch; see :func:`timm_branches.hierarchy.decode`.
        loss: A loss of your own in place of the cross-entropies, of the form that
            :class:`timm_branches.hierarchy.losses.HierarchyLoss` states. It brings its own
            smoothing and class weights.
        marginal: An image that is labelled on a coarser level only trains the finer heads, too: the
            probability of the classes below its label is raised as a whole (:func:`marginal_loss`
            on each level).
        consistency: Weight of :func:`consistency_loss` between neighbouring levels.
        tree_path: Weight of :func:`tree_path_kl`.
        uncertainty: Learn the levels' weights (:class:`UncertaintyWeighting`) instead of scheduling
            them.
        device: Where the task lives.
        dtype: As in timm.
        verbose: As in timm.

    Raises:
        ValueError: The schedule is for another number of levels than the model has heads, a setting
            is out of its range, a class weight fits no level, or a loss needs a taxonomy that the
            model does not have.

    Example:
        >>> task = BranchTask(model, schedule='bcnn-cifar10')            # doctest: +SKIP
        >>> task.set_epoch(0)                                            # doctest: +SKIP
        >>> task(images, labels)['loss'].backward()                      # doctest: +SKIP
    """

    def __init__(
        self,
        model: BranchModel,
        schedule: Schedule = None,
        label_smoothing: float | Sequence[float] = 0.0,
        class_weights: Mapping[str, torch.Tensor | Sequence[float]] | None = None,
        *,
        loss: HierarchyLoss | None = None,
        decoder: str = "independent",
        marginal: bool = False,
        consistency: float = 0.0,
        tree_path: float = 0.0,
        uncertainty: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        verbose: bool = True,
    ):
        _check_branch_arguments(
            model, label_smoothing, class_weights, marginal, consistency, tree_path, uncertainty
        )
        names = _classifying_heads(model)
        if not names:
            raise ValueError(
                f"the heads {list(model.names)} are decoders, without classes of whole images: a "
                "DenseTask trains them."
            )
        super().__init__(model, names, schedule, device, dtype, verbose)
        self.level_names = self.names
        self.taxonomy: Taxonomy | None = model.taxonomy
        # without a tree one logit says yes or no; a tree's level of one class has one answer
        smallest = 2 if self.taxonomy is None else 1
        self.level_classes = tuple(max(smallest, model.num_classes[name]) for name in names)
        if isinstance(label_smoothing, (int, float)):
            smoothing = [label_smoothing] * len(names)
        else:
            smoothing = list(label_smoothing)
        if len(smoothing) != len(names) or not all(0 <= s < 1 for s in smoothing):
            raise ValueError(
                "label_smoothing must be in [0, 1), one number or one for each of "
                f"{list(self.names)}, got {label_smoothing}."
            )
        self.label_smoothing = dict(zip(self.names, smoothing, strict=True))
        self.extras: dict[str, float] = {}
        for name, value in (("consistency", consistency), ("tree_path", tree_path)):
            if value:
                self.extras[name] = value
        need_taxonomy = list(self.extras)
        if marginal:
            need_taxonomy.append("marginal")
        if need_taxonomy and self.taxonomy is None:
            raise ValueError(
                f"{', '.join(need_taxonomy)} needs a taxonomy: make the model with taxonomy=."
            )
        self.loss = loss
        self.decoder = decoder
        if loss is not None:
            _refuse_beside_loss(
                label_smoothing=any(smoothing),
                class_weights=class_weights,
                marginal=marginal,
                uncertainty=uncertainty,
            )
        self._weigh_classes(class_weights or {}, model)
        self.marginal = marginal
        self.below = nn.ModuleList()
        if marginal and self.taxonomy is not None:
            self.below.extend(_Below(self.taxonomy, level) for level in range(len(names)))
        if uncertainty and schedule is not None:
            raise ValueError(
                "a schedule has no effect beside learned weights: give schedule= or "
                "uncertainty=True."
            )
        if uncertainty and marginal:
            raise ValueError("uncertainty= does not go with marginal=.")
        self.uncertainty = UncertaintyWeighting(self.names) if uncertainty else None
        self.heads_can_be_off = not self.extras
        self.to(next(model.parameters()).device if device is None else device)

    def _weigh_classes(self, class_weights: Mapping[str, Any], model: BranchModel) -> None:
        for name, given in class_weights.items():
            try:
                weights = torch.as_tensor(given, dtype=torch.float32)
            except (RuntimeError, TypeError, ValueError) as error:
                raise ValueError(
                    f"class_weights[{name!r}] takes a number for each class, got {shown(given)}."
                ) from error
            fits = name in self.names and weights.shape == (model.num_classes[name],)
            if not fits or not (weights >= 0).all():
                raise ValueError(
                    f"class_weights[{name!r}] of shape {tuple(weights.shape)}: give one weight "
                    f"from 0 upwards for each class of one of the heads {model.num_classes}."
                )
            self.register_buffer(
                f"class_weights_{self.names.index(name)}", weights, persistent=False
            )

    def end_epoch(self, metrics: Mapping[str, float], epoch: int) -> None:
        """Tell the schedule the levels' accuracies."""
        if len(self.level_names) == self.schedule.num_levels:
            accuracies = [metrics[f"{name}_top1"] / 100 for name in self.level_names]
            self.schedule.update(accuracies, epoch)

    def parameters_of_loss(self) -> list[nn.Parameter]:
        """The learned uncertainties."""
        return list(self.uncertainty.parameters()) if self.uncertainty else []

    def describe_settings(self) -> dict[str, Any]:
        """What the loss is made of beside the schedule."""
        class_weights = {}
        for index, name in enumerate(self.names):
            weights = getattr(self, f"class_weights_{index}", None)
            if weights is not None:
                class_weights[name] = weights.tolist()
        return {
            **super().describe_settings(),
            "label smoothing": list(self.label_smoothing.values()),
            "class weights": class_weights,
            "loss": None if self.loss is None else name_of_function(self.loss),
            "marginal": self.marginal,
            "consistency": self.extras.get("consistency", 0.0),
            "tree path": self.extras.get("tree_path", 0.0),
            "uncertainty": self.uncertainty is not None,
        }

    def check_targets(self, target: Any, loader: Any = None) -> None:
        """Refuse labels (..., L) outside the classes of their level; -1 is unknown."""
        if not isinstance(target, torch.Tensor) or target.is_floating_point():
            return
        if target.ndim < 2 or target.shape[-1] != len(self.level_classes):
            return  # the loss says what is wrong with their shape
        for level, count in enumerate(self.level_classes):
            column = target[..., level]
            bad = ((column < -1) | (column >= count)).nonzero()
            if not len(bad):
                continue
            place = tuple(bad[0].tolist())
            where = name_of_labels(loader, level, int(column[place]))
            raise ValueError(
                f"label {int(column[place])} of level {self.level_names[level]!r}{where} is "
                f"outside its {count} classes: labels are -1 for unknown, or 0 to {count - 1}."
            )

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        """The schedule, the epoch and what the loss has learned, for checkpoints."""
        state = super().get_task_state(module, ema)
        if self.uncertainty:
            state["uncertainty"] = self.uncertainty.state_dict()
        return state

    def load_task_state(
        self,
        state: dict[str, Any] | None,
        strict: bool = True,
        module: nn.Module | None = None,
        ema: bool = False,
    ) -> None:
        """Continue with the checkpoint's schedule and what the loss has learned."""
        super().load_task_state(state, strict, module, ema)
        if state and self.uncertainty:
            self.uncertainty.load_state_dict(state["uncertainty"])

    # -- losses

    def needed_heads(self) -> tuple[str, ...]:
        """As in :class:`HeadsTask`."""
        return self.names if self.extras or self.loss is not None else self.active

    def _turns_levels_off(self) -> bool:
        # a loss from outside may leave heads out
        return self.loss is not None or super()._turns_levels_off()

    def compare(
        self,
        output: dict[str, torch.Tensor],
        target: torch.Tensor,
        lengths: torch.Tensor | None = None,
        share: bool = False,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The weighted sum, and the losses by level.

        Args:
            output: Logits by level, of the levels that are on.
            target: Labels (B, L) with -1 for unknown, or soft labels (B, sum of classes) as mixup
                makes them. Heads that answer for each frame are held to the clip's labels in each
                of its frames, or to labels (B, T, L).
            lengths: Valid frames of each clip.
            share: Average over the samples of all processes.
        """
        targets = self._targets(target)
        if self.loss is None:
            losses = self._level_losses(output, target, lengths, share)
        else:
            losses = self._own_losses(output, target, lengths, share)
        weights = dict(zip(self.names, self.weights, strict=True))
        if self.uncertainty:
            loss = self.uncertainty(losses, self._known(targets, share))
        else:
            # what a loss from outside adds beside the levels has no weight
            weighted = [weights.get(name, 1.0) * losses[name] for name in losses]
            loss = torch.stack(weighted).sum()
        for name, weight in self.extras.items():
            losses[name] = self._extra_loss(name, output, target, share)
            loss = loss + weight * losses[name]
        return loss, losses

    def _level_losses(
        self,
        output: dict[str, torch.Tensor],
        target: torch.Tensor,
        lengths: torch.Tensor | None,
        share: bool,
    ) -> dict[str, torch.Tensor]:
        losses = {}
        for name in self.active:
            logits, rows = _by_sample(name, self._logits(output, name), target, lengths)
            losses[name] = self._level_loss(name, logits, self._targets(rows)[name], rows, share)
        return losses

    def _own_losses(
        self,
        output: dict[str, torch.Tensor],
        target: torch.Tensor,
        lengths: torch.Tensor | None,
        share: bool,
    ) -> dict[str, torch.Tensor]:
        """The losses of a function from outside, but for levels of weight 0."""
        assert self.loss is not None
        logits, rows = {}, target
        for name in self.names:
            logits[name], rows = _by_sample(name, self._logits(output, name), target, lengths)
        losses = self.loss(logits, rows, self.taxonomy, share=share)
        if not isinstance(losses, Mapping) or not losses:
            raise ValueError(
                "loss= must return a dict of scalars: the losses of levels by the levels' names, "
                f"and others; got {type(losses).__name__}."
            )
        off = set(self.names) - set(self.active)
        return {name: loss for name, loss in losses.items() if name not in off}

    def _known(self, targets: dict[str, torch.Tensor], share: bool) -> dict[str, torch.Tensor]:
        """Of each level, whether any process has a label for it."""
        flags = []
        for y in targets.values():
            labelled = y > 0 if y.is_floating_point() else y >= 0
            flags.append(labelled.any())
        known = torch.stack(flags)  # (levels,)
        if share:
            known = known.int()
            dist.all_reduce(known, op=dist.ReduceOp.MAX)
            known = known.bool()
        return dict(zip(targets, known.unbind(), strict=True))

    def _level_loss(
        self,
        name: str,
        logits: torch.Tensor,
        level_target: torch.Tensor,
        target: torch.Tensor,
        share: bool,
    ) -> torch.Tensor:
        """Cross-entropy of one level, which images with a coarser label may join."""
        index = self.names.index(name)
        settings: dict[str, Any] = {
            "label_smoothing": self.label_smoothing[name],
            "class_weights": getattr(self, f"class_weights_{index}", None),
        }
        if not self.marginal or target.is_floating_point():
            return level_cross_entropy(logits, level_target, **settings, share=share)
        below: Any = self.below[index]
        return _with_coarse(logits, level_target, below(target), below.taxonomy, settings, share)

    def _extra_loss(
        self, name: str, output: dict[str, torch.Tensor], target: torch.Tensor, share: bool
    ) -> torch.Tensor:
        assert self.taxonomy is not None
        logits = self.level_logits(output)
        if any(y.ndim != 2 for y in logits):
            raise ValueError(
                f"{name}= compares answers for images or whole clips: give the heads output='clip'."
            )
        if name == "consistency":
            return consistency_loss(logits, self.taxonomy, share)
        if target.is_floating_point():
            raise ValueError("tree_path= needs class indices: it does not go with mixup or CutMix.")
        return tree_path_kl(logits, target, self.taxonomy, share)

    def _targets(self, target: torch.Tensor) -> dict[str, torch.Tensor]:
        if not isinstance(target, torch.Tensor):
            raise ValueError(f"labels must be a tensor (B, L), got {type(target).__name__}.")
        if target.device.type == "cpu":  # elsewhere it would have to be waited for
            self.check_targets(target)
        if target.is_floating_point():
            if target.ndim != 2 or target.shape[1] != sum(self.level_classes):
                raise ValueError(
                    f"soft labels must be (B, {sum(self.level_classes)}), the levels' classes "
                    f"{list(self.level_classes)} side by side, got {tuple(target.shape)}."
                )
            columns = target.split(list(self.level_classes), dim=1)  # (B, K) each
            return dict(zip(self.level_names, columns, strict=True))
        if target.ndim not in (2, 3) or target.shape[-1] != len(self.level_names):
            raise ValueError(
                f"labels must be (B, {len(self.level_names)}), one column per level "
                f"{list(self.level_names)}, got {tuple(target.shape)}."
            )
        return dict(zip(self.level_names, target.unbind(-1), strict=True))

    def level_logits(self, output: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        """Logits (B, K) of every level from the model's output."""
        return [self._logits(output, name) for name in self.names]

    def _logits(self, output: dict[str, torch.Tensor], name: str) -> torch.Tensor:
        """Logits (..., K) of a head with at least as many classes as its labels have."""
        return output[name] if self.taxonomy is not None else two_classes(output[name])

    # -- names

    def match_labels(self, names: Any) -> Callable[[Any], Any] | None:
        """As in :class:`HeadsTask`; class indices (B,) of a class list become labels (B, L)."""
        if names is None or self.taxonomy is None:
            return None
        if isinstance(names, Taxonomy):
            return match_taxonomies(names, self.taxonomy)
        return _LeafTranslation(names, self.taxonomy)

    def describe_labels(self) -> dict[str, Any]:
        """The taxonomy."""
        if self.taxonomy is None:
            return {}
        return {"taxonomy": self.taxonomy.to_dict()}

    # -- evaluation

    @property
    def default_metric(self) -> str:
        """The accuracy of the finest level."""
        return f"{self.level_names[-1]}_top1"

    def create_evaluator(self, **kwargs: Any) -> HierarchyEvaluator:
        """A fresh evaluator that takes the model's whole output and labels (B, L)."""
        kwargs.setdefault("decoder", self.decoder)
        return HierarchyEvaluator(
            self.level_names,
            self.level_classes,
            self.taxonomy,
            device=self.device,
            to_levels=self.level_logits,
            **kwargs,
        )

    def confusions(
        self, evaluator: HierarchyEvaluator
    ) -> list[tuple[str, torch.Tensor, list[str]]]:
        """A matrix for each level of at most 1,000 classes."""
        names: Sequence[Sequence[str]]
        if self.taxonomy is not None:
            names = self.taxonomy.classes
        else:
            names = [list(map(str, range(count))) for count in self.level_classes]
        result = []
        matrices = evaluator.confusion_matrices()
        for level, matrix, classes in zip(self.level_names, matrices, names, strict=True):
            if matrix is not None:
                result.append((level, matrix, list(classes)))
        return result


def _check_branch_arguments(
    model: Any,
    label_smoothing: Any,
    class_weights: Any,
    marginal: Any,
    consistency: Any,
    tree_path: Any,
    uncertainty: Any,
) -> None:
    """Refuse what is no such argument."""
    if not isinstance(model, BranchModel):
        raise ValueError(f"model= takes a model of create_branch_model, got {shown(model)}.")
    several = isinstance(label_smoothing, (list, tuple))
    for smoothing in label_smoothing if several else [label_smoothing]:
        check_number("label_smoothing must be in [0, 1): it", smoothing, 0, 1, below=True)
    if class_weights is not None and not isinstance(class_weights, Mapping):
        raise ValueError(f"class_weights= takes weights by head, got {shown(class_weights)}.")
    for name, value in (("consistency", consistency), ("tree_path", tree_path)):
        check_number(f"{name} must be a finite weight from 0 upwards: it", value, 0)
    check_flag("marginal=", marginal)
    check_flag("uncertainty=", uncertainty)


def _classifying_heads(model: BranchModel) -> list[str]:
    """The heads of the taxonomy's levels; without a taxonomy all that are no decoders."""
    if model.taxonomy is not None:
        return list(model.names[: model.taxonomy.num_levels])
    heads = zip(model.names, model.head_specs, strict=True)
    return [name for name, head in heads if not head.dense]


def _refuse_beside_loss(**settings: Any) -> None:
    named = [f"{name}=" for name, value in settings.items() if value]
    if named:
        raise ValueError(f"{', '.join(named)} has no effect beside loss=, which brings its own.")


class FlatTask(BranchTask):
    """The baseline that every hierarchy must beat: one head of leaves.

    The levels' answers are its probabilities, summed upwards.

    Args:
        model: Branch model with a single head of `taxonomy.num_leaves` classes.
        taxonomy: The hierarchy whose levels are reported.
        label_smoothing: Of the marginal loss, for images whose leaf is known.
        loss: `'marginal'`, cross-entropy on the deepest class that is known; `'hxe'` or
            `'soft'`, the hierarchical losses of Bertinetto et al. 2020; or a function of your own
            of (leaf logits (B, K), labels (B, L), taxonomy) that returns a scalar.
        strength: alpha of `'hxe'` (default 0.1) or beta of `'soft'` (default 10).
        device: Where the task lives.

    Raises:
        ValueError: The model has several heads, or another number of classes than leaves, the loss
            is unknown, or a setting has no effect with it.
    """

    losses: ClassVar[tuple[str, ...]] = ("marginal", "hxe", "soft")

    def __init__(
        self,
        model: BranchModel,
        taxonomy: Taxonomy,
        label_smoothing: float = 0.0,
        loss: str | Callable[..., torch.Tensor] = "marginal",
        strength: float | None = None,
        device: torch.device | None = None,
    ):
        if not isinstance(taxonomy, Taxonomy):
            raise ValueError(f"taxonomy= takes a Taxonomy, got {shown(taxonomy)}.")
        if strength is not None:
            check_number("strength=", strength, 0)
        super().__init__(model, None, label_smoothing, device=device)
        if len(self.names) != 1 or model.num_classes[self.names[0]] != taxonomy.num_leaves:
            raise ValueError(
                f"a flat baseline has one head of the taxonomy's {taxonomy.num_leaves} leaves, "
                f"got {model.num_classes}."
            )
        own = callable(loss)
        if not own and loss not in self.losses:
            raise ValueError(f"loss={loss!r}: choose one of {', '.join(self.losses)}.")
        if loss != "marginal" and label_smoothing:
            raise ValueError(f"label_smoothing has no effect with loss={loss!r}.")
        if loss == "marginal" and strength is not None:
            raise ValueError("strength= has no effect with loss='marginal'.")
        if own and strength is not None:
            raise ValueError("strength= has no effect beside a loss of your own.")
        self.leaf_loss = loss
        self.strength = strength
        if strength is None and isinstance(loss, str):
            self.strength = {"hxe": 0.1, "soft": 10.0}.get(loss)
        self.taxonomy = taxonomy
        self.level_names = tuple(taxonomy.levels)
        self.level_classes = tuple(taxonomy.num_classes)
        # where each leaf stands among the nodes of all levels side by side
        table = taxonomy.leaf_table
        depth = (table >= 0).sum(1) - 1
        starts = torch.tensor([0, *self.level_classes[:-1]]).cumsum(0)
        self.register_buffer(
            "leaf_column", starts[depth] + table.gather(1, depth[:, None])[:, 0], persistent=False
        )
        self.to(next(model.parameters()).device if device is None else device)

    def describe_settings(self) -> dict[str, Any]:
        """What the loss is made of."""
        loss = (
            self.leaf_loss if isinstance(self.leaf_loss, str) else name_of_function(self.leaf_loss)
        )
        return {**super().describe_settings(), "loss": loss, "strength": self.strength}

    def _level_loss(
        self,
        name: str,
        logits: torch.Tensor,
        level_target: torch.Tensor,
        target: torch.Tensor,
        share: bool,
    ) -> torch.Tensor:
        assert self.taxonomy is not None
        settings = {"label_smoothing": self.label_smoothing[name]}
        if target.is_floating_point():
            if self.leaf_loss != "marginal":
                raise ValueError(
                    f"loss={self.leaf_loss!r} needs class indices: it does not go with mixup or "
                    "CutMix."
                )
            return level_cross_entropy(logits, level_target, share=share)
        if callable(self.leaf_loss):
            return self.leaf_loss(logits, target, self.taxonomy)
        if self.leaf_loss == "marginal":
            return _with_coarse(logits, level_target, target, self.taxonomy, settings, share)
        assert self.strength is not None
        which = hxe_loss if self.leaf_loss == "hxe" else soft_label_loss
        return which(logits, target, self.taxonomy, self.strength, share)

    def _targets(self, target: torch.Tensor) -> dict[str, torch.Tensor]:
        super()._targets(target)
        column: torch.Tensor = self.leaf_column  # type: ignore[assignment]
        if target.is_floating_point():
            return {self.names[0]: target[:, column]}
        leaf = torch.full((sum(self.level_classes),), -1, device=target.device)
        leaf[column] = torch.arange(len(column), device=target.device)
        result = torch.full_like(target[:, 0], -1)
        start = 0
        for level, classes in enumerate(self.level_classes):
            known = target[:, level] >= 0
            result = torch.where(known, leaf[start + target[:, level].clamp(min=0)], result)
            start += classes
        return {self.names[0]: result}

    def level_logits(self, output: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        """Log-probabilities (B, K) of every level: the leaves' probabilities, summed upwards."""
        assert self.taxonomy is not None
        return sum_upwards(output[self.names[0]].float(), self.taxonomy)


def two_classes(logits: torch.Tensor) -> torch.Tensor:
    """A single logit z (..., 1) as the logits (0, z) of no and yes.

    Their cross-entropy is the binary one.
    """
    return torch.cat([torch.zeros_like(logits), logits], -1) if logits.shape[-1] == 1 else logits


def _by_sample(
    name: str, logits: torch.Tensor, target: torch.Tensor, lengths: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (N, K) and labels (N, L) of a head.

    Of images or clips as they are, of frames one by one.
    """
    if logits.ndim == 2 and target.ndim == 2:
        return logits, target
    if logits.ndim == 2 or target.is_floating_point():
        raise ValueError(
            f"head {name!r} with logits {tuple(logits.shape)} cannot be held to labels "
            f"{tuple(target.shape)}: labels of frames need a head with output='frame', class "
            "indices."
        )
    batch, time = logits.shape[:2]
    rows = target if target.ndim == 3 else target[:, None].expand(batch, time, target.shape[1])
    if lengths is not None:
        behind = torch.arange(time, device=rows.device) >= lengths.to(rows.device)[:, None]
        rows = rows.masked_fill(behind[..., None], -1)
    return logits.flatten(0, 1), rows.flatten(0, 1)


class _LeafTranslation:
    """Class indices of a list of leaf names, as labels of every level.

    Args:
        names: The leaves' names in the order of the data set's class indices.
        taxonomy: The task's tree; its leaves are found by their own or their display names.

    Raises:
        ValueError: A name is no leaf of the tree.
    """

    def __init__(self, names: Sequence[str], taxonomy: Taxonomy):
        self.names = tuple(names)
        self.taxonomy = taxonomy
        own = [path[-1] for path in taxonomy.leaves]
        leaves = own if len(set(own)) == len(own) else list(taxonomy.leaf_names)
        self.in_order = list(names) == leaves
        self.table: torch.Tensor | None = None
        self.error: ValueError | None = None
        try:
            table = match_classes(names, leaves)
        except ValueError as error:
            self.error = error
            return
        self.table = torch.arange(len(leaves)) if table is None else table

    def __call__(self, target: torch.Tensor) -> torch.Tensor:
        """Labels (B,) -> (B, L). Labels (B, L) were made by the user, and are only checked."""
        if target.is_floating_point():
            return target
        if target.ndim == 1:
            if self.table is None:
                assert self.error is not None
                raise self.error
            bad = (target < -1) | (target >= len(self.table))
            if target.device.type == "cpu" and bad.any():
                raise ValueError(
                    f"label {int(target[bad][0])} is outside the {len(self.table)} classes of the "
                    f"data set: labels are -1 for unknown, or 0 to {len(self.table) - 1}."
                )
            table = torch.cat([self.table, torch.tensor([-1])]).to(target.device)
            return self.taxonomy.expand(table[target])
        if self.table is not None and not self.in_order:
            raise ValueError(
                "The data set's `classes` are the leaves of the model's tree in another order, and "
                "its labels are given by level: whose numbers they are cannot be told. Give the "
                "data set the tree that its labels refer to, as its attribute `taxonomy`."
            )
        return target


class _Below(nn.Module):
    """Labels of all levels as labels of the forest that ends at one level.

    The marginal loss of that level's head reads them.

    A leaf above that level has no class there, so its images are unknown to it.
    """

    def __init__(self, taxonomy: Taxonomy, level: int):
        super().__init__()
        self.taxonomy = Taxonomy(taxonomy.nodes[level], taxonomy.levels[: level + 1])
        for depth in range(level + 1):
            here = {path: i for i, path in enumerate(self.taxonomy.nodes[depth])}
            # the last: unknown
            table = torch.tensor([*(here.get(path, -1) for path in taxonomy.nodes[depth]), -1])
            self.register_buffer(f"table{depth}", table, persistent=False)

    def forward(self, labels: torch.Tensor) -> torch.Tensor:
        labels = labels[:, : self.taxonomy.num_levels]
        here = torch.stack(
            [
                getattr(self, f"table{depth}")[column]
                for depth, column in enumerate(labels.unbind(1))
            ],
            1,
        )
        ends_above = ((labels >= 0) & (here < 0)).any(1)
        return here.masked_fill(ends_above[:, None], -1)


def _with_coarse(
    logits: torch.Tensor,
    target: torch.Tensor,
    labels: torch.Tensor,
    taxonomy: Taxonomy,
    settings: dict[str, Any],
    share: bool,
) -> torch.Tensor:
    """Mean over samples.

    Cross-entropy where the class is known, the marginal loss where only a coarser one is.
    """
    fine = target >= 0
    coarse = ~fine & (labels >= 0).any(1)
    total = (
        level_cross_entropy(logits, target, **settings) * fine.sum()
        + marginal_loss(logits, labels.masked_fill(fine[:, None], -1), taxonomy) * coarse.sum()
    )
    known = (fine | coarse).sum().to(total.dtype)
    if share:
        dist.all_reduce(known)
        known = known / dist.get_world_size()
    return total / torch.where(known > 0, known, 1)
