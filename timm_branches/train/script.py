"""What every recipe does around its main: say what it ran on, and tell a person's mistakes on one line."""

import platform
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

__all__ = ["hardware", "run_script"]


def hardware(device: torch.device) -> str:
    """What the numbers were made on."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    return f"{torch.get_num_threads()} CPU threads ({platform.machine()}), torch {torch.__version__}"


def run_script(main: Callable[[], None]) -> None:
    """Run a script's main; what a person got wrong becomes one line and exit status 2."""
    try:
        main()
    except (ValueError, OSError, FloatingPointError, ImportError) as error:
        # the table of taps in such a message has several lines
        text = " | ".join(" ".join(line.split()) for line in str(error).splitlines())
        print(f"{Path(sys.argv[0]).name}: {text}", file=sys.stderr)
        sys.exit(2)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
