"""Heads.

What is attached at a tap. A head is described by a small frozen object that builds the module.
"""

from dataclasses import asdict
from typing import Any, ClassVar, Protocol, cast

from torch import nn

from timm_branches.heads.classifier import BranchClassifier, FlattenHead, PoolHead
from timm_branches.heads.decoder import RedNetHead, SkipDecoder, UNetHead
from timm_branches.heads.temporal import GRUHead, LSTMHead, TemporalClassifier

__all__ = [
    "HEADS",
    "BranchClassifier",
    "FlattenHead",
    "GRUHead",
    "Head",
    "LSTMHead",
    "PoolHead",
    "RedNetHead",
    "SkipDecoder",
    "TemporalClassifier",
    "UNetHead",
    "head_to_dict",
    "parse_head",
]


class Head(Protocol):
    """What describes a head: a frozen dataclass with a ``kind`` that builds the module for its
    taps.

    Attributes:
        kind: Its name in ``head=`` and in files.
        multi_tap: Whether it reads several taps (a decoder) or exactly one (a classifier).
        dense: Whether its output is a map of the image's size (a decoder): its module is called
            with the images too, ``module(*maps, image=x)``, and in a batch of clips with every
            frame; ``build`` is told ``in_chans``.
        temporal: Whether it reads clips: its module is called as ``module(map, clips, state)`` and
            returns its output and its new state.
    """

    kind: ClassVar[str]
    multi_tap: ClassVar[bool]
    dense: ClassVar[bool]
    temporal: ClassVar[bool]

    def build(self, *args: Any, **kwargs: Any) -> nn.Module:
        """The module that takes the taps' maps (B, C, H, W) as its arguments and returns logits.

        Its arguments are ``taps: Sequence[TapInfo]``, ``num_classes: int`` and ``drop_rate: float |
        None = None``. It has ``fc``, its last layer, ``num_classes``, and
        ``reset_classifier(num_classes)``.
        """
        ...


HEADS: dict[str, type] = {
    cls.kind: cls for cls in (PoolHead, FlattenHead, LSTMHead, GRUHead, UNetHead, RedNetHead)
}


def parse_head(spec: "str | dict | Head") -> Head:
    """Read a head from its kind (``'pool'``), the dict that :func:`head_to_dict` gives, or a head
    object.

    Raises:
        ValueError: Unknown kind or option.
    """
    if isinstance(spec, tuple(HEADS.values())):
        return cast(Head, spec)
    options = dict(spec) if isinstance(spec, dict) else {"kind": spec}
    kind = options.pop("kind", None)
    if not isinstance(kind, str) or kind not in HEADS:
        raise ValueError(
            f"Unknown head {spec!r}: write one of {', '.join(map(repr, HEADS))} or a Head object."
        )
    try:
        return HEADS[kind](**options)
    except TypeError as error:
        raise ValueError(f"head {kind!r}: {error}") from error


def head_to_dict(head: Head) -> dict:
    """JSON-safe form of a head, read back by :func:`parse_head`."""
    return {"kind": head.kind, **asdict(head)}  # type: ignore[call-overload]
