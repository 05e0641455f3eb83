"""The lines of a run's metrics that count, in the order of their steps, whatever a run that was cut off has left."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pldr_train.json_lines import read_lines
from pldr_train.untrusted import open_regular


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
        with open_regular(self.path) as handle:
            for line in read_lines(handle):
                if line.problem is None:
                    self._add(line.step, line.offset)
                elif not line.is_blank:
                    self.left_out += 1

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
        with open_regular(self.path) as handle:
            for place in self._places:
                whole: list[dict[str, float]] = []
                for offset in place.offsets:
                    handle.seek(offset)
                    line = next(read_lines(handle), None)
                    if line is None or line.problem is not None:  # changed meanwhile
                        self.left_out += 1
                    else:
                        whole.append(_numbers_of(line.values))
                if whole:
                    yield place.step, {name: value for numbers in whole for name, value in numbers.items()}


def _numbers_of(values: dict[str, Any]) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, value in values.items():
        if name == "step" or isinstance(value, bool | str | list | dict):
            continue
        found[name] = float("nan") if value is None else value
    return found
