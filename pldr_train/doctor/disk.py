"""The disk that the runs go to, and locks of killed builds.

Space, how fast the disk writes and reads, whether files can be locked and linked; and locks that a killed build of a
torch or DeepSpeed extension left behind, on which every later run would wait for ever.
"""

from __future__ import annotations

import os
import stat
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pldr_train.doctor.finding import Finding
from pldr_train.doctor.machine import size_text
from pldr_train.file_locks import try_lock

PROBE_BYTES = 256 * 2**20
_BLOCK_BYTES = 4 * 2**20
_LIMIT_S = 15.0
"""Of writing and of reading each: a slow disk is measured on less."""
_LITTLE_SPACE_BYTES = 5 * 2**30
_SLOW_BYTES_PER_S = 50e6


@dataclass(frozen=True)
class Speed:
    """One measurement: bytes written and synced, then read back past the page cache where the system allows it."""

    size_bytes: int
    write_s: float
    read_bytes: int
    read_s: float

    @property
    def write_bytes_per_s(self) -> float:
        """With the sync."""
        return self.size_bytes / max(self.write_s, 1e-9)

    @property
    def read_bytes_per_s(self) -> float:
        """Memory's speed rather than the disk's on a file system that lives in memory."""
        return self.read_bytes / max(self.read_s, 1e-9)


def existing_part(folder: Path) -> Path:
    """Return the folder itself, or the nearest one above it that exists: where it would be made."""
    whole = folder.absolute()
    return next(part for part in (whole, *whole.parents) if os.path.isdir(part))


def free_bytes(folder: Path) -> int:
    """Return what this user may still write in the file system of `folder`."""
    disk = os.statvfs(folder)
    return disk.f_bavail * disk.f_frsize


