"""A run's metrics: the lines that count in the order of their steps, and all of them as columns."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pldr_train.runs.lines import read_lines
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
        for step, values in self.steps():
            yield step, {name: value for name, value in values.items() if not isinstance(value, str)}

    def steps(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield (step, its numbers and texts) in order; what is written as null is NaN."""
        with open_regular(self.path) as handle:
            for place in self._places:
                whole: list[dict[str, Any]] = []
                for offset in place.offsets:
                    handle.seek(offset)
                    line = next(read_lines(handle), None)
                    if line is None or line.problem is not None:  # changed meanwhile
                        self.left_out += 1
                    else:
                        whole.append(_values_of(line.values))
                if whole:
                    yield place.step, {name: value for values in whole for name, value in values.items()}


def _values_of(values: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        if name == "step" or isinstance(value, bool | list | dict):
            continue
        found[name] = float("nan") if value is None else value
    return found


class Metrics(Mapping[str, "NDArray[Any]"]):
    """A run's metrics as columns: `metrics["train/loss"]` is (n,), one value for each of the n steps in `steps`.

    A column of numbers is float64 and has NaN where a step has no such metric; a column of texts holds objects, and
    None there. `points` leaves these steps out.

    Args:
        rows: (step, its values) in the order of steps.
    """

    def __init__(self, rows: Iterable[tuple[int, Mapping[str, Any]]]) -> None:
        self._rows = list(rows)
        self.steps: NDArray[np.int64] = np.array([step for step, _ in self._rows], dtype=np.int64)
        """(n,): the steps that have any metric, ascending."""
        self._names = tuple(dict.fromkeys(name for _, values in self._rows for name in values))

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __getitem__(self, name: str) -> NDArray[Any]:
        found = [values.get(name) for _, values in self._rows]
        if name not in self._names:
            near = ", ".join(get_close_matches(name, self._names)) or f"one of {len(self)} others"
            raise KeyError(f"{name}: no such metric; did you mean {near}?")
        if any(isinstance(value, str) for value in found):
            return np.array(found, dtype=object)
        return np.array([_as_float(value) for value in found], dtype=np.float64)

    def points(self, name: str) -> tuple[NDArray[np.int64], NDArray[Any]]:
        """Return the steps (k,) at which a metric was logged, and its values (k,). Raises KeyError."""
        has = np.array([name in values for _, values in self._rows], dtype=bool)
        values = self[name]
        return self.steps[has], values[has]

    def with_metric(self, name: str) -> Metrics:
        """Return the metrics of the steps at which `name` was logged."""
        return Metrics((step, values) for step, values in self._rows if name in values)

    def to_pandas(self) -> Any:
        """Return a DataFrame with a row for each step and a column for each metric. Raises ImportError."""
        import pandas  # noqa: PLC0415, it need not be there

        return pandas.DataFrame(dict(self), index=pandas.Index(self.steps, name="step"))

    def __repr__(self) -> str:
        reach = f", {self.steps[0]} to {self.steps[-1]}" if len(self.steps) else ""
        return f"Metrics({len(self)} metrics at {len(self.steps)} steps{reach})"


def _as_float(value: Any) -> float:
    try:
        return float("nan") if value is None else float(value)
    except OverflowError:
        return float("inf") if value > 0 else float("-inf")


def finite_values(path: Path, name: str) -> dict[int, float]:
    """Return a metric's finite values by step; empty without the file.

    Raises:
        OSError: the file cannot be read.
    """
    try:
        lines = MetricLines(path)
    except FileNotFoundError:
        return {}
    found = ((step, values.get(name, math.nan)) for step, values in lines)
    return {step: value for step, value in found if math.isfinite(value)}


def read_metrics(path: Path) -> Metrics:
    """Return a metrics file as columns; one that is not there yet has none.

    Raises:
        OSError: the file cannot be read.
    """
    return Metrics(MetricLines(path).steps() if os.path.lexists(path) else ())
