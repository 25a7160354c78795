"""Image transforms: timm's own for evaluation, albumentations for augmentation.

This is the only file that imports albumentations.
"""

import copy
import hashlib
import os
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from timm.data.constants import DEFAULT_CROP_PCT, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

__all__ = ["SampleTransform", "create_transform"]

AUGMENTS = ("none", "light", "cifar", "imagenet", "auto")
# pixels; up to here images are shifted rather than cut out and enlarged, and not cropped in
# evaluation
_SMALL = 64
# OpenCV's numbers
_INTERPOLATIONS = {"nearest": 0, "bilinear": 1, "bicubic": 2, "area": 3, "lanczos": 4}


def import_albumentations() -> Any:
    """The library, which is heavy and therefore imported where it is used."""
    # Without this, importing albumentations asks the network whether there is a newer release.
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
    import albumentations

    return albumentations


class SampleRandom:
    """One numpy and one Python generator that are set to a new state for each sample."""

    def __init__(self) -> None:
        self.numpy = np.random.Generator(np.random.PCG64(0))
        self.python = random.Random(0)
        self._state: Any = self.numpy.bit_generator.state

    def seed(self, key: Sequence[int]) -> None:
        """Begin the random numbers of one sample, a function of `key` alone."""
        # A cryptographic hash, because neighbouring keys (epoch 1, sample 2 and epoch 2, sample 1)
        # must not be related.
        digest = hashlib.blake2b(repr(tuple(key)).encode(), digest_size=24).digest()
        self._state["state"]["state"] = int.from_bytes(digest[:16], "little")
        self.numpy.bit_generator.state = self._state
        self.python.seed(int.from_bytes(digest[16:], "little"))


class SampleTransform:
    """An uint8 image to a normalised tensor.

    By a geometry, an optional augmentation, and mean and deviation.

    Random numbers are a function of the key (seed, epoch, sample) alone. So the augmentation of a
    sample does not depend on how many workers or ranks there are, differs between epochs, and
    repeats with the seed. An albumentations `Compose` by itself ignores global seeds and repeats
    itself in every worker; its `set_random_seed` hands the same seed to every transform in it,
    which makes a flip and a dropout of the same probability happen always together. Here all
    transforms share one generator, whose state is set anew: some 5 us a sample, against some 50 us
    for `set_random_seed` and 60 us for five transforms of a 32 px image.

    Args:
        size: Height and width of the result.
        mean: Mean of each channel, for values in [0, 1].
        std: Standard deviation of each channel.
        geometry: Takes a PIL image, returns an uint8 tensor CHW; None leaves the image as it is.
        compose: An albumentations `Compose`; it is copied. It may normalise by itself: only uint8
            results are normalised here.
        keeps_exact: Whether `geometry` changes nothing of an image that has the right size already;
            it is skipped then.
    """

    takes_key = True

    def __init__(
        self,
        size: tuple[int, int],
        mean: Sequence[float],
        std: Sequence[float],
        geometry: Callable | None = None,
        compose: Any = None,
        keeps_exact: bool = False,
    ) -> None:
        self.size = size
        self.keeps_exact = keeps_exact
        self.mean = torch.tensor(mean).view(-1, 1, 1)
        self.std = torch.tensor(std).view(-1, 1, 1)
        self.geometry = geometry
        self.compose = copy.deepcopy(compose)
        self.random = SampleRandom()
        self._normalises = False
        self._deep_compose: Any = None
        if self.compose is not None:
            self.compose.set_random_state(self.random.numpy, self.random.python)
            self._normalises = "Normalize" in repr(self.compose)

    def __call__(self, image: np.ndarray, key: Sequence[int] | None = None) -> torch.Tensor:
        """Transform one image.

        Args:
            image: uint8 array (H, W, C), or float32 in [0, 1].
            key: (seed, epoch, sample); None draws one from torch's global generator.

        Returns:
            Float tensor (C, height, width).

        Raises:
            ValueError: If channels differ from the mean's, or a given `Compose` returns another
                size.
        """
        known = image.dtype in (np.uint8, np.float32)
        if not known or image.ndim != 3 or image.shape[2] != len(self.mean):
            raise ValueError(
                f"expected an uint8 (or float32) image (H, W, {len(self.mean)}), not {image.dtype} "
                f"of shape {image.shape}; set in_chans of the dataset and "
                "input_size=(channels, height, width) of the transform alike."
            )
        deep = image.dtype == np.float32
        if self.geometry is not None and not (self.keeps_exact and image.shape[:2] == self.size):
            image = self._resize(image)
        if self.compose is not None:
            self.random.seed((int(torch.randint(2**62, ())),) if key is None else key)
            compose = self._for_deep() if deep else self.compose
            augmented = compose(image=image)["image"]
        else:
            augmented = image
        if isinstance(augmented, torch.Tensor):  # the compose ends with ToTensorV2
            tensor = augmented
        else:
            tensor = torch.from_numpy(np.ascontiguousarray(augmented.transpose(2, 0, 1)))
        if tuple(tensor.shape[-2:]) != self.size:
            raise ValueError(
                f"the augmentation returned an image of {tuple(tensor.shape[-2:])} pixels, but the "
                f"model takes {self.size}; end it with a Resize or RandomCrop to that size."
            )
        if tensor.dtype == torch.uint8:
            # In timm's order of operations, so that values agree to the last bit
            tensor = tensor.float().div_(255).sub_(self.mean).div_(self.std)
        elif deep and not self._normalises:
            tensor = tensor.float().sub_(self.mean).div_(self.std)
        return tensor.float()

    def _for_deep(self) -> Any:
        """The augmentation for images in [0, 1]: what it fills with is given for 0 to 255."""
        if self._deep_compose is None:
            compose = copy.deepcopy(self.compose)
            scale_fills(compose)
            compose.set_random_state(self.random.numpy, self.random.python)
            self._deep_compose = compose
        return self._deep_compose

    def _resize(self, image: np.ndarray) -> np.ndarray:
        from PIL import Image

        assert self.geometry is not None
        channels = image.shape[2]
        if image.dtype == np.uint8 and channels in (1, 3):
            tensor = self.geometry(Image.fromarray(image[:, :, 0] if channels == 1 else image))
            return tensor.numpy().transpose(1, 2, 0)
        # PIL resizes single channels of any type: bands, and deep values as they are
        resized = []
        for channel in range(channels):
            band = self.geometry(Image.fromarray(np.ascontiguousarray(image[:, :, channel])))
            resized.append(band.numpy()[0])
        return np.stack(resized, axis=-1)

    def __repr__(self) -> str:
        return (
            f"SampleTransform(size={self.size}, geometry={self.geometry}, compose={self.compose})"
        )


