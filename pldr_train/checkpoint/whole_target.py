"""A file or folder that a command writes whole or not at all, beside what was there before."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from pldr_train.checkpoint.places import remove
from pldr_train.data.files import put_in_place, sync_path
from pldr_train.errors import CheckpointError
from pldr_train.file_locks import try_lock
from pldr_train.outputs import keep_off_runs
from pldr_train.runs.layout import CHECKPOINTS_FOLDER, LAST_LINK, RECIPE_FILE

_SYNCED_AT_ONCE = 16


def check_target(target: Path, source: Path, replace: bool, is_ours: bool, what: str) -> None:
    """Check that `target` may be written, before the work is done.

    Args:
        target: what is to be written.
        source: the checkpoint that it is made from.
        replace: whether what is there may be replaced.
        is_ours: whether what is there is what such a command writes, and nothing else.
        what: that, in words.

    Raises:
        CheckpointError: it exists and may not be replaced, or lies where it would harm a run.
    """
    where = target.resolve()
    if where == source or source in where.parents or where in source.parents:
        raise CheckpointError(f"{target} and the checkpoint {source} lie in one another; name a place outside of it")
    inside = next((parent for parent in where.parents if _is_runs(parent)), None)
    if inside is not None:
        raise CheckpointError(
            f"{target} is inside {inside}, where a run keeps, counts and removes its own checkpoints; name a place "
            "outside of it"
        )
    keep_off_runs(target, "the place to write,")
    if not os.path.lexists(target):
        return
    if not replace:
        raise CheckpointError(f"{target} exists; name another place, or pass --force to replace it")
    if not is_ours:
        raise CheckpointError(f"{target} is not {what} alone, so it is not replaced; name another place, or remove it")


def _is_runs(folder: Path) -> bool:
    """Return whether it is where a run keeps its checkpoints."""
    in_a_run = folder.name == CHECKPOINTS_FOLDER and (folder.parent / RECIPE_FILE).exists()
    return in_a_run or (folder / LAST_LINK).is_symlink()


@contextmanager
def whole_target(target: Path, needed_bytes: int, replace: bool) -> Iterator[Path]:
    """Give a place for a file or folder beside `target`, where it is put, synced, when the block ends without error.

    Args:
        target: what is to be written.
        needed_bytes: about how much will be written, at most.
        replace: whether to take the place of what is there.

    Raises:
        CheckpointError: the disk is full or refuses, or another process is writing the same; what was there stays.
    """
    building = target.with_name(f".building-{target.name}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        building.mkdir(exist_ok=True)
        lock = os.open(building, os.O_RDONLY)
    except OSError as error:
        raise CheckpointError(_not_written(target, error)) from error
    try:
        _begin(target, building, lock, needed_bytes)
        try:
            yield building / "new"
            _put_in_place(target, building, replace)
        except OSError as error:
            raise CheckpointError(_not_written(target, error)) from error
        finally:
            shutil.rmtree(building, ignore_errors=True)
    finally:
        os.close(lock)


def _begin(target: Path, building: Path, lock: int, needed_bytes: int) -> None:
    # Where locks do not work, what a second command writes at once is at worst incomplete, and said so by it.
    with suppress(OSError):
        if not try_lock(lock):
            raise CheckpointError(f"{target} is being written by another process; wait for it, or name another place")
    # What a process that was killed has left; the lock ends with the process.
    if os.path.lexists(building / "replaced") and not os.path.lexists(target):
        (building / "replaced").rename(target)
    for leftover in building.iterdir():
        remove(leftover)
    free = shutil.disk_usage(target.parent).free
    if needed_bytes > free:
        shutil.rmtree(building, ignore_errors=True)
        raise CheckpointError(
            f"{target} takes up to {needed_bytes / 1e6:,.0f} MB and {free / 1e6:,.0f} MB are free there; free some "
            "space, or name a place on another disk"
        )


def _put_in_place(target: Path, building: Path, replace: bool) -> None:
    new, old = building / "new", building / "replaced"
    # Many small files that are synced one after the other take far longer.
    with ThreadPoolExecutor(_SYNCED_AT_ONCE) as pool:
        list(pool.map(sync_path, [*new.rglob("*"), new]))
    if os.path.lexists(target) and not replace:
        raise CheckpointError(f"{target} exists by now; name another place, or pass --force to replace it")
    put_in_place(new, target, old)
    sync_path(target.parent)


def _not_written(target: Path, error: OSError) -> str:
    try:
        free = f" ({shutil.disk_usage(target.parent).free / 1e6:,.0f} MB free there)"
    except OSError:
        free = ""
    return (
        f"cannot write {target}: {error.strerror or error}{free}; nothing was changed. Free some space, or name a "
        "place that can be written"
    )
