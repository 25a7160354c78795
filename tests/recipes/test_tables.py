"""People's tables through a recipe: what is said, what is kept, what is refused in one line."""

import numpy as np
import pytest
from PIL import Image

from tests.recipes.script import RECIPES, run_recipe
from timm_branches import load_model

BCNN = RECIPES / "bcnn.py"
QUICK = ["--model", "test_resnet", "--epochs", "1", "-b", "4", "--no-flat", "--no-plots"]


@pytest.fixture
def table(tmp_path):
    """40 grey scans of 12 bits with a table that has more columns than levels."""
    rng = np.random.default_rng(0)
    lines = [",wo,photographer,reich,art,teil"]
    for i in range(40):
        pixels = rng.integers(0, 4096, (32, 32)).astype(np.uint16)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
        kind, species = [("animal", "cat"), ("animal", "dog"), ("plant", "moss")][i % 3]
        part = "test" if i % 5 == 0 else "train"
        lines.append(f"{i},{i}.png,me{i % 2},{kind},{species},{part}")
    path = tmp_path / "list.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


COLUMNS = ["--path-column", "wo", "--levels", "reich", "art", "--split-column", "teil"]


def test_columns_and_range(table, tmp_path):
    output = tmp_path / "run"
    arguments = [str(table), *QUICK, *COLUMNS, "--in-chans", "1", "--value-range", "0", "4095"]
    arguments += ["--class-weights", "sqrt", "--sampler", "balanced", "--balance-level", "reich"]
    done = run_recipe(BCNN, *arguments, "--output", str(output), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "photographer as no level (not asked for)" in done.stdout
    assert "train: " in done.stdout
    assert "test: 8 images of 3 classes" in done.stdout
    assert done.stdout.index("levels, with their classes: reich (2), art (3)") < done.stdout.index(
        "epoch 1/1"
    )
    model = load_model(next(output.rglob("model.safetensors")))
    assert model.data_summary["levels"] == {"reich": 2, "art": 3}
    assert list(model.pretrained_cfg["value_range"]) == [0, 4095]


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        (lambda t: t, ["--levels", "kind"], "no column 'kind'"),
        (lambda t: t.replace("3.png", "nowhere.png"), COLUMNS, "line 5: there is no file"),
        (lambda t: t.replace("cat", "cat, wild", 1), COLUMNS, "line 2: 7 cells"),
        (lambda t: t.replace(",test", ",somewhere", 1), COLUMNS, "line 2: 'somewhere'"),
        (lambda t: t, [*COLUMNS, "--balance-level", "art"], "no effect without --sampler"),
    ],
)
def test_refused_in_one_line(table, tmp_path, change, arguments, message):
    table.write_text(change(table.read_text()))
    output = str(tmp_path / "run")
    done = run_recipe(
        BCNN, str(table), *QUICK, "--in-chans", "1", *arguments, "--output", output, cwd=tmp_path
    )
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
