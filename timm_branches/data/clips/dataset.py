"""Clips (videos, folders of frames, arrays) with a label on every level of a taxonomy."""

import dataclasses
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

from timm_branches.data.clips.sampling import FrameSampler
from timm_branches.data.clips.sources import ArrayClips, FileClips, read_clip_csv, read_clip_folder
from timm_branches.data.clips.video import ClipError
from timm_branches.data.datasets import (
    HierarchicalDataset,
    HierarchicalSubset,
    set_value_range,
    split_dataset,
    take_split,
    take_splits,
    to_unit_tensor,
    with_taxonomy,
)
from timm_branches.data.sources import READERS, Source
from timm_branches.data.splits import wanted_splits
from timm_branches.data.stratify import stratified_indices
from timm_branches.taxonomy.table_files import is_table_name
from timm_branches.taxonomy.taxonomy import Taxonomy
from timm_branches.taxonomy.trees import get_taxonomy

__all__ = [
    "ClipDataset",
    "ClipSubset",
    "create_clip_dataset",
    "create_clip_splits",
    "split_clips",
]


class ClipDataset(HierarchicalDataset):
    """Clips in memory or on disk, each with one label, or one a level.

    Frames and augmentation are functions of (seed, epoch, sample), as the augmentation of images
    is. A transform made by :func:`timm_branches.data.create_transform` is given each frame of a
    clip with the same random numbers, so that all of them are cut, flipped and coloured alike; any
    other callable is given the whole clip, uint8 (T, H, W, C).

    A clip that cannot be read is replaced, its label too, by the next one that can, so that batches
    stay full; there is one warning for each, and `errors` counts them. Where every single result
    matters, set `strict`.

    Args:
        clips: uint8 array (N, T, H, W) or (N, T, H, W, C), a sequence of uint8 arrays (T, H, W) or
            (T, H, W, C), or what `create_clip_dataset` finds in files.
        labels: (N,) class indices, or (N, L) of all levels; -1 is unknown.
        taxonomy: The tree that the labels refer to; it needs (N, L).
        transform: Makes a float tensor CHW of each frame; None scales to [0, 1].
        in_chans: Channels that clips in memory are brought to, 1 or 3; None leaves them.
        sampler: Which frames to take; all of them by default.
        strict: Raise for a clip that cannot be read, instead of taking another one.

    Raises:
        ValueError: If clips and labels differ in number, labels do not fit the taxonomy, or clips
            are no such arrays.

    Example:
        >>> import numpy as np
        >>> data = ClipDataset(np.zeros((2, 30, 24, 48), np.uint8), [0, 1], sampler=FrameSampler(8))
        >>> clip, label = data[1]
        >>> clip.shape, label.item()
        (torch.Size([8, 1, 24, 48]), 1)
    """

    def __init__(
        self,
        clips: Any,
        labels: Any,
        taxonomy: Taxonomy | None = None,
        transform: Callable | None = None,
        in_chans: int | None = None,
        sampler: FrameSampler | None = None,
        strict: bool = False,
    ) -> None:
        if isinstance(clips, FileClips) and in_chans not in (None, clips.in_chans):
            raise ValueError(
                f"in_chans={in_chans}, but the files are decoded to {clips.in_chans} channels."
            )
        labels = torch.as_tensor(labels, dtype=torch.long)
        is_flat = labels.ndim == 1 and taxonomy is None
        super().__init__(clips, labels[:, None] if is_flat else labels, taxonomy, transform)
        self.labels = labels
        self.images: Any = clips if isinstance(clips, FileClips) else ArrayClips(clips, in_chans)
        self.sampler = sampler or FrameSampler()
        self.strict = strict
        # By position in `images`, in memory that worker processes share: which ones could not be
        # read.
        self._failed = torch.zeros(len(labels), dtype=torch.bool).share_memory_()

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """One clip.

        Args:
            index: Its position.

        Returns:
            The frames (T, C, H, W), T at most the sampler's `num_frames`, and the label () or
            labels (L,).

        Raises:
            ClipError: If the clip cannot be read and `strict` is set; it is a ValueError.
            RuntimeError: If no clip at all can be read.
        """
        size = len(self)
        index = range(size)[index]
        first: ClipError | None = None
        for step in range(size):
            position = (index + step) % size
            try:
                return self._read(int(self.sample_ids[position])), self.labels[position]
            except ClipError as error:
                if self.strict:
                    self._failed[int(self.sample_ids[position])] = True
                    raise
                self._note(int(self.sample_ids[position]), error)
                first = first or error
        raise RuntimeError(f"none of the {size} clips can be read; the first error was: {first}")

    def _read(self, sample: int) -> torch.Tensor:
        key = (self.seed, self.epoch, sample)
        frames = self.images.read(sample, self.sampler.bound(key))
        if self.transform is None:
            return torch.stack([to_unit_tensor(frame) for frame in frames])
        if getattr(self.transform, "takes_key", False):
            return torch.stack([self.transform(frame, key=key) for frame in frames])
        return self.transform(frames)

    def _note(self, sample: int, error: ClipError) -> None:
        if not self._failed[sample]:
            self._failed[sample] = True
            warnings.warn(
                f"{str(error).rstrip('.')}. The next clip that can be read takes its place.",
                stacklevel=3,
            )

    def subset(self, indices: Any) -> "ClipSubset":
        """Some of the clips, at these positions."""
        return ClipSubset(self, indices)

    @property
    def errors(self) -> int:
        """How many of these clips could not be read so far.

        Each is counted once, in all worker processes together.
        """
        return int(self._failed[self.sample_ids].sum())

    def limit(self, count: int, seed: int = 0) -> "ClipSubset":
        """A stratified part, for quick runs.

        Every class keeps its share, as far as whole clips allow.

        Args:
            count: Clips wanted; all if there are fewer.
            seed: Which clips.

        Returns:
            A subset with the same transform, sampler and taxonomy, its clips in their old order.
        """
        return ClipSubset(
            self, stratified_indices(self.labels, min(count, len(self)), seed).sort().values
        )


