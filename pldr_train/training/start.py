"""Where a run starts: afresh, or from which checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pldr_train.errors import CheckpointError, RecipeError
from pldr_train.recipe import Recipe, compare_for_resume, recipe_from_dict
from pldr_train.training.checkpoints import checkpoint_folders, find_defect, find_newest_whole, read_info, step_of
from pldr_train.training.run_folder import RunFolder

NEVER, AUTO = "never", "auto"


@dataclass(frozen=True)
class Start:
    """The checkpoint to go on from, and its step; `None` and 0 for a run that starts afresh."""

    checkpoint: Path | None
    step: int


def choose_start(folder: RunFolder, recipe: Recipe, resume: str, force: bool, say: Callable[[str], None]) -> Start:
    """Decide where the run starts, and bring its folder into that state.

    Args:
        folder: the run's folder, acquired.
        recipe: the resolved recipe of this start.
        resume: `auto` (from the newest whole checkpoint, else afresh), `never` (afresh; an earlier run is moved
            aside), or the path of a checkpoint.
        force: resume although the recipe differs in more than a resumed run may change.
        say: is told what was decided, and why.

    Raises:
        CheckpointError: the named checkpoint does not exist or is damaged, or none of the run's is whole.
        RecipeError: the recipe differs from the checkpoint's.
    """
    if resume == NEVER:
        if folder.holds_a_run():
            say(f"an earlier run was here; it is kept as {folder.move_aside()}")
        return Start(None, 0)
    if resume == AUTO:
        checkpoint = find_newest_whole(folder.checkpoints_path, say)
    else:
        checkpoint = _named(folder, Path(resume), say)
    if checkpoint is None:
        if folder.holds_a_run():
            folder.cut_back(-1)
            say(f"{folder.path} has no checkpoint yet: starting again from step 0")
        return Start(None, 0)
    info = read_info(checkpoint)
    _check_recipe(recipe_from_dict(info["recipe"], str(checkpoint)), recipe, checkpoint, force, say)
    step = step_of(checkpoint)
    folder.cut_back(step - 1 if info["validation_owed"] else step)
    return Start(checkpoint, step)


def _named(folder: RunFolder, path: Path, say: Callable[[str], None]) -> Path:
    """The checkpoint that a path names: its folder, a file in it, or a run's folder."""
    candidates = [path, path.parent if path.is_file() else path / "checkpoints" / "last", path / "last"]
    checkpoint = next((c.resolve() for c in candidates if (c / "manifest.json").is_file()), None)
    if checkpoint is None:
        raise CheckpointError(
            f"--resume {path}: no checkpoint there; name a folder like {folder.path}/checkpoints/last"
        )
    defect = find_defect(checkpoint)
    if defect is not None:
        raise CheckpointError(f"--resume {path}: the checkpoint is damaged: {defect.reason}; name another one")
    if checkpoint.parent == folder.checkpoints_path.resolve():
        _set_newer_aside(checkpoint, say)
    elif folder.holds_a_run():
        raise CheckpointError(
            f"--resume {path} is another run's checkpoint, and {folder.path} holds a run already; "
            "give this run a new run.name"
        )
    return checkpoint


def _set_newer_aside(checkpoint: Path, say: Callable[[str], None]) -> None:
    """Rename the checkpoints after the named one, or a later `auto` would jump back to them."""
    for newer in checkpoint_folders(checkpoint.parent):
        if step_of(newer) > step_of(checkpoint):
            aside = newer.with_name(f"superseded-{newer.name}")
            newer.rename(aside)
            say(f"checkpoint {newer.name} is newer than the one resumed from; it is kept as {aside.name}")


def _check_recipe(saved: Recipe, new: Recipe, checkpoint: Path, force: bool, say: Callable[[str], None]) -> None:
    problems = compare_for_resume(saved, new)
    if not problems:
        return
    listing = "\n  ".join(problems)
    if force:
        say(f"resuming although the recipe differs from the checkpoint's:\n  {listing}")
        return
    raise RecipeError(
        f"the recipe differs from that of {checkpoint}:\n  {listing}\n"
        "Put the values back, give the run a new run.name, start over with --resume never, or resume all the same "
        "with --force"
    )
