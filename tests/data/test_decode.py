"""What files hold against PIL, tifffile and the arrays they were made of, format by format."""

import io
import os
import socket
import struct
import tarfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from timm_branches.data import create_dataset, create_transform
from timm_branches.data import decode as module
from timm_branches.data.decode import decode_image, from_pil, read_file
from timm_branches.data.image_list import ImageList
from timm_branches.data.images import ArrayImages, open_tar

tifffile = pytest.importorskip("tifffile")

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (13, 17, 3), np.uint8)
ALPHA = RNG.integers(0, 256, (13, 17), np.uint8)
DEEP = RNG.integers(0, 65536, (13, 17), np.uint16)
DEEP_RGB = RNG.integers(0, 65536, (13, 17, 3), np.uint16)


def file_of(image, kind, **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def tiff_of(array, **options):
    stream = io.BytesIO()
    tifffile.imwrite(stream, array, **options)
    return stream.getvalue()


def luma(rgb):
    """ITU-R 601, as PIL's convert('L') has it."""
    return rgb.astype(float) @ [0.299, 0.587, 0.114]


# ---- 8 bits

LOSSLESS = ["PNG", "TIFF", "BMP", "WEBP", "PPM", "TGA"]


@pytest.mark.parametrize("kind", LOSSLESS)
def test_rgb(kind):
    options = {"lossless": True} if kind == "WEBP" else {}
    data = file_of(Image.fromarray(RGB), kind, **options)
    assert np.array_equal(decode_image(data, 3), RGB)
    grey = decode_image(data, 1)
    assert grey.shape == (13, 17, 1)
    assert np.abs(grey[:, :, 0] - luma(RGB)).max() <= 1


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "TGA"])
def test_alpha_is_not_multiplied_in(kind):
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    rgba = np.dstack([RGB, ALPHA])
    data = file_of(Image.fromarray(rgba), kind, **options)
    assert np.array_equal(decode_image(data, 3), RGB)
    assert np.array_equal(decode_image(data, 4), rgba)
    assert np.abs(decode_image(data, 1)[:, :, 0] - luma(RGB)).max() <= 1
    assert np.array_equal(from_pil(Image.fromarray(rgba), 3), RGB)


