"""Taps: one notation for the feature map at a depth, the same on every timm backbone.

Stage numbers count like conv1 to conv5 in the literature and the backbone's last stage is always 5,
so on an ordinary pyramid stage k is the map at stride 2^k. Backbones without a pyramid (ViT, Mixer)
have stage k of 2..5 at (k-1)/4 of their depth and stage 1 at their first block. VGG's stage k is
conv block k *with* its pool. Any module can be tapped by its path.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from timm.models import create_model
from timm.models.crossvit import CrossVit
from timm.models.vgg import VGG
from torch import nn

__all__ = ["StageInfo", "Tap", "TapTable", "list_taps", "stage_table"]

_STAGE_SPELLING = re.compile(r"(?:conv|stage)(\d+)")


@dataclass(frozen=True)
class Tap:
    """A place in a backbone at which a head listens.

    Args:
        stage: Stage number (`3`) or its spellings `'conv3'`, `'stage3'`.
        module: Path of a module whose output is tapped (`'layer3.2.conv2'`). Give either this or
            `stage`.
        detach: Stop the gradient of the heads at this tap from reaching the backbone.

    Raises:
        ValueError: Neither or both of `stage` and `module` are given, or the spelling is
            unknown.

    Example:
        >>> Tap(stage='conv3').stage
        3
        >>> Tap(module='layer3.2.conv2', detach=True).name
        'layer3_2_conv2'
    """

    stage: int | None = None
    module: str | None = None
    detach: bool = False

    def __post_init__(self):
        if (self.stage is None) == (self.module is None):
            raise ValueError(
                f"A tap is either a stage or a module path, got stage={self.stage!r}, "
                f"module={self.module!r}. Write Tap(stage=3) or Tap(module='layer3.2')."
            )
        if isinstance(self.stage, str):
            match = _STAGE_SPELLING.fullmatch(self.stage)
            if not match:
                raise ValueError(
                    f"Unknown stage {self.stage!r}: write 3, 'conv3' or 'stage3', "
                    f"or Tap(module={self.stage!r}) for a module path."
                )
            object.__setattr__(self, "stage", int(match.group(1)))
        elif self.stage is not None and (
            isinstance(self.stage, bool) or not isinstance(self.stage, int)
        ):
            raise ValueError(f"A stage is a whole number, got {self.stage!r}.")

    @classmethod
    def parse(cls, spec: int | str | Tap | dict) -> Tap:
        """Read a tap from what people write.

        `3`, `'conv3'`, `'stage3'`, `'layer3.2.conv2'` or a Tap.
        """
        if isinstance(spec, Tap):
            return spec
        if isinstance(spec, dict):
            try:
                return cls(**spec)
            except TypeError as error:
                raise ValueError(f"{spec!r} describes no tap: {str(error).rstrip('.')}.") from error
        if isinstance(spec, str):
            text = spec.strip()
            if text.isdigit():
                return cls(stage=int(text))
            return cls(stage=text) if _STAGE_SPELLING.fullmatch(text) else cls(module=text)  # type: ignore[arg-type]
        return cls(stage=spec)

    @property
    def name(self) -> str:
        """Default name of the head at this tap.

        `stage3`, or the module path with underscores for dots.
        """
        return f"stage{self.stage}" if self.module is None else self.module.replace(".", "_")

    def to_dict(self) -> dict:
        """JSON-safe form, read back by :meth:`parse`."""
        return {k: v for k, v in vars(self).items() if v is not None and v is not False}


@dataclass(frozen=True)
class StageInfo:
    """One stage of a backbone.

    Attributes:
        stage: Stage number, 5 is the last.
        module: Path of the module whose output the stage is.
        channels: Channels of the map.
        stride: Input pixels per pixel of the map.
        index: Entry of timm's `feature_info` that the map comes from.
        pool: The map is that entry after a 2x2 max-pool (VGG, whose entries stand before each
            pool).
    """

    stage: int
    module: str
    channels: int
    stride: int
    index: int
    pool: bool = False


class TapTable(list[StageInfo]):
    """The stages of one backbone; prints as a table."""

    def __init__(self, backbone: str, rows: Sequence[StageInfo]):
        super().__init__(rows)
        self.backbone = backbone

    def __str__(self) -> str:
        cells = [("stage", "module", "channels", "stride")]
        cells += [(str(r.stage), r.module, str(r.channels), str(r.stride)) for r in self]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = []
        for row in cells:
            padded = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
            lines.append("  ".join(padded).rstrip())
        return "\n".join(lines)

    def get(self, stage: int) -> StageInfo:
        """The row of a stage number.

        A ValueError that lists the stages there are if it has none.
        """
        for row in self:
            if row.stage == stage:
                return row
        raise ValueError(
            f"{self.backbone} has no stage {stage}. Its taps are:\n{self}\n"
            "or any module path, such as " + repr(self[-1].module) + "."
        )


def stage_table(backbone: nn.Module) -> TapTable:
    """Stages of an unpruned timm model, read off its `feature_info`.

    Args:
        backbone: Model as made by `timm.create_model`.

    Returns:
        The stages from the shallowest to the last, which has number 5.

    Raises:
        ValueError: The model has no `feature_info` or no `forward_intermediates`.
    """
    name = _architecture(backbone)
    info = getattr(backbone, "feature_info", None)
    if not info or not hasattr(backbone, "forward_intermediates"):
        raise ValueError(
            f"{name} cannot be tapped by stage: it has no feature_info or no "
            "forward_intermediates. timm 1.0.31 and later have both for all their architectures."
        )
    entries = list(info)
    strides = [entry["reduction"] for entry in entries]

    def row(stage: int, index: int) -> StageInfo:
        entry = entries[index]
        return StageInfo(stage, entry["module"], entry["num_chs"], entry["reduction"], index)

    if isinstance(backbone, VGG):
        # timm's entry k-1 is conv block k before its pool; the last entry is already the pooled
        # block 5
        rows = []
        for stage, end in enumerate(backbone.feature_ends[:-1], start=1):
            entry = entries[stage - 1]
            rows.append(
                StageInfo(
                    stage,
                    f"features.{end + 1}",
                    entry["num_chs"],
                    2 * entry["reduction"],
                    stage - 1,
                    pool=True,
                )
            )
        return TapTable(name, rows[:-1] + [row(5, len(entries) - 1)])
    if len(set(strides)) >= 3 or all(a < b for a, b in zip(strides, strides[1:], strict=False)):
        first = 6 - len(entries)
        return TapTable(name, [row(first + i, i) for i in range(len(entries)) if first + i >= 0])
    # CrossViT lists its fine branch, then its coarse one: its depth is that of the latter
    first = len(entries) - backbone.num_feature_blocks if isinstance(backbone, CrossVit) else 0
    depth = len(entries) - first
    at = {1: 0} | {k: math.ceil((k - 1) * depth / 4) - 1 for k in range(2, 6)}
    return TapTable(name, [row(stage, first + index) for stage, index in at.items()])


def list_taps(model: str | nn.Module, **kwargs) -> TapTable:
    """Stages of a backbone, what one reads before choosing taps. Needs no weights and no download.

    Args:
        model: Name of a registered architecture (built on the meta device) or an unpruned timm
            model.
        **kwargs: Passed to `timm.create_model`, for example `img_size` or `output_stride`.

    Returns:
        Rows of (stage, module, channels, stride); `print` shows them as a table.

    Raises:
        ValueError: The architecture is not registered, or cannot be tapped.

    Example:
        >>> print(list_taps('resnet50'))
        stage  module  channels  stride
        1      act1    64        2
        2      layer1  256       4
        3      layer2  512       8
        4      layer3  1024      16
        5      layer4  2048      32
    """
    if isinstance(model, str):
        check_name(model)
        with torch.device("meta"):
            model = create_model(model, pretrained=False, **kwargs)
    return stage_table(model)


def check_name(name: str) -> None:
    """Refuse an architecture that timm does not know, naming the nearest that it does."""
    from timm.models import is_model, list_models, parse_model_name

    if not isinstance(name, str):
        raise ValueError(f"a model is named by a text, such as 'resnet50', got {name!r}.")
    source, name = parse_model_name(name)
    architecture, _, tag = name.partition(".")
    if source is not None:
        return
    if is_model(architecture):
        tags = list_tags(architecture) if tag else []
        if tag and tag not in tags:
            known = ", ".join(tags) or "none"
            raise ValueError(
                f"timm's {architecture} has no weights {tag!r}; those that it knows: {known}."
            )
    else:
        near = difflib.get_close_matches(name.split(".")[0], list_models(), n=5)
        raise ValueError(
            f"timm has no model {name!r}."
            + (f" Did you mean {', '.join(near)}?" if near else " timm.list_models() lists them.")
        )


def list_tags(architecture: str) -> list[str]:
    """The tags of an architecture's pretrained weights, empty if it has none."""
    from timm.models import list_pretrained

    names = list_pretrained(f"{architecture}*")
    return [name.partition(".")[2] for name in names if name.partition(".")[0] == architecture]


def find_module(backbone: nn.Module, path: str, table: TapTable) -> nn.Module:
    """The module at a path.

    A ValueError that lists the stages and the nearest paths if there is none.
    """
    modules = dict(backbone.named_modules())
    if path not in modules or not path:
        near = difflib.get_close_matches(path, modules, n=5)
        raise ValueError(
            f"{table.backbone} has no module {path!r}."
            + (f" Did you mean {', '.join(map(repr, near))}?" if near else "")
            + f" Its stages are:\n{table}"
        )
    return modules[path]


def _architecture(backbone: nn.Module) -> str:
    cfg = getattr(backbone, "pretrained_cfg", None) or {}
    return cfg.get("architecture") or type(backbone).__name__
