"""Curves of bounded size: where there are too many points, buckets of steps keep their extremes and their mean."""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

MOST_BUCKETS = 1000
"""Of a series while it is read; its memory and its part of a page are bounded by this."""
MOST_NONFINITE_STEPS = 200
_CHUNK_POINTS = 4096

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Buckets:
    """A metric's values in the order of their steps; each array is (n,), and a lone value is a bucket of its own."""

    first_step: Floats
    low_step: Floats
    low: Floats
    high_step: Floats
    high: Floats
    step_sum: Floats
    value_sum: Floats
    count: Floats

    def __len__(self) -> int:
        return len(self.count)

    @classmethod
    def of_points(cls, steps: Floats, values: Floats) -> Buckets:
        """Return one bucket for each value."""
        return cls(steps, steps, values, steps, values, steps, values, np.ones_like(steps))

    def columns(self) -> tuple[Floats, ...]:
        """Return the arrays in the order of the fields."""
        return (
            self.first_step, self.low_step, self.low, self.high_step, self.high, self.step_sum, self.value_sum,
            self.count,
        )  # fmt: skip

    def followed_by(self, later: Buckets) -> Buckets:
        """Return these buckets, then those."""
        return Buckets(*map(np.concatenate, zip(self.columns(), later.columns(), strict=True)))

    def before(self, step: float) -> Buckets:
        """Return what lies before a step; of a bucket around it, only the extremes that do."""
        kept = Buckets(*(column[self.first_step < step] for column in self.columns()))
        low_late, high_late = kept.low_step >= step, kept.high_step >= step
        whole = Buckets(*(column[~(low_late | high_late)] for column in kept.columns()))
        half = low_late ^ high_late
        steps = np.where(low_late, kept.high_step, kept.low_step)[half]
        values = np.where(low_late, kept.high, kept.low)[half]
        return whole.followed_by(Buckets.of_points(steps, values))


def compact(buckets: Buckets, most_buckets: int) -> Buckets:
    """Merge neighbours into buckets of 2^k steps until there are at most `most_buckets`; no extreme is lost."""
    if len(buckets) <= most_buckets:
        return buckets
    span = float(buckets.first_step[-1] - buckets.first_step[0]) + 1
    width = 2.0 ** max(0, math.floor(math.log2(span / most_buckets)))
    while True:
        group = np.floor_divide(buckets.first_step, width)
        starts = np.flatnonzero(np.diff(group, prepend=group[0] - 1))
        if len(starts) <= most_buckets:
            break
        width *= 2
    lowest, highest = np.lexsort((buckets.low, group)), np.lexsort((-buckets.high, group))
    return Buckets(
        first_step=buckets.first_step[starts],
        low_step=buckets.low_step[lowest][starts],
        low=buckets.low[lowest][starts],
        high_step=buckets.high_step[highest][starts],
        high=buckets.high[highest][starts],
        step_sum=np.add.reduceat(buckets.step_sum, starts),
        value_sum=np.add.reduceat(buckets.value_sum, starts),
        count=np.add.reduceat(buckets.count, starts),
    )


def points_of(buckets: Buckets) -> tuple[Floats, Floats]:
    """Steps and values to draw: each bucket's two extremes in the order of their steps, or its only value."""
    low_first = buckets.low_step <= buckets.high_step
    steps = np.stack([np.where(low_first, buckets.low_step, buckets.high_step),
                      np.where(low_first, buckets.high_step, buckets.low_step)], axis=1)  # fmt: skip
    values = np.stack([np.where(low_first, buckets.low, buckets.high),
                       np.where(low_first, buckets.high, buckets.low)], axis=1)  # fmt: skip
    keep = np.ones(steps.shape, dtype=bool)
    keep[:, 1] = steps[:, 0] != steps[:, 1]
    return steps[keep], values[keep]


_NOTHING = Buckets.of_points(np.empty(0), np.empty(0))


