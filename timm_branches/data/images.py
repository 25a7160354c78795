"""Where images come from: decoded arrays, files, and members of a tar.

All are sequences of HWC arrays.

Every sequence here can be forked or pickled into DataLoader workers and read there in any order:
none keeps an open file position that two processes could move under each other's feet.
"""

import functools
import hashlib
import os
import tarfile
import zlib
from collections.abc import Iterable, Sequence
from tarfile import EOFHeaderError, HeaderError, ReadError  # type: ignore[attr-defined]
from typing import Any

import numpy as np

from timm_branches.data.decode import (
    ValueRange,
    check_uint8,
    decode_image,
    from_pil,
    match_channels,
    read_file,
)

__all__ = [
    "ArrayImages",
    "FileImages",
    "PackedImages",
    "TarImages",
    "is_image_name",
    "open_tar",
]

# what PIL always reads beside the extensions that timm lists by default
_MORE_EXTENSIONS = frozenset(
    ".bmp .dib .gif .jfif .jpe .jp2 .apng .pbm .pgm .ppm .pnm .tga .tif .tiff .webp".split()
)
# A compressed archive cannot be read in random order, so its members are kept in memory, undecoded,
# up to this size.
_MAX_PACKED_BYTES = 16 * 1024**3
_TAR_BLOCK = 512  # a member's header, before its bytes


def is_image_name(path: str) -> bool:
    """Whether a path names an image.

    Hidden files and folders (`.ipynb_checkpoints`, macOS's `._a.jpg`) do not.

    The extensions are timm's, so `timm.data.readers.add_img_extensions('.jp2')` works here as well,
    plus what PIL reads besides.

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
    ending = os.path.splitext(parts[-1])[1].lower()
    known = get_img_extensions(as_set=True) | _MORE_EXTENSIONS
    return ending in known or (ending in _OPTIONAL and _can_decode(ending))


_OPTIONAL = (".avif", ".heic", ".heif")


@functools.cache
def _can_decode(ending: str) -> bool:
    """Whether PIL has a decoder for what not every installation reads."""
    from PIL import Image, features

    if ending == ".avif":
        return bool(features.check("avif"))
    try:  # pillow-heif registers itself when it is told to
        import pillow_heif

        pillow_heif.register_heif_opener()
    except ImportError:
        pass
    return ending in Image.registered_extensions()


def one_of_each_size(dataset: Any, limit: int = 16) -> list[int]:
    """Positions of samples whose images differ in size, as far as files' headers tell.

    Args:
        dataset: Any data set, also a subset of one of ours.
        limit: How many positions at most.

    Returns:
        Positions in the data set; the first alone where sizes cannot be told without decoding.
    """
    positions = range(len(dataset))
    inner, indices = dataset, list(positions)
    while not hasattr(inner, "images") and hasattr(inner, "dataset"):
        if hasattr(inner, "indices"):
            indices = [int(inner.indices[i]) for i in indices]
        inner = inner.dataset
    images = getattr(inner, "images", None)
    images = getattr(images, "images", images)
    fixed = getattr(getattr(inner, "transform", None), "size", None) is not None
    if fixed or images is None or not len(dataset):
        return list(positions[:1])
    repeats = getattr(inner, "repeats", 1)
    ids = getattr(inner, "sample_ids", None)
    first: dict[Any, int] = {}
    for position, index in enumerate(indices[: 100 * limit]):
        sample = int(ids[index]) if ids is not None else index // repeats
        first.setdefault(_size_of(images, sample), position)
        if len(first) >= limit:
            break
    return list(first.values())


def _size_of(images: Any, index: int) -> Any:
    """Height and width of an image, None where only decoding tells."""
    paths = getattr(images, "paths", None)
    if paths is None:
        image = images[index] if isinstance(images, list | tuple | np.ndarray) else None
        return np.shape(image)[:2] if isinstance(image, np.ndarray) else None
    from PIL import Image

    try:
        with Image.open(str(paths[index])) as image:
            return image.size
    except Exception:  # what cannot be read is named when it is
        return None


def file_identity(path: str) -> str:
    """A file's path, size and time of change; of a folder those of the images in it.

    Raises:
        FileNotFoundError: The file is gone.
    """
    path = os.path.abspath(path)
    if os.path.isdir(path):
        names = sorted(name for name in os.listdir(path) if is_image_name(name))
        return "".join(file_identity(os.path.join(path, name)) for name in names)
    stat = os.stat(path)
    return f"{path} {stat.st_size} {stat.st_mtime_ns}\n"


def array_identity(array: np.ndarray) -> bytes:
    """An array's type, shape and values."""
    return f"{array.dtype} {array.shape} ".encode() + array.tobytes()


