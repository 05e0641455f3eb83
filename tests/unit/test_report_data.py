"""What the report makes of a run's files: bounded curves that lose no extreme, and a word on all that is odd."""

from __future__ import annotations

import fcntl
import io
import json
import math
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pldr_train.commands.watch import picture
from pldr_train.metrics.catalog import all_metrics
from pldr_train.report.charts import charts_of
from pldr_train.report.page import MOST_POINTS, content_of, data_text, render_page
from pldr_train.report.runs import MetricsFile, open_runs
from pldr_train.report.series import MOST_BUCKETS, Series, compact


def write_lines(path: Path, *lines: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


def read(path: Path) -> MetricsFile:
    metrics = MetricsFile(path)
    metrics.read_on()
    return metrics


def content(*folders: Path, live: bool = False) -> dict[str, Any]:
    runs, problems = open_runs(folders)
    for run in runs:
        run.read_on()
    return content_of(runs, problems, live)


# ------------------------------------------------------------------------------------------------------------- curves


def test_few_values_are_kept_as_they_are() -> None:
    series = Series()
    for step in range(100):
        series.add(step, step / 7)
    plain = series.as_plain(2000)
    assert plain["x"] == list(range(100))
    assert plain["y"] == pytest.approx([step / 7 for step in range(100)], rel=1e-5)
    assert "mx" not in plain


@pytest.mark.parametrize("most_points", [2000, 100, 40])
def test_a_long_curve_keeps_every_buckets_extremes_and_both_ends(most_points: int) -> None:
    chance = random.Random(1)
    values = {step * 3: chance.gauss(0, 1) for step in range(50_000)}
    spikes = {3 * 77: 50.0, 3 * 31_000: -80.0, 3 * 49_998: 60.0}
    values |= spikes
    series = Series()
    for step, value in values.items():
        series.add(step, value)
    plain = series.as_plain(most_points)
    assert len(plain["x"]) <= most_points + 2
    assert plain["x"] == sorted(plain["x"])
    drawn = dict(zip(plain["x"], plain["y"], strict=True))
    assert {step: drawn[step] for step in spikes} == spikes
    assert plain["x"][0] == 0
    assert plain["x"][-1] == 3 * 49_999
    assert all(value == pytest.approx(values[step], rel=1e-5) for step, value in drawn.items())
    assert plain["low"] == [3 * 31_000, -80.0]
    assert plain["high"] == [3 * 49_998, 60.0]
    width = max(b - a for a, b in zip(plain["mx"], plain["mx"][1:], strict=False))
    for place in (0.1, 0.5, 0.9):
        middle = place * 150_000
        near = [value for step, value in values.items() if abs(step - middle) < width]
        seen = [value for step, value in drawn.items() if abs(step - middle) < 2 * width]
        assert max(seen) >= max(near) - 1e-4
        assert min(seen) <= min(near) + 1e-4


def test_means_of_buckets_have_the_whole_curves_mean() -> None:
    series = Series()
    for step in range(20_000):
        series.add(step, math.sin(step / 900) + 3)
    buckets = compact(series.buckets(), 64)
    assert len(buckets) <= 64
    assert buckets.value_sum.sum() / buckets.count.sum() == pytest.approx(
        np.mean([math.sin(step / 900) + 3 for step in range(20_000)])
    )


def test_memory_is_bounded_while_reading() -> None:
    series = Series()
    for step in range(100_000):
        series.add(step, 1.0)
    assert len(series.buckets()) <= 2 * MOST_BUCKETS
    assert series.count == 100_000


def test_a_page_of_very_many_metrics_is_bounded(tmp_path: Path) -> None:
    names = [f"deductive/m{metric}/layer_{layer}" for metric in range(60) for layer in range(10)]
    lines = [{"step": step} | dict.fromkeys(names, step * 0.1234567) for step in range(700)]
    write_lines(tmp_path / "run" / "metrics.jsonl", *lines)
    made = content(tmp_path / "run")
    assert sum(len(each["x"]) for each in made["runs"][0]["series"].values()) <= MOST_POINTS + 2 * len(names)
    assert len(made["charts"]) == 60
    assert all(len(chart["lines"]) == 10 for chart in made["charts"])


# -------------------------------------------------------------------------------------------------------- metrics.jsonl


def test_values_that_are_not_finite_are_marked_and_the_rest_is_drawn(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "metrics.jsonl",
        {"step": 1, "train/loss": 2.0},
        '{"step": 2, "train/loss": NaN}',
        '{"step": 3, "train/loss": -Infinity}',
        '{"step": 4, "train/loss": null}',
        '{"step": 5, "train/loss": 1' + "0" * 400 + "}",
        {"step": 6, "train/loss": 1.0},
    )
    metrics = read(path)
    plain = metrics.series["train/loss"].as_plain(100)
    assert plain["x"] == [1, 6]
    assert plain["nonfinite"] == [2, 3, 4, 5]
    assert "train/loss 4" in " ".join(metrics.notes())
    json.dumps(plain, allow_nan=False)


@pytest.mark.parametrize(
    ("line", "note"),
    [
        ('{"step": 2, "a": 3', "line 2 is no whole JSON object"),
        ("[1, 2]", "line 2 has no step"),
        ('{"a": 1}', "line 2 has no step"),
        ('{"step": "two", "a": 1}', "line 2 has no step"),
        ('{"step": true, "a": 1}', "line 2 has no step"),
        ('{"step": NaN, "a": 1}', "line 2 has no step"),
        ('{"step": -4, "a": 1}', "line 2 has no step"),
        ("\x00\x00\x00\x00", "line 2 is no whole JSON object"),
        ("[" * 100_000, "line 2 is no whole JSON object"),
        ('{"step": 2, "a": [1]}', "values that are no numbers were left out of a"),
        ('{"step": 2, "a": "text"}', "values that are no numbers were left out of a"),
    ],
)
def test_a_line_that_is_wrong_is_named_and_the_others_are_read(tmp_path: Path, line: str, note: str) -> None:
    metrics = read(write_lines(tmp_path / "metrics.jsonl", {"step": 1, "a": 1}, line, {"step": 3, "a": 3}))
    assert metrics.series["a"].as_plain(100)["x"] == [1, 3]
    assert note in " ".join(metrics.notes())


def test_bytes_that_are_no_utf8_cost_their_line_only(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1, "a": 1}\n{"step": 2, "\xff": 1}\n{"step": 3, "a": 2}\n')
    metrics = read(tmp_path / "metrics.jsonl")
    assert metrics.series["a"].count == 2
    assert "line 2" in " ".join(metrics.notes())


def test_a_half_written_line_is_read_once_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "a": 1}\n{"step": 2, ')
    metrics = read(path)
    assert metrics.last_step == 1
    assert "last line is unfinished (12 bytes left out)" in " ".join(metrics.notes())
    assert not metrics.read_on()
    with path.open("a") as handle:
        handle.write('"a": 5}\n')
    assert metrics.read_on()
    assert metrics.series["a"].last == (2, 5)
    assert metrics.notes() == []


@pytest.mark.parametrize("steps", [10, 80])
def test_a_resumed_run_that_cut_its_metrics_is_read_again(tmp_path: Path, steps: int) -> None:
    path = write_lines(tmp_path / "metrics.jsonl", *({"step": step, "a": step} for step in range(50)))
    metrics = read(path)
    other = write_lines(tmp_path / "new", *({"step": step, "a": -step} for step in range(steps)))
    other.replace(path)
    assert metrics.read_on()
    assert metrics.series["a"].as_plain(100)["y"] == [-step for step in range(steps)]


def test_steps_told_again_replace_those_told_before(tmp_path: Path) -> None:
    lines = [{"step": step, "a": 1.0} for step in range(5000)] + [{"step": step, "a": 9.0} for step in range(300, 400)]
    metrics = read(write_lines(tmp_path / "metrics.jsonl", *lines))
    plain = metrics.series["a"].as_plain(2000)
    assert max(plain["x"]) == 399
    assert {value for step, value in zip(plain["x"], plain["y"], strict=True) if step < 296} == {1.0}
    assert {value for step, value in zip(plain["x"], plain["y"], strict=True) if step >= 300} == {9.0}
    assert "line 5,001 goes back from step 4,999 to 300" in " ".join(metrics.notes())


# -------------------------------------------------------------------------------------------------------------- charts


def test_the_hours_of_training_are_tokens_by_their_rate_also_after_a_step_back(tmp_path: Path) -> None:
    lines = [(10, 3600, 1.0), (20, 7200, 2.0), (30, 10800, 1.0), (20, 7200, 4.0), (30, 10800, 0.5)]
    text = "".join(
        json.dumps({"step": step, "tokens": tokens, "system/tokens_per_s": rate}) + "\n" for step, tokens, rate in lines
    )
    (tmp_path / "metrics.jsonl").write_text(text + '{"step": 35, "val/loss": 1.0}\n')
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    metrics.read_on()
    plain = metrics.hours.as_plain(100)
    assert (plain["x"], plain["y"]) == ([10, 20, 30], [1, 1.25, 3.25])


def test_train_and_validation_share_a_chart_and_layers_share_one() -> None:
    charts = charts_of([
        "val/loss", "train/loss", "train/grad_norm_clipped", "train/grad_norm", "tokens", "train/lr", "train/dag/G_LM",
        "val/dag/layer_1/G_LM", "deductive/layer_10/rank", "deductive/layer_2/rank", "deductive/rank", "mine/own",
        "deductive/max/G_LM", "leakage/gap", "leakage/gap_high", "leakage/gap_low", "data/null", "data/documents",
        "data/empty", "train/update_ratio/norms", "system/step_s_p50", "system/step_s_max",
    ])  # fmt: skip
    shown = [(chart["section"], chart["title"], [line["label"] for line in chart["lines"]]) for chart in charts]
    assert shown == [
        ("Loss", "Loss", ["train", "val"]),
        ("Leakage", "Leakage gap", ["gap", "interval's lower end", "interval's upper end"]),
        ("DAG losses", "DAG loss of G_LM", ["all layers", "val layer_1"]),
        ("Deductive outputs", "deductive/rank", ["all layers", "layer_2", "layer_10"]),
        ("Deductive outputs", "deductive/max/G_LM", ["deductive/max/G_LM"]),
        ("Optimisation", "Learning rate", ["train/lr"]),
        ("Optimisation", "Gradient norm", ["before clipping", "after clipping"]),
        ("Optimisation", "Update over weight", ["train/update_ratio/norms"]),
        ("System", "Time of a step", ["median", "slowest"]),
        ("Data", "Documents", ["data/documents"]),
        ("Data", "Documents left out or mended", ["null", "empty"]),
        ("Other metrics", "mine/own", ["mine/own"]),
    ]
    assert charts[0]["unit"] == "nat/token"
    assert [line["index"] for line in charts[3]["lines"]] == [None, 2, 10]
    assert [line["role"] for line in charts[1]["lines"]] == [None, "low", "high"]


def test_every_metric_that_a_run_may_write_has_a_place_a_unit_and_a_meaning() -> None:
    infos = {info.name: info for info in all_metrics(3)}
    charts = charts_of(infos)
    placed = {line["metric"] for chart in charts for line in chart["lines"]}
    assert infos.keys() - placed == {"tokens", "leakage/targets"}
    others = [chart["title"] for chart in charts if chart["section"] == "Other metrics"]
    assert others == ["step"]
    assert all(chart["meaning"] for chart in charts)
    assert {chart["unit"] for chart in charts if chart["title"] == "A: log abs det"} == {"nat"}
    in_sight = [chart for chart in charts if not chart["group"]]
    assert len(in_sight) <= 40
    assert len({(chart["section"], chart["group"], chart["family"]) for chart in charts}) == len(charts)


def test_what_tells_criticality_stands_together_by_tensor_and_by_layer() -> None:
    charts = charts_of([info.name for info in all_metrics(2)])
    critical = [chart for chart in charts if chart["section"] == "Criticality"]
    collapse = [chart for chart in critical if chart["title"] == "Row-map collapse"]
    assert [line["label"] for line in collapse[0]["lines"]] == ["A", "A_LM", "A_P", "G_LM"]
    of_layers = [chart for chart in critical if chart["title"] == "A: row map collapse"]
    assert [line["label"] for line in of_layers[0]["lines"]] == ["all layers", "layer_0", "layer_1"]
    assert of_layers[0]["group"] == "A, the metric"
    assert [chart["title"] for chart in critical if chart["log"]][:2] == [
        "Order parameter, relative", "Cached order parameter, relative",
    ]  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- other files


def test_runs_are_compared_by_their_recipes(tmp_path: Path) -> None:
    for name, lr in (("a", 1e-3), ("b", 2e-3)):
        write_lines(
            tmp_path / name / "recipe.yaml", f"optim: {{lr: {lr}, betas: [0.9, 0.95]}}", "trainer:", "  max_steps: 9"
        )
    write_lines(tmp_path / "c" / "metrics.jsonl", {"step": 1, "only/here": 2})
    made = content(tmp_path / "a", tmp_path / "b", tmp_path / "c")
    assert {each["key"]: (each["values"], each["differs"]) for each in made["recipe"]} == {
        "optim.lr": (["0.001", "0.002", ""], True),
        "optim.betas": (["[0.9, 0.95]"] * 2 + [""], False),
        "trainer.max_steps": (["9", "9", ""], False),
    }
    notes = {run["name"]: " ".join(run["notes"]) for run in made["runs"]}
    assert "no metrics.jsonl (yet)" in notes["a"]
    assert "there is no recipe.yaml" in notes["c"]
    assert [chart["title"] for chart in made["charts"]] == ["only/here"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("recipe.yaml", "trainer: [1, 2"),
        ("recipe.yaml", "- 1"),
        ("environment.json", "[3]"),
        ("environment.json", "{"),
        ("nonfinite.json", '{"a": 1}'),
        ("unreadable.json", "nothing"),
        ("samples.jsonl", '{"text": "cut of'),
        ("samples.jsonl", "[1]"),
        ("checkpoints/step-00000002/manifest.json", '{"files": 3}'),
        ("checkpoints/step-00000002/manifest.json", "{"),
    ],
)
def test_a_damaged_file_is_named_and_the_rest_is_shown(tmp_path: Path, name: str, text: str) -> None:
    write_lines(tmp_path / "metrics.jsonl", {"step": 1, "train/loss": 2.5})
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(text)
    run = content(tmp_path)["runs"][0]
    problems = " ".join([*run["notes"], *(str(each["problem"]) for each in run["checkpoints"])])
    assert Path(name).name in problems
    assert run["series"]["train/loss"]["last"] == [1, 2.5]


