"""What all pairs of images share: matching files, and images that count several times."""

import copy
import logging
import os
from collections.abc import Mapping
from typing import Any

from timm_branches.data.decode import ValueRange
from timm_branches.data.folders import find_files
from timm_branches.data.images import ArrayImages, FileImages, is_image_name
from timm_branches.data.seeded import SeededDataset
from timm_branches.data.summary import DataSummary
from timm_branches.taxonomy.order import natural_order

_logger = logging.getLogger(__name__)

__all__ = ["PairDataset", "list_images", "match_files", "open_images"]

_SHOWN = 10


class PairDataset(SeededDataset):
    """Images, each of which counts several times in an epoch.

    Args:
        images: A sequence of arrays (H, W, C).
        repeats: How often each image counts.

    Raises:
        ValueError: There is no image, or `repeats` is below 1.
    """

    def __init__(self, images: Any, repeats: int) -> None:
        if repeats < 1:
            raise ValueError(f"repeats must be at least 1, got {repeats}.")
        if not len(images):
            raise ValueError("there are no images.")
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

    @property
    def summary(self) -> DataSummary:
        """What was understood of the folders."""
        summary = DataSummary()
        summary.splits = {"images": {"images": len(self.images), "classes": 0}}
        return summary

    def _check_index(self, index: int) -> int:
        return range(len(self))[index]


def list_images(root: str) -> list[tuple[str, str]]:
    """The images below a folder in natural order.

    Args:
        root: The folder.

    Returns:
        For each image its path within the folder without the extension, and where the file is.

    Raises:
        ValueError: There is none.
    """
    names, _ = find_files(root, is_image_name)
    if not names:
        raise ValueError(f"no images in {root}.")
    return [(os.path.splitext(name)[0], os.path.join(root, name)) for name in names]


def open_images(
    images: Any, in_chans: int, value_range: ValueRange | None
) -> tuple[FileImages | ArrayImages, list[str]]:
    """Images of a folder, of paths or in memory, and what each is called in an error.

    Args:
        images: A folder, a sequence of paths, or uint8 arrays.
        in_chans: 3 for RGB, 1 for grey.
        value_range: The values of black and white of deep files.

    Raises:
        ValueError: There is no image in the folder, or `value_range` is given for arrays.
    """
    if isinstance(images, str | os.PathLike):
        images = [path for _, path in list_images(os.fspath(images))]
    if len(images) and isinstance(images[0], str | os.PathLike):
        names = [os.fspath(path) for path in images]
        return FileImages(names, in_chans, value_range), names
    if value_range is not None:
        raise ValueError("value_range= belongs to files, and has no effect on arrays.")
    return ArrayImages(images, in_chans), [f"image {i}" for i in range(len(images))]


def match_files(
    images: str,
    partners: str,
    image_suffix: str = "",
    partner_suffix: str = "",
    partner: str = "mask",
    advice: str = "mask_suffix=, --mask-suffix",
) -> tuple[list[str], list[str]]:
    """The files of two folders that belong together by their paths within them.

    Args:
        images: One folder.
        partners: The other.
        image_suffix: What the images' names end with before the extension; it does not count.
        partner_suffix: The same of the partners; files without it are passed over. Where no name
            fits without one and all partners end alike, that end is taken.
        partner: What the second kind is called in a message.
        advice: How a user names a suffix.

    Returns:
        The images' paths and their partners', in the same order.

    Raises:
        ValueError: Files without a partner, or two of one name.
    """
    left = _by_stem(images, image_suffix)
    right = _by_stem(partners, partner_suffix)
    if not partner_suffix and not set(left) & set(right):
        partner_suffix = _common_suffix(left, right)
        if partner_suffix:
            _logger.info("%ss are named as their images with %r behind.", partner, partner_suffix)
            right = _by_stem(partners, partner_suffix)
    problems = []
    without = sorted(set(left) - set(right), key=natural_order)
    if without:
        names = ", ".join(without[:_SHOWN])
        problems.append(f"{names} in {images} has no {partner} in {partners}")
    alone = sorted(set(right) - set(left), key=natural_order)
    if alone:
        names = ", ".join(alone[:_SHOWN])
        problems.append(f"{names} in {partners} has no image in {images}")
    if problems:
        text = "; ".join(problems)
        raise ValueError(
            f"{text}. A {partner} is named as its image, but for the extension and a suffix that "
            f"you can name ({advice})."
        )
    return list(left.values()), [right[stem] for stem in left]


def _by_stem(root: str, suffix: str) -> dict[str, str]:
    """Paths by their names without extension and suffix."""
    paths: dict[str, str] = {}
    for stem, path in list_images(root):
        if not stem.endswith(suffix):
            continue
        name = stem.removesuffix(suffix)
        if name in paths:
            raise ValueError(
                f"{paths[name]} and {path} share their names with each other but for the extension."
            )
        paths[name] = path
    return paths


def _common_suffix(left: Mapping[str, str], right: Mapping[str, str]) -> str:
    """The end that every partner's name has behind its image's name, '' if there is none."""
    ends = set()
    for stem in right:
        lengths = [len(prefix) for prefix in left if stem.startswith(prefix)]
        if not lengths:
            return ""
        ends.add(stem[max(lengths) :])
    return ends.pop() if len(ends) == 1 else ""
