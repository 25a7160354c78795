"""Frames of video files, decoded with PyAV."""

import contextlib
import os
import warnings
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from timm_branches.data.decode import match_channels

__all__ = [
    "VIDEO_EXTENSIONS",
    "ClipEndsEarly",
    "ClipError",
    "count_frames",
    "frame_rate",
    "frame_times",
    "is_video_name",
    "iterate_frames",
    "read_frames",
]

VIDEO_EXTENSIONS = tuple(
    ".mp4 .m4v .avi .mov .mkv .webm .mpg .mpeg .wmv .ts .mts .m2ts .flv .3gp .ogv .gif".split()
)
_TRANSPORT_STREAMS = (".ts", ".mts", ".m2ts")


class ClipError(ValueError):
    """A clip cannot be read.

    Its file is missing, damaged or empty. The message names the file and the frame.
    """


class ClipEndsEarly(ClipError):
    """A video has fewer frames than were asked for.

    Args:
        path: The video.
        count: Frames that it has.
    """

    def __init__(self, path: str, count: int) -> None:
        super().__init__(f"cannot read frame {count} of {path}: it has only {count} frames")
        self.count = count


def _import_av() -> Any:
    try:
        import av
    except ImportError as error:
        raise ImportError(
            "video files are decoded with PyAV: pip install 'timm_branches[video]'."
        ) from error
    return av


def is_video_name(path: str) -> bool:
    """Whether a path names a video by its extension; hidden files and folders do not.

    Example:
        >>> is_video_name('jump/1.MP4'), is_video_name('jump/._1.mp4'), is_video_name('jump/1.jpg')
        (True, False, False)
    """
    parts = path.split("/")
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in parts)
    return not hidden and os.path.splitext(path)[1].lower() in VIDEO_EXTENSIONS


def _open_container(av: Any, path: str) -> Any:
    """A file's container, found by its contents; a pipe would be waited for without end."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise OSError(f"{path} is no regular file.")
    # names that are no UTF-8 matter to nobody; PyAV 19 does not look at them any more
    options = {"metadata_errors": "ignore"} if int(av.__version__.split(".")[0]) < 19 else {}
    try:
        return av.open(path, **options)
    except av.EOFError:
        # a transport stream of a few packets is too short to be recognised
        if not path.lower().endswith(_TRANSPORT_STREAMS):
            raise
        return av.open(path, format="mpegts", **options)


@contextlib.contextmanager
def _open_video(path: str) -> Iterator[tuple[Any, Any]]:
    """A video's container and its (main) video stream; errors of PyAV become a ClipError."""
    av = _import_av()
    try:
        container = _open_container(av, path)
    except (av.FFmpegError, OSError) as error:  # e.g. no such file
        raise ClipError(f"cannot open the video {path}: {error.strerror or error}") from error
    with container:
        stream = container.streams.best("video")
        if stream is None:
            raise ClipError(
                f"{path} has no pictures, only "
                f"{', '.join(s.type for s in container.streams) or 'nothing'}."
            )
        # loaders have worker processes for what runs in parallel
        stream.codec_context.thread_count = 1
        yield container, stream


def _decode(path: str, container: Any, stream: Any) -> Iterator[Any]:
    """All frames in presentation order, which is the order that decoders give them out in."""
    av = _import_av()
    number = 0
    try:
        for frame in container.decode(stream):
            yield frame
            number += 1
    except av.FFmpegError as error:
        raise ClipError(
            f"cannot decode frame {number} of {path}: {error.strerror or error}"
        ) from error


def count_frames(path: str) -> int:
    """The number of frames of a video.

    It is what the header says, or all of them are decoded if it does not (mkv, webm).

    Args:
        path: The video.

    Returns:
        The number. A header's may be a little too high: it counts packets, and decoders make no
        picture of a few of them (edit lists, packed B-frames).

    Raises:
        ClipError: If the file cannot be decoded or holds no frame.
        ImportError: If PyAV is not installed.
    """
    with _open_video(path) as (container, stream):
        if stream.frames > 0:
            return stream.frames
        count, end = 0, 0.0
        for frame in _decode(path, container, stream):
            count += 1
            end = frame.time or 0.0
        if not count:
            raise ClipError(f"{path} holds no frame.")
        duration = (container.duration or 0) / 1e6
        # no error: the last frame may be meant to stand for long
        if end + end / max(1, count - 1) < 0.9 * duration:
            warnings.warn(
                f"the last of {count} frames of {path} stands at {end:.2f} s, but its header says "
                f"that it lasts {duration:.2f} s; is the file complete?",
                stacklevel=2,
            )
        return count


