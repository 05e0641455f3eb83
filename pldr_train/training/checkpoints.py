"""Checkpoints on disk: written whole or not at all, checksummed, read without running anything in them.

    checkpoints/step-00000400/weights-*.safetensors    the weights, see `shards.py`
                              optimizer-*.safetensors  AdamW's moments
                              state.pt                 all else, tensors and plain types only (torch's zip format)
                              manifest.json            step, recipe, sizes and SHA-256 of the files, see `manifest.py`
                last -> step-00000400                  a link for people, replaced atomically

The newest whole checkpoint is found by the folders (`find_newest_whole`), never by the link, which may be missing, a
copied folder, or old. A folder may be a link to one on another disk.

A checkpoint is built in a hidden folder beside the others, by all processes together, synced, and renamed into place by
one: a process that dies at any moment leaves the old ones whole and at worst hidden folders, which the next start puts
in place or removes (`settle`).
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from pldr_train.data.files import sync_path
from pldr_train.errors import CheckpointError, UserError, first_line
from pldr_train.runs.layout import (
    CHECKPOINTS_FOLDER,
    LAST_LINK,
    MANIFEST_FILE,
    checkpoint_folders,
    folder_name,
    linked_last,
    named_step,
)
from pldr_train.training.checkpoint_places import (
    BUILDING_PREFIX,
    FILE_NAMES,
    point_last_at,
    put_back_replaced,
    remove,
    remove_leftovers,
    remove_old,
    replace_folder,
)
from pldr_train.training.manifest import STATE_FILE, manifest_text, parse_manifest
from pldr_train.training.torch_files import DamagedFileError, ForbiddenContentError, read_torch_file
from pldr_train.training.world import World

_log = logging.getLogger(__name__)

__all__ = [
    "BUILDING_PREFIX", "FILE_NAMES", "LAST_LINK", "MANIFEST_FILE", "STATE_FILE", "checkpoint_folders", "folder_name",
    "remove_old",
]  # fmt: skip

T = TypeVar("T")


def write_checkpoint(
    root: Path,
    step: int,
    fill: Callable[[Path], dict[str, dict[str, Any]]],
    info: Mapping[str, Any],
    world: World | None = None,
    warn: Callable[[str], None] = _log.warning,
) -> Path:
    """Write a checkpoint whole or not at all, and point `last` at it; called by all processes.

    Args:
        root: the run's folder of checkpoints.
        step: optimizer steps done.
        fill: writes this process' files, synced, into the folder it is given; returns `bytes` and `sha256` of each.
        info: plain values for the manifest, readable without the state.
        world: the processes.
        warn: is called, on rank 0, when `last` cannot be a link.

    Returns:
        The checkpoint's folder; one of the same step is replaced.

    Raises:
        CheckpointError: it could not be written by some process; what was there before is untouched.
    """
    world = world or World()
    target = root / folder_name(step)
    building = root / f"{BUILDING_PREFIX}{target.name}"

    def attempt(action: Callable[[], T]) -> Callable[[], T]:
        def attempted() -> T:
            try:
                return action()
            except OSError as error:
                raise CheckpointError(_not_written(root, step, error)) from error

        return attempted

    try:
        world.together(attempt(lambda: _begin(root, building)), here=world.is_main)
        mine = world.together(attempt(lambda: fill(building)))
        files = {name: entry for part in world.gather(mine) for name, entry in sorted((part or {}).items())}
        manifest = manifest_text(step, files, info)
        world.together(attempt(lambda: _finish(root, building, target, manifest, warn)), here=world.is_main)
    except UserError:
        if world.is_main:
            remove(building)
        raise
    return target


def _begin(root: Path, building: Path) -> None:
    root.mkdir(parents=True, exist_ok=True)
    put_back_replaced(root)
    remove_leftovers(root)
    building.mkdir()


def _finish(root: Path, building: Path, target: Path, manifest: str, warn: Callable[[str], None]) -> None:
    _write_synced(building / MANIFEST_FILE, manifest.encode())
    sync_path(building)
    replace_folder(building, target)
    point_last_at(root, target.name, warn)
    sync_path(root)


def settle(root: Path) -> None:
    """Put a run's folder of checkpoints in order after a death in the midst of a save; by the run's lock's holder only.

    A checkpoint that was whole but not in its place is put there, the link `last` names the newest whole one again, and
    what else was left behind is removed.

    Raises:
        CheckpointError: the folder is a link to nothing, or cannot be changed.
    """
    if root.is_symlink() and not root.exists():
        raise CheckpointError(
            f"{root} is a link to {root.readlink()}, which is not there; mount its disk, or put the folder back"
        )
    if not root.is_dir():
        return
    try:
        for building in sorted(root.glob(f"{BUILDING_PREFIX}step-*")):
            target = root / building.name.removeprefix(BUILDING_PREFIX)
            if named_step(target.name) is not None and not os.path.lexists(target) and _is_whole(building, target.name):
                building.rename(target)
                _log.info(f"checkpoint {target.name} was whole but not in its place yet; it is there now")
        for name in put_back_replaced(root):
            _log.info(f"checkpoint {name} was about to be written again; the one from before is back")
        remove_leftovers(root)
    except OSError as error:
        raise CheckpointError(f"{root} cannot be put in order: {error}; see to its permissions and its disk") from error


def repair_last(root: Path, newest: Path, warn: Callable[[str], None]) -> None:
    """Let the link `last` name the newest whole checkpoint, should a death have prevented it."""
    if linked_last(root) != root / newest.name:
        point_last_at(root, newest.name, warn)


def _is_whole(folder: Path, name: str) -> bool:
    manifest = read_manifest(folder)
    return not isinstance(manifest, Defect) and manifest["step"] == named_step(name) and find_defect(folder) is None


def save_state(path: Path, state: Any, sync: bool = True) -> None:
    """Write a state file, or anything else of tensors and plain types, and sync it.

    Raises:
        OSError: the file cannot be written.
    """
    with path.open("wb") as handle:
        try:
            torch.save(state, handle)
        except RuntimeError as error:
            # torch reports a write that failed (a full disk) as an error of its own.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise
        handle.flush()
        if sync:
            os.fsync(handle.fileno())


def describe_file(path: Path) -> dict[str, Any]:
    """`bytes` and `sha256` of a file, for the manifest."""
    with path.open("rb") as handle:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(handle, "sha256").hexdigest()}


def _not_written(root: Path, step: int, error: OSError) -> str:
    try:
        free = f"{shutil.disk_usage(root).free / 1e6:,.0f} MB free there"
    except OSError:
        free = "the disk cannot be asked for its free space"
    kept = [path.name for path in checkpoint_folders(root)]
    earlier = f"the newest earlier one, {kept[0]}, is untouched" if kept else "there is no earlier one"
    return (
        f"the checkpoint of step {step} could not be written to {root}: {error.strerror or error} ({free}); "
        f"{earlier}. Free some space, then run the same command again: it resumes"
    )


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as handle:
        handle.write(data)
        handle.flush()
        os.fsync(handle.fileno())


def step_of(folder: Path) -> int:
    """The step in a checkpoint folder's name, or of one of another name (a copy) the step in its manifest.

    Raises:
        CheckpointError: it has another name, and its manifest is damaged.
    """
    named = named_step(folder.name)
    if named is not None:
        return named
    manifest = read_manifest(folder)
    if isinstance(manifest, Defect):
        raise CheckpointError(f"{folder}: {manifest.reason}; name another checkpoint")
    return int(manifest["step"])


@dataclass(frozen=True)
class Defect:
    """Why a checkpoint cannot be used."""

    folder: Path
    reason: str


def read_manifest(folder: Path) -> dict[str, Any] | Defect:
    """A checkpoint's manifest, if it is whole and one of this version's."""
    manifest = parse_manifest(folder)
    return Defect(folder, manifest) if isinstance(manifest, str) else manifest


def find_defect(folder: Path) -> Defect | None:
    """Check a checkpoint's manifest, sizes and checksums; `None` if it is whole."""
    manifest = read_manifest(folder)
    if isinstance(manifest, Defect):
        return manifest
    for name, expected in manifest["files"].items():
        reason = _file_defect(folder / name, expected)
        if reason:
            return Defect(folder, reason)
    return None


