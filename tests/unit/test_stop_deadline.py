"""A run that is asked to stop leaves at its deadline at the latest, unless it has begun to save."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pldr_train.training.stop_signals import StopSignals
from tests.distributed.fleet import Fleet
from tests.tiny import metric_lines, tiny_values


class Leaving:
    """Takes the place of the process' end."""

    def __init__(self) -> None:
        self.codes: list[int] = []
        self.happened = threading.Event()

    def __call__(self, code: int) -> None:
        self.codes.append(code)
        self.happened.set()


@pytest.fixture
def leaving() -> Leaving:
    return Leaving()


@pytest.fixture
def signals(leaving: Leaving) -> Iterator[Callable[[float | None], StopSignals]]:
    made: list[StopSignals] = []

    def make(deadline_s: float | None) -> StopSignals:
        made.append(StopSignals(deadline_s, leaving))
        made[-1].install()
        return made[-1]

    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    its_own = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
    before = [signal.getsignal(number) for number in numbers]
    yield make
    for each in made:
        each.restore()
    for timer in timers():  # cancelled, but its thread may live for a moment more, and the next test counts them
        timer.join(60)
    assert [signal.getsignal(number) for number in numbers] == before
    signal.signal(signal.SIGHUP, its_own)


def timers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_at_the_deadline_the_process_leaves_as_on_that_signal(
    number: signal.Signals,
    signals: Callable[[float | None], StopSignals],
    leaving: Leaving,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stop = signals(0.05)
    assert stop.received is None
    os.kill(os.getpid(), number)
    assert leaving.happened.wait(60)
    assert stop.received == number.name
    assert leaving.codes == [128 + number]
    told = capsys.readouterr().err
    assert told.startswith(f"error: {number.name} came 0.05 s ago (checkpoint.stop_deadline_s)")
    assert "the same command resumes" in told


@pytest.mark.parametrize("deadline_s", [None, 3600.0])
def test_before_the_deadline_or_without_one_the_signal_is_only_remembered(
    deadline_s: float | None, signals: Callable[[float | None], StopSignals], leaving: Leaving
) -> None:
    stop = signals(deadline_s)
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.received == "SIGTERM"
    assert len(timers()) == (0 if deadline_s is None else 1)
    assert leaving.codes == []


def test_a_run_that_has_left_in_time_has_no_deadline_any_more(
    signals: Callable[[float | None], StopSignals], leaving: Leaving
) -> None:
    stop = signals(3600.0)
    os.kill(os.getpid(), signal.SIGTERM)
    (timer,) = timers()
    stop.restore()
    timer.join(60)
    assert not timer.is_alive()
    assert leaving.codes == []


def test_a_save_that_has_begun_is_not_cut_off(signals: Callable[[float | None], StopSignals], leaving: Leaving) -> None:
    stop = signals(3600.0)
    with stop.saving(then_leaves=False):  # a save before any signal
        pass
    assert timers() == []
    os.kill(os.getpid(), signal.SIGTERM)
    (timer,) = timers()
    with stop.saving(then_leaves=True):
        timer.join(60)
        assert not timer.is_alive()
    assert timers() == []
    assert stop.received == "SIGTERM"
    assert leaving.codes == []


def test_a_save_between_a_signal_and_the_others_hearing_of_it_keeps_the_deadline(
    signals: Callable[[float | None], StopSignals], leaving: Leaving
) -> None:
    stop = signals(0.05)
    with stop.saving(then_leaves=False):
        os.kill(os.getpid(), signal.SIGTERM)
    with stop.saving(then_leaves=False):
        pass
    assert leaving.happened.wait(60)


def test_a_signal_in_the_midst_of_a_save_waits_for_its_end(
    signals: Callable[[float | None], StopSignals], leaving: Leaving
) -> None:
    stop = signals(0.05)
    with stop.saving(then_leaves=False):
        os.kill(os.getpid(), signal.SIGTERM)
        assert timers() == []
        assert stop.received == "SIGTERM"
        assert not leaving.happened.wait(0.3)
    # The step after it must end in time.
    assert leaving.happened.wait(60)
    assert leaving.codes == [143]


def test_a_second_signal_has_its_usual_effect(signals: Callable[[float | None], StopSignals]) -> None:
    signals(3600.0)
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_a_terminal_that_closes_may_send_its_signal_twice(signals: Callable[[float | None], StopSignals]) -> None:
    stop = signals(3600.0)
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGHUP)
    assert stop.received == "SIGHUP"
    assert len(timers()) == 1


def test_under_nohup_a_closing_terminal_stays_without_effect(signals: Callable[[float | None], StopSignals]) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = signals(3600.0)
    os.kill(os.getpid(), signal.SIGHUP)
    assert stop.received is None
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def test_outside_the_main_thread_signals_stay_with_who_had_them(leaving: Leaving) -> None:
    before = signal.getsignal(signal.SIGTERM)
    stop = StopSignals(3600.0, leaving)
    thread = threading.Thread(target=stop.install)
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGTERM) is before
    stop.restore()


def slow_saves(_rank: int, seconds: float) -> None:
    from pldr_train.training import saving

    original = saving.CheckpointWrite

    def slow_write(*arguments: Any) -> Any:
        time.sleep(seconds)
        return original(*arguments)

    saving.CheckpointWrite = slow_write  # type: ignore[attr-defined, assignment, misc]


@pytest.mark.slow
def test_a_run_asked_to_stop_saves_although_that_takes_longer_than_its_deadline(
    tiny_data: Path, tmp_path: Path
) -> None:
    checkpoint = {"stop_deadline_s": 2.0, "every_steps": 10**6}
    values = tiny_values(tiny_data, tmp_path, "run", checkpoint=checkpoint, trainer={"max_steps": 10**5})
    fleet, run = Fleet(values, 1, tmp_path / "logs", slow_saves, (4.0,)), tmp_path / "run"
    fleet.wait_for(lambda: (run / "metrics.jsonl").exists() and len(metric_lines(run)) > 3)
    os.kill(fleet.children[0].pid, signal.SIGTERM)
    assert fleet.join() == [143], fleet.text()
    assert "checkpoint.stop_deadline_s" not in fleet.text()
    assert (run / "checkpoints" / "last" / "manifest.json").exists()
