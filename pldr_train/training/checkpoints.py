"""Checkpoints on disk: written whole or not at all, checksummed, read without running anything in them.

    checkpoints/step-00000400/weights-*.safetensors    the weights, see `shards.py`
                              optimizer-*.safetensors  AdamW's moments
                              state.pt                 all else, tensors and plain types only (torch's zip format)
                              manifest.json            step, recipe, sizes and SHA-256 of the files
                last -> step-00000400                  a link, replaced atomically

A checkpoint is built in a hidden folder beside the others, by all processes together, synced, and renamed into place by
one: a process that dies at any moment leaves the old ones whole and at worst a hidden folder, which the next save
removes.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from pldr_train.data.files import sync_path
from pldr_train.errors import CheckpointError, UserError
from pldr_train.training.world import World

T = TypeVar("T")

STATE_FILE = "state.pt"
MANIFEST_FILE = "manifest.json"
LAST_LINK = "last"
_FORMAT = 2
_STEP_FOLDER = re.compile(r"step-(\d{8,})")
_BUILDING_PREFIX = ".building-"


def folder_name(step: int) -> str:
    """Name of the folder of a step's checkpoint; names sort as steps do."""
    return f"step-{step:08d}"


def write_checkpoint(
    root: Path,
    step: int,
    fill: Callable[[Path], dict[str, dict[str, Any]]],
    info: Mapping[str, Any],
    world: World | None = None,
) -> Path:
    """Write a checkpoint whole or not at all, and point `last` at it; called by all processes.

    Args:
        root: the run's folder of checkpoints.
        step: optimizer steps done.
        fill: writes this process' files, synced, into the folder it is given; returns `bytes` and `sha256` of each.
        info: plain values for the manifest, readable without the state.
        world: the processes.

    Returns:
        The checkpoint's folder; one of the same step is replaced.

    Raises:
        CheckpointError: it could not be written by some process; what was there before is untouched.
    """
    world = world or World()
    target = root / folder_name(step)
    building = root / f"{_BUILDING_PREFIX}{target.name}"

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
        manifest = {"format": _FORMAT, "step": step, "files": files, "info": dict(info)}
        world.together(attempt(lambda: _finish(root, building, target, manifest)), here=world.is_main)
    except UserError:
        if world.is_main:
            _remove(building)
        raise
    return target


def _begin(root: Path, building: Path) -> None:
    root.mkdir(parents=True, exist_ok=True)
    for leftover in root.glob(f"{_BUILDING_PREFIX}*"):
        _remove(leftover)
    building.mkdir()


def _finish(root: Path, building: Path, target: Path, manifest: Mapping[str, Any]) -> None:
    _write_synced(building / MANIFEST_FILE, json.dumps(manifest, indent=1).encode())
    sync_path(building)
    _replace_folder(building, target)
    _point_last_at(root, target.name)
    sync_path(root)


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


def _replace_folder(building: Path, target: Path) -> None:
    doomed = target.with_name(f"{_BUILDING_PREFIX}replaced-{target.name}")
    if target.exists():
        target.rename(doomed)
    building.rename(target)
    _remove(doomed)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


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


def _point_last_at(root: Path, name: str) -> None:
    temporary = root / f"{_BUILDING_PREFIX}{LAST_LINK}"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(name)
    temporary.replace(root / LAST_LINK)


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as handle:
        handle.write(data)
        handle.flush()
        os.fsync(handle.fileno())


def checkpoint_folders(root: Path) -> list[Path]:
    """Folders of checkpoints, newest step first; whether they are whole is not checked."""
    if not root.is_dir():
        return []
    found = [path for path in root.iterdir() if path.is_dir() and _STEP_FOLDER.fullmatch(path.name)]
    return sorted((path for path in found if not path.is_symlink()), key=step_of, reverse=True)


def step_of(folder: Path) -> int:
    """The step in a checkpoint folder's name, or of a whole one of another name (a copy) the step in its manifest."""
    match = _STEP_FOLDER.fullmatch(folder.name)
    if match is None:
        return int(json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))["step"])
    return int(match.group(1))


def remove_old(root: Path, keep_last: int, keep_steps: Collection[int]) -> None:
    """Delete all but the newest `keep_last` checkpoints and those of `keep_steps`."""
    for folder in checkpoint_folders(root)[keep_last:]:
        if step_of(folder) not in keep_steps:
            # Renamed first: a half-deleted folder must not be taken for a checkpoint.
            doomed = folder.with_name(f"{_BUILDING_PREFIX}{folder.name}")
            folder.rename(doomed)
            _remove(doomed)


@dataclass(frozen=True)
class Defect:
    """Why a checkpoint cannot be used."""

    folder: Path
    reason: str


def read_manifest(folder: Path) -> dict[str, Any] | Defect:
    """A checkpoint's manifest, if it is one of this version's."""
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
        files = manifest["files"]
        if manifest["format"] != _FORMAT:
            return Defect(folder, f"its format is {manifest['format']}, this version reads {_FORMAT}")
        if STATE_FILE not in files:
            return Defect(folder, f"{MANIFEST_FILE} lists no {STATE_FILE}")
    except OSError as error:
        return Defect(folder, f"{MANIFEST_FILE} cannot be read: {error.strerror}")
    except (ValueError, KeyError, TypeError):
        return Defect(folder, f"{MANIFEST_FILE} is damaged")
    return manifest


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
    """What `write_checkpoint` was given as `info`, of a checkpoint that is whole."""
    info: dict[str, Any] = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))["info"]
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


def find_newest_whole(root: Path, report: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that is whole, or `None` if there are none at all.

    Args:
        root: the run's folder of checkpoints.
        report: told of every checkpoint that is passed over, and why.

    Raises:
        CheckpointError: there are checkpoints, and all of them are damaged.
    """
    folders = checkpoint_folders(root)
    for folder in folders:
        defect = find_defect(folder)
        if defect is None:
            return folder
        report(f"skipped checkpoint {folder}: {defect.reason}")
    if folders:
        raise CheckpointError(
            f"all {len(folders)} checkpoints in {root} are damaged; restore one from a copy, or start over with "
            "--resume never (the old run is kept beside the new one)"
        )
    return None


def load_state(path: Path, map_location: Any = None) -> dict[str, Any]:
    """Read a checkpoint's state file; whatever is not a tensor or a plain type is refused, not executed.

    Raises:
        CheckpointError: the file holds code, or is no state of ours.
    """
    try:
        state = torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is refused: it holds more than tensors and plain types ({_first_line(error)}). "
            "Nothing in it was executed; use a checkpoint that this program wrote"
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as a checkpoint: {_first_line(error)}") from error
    if not isinstance(state, dict) or "pldr_train" not in state:
        raise CheckpointError(f"{path} is no training checkpoint of pldr_train: it has no 'pldr_train' entry")
    return state


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
