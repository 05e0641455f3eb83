"""The lines of a run's metrics that count, in the order of their steps, whatever a run that was cut off has left."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_BEGINNING = re.compile(rb'\{"step": (\d+)[,}]')


@dataclass
class _Place:
    """A step and where its lines begin in the file."""

    step: int
    offsets: list[int]


class MetricLines:
    """A metrics file, looked over once and then read step by step, so that its size does not matter.

    Where the steps go back, a run was resumed: what stood there for these steps before does not count. Several lines
    of one step in a row are one, the later values before the earlier. Lines that are not whole are left out.

    Args:
        path: the file.

    Raises:
        OSError: it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.left_out = 0
        """Lines that are no whole JSON object with a step; all of them are known once the lines were read."""
        self.superseded = 0
        """Steps that were written again by a resumed run."""
        self._places: list[_Place] = []
        self._look_over()

    def __len__(self) -> int:
        return len(self._places)

    def _look_over(self) -> None:
        offset = 0
        with self.path.open("rb") as lines:
            for line in lines:
                step = _step_of(line)
                if step is not None:
                    self._add(step, offset)
                elif line.strip():
                    self.left_out += 1
                offset += len(line)

    def _add(self, step: int, offset: int) -> None:
        places = self._places
        if places and places[-1].step == step:
            places[-1].offsets.append(offset)
            return
        while places and places[-1].step >= step:
            places.pop()
            self.superseded += 1
        places.append(_Place(step, [offset]))

    def __iter__(self) -> Iterator[tuple[int, dict[str, float]]]:
        """Yield (step, its numbers) in order; what is written as null is NaN."""
        with self.path.open("rb") as lines:
            for place in self._places:
                whole: list[dict[str, float]] = []
                for offset in place.offsets:
                    lines.seek(offset)
                    try:
                        whole.append(_numbers_of(json.loads(lines.readline())))
                    except (ValueError, RecursionError):
                        self.left_out += 1
                if whole:
                    yield place.step, {name: value for numbers in whole for name, value in numbers.items()}


def _step_of(line: bytes) -> int | None:
    """The step of a whole line; `None` for any other."""
    if not line.endswith(b"}\n"):
        return _step_by_parsing(line) if line.endswith(b"\n") else None
    match = _BEGINNING.match(line)
    # All lines of a run begin like this; a damaged one is not parsed twice.
    return int(match[1]) if match is not None and _is_whole(line) else _step_by_parsing(line)


def _is_whole(line: bytes) -> bool:
    return line.count(b"{") == line.count(b"}") == 1


def _step_by_parsing(line: bytes) -> int | None:
    try:
        values = json.loads(line)
        step = values["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return step if isinstance(step, int) and not isinstance(step, bool) and step >= 0 else None


def _numbers_of(values: dict[str, Any]) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, value in values.items():
        if name == "step" or isinstance(value, bool | str | list | dict):
            continue
        found[name] = float("nan") if value is None else value
    return found