class Series:
    """One metric of one run, added to in the order of steps, in bounded memory."""

    def __init__(self) -> None:
        self.nonfinite_count = 0
        self.nonfinite_steps: list[float] = []
        self._first: tuple[float, float] | None = None
        self._last: tuple[float, float] | None = None
        self._buckets = _NOTHING
        self._steps, self._values = array("d"), array("d")

    @property
    def first(self) -> tuple[float, float] | None:
        """Step and value of the first that is finite."""
        self.buckets()
        return self._first

    @property
    def last(self) -> tuple[float, float] | None:
        """Step and value of the last that is finite."""
        self.buckets()
        return self._last

    @property
    def before_last(self) -> tuple[float, float] | None:
        """Step and value of the finite one before the last; None without one, or where they were merged."""
        buckets = self.buckets()
        if len(buckets) < 2 or bool((buckets.count[-2:] > 1).any()):
            return None
        return float(buckets.first_step[-2]), float(buckets.low[-2])

    @property
    def count(self) -> int:
        """Of the finite values."""
        return int(self.buckets().count.sum())

    def add(self, step: float, value: float) -> None:
        """Take a value; one that is not finite is counted, and cannot be drawn."""
        if value - value == 0.0:  # finite; the quickest way to ask, and this is asked millions of times
            self._steps.append(step)
            self._values.append(value)
            if len(self._steps) >= _CHUNK_POINTS:
                self.buckets()
            return
        self.nonfinite_count += 1
        if len(self.nonfinite_steps) < MOST_NONFINITE_STEPS:
            self.nonfinite_steps.append(step)

    def cut(self, step: float) -> None:
        """Forget the values at a step and after it: the file has them again."""
        kept = self.buckets().before(step)
        steps, values = points_of(kept)
        self._buckets = kept
        self._first = self._first if len(kept) else None
        self._last = (float(steps[-1]), float(values[-1])) if len(kept) else None
        self.nonfinite_steps = [each for each in self.nonfinite_steps if each < step]
        self.nonfinite_count = len(self.nonfinite_steps)

    def buckets(self) -> Buckets:
        """Return all values so far."""
        if self._steps:
            self._first = self._first or (self._steps[0], self._values[0])
            self._last = (self._steps[-1], self._values[-1])
            new = Buckets.of_points(np.array(self._steps), np.array(self._values))
            self._buckets = self._buckets.followed_by(new)
            self._steps, self._values = array("d"), array("d")
            if len(self._buckets) > 2 * MOST_BUCKETS:
                self._buckets = compact(self._buckets, MOST_BUCKETS)
        return self._buckets

    def as_plain(self, most_points: int) -> dict[str, Any]:
        """Return what the page draws, in about `most_points` points: `x` steps, `y` values, `mx`, `my` the buckets'
        means.
        """
        buckets = self.buckets()
        x, y = points_of(buckets)
        if len(x) > most_points:
            buckets = compact(buckets, most_points // 2)
            x, y = points_of(buckets)
        steps, values = [int(each) for each in x], [_rounded(each) for each in y]
        for place, end in ((0, self.first), (-1, self.last)):
            if end is not None and int(end[0]) != steps[place]:
                at = 0 if place == 0 else len(steps)
                steps.insert(at, int(end[0]))
                values.insert(at, _rounded(end[1]))
        plain: dict[str, Any] = {"x": steps, "y": values, "count": self.count}
        if bool((buckets.count > 1).any()):
            plain["mx"] = [int(each) for each in buckets.step_sum / buckets.count]
            plain["my"] = [_rounded(each) for each in buckets.value_sum / buckets.count]
        if len(buckets):
            low, high = int(buckets.low.argmin()), int(buckets.high.argmax())
            plain["low"] = [int(buckets.low_step[low]), float(buckets.low[low])]
            plain["high"] = [int(buckets.high_step[high]), float(buckets.high[high])]
        if self.last is not None:
            plain["last"] = [int(self.last[0]), self.last[1]]
        if self.nonfinite_count:
            plain["nonfinite"] = [int(each) for each in self.nonfinite_steps]
            plain["nonfinite_count"] = self.nonfinite_count
        return plain


def _rounded(value: float) -> float | int:
    """Six digits: more than a screen shows, in half the bytes."""
    short = float(f"{value:.6g}")
    return int(short) if short.is_integer() and abs(short) < 1e15 else short
