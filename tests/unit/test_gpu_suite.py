"""The benchmark suite for a GPU, rehearsed: every row runs in a tiny form, so that only the machine can fail it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import gpu_suite

NEEDS_A_GPU = {f"step, {rows}attention {name}" for rows in ("", "documents, ") for name in gpu_suite.BACKENDS}


def test_every_row_of_the_suite_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Rows of flex_attention would compile their mask before torch refuses them.
    rows = [name for name in gpu_suite.Suite(gpu_suite.REHEARSAL).rows() if name != "tests" and "flex" not in name]
    file = tmp_path / "figures.json"
    assert gpu_suite.main(["--rehearse", "--json", str(file), "--rows", *rows]) == 0
    report = json.loads(file.read_text())
    assert list(report["rows"]) == rows
    failed = {name: row["failed"] for name, row in report["rows"].items() if "failed" in row}
    assert failed.keys() <= NEEDS_A_GPU, failed
    steps = [row for name, row in report["rows"].items() if name.startswith("step, ") and "failed" not in row]
    assert all(row["tokens_per_s"] > 0 for row in steps)
    assert report["rows"]["DAG kernel"]["difference"] < 1e-5
    assert report["rows"]["metric learner"]["difference"] == 0.0  # there is no kernel here
    measured = {each["name"] for each in report["bars"] if each["figure"] is not None}
    assert {each["name"] for each in report["bars"]} - measured == {
        "MFU, learned G with DAG", "peak memory of the loss, whole logits over chunks",
    }  # fmt: skip
    assert "| MFU, learned G with DAG | not measured | >= 0.45 |" in capsys.readouterr().out


def test_without_a_device_or_with_an_unknown_row_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu_suite.main(["--rehearse", "--rows", "nothing"])
    assert "--rows nothing: there are tests, step, Llama," in capsys.readouterr().err
