"""The alarm about a model that reads the future: when it goes off, what it says, and how a run ends on it."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from pldr_train.errors import LeakageError
from pldr_train.fit import fit
from pldr_train.recipe import MonitorSection, recipe_from_dict
from pldr_train.training.observing import LeakageAlarm
from tests.tiny import metric_lines, tiny_values


def values(gap: float, half: float = 0.01) -> dict[str, float]:
    return {
        "leakage/block_nll": 1.0,
        "leakage/sequential_nll": 1.0 + gap,
        "leakage/gap": gap,
        "leakage/gap_low": gap - half,
        "leakage/gap_high": gap + half,
    }


def test_only_a_gap_whose_interval_lies_above_the_limit_is_reported() -> None:
    alarm = LeakageAlarm(MonitorSection(max_gap=0.1))
    assert alarm.judge(values(0.109)) is None
    assert alarm.judge(values(-3.0)) is None
    assert alarm.judge({}) is None
    assert alarm.judge({"leakage/gap": 5.0}) is None  # one row has no interval
    text = alarm.judge(values(0.4))
    assert text is not None
    for part in ("1.000", "1.400", "0.400 (95 % interval 0.390 to 0.410)", "monitor.max_gap=0.1", "gram_chunk_size"):
        assert part in text


def test_a_warning_is_repeated_when_the_gap_has_doubled_and_a_stop_always() -> None:
    alarm = LeakageAlarm(MonitorSection(max_gap=0.1))
    assert [alarm.judge(values(gap)) is not None for gap in (0.4, 0.5, 0.79, 0.8, 1.5, 1.6)] == [
        True, False, False, True, False, True,
    ]  # fmt: skip
    strict = LeakageAlarm(MonitorSection(max_gap=0.1, leakage="stop"))
    assert all(strict.judge(values(gap)) is not None for gap in (0.4, 0.4, 0.3))


class Leaking(LeakageAlarm):
    """Sees a leak at step 8 and later: wherever the loss is not the first one, which may be lower or higher."""

    def judge(self, found: Any) -> str | None:
        assert "leakage/gap_low" in found
        return super().judge(values(2.0) if found["val/loss"] != Leaking.first_loss else values(0.0))

    first_loss = float("nan")


@pytest.fixture
def leaking(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pldr_train.training.observing.LeakageAlarm", Leaking)


@pytest.mark.usefixtures("leaking")
def test_a_run_that_leaks_is_saved_and_stopped_and_goes_on_when_told_to(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    run = tmp_path / "tiny"
    plain = fit(recipe_from_dict(tiny_values(tiny_data, tmp_path, "plain", monitor={"leakage": "warn"})))
    first = metric_lines(plain.folder)[0]["val/loss"]
    monkeypatch.setattr(Leaking, "first_loss", first)  # the weights at initialisation are no reason to stop
    stopping = recipe_from_dict(tiny_values(tiny_data, tmp_path, monitor={"leakage": "stop"}))
    with pytest.raises(
        LeakageError, match=r"step 8: the model reads the future.*or go on as it is with monitor\.leakage"
    ):
        fit(stopping)
    # What called it may go on for hours, and no watch of a run that has ended may end it.
    assert not [thread for thread in threading.enumerate() if thread.name == "pldr_train watchdog"]
    assert (run / "checkpoints" / "last").resolve().name == "step-00000008"
    assert metric_lines(run)[-1]["step"] == 8
    assert "leakage/gap" in metric_lines(run)[-1]
    # The same command goes on to the next validation, and stops there.
    with pytest.raises(LeakageError, match="step 16: the model reads the future"):
        fit(stopping)
    going_on = recipe_from_dict(tiny_values(tiny_data, tmp_path, monitor={"leakage": "warn"}))
    outcome = fit(going_on)
    assert outcome.step == 24
    assert [text for text in said if "step 24: the model reads the future" in text]
    assert metric_lines(run) == metric_lines(plain.folder)


@pytest.mark.usefixtures("leaking")
def test_a_finished_run_is_only_warned(tiny_data: Path, tmp_path: Path, said: list[str]) -> None:
    chosen = recipe_from_dict(tiny_values(tiny_data, tmp_path, trainer={"max_steps": 8}, monitor={"leakage": "stop"}))
    assert fit(chosen).step == 8
    assert [text for text in said if text.startswith("step 8: the model reads the future")]
