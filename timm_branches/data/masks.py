"""Masks as people have them: class indices, colours, label ids, polygons.

A mask is read without loss or not at all: every pixel is a class index, or a colour or value that a
table turns into one.
"""

import io
import json
import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from timm_branches.data.decode import MAX_PIXELS, read_file
from timm_branches.data.summary import listed

__all__ = [
    "CITYSCAPES_CLASSES",
    "CITYSCAPES_IDS",
    "MaskColors",
    "coco_masks",
    "decode_mask",
    "read_mask_colors",
]

Colour = tuple[int, ...]

CITYSCAPES_CLASSES = tuple(
    "road,sidewalk,building,wall,fence,pole,traffic light,traffic "
    "sign,vegetation,terrain,sky,person,"
    "rider,car,truck,bus,train,motorcycle,bicycle".split(",")
)
"""The 19 classes that Cityscapes trains and evaluates, in the order of their train ids."""

CITYSCAPES_IDS = {
    label: index
    for index, label in enumerate(
        (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
    )
}
"""From the label ids of `*_labelIds.png` to train ids, for `mask_colors=`; others are unlabelled.

Source: cityscapesScripts, `labels.py`.
"""


class MaskColors:
    """A table from the values or colours of masks to class indices.

    Args:
        table: Keys are grey values (`255`), colours (`(128, 0, 0)`, `'#800000'`); values are class
            indices, names out of `classes`, or -1 for unlabelled.
        classes: The classes' names.
        others: What other values are: None refuses them, -1 takes them for unlabelled.

    Raises:
        ValueError: A key is no colour, a value is no class, or grey values and colours are mixed.

    Example:
        >>> colors = MaskColors({'#000000': 'sky', (255, 0, 0): 'roof'}, ['sky', 'roof'])
        >>> colors(np.array([[[255, 0, 0], [0, 0, 0]]], np.uint8), 'a.png').tolist()
        [[1, 0]]
    """

    def __init__(
        self, table: Mapping[Any, Any], classes: Sequence[str], others: int | None = None
    ) -> None:
        self.others = others
        self.index: dict[Colour, int] = {}
        for key, value in table.items():
            self.index[_colour(key)] = _class_index(value, classes)
        lengths = {len(colour) for colour in self.index}
        if len(lengths) != 1:
            raise ValueError(
                "The table of mask colours mixes grey values and colours, or is empty: "
                f"{dict(table)}."
            )
        self.is_grey = lengths == {1}

    def __call__(self, pixels: np.ndarray, name: str) -> np.ndarray:
        """Class indices (H, W) of values (H, W) or colours (H, W, 3).

        Raises:
            ValueError: A value that the table lacks; its first pixel is named.
        """
        if self.is_grey and pixels.ndim == 3:
            pixels = as_grey(pixels, name)
        if not self.is_grey and pixels.ndim == 2:
            pixels = np.repeat(pixels[:, :, None], 3, axis=2)
        rows = pixels.reshape(-1, 1 if pixels.ndim == 2 else 3)
        codes = _codes(rows)
        distinct, inverse = np.unique(codes, return_inverse=True)
        table = np.empty(len(distinct), np.int64)
        known = {int(_codes(np.array([colour]))[0]): i for colour, i in self.index.items()}
        for place, code in enumerate(distinct.tolist()):
            index = known.get(code, self.others)
            if index is None:
                at = int(np.argmax(codes == code))
                y, x = divmod(at, pixels.shape[1])
                colour = tuple(int(v) for v in rows[at])
                raise ValueError(
                    f"the mask {name} holds {colour if len(colour) > 1 else colour[0]} at x={x}, "
                    f"y={y}, which the table of colours lacks; it has {listed(self.index, 10)}."
                )
            table[place] = index
        return table[inverse.reshape(-1)].reshape(pixels.shape[:2])


def _codes(rows: np.ndarray) -> np.ndarray:
    codes = rows[:, 0].astype(np.int64)
    for channel in range(1, rows.shape[1]):
        codes = codes * 65536 + rows[:, channel]
    return codes


def _colour(key: Any) -> Colour:
    if isinstance(key, str):
        text = key.strip().lstrip("#")
        if len(text) == 6 and key.strip().startswith("#"):
            try:
                return tuple(bytes.fromhex(text))
            except ValueError:
                pass
        elif text.isdigit():
            return (int(text),)
    elif isinstance(key, int | np.integer):
        return (int(key),)
    elif isinstance(key, Sequence) and len(key) == 3:
        return tuple(int(value) for value in key)
    raise ValueError(
        f"{key!r} is no colour of a mask: give a value (255), three (128, 0, 0), or '#800000'."
    )


def _class_index(value: Any, classes: Sequence[str]) -> int:
    if isinstance(value, str) and value in classes:
        return list(classes).index(value)
    if isinstance(value, int | np.integer) and -1 <= value < len(classes):
        return int(value)
    raise ValueError(
        f"{value!r} is no class of a mask: give an index below {len(classes)}, -1 for unlabelled, "
        f"or one of {listed(classes, 10)}."
    )


def read_mask_colors(path: str | os.PathLike) -> dict[Colour, str]:
    """A file of colours: in each line the class's name and its colour, in either order.

    `128 64 128 Road`, `Road,128,64,128`, `Road #804080` and `255 object` are understood, as in
    CamVid's `label_colors.txt`; a header and lines that begin with `//` are passed over.

    Raises:
        ValueError: A line is none of these, or a colour occurs twice.
    """
    table: dict[Colour, str] = {}
    with open(path, encoding="utf-8-sig") as file:
        lines = file.read().splitlines()
    for number, line in enumerate(lines, start=1):
        text = line.strip()
        if not text or text.startswith("//"):
            continue
        if "," in text:
            cells = text.split(",")
        elif "\t" in text:
            cells = text.split("\t")
        else:
            cells = text.split()
        cells = [cell.strip() for cell in cells if cell.strip()]
        digits = [cell for cell in cells if cell.isdigit()]
        codes = [cell for cell in cells if cell.startswith("#")]
        name = " ".join(cell for cell in cells if not cell.isdigit() and not cell.startswith("#"))
        colour: Colour | None = None
        if len(digits) in (1, 3) and not codes:
            colour = tuple(map(int, digits))
        elif len(codes) == 1:
            colour = _colour(codes[0])
        if colour is None or not name:
            if number == 1:
                continue  # the header
            raise ValueError(
                f"{path}, line {number}: {text!r} is no class with its colour, as in '128 64 128 "
                "Road'."
            )
        if colour in table:
            raise ValueError(f"{path}, line {number}: the colour {colour} occurs twice.")
        table[colour] = name
    if not table:
        raise ValueError(f"{path} names no colour.")
    return table


def decode_mask(path: str) -> tuple[np.ndarray, Colour | None]:
    """The values of a mask's file as they are, upright, and its palette.

    Returns:
        Integers (H, W), a palette's indices among them, or colours (H, W, 3); and the palette,
        three numbers a colour, None without one.

    Raises:
        ValueError: It is no whole image, was compressed with loss, or holds fractions.
    """
    from PIL import Image, ImageOps

    data = read_file(path)
    try:
        image: Any = Image.open(io.BytesIO(data))
        if image.size[0] * image.size[1] > MAX_PIXELS:
            raise ValueError(f"it declares {image.size[0]} x {image.size[1]} pixels")
        lossy = image.format in ("JPEG", "MPO") or (image.format == "WEBP" and b"VP8 " in data[:64])
        if lossy:
            raise ValueError(
                f"a {image.format} changes values when it compresses, so that classes cannot be "
                "told any more. Save masks as PNG, from what they were made of"
            )
        image = ImageOps.exif_transpose(image)
        palette = image.getpalette() if image.mode == "P" else None
        if image.mode in ("LA", "PA"):
            image = image.getchannel(0)
        elif image.mode not in ("1", "L", "P", "I", "F", "RGB") and not image.mode.startswith(
            "I;16"
        ):
            image = image.convert("RGB") if image.mode != "RGBA" else _without_alpha(image)
        pixels = np.asarray(image)
    except ValueError as error:
        raise ValueError(f"cannot read the mask {path}: {str(error).rstrip('.')}.") from error
    except Exception as error:
        raise ValueError(f"cannot read the mask {path}: it is no whole image ({error}).") from error
    if pixels.dtype == np.bool_:
        pixels = pixels.astype(np.uint8)
    if pixels.dtype.kind == "f":
        if not np.array_equal(pixels, np.round(pixels)):
            raise ValueError(f"cannot read the mask {path}: its values are fractions, no classes.")
        pixels = pixels.astype(np.int64)
    return pixels, None if palette is None else tuple(palette)


def _without_alpha(image: Any) -> Any:
    from PIL import Image

    return Image.merge("RGB", image.split()[:3])


def as_grey(pixels: np.ndarray, name: str) -> np.ndarray:
    """Colours (H, W, 3) whose three values agree, as values (H, W)."""
    if (pixels == pixels[:, :, :1]).all():
        return pixels[:, :, 0]
    seen = np.unique(pixels.reshape(-1, 3), axis=0)[:6].tolist()
    raise ValueError(
        f"the mask {name} holds colours, such as "
        f"{', '.join(str(tuple(colour)) for colour in seen)}: "
        "say which class each stands for, mask_colors={(128, 0, 0): 'road', ...} or a file of them "
        "(--mask-colors)."
    )


def palette_colours(pixels: np.ndarray, palette: Colour) -> np.ndarray:
    """A palette image's indices (H, W) as colours (H, W, 3)."""
    table = np.zeros((256, 3), np.uint8)
    given = np.array(palette, np.uint8).reshape(-1, 3)
    table[: len(given)] = given
    return table[pixels]


def check_palettes(paths: Sequence[str]) -> None:
    """Refuse masks whose palettes give one colour different indices: their classes would be mixed.

    Only headers are read.

    Raises:
        ValueError: Two palettes hold the same colours in another order.
    """
    from PIL import Image

    first: tuple[str, list[Colour]] | None = None
    for path in paths:
        if not path.lower().endswith((".png", ".gif", ".bmp", ".tif", ".tiff")):
            continue
        try:
            with Image.open(path) as image:
                palette = image.getpalette() if image.mode == "P" else None
        except Exception:  # what cannot be read is named when it is
            continue
        if palette is None:
            continue
        colours = [tuple(palette[i : i + 3]) for i in range(0, len(palette) - 2, 3)]
        if first is None:
            first = path, colours
            continue
        used = min(len(colours), len(first[1]))
        if colours[:used] == first[1][:used]:
            continue
        moved = [c for c in set(colours) & set(first[1]) if colours.index(c) != first[1].index(c)]
        if moved:
            colour = min(moved)
            raise ValueError(
                f"the palettes of the masks {first[0]} and {path} have another order: the colour "
                f"{colour} is number {first[1].index(colour)} in one and {colours.index(colour)} "
                "in "
                "the other. Say which class each colour stands for: mask_colors= (--mask-colors)."
            )


# ---- COCO


def coco_masks(
    annotations: str | os.PathLike, images: str | os.PathLike
) -> tuple[list[str], list[Callable[[], np.ndarray]], list[str]]:
    """Masks of a COCO file: polygons and run lengths, by pycocotools (extra `coco`).

    Class 0 is 'background', the categories follow in the order of their ids. Where instances
    overlap the smaller one wins, so that a cup on a table is seen. Crowds are unlabelled, -1.

    Args:
        annotations: The JSON file with `images`, `annotations` and `categories`.
        images: The folder that holds the images.

    Returns:
        The images' paths, for each a function that returns its mask (H, W), and the classes' names:
        what :class:`timm_branches.data.SegmentationDataset` takes.

    Raises:
        ImportError: pycocotools is not installed.
        ValueError: The file is no such JSON, an image is missing, or an annotation is of an unknown
            category.

    Example:
        >>> paths, masks, classes = coco_masks('instances.json', 'photos/')       # doctest: +SKIP
        >>> data = SegmentationDataset(paths, masks, classes)                     # doctest: +SKIP
    """
    try:
        from pycocotools import mask as _  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "COCO's masks need pycocotools: pip install 'timm_branches[coco]'."
        ) from error
    with open(annotations, encoding="utf-8") as file:
        content = json.load(file)
    missing = [key for key in ("images", "annotations", "categories") if key not in content]
    if missing:
        raise ValueError(f"{annotations} is no COCO file: it lacks {', '.join(missing)}.")
    categories = sorted(content["categories"], key=lambda category: category["id"])
    classes = ["background", *(category["name"] for category in categories)]
    number = {category["id"]: i for i, category in enumerate(categories, start=1)}
    by_image: dict[Any, list[dict]] = defaultdict(list)
    for annotation in content["annotations"]:
        if annotation["category_id"] not in number:
            raise ValueError(
                f"{annotations}: annotation {annotation.get('id')} has the category "
                f"{annotation['category_id']}, which `categories` lacks."
            )
        by_image[annotation["image_id"]].append(annotation)
    paths: list[str] = []
    masks: list[Callable[[], np.ndarray]] = []
    for image in content["images"]:
        path = os.path.join(images, image["file_name"])
        if not os.path.isfile(path):
            raise ValueError(f"{annotations} names {image['file_name']}, which is not in {images}.")
        paths.append(path)
        masks.append(_CocoMask(image["height"], image["width"], by_image[image["id"]], number))
    return paths, masks, classes


class _CocoMask:
    """The mask of one image, drawn when it is asked for."""

    def __init__(
        self, height: int, width: int, annotations: list[dict], number: Mapping[Any, int]
    ) -> None:
        self.size = (height, width)
        self.annotations = annotations
        self.number = {a["category_id"]: number[a["category_id"]] for a in annotations}

    def __call__(self) -> np.ndarray:
        height, width = self.size
        mask = np.zeros(self.size, np.int64)
        drawn = [(self._pixels(a), a) for a in self.annotations]
        drawn.sort(key=lambda pair: -int(pair[0].sum()))
        for pixels, annotation in drawn:
            crowd = bool(annotation.get("iscrowd"))
            mask[pixels] = -1 if crowd else self.number[annotation["category_id"]]
        return mask.reshape(height, width)

    def _pixels(self, annotation: dict) -> np.ndarray:
        from pycocotools import mask as coco

        height, width = self.size
        shape: Any = annotation["segmentation"]
        if isinstance(shape, list):
            shape = coco.merge(coco.frPyObjects(shape, height, width))
        elif isinstance(shape["counts"], list):
            shape = coco.frPyObjects(shape, height, width)
        return coco.decode(shape).astype(bool)
