"""Where images come from: decoded arrays, files, and members of a tar, all as sequences of HWC
uint8 arrays.

Every sequence here can be forked or pickled into DataLoader workers and read there in any order:
none keeps an open file position that two processes could move under each other's feet.
"""

import os
import tarfile
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

__all__ = [
    "ArrayImages",
    "FileImages",
    "PackedImages",
    "TarImages",
    "decode_image",
    "is_image_name",
    "match_channels",
    "open_tar",
]

# What OpenCV reads beside the extensions that timm lists by default.
_MORE_EXTENSIONS = {".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
# A compressed archive cannot be read in random order, so its members are kept in memory, undecoded,
# up to this size.
_MAX_PACKED_BYTES = 16 * 1024**3


def is_image_name(path: str) -> bool:
    """Whether a path names an image; hidden files and folders (`.ipynb_checkpoints`, macOS's
    `._a.jpg`) do not.

    The extensions are timm's, so `timm.data.readers.add_img_extensions('.jp2')` works here as well,
    plus what OpenCV reads besides.

    Args:
        path: A path with forward slashes, relative to the root of its dataset.

    Returns:
        True if the file should be read as an image.

    Example:
        >>> is_image_name('cat/1.JPG'), is_image_name('cat/._1.jpg'), is_image_name('cat/notes.txt')
        (True, False, False)
    """
    from timm.data.readers.img_extensions import get_img_extensions

    parts = path.split("/")
    if any(part.startswith(".") or part == "__MACOSX" for part in parts):
        return False
    return (
        os.path.splitext(parts[-1])[1].lower() in get_img_extensions(as_set=True) | _MORE_EXTENSIONS
    )


def _is_cut_jpeg(data: bytes) -> bool:
    """Whether a JPEG ends before its end-of-image marker.

    Some OpenCV versions fill the missing part with grey.
    """
    if data[:2] != b"\xff\xd8":
        return False
    position = 2
    # The segments before the first scan are skipped by their length: a thumbnail in them has an end
    # marker of its own.
    while position + 4 <= len(data) and data[position] == 0xFF and data[position + 1] != 0xDA:
        if data[position + 1] == 0xFF:  # fill byte
            position += 1
        else:
            position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    return data.find(b"\xff\xd9", position) < 0


def decode_image(data: bytes, in_chans: int = 3, name: str = "image") -> np.ndarray:
    """Decode an image file's bytes to HWC uint8.

    OpenCV decodes: RGB order, palettes expanded, alpha dropped (as PIL's `convert('RGB')` does), 16
        bits scaled to 8,
    the EXIF orientation applied. With `in_chans=1` the result is grey, whatever the file holds.

    Args:
        data: The bytes of the file.
        in_chans: 3 for RGB, 1 for grey.
        name: What to call the file in an error.

    Returns:
        uint8 array (H, W, in_chans).

    Raises:
        ValueError: If the bytes are no image that OpenCV can read, or are cut off; the message
            names the file.
    """
    import cv2

    image = None
    reason = "OpenCV cannot decode it"
    if not data:
        reason = "it is empty"
    elif _is_cut_jpeg(data):
        reason = "the JPEG data end before the end-of-image marker"
    else:
        flag = cv2.IMREAD_GRAYSCALE if in_chans == 1 else cv2.IMREAD_COLOR
        try:
            image = cv2.imdecode(np.frombuffer(data, np.uint8), flag)
        except cv2.error as error:  # e.g. more pixels than OpenCV's limit
            reason = str(error).strip()
    if image is None:
        raise ValueError(
            f"cannot read the image {name} ({len(data)} bytes): {reason}. Replace the file or remove it."
        )
    return image[:, :, None] if in_chans == 1 else cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def match_channels(image: np.ndarray, in_chans: int) -> np.ndarray:
    """Bring an HW or HWC uint8 array to `in_chans` channels: grey is repeated to RGB, RGB is
    converted to grey.

    Args:
        image: uint8 array (H, W) or (H, W, C).
        in_chans: Channels wanted.

    Returns:
        uint8 array (H, W, in_chans), the same memory where nothing had to change.

    Raises:
        ValueError: If the image is not uint8, has other dimensions, or cannot be converted.
    """
    if image.dtype != np.uint8 or image.ndim not in (2, 3):
        raise ValueError(
            f"images must be uint8 arrays HW or HWC, not {image.dtype} of shape {image.shape}"
        )
    if image.ndim == 2:
        image = image[:, :, None]
    channels = image.shape[2]
    if channels == in_chans:
        return image
    if channels == 1 and in_chans == 3:
        return np.repeat(image, 3, axis=2)
    if channels == 3 and in_chans == 1:
        import cv2

        return cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[:, :, None]
    raise ValueError(
        f"an image with {channels} channels cannot be read as in_chans={in_chans}; 1 and 3 convert"
    )


class ArrayImages:
    """Images in memory, one array or any sequence of arrays.

    Args:
        images: uint8 array (N, H, W) or (N, H, W, C), or a sequence of uint8 arrays HW or HWC, or
            of functions that take nothing and return one.
        in_chans: Channels to return; None keeps each image's own.

    Example:
        >>> ArrayImages(np.zeros((10, 8, 8), np.uint8), in_chans=3)[0].shape
        (8, 8, 3)
    """

    def __init__(self, images: Any, in_chans: int | None = None) -> None:
        self.images = images
        self.in_chans = in_chans

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> np.ndarray:
        image = self.images[index]
        image = np.asarray(image() if callable(image) else image)
        channels = self.in_chans or (1 if image.ndim == 2 else image.shape[-1])
        return match_channels(image, channels)


class FileImages:
    """Images in files, opened when they are asked for.

    Args:
        paths: The files.
        in_chans: 3 for RGB, 1 for grey.
    """

    def __init__(self, paths: Iterable[str], in_chans: int = 3) -> None:
        # One fixed-width array rather than a list: forked workers do not copy it just by counting
        # references.
        self.paths = np.array(list(paths), dtype=str)
        self.in_chans = in_chans

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> np.ndarray:
        path = str(self.paths[index])
        with open(path, "rb") as file:
            return decode_image(file.read(), self.in_chans, path)


class PackedImages:
    """Undecoded image files, packed into one array that forked workers share without copying.

    Args:
        data: The bytes of all files, one after the other.
        sizes: How many bytes each has.
        names: What to call each in an error.
        in_chans: 3 for RGB, 1 for grey.
    """

    def __init__(
        self, data: bytes | bytearray, sizes: Sequence[int], names: Sequence[str], in_chans: int = 3
    ) -> None:
        self.data = np.frombuffer(data, np.uint8)
        self.ends = np.cumsum(np.array(sizes, np.int64))
        self.names = np.array(list(names), dtype=str)
        self.in_chans = in_chans

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> np.ndarray:
        index = range(len(self))[index]
        start = self.ends[index - 1] if index else 0
        return decode_image(
            self.data[start : self.ends[index]].tobytes(), self.in_chans, str(self.names[index])
        )


class TarImages:
    """Members of an uncompressed tar, read in place.

    The position and length of each member are noted once; a read is then a single `pread`, which
    moves no shared file position, so any number of forked workers may read at once.

    Args:
        path: The tar.
        offsets: Where each member's bytes begin.
        sizes: How many bytes each has.
        names: What to call each in an error.
        in_chans: 3 for RGB, 1 for grey.
    """

    def __init__(
        self,
        path: str,
        offsets: Sequence[int],
        sizes: Sequence[int],
        names: Sequence[str],
        in_chans: int = 3,
    ) -> None:
        self.path = path
        self.offsets = np.array(offsets, np.int64)
        self.sizes = np.array(sizes, np.int64)
        self.names = np.array(list(names), dtype=str)
        self.in_chans = in_chans
        self._file: Any = None

    def __len__(self) -> int:
        return len(self.offsets)

    def __getitem__(self, index: int) -> np.ndarray:
        if self._file is None:
            self._file = open(self.path, "rb")  # stays open for the life of the dataset
        data = os.pread(self._file.fileno(), int(self.sizes[index]), int(self.offsets[index]))
        return decode_image(data, self.in_chans, str(self.names[index]))

    def __getstate__(self) -> dict[str, Any]:
        # an open file cannot be pickled into a spawned worker
        return {**self.__dict__, "_file": None}


def open_tar(path: str, in_chans: int = 3) -> tuple[list[str], PackedImages | TarImages]:
    """List the image members of a tar and give random access to them.

    timm's `ReaderImageInTar` does not fit: it takes no compressed tar, keeps only the last folder
    of a member's path as its class (a hierarchy is lost, equal names merge), and forked workers
    share its one open file position.

    Args:
        path: A .tar, or a compressed one (.tar.gz, .tar.bz2, .tar.xz). Members of a compressed tar
            are kept in memory as they are in the file, undecoded.
        in_chans: 3 for RGB, 1 for grey.

    Returns:
        The members' paths, and the images as a sequence in the same order.

    Raises:
        ValueError: If it is no tar, is cut off, or if a compressed one holds more than fits in
            memory.
    """
    members: list[tuple[str, int, int]] = []
    packed = bytearray()
    try:
        # Streaming ('|*') reads a compressed tar once, front to back; only a plain one is read in
        # place later.
        compressed = not _is_plain_tar(path)
        with tarfile.open(path, "r|*" if compressed else "r:") as tar:
            for info in tar:
                name = os.path.normpath(info.name).replace(os.sep, "/")
                if not info.isfile() or not is_image_name(name):
                    continue
                members.append((name, info.offset_data, info.size))
                if compressed:
                    if len(packed) + info.size > _MAX_PACKED_BYTES:
                        raise ValueError(
                            f"{path} holds more than {_MAX_PACKED_BYTES >> 30} GiB of images; a compressed tar is kept "
                            "in memory. Decompress it (gunzip): a plain .tar is read in place."
                        )
                    packed += tar.extractfile(info).read()  # type: ignore[union-attr]
    except (tarfile.TarError, EOFError, OSError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise ValueError(f"cannot read {path} as a tar: {error}. Is it complete?") from error
    names = [name for name, _, _ in members]
    labels = [f"{path}:{name}" for name in names]
    sizes = [size for _, _, size in members]
    if compressed:
        return names, PackedImages(packed, sizes, labels, in_chans)
    return names, TarImages(path, [offset for _, offset, _ in members], sizes, labels, in_chans)


def _is_plain_tar(path: str) -> bool:
    """Whether a file is a tar without compression."""
    with open(path, "rb") as file:
        start = file.read(6)
    return not start.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00"))
