"""Children for tests of the launcher: small scripts that start fast, and the launcher as a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from pldr_train.launching import launch
from tests.messages import collected
from tests.processes import ROOT

# What every child script begins with. It imports no torch: a start takes some hundredths of a second.
PRELUDE = """
import json, os, signal, subprocess, sys, time
from pathlib import Path

here, rank = Path(__file__).parent, int(os.environ["RANK"])

def note(name, text="x"):
    # The file appears with its first line in it; a signal's handler may come between.
    path, aside = here / f"{name}-{rank}", here / f".{name}-{rank}-{time.monotonic_ns()}"
    aside.write_text(text + "\\n")
    try:
        os.link(aside, path)
    except FileExistsError:
        with path.open("a") as handle:
            handle.write(text + "\\n")
    aside.unlink()

def wait_for(*names):
    while not all((here / name).exists() for name in names):
        time.sleep(0.01)

def count_signals(leave_at):
    def on_signal(number, frame):
        note("signals", signal.Signals(number).name)
        seen.append(number)
        if len(seen) == leave_at:
            time.sleep(0.3)  # long enough for one too many to arrive
            os._exit(128 + number)
    seen = []
    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        signal.signal(signal.SIGHUP, on_signal)
    note("ready")
    while True:
        time.sleep(0.01)
"""

# The launcher as a process of its own; like the real command it imports no torch.
LAUNCHER = """
import json, sys
import signal
from pldr_train import launching, printing
assert "torch" not in sys.modules
script, options = sys.argv[1], json.loads(sys.argv[2])
signal.signal(signal.SIGHUP, signal.SIG_IGN if options.pop("nohup", False) else signal.SIG_DFL)
launching._AFTER_SECOND_SIGNAL_S = options.pop("after_second_signal_s", launching._AFTER_SECOND_SIGNAL_S)
printing.log_to_terminal()
sys.exit(launching.launch([sys.executable, script], 2, **options))
"""


@pytest.fixture
def script(tmp_path: Path) -> Callable[[str], Path]:
    def write(body: str) -> Path:
        path = tmp_path / "child.py"
        path.write_text(f"{PRELUDE}\n{body}\n")
        return path

    return write


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []

    def start_launcher(script: Path, **options: Any) -> subprocess.Popen[str]:
        program = tmp_path / "pldr-train"
        program.write_text(LAUNCHER)
        started.append(
            subprocess.Popen(
                [sys.executable, str(program), str(script), json.dumps(options)],
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                stdout=subprocess.PIPE,
                text=True,
                start_new_session=True,  # a process group of its own, as a terminal's foreground job
            )
        )
        return started[-1]

    yield start_launcher
    for process in started:
        if process.poll() is None:
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
            process.kill()
            process.wait()


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def wait_for_files(folder: Path, *names: str) -> None:
    wait_until(lambda: all((folder / name).exists() for name in names), f"no {names}")


def run(script: Path, **options: Any) -> tuple[int, list[str]]:
    with collected() as said:
        code = launch([sys.executable, str(script)], options.pop("num_processes", 2), **options)
    return code, said


def is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
