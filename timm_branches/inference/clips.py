"""Answers for videos and folders of frames: a path through the tree a clip, or one a frame."""

import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils.data import Dataset

from timm_branches.arguments import check_number
from timm_branches.data.clips.sampling import FrameSampler
from timm_branches.data.clips.sources import FileClips, check_count
from timm_branches.data.clips.video import (
    count_frames,
    frame_rate,
    is_video_name,
    iterate_frames,
)
from timm_branches.data.folders import walk
from timm_branches.data.images import is_image_name
from timm_branches.data.transforms import SampleTransform
from timm_branches.inference.predict import (
    UNREADABLE,
    Levels,
    Record,
    find_device,
    model_transform,
)
from timm_branches.model import BranchModel
from timm_branches.taxonomy.order import natural_order

__all__ = ["ClipPredictions", "ClipRecord", "find_clips", "predict_clips", "training_sampler"]

_CHUNK = 64  # frames that go through a model at once where it can go on from a state


class ClipRecord(NamedTuple):
    """What a model says of one clip.

    Attributes:
        file: The video, or the folder of frames.
        answers: One :class:`Record` for the clip, or one for each frame that was looked at.
        frames: The positions of these frames, from 0.
        rate: Frames a second; None for a folder.
        error: Why the clip could not be read; nothing else is known of it then.
    """

    file: str
    answers: tuple[Record, ...] = ()
    frames: tuple[int, ...] = ()
    rate: float | None = None
    error: str | None = None


def predict_clips(
    model: BranchModel | str | os.PathLike,
    clips: Any,
    taxonomy: Any = None,
    decoder: str | None = None,
    threshold: float | None = None,
    sampler: FrameSampler | None = None,
    num_workers: int = 0,
    device: torch.device | str | None = None,
    strict: bool = True,
    calibrated: bool = True,
) -> "ClipPredictions":
    """Classify clips on every level of a model's tree, as a whole or frame by frame.

    Each clip begins anew: no state is carried from one to the next.

    Args:
        model: A model with a temporal head, or what :func:`timm_branches.load_model` takes.
        clips: A video, a folder of frames, a folder that holds such (searched), or several.
        taxonomy: As in :func:`timm_branches.inference.predict`.
        decoder: As in :func:`timm_branches.inference.predict`.
        threshold: As in :func:`timm_branches.inference.predict`.
        sampler: Which frames are looked at. None is what the model's file says of its training; for
            a model that answers frame by frame all of them.
        num_workers: Processes that read clips; 0 reads them in this one.
        device: Where the model is moved to; None leaves a model where it is and puts a loaded one
            on a GPU if there is one.
        strict: Raise at the first clip that cannot be read; otherwise it has a record with its
            `error`.
        calibrated: As in :func:`timm_branches.inference.predict`.

    Returns:
        :class:`ClipPredictions`: iterate over it for one :class:`ClipRecord` a clip, in order.

    Raises:
        FileNotFoundError: A path given does not exist.
        ValueError: There are no clips, or the model reads none; as
            :func:`timm_branches.inference.predict`.

    Example:
        >>> for record in predict_clips('model.safetensors', 'videos/'):  # doctest: +SKIP
        ...     print(record.file, record.answers[0].path)
        videos/1.mp4 ('sport', 'jump')
    """
    if not isinstance(model, BranchModel):
        from timm_branches.factory import load_model

        model = load_model(model)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if not model.temporal_heads:
        raise ValueError(
            f"the model reads no clips, its heads are {list(model.names)}: predict() classifies "
            "images with it."
        )
    check_number("num_workers=", num_workers, 0, whole=True)
    levels = Levels(model, taxonomy, decoder, threshold, calibrated)
    names = find_clips([clips] if isinstance(clips, (str, os.PathLike)) else list(clips))
    if device is not None:
        model.to(find_device(device))
    return ClipPredictions(model, names, levels, sampler, num_workers, strict)


def find_clips(paths: Sequence[str | os.PathLike]) -> list[str]:
    """The videos and folders of frames at these places and below, in natural order.

    Args:
        paths: Videos, folders of images, and folders that hold such.

    Raises:
        FileNotFoundError: There is no such file or folder.
        ValueError: There is no clip.
    """
    clips: list[str] = []
    for path_or_text in paths:
        given = os.fspath(path_or_text)
        if not os.path.exists(given):
            raise FileNotFoundError(f"{given}: there is no such file or folder.")
        if not os.path.isdir(given):
            clips.append(given)
            continue
        below = []
        for folder, _, files in walk(given):
            path = os.path.join(given, folder) if folder else given
            videos = [os.path.join(path, name) for name in files if is_video_name(name)]
            below += videos
            # a picture beside videos is a preview, no frame
            if not videos and any(is_image_name(name) for name in files):
                below.append(path)
        if not below:
            raise ValueError(f"there are no videos or folders of frames in {given}.")
        clips += sorted(below, key=natural_order)
    if not clips:
        raise ValueError("there are no clips: give videos, or folders of frames.")
    return clips


