"""``timm-branches``: look at a backbone's taps or at a model's file."""

import argparse
import json
import sys

__all__ = ["main"]


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status (2 and one line on stderr for what a person got wrong)."""
    parser = argparse.ArgumentParser(prog="timm-branches", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    taps = commands.add_parser("taps", help="stages of a backbone: module, channels, stride")
    taps.add_argument("model", help="any timm architecture")
    info = commands.add_parser("info", help="what a model's file says of itself")
    info.add_argument("file", help="model.safetensors")
    args = parser.parse_args(argv)
    try:
        if args.command == "taps":
            from timm_branches import list_taps
            print(list_taps(args.model))
        else:
            from timm_branches.weights import read_metadata
            metadata = read_metadata(args.file)
            if metadata is None:
                raise ValueError(f"{args.file} is a safetensors file but not one of timm_branches.")
            config = json.loads(metadata["config"])
            print(json.dumps({**config, "extra": json.loads(metadata["extra"])}, indent=2))
    except (ValueError, FileNotFoundError) as error:
        print(f"timm-branches: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
