"""Masks in people's formats, against numpy, PIL and pycocotools."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from timm_branches.data import SegmentationDataset
from timm_branches.data.masks import (
    CITYSCAPES_CLASSES,
    CITYSCAPES_IDS,
    MaskColors,
    coco_masks,
    decode_mask,
    read_mask_colors,
)

RNG = np.random.default_rng(0)
LABELS = RNG.integers(0, 3, (7, 9)).astype(np.uint8)
PALETTE = np.array([[0, 0, 0], [128, 0, 0], [0, 128, 0]], np.uint8)


def put(folder, name, image, **options):
    folder.mkdir(parents=True, exist_ok=True)
    image.save(folder / name, **options)
    return str(folder / name)


def palette_image(labels, palette=PALETTE):
    image = Image.fromarray(labels, "L").convert("P")
    image = Image.frombytes("P", image.size, labels.tobytes())
    image.putpalette(palette.flatten().tolist())
    return image


@pytest.fixture
def photo(tmp_path):
    def write(name="a", shape=LABELS.shape):
        put(tmp_path / "images", f"{name}.png", Image.new("RGB", shape[::-1]))

    write()
    return tmp_path, write


def dataset(root, classes=3, **options):
    return SegmentationDataset(str(root / "images"), str(root / "masks"), classes, **options)


class TestFormats:
    @pytest.mark.parametrize("ending", ["png", "tif", "gif", "bmp", "webp"])
    @pytest.mark.parametrize("mode", ["L", "P", "RGB", "LA", "I;16"])
    def test_values(self, photo, ending, mode):
        root, _ = photo
        if mode == "P":
            image = palette_image(LABELS)
        elif mode == "I;16":
            image = Image.fromarray(LABELS.astype(np.uint16))
        else:
            image = Image.fromarray(LABELS).convert(mode)
        if ending == "webp":
            if mode != "RGB":
                pytest.skip("WebP holds colours")
        try:
            put(
                root / "masks",
                f"a.{ending}",
                image,
                **({"lossless": True} if ending == "webp" else {}),
            )
        except (OSError, KeyError):
            pytest.skip(f"PIL writes no {mode} as {ending}")
        if ending == "gif" and mode in ("RGB", "LA"):
            return  # PIL itself chooses a palette there
        assert torch.equal(dataset(root)[0][1], torch.from_numpy(LABELS).long())

    def test_bits(self, photo):
        root, _ = photo
        put(root / "masks", "a.png", Image.fromarray(LABELS > 0).convert("1"))
        assert torch.equal(dataset(root, 2)[0][1], torch.from_numpy(LABELS > 0).long())

    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_exif(self, tmp_path, orientation):
        """A mask that was turned with its photograph."""
        from PIL import ImageOps

        exif = Image.Exif()
        exif[274] = orientation
        put(tmp_path / "images", "a.png", Image.fromarray(np.dstack([LABELS] * 3)), exif=exif)
        path = put(tmp_path / "masks", "a.png", Image.fromarray(LABELS), exif=exif)
        with Image.open(path) as file:
            expected = np.asarray(ImageOps.exif_transpose(file))
        image, mask = dataset(tmp_path, transform=None)[0]
        assert np.array_equal(mask.numpy(), expected)
        assert image.shape[1:] == mask.shape

    @pytest.mark.parametrize("ending", ["jpg", "webp"])
    def test_lossy(self, photo, ending):
        root, _ = photo
        put(root / "masks", f"a.{ending}", Image.fromarray(np.dstack([LABELS] * 3)))
        with pytest.raises(ValueError, match="cannot be told any more. Save masks as PNG"):
            dataset(root)[0]

    def test_cut(self, photo):
        root, _ = photo
        path = put(root / "masks", "a.png", Image.fromarray(RNG.integers(0, 3, (90, 90), np.uint8)))
        with open(path, "rb") as file:
            data = file.read()
        with open(path, "wb") as file:
            file.write(data[: len(data) // 2])
        with pytest.raises(ValueError, match="no whole image"):
            decode_mask(path)

    def test_another_size(self, photo):
        root, _ = photo
        put(root / "masks", "a.png", Image.fromarray(LABELS[:5]))
        with pytest.raises(ValueError, match=r"\(5, 9\) pixels, the image \(7, 9\)"):
            dataset(root)[0]


class TestColours:
    table = {(0, 0, 0): "sky", "#800000": "sea", (0, 128, 0): "ship"}
    names = ("sky", "sea", "ship")

    @pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
    def test_table(self, photo, mode):
        root, _ = photo
        image = palette_image(LABELS)
        if mode == "P":  # whose indices are in another order
            order = np.array([2, 0, 1])
            image = palette_image(order[LABELS].astype(np.uint8), PALETTE[np.argsort(order)])
        put(root / "masks", "a.png", image if mode == "P" else image.convert(mode))
        data = dataset(root, self.names, mask_colors=self.table)
        assert torch.equal(data[0][1], torch.from_numpy(LABELS).long())

    def test_file(self, photo):
        root, _ = photo
        put(root / "masks", "a.png", palette_image(LABELS).convert("RGB"))
        forms = ["0 0 0 sky\n128 0 0 sea\n0 128 0 ship\n"]
        forms += ["name,r,g,b\nsky,0,0,0\nsea,128,0,0\n\nship,0,128,0\n"]
        forms += ["// colours\nsky\t#000000\nsea\t#800000\nship\t#008000"]
        for text in forms:
            (root / "colours.txt").write_text(text)
            data = dataset(root, self.names, mask_colors=root / "colours.txt")
            assert torch.equal(data[0][1], torch.from_numpy(LABELS).long())
        (root / "colours.txt").write_text("0 0 0 sky\n128 0 sea\n")
        with pytest.raises(ValueError, match="line 2: '128 0 sea'"):
            read_mask_colors(root / "colours.txt")

    def test_unknown_colour(self, photo):
        root, _ = photo
        pixels = PALETTE[LABELS]
        pixels[4, 6] = (1, 2, 3)
        put(root / "masks", "a.png", Image.fromarray(pixels))
        with pytest.raises(ValueError, match=r"holds \(1, 2, 3\) at x=6, y=4"):
            dataset(root, self.names, mask_colors=self.table)[0]

    def test_without_a_table(self, photo):
        root, _ = photo
        put(root / "masks", "a.png", Image.fromarray(PALETTE[LABELS]))
        with pytest.raises(
            ValueError, match=r"holds colours, such as .*\(128, 0, 0\).*--mask-colors"
        ):
            dataset(root)[0]

    @pytest.mark.parametrize(
        ("table", "message"),
        [
            ({(0, 0, 0): "cloud"}, "'cloud' is no class"),
            ({(0, 0, 0): 3}, "3 is no class"),
            ({"grey": 0}, "no colour"),
            ({(0, 0, 0): 0, 255: 1}, "mixes"),
            ({}, "empty"),
        ],
    )
    def test_wrong_table(self, table, message):
        with pytest.raises(ValueError, match=message):
            MaskColors(table, self.names)

    def test_palettes_in_another_order(self, photo):
        root, write = photo
        write("b")
        put(root / "masks", "a.png", palette_image(LABELS))
        put(root / "masks", "b.png", palette_image(LABELS, PALETTE[[0, 2, 1]]))
        with pytest.raises(ValueError, match=r"another order: the colour .*mask_colors="):
            dataset(root)
        data = dataset(root, self.names, mask_colors=self.table)
        other = np.array([0, 2, 1])[LABELS]
        assert torch.equal(data[1][1], torch.from_numpy(other).long())


class TestValues:
    def test_black_and_white(self, photo):
        root, _ = photo
        put(root / "masks", "a.png", Image.fromarray((LABELS > 0).astype(np.uint8) * 255))
        with pytest.raises(ValueError, match=r"black and white: mask_colors=\{0: 0, 255: 1\}"):
            dataset(root, 2)[0]
        data = dataset(root, ["ground", "thing"], mask_colors={0: "ground", 255: "thing"})
        assert torch.equal(data[0][1], torch.from_numpy(LABELS > 0).long())

    def test_zero_is_unlabelled(self, photo):
        """As in ADE20K."""
        root, _ = photo
        put(root / "masks", "a.png", Image.fromarray(LABELS))
        data = dataset(root, 2, reduce_zero_label=True)
        assert torch.equal(data[0][1], torch.from_numpy(LABELS).long() - 1)
        with pytest.raises(ValueError, match="reduce_zero_label=True"):
            dataset(root, 2)[0]

    def test_voc(self, photo):
        root, _ = photo
        pixels = LABELS.copy()
        pixels[0] = 255
        put(root / "masks", "a.png", Image.fromarray(pixels))
        mask = dataset(root, ignore_index=255)[0][1]
        assert (mask[0] == -1).all()
        with pytest.raises(ValueError, match="ignore_index=255"):
            dataset(root)[0]

    def test_cityscapes(self, tmp_path):
        ids = np.array([[7, 8, 33, 0, 4, 26]], np.uint8)
        name = "aachen/aachen_000000_000019"
        put(tmp_path / "images/aachen", f"{name[7:]}_leftImg8bit.png", Image.new("RGB", (6, 1)))
        for kind in ("labelIds", "instanceIds", "color"):
            put(tmp_path / "masks/aachen", f"{name[7:]}_gtFine_{kind}.png", Image.fromarray(ids))
        data = dataset(
            tmp_path,
            CITYSCAPES_CLASSES,
            mask_colors=CITYSCAPES_IDS,
            image_suffix="_leftImg8bit",
            mask_suffix="_gtFine_labelIds",
        )
        assert data[0][1].tolist() == [[0, 1, 18, -1, -1, 13]]
        assert [data.classes[i] for i in (0, 13, 18)] == ["road", "car", "bicycle"]

    def test_counted(self, photo):
        root, _ = photo
        put(root / "masks", "a.png", Image.fromarray(LABELS))
        assert (
            dataset(root, 4).count_pixels().tolist()
            == np.bincount(LABELS.flat, minlength=4).tolist()
        )


class TestNames:
    @pytest.mark.parametrize("suffix", ["_mask", "_gt", "-labels"])
    @pytest.mark.parametrize("said", [True, False])
    def test_suffix(self, photo, suffix, said):
        root, write = photo
        write("b")
        for name in "ab":
            put(root / "masks", f"{name}{suffix}.png", Image.fromarray(LABELS))
        data = dataset(root, **({"mask_suffix": suffix} if said else {}))
        assert [mask.endswith(f"{suffix}.png") for mask in data.masks] == [True, True]

    def test_no_partner(self, photo):
        root, write = photo
        write("b")
        put(root / "masks", "a.png", Image.fromarray(LABELS))
        with pytest.raises(ValueError, match=r"b in .*images has no mask.*--mask-suffix"):
            dataset(root)


def test_coco(tmp_path):
    coco = pytest.importorskip("pycocotools.mask")
    for i in (1, 2):
        put(tmp_path / "photos", f"{i}.png", Image.new("RGB", (20, 10)))
    table = np.zeros((10, 20), np.uint8)
    table[2:9, 1:18] = 1
    cup = [4, 3, 9, 3, 9, 7, 4, 7]
    crowd = np.zeros((10, 20), np.uint8)
    crowd[0, :] = 1
    packed = coco.encode(np.asfortranarray(table))
    counts, value, run = [], 0, 0  # uncompressed run lengths, column by column
    for pixel in crowd.flatten("F").tolist():
        if pixel != value:
            counts.append(run)
            value, run = pixel, 0
        run += 1
    counts.append(run)
    content = {
        "images": [{"id": i, "file_name": f"{i}.png", "height": 10, "width": 20} for i in (1, 2)],
        "categories": [{"id": 9, "name": "table"}, {"id": 4, "name": "cup"}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 4, "segmentation": [cup], "iscrowd": 0},
            {
                "id": 2,
                "image_id": 1,
                "category_id": 9,
                "segmentation": {"size": [10, 20], "counts": packed["counts"].decode()},
                "iscrowd": 0,
            },
            {
                "id": 3,
                "image_id": 1,
                "category_id": 4,
                "segmentation": {"size": [10, 20], "counts": counts},
                "iscrowd": 1,
            },
        ],
    }
    file = tmp_path / "instances.json"
    file.write_text(json.dumps(content))
    paths, masks, classes = coco_masks(file, tmp_path / "photos")
    assert classes == ["background", "cup", "table"]
    data = SegmentationDataset(paths, masks, classes)
    expected = np.where(table, 2, 0)
    drawn = coco.decode(coco.merge(coco.frPyObjects([cup], 10, 20))).astype(bool)
    expected[drawn] = 1  # the smaller one wins, whatever the order
    expected[0] = -1
    assert np.array_equal(data[0][1].numpy(), expected)
    assert not data[1][1].any()
    content["annotations"][0]["category_id"] = 5
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="annotation 1 has the category 5"):
        coco_masks(file, tmp_path / "photos")
