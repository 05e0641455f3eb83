"""Errors that a user can correct.

Anything a user can cause (a wrong recipe, a missing file, a damaged checkpoint) is raised as a `UserError` whose
message names the key or file, the value and the fix. The command line prints the message alone and exits with code 2;
every other exception is a defect of the program and keeps its traceback.
"""

from __future__ import annotations

import errno
import os


class UserError(ValueError):
    """Base of all errors that the user can correct; the message is complete by itself."""


class RecipeError(UserError):
    """One or more problems in a recipe; the message lists them all."""


class DataError(UserError):
    """A corpus, tokenizer or data file that cannot be used as the recipe asks."""


class CheckpointError(UserError):
    """A checkpoint that cannot be written, or is damaged, unsafe or does not fit the run."""


class LeakageError(UserError):
    """The model reads the future, and the recipe says that the run ends on it; it was saved."""


class ReportedElsewhereError(UserError):
    """Another process of the run has the error that ends it, and reports it."""


class LostProcessError(Exception):
    """Another process of the run has ended or does not answer: nothing to correct here, and no defect either."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the error's type where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


_FIXES = {
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "a part of the path is a file; name another",
    errno.EISDIR: "name a file",
    errno.EEXIST: "name another, or move it away",
    errno.ENOTEMPTY: "name another, or move it away",
    errno.EACCES: "change its permissions, or name another",
    errno.EPERM: "change its permissions, or name another",
    errno.EROFS: "name a place on a disk that can be written",
    errno.ENAMETOOLONG: "shorten the name",
    errno.ELOOP: "its links lead to each other; name what they should lead to",
    errno.EMFILE: "raise the limit of open files, `ulimit -n`",
    errno.ENFILE: "close other programs, or raise the machine's limit of open files",
    errno.EIO: "its disk does not answer as it should; look at it, or copy the file anew",
    errno.ESTALE: "it was replaced on its server; run the same command again",
    errno.ENODEV: "name a regular file",
    errno.ENXIO: "name a regular file",
    errno.EINVAL: "name a regular file",
    errno.ETXTBSY: "another program uses it; end that, or name another",
    errno.EBUSY: "another program uses it; end that, or name another",
}


_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def os_error_text(error: OSError) -> str | None:
    """Return path, reason and fix of what the system refused.

    None where the error names no file and the disk is not full: that is no user's error.
    """
    if error.errno in _DISK_FULL:
        where = f" while writing {error.filename}" if error.filename else ""
        return (
            f"the disk is full{where} ({error.strerror}); free some space and run the same command again: it goes on "
            "from the last checkpoint"
        )
    if error.errno is None or not isinstance(error.filename, str | bytes | os.PathLike):
        return None
    paths = " -> ".join(os.fsdecode(each) for each in (error.filename, error.filename2) if each is not None)
    reason = error.strerror or type(error).__name__
    return f"{paths}: {reason[:1].lower()}{reason[1:]}; {_FIXES.get(error.errno, 'check the path and its disk')}"
