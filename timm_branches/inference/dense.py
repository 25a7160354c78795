"""Answers for every pixel of images of any size: masks of classes, and restored images."""

import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from timm_branches.arguments import check_number
from timm_branches.data.datasets import to_unit_tensor
from timm_branches.data.image_list import ImageList
from timm_branches.dense import augmented_inference, tiled_inference
from timm_branches.hierarchy.decode import decode
from timm_branches.inference.predict import UNREADABLE, find_device
from timm_branches.model import BranchModel
from timm_branches.taxonomy import Taxonomy

__all__ = ["DensePredictions", "DenseRecord", "default_colors", "predict_pixels"]

KINDS = ("masks", "images")
# larger images are read in tiles of this side
_MOST_PIXELS = 2**21
_TILE = 512
# what a tile's side and the overlap, a quarter of it, must be multiples of: the usual stride
_MULTIPLE = 32
_PIXELS_AT_ONCE = 2**18


class DenseRecord(NamedTuple):
    """What a model says of the pixels of one image.

    Attributes:
        file: The image's file, or what it is called.
        pixels: The image (H, W, C) itself, uint8, or float32 in [0, 1].
        mask: Class indices (H, W), uint8, or uint16 for more than 256 classes; None for a restored
            image.
        image: The restored image (H, W, C), uint8; None for a mask.
        error: Why the image could not be read; nothing else is known of it then.
    """

    file: str
    pixels: np.ndarray | None = None
    mask: np.ndarray | None = None
    image: np.ndarray | None = None
    error: str | None = None


def predict_pixels(
    model: BranchModel | str | os.PathLike,
    images: Any,
    head: str | None = None,
    kind: str | None = None,
    tile: int | None = None,
    num_workers: int = 0,
    device: torch.device | str | None = None,
    strict: bool = True,
    views: str = "none",
    scales: Sequence[float] = (1.0,),
) -> "DensePredictions":
    """Label every pixel of images, or restore them; each keeps its own size.

    Args:
        model: A model with a decoder, or what :func:`timm_branches.load_model` takes.
        images: As :func:`timm_branches.inference.predict` takes them.
        head: The decoder, where the model has several that are not the levels of one tree.
        kind: 'masks' or 'images'; None goes by what the model's file says: a decoder that adds to
            the image, or was trained on degraded images, restores.
        tile: Side of the tiles in which an image is read; None reads those of up to 2 million
            pixels whole and larger ones in tiles of 512; 0 reads all of them whole.
        num_workers: Processes that read images; 0 reads them in this one.
        device: Where the model is moved to; None leaves a model where it is and puts a loaded one
            on a GPU if there is one.
        strict: Raise at the first image that cannot be read; otherwise it has a record with its
            `error`.
        views: Test-time augmentation, as :func:`timm_branches.dense.augmented_inference` takes it.
        scales: As there.

    Returns:
        :class:`DensePredictions`: iterate over it for one :class:`DenseRecord` an image, in order.

    Raises:
        FileNotFoundError: A path given does not exist.
        ValueError: The model has no decoder, or several; a setting has no sense; while iterating:
            an image cannot be read, or the model's outputs are not finite.

    Example:
        >>> from timm_branches import create_branch_model
        >>> model = create_branch_model(
        ...     'test_resnet', taps=[1, 2, 3], head='unet', num_classes=3, img_size=32)
        >>> (record,) = predict_pixels(model, np.zeros((40, 50, 3), np.uint8), kind='masks')
        >>> record.mask.shape
        (40, 50)
    """
    if not isinstance(model, BranchModel):
        from timm_branches.factory import load_model

        model = load_model(model)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if tile is not None:
        check_number("tile=", tile, 0, whole=True)
        if tile % (4 * _MULTIPLE):
            raise ValueError(f"tile= takes a multiple of {4 * _MULTIPLE}, or 0, got {tile}.")
    check_number("num_workers=", num_workers, 0, whole=True)
    if kind is not None and kind not in KINDS:
        raise ValueError(f"kind={kind!r}: choose one of {', '.join(KINDS)}.")
    heads = _decoders(model, head)
    listed = ImageList(images, model.in_chans, model.pretrained_cfg.get("value_range"))
    if device is not None:
        model.to(find_device(device))
    kind = kind or _kind(model, heads)
    # what cannot be asked for is said before an image is read
    augmented_inference(lambda x: x, torch.zeros(1, 2, 1, 1), views, scales, kind)
    found = DensePredictions(model, listed, heads, kind, tile, num_workers, strict)
    found.views, found.scales = views, tuple(scales)
    return found


