"""The notebook runs from top to bottom, in a kernel of its own."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted(ROOT.glob("docs/notebooks/*.ipynb"))


def printed(notebook):
    """What the cells print, cell by cell; warnings on stderr are the machine's."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return [output.text for output in outputs if output.get("name") == "stdout"]


def pictures(notebook):
    """How many pictures the cells draw."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return sum("image/png" in output.get("data", {}) for output in outputs)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebook(path, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    stored = nbformat.read(path, as_version=4)
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    assert pictures(notebook) == pictures(stored) > 0
    # the last cell that prints says what was learned, which may differ between machines
    assert printed(notebook)[:-1] == printed(stored)[:-1]
    assert "full path right: more than half" in printed(notebook)[-1]


def test_notebooks_are_small():
    assert NOTEBOOKS
    for path in NOTEBOOKS:
        assert path.stat().st_size < 60_000
