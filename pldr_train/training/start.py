"""Where a run starts: afresh, or from which checkpoint."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path

from pldr_train.checkpoint.finding import find_newest_whole, named_checkpoint
from pldr_train.checkpoint.manifest import damaged_text, read_info, step_of
from pldr_train.checkpoint.places import kept_steps, remove_old
from pldr_train.checkpoint.verifying import state_defect
from pldr_train.checkpoint.writing import repair_last, settle
from pldr_train.errors import CheckpointError, RecipeError
from pldr_train.optim import lr_of_recipe
from pldr_train.recipe import Recipe, compare_for_resume, recipe_from_dict, refused_resume
from pldr_train.runs.folder import RunFolder, free_name
from pldr_train.runs.layout import checkpoint_folders

_log = logging.getLogger(__name__)

NEVER, AUTO = "never", "auto"


@dataclass(frozen=True)
class Start:
    """The checkpoint to go on from, and its step; `None` and 0 for a run that starts afresh."""

    checkpoint: Path | None
    step: int


def choose_start(folder: RunFolder, recipe: Recipe, resume: str, force: bool) -> Start:
    """Decide where the run starts, and bring its folder into that state.

    Args:
        folder: the run's folder, acquired.
        recipe: of this start; what it leaves open is as the checkpoint's has it.
        resume: `auto` (from the newest whole checkpoint, else afresh), `never` (afresh; an earlier run is moved
            aside), or the path of a checkpoint. With `auto` a run without any goes on from the one that it began with.
        force: resume although the recipe differs in more than a resumed run may change.

    Raises:
        CheckpointError: the named checkpoint does not exist or is damaged, none of the run's is whole, or there are
            none any more and the run's metrics would be lost.
        RecipeError: the recipe differs from the checkpoint's.
    """
    if resume == NEVER:
        if folder.holds_a_run():
            _log.info(f"an earlier run was here; it is kept as {folder.move_aside()}")
        folder.begin_unsaved(None)
        return Start(None, 0)
    settle(folder.checkpoints_path)
    checkpoint = _own(folder) if resume == AUTO else _named(folder, Path(resume))
    if checkpoint is None:
        return _afresh(folder)
    info = read_info(checkpoint)
    saved = recipe_from_dict(info["recipe"], str(checkpoint))
    _check_recipe(saved, recipe, checkpoint, force)
    step = step_of(checkpoint)
    _report_another_length(saved, recipe, step)
    own = _is_own(folder, checkpoint)
    goes_back = own and resume != AUTO
    if goes_back:
        _set_newer_aside(checkpoint)
    if own:
        folder.saved()
        is_complete = step >= recipe.trainer.max_steps
        # A run that goes on says at its next save that there can be no link.
        repair_last(folder.checkpoints_path, checkpoint, _log.warning if is_complete else lambda _: None)
        settings = recipe.going_on(saved).resolved().checkpoint
        remove_old(folder.checkpoints_path, settings.keep_last, kept_steps(folder.path, settings), step)
    else:
        folder.begin_unsaved(checkpoint)
    folder.cut_back(step - 1 if info["validation_owed"] else step, keep_copy=goes_back)
    return Start(checkpoint, step)


def _own(folder: RunFolder) -> Path | None:
    """Return the run's newest whole checkpoint; before its first one, the other run's that it began from, if any."""
    checkpoint = find_newest_whole(folder.checkpoints_path, state_defect)
    began_from = folder.began_from() if checkpoint is None else None
    return checkpoint if began_from is None else _named(folder, began_from)


def _afresh(folder: RunFolder) -> Start:
    """Start from step 0, unless metrics of a run that was saved would be lost.

    A run that was killed before its first checkpoint starts again: there is nothing else to go on from, and its lines
    are written again. A copy of them is kept. Once a checkpoint was whole, its absence means that it was moved or
    deleted, or lies on a disk that is missing.
    """
    last = folder.last_metrics_step()
    if last is not None and not folder.is_unsaved():
        raise CheckpointError(
            f"{folder.path} holds metrics up to step {last:,}, and {folder.checkpoints_path} no checkpoint to go on "
            "from. Put the checkpoints back (moved, or their disk is not mounted?), or start over with --resume never, "
            "which keeps this folder under another name"
        )
    if not folder.is_unsaved():
        folder.begin_unsaved(None)
    if last is not None:
        _log.warning(f"{folder.path} has no checkpoint yet: starting again from step 0")
    folder.cut_back(-1, keep_copy=True)
    return Start(None, 0)


def _is_own(folder: RunFolder, checkpoint: Path) -> bool:
    return checkpoint.parent.resolve() == folder.checkpoints_path.resolve()


def _named(folder: RunFolder, path: Path) -> Path:
    """Return the checkpoint that a path names, see `named_checkpoint`."""
    checkpoint = named_checkpoint(Path(os.path.expanduser(path)), f"--resume {path}")
    if checkpoint is None:
        raise CheckpointError(
            f"--resume {path}: no checkpoint there; name a folder like {folder.path}/checkpoints/last"
        )
    reason = state_defect(checkpoint)
    if reason is not None:
        raise CheckpointError(damaged_text(f"--resume {path}", reason))
    if not _is_own(folder, checkpoint) and folder.holds_a_run() and not folder.is_unsaved():
        raise CheckpointError(
            f"--resume {path} is another run's checkpoint, and {folder.path} holds a run already; "
            "give this run a new run.name"
        )
    return checkpoint


def _set_newer_aside(checkpoint: Path) -> None:
    """Rename the checkpoints after the named one, or a later `auto` would jump back to them."""
    for newer in checkpoint_folders(checkpoint.parent):
        if step_of(newer) > step_of(checkpoint):
            aside = free_name(newer.with_name(f"superseded-{newer.name}"))
            newer.rename(aside)
            _log.info(f"checkpoint {newer.name} is newer than the one resumed from; it is kept as {aside.name}")


def _report_another_length(saved: Recipe, new: Recipe, step: int) -> None:
    """Log what another `trainer.max_steps` makes of the learning rate, whose schedule stretches over the run."""
    before, after = saved.going_on(saved).resolved(), new.going_on(saved).resolved()
    lengths = before.trainer.max_steps, after.trainer.max_steps
    rates = lr_of_recipe(before, step), lr_of_recipe(after, step)
    if lengths[0] == lengths[1] or rates[0] == rates[1] or step >= lengths[1]:
        return
    _log.info(
        f"trainer.max_steps={lengths[1]:,}, it was {lengths[0]:,}: the schedule optim.schedule={after.optim.schedule} "
        f"stretches, so the next step's learning rate is {rates[1]:.4g} instead of {rates[0]:.4g}"
    )


def _check_recipe(saved: Recipe, new: Recipe, checkpoint: Path, force: bool) -> None:
    problems = compare_for_resume(saved, new)
    if not problems:
        return
    listing = "\n  ".join(problems)
    if force:
        _log.warning(f"resuming although the recipe differs from the checkpoint's:\n  {listing}")
        return
    raise RecipeError(refused_resume(problems, checkpoint))
