"""Fetching in the background: a handful of threads that read blocks before they are needed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

_T = TypeVar("_T")


class Fetched(Generic[_T]):
    """What a call will give, or has given."""

    def __init__(self, call: Callable[[], _T]) -> None:
        self._call: Callable[[], _T] | None = call
        self._lock = threading.Lock()
        self._value: _T
        self._error: Exception | None = None

    def run(self) -> None:
        """Make the call unless it was made; a second caller waits for the first."""
        with self._lock:
            if self._call is None:
                return
            try:
                self._value = self._call()
            except Exception as error:
                self._error = error
            self._call = None

    def result(self) -> _T:
        """The call's value, made now if no thread has got to it yet; raises what the call raised."""
        self.run()
        if self._error is not None:
            raise self._error
        return self._value


class ReadingAhead:
    """Runs calls in up to `threads` threads in the order given; with 0, each when its result is asked for.

    The threads are daemons: a process that ends does not wait for what they read. They start as calls come, so the
    object may be made before a process forks, and end with the object.
    """

    def __init__(self, threads: int) -> None:
        self._max_threads, self._num_threads = threads, 0
        self._waiting: SimpleQueue[Fetched[Any] | None] = SimpleQueue()

    def fetch(self, call: Callable[[], _T]) -> Fetched[_T]:
        """Have `call` made soon."""
        fetched = Fetched(call)
        if self._max_threads:
            self._waiting.put(fetched)
            if self._num_threads < self._max_threads:
                self._num_threads += 1
                threading.Thread(target=_work, args=(self._waiting,), daemon=True).start()
        return fetched

    def __del__(self) -> None:
        for _ in range(self._num_threads):
            self._waiting.put(None)


def _work(waiting: SimpleQueue[Fetched[Any] | None]) -> None:
    while (fetched := waiting.get()) is not None:
        fetched.run()
        del fetched  # its value is the asker's alone to keep
