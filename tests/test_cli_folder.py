"""Answers in a folder: kept as they come, and gone on with."""

import csv
import json
import os
import tarfile

import numpy as np
import pytest
from PIL import Image

from timm_branches import Taxonomy, create_branch_model, save_model
from timm_branches.cli import main

TREE = Taxonomy(["animal/cat", "animal/dog", "plant/rose", "rock"], levels=["kind", "name"])


def make_model(path, seed=0):
    import torch

    torch.manual_seed(seed)
    model = create_branch_model("test_resnet", taps=[4, 5], taxonomy=TREE, img_size=64)
    save_model(model, path)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model") / "model.safetensors")


def paint(path, seed):
    pixels = np.random.default_rng(seed).integers(0, 255, (48, 40, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def photos(tmp_path):
    for seed, name in enumerate(["1.png", "2.png", "10.png", "more/1.png", "more/q\nueer.png"]):
        paint(tmp_path / "photos" / name, seed)
    return tmp_path / "photos"


def answers(path):
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.reader(file))


def lines(folder):
    return (folder / "answers.jsonl").read_bytes().splitlines(keepends=True)


def test_equal_to_a_file(model, photos, tmp_path, capsys):
    folder, file = tmp_path / "out", tmp_path / "answers.csv"
    assert main(["predict", str(model), str(photos), "--output", f"{folder}{os.sep}"]) == 0
    assert main(["predict", str(model), str(photos), "--output", str(file)]) == 0
    assert answers(folder / "answers.csv") == answers(file)
    assert len(lines(folder)) == 5
    # again: nothing is asked of the model, and the answers are the same
    before = lines(folder)
    capsys.readouterr()
    assert main(["predict", str(model), str(photos), "--output", str(folder)]) == 0
    assert "5 of 5 are there already" in capsys.readouterr().err
    assert lines(folder) == before
    assert answers(folder / "answers.csv") == answers(file)


@pytest.mark.parametrize("kind", ["text", "json"])
def test_formats(model, photos, tmp_path, kind):
    folder, file = tmp_path / "out", tmp_path / "answers"
    run = ["predict", str(model), str(photos), "--format", kind, "--output"]
    assert main([*run, f"{folder}{os.sep}"]) == 0
    assert main([*run, str(file)]) == 0
    ending = {"text": "txt", "json": "json"}[kind]
    assert (folder / f"answers.{ending}").read_text() == file.read_text()


def test_stopped(model, photos, tmp_path, monkeypatch, capsys):
    """Whatever was answered before a stop is there; the rest follows, in the images' order."""
    from timm_branches.inference.predict import Predictions

    folder, file = tmp_path / "out", tmp_path / "answers.csv"
    run = ["predict", str(model), str(photos), "-b", "2", "--output"]
    assert main([*run, str(file)]) == 0
    real, asked = Predictions._forward, []

    def stops(self, x):
        asked.append(len(x))
        if sum(asked) > 4:
            raise KeyboardInterrupt
        return real(self, x)

    monkeypatch.setattr(Predictions, "_forward", stops)
    with pytest.raises(KeyboardInterrupt):
        main([*run, f"{folder}{os.sep}"])
    assert len(lines(folder)) == 4
    assert not (folder / "answers.csv").exists()
    # as if the machine had stopped within a line
    whole = (folder / "answers.jsonl").read_bytes()
    (folder / "answers.jsonl").write_bytes(whole[:-7])
    asked.clear()

    def goes(self, x):
        asked.append(len(x))
        return real(self, x)

    monkeypatch.setattr(Predictions, "_forward", goes)
    capsys.readouterr()
    assert main([*run, str(folder)]) == 0
    assert "3 of 5 are there already" in capsys.readouterr().err
    assert sum(asked) == 2
    assert len(lines(folder)) == 5
    assert answers(folder / "answers.csv") == answers(file)


def test_new_and_changed_images(model, photos, tmp_path, capsys):
    folder = tmp_path / "out"
    run = ["predict", str(model), str(photos), "--output", f"{folder}{os.sep}"]
    assert main(run) == 0
    before = answers(folder / "answers.csv")
    paint(photos / "3.png", 77)
    paint(photos / "2.png", 78)
    (photos / "10.png").write_bytes(b"no image")
    capsys.readouterr()
    assert main(run) == 1
    error = capsys.readouterr().err
    assert "3 of 6 are there already" in error
    assert "10.png" in error
    after = answers(folder / "answers.csv")
    fresh = tmp_path / "fresh.csv"
    main(["predict", str(model), str(photos), "--output", str(fresh)])
    assert after == answers(fresh)
    assert [row[0] for row in after] == [row[0] for row in answers(fresh)]
    assert not any(row[0].endswith("10.png") for row in after)
    assert before != after


def test_a_tar(model, photos, tmp_path, capsys):
    archive, folder = tmp_path / "photos.tar", tmp_path / "out"
    with tarfile.open(archive, "w") as tar:
        tar.add(photos / "1.png", "a/1.png")
        tar.add(photos / "2.png", "b/1.png")
    run = ["predict", str(model), str(archive), "--output", f"{folder}{os.sep}"]
    assert main(run) == 0
    capsys.readouterr()
    assert main(run) == 0
    assert "2 of 2 are there already" in capsys.readouterr().err
    assert len({json.dumps(row) for row in answers(folder / "answers.csv")}) == 3


def test_others_answers(model, photos, tmp_path, capsys):
    """Answers of another model, or made otherwise, are not mixed with these."""
    folder = tmp_path / "out"
    run = ["predict", str(model), str(photos), "--output", f"{folder}{os.sep}"]
    assert main(run) == 0
    other = make_model(tmp_path / "other.safetensors", seed=1)
    for changed in (
        ["predict", str(other), *run[2:]],
        [*run, "--threshold", "0.5"],
        [*run, "--decoder", "crm"],
        [*run, "--decoder", "cost", "--costs", "wu-palmer"],
        [*run, "--novel"],
    ):
        capsys.readouterr()
        assert main(changed) == 2, changed
        assert (
            "holds the answers of another model, or with other settings" in capsys.readouterr().err
        )
    (folder / "predict.json").unlink()
    assert main(run) == 2
    assert "of unknown origin" in capsys.readouterr().err


def test_a_damaged_line(model, photos, tmp_path, capsys):
    folder = tmp_path / "out"
    run = ["predict", str(model), str(photos), "--output", f"{folder}{os.sep}"]
    assert main(run) == 0
    kept = lines(folder)
    (folder / "answers.jsonl").write_bytes(b"".join([kept[0], b"nonsense\n", *kept[1:]]))
    assert main(run) == 2
    assert "line 2 is no answer" in capsys.readouterr().err


def test_a_file_is_still_a_file(model, photos, tmp_path):
    assert main(["predict", str(model), str(photos), "--output", str(tmp_path / "a.txt")]) == 0
    assert (tmp_path / "a.txt").read_text().count("\n") == 5
