"""The doctor's all-reduce among real processes: what it measures, and how it fails."""

from __future__ import annotations

import os
import time
from pathlib import Path

import psutil
import pytest

from pldr_train.doctor import all_reduce
from pldr_train.doctor.all_reduce import Reduction, bus_bandwidth, check_all_reduce, measure

MIB = 2**20
DIES = 'os.kill(os.getpid(), 9) if rank == "1" else time.sleep(60)'


def reduction(backend: str = "gloo", needed: bool = True, limit_s: float = 90.0) -> Reduction:
    return Reduction(backend, 2, needed, size_bytes=MIB, rounds=2, limit_s=limit_s)


def stand_in(monkeypatch: pytest.MonkeyPatch, folder: Path, text: str) -> None:
    """Have the processes do something else than an all-reduce."""
    program = folder / "program.py"
    program.write_text(f"import json, os, sys, time\nrank = sys.argv[1]\n{text}\n")
    monkeypatch.setattr(all_reduce, "_PROGRAM", program)


def running_below_this_process() -> list[psutil.Process]:
    children = [each for each in psutil.Process().children(recursive=True) if each.status() != psutil.STATUS_ZOMBIE]
    commands = [(each, " ".join(each.cmdline())) for each in children]
    return [each for each, command in commands if "reducing.py" in command or "program.py" in command]


def test_the_bus_bandwidth_is_that_of_nccl_tests() -> None:
    assert bus_bandwidth(2, 1000, 1.0) == 1000
    assert bus_bandwidth(8, 800, 0.5) == pytest.approx(2 * 7 / 8 * 800 / 0.5)
    assert bus_bandwidth(1, 1000, 1.0) == 0


def test_two_processes_sum_and_their_speed_is_reported() -> None:
    (found,) = check_all_reduce(reduction())
    assert found.level == "ok", found.text
    speed = bus_bandwidth(2, MIB, found.figures["seconds"])
    assert found.figures["bus_bytes_per_s"] == speed > 0
    assert f"gloo, 2 processes: {speed / 1e9:,.2f} GB/s bus bandwidth" in found.text
    assert not running_below_this_process()


@pytest.mark.parametrize(
    ("backend", "words"), [("nccl", ["NCCL_P2P_DISABLE=1", "NCCL_SOCKET_IFNAME"]), ("gloo", ["GLOO_SOCKET_IFNAME"])]
)
def test_processes_that_hang_are_ended_at_the_limit(
    backend: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch, tmp_path, "time.sleep(60)")
    begun = time.monotonic()
    (found,) = check_all_reduce(reduction(backend, limit_s=0.5))
    assert time.monotonic() - begun < 30
    assert (found.level, "no result within 0.5 s" in found.text) == ("fail", True)
    assert all(word in str(found.advice) for word in words)
    assert not running_below_this_process()


def test_a_process_that_dies_ends_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, tmp_path, f'print("out of memory", file=sys.stderr, flush=True)\n{DIES}')
    (found,) = check_all_reduce(reduction(needed=False))
    assert found.level == "warn"
    assert "process 1 was killed by signal 9: out of memory" in found.text
    assert not running_below_this_process()


def test_a_wrong_sum_fails_even_where_no_run_needs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, tmp_path, 'print(json.dumps({"seconds": 0.1, "right": rank == "0"}))')
    (found,) = check_all_reduce(reduction("nccl", needed=False))
    assert (found.level, "the sum was wrong" in found.text) == ("fail", True)
    assert str(found.advice).startswith("try NCCL_P2P_DISABLE=1")


def test_the_slowest_process_counts_and_slow_links_of_gpus_are_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch, tmp_path, 'print(json.dumps({"seconds": 0.001 * (1 + int(rank)), "right": True}))')
    assert measure(reduction(), os.environ).seconds == 0.002
    (found,) = check_all_reduce(reduction("nccl"))
    assert (found.level, "nvidia-smi topo -m" in str(found.advice)) == ("note", True)
    assert found.figures["bus_bytes_per_s"] == pytest.approx(MIB / 0.002)


@pytest.mark.gpu
def test_nccl_starts_on_a_gpu() -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    number = torch.cuda.device_count()
    (found,) = check_all_reduce(Reduction("nccl", number, True, size_bytes=MIB, rounds=2))
    assert found.level in ("ok", "note"), found.text