class ClipPredictions:
    """The records of clips, in their order; made by :func:`predict_clips`.

    Attributes:
        files: The clips.
        levels: Names of the levels, coarsest first; of the heads for a model without a tree.
        taxonomy: The tree, or None.
        by_frame: Whether the model answers frame by frame.
        sampler: Which frames are looked at.
        calibration: What the answers are calibrated to, or None.
    """

    def __init__(
        self,
        model: BranchModel,
        files: list[str],
        levels: Levels,
        sampler: FrameSampler | None,
        num_workers: int,
        strict: bool,
    ) -> None:
        self.model, self.files, self._levels = model, files, levels
        self.levels, self.taxonomy = levels.names, levels.taxonomy
        self.calibration = levels.calibration
        self.num_workers, self.strict = num_workers, strict
        self.by_frame = answers_by_frame(model, levels.heads)
        if sampler is None:
            sampler = FrameSampler() if self.by_frame else training_sampler(model)
        self.sampler = sampler
        videos = not any(os.path.isdir(file) for file in files)
        all_frames = self.by_frame and sampler.sampling == "all" and sampler.rate is None
        # an hour of video holds more frames than memory does
        self._reads_in_chunks = videos and all_frames and _can_stream(model)

    def __len__(self) -> int:
        return len(self.files)

    def drift(self) -> str | None:
        """A sentence, if the clips iterated over are unlike those of the calibration."""
        return self._levels.drift()

    def __iter__(self) -> Iterator[ClipRecord]:
        return self.records(range(len(self)))

    def records(self, indices: Sequence[int]) -> Iterator[ClipRecord]:
        """The records of some of the clips alone, in this order.

        Args:
            indices: Which, from 0.
        """
        from timm_branches.data import create_loader

        self._levels.begin()
        files = [self.files[index] for index in indices]
        if self._reads_in_chunks:
            for file in files:
                yield self._read_in_chunks(file)
            return
        if not files:
            return
        samples = _Clips(files, self.model, self.sampler)
        loader = create_loader(
            samples,
            1,
            num_workers=self.num_workers,
            rank=0,
            world_size=1,
            collate_fn=list,
            persistent_workers=False,
        )
        for file, (sample,) in zip(files, loader, strict=True):
            if isinstance(sample, str):
                if self.strict:
                    raise ValueError(sample)
                yield ClipRecord(file, error=sample)
                continue
            clip, frames = sample
            logits = self._forward(clip, file)
            answers = tuple(Record(file, **record) for record in self._levels.read(logits, 0))
            rate = None if os.path.isdir(file) else frame_rate(file)
            yield ClipRecord(file, answers, tuple(frames), rate)

    def _read_in_chunks(self, file: str) -> ClipRecord:
        """The answers for all frames of a video, of which a few at a time are in memory."""
        logits: list[list[torch.Tensor]] = []
        state = None
        try:
            expected = count_frames(file)
            for clip in _chunks(file, self.model):
                part, state = self._go_on(clip, state)
                logits.append(part)
            count = sum(len(part[0]) for part in logits)
            check_count(file, count, expected)
        except UNREADABLE as error:
            if self.strict:
                raise
            return ClipRecord(file, error=_message(file, error))
        joined = [torch.cat(parts) for parts in zip(*logits, strict=True)]  # (T, K) each
        self._check_finite(joined, file)
        answers = tuple(Record(file, **record) for record in self._levels.read(joined, 0))
        return ClipRecord(file, answers, tuple(range(count)), frame_rate(file))

    @torch.inference_mode()
    def _go_on(self, clip: torch.Tensor, state: Any) -> tuple[list[torch.Tensor], Any]:
        """Logits (T, K) of each head for the next frames (T, C, H, W), and the state after."""
        parameter = next(self.model.parameters())
        training = self.model.training
        self.model.eval()
        try:
            x = clip[None].to(parameter.device, parameter.dtype)
            outputs, state = self.model.forward_stream(x, state, list(self._levels.heads))
        finally:
            self.model.train(training)
        return [outputs[name][0].float().cpu() for name in self._levels.heads], state

    def _check_finite(self, logits: Sequence[torch.Tensor], file: str) -> None:
        for name, y in zip(self._levels.heads, logits, strict=True):
            if not y.isfinite().all():
                raise ValueError(
                    f"head {name!r} of the model gives numbers that are not finite for {file}: the "
                    "model has diverged in training, or its input is out of bounds."
                )

    @torch.inference_mode()
    def _forward(self, clip: torch.Tensor, file: str) -> list[torch.Tensor]:
        """Logits (1, K) of each head for a clip (T, C, H, W), or (T, K)."""
        parameter = next(self.model.parameters())
        training = self.model.training
        self.model.eval()
        try:
            if self.by_frame and len(clip) > _CHUNK and _can_stream(self.model):
                outputs = self._stream(clip)
            else:
                x = clip[None].to(parameter.device, parameter.dtype)  # (1, T, C, H, W)
                outputs = self.model(x, heads=list(self._levels.heads))
        finally:
            self.model.train(training)
        logits = [outputs[name][0].float().cpu() for name in self._levels.heads]
        self._check_finite(logits, file)
        if self.by_frame:
            return logits
        return [y[None] for y in logits]

    def _stream(self, clip: torch.Tensor) -> dict[str, torch.Tensor]:
        """The answers for a long clip, some frames after the other."""
        parameter = next(self.model.parameters())
        state = None
        parts: dict[str, list[torch.Tensor]] = {name: [] for name in self._levels.heads}
        for frames in clip.split(_CHUNK):
            x = frames[None].to(parameter.device, parameter.dtype)
            outputs, state = self.model.forward_stream(x, state, list(self._levels.heads))
            for name, part in parts.items():
                part.append(outputs[name].cpu())
        return {name: torch.cat(part, dim=1) for name, part in parts.items()}


