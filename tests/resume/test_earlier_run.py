"""A run that an earlier version saved goes on as if that version had never stopped (tests/earlier_run)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from pldr_train.fit import fit
from pldr_train.metrics.catalog import TIMINGS
from pldr_train.recipe import load_recipe

EARLIER = Path(__file__).parents[1] / "earlier_run"
NEW_METRICS = ("/row_contrast", "/commutant_residual", "/row_map_jacobian")
"""That the earlier version did not have."""


def without_timings(path: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMINGS} for line in lines]


def test_a_run_of_an_earlier_version_goes_on_with_its_batches_and_losses(tmp_path: Path, said: list[str]) -> None:
    run = tmp_path / "runs" / "run"
    shutil.copytree(EARLIER / "run", run)
    whole = (EARLIER / "whole-metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(whole[:13]))  # killed after step 12, saved at step 10
    overrides = [
        f"run.dir={tmp_path / 'runs'}",
        f"data.path={EARLIER / 'corpus'}",
        f"data.tokenizer={run / 'tokenizer.model'}",
        "trainer.threads=1",
    ]
    notices: list[str] = []
    recipe = load_recipe(run / "recipe.yaml", overrides, notices.append)
    assert "read as trainer.validation_rows=" in notices[0]
    outcome = fit(recipe)
    assert outcome.step == 24
    assert any("resuming after step 10 from" in line for line in said)
    expected, found = without_timings(EARLIER / "whole-metrics.jsonl"), without_timings(run / "metrics.jsonl")
    assert [line["step"] for line in found] == list(range(25))
    digests = [line["data/batch_digest"] for line in expected[1:]]
    assert [line["data/batch_digest"] for line in found[1:]] == digests
    for mine, theirs in zip(found, expected, strict=True):
        assert {name for name in mine if not name.endswith(NEW_METRICS)} == theirs.keys()
        exact = [name for name in theirs if name in ("step", "tokens", "train/lr") or name.startswith("data/")]
        assert {name: mine[name] for name in exact} == {name: theirs[name] for name in exact}
        # On the machine that wrote them all values are equal; processors differ in the last bits, which grow.
        for name in ("train/cross_entropy", "val/cross_entropy"):
            assert mine.get(name, 0.0) == pytest.approx(theirs.get(name, 0.0), rel=0.02)
