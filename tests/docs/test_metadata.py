"""What a package's page shows: whole links, addresses and pictures."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_readme_of_the_package_has_no_relative_link():
    command = [sys.executable, "setup.py", "-q", "--long-description"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "# timm_branches" in done.stdout
    targets = re.findall(r"\]\(([^)]*)\)", done.stdout)
    assert len(targets) > 10
    assert [target for target in targets if not target.startswith("https://")] == []
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]*)\)", done.stdout)
    assert pictures
    assert all(picture.startswith("https://raw.githubusercontent.com/") for picture in pictures)
    for target in targets:  # and each is a file of the repository, where it says so
        own = re.match(r"https://[\w.]+/timm-branches/timm_branches/(?:blob/)?main/([^#]*)", target)
        assert own is None or (ROOT / own[1]).exists(), target
