"""The checkpoint that a run goes on from, or that a path names: the newest whole one."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from pldr_train.checkpoint.manifest import damaged_text, find_defect
from pldr_train.checkpoint.places import FILE_NAMES
from pldr_train.errors import CheckpointError
from pldr_train.runs.layout import CHECKPOINTS_FOLDER, LAST_LINK, MANIFEST_FILE, checkpoint_folders, named_step

_log = logging.getLogger(__name__)


def find_newest_whole(root: Path, check: Callable[[Path], str | None] = lambda _: None) -> Path | None:
    """Return the newest checkpoint that is whole, or `None` if there are none at all.

    Args:
        root: the run's folder of checkpoints.
        check: says why a checkpoint whose files are whole is passed over all the same, or None.

    Raises:
        CheckpointError: there are checkpoints, and all of them are damaged.
    """
    folders = checkpoint_folders(root)
    for folder in folders:
        defect = find_defect(folder)
        reason = check(folder) if defect is None else defect.reason
        if reason is None:
            return folder
        _log.warning(f"skipped checkpoint {folder}: {reason}")
    if folders:
        raise CheckpointError(
            f"all {len(folders)} checkpoints in {root} are damaged; restore one from a copy, or start over with "
            "--resume never (the old run is kept beside the new one)"
        )
    return None


def named_checkpoint(path: Path, shown: str | None = None) -> Path | None:
    """Return the whole checkpoint that a path names, or None: its folder or a file in it; or a run's folder, its folder
    of checkpoints or `last` in there, which all name the newest whole one.

    Its files are verified here, once.

    Args:
        path: as a user gives it.
        shown: the path in messages, such as `--resume PATH`.

    Raises:
        CheckpointError: the checkpoint that is named is damaged, or a run is named and all of its are.
    """
    folder = path.parent if path.is_file() and FILE_NAMES.fullmatch(path.name) else path
    if folder.name == LAST_LINK and checkpoint_folders(folder.parent):
        return find_newest_whole(folder.parent.absolute())
    if (folder / MANIFEST_FILE).is_file():
        # A link to another disk keeps its name, by which its run is found; any other link is followed.
        named = folder.absolute() if named_step(folder.name) is not None else folder.resolve()
        defect = find_defect(named)
        if defect is not None:
            raise CheckpointError(damaged_text(shown or str(path), defect.reason))
        return named
    roots = (path / CHECKPOINTS_FOLDER, path)
    root = next((each for each in roots if checkpoint_folders(each)), None)
    return None if root is None else find_newest_whole(root.absolute())
