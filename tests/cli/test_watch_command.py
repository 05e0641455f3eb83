"""`pldr-train watch` as a user meets it, in a terminal and elsewhere."""

from __future__ import annotations

import io
import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pldr_train.cli import main
from pldr_train.commands.watch import sparkline, watch
from pldr_train.printing import duration_text, printable
from pldr_train.report.runs import Run
from pldr_train.report.series import Series

# As the installed command, which imports torch only where it is needed.
COMMAND = [
    sys.executable,
    "-c",
    "import sys; from pldr_train.cli import main; sys.exit(main())",
]


def add_steps(folder: Path, first: int, last: int) -> None:
    with (folder / "metrics.jsonl").open("a") as handle:
        for step in range(first, last + 1):
            values = {"step": step, "train/cross_entropy": 10 / step, "train/dag/A_LM": 0.5, "train/grad_norm": 2.0}
            values |= {"tokens": step * 1000, "system/tokens_per_s": 500.0}
            handle.write(json.dumps(values | ({"val/cross_entropy": 3.0} if step % 10 == 0 else {})) + "\n")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "recipe.yaml").write_text("trainer:\n  max_steps: 100\n")
    add_steps(tmp_path, 1, 40)
    checkpoint = tmp_path / "checkpoints" / "step-00000030"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text('{"files": {}}')
    return tmp_path


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return "utf-8"


def test_once_shows_how_an_unfinished_run_stands(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["watch", str(folder), "--once"]) == 0
    said = capsys.readouterr().out
    assert "step 40 of 100 (40.0%), unfinished, metrics written " in said
    for label in ("cross-entropy", "val cross-entropy", "DAG loss A_LM", "gradient norm", "tokens/s"):
        assert f"  {label:<16} " in said
    assert "█" in said
    assert "40,000 tokens; about 2 min left" in said
    assert "last checkpoint: step 30, " in said
    assert "\x1b" not in said
    assert "DAG loss G_LM" not in said


def test_the_gap_and_what_it_means_are_shown_and_follow_the_run(folder: Path) -> None:
    write = (folder / "metrics.jsonl").open("a")
    out = io.StringIO()

    def sleep(_: float) -> None:
        gap = {"leakage/gap": 6.9, "leakage/gap_low": 6.5, "leakage/gap_high": 7.3}
        gap |= {"leakage/block_nll": 0.2, "leakage/sequential_nll": 7.1, "val/cross_entropy": 0.3}
        write.write(json.dumps({"step": 100, "train/cross_entropy": 0.1, **gap}) + "\n")
        write.flush()

    with write:
        watch(Run(folder, "run"), out, once=False, interval_s=1.0, sleep=sleep)
    assert "leakage" not in out.getvalue().partition("step 100")[0]
    assert "val cross-entropy 0.3  leakage gap 6.9" in out.getvalue().splitlines()[-1]
    shown = io.StringIO()
    watch(Run(folder, "run"), shown, once=True, interval_s=1.0)
    lines = shown.getvalue().splitlines()
    assert any(line.startswith("  leakage gap ") and line.endswith("  [6.5, 7.3]") for line in lines)
    assert "  leakage: reads the future: block 0.2, sequential 7.1 nat/token" in lines
    assert not any("operator" in line for line in lines)


def test_elsewhere_than_in_a_terminal_each_new_step_is_a_line(folder: Path) -> None:
    out = io.StringIO()
    looks = iter([(41, 42), None, (43, 100)])

    def sleep(_: float) -> None:
        if (steps := next(looks)) is not None:
            add_steps(folder, *steps)

    watch(Run(folder, "run"), out, once=False, interval_s=1.0, sleep=sleep)
    lines = out.getvalue().splitlines()
    assert lines[-2].startswith("step 42  cross-entropy 0.2381  ")
    assert lines[-1].startswith("step 100  cross-entropy 0.1  val cross-entropy 3")
    assert sum(line.startswith("step ") for line in lines) == 2
    assert "\x1b" not in out.getvalue()


def test_in_a_terminal_the_lines_are_drawn_over(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("LINES", "8")
    out = Terminal()
    watch(Run(folder, "run"), out, once=False, interval_s=1.0, sleep=lambda _: add_steps(folder, 41, 100))
    first, second = out.getvalue().split("\x1b[J")[:2]
    assert second.startswith("\x1b[7F")
    assert "step 100 of 100 (100.0%), finished" in second
    shown = [line.replace("\x1b[K", "") for line in first.splitlines()]
    assert len(shown) == 7
    assert max(map(len, shown)) <= 59


def test_without_unicode_the_curves_are_plain_characters(folder: Path) -> None:
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    command = [*COMMAND, "watch", str(folder), "--once"]
    done = subprocess.run(command, capture_output=True, env=environment, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert b"@" in done.stdout
    assert done.stdout.isascii()


def test_ctrl_c_leaves_with_0(folder: Path) -> None:
    leader, follower = pty.openpty()
    command = [*COMMAND, "watch", str(folder), "--interval", "0.2"]
    process = subprocess.Popen(command, stdout=follower, stderr=subprocess.PIPE)
    os.close(follower)
    seen = b""
    while b"last checkpoint" not in seen:
        seen += os.read(leader, 4096)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    os.close(leader)
    assert (process.returncode, errors) == (0, b"")


@pytest.mark.parametrize(
    ("name", "words"), [("nope", "no such folder"), ("empty", "an empty folder"), ("recipe.yaml", "a file")]
)
def test_what_is_no_run_is_said(folder: Path, capsys: pytest.CaptureFixture[str], name: str, words: str) -> None:
    (folder / "empty").mkdir()
    assert main(["watch", str(folder / name)]) == 2
    assert words in capsys.readouterr().err


def test_odd_metrics_are_noted_and_cannot_move_the_cursor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = '{"step": 1, "train/loss": 2.0}\n{"step": 2, "train/loss": NaN, "\\u001b[2J": [1]}\n{"step": 3, "tr'
    (tmp_path / "metrics.jsonl").write_text(text)
    assert main(["watch", str(tmp_path), "--once"]) == 0
    said = capsys.readouterr().out
    assert "1 not finite" in said
    assert "note: there is no recipe.yaml" in said
    assert "last line is unfinished" in said
    assert "time left unknown yet" in said
    assert "no checkpoint yet" in said
    assert "\x1b" not in said


def test_a_sparkline_goes_from_the_lowest_to_the_highest() -> None:
    series = Series()
    for step in range(1000):
        series.add(step, step)
    assert sparkline(series, 8, "12345678") == "12345678"
    flat = Series()
    flat.add(5, 1.0)
    assert sparkline(flat, 4, "12345678") == "1111"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0 s"), (59, "59 s"), (61, "1 min 1 s"), (3600, "1 h"), (90_061, "1 d 1 h")]
)
def test_durations_have_two_units(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


def test_control_characters_are_not_printed() -> None:
    assert printable("a\x1b[2Jb\n") == "a?[2Jb?"
