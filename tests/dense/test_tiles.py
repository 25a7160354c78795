"""Inference in tiles against the whole image."""

import pytest
import torch
from torch import nn

from timm_branches.dense import tiled_inference

SETTINGS = [
    (16, 0, "linear"),
    (16, 4, "linear"),
    (16, 5, "crop"),
    (16, 12, "linear"),
    (16, 15, "crop"),
]


def pointwise(x):
    return torch.cat([x.sin() * 3 - x, x.exp()], 1)


def convolutions(kernel, depth, stride=1, seed=0):
    """A stack that sees (kernel - 1) / 2 * depth pixels far, with biases.

    Zero padding changes what it gives.
    """
    torch.manual_seed(seed)
    layers = [nn.Conv2d(1, 8, kernel, padding=kernel // 2), nn.Tanh()]
    for _ in range(depth - 2):
        layers += [nn.Conv2d(8, 8, kernel, padding=kernel // 2), nn.Tanh()]
    layers += [nn.Conv2d(8, 1, kernel, padding=kernel // 2)]
    if stride > 1:
        layers = [
            nn.Conv2d(1, 8, stride, stride),
            nn.Tanh(),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.Tanh(),
            nn.ConvTranspose2d(8, 1, stride, stride),
        ]
    return nn.Sequential(*layers).eval()


def smooth_image(height, width):
    y, x = torch.meshgrid(torch.linspace(0, 3, height), torch.linspace(0, 4, width), indexing="ij")
    return (0.5 + 0.3 * (y + x).sin() + 0.2 * (2 * x - y).cos())[None, None]


@pytest.mark.parametrize(("tile", "overlap", "blend"), SETTINGS)
@pytest.mark.parametrize("size", [(16, 16), (33, 47), (17, 16), (7, 40), (1, 1), (5, 3)])
@pytest.mark.parametrize("multiple", [1, 4])
def test_a_pointwise_model_gives_exactly_the_whole(tile, overlap, blend, size, multiple):
    if overlap % multiple:
        overlap = overlap // multiple * multiple
    image = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    found = tiled_inference(
        pointwise, image, tile, overlap, batch_size=3, blend=blend, multiple=multiple
    )
    assert torch.equal(found, pointwise(image))


@pytest.mark.parametrize(
    ("blend", "overlap", "depth"), [("crop", 16, 8), ("linear", 32, 8), ("crop", 7, 3)]
)
def test_a_convolution_that_sees_no_further_than_the_margin_gives_the_whole(blend, overlap, depth):
    model, image = (
        convolutions(3, depth),
        torch.rand(1, 1, 75, 61, generator=torch.Generator().manual_seed(1)),
    )
    with torch.no_grad():
        expected = model(image)
    found = tiled_inference(model, image, tile=40, overlap=overlap, blend=blend)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    # one pixel of margin less, and it is not
    less = tiled_inference(
        model, image, tile=40, overlap=overlap - (4 if blend == "linear" else 2), blend=blend
    )
    assert (less - expected).abs().max() > 1e-6


@pytest.mark.parametrize("blend", ["linear", "crop"])
@pytest.mark.parametrize("seed", range(3))
def test_seams_on_a_smooth_image_cannot_be_seen(blend, seed):
    # a receptive field of 29 pixels
    model, image = convolutions(5, 7, seed=seed), smooth_image(150, 131)
    with torch.no_grad():
        expected = model(image)
    found = tiled_inference(model, image, tile=64, overlap=32, blend=blend)
    assert (found - expected).abs().max() < 1 / 255
    assert (tiled_inference(model, image, tile=64, overlap=0) - expected).abs().max() > 1 / 255


@pytest.mark.parametrize("size", [(64, 80), (61, 70), (33, 20), (90, 41)])
def test_a_strided_model_needs_tiles_at_multiples(size):
    model, image = (
        convolutions(3, 0, stride=8),
        torch.rand(1, 1, *size, generator=torch.Generator().manual_seed(2)),
    )
    side = [-(-s // 8) * 8 for s in size]
    padded = torch.nn.functional.pad(
        image, (0, side[1] - size[1], 0, side[0] - size[0]), mode="reflect"
    )
    with torch.no_grad():
        expected = model(padded)[..., : size[0], : size[1]]
    found = tiled_inference(model, image, tile=48, overlap=32, blend="crop", multiple=8)
    # below it is what was reflected
    inside = expected if min(size) >= 48 else expected[..., : size[0] - 16, :]
    inside = inside if size[1] >= 48 else inside[..., : size[1] - 16]
    torch.testing.assert_close(
        found[..., : inside.shape[2], : inside.shape[3]], inside, rtol=0, atol=1e-6
    )


def test_a_small_image_is_continued_by_reflection():
    seen = []
    image = torch.arange(6.0).view(1, 1, 2, 3)
    tiled_inference(lambda x: seen.append(x) or x, image, tile=6, overlap=2)
    columns = [0, 1, 2, 1, 0, 1]
    expected = image[0, 0][[0, 1, 0, 1, 0, 1]][:, columns]
    assert len(seen) == 1
    assert torch.equal(seen[0][0, 0], expected)


def test_several_outputs_by_name():
    image = torch.rand(2, 1, 30, 20)
    found = tiled_inference(
        lambda x: {"mask": pointwise(x), "clean": (x / 2).half()}, image, tile=16, overlap=8
    )
    assert list(found) == ["mask", "clean"]
    assert torch.equal(found["mask"], pointwise(image))
    assert found["clean"].dtype == torch.float16
    assert torch.equal(found["clean"], (image / 2).half())


def test_batches_hold_no_more_than_asked():
    sizes = []
    tiled_inference(
        lambda x: sizes.append(tuple(x.shape)) or x, torch.rand(3, 2, 40, 40), 16, 4, batch_size=5
    )
    assert sizes == [(5, 2, 16, 16)] * 5 + [(2, 2, 16, 16)]  # 3 images of 3 x 3 tiles


@pytest.mark.parametrize(
    ("blend", "fade"),
    [
        ("linear", [0, 0, 0.125, 0.375, 0.625, 0.875, 1, 1]),
        ("crop", [0, 0, 0, 0, 1, 1, 1, 1]),
    ],
)
def test_the_fade_from_a_tile_to_the_next(blend, fade):
    def model(x):  # the first tile is all 0, the second all 1
        return torch.arange(2.0).view(2, 1, 1, 1).expand_as(x)

    found = tiled_inference(model, torch.rand(1, 1, 16, 24), tile=16, overlap=8, blend=blend)
    assert found[0, 0, 5].tolist() == pytest.approx([0] * 8 + fade + [1] * 8)


def test_what_is_cut_off_may_be_infinite():
    def model(x):
        out = x.clone()
        out[..., :2, :] = torch.inf
        return out

    image = torch.rand(1, 1, 40, 16)
    found = tiled_inference(model, image, tile=16, overlap=8, blend="linear")
    assert torch.equal(found[..., 2:, :], image[..., 2:, :])
    assert found[..., :2, :].isinf().all()


def test_no_graph_is_kept():
    model = convolutions(3, 2)
    assert not tiled_inference(model, torch.rand(1, 1, 20, 20), tile=16, overlap=4).requires_grad


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tile": 0, "overlap": 0}, "tile=0"),
        ({"tile": 16, "overlap": 16}, "overlap=16"),
        ({"overlap": -1}, "overlap=-1"),
        ({"blend": "cosine"}, "linear, crop"),
        ({"tile": 20, "overlap": 8, "multiple": 8}, "multiples"),
        ({"tile": 24, "overlap": 4, "multiple": 8}, "multiples"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"image": torch.rand(3, 8, 8)}, r"\(B, C, H, W\)"),
        ({"image": torch.rand(0, 3, 8, 8)}, "at least one pixel"),
        ({"model_fn": lambda x: x.mean((2, 3))}, "dense outputs"),
        ({"model_fn": lambda x: {"mask": x, "fine": x.mean((2, 3))}}, "'fine'"),
        ({"model_fn": lambda x: x[..., ::2, ::2]}, "dense outputs"),
    ],
)
def test_refusals(settings, message):
    with pytest.raises(ValueError, match=message):
        tiled_inference(**{"model_fn": torch.sin, "image": torch.rand(1, 3, 20, 20), **settings})
