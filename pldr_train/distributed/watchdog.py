"""Ends a run that no longer gets anywhere, with a message that names the process behind.

A process that hangs (a dead disk, a stuck driver) would have the others wait inside a collective for ever. Each process
counts what it does in a store that all of them reach, from a thread that goes on while the main one waits.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from pldr_train.distributed.world import World

_KEY = "pldr_train/progress"
_ANSWER_S = 10.0
WAITING_FOR_DATA = "waiting for data"
"""Ends what a process does that waits for its batch."""
_DATA_ADVICE = "Its loader gives no batch: a disk or the network may hang, or a loader process (data.num_workers)"
_END = "The run ends here and resumes from its newest checkpoint; if the work is just slow, raise parallel.timeout_s"


class Watchdog:
    """Watch the progress of this process; when it stands still, report that of all ranks.

    Args:
        world: the processes of the run; one by itself is watched too.
        timeout_s: how long a process may stand still.
        store: where the processes see each other's counts; made from the environment's variables if not given.
        leave: ends this process; for tests.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        world: World,
        timeout_s: float,
        store: Any = None,
        leave: Callable[[int], Any] = os._exit,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._world, self._timeout_s, self._store = world, timeout_s, store
        self._leave, self._clock = leave, clock
        self._count, self._doing, self._since = 0, "starting", clock()
        self._reported = -1
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to watch."""
        if self._thread is not None:
            return
        if self._store is None:
            self._store = _OwnStore() if self._world.size == 1 else _own_connection(self._world)
        self.beat(self._doing)
        self._thread = threading.Thread(target=self._watch, daemon=True, name="pldr_train watchdog")
        self._thread.start()

    def stop(self) -> None:
        """Watch no longer."""
        self._over.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._over.clear()

    def beat(self, doing: str) -> None:
        """This process goes on, and does `doing` now."""
        self._count, self._doing, self._since = self._count + 1, doing, self._clock()

    def _watch(self) -> None:
        period_s = min(5.0, self._timeout_s / 10)
        reporting = _Asked(self._report)
        while not self._over.wait(period_s):
            # Where the process that keeps the store hangs, what asks the store hangs as well: not this thread.
            if reporting.is_done:
                reporting = _Asked(self._report)
            reporting.wait(period_s)
            if reporting.failed:
                return  # the store went with the process that kept it; what ended that one is reported there
            if self._clock() - self._since > self._timeout_s:
                asked = _Asked(self._message)
                asked.wait(_ANSWER_S)
                if asked.failed:
                    return
                print(f"error: {asked.answer or self._unanswered()}", file=sys.stderr, flush=True)
                self._leave(1)
                return

    def _unanswered(self) -> str:
        return (
            f"no progress for parallel.timeout_s={self._timeout_s:g} s: rank 0, which keeps the counts, does not "
            f"answer and is behind, or its machine; this is rank {self._world.rank}, at: {self._doing}. {_END}"
        )

    def _report(self) -> None:
        if self._reported != self._count:
            count, doing = self._count, self._doing
            self._store.set(f"{_KEY}/{self._world.rank}", f"{count} {doing}")
            self._reported = count

    def _message(self) -> str:
        seen = {rank: self._seen(rank) for rank in range(self._world.size)}
        least = min(count for count, _ in seen.values())
        behind = [rank for rank, (count, _) in seen.items() if count == least]
        if self._world.size == 1:
            who = f"it stands still at: {self._doing}"
        elif len(behind) == self._world.size:
            who = f"all {self._world.size} processes stand still ({seen[self._world.rank][1]})"
        else:
            names = ", ".join(map(str, behind))
            who = f"rank {names} is behind, last seen at: {seen[behind[0]][1]}; this is rank {self._world.rank}, "
            who += f"at: {self._doing}"
        end = f"{_DATA_ADVICE}. {_END}" if self._doing.endswith(WAITING_FOR_DATA) else _END
        return f"no progress for parallel.timeout_s={self._timeout_s:g} s: {who}. {end}"

    def _seen(self, rank: int) -> tuple[int, str]:
        key = f"{_KEY}/{rank}"
        if not self._store.check([key]):
            return 0, "before its first step"
        count, _, doing = self._store.get(key).decode().partition(" ")
        return int(count), doing


class _OwnStore(dict[str, bytes]):
    """What a store does for a process that is alone."""

    def set(self, key: str, value: str) -> None:
        self[key] = value.encode()

    def check(self, keys: list[str]) -> bool:
        return all(key in self for key in keys)


class _Asked:
    """A question to the store, asked by a thread of its own, which may never come back."""

    def __init__(self, question: Callable[[], str | None]) -> None:
        self.answer: str | None = None
        self.failed = False
        self._question = question
        self._thread = threading.Thread(target=self._ask, daemon=True, name="pldr_train watchdog's question")
        self._thread.start()

    @property
    def is_done(self) -> bool:
        return not self._thread.is_alive()

    def wait(self, seconds: float) -> None:
        self._thread.join(seconds)

    def _ask(self) -> None:
        try:
            self.answer = self._question()
        except RuntimeError:
            self.failed = True


def _own_connection(world: World) -> Any:
    """Return a connection of the watchdog's own: one that is shared is blocked while another thread waits in it."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    limit = timedelta(seconds=60)
    return TCPStore(address, port, world.size, is_master=False, timeout=limit, wait_for_workers=False)
