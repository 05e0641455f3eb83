"""Samples of a run: kept for every step that has any, replaced where a step comes again, cut back for a resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pldr_train.fit import fit
from pldr_train.recipe import recipe_from_dict
from pldr_train.runs.folder import RunFolder
from tests.tiny import tiny_values


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "samples.jsonl").read_text(encoding="utf-8").splitlines()]


def test_texts_of_a_step_are_replaced_and_later_ones_cut(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.last_samples() == (-1, ())
    folder.add_samples(5, ["A", "B"], ["A one", "B zwölf\nlines"])
    folder.add_samples(9, ["A"], ["A two"])
    folder.add_samples(5, ["A"], ["A three"])
    assert [(each["step"], each["text"]) for each in lines(tmp_path)] == [(9, "A two"), (5, "A three")]
    folder.add_samples(12, ["A", "B"], ["A four", "B four\x85 and \u2028 more"])
    assert folder.last_samples() == (12, ("A four", "B four\x85 and \u2028 more"))
    with (tmp_path / "samples.jsonl").open("a") as file:
        file.write('{"step": 12, "te')
    folder.cut_back(12)
    assert folder.last_samples() == (12, ("A four", "B four\x85 and \u2028 more"))
    folder.cut_back(9)
    assert {each["step"] for each in lines(tmp_path)} == {5, 9}
    folder.cut_back(-1)
    assert (tmp_path / "samples.jsonl").read_text() == ""


def test_a_run_samples_at_validations_and_at_its_end(tiny_data: Path, tmp_path: Path) -> None:
    chosen = tiny_values(tiny_data, tmp_path, sample={"every_steps": 8, "prompts": ["the metric", "a"]})
    outcome = fit(recipe_from_dict(chosen))
    found = lines(outcome.folder)
    assert [each["step"] for each in found] == [8, 8, 16, 16, 24, 24]
    assert [each["text"] for each in found[-2:]] == list(outcome.samples)
    assert all(each["text"].startswith(each["prompt"]) for each in found)
    # Sampling draws from generators of its own: the run without it is the same.
    plain = fit(recipe_from_dict(tiny_values(tiny_data, tmp_path, "plain")))
    from tests.tiny import metric_lines

    assert metric_lines(outcome.folder) == metric_lines(plain.folder)
    again = fit(recipe_from_dict(chosen))
    assert not again.trained
    assert again.samples == outcome.samples


@pytest.mark.parametrize("parallel", [{}, {"strategy": "fsdp"}])
def test_samples_that_a_death_prevented_are_made_by_the_same_command(
    parallel: dict[str, str], tiny_data: Path, tmp_path: Path
) -> None:
    values = tiny_values(tiny_data, tmp_path) | {"parallel": parallel}
    outcome = fit(recipe_from_dict(values))
    (outcome.folder / "samples.jsonl").unlink()
    again = fit(recipe_from_dict(values))
    assert not again.trained
    assert again.samples == outcome.samples
    assert [each["step"] for each in lines(outcome.folder)] == [24]