def scale_fills(compose: Any) -> None:
    """Divide by 255, in place, what an augmentation fills images with: for images in [0, 1].

    Args:
        compose: An albumentations `Compose`, with whatever is nested in it.
    """
    for transform in compose.transforms:
        if hasattr(transform, "transforms"):
            scale_fills(transform)
        fill = getattr(transform, "fill", None)
        if isinstance(fill, tuple | list | np.ndarray):
            transform.fill = tuple(float(value) / 255 for value in fill)
        elif isinstance(fill, int | float):
            transform.fill = fill / 255


def match_mean(values: Sequence[float], channels: int, name: str) -> tuple[float, ...]:
    """Mean or deviation for so many channels: repeated for bands, averaged for grey.

    Args:
        values: One for each channel, or one for all.
        channels: How many the images have.
        name: What to call them in the message.

    Raises:
        ValueError: Their numbers do not fit together.
    """
    values = tuple(float(value) for value in values)
    if len(values) == channels:
        return values
    # timm averages RGB weights for grey input in the same way
    if len(values) == 1 or channels == 1:
        return (sum(values) / len(values),) * channels
    raise ValueError(
        f"{name}={values} has {len(values)} values, but images have {channels} channels."
    )


def _built_in(
    name: str, size: tuple[int, int], fill: Sequence[float], options: dict[str, Any]
) -> Any:
    """The albumentations pipeline of a named augmentation; None for 'none'."""
    if name == "none":
        return None
    A = import_albumentations()
    height, width = size
    flips = [A.HorizontalFlip(p=options["hflip"]), A.VerticalFlip(p=options["vflip"])]
    flips = [flip for flip in flips if flip.p > 0]
    if name == "imagenet":
        chosen = options["interpolation"]
        kinds = ("bilinear", "bicubic") if chosen == "random" else (chosen,)
        # OpenCV does not smooth what it shrinks, except by area
        crops = [
            A.RandomResizedCrop(
                size,
                options["scale"],
                options["ratio"],
                _INTERPOLATIONS[kind],
                area_for_downscale="image",
            )
            for kind in kinds
        ]
        jitter = color_jitter_steps(options["color_jitter"])
        return A.Compose([crops[0] if len(crops) == 1 else A.OneOf(crops, p=1), *flips, *jitter])
    # 4 pixels at 32, as is usual for CIFAR
    pads = (max(1, width // 8), max(1, height // 8))
    steps = [A.Pad(padding=pads), A.RandomCrop(height, width), *flips]
    if name == "cifar":
        hole = (0.25, 0.5)
        steps.append(
            A.CoarseDropout((1, 1), hole, hole, fill=tuple(255 * value for value in fill), p=0.5)
        )
    return A.Compose(steps)


def color_jitter_steps(strength: float) -> list:
    """Brightness, contrast and saturation by factors around 1, as timm's, in every image.

    Raises:
        ValueError: The strength is negative.
    """
    if strength < 0:
        raise ValueError(f"color_jitter must be at least 0, got {strength}.")
    if not strength:
        return []
    factors = (max(0.0, 1 - strength), 1 + strength)
    return [import_albumentations().ColorJitter(factors, factors, factors, hue=(0, 0), p=1)]


def load_compose(augment: Any) -> Any:
    """An own pipeline, given as an object or as the path of a file that `A.save` wrote."""
    A = import_albumentations()
    if isinstance(augment, A.Compose):
        return augment
    if isinstance(augment, A.BasicTransform | A.BaseCompose):
        return A.Compose([augment])
    path = os.fspath(augment) if isinstance(augment, str | os.PathLike) else ""
    kind = os.path.splitext(path)[1].lower()
    if kind not in (".json", ".yaml", ".yml"):
        raise ValueError(
            f"no augmentation {augment!r}; it is one of {', '.join(AUGMENTS)}, an albumentations "
            "Compose, or a .json or .yaml file written by albumentations.save."
        )
    if not os.path.isfile(path):
        raise ValueError(
            f"no augmentation file {path}; albumentations.save(compose, path) writes one."
        )
    compose = A.load(path, data_format="json" if kind == ".json" else "yaml")
    return compose if isinstance(compose, A.Compose) else A.Compose([compose])


def create_transform(
    input_size: int | Sequence[int] = 224,
    is_training: bool = False,
    augment: Any = "none",
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
    std: Sequence[float] = IMAGENET_DEFAULT_STD,
    interpolation: str = "bilinear",
    crop_pct: float | None = None,
    crop_mode: str | None = None,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    hflip: float = 0.5,
    vflip: float = 0.0,
    color_jitter: float = 0.4,
) -> SampleTransform:
    """The transform for training or evaluation.

    Arguments are named as timm's, and take `resolve_data_config`'s dict.

    Evaluation is timm's own transform: the shorter side is resized to input_size / crop_pct, and
    the centre cut out.

    Args:
        input_size: One side, (height, width), or (channels, height, width).
        is_training: Whether to augment.
        augment: For training: 'none'; 'light', a random shift by up to an eighth of the side (4
            pixels at 32) and flips; 'cifar', that and one rectangle cut out half of the time;
            'imagenet', a random resized crop, flips and colour jitter; 'auto', 'light' up to 64
            pixels and 'imagenet' above. Or an albumentations `Compose`, or a .json or .yaml file
            written by `albumentations.save`, which then does all resizing itself.
        mean: Mean of each channel.
        std: Standard deviation of each channel.
        interpolation: 'bilinear', 'bicubic', 'nearest' or 'lanczos'; 'random' (training) is one of
            the first two.
        crop_pct: What part of the resized image evaluation keeps; None is 1 up to 64 pixels, else
            timm's 0.875. Note that `resolve_data_config` fills in the model's, also for small
            images.
        crop_mode: timm's 'center', 'squash' or 'border'.
        scale: Range of the share of the area that 'imagenet' cuts out.
        ratio: Range of the aspect ratio of what 'imagenet' cuts out.
        hflip: Probability of a horizontal flip; 0 for digits and letters.
        vflip: Probability of a vertical flip.
        color_jitter: Strength of brightness, contrast and saturation changes in 'imagenet'.

    Returns:
        A callable for uint8 arrays (H, W, C), and for a sample's key: see :class:`SampleTransform`.

    Raises:
        ValueError: For an unknown augmentation or interpolation, or a mean that does not fit the
            channels.

    Example:
        >>> transform = create_transform((3, 32, 32), is_training=True, augment='cifar')
        >>> transform(np.zeros((32, 32, 3), np.uint8), key=(0, 0, 0)).shape
        torch.Size([3, 32, 32])
    """
    from timm.data import create_transform as create_timm_transform

    if isinstance(input_size, int):
        input_size = (input_size, input_size)
    sides = tuple(int(side) for side in input_size)
    if len(sides) not in (2, 3) or min(sides) < 1:
        raise ValueError(
            "input_size must be a side, (height, width) or (channels, height, width), not "
            f"{input_size}."
        )
    size = (sides[-2], sides[-1])
    channels = sides[0] if len(sides) == 3 else len(tuple(mean))
    mean, std = match_mean(mean, channels, "mean"), match_mean(std, channels, "std")
    if interpolation not in _INTERPOLATIONS and interpolation != "random":
        raise ValueError(
            f"no interpolation {interpolation!r}; it is {', '.join(_INTERPOLATIONS)} or random."
        )
    if crop_pct is None:
        crop_pct = 1.0 if max(size) <= _SMALL else DEFAULT_CROP_PCT

    compose, resize = None, True
    if is_training:
        crop_pct, crop_mode = 1.0, None
        if isinstance(augment, str) and augment == "auto":
            augment = "light" if max(size) <= _SMALL else "imagenet"
        if isinstance(augment, str) and augment in AUGMENTS:
            options = {
                "scale": scale,
                "ratio": ratio,
                "hflip": hflip,
                "vflip": vflip,
                "color_jitter": color_jitter,
            }
            compose = _built_in(augment, size, mean, {**options, "interpolation": interpolation})
            resize = augment != "imagenet"
        else:
            compose, resize = load_compose(augment), False
    geometry = None
    if resize:
        # The same PIL resizing in training and evaluation; normalize=False keeps uint8 for what
        # comes after.
        geometry = create_timm_transform(
            size,
            is_training=False,
            interpolation="bilinear" if interpolation == "random" else interpolation,
            mean=mean,
            std=std,
            crop_pct=crop_pct,
            crop_mode=crop_mode,
            normalize=False,
        )
    return SampleTransform(size, mean, std, geometry, compose, keeps_exact=crop_pct == 1)
