"""Where clips come from: arrays, video files and folders of frames, listed by folders or by a CSV.

As with images, every sequence here can be forked or pickled into DataLoader workers; files are open
only while they are read.
"""

import hashlib
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch

from timm_branches.data.clips.video import (
    VIDEO_EXTENSIONS,
    ClipEndsEarly,
    ClipError,
    count_frames,
    frame_times,
    is_video_name,
    read_frames,
)
from timm_branches.data.columns import resolve_paths
from timm_branches.data.decode import decode_image, match_channels, read_file
from timm_branches.data.folders import walk
from timm_branches.data.images import (
    array_identity,
    file_identity,
    is_image_name,
)
from timm_branches.data.sources import Source, from_names, label_table, table_root
from timm_branches.data.splits import split_of
from timm_branches.data.summary import DataSummary, count_endings, listed
from timm_branches.taxonomy.order import natural_order
from timm_branches.taxonomy.table_files import read_table
from timm_branches.taxonomy.taxonomy import Taxonomy

__all__ = ["ArrayClips", "FileClips", "check_count", "read_clip_csv", "read_clip_folder"]

Choose = Callable[..., Sequence[int] | np.ndarray]


class ArrayClips:
    """Clips in memory.

    Args:
        clips: One uint8 array (N, T, H, W) or (N, T, H, W, C), or a sequence of arrays (T, H, W) or
            (T, H, W, C).
        in_chans: Channels to return; None keeps each clip's own.

    Raises:
        ValueError: If a clip is no such array, or has no frame.

    Example:
        >>> clips = ArrayClips(np.zeros((2, 30, 24, 48), np.uint8))
        >>> clips.read(0, lambda count: [0, count - 1]).shape
        (2, 24, 48, 1)
    """

    def __init__(self, clips: Any, in_chans: int | None = None) -> None:
        for number, clip in enumerate(clips):
            if (
                not isinstance(clip, np.ndarray)
                or clip.dtype != np.uint8
                or clip.ndim not in (3, 4)
                or not len(clip)
            ):
                what = (
                    f"{clip.dtype} of shape {clip.shape}"
                    if isinstance(clip, np.ndarray)
                    else type(clip).__name__
                )
                raise ValueError(
                    "clips must be uint8 arrays (T, H, W) or (T, H, W, C) with at least one "
                    f"frame, but clip {number} "
                    f"is {what}"
                )
        self.clips = clips
        self.in_chans = in_chans

    def __len__(self) -> int:
        return len(self.clips)

    def read(self, index: int, choose: Choose) -> np.ndarray:
        """Some frames of a clip.

        Args:
            index: Which clip.
            choose: Takes the number of frames there are, returns the ascending positions of those
                wanted.

        Returns:
            uint8 array (T, H, W, C).
        """
        clip = self.clips[index]
        clip = clip[np.asarray(_chosen(choose, len(clip), "clips in memory"))]
        channels = self.in_chans or (1 if clip.ndim == 3 else clip.shape[-1])
        return np.stack([match_channels(frame, channels) for frame in clip])

    def identity(self, indices: Iterable[int]) -> str:
        """A checksum of these clips."""
        digest = hashlib.sha256()
        for index in indices:
            digest.update(array_identity(np.asarray(self.clips[index])))
        return digest.hexdigest()


def _chosen(choose: Choose, count: int, what: str) -> Sequence[int] | np.ndarray:
    """What is chosen among frames that have no times."""
    if getattr(choose, "needs_times", False):
        raise ValueError(f"a sampler with a rate= needs videos: {what} have no times.")
    return choose(count)


