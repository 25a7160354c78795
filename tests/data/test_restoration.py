"""People's own pairs of degraded and clean images, against PIL and numpy."""

import numpy as np
import pytest
import torch
from PIL import Image

from timm_branches.data import DenoisingDataset, PairTransform, RestorationDataset, create_loader

RNG = np.random.default_rng(0)


def write_pairs(root, count=3, size=(12, 9), clean_suffix="", mode="RGB"):
    """Noisy and clean pictures; noisy is clean + 10."""
    for folder in ("noisy", "clean"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for i in range(count):
        clean = RNG.integers(0, 200, (*size, 3), dtype=np.uint8)
        Image.fromarray(clean).convert(mode).save(root / "clean" / f"{i}{clean_suffix}.png")
        Image.fromarray(clean + 10).convert(mode).save(root / "noisy" / f"{i}.bmp")
    return str(root / "noisy"), str(root / "clean")


@pytest.mark.parametrize("suffix", ["", "_gt"])
@pytest.mark.parametrize("channels", [1, 3])
def test_files_belong_together_by_name(tmp_path, suffix, channels):
    data = RestorationDataset(*write_pairs(tmp_path, 12, clean_suffix=suffix), in_chans=channels)
    assert len(data) == 12
    for i in range(12):
        degraded, clean = data[i]
        with Image.open(tmp_path / f"clean/{i}{suffix}.png") as file:
            picture = np.asarray(file.convert("L" if channels == 1 else "RGB"), float) / 255
        # grey is the luma, which PIL and OpenCV round differently
        step = 1.01 / 255 if channels == 1 else 1e-6
        np.testing.assert_allclose(clean.numpy().transpose(1, 2, 0).squeeze(), picture, atol=step)
        assert (degraded - clean).sub(10 / 255).abs().max() < 1.01 / 255
        assert data.names[i].endswith(f"{i}.bmp")


def test_patches_are_of_the_same_place_and_turn(tmp_path):
    noisy, clean = write_pairs(tmp_path, 2, (20, 16))
    data = RestorationDataset(noisy, clean, True, patch_size=6, in_chans=3, repeats=50)
    assert len(data) == 100
    pictures = [np.asarray(Image.open(tmp_path / f"clean/{i}.png")) for i in range(2)]
    seen = set()
    for i in range(100):
        degraded, target = data[i]
        assert degraded.shape == target.shape == (3, 6, 6)
        torch.testing.assert_close(degraded - target, torch.full((3, 6, 6), 10 / 255))
        patch = (target.numpy().transpose(1, 2, 0) * 255).round().astype(np.uint8)
        picture = pictures[i // 50]
        places = {
            (y, x, k, flip)
            for y in range(15)
            for x in range(11)
            for k in range(4)
            for flip in (False, True)
            if np.array_equal(
                np.rot90(picture[y : y + 6, x : x + 6], k)[:, :: -1 if flip else 1], patch
            )
        }
        assert len(places) == 1
        seen |= places
    assert len({place[:2] for place in seen}) > 50
    assert len({place[2:] for place in seen}) == 8


def test_a_function_of_seed_and_epoch(tmp_path):
    def batches(epoch, seed=0, workers=0):
        data = RestorationDataset(*write, True, patch_size=6, repeats=4)
        loader = create_loader(data, 4, is_training=True, num_workers=workers, seed=seed)
        loader.set_epoch(epoch)
        return torch.cat([torch.cat(pair, 1) for pair in loader])

    write = write_pairs(tmp_path, 2, (20, 16))
    assert torch.equal(batches(1), batches(1, workers=2))
    assert not torch.equal(batches(0), batches(1))
    assert not torch.equal(batches(0), batches(0, seed=1))


def test_deep_pairs_keep_their_values(tmp_path):
    values = RNG.integers(0, 4096, (2, 8, 8)).astype(np.uint16)
    for folder, array in zip(("noisy", "clean"), values, strict=True):
        (tmp_path / folder).mkdir()
        Image.fromarray(array).save(tmp_path / folder / "a.tif")
    folders = str(tmp_path / "noisy"), str(tmp_path / "clean")
    target = DenoisingDataset(folders[1], value_range=(0, 4095))[0][1]
    np.testing.assert_allclose(target[0].numpy(), values[1] / 4095, atol=1e-6)
    degraded, clean = RestorationDataset(*folders, value_range=(0, 4095))[0]
    np.testing.assert_allclose(degraded[0].numpy(), values[0] / 4095, atol=1e-6)
    np.testing.assert_allclose(clean[0].numpy(), values[1] / 4095, atol=1e-6)


def test_both_are_turned_by_their_own_orientation(tmp_path):
    """Of the two files one says by EXIF that it lies on its side."""
    picture = RNG.integers(0, 256, (6, 9), dtype=np.uint8)
    for folder in ("noisy", "clean"):
        (tmp_path / folder).mkdir()
    Image.fromarray(picture).save(tmp_path / "clean/a.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise
    Image.fromarray(np.rot90(picture)).save(tmp_path / "noisy/a.png", exif=exif)
    degraded, clean = RestorationDataset(str(tmp_path / "noisy"), str(tmp_path / "clean"))[0]
    assert torch.equal(degraded, clean)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: (root / "clean/1.png").unlink(), "1 in .*noisy has no clean image in"),
        (lambda root: (root / "noisy/1.bmp").unlink(), "1 in .*clean has no image in"),
        (
            lambda root: Image.new("RGB", (4, 4)).save(root / "clean/1.png"),
            r"1\.bmp has 12 x 9 pixels, its clean image .*1\.png 4 x 4",
        ),
    ],
)
def test_pairs_that_are_none(tmp_path, change, message):
    folders = write_pairs(tmp_path)
    change(tmp_path)
    with pytest.raises(ValueError, match=message):
        RestorationDataset(*folders)[1]


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("noisy", np.zeros((1, 4, 4), np.uint8)), {}, "two folders, or both arrays"),
        ((np.zeros((2, 4, 4), np.uint8), np.zeros((1, 4, 4), np.uint8)), {}, "2 degraded images"),
        ((np.zeros((1, 4, 4), np.uint8),) * 2, {"clean_suffix": "_gt"}, "no effect"),
        ((np.zeros((1, 4, 4), np.uint8),) * 2, {"value_range": (0, 9)}, "no effect"),
        ((np.zeros((1, 4, 4), np.uint8),) * 2, {"patch_size": 2}, "is_training"),
        ((np.zeros((0, 4, 4), np.uint8),) * 2, {}, "no images"),
    ],
)
def test_refusals(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        RestorationDataset(*arguments, **options)


def test_fills_of_nested_transforms_are_scaled_too():
    """What an augmentation brings in from outside is 128 of 255, in an image of [0, 1]."""
    import albumentations as A

    shift = A.Affine(translate_px={"x": 4, "y": 0}, fill=128, p=1)
    for augment in (shift, A.OneOf([shift], p=1), A.Sequential([A.OneOf([shift], p=1)], p=1)):
        transform = PairTransform(augment=augment, mean=(0,), std=(1,))
        image, mask = np.full((8, 8, 3), 0.25, np.float32), np.zeros((8, 8), int)
        picture, labels = transform(image, mask, key=(0, 0, 0))
        assert (labels < 0).any()
        outside = picture[:, labels < 0]
        torch.testing.assert_close(outside, torch.full_like(outside, 128 / 255))


def test_deep_images_are_padded_with_the_mean():
    """The fill is given for 0 to 255, and a deep image lies in [0, 1]."""
    image, mask = np.full((4, 4, 3), 0.25, np.float32), np.zeros((4, 4), int)
    picture, labels = PairTransform(8, hflip=0)(image, mask, key=(0, 0, 0))
    assert (labels < 0).sum() == 48
    assert picture[:, labels < 0].abs().max() < 1e-6
    assert picture[:, labels == 0].abs().min() > 0.1


class TestCompression:
    @pytest.fixture
    def photograph(self):
        from skimage.data import astronaut

        return astronaut()[:96, 100:228]

    @pytest.mark.parametrize("in_chans", [1, 3])
    @pytest.mark.parametrize("quality", [5, 40, 95])
    def test_is_jpeg(self, photograph, quality, in_chans):
        """Pillow's encoder makes the same of it, up to its colour conversion's rounding."""
        import io

        image = photograph if in_chans == 3 else photograph[:, :, 1]
        data = DenoisingDataset(image[None], sigma=0, jpeg=quality, in_chans=in_chans)
        degraded, clean = data[0]
        assert torch.equal(clean, torch.from_numpy(np.atleast_3d(image)).movedim(2, 0) / 255)
        file = io.BytesIO()
        Image.fromarray(image).save(file, "jpeg", quality=quality)
        expected = np.atleast_3d(np.asarray(Image.open(file)))
        own = (degraded * 255).movedim(0, 2).numpy()
        assert own == pytest.approx(own.round(), abs=1e-3)
        # a pixel here and there, where the two round colours otherwise
        assert np.abs(own - expected).mean() < 1.0
        assert torch.equal(data[0][0], degraded)

    def test_worse_the_lower_the_quality(self, photograph):
        errors = []
        for quality in (90, 50, 10):
            data = DenoisingDataset(photograph[None], sigma=0, jpeg=quality, in_chans=3)
            degraded, clean = data[0]
            errors.append(float((degraded - clean).square().mean()))
        assert errors[0] < errors[1] < errors[2]

    def test_patches_and_noise(self, photograph):
        data = DenoisingDataset(
            photograph[None], 25, jpeg=(10, 90), in_chans=3, is_training=True, patch_size=32
        )
        first, _ = data[0]
        assert first.shape == (3, 32, 32)
        assert 0 <= float(first.min()) <= float(first.max()) <= 1
        data.set_epoch(1)
        assert not torch.equal(data[0][0], first)
