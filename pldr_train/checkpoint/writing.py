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
in place or removes (`settle`). Between its beginning and the renaming the processes may do other things, while a thread
of each writes.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from pldr_train.checkpoint.manifest import Defect, find_defect, manifest_text, read_manifest
from pldr_train.checkpoint.places import (
    BUILDING_PREFIX,
    point_last_at,
    put_back_replaced,
    remove,
    remove_leftovers,
    replace_folder,
)
from pldr_train.data.files import sync_path
from pldr_train.distributed.world import World
from pldr_train.errors import CheckpointError, UserError
from pldr_train.runs.layout import (
    MANIFEST_FILE,
    checkpoint_folders,
    folder_name,
    linked_last,
    named_step,
)

_log = logging.getLogger(__name__)

T = TypeVar("T")


class CheckpointWrite:
    """A checkpoint on its way to the disk, whole there or not at all; made and published by all processes together.

    Args:
        root: the run's folder of checkpoints.
        step: optimizer steps done.
        fill: writes this process' files, synced, into the folder it is given; returns `bytes` and `sha256` of each.
        info: plain values for the manifest, readable without the state.
        world: the processes.
        warn: is called, on rank 0, when `last` cannot be a link.
        in_background: let a thread call `fill` at once, else `publish` calls it.

    Raises:
        CheckpointError: it could not be begun by some process; what was there before is untouched.
    """

    def __init__(
        self,
        root: Path,
        step: int,
        fill: Callable[[Path], dict[str, dict[str, Any]]],
        info: Mapping[str, Any],
        world: World | None = None,
        warn: Callable[[str], None] = _log.warning,
        in_background: bool = False,
    ) -> None:
        self.step = step
        self._root, self._info, self._world, self._warn = root, info, world or World(), warn
        self._target = root / folder_name(step)
        self._building = root / f"{BUILDING_PREFIX}{self._target.name}"
        self._files: Callable[[], dict[str, dict[str, Any]]] = partial(fill, self._building)
        self._future: Future[dict[str, dict[str, Any]]] | None = None
        with self._removed_on_failure():
            self._on_all(lambda: _begin(root, self._building), here=self._world.is_main)
        if in_background:
            writer = ThreadPoolExecutor(1, "pldr_train checkpoint")
            self._future = writer.submit(self._files)
            self._files = self._future.result
            writer.shutdown(wait=False)  # its thread ends with what it was given

    @property
    def is_written(self) -> bool:
        """Whether `publish` need not wait for this process' files."""
        return self._future is None or self._future.done()

    def publish(self) -> Path:
        """Put the checkpoint in its place when all files are written, and point `last` at it.

        Returns:
            The checkpoint's folder; one of the same step is replaced.

        Raises:
            CheckpointError: it could not be written by some process; what was there before is untouched.
        """
        world = self._world
        with self._removed_on_failure():
            mine = self._on_all(self._files)
            files = {name: entry for part in world.gather(mine) for name, entry in sorted((part or {}).items())}
            manifest = manifest_text(self.step, files, self._info)
            self._on_all(
                lambda: _finish(self._root, self._building, self._target, manifest, self._warn), here=world.is_main
            )
        return self._target

    def _on_all(self, action: Callable[[], T], here: bool = True) -> T | None:
        def attempted() -> T:
            try:
                return action()
            except OSError as error:
                raise CheckpointError(_not_written(self._root, self.step, error)) from error

        return self._world.on_all(attempted, here)

    @contextmanager
    def _removed_on_failure(self) -> Iterator[None]:
        try:
            yield
        except UserError:
            if self._world.is_main:
                remove(self._building)
            raise


def _begin(root: Path, building: Path) -> None:
    root.mkdir(parents=True, exist_ok=True)
    put_back_replaced(root)
    remove_leftovers(root)
    building.mkdir()


def _finish(root: Path, building: Path, target: Path, manifest: str, warn: Callable[[str], None]) -> None:
    write_synced(building / MANIFEST_FILE, manifest.encode())
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


def write_synced(path: Path, data: bytes) -> None:
    """Write a file and bring it to the disk."""
    with path.open("wb") as handle:
        handle.write(data)
        handle.flush()
        os.fsync(handle.fileno())
