"""Write files and folders atomically: they appear whole or not at all, also if a process dies or several write."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from pldr_train.errors import DataError

CACHE_FIX = "free some space, or set data.cache_dir to a folder that can be written"
_STALE_AFTER_S = 3600.0


def write_file_atomically(path: Path, content: bytes, fix: str = CACHE_FIX) -> None:
    """Write `content` under a temporary name beside `path`, sync it and rename it.

    Raises DataError naming the file, with `fix` as the advice.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=_prefix(path), dir=path.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        sync_path(path.parent)
    except OSError as error:
        raise _not_writable(path, error, fix) from error


def build_folder_atomically(folder: Path, fill: Callable[[Path], None], fix: str = CACHE_FIX) -> None:
    """Let `fill` write the files of a temporary folder, sync them and rename the folder to `folder`.

    If another process finishes the same folder first, its result stays and ours is removed. If `fill` raises, nothing
    is left. A killed process leaves a folder of a temporary name, which a later build removes. Raises DataError naming
    the folder, with `fix` as the advice, if it cannot be written.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(folder)
        temporary = Path(tempfile.mkdtemp(prefix=_prefix(folder), dir=folder.parent))
        try:
            fill(temporary)
            for file in temporary.iterdir():
                sync_path(file)
            os.chmod(temporary, 0o755)
            sync_path(temporary)
            if not folder.exists():
                _rename_unless_finished(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        sync_path(folder.parent)
    except OSError as error:
        raise _not_writable(folder, error, fix) from error


def put_in_place(new: Path, target: Path, aside: Path) -> None:
    """Rename `new` to `target`. An earlier target is renamed to `aside` first, and back if that fails.

    Raises OSError.
    """
    if os.path.lexists(target):
        target.rename(aside)
    try:
        new.rename(target)
    except OSError:
        if os.path.lexists(aside):
            aside.rename(target)
        raise


def sync_path(path: Path) -> None:
    """Flush a file, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _rename_unless_finished(temporary: Path, folder: Path) -> None:
    try:
        os.rename(temporary, folder)
    except OSError:
        if not folder.is_dir():
            raise


def _prefix(target: Path) -> str:
    return f".building-{target.name}-"


def _remove_stale(folder: Path) -> None:
    for leftover in folder.parent.glob(_prefix(folder) + "*"):
        try:
            if time.time() - leftover.stat().st_mtime > _STALE_AFTER_S:
                shutil.rmtree(leftover, ignore_errors=True)
        except FileNotFoundError:
            continue  # another process was quicker


def _not_writable(path: Path, error: OSError, fix: str) -> DataError:
    return DataError(f"cannot write {path}: {error.strerror or error}; {fix}")
