"""Stopping on a signal (Ctrl-C, a cluster's notice) without losing more than the current batch."""

import logging
import signal
import threading
from types import FrameType
from typing import Any

__all__ = ["StopSignals"]

_logger = logging.getLogger(__name__)
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopSignals:
    """Remembers that SIGINT or SIGTERM came, so that a training can stop where nothing is lost.

    A second signal ends the process at once. Handlers of others stay: only the system's and
    Python's own are replaced, in the main thread, between `__enter__` and `__exit__`.

    Attributes:
        received: Number of the first signal; None before one.

    Example:
        >>> with StopSignals() as signals:
        ...     signals.received is None
        True
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                handler = signal.getsignal(number)
                if handler in (signal.SIG_DFL, signal.default_int_handler):
                    self._before[number] = handler
                    signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.received = number
        _logger.warning(
            "%s: the current batch is finished and saved (a second signal ends at once).",
            signal.Signals(number).name,
        )

    def end(self) -> BaseException:
        """What to raise when everything is saved.

        A KeyboardInterrupt, or a SystemExit with the status 128 + signal (143 for SIGTERM).
        """
        if self.received == signal.SIGINT:
            return KeyboardInterrupt()
        assert self.received is not None
        return SystemExit(128 + self.received)
