"""Pairs of images for dense outputs: an image and its mask, a degraded image and the clean one."""

import copy
import logging
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from timm_branches.data.datasets import to_unit_tensor
from timm_branches.data.decode import ValueRange
from timm_branches.data.folders import find_files
from timm_branches.data.images import ArrayImages, FileImages, is_image_name
from timm_branches.data.masks import (
    CITYSCAPES_IDS,
    MaskColors,
    as_grey,
    check_palettes,
    decode_mask,
    palette_colours,
    read_mask_colors,
)
from timm_branches.data.seeded import SeededDataset
from timm_branches.data.summary import DataSummary
from timm_branches.data.transforms import (
    _albumentations,
    _color_jitter,
    _load_compose,
    _match_mean,
    _SampleRandom,
)
from timm_branches.taxonomy.order import natural_order
from timm_branches.taxonomy.taxonomy import Taxonomy

_logger = logging.getLogger(__name__)

__all__ = ["DenoisingDataset", "PairTransform", "SegmentationDataset"]


class _PairDataset(SeededDataset):
    """Images, each of which counts several times in an epoch."""

    def __init__(self, images: Any, repeats: int) -> None:
        if repeats < 1:
            raise ValueError(f"repeats must be at least 1, got {repeats}")
        if not len(images):
            raise ValueError("there are no images")
        self.images = images
        self.repeats = repeats
        super().__init__()

    def __len__(self) -> int:
        return len(self.images) * self.repeats

    def repeated(self, repeats: int) -> Any:
        """The same images, each of which counts `repeats` times in an epoch; nothing is read."""
        twin = copy.copy(self)
        twin.repeats = repeats
        SeededDataset.__init__(twin, self.seed, self.epoch)
        return twin

    def _check_index(self, index: int) -> int:
        return range(len(self))[index]


