"""Degraded images and the clean ones: made on the fly, or people's own pairs."""

import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from timm_branches.data.decode import ValueRange
from timm_branches.data.pairs import PairDataset, match_files, open_images
from timm_branches.data.transforms import SampleRandom

__all__ = ["DenoisingDataset", "RestorationDataset"]


class _PatchDataset(PairDataset):
    """Whole images, or random patches of them that are also flipped and turned."""

    def __init__(
        self, images: Any, is_training: bool, patch_size: int | None, repeats: int
    ) -> None:
        if patch_size is not None and (patch_size < 1 or not is_training):
            raise ValueError(
                f"patch_size={patch_size} must be at least 1, and is for is_training=True."
            )
        self.is_training, self.patch_size = is_training, patch_size
        self.random = SampleRandom()
        super().__init__(images, repeats)

    def _begin(self, sample: int) -> np.random.Generator:
        """The random numbers of a sample: in evaluation the same in every epoch."""
        if self.is_training:
            self.random.seed((self.seed, self.epoch, sample))
        else:
            self.random.seed((self.seed, sample))
        return self.random.numpy

    def _draw_corner(
        self, random: np.random.Generator, shape: tuple[int, ...], name: str
    ) -> list[int]:
        """Row and column where a patch begins.

        Raises:
            ValueError: The image is smaller than a patch.
        """
        assert self.patch_size is not None
        corner = []
        for side in shape[:2]:
            if side < self.patch_size:
                raise ValueError(
                    f"{name} has a side of {side} pixels, less than patch_size={self.patch_size}."
                )
            corner.append(int(random.integers(side - self.patch_size + 1)))
        return corner


