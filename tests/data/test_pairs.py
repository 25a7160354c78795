"""Pairs for dense outputs.

Files that the tests write, geometry against coordinates, noise against its statistics.
"""

import copy

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Subset

from timm_branches.data import DenoisingDataset, PairTransform, SegmentationDataset, create_loader
from timm_branches.taxonomy import Taxonomy


def write_pair(root, name, mask, mode="L", size=None):
    """A picture whose red is 10 * (class + 1), and its mask."""
    mask = np.array(mask, np.uint8)
    for folder in ("images", "masks"):
        (root / folder / name).parent.mkdir(parents=True, exist_ok=True)
    red = np.zeros((*(size or mask.shape), 3), np.uint8)
    if size is None:
        red[..., 0] = 10 * (mask + 1)
    Image.fromarray(red).save(root / "images" / f"{name}.bmp")
    picture = Image.fromarray(mask)
    if mode == "P":
        picture = Image.frombytes("P", picture.size, mask.tobytes())
        picture.putpalette([200, 0, 0, 0, 200, 0, 0, 0, 200] * 85 + [1, 2, 3])
    picture.convert(mode).save(root / "masks" / f"{name}.png")


def coded(height, width, classes=200):
    """An image whose red is the class plus one, and that mask: geometry has to move both alike."""
    mask = np.random.default_rng(0).integers(0, classes, (height, width))
    image = np.zeros((height, width, 3), np.uint8)
    image[..., 0] = mask + 1
    return image, mask


def decode(image):
    """The mask that the red channel tells, -1 where there was no image."""
    return (image[0] * 255).round().long() - 1


@pytest.mark.parametrize("mode", ["L", "P"])
def test_folders(tmp_path, mode):
    write_pair(tmp_path, "10", [[0, 1, 2]], mode)
    write_pair(tmp_path, "deep/2", [[2, 2], [255, 0]], mode)
    write_pair(tmp_path, "2", [[1], [1]], mode)
    (tmp_path / "images/notes.txt").write_text("no image")
    data = SegmentationDataset(
        tmp_path / "images", str(tmp_path / "masks"), ["a", "b", "c"], ignore_index=255
    )
    assert [name.split("images/")[1] for name in data.names] == ["2.bmp", "10.bmp", "deep/2.bmp"]
    assert [data[i][1].tolist() for i in range(3)] == [[[1], [1]], [[0, 1, 2]], [[2, 2], [-1, 0]]]
    assert data.classes == ("a", "b", "c")
    assert data.num_classes == 3
    image, mask = data[1]
    assert image.dtype == torch.float32
    assert mask.dtype == torch.int64
    torch.testing.assert_close(image[0], torch.tensor([[10, 20, 30]]) / 255)


def test_files_without_partner_are_named(tmp_path):
    for name in ("one", "two"):
        write_pair(tmp_path, name, [[0]])
    (tmp_path / "images/one.bmp").unlink()
    (tmp_path / "masks/two.png").unlink()
    with pytest.raises(
        ValueError, match=r"two in .*images has no mask in .*; one in .*masks has no image in"
    ):
        SegmentationDataset(tmp_path / "images", tmp_path / "masks", 2)


def test_two_files_of_one_name(tmp_path):
    write_pair(tmp_path, "one", [[0]])
    Image.new("RGB", (1, 1)).save(tmp_path / "images/one.png")
    with pytest.raises(ValueError, match=r"images.one\.bmp and .*images.one\.png share"):
        SegmentationDataset(tmp_path / "images", tmp_path / "masks", 2)


@pytest.mark.parametrize(
    ("mask", "kwargs", "message"),
    [
        ([[0, 3]], {}, r"x\.bmp holds \[3\]; the 3 classes are 0 to 2"),
        ([[0, 255]], {"ignore_index": 11}, r"holds \[255\].*ignore_index is 11"),
        ([[0, 1]], {"size": (2, 2)}, r"x\.bmp has \(1, 2\) pixels, the image \(2, 2\)"),
    ],
)
def test_masks_that_are_none(tmp_path, mask, kwargs, message):
    ignored = kwargs.pop("ignore_index", None)
    write_pair(tmp_path, "x", mask, **kwargs)
    data = SegmentationDataset(tmp_path / "images", tmp_path / "masks", 3, ignored)
    with pytest.raises(ValueError, match=message):
        data[0]


