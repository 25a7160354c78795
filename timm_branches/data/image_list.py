"""Images as people give them.

Files, folders, tars, and what is in memory already, mixed at will.
"""

import os
from typing import Any

import numpy as np
import torch

from timm_branches.data.decode import (
    ValueRange,
    check_uint8,
    decode_image,
    from_pil,
    match_channels,
    read_file,
    scale_values,
)
from timm_branches.data.images import is_image_name, open_tar
from timm_branches.taxonomy.order import natural_order

__all__ = ["ImageList"]

_TAR = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")


class ImageList:
    """Images of all the kinds that `predict` takes, as uint8 arrays (H, W, C).

    See :func:`timm_branches.inference.predict.predict`.

    Files are opened when their image is asked for.

    Args:
        images: See :func:`timm_branches.inference.predict.predict`.
        in_chans: 3 for RGB, 1 for grey, more for as many bands.
        value_range: The values of black and white, see
            :func:`timm_branches.data.decode.decode_image`.

    Attributes:
        names: What each is called.

    Raises:
        FileNotFoundError: A path does not exist.
        ValueError: There is no image.
        TypeError: Something else than paths, images, arrays and tensors.

    Example:
        >>> images = ImageList([np.zeros((8, 6), np.uint8)])
        >>> images.names, images[0].shape
        (['image 0'], (8, 6, 3))
    """

    def __init__(
        self, images: Any, in_chans: int = 3, value_range: ValueRange | None = None
    ) -> None:
        self.in_chans = in_chans
        self.value_range = value_range
        self.names: list[str] = []
        self._sources: list[Any] = []
        for image in [images] if _is_single(images) else images:
            if isinstance(image, (str, os.PathLike)):
                self._add_path(os.fspath(image))
            elif isinstance(image, (np.ndarray, torch.Tensor)) or _is_pil(image):
                self.names.append(f"image {len(self.names)}")
                self._sources.append(image)
            else:
                raise TypeError(
                    "an image is a file's name, a PIL image, an array or a tensor, not "
                    f"{type(image)}."
                )
        if not self._sources:
            where = f" in {images}" if isinstance(images, (str, os.PathLike)) else ""
            raise ValueError(
                f"there are no images{where}: give image files, folders or tars that hold some."
            )

    def _add_path(self, path: str) -> None:
        if os.path.isdir(path):
            found = _find_images(path)
            if not found:
                raise ValueError(f"there are no images in the folder {path}.")
        elif not os.path.exists(path):
            raise FileNotFoundError(f"{path}: there is no such file or folder.")
        elif path.lower().endswith(_TAR):
            members, archive = open_tar(path, self.in_chans)
            if not members:
                raise ValueError(f"there are no images in {path}.")
            self.names += [f"{path}:{member}" for member in members]
            self._sources += [(archive, i) for i in range(len(members))]
            return
        else:
            found = [path]
        self.names += found
        self._sources += found

    def __len__(self) -> int:
        return len(self._sources)

    def __getitem__(self, index: int) -> Any:
        source = self._sources[index]
        if isinstance(source, str):
            return decode_image(read_file(source), self.in_chans, source, self.value_range)
        if isinstance(source, tuple):
            archive, member = source
            archive.value_range = self.value_range
            return archive[member]
        if isinstance(source, torch.Tensor):
            if source.is_floating_point():
                return source
            source = source.cpu().numpy()
            source = source.transpose(1, 2, 0) if source.ndim == 3 else source
        elif not isinstance(source, np.ndarray):
            return from_pil(source, self.in_chans, self.value_range)
        if source.ndim == 3 and source.shape[2] in (2, 4) and source.shape[2] != self.in_chans:
            source = source[:, :, : source.shape[2] - 1]  # alpha is dropped, as it is from files
        if source.dtype != np.uint8 and self.value_range is not None:
            source = scale_values(source, self.value_range)
        elif source.dtype != np.float32 or self.value_range is None:
            check_uint8(source)
        return np.ascontiguousarray(match_channels(source, self.in_chans))


def _is_single(images: Any) -> bool:
    if isinstance(images, (np.ndarray, torch.Tensor)):
        return images.ndim < 4
    return isinstance(images, (str, os.PathLike)) or _is_pil(images)


def _is_pil(image: Any) -> bool:
    from PIL import Image

    return isinstance(image, Image.Image)


def _find_images(root: str) -> list[str]:
    """The image files in a folder and below it, in natural order.

    Links are followed, but no folder is read twice.
    """
    found, seen = [], {os.path.realpath(root)}
    for folder, below, files in os.walk(root, followlinks=True):
        real = {
            os.path.realpath(os.path.join(folder, name)): name
            for name in sorted(below, reverse=True)
            if not name.startswith(".")
        }
        below[:] = [name for place, name in real.items() if place not in seen]
        seen.update(real)
        found += [os.path.join(folder, name) for name in files if is_image_name(name)]
    return sorted(found, key=lambda path: natural_order(os.path.relpath(path, root)))
