"""Half precision where the processor has no instructions for it."""

from importlib import util
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.train.small_runs import loader_of, make_data, make_task, settings
from timm_branches.train import fit, half_precision
from timm_branches.train.half_precision import check_half_precision, is_emulated, preset_for

CPU = torch.device("cpu")


@pytest.fixture
def old_processor(monkeypatch):
    """One with AVX2 alone."""
    flags = SimpleNamespace(
        _is_mkldnn_bf16_supported=lambda: False, _is_mkldnn_fp16_supported=lambda: False
    )
    monkeypatch.setattr(torch.ops, "mkldnn", flags)


@pytest.fixture
def new_processor(monkeypatch):
    flags = SimpleNamespace(
        _is_mkldnn_bf16_supported=lambda: True, _is_mkldnn_fp16_supported=lambda: False
    )
    monkeypatch.setattr(torch.ops, "mkldnn", flags)


def test_flags(old_processor):
    assert is_emulated(CPU)
    assert is_emulated(CPU, "float16")
    assert not is_emulated(torch.device("cuda"))


def test_each_type_has_its_own(new_processor):
    assert not is_emulated(CPU, "bfloat16")
    assert is_emulated(CPU, "float16")


def test_a_torch_that_does_not_say(monkeypatch):
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace())
    assert not is_emulated(CPU)


def test_preset(old_processor):
    settings, said = preset_for({"amp": True, "epochs": 3}, "cpu")
    assert settings == {"amp": False, "epochs": 3}
    assert "no bfloat16 instructions" in said
    assert preset_for({"amp": True}, "cuda:1") == ({"amp": True}, "")
    assert preset_for({"epochs": 3}, "cpu") == ({"epochs": 3}, "")


def test_preset_on_a_new_processor(new_processor):
    assert preset_for({"amp": True}, "cpu") == ({"amp": True}, "")
    settings, said = preset_for({"amp": True, "amp_dtype": "float16"}, "cpu")
    assert not settings["amp"]
    assert "float16" in said


def test_what_was_asked_for_is_warned_about(old_processor):
    assert "leave amp out" in check_half_precision(CPU, True, "bfloat16")
    assert check_half_precision(CPU, False, "bfloat16") == ""
    assert check_half_precision(torch.device("cuda"), True, "bfloat16") == ""


def test_fit_warns(old_processor, tmp_path):
    loader = loader_of(make_data())
    with pytest.warns(UserWarning, match="emulates them.*leave amp out"):
        fit(make_task(), loader, None, settings(tmp_path, epochs=1, amp=True))


@pytest.mark.parametrize("name", ["bcnn", "denoise"])
def test_recipes(name, old_processor, monkeypatch, capsys):
    path = Path(__file__).resolve().parents[2] / "recipes" / f"{name}.py"
    spec = util.spec_from_file_location(f"recipe_{name}", path)
    recipe = util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    presets = [key for key, preset in recipe.RECIPES.items() if preset.get("amp")]
    assert presets
    data = ["data"] if name == "denoise" else []
    args = recipe.parse_args([*data, "--recipe", presets[0], "--device", "cpu"])
    assert not args.amp
    assert "mixed precision is left out" in capsys.readouterr().err
    assert recipe.parse_args([*data, "--recipe", presets[0], "--device", "cpu", "--amp"]).amp


def test_this_machine_is_asked():
    """Torch's flags answer; no flag of another name is asked for in vain."""
    assert isinstance(half_precision.is_emulated(CPU), bool)
    assert hasattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported")
    assert hasattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported")
