"""Masks and restored images: against the network itself, pixel by pixel."""

import json
import os

import numpy as np
import pytest
import torch
from PIL import Image

from timm_branches import Taxonomy, create_branch_model, load_model, save_model
from timm_branches.cli import main
from timm_branches.hierarchy.decode import decode
from timm_branches.inference import predict_pixels
from timm_branches.inference.dense import default_colors

TREE = Taxonomy(["ground/road", "ground/grass", "thing/car"])
COLORS = [[128, 64, 128], [0, 255, 0], [0, 0, 142]]


def make(**options):
    torch.manual_seed(0)
    settings = {"taps": [[1, 2, 3]], "head": "unet", "img_size": 32, **options}
    model = create_branch_model("test_resnet", **settings).eval()
    for head in model.heads.values():
        torch.nn.init.normal_(head.fc.weight, std=1.0)
    return model


@pytest.fixture
def pictures(tmp_path):
    random = np.random.default_rng(0)
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    for name, size in (("a.jpg", (50, 70, 3)), ("sub/a.png", (33, 47, 3)), ("a.png", (32, 32))):
        Image.fromarray(random.integers(0, 255, size, dtype=np.uint8)).save(folder / name)
    return folder


def logits_of(model, path):
    """By hand: the image as RGB, normalised, whole."""
    pixels = torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1) / 255
    mean = torch.tensor(model.pretrained_cfg["mean"])[:, None, None]
    std = torch.tensor(model.pretrained_cfg["std"])[:, None, None]
    with torch.no_grad():
        return model(((pixels - mean) / std)[None])


def test_masks(pictures):
    model = make(num_classes=5)
    records = list(predict_pixels(model, pictures))
    assert [record.file for record in records] == [
        str(pictures / name) for name in ("a.jpg", "a.png", "sub/a.png")
    ]
    seen = set()
    for record in records:
        (logits,) = logits_of(model, record.file).values()
        assert np.array_equal(record.mask, logits[0].argmax(0).numpy())
        assert record.mask.dtype == np.uint8
        seen |= set(record.mask.flat)
    assert len(seen) > 2, "the test needs several classes"


def test_two_classes_of_one_logit(pictures):
    model = make(num_classes=1)
    for record in predict_pixels(model, pictures, kind="masks"):
        (logits,) = logits_of(model, record.file).values()
        assert np.array_equal(record.mask, (logits[0, 0] > 0).numpy())


def test_an_uneven_tree(pictures):
    tree = Taxonomy(["sky", "ground/road", "ground/grass"])
    model = make(taps=[[1, 2, 3]], taxonomy=tree)
    seen = set()
    for record in predict_pixels(model, pictures):
        outputs = logits_of(model, record.file)
        rows = [outputs[name][0].flatten(1).T for name in tree.levels]
        labels = decode(rows, tree, "best-path").labels.tolist()
        paths = []
        for row in labels:
            level = max(number for number, label in enumerate(row) if label >= 0)
            paths.append(tree.classes[level][row[level]])
        names = [tree.leaves[leaf][-1] for leaf in record.mask.flat]
        assert names == paths
        seen |= set(names)
    assert seen == {"sky", "road", "grass"}


@pytest.mark.parametrize("shared", [True, False])
def test_masks_of_a_tree(pictures, shared):
    """The leaf of the likeliest path, as `decode` gives it."""
    taps = [[1, 2, 3]] if shared else [[1, 2, 3]] * 2
    model = make(taps=taps, taxonomy=TREE)
    predictions = predict_pixels(model, pictures)
    assert predictions.classes == ("road", "grass", "car")
    for record in predictions:
        outputs = logits_of(model, record.file)
        rows = [outputs[name][0].flatten(1).T for name in TREE.levels]
        # each leaf is a class of the last level, in the order of the leaves
        expected = decode(rows, TREE, "best-path").labels[:, 1].reshape(record.mask.shape)
        assert np.array_equal(record.mask, expected.numpy())


