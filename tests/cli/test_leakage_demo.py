"""recipes/leakage-demo.yaml as a user runs it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from tests.processes import ROOT, run_cli
from tests.tiny import metric_lines

RECIPE = ROOT / "recipes/leakage-demo.yaml"
BOUND = math.log(8)


def overrides(tmp_path: Path) -> list[str]:
    return [f"run.dir={tmp_path / 'runs'}", f"data.cache_dir={tmp_path / 'cache'}", "logging.wandb=disabled"]


def test_the_dry_run_names_the_corpus() -> None:
    result = run_cli("fit", RECIPE, "--dry-run")
    assert result.returncode == 0, result.stderr
    assert "the hidden-class corpus, built at first use" in result.stdout


@pytest.mark.slow
def test_a_learned_g_reads_the_future_and_the_run_stops_itself(tmp_path: Path) -> None:
    result = run_cli("fit", RECIPE, *overrides(tmp_path))
    assert result.returncode == 2, result.stderr
    assert "the model reads the future" in result.stderr
    assert "exceeds monitor.max_gap=3.0" in result.stderr
    assert "Traceback" not in result.stderr
    last = [line for line in metric_lines(tmp_path / "runs" / "leakage-demo") if "leakage/gap" in line][-1]
    assert 75 <= last["step"] <= 250
    assert last["leakage/block_nll"] < BOUND - 1
    assert last["leakage/sequential_nll"] > BOUND + 1
    saved = tmp_path / "runs" / "leakage-demo" / "checkpoints" / f"step-{last['step']:08d}"
    assert saved.is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("override", ["model.custom_G_type=identity", "model.gram_chunk_size=4"])
def test_a_causal_model_stays_at_the_bound(override: str, tmp_path: Path) -> None:
    # Faster than the recipe: after 40 steps such a model is at 2.2.
    fast = (
        "trainer.max_steps=40", "trainer.batch_size=32", "trainer.validate_every_steps=10", "optim.lr=5e-3",
        "optim.warmup_steps=4", "monitor.deductive=false",
    )  # fmt: skip
    result = run_cli("fit", RECIPE, override, *fast, "run.name=causal", *overrides(tmp_path))
    assert result.returncode == 0, result.stderr
    found = [line for line in metric_lines(tmp_path / "runs" / "causal") if "leakage/gap" in line]
    assert [line["step"] for line in found] == [0, 10, 20, 30, 40]
    assert all(line["leakage/block_nll"] > BOUND for line in found)
    assert all(abs(line["leakage/gap"]) < 1e-4 for line in found)
    assert found[-1]["leakage/block_nll"] < BOUND + 0.4
