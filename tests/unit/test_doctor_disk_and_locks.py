"""Real files: the probe of the disk leaves none behind; locks of builds, held and abandoned."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch.utils.cpp_extension import get_default_build_root
from torch.utils.file_baton import FileBaton

from pldr_train.doctor import disk
from pldr_train.doctor.disk import STALE_S, check_disk, check_locks, extension_folder, measure_speed

MIB = 2**20


def test_the_probe_writes_what_is_asked_and_leaves_nothing(tmp_path: Path) -> None:
    speed = measure_speed(tmp_path, 10 * MIB)
    assert (speed.size_bytes, speed.read_bytes) == (10 * MIB, 10 * MIB)
    assert speed.write_bytes_per_s > 0
    assert speed.read_bytes_per_s > 0
    assert list(tmp_path.iterdir()) == []


def test_a_slow_disk_is_measured_on_less(tmp_path: Path) -> None:
    assert measure_speed(tmp_path, 1000 * MIB, limit_s=0.0).size_bytes == 4 * MIB


def test_a_folder_that_is_not_there_yet_is_measured_where_it_would_be(tmp_path: Path) -> None:
    space, speed, *_ = check_disk(tmp_path / "a" / "runs", probe_bytes=8 * MIB)
    assert space.figures["folder"] == speed.figures["folder"] == str(tmp_path)
    assert "is not there yet" in speed.text
    assert space.figures["free_bytes"] <= space.figures["total_bytes"]
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_nearly_full_is_warned_of_and_not_filled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "free_bytes", lambda _: 3 * MIB)
    space = next(check_disk(tmp_path))
    assert (space.level, space.figures["free_bytes"]) == ("warn", 3 * MIB)


def test_a_folder_that_cannot_be_written_fails() -> None:
    found = list(check_disk(Path("/proc/self"), probe_bytes=4 * MIB))
    # procfs has no space at all, so there is nothing to try.
    assert found[0].level in ("warn", "fail")
    speed = disk._speed(Path("/proc/self"), "in /proc/self", 4 * MIB)
    assert (speed.level, "--run-dir" in str(speed.advice)) == ("fail", True)


def levels(folder: Path) -> dict[str, str]:
    return {each.name: each.level for each in check_disk(folder, probe_bytes=4 * MIB)}


def test_locks_and_links_are_tried_where_runs_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert {name: levels(tmp_path)[name] for name in ("file locks", "links")} == {"file locks": "ok", "links": "ok"}
    assert list(tmp_path.iterdir()) == []

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    monkeypatch.setattr(os, "symlink", refuse)
    found = {each.name: each for each in check_disk(tmp_path, probe_bytes=4 * MIB)}
    assert (found["file locks"].level, found["links"].level) == ("warn", "note")
    assert "No locks available" in found["file locks"].text
    monkeypatch.setattr("fcntl.flock", lambda *_: None)
    assert levels(tmp_path)["file locks"] == "warn"
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------------------------- locks


def make_lock(folder: Path, age_s: float) -> Path:
    """A lock as torch's build makes it, of a build that was killed."""
    folder.mkdir(parents=True, exist_ok=True)
    killed = "import os, sys; os.open(sys.argv[1], os.O_CREAT | os.O_EXCL); os.kill(os.getpid(), 9)"
    path = folder / "lock"
    assert subprocess.run([sys.executable, "-Sc", killed, str(path)], check=False).returncode == -9
    os.utime(path, (time.time() - age_s,) * 2)
    return path


def test_the_folder_is_torchs_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    assert extension_folder(os.environ, Path.home()) == Path(get_default_build_root())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert extension_folder(os.environ, Path.home()) == Path(get_default_build_root())
    assert extension_folder({"TORCH_EXTENSIONS_DIR": "/scratch/x"}, Path.home()) == Path("/scratch/x")


@pytest.mark.parametrize(("needed", "level"), [(True, "fail"), (False, "warn")])
def test_a_stale_lock_is_reported_and_removed_only_with_fix(tmp_path: Path, needed: bool, level: str) -> None:
    lock = make_lock(tmp_path / "py311_cpu" / "cpu_adam", STALE_S + 100)
    (lock.parent / "build.ninja").touch()
    (found,) = check_locks(tmp_path, time.time(), fix=False, needed=needed)
    assert (found.level, str(lock) in found.text, "--fix" in str(found.advice)) == (level, True, True)
    assert lock.exists()
    (found,) = check_locks(tmp_path, time.time(), fix=True, needed=needed)
    assert (found.level, found.figures["removed"]) == ("ok", True)
    assert [path.name for path in lock.parent.iterdir()] == ["build.ninja"]
    (found,) = check_locks(tmp_path, time.time(), fix=True, needed=needed)
    assert (found.level, found.text) == ("ok", f"none in {tmp_path}")


def test_a_lock_that_a_living_build_holds_stays_however_old(tmp_path: Path) -> None:
    baton = FileBaton(str(tmp_path / "lock"))
    assert baton.try_acquire()
    os.utime(tmp_path / "lock", (0, 0))
    (found,) = check_locks(tmp_path, time.time(), fix=True, needed=True)
    assert (found.level, found.figures["holders"]) == ("note", [os.getpid()])
    assert (tmp_path / "lock").exists()
    baton.release()


def test_a_young_lock_stays(tmp_path: Path) -> None:
    lock = make_lock(tmp_path, 30.0)
    (found,) = check_locks(tmp_path, time.time(), fix=True, needed=True)
    assert (found.level, f"rm {lock}" in str(found.advice)) == ("warn", True)
    assert lock.exists()


def test_another_users_lock_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = make_lock(tmp_path, STALE_S * 2)
    monkeypatch.setattr(disk.os, "geteuid", lambda: lock.stat().st_uid + 1)
    (found,) = check_locks(tmp_path, time.time(), fix=True, needed=True)
    assert (found.level, "another user's" in found.text) == ("warn", True)
    assert lock.exists()


def test_what_is_no_lock_file_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "a" / "lock").mkdir(parents=True)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "lock").symlink_to(tmp_path / "precious")
    (tmp_path / "precious").touch()
    os.utime(tmp_path / "precious", (0, 0))
    (found,) = check_locks(tmp_path, time.time(), fix=True, needed=True)
    assert found.level == "ok"
    assert (tmp_path / "precious").exists()