def test_a_taxonomy_names_the_classes_and_grey_images_become_rgb():
    tree = Taxonomy(["a/x", "b/y"])
    data = SegmentationDataset(np.full((3, 4, 5), 51, np.uint8), np.ones((3, 4, 5), bool), tree)
    assert data.taxonomy is tree
    assert data.classes == ("x", "y")
    image, mask = data[-1]
    assert torch.equal(image, torch.full((3, 4, 5), 0.2))
    assert torch.equal(mask, torch.ones(4, 5, dtype=torch.long))
    with pytest.raises(IndexError):
        data[3]


@pytest.mark.parametrize(
    ("size", "shape", "scale"),
    [
        (16, (40, 33), (1.0, 1.0)),
        ((20, 12), (9, 40), (1.0, 1.0)),
        (24, (40, 40), (0.5, 1.5)),
        (24, (24, 24), (1.0, 1.0)),
    ],
)
@pytest.mark.parametrize("classes", [200, 254])
def test_image_and_mask_move_alike(size, shape, scale, classes):
    image, mask = coded(*shape, classes)
    transform = PairTransform(size, scale, mean=(0,), std=(1,))
    seen = set()
    for sample in range(12):
        picture, labels = transform(image, mask, key=(0, 0, sample))
        assert (
            labels.shape == picture.shape[1:] == ((size, size) if isinstance(size, int) else size)
        )
        if scale == (1.0, 1.0):  # otherwise the image is interpolated, the mask is not
            assert torch.equal(decode(picture), labels)
        assert set(labels.unique().tolist()) <= set(mask.flatten().tolist()) | {-1}
        seen.add(labels.numpy().tobytes())
    assert len(seen) > 1  # a crop of the image's own size is still flipped


@pytest.mark.parametrize("classes", [3, 300])
def test_what_comes_from_outside_is_unlabelled(classes):
    import albumentations as A

    image = np.full((32, 32, 3), 200, np.uint8)
    mask = np.full((32, 32), classes - 1)
    mask[:16] = -1
    turn = PairTransform(augment=A.Affine(rotate=(45, 45), p=1), mean=(0,), std=(1,))
    picture, labels = turn(image, mask, key=(0, 0, 0))
    assert set(labels.unique().tolist()) == {-1, classes - 1}
    assert (labels[picture[0] == 0] == -1).all()  # the corners
    assert (picture[0] == 0).sum() > 100
    _, same = PairTransform(augment=A.NoOp())(image, mask)
    assert torch.equal(same, torch.from_numpy(mask))


def test_padding_is_the_mean_and_normalisation_is_timms():
    image, mask = np.full((4, 4, 3), 255, np.uint8), np.zeros((4, 4), int)
    transform = PairTransform(8)
    picture, labels = transform(image, mask, key=(0, 0, 1))
    assert picture[:, labels < 0].abs().max() < 0.01  # half of a step of 255 over the deviation
    expected = (1 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(picture[:, labels == 0], expected[:, None].expand(3, 16))
    whole, _ = PairTransform()(image, mask)
    assert whole.shape == (3, 4, 4)


@pytest.mark.parametrize("channels", [1, 3])
def test_color_jitter_leaves_mask_and_geometry(channels):
    """Brightness scales, contrast stretches about the mean, saturation leaves grey alone.

    So grey stays affine.
    """
    rng = np.random.default_rng(0)
    image = np.repeat(rng.integers(60, 120, (16, 16, 1), np.uint8), channels, 2)
    mask = rng.integers(0, 3, (16, 16))
    found = []
    for sample in range(8):
        key = (0, 0, sample)
        plain, labels = PairTransform(16, hflip=0, mean=(0,), std=(1,))(image, mask, key)
        picture, same = PairTransform(16, hflip=0, color_jitter=0.4, mean=(0,), std=(1,))(
            image, mask, key
        )
        assert torch.equal(labels, same)
        x, y = (255 * z.flatten().double().numpy() for z in (plain, picture))
        slope, offset = np.polyfit(x, y, 1)
        assert abs(slope * x + offset - y).max() < 2.1  # rounding to whole values, twice
        assert 0.6**2 - 0.05 < slope < 1.4**2 + 0.05
        found.append(slope)
    assert np.ptp(found) > 0.1


def make_segmentation(repeats=4):
    pairs = [coded(40, 40), coded(50, 30)]
    return SegmentationDataset(
        [p[0] for p in pairs],
        [p[1] for p in pairs],
        200,
        repeats=repeats,
        transform=PairTransform(16, mean=(0,), std=(1,)),
    )


def make_denoising(repeats=4):
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, size, dtype=np.uint8) for size in ((40, 40), (50, 30))]
    return DenoisingDataset(
        images, sigma=(5, 50), blur=(0, 2), is_training=True, patch_size=16, repeats=repeats
    )