def _is_pil(image: Any) -> bool:
    return type(image).__module__.startswith("PIL.") and hasattr(image, "getbands")


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
        if callable(image):
            image = image()
        if _is_pil(image):  # as files are decoded: EXIF, palettes, alpha
            return from_pil(image, self.in_chans or len(image.convert("RGB").getbands()))
        image = np.asarray(image)
        if not hasattr(self.images, "identity"):  # not decoded here
            check_uint8(image)
        channels = self.in_chans or (1 if image.ndim == 2 else image.shape[-1])
        return match_channels(image, channels)

    def identity(self, indices: Iterable[int]) -> str:
        """A checksum of these images; where they come from elsewhere, their own."""
        if hasattr(self.images, "identity"):
            return self.images.identity(indices)
        digest = hashlib.sha256()
        for index in indices:
            image = self.images[index]
            digest.update(array_identity(np.asarray(image() if callable(image) else image)))
        return digest.hexdigest()


class FileImages:
    """Images in files, opened when they are asked for.

    Args:
        paths: The files.
        in_chans: 3 for RGB, 1 for grey, more for as many bands.
        value_range: The values of black and white, see :func:`decode_image`.
    """

    def __init__(
        self, paths: Iterable[str], in_chans: int = 3, value_range: ValueRange | None = None
    ) -> None:
        # One fixed-width array rather than a list: forked workers do not copy it just by counting
        # references.
        self.paths = np.array(list(paths), dtype=str)
        self.in_chans = in_chans
        self.value_range = value_range

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> np.ndarray:
        path = str(self.paths[index])
        return decode_image(read_file(path), self.in_chans, path, self.value_range)

    def check_header(self, index: int) -> None:
        """Try whether a file is there and begins like an image.

        Raises:
            OSError: There is no such file, or it may not be read.
            ValueError: It is empty, or no image.
        """
        path = str(self.paths[index])
        if not os.path.getsize(path):
            raise ValueError(f"the file {path} is empty")
        from PIL import Image

        try:
            with Image.open(path):
                return
        except Exception:  # PIL knows fewer kinds than are decoded here
            self[index]

    def identity(self, indices: Iterable[int]) -> str:
        """A checksum of the paths, sizes and times of change of these files."""
        digest = hashlib.sha256()
        for index in indices:
            digest.update(file_identity(str(self.paths[index])).encode())
        return digest.hexdigest()

    def select(self, indices: Sequence[int]) -> "FileImages":
        """Some of the files."""
        paths = self.paths[np.asarray(indices, dtype=int)]
        return FileImages(paths, self.in_chans, self.value_range)


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
        self.value_range: ValueRange | None = None

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> np.ndarray:
        index = range(len(self))[index]
        data = self._bytes(index).tobytes()
        return decode_image(data, self.in_chans, str(self.names[index]), self.value_range)

    def _bytes(self, index: int) -> np.ndarray:
        start = self.ends[index - 1] if index else 0
        return self.data[start : self.ends[index]]

    def identity(self, indices: Iterable[int]) -> str:
        """A checksum of the undecoded bytes of these files."""
        digest = hashlib.sha256()
        for index in indices:
            digest.update(array_identity(self._bytes(index)))
        return digest.hexdigest()

    def select(self, indices: Sequence[int]) -> "PackedImages":
        """Some of the files."""
        parts = [self._bytes(index).tobytes() for index in indices]
        names = [str(self.names[index]) for index in indices]
        sizes = [len(part) for part in parts]
        selected = PackedImages(b"".join(parts), sizes, names, self.in_chans)
        selected.value_range = self.value_range
        return selected