class SegmentationDataset(_PairDataset):
    """Images with a mask of class indices, from two folders or from memory.

    Files belong together by their paths within the folders, without the extension. Masks are
    palette or grey images whose values *are* the class indices.

    Args:
        images: A folder, or uint8 arrays as :class:`HierarchicalDataset` takes them.
        masks: A folder, or integer arrays (H, W), of class indices, -1 for unlabelled pixels.
        classes: Names in the order of their indices, or how many there are, or a taxonomy whose
            leaves they are.
        ignore_index: The value of unlabelled pixels in the masks (often 255); they become -1, the
            value that losses and evaluators leave out by default.
        transform: A :class:`PairTransform`; None scales the image to [0, 1] and changes nothing
            else.
        in_chans: 3 for RGB, 1 for grey.
        repeats: How often each image counts in an epoch, with another random crop each time.
        mask_colors: What values or colours stand for, as :class:`MaskColors` takes it, or a file of
            them; without it values are class indices.
        image_suffix: What the images' names end with before the extension (`_leftImg8bit`).
        mask_suffix: The same of the masks (`_gtFine_labelIds`); files without it are passed over.
        reduce_zero_label: Whether 0 is unlabelled and class k is k + 1, as in ADE20K.
        value_range: The values of black and white of deep images, see
            :mod:`timm_branches.data.decode`.

    Attributes:
        classes: The classes' names.
        num_classes: How many there are.
        taxonomy: The taxonomy, or None.
        names: What each image is called in an error.

    Raises:
        ValueError: A file has no partner or two have one name, there are no files, or the arrays
            differ in number.

    Example:
        >>> data = SegmentationDataset(np.zeros((2, 8, 8), np.uint8), np.full((2, 8, 8), 255), 3, ignore_index=255)
        >>> image, mask = data[0]
        >>> image.shape, mask.unique().tolist()
        (torch.Size([3, 8, 8]), [-1])
    """

    def __init__(
        self,
        images: Any,
        masks: Any,
        classes: int | Sequence[str] | Taxonomy,
        ignore_index: int | None = None,
        transform: "PairTransform | None" = None,
        in_chans: int = 3,
        repeats: int = 1,
        *,
        mask_colors: Mapping[Any, Any] | MaskColors | str | os.PathLike | None = None,
        image_suffix: str = "",
        mask_suffix: str = "",
        reduce_zero_label: bool = False,
        value_range: ValueRange | None = None,
    ) -> None:
        self.taxonomy = classes if isinstance(classes, Taxonomy) else None
        names = (
            range(classes) if isinstance(classes, int) else getattr(classes, "leaf_names", classes)
        )
        self.classes = tuple(map(str, names))  # type: ignore[arg-type]
        self.num_classes = len(self.classes)
        if ignore_index is not None and 0 <= ignore_index < self.num_classes:
            raise ValueError(
                f"ignore_index={ignore_index} is one of the {self.num_classes} classes"
            )
        self.ignore_index = ignore_index
        self.reduce_zero_label = reduce_zero_label
        self.mask_colors = self._read_colors(mask_colors)
        self.transform = transform
        if isinstance(images, str | os.PathLike) != isinstance(masks, str | os.PathLike):
            raise ValueError("images and masks must be two folders, or both arrays")
        if isinstance(images, str | os.PathLike):
            pictures, self.masks = match_files(
                os.fspath(images), os.fspath(masks), image_suffix, mask_suffix
            )
            if self.mask_colors is None:
                check_palettes(self.masks)
            self.names: Sequence[str] = pictures
            super().__init__(FileImages(pictures, in_chans, value_range), repeats)
            return
        if image_suffix or mask_suffix:
            raise ValueError(
                "image_suffix= and mask_suffix= belong to folders, and have no effect here"
            )
        if _are_paths(images):
            self.masks, self.names = masks, list(map(str, images))
            if len(images) != len(masks):
                raise ValueError(f"{len(images)} images have {len(masks)} masks")
            super().__init__(FileImages(self.names, in_chans, value_range), repeats)
        else:
            if value_range is not None:
                raise ValueError("value_range= belongs to files, and has no effect on arrays")
            if len(images) != len(masks):
                raise ValueError(
                    f"{len(images)} images have {len(masks)} masks; give one mask for each image"
                )
            self.masks, self.names = masks, [f"image {i}" for i in range(len(images))]
            super().__init__(ArrayImages(images, in_chans), repeats)

    def _read_colors(self, given: Any) -> MaskColors | None:
        if given is None or isinstance(given, MaskColors):
            return given
        if isinstance(given, str | os.PathLike):
            given = read_mask_colors(given)
        others = -1 if given is CITYSCAPES_IDS else None
        return MaskColors(given, self.classes, others)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """One sample.

        Args:
            index: Its position.

        Returns:
            The image (C, H, W), float32, and its mask (H, W), int64, -1 where unlabelled.

        Raises:
            ValueError: The mask has another size than the image, is coloured, or holds a value that
                is no class.
        """
        sample = self._check_index(index)
        image, mask = self.pixels(sample // self.repeats)
        transform = self.transform or PairTransform(mean=(0,), std=(1,))
        return transform(image, mask, key=(self.seed, self.epoch, sample))

    def pixels(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """An image (H, W, C) and its mask (H, W) as they are, without transform."""
        image, mask = self.images[index], self._mask(index)
        if mask.shape != image.shape[:2]:
            raise ValueError(
                f"the mask of {self.names[index]} has {mask.shape} pixels, the image {image.shape[:2]}"
            )
        return image, mask

    def _mask(self, index: int) -> np.ndarray:
        where = self.masks[index]
        palette = None
        if isinstance(where, str):
            mask, palette = decode_mask(where)
        else:
            mask = np.asarray(where() if callable(where) else where)
        if self.mask_colors is not None:
            if palette is not None and not self.mask_colors.is_grey:
                mask = palette_colours(mask, palette)
            mask = self.mask_colors(mask, self.names[index])
        elif mask.ndim == 3 and mask.shape[2] == 3 and isinstance(where, str):
            mask = as_grey(mask, where)
        if mask.ndim != 2 or mask.dtype.kind not in "iub":
            raise ValueError(
                f"the mask of {self.names[index]} is an array {mask.dtype} of shape {mask.shape}; it must "
                "hold one class index for each pixel (a palette or grey image), not colours"
            )
        mask = mask.astype(np.int64)
        if self.ignore_index is not None:
            mask = np.where(mask == self.ignore_index, -1, mask)
        if self.reduce_zero_label:  # 0 is unlabelled, and class k is k + 1
            mask = np.where(mask > 0, mask - 1, -1)
        wrong = np.unique(mask[(mask < -1) | (mask >= self.num_classes)])
        if len(wrong):
            raise ValueError(self._wrong_values(index, mask, wrong))
        return mask

    def _wrong_values(self, index: int, mask: np.ndarray, wrong: np.ndarray) -> str:
        text = (
            f"the mask of {self.names[index]} holds {wrong[:10].tolist()}; the {self.num_classes} "
            f"classes are 0 to {self.num_classes - 1}, and ignore_index is {self.ignore_index}"
        )
        values = np.unique(mask[mask >= 0])
        if wrong.tolist() == [255] and self.num_classes == 2 and set(values.tolist()) <= {0, 255}:
            return text + (
                ". It seems to be black and white: mask_colors={0: 0, 255: 1} (--mask-colors) makes "
                "255 class 1"
            )
        if wrong.tolist() == [255]:
            return text + "; if 255 is unlabelled, write ignore_index=255 (--ignore-index 255)"
        if wrong.tolist() == [self.num_classes] and 0 in values:
            return text + (
                "; if 0 is unlabelled and classes count from 1, write reduce_zero_label=True"
            )
        return text

    def count_pixels(self) -> torch.Tensor:
        """How many pixels each class has in all masks (K,); every mask is read once."""
        total = np.zeros(self.num_classes, np.int64)
        for index in range(len(self.images)):
            mask = self._mask(index)
            total += np.bincount(mask[mask >= 0], minlength=self.num_classes)
        return torch.from_numpy(total)

    @property
    def summary(self) -> DataSummary:
        """What was understood of the folders."""
        summary = DataSummary()
        counts = {"images": len(self.images), "classes": self.num_classes}
        summary.splits = {"images": counts}
        return summary


class PairTransform:
    """The same geometry for an image and its mask, then mean and standard deviation for the image.

    Random numbers are a function of the key (seed, epoch, sample) alone, as in
    :class:`SampleTransform`. The mask is never interpolated, and pixels that a transform brings in
    from outside of the image are unlabelled.

    Args:
        size: For training: the height and width of a random crop, or one side; images that are
            smaller are padded. None, for evaluation: the whole image.
        scale: For training: the range of a random factor that the image is resized by before the
            crop.
        hflip: Probability of a horizontal flip, where `size` is given.
        color_jitter: For training: strength of changes in the image's brightness, contrast and
            saturation, as timm's.
        augment: An albumentations `Compose`, or a .json or .yaml file written by
            `albumentations.save`, instead of all this. It sees unlabelled pixels as 0 and class k
            as k + 1: what its transforms fill masks with by default is unlabelled.
        mean: Mean of each channel, for values in [0, 1].
        std: Standard deviation of each channel.

    Raises:
        ValueError: `augment` is given together with `size`, or a setting is out of its range.

    Example:
        >>> transform = PairTransform(size=8, mean=(0.5,), std=(0.5,))
        >>> image, mask = transform(np.zeros((4, 12, 3), np.uint8), np.zeros((4, 12), np.int64), key=(0, 0, 0))
        >>> image.shape, (mask < 0).sum().item()
        (torch.Size([3, 8, 8]), 32)
    """

    def __init__(
        self,
        size: int | tuple[int, int] | None = None,
        scale: tuple[float, float] = (1.0, 1.0),
        hflip: float = 0.5,
        color_jitter: float = 0.0,
        augment: Any = None,
        mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
        std: Sequence[float] = IMAGENET_DEFAULT_STD,
    ) -> None:
        if augment is not None and size is not None:
            raise ValueError("size= has no effect beside augment=: let the augmentation crop")
        if not 0 < scale[0] <= scale[1] or not 0 <= hflip <= 1:
            raise ValueError(
                f"scale must be an increasing range above 0 and hflip a probability, got {scale}, {hflip}"
            )
        if size is None and (scale != (1.0, 1.0) or color_jitter):
            raise ValueError(
                "scale= and color_jitter= are for training: they need size=, the size of the crop"
            )
        self.mean, self.std = tuple(mean), tuple(std)
        self.random = _SampleRandom()
        self.compose = None
        if augment is not None:
            self.compose = _load_compose(augment)
        elif size is not None:
            A = _albumentations()
            height, width = (size, size) if isinstance(size, int) else size
            fill = [255 * value for value in self.mean]
            self.compose = A.Compose(
                [
                    *(
                        [A.RandomScale((scale[0] - 1, scale[1] - 1), p=1)]
                        if scale != (1.0, 1.0)
                        else []
                    ),
                    # to the right and below, so that a crop of the image's own size is the image
                    A.PadIfNeeded(
                        height, width, position="top_left", fill=fill[0] if len(fill) == 1 else fill
                    ),
                    A.RandomCrop(height, width),
                    *([A.HorizontalFlip(p=hflip)] if hflip else []),
                    *_color_jitter(color_jitter),
                ]
            )
        if self.compose is not None:
            self.compose = copy.deepcopy(self.compose)
            self.compose.set_random_state(self.random.numpy, self.random.python)

    def __call__(
        self, image: np.ndarray, mask: np.ndarray, key: Sequence[int] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Transform one pair.

        Args:
            image: uint8 array (H, W, C).
            mask: Integer array (H, W), -1 where unlabelled.
            key: (seed, epoch, sample); None draws one from torch's global generator.

        Returns:
            Float tensor (C, height, width), and LongTensor (height, width).

        Raises:
            ValueError: The mean does not fit the image's channels, or an own augmentation returns
                no uint8 image.
        """
        given = image.dtype
        if self.compose is not None:
            self.random.seed((int(torch.randint(2**62, ())),) if key is None else key)
            kind = np.uint8 if mask.max(initial=0) < 255 else np.int16
            result = self.compose(image=image, mask=(mask + 1).astype(kind))
            image, mask = result["image"], result["mask"].astype(np.int64) - 1
            if not isinstance(image, np.ndarray) or image.dtype != given:
                raise ValueError(
                    "the augmentation must return uint8 arrays: leave out Normalize and ToTensorV2"
                )
        image = image[:, :, None] if image.ndim == 2 else image
        mean, std = (
            torch.tensor(
                _match_mean(values, image.shape[2], name)
                if len(values) > 1
                else values * image.shape[2]
            ).view(-1, 1, 1)
            for values, name in ((self.mean, "mean"), (self.std, "std"))
        )
        tensor = to_unit_tensor(image)
        return tensor.sub_(mean).div_(std), torch.from_numpy(
            np.ascontiguousarray(mask, dtype=np.int64)
        )


class DenoisingDataset(_PairDataset):
    """Clean images, and what blur and noise made on the fly make of them.

    degraded = blur(clean) + noise. The noise is white, Gaussian, and not clipped, as the literature
    has it: values may lie outside of [0, 1]. In training patch, flips, quarter turns, blur and
    noise are functions of (seed, epoch, sample); in evaluation blur and noise are functions of
    (seed, sample): the same in every epoch. Whole images of
    different sizes do not stack: evaluate them in batches of 1.

    Args:
        images: A folder, or uint8 arrays as :class:`HierarchicalDataset` takes them.
        sigma: Standard deviation of the noise on the scale of 0 to 255, as in the literature; or a
            range, from which each sample draws its own.
        blur: Standard deviation of a Gaussian blur in pixels, cut off at 4 of it, or a range; 0 for
            none.
        is_training: Whether to draw anew each epoch.
        patch_size: For training: the side of a random patch, which is also flipped and turned; None
            is the whole image.
        in_chans: 1 for grey, 3 for RGB.
        repeats: How often each image counts in an epoch, with another patch and noise each time.

    Raises:
        ValueError: A setting is out of its range or has no effect, or a folder holds no image.

    Example:
        >>> data = DenoisingDataset(np.full((1, 64, 64), 128, np.uint8), sigma=25)
        >>> degraded, clean = data[0]
        >>> round(float((degraded - clean).std() * 255))
        25
    """

    def __init__(
        self,
        images: Any,
        sigma: float | tuple[float, float] = 25.0,
        blur: float | tuple[float, float] = 0.0,
        is_training: bool = False,
        patch_size: int | None = None,
        in_chans: int = 1,
        repeats: int = 1,
    ) -> None:
        self.sigma, self.blur = _range("sigma", sigma), _range("blur", blur)
        if not self.sigma[1] and not self.blur[1]:
            raise ValueError("with sigma=0 and blur=0 nothing is degraded")
        if patch_size is not None and (patch_size < 1 or not is_training):
            raise ValueError(
                f"patch_size={patch_size} must be at least 1, and is for is_training=True"
            )
        self.is_training, self.patch_size = is_training, patch_size
        self.random = _SampleRandom()
        if isinstance(images, str | os.PathLike):
            self.paths = [path for _, path in _list_images(os.fspath(images))]
            super().__init__(FileImages(self.paths, in_chans), repeats)
        else:
            super().__init__(ArrayImages(images, in_chans), repeats)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """One sample.

        Args:
            index: Its position.

        Returns:
            The degraded and the clean image (C, H, W), float32; the clean one in [0, 1].

        Raises:
            ValueError: The image is smaller than a patch.
        """
        import cv2

        sample = self._check_index(index)
        image: np.ndarray = self.images[sample // self.repeats]
        self.random.seed(
            (self.seed, self.epoch, sample) if self.is_training else (self.seed, sample)
        )
        random = self.random.numpy
        sigma, blur = (random.uniform(*limits) for limits in (self.sigma, self.blur))
        reach = math.ceil(4 * blur)
        inner: tuple[slice, ...] = (slice(None), slice(None))
        if self.patch_size is not None:
            turn, flip = int(random.integers(4)), bool(random.integers(2))
            corner: list[int] = [
                int(random.integers(self._room(side, sample) + 1)) for side in image.shape[:2]
            ]
            # with what the blur brings in from beyond the patch
            before = [min(start, reach) for start in corner]
            image = image[
                tuple(
                    slice(start - extra, start + self.patch_size + reach)
                    for start, extra in zip(corner, before, strict=True)
                )
            ]
            inner = tuple(slice(extra, extra + self.patch_size) for extra in before)
        clean: np.ndarray = image if image.dtype == np.float32 else image.astype(np.float32) / 255
        degraded: np.ndarray = clean
        if blur:
            side = 2 * reach + 1
            degraded = cv2.GaussianBlur(clean, (side, side), blur).reshape(clean.shape)
        clean, degraded = clean[inner], degraded[inner]
        if self.patch_size is not None:
            clean, degraded = (
                np.rot90(part, turn)[:, :: -1 if flip else 1] for part in (clean, degraded)
            )
        degraded = degraded + np.float32(sigma / 255) * random.standard_normal(
            clean.shape, dtype=np.float32
        )
        first, second = (
            torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
            for image in (degraded, clean)
        )
        return first, second

    def _room(self, side: int, sample: int) -> int:
        assert self.patch_size is not None
        if side < self.patch_size:
            raise ValueError(
                f"image {sample // self.repeats} has a side of {side} pixels, less than "
                f"patch_size={self.patch_size}"
            )
        return side - self.patch_size


def _are_paths(images: Any) -> bool:
    return len(images) > 0 and isinstance(images[0], str | os.PathLike)


def _range(name: str, value: float | tuple[float, float]) -> tuple[float, float]:
    low, high = (value, value) if isinstance(value, int | float) else value
    if not 0 <= low <= high < math.inf:
        raise ValueError(
            f"{name} must be a number from 0 upwards, or an increasing range of two, got {value}"
        )
    return float(low), float(high)


def _list_images(root: str) -> list[tuple[str, str]]:
    """The images below a folder in natural order.

    The path without its extension, and where the file is.
    """
    names, _ = find_files(root, is_image_name)
    if not names:
        raise ValueError(f"no images in {root}")
    return [(os.path.splitext(name)[0], os.path.join(root, name)) for name in names]


def match_files(
    images: str, masks: str, image_suffix: str = "", mask_suffix: str = "", partner: str = "mask"
) -> tuple[list[str], list[str]]:
    """The files of two folders that belong together by their paths within them.

    Args:
        images: One folder.
        masks: The other.
        image_suffix: What the images' names end with before the extension; it does not count.
        mask_suffix: The same of the masks; files without it are passed over. Where no name fits
            without one and all masks end alike, that end is found.
        partner: What the second kind is called in a message.

    Raises:
        ValueError: Files without a partner, or two of one name.
    """
    pictures = _by_stem(images, image_suffix)
    labels = _by_stem(masks, mask_suffix)
    if not mask_suffix and not set(pictures) & set(labels):
        mask_suffix = _common_suffix(pictures, labels)
        if mask_suffix:
            _logger.info("%ss are named as their images with %r behind.", partner, mask_suffix)
            labels = _by_stem(masks, mask_suffix)
    problems = []
    without = sorted(set(pictures) - set(labels), key=natural_order)
    if without:
        problems.append(f"{', '.join(without[:10])} in {images} has no {partner} in {masks}")
    alone = sorted(set(labels) - set(pictures), key=natural_order)
    if alone:
        problems.append(f"{', '.join(alone[:10])} in {masks} has no image in {images}")
    if problems:
        raise ValueError(
            "; ".join(problems)
            + f". A {partner} is named as its image, but for the extension and a "
            f"suffix that you can name ({partner}_suffix=, --{partner}-suffix)."
        )
    return list(pictures.values()), [labels[stem] for stem in pictures]


def _by_stem(root: str, suffix: str) -> dict[str, str]:
    """Paths by their names without extension and suffix."""
    found: dict[str, str] = {}
    for stem, path in _list_images(root):
        if not stem.endswith(suffix):
            continue
        name = stem.removesuffix(suffix)
        if name in found:
            raise ValueError(
                f"{found[name]} and {path} share their names with each other but for the extension"
            )
        found[name] = path
    return found


def _common_suffix(pictures: Mapping[str, str], labels: Mapping[str, str]) -> str:
    """The end that every mask's name has behind its image's name, '' if there is none."""
    ends = set()
    for label in labels:
        parts = [len(stem) for stem in pictures if label.startswith(stem)]
        if not parts:
            return ""
        ends.add(label[max(parts) :])
    return ends.pop() if len(ends) == 1 else ""
