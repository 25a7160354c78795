"""The documentation builds as a site without a warning, and shows every public name."""

import importlib
import pkgutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from sphinx.util.inventory import InventoryFile

import timm_branches

ROOT = Path(__file__).parents[2]
PACKAGES = ["timm_branches"] + [
    info.name
    for info in pkgutil.walk_packages(timm_branches.__path__, "timm_branches.")
    if info.ispkg
]


@pytest.fixture(scope="module")
def site():
    """The command of CONTRIBUTING.md, into another folder."""
    with tempfile.TemporaryDirectory() as folder:
        options = ["-q", "-W", "--keep-going", "-b", "html"]
        command = [sys.executable, "-m", "sphinx", *options, "docs", folder]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        yield Path(folder)


def test_pages(site):
    pages = sorted(ROOT.glob("docs/**/*.md"))
    assert len(pages) > 30
    for page in pages:
        built = site / page.relative_to(ROOT / "docs").with_suffix(".html")
        assert built.exists(), f"{page} is not in the site"


def test_links_that_leave_the_pages(site):
    recipes = (site / "recipes.html").read_text()
    assert (
        'href="https://github.com/timm-branches/timm_branches/blob/main/recipes/bcnn.py"' in recipes
    )
    for page in site.rglob("*.html"):
        assert 'href="../README' not in page.read_text(), page
        assert 'href="../benchmarks' not in page.read_text(), page


def test_every_public_name_has_an_entry(site):
    inventory = InventoryFile.loads((site / "objects.inv").read_bytes(), uri="")
    shown = {name for kind, names in inventory.data.items() if kind[:3] == "py:" for name in names}
    missing = []
    for package in PACKAGES:
        module = importlib.import_module(package)
        for name in getattr(module, "__all__", ()):
            # what the top of the package offers may have its entry in the package it is from
            places = PACKAGES if package == "timm_branches" else [package]
            if not any(f"{place}.{name}" in shown for place in places):
                missing.append(f"{package}.{name}")
    assert not missing
