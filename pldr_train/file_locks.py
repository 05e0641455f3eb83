"""Locks on open files, where the file system has them."""

from __future__ import annotations

import errno
import fcntl

_HELD = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)


def try_lock(descriptor: int) -> bool:
    """Lock an open file or folder for this process alone; False if another one holds it.

    Raises:
        OSError: locks do not work there; that says nothing of other processes.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _HELD:
            return False
        raise
    return True


def wait_for_lock(descriptor: int) -> None:
    """Lock an open file or folder for this process alone, once no other one holds it; raises as `try_lock`."""
    fcntl.flock(descriptor, fcntl.LOCK_EX)