def check_count(path: str, count: int, expected: int) -> None:
    """Refuse a video with fewer frames than its header says.

    A header may count a few frames too many; more than that are missing from a damaged file.

    Raises:
        ClipError: More are missing.
    """
    if count < expected - max(2, expected // 50):
        raise ClipError(
            f"{str(ClipEndsEarly(path, count)).rstrip('.')}, where {expected} are expected; is the "
            "file complete?"
        )


class FileClips:
    """Clips in video files and in folders of frames.

    Frames are images in natural order: frame2 before frame10.

    Args:
        paths: For each clip a video or a folder.
        in_chans: 3 for RGB, 1 for grey.
        starts: For each clip its first frame, from 0; None is 0 for all.
        ends: For each clip the frame after its last one, -1 for the end of the file; None is -1 for
            all.
    """

    def __init__(
        self,
        paths: Iterable[str],
        in_chans: int = 3,
        starts: Sequence[int] | None = None,
        ends: Sequence[int] | None = None,
    ) -> None:
        self.paths = np.array(list(paths), dtype=str)
        self.in_chans = in_chans
        self.value_range: tuple[float, float] | None = None  # of frames that are image files
        self.starts = (
            np.zeros(len(self), np.int64) if starts is None else np.array(starts, np.int64)
        )
        # Counting may mean decoding a whole video: shared memory, so that one worker counts for all
        # of them.
        # as given, -1: not given
        self.ends = torch.full((len(self),), -1) if ends is None else torch.tensor(ends)
        self._ends = self.ends.clone().share_memory_()  # as counted since

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int, choose: Choose) -> np.ndarray:
        """Some frames of a clip.

        Args:
            index: Which clip.
            choose: Takes the number of frames there are, returns the ascending positions of those
                wanted.

        Returns:
            uint8 array (T, H, W, in_chans).

        Raises:
            ClipError: If the file or a frame cannot be read, or frames differ in size.
            ImportError: If it is a video and PyAV is not installed.
        """
        path, start, end = str(self.paths[index]), int(self.starts[index]), int(self._ends[index])
        if os.path.isdir(path):
            return self._read_folder(path, start, end, choose)
        end = count_frames(path) if end < 0 else end
        try:
            clip = self._read_video(path, start, end, choose)
        except ClipEndsEarly as error:
            check_count(path, error.count, end)
            end = error.count
            clip = self._read_video(path, start, end, choose)
        self._ends[index] = end
        return clip

    def _read_video(self, path: str, start: int, end: int, choose: Choose) -> np.ndarray:
        if start >= end:
            raise ClipError(f"cannot read frame {start} of {path}: it has only {end} frames.")
        if getattr(choose, "needs_times", False):
            times = frame_times(path)[start:end]
            if not len(times):
                raise ClipError(f"cannot read frame {start} of {path}: it has fewer frames.")
            positions = choose(len(times), times)
        else:
            positions = choose(end - start)
        chosen = [start + int(number) for number in positions]
        return _stack(
            read_frames(path, chosen, self.in_chans), [f"frame {number}" for number in chosen], path
        )

    def _read_folder(self, path: str, start: int, end: int, choose: Choose) -> np.ndarray:
        try:
            names = sorted(filter(is_image_name, os.listdir(path)), key=natural_order)
            if not names:
                raise ClipError(f"the folder {path} holds no image.")
            end = len(names) if end < 0 else end
            if not start < end <= len(names):
                raise ClipError(
                    f"cannot read the frames {start} to {end} of {path}: it holds {len(names)} "
                    "images."
                )
            positions = _chosen(choose, end - start, f"the images in {path}")
            chosen = [names[start + int(number)] for number in positions]
            images = [self._decode(os.path.join(path, name)) for name in chosen]
        except OSError as error:
            raise ClipError(f"cannot read the clip {path}: {error}") from error
        return _stack(images, chosen, path)

    def identity(self, indices: Iterable[int]) -> str:
        """A checksum of these files' paths, sizes and times of change, and of the clips' bounds."""
        digest = hashlib.sha256()
        for index in indices:
            bounds = f"{self.starts[index]} {int(self.ends[index])}"
            digest.update(f"{file_identity(str(self.paths[index]))} {bounds}".encode())
        return digest.hexdigest()

    def select(self, indices: Sequence[int]) -> "FileClips":
        """Some of the clips."""
        which = np.asarray(indices, dtype=int)
        starts, ends = self.starts[which].tolist(), self.ends[which].tolist()
        return FileClips(self.paths[which], self.in_chans, starts, ends)

    def _decode(self, path: str) -> np.ndarray:
        try:
            return decode_image(read_file(path), self.in_chans, path, self.value_range)
        except ValueError as error:
            raise ClipError(str(error)) from error


def _stack(images: list[np.ndarray], names: list[str], path: str) -> np.ndarray:
    for image, name in zip(images, names, strict=True):
        if image.shape != images[0].shape:
            (height, width), (other_height, other_width) = images[0].shape[:2], image.shape[:2]
            raise ClipError(
                f"frames of the clip {path} differ in size: {names[0]} is {width} x {height} "
                f"pixels, {name} is {other_width} x {other_height}."
            )
    return np.stack(images)


