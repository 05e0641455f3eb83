"""Leaving a run on SIGTERM or Ctrl-C with everything saved."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


class StopRequestedError(Exception):
    """The run was asked to stop (SIGTERM, Ctrl-C), has saved a checkpoint and leaves."""

    def __init__(self, signal_name: str, step: int) -> None:
        super().__init__(f"{signal_name} after step {step}")
        self.signal_name = signal_name
        self.step = step


class StopSignals:
    """Remembers the first SIGTERM or Ctrl-C; a second one has its usual effect at once."""

    def __init__(self) -> None:
        self.received: str | None = None
        self._previous: dict[int, Any] = {}

    def install(self) -> None:
        """Take over the signals, if this is the main thread (elsewhere Python does not allow it)."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._remember)

    def restore(self) -> None:
        """Give the signals back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)
