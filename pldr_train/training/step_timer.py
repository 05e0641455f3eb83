"""Throughput and data wait between two log steps."""

from __future__ import annotations

from collections.abc import Callable


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

    def waiting_begins(self) -> None:
        """All that belongs to the previous step is over."""
        self._mark = self._clock()

    def batch_arrived(self) -> None:
        """The next batch is there; its step begins."""
        now = self._clock()
        self._wait_s += now - self._mark
        self._mark = now

    def step_done(self, tokens: int) -> None:
        """The step is over; it trained on `tokens` tokens of all processes together."""
        now = self._clock()
        self._step_s += now - self._mark
        self._tokens += tokens
        self._mark = now

    def take(self) -> dict[str, float]:
        """`tokens_per_s` and `data_wait_s` since the last call; begins a new window."""
        total_s = self._step_s + self._wait_s
        values = {"tokens_per_s": self._tokens / total_s if total_s > 0 else 0.0, "data_wait_s": self._wait_s}
        self._tokens, self._step_s, self._wait_s = 0, 0.0, 0.0
        return values