def test_events_samples_and_checkpoints_are_listed(tmp_path: Path) -> None:
    write_lines(tmp_path / "metrics.jsonl", {"step": 4, "a": 1})
    event = {"step": 3, "action": "rollback", "rows": [8, 16], "batch_digest": "ab", "resumed_from": 2}
    (tmp_path / "nonfinite.json").write_text(json.dumps([event]))
    part = {"start": 1, "stop": 4, "place": "x.parquet", "reason": "cut"}
    (tmp_path / "unreadable.json").write_text(json.dumps([part]))
    write_lines(
        tmp_path / "samples.jsonl", {"step": 4, "prompt": "A", "text": "A b"}, "{", {"step": 4, "text": "x" * 9000}
    )
    for step, size in ((2, 3), (4, 5)):
        folder = tmp_path / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        (folder / "w").write_bytes(b"12345")
        (folder / "manifest.json").write_text(json.dumps({"files": {"w": {"bytes": size}}}))
    (tmp_path / "checkpoints" / "last").symlink_to("step-00000004")
    run = content(tmp_path)["runs"][0]
    assert [(each["kind"], each["step"]) for each in run["events"]] == [("nonfinite", 3), ("unreadable", None)]
    assert "went back to step 2" in run["events"][0]["text"]
    assert "documents [1, 4) in x.parquet: cut" in run["events"][1]["text"]
    assert [len(each["text"]) < 4100 for each in run["samples"]] == [True, True]
    assert "samples.jsonl: line 2" in " ".join(run["notes"])
    whole, broken = run["checkpoints"]
    assert (whole["step"], whole["is_last"], whole["problem"]) == (4, True, None)
    assert broken["problem"] == "missing or of another size: w"


