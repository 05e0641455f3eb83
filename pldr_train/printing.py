"""What this program prints: texts from files made harmless, and output that cannot be written."""

from __future__ import annotations

import errno
import io
import logging
import os
import sys
import unicodedata
from contextlib import suppress
from typing import Any, Literal, NamedTuple, TextIO

_GONE = (errno.EPIPE, errno.EIO, errno.EBADF, errno.ENXIO, errno.ESTALE)
"""The reader has left, the terminal is closed, the descriptor is none: nothing can be written there ever again."""

_LOGGER = logging.getLogger("pldr_train")


class Terminal(NamedTuple):
    """Where a process prints the messages of the logger "pldr_train"; can be pickled for another process."""

    rank: int = 0
    """Of the process; any other than 0 prints nothing."""
    stream: Literal["stdout", "stderr"] = "stdout"


class _TerminalHandler(logging.Handler):
    """Prints messages to the standard output or standard error of the moment."""

    terminal = Terminal()

    def emit(self, record: logging.LogRecord) -> None:
        """Print the bare message. What cannot be written is dropped: no message is worth a run."""
        if self.terminal.rank == 0:
            with suppress(OSError, ValueError):  # the reader has left, the disk is full, or the stream is closed
                print(record.getMessage(), file=getattr(sys, self.terminal.stream), flush=True)


def log_to_terminal(rank: int = 0, stream: Literal["stdout", "stderr"] = "stdout") -> None:
    """Print the messages of the logger "pldr_train" from now on; a further call changes rank and stream.

    Messages of a level below INFO are left out, and those of a rank other than 0.
    """
    handler = _attached()
    if handler is None:
        handler = _TerminalHandler(logging.INFO)
        _LOGGER.addHandler(handler)
    handler.terminal = Terminal(rank, stream)
    if _LOGGER.level == logging.NOTSET:
        _LOGGER.setLevel(logging.INFO)


def log_to_terminal_by_default(rank: int) -> None:
    """Call `log_to_terminal`, unless the user has given "pldr_train" or the root logger a handler: it then decides."""
    if _attached() is not None or not _LOGGER.hasHandlers():
        log_to_terminal(rank)


def terminal_of_messages() -> Terminal | None:
    """Return where this process prints messages; None: `log_to_terminal` was not called."""
    handler = _attached()
    return None if handler is None else handler.terminal


def log_as_parent(terminal: Terminal | None) -> None:
    """Print messages as the process that started this one, whose `terminal_of_messages` is given.

    A forked process does so anyway.
    """
    if terminal is not None:
        log_to_terminal(*terminal)


def _attached() -> _TerminalHandler | None:
    return next((each for each in _LOGGER.handlers if isinstance(each, _TerminalHandler)), None)


def printable(text: str) -> str:
    """Return a text from a file without what would move the cursor or change colours of a terminal."""
    return "".join(each if each.isprintable() else "?" for each in text)


def printable_text(text: str) -> str:
    """Return a text of several lines without control characters; line ends and tabs stay."""
    return "".join("?" if unicodedata.category(each) == "Cc" and each not in "\n\t" else each for each in text)


def can_show_a_bar(stream: TextIO) -> bool:
    """Return whether the stream is a terminal of known height; some remote consoles give none, and tqdm then shows
    nothing.
    """
    try:
        return stream.isatty() and os.get_terminal_size(stream.fileno()).lines > 1
    except OSError:  # it was closed meanwhile
        return False


def format_seconds(seconds: float) -> str:
    """Days, hours, minutes and seconds, as short as they allow: 45s, 3:05, 2:03:04, 5d 02:00."""
    total = round(seconds)
    minutes, rest = divmod(total, 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d {hours:02}:{minutes:02}"
    if hours:
        return f"{hours}:{minutes:02}:{rest:02}"
    return f"{minutes}:{rest:02}" if minutes else f"{rest}s"


def prepare_standard_streams() -> None:
    """Let no text fail for its characters, and no file that is opened later become the standard output.

    Characters that the terminal's encoding lacks are written as escapes such as `\\u03b3`. Descriptors 0 to 2 that
    are closed (`>&-`) lead to the null device from now on.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free, which is this one
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            with suppress(OSError):  # it writes first what is still to be written
                stream.reconfigure(errors="backslashreplace")


def outlive_standard_streams() -> None:
    """Drop, from now on, what cannot be written to standard output or standard error.

    For what must not end because of its output: a training goes on when its terminal is closed, the reader of a pipe
    leaves or the disk of its log is full. Everything that looks up `sys.stdout` or `sys.stderr` takes part.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, _Forgiving):
            setattr(sys, name, _Forgiving(stream))


class _Forgiving:
    """A text stream whose writes do not fail; everything else is that of the stream below."""

    def __init__(self, stream: Any) -> None:
        # Python has none where the descriptor was closed from the start.
        self._stream = open(os.devnull, "w", encoding="utf-8") if stream is None else stream  # noqa: SIM115

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except OSError as error:
            self._give_up(error)
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        """Lead the descriptor to the null device where that is for ever; a full disk may have room again later."""
        if error.errno not in _GONE:
            return
        try:
            descriptor = self._stream.fileno()
        except (OSError, ValueError):
            return  # no descriptor below
        null = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(null, descriptor)
        finally:
            if null != descriptor:
                os.close(null)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def duration_text(seconds: float) -> str:
    """Return a time for people: its two largest units."""
    words: list[str] = []
    left = max(0, round(seconds))
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60), ("s", 1)):
        if left >= size or (unit == "s" and not words):
            words.append(f"{left // size} {unit}")
            left %= size
    return " ".join(words[:2])
