"""`timm-branches evaluate` of clips, masks and restored images, against counting by hand."""

import csv
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from timm_branches import LSTMHead, Taxonomy, create_branch_model, load_model, save_model
from timm_branches.cli import main
from timm_branches.inference import predict_clips, predict_pixels

RANDOM = np.random.default_rng(0)


def save(folder, name, pixels):
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(folder / name)


def run(*arguments):
    return main(["evaluate", *map(str, arguments)])


@pytest.fixture
def mask_model(tmp_path):
    torch.manual_seed(0)
    model = create_branch_model(
        "test_resnet", taps=[(1, 2, 3)], head="unet", num_classes=3, img_size=32
    )
    torch.nn.init.normal_(next(iter(model.heads.values())).fc.weight)
    extra = {"classes": ["road", "grass", "car"], "kind": "masks"}
    return save_model(model, tmp_path / "mask.safetensors", extra=extra)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("annot", [True, False])
def test_masks(mask_model, tmp_path, capsys, annot, nested):
    root = tmp_path / "data"
    masks = root / ("testannot" if annot else "labels")
    truths = {}
    for index in range(3):
        size = (40 + 8 * index, 56)
        # below folders of their own, as a city's are
        city = f"city{index % 2}" if nested else "."
        image = RANDOM.integers(0, 255, (*size, 3), dtype=np.uint8)
        save(root / "test" / city, f"{index}.png", image)
        truths[f"{index}.png"] = RANDOM.choice([0, 1, 2, 255], size).astype(np.uint8)
        save(masks / city, f"{index}.png", truths[f"{index}.png"])
    where = [root] if annot else [root / "test", "--targets", masks]
    out, pictures = tmp_path / "out.json", tmp_path / "pictures"
    arguments = [mask_model, *where, "--ignore-index", 255]
    assert run(*arguments, "--output", out, "--pictures", pictures) == 0
    results = json.loads(out.read_text())
    said, true = [], []
    for record in predict_pixels(load_model(mask_model), root / "test"):
        truth = truths[record.file.rpartition("/")[2]]
        said.append(record.mask[truth < 3])
        true.append(truth[truth < 3])
    said, true = np.concatenate(said), np.concatenate(true)
    ious = []
    (classes,) = results["classes"].values()
    for index, name in enumerate(("road", "grass", "car")):
        both = ((said == index) & (true == index)).sum()
        ious.append(100 * both / ((said == index) | (true == index)).sum())
        assert classes[name]["pixels"] == (true == index).sum()
        assert classes[name]["iou"] == pytest.approx(ious[-1])
    assert results["metrics"]["miou"] == pytest.approx(np.mean(ious))
    assert results["metrics"]["pixel_accuracy"] == pytest.approx(100 * (said == true).mean())
    assert [path.suffix for path in pictures.iterdir()] == [".png"]
    assert run(*arguments) == 0
    assert "of 3 images" in capsys.readouterr().out
    assert run(*arguments, "--format", "csv") == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["class"] for row in rows] == ["road", "grass", "car"]


def test_masks_as_colours(mask_model, tmp_path):
    """The model's own colours say what the masks mean."""
    model = load_model(mask_model)
    colors = [[255, 0, 0], [0, 255, 0], [0, 0, 255]]
    extra = {"classes": ["road", "grass", "car"], "colors": colors}
    file = save_model(model, tmp_path / "coloured.safetensors", extra=extra)
    image = RANDOM.integers(0, 255, (40, 48, 3), dtype=np.uint8)
    save(tmp_path / "images", "a.png", image)
    (record,) = predict_pixels(model, image, kind="masks")
    save(tmp_path / "masks", "a.png", np.array(colors, np.uint8)[record.mask])
    out = tmp_path / "out.json"
    assert run(file, tmp_path / "images", "--targets", tmp_path / "masks", "--output", out) == 0
    assert json.loads(out.read_text())["metrics"]["pixel_accuracy"] == 100


