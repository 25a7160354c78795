"""The code that README and docs show runs, as it stands there, and their links lead somewhere."""

import ast
import doctest
import importlib
import pkgutil
import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import timm_branches
from timm_branches.cli import make_parser

ROOT = Path(__file__).parents[2]
DOCS = [page for page in ROOT.glob("docs/**/*.md") if "_build" not in page.parts]
PAGES = sorted([*ROOT.glob("*.md"), *DOCS, *ROOT.glob("benchmarks/*.md")])
# ```python is run; so is the set-up that a page needs but does not show, <!-- python ... -->
BLOCK = re.compile(
    r"^(?:```(?P<kind>python|pycon)\n(?P<code>.*?)^```|<!-- python\n(?P<hidden>.*?)^-->)",
    re.MULTILINE | re.DOTALL,
)
LINK = re.compile(r"!?\[[^\]]*\]\((?!https?:)([^)#]*)(#[^)]*)?\)")
COMMAND = re.compile(r"^(?:\$ )?(?:python|torchrun --nproc-per-node \d+) (recipes/\w+\.py)(.*)$")
# of the console; a recipe's flags follow its name
SHELL = re.compile(r"^```bash\n(.*?)^```", re.MULTILINE | re.DOTALL)
CONSOLE = re.compile(r"(?:^|\| )timm-branches (.*)")
SCRIPTS = sorted(ROOT.glob("recipes/*.py"))


def name_of(page):
    return str(page.relative_to(ROOT))


def anchors(page):
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.fixture
def registries():
    """What an example adds to a registry goes again: other tests would meet it."""
    found = []
    # all are imported first: what a module registers when it is imported stays
    for info in pkgutil.walk_packages(timm_branches.__path__, "timm_branches."):
        if not info.name.endswith("__main__"):
            values = vars(importlib.import_module(info.name))
            found += [v for k, v in values.items() if k.isupper() and isinstance(v, dict)]
    before = [dict(registry) for registry in found]
    yield
    for registry, entries in zip(found, before, strict=True):
        registry.clear()
        registry.update(entries)


@pytest.mark.parametrize("page", [p for p in PAGES if BLOCK.search(p.read_text())], ids=name_of)
def test_code(page, tmp_path, monkeypatch, registries):
    monkeypatch.chdir(tmp_path)  # an example may write a file
    text = page.read_text()
    namespace = {"__name__": "__page__"}
    for block in BLOCK.finditer(text):
        line = text.count("\n", 0, block.start()) + 1
        if block["kind"] == "pycon":
            test = doctest.DocTestParser().get_doctest(
                block["code"], namespace, name_of(page), name_of(page), line
            )
            assert doctest.DocTestRunner().run(test, clear_globs=False).failed == 0
            namespace.update(test.globs)
        else:
            code = block["code"] or block["hidden"]
            # blank lines in front, so that an error names the page's own line
            exec(compile("\n" * line + code, name_of(page), "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links(page):
    for target, anchor in LINK.findall(page.read_text()):
        file = page if not target else (page.parent / target).resolve()
        assert file.exists(), f"{name_of(page)} links to {target}"
        if anchor:
            assert anchor[1:] in anchors(file), f"{name_of(page)} links to {target}{anchor}"


def help_of(script):
    """What a script says of itself."""
    return ast.get_docstring(ast.parse(script.read_text()))


def commands():
    """Every recipe's command in a page or a script's help, as (page, script, arguments)."""
    result = []
    texts = {page: page.read_text() for page in PAGES}
    texts |= {script: textwrap.dedent(help_of(script)) for script in SCRIPTS}
    for page, text in texts.items():
        for line in text.replace("\\\n", " ").split("\n"):
            match = COMMAND.match(line.strip() if page in SCRIPTS else line)
            if match:
                arguments = shlex.split(match[2], comments=True)
                result.append((name_of(page), match[1], arguments))
    for page, arguments in console_commands():
        if arguments[0] in ("train", "check") and arguments[1:2] and runs_recipe(arguments[1]):
            flags = arguments[2:]
            if "--config" in flags:  # a file of an earlier run
                del flags[flags.index("--config") : flags.index("--config") + 2]
            result.append((page, f"recipes/{arguments[1]}.py", flags))
    return result


def runs_recipe(name):
    return any(script.stem == name for script in SCRIPTS)


def console_commands():
    """Every line of the console in a page, as (page, arguments)."""
    found = []
    for page in PAGES:
        for block in SHELL.findall(page.read_text()):
            for line in block.replace("\\\n", " ").split("\n"):
                for command in CONSOLE.findall(line):
                    found.append((name_of(page), shlex.split(command, comments=True)))
    return found


def test_console_commands(capsys):
    """Those that no recipe reads."""
    shown = console_commands()
    assert len(shown) > 20
    for page, arguments in shown:
        if arguments[0] in ("train", "check") and arguments[1:2] and runs_recipe(arguments[1]):
            continue
        try:
            make_parser().parse_args(arguments)
        except SystemExit:
            pytest.fail(f"{page}: timm-branches {shlex.join(arguments)}: {capsys.readouterr().err}")


@pytest.mark.parametrize("script", SCRIPTS, ids=name_of)
def test_help_shows_a_command_a_line(script):
    """So that one can be copied; a rewrapped text would run them together."""
    shown = [command for command in commands() if command[0] == name_of(script)]
    assert len(shown) > 3
    assert len(shown) == help_of(script).count(f"recipes/{script.name}")


def test_commands():
    """The flags of every command shown exist; nothing is trained."""
    code = (
        "import argparse, runpy, sys\n"
        "class Parsed(BaseException): pass\n"
        "parse = argparse.ArgumentParser.parse_args\n"
        "def stop(self, *args):\n"
        "    parse(self, *args)\n"
        "    raise Parsed\n"
        "argparse.ArgumentParser.parse_args = stop\n"
        "failed = 0\n"
        "for page, script, arguments in eval(sys.argv[1]):\n"
        "    sys.argv = [script, *arguments]\n"
        "    try:\n"
        "        runpy.run_path(script, run_name='__main__')\n"
        "    except Parsed:\n"
        "        continue\n"
        "    except SystemExit:\n"
        "        pass\n"
        "    failed = 1\n"
        "    print(page, script, arguments)\n"
        "sys.exit(failed)\n"
    )
    # the ablation reads its own flags and leaves the recipe's to the recipe: see its tests
    shown = [command for command in commands() if not command[1].endswith("ablate.py")]
    assert len(shown) > 10
    done = subprocess.run(
        [sys.executable, "-c", code, repr(shown)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) < 200