def answers_by_frame(model: BranchModel, heads: Sequence[str]) -> bool:
    """Whether the heads give (B, T, K), found by a short clip of nothing.

    Raises:
        ValueError: Some do, and some answer for whole clips.
    """
    parameter = next(model.parameters())
    x = torch.zeros(1, 2, *model.input_size, device=parameter.device, dtype=parameter.dtype)
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            outputs = model(x, heads=list(heads))
    finally:
        model.train(training)
    kinds = {outputs[name].ndim for name in heads}
    if len(kinds) > 1:
        raise ValueError(
            "some heads of the model answer for clips and others for frames: call the model itself "
            "on clips (B, T, C, H, W)."
        )
    return kinds == {3}


def _can_stream(model: BranchModel) -> bool:
    from timm_branches.inference.streaming import StreamingClassifier

    try:
        StreamingClassifier(model)
    except ValueError:
        return False
    return True


def training_sampler(model: BranchModel) -> FrameSampler:
    """The frames that the model's file says; all where it says nothing.

    Raises:
        ValueError: The file says something else.
    """
    facts = model.extra.get("frames")
    if not isinstance(facts, dict):
        return FrameSampler()
    keys = ("num_frames", "sampling", "stride", "rate")
    count, sampling, stride, rate = (facts.get(key) for key in keys)
    whole = all(type(value) is int for value in (count, stride) if value is not None)
    known = isinstance(sampling, str | None) and isinstance(rate, int | float | None)
    if not (whole and known):
        raise ValueError(f"the model's file says of its frames {facts!r}, which are no settings.")
    return FrameSampler(count, sampling, stride or 1, rate=rate)


class _Clips(Dataset):
    """Each clip's frames (T, C, H, W) as the model takes them, or as a text why they cannot be."""

    def __init__(self, files: Sequence[str], model: BranchModel, sampler: FrameSampler) -> None:
        self.clips = FileClips(files, model.in_chans)
        self.clips.value_range = model.pretrained_cfg.get("value_range")
        self.transform: SampleTransform = model_transform(model)
        self.sampler = sampler

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, list[int]] | str:
        choose = self.sampler.bound((0, 0, index))
        try:
            frames = self.clips.read(index, choose)  # (T, H, W, C)
        except UNREADABLE as error:
            return _message(str(self.clips.paths[index]), error)
        return torch.stack([self.transform(frame) for frame in frames]), choose.chosen


def _message(name: str, error: Exception) -> str:
    reason = " ".join(str(error).split())
    return reason if name in reason else f"{name}: {reason}"


def _chunks(file: str, model: BranchModel) -> Iterator[torch.Tensor]:
    """The frames of a video as the model takes them, (T, C, H, W) with T at most a chunk's."""
    transform = model_transform(model)
    frames: list[torch.Tensor] = []
    for frame in iterate_frames(file, in_chans=model.in_chans):
        frames.append(transform(frame))
        if len(frames) == _CHUNK:
            yield torch.stack(frames)
            frames = []
    if frames:
        yield torch.stack(frames)