@pytest.mark.parametrize("make", [make_segmentation, make_denoising])
def test_loader_is_a_function_of_seed_and_epoch(make):
    def batches(epochs, seed=0, workers=0, wrap=lambda data: data):
        loader = create_loader(wrap(make()), 4, is_training=True, num_workers=workers, seed=seed)
        found = {}
        for epoch in epochs:
            loader.set_epoch(epoch)
            found[epoch] = torch.cat(
                [torch.cat([a.float().flatten(), b.float().flatten()]) for a, b in loader]
            )
        return found

    found = batches([0, 1])
    with_workers = batches([0, 1], workers=2)
    assert all(torch.equal(found[epoch], with_workers[epoch]) for epoch in (0, 1))
    assert torch.equal(batches([1])[1], found[1])
    assert not torch.equal(found[0].sort().values, found[1].sort().values)
    assert not torch.equal(batches([0], seed=1)[0].sort().values, found[0].sort().values)
    wrapped = batches([1], wrap=lambda data: Subset(data, range(len(data))))
    assert torch.equal(wrapped[1], found[1])
    copied = batches([1], wrap=copy.deepcopy)
    assert torch.equal(copied[1], found[1])


def test_repeats_of_an_image_differ():
    data = make_denoising(repeats=4)
    assert len(data) == 8
    samples = [data[i][1].numpy().tobytes() for i in range(8)]
    assert len(set(samples)) == 8


def test_noise_is_white_gaussian_of_the_stated_deviation_and_not_clipped():
    from scipy.stats import kstest

    degraded, clean = DenoisingDataset(np.full((1, 200, 200), 250, np.uint8), sigma=25)[0]
    noise = ((degraded - clean) * 255).numpy()[0]
    assert torch.equal(clean, torch.full((1, 200, 200), 250 / 255))
    assert kstest(noise.flatten() / 25, "norm").pvalue > 1e-3
    assert abs(np.corrcoef(noise[:, 1:].flatten(), noise[:, :-1].flatten())[0, 1]) < 0.02
    assert degraded.max() > 1.1


def test_range_of_noise():
    data = DenoisingDataset(np.zeros((200, 64, 64), np.uint8), sigma=(10, 50))
    sigmas = np.array([float(data[i][0].std()) * 255 for i in range(200)])
    assert 9 < sigmas.min() < 13
    assert 47 < sigmas.max() < 53
    assert abs(sigmas.mean() - 30) < 3


def test_evaluation_does_not_change_between_epochs_but_between_samples_and_seeds():
    data = DenoisingDataset(np.zeros((2, 8, 8), np.uint8))
    first = data[0][0].clone()
    data.set_epoch(5)
    assert torch.equal(data[0][0], first)
    assert not torch.equal(data[1][0], first)
    data.set_seed(1)
    assert not torch.equal(data[0][0], first)


def test_blur_is_scipys_and_reaches_beyond_the_patch():
    from scipy.ndimage import gaussian_filter

    image = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    expected = gaussian_filter(image / 255, (1.5, 1.5, 0), mode="mirror", truncate=4)
    degraded, clean = DenoisingDataset([image], sigma=0, blur=1.5, in_chans=3)[0]
    np.testing.assert_allclose(degraded.numpy().transpose(1, 2, 0), expected, atol=1e-5)
    np.testing.assert_allclose(clean.numpy().transpose(1, 2, 0), image / 255, atol=1e-6)

    patch, sharp = DenoisingDataset(
        [image], sigma=0, blur=1.5, in_chans=3, is_training=True, patch_size=12
    )[0]
    # find the patch and its turn in the image, and compare with the same place of the blurred whole
    turns = [(k, flip) for k in range(4) for flip in (False, True)]
    undo = [
        lambda x, k=k, flip=flip: torch.rot90(x.flip(2) if flip else x, -k, (1, 2))
        for k, flip in turns
    ]
    places = [(turned(sharp), turned(patch)) for turned in undo]
    hits = [
        (y, x, blurred)
        for plain, blurred in places
        for y in range(29)
        for x in range(39)
        if np.array_equal(
            np.rint(plain.numpy().transpose(1, 2, 0) * 255), image[y : y + 12, x : x + 12]
        )
    ]
    assert len(hits) == 1
    y, x, blurred = hits[0]
    np.testing.assert_allclose(
        blurred.numpy().transpose(1, 2, 0), expected[y : y + 12, x : x + 12], atol=1e-5
    )


