"""What a run's last values say in words."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest

from pldr_train.report.health import criticality_verdict, health_of, leakage_verdict, training_verdict
from pldr_train.report.series import Series


def series_of(*lines: Mapping[str, Any]) -> dict[str, Series]:
    found: dict[str, Series] = {}
    for line in lines:
        for name, value in line.items():
            if name != "step":
                found.setdefault(name, Series()).add(line["step"], value)
    return found


def gap_of(low: float, high: float, **more: float) -> dict[str, Any]:
    values = {"leakage/gap": (low + high) / 2, "leakage/gap_low": low, "leakage/gap_high": high}
    return {"step": 1, **values, **{f"leakage/{name}": value for name, value in more.items()}}


@pytest.mark.parametrize(
    ("low", "high", "recipe", "state", "words"),
    [
        (-0.01, 0.01, {}, "good", "no leakage"),
        (0.0, 0.05, {}, "good", "no leakage"),
        (-0.1, 0.2, {}, "look", "undecided"),
        (0.04, 0.2, {}, "look", "undecided"),
        (0.06, 0.2, {}, "bad", "reads the future: block 0.2, sequential 7.1 nat/token"),
        (0.06, 0.2, {"monitor.max_gap": "0.5"}, "good", "no leakage"),
        (0.6, 0.7, {"monitor.max_gap": "0.5"}, "bad", "reads the future: block 0.2, sequential 7.1 nat/token"),
        (0.06, 0.2, {"monitor.max_gap": "nonsense"}, "bad", "reads the future: block 0.2, sequential 7.1 nat/token"),
    ],
)
def test_leakage_is_judged_by_the_ends_of_the_interval(
    low: float, high: float, recipe: dict[str, str], state: str, words: str
) -> None:
    verdict = leakage_verdict(series_of(gap_of(low, high, block_nll=0.2, sequential_nll=7.1)), recipe)
    assert (verdict.state, verdict.words) == (state, words)
    assert f"[{low:.3g}, {high:.3g}]" in verdict.detail


def test_leakage_without_a_usable_measurement_is_no_clearance() -> None:
    assert leakage_verdict({}, {}).words == "not measured"
    assert "without an interval" in leakage_verdict(series_of({"step": 1, "leakage/gap": 0.0}), {}).words
    # The interval is of an older validation than the gap.
    stale = series_of(gap_of(-0.01, 0.01), {"step": 2, "leakage/gap": 3.0})
    assert leakage_verdict(stale, {}).state == "look"
    later = series_of(gap_of(-0.01, 0.01), {"step": 2, "leakage/gap": math.nan})
    assert "not finite" in leakage_verdict(later, {}).words
    assert "not finite" in leakage_verdict(series_of({"step": 2, "leakage/gap": math.inf}), {}).words


@pytest.mark.parametrize(
    ("rows", "sensitivity", "bounded", "words"),
    [
        (1e-6, 1e-5, 1e-4, "near-critical: hardly depends on the input"),
        (0.98, 0.04, 0.03, "depends on the input"),  # at initialisation: G is near 1 whatever the text
        (1e-6, 1e-5, 1.2, "depends on the input"),
        (1e-6, 0.5, 1e-5, "depends on the input"),
        (0.05, 0.01, 0.01, "between near-critical and depending on the input"),
        (1e-6, 0.05, 0.01, "between near-critical and depending on the input"),
    ],
)
def test_the_operator_is_judged_by_the_rows_of_a_and_the_changes_of_g(
    rows: float, sensitivity: float, bounded: float, words: str
) -> None:
    values = {
        "step": 1,
        "deductive/A/row_map_collapse": rows,
        "deductive/G_LM/input_sensitivity": sensitivity,
        "deductive/order_parameter/G_LM/bounded": bounded,
    }
    verdict = criticality_verdict(series_of(values), {"model.custom_G_type": "learned"})
    assert verdict.words == words
    assert f"row-map collapse of A {rows:.3g}" in verdict.detail
    assert f"{max(sensitivity, bounded):.3g} of its size" in verdict.detail


def test_rows_alone_are_not_enough_for_near_critical() -> None:
    verdict = criticality_verdict(series_of({"step": 1, "deductive/A/row_map_collapse": 0.0}), {})
    assert verdict.words.startswith("between")
    assert criticality_verdict({}, {}).words == "not measured"
    assert criticality_verdict({}, {"model.custom_G_type": "random"}).words.startswith("predefined G")


@pytest.mark.parametrize(
    ("lines", "state", "words"),
    [
        ([], "plain", "no loss yet"),
        ([{"step": 1, "train/loss": 2.0}], "good", "the loss is finite, no validation yet"),
        ([{"step": 1, "train/loss": 2.0}, {"step": 2, "train/loss": math.nan}], "bad", "the last loss is not finite"),
        ([{"step": 1, "train/loss": math.nan}], "bad", "the last loss is not finite"),
        ([{"step": 1, "train/loss": 2.0, "train/nonfinite_steps": 1}], "look", "1 step was not finite"),
        ([{"step": 1, "train/loss": 2.0, "train/nonfinite_steps": 0, "val/loss": 2.0}], "good",
         "the loss is finite, validation at its lowest"),
        ([{"step": 1, "train/loss": 2.0, "val/cross_entropy": 2.0}, {"step": 2, "val/cross_entropy": 2.5}], "look",
         "validation has risen by 25%"),
        ([{"step": 1, "train/loss": 2.0, "val/cross_entropy": 2.0}, {"step": 2, "val/cross_entropy": 1.5}], "good",
         "validation better by 0.5 since step 1"),
        ([{"step": 1, "train/loss": 2.0, "val/cross_entropy": 2.0}, {"step": 2, "val/cross_entropy": 2.0625}], "good",
         "validation worse by 0.0625 since step 1"),
    ],
)  # fmt: skip
def test_training_is_judged_by_what_is_finite_and_by_validation(
    lines: list[dict[str, Any]], state: str, words: str
) -> None:
    verdict = training_verdict(series_of(*lines))
    assert (verdict.state, verdict.words) == (state, words)


def test_the_card_says_how_validations_changed_and_whether_that_is_good() -> None:
    lines = [gap_of(0.0, 0.5) | {"step": 5, "val/cross_entropy": 2.0}, {"step": 9, "val/cross_entropy": 1.5}]
    changes = health_of(series_of(*lines), {})["changes"]
    assert changes == {"validation": {"difference": -0.5, "since": 5, "is_good": True}}
    changes = health_of(series_of(*lines, {"step": 12, "leakage/gap": 9.0}), {})["changes"]
    assert (changes["gap"]["since"], changes["gap"]["is_good"]) == (5, None)
    assert changes["gap"]["difference"] > 0


def test_the_worst_verdict_is_the_runs() -> None:
    good = {"step": 1, "train/loss": 2.0, "val/loss": 2.0}
    assert health_of(series_of(good), {})["state"] == "good"
    assert health_of(series_of(good, gap_of(-1.0, 1.0)), {})["state"] == "look"
    assert health_of(series_of(good, gap_of(1.0, 2.0)), {})["state"] == "bad"
    assert health_of({}, {})["state"] == "plain"
