"""Leaving a run on SIGTERM, Ctrl-C or SIGHUP (its terminal was closed) with everything saved."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
SIGNAL_NAMES = tuple(number.name for number in _NUMBERS)
_AT_THE_SECOND: dict[int, Any] = {
    signal.SIGTERM: signal.SIG_DFL,
    signal.SIGINT: signal.default_int_handler,
    signal.SIGHUP: signal.SIG_IGN,
}


class StopRequestedError(Exception):
    """The run was asked to stop (see `StopSignals`), has saved a checkpoint and leaves."""

    def __init__(self, signal_name: str, step: int) -> None:
        super().__init__(f"{signal_name} after step {step}")
        self.signal_name = signal_name
        self.step = step


class StopSignals:
    """Remembers the first SIGTERM, Ctrl-C or SIGHUP; a second one has its usual effect at once.

    A second SIGHUP has none: a terminal that closes sends it twice, once by the shell and once by the system. Where
    SIGHUP is ignored (nohup) it stays so.

    Args:
        deadline_s: so long after the first one the process leaves without having saved; None: never.
        leave: ends this process; for tests.
    """

    def __init__(self, deadline_s: float | None = None, leave: Callable[[int], Any] = os._exit) -> None:
        self.received: str | None = None
        self._previous: dict[int, Any] = {}
        self._deadline_s, self._leave = deadline_s, leave
        self._timer: threading.Timer | None = None
        self._is_saving = False

    def install(self) -> None:
        """Take over the signals, if this is the main thread (elsewhere Python does not allow it)."""
        if threading.current_thread() is threading.main_thread():
            for number in _NUMBERS:
                if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._remember)

    def restore(self) -> None:
        """Give the signals back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()
        self.lift_deadline()

    def lift_deadline(self) -> None:
        """Wait as long as it takes."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    @contextmanager
    def saving(self, then_leaves: bool) -> Iterator[None]:
        """A save takes as long as it takes, also if the signal comes in its midst; the deadline begins after it.

        Args:
            then_leaves: the run leaves after this save, and needs no deadline any more.
        """
        self._is_saving = True  # first: a signal from here on begins no deadline
        self.lift_deadline()
        try:
            yield
        finally:
            self._is_saving = False
            if self.received is not None and not then_leaves:
                self._begin_deadline(int(signal.Signals[self.received]))

    def _begin_deadline(self, number: int) -> None:
        if self._deadline_s is not None:
            self._timer = threading.Timer(self._deadline_s, self._too_late, (number,))
            self._timer.daemon = True
            self._timer.start()

    def note(self, number: signal.Signals) -> None:
        """Take a signal that came before `install` as one that comes now."""
        self._remember(number, None)

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
        if not self._is_saving:
            self._begin_deadline(number)
        signal.signal(number, _AT_THE_SECOND[number])

    def _too_late(self, number: int) -> None:
        name = signal.Signals(number).name
        print(
            f"error: {name} came {self._deadline_s:g} s ago (checkpoint.stop_deadline_s), and the step at whose end "
            "the run saves is not over: leaving without; the newest checkpoint is whole, the same command resumes",
            file=sys.stderr,
            flush=True,
        )
        self._leave(128 + number)