class ClipSubset(ClipDataset, HierarchicalSubset):
    """Some clips of a dataset, with a transform and a sampler of its own to set.

    A clip that cannot be read is replaced by one of the same subset.

    Args:
        dataset: The whole.
        indices: Positions in it.

    Example:
        >>> import numpy as np
        >>> data = ClipDataset(np.zeros((5, 3, 8, 8), np.uint8), torch.zeros(5))
        >>> len(ClipSubset(data, [0, 3]))
        2
    """

    def __init__(self, dataset: ClipDataset, indices: Any) -> None:
        self.__dict__.update(vars(dataset))
        HierarchicalSubset.__init__(self, dataset, indices)


def split_clips(
    dataset: ClipDataset, fraction: float = 0.1, seed: int = 0
) -> tuple[ClipSubset, ClipSubset]:
    """Set a stratified part of the training clips aside for validation.

    It does what `split_dataset` does with images.

    Args:
        dataset: The training data.
        fraction: The validation part's share.
        seed: Which clips; the split depends on the labels, the fraction and the seed alone.

    Returns:
        The training part, and the validation part with frames that are the same each time; both
        have the dataset's
        transform: give the latter one without augmentation (`val.transform = ...`).

    Raises:
        ValueError: If a part would be empty.

    Example:
        >>> import numpy as np
        >>> data = ClipDataset(np.zeros((10, 3, 8, 8), np.uint8), torch.zeros(10))
        >>> [len(part) for part in split_clips(data, 0.2)]
        [8, 2]
    """
    positions = HierarchicalDataset(range(len(dataset)), dataset.labels.view(len(dataset), -1))
    positions.groups = dataset.groups
    train, val = (
        ClipSubset(dataset, part.sample_ids) for part in split_dataset(positions, fraction, seed)
    )
    val.sampler = dataclasses.replace(val.sampler, is_training=False)
    return train, val


def _read(path: Any, taxonomy: Any, in_chans: int, columns: dict[str, Any]) -> Source:
    if in_chans not in (1, 3):
        raise ValueError(f"in_chans must be 3 (RGB) or 1 (grey), not {in_chans}.")
    tree = None if taxonomy is None else get_taxonomy(taxonomy)
    columns = {name: value for name, value in columns.items() if value is not None}
    if isinstance(path, Source):
        return with_taxonomy(path, tree)
    if not isinstance(path, str | os.PathLike):
        return read_clip_csv(path, in_chans, tree, **columns)
    path = os.fspath(path)
    if os.path.isfile(path) and is_table_name(path):
        return read_clip_csv(path, in_chans, tree, **columns)
    if columns:
        raise ValueError(
            f"{', '.join(columns)} name columns of a table and have no effect on {path}."
        )
    prefix, _, remainder = path.partition("/")
    if prefix in ("hfds", "hfids", "tfds", "wds"):
        raise ValueError(f"{path} holds images; clips come from a folder or a table of videos.")
    if prefix in READERS:
        source = READERS[prefix](remainder, split="all", in_chans=in_chans, taxonomy=tree)
        return with_taxonomy(source, tree)
    if os.path.isdir(path):
        return read_clip_folder(path, in_chans, tree)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path} is neither a folder nor a file.")
    raise ValueError(f"{path} is of no known kind; expected a folder of class folders or a .csv.")


def _whole(
    source: Source, transform: Callable | None, sampler: FrameSampler, strict: bool
) -> ClipDataset:
    data = ClipDataset(
        source.images, source.labels, source.taxonomy, transform, sampler=sampler, strict=strict
    )
    data.groups, data.summary = source.groups, source.summary
    return data


