"""The lock of a run's folder: one process trains in a folder, and notices when its folder is taken away."""

from __future__ import annotations

import logging
import os
import platform
import secrets
from pathlib import Path
from typing import TextIO
from weakref import WeakSet

from pldr_train.errors import CheckpointError
from pldr_train.file_locks import try_lock
from pldr_train.runs.layout import LOCK_FILE

_log = logging.getLogger(__name__)

_MOST_CHARACTERS = 200


def is_held(folder: Path) -> bool:
    """Return whether a process of this machine trains in a folder.

    The kernel's list is read, for trying the lock could disturb a start.
    """
    try:
        status = (folder / LOCK_FILE).stat()
        locks = Path("/proc/locks").read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        return False
    device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    return any(device in line.split() for line in locks.splitlines())


class RunLock:
    """Held from `acquire` to `release`, or to the end of the process, however it ends.

    What is held is the path: a folder that was renamed or deleted is not held any more, though its lock file is.

    Args:
        folder: the run's.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._path = folder, folder / LOCK_FILE
        self._handle: TextIO | None = None
        self._text = ""
        self._folder_inode: tuple[int, int] | None = None
        self.works = True
        """False where the file system has no locks."""

    def acquire(self) -> None:
        """Take the lock of an existing folder.

        Raises:
            CheckpointError: another process has it.
            OSError: the file cannot be opened.
        """
        handle = self._path.open("a+", encoding="utf-8", errors="replace")
        try:
            held_by_another = not self._try_lock(handle)
        except BaseException:
            handle.close()
            raise
        if held_by_another:
            holder = self._holder(handle)
            handle.close()
            raise CheckpointError(
                f"run folder {self._folder} is in use by {holder}; wait for it, or give this run another run.name"
            )
        self._text = f"process {os.getpid()} on {platform.node()}, {secrets.token_hex(8)}"
        self._hold(handle)

    def release(self) -> None:
        """Give it up."""
        if self._handle is not None:
            self._handle.close()
        self._handle = None
        _held.discard(self)

    def check(self) -> str | None:
        """Return why the folder's path is not held any more; None while it is.

        A lock file that was removed is made again, if no other process was quicker.
        """
        if self._handle is None:
            return None
        try:
            there = os.stat(self._path)
        except FileNotFoundError:
            return self._make_again() if self._is_same_folder() else "it was moved or deleted"
        except OSError as error:
            return f"it cannot be read ({error.strerror})"
        mine = os.fstat(self._handle.fileno())
        return None if (there.st_dev, there.st_ino) == (mine.st_dev, mine.st_ino) else self._take_over()

    def _is_same_folder(self) -> bool:
        try:
            status = os.stat(self._folder)
        except OSError:
            return False
        return (status.st_dev, status.st_ino) == self._folder_inode

    def _make_again(self) -> str | None:
        try:
            handle = self._path.open("a+", encoding="utf-8", errors="replace")
        except OSError as error:
            return f"its lock was removed and cannot be made again ({error.strerror})"
        return self._swap(handle)

    def _take_over(self) -> str | None:
        """Lock another file at the path, if it is a copy of ours: the folder was copied and put in its place."""
        try:
            handle = self._path.open("a+", encoding="utf-8", errors="replace")
        except OSError as error:
            return f"its lock cannot be opened ({error.strerror})"
        handle.seek(0)
        if handle.read(_MOST_CHARACTERS) != self._text:
            holder = self._holder(handle)
            handle.close()
            return f"another folder is in its place, last used by {holder}"
        return self._swap(handle)

    def _swap(self, handle: TextIO) -> str | None:
        if not self._try_lock(handle):
            holder = self._holder(handle)
            handle.close()
            return f"it is in use by {holder}"
        assert self._handle is not None
        self._handle.close()
        self._hold(handle)
        return None

    def _hold(self, handle: TextIO) -> None:
        handle.seek(0)
        handle.truncate(0)
        handle.write(self._text)
        handle.flush()
        status = os.stat(self._folder)
        self._handle, self._folder_inode = handle, (status.st_dev, status.st_ino)
        _held.add(self)

    def _try_lock(self, handle: TextIO) -> bool:
        try:
            return try_lock(handle.fileno())
        except OSError as error:
            if self.works:
                _log.warning(
                    f"{self._folder}: files cannot be locked there ({error.strerror}), so nothing keeps a second "
                    "process out of this run: start it once only"
                )
            self.works = False
            return True

    def _holder(self, handle: TextIO) -> str:
        handle.seek(0)
        return handle.read(_MOST_CHARACTERS).partition(",")[0].strip() or "another process"

    def let_go(self) -> None:
        """Close a lock that a forked process has inherited; the parent's stays."""
        if self._handle is not None:
            self._handle.close()
            self._handle = None


_held: WeakSet[RunLock] = WeakSet()


def _let_go_in_child() -> None:
    """A loader worker that outlives a killed run must not hold its folder."""
    for lock in list(_held):
        lock.let_go()


os.register_at_fork(after_in_child=_let_go_in_child)
