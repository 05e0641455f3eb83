"""The table of metrics is the whole truth: the documentation shows it, and a run writes nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pldr_train.dag import TENSOR_NAMES
from pldr_train.metrics.catalog import DAG_TENSORS, GPU_ONLY, TIMINGS, all_metrics, metrics_as_markdown
from tests.processes import ROOT, run_cli
from tests.tiny import MONITORED, tiny_values


def test_the_page_of_metrics_is_the_one_that_the_declarations_give() -> None:
    page = (ROOT / "docs" / "metrics.md").read_text()
    assert page == metrics_as_markdown(), "python -m pldr_train.metrics.catalog > docs/metrics.md"
    for name in (
        "val/loss",
        "leakage/gap",
        "train/dag/layer_0/A_LM",
        "row_map_collapse",
        "bounded",
        "relative_entropy",
    ):
        assert page.count(f"| `{name}`") == 1
    for table in page.split("\n\n"):
        cells = {line.replace(r"\|", "").count("|") for line in table.splitlines() if line.startswith("|")}
        assert len(cells) <= 1


def test_the_dag_losses_are_named_as_their_tensors_are() -> None:
    assert tuple(DAG_TENSORS) == TENSOR_NAMES


def test_no_name_is_in_the_table_twice() -> None:
    names = [metric.name for metric in all_metrics(3)]
    assert len(set(names)) == len(names)
    assert len(names) == 415


def run_with(tmp_path: Path, tiny_data: Path, **sections: dict[str, Any]) -> list[dict[str, Any]]:
    recipe = tmp_path / "recipe.json"  # JSON is YAML
    sections["monitor"] = MONITORED | sections.get("monitor", {})
    recipe.write_text(json.dumps(tiny_values(tiny_data, tmp_path, trainer={"max_steps": 8}, **sections)))
    result = run_cli("fit", recipe)
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in (tmp_path / "tiny" / "metrics.jsonl").read_text().splitlines()]


def test_a_run_writes_every_metric_of_the_table_and_no_other(tiny_data: Path, tmp_path: Path) -> None:
    scheduled = {f"{tensor}_schedule": "warmup" for tensor in DAG_TENSORS} | {
        f"{tensor}_steps": [0, 4] for tensor in DAG_TENSORS
    }
    lines = run_with(
        tmp_path, tiny_data, logging={"peak_tflops": 0.1}, dag=dict.fromkeys(DAG_TENSORS, 0.01) | scheduled
    )
    written = {name for line in lines for name in line}
    assert written == {metric.name for metric in all_metrics(2)} - GPU_ONLY | {"system/mfu"}
    assert written >= TIMINGS - GPU_ONLY
    cadences = {metric.name: metric.cadence for metric in all_metrics(2)}
    # Step 0 is validated only, step 1 logged only.
    assert {cadences[name] for name in lines[0]} == {"each line", "validations"}
    assert {cadences[name] for name in lines[1]} == {"each line", "log steps", "each step, on request"}
    share = lines[-1]["system/tflops_per_s"] / 0.1
    assert lines[-1]["system/mfu"] == pytest.approx(share)


def test_a_predefined_g_and_a_monitor_without_deductive_metrics_write_less(tiny_data: Path, tmp_path: Path) -> None:
    lines = run_with(
        tmp_path,
        tiny_data,
        model={"custom_G_type": "identity"},
        dag={"A_LM": 0.0, "A_P": 0.0, "G_LM": 0.0},
        monitor={"targets": 0},
    )
    names = {name for line in lines for name in line}
    assert not [name for name in names if name.startswith("leakage/")]
    tensors = {part for name in names if name.startswith("deductive/") for part in name.split("/")}
    assert "G_LM" in tensors
    assert not tensors & {"A", "A_LM", "A_P", "W", "P", "a", "input_sensitivity"}
    assert not [name for name in names if "update_ratio/metric_learner" in name]
    assert sorted(path.name for path in (tmp_path / "tiny" / "snapshots").iterdir()) == ["step-00000000.safetensors"]