@pytest.mark.parametrize("extra", ["unassalpha", "assocalpha", "unspecified"])
def test_fourth_sample_of_tiff(extra):
    rgba = np.dstack([RGB, np.maximum(RGB.max(2), ALPHA)])
    data = tiff_of(rgba, photometric="rgb", extrasamples=[extra])
    if extra != "assocalpha":  # there PIL, and many others, divide; the file's own values are these
        assert np.array_equal(decode_image(data, 3), RGB)
    assert np.array_equal(decode_image(data, 4), rgba)


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "CMYK", "YCbCr", "PA"])
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "GIF"])
def test_modes(mode, kind):
    image = Image.fromarray(RGB).convert("RGB" if mode == "PA" else mode if mode != "LA" else "LA")
    if mode == "PA":
        image = Image.fromarray(RGB).quantize(16)
        image.info["transparency"] = 3
    try:
        data = file_of(image, kind)
    except (OSError, KeyError, ValueError):
        pytest.skip(f"PIL writes no {mode} as {kind}")
    opened = Image.open(io.BytesIO(data))
    bare = (
        opened.convert("RGBA").convert("RGB")
        if "transparency" in opened.info
        else opened.convert("RGB")
    )
    assert np.array_equal(decode_image(data, 3), np.asarray(bare))
    assert np.array_equal(from_pil(Image.open(io.BytesIO(data)), 3), np.asarray(bare))


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0, "quality": 100}])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpeg(options, mode):
    data = file_of(Image.fromarray(RGB).convert(mode), "JPEG", **options)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert np.array_equal(decode_image(data, 3), expected)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(kind, orientation):
    from PIL import ImageOps

    exif = Image.Exif()
    exif[274] = orientation
    options = {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
    options |= {"lossless": True} if kind == "WEBP" else {}
    data = file_of(Image.fromarray(RGB), kind, exif=exif, **options)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    assert np.array_equal(decode_image(data, 3), expected)


# ---- more than 8 bits


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey(kind):
    data = file_of(Image.fromarray(DEEP), kind)
    expected = DEEP / 65535
    assert np.allclose(decode_image(data, 1)[:, :, 0], expected, atol=1e-7)
    assert np.allclose(decode_image(data, 3), expected[:, :, None], atol=1e-7)


@pytest.mark.parametrize("orientation", [1, 6])
def test_16_bit_colours(orientation):
    import cv2

    png = cv2.imencode(".png", DEEP_RGB[:, :, ::-1])[1].tobytes()
    assert np.allclose(decode_image(png, 3), DEEP_RGB / 65535, atol=1e-7)
    rgba = np.dstack([DEEP_RGB[:, :, ::-1], DEEP])
    png = cv2.imencode(".png", rgba)[1].tobytes()
    assert np.allclose(decode_image(png, 3), DEEP_RGB / 65535, atol=1e-7)
    tiff = tiff_of(DEEP_RGB, photometric="rgb", extratags=[(274, "H", 1, orientation, True)])
    upright = np.rot90(DEEP_RGB, -1) if orientation == 6 else DEEP_RGB
    assert np.allclose(decode_image(tiff, 3), upright / 65535, atol=1e-7)


def test_12_bits_in_16(caplog):
    """3,300 values stay 3,300 values."""
    values = np.arange(3300, dtype=np.uint16).reshape(60, 55)
    data = file_of(Image.fromarray(values), "PNG")
    stated = decode_image(data, 1, value_range=(0, 4095))
    assert np.allclose(stated[:, :, 0], values / 4095, atol=1e-7)
    assert len(np.unique(stated)) == 3300
    module._warned_of_range = False
    assert len(np.unique(decode_image(data, 1))) == 3300
    assert "state it" in caplog.text
    tagged = tiff_of(values, extratags=[(341, "H", 1, 4095, True)])
    assert np.allclose(decode_image(tagged, 1)[:, :, 0], values / 4095, atol=1e-7)


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.float32, np.float64])
def test_signed_and_float(dtype):
    values = (DEEP.astype(np.int64) - 1000).clip(-1000, 30000).astype(dtype)
    data = tiff_of(values)
    with pytest.raises(ValueError, match="state it"):
        decode_image(data, 1, "scan.tif")
    expected = ((values.astype(float) + 1000) / 5000).clip(0, 1)
    found = decode_image(data, 1, value_range=(-1000, 4000))[:, :, 0]
    assert np.allclose(found, expected, atol=1e-6)


def test_range_of_8_bits():
    data = file_of(Image.fromarray(RGB), "PNG")
    assert decode_image(data, 3, value_range=(0, 255)).dtype == np.uint8
    expected = ((RGB - 50.0) / 100).clip(0, 1)
    assert np.allclose(decode_image(data, 3, value_range=(50, 150)), expected, atol=1e-6)
    with pytest.raises(ValueError, match="black and white"):
        decode_image(data, 3, value_range=(5, 5))


@pytest.mark.parametrize("top", [100, 255, 1023, 65535])
@pytest.mark.parametrize("channels", [1, 3])
def test_netpbm(top, channels):
    values = RNG.integers(0, top + 1, (4, 6, channels))
    kind = ">u2" if top > 255 else "u1"
    header = f"P{5 if channels == 1 else 6}\n# a comment\n6 4\n{top}\n".encode()
    found = decode_image(header + values.astype(kind).tobytes(), channels)
    scaled = found / 255 if found.dtype == np.uint8 else found
    assert np.allclose(scaled, values / top, atol=1e-6)


