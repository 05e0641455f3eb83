"""A run that stands still ends with a message that names the process behind; one that goes on is left alone."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest

from pldr_train.distributed.watchdog import Watchdog
from pldr_train.distributed.world import World

TIMEOUT_S = 0.2
"""By the test's own clock; by the real one the watchdog looks every 0.02 s."""


class Store(dict[str, bytes]):
    """Stands for torch's; dead: as when the process that keeps it has ended."""

    dead = False

    def _reach(self) -> None:
        if self.dead:
            raise RuntimeError("Connection reset by peer")

    def set(self, key: str, value: str) -> None:
        self._reach()
        self[key] = value.encode()

    def check(self, keys: list[str]) -> bool:
        self._reach()
        return all(key in self for key in keys)

    def told(self, text: str) -> bool:
        return any(value.decode().endswith(text) for value in list(self.values()))


class Watched:
    """A process with its watchdog."""

    def __init__(self, rank: int, store: Store, size: int = 2) -> None:
        self.now, self.codes, self.ended, self.store = 0.0, list[int](), threading.Event(), store
        world = World(rank=rank, size=size, local_rank=rank, local_size=size)
        self.dog = Watchdog(world, TIMEOUT_S, store, self._leave, lambda: self.now)

    def _leave(self, code: int) -> None:
        self.codes.append(code)
        self.ended.set()

    def stand_still(self) -> None:
        self.now += 2 * TIMEOUT_S
        assert self.ended.wait(60)

    def beat(self, doing: str) -> None:
        """Go on, and wait until the watchdog has told of it."""
        self.dog.beat(doing)
        wait_until(lambda: self.store.told(doing))


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def watching_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "pldr_train watchdog"]


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture
def pair(store: Store) -> Iterator[tuple[Watched, Watched]]:
    both = Watched(0, store), Watched(1, store)
    for each in both:
        each.dog.start()
    yield both
    for each in both:
        each.dog.stop()


def test_the_process_behind_is_named_with_what_it_did(
    pair: tuple[Watched, Watched], capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = pair
    second.beat("step 3, computing")
    for doing in ("step 3, computing", "step 4, waiting for data"):
        first.beat(doing)
    first.stand_still()
    assert (first.codes, second.codes) == ([1], [])
    told = capsys.readouterr().err
    assert told.startswith("error: no progress for parallel.timeout_s=0.2 s: rank 1 is behind, last seen at: step 3, ")
    assert "this is rank 0, at: step 4, waiting for data" in told
    assert "if the work is just slow, raise parallel.timeout_s" in told
    assert told.count("\n") == 1


def test_the_process_behind_names_itself(pair: tuple[Watched, Watched], capsys: pytest.CaptureFixture[str]) -> None:
    first, second = pair
    first.beat("saving after step 3")
    second.stand_still()
    assert "rank 1 is behind, last seen at: starting; this is rank 1" in capsys.readouterr().err


def test_all_standing_still_are_reported_as_that(
    pair: tuple[Watched, Watched], capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = pair
    for each in pair:
        each.dog.beat("step 9, computing")
    wait_until(
        lambda: len([value for value in list(first.store.values()) if value.endswith(b"step 9, computing")]) == 2
    )
    second.stand_still()
    assert "all 2 processes stand still (step 9, computing)" in capsys.readouterr().err


def test_processes_that_never_came_to_a_step_are_named(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    alone = Watched(1, store, size=4)
    alone.dog.start()
    alone.stand_still()
    alone.dog.stop()
    assert "rank 0, 2, 3 is behind, last seen at: before its first step; this is rank 1" in capsys.readouterr().err


def test_a_slow_process_that_goes_on_raises_no_alarm(
    pair: tuple[Watched, Watched], capsys: pytest.CaptureFixture[str]
) -> None:
    for step in range(8):
        for each in pair:
            each.now += 0.9 * TIMEOUT_S
            each.beat(f"step {step} of {each.dog}")
    assert [each.codes for each in pair] == [[], []]
    assert capsys.readouterr().err == ""


def test_a_store_that_has_gone_ends_the_watch_silently(
    pair: tuple[Watched, Watched], capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = pair
    wait_until(lambda: len(first.store) == 2)
    first.store.dead = True
    first.dog.beat("step 1, computing")  # finds it while telling
    second.now += 2 * TIMEOUT_S  # and this one while it asks after the others
    wait_until(lambda: not watching_threads())
    assert (first.codes, second.codes) == ([], [])
    assert capsys.readouterr().err == ""


def test_no_alarm_once_stopped(pair: tuple[Watched, Watched]) -> None:
    assert len(watching_threads()) == 2
    for each in pair:
        each.dog.stop()
        each.now += 2 * TIMEOUT_S
    assert watching_threads() == []
    assert [each.codes for each in pair] == [[], []]


def test_one_process_is_watched_too(capsys: pytest.CaptureFixture[str]) -> None:
    alone = Watched(0, Store(), size=1)
    alone.dog.start()
    assert len(watching_threads()) == 1
    alone.beat("step 4, waiting for data")
    alone.stand_still()
    alone.dog.stop()
    told = capsys.readouterr().err
    assert alone.codes == [1]
    assert told.startswith("error: no progress for parallel.timeout_s=0.2 s: it stands still at: step 4, waiting for ")
    assert "Its loader gives no batch" in told
    assert "data.num_workers" in told


def test_one_process_needs_no_store_of_others(capsys: pytest.CaptureFixture[str]) -> None:
    codes: list[int] = []
    ended = threading.Event()
    now = [0.0]
    dog = Watchdog(World(), TIMEOUT_S, leave=lambda code: (codes.append(code), ended.set()), clock=lambda: now[0])
    dog.start()
    dog.beat("step 2, computing")
    now[0] += 2 * TIMEOUT_S
    assert ended.wait(60)
    dog.stop()
    assert codes == [1]
    assert "it stands still at: step 2, computing. The run ends here" in capsys.readouterr().err
