"""Images with a mask of class indices."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from timm_branches.data.decode import ValueRange
from timm_branches.data.masks import (
    CITYSCAPES_IDS,
    MaskColors,
    as_grey,
    check_palettes,
    decode_mask,
    palette_colours,
    read_mask_colors,
)
from timm_branches.data.pair_transform import PairTransform
from timm_branches.data.pairs import PairDataset, match_files, open_images
from timm_branches.data.summary import DataSummary, listed
from timm_branches.taxonomy.taxonomy import Taxonomy

__all__ = ["SegmentationDataset"]


class SegmentationDataset(PairDataset):
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
        >>> images, masks = np.zeros((2, 8, 8), np.uint8), np.full((2, 8, 8), 255)
        >>> data = SegmentationDataset(images, masks, 3, ignore_index=255)
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
        self.classes = _class_names(classes)
        self.num_classes = len(self.classes)
        if ignore_index is not None and 0 <= ignore_index < self.num_classes:
            raise ValueError(
                f"ignore_index={ignore_index} is one of the {self.num_classes} classes."
            )
        self.ignore_index = ignore_index
        self.reduce_zero_label = reduce_zero_label
        self.mask_colors = self._read_colors(mask_colors)
        self.transform = transform
        self.masks: Sequence[Any] = masks
        folders = isinstance(images, str | os.PathLike)
        if folders != isinstance(masks, str | os.PathLike):
            raise ValueError("images and masks must be two folders, or both arrays.")
        if not folders:
            if image_suffix or mask_suffix:
                raise ValueError(
                    "image_suffix= and mask_suffix= belong to folders, and have no effect here."
                )
            if len(images) != len(masks):
                raise ValueError(
                    f"{len(images)} images have {len(masks)} masks; give one mask for each image."
                )
        if folders:
            images, self.masks = match_files(
                os.fspath(images), os.fspath(masks), image_suffix, mask_suffix
            )
            if self.mask_colors is None:
                check_palettes(self.masks)
        pictures, self.names = open_images(images, in_chans, value_range)
        super().__init__(pictures, repeats)

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
                f"the mask of {self.names[index]} has {mask.shape} pixels, "
                f"the image {image.shape[:2]}."
            )
        return image, mask

    def _mask(self, index: int) -> np.ndarray:
        """A mask (H, W) of class indices, -1 where unlabelled."""
        mask = self._read_mask(index)
        if mask.ndim != 2 or mask.dtype.kind not in "iub":
            raise ValueError(
                f"the mask of {self.names[index]} is an array {mask.dtype} of shape {mask.shape}; "
                "it must hold one class index for each pixel (a palette or grey image), not "
                "colours."
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

    def _read_mask(self, index: int) -> np.ndarray:
        """What the file or array holds, with colours brought to class indices."""
        given = self.masks[index]
        palette = None
        if isinstance(given, str | os.PathLike):
            mask, palette = decode_mask(os.fspath(given))
        else:
            mask = np.asarray(given() if callable(given) else given)
        if self.mask_colors is not None:
            if palette is not None and not self.mask_colors.is_grey:
                mask = palette_colours(mask, palette)
            return self.mask_colors(mask, self.names[index])
        is_file = isinstance(given, str | os.PathLike)
        if is_file and mask.ndim == 3 and mask.shape[2] == 3:
            return as_grey(mask, os.fspath(given))
        return mask

    def _wrong_values(self, index: int, mask: np.ndarray, wrong: np.ndarray) -> str:
        text = (
            f"the mask of {self.names[index]} holds {wrong[:10].tolist()}; the {self.num_classes} "
            f"classes are 0 to {self.num_classes - 1}, and ignore_index is {self.ignore_index}"
        )
        values = set(np.unique(mask[mask >= 0]).tolist())
        if wrong.tolist() == [255] and self.num_classes == 2 and values <= {0, 255}:
            return text + (
                ". It seems to be black and white: mask_colors={0: 0, 255: 1} (--mask-colors) "
                "makes 255 class 1"
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
        summary = super().summary
        summary.splits["images"]["classes"] = self.num_classes
        summary.levels = {"mask": self.num_classes}
        if self.taxonomy is not None:
            summary.levels = dict(zip(self.taxonomy.levels, self.taxonomy.num_classes, strict=True))
        return summary

    def absent_classes(self, pixels: torch.Tensor) -> str:
        """A warning of classes that are in no mask, '' if there are none.

        Args:
            pixels: What :meth:`count_pixels` returned.

        Example:
            >>> images, masks = np.zeros((1, 4, 4), np.uint8), np.zeros((1, 4, 4), int)
            >>> data = SegmentationDataset(images, masks, ['road', 'sky'])
            >>> data.absent_classes(data.count_pixels())
            "1 of 2 classes is in no mask: 'sky'"
        """
        absent = [self.classes[index] for index in (pixels == 0).nonzero().flatten().tolist()]
        if not absent:
            return ""
        verb = "is" if len(absent) == 1 else "are"
        return f"{len(absent)} of {self.num_classes} classes {verb} in no mask: {listed(absent)}"


def _class_names(classes: int | Sequence[str] | Taxonomy) -> tuple[str, ...]:
    if isinstance(classes, Taxonomy):
        return tuple(classes.leaf_names)
    if isinstance(classes, int):
        return tuple(str(index) for index in range(classes))
    return tuple(str(name) for name in classes)