def test_of_very_many_samples_those_of_evenly_spread_steps_are_kept(tmp_path: Path) -> None:
    write_lines(tmp_path / "metrics.jsonl", {"step": 1, "a": 1})
    lines = [{"step": step, "prompt": prompt, "text": "x"} for step in range(0, 10_000, 10) for prompt in "abc"]
    write_lines(tmp_path / "samples.jsonl", *lines)
    run = content(tmp_path)["runs"][0]
    steps = sorted({each["step"] for each in run["samples"]})
    assert 150 <= len(run["samples"]) <= 200
    assert (steps[0], steps[-1]) == (0, 9990)
    assert max(np.diff(steps)) - min(np.diff(steps)) <= 10
    assert all(sum(each["step"] == step for each in run["samples"]) == 3 for step in steps)
    assert f"those of {len(steps)} of 1,000 steps are shown" in " ".join(run["notes"])


def test_a_run_is_running_while_a_process_holds_it(tmp_path: Path) -> None:
    write_lines(tmp_path / "metrics.jsonl", {"step": 9, "a": 1})
    write_lines(tmp_path / "recipe.yaml", "trainer: {max_steps: 9}")
    (run,), _ = open_runs([tmp_path])
    run.read_on()
    assert run.state == "finished"
    with (tmp_path / ".lock").open("a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if f":{(tmp_path / '.lock').stat().st_ino} " not in Path("/proc/locks").read_text():
            pytest.skip("this system does not list the locks of this file system")
        assert run.state == "running"
    assert run.state == "finished"


@pytest.mark.parametrize(
    ("written", "stopped", "notes"),
    [
        (None, None, 0),
        ('{"text": "the model reads the future"}', "the model reads the future", 0),
        ('{"text": 7}', None, 1),
        ("[]", None, 1),
    ],
)
def test_why_a_run_was_stopped_is_shown(written: str | None, stopped: str | None, notes: int, tmp_path: Path) -> None:
    write_lines(tmp_path / "metrics.jsonl", {"step": 4, "a": 1})
    write_lines(tmp_path / "recipe.yaml", "trainer: {max_steps: 9}")
    (tmp_path / "environment.json").write_text("{}")
    if written is not None:
        (tmp_path / "stopped.json").write_text(written)
    (run,), _ = open_runs([tmp_path])
    run.read_on()
    (shown,) = content_of([run], [], live=False)["runs"]
    assert shown["stopped"] == stopped
    assert sum("stopped.json" in note for note in run.notes()) == notes
    lines = list(picture(run, io.StringIO(), 80))
    assert (f"  stopped: {stopped}" in lines) == (stopped is not None)


def test_runs_of_one_name_are_told_apart_and_a_run_named_twice_is_shown_once(tmp_path: Path) -> None:
    for group in ("x", "y"):
        write_lines(tmp_path / group / "run" / "metrics.jsonl", {"step": 1, "a": 1})
    runs, problems = open_runs([tmp_path / "x" / "run", tmp_path / "y" / "run", tmp_path / "x" / ".." / "x" / "run"])
    assert [run.name for run in runs] == [str(tmp_path / "x" / "run"), str(tmp_path / "y" / "run")]
    assert problems == []


# ---------------------------------------------------------------------------------------------------------------- page


def test_nothing_from_a_file_becomes_markup(tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script><!--<script>\u2028 & \ud800 <img src=x onerror=alert(1)>"
    folder = tmp_path / "<img src=x onerror=alert(1)>"
    write_lines(folder / "metrics.jsonl", {"step": 1, evil: 1.0})
    write_lines(folder / "recipe.yaml", f"run: {{name: {json.dumps('</script><b>')}}}", "trainer: {max_steps: 3}")
    write_lines(folder / "samples.jsonl", {"step": 1, "prompt": evil, "text": evil})
    made = content(folder)
    text = data_text(made)
    assert not set("<>&") & set(text)
    assert json.loads(text)["runs"][0]["samples"][0]["text"] == evil
    page = render_page(made)
    page.encode()
    assert "<img" not in page
    assert page.count("<script") == page.count("</script>") == 3
    assert "@@" not in page


def test_the_page_needs_nothing_from_elsewhere(tmp_path: Path) -> None:
    write_lines(tmp_path / "metrics.jsonl", {"step": 1, "a": 1})
    page = render_page(content(tmp_path))
    assert "http://" not in page
    assert "https://" not in page
    assert "default-src 'none'" in page
    assert "connect-src 'none'" in page
    assert "connect-src 'self'" in render_page(content(tmp_path, live=True))


def test_reading_runs_imports_neither_torch_nor_lightning() -> None:
    program = (
        "import sys\n"
        "import pldr_train.report.serving, pldr_train.commands.report, pldr_train.commands.watch\n"
        "print(sorted({'torch', 'lightning', 'transformers', 'datasets', 'pyarrow'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"
