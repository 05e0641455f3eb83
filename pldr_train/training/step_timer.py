"""Throughput and data wait between two log steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from pldr_train.metrics import catalog

STARVED_SHARE = 0.1
"""Share of the time that training may wait for data before the user is warned."""


_WELL_FOR_WINDOWS = 10


class StepTimer:
    """Adds up the time of training steps and of waiting for data; validation and saving count as neither.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._mark = clock()
        self._tokens = 0
        self._step_s = 0.0
        self._wait_s = 0.0
        self._own_wait_s = 0.0
        self._each_s: list[float] = []

    def waiting_begins(self) -> None:
        """All that belongs to the previous step is over."""
        self._mark = self._clock()

    def batch_arrived(self) -> None:
        """The next batch is there; its step begins."""
        now = self._clock()
        self._own_wait_s = now - self._mark
        self._wait_s += self._own_wait_s
        self._mark = now

    def step_done(self, tokens: int) -> None:
        """The step is over; it trained on `tokens` tokens of all processes together."""
        now = self._clock()
        self._step_s += now - self._mark
        self._each_s.append(self._own_wait_s + now - self._mark)
        self._tokens += tokens
        self._mark, self._own_wait_s = now, 0.0

    @property
    def total_s(self) -> float:
        """Time of this window's steps, waiting for data included."""
        return self._step_s + self._wait_s

    def take(self) -> dict[str, float]:
        """Return the `system/...` metrics of the steps since the last call; begins a new window."""
        total_s = self.total_s
        values = {
            catalog.TOKENS_PER_S: self._tokens / total_s if total_s > 0 else 0.0,
            catalog.DATA_WAIT_S: self._wait_s,
            catalog.DATA_WAIT_SHARE: self._wait_s / total_s if total_s > 0 else 0.0,
        }
        if self._each_s:
            values |= {
                catalog.STEP_S_P50: nearest_rank(self._each_s, 0.5),
                catalog.STEP_S_P95: nearest_rank(self._each_s, 0.95),
                catalog.STEP_S_MAX: max(self._each_s),
            }
        self._tokens, self._step_s, self._wait_s, self._each_s = 0, 0.0, 0.0, []
        return values


def nearest_rank(values: Sequence[float], share: float) -> float:
    """Return the least of the values that at least `share` of them do not exceed."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


class Starvation:
    """Notices when the model waits for its data, and says what helps; again only after it was well for a while.

    Args:
        num_workers: loader processes of each device.
    """

    def __init__(self, num_workers: int) -> None:
        self._num_workers = num_workers
        self._windows = 0
        self._well_windows = _WELL_FOR_WINDOWS

    def advice(self, wait_share: float) -> str | None:
        """Return what to tell the user after another window of steps, of which `wait_share` was spent waiting."""
        self._windows += 1
        if wait_share < STARVED_SHARE:
            self._well_windows += 1
            return None
        was_well, self._well_windows = self._well_windows >= _WELL_FOR_WINDOWS, 0
        if self._windows == 1:  # waits for the start of the loader
            self._well_windows = _WELL_FOR_WINDOWS
            return None
        if not was_well:
            return None
        workers = f"raise data.num_workers (now {self._num_workers})"
        return (
            f"training waits for data {wait_share:.0%} of its time; {workers}, tokenise ahead (pldr-train data "
            "tokenize, then data.source=tokens), or, with data.source=hub, fetch ahead (pldr-train data download)"
        )
