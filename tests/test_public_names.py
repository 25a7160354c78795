"""The public names are these: one that comes, goes or is renamed shows as a change of a file."""

import importlib
import pkgutil
from pathlib import Path

import timm_branches

FILE = Path(__file__).parent / "fixtures" / "public_names.txt"


def public_names():
    """`package.name` for all of `__all__` of the package and the packages in it, sorted."""
    infos = pkgutil.walk_packages(timm_branches.__path__, "timm_branches.")
    packages = ["timm_branches", *(info.name for info in infos if info.ispkg)]
    names = []
    for package in packages:
        module = importlib.import_module(package)
        names += [f"{package}.{name}" for name in getattr(module, "__all__", ())]
    return sorted(names)


def test_public_names_are_frozen():
    agreed, found = FILE.read_text().split(), public_names()
    gone = sorted(set(agreed) - set(found))
    new = sorted(set(found) - set(agreed))
    assert agreed == found, (
        f"Public names differ from {FILE.name}: gone {gone}, new {new}. A name that goes breaks "
        "people's code: keep it, or say so in CHANGELOG.md. If it is meant, write the file anew "
        "with `python -m tests.test_public_names`."
    )


if __name__ == "__main__":
    FILE.write_text("\n".join(public_names()) + "\n")
