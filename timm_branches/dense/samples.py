"""Photographs inside installed packages, and a small segmentation task made of one of them.

Recipes are single files that people copy, so what several of them and the tests use is in the
package.
"""

import os
from importlib.util import find_spec

import numpy as np

from timm_branches.data.segmentation import SegmentationDataset
from timm_branches.taxonomy import Taxonomy

__all__ = ["package_photographs", "package_segmentation"]

# Only what the wheels themselves hold: skimage.data fetches others from the network.
_FILES = {
    "skimage": {
        "astronaut": "astronaut.png",
        "brick": "brick.png",
        "camera": "camera.png",
        "cell": "cell.png",
        "chelsea": "chelsea.png",
        "clock": "clock_motion.png",
        "coffee": "coffee.png",
        "coins": "coins.png",
        "grass": "grass.png",
        "gravel": "gravel.png",
        "hubble_deep_field": "hubble_deep_field.jpg",
        "immunohistochemistry": "ihc.png",
        "moon": "moon.png",
        "motorcycle_left": "motorcycle_left.png",
        "motorcycle_right": "motorcycle_right.png",
        "page": "page.png",
        "retina": "retina.jpg",
        "rocket": "rocket.jpg",
        "text": "text.png",
    },
    "sklearn": {"china": "china.jpg", "flower": "flower.jpg"},
}
_FOLDERS = {"skimage": ("data",), "sklearn": ("datasets", "images")}
_INSTALL = "pip install scikit-image scikit-learn"
_FLOOR_ROW = 440  # below it the floor fills most of the scene
_HORIZON_ROW = 250  # where the floor meets the wall
_WALL_DISPARITY = 30.0
# columns at half the size, with gaps: bench and shelf, concrete and metal are seen in training
_PARTS = {
    "train": (slice(0, 75), slice(129, 276)),
    "val": (slice(79, 125),),
    "test": (slice(280, 370),),
}


def package_photographs() -> dict[str, np.ndarray]:
    """The photographs inside scikit-image and scikit-learn, as far as these are installed.

    Nothing is fetched.

    Beside scenes there are textures (brick, grass, gravel), scans (page, text), micrographs (cell,
    immunohistochemistry, retina) and a stereo pair, whose two images must not be divided between
    training and test. 'clock' is blurred by motion, and no clean image to compare with.

    Returns:
        By name uint8 arrays: grey (H, W) or RGB (H, W, 3).

    Raises:
        ImportError: Neither package is installed.

    Example:
        >>> package_photographs()['camera'].shape
        (512, 512)
    """
    from PIL import Image

    found = {}
    for package, files in _FILES.items():
        for name, file in files.items():
            if os.path.isfile(path := os.path.join(_folder(package), file)):
                with Image.open(path) as image:
                    found[name] = np.asarray(
                        image if image.mode in ("L", "RGB") else image.convert("RGB")
                    )
    if not found:
        raise ImportError(f"the photographs come with scikit-image and scikit-learn: {_INSTALL}")
    return found


def package_segmentation(
    repeats: int = 1,
) -> tuple[SegmentationDataset, SegmentationDataset, SegmentationDataset]:
    """A real scene with measured labels: wall, floor and motorcycle.

    It is from the stereo data inside scikit-image.

    The image is the left one of 'Motorcycle' (Scharstein et al., "High-Resolution Stereo Datasets
    with Subpixel-Accurate Ground Truth", GCPR 2014), whose disparity, the inverse of the distance,
    was measured with structured light. Labels are derived from the disparity alone, never from the
    photograph, so that there is no rule on colours to be found out:

    - floor: within 1.5 pixels of the plane that is fitted to the disparity of the lowest rows,
      below row 250;
    - motorcycle: nearer than that plane by more, and of a disparity of at least 30;
    - wall, with all that stands before it (shelves, bench, boxes): of the rest what has a disparity
      below 30;
    - -1 where nothing was measured (7 percent, mostly edges of objects), and the few pixels left.

    So the few pixels where tyres touch the floor are labelled floor. It is one scene at half its
    size, 250 by 370 pixels, cut into four strips: for training one with the bench and one with
    engine and shelf, 222 columns together; between them one for validation, with the rear wheel
    (46); the right one is for test, with the front wheel (90). A result says whether a network
    learns and whether it carries over to another part of this scene, not what it is worth on other
    photographs.

    Args:
        repeats: How often a training strip counts in an epoch, with another random crop each time.

    Returns:
        Training (two strips), validation and test data, with the taxonomy surroundings (wall,
        floor) and vehicle (motorcycle), without a transform: set `train.transform` and so on.

    Raises:
        ImportError: scikit-image is not installed.

    Example:
        >>> train, val, test = package_segmentation()
        >>> train.classes, test[0][1].shape
        (('wall', 'floor', 'motorcycle'), torch.Size([250, 90]))
    """
    import cv2

    file = os.path.join(_folder("skimage"), "motorcycle_disp.npz")
    if not os.path.isfile(file):
        raise ImportError(f"the stereo data come with scikit-image: {_INSTALL}")
    with np.load(file) as arrays:
        labels = _label_scene(arrays["arr_0"].astype(np.float64))[::2, ::2]
    image = package_photographs()["motorcycle_left"]
    image = cv2.resize(image[:, :740], (370, 250), interpolation=cv2.INTER_AREA)
    tree = Taxonomy(
        ["surroundings/wall", "surroundings/floor", "vehicle/motorcycle"], levels=["kind", "object"]
    )
    parts = []
    for name, strips in _PARTS.items():
        images = [image[:, strip] for strip in strips]
        masks = [labels[:, strip] for strip in strips]
        times = repeats if name == "train" else 1
        parts.append(SegmentationDataset(images, masks, tree, repeats=times))
    train, val, test = parts
    return train, val, test


def _label_scene(disparity: np.ndarray) -> np.ndarray:
    """Class indices (H, W) from disparities in pixels (H, W), infinite where unknown."""
    known = np.isfinite(disparity)
    disparity = np.where(known, disparity, 0)
    row, column = np.indices(disparity.shape)
    terms = np.stack([row, column, np.ones_like(row)], -1).astype(np.float64)
    fitted = known & (row >= _FLOOR_ROW)
    for _ in range(3):  # again without what does not lie on it
        plane = terms @ np.linalg.lstsq(terms[fitted], disparity[fitted], rcond=None)[0]
        above = disparity - plane
        fitted = known & (row >= _FLOOR_ROW) & (abs(above) < 1)
    labels = np.full(disparity.shape, -1)
    labels[known & (disparity < _WALL_DISPARITY)] = 0
    labels[known & (above >= 1.5) & (disparity >= _WALL_DISPARITY)] = 2
    labels[known & (abs(above) < 1.5) & (row >= _HORIZON_ROW)] = 1
    return labels


def _folder(package: str) -> str:
    """Where a package keeps its images, '' if it is not installed; without importing it."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return ""
    return os.path.join(spec.submodule_search_locations[0], *_FOLDERS[package])
