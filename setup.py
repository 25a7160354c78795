"""The one thing that pyproject.toml cannot say: the recipes travel inside the package."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["timm_branches*"]), "timm_branches.recipes"],
    package_dir={"timm_branches.recipes": "recipes"},
)
