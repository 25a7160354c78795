"""What every head must offer: the contract that the package's own heads are written to as well.

A head has two parts. Its *description* is a small frozen dataclass (a :class:`Head`) that goes into
`head=` and into files; its *module* is what the description builds for the taps and classes of one
model. `docs/extending.md` shows a head from outside in ten lines.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import nn

from timm_branches.heads.folding import Clips
from timm_branches.taps.reader import TapInfo

__all__ = [
    "HEADS",
    "Head",
    "HeadModule",
    "State",
    "TemporalHead",
    "check_module",
    "check_registered",
    "head_to_dict",
    "parse_head",
    "register_head",
]

State = tuple[torch.Tensor, ...]
"""What a temporal head hands on from frame to frame, each tensor with B in its second place."""

HEADS: dict[str, type["Head"]] = {}
"""The registered heads by their kind."""


@dataclass(frozen=True)
class Head:
    """The description of a head: a frozen dataclass whose fields are its options.

    A subclass sets `kind`, gives its options as fields that JSON can hold, and implements
    :meth:`build`. It says by the other class attributes how its module is called.

    Attributes:
        kind: Its name in `head=` and in files.
        multi_tap: Whether it reads several taps (a decoder) or exactly one (a classifier).
        dense: Whether its output is a map of the image's size (a decoder). Its module is called
            with the images too, `module(*maps, image=x)`, and in a batch of clips with every frame.
        temporal: Whether it reads clips. Its module is a :class:`TemporalHead`.

    Example:
        >>> from timm_branches.heads import PoolHead
        >>> isinstance(PoolHead(), Head)
        True
    """

    kind: ClassVar[str] = ""
    multi_tap: ClassVar[bool] = False
    dense: ClassVar[bool] = False
    temporal: ClassVar[bool] = False

    def build(
        self,
        taps: Sequence[TapInfo],
        num_classes: int,
        drop_rate: float | None = None,
        in_chans: int = 3,
    ) -> nn.Module:
        """The module that takes the taps' maps (B, C, H, W) and returns logits.

        Args:
            taps: The taps it reads, each with its channels, size and stride.
            num_classes: Classes; 0 leaves the features that the last layer would read.
            drop_rate: The model's dropout, for a head that does not set its own.
            in_chans: Channels of the images.

        Returns:
            A :class:`HeadModule`; a :class:`TemporalHead` where `temporal` is set.
        """
        raise NotImplementedError(f"{type(self).__name__} does not implement build().")

    def to_dict(self) -> dict[str, Any]:
        """The kind and the options as JSON holds them; :func:`parse_head` is the inverse."""
        return {"kind": self.kind, **asdict(self)}


class HeadModule(Protocol):
    """What the module of any head offers beside `forward`.

    A classifier may have `to_vector` as well, the module that turns its map (B, C, H, W) into a
    vector (B, D): if that is timm's global pooling, features of a frozen backbone are kept pooled.

    Attributes:
        fc: Its last layer.
        num_classes: Classes of that layer.
    """

    fc: nn.Module
    num_classes: int

    def reset_classifier(self, num_classes: int) -> None:
        """A new last layer for other classes; 0 leaves the features."""


class TemporalHead(Protocol):
    """What the module of a temporal head offers.

    Attributes:
        fc: As in :class:`HeadModule`.
        num_classes: As in :class:`HeadModule`.
        to_vector: The module that turns the maps (N, C, H, W) of all frames into vectors (N, D),
            and is called once in a forward pass. The gradient at each frame is measured behind it.
    """

    fc: nn.Module
    num_classes: int
    to_vector: nn.Module

    def reset_classifier(self, num_classes: int) -> None:
        """As in :class:`HeadModule`."""

    def forward(
        self, x: torch.Tensor, clips: Clips, state: State | None = None
    ) -> tuple[torch.Tensor, State]:
        """Logits (B, K) or (B, T, K) for clips, and the state after their last frames.

        Args:
            x: Maps (N, C, H, W) of the clips' valid frames; `clips.unfold` makes (B, T, ...) of
                (N, ...), and `clips.blank` sets to 0 what is behind a clip's length.
            clips: How the frames make up the clips.
            state: What to go on from, None at the beginning.
        """

    def check_stream(self, name: str, batch_size: int, state: State | None = None) -> None:
        """Raise a ValueError if the head `name` cannot go on from a state, or not from this one."""

    def zero_state(self, batch_size: int) -> State:
        """The state before the first frame; a head that cannot stream may return ()."""


_H = TypeVar("_H", bound=type[Head])


def register_head(cls: _H) -> _H:
    """Make a head known by its kind, for `head='kind'` and for loading files. Use as a decorator.

    Args:
        cls: A frozen dataclass that derives from :class:`Head`.

    Returns:
        The class.

    Raises:
        ValueError: It is no such class, has no kind, or another head has its kind already.

    Example:
        >>> @register_head
        ... @dataclass(frozen=True)
        ... class Mine(Head):
        ...     kind = 'doctest-mine'
        >>> HEADS.pop('doctest-mine') is Mine
        True
    """
    if not (isinstance(cls, type) and issubclass(cls, Head) and is_dataclass(cls)):
        raise ValueError(
            f"register_head takes a frozen dataclass that derives from Head, got {cls!r}."
        )
    if not isinstance(cls.kind, str) or not cls.kind:
        raise ValueError(f"{cls.__name__} has no name: give it a class attribute kind = '...'.")
    reserved = {field.name for field in fields(cls)} & {"kind", "module"}
    if reserved:
        raise ValueError(
            f"{cls.__name__} has an option {min(reserved)!r}, a name that files need for "
            "themselves: call it otherwise."
        )
    known = HEADS.get(cls.kind)
    # a module that is imported again (a notebook's cell, a reload) may replace its own head
    if known is not None and _place(known) != _place(cls):
        raise ValueError(
            f"the head kind {cls.kind!r} is taken by {_place(known)}: choose another kind for "
            f"{_place(cls)}."
        )
    HEADS[cls.kind] = cls
    return cls


def _place(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def parse_head(spec: str | dict | Head) -> Head:
    """Read a head from its kind (`'pool'`), from what :func:`head_to_dict` gives, or a Head itself.

    Raises:
        ValueError: Unknown kind or option, or a head from outside that is not registered.
    """
    if isinstance(spec, Head):
        return spec
    options = dict(spec) if isinstance(spec, dict) else {"kind": spec}
    kind = options.pop("kind", None)
    module = options.pop("module", None)
    if not isinstance(kind, str) or kind not in HEADS:
        raise ValueError(_unknown(spec, kind, module))
    try:
        return HEADS[kind](**options)
    except TypeError as error:
        raise ValueError(f"The head {kind!r} cannot be made: {str(error).rstrip('.')}.") from error


def _unknown(spec: Any, kind: Any, module: Any) -> str:
    if isinstance(module, str):
        remedy = f"import {module}, which registers it"
        if module == "__main__":
            remedy = "run the definition with @register_head first; it stood in the script itself"
        return (
            f"The head {kind!r} comes from outside timm_branches and is not registered: {remedy}."
        )
    known = ", ".join(map(repr, sorted(HEADS)))
    hint = ""
    if callable(getattr(spec, "build", None)):
        hint = f" ({type(spec).__name__} has build(), but does not derive from timm_branches.Head)"
    return f"Unknown head {spec!r}{hint}: write one of {known} or a Head object."


def head_to_dict(head: Head) -> dict[str, Any]:
    """A head as JSON holds it, read back by :func:`parse_head`.

    One from outside names the module to import, so that a file can say what is missing.
    """
    options = head.to_dict()
    module = type(head).__module__
    if not module.startswith("timm_branches."):
        options["module"] = module
    return options


def check_registered(head: dict[str, Any]) -> None:
    """Refuse to write a head that nobody could read again.

    Raises:
        ValueError: Its kind is not registered.
    """
    if head["kind"] not in HEADS:
        raise ValueError(
            f"The head {head['kind']!r} is not registered, so no file with it could be loaded: put "
            "@register_head above its class."
        )


def check_module(head: Head, module: nn.Module) -> None:
    """Compare what a head built with the contract.

    Raises:
        TypeError: Something is missing; it is named.
    """
    contract: Any = TemporalHead if head.temporal else HeadModule
    # not isinstance(): from Python 3.12 on it looks past nn.Module's own way to find submodules
    names = {*getattr(contract, "__annotations__", ()), "reset_classifier"}
    if head.temporal:
        names |= {"check_stream", "zero_state"}
    missing = sorted(name for name in names if not hasattr(module, name))
    if not missing:
        return
    raise TypeError(
        f"{type(head).__name__}.build() returned a {type(module).__name__} without "
        f"{', '.join(missing)}: {contract.__name__} in timm_branches.heads says what is needed."
    )