def frame_rate(path: str) -> float | None:
    """Frames a second on average, as a video's header says; None where it says nothing.

    Raises:
        ClipError: If the file cannot be opened or has no pictures.
        ImportError: If PyAV is not installed.
    """
    with _open_video(path) as (_, stream):
        return float(stream.average_rate) if stream.average_rate else None


def frame_times(path: str) -> np.ndarray:
    """When each frame of a video is shown: seconds since the first, ascending, (frames,).

    Args:
        path: The video.

    Raises:
        ClipError: If the file cannot be decoded or holds no frame.
        ImportError: If PyAV is not installed.
    """
    order = _read_order(path)
    if order is not None:
        times = np.array(order.times) * order.unit
        return times - times[0]
    with _open_video(path) as (container, stream):
        found = []
        rate = float(stream.average_rate) if stream.average_rate else 25.0
        for number, frame in enumerate(_decode(path, container, stream)):
            found.append(number / rate if frame.time is None else frame.time)
    if not found:
        raise ClipError(f"{path} holds no frame.")
    # a frame without a sensible time of its own is shown after the one before
    return np.maximum.accumulate(np.array(found) - found[0])


def _display_matrix(frame: Any) -> tuple[int, int, int, int] | None:
    """The signs (a, b, c, d) of a frame's display matrix; None for one without, or no quarter turn.

    The matrix [a b u; c d v; x y w], in 16.16 fixed point, maps a pixel's (x, y) to
    (ax + cy, bx + dy), y pointing down (ISO 14496-12, 6.2.2).
    """
    from av.sidedata.sidedata import Type

    side_data = frame.side_data.get(Type.DISPLAYMATRIX)
    if side_data is None:
        return None
    matrix = np.frombuffer(bytes(side_data), np.int32)
    a, b, c, d = (int(np.sign(matrix[place])) for place in (0, 1, 3, 4))
    upright, turned = abs(a * d), abs(b * c)
    return (a, b, c, d) if upright != turned else None


def as_displayed(image: np.ndarray, matrix: tuple[int, int, int, int] | None) -> np.ndarray:
    """An image (H, W, C) turned and mirrored as the signs of a display matrix say.

    Example:
        >>> as_displayed(np.array([[[1], [2]]]), (-1, 0, 0, 1))[0, :, 0].tolist()
        [2, 1]
    """
    if matrix is None:
        return image
    a, b, c, d = matrix
    across, down = a, d  # where x and y go
    if a == 0:
        image = image.swapaxes(0, 1)
        across, down = c, b
    if across < 0:
        image = image[:, ::-1]
    if down < 0:
        image = image[::-1]
    return image


def read_frames(path: str, indices: Sequence[int], in_chans: int = 3) -> list[np.ndarray]:
    """Frames of a video by their position in presentation order, also where the frame rate varies.

    Compressed frames build on each other, so all from a key frame on are decoded; only the wanted
    ones are converted to RGB. In a long MP4 or Matroska file whose packets tell the order of its
    frames the decoder skips to the key frame before a wanted one; elsewhere it begins at the start.
    Rotation and mirroring that the file asks for (upright phones, front cameras) are applied.

    Args:
        path: The video.
        indices: Positions from 0, ascending.
        in_chans: 3 for RGB, 1 for grey.

    Returns:
        uint8 arrays (H, W, in_chans).

    Raises:
        ClipError: If the file or a frame cannot be decoded.
        ClipEndsEarly: If there are fewer frames.
        ImportError: If PyAV is not installed.
    """
    return list(iterate_frames(path, indices, in_chans))


def iterate_frames(
    path: str, indices: Sequence[int] | None = None, in_chans: int = 3
) -> Iterator[np.ndarray]:
    """The frames of :func:`read_frames` one after the other, so that one of them is in memory.

    Args:
        path: The video.
        indices: Positions from 0, ascending; None is all frames.
        in_chans: 3 for RGB, 1 for grey.

    Yields:
        uint8 arrays (H, W, in_chans).

    Raises:
        ClipError: If the file or a frame cannot be decoded.
        ClipEndsEarly: If there are fewer frames than the indices say.
        ImportError: If PyAV is not installed.
    """
    found = 0
    if indices is not None:
        for number, frame in _seek_frames(path, indices):
            found += 1
            yield _picture(path, number, frame, in_chans)
        if found == len(indices):
            return
    with _open_video(path) as (container, stream):
        count = 0
        for number, frame in enumerate(_decode(path, container, stream)):
            count = number + 1
            if indices is not None and number != indices[found]:
                continue
            found += 1
            yield _picture(path, number, frame, in_chans)
            if indices is not None and found == len(indices):
                return
    if indices is not None or not count:
        raise ClipEndsEarly(path, count)


