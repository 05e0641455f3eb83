"""One reader of `metrics.jsonl` and `samples.jsonl`: a damaged line costs itself alone, in every command."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from pldr_train.errors import CheckpointError
from pldr_train.model import PldrllmConfig
from pldr_train.models.card import metrics_at, model_card
from pldr_train.models.loading import RunCheckpoint
from pldr_train.recipe import load_recipe
from pldr_train.report.runs import open_runs
from pldr_train.runs import lines as json_lines
from pldr_train.runs.folder import RunFolder, cut_lines
from pldr_train.runs.lines import NO_OBJECT, NO_STEP, TOO_LONG, UNFINISHED, read_file, read_samples
from pldr_train.runs.metrics import MetricLines
from pldr_train.wandb_runs.media import read_samples as samples_for_wandb

RECIPE = load_recipe(Path(__file__).parents[2] / "recipes" / "quickstart.yaml").resolved()
BAD_LINES = {
    b"\0" * 64 + b"\n": NO_OBJECT,
    b'{"step": 1, "train/loss": 2.\n': NO_OBJECT,
    b'{"step": 1, "a": "\xff"}\n': NO_OBJECT,
    b"# a note\n": NO_OBJECT,
    b"[" * 100_000 + b"\n": NO_OBJECT,
    b"[1, 2]\n": NO_STEP,
    b'{"note": "restarted here"}\n': NO_STEP,
    b'{"step": Infinity}\n': NO_STEP,
    b'{"step": NaN}\n': NO_STEP,
    b'{"step": 1e300}\n': NO_STEP,
    b'{"step": -1}\n': NO_STEP,
    b'{"step": true}\n': NO_STEP,
    b'{"step": "1"}\n': NO_STEP,
    b'{"step": 1.5}\n': NO_STEP,
}
GOOD = [b'{"step": 0, "val/loss": 5.5}\n', b'{"step": 2, "train/loss": 5.0}\n']


def write_run(folder: Path, *lines: bytes) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_bytes(b"".join(lines))
    return folder


@pytest.mark.parametrize(("line", "problem"), BAD_LINES.items(), ids=[repr(line[:20]) for line in BAD_LINES])
def test_a_bad_line_costs_itself_alone_in_every_reader(
    tmp_path: Path, line: bytes, problem: str, said: list[str]
) -> None:
    run = write_run(tmp_path / "run", GOOD[0], line, GOOD[1])
    path = run / "metrics.jsonl"
    assert [each.problem for each in read_file(path)] == [None, problem, None]
    shown = open_runs([run])[0][0]
    shown.read_on()
    assert (shown.metrics.last_step, sorted(shown.metrics.series)) == (2, ["train/loss", "val/loss"])
    assert any(f"line 2 {problem}" in note for note in shown.notes())
    lines = MetricLines(path)
    assert (list(lines), lines.left_out) == ([(0, {"val/loss": 5.5}), (2, {"train/loss": 5.0})], 1)
    assert metrics_at(RunCheckpoint(run, run, 2, RECIPE)) == {"val/loss": 5.5, "train/loss": 5.0}
    assert RunFolder(run).last_metrics_step() == 2
    # A resume drops it, says so, and keeps the file as it was.
    before = path.read_bytes()
    assert cut_lines(path, 0) == 2
    assert path.read_bytes() == GOOD[0]
    (copy,) = run.glob("metrics.before-*.jsonl")
    assert copy.read_bytes() == before
    assert f"1 cannot be read (line 2 {problem}); the file as it was is kept as {copy.name}" in said[0]


def test_a_byte_order_mark_and_other_ends_of_lines_cost_nothing(tmp_path: Path) -> None:
    run = write_run(
        tmp_path, b"\xef\xbb\xbf" + GOOD[0].replace(b"\n", b"\r\n"), b"\n", GOOD[1].replace(b" 2,", b" 2.0,")
    )
    assert [each.values.get("step") for each in read_file(run / "metrics.jsonl")] == [0, None, 2]
    assert [step for step, _ in MetricLines(run / "metrics.jsonl")] == [0, 2]
    cut_lines(run / "metrics.jsonl", 0)
    assert (run / "metrics.jsonl").read_bytes() == GOOD[0].replace(b"\n", b"\r\n")
    assert list(run.glob("*.before-*")) == []


def test_a_line_that_was_cut_short_goes_without_a_word(tmp_path: Path, said: list[str]) -> None:
    run = write_run(tmp_path, *GOOD, b'{"step": 3, "tr')
    assert read_file(run / "metrics.jsonl")[-1].problem == UNFINISHED
    assert cut_lines(run / "metrics.jsonl", 5) == 1
    assert (run / "metrics.jsonl").read_bytes() == b"".join(GOOD)
    assert (said, list(run.glob("*.before-*"))) == ([], [])


def test_a_line_without_end_is_not_read_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_lines, "MOST_LINE_BYTES", 100)
    run = write_run(tmp_path, GOOD[0], b'{"step": 1, "a": "' + b"x" * 1000 + b'"}\n', GOOD[1])
    found = read_file(run / "metrics.jsonl")
    assert [each.problem for each in found] == [None, TOO_LONG, None]
    assert [each.offset for each in found] == [0, 29, 29 + found[1].num_bytes]
    assert len(found[1].raw) == 100


def test_what_is_no_file_is_named_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl cannot be read \(not a regular file\)"):
        RunFolder(tmp_path).last_metrics_step()
    shown = open_runs([tmp_path])[0][0]
    shown.read_on()
    assert "metrics.jsonl cannot be read (not a regular file)" in shown.notes()


def test_samples_with_any_character_are_read_alike_and_damage_stays(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    text = "a\u2028b\u2029c\x85d\x0be"
    folder.add_samples(2, ["p"], [text])
    path = tmp_path / "samples.jsonl"
    path.write_bytes(path.read_bytes() + b'{"step": 3, "text": "\xff"}\n{"step": 4, "text": 7}\n{"step": 4, "te')
    assert [(each.step, each.text) for each in read_samples(path)[0]] == [(2, text)]
    assert read_samples(path)[1] == [2, 3, 4]
    assert folder.last_samples() == (2, (text,))
    assert [each["text"] for each in samples_for_wandb(tmp_path)] == [text]
    (tmp_path / "recipe.yaml").write_text("trainer: {max_steps: 9}")
    shown = open_runs([tmp_path])[0][0]
    shown.read_on()
    assert [each["text"] for each in shown.files.samples] == [text]
    assert any("samples.jsonl: line 2, 3, 4 is no whole sample" in note for note in shown.notes())
    folder.add_samples(5, ["p"], ["q"])
    assert path.read_bytes().count(b"\n") == 4
    assert b"\xff" in path.read_bytes()
    assert folder.last_samples() == (5, ("q",))


@pytest.mark.parametrize("damage", [b"", b"{", b"\xff", b"[]", b'{"packages": 3}', b"[" * 100_000])
def test_a_damaged_environment_does_not_stop_an_export(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / "environment.json").write_bytes(damage)
    card = model_card("m", PldrllmConfig(), 1, RunCheckpoint(tmp_path, tmp_path, 2, RECIPE))
    assert "environment.json is damaged" in card


def test_numbers_of_metrics_are_read_as_they_were_written(tmp_path: Path) -> None:
    values = {"step": 7, "a": 1e-300, "b": 2**60, "c": float("nan")}
    run = write_run(tmp_path, json.dumps(values).encode() + b"\n")
    (line,) = read_file(run / "metrics.jsonl")
    assert (line.step, line.values["a"], line.values["b"]) == (7, 1e-300, 2**60)
    assert line.values["c"] != line.values["c"]