def test_tiles_give_what_the_whole_gives(pictures):
    random = np.random.default_rng(0)
    large = random.integers(0, 255, (300, 400, 3), dtype=np.uint8)
    model = make(num_classes=4)
    (whole,) = predict_pixels(model, large, tile=0)
    (tiled,) = predict_pixels(model, large, tile=256)
    # what a network sees of the image's own edge stays as it is; tiles fade where they overlap
    assert (whole.mask == tiled.mask).mean() > 0.97
    assert not np.array_equal(whole.mask, np.zeros_like(whole.mask))


def test_restored_images(pictures):
    model = make(num_classes=3, head={"kind": "unet", "residual": True})
    predictions = predict_pixels(model, pictures)
    assert predictions.kind == "images"
    for record in predictions:
        (output,) = logits_of(model, record.file).values()
        mean = torch.tensor(model.pretrained_cfg["mean"])[:, None, None]
        std = torch.tensor(model.pretrained_cfg["std"])[:, None, None]
        expected = ((output[0] * std + mean).clamp(0, 1) * 255).round().byte()
        assert np.array_equal(record.image, expected.permute(1, 2, 0).numpy())


def test_what_the_file_says(tmp_path, pictures):
    model = make(num_classes=3)
    with pytest.raises(ValueError, match="give kind='masks'"):
        predict_pixels(model, pictures)
    model.extra = {"classes": ["road", "grass", "car"], "colors": COLORS}
    again = load_model(save_model(model, tmp_path / "model.safetensors"))
    predictions = predict_pixels(again, pictures)
    assert predictions.classes == ("road", "grass", "car")
    assert predictions.colors == tuple(map(tuple, COLORS))
    again.extra = {"classes": ["road", 3, None], "colors": [[300, 0, 0]] * 3}
    predictions = predict_pixels(again, pictures)
    assert predictions.classes == ("0", "1", "2")
    assert predictions.colors == default_colors(3)


def test_colors_differ():
    assert len(set(default_colors(256))) == 256


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "video"}, "kind='video'"),
        ({"tile": 100}, "multiple of 128"),
        ({"tile": -128}, "tile="),
        ({"head": "nose"}, "the model's decoders are"),
        ({"num_workers": -1}, "num_workers="),
        ({"device": "nose"}, "no device 'nose'"),
    ],
)
def test_refused(pictures, arguments, message):
    with pytest.raises(ValueError, match=message):
        list(predict_pixels(make(num_classes=5), pictures, **arguments))


def test_other_models(pictures):
    with pytest.raises(ValueError, match="the model has no decoder"):
        predict_pixels(create_branch_model("test_resnet", num_classes=3), pictures)
    with pytest.raises(ValueError, match="give head= to choose one"):
        predict_pixels(make(taps=[[1, 2], [2, 3]], num_classes=[5, 4], names=["a", "b"]), pictures)


