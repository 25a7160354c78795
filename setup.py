"""What pyproject.toml cannot say: recipes travel inside the package; README's links are whole."""

import re
from pathlib import Path

from setuptools import find_packages, setup

SOURCE = "https://github.com/timm-branches/timm_branches/blob/main"
PICTURES = "https://raw.githubusercontent.com/timm-branches/timm_branches/main"
# ![text](docs/picture.svg) or [text](docs/page.md#heading), but not an address or a heading alone
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?![a-z]+:|#)([^)]*)\)")


def whole_link(match: re.Match[str]) -> str:
    """A relative link as an address: from a package's page it would lead nowhere."""
    mark, text, target = match.groups()
    return f"{mark}[{text}]({PICTURES if mark else SOURCE}/{target})"


setup(
    packages=[*find_packages(include=["timm_branches*"]), "timm_branches.recipes"],
    package_dir={"timm_branches.recipes": "recipes"},
    long_description=LINK.sub(whole_link, Path(__file__).with_name("README.md").read_text("utf-8")),
    long_description_content_type="text/markdown",
)
