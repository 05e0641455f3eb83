"""Real processes: what a signal to the launcher, or its death, does to those it has started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pldr_train.launching import end_with_parent
from tests.processes import ROOT
from tests.unit.launched_processes import is_gone, run, script, start, wait_for_files, wait_until

__all__ = ["script", "start"]  # fixtures


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_reaches_each_process_once(
    number: signal.Signals, script: Callable[[str], Path], start: Callable[..., Any], tmp_path: Path
) -> None:
    launcher = start(script("count_signals(leave_at=1)"), max_restarts=3)
    wait_for_files(tmp_path, "ready-0", "ready-1")
    # The whole group, as a terminal does at Ctrl-C.
    os.killpg(launcher.pid, number)
    assert launcher.wait(60) == 128 + number
    for rank in range(2):
        assert (tmp_path / f"signals-{rank}").read_text().split() == [number.name]
    assert launcher.stdout.read() == ""


def test_a_second_signal_is_passed_on_too(
    script: Callable[[str], Path], start: Callable[..., Any], tmp_path: Path
) -> None:
    launcher = start(script("count_signals(leave_at=2)"))
    wait_for_files(tmp_path, "ready-0", "ready-1")
    launcher.send_signal(signal.SIGTERM)
    wait_for_files(tmp_path, "signals-0", "signals-1")
    launcher.send_signal(signal.SIGINT)
    assert launcher.wait(60) == 130
    for rank in range(2):
        assert (tmp_path / f"signals-{rank}").read_text().split() == ["SIGTERM", "SIGINT"]


def test_a_second_hangup_is_none_and_under_nohup_there_is_no_first(
    script: Callable[[str], Path], start: Callable[..., Any], tmp_path: Path
) -> None:
    for nohup, expected in ((False, ["SIGHUP", "SIGTERM"]), (True, ["SIGTERM"])):
        for old in tmp_path.glob("*-[01]"):
            old.unlink()
        launcher = start(script(f"count_signals(leave_at={len(expected)})"), nohup=nohup)
        wait_for_files(tmp_path, "ready-0", "ready-1")
        launcher.send_signal(signal.SIGHUP)
        if not nohup:
            wait_for_files(tmp_path, "signals-0", "signals-1")
        launcher.send_signal(signal.SIGHUP)
        launcher.send_signal(signal.SIGTERM)
        assert launcher.wait(60) == 143
        for rank in range(2):
            assert (tmp_path / f"signals-{rank}").read_text().split() == expected


def test_processes_that_a_passed_on_signal_ended_are_no_crash(
    script: Callable[[str], Path], start: Callable[..., Any], tmp_path: Path
) -> None:
    launcher = start(script('note("ready"); time.sleep(600)'), max_restarts=3)
    wait_for_files(tmp_path, "ready-0", "ready-1")
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(60) == 143
    assert launcher.stdout.read() == ""


@pytest.mark.parametrize(
    ("leave_at", "number", "grace_s", "code", "killed"),
    [
        ("2 if rank else 99", signal.SIGTERM, 1.5, 143, "rank 0"),
        ("99", signal.SIGINT, 0.2, 130, "rank 0, 1"),  # none ends by itself, and still the run is not done
    ],
)
def test_after_a_second_signal_the_deaf_are_killed(
    script: Callable[[str], Path],
    start: Callable[..., Any],
    tmp_path: Path,
    leave_at: str,
    number: signal.Signals,
    grace_s: float,
    code: int,
    killed: str,
) -> None:
    launcher = start(script(f"count_signals(leave_at={leave_at})"), after_second_signal_s=grace_s)
    wait_for_files(tmp_path, "ready-0", "ready-1")
    launcher.send_signal(number)
    wait_for_files(tmp_path, "signals-0", "signals-1")
    launcher.send_signal(number)
    assert launcher.wait(60) == code
    assert launcher.stdout.read() == f"killed {killed}: still running {grace_s} s after a second signal\n"


def test_no_restart_after_a_signal_even_if_a_rank_then_crashes(
    script: Callable[[str], Path], start: Callable[..., Any], tmp_path: Path
) -> None:
    body = """
signal.signal(signal.SIGTERM, lambda *_: os._exit(9))
note("ready")
time.sleep(600)"""
    launcher = start(script(body), max_restarts=3)
    wait_for_files(tmp_path, "ready-0", "ready-1")
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(60) == 9
    assert (tmp_path / "ready-0").read_text() == "x\n"


def test_the_signals_are_given_back(script: Callable[[str], Path]) -> None:
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    run(script(""))
    assert [signal.getsignal(number) for number in numbers] == before


def test_processes_do_not_outlive_a_killed_launcher(
    script: Callable[[str], Path], start: Callable[..., Any], tmp_path: Path
) -> None:
    body = """
from pldr_train.launching import end_with_parent
end_with_parent()
signal.signal(signal.SIGTERM, signal.SIG_IGN)
note("pid", str(os.getpid()))
note("ready")
time.sleep(600)"""
    launcher = start(script(body))
    wait_for_files(tmp_path, "ready-0", "ready-1")
    pids = [int((tmp_path / f"pid-{rank}").read_text()) for rank in range(2)]
    launcher.kill()
    launcher.wait()
    wait_until(lambda: all(map(is_gone, pids)), "a process lives on")


def test_a_process_whose_launcher_has_died_already_ends_at_once() -> None:
    code = "from pldr_train.launching import end_with_parent; end_with_parent()"
    for launcher, expected in ((os.getpid(), 0), (1, -signal.SIGKILL)):
        environment = {**os.environ, "PLDR_TRAIN_LAUNCHED": "1", "PLDR_TRAIN_LAUNCHER_PID": str(launcher)}
        ended = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, check=False)
        assert ended.returncode == expected


def test_elsewhere_than_on_linux_nothing_is_asked_of_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setenv("PLDR_TRAIN_LAUNCHED", "1")
    monkeypatch.setenv("PLDR_TRAIN_LAUNCHER_PID", "1")
    end_with_parent()
