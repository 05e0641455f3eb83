"""Cores, memory, limits and GPUs as the doctor sees them, on machines made of files and figures."""

from __future__ import annotations

import resource
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pldr_train.doctor.machine import (
    Cgroup,
    check_cores,
    check_gpus,
    check_locked_memory,
    check_memory,
    check_open_files,
    check_shared_memory,
    driver_version,
    read_cgroup,
)

GIB = 2**30
FREE = Cgroup(None, None)


def write(root: Path, **files: str) -> None:
    for name, text in files.items():
        path = root / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


# ------------------------------------------------------------------------------------------------- cores and cgroups


@pytest.mark.parametrize(
    ("setting", "processes", "level", "words"),
    [
        (None, 1, "ok", "not set: torch starts 8"),
        (None, 4, "ok", "each of 4 processes gets 2"),
        ("2", 4, "ok", "OMP_NUM_THREADS=2"),
        ("8", 4, "warn", "wait for each other"),
        ("many", 1, "warn", "OMP_NUM_THREADS=many"),
        ("0", 1, "warn", "OMP_NUM_THREADS=0"),
    ],
)
def test_threads_against_cores(setting: str | None, processes: int, level: str, words: str) -> None:
    environment = {} if setting is None else {"OMP_NUM_THREADS": setting}
    cores, threads = check_cores(environment, processes, FREE, affinity=8)
    assert (cores.level, cores.figures["usable"]) == ("ok", 8)
    assert threads.level == level
    assert words in threads.text
    if level == "warn":
        assert f"OMP_NUM_THREADS={8 // processes} " in str(threads.advice)


def test_a_container_has_the_cores_that_it_is_given() -> None:
    cores, _ = check_cores({}, 4, Cgroup(2.5, None), affinity=16)
    assert (cores.level, cores.figures["usable"]) == ("warn", 2)
    assert "for 4 processes" in cores.text


def test_the_tightest_limit_of_all_groups_above_holds(tmp_path: Path) -> None:
    slices = tmp_path / "sys/fs/cgroup/a.slice"
    (slices / "job").mkdir(parents=True)
    write(tmp_path, proc__self__cgroup="0::/a.slice/job\n")
    (slices / "cpu.max").write_text("300000 100000\n")
    (slices / "job/cpu.max").write_text("max 100000\n")
    (slices / "job/memory.max").write_text(f"{8 * GIB}\n")
    (slices / "job/memory.current").write_text(f"{GIB}\n")
    (slices / "memory.max").write_text(f"{64 * GIB}\n")
    assert read_cgroup(tmp_path) == Cgroup(3.0, 8 * GIB, GIB)
    assert read_cgroup(tmp_path / "nothing") == FREE


def test_limits_of_the_older_control_groups(tmp_path: Path) -> None:
    write(tmp_path, proc__self__cgroup="4:memory:/job\n3:cpu,cpuacct:/job\n")
    for controller, name, text in (
        ("memory", "memory.limit_in_bytes", str(2 * GIB)),
        ("cpu", "cpu.cfs_quota_us", "-1"),
        ("cpu", "cpu.cfs_period_us", "100000"),
    ):
        folder = tmp_path / "sys/fs/cgroup" / controller / "job"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    assert read_cgroup(tmp_path) == Cgroup(None, 2 * GIB)


# --------------------------------------------------------------------------------------------------- memory and limits

MEMINFO = "MemTotal:  33554432 kB\nMemAvailable:  25165824 kB\nHugePages_Total:  0\n"


def test_memory_is_what_the_control_group_leaves() -> None:
    (found,) = check_memory(MEMINFO, FREE)
    assert (found.level, found.figures) == ("ok", {"total_bytes": 32 * GIB, "available_bytes": 24 * GIB})
    (found,) = check_memory(MEMINFO, Cgroup(None, 8 * GIB, 5 * GIB))
    assert (found.level, found.figures) == ("warn", {"total_bytes": 8 * GIB, "available_bytes": 3 * GIB})


def test_shared_memory_that_is_missing_or_there(tmp_path: Path) -> None:
    (found,) = check_shared_memory(tmp_path / "shm")
    assert found.level == "warn"
    assert "--shm-size" in str(found.advice)
    (found,) = check_shared_memory(tmp_path)
    assert found.figures["total_bytes"] > 0


