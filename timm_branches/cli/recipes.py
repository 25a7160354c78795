"""`timm-branches train` and `timm-branches recipes`: the recipes by name.

They are scripts for themselves, in the folder `recipes` of the repository, and travel inside the
package.
"""

import argparse
import ast
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

__all__ = [
    "add_parsers",
    "copy_recipe",
    "find_recipe",
    "list_presets",
    "list_recipes",
    "run_recipe",
]


def add_parsers(commands: Any) -> None:
    """Add the commands and their flags."""
    train = commands.add_parser(
        "train",
        help="run a recipe by its name, such as bcnn",
        description="Run a recipe; its own flags come behind its name. `timm-branches train bcnn "
        "--help` shows them.",
        add_help=False,
    )
    train.add_argument("recipe")
    train.add_argument("arguments", nargs=argparse.REMAINDER)
    ablate = commands.add_parser(
        "ablate",
        help="a recipe over a grid of its flags, as one table",
        description="The same as `timm-branches train ablate`.",
        add_help=False,
    )
    ablate.add_argument("arguments", nargs=argparse.REMAINDER)
    recipes = commands.add_parser("recipes", help="list the recipes, or copy one to change it")
    actions = recipes.add_subparsers(dest="action", required=True)
    actions.add_parser("list", help="a line each")
    copy = actions.add_parser("copy", help="a copy to change")
    copy.add_argument("name", help="one of `timm-branches recipes list`")
    copy.add_argument("to", nargs="?", default=".", help="a file or folder (default: this folder)")


def recipe_folder() -> Path:
    """Where the scripts are: inside the package, in a checkout beside it."""
    package = Path(__file__).parents[1]
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


def list_recipes() -> dict[str, str]:
    """The names of the recipes, with the first line of what each says of itself."""
    recipes = {}
    for path in sorted(recipe_folder().glob("*.py")):
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        recipes[path.stem] = text.split("\n")[0]
    return recipes


def list_presets(name: str) -> list[str]:
    """What a recipe takes as `--recipe`, read from its table of settings."""
    tree = ast.parse(find_recipe(name).read_text(encoding="utf-8"))
    for statement in tree.body:
        if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.value, ast.Dict):
            continue
        if ast.unparse(statement.target) == "RECIPES":
            return [ast.literal_eval(key) for key in statement.value.keys if key is not None]
    return []


def find_recipe(name: str) -> Path:
    """The script of a recipe.

    Raises:
        ValueError: There is none of this name.
    """
    path = recipe_folder() / f"{name}.py"
    names = list(list_recipes())
    if name not in names:
        raise ValueError(f"there is no recipe {name!r}: choose one of {', '.join(names)}.")
    return path


def run_recipe(name: str, arguments: list[str]) -> None:
    """Run a recipe in this process, as `python recipes/NAME.py ARGUMENTS` would."""
    path = find_recipe(name)
    before = sys.argv
    sys.argv = [f"timm-branches train {name}", *arguments]
    try:
        runpy.run_path(str(path), run_name="__main__")
    finally:
        sys.argv = before


def copy_recipe(name: str, to: str) -> Path:
    """Copy a recipe's script; a file that is there is not written over.

    Raises:
        ValueError: There is no such recipe, or already such a file.
    """
    source = find_recipe(name)
    target = Path(to)
    if target.is_dir():
        target = target / source.name
    if target.exists():
        raise ValueError(f"{target} is there already: name another file.")
    shutil.copyfile(source, target)
    return target
