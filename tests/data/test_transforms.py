"""Geometry against timm, and augmentation as a function of (seed, epoch, sample)."""

import copy
import pickle

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from timm_branches.data import create_transform


def photo(height=60, width=90, channels=3):
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (height // 6, width // 6, channels), np.uint8)
    return np.ascontiguousarray(small.repeat(6, 0).repeat(6, 1))


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("size", [(3, 48, 48), (3, 40, 56)])
def test_evaluation_is_timm_to_the_last_bit(size, crop_mode):
    config = timm.data.resolve_data_config(
        {"input_size": size}, {"interpolation": "bicubic", "crop_pct": 0.9}
    )
    config["crop_mode"] = crop_mode
    theirs = timm.data.create_transform(**config)(Image.fromarray(photo()))
    ours = create_transform(**config)(photo())
    assert torch.equal(ours, theirs)


def test_small_images_are_not_cropped_unless_asked():
    image = photo(36, 36)
    expected = (torch.from_numpy(image).permute(2, 0, 1) / 255 - 0.5) / 0.25
    options = {"input_size": 36, "mean": (0.5,) * 3, "std": (0.25,) * 3}
    torch.testing.assert_close(create_transform(**options)(image), expected)
    torch.testing.assert_close(create_transform(is_training=True, **options)(image), expected)
    assert not torch.allclose(create_transform(crop_pct=0.8, **options)(image), expected)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("augment", ["none", "light", "cifar", "imagenet", "auto"])
@pytest.mark.parametrize("side", [32, 80])
def test_shapes(augment, side, channels):
    transform = create_transform(
        (channels, side, side), is_training=True, augment=augment, interpolation="random"
    )
    result = transform(photo(channels=channels), key=(0, 0, 0))
    assert result.shape == (channels, side, side)
    assert result.dtype == torch.float32
    assert result.isfinite().all()


@pytest.mark.parametrize("augment", ["light", "cifar", "imagenet"])
def test_key_alone_decides(augment):
    transform = create_transform((3, 32, 32), is_training=True, augment=augment)
    image = photo(32, 32) if augment != "imagenet" else photo()
    image = np.random.default_rng(1).integers(0, 256, image.shape, np.uint8)
    keys = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (7, 3, 10**12)]
    first = [transform(image, key=key) for key in keys]
    for i in range(len(keys)):
        for j in range(i):
            assert not torch.equal(first[i], first[j]), (keys[i], keys[j])
    copies = [transform, copy.deepcopy(transform), pickle.loads(pickle.dumps(transform))]
    for other in copies:
        for key, expected in reversed(list(zip(keys, first, strict=True))):
            np.random.rand()  # global generators must not matter
            assert torch.equal(other(image, key=key), expected)


def test_transforms_in_one_compose_are_independent():
    # Compose.set_random_seed gives each transform the same seed: both flips, or none
    A = pytest.importorskip("albumentations")
    flips = A.Compose([A.HorizontalFlip(p=0.5), A.VerticalFlip(p=0.5)])
    transform = create_transform(
        (1, 2, 2), is_training=True, augment=flips, mean=(0.0,), std=(1.0,)
    )
    image = np.array([[[0], [10]], [[20], [30]]], np.uint8)
    seen: dict[tuple, int] = {}
    for sample in range(1000):
        result = tuple(transform(image, key=(0, 0, sample)).mul(25.5).round().flatten().tolist())
        seen[result] = seen.get(result, 0) + 1
    assert len(seen) == 4
    assert all(200 < count < 300 for count in seen.values()), seen


def test_shift_is_uniform_over_the_nine_by_nine_offsets():
    transform = create_transform((1, 32, 32), True, "light", mean=(0.0,), std=(1.0,), hflip=0.0)
    image = np.zeros((32, 32, 1), np.uint8)
    image[16, 16] = 255
    places = [transform(image, key=(0, 0, i))[0].argmax().item() for i in range(1500)]
    rows, columns = {place // 32 for place in places}, {place % 32 for place in places}
    assert rows == columns == set(range(12, 21))
    assert len(set(places)) == 81


@pytest.mark.parametrize("kind", ["json", "yaml", "object", "single"])
def test_own_compose(tmp_path, kind):
    A = pytest.importorskip("albumentations")
    compose = A.Compose([A.RandomCrop(16, 16), A.Normalize((0.5,) * 3, (0.5,) * 3), A.ToTensorV2()])
    augment = compose
    if kind == "single":
        augment = A.RandomCrop(16, 16)
    elif kind != "object":
        augment = tmp_path / f"own.{kind}"
        A.save(compose, str(augment), data_format=kind)
    transform = create_transform((3, 16, 16), True, augment, mean=(0.5,) * 3, std=(0.5,) * 3)
    result = transform(photo(), key=(0, 0, 1))
    assert result.shape == (3, 16, 16)
    # normalised once, not twice: every value is one of the image's
    values = torch.from_numpy(np.unique(photo())).float() / 255 * 2 - 1
    assert (result.flatten()[:, None] - values).abs().amin(1).max() < 1e-5
    assert torch.equal(transform(photo(), key=(0, 0, 1)), result)


def test_own_compose_stays_as_it_was():
    A = pytest.importorskip("albumentations")
    compose = A.Compose([A.HorizontalFlip()])
    before = compose.random_generator
    create_transform((3, 32, 32), True, compose)
    assert compose.random_generator is before


def test_without_key_torch_decides():
    transform = create_transform((3, 32, 32), True, "cifar")
    image = photo(32, 32)
    torch.manual_seed(0)
    first = [transform(image) for _ in range(3)]
    torch.manual_seed(0)
    assert all(torch.equal(transform(image), one) for one in first)
    assert not torch.equal(first[0], first[1])


def test_grey_takes_the_average_of_an_rgb_mean():
    config = timm.data.resolve_data_config({"in_chans": 1}, {})
    config["input_size"] = (1, 8, 8)
    result = create_transform(**config)(np.full((8, 8, 1), 255, np.uint8))
    mean, std = np.mean(config["mean"]), np.mean(config["std"])
    torch.testing.assert_close(result, torch.full((1, 8, 8), float((1 - mean) / std)))


def test_errors(tmp_path):
    A = pytest.importorskip("albumentations")
    with pytest.raises(ValueError, match="none, light, cifar"):
        create_transform(32, True, "cifra")
    with pytest.raises(ValueError, match="no augmentation file"):
        create_transform(32, True, tmp_path / "none.json")
    with pytest.raises(ValueError, match="no interpolation"):
        create_transform(32, interpolation="cubic")
    with pytest.raises(ValueError, match="mean="):
        create_transform((4, 32, 32))
    with pytest.raises(ValueError, match="input_size"):
        create_transform((3, 3, 32, 32))
    with pytest.raises(ValueError, match="expected an uint8"):
        create_transform((1, 32, 32))(photo())
    with pytest.raises(ValueError, match="end it with a Resize"):
        create_transform((3, 32, 32), True, A.Compose([A.HorizontalFlip()]))(photo())
