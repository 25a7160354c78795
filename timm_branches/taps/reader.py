"""Reading several taps in one pass of a backbone that is cut down to what the taps need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from timm_branches.taps.layout import Layout, as_map, recognise_layout
from timm_branches.taps.notation import StageInfo, Tap, find_module, stage_table
from timm_branches.taps.pruning import dry_run, remove_unused_modules, unused_parameters

__all__ = ["TapInfo", "TapReader"]


@dataclass(frozen=True)
class TapInfo:
    """A resolved tap.

    Attributes:
        tap: The tap as it was asked for.
        module: Path of the module whose output it is.
        channels: Channels C of the map (B, C, H, W).
        size: Height and width of the map at the model's nominal input size.
        stride: Input pixels per pixel of the map.
        stage: The stage, None for a module path.
    """

    tap: Tap
    module: str
    channels: int = 0
    size: tuple[int, int] = (0, 0)
    stride: int = 0
    stage: StageInfo | None = None


class _LastTapReached(Exception):
    """Ends the pass at the last module that is tapped: nothing behind it is needed."""


class _Capture:
    """Forward hook that keeps a module's output while a pass is being read.

    A class, so that deepcopy follows it.
    """

    def __init__(self, reader: TapReader, key: str):
        self.reader, self.key = reader, key

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        reader = self.reader
        # no pass is being read: someone runs the backbone alone, or checkpointing computes it again
        if reader.captured is None or self.key not in reader.wanted:
            return
        # after the construction a pass that does not end at the last tap may run what was emptied,
        # in place
        copy = self.key in reader.copied or (reader.to_stage_end and reader.versions is None)
        reader.captured[self.key] = output.clone() if copy else output
        if reader.versions is not None:
            reader.versions[self.key] = output._version if isinstance(output, torch.Tensor) else 0
            reader.calls[self.key] = reader.calls.get(self.key, 0) + 1
        if self.key == reader.last:
            raise _LastTapReached


class TapReader:
    """Runs a backbone once, only as deep as needed, and returns its maps at the taps as NCHW.

    Stages are read with timm's `forward_intermediates`, module paths with forward hooks.
    Construction prunes
    the backbone in place: what lies behind the last tap goes, the classifier included.

    Args:
        backbone: Unpruned timm model.
        taps: Taps in the order in which their maps shall be returned.
        input_size: Nominal input (C, H, W), for the sizes of the maps.

    Raises:
        ValueError: A tap does not exist, is not a map, or is left without a pixel at this input
            size.
    """

    def __init__(self, backbone: nn.Module, taps: Sequence[Tap], input_size: tuple[int, int, int]):
        self.input_size = input_size
        self.captured: dict[str, torch.Tensor] | None = None
        self.versions: dict[str, int] | None = None
        self.wanted: frozenset[str] = frozenset()
        self.hookable: set[str] = set()  # modules that return the map of their stage
        # tensors that the network overwrites later, in place
        self.copied: frozenset[str] = frozenset()
        self.last: str | None = None
        # whether the pass runs on from the last tapped module to the end of its stage
        self.to_stage_end = False
        self.raw: dict[str, Layout] = {}  # how hooked modules give their map
        self.order: dict[str, int] = {}  # in which the hooked modules are run
        self.calls: dict[str, int] = {}  # how often each of them is run in a pass
        # timm's entry that is computed when a hooked module is run
        self.within: dict[str, int] = {}
        self.table = stage_table(backbone)
        self.architecture = self.table.backbone
        self.depth = len(list(backbone.feature_info))  # type: ignore[arg-type]
        self.taps: list[TapInfo] = []
        for tap in taps:
            if tap.module is None:
                stage = self.table.get(tap.stage)  # type: ignore[arg-type]
                self.taps.append(TapInfo(tap, stage.module, stage=stage))
            else:
                find_module(backbone, tap.module, self.table)
                self.taps.append(TapInfo(tap, tap.module))
        try:
            self._hook(backbone)
            self._prune(backbone)
        except (RuntimeError, AssertionError, IndexError) as error:
            self.captured = self.versions = None
            raise ValueError(self.explain(backbone, input_size) or str(error)) from error
        self._measure(backbone)

    # -- reading

    def read(
        self, backbone: nn.Module, x: torch.Tensor, which: Sequence[int] | None = None
    ) -> list[torch.Tensor]:
        """Maps (B, C, H, W) of the taps numbered `which` for images x (B, C, H, W).

        All taps by default.
        """
        numbers = range(len(self.taps)) if which is None else which
        infos = [self.taps[number] for number in numbers]
        if self._hooks_only(infos):
            outputs = self._run_hooks(backbone, x, infos)
        else:
            outputs = self._run_stages(backbone, x, infos)
        maps = []
        for info, y in zip(infos, outputs, strict=True):
            # timm's loop gives stages as maps; where the pass ended at a hook, they are raw, too
            if self.last is not None or info.stage is None:
                y = as_map(y, self.raw[info.module], x)
            maps.append(self._finish(info, y))
        return maps

    def _hooks_only(self, infos: Sequence[TapInfo]) -> bool:
        """Whether the last of these taps is a module inside a stage.

        timm's loop does not get to return then.
        """
        deepest_stage = -1
        deepest_module = -1
        for info in infos:
            if info.stage is None:
                deepest_module = max(deepest_module, self.within[info.module])
            else:
                deepest_stage = max(deepest_stage, info.stage.index)
        return deepest_module > deepest_stage

    def _run_stages(
        self, backbone: nn.Module, x: torch.Tensor, infos: Sequence[TapInfo]
    ) -> list[torch.Tensor]:
        """One call of timm's forward_intermediates gives the stages.

        Hooks on modules fire on the way.
        """
        indices = sorted({info.stage.index for info in infos if info.stage is not None})
        self.wanted = frozenset(info.module for info in infos if info.stage is None)
        self.last, self.to_stage_end, self.captured = None, False, {}
        maps = backbone.forward_intermediates(  # type: ignore[operator]
            x, indices=indices, stop_early=True, output_fmt="NCHW", intermediates_only=True
        )
        return self._outputs(infos, dict(zip(indices, maps, strict=True)))

    def _run_hooks(
        self, backbone: nn.Module, x: torch.Tensor, infos: Sequence[TapInfo]
    ) -> list[torch.Tensor]:
        """What the taps' hooks caught; the last tap is a module inside a stage.

        The pass ends there, if hooks can give all that stands before it.

        Else (the map of a ViT's stage is not what any module returns) timm's loop runs to the end
        of that stage.
        """
        modules = [info for info in infos if info.stage is None]
        stages = [info for info in infos if info.stage is not None]
        hooked = all(info.module in self.hookable for info in stages)
        wanted = infos if hooked else modules
        self.wanted = frozenset(info.module for info in wanted)
        self.last = self._last_run(infos) if hooked else None
        self.to_stage_end = not hooked
        self.captured = {}
        by_index: dict[int, torch.Tensor] = {}
        bound = max(self.within[info.module] for info in modules)
        indices = {min(bound, self.depth - 1)}
        indices |= {info.stage.index for info in stages if info.stage is not None}
        # a module behind timm's stages runs only where the whole network does
        stops_early = bound < self.depth
        try:
            result = backbone.forward_intermediates(  # type: ignore[operator]
                x,
                indices=sorted(indices),
                stop_early=stops_early,
                output_fmt="NCHW",
                intermediates_only=stops_early,
            )
            maps = result if stops_early else result[1]
            by_index = dict(zip(sorted(indices), maps, strict=True))
        except _LastTapReached:
            pass
        if hooked and any(info.module not in self.captured for info in stages):
            self.hookable.clear()  # checkpointing runs the members of a stage, not the stage
            return self._run_hooks(backbone, x, infos)
        return self._outputs(infos, by_index)

    def _last_run(self, infos: Sequence[TapInfo]) -> str:
        """The tapped module that a pass comes to last; a loop, since compilers know no `key=`."""
        last = infos[0].module
        for info in infos:
            if self.order[info.module] > self.order[last]:
                last = info.module
        return last

    def _outputs(
        self, infos: Sequence[TapInfo], by_index: Mapping[int, torch.Tensor]
    ) -> list[torch.Tensor]:
        """Each tap's output: what its hook caught, or what timm's loop gave of its stage."""
        captured = self._captured()
        hooked = self.last is not None
        outputs = []
        for info in infos:
            if hooked or info.stage is None:
                outputs.append(captured[info.module])
            else:
                outputs.append(by_index[info.stage.index])
        return outputs

    def _captured(self) -> dict[str, torch.Tensor]:
        """What hooks kept in this pass, which must be all that was wanted."""
        captured, self.captured = self.captured or {}, None
        for path in self.wanted:
            if path not in captured:
                raise ValueError(
                    f"{path!r} was not run as a module in this pass (gradient checkpointing runs "
                    "the members of a stage one by one); tap the stage by its number, or its last "
                    "member."
                )
        return captured

    def _run(self, backbone: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
        """Raw outputs of all taps."""
        run = self._run_hooks if self._hooks_only(self.taps) else self._run_stages
        return run(backbone, x, self.taps)

    def _finish(self, info: TapInfo, y: torch.Tensor) -> torch.Tensor:
        if info.stage is not None and info.stage.pool:
            y = F.max_pool2d(y, 2)
        return y.detach() if info.tap.detach else y

    # -- construction

    def _hook(self, backbone: nn.Module) -> None:
        """Hook the tapped modules.

        Find their order, layouts, and which timm entry's computation they are within.
        """
        paths = {info.module for info in self.taps if info.stage is None}
        if not paths:
            return
        modules = dict(backbone.named_modules())
        for key, path in sorted(
            {(info.module, _hooked_path(info, backbone)) for info in self.taps}
        ):
            if path in modules:
                modules[path].register_forward_hook(_Capture(self, key))
        self.wanted = frozenset(info.module for info in self.taps)
        self.captured, self.versions = {}, {}
        indices = sorted({info.stage.index for info in self.taps if info.stage} | {self.depth - 1})

        def features(model: Any, x: torch.Tensor) -> Any:
            return model.forward_intermediates(x, indices=indices, output_fmt="NCHW")

        _, maps = dry_run(backbone, self.input_size, features)
        captured, self.captured, self.versions = self.captured, None, None
        self.order = {path: number for number, path in enumerate(captured)}
        for info in self.taps:
            output = captured.get(info.module)
            if info.stage is None:
                self._check_module(info.module, captured)
                self.raw[info.module] = recognise_layout(
                    output, self.input_size, backbone, info.module
                )
                continue
            expected = maps[indices.index(info.stage.index)]
            if self._is_hookable(output, expected, info, backbone):
                self.hookable.add(info.module)
        self._find_within(backbone, paths)

    def _check_module(self, path: str, captured: Mapping[str, Any]) -> None:
        """Refuse a module that does not run just once when features are computed."""
        if path not in captured:
            raise ValueError(
                f"{self.architecture}: {path!r} is not run as a module when features are computed "
                "(it belongs to the classifier, or is called in another way); tap another "
                f"module.\n{self.table}"
            )
        if self.calls[path] > 1:
            raise ValueError(
                f"{self.architecture}: {path!r} is run {self.calls[path]} times in one pass: which "
                f"of its maps is meant is not clear; tap another module.\n{self.table}"
            )

    def _is_hookable(
        self, y: Any, expected: torch.Tensor, info: TapInfo, backbone: nn.Module
    ) -> bool:
        """Whether the module of a stage returns that stage's map.

        The same memory, read in the same order.
        """
        if self.calls.get(info.module) != 1:
            return False
        try:
            self.raw[info.module] = layout = recognise_layout(
                y, self.input_size, backbone, info.module
            )
        except ValueError:
            return False
        y = as_map(y, layout, torch.empty(2, *self.input_size, device="meta"))
        return (
            y.untyped_storage()._cdata == expected.untyped_storage()._cdata
            and y.shape == expected.shape
            and y.stride() == expected.stride()
            and y.storage_offset() == expected.storage_offset()
        )

    def _find_within(self, backbone: nn.Module, paths: set[str]) -> None:
        """For each tapped module the first of timm's entries whose computation runs it.

        `depth` if none does.
        """
        run_until: dict[int, set[str]] = {}
        for path in paths:
            # by bisection: a pass that stops later runs all that an earlier one does
            low, high = 0, self.depth
            while low < high:
                stop = (low + high) // 2
                if stop not in run_until:
                    run_until[stop] = self._modules_run_until(backbone, stop)
                if path in run_until[stop]:
                    high = stop
                else:
                    low = stop + 1
            self.within[path] = low

    def _modules_run_until(self, backbone: nn.Module, stop: int) -> set[str]:
        """The hooked modules that run in a pass that ends with timm's entry `stop`."""

        def features(model: Any, x: torch.Tensor) -> Any:
            return model.forward_intermediates(
                x, indices=[stop], stop_early=True, output_fmt="NCHW", intermediates_only=True
            )

        self.captured = {}
        dry_run(backbone, self.input_size, features)
        modules, self.captured = set(self.captured), None
        return modules

    def _prune(self, backbone: nn.Module) -> None:
        """Remove what no tap needs.

        timm cuts behind the last stage, autograd tells of everything else.
        """
        # else timm might cut a tapped module (the pool behind a stem)
        if all(info.stage for info in self.taps):
            indices = sorted({info.stage.index for info in self.taps if info.stage})
            backbone.prune_intermediate_layers(indices, prune_norm=True, prune_head=True)  # type: ignore[operator]
        unused = unused_parameters(backbone, self.input_size, self._run)
        removed = remove_unused_modules(backbone, unused)
        if removed:
            try:
                dry_run(backbone, self.input_size, self._run)
            # the forward pass does need one of them, if only for an attribute: put them back
            except Exception:
                for parent, name, module in removed:
                    setattr(parent, name, module)
        self.copied = self._written_over(backbone)
        # what only detached taps read is run but not trained
        if any(info.tap.detach for info in self.taps):
            unused = unused_parameters(backbone, self.input_size, self.read)
        for name, parameter in backbone.named_parameters():
            # a single tensor that cannot be cut out (a mask token, say) must not be trained
            if name in unused:
                parameter.requires_grad_(False)

    def _written_over(self, backbone: nn.Module) -> frozenset[str]:
        """Modules whose output a later one changes in place: a hook must keep a copy of it."""
        versions: dict[str, int] = {}
        self.versions = versions
        outputs = dry_run(backbone, self.input_size, self._run)
        self.versions = None
        changed = set()
        for info, y in zip(self.taps, outputs, strict=True):
            if info.module in versions and y._version > versions[info.module]:
                changed.add(info.module)
        return frozenset(changed)

    def resize(self, backbone: nn.Module, input_size: tuple[int, int, int]) -> None:
        """Measure the taps at another nominal input (C, H, W).

        Raises:
            ValueError: A map cannot be computed at this size; it is named.
        """
        self.input_size = input_size
        self._measure(backbone)

    def _measure(self, backbone: nn.Module) -> None:
        """Channels and size of each map at the nominal input size."""
        try:
            maps = dry_run(backbone, self.input_size, self.read)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(self.explain(backbone, self.input_size) or str(error)) from error
        for i, (info, y) in enumerate(zip(list(self.taps), maps, strict=True)):
            height, width = int(y.shape[2]), int(y.shape[3])
            if min(height, width) < 1:
                raise ValueError(self.explain(backbone, self.input_size))
            if info.stage is not None:
                stride = info.stage.stride
            else:
                stride = max(1, round(self.input_size[1] / height))
            self.taps[i] = replace(
                info, channels=int(y.shape[1]), size=(height, width), stride=stride
            )

    def explain(self, backbone: nn.Module, shape: Sequence[int]) -> str | None:
        """Why images (C, H, W) of this shape cannot be read.

        A sentence that names the tap; None if they can.
        """

        def stride(i: int) -> int:
            stage = self.taps[i].stage
            return stage.stride if stage else 0

        for i in sorted(range(len(self.taps)), key=stride):
            info = self.taps[i]
            try:
                (y,) = dry_run(backbone, shape, lambda m, x, i=i: self.read(m, x, [i]))
                if min(y.shape[-2:]) < 1:
                    raise RuntimeError("the map has no pixel left.")
            except Exception as error:
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                return (
                    f"tap {info.tap.name!r} ({info.module}) of {self.architecture} cannot be "
                    f"computed for input {_text(shape)}: {reason.rstrip('.')}. The model was made "
                    f"for input {_text(self.input_size)}; give images that fit, a shallower tap, "
                    "or img_size=."
                )
            finally:
                self.captured = None
        return None


def _text(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _hooked_path(info: TapInfo, backbone: nn.Module) -> str:
    """The module to hook for a tap: for VGG's pooled stages timm's entry, one before the pool.

    For a Sequential it is the last member, because gradient checkpointing runs the members and not
    the whole.
    """
    path = info.module
    if info.stage is not None and info.stage.pool:
        path = list(backbone.feature_info)[info.stage.index]["module"]  # type: ignore[arg-type]
    module = dict(backbone.named_modules()).get(path)
    while (
        module is not None
        and type(module).forward is nn.Sequential.forward
        and len(module._modules)
    ):
        name, module = list(module._modules.items())[-1]
        path = f"{path}.{name}"
    return path
