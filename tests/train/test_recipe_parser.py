"""Settings in a file and on the command line: what is written repeats the run."""

import argparse
import re
import runpy
import sys
from pathlib import Path

import pytest
import yaml

from timm_branches.train.recipe_parser import RecipeParser

ROOT = Path(__file__).parents[2]
NAMES = ("bcnn", "cnn_lstm", "denoise", "segment")
COMMANDS = {
    "bcnn": [
        [],
        ["photos", "--taps", "3", "4", "5", "--no-flat", "--lr", "1e-3"],
        ["--recipe", "bcnn-b-cifar10", "--weight-decay", "0.1"],
        ["--compare", "--seeds", "2", "--levels", "a b", "c"],
        ["--recipe", "modern-cifar10", "--no-amp"],
    ],
    "cnn_lstm": [
        [],
        ["videos", "--freeze", "all", "--sampling", "dense"],
        ["v", "--bidirectional"],
    ],
    "denoise": [[], ["--colour", "--sigma", "0", "50"], ["d", "--recipe", "train400-sigma25"]],
    "segment": [[], ["camvid", "--classes", "11", "--class-weights", "auto", "--crop", "64", "96"]],
}


def recipe(name):
    return runpy.run_path(str(ROOT / "recipes" / f"{name}.py"))


def write(path, settings):
    path.write_text(yaml.safe_dump(settings))
    return str(path)


@pytest.mark.parametrize(
    ("name", "command"), [(name, command) for name in NAMES for command in COMMANDS[name]]
)
def test_a_run_is_repeated_from_its_file(name, command, tmp_path):
    parse_args = recipe(name)["parse_args"]
    args = parse_args(command)
    RecipeParser.write(args, tmp_path)
    again = parse_args(["--config", str(tmp_path / "config.yaml")])
    before, after = vars(args), vars(again)
    for name, value in before.items():
        before[name] = list(value) if isinstance(value, tuple) else value
    assert after.pop("config") == str(tmp_path / "config.yaml")
    assert before.pop("config") is None
    assert before == after
    flags = parse_args(["-c", str(tmp_path / "config.yaml"), "--epochs", "77", "--model", "x"])
    assert (flags.epochs, flags.model) == (77, "x")


def test_flags_win():
    parser = make()
    args = parser.parse_args(["data", "-c", FILE, "--rate", "0.5", "--no-amp", "--taps", "9"])
    assert (args.rate, args.amp, args.taps, args.data) == (0.5, False, ["9"], "data")
    assert args.colour == 3
    assert args.verbose is True
    assert make().parse_args(["-c", FILE, "--grey"]).colour == 1


FILE = ""


@pytest.fixture(autouse=True)
def settings_file(tmp_path):
    global FILE
    settings = {"rate": 1e-3, "amp": True, "taps": [3, "4"], "data": "other", "colour": 3}
    settings |= {"verbose": True, "name": "-x y", "negative": -2.5, "none": None, "rate-2": "1e-3"}
    FILE = write(tmp_path / "settings.yaml", settings)


def make():
    parser = RecipeParser("What it does.\n\nAnd more.", ["rate"])
    parser.add_argument("data", nargs="?")
    parser.add_argument("--rate", type=float, default=0.1, help="of learning")
    parser.add_argument("--rate-2", type=float)
    parser.add_argument("--amp", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument("--verbose", action="store_true")
    parser.add_argument("--taps", nargs="+")
    parser.add_argument("--name")
    parser.add_argument("--none")
    parser.add_argument("--negative", type=float)
    colours = parser.add_mutually_exclusive_group()
    colours.add_argument("--grey", dest="colour", action="store_const", const=1, default=1)
    colours.add_argument("--rgb", dest="colour", action="store_const", const=3)
    return parser


def test_all_kinds_of_values():
    args = make().parse_args(["--config", FILE])
    assert args.settings == {
        "data": "other",
        "rate": 1e-3,
        "rate_2": 1e-3,
        "amp": True,
        "verbose": True,
        "taps": ["3", "4"],
        "name": "-x y",
        "negative": -2.5,
        "colour": 3,
    }


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rat": 1}, "there is no setting 'rat'. Did you mean rate?"),
        ({"amp": "yes"}, "amp takes true or false, got 'yes'"),
        ({"rate": True}, "rate takes a value"),
        ({"rate": [1, 2]}, "rate takes one value"),
        ({"rate": {"a": 1}}, "rate takes one value"),
        ({"colour": 2}, "colour takes one of [1, 3]"),
        ([1], "holds no settings"),
    ],
)
def test_refused(settings, message, tmp_path):
    path = write(tmp_path / "bad.yaml", settings)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        make().parse_args(["--config", path])
    assert path in str(error.value)


def test_no_yaml(tmp_path, capsys):
    (tmp_path / "bad.yaml").write_text("a: [1")
    with pytest.raises(ValueError, match="no YAML"):
        make().parse_args(["-c", str(tmp_path / "bad.yaml")])
    with pytest.raises(FileNotFoundError, match="no such file"):
        make().parse_args(["-c", str(tmp_path / "nose.yaml")])
    bad = write(tmp_path / "type.yaml", {"rate": "fast"})
    with pytest.raises(SystemExit):
        make().parse_args(["-c", bad])
    assert "--rate: invalid float value: 'fast'" in capsys.readouterr().err


@pytest.mark.parametrize("name", NAMES)
def test_help_of_one_screen(name, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [f"{name}.py"])
    parser = recipe(name)["make_parser"]()
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    text = capsys.readouterr().out
    assert text.count("\n") <= 40
    assert max(map(len, text.splitlines())) <= 100
    flags = {action.dest for action in parser._actions}
    (short,) = [action for action in parser._actions if action.dest == "help"]
    assert set(short.const) <= flags
    with pytest.raises(SystemExit):
        parser.parse_args(["--help-all"])
    everything = " ".join(capsys.readouterr().out.split())
    for action in parser._actions:
        assert all(option in everything for option in action.option_strings)
    # what the help calls a default is the recipe's own
    assert f"(default: {parser.get_default('output')})" in everything
