"""Images as people give them.

Files, folders, tars, and what is in memory already, mixed at will.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from timm_branches.data.images import decode_image, is_image_name, match_channels, open_tar

__all__ = ["ImageList"]

_TAR = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")


class ImageList:
    """Images of all the kinds that :func:`timm_branches.inference.predict.predict` takes, as uint8
    arrays (H, W, C).

    Files are opened when their image is asked for.

    Args:
        images: See :func:`timm_branches.inference.predict.predict`.
        in_chans: 3 for RGB, 1 for grey.

    Attributes:
        names: What each is called.

    Raises:
        FileNotFoundError: A path does not exist.
        ValueError: There is no image, or `in_chans` is neither 1 nor 3.
        TypeError: Something else than paths, images, arrays and tensors.

    Example:
        >>> images = ImageList([np.zeros((8, 6), np.uint8)])
        >>> images.names, images[0].shape
        (['image 0'], (8, 6, 3))
    """

    def __init__(self, images: Any, in_chans: int = 3) -> None:
        if in_chans not in (1, 3):
            raise ValueError(
                f"the model takes images of {in_chans} channels; images are read as RGB (3) or grey (1)."
            )
        self.in_chans = in_chans
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
                    f"an image is a file's name, a PIL image, an array or a tensor, not {type(image)}."
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
            return decode_image(Path(source).read_bytes(), self.in_chans, source)
        if isinstance(source, tuple):
            archive, member = source
            return archive[member]
        if isinstance(source, torch.Tensor):
            if source.is_floating_point():
                return source
            source = source.cpu().numpy()
            source = source.transpose(1, 2, 0) if source.ndim == 3 else source
        elif not isinstance(source, np.ndarray):
            source = _from_pil(source, self.in_chans)
        if source.ndim == 3 and source.shape[2] in (2, 4):
            source = source[:, :, : source.shape[2] - 1]  # alpha is dropped, as it is from files
        return np.ascontiguousarray(match_channels(source, self.in_chans))


def _is_single(images: Any) -> bool:
    if isinstance(images, (np.ndarray, torch.Tensor)):
        return images.ndim < 4
    return isinstance(images, (str, os.PathLike)) or _is_pil(images)


def _is_pil(image: Any) -> bool:
    from PIL import Image

    return isinstance(image, Image.Image)


def _from_pil(image: Any, in_chans: int) -> np.ndarray:
    """As files are decoded.

    Upright, without alpha, 16 bits scaled to 8 (PIL itself would cut them off at 255).
    """
    from PIL import ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        return (np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8)
    if image.mode in ("I", "F"):
        raise ValueError(
            f"a PIL image of mode {image.mode!r} has no known range of values: convert it to 'L'."
        )
    return np.asarray(image.convert("L" if in_chans == 1 else "RGB"))


def _find_images(root: str) -> list[str]:
    """The image files in a folder and below it, in natural order.

    Links are followed, but no folder is read twice.
    """
    from timm.utils.misc import natural_key

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
    return sorted(found, key=lambda path: natural_key(os.path.relpath(path, root)))