def test_restored_images(tmp_path, capsys):
    torch.manual_seed(0)
    model = create_branch_model(
        "test_resnet", taps=[(1, 2)], head="rednet", num_classes=3, img_size=32
    )
    facts = {"degradation": "noise 25"}
    file = save_model(model, tmp_path / "model.safetensors", extra=facts)
    errors = []
    for index in range(2):
        clean = RANDOM.integers(0, 255, (32, 40, 3), dtype=np.uint8)
        noisy = RANDOM.integers(0, 255, (32, 40, 3), dtype=np.uint8)
        save(tmp_path / "clean", f"{index}.png", clean)
        save(tmp_path / "noisy", f"{index}.png", noisy)
        errors.append(((clean / 255.0 - noisy / 255.0) ** 2).mean())
    out = tmp_path / "out.json"
    arguments = [file, tmp_path / "noisy", "--targets", tmp_path / "clean"]
    assert run(*arguments, "--output", out) == 0
    metrics = json.loads(out.read_text())["metrics"]
    assert metrics["input_psnr"] == pytest.approx(np.mean(-10 * np.log10(errors)), abs=1e-3)
    assert {"psnr", "ssim", "input_ssim"} <= metrics.keys()
    for index in range(2):  # restored perfectly: the restored images themselves as clean ones
        (record,) = predict_pixels(load_model(file), tmp_path / "noisy" / f"{index}.png")
        save(tmp_path / "clean", f"{index}.png", record.image)
    assert run(*arguments) == 0
    assert "input PSNR" in capsys.readouterr().out
    assert run(*arguments, "--output", out) == 0
    assert json.loads(out.read_text())["metrics"]["psnr"] > 45  # but for rounding and clipping
    assert run(*arguments, "--ignore-index", 3) == 2
    assert run(*arguments, "--pictures", tmp_path / "pictures") == 2
    assert run(file, tmp_path / "noisy") == 2
    assert "give --targets" in capsys.readouterr().err


@pytest.mark.parametrize("output", ["clip", "frame"])
def test_clips(tmp_path, capsys, output):
    torch.manual_seed(3)
    tree = Taxonomy([("up",), ("down",)], ["order"])
    model = create_branch_model(
        "test_resnet", head=LSTMHead(hidden_size=8, output=output), taxonomy=tree, img_size=32
    )
    frames = {"num_frames": 3, "sampling": "uniform", "stride": 1}
    file = save_model(model, tmp_path / "model.safetensors", extra={"frames": frames})
    for label in ("up", "down"):
        for clip in range(3):
            for frame in range(5):
                pixels = RANDOM.integers(0, 255, (32, 32, 3), dtype=np.uint8)
                save(tmp_path / "data" / "test" / label / f"clip{clip}", f"{frame}.png", pixels)
    out = tmp_path / "out.json"
    assert run(file, tmp_path / "data", "--output", out) == 0
    results = json.loads(out.read_text())
    assert results["clips"] == 6
    assert run(file, tmp_path / "data", "--frames", 2, "--sampling", "dense") == 0
    table = capsys.readouterr().out
    assert "full path" not in table
    assert "of 6 clips" in table
    if output == "clip":
        right = []
        for record in predict_clips(load_model(file), tmp_path / "data" / "test"):
            right.append(record.answers[0].path[0] in record.file.split("/"))
        assert results["metrics"]["order_top1"] == pytest.approx(100 * np.mean(right))


def test_refused(mask_model, tmp_path, capsys):
    mixed = create_branch_model(
        "test_resnet",
        taps=[5, (1, 2, 3)],
        head=["pool", "unet"],
        names=["label", "mask"],
        num_classes=[2, 3],
        img_size=32,
    )
    mixed_file = save_model(mixed, tmp_path / "mixed.safetensors")
    for arguments, message in (
        ([mask_model, tmp_path], "give --targets"),
        ([mask_model, tmp_path, "--targets", tmp_path / "nose"], "there is no folder"),
        ([mask_model, tmp_path, "--decoder", "crm"], "--decoder has no effect"),
        ([mask_model, tmp_path, "--workers", "0"], "--workers has no effect"),
        ([mixed_file, tmp_path], "with heads of one kind"),
    ):
        assert run(*arguments) == 2, message
        err = capsys.readouterr().err
        assert message in err
        assert err.count("\n") == 1