class TarImages:
    """Members of an uncompressed tar, read in place.

    The position and length of each member are noted once; a read is then a single `pread`, which
    moves no shared file position, so any number of forked workers may read at once.

    Args:
        path: The tar.
        offsets: Where each member's bytes begin.
        sizes: How many bytes each has.
        names: What to call each in an error.
        headers: A checksum of each member's header, by which a tar that was written anew while it
            is read is noticed.
        in_chans: 3 for RGB, 1 for grey.
    """

    def __init__(
        self,
        path: str,
        offsets: Sequence[int],
        sizes: Sequence[int],
        names: Sequence[str],
        headers: Sequence[int],
        in_chans: int = 3,
    ) -> None:
        self.path = path
        self.headers = np.array(headers, np.uint32)
        self.offsets = np.array(offsets, np.int64)
        self.sizes = np.array(sizes, np.int64)
        self.names = np.array(list(names), dtype=str)
        self.in_chans = in_chans
        self.value_range: ValueRange | None = None
        self._file: Any = None

    def __len__(self) -> int:
        return len(self.offsets)

    def __getitem__(self, index: int) -> np.ndarray:
        if self._file is None:
            self._file = open(self.path, "rb")  # stays open for the life of the dataset
        name = str(self.names[index])
        offset, size = int(self.offsets[index]), int(self.sizes[index])
        block = os.pread(self._file.fileno(), _TAR_BLOCK + size, offset - _TAR_BLOCK)
        header, data = block[:_TAR_BLOCK], block[_TAR_BLOCK:]
        if zlib.crc32(header) != self.headers[index] or len(data) < size:
            raise ValueError(
                f"{self.path} was changed after its members were listed: {name} is no longer where "
                "it was. Begin again (--resume auto), and leave the file as it is meanwhile."
            )
        return decode_image(data, self.in_chans, name, self.value_range)

    def identity(self, indices: Iterable[int]) -> str:
        """A checksum of the tar's path, size and time of change, and of where these members lie."""
        digest = hashlib.sha256(file_identity(self.path).encode())
        for index in indices:
            digest.update(f"{self.offsets[index]} {self.sizes[index]} ".encode())
        return digest.hexdigest()

    def select(self, indices: Sequence[int]) -> "TarImages":
        """Some of the members."""
        which = np.asarray(indices, dtype=int)
        offsets, sizes = self.offsets[which], self.sizes[which]
        names, headers = self.names[which], self.headers[which]
        selected = TarImages(self.path, offsets, sizes, names, headers, self.in_chans)
        selected.value_range = self.value_range
        return selected

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
        mode: Any = "r|*" if compressed else "r:"
        with tarfile.open(path, mode, tarinfo=_WholeHeader) as tar:
            for info in tar:
                name = os.path.normpath(info.name).replace(os.sep, "/")
                if not info.isfile() or not is_image_name(name):
                    continue
                members.append((name, info.offset_data, info.size))
                if compressed:
                    if len(packed) + info.size > _MAX_PACKED_BYTES:
                        raise ValueError(
                            f"{path} holds more than {_MAX_PACKED_BYTES >> 30} GiB of images; a "
                            "compressed tar is kept "
                            "in memory. Decompress it (gunzip): a plain .tar is read in place."
                        )
                    packed += tar.extractfile(info).read()  # type: ignore[union-attr]
            _check_end(tar)
    except (tarfile.TarError, EOFError, OSError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise ValueError(f"cannot read {path} as a tar: {error}. Is it complete?") from error
    names = [name for name, _, _ in members]
    labels = [f"{path}:{name}" for name in names]
    sizes = [size for _, _, size in members]
    if compressed:
        return names, PackedImages(packed, sizes, labels, in_chans)
    offsets = [offset for _, offset, _ in members]
    with open(path, "rb") as file:
        headers = [
            zlib.crc32(os.pread(file.fileno(), _TAR_BLOCK, offset - _TAR_BLOCK))
            for offset in offsets
        ]
    return names, TarImages(path, offsets, sizes, labels, headers, in_chans)


class _WholeHeader(tarfile.TarInfo):
    """A member's header; tarfile itself takes a tar that is cut at one, or damaged, for its end."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> "_WholeHeader":
        """The next header.

        Raises:
            ReadError: There is none, or half of one, where the mark of the end should be.
        """
        try:
            return super().fromtarfile(archive)
        except EOFHeaderError:  # the empty block at the end
            raise
        except HeaderError as error:
            raise ReadError(f"{error} at byte {archive.offset}") from error


def _check_end(archive: tarfile.TarFile) -> None:
    """Raise a ReadError if something follows the end of a tar, which `cat a.tar b.tar` makes."""
    assert archive.fileobj is not None
    while block := archive.fileobj.read(1 << 20):
        if block.strip(b"\0"):
            raise ReadError("more follows behind its end; unpack tars that were joined")


def _is_plain_tar(path: str) -> bool:
    """Whether a file is a tar without compression."""
    with open(path, "rb") as file:
        start = file.read(6)
    return not start.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00"))