def read_clip_folder(root: str, in_chans: int = 3, taxonomy: Taxonomy | None = None) -> Source:
    """A folder of class folders with clips: video files, and folders that hold images.

    Classes may be nested, and train, val(idation) and test folders may lie on top, as with images.

    Args:
        root: The folder.
        in_chans: 3 for RGB, 1 for grey.
        taxonomy: The tree whose class names the folders bear; None derives it from the folders.

    Returns:
        The clips, in natural order of their paths.

    Raises:
        ValueError: If there are no clips, a clip lies in no class folder, or folders do not match
            the taxonomy.
    """
    summary = DataSummary(source=root)
    names: list[str] = []
    others: list[str] = []
    stray: list[str] = []
    for folder, below, files in walk(root):
        visible = [name for name in files if not name.startswith(".")]
        prefix = f"{folder}/" if folder else ""
        videos = [name for name in visible if is_video_name(name)]
        images = [name for name in visible if is_image_name(name)]
        names += [prefix + name for name in videos]
        others += [prefix + name for name in visible if name not in videos and name not in images]
        if images and not videos and not below and folder:
            names.append(folder)
        # images beside videos or folders, a preview say, are no frames
        elif images or not (videos or below):
            stray.append(folder)
    if not names:
        raise ValueError(
            f"no clips in {root}; they are expected in one folder per class, either videos "
            f"({', '.join(VIDEO_EXTENSIONS)}) or folders of images, e.g. jump/1.mp4 or "
            "jump/1/000.jpg."
        )
    summary.left_out = count_endings(others)
    if stray:
        text = (
            f"left out in {root}, because they are empty or hold images beside videos or folders: "
            f"{listed(stray)}"
        )
        summary.warnings.append(text)
        warnings.warn(text, stacklevel=2)
    names.sort(key=natural_order)
    _refuse_frames_in_class_folders(names, root)
    clips = FileClips([os.path.join(root, name) for name in names], in_chans)
    return from_names(names, clips, root, taxonomy, summary)


def _refuse_frames_in_class_folders(names: Sequence[str], root: str) -> None:
    """Images that lie directly in class folders would make each class a single clip of no class."""
    for name in names:
        classes_above = name.count("/") - bool(split_of(name.split("/")[0]))
        if classes_above > 0 or is_video_name(name):
            return
    raise ValueError(
        f"the folders in {root} ({listed(names, 3)}) hold images directly: whether a folder is a "
        "class or a clip cannot be told. Frames lie one folder deeper, one folder for each clip: "
        "class/clip/frame.jpg. To classify the single images, use an image data set."
    )


def read_clip_csv(
    path: Any,
    in_chans: int = 3,
    taxonomy: Taxonomy | None = None,
    *,
    root: str | None = None,
    **columns: Any,
) -> Source:
    """A table as for images, whose paths lead to videos or folders of frames.

    Optional columns are `start` and `end`, which cut a clip out of a longer one: the numbers of its
    first frame, from 0, and of the frame after its last. Frames, because they mean the same for
    videos of any frame rate and for folders. An empty start or end is that of the file.

    Args:
        path: The table, as :func:`timm_branches.data.sources.read_csv` takes it.
        in_chans: 3 for RGB, 1 for grey.
        taxonomy: The tree to find the names in; None derives it from the rows.
        root: The folder that paths are relative to; by default the table's own.
        **columns: As in :func:`timm_branches.data.sources.read_csv`.

    Returns:
        The clips in the order of the rows. Clips of one file belong together: they are never
        divided between two splits, unless the table says so.

    Raises:
        FileNotFoundError: Clips are missing; the line is named.
        ValueError: If columns are missing, do not fit the taxonomy, names are unknown or ambiguous
            in it, or start and end are no frame numbers.
    """
    table = read_table(path)
    labelled = label_table(table, taxonomy, reserved=("start", "end"), **columns)
    source = labelled.source
    empty = [""] * len(table)
    starts, ends = table.columns.get("start", empty), table.columns.get("end", empty)
    bounds = []
    for row, (start, end) in enumerate(zip(starts, ends, strict=True)):
        bounds.append(_bounds(start, end, table.place(row)))
    paths = resolve_paths(table, labelled.path_column, table_root(path, root))
    first_frames = [first for first, _ in bounds]
    ends_of_clips = [end_of_clip for _, end_of_clip in bounds]
    source.images = FileClips(paths, in_chans, first_frames, ends_of_clips)
    if source.groups is None:
        source.groups = number_groups(paths)
    return source


def number_groups(paths: Sequence[str]) -> np.ndarray:
    """The same number for equal paths."""
    number: dict[str, int] = {}
    return np.array([number.setdefault(path, len(number)) for path in paths])


def _bounds(start: str, end: str, where: str) -> tuple[int, int]:
    """First frame, and the one after the last or -1."""
    try:
        first, last = int(start or 0), int(end or -1)
    except ValueError:
        first, last = -1, 0
    if first < 0 or (end and last <= first):
        raise ValueError(
            f"{where}: start={start!r} and end={end!r} are no range of frames; they are whole "
            "numbers from 0, the last frame is end - 1 (times in seconds have to be multiplied by "
            "the frame rate)."
        )
    return first, last
