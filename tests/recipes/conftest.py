"""How the recipes are started here; the module of tests names its script in RECIPE."""

import importlib.util
import runpy
import sys

import pytest
import torch


@pytest.fixture
def here(request, tmp_path, monkeypatch, capsys):
    """Run the script in this process, where imports are paid for already.

    (exit status, stdout, stderr).
    """

    def start(*args):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        monkeypatch.setattr(sys, "argv", [str(request.module.RECIPE), *map(str, args)])
        threads = torch.get_num_threads()
        try:
            runpy.run_path(str(request.module.RECIPE), run_name="__main__")
            status = 0
        except SystemExit as error:
            status = error.code
        finally:
            torch.set_num_threads(threads)
        return (status, *capsys.readouterr())

    return start


@pytest.fixture(scope="module")
def recipe(request):
    """The script as a module."""
    path = request.module.RECIPE
    spec = importlib.util.spec_from_file_location(f"{path.stem}_recipe", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]
