"""Read blocks in a few background threads before they are needed."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

_T = TypeVar("_T")


class Fetched(Generic[_T]):
    """The result of a call that was made, or will be."""

    def __init__(self, call: Callable[[], _T]) -> None:
        self._call: Callable[[], _T] | None = call
        self._lock = threading.Lock()
        self._value: _T
        self._error: Exception | None = None

    def run(self) -> None:
        """Make the call unless it was made. A second thread waits for the first."""
        with self._lock:
            if self._call is None:
                return
            try:
                self._value = self._call()
            except Exception as error:
                self._error = error
            self._call = None

    def result(self) -> _T:
        """Return the call's value, or raise what it raised. Make the call now if no thread has begun it."""
        self.run()
        if self._error is not None:
            raise self._error
        return self._value


class ReadingAhead:
    """Run calls in order, in up to `threads` threads; with 0 threads `result` makes the call.

    The threads are daemons: a process ends without waiting for them. They start with the first calls, so the object may
    be made before a process forks, and end with the object. A fork waits for the calls that are running.
    """

    def __init__(self, threads: int) -> None:
        self._max_threads, self._num_threads = threads, 0
        self._waiting: SimpleQueue[Fetched[Any] | None] = SimpleQueue()

    def fetch(self, call: Callable[[], _T]) -> Fetched[_T]:
        """Queue a call for the threads."""
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
        with _calls_changed:
            _in_a_call.add(threading.get_ident())
        try:
            fetched.run()
        finally:
            with _calls_changed:
                _in_a_call.remove(threading.get_ident())
                _calls_changed.notify_all()
        del fetched  # its value is the asker's alone to keep


# A forked process has the locks of its parent's threads, but not the threads. A lock that a thread holds during the
# fork (a reader's, or one inside Arrow) stays locked in the child for ever. So a fork waits until no call runs.
_calls_changed = threading.Condition()
_in_a_call: set[int] = set()


def _before_fork() -> None:
    _calls_changed.acquire()
    while _in_a_call - {threading.get_ident()}:
        _calls_changed.wait()


os.register_at_fork(before=_before_fork, after_in_parent=_calls_changed.release, after_in_child=_calls_changed.release)