@pytest.mark.parametrize(
    ("limits", "level", "advice"),
    [
        ((1023, 65_536), "warn", "ulimit -n 65536"),
        ((1024, 4096), "note", "ulimit -n 4096"),
        ((256, 256), "warn", "limits.conf"),
        ((1024, resource.RLIM_INFINITY), "note", "ulimit -n 65536"),
        ((4096, 4096), "ok", "None"),
        ((resource.RLIM_INFINITY, resource.RLIM_INFINITY), "ok", "None"),
    ],
)
def test_open_files(limits: tuple[int, int], level: str, advice: str) -> None:
    (found,) = check_open_files(limits)
    assert found.level == level
    assert advice in str(found.advice)


def test_locked_memory_matters_where_there_is_an_rdma_card(tmp_path: Path) -> None:
    small, endless = (8 * 2**20, 8 * 2**20), (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    (found,) = check_locked_memory(small, tmp_path)
    assert found.level == "ok"
    (tmp_path / "sys/class/infiniband/mlx5_0").mkdir(parents=True)
    (found,) = check_locked_memory(small, tmp_path)
    assert (found.level, "mlx5_0" in found.text, "ulimit -l" in str(found.advice)) == ("warn", True, True)
    (found,) = check_locked_memory(endless, tmp_path)
    assert (found.level, found.text) == ("ok", "no limit")


def test_the_limits_of_this_process_are_read() -> None:
    for found in (*check_open_files(), *check_locked_memory()):
        assert found.text


# ---------------------------------------------------------------------------------------------------------------- GPUs


class Cuda:
    """torch.cuda of a machine with cards of (free, total, capability)."""

    def __init__(self, *cards: tuple[int, int, tuple[int, int]], peers: bool = True) -> None:
        self.cards, self.peers = cards, peers

    def is_available(self) -> bool:
        return bool(self.cards)

    def device_count(self) -> int:
        return len(self.cards)

    def get_device_properties(self, index: int) -> Any:
        major, minor = self.cards[index][2]
        return SimpleNamespace(name="A Card", major=major, minor=minor)

    def mem_get_info(self, index: int) -> tuple[int, int]:
        return self.cards[index][:2]

    def can_device_access_peer(self, first: int, second: int) -> bool:
        return self.peers


FRESH = (79 * GIB, 80 * GIB, (9, 0))


def test_each_gpu_is_named_with_its_memory_and_capability() -> None:
    found = list(check_gpus(Cuda(FRESH, FRESH), "13.0", "580.65"))
    assert [each.level for each in found] == ["ok"] * 4
    assert found[0].figures == {"number": 2, "driver": "580.65", "cuda": "13.0"}
    assert "A Card: 79.0 GiB free of 80.0 GiB, capability 9.0, bf16" in found[1].text


def test_a_gpu_in_use_an_old_one_and_peers_apart_are_reported() -> None:
    cards = Cuda((10 * GIB, 80 * GIB, (9, 0)), (15 * GIB, 16 * GIB, (7, 5)), peers=False)
    _, used, old, apart = check_gpus(cards, "12.8", "570.1")
    assert (used.level, "nvidia-smi" in str(used.advice)) == ("warn", True)
    assert (old.level, "fp32" in str(old.advice)) == ("note", True)
    assert (apart.level, "0-1" in apart.text) == ("note", True)


@pytest.mark.parametrize(
    ("cuda_version", "driver", "level", "words"),
    [
        (None, None, "note", "none: a run computes on the CPU"),
        (None, "580.65", "warn", "for the CPU only"),
        ("13.0", "470.1", "warn", "none that torch can use"),
    ],
)
def test_no_gpu_is_a_note_unless_there_is_a_driver(
    cuda_version: str | None, driver: str | None, level: str, words: str
) -> None:
    (found,) = check_gpus(Cuda(), cuda_version, driver)
    assert found.level == level
    assert words in found.text


def test_the_driver_is_read_from_the_kernel(tmp_path: Path) -> None:
    assert driver_version(tmp_path) is None
    line = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (root@x)\n"
    write(tmp_path, proc__driver__nvidia__version=line)
    assert driver_version(tmp_path) == "580.65.06"
