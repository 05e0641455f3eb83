"""Which checkpoints a run has, at a glance: nothing but manifests and the run's metrics is read."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG
from typing import Any

from pldr_train.checkpoint.manifest import Defect, file_defect, read_manifest, step_of
from pldr_train.checkpoint.places import BUILDING_PREFIX, kept_steps
from pldr_train.errors import CheckpointError, UserError
from pldr_train.metrics.catalog import VAL_CROSS_ENTROPY
from pldr_train.recipe import CheckpointSection, load_recipe, recipe_from_dict, strategy_in_force
from pldr_train.runs.layout import (
    CHECKPOINTS_FOLDER,
    LAST_LINK,
    MANIFEST_FILE,
    METRICS_FILE,
    RECIPE_FILE,
    checkpoint_folders,
    linked_last,
    named_step,
)
from pldr_train.runs.metrics import finite_values

_SUPERSEDED = "superseded-"


@dataclass(frozen=True)
class Place:
    """Checkpoints that a path names."""

    path: Path
    """As it was given."""
    root: Path | None
    """The run's folder of checkpoints; None: one checkpoint was named."""
    folders: tuple[Path, ...]
    """Newest step first."""


@dataclass(frozen=True)
class Listed:
    """A checkpoint, at a glance."""

    folder: Path
    step: int
    num_bytes: int
    """Of all files in the folder."""
    written_s: float | None
    """When it was finished, seconds since 1970; None without a manifest."""
    strategy: str | None
    processes: int | None
    problem: str | None
    """What is wrong with its manifest or with the files' sizes; contents are not looked at."""
    is_last: bool
    """Whether the link `last` names it."""
    is_kept: bool
    """Whether checkpoint.also_keep_steps keeps it for ever."""
    is_best: bool
    """Whether checkpoint.keep_best keeps it."""
    validation: float | None
    """Validation cross-entropy at its step, nat/token, from the run's metrics."""


@dataclass(frozen=True)
class Leftover:
    """A folder beside the checkpoints that no run reads."""

    folder: Path
    num_bytes: int
    reason: str


def find_place(path: Path) -> Place:
    """Return the checkpoints that a path names: a run's folder, its folder of checkpoints, or one checkpoint.

    Raises:
        CheckpointError: there is no such folder, or no run and no checkpoint in it.
    """
    if path.is_file():
        raise CheckpointError(f"{path} is a file; name a run's folder, or a checkpoint's")
    if not path.exists():
        raise CheckpointError(f"{path}: no such folder; name one like runs/NAME or runs/NAME/checkpoints/last")
    if path.name == LAST_LINK and (folders := tuple(checkpoint_folders(path.parent))):
        # What else may stand there, a copied folder, is not what the run goes on from.
        return Place(path, None, (linked_last(path.parent) or folders[0],))
    if named_step(path.name) is not None:
        return Place(path, None, (path.absolute(),))  # a link to another disk keeps its name
    if (path / MANIFEST_FILE).is_file() or named_step(path.resolve().name) is not None:
        return Place(path, None, (path.resolve(),))
    root = path / CHECKPOINTS_FOLDER
    if not root.is_dir():
        root = path
    folders = tuple(checkpoint_folders(root))
    is_run = CHECKPOINTS_FOLDER in (root.absolute().name, root.resolve().name) or (path / RECIPE_FILE).is_file()
    if not folders and not is_run:
        raise CheckpointError(
            f"{path} holds no run and no checkpoint; name a folder like runs/NAME or runs/NAME/checkpoints/last"
        )
    return Place(path, root, folders)


def find_one(path: Path) -> Path:
    """Return the checkpoint that a path names; of a run the newest, whole or not.

    Raises:
        CheckpointError: as `find_place`, or the run has none yet.
    """
    place = find_place(path)
    if not place.folders:
        raise CheckpointError(f"{path}: the run has no checkpoint yet; train it further, or name another run")
    return place.folders[0]