class DenoisingDataset(_PatchDataset):
    """Clean images, and what blur, noise and compression made on the fly make of them.

    degraded = JPEG(blur(clean) + noise). The noise is white, Gaussian, and not clipped where no
    JPEG follows, as the literature has it: values may lie outside of [0, 1]. In training patch,
    flips, quarter turns, blur, noise and quality are functions of (seed, epoch, sample); in
    evaluation of (seed, sample): the same in every epoch. Whole images of different sizes do not
    stack: evaluate them in batches of 1.

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
        value_range: The values of black and white of deep images, see
            :mod:`timm_branches.data.decode`.
        jpeg: Quality of a JPEG compression from 1 to 100, which comes last and clips to 8 bits, or
            a range; 0 for none.

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
        *,
        value_range: ValueRange | None = None,
        jpeg: float | tuple[float, float] = 0.0,
    ) -> None:
        self.sigma, self.blur = _range("sigma", sigma), _range("blur", blur)
        self.jpeg = _range("jpeg", jpeg)
        if self.jpeg[1] and not 1 <= self.jpeg[0] <= self.jpeg[1] <= 100:
            raise ValueError(f"jpeg takes qualities from 1 to 100, or 0 for none, got {jpeg}.")
        if not self.sigma[1] and not self.blur[1] and not self.jpeg[1]:
            raise ValueError("with sigma=0, blur=0 and jpeg=0 nothing is degraded.")
        pictures, self.names = open_images(images, in_chans, value_range)
        super().__init__(pictures, is_training, patch_size, repeats)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """One sample.

        Args:
            index: Its position.

        Returns:
            The degraded and the clean image (C, H, W), float32; the clean one in [0, 1].

        Raises:
            ValueError: The image is smaller than a patch.
        """
        sample = self._check_index(index)
        number = sample // self.repeats
        image: np.ndarray = self.images[number]  # (H, W, C)
        random = self._begin(sample)
        sigma = random.uniform(*self.sigma)
        blur = random.uniform(*self.blur)
        if self.patch_size is None:
            clean = _to_float(image)
            degraded = _blur(clean, blur)
        else:
            size, reach = self.patch_size, _reach(blur)
            turn, flip = _draw_turn(random)
            top, left = self._draw_corner(random, image.shape, self.names[number])
            # with what the blur brings in from beyond the patch
            above, before = min(top, reach), min(left, reach)
            rows = slice(top - above, top + size + reach)
            columns = slice(left - before, left + size + reach)
            around = _to_float(image[rows, columns])
            inside = (slice(above, above + size), slice(before, before + size))
            clean = _turned(around[inside], turn, flip)
            degraded = _turned(_blur(around, blur)[inside], turn, flip)
        noise = random.standard_normal(clean.shape, dtype=np.float32)
        degraded = degraded + np.float32(sigma / 255) * noise
        if self.jpeg[1]:
            degraded = _compress(degraded, round(random.uniform(*self.jpeg)))
        return _to_tensor(degraded), _to_tensor(clean)


class RestorationDataset(_PatchDataset):
    """People's own pairs of a degraded image and the clean one, from two folders or from memory.

    Files belong together by their paths within the folders, without the extension, and both are
    decoded alike. In training patch, flips and quarter turns are functions of (seed, epoch, sample)
    and the same for both. Whole images of different sizes do not stack: evaluate them in batches
    of 1.

    Args:
        degraded: A folder, or uint8 arrays as :class:`HierarchicalDataset` takes them.
        clean: The same of the clean images, of the same sizes.
        is_training: Whether to draw anew each epoch.
        patch_size: For training: the side of a random patch, which is also flipped and turned; None
            is the whole image.
        in_chans: 1 for grey, 3 for RGB.
        repeats: How often each pair counts in an epoch, with another patch each time.
        degraded_suffix: What the degraded images' names end with before the extension (`_noisy`).
        clean_suffix: The same of the clean ones; without it, an end that all have is taken.
        value_range: The values of black and white of deep images, see
            :mod:`timm_branches.data.decode`.

    Attributes:
        names: What each pair is called in an error.

    Raises:
        ValueError: A file has no partner or two have one name, there are no files, the arrays
            differ in number, or a setting has no effect.

    Example:
        >>> noisy, clean = np.full((1, 8, 8), 51, np.uint8), np.zeros((1, 8, 8), np.uint8)
        >>> degraded, target = RestorationDataset(noisy, clean)[0]
        >>> degraded.shape, round(float((degraded - target).mean()), 3)
        (torch.Size([1, 8, 8]), 0.2)
    """

    def __init__(
        self,
        degraded: Any,
        clean: Any,
        is_training: bool = False,
        patch_size: int | None = None,
        in_chans: int = 1,
        repeats: int = 1,
        *,
        degraded_suffix: str = "",
        clean_suffix: str = "",
        value_range: ValueRange | None = None,
    ) -> None:
        folders = isinstance(degraded, str | os.PathLike)
        if folders != isinstance(clean, str | os.PathLike):
            raise ValueError("degraded and clean must be two folders, or both arrays.")
        if folders:
            degraded, clean = match_files(
                os.fspath(degraded),
                os.fspath(clean),
                degraded_suffix,
                clean_suffix,
                partner="clean image",
                advice="degraded_suffix=, clean_suffix=; --noisy-suffix, --clean-suffix",
            )
        elif degraded_suffix or clean_suffix:
            raise ValueError(
                "degraded_suffix= and clean_suffix= belong to folders, and have no effect here."
            )
        if len(degraded) != len(clean):
            raise ValueError(
                f"{len(degraded)} degraded images have {len(clean)} clean ones; give one for each."
            )
        pictures, self.names = open_images(degraded, in_chans, value_range)
        self.clean_images, self.clean_names = open_images(clean, in_chans, value_range)
        super().__init__(pictures, is_training, patch_size, repeats)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """One sample.

        Args:
            index: Its position.

        Returns:
            The degraded and the clean image (C, H, W), float32, in [0, 1].

        Raises:
            ValueError: The two differ in size, or are smaller than a patch.
        """
        sample = self._check_index(index)
        number = sample // self.repeats
        degraded, clean = self.images[number], self.clean_images[number]  # (H, W, C)
        if degraded.shape != clean.shape:
            height, width = degraded.shape[:2]
            raise ValueError(
                f"{self.names[number]} has {height} x {width} pixels, its clean image "
                f"{self.clean_names[number]} {clean.shape[0]} x {clean.shape[1]}; "
                "they must be of one size."
            )
        random = self._begin(sample)
        if self.patch_size is not None:
            turn, flip = _draw_turn(random)
            top, left = self._draw_corner(random, clean.shape, self.names[number])
            rows, columns = slice(top, top + self.patch_size), slice(left, left + self.patch_size)
            degraded = _turned(degraded[rows, columns], turn, flip)
            clean = _turned(clean[rows, columns], turn, flip)
        return _to_tensor(_to_float(degraded)), _to_tensor(_to_float(clean))


def _to_float(image: np.ndarray) -> np.ndarray:
    return image if image.dtype == np.float32 else image.astype(np.float32) / 255


def _to_tensor(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))  # (C, H, W)


def _draw_turn(random: np.random.Generator) -> tuple[int, bool]:
    """Quarter turns, and whether to flip."""
    return int(random.integers(4)), bool(random.integers(2))


def _turned(image: np.ndarray, turn: int, flip: bool) -> np.ndarray:
    turned = np.rot90(image, turn)
    return turned[:, ::-1] if flip else turned


def _reach(blur: float) -> int:
    """Pixels to each side that a blur of this deviation takes in."""
    return math.ceil(4 * blur)


def _blur(image: np.ndarray, blur: float) -> np.ndarray:
    import cv2

    if not blur:
        return image
    side = 2 * _reach(blur) + 1
    return cv2.GaussianBlur(image, (side, side), blur).reshape(image.shape)


def _compress(image: np.ndarray, quality: int) -> np.ndarray:
    """An image (H, W, C) in [0, 1] through JPEG, one or three channels."""
    import cv2

    pixels = (image.clip(0, 1) * 255).round().astype(np.uint8)
    is_colour = pixels.shape[2] == 3
    _, code = cv2.imencode(
        ".jpg", pixels[:, :, ::-1] if is_colour else pixels, [cv2.IMWRITE_JPEG_QUALITY, quality]
    )
    flag = cv2.IMREAD_COLOR if is_colour else cv2.IMREAD_GRAYSCALE
    decoded = cv2.imdecode(code, flag)
    assert decoded is not None
    decoded = decoded.reshape(pixels.shape)
    return _to_float(decoded[:, :, ::-1] if is_colour else decoded)


def _range(name: str, value: float | Sequence[float]) -> tuple[float, float]:
    low, high = (value, value) if isinstance(value, int | float) else value
    if not 0 <= low <= high < math.inf:
        raise ValueError(
            f"{name} must be a number from 0 upwards, or an increasing range of two, got {value}."
        )
    return float(low), float(high)
