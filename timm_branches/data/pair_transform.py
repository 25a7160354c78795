"""One geometry for an image and its mask."""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from timm_branches.data.datasets import to_unit_tensor
from timm_branches.data.transforms import (
    SampleRandom,
    color_jitter_steps,
    import_albumentations,
    load_compose,
    match_mean,
    scale_fills,
)

__all__ = ["PairTransform"]


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
        >>> picture, labels = np.zeros((4, 12, 3), np.uint8), np.zeros((4, 12), np.int64)
        >>> image, mask = transform(picture, labels, key=(0, 0, 0))
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
            raise ValueError("size= has no effect beside augment=: let the augmentation crop.")
        if not 0 < scale[0] <= scale[1] or not 0 <= hflip <= 1:
            raise ValueError(
                "scale must be an increasing range above 0 and hflip a probability, "
                f"got {scale}, {hflip}."
            )
        if size is None and (scale != (1.0, 1.0) or color_jitter):
            raise ValueError(
                "scale= and color_jitter= are for training: they need size=, the size of the crop."
            )
        self.mean, self.std = tuple(mean), tuple(std)
        self.random = SampleRandom()
        self.compose: Any = None
        if augment is not None:
            self.compose = copy.deepcopy(load_compose(augment))
        elif size is not None:
            height, width = (size, size) if isinstance(size, int) else size
            self.compose = self._training_steps(height, width, scale, hflip, color_jitter)
        self._deep_compose: Any = None
        if self.compose is not None:
            self._deep_compose = copy.deepcopy(self.compose)
            scale_fills(self._deep_compose)
            for compose in (self.compose, self._deep_compose):
                compose.set_random_state(self.random.numpy, self.random.python)

    def _training_steps(
        self, height: int, width: int, scale: tuple[float, float], hflip: float, jitter: float
    ) -> Any:
        A = import_albumentations()
        fill = [255 * value for value in self.mean]
        steps = []
        if scale != (1.0, 1.0):
            steps.append(A.RandomScale((scale[0] - 1, scale[1] - 1), p=1))
        # to the right and below, so that a crop of the image's own size is the image
        steps.append(
            A.PadIfNeeded(
                height, width, position="top_left", fill=fill[0] if len(fill) == 1 else fill
            )
        )
        steps.append(A.RandomCrop(height, width))
        if hflip:
            steps.append(A.HorizontalFlip(p=hflip))
        return A.Compose(steps + color_jitter_steps(jitter))

    def __call__(
        self, image: np.ndarray, mask: np.ndarray, key: Sequence[int] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Transform one pair.

        Args:
            image: Array (H, W, C), uint8, or float32 in [0, 1].
            mask: Integer array (H, W), -1 where unlabelled.
            key: (seed, epoch, sample); None draws one from torch's global generator.

        Returns:
            Float tensor (C, height, width), and LongTensor (height, width).

        Raises:
            ValueError: The mean does not fit the image's channels, or an own augmentation returns
                an image of another type.
        """
        if self.compose is not None:
            image, mask = self._augment(image, mask, key)
        if image.ndim == 2:
            image = image[:, :, None]
        channels = image.shape[2]
        mean = self._per_channel(self.mean, channels, "mean")  # (C, 1, 1)
        std = self._per_channel(self.std, channels, "std")
        tensor = to_unit_tensor(image).sub_(mean).div_(std)
        return tensor, torch.from_numpy(np.ascontiguousarray(mask, dtype=np.int64))

    def _augment(
        self, image: np.ndarray, mask: np.ndarray, key: Sequence[int] | None
    ) -> tuple[np.ndarray, np.ndarray]:
        self.random.seed((int(torch.randint(2**62, ())),) if key is None else key)
        compose = self.compose if image.dtype == np.uint8 else self._deep_compose
        # unlabelled is 0, which transforms fill with, and class k is k + 1
        mask_type = np.uint8 if mask.max(initial=0) < 255 else np.int16
        result = compose(image=image, mask=(mask + 1).astype(mask_type))
        augmented = result["image"]
        if not isinstance(augmented, np.ndarray) or augmented.dtype != image.dtype:
            raise ValueError(
                f"the augmentation must return {image.dtype} arrays: leave out Normalize and "
                "ToTensorV2."
            )
        return augmented, result["mask"].astype(np.int64) - 1

    @staticmethod
    def _per_channel(values: Sequence[float], channels: int, name: str) -> torch.Tensor:
        if len(values) == 1:
            matched = tuple(values) * channels
        else:
            matched = match_mean(values, channels, name)
        return torch.tensor(matched).view(-1, 1, 1)
