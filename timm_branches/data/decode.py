"""One contract for the pixels of every file: they are what the file holds.

Classification, masks, restoration, frames and predictions all decode here.

==================== ==================================================================
what the file holds  what is returned
==================== ==================================================================
8 bits a sample      uint8, as they are; palettes and bits as their colours
RGBA, grey and alpha the colours as they are: alpha is dropped, never multiplied in
CMYK, YCbCr, Lab     RGB, as PIL converts them
more than 8 bits     float32 in [0, 1], scaled by a stated range (see `value_range`)
several pages        the first; all of them as bands, if `in_chans` > 3 asks for as many
EXIF orientation     applied
==================== ==================================================================

Grey becomes RGB by repetition, RGB becomes grey by its luma. With `in_chans` of 2 or more than 3 a
file must have that many samples a pixel, or pages.
"""

import contextlib
import io
import logging
import os
import stat
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

__all__ = [
    "MAX_PIXELS",
    "ValueRange",
    "decode_image",
    "match_channels",
    "read_file",
    "scale_values",
]

ValueRange = tuple[float, float]

MAX_PIXELS = 2**28
"""Pixels beyond which an image is refused before it is decoded: 16,384 x 16,384."""

_logger = logging.getLogger(__name__)
_ZEROS = 64  # a compressed stream does not end in so many zero bytes
_warned_of_range = False


