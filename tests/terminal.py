"""A terminal of a given size, and all that was shown in it."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO


class Terminal:
    """A pseudo-terminal that is written to."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.shown = ""
        """All that was shown; known once the terminal is closed."""


@contextmanager
def terminal(rows: int = 24, columns: int = 100) -> Iterator[Terminal]:
    """A terminal to write to; one of no rows has no known size, as in some remote consoles."""
    reader, writer = pty.openpty()
    if rows:
        fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    try:
        with os.fdopen(writer, "w") as stream:
            opened = Terminal(stream)
            yield opened
        opened.shown = _all_of(reader).decode()
    finally:
        os.close(reader)


def _all_of(reader: int) -> bytes:
    """One read gives what has arrived so far; only when the writer is closed and all is read does it fail."""
    parts = []
    while True:
        try:
            part = os.read(reader, 1 << 16)
        except OSError:  # EIO: Linux's word for the end
            part = b""
        if not part:
            return b"".join(parts)
        parts.append(part)
