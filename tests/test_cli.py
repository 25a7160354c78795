"""``timm-branches``: what it prints, and one line for what a person got wrong."""

import json
import subprocess
import sys

import pytest
import torch

from timm_branches import create_branch_model, save_model
from timm_branches.cli import main


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    model = create_branch_model("test_resnet", taps=[3, 5], num_classes=[2, 7], names=["coarse", "fine"])
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
    done = subprocess.run([sys.executable, "-m", "timm_branches", "info", str(model_file)], capture_output=True,
                          text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["extra"] == {"epoch": 4}


@pytest.mark.parametrize("case", ["unknown model", "no file", "a folder", "not safetensors", "someone else's",
                                  "cut short"])
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
