"""``timm-branches``: what it prints, and one line for what a person got wrong."""

import csv
import io
import json
import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from timm_branches import Taxonomy, create_branch_model, save_model
from timm_branches.cli import main
from timm_branches.inference.predict import predict
from timm_branches.train.script import run_script

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    model = create_branch_model(
        "test_resnet", taps=[3, 5], num_classes=[2, 7], names=["coarse", "fine"]
    )
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    save_model(model, path, extra={"epoch": 4})
    return path


def test_taps(capsys):
    assert main(["taps", "resnet50"]) == 0
    out, err = capsys.readouterr()
    rows = [line.split() for line in out.splitlines()]
    assert ["5", "layer4", "2048", "32"] in rows
    assert ["2", "layer1", "256", "4"] in rows
    assert err == ""


def test_info(model_file, capsys):
    assert main(["info", str(model_file)]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["extra"] == {"epoch": 4}
    text = json.dumps(facts)
    assert "test_resnet" in text
    assert "coarse" in text
    assert "fine" in text


def test_as_a_module(model_file):
    done = subprocess.run(
        [sys.executable, "-m", "timm_branches", "info", str(model_file)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["extra"] == {"epoch": 4}


@pytest.mark.parametrize(
    "case",
    ["unknown model", "no file", "a folder", "not safetensors", "someone else's", "cut short"],
)
def test_mistakes(case, model_file, tmp_path, capsys):
    from safetensors.torch import save_file

    (tmp_path / "text.safetensors").write_text("hello, this is not a model")
    save_file({"weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(model_file.read_bytes()[:500])
    args, needle = {
        "unknown model": (["taps", "resnet5000"], "resnet5000"),
        "no file": (["info", str(tmp_path / "none.safetensors")], "none.safetensors"),
        "a folder": (["info", str(tmp_path)], tmp_path.name),
        "not safetensors": (["info", str(tmp_path / "text.safetensors")], "text.safetensors"),
        "someone else's": (["info", str(tmp_path / "other.safetensors")], "other.safetensors"),
        "cut short": (["info", str(tmp_path / "cut.safetensors")], "cut.safetensors"),
    }[case]
    assert main(args) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("timm-branches: ")
    assert err.count("\n") == 1, err
    assert needle in err


@pytest.mark.parametrize("args", [[], ["tap", "resnet50"], ["taps"]])
def test_usage(args, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(args)
    assert stopped.value.code == 2
    assert "usage: timm-branches" in capsys.readouterr().err


NAMES = ['a,"b"\n.png', "\u732b \u00e9.png", "plain.png"]
TREE = Taxonomy(
    [("animal, living", "\u732b"), ("animal, living", 'the "dog"'), ("thing\nor so", "van")],
    levels=["coarse", "fine"],
)


@pytest.fixture(scope="module")
def tree_file(tmp_path_factory):
    torch.manual_seed(0)
    model = create_branch_model("test_resnet", taps=[4, 5], taxonomy=TREE, img_size=32)
    for name in model.names:
        model.head(name).fc.weight.data *= 12
    return save_model(model, tmp_path_factory.mktemp("tree") / "model.safetensors")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    root = tmp_path_factory.mktemp("photos")
    for i, name in enumerate(NAMES):
        Image.fromarray(
            np.random.default_rng(i).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        ).save(root / name)
    return root


def _parse(kind, text, levels):
    """(file, [(name, probability), ...]) of every image, read back from a file's text."""
    if kind == "json":
        return [
            (r["file"], [(x["name"], x["probability"]) for x in r["levels"]])
            for r in json.loads(text)
        ]
    rows = list(csv.DictReader(io.StringIO(text)))
    return [
        (
            row["file"],
            [(row[level], float(row[f"{level}_probability"])) for level in levels if row[level]],
        )
        for row in rows
    ]


@pytest.mark.parametrize("kind", ["json", "csv"])
@pytest.mark.parametrize("threshold", [None, "0.6"])
@pytest.mark.parametrize("where", ["stdout", "file", "by its ending"])
def test_predict_formats(tree_file, photos, tmp_path, capsys, kind, threshold, where):
    limit = ["--threshold", threshold] if threshold else []
    output = {
        "stdout": [],
        "file": ["--output", str(tmp_path / "out")],
        "by its ending": ["--output", str(tmp_path / f"out.{kind.upper()}")],
    }[where]
    wanted = [] if where == "by its ending" else ["--format", kind]
    assert main(["predict", str(tree_file), str(photos), *wanted, *output, *limit]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    text = Path(output[1]).read_bytes().decode() if output else out
    assert bool(out) != bool(output)
    expected = list(predict(tree_file, photos, threshold=float(threshold) if threshold else None))
    parsed = _parse(kind, text, TREE.levels)
    assert sorted(os.path.basename(file) for file, _ in parsed) == sorted(NAMES)
    assert [file for file, _ in parsed] == [r.file for r in expected]
    for (_, levels), record in zip(parsed, expected, strict=True):
        assert tuple(name for name, _ in levels) == record.path
        assert [p for _, p in levels] == pytest.approx(record.probabilities, abs=1e-5)
    if kind == "json":
        assert [r["stopped"] for r in json.loads(text)] == [r.stopped for r in expected]


def test_predict_text(tree_file, photos, capsys):
    expected = list(predict(tree_file, photos, threshold=0.6))
    assert main(["predict", str(tree_file), str(photos), "--threshold", "0.6"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(expected) == 3
    for line, record in zip(lines, expected, strict=True):
        steps = [
            f"{name} {p:.2f}".replace("\n", "\\n")
            for name, p in zip(record.path, record.probabilities, strict=True)
        ]
        file = record.file.replace("\n", "\\n")
        assert line == f"{file}  {' > '.join(steps + ['(stopped)'] * record.stopped)}"


def test_predict_without_a_tree(model_file, photos, tmp_path, capsys):
    args = ["predict", str(model_file), str(photos / "plain.png")]
    (record,) = predict(model_file, photos / "plain.png")
    assert main(args) == 0
    (coarse, fine), (p, q) = record.labels, record.probabilities
    assert (
        capsys.readouterr().out
        == f"{photos}/plain.png  coarse {coarse} {p:.2f}, fine {fine} {q:.2f}\n"
    )
    assert main([*args, "--format", "json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert [level["class"] for level in found["levels"]] == [coarse, fine]
    assert [level["name"] for level in found["levels"]] == [None, None]
    assert main([*args, "--format", "csv"]) == 0
    (row,) = csv.DictReader(io.StringIO(capsys.readouterr().out))
    assert (row["coarse"], row["fine"]) == (str(coarse), str(fine))


def test_predict_flat_model_with_a_tree(photos, tmp_path, capsys):
    model = create_branch_model("test_resnet", taps=[5], num_classes=3, names=["leaf"], img_size=32)
    save_model(model, tmp_path / "flat.safetensors")
    TREE.save_json(tmp_path / "tree.json")
    assert (
        main(
            [
                "predict",
                str(tmp_path / "flat.safetensors"),
                str(photos),
                "--taxonomy",
                str(tmp_path / "tree.json"),
                "--format",
                "json",
            ]
        )
        == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert [tuple(r["path"]) for r in found] == [
        r.path for r in predict(model, photos, taxonomy=TREE)
    ]
    assert all(tuple(r["path"]) in TREE.leaves for r in found)


@pytest.mark.parametrize("kind", ["text", "json", "csv"])
@pytest.mark.parametrize("good", [True, False])
def test_predict_unreadable(tree_file, photos, tmp_path, capsys, kind, good):
    if good:
        (tmp_path / "1.png").write_bytes((photos / "plain.png").read_bytes())
    (tmp_path / "2.png").write_bytes(b"no image")
    output = tmp_path / "out"
    output.write_text("earlier")
    args = ["predict", str(tree_file), str(tmp_path), "--format", kind, "--output", str(output)]
    assert main([*args, "--strict"]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("timm-branches: ")
    assert "2.png" in err
    assert err.count("\n") == 1
    assert output.read_text() == "earlier"
    assert main(args) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "2.png" in err.splitlines()[0]
    assert err.splitlines()[1] == f"timm-branches: 1 of {1 + good} images could not be read"
    text = output.read_text()
    files = (
        [line.split("  ")[0] for line in text.splitlines()]
        if kind == "text"
        else [file for file, _ in _parse(kind, text, TREE.levels)]
    )
    assert files == [str(tmp_path / "1.png")] * good
    assert not list(tmp_path.glob(".*"))


def test_predict_names_that_are_not_unicode(tree_file, photos, tmp_path, capsys):
    name = os.fsdecode(b"\xff.png")
    try:
        (tmp_path / name).write_bytes((photos / "plain.png").read_bytes())
    except OSError:
        pytest.skip("this file system takes Unicode only")
    for kind in ("text", "json", "csv"):
        assert main(["predict", str(tree_file), str(tmp_path), "--format", kind]) == 0
        out, err = capsys.readouterr()
        assert "\\udcff.png" in out
        assert err == ""
    output = tmp_path / "out.csv"
    assert main(["predict", str(tree_file), str(tmp_path), "--output", str(output)]) == 0
    assert os.fsencode(tmp_path / name) in output.read_bytes()


def test_predict_pictures(tree_file, photos, tmp_path, capsys):
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "plain.png").write_bytes((photos / "plain.png").read_bytes())
    images = [str(photos), str(tmp_path / "more")]
    pictures = tmp_path / "pictures"
    assert main(["predict", str(tree_file), *images, "--picture", str(pictures)]) == 0
    names = sorted(p.name for p in pictures.iterdir())
    assert names == sorted([*(f"{name}.branch.png" for name in NAMES), "plain.png.2.branch.png"])
    one = tmp_path / "one.png"
    assert main(["predict", str(tree_file), str(photos / "plain.png"), "--picture", str(one)]) == 0
    assert one.read_bytes() == (pictures / "plain.png.branch.png").read_bytes()
    for path in [one, *pictures.iterdir()]:
        assert Image.open(path).size[0] > 500
    assert main(["predict", str(tree_file), *images, "--picture", str(one)]) == 2
    assert "give a folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["{model}", "{photos}/none.png"], "none.png"),
        (["{model}", "{tmp}"], "no images"),
        (["{photos}/plain.png", "{photos}"], "safetensors"),
        (["{model}", "{photos}", "--decoder", "greedy"], "best-path"),
        (["{model}", "{photos}", "--threshold", "2"], "from 0 to 1"),
        (["{model}", "{photos}", "--taxonomy", "cifar10"], "of its own"),
        (["{model}", "{photos}", "--taxonomy", "none.json"], "none.json"),
        (["{model}", "{photos}", "--device", "gpu"], "gpu"),
        (["{model}", "{photos}", "-b", "0"], "batch_size"),
        (["{model}", "{photos}", "--output", "{tmp}", "--picture", "{tmp}"], "does not go with"),
        (["{model}", "{photos}", "--output", "{model}"], "among what is read"),
        (["{model}", "{photos}", "--output", "{photos}/plain.png"], "among what is read"),
        (
            ["{model}", "{photos}/plain.png", "--picture", "{photos}/plain.png"],
            "among what is read",
        ),
        (["{model}", "{photos}", "--picture", "{model}"], ".png"),
    ],
)
def test_predict_mistakes(tree_file, photos, tmp_path, capsys, args, message):
    before = {p: p.read_bytes() for p in [tree_file, *photos.iterdir()]}
    places = {"model": tree_file, "photos": photos, "tmp": tmp_path}
    assert main(["predict", *(a.format(**places) for a in args)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("timm-branches: ")
    assert err.count("\n") == 1, err
    assert message in err
    assert {p: p.read_bytes() for p in [tree_file, *photos.iterdir()]} == before


def test_predict_into_a_closed_pipe(tree_file, photos):
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "timm_branches", "predict", str(tree_file), str(photos)],
        stdout=writing,
        stderr=subprocess.PIPE,
        check=False,
    )
    os.close(writing)
    assert done.stderr == b""
    assert done.returncode == 1


def test_recipes_by_name(tmp_path, capsys, monkeypatch):
    assert main(["recipes", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = [line.split()[0] for line in lines]
    assert names == sorted(path.stem for path in (ROOT / "recipes").glob("*.py"))
    assert "B-CNN" in lines[names.index("bcnn")]
    monkeypatch.chdir(tmp_path)
    assert main(["recipes", "copy", "segment"]) == 0
    assert (tmp_path / "segment.py").read_bytes() == (ROOT / "recipes/segment.py").read_bytes()
    (tmp_path / "segment.py").write_text("mine")
    assert main(["recipes", "copy", "segment"]) == 2
    assert "segment.py is there already" in capsys.readouterr().err
    assert (tmp_path / "segment.py").read_text() == "mine"
    assert main(["recipes", "copy", "nose"]) == 2
    assert "choose one of ablate, bcnn" in capsys.readouterr().err


def test_train_and_predict(tmp_path, capsys):
    """A recipe's flags are its own; what it writes can be asked."""
    run = ["train", "bcnn", "--epochs", "1", "--limit", "64", "--no-flat", "--no-plots"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "timm_branches", *run, "--output", str(tmp_path / "run")],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert "best path" in done.stdout
    (model,) = (tmp_path / "run").rglob("model.safetensors")
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    assert main(["predict", str(model), str(tmp_path / "a.png")]) == 0
    assert "a.png" in capsys.readouterr().out
    wrong = subprocess.run(
        [sys.executable, "-m", "timm_branches", "train", "bcnn", "--epochs", "-1"],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert wrong.returncode == 2
    assert "Traceback" not in wrong.stderr


def test_looking(capsys):
    assert main(["tree", "cifar10"]) == 0
    assert "├─ sky" in capsys.readouterr().out
    assert main(["tree", "nose"]) == 2
    assert main(["list"]) == 0
    out = capsys.readouterr().out
    for word in ("bcnn", "bcnn_vgg16", "cifar100", "rednet", "best-path"):
        assert word in out
    (presets,) = [line for line in out.splitlines() if line.startswith("presets:")]
    assert "bcnn --recipe modern-cifar10" in presets
    assert "denoise --recipe train400-sigma25" in presets
    for command in ("train", "predict", "evaluate", "check", "export"):
        with pytest.raises(SystemExit) if command != "train" else nullcontext():
            main([command, "--help"])
        text = capsys.readouterr().out
        assert 4 <= text.count("\n") <= 40, command  # one screen
    with pytest.raises(SystemExit):
        main(["predict", "--help-all"])
    assert "--stride" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert "timm_branches 0." in capsys.readouterr().out


def test_the_wheel_has_the_recipes(tmp_path):
    """What `pip install` brings: package, stubs and recipes, and nothing beside them."""
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("timm_branches", "recipes"):
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    subprocess.run(
        [sys.executable, "setup.py", "build"],
        cwd=source,
        check=True,
        capture_output=True,
    )
    built = source / "build" / "lib"
    assert {path.name for path in built.iterdir()} == {"timm_branches"}
    names = {path.name for path in (built / "timm_branches" / "recipes").iterdir()}
    assert names == {path.name for path in (ROOT / "recipes").glob("*.py")}
    assert (built / "timm_branches" / "py.typed").exists()
    assert (built / "timm_branches" / "data" / "__init__.pyi").exists()
    done = subprocess.run(
        [sys.executable, "-m", "timm_branches", "recipes", "list"],
        cwd=built,
        check=True,
        capture_output=True,
        text=True,
    )
    assert "\nbcnn " in done.stdout


TREE = Taxonomy(["animal/cat", "animal/dog", "plant/rose"], levels=["kind", "name"])


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """Class folders of 7, 5 and 3 images."""
    root = tmp_path_factory.mktemp("labelled")
    random = np.random.default_rng(0)
    for leaf, count in zip(TREE.leaves, (7, 5, 3), strict=True):
        folder = root.joinpath("test", *leaf)
        folder.mkdir(parents=True)
        for index in range(count):
            pixels = random.integers(0, 255, (40, 40, 3), dtype=np.uint8) // (1 + index % 4)
            Image.fromarray(pixels).save(folder / f"{index}.png")
    return root


@pytest.mark.parametrize("flat", [False, True])
def test_evaluate(labelled, tmp_path, capsys, flat):
    """Against what `predict` says of each image."""
    torch.manual_seed(1)
    options = {"num_classes": 3, "taps": [5], "names": ["leaf"]}
    if not flat:
        options = {"taps": [3, 5], "taxonomy": TREE}
    model = create_branch_model("test_resnet", img_size=40, **options)
    file = str(save_model(model, tmp_path / "model.safetensors"))
    TREE.save_json(tmp_path / "tree.json")
    tree = ["--taxonomy", str(tmp_path / "tree.json")] if flat else []
    out = tmp_path / "out.json"
    assert main(["evaluate", file, str(labelled), "--output", str(out), *tree]) == 0
    results = json.loads(out.read_text())
    hits = {}
    for level, names in zip(TREE.levels, TREE.classes, strict=True):
        hits |= {(level, name): [] for name in names}
    for record in predict(file, labelled, taxonomy=tree[1] if flat else None):
        truth = Path(record.file).parts[-3:-1]
        for level, name, said in zip(TREE.levels, truth, record.path, strict=True):
            hits[level, name].append(name == said)
    assert results["images"] == 15
    for (level, name), right in hits.items():
        row = results["classes"][level][name]
        assert row["images"] == len(right)
        assert row["top1"] == pytest.approx(100 * sum(right) / len(right))
    every = [right for (level, _), rights in hits.items() if level == "name" for right in rights]
    assert results["metrics"]["name_top1"] == pytest.approx(100 * sum(every) / 15)
    assert main(["evaluate", file, str(labelled), *tree, "--format", "csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["class"] for row in rows] == ["animal", "plant", "cat", "dog", "rose"]
    assert main(["evaluate", file, str(labelled), *tree]) == 0
    assert "Percent right, and images, of 15 images" in capsys.readouterr().out


def test_evaluate_refuses(labelled, model_file, tmp_path, capsys):
    clips = create_branch_model("test_resnet", head="lstm", taxonomy=["a", "b"], img_size=32)
    clips_file = save_model(clips, tmp_path / "clips.safetensors")
    own = create_branch_model("test_resnet", taps=[3, 5], taxonomy=TREE, img_size=32)
    own_file = save_model(own, tmp_path / "own.safetensors")
    for arguments, message in (
        ([own_file, labelled, "--frames", "3"], "--frames has no effect"),
        ([clips_file, labelled, "--targets", "x"], "--targets has no effect"),
        ([model_file, labelled], "give --taxonomy"),
        ([model_file, labelled, "--taxonomy", "cifar10"], "the model's heads have"),
        ([own_file, labelled, "--taxonomy", "cifar10"], "--taxonomy has no effect"),
        ([own_file, labelled, "--split", "nose"], "nose"),
        ([own_file, labelled, "--decoder", "nose"], "nose"),
        ([own_file, labelled, "--device", "nose"], "no device 'nose'"),
        ([own_file, tmp_path / "nose"], "nose"),
    ):
        assert main(["evaluate", *map(str, arguments)]) == 2, message
        err = capsys.readouterr().err
        assert message in err
        assert err.count("\n") == 1


def test_a_recipe_without_its_extra(capsys):
    def needs():
        import_module("no_such_module")

    with pytest.raises(SystemExit) as end:
        run_script(needs)
    assert end.value.code == 2
    assert "pip install 'timm_branches[recipes]'" in capsys.readouterr().err
