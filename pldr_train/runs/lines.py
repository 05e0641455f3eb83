"""Files of one JSON object a line, `metrics.jsonl` and `samples.jsonl`, however a crash or an editor has left them.

A line counts if it ends in a newline and is a JSON object whose `step` is a whole number. A byte-order mark at the
file's beginning is passed over. Every other line has a `problem`; nothing in a file raises.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from pldr_train.untrusted import open_regular, parse_json

UNFINISHED = "is unfinished"
NO_OBJECT = "is no whole JSON object"
NO_STEP = "has no step"
TOO_LONG = "is too long"
MOST_LINE_BYTES = 2**24
"""A longer line is not read into memory."""
LARGEST_STEP = 2**53
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Line:
    """A line of a file."""

    number: int
    """Counted from 1."""
    offset: int
    """Of its first byte in the file."""
    num_bytes: int
    raw: bytes
    """As it stands in the file, without a byte-order mark; of a line that is too long its beginning."""
    values: dict[str, Any]
    """What it holds; empty where there is a problem."""
    problem: str | None = None
    """Why it does not count: UNFINISHED, NO_OBJECT, NO_STEP or TOO_LONG."""

    @property
    def step(self) -> int:
        """Its step; for a line that counts."""
        return int(self.values["step"])

    @property
    def is_blank(self) -> bool:
        """Whether it holds nothing but white space."""
        return not self.raw.strip()


def read_lines(handle: BinaryIO, number: int = 0) -> Iterator[Line]:
    """Yield the lines from where a file stands to its end.

    Args:
        handle: the file, at the beginning of a line.
        number: how many lines lie before.
    """
    offset = handle.tell()
    while raw := handle.readline(MOST_LINE_BYTES):
        number += 1
        rest = 0 if raw.endswith(b"\n") else _pass_over_line(handle)
        yield _line(number, offset, raw, rest)
        offset += len(raw) + rest


def read_file(path: Path) -> list[Line]:
    """Return all lines of a file; raises OSError as `open_regular`."""
    with open_regular(path) as handle:
        return list(read_lines(handle))


def _pass_over_line(handle: BinaryIO) -> int:
    passed = 0
    while part := handle.readline(MOST_LINE_BYTES):
        passed += len(part)
        if part.endswith(b"\n"):
            break
    return passed


def _line(number: int, offset: int, raw: bytes, rest: int) -> Line:
    size = len(raw) + rest
    if offset == 0:
        raw = raw.removeprefix(_BYTE_ORDER_MARK)
    if rest:
        return Line(number, offset, size, raw[:100], {}, TOO_LONG)
    if not raw.endswith(b"\n"):
        return Line(number, offset, size, raw, {}, UNFINISHED)
    values = parse_line(raw)
    return (
        Line(number, offset, size, raw, {}, values)
        if isinstance(values, str)
        else Line(number, offset, size, raw, values)
    )


def parse_line(raw: bytes) -> dict[str, Any] | str:
    """Return the object in a whole line, or why it does not count."""
    try:
        values = parse_json(raw)
    except ValueError:
        return NO_OBJECT
    step = values.get("step") if isinstance(values, dict) else None
    if isinstance(step, float) and step.is_integer():  # as some editors of JSON write whole numbers
        values["step"] = step = int(step)
    if not isinstance(step, int) or isinstance(step, bool) or not 0 <= step < LARGEST_STEP:
        return NO_STEP
    found: dict[str, Any] = values
    return found


@dataclass(frozen=True)
class Sample:
    """A text sample of a run."""

    step: int
    prompt: str
    text: str


def read_samples(path: Path) -> tuple[list[Sample], list[int]]:
    """Return the samples in a file, in its order, and the numbers of the lines that hold none.

    Raises:
        OSError: as `open_regular`.
    """
    found, bad = [], []
    for line in read_file(path):
        prompt, text = line.values.get("prompt", ""), line.values.get("text", "")
        if line.problem is None and isinstance(prompt, str) and isinstance(text, str):
            found.append(Sample(line.step, prompt, text))
        elif not line.is_blank:
            bad.append(line.number)
    return found, bad
