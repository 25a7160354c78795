"""What a command is asked to read, and the check-up before a training."""

import io
import subprocess
import sys

import numpy as np
import pandas
import pytest
from PIL import Image

from timm_branches import Taxonomy, create_branch_model, save_model
from timm_branches.cli import main
from timm_branches.cli.inputs import expand_inputs

TREE = Taxonomy(["animal/cat", "animal/dog", "plant/rose"], levels=["kind", "name"])


@pytest.fixture
def photos(tmp_path):
    random = np.random.default_rng(0)
    for leaf in TREE.leaves:
        folder = tmp_path.joinpath("photos", "train", *leaf)
        folder.mkdir(parents=True)
        for index in (1, 2, 10):
            pixels = random.integers(0, 255, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{index}.png")
    return tmp_path / "photos"


def standard_input(monkeypatch, data):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


def test_patterns(photos):
    cats = photos / "train" / "animal" / "cat"
    found = expand_inputs([f"{cats}/*.png"])
    assert found == [str(cats / f"{index}.png") for index in (1, 2, 10)]
    assert len(expand_inputs([f"{photos}/**/*.png", str(photos)])) == 10
    odd = photos / "[1].png"
    (cats / "1.png").rename(odd)
    assert expand_inputs([str(odd)]) == [str(odd)]  # a file of such a name is no pattern
    with pytest.raises(FileNotFoundError, match="no file has such a name"):
        expand_inputs([f"{photos}/*.jpg"])


@pytest.mark.parametrize("kind", ["csv", "parquet", "tsv"])
def test_tables(photos, kind):
    names = ["train/animal/cat/1.png", "train/plant/rose/2.png"]
    frame = pandas.DataFrame({"id": [7, 8], "filename": names})
    path = photos / f"list.{kind}"
    if kind == "parquet":
        frame.to_parquet(path)
    else:
        frame.to_csv(path, index=False, sep="," if kind == "csv" else "\t")
    assert expand_inputs([str(path)]) == [str(photos / name) for name in names]


def test_tables_refused(photos):
    path = photos / "list.csv"
    path.write_text("path\ntrain/nose.png\n")
    with pytest.raises(FileNotFoundError, match="line 2.*nose.png"):
        expand_inputs([str(path)])
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="a column 'path'"):
        expand_inputs([str(path)])


def test_standard_input(monkeypatch):
    standard_input(monkeypatch, b"a b.png\n\nc.png\n")
    assert expand_inputs(["-"]) == ["a b.png", "c.png"]
    standard_input(monkeypatch, b"a\nb.png\0c.png\0")
    assert expand_inputs(["-"]) == ["a\nb.png", "c.png"]
    standard_input(monkeypatch, b"\n")
    with pytest.raises(ValueError, match="there was none"):
        expand_inputs(["-"])


def test_predict_reads_them(photos, tmp_path, monkeypatch, capsys):
    model = create_branch_model("test_resnet", taps=[3, 5], taxonomy=TREE, img_size=32)
    file = str(save_model(model, tmp_path / "model.safetensors"))
    image = photos / "train" / "plant" / "rose" / "10.png"
    standard_input(monkeypatch, f"{image}\n".encode())
    table = photos / "list.csv"
    table.write_text("path\ntrain/animal/dog/1.png\n")
    pattern = f"{photos}/train/*/cat/*.png"
    assert main(["predict", file, "-", str(table), pattern]) == 0
    names = [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()]
    cats = photos / "train" / "animal" / "cat"
    dog = photos / "train" / "animal" / "dog" / "1.png"
    assert names == [str(image), str(dog), *(str(cats / f"{i}.png") for i in (1, 2, 10))]
    assert main(["predict", file, str(table), "--output", str(table)]) == 2
    assert "is among what is read" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["architecture", "file"])
def test_check(photos, tmp_path, capsys, what):
    model = "test_resnet"
    if what == "file":
        made = create_branch_model("test_resnet", taps=[3, 5], taxonomy=TREE, img_size=32)
        model = str(save_model(made, tmp_path / "model.safetensors"))
    assert main(["check", model, str(photos)]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("passed: labels, forward pass")
    assert err.splitlines()[0] == "checking: labels ..."
    assert "checking: learning ..." in err


def test_check_finds(photos, tmp_path, capsys):
    made = create_branch_model("test_resnet", taps=[3, 5], taxonomy=TREE, img_size=32)
    for parameter in made.backbone.parameters():
        parameter.data.fill_(float("nan"))
    file = str(save_model(made, tmp_path / "model.safetensors"))
    assert main(["check", file, str(photos)]) == 1
    assert "problem: " in capsys.readouterr().out


def test_check_a_recipe(photos, tmp_path):
    output = tmp_path / "out"
    command = [sys.executable, "-m", "timm_branches", "check", "bcnn", str(photos)]
    command += ["--model", "test_resnet", "--output", str(output), "-b", "4"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "--check: learning ..." in done.stdout
    assert not list(output.rglob("*.safetensors"))


def test_check_refuses(tmp_path, capsys):
    masks = create_branch_model("test_resnet", taps=[(1, 2)], head="unet", num_classes=2)
    file = str(save_model(masks, tmp_path / "masks.safetensors"))
    for arguments, message in (
        (["test_resnet"], "name the data"),
        (["nose", str(tmp_path)], "no file, no recipe"),
        ([file, str(tmp_path)], "has no folders train and trainannot"),
        ([file, str(tmp_path), "--taxonomy", "cifar10"], "--taxonomy"),
        (["test_resnet", "digits", "--targets", str(tmp_path)], "--targets"),
    ):
        assert main(["check", *arguments]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["masks", "images"])
def test_check_pixels(tmp_path, capsys, kind):
    random = np.random.default_rng(0)
    for folder in ("train", "trainannot"):
        (tmp_path / folder).mkdir()
    for i in range(4):
        pixels = random.integers(0, 255, (70, 80, 3), dtype=np.uint8)
        target = (pixels[..., 0] > 128).astype(np.uint8) if kind == "masks" else pixels
        Image.fromarray(pixels).save(tmp_path / "train" / f"{i}.png")
        Image.fromarray(target).save(tmp_path / "trainannot" / f"{i}.png")
    classes = 2 if kind == "masks" else 3
    model = create_branch_model("test_resnet", taps=[(2, 3)], head="unet", num_classes=classes)
    file = str(save_model(model, tmp_path / "model.safetensors"))
    assert main(["check", file, str(tmp_path), "--kind", kind, "-b", "4"]) == 0
    assert "gradients, evaluation, input, learning" in capsys.readouterr().out
    if kind == "masks":
        target[:] = 7
        Image.fromarray(target).save(tmp_path / "trainannot" / "0.png")
        assert main(["check", file, str(tmp_path), "--kind", kind, "-b", "4"]) == 2
        assert "7" in capsys.readouterr().err


def test_completion(capsys):
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    done = subprocess.run(["bash", "-n"], input=script, text=True, check=False)
    assert done.returncode == 0
    for word in ("predict", "evaluate", "--threshold"):
        assert word in script
