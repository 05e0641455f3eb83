"""Where a run's checkpoints stand: put in place, replaced and removed so that a death at any moment loses none."""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from pathlib import Path

from pldr_train.checkpoint.manifest import STATE_FILE
from pldr_train.data.files import put_in_place
from pldr_train.recipe import CheckpointSection
from pldr_train.runs.layout import (
    CHECKPOINTS_FOLDER,
    LAST_LINK,
    LOCK_FILE,
    MANIFEST_FILE,
    METRICS_FILE,
    RECIPE_FILE,
    checkpoint_folders,
    named_step,
)
from pldr_train.runs.metrics import finite_values
from pldr_train.runs.validations import best_first

_log = logging.getLogger(__name__)

BUILDING_PREFIX = ".building-"
_REPLACED, _DOOMED = f"{BUILDING_PREFIX}replaced-", f"{BUILDING_PREFIX}removed-"
FILE_NAMES = re.compile(rf"{MANIFEST_FILE}|{STATE_FILE}|(weights|optimizer)-\d+-of-\d+\.safetensors")
"""Names of a checkpoint's files."""


def put_back_replaced(root: Path) -> list[str]:
    """Put checkpoints back that were moved out of the way of new ones, which never came; return their names."""
    names = []
    for replaced in sorted(root.glob(f"{_REPLACED}*")):
        target = root / replaced.name.removeprefix(_REPLACED)
        if not os.path.lexists(target):
            replaced.rename(target)
            names.append(target.name)
    return names


def remove_leftovers(root: Path) -> None:
    """Remove the hidden folders of saves and removals that did not come to their end."""
    for leftover in root.glob(f"{BUILDING_PREFIX}*"):
        _discard(leftover)


def replace_folder(building: Path, target: Path) -> None:
    """Put a finished folder in its place; one that is there goes once it is."""
    replaced = target.with_name(f"{_REPLACED}{target.name}")
    put_in_place(building, target, replaced)
    _discard(replaced)


def _discard(path: Path) -> None:
    """Delete a checkpoint's folder or what was left of one; of a link what it names first, if that is this run's own.

    A folder that was moved to another disk with a link left in its place goes as it would have gone without the move.
    """
    if path.is_symlink():
        named = path.resolve()
        if path.exists() and _was_moved_there(named, path.name):
            shutil.rmtree(named, ignore_errors=True)
        path.unlink(missing_ok=True)
    else:
        remove(path)


def _was_moved_there(folder: Path, link: str) -> bool:
    """Return whether the folder that a link among a run's checkpoints names is no checkpoint of another run."""
    is_others = any((folder.parent.parent / name).exists() for name in (LOCK_FILE, RECIPE_FILE, METRICS_FILE))
    in_a_run = folder.parent.name == CHECKPOINTS_FOLDER and is_others
    names = [each.name for each in folder.iterdir()] if folder.is_dir() else [""]
    return link.endswith(folder.name) and not in_a_run and all(FILE_NAMES.fullmatch(name) for name in names)


def remove(path: Path) -> None:
    """Delete a file, a link or a folder with all that is in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def point_last_at(root: Path, name: str, warn: Callable[[str], None]) -> None:
    """Replace the link; without it nothing is lost, for the newest is found by the folders."""
    temporary = root / f"{BUILDING_PREFIX}{LAST_LINK}"
    try:
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(name)
        temporary.replace(root / LAST_LINK)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        last = root / LAST_LINK
        if last.is_dir() and not last.is_symlink():
            why = "a folder is there (a copy that followed the link?), which is left alone; remove it to have a link"
        else:
            why = f"{error.strerror or error}; this file system may have no links"
        warn(f"{last} cannot be made a link to the newest checkpoint: {why}. Commands find the newest without it")


def kept_steps(run: Path, settings: CheckpointSection, values: Mapping[int, float] | None = None) -> set[int]:
    """Return the steps whose checkpoints stay, however old: those that are named, and of the best those there are.

    Args:
        run: the run's folder.
        settings: of a resolved recipe.
        values: what validations measured of `keep_best.metric`, by step; None: as the run's metrics have it.
    """
    best = settings.keep_best
    if best is None:
        return set(settings.also_keep_steps)
    values = finite_values(run / METRICS_FILE, best.metric) if values is None else values
    steps = {_step(folder) for folder in checkpoint_folders(run / CHECKPOINTS_FOLDER)} & values.keys()
    return {*settings.also_keep_steps, *best_first({step: values[step] for step in steps}, best)[: best.n]}


def remove_old(
    root: Path,
    keep_last: int,
    keep_steps: Collection[int],
    newest: int | None = None,
    warn: Callable[[str], None] = _log.warning,
) -> None:
    """Delete all but the newest `keep_last` checkpoints and those of `keep_steps`.

    Args:
        root: the run's folder of checkpoints.
        keep_last: how many stay; those without a manifest do not count.
        keep_steps: steps that stay.
        newest: the newest whole one's step; later ones are damaged and neither count nor go. None: there are none.
        warn: is called with what cannot be deleted.
    """
    folders = [path for path in checkpoint_folders(root) if newest is None or _step(path) <= newest]
    counted = [path for path in folders if (path / MANIFEST_FILE).is_file()][:keep_last]
    oldest = _step(counted[-1]) if counted else 0
    for folder in folders:
        # Of a link to nothing the disk may only be missing.
        if _step(folder) < oldest and _step(folder) not in keep_steps and folder.exists():
            # Renamed first: a half-deleted folder must not be taken for a checkpoint.
            doomed = folder.with_name(f"{_DOOMED}{folder.name}")
            try:
                folder.rename(doomed)
            except OSError as error:
                warn(f"{folder} is old and cannot be removed: {error.strerror or error}")
            else:
                _discard(doomed)


def _step(folder: Path) -> int:
    step = named_step(folder.name)
    assert step is not None, folder
    return step