def _decoders(model: BranchModel, head: str | None) -> tuple[str, ...]:
    """The decoder to ask, or those of the levels of the model's tree."""
    decoders = model.dense_heads
    if head is not None:
        if head not in decoders:
            raise ValueError(f"head={head!r}: the model's decoders are {list(decoders)}.")
        return (head,)
    if not decoders:
        raise ValueError(
            f"the model has no decoder, its heads are {list(model.names)}: predict() classifies "
            "whole images with it."
        )
    tree = model.taxonomy
    if len(decoders) > 1 and (tree is None or decoders != model.names[: tree.num_levels]):
        raise ValueError(f"the model has the decoders {list(decoders)}: give head= to choose one.")
    return decoders


def _kind(model: BranchModel, heads: Sequence[str]) -> str:
    """Whether the model gives masks or images, as its file says."""
    specs = dict(zip(model.names, model.head_specs, strict=True))
    if getattr(specs[heads[0]], "residual", False) or "degradation" in model.extra:
        return "images"
    known = model.taxonomy is not None or "classes" in model.extra
    if known or model.num_classes[heads[0]] != model.in_chans:
        return "masks"
    raise ValueError(
        f"the model's file does not say what its {model.in_chans} channels are: give kind='masks' "
        "or kind='images'."
    )


