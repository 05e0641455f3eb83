"""The table of metrics is the whole truth: the documentation shows it, and a run writes nothing else."""

from __future__ import annotations

import json
from pathlib import Path

from pldr_train.metrics.table import METRICS, TIMINGS
from tests.processes import ROOT, run_cli
from tests.tiny import tiny_values


def test_the_documentation_has_every_row_of_the_table() -> None:
    page = (ROOT / "docs" / "training.md").read_text()
    for metric in METRICS:
        assert f"| `{metric.name}` | {metric.unit} | {metric.reduction} | {metric.meaning} |" in page


def test_a_run_writes_every_metric_of_the_table_and_no_other(tiny_data: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.json"  # JSON is YAML
    recipe.write_text(json.dumps(tiny_values(tiny_data, tmp_path, trainer={"max_steps": 8})))
    result = run_cli("fit", recipe)
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in (tmp_path / "tiny" / "metrics.jsonl").read_text().splitlines()]
    written = {name for line in lines for name in line}
    assert written == {metric.name for metric in METRICS}
    assert written >= TIMINGS