def list_checkpoints(place: Place) -> list[Listed]:
    """Return the checkpoints at a place, newest step first."""
    root = place.root or _root_of(place.folders[0])
    last = None if root is None else linked_last(root)
    if root is None:
        return [_listed(folder) for folder in place.folders]
    settings, run = _settings(root, place.folders), root.absolute().parent
    kept = () if settings is None else settings.also_keep_steps
    validated: Mapping[int, float] = {}
    best: Collection[int] = ()
    with suppress(OSError):
        validated = finite_values(run / METRICS_FILE, VAL_CROSS_ENTROPY)
        best = () if settings is None else kept_steps(run, settings) - set(kept)
    return [_listed(folder, last, kept, best, validated) for folder in place.folders]


def dangling_last(place: Place) -> str | None:
    """Return what the run's link `last` names, if that is not there."""
    link = None if place.root is None else place.root / LAST_LINK
    return str(link.readlink()) if link is not None and link.is_symlink() and not link.exists() else None


def list_leftovers(place: Place) -> list[Leftover]:
    """Return what else lies in a run's folder of checkpoints."""
    if place.root is None:
        return []
    found = []
    for folder in sorted(place.root.iterdir()):
        if folder.is_symlink() or not folder.is_dir():
            continue
        if folder.name.startswith(BUILDING_PREFIX):
            reason = "a save that is under way or was cut short; the run's next start or save removes it"
        elif folder.name.startswith(_SUPERSEDED):
            reason = "newer than a checkpoint that was resumed from by name; no run reads it, remove it when you like"
        else:
            continue
        found.append(Leftover(folder, folder_bytes(folder), reason))
    return found


def size_problem(folder: Path, manifest: Mapping[str, Any]) -> str | None:
    """Return the first file that is missing or has another size than its manifest says."""
    defects = (file_defect(folder / name, expected, checksum=False) for name, expected in manifest["files"].items())
    return next((defect for defect in defects if defect is not None), None)


def folder_bytes(folder: Path) -> int:
    """Return the size of all files in a folder, those in folders within included."""
    total = 0
    for path in folder.rglob("*"):
        try:
            status = path.lstat()
        except FileNotFoundError:
            continue  # a run that trains removes what is old
        total += status.st_size if S_ISREG(status.st_mode) else 0
    return total


def _root_of(folder: Path) -> Path | None:
    """Return the run's folder of checkpoints that a checkpoint lies in; None for a copy elsewhere."""
    is_in_run = folder.parent.name == CHECKPOINTS_FOLDER and named_step(folder.name) is not None
    return folder.parent if is_in_run else None


def _listed(
    folder: Path,
    last: Path | None = None,
    kept: Collection[int] = (),
    best: Collection[int] = (),
    validated: Mapping[int, float] | None = None,
) -> Listed:
    manifest = read_manifest(folder)
    try:
        written: float | None = (folder / MANIFEST_FILE).stat().st_mtime
    except OSError:
        written = None
    if isinstance(manifest, Defect):
        problem: str | None = manifest.reason
        info: Any = {}
    else:
        problem, info = size_problem(folder, manifest), manifest.get("info", {})
    step = _step(folder)
    return Listed(
        folder=folder,
        step=step,
        num_bytes=folder_bytes(folder),
        written_s=written,
        strategy=_strategy(info),
        processes=info.get("processes"),
        problem=problem,
        is_last=last is not None and folder.name == last.name,
        is_kept=step in kept,
        is_best=step in best,
        validation=(validated or {}).get(step),
    )


def _strategy(info: Mapping[str, Any]) -> str | None:
    name, processes = info.get("strategy"), info.get("processes")
    return name if name is None or processes is None else strategy_in_force(name, processes)


def _step(folder: Path) -> int:
    try:
        return step_of(folder)
    except (ValueError, KeyError, TypeError):
        return 0


def _settings(root: Path, folders: Collection[Path]) -> CheckpointSection | None:
    """Of the recipe that the run was started with last; else of the newest checkpoint's."""
    path = root.absolute().parent / RECIPE_FILE
    try:
        if path.is_file():
            return load_recipe(path, notice=lambda _: None).resolved().checkpoint
    except (UserError, OSError, RecursionError):
        pass
    for folder in folders:
        manifest = read_manifest(folder)
        if not isinstance(manifest, Defect):
            try:
                return recipe_from_dict(manifest["info"]["recipe"], str(folder)).resolved().checkpoint
            except (UserError, KeyError, TypeError):
                continue
    return None
