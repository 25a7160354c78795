"""The command line of a recipe: short help and all of it, settings out of a file and into one."""

import argparse
import difflib
import os
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from timm_branches.files import atomic_write

__all__ = ["RecipeParser", "add_short_help"]

FILE_NAME = "config.yaml"
# what the short help of every recipe shows
_OF_ALL = (
    *("data", "batch_size", "workers", "model", "pretrained", "taps", "output", "epochs", "lr"),
    *("amp", "resume", "check", "check_only", "config"),
)
# what says how a run is called, not what it is
_NOT_KEPT = ("help", "help_all", "config", "resume")


class RecipeParser(argparse.ArgumentParser):
    """An argument parser whose settings can be kept in a file, as timm's train.py keeps its own.

    `--help` shows the flags in `common` on one screen, `--help-all` all of them. `--config FILE`
    reads settings; what stands on the command line wins over the file.

    Args:
        description: What the recipe does; its first paragraph and examples.
        common: Names of the arguments that most people need, beside those of all recipes (data,
            model, epochs and the like).

    Example:
        >>> parser = RecipeParser('Train something.', common=['epochs'])
        >>> _ = parser.add_argument('--epochs', type=int, default=20)
        >>> parser.parse_args(['--epochs', '3']).settings
        {'epochs': 3}
    """

    def __init__(self, description: str | None, common: Sequence[str]) -> None:
        super().__init__(
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            add_help=False,
        )
        add_short_help(self, (*_OF_ALL, *common))
        self.add_argument(
            "-c",
            "--config",
            metavar="FILE",
            help=f"settings of an earlier run, its {FILE_NAME}; flags win over it",
        )

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """As of argparse, with the file's settings before those that are given.

        `settings` of the namespace holds all of them, as :meth:`write` keeps them.
        """
        given = list(sys.argv[1:] if args is None else args)
        path = _config_of(given)
        if path is not None:
            given = [*self._arguments_of(read_settings(path), path), *given]
        parsed, rest = super().parse_known_args(given, namespace)
        parsed.settings = self._settings(parsed)
        return parsed, rest

    def _settings(self, parsed: argparse.Namespace) -> dict[str, Any]:
        settings = {}
        for action in self._actions:
            value = getattr(parsed, action.dest, None)
            if action.dest not in _NOT_KEPT and value is not None:
                settings[action.dest] = list(value) if isinstance(value, tuple) else value
        return settings

    def _arguments_of(self, settings: Mapping[str, Any], path: str) -> Iterator[str]:
        """Settings as they would be given on the command line, so that argparse checks them.

        Raises:
            ValueError: There is no such setting, or it takes no such value.
        """
        actions: dict[str, list[argparse.Action]] = {}
        for action in self._actions:
            if action.dest not in _NOT_KEPT:
                actions.setdefault(action.dest, []).append(action)
        for key, value in settings.items():
            name = str(key).replace("-", "_")
            if name not in actions:
                near = difflib.get_close_matches(name, actions, n=1)
                hint = f" Did you mean {near[0]}?" if near else ""
                raise ValueError(f"{path}: there is no setting {key!r}.{hint}")
            if value is not None:
                yield from self._one_argument(actions[name], name, value, path)

    def _one_argument(
        self, actions: list[argparse.Action], name: str, value: Any, path: str
    ) -> Iterator[str]:
        # beside a flag with a value there may be a short name for one of its values
        valued = [action for action in actions if action.nargs != 0]
        action, consts = actions[0], [action.const for action in actions]
        if valued:
            action, consts = valued[0], []
        is_switch = isinstance(action, argparse.BooleanOptionalAction) or consts in (
            [True],
            [False],
        )
        if is_switch != isinstance(value, bool):
            wanted = "true or false" if is_switch else "a value, not true or false"
            raise ValueError(f"{path}: {name} takes {wanted}, got {value!r}.")
        many = isinstance(value, list)
        items = value if many else [value]
        if any(isinstance(item, list | dict) for item in items) or (
            many and action.nargs in (None, "?")
        ):
            raise ValueError(f"{path}: {name} takes one value, got {value!r}.")
        if isinstance(action, argparse.BooleanOptionalAction):
            yield action.option_strings[0] if value else action.option_strings[-1]
        elif is_switch:
            if value == consts[0]:
                yield action.option_strings[-1]
        elif consts or not action.option_strings:
            # flags that exclude each other, and what has no flag: those given win over a default
            if consts and value not in consts:
                raise ValueError(f"{path}: {name} takes one of {consts}, got {value!r}.")
            self.set_defaults(**{name: value})
        elif many and not value:
            self.set_defaults(**{name: value})  # no flag says so
        elif many:
            yield from (action.option_strings[-1], *map(str, value))
        else:
            yield f"{action.option_strings[-1]}={value}"

    @staticmethod
    def write(args: argparse.Namespace, folder: str | os.PathLike) -> None:
        """Keep the settings of a run as `config.yaml` in its folder; the first process does.

        Args:
            args: What :meth:`parse_args` returned.
            folder: The run's folder.
        """
        # a command's help does not wait for torch
        import yaml

        from timm_branches.train.process import is_primary

        if not is_primary():
            return

        text = yaml.safe_dump(args.settings, allow_unicode=True, sort_keys=False)
        head = f"# {shlex.join(['python', *sys.argv])}\n".encode(errors="backslashreplace")
        atomic_write(os.path.join(folder, FILE_NAME), head + text.encode())


def add_short_help(parser: argparse.ArgumentParser, common: Sequence[str]) -> None:
    """Give a parser without help a `--help` of one screen, and `--help-all`.

    Args:
        parser: The parser, made with `add_help=False`.
        common: Names of the arguments that `--help` shows.
    """
    parser.add_argument(
        "-h",
        "--help",
        action=_ShortHelp,
        nargs=0,
        const=tuple(common),
        help="what most people need",
    )
    parser.add_argument("--help-all", action="help", help="all flags")


def read_settings(path: str) -> dict[str, Any]:
    """The settings in a YAML file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no YAML, or no settings.
    """
    import yaml

    if not os.path.isfile(path):
        raise FileNotFoundError(f"--config {path}: there is no such file.")
    with open(path, encoding="utf-8") as file:
        try:
            settings = yaml.safe_load(file)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"--config {path} is no YAML file: {reason}") from None
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise ValueError(f"--config {path} holds no settings: write lines such as `epochs: 20`.")
    return settings


def _config_of(arguments: Sequence[str]) -> str | None:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("-c", "--config")
    return parser.parse_known_args(list(arguments))[0].config


class _ShortHelp(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, values: Any, option: Any = None) -> None:
        formatter = parser.formatter_class(parser.prog, max_help_position=32, width=100)
        shown = [action for action in parser._actions if action.dest in self.const]
        formatter.add_text((parser.description or "").split("\n\n")[0])
        formatter.start_section("what most people need (--help-all shows all flags)")
        formatter.add_arguments(shown)
        formatter.end_section()
        names = [action.dest.upper() for action in parser._actions if not action.option_strings]
        usage = " ".join([parser.prog, *names, "[FLAGS]"])
        print(f"usage: {usage}\n\n{formatter.format_help()}", end="")
        parser.exit()
