"""What importing the package brings in, what it offers, and that its docstrings' examples hold."""

import doctest
import importlib
import json
import os
import pkgutil
import subprocess
import sys
from importlib.resources import files

import pytest

import timm_branches

MODULES = [
    info.name
    for info in pkgutil.walk_packages(timm_branches.__path__, "timm_branches.")
    if not info.name.endswith("__main__")
]  # to import that is to run it
# needed by some jobs only, and slow to import or not always installed
UNWANTED = (
    "albumentations",
    "av",
    "cv2",
    "matplotlib",
    "nltk",
    "onnx",
    "pandas",
    "scipy",
    "sklearn",
    "skimage",
    "tensorboard",
    "torch.utils.tensorboard",
    "torchmetrics",
    "torchvision.datasets",
    "wandb",
)


def modules_after(code):
    """What sys.modules holds in a fresh process after `code`."""
    code += "; import json, sys; print(json.dumps(list(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_import_is_lean():
    # timm itself imports torchvision, and with it torchvision.datasets: what matters is that we add
    # nothing
    ours = modules_after(
        "import timm_branches, timm_branches.data, timm_branches.train, timm_branches.cli"
    )
    added = ours - modules_after("import timm")
    assert not {
        name for name in added for unwanted in UNWANTED if f"{name}.".startswith(f"{unwanted}.")
    }


def test_public_names():
    assert len(set(timm_branches.__all__)) == len(timm_branches.__all__)
    for name in [timm_branches.__name__, *MODULES]:
        module = importlib.import_module(name)
        missing = [
            public for public in getattr(module, "__all__", ()) if not hasattr(module, public)
        ]
        assert not missing, f"{name}.__all__ names {missing}"
    assert timm_branches.__version__


def test_all_modules_are_found():
    root = files("timm_branches")
    on_disk = {
        os.path.relpath(os.path.join(folder, name), root)[:-3]
        .replace(os.sep, ".")
        .removesuffix(".__init__")
        for folder, _, names in os.walk(root)
        for name in names
        if name.endswith(".py")
    }
    assert {f"timm_branches.{name}" for name in on_disk - {"__init__", "__main__"}} == set(MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_doctests(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # an example may write a file
    module = importlib.import_module(name)
    result = doctest.testmod(module, report=True)
    assert result.failed == 0


def test_doctests_are_collected():
    """At least this many examples are there: an empty collection would pass, too."""
    finder = doctest.DocTestFinder(exclude_empty=True)
    count = sum(
        len(test.examples)
        for name in MODULES
        for test in finder.find(importlib.import_module(name))
    )
    assert count > 50


def test_is_typed():
    assert files("timm_branches").joinpath("py.typed").is_file()
