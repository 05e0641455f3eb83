"""Throughput, and waiting for data: what is measured and when the user hears of it."""

import pytest

from pldr_train.training.step_line import Starvation, StepTimer, nearest_rank


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_waiting_and_stepping_are_told_apart_and_validation_counts_as_neither():
    clock = Clock()
    timer = StepTimer(clock)
    for _ in range(2):
        clock.now += 50.0  # a validation, a save
        timer.waiting_begins()
        clock.now += 1.0
        timer.batch_arrived()
        clock.now += 3.0
        timer.step_done(tokens=1000)
    assert timer.total_s == 8.0
    assert timer.take() == {
        "system/tokens_per_s": 250.0,
        "system/data_wait_s": 2.0,
        "system/data_wait_share": 0.25,
        "system/step_s_p50": 4.0,
        "system/step_s_p95": 4.0,
        "system/step_s_max": 4.0,
    }
    assert timer.take() == {"system/tokens_per_s": 0.0, "system/data_wait_s": 0.0, "system/data_wait_share": 0.0}


def test_the_percentiles_are_of_the_windows_steps():
    clock = Clock()
    timer = StepTimer(clock)
    for window in (range(1, 101), range(1001, 1003)):
        for seconds in window:
            timer.waiting_begins()
            timer.batch_arrived()
            clock.now += seconds
            timer.step_done(tokens=1)
        values = timer.take()
        shares = [values[f"system/step_s_{name}"] for name in ("p50", "p95", "max")]
        assert shares == ([50, 95, 100] if window.start == 1 else [1001, 1002, 1002])


@pytest.mark.parametrize(
    ("values", "share", "expected"), [([3.0], 0.5, 3.0), ([2.0, 1.0], 0.5, 1.0), ([5.0, 1.0, 3.0], 0.95, 5.0)]
)
def test_the_nearest_rank_is_one_of_the_values(values, share, expected):
    assert nearest_rank(values, share) == expected


def test_a_starved_model_is_said_once_with_advice_and_again_after_it_was_well():
    starvation = Starvation(num_workers=2)
    assert starvation.advice(0.9) is None  # the first window has the loader's start in it
    first = starvation.advice(0.42)
    assert first is not None
    for word in ("42%", "data.num_workers (now 2)", "pldr-train data tokenize", "pldr-train data download"):
        assert word in first
    assert starvation.advice(0.5) is None
    for _ in range(9):
        assert starvation.advice(0.05) is None
    assert starvation.advice(0.11) is None  # not for every window that is worse than the one before
    for _ in range(10):
        assert starvation.advice(0.05) is None
    assert starvation.advice(0.11) is not None
