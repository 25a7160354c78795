"""Where clips come from: arrays, video files and folders of frames, listed by folders or by a CSV.

As with images, every sequence here can be forked or pickled into DataLoader workers; files are open
only while they are read.
"""

import csv
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
    is_video_name,
    read_frames,
)
from timm_branches.data.images import decode_image, is_image_name, match_channels
from timm_branches.data.sources import (
    _PATH_COLUMNS,
    SPLITS,
    Source,
    _cell_labels,
    _derive,
    _from_names,
    _known_start,
    _some,
    node_labels,
)
from timm_branches.taxonomy.taxonomy import Taxonomy

__all__ = ["ArrayClips", "FileClips", "read_clip_csv", "read_clip_folder"]

Choose = Callable[[int], Sequence[int] | np.ndarray]


class ArrayClips:
    """Clips in memory.

    Args:
        clips: One uint8 array (N, T, H, W) or (N, T, H, W, C), or a sequence of arrays (T, H, W) or
            (T, H, W, C).
        in_chans: Channels to return; None keeps each clip's own.

    Raises:
        ValueError: If a clip is no such array, or has no frame.

    Example:
        >>> ArrayClips(np.zeros((2, 30, 24, 48), np.uint8)).read(0, lambda count: [0, count - 1]).shape
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
                    f"clips must be uint8 arrays (T, H, W) or (T, H, W, C) with at least one frame, but clip {number} "
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
        clip = clip[np.asarray(choose(len(clip)))]
        channels = self.in_chans or (1 if clip.ndim == 3 else clip.shape[-1])
        return np.stack([match_channels(frame, channels) for frame in clip])


class FileClips:
    """Clips in video files and in folders of frames (images, in natural order: frame2 before
    frame10).

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
            # A header may count a few frames too many; more than that are missing from a damaged
            # file.
            if error.count < end - max(2, end // 50):
                raise ClipError(
                    f"{error}, where {end} are expected; is the file complete?"
                ) from error
            end = error.count
            clip = self._read_video(path, start, end, choose)
        self._ends[index] = end
        return clip

    def _read_video(self, path: str, start: int, end: int, choose: Choose) -> np.ndarray:
        if start >= end:
            raise ClipError(f"cannot read frame {start} of {path}: it has only {end} frames")
        chosen = [start + int(number) for number in choose(end - start)]
        return _stack(
            read_frames(path, chosen, self.in_chans), [f"frame {number}" for number in chosen], path
        )

    def _read_folder(self, path: str, start: int, end: int, choose: Choose) -> np.ndarray:
        from timm.utils.misc import natural_key

        try:
            names = sorted(filter(is_image_name, os.listdir(path)), key=natural_key)
            if not names:
                raise ClipError(f"the folder {path} holds no image")
            end = len(names) if end < 0 else end
            if not start < end <= len(names):
                raise ClipError(
                    f"cannot read the frames {start} to {end} of {path}: it holds {len(names)} images"
                )
            chosen = [names[start + int(number)] for number in choose(end - start)]
            images = [self._decode(os.path.join(path, name)) for name in chosen]
        except OSError as error:
            raise ClipError(f"cannot read the clip {path}: {error}") from error
        return _stack(images, chosen, path)

    def _decode(self, path: str) -> np.ndarray:
        with open(path, "rb") as file:
            data = file.read()
        try:
            return decode_image(data, self.in_chans, path)
        except ValueError as error:
            raise ClipError(str(error)) from error


def _stack(images: list[np.ndarray], names: list[str], path: str) -> np.ndarray:
    for image, name in zip(images, names, strict=True):
        if image.shape != images[0].shape:
            (height, width), (other_height, other_width) = images[0].shape[:2], image.shape[:2]
            raise ClipError(
                f"frames of the clip {path} differ in size: {names[0]} is {width} x {height} pixels, {name} is "
                f"{other_width} x {other_height}"
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
    from timm.utils.misc import natural_key

    names, stray = [], []
    for folder, below, files in os.walk(root, followlinks=True):
        below[:] = [name for name in below if not name.startswith(".")]
        rest = os.path.relpath(folder, root).replace(os.sep, "/")
        videos = [
            name if rest == "." else f"{rest}/{name}" for name in files if is_video_name(name)
        ]
        names += videos
        has_images = any(map(is_image_name, files))
        if has_images and not videos and not below and rest != ".":
            names.append(rest)
        # images beside videos or folders, a preview say, are no frames
        elif has_images or not (videos or below):
            stray.append(rest)
    if not names:
        raise ValueError(
            f"no clips in {root}; they are expected in one folder per class, either videos "
            f"({', '.join(VIDEO_EXTENSIONS)}) or folders of images, e.g. jump/1.mp4 or jump/1/000.jpg"
        )
    if stray:
        warnings.warn(
            f"left out in {root}, because they are empty or hold images beside videos or folders: "
            f"{_some(sorted(stray, key=natural_key), 5)}",
            stacklevel=2,
        )
    names.sort(key=natural_key)
    clips = FileClips([os.path.join(root, name) for name in names], in_chans)
    return _from_names(names, clips, root, taxonomy)


def read_clip_csv(path: str, in_chans: int = 3, taxonomy: Taxonomy | None = None) -> Source:
    """A CSV as for images, whose paths lead to videos or folders of frames.

    Columns: `path` (relative to the CSV), then one a level or one `label` with class names.
        Optional are `split`, and
    `start` and `end`, which cut a clip out of a longer one: the numbers of its first frame, from 0,
    and of the frame after its last. Frames, because they mean the same for videos of any frame rate
    and for folders. An empty start or end is that of the file.

    Args:
        path: The CSV.
        in_chans: 3 for RGB, 1 for grey.
        taxonomy: The tree to find the names in; None derives it from the rows.

    Returns:
        The clips in the order of the rows.

    Raises:
        ValueError: If columns are missing, do not fit the taxonomy, names are unknown or ambiguous
            in it, or start and end are no frame numbers.
    """
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file, skipinitialspace=True)
        columns = list(reader.fieldnames or [])
        rows = [{key: (value or "").strip() for key, value in row.items() if key} for row in reader]
    path_column = next((column for column in _PATH_COLUMNS if column in columns), None)
    levels = [column for column in columns if column not in (path_column, "split", "start", "end")]
    if path_column is None or not levels or not rows:
        raise ValueError(
            f"{path} has the columns {columns} and {len(rows)} rows; needed are a column 'path', then one column per "
            "level or one named 'label', and at least one row"
        )
    tree, labels = _csv_labels(rows, levels, taxonomy, path)
    splits = None
    if "split" in columns:
        given = [row["split"].lower() for row in rows]
        if wrong := sorted(set(given) - set(SPLITS)):
            raise ValueError(f"{path} has the splits {_some(wrong)}; known are {_some(SPLITS)}")
        splits = np.array([SPLITS[name] for name in given])
    bounds = [_csv_bounds(row, f"{path}, line {line}") for line, row in enumerate(rows, 2)]
    folder = os.path.dirname(os.path.abspath(path))
    paths = [os.path.join(folder, row[path_column]) for row in rows]
    clips = FileClips(paths, in_chans, [start for start, _ in bounds], [end for _, end in bounds])
    return Source(clips, labels, tree, splits)


def _csv_labels(
    rows: list[dict[str, str]], levels: list[str], taxonomy: Taxonomy | None, where: str
) -> tuple[Taxonomy, torch.Tensor]:
    if levels == ["label"]:
        nodes = [tuple(row["label"].split("/")) if row["label"] else () for row in rows]
        tree = _derive(nodes) if taxonomy is None else taxonomy
        return tree, node_labels(nodes, tree)
    if taxonomy is not None and set(taxonomy.levels) <= set(levels):
        levels = list(taxonomy.levels)
    elif taxonomy is not None and len(levels) != taxonomy.num_levels:
        raise ValueError(
            f"{where} has the level columns {levels}, the taxonomy the levels {list(taxonomy.levels)}"
        )
    cells = [tuple(row[level] for level in levels) for row in rows]
    tree = _derive(map(_known_start, cells), levels) if taxonomy is None else taxonomy
    return tree, _cell_labels(cells, tree, where)


def _csv_bounds(row: dict[str, str], where: str) -> tuple[int, int]:
    """First frame, and the one after the last or -1."""
    try:
        start, end = int(row.get("start") or 0), int(row.get("end") or -1)
    except ValueError:
        start, end = -1, 0
    if start < 0 or (row.get("end") and end <= start):
        raise ValueError(
            f"{where}: start={row.get('start', '')!r} and end={row.get('end', '')!r} are no range of frames; they are "
            "whole numbers from 0, the last frame is end - 1 (times in seconds have to be multiplied by the frame rate)"
        )
    return start, end
