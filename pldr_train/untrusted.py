"""Files that a download, an editor or a crash may have damaged: read within limits of size, depth and kind.

A file that is no regular one is not opened for reading (a pipe could be waited for without end, a device has none), and
what it holds is checked for depth before anything walks through it. All trouble is an OSError or a ValueError, whose
message says what is wrong and leaves the path to the caller.
"""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from stat import S_ISREG
from typing import Any, BinaryIO

MOST_BYTES = 2**26
MOST_DEPTH = 100
"""Of lists and mappings in each other; far more than any file has that a program writes."""
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file; raises OSError, for anything else too."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return os.fdopen(descriptor, "rb")


def read_bytes(path: Path, most_bytes: int = MOST_BYTES, regular: bool = True) -> bytes:
    """Return what a file holds.

    Args:
        path: the file.
        most_bytes: it may have.
        regular: refuse pipes and devices. A file that the user names for its text may be `/dev/stdin`.

    Raises:
        OSError: it cannot be read, or is no regular file.
        ValueError: it is larger than `most_bytes`.
    """
    with open_regular(path) if regular else path.open("rb") as handle:
        content = handle.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise ValueError(f"more than {most_bytes:,} bytes")
    return content


def read_text(path: Path, most_bytes: int = MOST_BYTES, regular: bool = True) -> str:
    """Return the text in a file, without a byte-order mark; raises as `read_bytes`, and UnicodeDecodeError for no
    UTF-8.
    """
    return read_bytes(path, most_bytes, regular).removeprefix(_BYTE_ORDER_MARK).decode("utf-8")


def read_json(path: Path, most_bytes: int = MOST_BYTES) -> Any:
    """Return what a JSON file holds; raises OSError as `read_bytes`, ValueError as `parse_json` and for a file too
    large.
    """
    return parse_json(read_bytes(path, most_bytes).removeprefix(_BYTE_ORDER_MARK))


def parse_json(content: str | bytes) -> Any:
    """Return what JSON says; raise ValueError if it is none, no UTF-8, or nested more than `MOST_DEPTH` deep."""
    text = content if isinstance(content, str) else content.decode("utf-8")
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    check_depth(value)
    return value


def check_depth(value: Any) -> None:
    """Refuse lists and mappings that are nested more than `MOST_DEPTH` deep. Raises ValueError.

    What walks through them by recursion, as `json.dumps` does, would fail on them later.
    """
    level = [value]
    for _ in range(MOST_DEPTH + 1):
        inner = [each for each in level if isinstance(each, list | dict)]
        if not inner:
            return
        level = [entry for each in inner for entry in (each.values() if isinstance(each, dict) else each)]
    raise ValueError("nested too deeply")
