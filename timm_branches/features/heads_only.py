"""The heads of a frozen model without its backbone, fed with features that were computed before."""

import math
from collections.abc import Sequence
from typing import NamedTuple, NoReturn

import torch
from timm.layers import SelectAdaptivePool2d
from torch import nn

from timm_branches.heads import Clips
from timm_branches.model import BranchModel

__all__ = ["Feature", "HeadsOnly", "check_frozen", "feature_layout"]


class Feature(NamedTuple):
    """One part of a sample's features.

    The map at a tap, or what heads pool it to before anything else.

    Attributes:
        shape: (C, H, W); H and W are 1 where it is pooled.
        head: A head that reads it.
        position: Which of that head's taps it is.
        pool: What pools it, if anything.
    """

    shape: tuple[int, int, int]
    head: str
    position: int
    pool: nn.Module | None


def check_frozen(model: BranchModel) -> None:
    """Raise a ValueError if any part of the backbone may change in training."""
    if not isinstance(model, BranchModel):
        raise ValueError(
            f"expected a branch model, not {type(model).__name__}: take it out of DDP, compile or "
            "a task with base_model(task)."
        )
    if not model.frozen or any(p.requires_grad for p in model.backbone.parameters()):
        what = (
            "is not frozen"
            if model.frozen_stages is None or model.frozen
            else f"is frozen up to stage {model.frozen_stages} only"
        )
        raise ValueError(
            f"the backbone {what}, so that its features change in training: call model.freeze()."
        )


def feature_layout(model: BranchModel) -> tuple[dict[str, Feature], list[list[str]]]:
    """The features of a sample in the order of their names, and for each head those it reads.

    The order in which they are stored does not depend on that of the heads.

    A map that a head pools first is stored pooled: pooling its single pixel again changes nothing,
    so the head need not know. ('catavgmax' would double its channels again; there the map is
    stored.) Heads at the same tap share it.

    Raises:
        ValueError: A head is a decoder, which reads the images too.
    """
    features: dict[str, Feature] = {}
    reads: list[list[str]] = []
    for name, spec, which in zip(model.names, model.head_specs, model.head_taps, strict=True):
        if spec.dense:
            raise ValueError(
                f"head {name!r} ({spec.kind}) reads the images too: features alone do not feed it."
            )
        head = model.head(name)
        pool = getattr(head, "to_vector", None)
        if not isinstance(pool, SelectAdaptivePool2d) or pool.pool_type not in (
            "avg",
            "max",
            "avgmax",
        ):
            pool = None
        reads.append([])
        for position, i in enumerate(which):
            info = model.taps[i]
            key = f"stage {info.tap.stage}" if info.stage else f"module {info.module}"
            key += "" if pool is None else f", {pool.pool_type}"
            size = info.size if pool is None else (1, 1)
            features.setdefault(key, Feature((info.channels, *size), name, position, pool))
            reads[-1].append(key)
    return dict(sorted(features.items())), reads


class HeadsOnly(BranchModel):
    """A frozen branch model that takes its backbone's features instead of images.

    They are the input of its heads.

    It is the same model, seen from another side, not a copy: weights, names, taxonomy and mode are
    shared. So it goes into a task and through `fit` as the model does, what is trained are the
    model's heads, and `save_model` of either writes the whole model.

    Args:
        model: The frozen model.

    Shapes: features (B, F) -> `{name: (B, K)}`; of clips (B, T, F) -> what the model gives for
    clips. F features are those of :func:`timm_branches.data.cache_features`.

    Raises:
        ValueError: The backbone is not wholly frozen, or a head is a decoder, which reads the
            images too.

    Example:
        >>> from timm_branches import create_branch_model
        >>> model = create_branch_model('test_resnet', taps=[4, 5], num_classes=[2, 7])
        >>> model = model.freeze().eval()
        >>> images = torch.randn(2, 3, 64, 64)
        >>> maps = model.forward_taps(images)
        >>> features = torch.cat([y.mean((2, 3)) for y in maps.values()], 1)
        >>> torch.allclose(HeadsOnly(model)(features)['stage5'], model(images)['stage5'], atol=1e-6)
        True
    """

    def __init__(self, model: BranchModel):
        check_frozen(model)
        feature_layout(model)
        self.__dict__ = model.__dict__

    def forward(
        self,
        x: torch.Tensor,
        heads: Sequence[str] | None = None,
        lengths: torch.Tensor | Sequence[int] | None = None,
    ) -> dict[str, torch.Tensor]:
        """Logits of the heads.

        Args:
            x: Features (B, F), or of clips (B, T, F), which temporal heads need.
            heads: Names of the heads to compute, all by default.
            lengths: Valid frames of each clip, as the model takes them.

        Returns:
            What the model returns for the images.

        Raises:
            ValueError: Features of another model, lengths that do not fit, an unknown head, or a
                backbone that was unfrozen.
        """
        if not self.frozen:
            raise ValueError(
                "the backbone was unfrozen: features that were computed before are not its own "
                "any more. Train the model itself, on images."
            )
        features, reads = feature_layout(self)
        widths = [math.prod(feature.shape) for feature in features.values()]
        if x.ndim not in (2, 3) or x.shape[-1] != sum(widths):
            raise ValueError(
                f"expected features (B, {sum(widths)}), or (B, T, {sum(widths)}) of clips, which "
                f"cache_features makes for this model, got {tuple(x.shape)}."
            )
        which = self.head_indices(heads)
        clips = Clips(x, lengths) if x.ndim == 3 else None
        if clips is None:
            temporal = [self.names[i] for i in which if self.names[i] in self.temporal_heads]
            if temporal or lengths is not None:
                raise ValueError(
                    f"{f'the heads {temporal} read' if temporal else 'lengths= belongs to'} "
                    f"features of clips (B, T, {sum(widths)}), got {tuple(x.shape)}."
                )
        rows = (x if clips is None else clips.fold(x)).to(next(self.backbone.parameters()).dtype)
        maps = {
            key: part.unflatten(1, feature.shape)
            for (key, feature), part in zip(features.items(), rows.split(widths, 1), strict=True)
        }
        outputs = {}
        for i in which:
            name = self.names[i]
            inputs = [maps[key] for key in reads[i]]
            if name in self.temporal_heads:
                outputs[name], _ = self.head(name)(*inputs, clips, None)
            else:
                y = self.head(name)(*inputs)
                outputs[name] = y if clips is None else clips.unfold(y)
        return outputs

    def set_grad_checkpointing(self, enable: bool = True) -> NoReturn:
        """Refused: no backbone is run.

        Raises:
            ValueError: Always.
        """
        raise ValueError("gradient checkpointing has no effect on heads alone: no backbone is run.")
