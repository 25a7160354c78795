"""Freezing a backbone, whole or up to a stage.

What belongs to a stage, and how it stays as it is.
"""

from typing import NamedTuple, Self

import torch
from torch import nn

from timm_branches.taps.notation import Tap
from timm_branches.taps.pruning import unused_parameters
from timm_branches.taps.reader import TapReader

__all__ = ["FreezableBackbone", "FrozenPart", "part_up_to"]

_LAST = 5  # the backbone's last stage, on every architecture


class FrozenPart(NamedTuple):
    """Names of the parameters and modules of a backbone that are frozen."""

    parameters: frozenset[str]
    modules: frozenset[str]


def part_up_to(backbone: nn.Module, reader: TapReader, stage: int) -> FrozenPart:
    """What the map of a stage depends on.

    Its parameters are found by autograd's graph, its modules by being run.

    A table of names would have to know every architecture; the graph of a dry run knows what
    changes the map.
    """
    index = reader.table.get(stage).index
    names = {module: name for name, module in backbone.named_modules()}
    run: set[str] = set()

    def read(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
        return model.forward_intermediates(
            x,
            indices=[index],
            stop_early=True,  # type: ignore[operator]
            output_fmt="NCHW",
            intermediates_only=True,
        )

    hooks = [
        module.register_forward_pre_hook(lambda m, args: run.add(names[m])) for module in names
    ]
    try:
        unused = unused_parameters(backbone, reader.input_size, read)
    finally:
        for hook in hooks:
            hook.remove()
    parameters = frozenset(name for name, _ in backbone.named_parameters()) - unused
    owners = {name.rpartition(".")[0] for name in parameters}
    return FrozenPart(parameters, frozenset(run | owners) - {""})


class FreezableBackbone(nn.Module):
    """The part of a branch model that freezes its `backbone`.

    Freezing is a matter of training: files do not hold it.

    A frozen part gets no gradients and keeps BatchNorm and dropout in eval through `train()`.
    Autograd saves nothing in it, because it begins at the input.
    """

    backbone: nn.Module
    reader: TapReader

    def _init_freezing(self) -> None:
        """Nothing is frozen but what is never trained.

        To be called when the backbone is cut to what its taps need.
        """
        self._untrained = frozenset(
            name for name, p in self.backbone.named_parameters() if not p.requires_grad
        )
        self._frozen_stages: int | None = None
        self._frozen = False
        self._frozen_modules: frozenset[str] = frozenset()
        self._frozen_parameters: frozenset[str] = frozenset()  # those that would be trained else

    def freeze(self, stages: int | str | None = None) -> Self:
        """Freeze the backbone, or its stages up to and including one.

        What is frozen already stays so.

        Args:
            stages: The last frozen stage, by the number it has in taps. None freezes all of the
                backbone, which then runs without autograd.

        Returns:
            The model itself.

        Raises:
            ValueError: No such stage, or one that is cut off behind the last tap.

        Example:
            >>> from timm_branches import create_branch_model
            >>> model = create_branch_model('resnet18', taps=[5], num_classes=2).freeze(stages=3)
            >>> [name for name, p in model.backbone.named_parameters() if p.requires_grad][0]
            'layer3.0.conv1.weight'
            >>> model.unfreeze(stages=3).frozen_stages
            2
        """
        stage = _LAST if stages is None else self._check_stage(stages)
        if self._frozen_stages is not None:
            stage = max(stage, self._frozen_stages)
        self._set_frozen(stage, whole=stages is None or self._frozen)
        return self

    def unfreeze(self, stages: int | str | None = None) -> Self:
        """Train the backbone again, or its stages from one on.

        So it is unfrozen step by step from the top.

        Args:
            stages: The first stage that trains again, those before it stay as they are. None frees
                all.

        Returns:
            The model itself.

        Raises:
            ValueError: No such stage, or one that is cut off behind the last tap.
        """
        left = -1 if stages is None else self._check_stage(stages) - 1
        if self._frozen_stages is not None and left < self._frozen_stages:
            self._set_frozen(left if left >= self._stages()[0] else None)
        return self

    def _stages(self) -> list[int]:
        """The stages that the backbone, cut behind its last tap, still computes."""
        depths = []
        for info in self.reader.taps:
            if info.stage is not None:
                depths.append(info.stage.index)
            else:
                depths.append(self.reader.within[info.module] - 1)
        deepest = max(depths)
        return [row.stage for row in self.reader.table if row.index <= deepest]

    def _check_stage(self, given: int | str) -> int:
        stage = Tap(stage=given).stage  # type: ignore[arg-type]
        there = self._stages()
        if stage not in there:
            raise ValueError(
                f"stages={given!r}: {self.reader.architecture} with these taps has the stages "
                f"{there}; freeze() and unfreeze() without stages= take all of it."
            )
        assert isinstance(stage, int)
        return stage

    def _set_frozen(self, stage: int | None, whole: bool = False) -> None:
        own = dict(self.backbone.named_parameters())
        everything = FrozenPart(
            frozenset(own), frozenset(name for name, _ in self.backbone.named_modules())
        )
        if stage is None:
            part = FrozenPart(frozenset(), frozenset())
        elif whole:
            part = everything
        else:
            part = part_up_to(self.backbone, self.reader, stage)
        self._frozen_stages = stage
        self._frozen = everything.parameters <= part.parameters | self._untrained
        self._frozen_modules = everything.modules if self._frozen else part.modules
        before = self._frozen_parameters
        self._frozen_parameters = frozenset(
            name for name in part.parameters if name in before or own[name].requires_grad
        )
        for name in before | self._frozen_parameters:
            own[name].requires_grad_(name not in self._frozen_parameters)
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """Training mode, but for what is frozen."""
        super().train(mode)
        for name, module in self.backbone.named_modules():
            if name in self._frozen_modules:
                module.training = False
        return self

    @property
    def frozen(self) -> bool:
        """Whether the whole backbone is frozen."""
        return self._frozen

    @property
    def frozen_stages(self) -> int | None:
        """The last frozen stage, None if none is."""
        return self._frozen_stages