# ---- bands and pages


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("layout", ["contig", "separate", "pages"])
def test_bands(dtype, layout):
    top = np.iinfo(dtype).max
    bands = RNG.integers(0, top + 1, (5, 13, 17)).astype(dtype)
    if layout == "contig":
        data = tiff_of(np.moveaxis(bands, 0, -1), photometric="minisblack", planarconfig="contig")
    elif layout == "separate":
        data = tiff_of(bands, photometric="minisblack", planarconfig="separate")
    else:
        stream = io.BytesIO()
        with tifffile.TiffWriter(stream) as writer:
            for band in bands:
                writer.write(band, contiguous=False)
        data = stream.getvalue()
    found = decode_image(data, 5)
    scaled = found / 255 if found.dtype == np.uint8 else found
    assert np.allclose(scaled, np.moveaxis(bands, 0, -1) / top, atol=1e-6)
    with pytest.raises(ValueError, match="7|cannot be read as in_chans"):
        decode_image(data, 7, "bands.tif")


def test_first_page():
    first, second = Image.fromarray(RGB), Image.fromarray(255 - RGB)
    for kind in ("TIFF", "GIF"):
        data = file_of(first, kind, save_all=True, append_images=[second])
        expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        assert np.array_equal(decode_image(data, 3), expected)


# ---- files that decoders read wrongly, or hang on


def jpeg(quality=90):
    picture = Image.fromarray(RGB).resize((320, 240))
    return file_of(picture, "JPEG", quality=quality)