def read_file(path: str) -> bytes:
    """The bytes of a regular file.

    Whatever else bears the name (a pipe would wait for ever) is refused.

    Raises:
        OSError: There is no such file.
        ValueError: It is no regular file.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError(f"cannot read the image {path}: it is no regular file.")
    with open(path, "rb") as file:
        return file.read()


def decode_image(
    data: bytes, in_chans: int = 3, name: str = "image", value_range: ValueRange | None = None
) -> np.ndarray:
    """Decode an image file's bytes, by the contract of this module.

    Args:
        data: The bytes of the file.
        in_chans: 3 for RGB, 1 for grey; more for as many bands or pages.
        name: What to call the file in an error.
        value_range: The values that stand for black and white, such as (0, 4095) for 12 bits in 16.
            By default 8 bits are as they are; for deeper ones what the file's tags say, else the
            whole range of an unsigned type. Signed and floating-point values need it.

    Returns:
        Array (H, W, in_chans), uint8, or float32 in [0, 1] for what is deeper than 8 bits or scaled
        by a given range.

    Raises:
        ValueError: The bytes are no image that can be read, are cut off, hold too many pixels, or
            have another number of bands; the message names the file.
    """
    try:
        pixels, own_range = _decode(data, in_chans)
    except ValueError as error:
        raise ValueError(
            f"cannot read the image {name} ({len(data)} bytes): {error}.{_remedy(error)}"
        ) from error
    if not pixels.size:
        raise ValueError(f"cannot read the image {name}: it has no pixel.")
    try:
        image = match_channels(scale_values(pixels, value_range, own_range, name), in_chans)
    except ValueError as error:
        raise ValueError(f"cannot read the image {name}: {error}") from error
    return image if image.flags.writeable else image.copy()


def scale_values(
    pixels: np.ndarray,
    value_range: ValueRange | None = None,
    own_range: ValueRange | None = None,
    name: str = "image",
) -> np.ndarray:
    """Values of any type as uint8, or as float32 in [0, 1].

    Args:
        pixels: Array of any shape.
        value_range: The values that stand for 0 and 1.
        own_range: What the file itself says of them, where `value_range` is not given.
        name: What to call the image in a message.

    Raises:
        ValueError: The range is not known, or is none.

    Example:
        >>> scale_values(np.array([0, 4095], np.uint16), (0, 4095)).tolist()
        [0.0, 1.0]
    """
    global _warned_of_range
    if pixels.dtype == np.bool_:
        pixels = pixels.astype(np.uint8) * 255
    given = value_range is not None
    limits = value_range or own_range
    if pixels.dtype == np.uint8 and limits in (None, (0, 255)):
        return pixels
    if limits is None:
        limits = _type_range(pixels)
    low, high = (float(limit) for limit in limits)
    if not low < high:
        raise ValueError(
            f"value_range={limits}: give the values of black and white, as in (0, 4095)."
        )
    top = float(pixels.max(initial=0))
    unsigned = pixels.dtype.kind == "u"
    if unsigned and not given and own_range is None and 0 < top < high / 8 and not _warned_of_range:
        _warned_of_range = True
        _logger.warning(
            "%s holds values up to %g of %g: if its range is smaller, as of 12 bits in 16, state "
            "it (value_range=, --value-range 0 4095).",
            name,
            top,
            high,
        )
    scaled = (pixels.astype(np.float64) - low) / (high - low)
    return np.clip(scaled, 0, 1).astype(np.float32)


def _type_range(pixels: np.ndarray) -> ValueRange:
    if pixels.dtype.kind == "u":
        return 0, np.iinfo(pixels.dtype).max
    raise ValueError(
        f"its values are {pixels.dtype} from {pixels.min():g} to {pixels.max():g}, and no tag says "
        "what is black and white: state it (value_range=, --value-range LOW HIGH)."
    )


def check_uint8(image: np.ndarray) -> np.ndarray:
    """An image that somebody gave as an array; its type says the range of its values.

    Raises:
        ValueError: It is not uint8.
    """
    if image.dtype != np.uint8 or image.ndim not in (2, 3):
        raise ValueError(
            f"images must be uint8 arrays HW or HWC, not {image.dtype} of shape {image.shape}"
        )
    return image


def match_channels(image: np.ndarray, in_chans: int) -> np.ndarray:
    """Bring an HW or HWC array to `in_chans` channels: grey is repeated, RGB becomes its luma.

    Args:
        image: uint8 or float32 array (H, W) or (H, W, C).
        in_chans: Channels wanted.

    Returns:
        Array (H, W, in_chans) of the same type, the same memory where nothing had to change.

    Raises:
        ValueError: The image is of another type, has other dimensions, or cannot be converted.
    """
    if image.dtype not in (np.uint8, np.float32) or image.ndim not in (2, 3):
        raise ValueError(
            f"images must be uint8 (or float32 in [0, 1]) arrays HW or HWC, not {image.dtype} of "
            f"shape {image.shape}"
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


# ---- formats


def _decode(data: bytes, in_chans: int) -> tuple[np.ndarray, ValueRange | None]:
    """Pixels as they are in the file, and the range that it states."""
    from PIL import Image

    if not data:
        raise ValueError("it is empty")
    if data[:2] in (b"P5", b"P6"):
        return _decode_netpbm(data)
    limit = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None  # ours, below, comes with a sentence
    try:
        image = Image.open(io.BytesIO(data))
    except Exception as error:
        if data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
            return _or_value_error(_decode_tiff, data, None, in_chans)
        raise ValueError("it is no image of a known format, or its header is damaged") from error
    finally:
        Image.MAX_IMAGE_PIXELS = limit
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ValueError(
            f"it declares {width} x {height} pixels, more than {MAX_PIXELS} "
            "(timm_branches.data.decode.MAX_PIXELS)"
        )
    _check_whole(data, image.format)
    return _or_value_error(_by_format, data, image, in_chans)


def _or_value_error(decode: Callable, data: bytes, image: Any, in_chans: int) -> Any:
    """What a decoder gives; decoders raise whatever they like on damaged files."""
    try:
        return decode(data, image, in_chans)
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(f"it cannot be decoded ({error})") from error


def _check_whole(data: bytes, kind: str | None) -> None:
    """Refuse files whose decoders fill what is missing without a word."""
    if kind == "WEBP":
        size = int.from_bytes(data[4:8], "little") + 8
        if len(data) < size - 1:
            raise ValueError(f"the WebP data end after {len(data)} of {size} bytes")
        if not data[:size].rstrip(b"\0") or data[size - _ZEROS : size].count(0) == _ZEROS:
            raise ValueError("the WebP data end in zeros, as of an unfinished download")


def _by_format(data: bytes, image: Any, in_chans: int) -> tuple[np.ndarray, ValueRange | None]:
    oriented = image.getexif().get(274, 1) not in (0, 1)
    if image.format in ("JPEG", "MPO") and image.mode in ("L", "RGB") and not oriented:
        return _decode_jpeg(data, in_chans), None
    if image.format in ("JPEG", "MPO"):
        _decode_jpeg(data, in_chans)  # PIL fills what a cut file lacks
    if image.format == "TIFF":
        return _decode_tiff(data, image, in_chans)
    if image.format == "PNG" and data[24] == 16:
        return _decode_deep_png(data, image), None
    return _from_pil(image, in_chans), None


def _decode_jpeg(data: bytes, in_chans: int) -> np.ndarray:
    import simplejpeg

    colours = "GRAY" if in_chans == 1 else "RGB"
    if simplejpeg.decode_jpeg_header(data)[2] in ("CMYK", "YCCK"):
        colours = "CMYK"
    try:
        return simplejpeg.decode_jpeg(data, colours)
    except ValueError as error:
        if "premature end" in str(error).lower():
            raise ValueError("the JPEG data end before the image does") from error
    # damage that every decoder passes over, such as bytes before a marker
    return simplejpeg.decode_jpeg(data, colours, strict=False)


def from_pil(image: Any, in_chans: int, value_range: ValueRange | None = None) -> np.ndarray:
    """A PIL image of any mode, as files are decoded.

    Raises:
        ValueError: The range of its values is not known, or it has another number of bands.

    Example:
        >>> from PIL import Image
        >>> from_pil(Image.new('RGBA', (2, 1), (10, 20, 30, 0)), 3).tolist()
        [[[10, 20, 30], [10, 20, 30]]]
    """
    return match_channels(scale_values(_from_pil(image, in_chans), value_range), in_chans)


def _from_pil(image: Any, in_chans: int) -> np.ndarray:
    from PIL import ImageOps

    image = ImageOps.exif_transpose(image)
    mode = image.mode
    if mode.startswith("I;16"):
        return np.asarray(image).astype(np.uint16)
    if mode in ("I", "F"):
        return np.asarray(image)
    if mode == "1":
        return np.asarray(image.convert("L"))
    if mode == "L":
        return np.asarray(image)
    if mode in ("RGBA", "RGBX") and in_chans == 4:
        return np.asarray(image)
    if mode in ("LA", "La"):
        return np.asarray(image)[:, :, 0] if in_chans != 2 else np.asarray(image)
    if mode in ("RGBA", "RGBX"):
        return np.ascontiguousarray(np.asarray(image)[:, :, :3])
    return np.asarray(image.convert("RGB"))


def _decode_deep_png(data: bytes, image: Any) -> np.ndarray:
    """A PNG of 16 bits a sample, which PIL would cut to 8 where it has colours."""
    import cv2

    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if pixels is None:
        raise ValueError("it cannot be decoded")
    if pixels.ndim == 3 and data[25] == 4:  # grey and alpha, which OpenCV spreads over BGRA
        pixels = pixels[:, :, 0]
    elif pixels.ndim == 3:
        pixels = pixels[:, :, 2::-1]  # BGR(A) to RGB
    return _orient(np.ascontiguousarray(pixels), image.getexif().get(274, 1))


def _decode_netpbm(data: bytes) -> tuple[np.ndarray, ValueRange | None]:
    """PGM and PPM, whose header states the range of the values."""
    numbers: list[int] = []
    position = 2
    while len(numbers) < 3:
        while position < len(data) and data[position : position + 1].isspace():
            position += 1
        if data[position : position + 1] == b"#":
            position = data.find(b"\n", position) % (len(data) + 1)
            continue
        end = position
        while end < len(data) and data[end : end + 1].isdigit():
            end += 1
        if end == position:
            raise ValueError("its header is damaged")
        numbers.append(int(data[position:end]))
        position = end
    width, height, top = numbers
    channels = 3 if data[:2] == b"P6" else 1
    if not 0 < width * height <= MAX_PIXELS or not 0 < top < 65536:
        raise ValueError(f"its header declares {width} x {height} pixels of values up to {top}")
    kind = np.dtype(">u2") if top > 255 else np.dtype("u1")
    count = width * height * channels
    body = data[position + 1 : position + 1 + count * kind.itemsize]
    if len(body) < count * kind.itemsize:
        raise ValueError("the data end before the image does")
    pixels = np.frombuffer(body, kind).reshape(height, width, channels)
    if top == 255:
        return pixels.copy(), None
    return pixels.astype(np.uint16), (0, top)


def _decode_tiff(data: bytes, image: Any, in_chans: int) -> tuple[np.ndarray, ValueRange | None]:
    """TIFF: what PIL reads exactly by PIL, the rest by tifffile."""
    simple = image is not None and image.mode in ("1", "L", "P", "RGB", "CMYK", "YCbCr", "LAB")
    deep_rgb = simple and image.mode == "RGB" and max(image.tag_v2.get(258, (8,))) > 8
    if simple and not deep_rgb and in_chans in (1, 3):
        return _from_pil(image, in_chans), None
    try:
        import tifffile
    except ImportError:
        if image is not None and not deep_rgb and in_chans in (1, 3):
            return _from_pil(image, in_chans), _tag_range(image.tag_v2)
        raise ValueError(
            "a TIFF of this kind (deep colours, bands, pages) needs tifffile: "
            "pip install 'timm_branches[tiff]'"
        ) from None
    with _naming_codecs(), tifffile.TiffFile(io.BytesIO(data)) as file:
        first: Any = file.pages[0]
        tags = {tag.code: tag.value for tag in first.tags}
        pixels = _tiff_pixels(file, in_chans)
    if pixels.ndim == 3 and in_chans in (1, 3):
        # without alpha
        if pixels.shape[2] == 4:
            pixels = pixels[:, :, :3]
        elif pixels.shape[2] == 2:
            pixels = pixels[:, :, 0]
    pixels = _orient(np.ascontiguousarray(pixels), tags.get(274, 1))
    return pixels, _tag_range(tags)


def _tiff_pixels(file: Any, in_chans: int) -> np.ndarray:
    """The first page (H, W) or (H, W, bands) of an open TIFF, or its pages where they are bands."""
    page = file.pages[0]
    if page.imagewidth * page.imagelength > MAX_PIXELS:
        raise ValueError(f"it declares {page.imagewidth} x {page.imagelength} pixels")
    if in_chans > 3 and len(file.pages) == in_chans and page.samplesperpixel == 1:
        pixels = np.stack([band.asarray() for band in file.pages], axis=-1)
    else:
        pixels = page.asarray()
        if page.planarconfig == 2 and pixels.ndim == 3:  # (bands, H, W)
            pixels = np.moveaxis(pixels, 0, -1)
    if page.photometric == 0 and pixels.dtype.kind == "u":  # white is zero
        pixels = np.iinfo(pixels.dtype).max - pixels
    return pixels


@contextlib.contextmanager
def _naming_codecs() -> Iterator[None]:
    """Say how what tifffile lacks for a compression is installed."""
    try:
        yield
    except ValueError as error:
        if "imagecodecs" not in str(error):
            raise
        raise ValueError(f"{error}".rstrip(".") + ": pip install 'timm_branches[tiff]'") from None


def _remedy(error: ValueError) -> str:
    """What a person can do about a file that cannot be read."""
    return "" if "pip install" in str(error) else " Replace the file or remove it."


def _tag_range(tags: Any) -> ValueRange | None:
    """The range of values that a TIFF states: SMin/SMaxSampleValue, Min/MaxSampleValue, bits."""
    for lowest, highest in ((340, 341), (280, 281)):
        if highest in tags:
            low, high = _single(tags.get(lowest, 0)), _single(tags[highest])
            if low is not None and high is not None and low < high:
                return low, high
    bits = _single(tags.get(258, 8))
    if bits is not None and 8 < bits < 16:
        return 0, 2**bits - 1
    return None


def _single(value: Any) -> float | None:
    values = set(value) if isinstance(value, tuple | list) else {value}
    return float(values.pop()) if len(values) == 1 else None


def _orient(pixels: np.ndarray, orientation: Any) -> np.ndarray:
    """Pixels (H, W, ...) as EXIF's orientation, 1 to 8, says that they are to be seen."""
    if orientation in (5, 6, 7, 8):
        pixels = np.swapaxes(pixels, 0, 1)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)