def create_clip_dataset(
    path: Any,
    split: str = "train",
    taxonomy: Taxonomy | str | None = None,
    num_frames: int | None = None,
    sampling: str | None = None,
    stride: int = 1,
    is_training: bool = False,
    in_chans: int = 3,
    transform: Callable | None = None,
    strict: bool = False,
    *,
    levels: Sequence[str] | None = None,
    path_column: str | None = None,
    split_column: str | None = None,
    group_column: str | None = None,
    value_range: tuple[float, float] | None = None,
    rate: float | None = None,
) -> ClipDataset:
    """Make a dataset of the clips in a folder, a table, or a :class:`Source` of your own.

    For arrays call :class:`ClipDataset` itself.

    Args:
        path: A folder of class folders, which hold videos (.mp4, .avi, .mov, .mkv, .webm, .gif) or
            folders of images, and may be nested and lie below train, val and test; or a .csv with a
            path to a video or a folder of images and the names of its classes in each row, see
            `read_clip_csv`. Videos need PyAV.
        split: 'train', 'val', 'test', 'trainval' or 'all'. Where the source has no splits, all is
            'train'.
        taxonomy: The tree of labels, or what `get_taxonomy` takes; None is the one that folders or
            columns describe.
        num_frames: Frames of each clip; None takes all.
        sampling: 'uniform' (the default), 'dense', 'random' or 'all', see :class:`FrameSampler`.
        stride: Distance between two frames of 'dense'.
        is_training: Whether to draw frames at random.
        in_chans: 3 for RGB, 1 for grey.
        transform: Makes a float tensor CHW of a frame, see `create_transform`.
        strict: Raise for a clip that cannot be read, instead of taking another one.
        levels: As in `create_dataset`, like the other columns.
        path_column: As there.
        split_column: As there.
        group_column: As there; by default clips of one file belong together.
        value_range: As there, for frames that are image files.
        rate: Frames a second of videos to choose among, see :class:`FrameSampler`.

    Returns:
        The dataset, with its `taxonomy`; labels are (N, L).

    Raises:
        FileNotFoundError: If there is no such folder or file.
        ValueError: If the split or the class names do not exist, files are of no known kind, or
            settings do not fit.

    Example:
        >>> data = create_clip_dataset('ucf101/', num_frames=16, is_training=True)  # doctest: +SKIP
        >>> data[0][0].shape  # doctest: +SKIP
        torch.Size([16, 3, 240, 320])
    """
    wanted_splits(split)
    sampler = FrameSampler(num_frames, sampling, stride, is_training, rate)
    columns = {
        "levels": levels,
        "path_column": path_column,
        "split_column": split_column,
        "group_column": group_column,
    }
    source = _read(path, taxonomy, in_chans, columns)
    set_value_range(source, value_range, path)
    return take_split(_whole(source, transform, sampler, strict), source, split, path)


def create_clip_splits(
    path: Any,
    val_fraction: float = 0.1,
    seed: int = 0,
    transform: Callable | None = None,
    eval_transform: Callable | None = None,
    **kwargs: Any,
) -> tuple[ClipDataset, ClipDataset, ClipDataset | None]:
    """Training, validation and test clips of any source, in one call.

    The source's own validation split is taken where there is one; otherwise a stratified part of
    its training clips.

    Args:
        path: As for `create_clip_dataset`.
        val_fraction: The share of the training clips to set aside where there is no validation
            split.
        seed: Which part to set aside.
        transform: For training, whose frames are drawn at random.
        eval_transform: For validation and test, whose frames are always the same.
        **kwargs: What else `create_clip_dataset` takes, but the split and is_training.

    Returns:
        The three datasets; the last is None where the source has no test clips.

    Raises:
        ValueError: As `create_clip_dataset`, or if a part would be empty.

    Example:
        >>> train, val, test = create_clip_splits('ucf101/', num_frames=16)  # doctest: +SKIP
    """
    for name in {"split", "is_training"} & set(kwargs):
        raise ValueError(
            f"{name} has no effect here: all splits are made, and only 'train' draws frames at "
            "random."
        )
    strict = kwargs.pop("strict", False)
    names = ("levels", "path_column", "split_column", "group_column")
    columns = {name: kwargs.pop(name, None) for name in names}
    value_range = kwargs.pop("value_range", None)
    source = _read(path, kwargs.pop("taxonomy", None), kwargs.pop("in_chans", 3), columns)
    set_value_range(source, value_range, path)
    sampler = FrameSampler(**kwargs, is_training=True)
    data = _whole(source, transform, sampler, strict)
    train, val, test = take_splits(data, source, val_fraction, seed, split_clips, path)
    for part in (val, test):
        if part is not None:
            part.sampler = dataclasses.replace(sampler, is_training=False)
            part.transform = eval_transform
    return train, val, test