class DensePredictions:
    """The records of images, in their order; made by :func:`predict_pixels`.

    Attributes:
        images: The images.
        kind: 'masks' or 'images'.
        classes: Names of the classes; empty for images.
        colors: Their colours, a tuple of three numbers from 0 to 255 each.
        views: Test-time augmentation.
        scales: Multiples of the size at which each image is read.
    """

    views: str = "none"
    scales: tuple[float, ...] = (1.0,)

    def __init__(
        self,
        model: BranchModel,
        images: ImageList,
        heads: tuple[str, ...],
        kind: str,
        tile: int | None,
        num_workers: int,
        strict: bool,
    ) -> None:
        from timm.data import resolve_model_data_config

        self.model, self.images, self.heads = model, images, heads
        self.kind, self.tile, self.num_workers, self.strict = kind, tile, num_workers, strict
        self.classes: tuple[str, ...] = ()
        self.colors: tuple[tuple[int, int, int], ...] = ()
        if kind == "masks":
            self.classes = _class_names(model, heads)
            self.colors = _colors(model, len(self.classes))
        cfg = resolve_model_data_config(model)
        self._mean = torch.tensor(cfg["mean"])[:, None, None]  # (C, 1, 1)
        self._std = torch.tensor(cfg["std"])[:, None, None]

    def __len__(self) -> int:
        return len(self.images)

    def __iter__(self) -> Iterator[DenseRecord]:
        return self.records(range(len(self)))

    def records(self, indices: Sequence[int]) -> Iterator[DenseRecord]:
        """The records of some of the images, by their positions."""
        from timm_branches.data import create_loader

        if not len(indices):
            return
        samples = _Pixels(self.images, indices)
        loader = create_loader(
            samples,
            1,
            num_workers=self.num_workers,
            rank=0,
            world_size=1,
            collate_fn=list,
            persistent_workers=False,
        )
        for index, (pixels,) in zip(indices, loader, strict=True):
            name = self.images.names[index]
            if isinstance(pixels, str):
                if self.strict:
                    raise ValueError(pixels)
                yield DenseRecord(name, error=pixels)
            elif self.kind == "masks":
                yield DenseRecord(name, pixels, mask=self._mask(pixels, name))
            else:
                yield DenseRecord(name, pixels, image=self._image(pixels, name))

    def _mask(self, pixels: np.ndarray, name: str) -> np.ndarray:
        outputs = self.outputs(pixels, name)
        tree = self.model.taxonomy
        by_level = tree is not None and set(tree.levels) <= set(outputs)
        levels = tree.levels if tree is not None and by_level else list(outputs)
        rows = [outputs[level][0].flatten(1).T for level in levels]  # (H W, K) each
        labels = []
        for start in range(0, len(rows[0]), _PIXELS_AT_ONCE):
            part = [row[start : start + _PIXELS_AT_ONCE].float() for row in rows]
            if by_level:
                assert tree is not None
                labels.append(_leaves(decode(part, tree, "best-path").labels, tree))
            elif part[0].shape[1] == 1:  # the logit of the second of two classes
                labels.append((part[0][:, 0] > 0).long())
            else:
                labels.append(part[0].argmax(1))
        kind = np.uint8 if len(self.classes) <= 256 else np.uint16
        return torch.cat(labels).reshape(pixels.shape[:2]).cpu().numpy().astype(kind)

    def _image(self, pixels: np.ndarray, name: str) -> np.ndarray:
        y = self.restored(pixels, name)[0].clamp(0, 1)  # (C, H, W)
        return (y * 255).round().byte().permute(1, 2, 0).numpy()

    def restored(self, pixels: np.ndarray, name: str) -> torch.Tensor:
        """The restored image (1, C, H, W), as :meth:`outputs`; its values are around [0, 1]."""
        (output,) = self.outputs(pixels, name).values()
        return output.float().cpu() * self._std + self._mean

    @torch.inference_mode()
    def outputs(self, pixels: np.ndarray, name: str) -> dict[str, torch.Tensor]:
        """The decoders' outputs for one image.

        Args:
            pixels: The image (H, W, C), uint8, or float32 in [0, 1].
            name: What it is called in messages.

        Returns:
            For each decoder its output (1, K, H, W).

        Raises:
            ValueError: They are not finite.
        """
        parameter = next(self.model.parameters())
        x = ((to_unit_tensor(pixels) - self._mean) / self._std)[None]
        tile = self.tile
        if tile is None:
            tile = _TILE if x.shape[2] * x.shape[3] > _MOST_PIXELS else 0
        training = self.model.training
        self.model.eval()
        try:
            if tile:
                outputs = tiled_inference(
                    lambda part: self._ask(part.to(parameter.device, parameter.dtype)),
                    x,
                    tile,
                    tile // 4,
                    multiple=_MULTIPLE,
                    batch_size=1,
                )
            else:
                outputs = self._ask(x.to(parameter.device, parameter.dtype))
        finally:
            self.model.train(training)
        for head, y in outputs.items():
            if not y.isfinite().all():
                raise ValueError(
                    f"head {head!r} of the model gives numbers that are not finite for {name}: the "
                    "model has diverged in training, or its input is out of bounds."
                )
        return outputs

    def _ask(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        def answer(view: torch.Tensor) -> dict[str, torch.Tensor]:
            return self.model(view, heads=list(self.heads))

        if self.views == "none" and self.scales == (1.0,):
            outputs = answer(x)
        else:
            outputs = augmented_inference(answer, x, self.views, self.scales, self.kind)
        return {head: y.cpu() for head, y in outputs.items()}


class _Pixels(Dataset):
    """Each image's pixels, or as a text why it cannot be read."""

    def __init__(self, images: ImageList, indices: Sequence[int]) -> None:
        self.images, self.indices = images, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> np.ndarray | str:
        position = self.indices[index]
        try:
            pixels = self.images[position]
            if isinstance(pixels, torch.Tensor):
                raise ValueError("give images as arrays (H, W, C) of uint8, or as files.")
            return pixels
        except UNREADABLE as error:
            name, reason = self.images.names[position], " ".join(str(error).split())
            return reason if name in reason else f"{name}: {reason}"


def _leaves(labels: torch.Tensor, tree: Taxonomy) -> torch.Tensor:
    """The numbers of the leaves (N,) at the ends of whole paths (N, L), -1 below an early end."""
    table = tree.leaf_table  # (leaves, L)
    depths = (table >= 0).sum(1) - 1
    classes = table.gather(1, depths[:, None])[:, 0]
    # the leaf that a class of a level is
    leaf_of = torch.full((tree.num_levels, max(tree.num_classes)), -1)
    leaf_of[depths, classes] = torch.arange(tree.num_leaves)
    labels = labels.cpu()
    ends = (labels >= 0).sum(1) - 1
    return leaf_of[ends, labels.gather(1, ends[:, None])[:, 0]]


def _class_names(model: BranchModel, heads: Sequence[str]) -> tuple[str, ...]:
    """The names that the model's tree or file has for its classes, else their numbers."""
    if model.taxonomy is not None and len(heads) >= 1:
        tree = model.taxonomy
        if len(heads) == tree.num_levels or len(model.names) == 1:
            return tuple(leaf[-1] for leaf in tree.leaves)
    count = max(2, model.num_classes[heads[0]])
    names = model.extra.get("classes") or []
    texts = isinstance(names, list) and all(isinstance(name, str) for name in names)
    if texts and len(names) == count:
        return tuple(names)
    return tuple(str(number) for number in range(count))


def _colors(model: BranchModel, count: int) -> tuple[tuple[int, int, int], ...]:
    """The colours that the model's file has for the classes, else others."""
    given = model.extra.get("colors")
    if not isinstance(given, list) or len(given) != count:
        return default_colors(count)
    colors = []
    for color in given:
        numbers = isinstance(color, list) and len(color) == 3
        if not numbers or not all(type(c) is int and 0 <= c <= 255 for c in color):
            return default_colors(count)
        colors.append((color[0], color[1], color[2]))
    return tuple(colors)


def default_colors(count: int) -> tuple[tuple[int, int, int], ...]:
    """Colours that differ as much as they can, those of PASCAL VOC; the first is black.

    Args:
        count: How many.

    Example:
        >>> default_colors(3)
        ((0, 0, 0), (128, 0, 0), (0, 128, 0))
    """
    colors = []
    for number in range(count):
        color = [0, 0, 0]
        rest = number
        # the bits of the number, by threes, from the highest bit of the channels down
        for bit in range(7, -1, -1):
            for channel in range(3):
                color[channel] |= ((rest >> channel) & 1) << bit
            rest >>= 3
        colors.append((color[0], color[1], color[2]))
    return tuple(colors)
