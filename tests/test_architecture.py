"""The walls of the package: who may import whom. docs/architecture.md draws this picture."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "timm_branches"

# from the ground up: a unit (a folder or a file of the package) imports only from lower floors
FLOORS = [
    {"arguments", "files", "hub", "schedules", "taps", "backbones"},
    {"figures", "heads", "taxonomy", "tensor_files"},
    {"data", "description", "hierarchy", "model", "model_card"},
    {"dense", "state_dicts", "weights"},
    {"factory", "features", "task"},
    {"gradients", "inference"},
    {"train", "__init__"},
    {"cli"},
    {"__main__"},
]
CORE = {"taps", "heads", "hub", "model", "model_card", "description"}
CORE |= {"state_dicts", "weights", "factory"}
WALLS = [
    (CORE, {"data", "task", "train", "hierarchy", "schedules", "features", "dense", "gradients"}),
    ({"taxonomy", "hierarchy", "schedules"}, CORE | {"backbones"}),
    ({"data"}, CORE | {"backbones", "task", "train"}),
]


def unit_of(module):
    """The unit of timm_branches.unit.rest; the package itself is __init__."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imports_of(file):
    """(unit, line) of every import of the package, in functions too."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno} is a relative import"
            modules = [node.module]
            if node.module == "timm_branches":
                units = [alias.name for alias in node.names]
                modules = [f"timm_branches.{unit}" for unit in units if (PACKAGE / unit).exists()]
                modules = modules or ["timm_branches"]
        elif isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        else:
            continue
        for module in modules:
            if module.split(".")[0] == "timm_branches":
                yield unit_of(module), node.lineno
            assert module.split(".")[0] != "recipes", f"{file}:{node.lineno} imports a recipe"


def edges():
    for file in sorted(PACKAGE.rglob("*.py")):
        unit = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for imported, line in imports_of(file):
            if imported != unit:
                yield unit, imported, f"{file.relative_to(ROOT)}:{line}"


def test_every_unit_has_a_floor():
    units = {
        path.name.removesuffix(".py")
        for path in PACKAGE.iterdir()
        if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert units == set().union(*FLOORS)


def test_imports_go_down():
    floor = {unit: number for number, units in enumerate(FLOORS) for unit in units}
    up = [
        f"{place}: {unit} imports {imported}"
        for unit, imported, place in edges()
        if floor[imported] >= floor[unit]
    ]
    assert not up


@pytest.mark.parametrize(("inside", "outside"), WALLS, ids=["core", "labels", "data"])
def test_walls(inside, outside):
    through = [
        f"{place}: {unit} imports {imported}"
        for unit, imported, place in edges()
        if unit in inside and imported in outside
    ]
    assert not through


def test_nobody_imports_a_recipe():
    for folder in ("recipes", "benchmarks"):
        for file in sorted((ROOT / folder).glob("*.py")):
            list(imports_of(file))  # asserts


# a loop in a loop counts twice
FOLDED = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.IfExp)
STATEMENTS = (ast.Assign, ast.AugAssign, ast.AnnAssign, ast.Return, ast.Expr, ast.Raise, ast.Assert)


def folded(tree):
    """The lines of statements with more than one comprehension or conditional expression."""
    for node in ast.walk(tree):
        parts = []
        if isinstance(node, STATEMENTS):
            parts = [node]
        elif isinstance(node, ast.If | ast.While):
            parts = [node.test]
        elif isinstance(node, ast.For):
            parts = [node.iter]
        elif isinstance(node, ast.With):
            parts = node.items
        count = 0
        for part in parts:
            for inner in ast.walk(part):
                if isinstance(inner, FOLDED):
                    count += len(getattr(inner, "generators", (None,)))
        if count > 1:
            yield node.lineno


@pytest.mark.parametrize("folder", ["timm_branches", "recipes"])
def test_statements_are_read_once(folder):
    lines = []
    for file in sorted((ROOT / folder).rglob("*.py")):
        tree = ast.parse(file.read_text())
        lines += [f"{file.relative_to(ROOT)}:{line}" for line in folded(tree)]
    assert lines == []


def test_folded_statements_are_found():
    """What the test above rests on."""
    code = "a = [b if c else d for b in e]\nf = [g for h in i for g in h]\nj = [k for k in l]\n"
    assert list(folded(ast.parse(code))) == [1, 2]