def read_info(folder: Path) -> dict[str, Any]:
    """What `write_checkpoint` was given as `info`.

    Raises:
        CheckpointError: the manifest is damaged.
    """
    manifest = read_manifest(folder)
    if isinstance(manifest, Defect):
        raise CheckpointError(f"{folder}: {manifest.reason}; name another checkpoint")
    info: dict[str, Any] = manifest["info"]
    return info


def _file_defect(path: Path, expected: dict[str, Any]) -> str | None:
    try:
        size = path.stat().st_size
        if size != expected["bytes"]:
            return f"{path.name} has {size:,} bytes instead of {expected['bytes']:,}"
        found = describe_file(path)
    except OSError as error:
        return f"{path.name} cannot be read: {error.strerror}"
    return None if found["sha256"] == expected["sha256"] else f"{path.name} does not match its checksum"


def find_newest_whole(root: Path, check: Callable[[Path], str | None] = lambda _: None) -> Path | None:
    """The newest checkpoint that is whole, or `None` if there are none at all.

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


def damaged_text(shown: str, reason: str) -> str:
    """Return the message about a checkpoint that was named and is damaged."""
    return f"{shown}: the checkpoint is damaged: {reason}; name another one"


class UnsafeStateError(CheckpointError):
    """A state file holds more than tensors and plain types."""


def load_state(path: Path, map_location: Any = None) -> dict[str, Any]:
    """Read a checkpoint's state file; whatever is not a tensor or a plain type is refused, not executed.

    Raises:
        UnsafeStateError: the file holds code.
        CheckpointError: it is no state of ours.
    """
    try:
        state = read_torch_file(path, map_location)
    except ForbiddenContentError as error:
        raise UnsafeStateError(
            f"{path} is refused: it holds more than tensors and plain types ({error}). "
            "Nothing in it was executed; use a checkpoint that this program wrote"
        ) from error
    except (OSError, DamagedFileError) as error:
        raise CheckpointError(f"{path} cannot be read as a checkpoint: {first_line(error)}") from error
    if not isinstance(state, dict) or "pldr_train" not in state:
        raise CheckpointError(f"{path} is no training checkpoint of pldr_train: it has no 'pldr_train' entry")
    return state