class TestCommand:
    @pytest.fixture
    def model(self, tmp_path):
        model = make(num_classes=3)
        model.extra = {"classes": ["road", "grass", "car"], "colors": COLORS}
        return save_model(model, tmp_path / "model.safetensors")

    def test_masks(self, model, pictures, tmp_path, capsys):
        (pictures / "bad.png").write_bytes(b"nothing")
        out = tmp_path / "out"
        command = ["predict", str(model), str(pictures), "--output", str(out), "--overlay"]
        assert main(command) == 1
        assert "bad.png" in capsys.readouterr().err
        names = {str(path.relative_to(out)) for path in out.rglob("*.png")}
        masks = {"a.png", "a.2.png", "sub/a.png"}
        assert names == masks | {name.replace(".png", ".overlay.png") for name in masks}
        (record,) = predict_pixels(model, pictures / "sub")
        written = Image.open(out / "sub/a.png")
        assert np.array_equal(np.array(written), record.mask)
        assert written.getpalette()[:9] == [value for color in COLORS for value in color]
        overlay = np.array(Image.open(out / "sub/a.overlay.png")).astype(float)
        grey = record.pixels.astype(np.float32).mean(-1, keepdims=True)
        expected = 0.5 * grey + 0.5 * np.array(COLORS, np.float32)[record.mask]
        assert np.abs(overlay - expected).max() <= 0.5

    def test_goes_on_where_it_stopped(self, model, pictures, tmp_path, capsys):
        out = tmp_path / "out"
        command = ["predict", str(model), str(pictures), "--output", str(out)]
        assert main(command) == 0
        os.remove(out / "a.png")
        kept = (out / "sub/a.png").stat().st_mtime_ns
        assert main(command) == 0
        assert "2 of 3 are there already" in capsys.readouterr().err
        assert (out / "a.png").exists()
        assert (out / "sub/a.png").stat().st_mtime_ns == kept
        assert json.loads((out / "predictions.json").read_text())["classes"][2] == "car"
        other = save_model(make(num_classes=5), tmp_path / "other.safetensors")
        assert main(["predict", str(other), str(pictures), "--output", str(out)]) == 2
        assert "answers of another model" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            ([], "give --output FOLDER"),
            (["--output", "IN"], "among what is read"),
            (["--output", "IN/a.jpg"], "is a file"),
            (["--output", "OUT", "--threshold", "0.5"], "--threshold has no effect"),
            (["--output", "OUT", "--frames", "3"], "--frames has no effect"),
            (["--output", "OUT", "--tile", "5"], "multiple of 128"),
        ],
    )
    def test_one_line(self, model, pictures, tmp_path, capsys, flags, message):
        flags = [flag.replace("IN", str(pictures)) for flag in flags]
        flags = [flag.replace("OUT", str(tmp_path / "out")) for flag in flags]
        assert main(["predict", str(model), str(pictures), *flags]) == 2
        err = capsys.readouterr().err
        assert message in err
        assert err.count("\n") == 1


def test_an_answer_is_not_taken_for_that_of_another_image(pictures, tmp_path, capsys):
    """Images of one name in two folders, one after the other into the same folder."""
    model = str(save_model(make(num_classes=3), tmp_path / "model.safetensors"))
    out = tmp_path / "out"
    command = ["predict", model, "--kind", "masks", "--output", str(out)]
    assert main([*command, str(pictures / "a.png")]) == 0
    assert main([*command, str(pictures / "a.png")]) == 0  # its own answer is kept
    assert main([*command, str(pictures / "sub" / "a.png")]) == 2
    err = capsys.readouterr().err
    assert f"a.png is the answer for {pictures / 'a.png'}" in err
    (out / "sources.jsonl").write_text('["a.png"')  # cut in the middle of a line
    assert main([*command, str(pictures / "a.png")]) == 2
    assert "of unknown origin" in capsys.readouterr().err
    (out / "a.png").unlink()
    assert main([*command, str(pictures / "a.png")]) == 0
    assert main([*command, str(pictures / "a.png")]) == 0


def test_the_mask_of_a_model_with_labels(pictures, tmp_path, capsys):
    model = create_branch_model(
        "test_resnet",
        taps=[5, (1, 2, 3)],
        head=["pool", "unet"],
        names=["label", "mask"],
        num_classes=[2, 3],
        img_size=32,
    ).eval()
    file = str(save_model(model, tmp_path / "model.safetensors", extra={"classes": list("abc")}))
    picture = pictures / "a.jpg"
    command = ["predict", file, str(picture)]
    assert main([*command, "--head", "mask", "--output", str(tmp_path / "out")]) == 0
    mask = np.array(Image.open(tmp_path / "out" / "a.png"))
    assert np.array_equal(mask, logits_of(model, picture)["mask"][0].argmax(0).numpy())
    capsys.readouterr()
    assert main(command) == 0
    assert "label" in capsys.readouterr().out
    assert main([*command, "--head", "label"]) == 2
    assert "choose a decoder of the model (mask)" in capsys.readouterr().err
