"""A run's folder replayed as one W&B run, read back from what W&B has written."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from PIL import Image

from pldr_train.errors import UserError
from pldr_train.runs.metrics import MetricLines
from pldr_train.wandb_runs.opening import Target
from pldr_train.wandb_runs.replaying import Replayed, replay
from tests.unit.wandb_case import (
    HEADS,
    LAYERS,
    TOKENS_PER_STEP,
    isolate_wandb,
    line_of,
    write_lines,
    write_run,
    write_samples,
    write_snapshot,
)
from tests.unit.wandb_records import only_record


@pytest.fixture(autouse=True)
def _isolated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    isolate_wandb(monkeypatch, tmp_path)


def replayed(run: Path, run_id: str = "replay01") -> Replayed:
    return replay(run, Target("offline", run_id, "demo", name="tiny", job_type="replay", resume=False))


def test_every_line_arrives_once_with_both_axes(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    done = replayed(run)
    found = only_record(run)
    assert (done.steps, done.notes, done.url) == (7, [], None)
    assert done.record == found.folder
    assert done.command == ["wandb", "sync", str(found.folder)]
    # Not where `wandb sync RUN/wandb/offline-run-*` would upload the same curves again.
    assert found.folder.parent == run / "wandb-replay" / "wandb"
    assert found.column("train/loss") == [(step, pytest.approx(7.0 / step)) for step in range(1, 7)]
    assert found.column("val/loss") == [(0, 6.0), (3, 3.0), (6, 0.0)]
    # Step 0 has a validation's line alone, and no tokens of its own.
    assert found.column("tokens") == [(step, step * TOKENS_PER_STEP) for step in range(7)]
    assert found.column("step") == [(step, step) for step in range(7)]
    assert not any("batch_digest" in name for row in found.history for name in row)
    assert found.exit_code == 0


def test_it_has_the_recipe_and_says_what_it_is(tmp_path: Path) -> None:
    run = write_run(tmp_path, run={"name": "tiny-seed5"}, dag={"A_LM": 0.0, "A_P": 0.0, "G_LM": 0.0})
    replayed(run)
    found = only_record(run)
    assert (found.run.run_id, found.run.project, found.run.display_name) == ("replay01", "demo", "tiny")
    assert (found.run.run_group, found.run.job_type) == ("tiny", "replay")
    assert list(found.run.tags) == ["2L-2H-8d", "G-learned", "no-dag", "parquet"]
    assert found.config["model"]["num_hidden_layers"] == LAYERS
    assert found.config["environment"]["packages"] == {"torch": "2"}
    assert found.config["tokens_per_step"] == TOKENS_PER_STEP


def test_metrics_are_defined_over_the_step_with_their_best_values(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    replayed(run)
    found = only_record(run)
    for name in ("train/*", "val/*", "leakage/*", "deductive/*", "system/*", "data/*", "tokens", "val/loss"):
        assert found.metrics[name].step_metric == "step", name
    assert found.metrics["step"].step_metric == ""
    assert found.metrics["val/cross_entropy"].summary.min
    assert found.metrics["train/dag/layer_1/G_LM"].summary.min
    assert found.metrics["val/accuracy"].summary.max
    assert found.summary["val/loss"] == {"min": 0, "last": 0}
    assert found.summary["train/loss"] == {"min": pytest.approx(7 / 6), "last": pytest.approx(7 / 6)}
    assert found.summary["train/accuracy"]["max"] == pytest.approx(0.6)
    assert found.summary["train/lr"] == 1e-3


def test_of_a_resumed_run_the_later_lines_count(tmp_path: Path) -> None:
    again = [line_of(step) | {"train/loss": 100.0 + step} for step in (4, 5, 6, 7)]
    run = write_run(tmp_path, [*(line_of(step) for step in range(7)), *again])
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "train/lo')
    done = replayed(run)
    found = only_record(run)
    assert found.column("train/loss")[3:] == [(4, 104.0), (5, 105.0), (6, 106.0), (7, 107.0)]
    assert [row["_step"] for row in found.history] == list(range(8))
    assert len(done.notes) == 2
    assert "3 steps stand twice" in done.notes[0]
    assert "1 lines" in done.notes[1]


def test_lines_of_one_step_in_a_row_are_one(tmp_path: Path) -> None:
    run = write_run(tmp_path, [line_of(1), line_of(2), {"step": 2, "val/loss": 9.0, "train/loss": 8.0}, line_of(3)])
    replayed(run)
    found = only_record(run)
    assert [row["_step"] for row in found.history] == [1, 2, 3]
    assert found.column("train/loss")[1] == (2, 8.0)
    assert found.column("val/loss")[0] == (2, 9.0)
    assert found.column("train/lr")[1] == (2, 1e-3)


def test_values_that_are_not_finite_stay_what_they_are(tmp_path: Path) -> None:
    lines = [line_of(1), line_of(2, **{"train/loss": math.nan}), line_of(3, **{"train/loss": None}),
             line_of(4, **{"train/loss": math.inf})]  # fmt: skip
    run = write_run(tmp_path, lines)
    replayed(run)
    values = [value for _, value in only_record(run).column("train/loss")]
    assert values[0] == 7.0
    assert math.isnan(float(values[1]))
    assert math.isnan(float(values[2]))
    assert math.isinf(float(values[3]))


def test_heatmaps_and_histograms_stand_at_their_steps(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    for step in (0, 3):
        write_snapshot(run, step)
    # A predefined G has no A; and what is damaged is told and left out.
    write_snapshot(run, 6, names=("G_LM",))
    (run / "snapshots" / "step-00000005.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0nothing of the kind")
    done = replayed(run)
    found = only_record(run)
    assert done.snapshots == 3
    assert [note for note in done.notes if "step-00000005" in note] == done.notes
    assert [step for step, _ in found.column("heatmaps/A/path")] == [0, 3]
    assert [step for step, _ in found.column("heatmaps/G_LM/path")] == [0, 3, 6]
    for _, path in found.column("heatmaps/G_LM/path"):
        picture = Image.open(found.run_files / path)
        assert picture.width > HEADS * 48
        assert picture.height > LAYERS * 48
        assert path in found.files
    assert "layers down, heads across" in found.column("heatmaps/A/caption")[0][1]
    assert "A, step 3" in found.column("heatmaps/A/caption")[1][1]
    histograms = found.column("histograms/layer_1/A_LM/values")
    assert [(step, sum(counts)) for step, counts in histograms] == [(0, HEADS * 64), (3, HEADS * 64)]
    # Media share their step's row with its metrics, so tokens can be their axis, too.
    assert [row["_step"] for row in found.history] == list(range(7))


def test_samples_are_a_table_that_grows(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    write_samples(run, (3, 6), prompts=("The", "A\u2028line"))
    with (run / "samples.jsonl").open("a") as file:
        file.write('{"step": 9, "prompt": "half')
    assert replayed(run).samples == 4
    found = only_record(run)
    assert found.column("samples/nrows") == [(3, 2), (6, 4)]
    (_, path) = found.column("samples/path")[-1]
    table = json.loads((found.run_files / path).read_text())
    assert table["columns"] == ["step", "prompt", "text"]
    assert table["data"][-1] == [6, "A\u2028line", "A\u2028line text of 6"]


def test_a_replay_is_a_record_of_its_own_each_time(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    first, second = replayed(run, "first"), replayed(run, "second")
    assert first.record != second.record
    assert not (run / "wandb.json").exists()


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    (run / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match=r"metrics\.jsonl"):
        replayed(run)
    (run / "recipe.yaml").unlink()
    with pytest.raises(UserError, match=r"recipe\.yaml"):
        replayed(run)


# ------------------------------------------------------------------------------------------------------ reading lines


def test_lines_that_are_no_lines_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(
        b'{"step": 1, "a": 1.5}\n\nnothing\n[1]\n{"a": 2}\n{"step": -1}\n{"step": true}\n{"a": 3, "step": 2}\n'
        b'{"step": 3, "a": \xff}\n{"step": 4, "text": "{", "a": 4}\r\n{"step": 5, "a": 5}'
    )
    lines = MetricLines(path)
    assert list(lines) == [(1, {"a": 1.5}), (2, {"a": 3}), (4, {"a": 4})]
    assert lines.left_out == 7


def test_going_back_to_the_beginning_leaves_nothing_of_before(tmp_path: Path) -> None:
    run = write_run(tmp_path, [line_of(step) for step in range(5)])
    write_lines(run, [*(line_of(step) for step in range(5)), *({"step": step, "b": 1} for step in (0, 2))])
    lines = MetricLines(run / "metrics.jsonl")
    assert list(lines) == [(0, {"b": 1}), (2, {"b": 1})]
    assert lines.superseded == 5


def test_a_quarter_of_a_million_lines_are_looked_over_without_being_kept(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with path.open("w") as file:
        file.writelines(f'{{"step": {step}, "train/loss": {step / 7}, "tokens": {step}}}\n' for step in range(250_000))
        file.writelines(f'{{"step": {step}, "train/loss": -1.0}}\n' for step in range(249_000, 250_001))
    lines = MetricLines(path)
    assert (len(lines), lines.superseded) == (250_001, 1_000)
    assert sum(numbers["train/loss"] == -1.0 for _, numbers in lines) == 1_001
