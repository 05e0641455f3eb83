"""What `pldr-train tokenizer train` shows while it reads and trains."""

from __future__ import annotations

import os
import resource
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, TextIO, TypeVar

from tqdm import tqdm

from pldr_train.data.tokenizer.line_sample import LineSample
from pldr_train.printing import can_show_a_bar, format_seconds

READING_EVERY_S = 5.0
TRAINING_EVERY_S = 15.0
EXIT_INTERRUPTED = 130
_JOIN_S = 0.5
_T = TypeVar("_T")


class ReadingProgress:
    """A moving bar of documents in a terminal, a line every few seconds elsewhere.

    Args:
        documents: how many will be read.
        stream: where to.
        clock: seconds, monotonic.
    """

    def __init__(
        self, documents: int, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._documents, self._stream, self._clock = documents, stream or sys.stdout, clock
        self._begun_at = self._said_at = clock()
        self._bar: Any = None
        if can_show_a_bar(self._stream):
            self._bar = tqdm(total=documents, file=self._stream, unit="doc", dynamic_ncols=True, leave=False)

    def advance(self, read: int, sample: LineSample) -> None:
        """So many documents are read, and this is what was kept of them."""
        now = self._clock()
        text = f"{sample.num_bytes_seen / 1e6:,.0f} MB read, {sample.num_lines:,} lines kept"
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(read - self._bar.n)
        elif now - self._said_at >= READING_EVERY_S:
            self._said_at = now
            left = format_seconds((now - self._begun_at) / read * (self._documents - read))
            print(f"reading     {read:,} of {self._documents:,} documents, {text}, {left} left", file=self._stream)
            self._stream.flush()

    def end(self) -> None:
        """All is read, or left."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def with_heartbeat(
    action: Callable[[], _T], stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic
) -> _T:
    """Run `action` in a thread, showing the time and the memory it takes; its value, or what it raised.

    An interrupt ends the process with exit code 130, at once.
    """
    stream = stream or sys.stdout
    outcome: list[_T] = []
    failure: list[BaseException] = []

    def work() -> None:
        try:
            outcome.append(action())
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        _show_until_it_ends(thread, stream, clock)
    except KeyboardInterrupt:
        # SentencePiece cannot be stopped, and Python's orderly end would abort amid its threads. Nothing is unsaved.
        print("stopped", file=sys.stderr, flush=True)
        stream.flush()
        os._exit(EXIT_INTERRUPTED)
    if failure:
        raise failure[0]
    return outcome[0]


def _show_until_it_ends(thread: threading.Thread, stream: TextIO, clock: Callable[[], float]) -> None:
    begun_at = said_at = clock()
    moving, width = can_show_a_bar(stream), 0
    while thread.is_alive():
        thread.join(_JOIN_S)
        now = clock()
        if now - said_at >= (1.0 if moving else TRAINING_EVERY_S):
            said_at = now
            text = (
                f"training    {format_seconds(now - begun_at)}, {_peak_bytes() / 1e9:.1f} GB of memory at most so far"
            )
            print(f"\r{text}" if moving else text, end="" if moving else "\n", file=stream, flush=True)
            width = len(text)
    if moving and width:
        print("\r" + " " * width, end="\r", file=stream, flush=True)


def _peak_bytes() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