def check_disk(folder: Path, probe_bytes: int = PROBE_BYTES) -> Iterator[Finding]:
    """Yield the space in the file system of `folder`, which need not exist yet, and its speed."""
    there = existing_part(folder)
    where = f"in {there}" if there == folder.absolute() else f"in {there} ({folder} is not there yet)"
    free = free_bytes(there)
    yield from _space(there, where, free)
    # A probe must not be what fills the disk.
    size = min(probe_bytes, free // 4) // _BLOCK_BYTES * _BLOCK_BYTES
    if size:
        yield _speed(there, where, size)
    yield from _locks_and_links(there, where)


def _locks_and_links(there: Path, where: str) -> Iterator[Finding]:
    figures = {"folder": str(there)}
    try:
        with tempfile.TemporaryDirectory(dir=there, prefix=".pldr-train-doctor-") as folder:
            yield _locks(Path(folder), where, figures)
            yield _links(Path(folder), where, figures)
    except OSError as error:
        text = f"a folder cannot be made {where}: {error.strerror}"
        yield Finding("fail", "run folder", text, "set run.dir to a folder that can be written", figures)


def _locks(folder: Path, where: str, figures: Mapping[str, Any]) -> Finding:
    advice = "start each run once only, or set run.dir to a disk of this machine"
    with (folder / "lock").open("w") as first, (folder / "lock").open("w") as second:
        try:
            if try_lock(first.fileno()) and not try_lock(second.fileno()):
                return Finding("ok", "file locks", f"work {where}: two processes cannot train one run", figures=figures)
            text = f"do nothing {where}: nothing keeps a second process out of a run"
        except OSError as error:
            text = f"do not work {where} ({error.strerror}): nothing keeps a second process out of a run"
    return Finding("warn", "file locks", text, advice, figures)


def _links(folder: Path, where: str, figures: Mapping[str, Any]) -> Finding:
    try:
        (folder / "last").symlink_to("lock")
    except OSError as error:
        text = f"cannot be made {where} ({error.strerror}): checkpoints/last will be missing"
        return Finding("note", "links", text, "name a run's folder instead, which means its newest checkpoint", figures)
    return Finding("ok", "links", f"work {where}", figures=figures)


def _space(there: Path, where: str, free: int) -> Iterator[Finding]:
    disk = os.statvfs(there)
    total = disk.f_blocks * disk.f_frsize
    figures = {"folder": str(there), "free_bytes": free, "total_bytes": total}
    text = f"{size_text(free)} free of {size_text(total)} {where}"
    if disk.f_files and not disk.f_favail:
        advice = "delete files there, or set run.dir to another disk"
        yield Finding("fail", "disk space", f"no more files can be made (no inodes left) {where}", advice, figures)
    elif free < _LITTLE_SPACE_BYTES:
        advice = "free some space, or set run.dir to another disk; a RECIPE says how much its checkpoints need"
        yield Finding("warn", "disk space", text, advice, figures)
    else:
        yield Finding("ok", "disk space", text, figures=figures)


def _speed(there: Path, where: str, size: int) -> Finding:
    try:
        speed = measure_speed(there, size)
    except OSError as error:
        text = f"{size // 2**20} MiB cannot be written {where}: {error.strerror}"
        advice = "check permissions, quota and `ulimit -f`, or name another folder (run.dir, --run-dir)"
        return Finding("fail", "disk speed", text, advice, {"folder": str(there)})
    rates = {"write_bytes_per_s": speed.write_bytes_per_s, "read_bytes_per_s": speed.read_bytes_per_s}
    figures = {"folder": str(there), "size_bytes": speed.size_bytes, **rates}
    text = (
        f"writes {speed.write_bytes_per_s / 1e6:,.0f} MB/s, reads {speed.read_bytes_per_s / 1e6:,.0f} MB/s "
        f"({speed.size_bytes // 2**20} MiB, synced) {where}"
    )
    if min(rates.values()) < _SLOW_BYTES_PER_S:
        advice = (
            "checkpoints will hold the run up: name a local disk (run.dir), or save less often (checkpoint.every_s)"
        )
        return Finding("warn", "disk speed", text, advice, figures)
    return Finding("ok", "disk speed", text, figures=figures)


def measure_speed(folder: Path, size_bytes: int, limit_s: float = _LIMIT_S) -> Speed:
    """Write a file in `folder`, sync it and read it back.

    The file has no name (or loses it at once), so nothing is left behind however the program ends.

    Args:
        folder: an existing one.
        size_bytes: of the file.
        limit_s: writing, and reading, go on for so long at most (and one block more).
    """
    block = os.urandom(_BLOCK_BYTES)  # a file system that compresses would show its speed on zeros
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        begun, written = time.perf_counter(), 0
        while written < size_bytes and (not written or time.perf_counter() - begun < limit_s):
            written += file.write(block[: size_bytes - written])
        os.fsync(file.fileno())
        write_s = time.perf_counter() - begun
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        begun, read = time.perf_counter(), 0
        buffer = bytearray(_BLOCK_BYTES)
        while (size := file.readinto(buffer)) and (read := read + size) and time.perf_counter() - begun < limit_s:
            pass
        return Speed(written, write_s, read, time.perf_counter() - begun)


STALE_S = 600.0
"""A build on another machine that shares the folder cannot be seen; none waits so long before its lock is touched."""


@dataclass(frozen=True)
class Lock:
    """A lock file: torch keeps it open while it builds, and removes it afterwards."""

    path: Path
    age_s: float
    holders: tuple[int, ...]
    """Processes of this machine that have it open."""
    owner_hidden: bool
    """It is another user's, whose open files cannot be seen."""

    @property
    def is_stale(self) -> bool:
        """Old, and held by nobody."""
        return not self.holders and not self.owner_hidden and self.age_s >= STALE_S


def extension_folder(environment: Mapping[str, str], home: Path) -> Path:
    """Return where torch builds extensions, by torch's rules."""
    if folder := environment.get("TORCH_EXTENSIONS_DIR"):
        return Path(folder)
    return Path(environment.get("XDG_CACHE_HOME") or home / ".cache") / "torch_extensions"


def find_locks(folder: Path, now_s: float) -> list[Lock]:
    """Return all locks below a folder, by path; `now_s` is the time since the epoch."""
    found = []
    for parent, _, names in os.walk(folder):
        if "lock" not in names:
            continue
        path = Path(parent) / "lock"
        try:
            status = path.lstat()
        except FileNotFoundError:
            continue  # its build has just ended
        if stat.S_ISREG(status.st_mode):
            hidden = os.geteuid() not in (0, status.st_uid)
            found.append(Lock(path, now_s - status.st_mtime, _holders(status), hidden))
    return sorted(found, key=lambda lock: lock.path)


def _holders(status: os.stat_result) -> tuple[int, ...]:
    """Return the processes that have a file open, by its device and inode."""
    wanted = (status.st_dev, status.st_ino)
    holders = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            descriptors = os.listdir(process / "fd")
        except OSError:
            continue  # it has ended, or is another user's
        for descriptor in descriptors:
            with suppress(OSError):  # closed meanwhile
                there = os.stat(process / "fd" / descriptor)
                if (there.st_dev, there.st_ino) == wanted:
                    holders.add(int(process.name))
    return tuple(sorted(holders))


def check_locks(folder: Path, now_s: float, fix: bool, needed: bool) -> Iterator[Finding]:
    """Yield a finding for each lock; with `fix` the stale ones are removed.

    Args:
        folder: where extensions are built.
        now_s: time since the epoch.
        fix: remove what is stale.
        needed: whether the run builds extensions (DeepSpeed does).
    """
    locks = find_locks(folder, now_s)
    if not locks:
        yield Finding("ok", "build locks", f"none in {folder}")
    for lock in locks:
        yield _removed(lock) if fix and lock.is_stale else _described(lock, needed)


def _described(lock: Lock, needed: bool) -> Finding:
    age = f"{lock.age_s / 60:,.0f} min old"
    figures = {"path": str(lock.path), "age_s": round(lock.age_s), "holders": list(lock.holders)}
    if lock.holders:
        text = f"{lock.path}: process {', '.join(map(str, lock.holders))} is building ({age})"
        return Finding("note", "build locks", text, "wait until it is done", figures)
    if lock.is_stale:
        text = f"{lock.path}: {age}, and no process holds it: what builds this extension waits for ever"
        advice = f"pldr-train doctor --fix, or rm {lock.path}"
        return Finding("fail" if needed else "warn", "build locks", text, advice, figures)
    if lock.owner_hidden:
        text = f"{lock.path}: {age}, another user's; whether it is in use cannot be seen"
        return Finding(
            "warn", "build locks", text, "ask its owner, or set TORCH_EXTENSIONS_DIR to a folder of your own", figures
        )
    text = f"{lock.path}: {age}, and no process of this machine holds it"
    advice = (
        f"if no other machine builds there, rm {lock.path}; `pldr-train doctor --fix` does so once it is "
        f"{STALE_S / 60:g} min old"
    )
    return Finding("warn", "build locks", text, advice, figures)


def _removed(lock: Lock) -> Finding:
    figures = {"path": str(lock.path), "age_s": round(lock.age_s), "holders": []}
    try:
        lock.path.unlink(missing_ok=True)
    except OSError as error:
        text = f"{lock.path}: stale, and cannot be removed: {error.strerror}"
        return Finding("fail", "build locks", text, f"rm {lock.path}, as a user who may", figures)
    return Finding("ok", "build locks", f"{lock.path}: was stale, removed", figures=figures | {"removed": True})
