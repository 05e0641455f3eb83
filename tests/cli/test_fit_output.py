"""Whatever happens to its output, a run trains to its end, saves and ends with exit code 0."""

from __future__ import annotations

import io
import os
import pty
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from pldr_train.checkpoint.manifest import find_defect
from pldr_train.printing import printable_text
from tests.processes import ROOT, SERVER, as_a_fresh_process
from tests.tiny import metric_lines, tiny_values

STEPS = 6
CHANGES: dict[str, dict[str, Any]] = {
    "trainer": {"max_steps": STEPS, "validate_every_steps": 3},
    "logging": {"progress": True, "wandb": "disabled"},
    "sample": {"prompts": ["γ\x1b[31m \U0001f600"], "max_new_tokens": 2},
}


def full_disk() -> int:
    return os.open("/dev/full", os.O_WRONLY)


def pipe_without_a_reader() -> int:
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def closed_terminal() -> int:
    reader, writer = pty.openpty()
    os.close(reader)
    return writer


def nothing() -> int:
    return -1


def latin_1(folder: Path) -> int:
    return os.open(folder / "latin-1", os.O_WRONLY | os.O_CREAT)


def _train(open_output: Callable[..., int], folder: str, recipe: str) -> None:
    as_a_fresh_process()
    descriptor = open_output(Path(folder)) if open_output is latin_1 else open_output()
    if descriptor < 0:  # as a shell's >&- leaves it
        os.close(1)
        os.close(2)
        sys.stdout = sys.stderr = None  # type: ignore[assignment]
    else:
        encoding = "latin-1" if open_output is latin_1 else "utf-8"
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(descriptor, number)
            setattr(sys, name, io.TextIOWrapper(io.FileIO(number, "w", closefd=False), encoding=encoding))
    from pldr_train.cli import main

    try:
        code = main(["fit", recipe])
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        (Path(folder) / "traceback").write_text(traceback.format_exc())
        code = 1
    os._exit(code)


@pytest.fixture
def recipe(tiny_data: Path, tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    with path.open("w") as handle:
        YAML(typ="safe").dump(tiny_values(tiny_data, tmp_path / "runs", **CHANGES), handle)
    return path


def assert_is_whole(run: Path) -> None:
    lines = metric_lines(run)
    assert [line["step"] for line in lines] == list(range(STEPS + 1))
    assert find_defect(run / "checkpoints" / f"step-{STEPS:08d}") is None
    assert (run / "samples.jsonl").read_text().count("\n") == 1
    assert (run / "report.html").stat().st_size > 10_000


@pytest.mark.parametrize("open_output", [full_disk, pipe_without_a_reader, closed_terminal, nothing, latin_1])
def test_a_run_outlives_its_output(open_output: Callable[..., int], recipe: Path, tmp_path: Path) -> None:
    child = SERVER.Process(target=_train, args=(open_output, str(tmp_path), str(recipe)))
    child.start()
    child.join(240)
    failed = tmp_path / "traceback"
    assert not failed.exists(), failed.read_text()
    assert child.exitcode == 0
    assert_is_whole(tmp_path / "runs" / "tiny")
    if open_output is latin_1:
        shown = (tmp_path / "latin-1").read_text(encoding="latin-1")
        assert f"step {STEPS:>6}/{STEPS}  cross-entropy " in shown
        assert "\nsample: \\u03b3[31m \\U0001f600" in shown.replace("\x1b", "")
        assert "\x1b" not in shown


@pytest.mark.slow
def test_a_run_outlives_a_full_disk_and_a_closed_standard_error_to_its_very_end(recipe: Path, tmp_path: Path) -> None:
    # The interpreter itself flushes its streams at its end, and exits with 120 where that fails.
    command = [sys.executable, "-P", "-m", "pldr_train", "fit", str(recipe)]
    code = 'exec "$@" >/dev/full 2>&-'
    ended = subprocess.run(["bash", "-c", code, "bash", *command], cwd=ROOT, check=False, timeout=240)
    assert ended.returncode == 0
    assert_is_whole(tmp_path / "runs" / "tiny")


def test_a_text_of_several_lines_is_shown_without_control_characters() -> None:
    assert printable_text("a\x1b[2Jb\r\x07\x9b\n\tγ\u3000\U0001f600") == "a?[2Jb???\n\tγ\u3000\U0001f600"
