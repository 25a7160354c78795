"""What lies inside scikit-image and scikit-learn."""

import numpy as np
import pytest

from timm_branches.dense import package_photographs, package_segmentation
from timm_branches.dense.samples import _label_scene

skimage_data = pytest.importorskip("skimage.data")


def test_photographs_are_what_the_packages_themselves_give():
    from sklearn.datasets import load_sample_image

    photographs = package_photographs()
    for name in ("astronaut", "camera", "immunohistochemistry", "retina", "clock", "coins"):
        assert np.array_equal(photographs[name], getattr(skimage_data, name)()), name
    for name in ("china", "flower"):
        assert np.array_equal(photographs[name], load_sample_image(f"{name}.jpg"))
    assert len(photographs) == 21
    assert {image.dtype for image in photographs.values()} == {np.dtype(np.uint8)}
    assert {image.shape[2:] for image in photographs.values()} == {(), (3,)}


def test_without_the_packages(monkeypatch):
    monkeypatch.setattr("timm_branches.dense.samples.find_spec", lambda name: None)
    for function in (package_photographs, package_segmentation):
        with pytest.raises(ImportError, match="scikit-image"):
            function()


def test_labels_of_a_scene_of_known_geometry():
    row, column = np.indices((500, 60))
    wall = np.full(row.shape, 10.0)
    floor = 0.18 * row - 0.003 * column - 31
    truth = np.where(floor > wall, 1, 0)
    disparity = np.where(truth == 1, floor, wall)
    thing = (row > 200) & (row < 460) & (column > 20) & (column < 40)
    disparity[thing], truth[thing] = 55, 2
    disparity[::7, 3], truth[::7, 3] = np.inf, -1
    labels = _label_scene(disparity)
    assert (labels == truth)[row >= 250].mean() == 1
    assert (labels == truth)[row < 200].mean() == 1


def test_the_segmentation_task():
    left, _, disparity = skimage_data.stereo_motorcycle()
    parts = package_segmentation(repeats=7)
    assert [len(part) for part in parts] == [14, 1, 1]
    # from left to right with their first columns; between them gaps
    strips = [(0, parts[0][0]), (79, parts[1][0]), (129, parts[0][7]), (280, parts[2][0])]
    pixels = left[:, :740].reshape(250, 2, 370, 2, 3).mean((1, 3)).transpose(2, 0, 1)
    known = np.isfinite(disparity[::2, ::2])
    masks = np.full((250, 370), -2)
    for start, (image, mask) in strips:
        width = image.shape[2]
        # not seen before, and no neighbour of what was
        assert (masks[:, max(0, start - 4) : start + width] == -2).all()
        masks[:, start : start + width] = mask
        assert abs(255 * image.numpy() - pixels[:, :, start : start + width]).max() < 0.51
        assert (mask.numpy()[~known[:, start : start + width]] == -1).all()
        assert (mask.numpy()[known[:, start : start + width]] == -1).mean() < 0.01
        assert min((mask == k).float().mean() for k in range(3)) > 0.05
    for part in parts:
        assert part.classes == ("wall", "floor", "motorcycle")
    # by eye: the door, the concrete in front, tank and seat, front wheel
    for (row, column), label in {
        (100, 220): 0,
        (480, 300): 1,
        (230, 430): 2,
        (210, 280): 2,
        (380, 665): 2,
    }.items():
        assert masks[row // 2, column // 2] == label, (row, column)
