"""A recipe as a user starts it, and what it prints."""

import os
import re
import subprocess
import sys
from pathlib import Path

RECIPES = Path(__file__).resolve().parents[2] / "recipes"


def run_recipe(path, *args, cwd, launcher=()):
    """Run the script in a process of its own, on the CPU."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "MPLBACKEND": "agg"}
    command = [sys.executable, *launcher, str(path), *map(str, args)]
    return subprocess.run(
        command, cwd=cwd, env=env, capture_output=True, text=True, timeout=600, check=False
    )


def read_table(text):
    """The last printed table.

    Titles of its columns, and {row: numbers}, None for a dash; means of "mean ± spread".
    """
    lines = text.splitlines()
    rules = [i for i, line in enumerate(lines) if line and set(line) == {"-"}]
    if not rules:
        return [], {}
    rows = {}
    for line in lines[rules[-1] + 1 :]:
        name, *cells = re.split(r"\s{2,}", line.strip())
        if not name:
            break
        rows[name] = [None if cell == "-" else float(cell.split(" ± ")[0]) for cell in cells]
    return re.split(r"\s{2,}", lines[rules[-1] - 1].strip()), rows
