"""What the terminal shows."""

from __future__ import annotations

import io

import pytest

from pldr_train.recipe import recipe_from_dict
from pldr_train.training.loggers import Progress, format_seconds
from tests.terminal import terminal

RECIPE = recipe_from_dict({
    "run": {"name": "x"}, "data": {"source": "quickstart"}, "dag": {"A_P": 0.1},
    "trainer": {"max_steps": 40}, "optim": {"warmup_steps": 0},
})  # fmt: skip
VALUES = {
    "train/loss": 3.25, "train/cross_entropy": 2.75,
    "train/dag/A_LM": 0.5, "train/dag/A_P": 1234.5, "train/dag/G_LM": 2e-5,
    "system/tokens_per_s": 12345.6,
    "val/loss": 3.5, "val/cross_entropy": 3.0, "val/accuracy": 0.25,
}  # fmt: skip


def test_a_log_file_gets_a_line_with_loss_dag_throughput_and_time_left() -> None:
    stream, now = io.StringIO(), [100.0]
    progress = Progress(RECIPE, stream, clock=lambda: now[0])
    progress.begin(10)
    now[0] += 30
    progress.log_metrics(VALUES, step=20)
    assert stream.getvalue().splitlines() == [
        "step     20/40  cross-entropy 2.7500  with DAG 3.2500  12,346 tok/s  "
        "DAG A_LM 0.5 A_P 1.23e+03 G_LM 2e-05  ETA 1:00",
        "validation at step 20: cross-entropy 3.0000  with DAG 3.5000  accuracy 25.0%",
    ]


def test_without_dag_loss_there_is_only_the_cross_entropy() -> None:
    stream = io.StringIO()
    progress = Progress(
        recipe_from_dict({"run": {"name": "x"}, "data": {"source": "quickstart"}}), stream, clock=lambda: 0.0
    )
    progress.begin(0)
    progress.log_metrics(VALUES, step=20)
    assert stream.getvalue().splitlines() == [
        "step     20/250000  cross-entropy 2.7500  12,346 tok/s  ETA 0s",
        "validation at step 20: cross-entropy 3.0000  accuracy 25.0%",
    ]


def test_the_gap_of_the_last_validation_stays_in_sight() -> None:
    stream = io.StringIO()
    progress = Progress(RECIPE, stream, clock=lambda: 0.0)
    progress.begin(0)
    gap = {"leakage/gap": -0.0001, "leakage/gap_low": -0.02, "leakage/gap_high": 0.0198}
    progress.log_metrics(VALUES | gap, step=10)
    progress.log_metrics({name: value for name, value in VALUES.items() if name[:3] != "val"}, step=20)
    first, validation, second = stream.getvalue().splitlines()
    assert "  gap 0.000  12,346 tok/s" in first
    assert validation.endswith("accuracy 25.0%  gap 0.000 [-0.020, 0.020]")
    assert "  gap 0.000  12,346 tok/s" in second


def test_a_gap_of_one_row_has_no_interval() -> None:
    stream = io.StringIO()
    progress = Progress(RECIPE, stream, clock=lambda: 0.0)
    progress.begin(0)
    progress.log_metrics({"val/loss": 1.0, "val/cross_entropy": 1.0, "val/accuracy": 0.5, "leakage/gap": 2.5}, step=1)
    assert stream.getvalue().endswith("gap 2.500\n")


@pytest.mark.parametrize(("rows", "bar"), [(40, True), (0, False)])
def test_a_terminal_gets_a_bar_if_its_height_is_known(rows: int, bar: bool) -> None:
    with terminal(rows, columns=120) as opened:
        progress = Progress(RECIPE, opened.stream)
        progress.begin(0)
        for step in range(1, 11):
            progress.advance(step)
        progress.log_metrics(VALUES, step=10)
        progress.end()
    assert "cross-entropy 2.7500" in opened.shown
    assert "12,346 tok/s" in opened.shown
    assert ("10/40 [" in opened.shown) is bar


@pytest.mark.parametrize(
    ("seconds", "text"), [(4.6, "5s"), (185, "3:05"), (7384, "2:03:04"), (5 * 86400 + 7200, "5d 02:00")]
)
def test_times_are_short(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text
