"""Test-time augmentation against the views written out."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from timm_branches import LeanHead, UNetHead, create_branch_model, save_model
from timm_branches.cli import main
from timm_branches.dense import augmented_inference
from timm_branches.inference import predict_pixels


def image(height=6, width=9, channels=3):
    return torch.randn(2, channels, height, width, generator=torch.Generator().manual_seed(0))


def lopsided(x):
    """Logits that depend on a pixel's neighbour to the right and the one below."""
    padded = F.pad(x, (0, 1, 0, 1))
    right, below = padded[..., :-1, 1:], padded[..., 1:, :-1]
    return torch.stack([x[:, 0], right[:, 1], below[:, 2]], 1)


def test_flip_of_masks():
    x = image()
    mirrored = lopsided(x.flip(3)).softmax(1).flip(3)
    expected = ((lopsided(x).softmax(1) + mirrored) / 2).log()
    torch.testing.assert_close(augmented_inference(lopsided, x), expected)


def test_eight_views_of_images():
    """All symmetries of the square, each undone; a result that no view is preferred in."""
    x = image()
    views = []
    for turns in range(4):
        y = torch.rot90(x, turns, (2, 3))
        views.append(torch.rot90(lopsided(y), -turns, (2, 3)))
        z = torch.flip(y, (3,))
        views.append(torch.rot90(torch.flip(lopsided(z), (3,)), -turns, (2, 3)))
    own = augmented_inference(lopsided, x, "d4", kind="images")
    torch.testing.assert_close(own, torch.stack(views).mean(0))
    for symmetry in (lambda y: y.flip(3), lambda y: y.flip(2), lambda y: y.rot90(1, (2, 3))):
        again = augmented_inference(lopsided, symmetry(x), "d4", kind="images")
        torch.testing.assert_close(again, symmetry(own))


def test_scales():
    x = image(8, 12)
    large = F.interpolate(x, (16, 24), mode="bilinear", antialias=True)
    back = F.interpolate(lopsided(large).softmax(1), (8, 12), mode="bilinear", antialias=True)
    expected = ((lopsided(x).softmax(1) + back) / 2).log()
    own = augmented_inference(lopsided, x, "none", (1.0, 2.0))
    torch.testing.assert_close(own, expected)


def test_one_channel():
    x = image(channels=1)
    own = augmented_inference(lambda y: y * 3, x)
    torch.testing.assert_close(own, x * 3, rtol=1e-4, atol=1e-5)
    sure = augmented_inference(lambda y: torch.full_like(y, 1e4), x)
    assert sure.isfinite().all()


def test_dicts_and_half_precision():
    x = image().bfloat16()
    own = augmented_inference(lambda y: {"a": lopsided(y), "b": y}, x)
    assert list(own) == ["a", "b"]
    assert own["a"].dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"views": "mirror"}, "views='mirror'"),
        ({"scales": (0,)}, "scales= takes factors"),
        ({"scales": ()}, "scales= is empty"),
        ({"scales": 1.5}, "scales= takes a list"),
        ({"kind": "labels"}, "kind='labels'"),
    ],
)
def test_refused(options, words):
    with pytest.raises(ValueError, match=words):
        augmented_inference(lopsided, image(), **options)


def test_outputs_that_are_not_dense():
    with pytest.raises(ValueError, match="only dense outputs"):
        augmented_inference(lambda x: {"label": x.mean((2, 3), keepdim=True)}, image())


def model_of_masks():
    torch.manual_seed(0)
    return create_branch_model(
        "test_resnet", taps=[[2, 3, 4]], head=LeanHead(channels=8), num_classes=3, img_size=64
    ).eval()


@pytest.mark.parametrize("tile", [0, 128])
def test_predictions_are_symmetric(tile):
    """With mirrored views the mirrored image gets the mirrored mask; without, it does not."""
    model = model_of_masks()
    pixels = np.random.default_rng(0).integers(0, 255, (96, 128, 3), np.uint8)
    both = [pixels, np.ascontiguousarray(pixels[:, ::-1])]
    for views, symmetric in (("none", False), ("flip", True)):
        a, b = predict_pixels(model, both, kind="masks", tile=tile, views=views)
        share = float((a.mask == b.mask[:, ::-1]).mean())
        assert (share > 0.999) == symmetric, (views, share)


def test_command_line(tmp_path, capsys):
    model = model_of_masks()
    save_model(model, tmp_path / "model.safetensors")
    pixels = np.random.default_rng(0).integers(0, 255, (64, 96, 3), np.uint8)
    (tmp_path / "in").mkdir()
    Image.fromarray(pixels).save(tmp_path / "in" / "a.png")
    base = [str(tmp_path / "model.safetensors"), str(tmp_path / "in"), "--kind", "masks"]
    out = ["--output", str(tmp_path / "out"), "--views", "flip", "--scales", "1", "1.5"]
    assert main(["predict", *base, *out]) == 0
    (record,) = predict_pixels(
        model, tmp_path / "in", kind="masks", views="flip", scales=(1.0, 1.5)
    )
    assert np.array_equal(np.array(Image.open(tmp_path / "out" / "a.png")), record.mask)
    # another way to look at the images is another answer
    assert main(["predict", *base, "--output", str(tmp_path / "out")]) == 2
    assert main(["predict", *base, "--output", str(tmp_path / "b"), "--scales", "-1"]) == 2
    (tmp_path / "truth").mkdir()
    Image.fromarray(record.mask).save(tmp_path / "truth" / "a.png")
    capsys.readouterr()
    evaluate = ["evaluate", *base, "--targets", str(tmp_path / "truth"), "--format", "json"]
    assert main([*evaluate, "--views", "flip", "--scales", "1", "1.5"]) == 0
    assert json.loads(capsys.readouterr().out)["metrics"]["pixel_accuracy"] == 100
    assert main(evaluate) == 0
    assert json.loads(capsys.readouterr().out)["metrics"]["pixel_accuracy"] < 100


def test_views_of_restored_images():
    torch.manual_seed(0)
    model = create_branch_model(
        "test_resnet", taps=[1, 2, 3], head=UNetHead(residual=True), num_classes=3, img_size=32
    ).eval()
    for module in model.heads.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.normal_(module.weight, std=0.1)
    pixels = np.random.default_rng(0).integers(0, 255, (32, 48, 3), np.uint8)
    (record,) = predict_pixels(model, [pixels], views="d4")
    (turned,) = predict_pixels(model, [np.ascontiguousarray(np.rot90(pixels))], views="d4")
    difference = np.rot90(record.image).astype(int) - turned.image
    assert np.abs(difference).max() <= 1
