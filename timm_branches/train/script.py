"""What every recipe does around its main.

Find a folder, say what it ran on, tell a person's mistakes on one line.
"""

import logging
import math
import os
import platform
import re
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from timm.utils import get_outdir
from tqdm import tqdm

from timm_branches.train.process import is_primary

# what gloo says when the other end of a connection has gone; NCCL has an exception of its own
_LOST_PROCESS = ("by peer", "Timed out waiting", "Broken pipe", "Connection refused")

__all__ = ["hardware", "nan_to_null", "new_output", "run_script", "setup_logging", "slug"]


def new_output(output: str | os.PathLike, resume: str) -> Path:
    """The folder of a script's runs, made where it is missing.

    Beside older runs, which stay as they are, a new one.

    Args:
        output: The folder that was asked for.
        resume: What is to be resumed; if anything, older runs are gone on with.
    """
    holder = [os.fspath(output)]
    path = Path(output)
    if is_primary() and not resume and any(any(path.glob(log)) for log in ("log.csv", "*/log.csv")):
        holder = [get_outdir(str(path.parent), path.name, inc=True)]
    if dist.is_initialized():
        dist.broadcast_object_list(holder)
    Path(holder[0]).mkdir(parents=True, exist_ok=True)
    return Path(holder[0])


def hardware(device: torch.device) -> str:
    """What the numbers were made on."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    count = torch.get_num_threads()
    return f"{_cpu_name()} ({count} thread{'s' * (count > 1)}), torch {torch.__version__}"


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(
                line.split(":", 1)[1].strip() for line in file if line.startswith("model name")
            )
    except (OSError, StopIteration):  # no Linux, or none that says so
        return platform.processor() or platform.machine()


class _BesideBars(logging.Handler):
    """Writes each message to standard output, above a progress bar where there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stdout)
        sys.stdout.flush()


def setup_logging(level: int = logging.INFO) -> None:
    """Show what the package says (an epoch's line, a warning) as plain lines on standard output.

    Args:
        level: The least level that is shown.
    """
    logger = logging.getLogger("timm_branches")
    logger.setLevel(level)
    if not any(isinstance(handler, _BesideBars) for handler in logger.handlers):
        logger.addHandler(_BesideBars())


def _end(error: Exception) -> NoReturn:
    # the table of taps in such a message has several lines
    text = " | ".join(" ".join(line.split()) for line in str(error).splitlines())
    print(f"{Path(sys.argv[0]).name}: {text}", file=sys.stderr)
    sys.exit(2)


def run_script(main: Callable[[], None]) -> None:
    """Run a script's main; what a person got wrong becomes one line and exit status 2."""
    setup_logging()
    try:
        main()
    except ModuleNotFoundError as error:
        if str(error).startswith("No module named"):
            error.msg += ": pip install 'timm_branches[recipes]' brings what the recipes need"
        _end(error)
    except (ValueError, OSError, FloatingPointError, ImportError) as error:
        _end(error)
    except RuntimeError as error:
        if _is_lost_process(error):
            print(
                f"{Path(sys.argv[0]).name}: process {dist.get_rank()} stops, since another of the "
                f"{dist.get_world_size()} ended or is out of reach; the other's message says why.",
                file=sys.stderr,
            )
            sys.exit(1)
        # torch says that a worker died wherever the main process is just then
        if not str(error).startswith("DataLoader worker"):
            raise
        _end(error)
    except KeyboardInterrupt:
        print(f"{Path(sys.argv[0]).name}: interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    # not after an error: it would wait for processes that wait for this one
    if dist.is_initialized():
        dist.destroy_process_group()


def _is_lost_process(error: RuntimeError) -> bool:
    """Whether torch says that it waits in vain for another process."""
    if not dist.is_initialized():
        return False
    return isinstance(error, dist.DistError) or any(sign in str(error) for sign in _LOST_PROCESS)


def nan_to_null(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics as JSON knows them: what could not be measured is null.

    Example:
        >>> nan_to_null({'top1': 50.0, 'severity': float('nan')})
        {'top1': 50.0, 'severity': None}
    """
    values = dict(metrics)
    for name, value in metrics.items():
        if isinstance(value, float) and math.isnan(value):
            values[name] = None
    return values


def slug(name: str) -> str:
    """A folder's name of a method's.

    Example:
        >>> slug('B-CNN, best path')
        'b_cnn_best_path'
    """
    return "_".join(re.findall(r"\w+", name.lower()))
