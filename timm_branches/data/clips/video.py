"""Frames of video files, decoded with PyAV."""

import contextlib
import os
import warnings
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

    Everything up to the last one is decoded, because compressed frames build on each other and
    few formats tell which one a seek arrives at; only the wanted ones are converted to RGB.
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
    with _open_video(path) as (container, stream):
        count = found = 0
        for number, frame in enumerate(_decode(path, container, stream)):
            count = number + 1
            if indices is not None and number != indices[found]:
                continue
            if frame.is_corrupt:
                raise ClipError(f"frame {number} of {path} is damaged.")
            # A converter with threads of its own hangs a forked worker that frees it: they are not
            # there any more.
            picture = frame.reformat(format="rgb24", threads=1).to_ndarray()  # (H, W, 3)
            image = as_displayed(picture, _display_matrix(frame))
            found += 1
            yield match_channels(np.ascontiguousarray(image), in_chans)
            if indices is not None and found == len(indices):
                return
    if indices is not None or not count:
        raise ClipEndsEarly(path, count)