def _picture(path: str, number: int, frame: Any, in_chans: int) -> np.ndarray:
    """A decoded frame (H, W, in_chans), as it is to be displayed."""
    if frame.is_corrupt:
        raise ClipError(f"frame {number} of {path} is damaged.")
    # A converter with threads of its own hangs a forked worker that frees it: they are not there
    # any more.
    picture = frame.reformat(format="rgb24", threads=1).to_ndarray()  # (H, W, 3)
    image = as_displayed(picture, _display_matrix(frame))
    return match_channels(np.ascontiguousarray(image), in_chans)


# ---- without decoding what lies between

# below this many frames that nobody asked for decoding them is as quick as looking for another way
_WORTH_SEEKING = 64
_SEEK_FORMATS = ("mov", "matroska")
# codecs of which each packet is one picture
_SEEK_CODECS = ("h264", "hevc", "av1", "vp9", "mpeg4", "mjpeg")
_LEAST_PACKET = 8  # bytes: an MPEG-4 packet that stands for no picture of its own is smaller


class _Order:
    """The timestamps of a video's frames in presentation order, and which of them are key frames.

    Attributes:
        times: Timestamps, ascending, in the stream's unit.
        keys: Positions of the key frames, ascending.
        unit: The stream's unit, in seconds.
    """

    def __init__(self, times: Sequence[int], keys: Sequence[int], unit: float = 1.0) -> None:
        self.unit = unit
        self.times = sorted(times)
        self.keys = sorted(bisect_left(self.times, time) for time in keys)

    def key_before(self, number: int) -> int:
        """The position of the last key frame up to this one."""
        place = bisect_right(self.keys, number)
        return self.keys[place - 1] if place else 0


def _read_order(path: str) -> _Order | None:
    """From the packets, nothing decoded; None where they do not tell for certain."""
    av = _import_av()
    with _open_video(path) as (container, stream):
        known = container.format.name.split(",")[0] in _SEEK_FORMATS
        # a decoder may have a name of its own, libdav1d
        codec = stream.codec_context.codec.canonical_name
        if not known or codec not in _SEEK_CODECS:
            return None
        unit = float(stream.time_base)
        least = _LEAST_PACKET if codec == "mpeg4" else 1
        times, keys = [], []
        try:
            for packet in container.demux(stream):
                if packet.size == 0:  # the end
                    continue
                odd = packet.pts is None or packet.is_discard or packet.is_corrupt
                if odd or packet.size < least:
                    return None
                times.append(packet.pts)
                if packet.is_keyframe:
                    keys.append(packet.pts)
        except av.FFmpegError:
            return None
    if len(set(times)) < len(times) or not keys:
        return None
    return _Order(times, keys, unit)


def _seek_frames(path: str, indices: Sequence[int]) -> Iterator[tuple[int, Any]]:
    """The wanted frames with their positions, as far as they can be found by skipping to them.

    It ends early where a frame is not what the packets said: the rest is to be decoded in order.
    """
    with contextlib.suppress(ClipError):  # of a damaged place decoding in order tells
        yield from _seek(path, indices)


def _seek(path: str, indices: Sequence[int]) -> Iterator[tuple[int, Any]]:
    if not len(indices) or indices[-1] + 1 - len(indices) < _WORTH_SEEKING:
        return
    order = _read_order(path)
    if order is None or indices[-1] >= len(order.times):
        return
    with _open_video(path) as (container, stream):
        frames = _decode(path, container, stream)
        # what comes next; frames that a file's beginning has no key frame for are told by this one
        position = 0
        ahead = next(frames, None)
        if ahead is None or ahead.pts != order.times[0]:
            return
        for wanted in indices:
            key = order.key_before(wanted)
            if key > position:
                container.seek(order.times[key], stream=stream)
                frames = _decode(path, container, stream)
                position, ahead = key, next(frames, None)
                # a seek may arrive earlier, and begin with frames that lack what they build on
                while ahead is not None and (ahead.pts or 0) < order.times[key]:
                    ahead = next(frames, None)
            while ahead is not None and position < wanted:
                if ahead.pts != order.times[position]:
                    return
                position, ahead = position + 1, next(frames, None)
            if ahead is None or ahead.pts != order.times[wanted]:
                return
            yield wanted, ahead
