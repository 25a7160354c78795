"""The site of the documentation: `python -m sphinx -W --keep-going -b html docs docs/_build`."""

import re
from pathlib import Path

import timm_branches

ROOT = Path(__file__).parents[1]
# a page links what lies outside docs/ as GitHub wants it, ../README.md; the site links there
OUTSIDE = re.compile(r"\]\((?:\.\./)+(?!(?:[\w-]+/)*[\w-]+\.(?:png|svg)\))([^)]*)\)")
SOURCE = "https://github.com/timm-branches/timm_branches"

project = "timm_branches"
author = copyright = "The timm_branches maintainers"
release = version = timm_branches.__version__

extensions = [
    "myst_nb",  # brings myst_parser, for pages and notebooks
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # a test runs the notebook; the page shows what is stored in it

default_role = "code"  # the docstrings have single backticks
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_member_order = "groupwise"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 88
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

html_theme = "furo"
html_title = f"timm_branches {release}"
html_theme_options = {
    "source_repository": SOURCE,
    "source_branch": "main",
    "source_directory": "docs/",
}


def link_outside(app, docname, source):
    """Lead links that leave docs/ to the repository; those between pages stay as they are."""
    folder = (Path(app.srcdir) / docname).parent

    def replace(match):
        text, target = match[0], match[0][2:-1]
        path, _, anchor = target.partition("#")
        file = (folder / path).resolve()
        if file.is_relative_to(app.srcdir):
            return text
        kind = "tree" if file.is_dir() else "blob"
        end = f"#{anchor}" if anchor else ""
        return f"]({SOURCE}/{kind}/main/{file.relative_to(ROOT)}{end})"

    source[0] = OUTSIDE.sub(replace, source[0])


def setup(app):
    """What Sphinx calls."""
    app.connect("source-read", link_outside)
