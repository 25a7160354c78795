"""`timm-branches`: train by recipe, look at backbones, trees and models, and let a model answer."""

import argparse
import json
import os
import sys
from collections.abc import Callable

from timm_branches.cli import calibrate, check, evaluate, predict, recipes, suggest_taps
from timm_branches.cli.text import printable

__all__ = ["main"]


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status.

    0 is success, 1 that some images could not be read, 2 (and one line on stderr) is for what a
    person got wrong.
    """
    parser = make_parser()
    given = list(sys.argv[1:] if argv is None else argv)
    if given[:1] == ["train"] and given[1:] in ([], ["-h"], ["--help"]):
        given = ["recipes", "list"]  # each of them has help of its own
    if given[:1] == ["check"] and given[1:] not in ([], ["-h"], ["--help"]):
        return _catch(lambda: check.run(given, parser))
    if given[:1] == ["ablate"]:  # its first word may be a flag, which argparse would take for ours
        given = ["train", *given]
    args = parser.parse_args(given)
    if args.command is None and not args.version:
        parser.error("name a command.")
    return _catch(lambda: _run(args))


def _catch(command: Callable[[], int]) -> int:
    """The exit status of a command; what a person got wrong becomes one line."""
    try:
        return command()
    # whoever read the output has seen enough; Python must not find out again on its way out
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError, ImportError) as error:
        print(f"timm-branches: {printable(' '.join(str(error).split()))}", file=sys.stderr)
        return 2


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="timm-branches", description=__doc__)
    parser.add_argument("--version", action="store_true", help="print versions and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    recipes.add_parsers(commands)
    predict.add_parser(commands)
    evaluate.add_parser(commands)
    calibrate.add_parser(commands)
    suggest_taps.add_parser(commands)
    check.add_parser(commands)
    export = commands.add_parser("export", help="write a model as ONNX or for torch.export")
    export.add_argument("model", help="model.safetensors, a folder, or hf-hub:user/name")
    export.add_argument("output", help="the file to write: .onnx or .pt2")
    export.add_argument("--frames", type=int, metavar="T", help="of clips: how many frames one has")
    export.add_argument("--decoder", help="put it inside: labels and probabilities of a path")
    commands.add_parser("list", help="recipes, backbones, trees, heads and decoders")
    tree = commands.add_parser("tree", help="draw a tree as text")
    tree.add_argument("tree", help="a ready-made tree's name, a .csv or .json, or class folders")
    taps = commands.add_parser("taps", help="stages of a backbone: module, channels, stride")
    taps.add_argument("model", help="any timm architecture")
    info = commands.add_parser("info", help="what a model's file says of itself")
    info.add_argument("file", help="model.safetensors")
    completion = commands.add_parser("completion", help="print a shell's completion script")
    completion.add_argument("shell", choices=("bash", "zsh", "tcsh"))
    return parser


def _run(args: argparse.Namespace) -> int:
    if args.command == "train":
        recipes.run_recipe(args.recipe, args.arguments)
    elif args.command == "recipes":
        _recipes(args)
    elif args.command == "predict":
        return predict.run(args)
    elif args.command == "evaluate":
        return evaluate.run(args)
    elif args.command == "calibrate":
        calibrate.run(args)
    elif args.command == "suggest-taps":
        suggest_taps.run(args)
    elif args.command == "export":
        _export(args)
    elif args.command == "list":
        _list()
    elif args.command == "tree":
        from timm_branches.taxonomy import get_taxonomy

        print(get_taxonomy(args.tree))
    elif args.command == "taps":
        from timm_branches import list_taps

        print(list_taps(args.model))
    elif args.command == "info":
        _info(args.file)
    elif args.command == "completion":
        _completion(args.shell)
    else:
        _versions()
    return 0


def _recipes(args: argparse.Namespace) -> None:
    if args.action == "copy":
        print(recipes.copy_recipe(args.name, args.to))
        return
    for name, line in recipes.list_recipes().items():
        print(f"{name:10} {line}")


def _export(args: argparse.Namespace) -> None:
    from timm_branches.factory import load_model
    from timm_branches.inference.export import export_model

    model = load_model(args.model)
    written = export_model(model, args.output, args.frames, args.decoder)
    if model.calibration is not None:
        print(
            "timm-branches: the calibration is no part of what is written: its logits, and a "
            "decoder's probabilities, are those of the network.",
            file=sys.stderr,
        )
    name, shape = written.input
    print(f"{written.path}: {name} ({', '.join(map(str, shape))}) -> {', '.join(written.outputs)}")
    print(f"Compared with the model: at most {written.difference:.1e} of the largest output off.")


def _list() -> None:
    from timm_branches import backbones
    from timm_branches.heads import HEADS
    from timm_branches.hierarchy.decode import DECODERS
    from timm_branches.taxonomy.trees import TREES

    presets = []
    for name in recipes.list_recipes():
        presets += [f"{name} --recipe {preset}" for preset in recipes.list_presets(name)]
    own = [name for name in backbones.__all__ if name.islower()]
    for title, names in (
        ("recipes", list(recipes.list_recipes())),
        ("presets", presets),
        ("backbones", [*own, "and every architecture of timm (timm.list_models())"]),
        ("trees", list(TREES)),
        ("heads", list(HEADS)),
        ("decoders", list(DECODERS)),
    ):
        print(f"{title + ':':10} {', '.join(names)}")


def _info(file: str) -> None:
    from timm_branches.weights import read_metadata

    metadata = read_metadata(file)
    if metadata is None:
        raise ValueError(f"{file} is a safetensors file but not one of timm_branches.")
    config = json.loads(metadata["config"])
    kept = {"extra": json.loads(metadata["extra"])}
    if "calibration" in metadata:
        kept["calibration"] = json.loads(metadata["calibration"])
        kept["calibration"].pop("confidences", None)  # up to a thousand numbers
    print(json.dumps({**config, **kept}, indent=2))


def _completion(shell: str) -> None:
    try:
        import shtab
    except ImportError:
        raise ImportError(
            "completion needs shtab: pip install 'timm_branches[completion]'."
        ) from None
    print(shtab.complete(make_parser(), shell))


def _versions() -> None:
    from importlib.metadata import version

    names = ("timm_branches", "timm", "torch", "torchvision", "albumentations", "safetensors")
    print(", ".join(f"{name} {version(name)}" for name in names))
