"""Locks that a killed build of a torch or DeepSpeed extension left behind: every later run waits on them for ever."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pldr_train.doctor.finding import Finding

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