def cut_with_end_marker():
    data = jpeg()
    return data[: len(data) // 2] + b"\xff\xd9"


def webp_with_zeros():
    data = file_of(Image.fromarray(RGB).resize((320, 240)), "WEBP", quality=80)
    return data[: len(data) // 2] + bytes(len(data) - len(data) // 2)


def gigapixel_png():
    def chunk(kind, content):
        return (
            struct.pack(">I", len(content))
            + kind
            + content
            + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (cut_with_end_marker(), "end before the image does"),
        (jpeg()[:-200], "end before the image does"),
        (webp_with_zeros(), "end in zeros"),
        (file_of(Image.fromarray(RGB), "WEBP")[:-40], "WebP data end after|its header is damaged"),
        (file_of(Image.fromarray(RGB), "PNG")[:-60], "cannot be decoded|damaged"),
        (file_of(Image.fromarray(RGB), "GIF")[:60], "cannot be decoded|damaged"),
        (file_of(Image.fromarray(RGB), "BMP")[:-60], "cannot be decoded|damaged"),
        (gigapixel_png(), "40000 x 40000 pixels, more than"),
        (b"", "it is empty"),
        (b"<html>404</html>", "no image of a known format"),
        (b"P6\n100 100\n255\nabc", "end before the image does"),
        (b"P5\n0 4\n255\n", "declares 0 x 4 pixels"),
        (b"MM\0*", "cannot be decoded|damaged"),
        (b"II*\0\x08\0\0\0", "cannot be decoded|damaged|no pages"),
    ],
)
def test_refused(data, reason):
    with pytest.raises(ValueError, match=rf"cannot read the image a/b.jpg .*({reason})"):
        decode_image(data, 3, "a/b.jpg")


def test_no_regular_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a socket's name must be short
    os.mkfifo(tmp_path / "pipe.png")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.png")
    for name in ("pipe.png", "socket.png"):
        with pytest.raises(ValueError, match=f"{name}: it is no regular file"):
            read_file(str(tmp_path / name))
        with pytest.raises(ValueError, match="no regular file"):
            ImageList([str(tmp_path / name)])[0]


def test_wrong_ending(tmp_path):
    (tmp_path / "class").mkdir()
    (tmp_path / "class/1.jpg").write_bytes(file_of(Image.fromarray(RGB), "PNG"))
    assert torch.equal(
        create_dataset(tmp_path)[0][0], torch.from_numpy(RGB).permute(2, 0, 1).float() / 255
    )


# ---- on the way to the model


def test_items_of_pil_are_treated_as_files():
    palette = Image.fromarray(RGB).quantize(16)
    exif = Image.Exif()
    exif[274] = 6
    stream = io.BytesIO(file_of(Image.fromarray(RGB), "PNG", exif=exif))
    turned = Image.open(stream)
    items = ArrayImages([palette, turned, Image.fromarray(np.dstack([RGB, ALPHA]))], 3)
    assert np.array_equal(items[0], np.asarray(palette.convert("RGB")))
    assert np.array_equal(items[1], np.rot90(RGB, -1))
    assert np.array_equal(items[2], RGB)


def test_deep_values_reach_the_model(tmp_path):
    """A 12-bit scan: the values of the tensor are those of the file over the stated range."""
    values = RNG.integers(0, 4096, (32, 32)).astype(np.uint16)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    for name in ("a/1.png", "b/1.png"):
        Image.fromarray(values).save(tmp_path / name)
    transform = create_transform((1, 32, 32), mean=(0.5,), std=(0.25,), crop_pct=1.0)
    data = create_dataset(tmp_path, in_chans=1, value_range=(0, 4095), transform=transform)
    expected = (values / 4095 - 0.5) / 0.25
    assert np.allclose(data[0][0][0].numpy(), expected, atol=1e-5)
    smaller = create_transform((1, 16, 16), mean=(0.5,), std=(0.25,), crop_pct=1.0)
    data.transform = smaller
    reference = Image.fromarray((values / 4095).astype(np.float32)).resize((16, 16), Image.BILINEAR)
    expected = (np.asarray(reference) - 0.5) / 0.25
    assert np.allclose(data[0][0][0].numpy(), expected, atol=1e-5)
    for augment in ("light", "cifar", "imagenet"):
        data.transform = create_transform((1, 16, 16), True, augment, mean=(0.5,), std=(0.25,))
        sample = data[0][0]
        assert sample.shape == (1, 16, 16)
        assert -2.2 < sample.min() < sample.max() < 2.2
    with pytest.raises(ValueError, match="value_range has no effect on digits"):
        create_dataset("digits", value_range=(0, 4095))


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz"])
def test_a_part_of_a_tar_keeps_the_range_of_values(tmp_path, name):
    values = RNG.integers(0, 4096, (3, 6, 5)).astype(np.uint16)
    with tarfile.open(tmp_path / name, "w:gz" if name.endswith("gz") else "w") as tar:
        for index, array in enumerate(values):
            Image.fromarray(array).save(tmp_path / f"{index}.tif")
            tar.add(tmp_path / f"{index}.tif", f"{index}.tif")
    _, images = open_tar(str(tmp_path / name), 1)
    images.value_range = (0, 4095)
    part = images.select([2, 0])
    for index, source in enumerate((2, 0)):
        np.testing.assert_allclose(part[index][:, :, 0], values[source] / 4095, atol=1e-6)


@pytest.mark.parametrize("compression", [1, 5, 8, 32773, 32946])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_compressions_of_deep_tiff(tmp_path, compression, channels):
    """As OpenCV writes them: none, LZW (its default), PackBits, both deflates."""
    import cv2

    values = RNG.integers(0, 4096, (40, 30, channels)).astype(np.uint16)
    path = str(tmp_path / "a.tif")
    stored = values.squeeze() if channels == 1 else values[:, :, [2, 1, 0, 3][:channels]]
    assert cv2.imwrite(path, stored, [cv2.IMWRITE_TIFF_COMPRESSION, compression])
    wanted = min(channels, 3)
    found = decode_image(read_file(path), wanted, path, (0, 4095))
    np.testing.assert_allclose(found, values[:, :, :wanted] / 4095, atol=1e-6)


def test_a_missing_codec_is_named(tmp_path, monkeypatch):
    import cv2
    import tifffile

    path = str(tmp_path / "a.tif")
    cv2.imwrite(path, RNG.integers(0, 4096, (8, 8, 3)).astype(np.uint16))

    def refuse(self, *args, **kwargs):
        raise ValueError("<COMPRESSION.LZW: 5> requires the 'imagecodecs' package")

    monkeypatch.setattr(tifffile.TiffPage, "asarray", refuse)
    with pytest.raises(ValueError, match=r"a\.tif .*LZW.*pip install 'timm_branches\[tiff\]'") as e:
        decode_image(read_file(path), 3, path)
    assert "Replace" not in str(e.value)
