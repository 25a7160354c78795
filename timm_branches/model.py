"""The branch model: one timm backbone, several heads at its taps.

The way of images or clips through `BranchModel`:

1. `forward`, `forward_stream`: which heads are wanted.
2. `_compute`: clips become frames, images for decoders are padded (`align`).
3. `_head_maps`: which taps these heads read; long clips in several passes.
4. `_maps`: the shape is checked, and what the backbone refuses is explained.
5. `TapReader.read`: the backbone runs as deep as the deepest of these taps.
6. `_compute` again: each head answers, padding is cut off, `_by_name` names the answers.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from itertools import accumulate, chain, pairwise
from typing import Any

import torch
from timm.models import group_modules, group_parameters
from timm.models._features import feature_take_indices
from torch import nn

from timm_branches.arguments import as_items, check_number
from timm_branches.heads import Head, State, check_module
from timm_branches.heads.alignment import common_multiple, crop_to, pad_to_multiple
from timm_branches.heads.folding import read_clips, warn_of_batch_statistics
from timm_branches.hub import HubModel
from timm_branches.taps.freezing import FreezableBackbone
from timm_branches.taps.notation import Tap
from timm_branches.taps.reader import TapInfo, TapReader, dry_run
from timm_branches.taxonomy import Taxonomy

__all__ = ["BranchModel", "ModelConfig"]


class ModelConfig(dict):
    """The arguments that rebuild a model, as `create_branch_model` takes them.

    A dict with the two methods that trainers and loggers call on a model's `config`.

    Example:
        >>> ModelConfig(model_name='resnet18', taxonomy=Taxonomy(['a/b', 'a/c'])).to_dict().keys()
        dict_keys(['model_name', 'taxonomy'])
    """

    def to_dict(self) -> dict[str, Any]:
        """A plain dict; the tree in it is one, too."""
        arguments = dict(self)
        if arguments.get("taxonomy") is not None:
            arguments["taxonomy"] = arguments["taxonomy"].to_dict()
        return arguments

    def to_json_string(self) -> str:
        """As JSON, for people to read: options that JSON cannot hold (classes) are described."""
        return json.dumps(self.to_dict(), indent=2, default=repr) + "\n"


class BranchModel(FreezableBackbone, HubModel):
    """Heads at taps of a timm backbone, all fed by one pass of it. Made by `create_branch_model`.

    Args:
        backbone: Unpruned timm model; it is pruned in place to what the taps need.
        taps: For each head the taps it reads: one, but for heads that read several.
        heads: The heads.
        num_classes: Classes of each head.
        names: Name of each head.
        input_size: Nominal input (C, H, W).
        drop_rate: Dropout of heads that do not set their own.
        taxonomy: The label hierarchy of the heads, if there is one.

    Shapes: images (B, C, H, W) -> `{name: (B, K)}` in tap order. Clips (B, T, C, H, W) -> what
        temporal heads say, (B, K) or (B, T, K), and (B, T, K) for the others.

    Attributes:
        names: Names of the heads in tap order.
        taps: Resolved taps (module, channels, size, stride) of all heads, one after the other.
        temporal_heads: Names of the heads that read clips.
        dense_heads: Names of the heads that answer with maps.
        head_taps: For each head its taps, as positions in `taps`.
        taxonomy: The label hierarchy or None; the first heads are its levels, or a lone decoder
            gives them all.
        config: What rebuilds the model, as `create_branch_model` takes it, a :class:`ModelConfig`.
        extra: Facts that its file keeps beside it, JSON-safe, such as the classes of masks, their
            colours, and which frames of a clip are looked at.
        data_summary: What was understood of the data that it was trained on, JSON-safe; kept in
            its file.
        calibration: A temperature and thresholds for answers that keep a promise, see
            :func:`timm_branches.train.calibrate`; kept in its file.
        frames_per_pass: Frames of a clip that go through the backbone at once; None, the default,
            takes all. It bounds memory and changes results only where BatchNorm takes its
            statistics from a batch.
        pretrained_cfg: The backbone's, with names of layers prefixed by `backbone.`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        taps: Sequence[Sequence[Tap]],
        heads: Sequence[Head],
        num_classes: Sequence[int],
        names: Sequence[str],
        input_size: tuple[int, int, int],
        drop_rate: float | None = None,
        taxonomy: Taxonomy | None = None,
    ):
        super().__init__()
        self.reader = TapReader(backbone, list(chain.from_iterable(taps)), input_size)
        starts = [0, *accumulate(map(len, taps))]
        self.head_taps = tuple(tuple(range(a, b)) for a, b in pairwise(starts))
        self.backbone = backbone
        self.names = tuple(names)
        self.taxonomy = taxonomy
        self.input_size = tuple(input_size)
        self.drop_rate = drop_rate
        self.config = ModelConfig()
        self.data_summary: dict[str, Any] | None = None
        self.extra: dict[str, Any] = {}
        self.calibration: dict[str, Any] | None = None
        self._keys = {name: module_key(name) for name in self.names}
        self.heads = nn.ModuleDict()
        self._multiples: list[int] = []  # for each head what the size of its images is padded to
        for name, head, which, classes in zip(
            self.names, heads, self.head_taps, num_classes, strict=True
        ):
            taps_read = [self.taps[i] for i in which]
            multiple = 1
            if head.dense:
                multiple, taps_read = self._aligned_taps(backbone, taps_read, which)
            self._multiples.append(multiple)
            module = head.build(taps_read, classes, drop_rate, in_chans=self.input_size[0])
            check_module(head, module)
            self.heads[self._keys[name]] = module
        self.head_specs = tuple(heads)
        specs = list(zip(self.names, heads, strict=True))
        self.temporal_heads = tuple(name for name, head in specs if head.temporal)
        self.dense_heads = tuple(name for name, head in specs if head.dense)
        self._shared = answers_all_levels(heads, taxonomy)
        self.frames_per_pass: int | None = None
        self._init_freezing()
        self.pretrained_cfg = self._prefixed_cfg()

    def _aligned_taps(
        self, backbone: nn.Module, taps: list[TapInfo], which: Sequence[int]
    ) -> tuple[int, list[TapInfo]]:
        """What images for a decoder are padded to, and its taps as they are measured then."""
        deepest = max((tap.stage.index for tap in taps if tap.stage), default=-1)
        strides: list[float] = [tap.stride for tap in taps]
        strides += [stage.stride for stage in self.reader.table if stage.index <= deepest]
        multiple = common_multiple(strides)
        channels, *size = self.input_size
        padded = [side + -side % multiple for side in size]
        if padded == size:
            return multiple, taps
        # the nominal size does not fit: a backbone bound to it cannot be given another
        if self.reader.explain(backbone, (channels, *padded)) is not None:
            return 1, taps
        maps = dry_run(
            backbone, (channels, *padded), lambda model, x: self.reader.read(model, x, which)
        )
        self.reader.captured = None
        sizes = [(y.shape[-2], y.shape[-1]) for y in maps]
        return multiple, [replace(tap, size=s) for tap, s in zip(taps, sizes, strict=True)]

    # -- forward

    @property
    def taps(self):
        """The resolved taps of all heads, one after the other."""
        return tuple(self.reader.taps)

    def forward(
        self,
        x: torch.Tensor,
        heads: Sequence[str] | None = None,
        lengths: torch.Tensor | Sequence[int] | None = None,
    ) -> dict[str, torch.Tensor]:
        """Logits of the heads.

        Args:
            x: Images (B, C, H, W), or clips (B, T, C, H, W), which temporal heads need.
            heads: Names of the heads to compute, all by default. The backbone runs only as deep as
                they need.
            lengths: Valid frames of each clip, (B,) whole numbers from 1 to T, or a mask (B, T)
                that is true for them. What is behind them changes nothing: it does not go through
                the backbone.

        Returns:
            Logits by name, in tap order. They are (B, K); for clips (B, T, K), or (B, K) from
            a temporal head with `output='clip'`. Frames behind a clip's length have zeros.
            Decoders give maps (B, K, H, W) of the images' size, with deep supervision in training
            those of their other stages too, as `name_aux1` and so on. A decoder that is the only
            head of a model with a taxonomy gives a map for each level, by the level's name.

        Raises:
            ValueError: Images that the backbone or a head cannot take, lengths that do not fit, or
                an unknown head.
        """
        return self._compute(x, self.head_indices(heads), lengths)[0]

    def forward_stream(
        self,
        clips: torch.Tensor,
        state: dict[str, State] | None = None,
        heads: Sequence[str] | None = None,
    ) -> tuple[dict[str, torch.Tensor], dict[str, State]]:
        """Logits of the heads for the next frames of a video, and the state to go on from.

        Frame by frame, in chunks or at once: the results are the same up to rounding. Answers of
        `output='clip'` are those for all frames so far.

        Args:
            clips: The next frames (B, T, C, H, W).
            state: What the call before returned; None at the beginning.
            heads: As in :meth:`forward`.

        Returns:
            The logits as :meth:`forward` gives them, and for each temporal head its state: hidden
            state (layers, B, hidden_size), for an LSTM the cell state beside it.

        Raises:
            ValueError: A head that cannot go on from a state, a state of other heads or another
                batch.

        Example: truncated backpropagation through time, over a video that is too long for one graph

            >>> from timm_branches import create_branch_model
            >>> from timm_branches.inference import detach_state
            >>> head = {'kind': 'lstm', 'output': 'frame'}
            >>> model = create_branch_model('test_resnet', head=head, num_classes=3)
            >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
            >>> video, labels = torch.randn(2, 6, 3, 32, 32), torch.randint(3, (2, 6))
            >>> state = None
            >>> for chunk, target in zip(video.split(3, dim=1), labels.split(3, dim=1)):
            ...     outputs, state = model.forward_stream(chunk, state)
            ...     logits = outputs['stage5'].flatten(0, 1)  # (B * T, K)
            ...     loss = torch.nn.functional.cross_entropy(logits, target.flatten())
            ...     optimizer.zero_grad()
            ...     loss.backward()
            ...     optimizer.step()
            ...     state = detach_state(state)       # the values go on, the graph ends here
        """
        which = self.head_indices(heads)
        temporal = [self.names[i] for i in which if self.names[i] in self.temporal_heads]
        if clips.ndim != 5 or not temporal:
            raise ValueError(
                f"forward_stream takes clips (B, T, C, H, W) and needs a temporal head; got "
                f"{tuple(clips.shape)} for the heads {[self.names[i] for i in which]}."
            )
        if state is not None and set(state) != set(temporal):
            raise ValueError(
                f"the state is that of the heads {sorted(state)}, these are {sorted(temporal)}."
            )
        for name in temporal:
            self.head(name).check_stream(name, clips.shape[0], state and state[name])  # type: ignore[operator]
        return self._compute(clips, which, state=state)

    def _compute(
        self,
        x: torch.Tensor,
        which: Sequence[int],
        lengths: Any = None,
        state: dict[str, State] | None = None,
    ) -> tuple[dict[str, torch.Tensor], dict[str, State]]:
        """Outputs of these heads for images or clips, and the new states of the temporal ones."""
        chosen = [self.names[i] for i in which]
        temporal = set(chosen) & set(self.temporal_heads)
        clips = read_clips(x, lengths, self.input_size[0], temporal)
        frames = x if clips is None else clips.fold(x)  # (N, C, H, W)
        per_pass = None if clips is None else self.frames_per_pass
        aligned = self.align(frames, which)  # what decoders read
        maps_of = self._maps_for_heads(frames, aligned, which, per_pass)
        outputs: dict[str, torch.Tensor] = {}
        states: dict[str, State] = {}
        for name in chosen:
            head, maps = self.head(name), maps_of[name]
            if name in self.temporal_heads:
                outputs[name], states[name] = head(*maps, clips, state and state[name])
                continue
            if name in self.dense_heads:
                y = head(*maps, image=aligned)
                if aligned is not frames:
                    y = crop_to(y, frames.shape[2:])
            else:
                y = head(*maps)
            for key, value in self._by_name(name, y).items():
                outputs[key] = value if clips is None else clips.unfold(value)
        return outputs, states

    def _maps_for_heads(
        self,
        frames: torch.Tensor,
        aligned: torch.Tensor,
        which: Sequence[int],
        per_pass: int | None,
    ) -> dict[str, list[torch.Tensor]]:
        """The maps of each of these heads, of padded images for decoders alone."""
        if aligned is frames:
            return self.head_maps(frames, which, per_pass)
        # the padding must not change what the other heads say
        dense = [i for i in which if self.names[i] in self.dense_heads]
        others = [i for i in which if i not in dense]
        maps_of = self.head_maps(aligned, dense, per_pass)
        if others:
            maps_of |= self.head_maps(frames, others, per_pass)
        return maps_of

    def _by_name(
        self, head: str, y: torch.Tensor | dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """A head's answers by name.

        One a level where a decoder speaks for all, several with deep supervision.
        """
        outputs: dict[str, torch.Tensor] = {}
        stages = y if isinstance(y, dict) else {"main": y}
        for stage, maps in stages.items():
            suffix = "" if stage == "main" else f"_{stage}"
            if self._shared and self.taxonomy is not None:
                levels = maps.split(self.taxonomy.num_classes, 1)  # (B, K, H, W) each
                for level, level_maps in zip(self.taxonomy.levels, levels, strict=True):
                    outputs[f"{level}{suffix}"] = level_maps
            else:
                outputs[f"{head}{suffix}"] = maps
        return outputs

    def forward_taps(self, x: torch.Tensor) -> dict[str, torch.Tensor | list[torch.Tensor]]:
        """Feature maps `{name: (B, C, H, W)}` at the taps.

        A list of maps for a head that reads several taps.
        """
        result: dict[str, torch.Tensor | list[torch.Tensor]] = {}
        maps_of = self.head_maps(x, range(len(self.names)))
        for head, (name, maps) in zip(self.head_specs, maps_of.items(), strict=True):
            result[name] = maps if head.multi_tap else maps[0]
        return result

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """The map (B, C, H, W) at the deepest tap.

        What a timm backbone's `forward_features` is to it.
        """
        deepest = self._deepest()
        return self._maps(x, [deepest])[0]

    def forward_head(
        self,
        x: torch.Tensor | Mapping[str, torch.Tensor | Sequence[torch.Tensor]],
        pre_logits: bool = False,
    ) -> dict[str, torch.Tensor]:
        """What classifiers say of maps that are there already, by name.

        Args:
            x: The map (B, C, H, W) that :meth:`forward_features` gives, for the heads at that tap;
                or maps by the heads' names, as :meth:`forward_taps` gives them, for these heads.
            pre_logits: Give what each head's last layer reads, (B, `head_hidden_size[name]`), which
                is what `reset_classifier(0)` leaves.

        Raises:
            ValueError: No head reads that map, an unknown name, or a head that needs more than
                maps: one for clips, or a decoder.

        Example:
            >>> from timm_branches import create_branch_model
            >>> model = create_branch_model('test_resnet', taps=[3, 5], num_classes=[2, 7]).eval()
            >>> x = torch.randn(1, 3, 64, 64)
            >>> list(model.forward_head(model.forward_features(x)))
            ['stage5']
            >>> model.forward_head(model.forward_taps(x), pre_logits=True)['stage3'].shape[1]
            48
        """
        given = x if isinstance(x, Mapping) else self._heads_of_deepest(x)
        chosen = [self.names[i] for i in self.head_indices(list(given))]
        others = [n for n in chosen if n in self.temporal_heads or n in self.dense_heads]
        if others:
            raise ValueError(
                f"forward_head answers for classifiers of images, which need no more than a map; "
                f"{others} read clips or images as well: call the model itself."
            )
        outputs: dict[str, torch.Tensor] = {}
        for name in chosen:
            maps = given[name]
            read = [maps] if isinstance(maps, torch.Tensor) else list(maps)
            if pre_logits:
                outputs[name] = self._before_last_layer(name, read)
            else:
                outputs[name] = self.head(name)(*read)
        return outputs

    def _heads_of_deepest(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """The map of `forward_features` for each head that reads it and nothing else."""
        deepest = self.taps[self._deepest()].module
        given: dict[str, torch.Tensor] = {}
        for name, which in zip(self.names, self.head_taps, strict=True):
            if [self.taps[i].module for i in which] == [deepest]:
                given[name] = x
        if not given:
            raise ValueError(
                f"no head reads the map at {deepest!r} alone: call the model itself, or give "
                "forward_head what forward_taps gives."
            )
        return given

    def _before_last_layer(self, name: str, maps: Sequence[torch.Tensor]) -> torch.Tensor:
        """What the last layer of a head reads; heads from outside need to have no option for it."""
        head, read = self.head(name), []
        last: Any = head.fc
        handle = last.register_forward_pre_hook(lambda module, args: read.append(args[0]))
        try:
            head(*maps)
        finally:
            handle.remove()
        if len(read) != 1:
            raise ValueError(
                f"the head {name!r} calls its last layer {len(read)} times: what it reads is not "
                "one tensor."
            )
        return read[0]

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[torch.Tensor] | tuple[torch.Tensor, list[torch.Tensor]]:
        """Maps at the taps, as timm's models give those of their stages; `feature_info` says which.

        Args:
            x: Images (B, C, H, W).
            indices: Positions in `feature_info`, the last n if int, all if None.
            norm: Only False: maps are taken as they are at the tap.
            stop_early: Let the final features be those of the deepest tap among `indices`.
            output_fmt: Only 'NCHW'.
            intermediates_only: Leave out the final features.

        Returns:
            (what :meth:`forward_features` gives, maps in tap order), or the maps alone.

        Raises:
            ValueError: Another `output_fmt`, or `norm`.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be 'NCHW', got {output_fmt!r}.")
        if norm:
            raise ValueError(
                "norm=True has no effect on a branch model, whose maps are taken as they are at "
                "the tap: leave it out."
            )
        take, _ = feature_take_indices(len(self.taps), indices)
        which = sorted(take)
        if intermediates_only:
            return self._maps(x, which)
        last = self._deepest(which) if stop_early else self._deepest()
        *maps, features = self._maps(x, [*which, last])
        return features, maps

    def align(self, images: torch.Tensor, heads: Sequence[int] | None = None) -> torch.Tensor:
        """Images (B, C, H, W) as decoders read them: padded so that the maps cover them exactly.

        Args:
            images: The images.
            heads: Positions of the heads that are computed, all by default; without a decoder among
                them nothing is padded.
        """
        chosen = range(len(self.names)) if heads is None else heads
        multiples = [self._multiples[i] for i in chosen if self.names[i] in self.dense_heads]
        if not multiples or images.ndim != 4:
            return images
        return pad_to_multiple(images, math.lcm(*multiples))

    def head(self, name: str) -> nn.Module:
        """The module of the head with this name."""
        if not isinstance(name, str) or name not in self._keys:
            raise KeyError(f"no head {name!r}: the model's heads are {list(self.names)}.")
        return self.heads[self._keys[name]]

    @property
    def level_heads(self) -> tuple[str, ...]:
        """Names of the heads that answer for the taxonomy's levels; those behind are free."""
        if self.taxonomy is None:
            return ()
        return self.names if self._shared else self.names[: self.taxonomy.num_levels]

    def head_prefix(self, name: str) -> str:
        """Where the tensors of the head with this name stand in the state dict."""
        return f"heads.{self._keys[name]}"

    def head_indices(self, heads: Sequence[str] | None) -> list[int]:
        """The numbers of these heads, of all for None.

        Raises:
            ValueError: One is unknown, or there is none.
        """
        if heads is None:
            return list(range(len(self.names)))
        wanted = [heads] if isinstance(heads, str) else as_items("heads=", heads, "['fine']")
        unknown = [name for name in wanted if name not in self.names]
        if unknown or not wanted:
            raise ValueError(f"heads={wanted!r}: the model's heads are {list(self.names)}.")
        return [i for i, name in enumerate(self.names) if name in wanted]

    def head_maps(
        self, x: torch.Tensor, which: Sequence[int], per_pass: int | None = None
    ) -> dict[str, list[torch.Tensor]]:
        """The maps that each of these heads reads, by its name.

        From one pass, or one for `per_pass` images each.
        """
        taps: list[int] = []
        for i in which:
            taps += self.head_taps[i]
        if per_pass is None or len(x) <= per_pass:
            maps = self._maps(x, taps)
        else:
            warn_of_batch_statistics(self.backbone)
            passes = [self._maps(images, taps) for images in x.split(per_pass)]
            maps = [torch.cat(parts) for parts in zip(*passes, strict=True)]
        result: dict[str, list[torch.Tensor]] = {}
        start = 0
        for i in which:
            end = start + len(self.head_taps[i])
            result[self.names[i]] = maps[start:end]
            start = end
        return result

    def _maps(self, x: torch.Tensor, which: Sequence[int]) -> list[torch.Tensor]:
        if x.ndim != 4 or x.shape[1] != self.input_size[0]:
            hint = f"; in_chans={x.shape[1]} makes a model for these." if x.ndim == 4 else "."
            raise ValueError(
                f"expected images (B, {self.input_size[0]}, H, W), got {tuple(x.shape)}{hint}"
            )
        if torch.compiler.is_compiling():
            return self._read(x, which)
        try:
            return self._read(x, which)
        except (RuntimeError, AssertionError, ValueError) as error:
            self.reader.captured = None
            if isinstance(error, torch.cuda.OutOfMemoryError):
                raise
            # only a failed pass pays for finding out whether it was the size of the images
            reason = self.reader.explain(self.backbone, tuple(x.shape[1:]))
            if reason is None:
                raise
            multiple = math.lcm(*self._multiples)
            if multiple > 1 and all(side % multiple == 0 for side in x.shape[2:]):
                reason += f" (For a decoder, sizes are padded to multiples of {multiple}.)"
            raise ValueError(reason) from error

    def _read(self, x: torch.Tensor, which: Sequence[int]) -> list[torch.Tensor]:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self._frozen):
            return self.reader.read(self.backbone, x, which)

    @property
    def frames_per_pass(self) -> int | None:
        """Frames of a clip that go through the backbone at once; None for all."""
        return self._frames_per_pass

    @frames_per_pass.setter
    def frames_per_pass(self, value: int | None) -> None:
        if value is not None and (
            isinstance(value, bool) or not isinstance(value, int) or value < 1
        ):
            raise ValueError(
                "frames_per_pass takes a whole number from 1, or None for all frames, got "
                f"{value!r}."
            )
        self._frames_per_pass = value

    def _deepest(self, among: Sequence[int] | None = None) -> int:
        """The number of the deepest tap, of all or among these."""

        def depth(i: int) -> tuple[int, bool, int]:
            info, reader = self.taps[i], self.reader
            if info.stage is not None:
                return info.stage.index + 1, False, 0
            return reader.within[info.module], True, reader.order[info.module]

        return max(range(len(self.taps)) if among is None else among, key=depth)

    # -- timm's contract

    @property
    def default_cfg(self) -> dict:
        """Timm's older name of `pretrained_cfg`."""
        return self.pretrained_cfg

    @property
    def num_classes(self) -> dict[str, int]:
        """Classes of each head, by name."""
        return {name: self.head(name).num_classes for name in self.names}  # type: ignore[misc]

    @property
    def num_features(self) -> int:
        """Channels of the map at the deepest tap, which is what `forward_features` gives."""
        return self.taps[self._deepest()].channels

    @property
    def head_hidden_size(self) -> dict[str, int]:
        """Width of what the last layer of each head reads, by the head's name."""
        sizes: dict[str, int] = {}
        for name in self.names:
            head = self.head(name)
            for owner, attribute in (
                (head.fc, "in_features"),
                (head.fc, "in_channels"),
                (head, "num_features"),
            ):
                size = getattr(owner, attribute, None)
                if isinstance(size, int):
                    sizes[name] = size
                    break
            else:
                raise ValueError(f"the head {name!r} does not say what its last layer reads.")
        return sizes

    @property
    def global_pool(self) -> dict[str, str]:
        """How each head makes a vector of its map, by the head's name; '' for those that do not.

        It is chosen when the model is made, by `PoolHead(pool_type=...)`.
        """
        pools: dict[str, str] = {}
        for name, spec in zip(self.names, self.head_specs, strict=True):
            pools[name] = getattr(spec, "pool_type", "flatten" if spec.kind == "flatten" else "")
        return pools

    @property
    def in_chans(self) -> int:
        """Channels of the images."""
        return self.input_size[0]

    @property
    def feature_info(self) -> list[dict]:
        """Timm's description of the maps at the taps, with module paths below `backbone.`."""
        return [
            {
                "num_chs": t.channels,
                "reduction": t.stride,
                "module": f"backbone.{t.module}",
                "stage": t.tap.stage,
            }
            for t in self.taps
        ]

    def get_classifier(self) -> nn.ModuleDict:
        """The last layer of each head, by the head's name."""
        return nn.ModuleDict({self._keys[name]: self.head(name).fc for name in self.names})  # type: ignore[misc]

    def reset_classifier(
        self,
        num_classes: int | Sequence[int] | dict[str, int],
        global_pool: str | None = None,
        taxonomy: Taxonomy | None = None,
    ) -> None:
        """New last layers. The taxonomy, which no longer fits, goes unless a new one is given.

        Args:
            num_classes: Classes of all heads, of each in tap order, or by name (others stay as they
                are).
            global_pool: Refused; the heads' pooling is set by `PoolHead(pool_type=...)`.
            taxonomy: The hierarchy of the new classes.

        Raises:
            ValueError: Another number of entries than heads, an unknown name, or `global_pool`
                given.
        """
        if global_pool is not None:
            raise ValueError(
                "global_pool= has no effect on a branch model: choose PoolHead(pool_type=...)."
            )
        chosen = set(self.names)
        if isinstance(num_classes, dict):
            self.head_indices(list(num_classes))
            chosen = set(num_classes)
            classes = [num_classes.get(name, old) for name, old in self.num_classes.items()]
        elif isinstance(num_classes, int):
            classes = [num_classes] * len(self.names)
        else:
            classes = as_items("num_classes", num_classes, "[2, 10]")
        for count in classes:
            check_number("num_classes", count, 0, 2**31, whole=True)
        if len(classes) != len(self.names):
            raise ValueError(
                f"{len(classes)} class counts for {len(self.names)} heads {list(self.names)}."
            )
        shared = answers_all_levels(self.head_specs, taxonomy)
        if taxonomy is not None:
            _check_classes(classes, taxonomy, shared)
        for name, count in zip(self.names, classes, strict=True):
            if name in chosen or count != self.num_classes[name]:
                self.head(name).reset_classifier(count)  # type: ignore[operator]
        self.taxonomy = taxonomy
        self.calibration = None  # of the old classes
        self._shared = shared
        self.config |= {"num_classes": list(classes), "taxonomy": taxonomy}
        # no more than that changes: the preprocessing may be that of the model's file
        self.pretrained_cfg["num_classes"] = next(iter(self.num_classes.values()))

    def set_input_size(self, img_size: int | Sequence[int]) -> None:
        """Take images of another size, as timm's ViT and Swin do; the weights stay.

        Backbones bound to a size are adapted by timm (tables of positions are resampled); for
        others it changes the nominal size alone, that of the preprocessing. The model's file is of
        the new size.

        Args:
            img_size: Side of the images, or (height, width).

        Raises:
            ValueError: No such size, a backbone that cannot be adapted, or a head that is bound to
                the size of its map ('flatten'). The model is as before then.

        Example:
            >>> from timm_branches import create_branch_model
            >>> model = create_branch_model('test_vit', taps=[5], num_classes=2)
            >>> model.set_input_size(96)
            >>> model.input_size, model.taps[0].size
            ((3, 96, 96), (6, 6))
        """
        sides: list[Any] = [img_size, img_size]
        if not isinstance(img_size, int):
            sides = as_items("img_size=", img_size, "(224, 224)")
            if len(sides) != 2:
                raise ValueError(f"img_size= takes a side or (height, width), got {img_size!r}.")
        for side in sides:
            check_number("img_size=", side, 1, 65_536, whole=True)
        size = (int(sides[0]), int(sides[1]))
        trial = deepcopy(self).eval()  # what fails, fails before this model is changed
        try:
            trial._resize(size)
            images = torch.zeros(1, *trial.input_size).to(next(trial.parameters()))
            with torch.no_grad():
                trial(images[:, None] if trial.temporal_heads else images)
        except (AssertionError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"img_size={size}: this model cannot take it ({str(error).rstrip('.')}). Make one "
                "with create_branch_model(..., img_size=)."
            ) from error
        self._resize(size)

    def _resize(self, size: tuple[int, int]) -> None:
        backbone: Any = self.backbone
        before = dict(getattr(backbone, "_model_args", {}))
        if hasattr(backbone, "set_input_size"):
            backbone.set_input_size(img_size=size)
        self.input_size = (self.input_size[0], *size)
        self.reader.resize(backbone, self.input_size)
        for i, name in enumerate(self.names):
            if name in self.dense_heads:
                which = self.head_taps[i]
                taps_read = [self.taps[j] for j in which]
                self._multiples[i] = self._aligned_taps(backbone, taps_read, which)[0]
        # timm notes what else it changed, such as Swin's windows
        for key, value in getattr(backbone, "_model_args", {}).items():
            if key not in before or before[key] != value:
                self.config[key] = list(value) if isinstance(value, tuple) else value
        self.config["img_size"] = list(size)
        self.pretrained_cfg["input_size"] = self.input_size
        for key in ("test_input_size", "test_crop_pct"):
            self.pretrained_cfg.pop(key, None)

    def no_weight_decay(self) -> set[str]:
        """The backbone's parameters without weight decay, prefixed.

        Timm's optimizer factory asks for them.
        """
        of_backbone = getattr(self.backbone, "no_weight_decay", set)
        return {f"backbone.{name}" for name in of_backbone()}

    def group_matcher(self, coarse: bool = False) -> Any:
        """The backbone's layer groups, prefixed.

        The heads fall into the last group, as classifiers do in timm.
        """
        of_backbone = getattr(self.backbone, "group_matcher", None)
        matcher = of_backbone(coarse=coarse) if of_backbone else None
        if isinstance(matcher, dict):
            return {group: _prefix_patterns(spec) for group, spec in matcher.items()}
        if matcher is None:
            from timm.optim import auto_group_layers

            ids: dict[str, float] = dict(auto_group_layers(self.backbone))
        else:
            ids = {
                **group_modules(self.backbone, matcher, reverse=True),
                **group_parameters(self.backbone, matcher, reverse=True),
            }
        return lambda name: ids.get(name.removeprefix("backbone."), float("inf"))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade time for memory in the backbone, as timm does.

        Raises:
            ValueError: The backbone does not support it.
        """
        try:
            self.backbone.set_grad_checkpointing(enable)  # type: ignore[operator]
        except (AssertionError, AttributeError) as error:
            raise ValueError(
                f"{self.reader.architecture} does not support gradient checkpointing in timm."
            ) from error

    def _prefixed_cfg(self) -> dict:
        cfg = dict(getattr(self.backbone, "pretrained_cfg", {}))
        first = cfg.get("first_conv")
        if isinstance(first, str):
            cfg["first_conv"] = f"backbone.{first}"
        elif first:
            cfg["first_conv"] = tuple(f"backbone.{name}" for name in first)
        source = tuple(cfg.get("input_size") or (3, 224, 224))
        if source != self.input_size:
            for key in ("test_input_size", "test_crop_pct"):
                cfg.pop(key, None)
        cfg["input_size"] = self.input_size
        # the source's statistics, spread over another number of channels
        for key in ("mean", "std"):
            value = cfg.get(key)
            if value is not None and len(value) != self.input_size[0]:
                cfg[key] = (sum(value) / len(value),) * self.input_size[0]
        cfg["classifier"] = tuple(f"heads.{key}.fc" for key in self._keys.values())
        cfg["num_classes"] = next(iter(self.num_classes.values()))
        return cfg


def _check_classes(classes: Sequence[int], taxonomy: Taxonomy, shared: bool) -> None:
    """Refuse classes of heads that are not those of a taxonomy's levels."""
    expected = taxonomy.num_classes
    note = ""
    if shared:
        expected = (sum(taxonomy.num_classes),)
        note = ", of which the decoder gives the sum"
    if tuple(classes[: taxonomy.num_levels]) != expected:
        raise ValueError(
            f"classes {classes} do not fit the taxonomy's {list(taxonomy.num_classes)}{note}."
        )


def answers_all_levels(heads: Sequence[Head], taxonomy: Taxonomy | None) -> bool:
    """Whether the only head is a decoder and the taxonomy has several levels.

    Its channels are then theirs together.
    """
    return taxonomy is not None and taxonomy.num_levels > 1 and len(heads) == 1 and heads[0].dense


def module_key(name: str) -> str:
    """A name that ModuleDict takes: no dots, none of its own methods ('type', 'values')."""
    key = name.replace(".", "_")
    return f"{key}_" if hasattr(nn.ModuleDict, key) else key


def _prefix_patterns(spec: Any) -> Any:
    """Timm's group patterns for names below `backbone.`.

    A pattern is a regex, or pairs of regex and order.
    """
    if spec is None:
        return None
    if isinstance(spec, (tuple, list)):
        return [(_prefix_patterns(pattern), order) for pattern, order in spec]
    return r"^backbone\.(?:" + re.sub(r"(^|\|)\^", r"\1", spec) + ")"