def test_patches_come_from_everywhere_in_all_eight_positions():
    image = np.arange(9, dtype=np.uint8).reshape(3, 3)
    data = DenoisingDataset([image], sigma=1, is_training=True, patch_size=2, repeats=400)
    found = {tuple((data[i][1] * 255).round().int().flatten().tolist()) for i in range(400)}
    expected = {
        tuple(np.rot90(turned, k).flatten().tolist())
        for y in (0, 1)
        for x in (0, 1)
        for k in range(4)
        for turned in (image[y : y + 2, x : x + 2], image[y : y + 2, x : x + 2].T)
    }
    assert found == expected


def test_denoising_folder_in_grey_and_colour(tmp_path):
    (tmp_path / "deep").mkdir()
    Image.new("RGB", (6, 4), (255, 0, 0)).save(tmp_path / "deep/1.png")
    assert [x.shape for x in DenoisingDataset(tmp_path)[0]] == [(1, 4, 6)] * 2
    clean = DenoisingDataset(str(tmp_path), in_chans=3)[0][1]
    assert clean[:, 0, 0].tolist() == [1, 0, 0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: SegmentationDataset("images", np.zeros((1, 2, 2)), 2),
            "two folders, or both arrays",
        ),
        (
            lambda: SegmentationDataset(np.zeros((2, 4, 4), np.uint8), np.zeros((1, 4, 4)), 2),
            "2 images have 1 masks",
        ),
        (lambda: SegmentationDataset([], [], 2), "no images"),
        (lambda: SegmentationDataset([], [], 2, ignore_index=1), "one of the 2"),
        (
            lambda: SegmentationDataset(np.zeros((1, 4, 4), np.uint8), np.zeros((1, 4, 4)), 2)[0],
            "float64",
        ),
        (
            lambda: SegmentationDataset(
                np.zeros((1, 4, 4), np.uint8), np.zeros((1, 4, 4), int), 2, repeats=0
            ),
            "repeats",
        ),
        (lambda: PairTransform(8, augment="none"), "no effect"),
        (lambda: PairTransform(scale=(0.5, 2)), "need size="),
        (lambda: PairTransform(color_jitter=0.4), "need size="),
        (lambda: PairTransform(8, color_jitter=-1), "color_jitter"),
        (lambda: PairTransform(8, scale=(2, 1)), "increasing"),
        (lambda: PairTransform(8, hflip=2), "probability"),
        (
            lambda: PairTransform(mean=(0, 0))(
                np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4), int)
            ),
            "3 channels",
        ),
        (lambda: DenoisingDataset(np.zeros((1, 4, 4), np.uint8), sigma=0), "nothing is degraded"),
        (lambda: DenoisingDataset(np.zeros((1, 4, 4), np.uint8), jpeg=101), "from 1 to 100"),
        (lambda: DenoisingDataset(np.zeros((1, 4, 4), np.uint8), jpeg=(0, 50)), "from 1 to 100"),
        (lambda: DenoisingDataset(np.zeros((1, 4, 4), np.uint8), sigma=-1), "sigma"),
        (lambda: DenoisingDataset(np.zeros((1, 4, 4), np.uint8), blur=(2, 1)), "blur"),
        (lambda: DenoisingDataset(np.zeros((1, 4, 4), np.uint8), patch_size=2), "is_training"),
        (
            lambda: DenoisingDataset(np.zeros((1, 4, 4), np.uint8), is_training=True, patch_size=5)[
                0
            ],
            "patch_size=5",
        ),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_folder_without_images(tmp_path):
    with pytest.raises(ValueError, match="no images in"):
        DenoisingDataset(tmp_path)
