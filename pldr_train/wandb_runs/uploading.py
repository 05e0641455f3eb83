"""A checkpoint as an artifact, after the run or beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pldr_train.recipe_io import read_recipe_file
from pldr_train.runs.layout import RECIPE_FILE, named_step
from pldr_train.wandb_runs.artifacts import artifact_name, log_checkpoint
from pldr_train.wandb_runs.opening import (
    Target,
    open_run,
    read_environment,
    record_folder,
    sync_command,
    told_to_the_user,
    value_of,
)


@dataclass(frozen=True)
class Uploaded:
    """What an upload has written."""

    artifact: str
    step: int
    bytes: int
    record: Path
    command: list[str]
    url: str | None


def upload(folder: Path, checkpoint: Path, aliases: Sequence[str], target: Target) -> Uploaded:
    """Log a checkpoint as an artifact; online, it is uploaded when this returns.

    Args:
        folder: the run's.
        checkpoint: its folder, `step-N`.
        aliases: of this version, beside its step.
        target: the W&B run that the artifact is of.

    Raises:
        UserError: W&B refuses.
        OSError: a file cannot be read.
    """
    values = read_recipe_file(folder / RECIPE_FILE)
    run_name = str(value_of(values, "run.name", folder.resolve().name))
    step = named_step(checkpoint.name) or 0
    with told_to_the_user():
        run = open_run(target, folder, values, read_environment(folder))
        url = run.url if target.mode == "online" else None
        try:
            artifact = log_checkpoint(run, checkpoint, step, aliases, run_name)
            if target.mode == "online":
                artifact.wait()
        finally:
            run.finish()
    return Uploaded(artifact_name(run_name), step, int(artifact.size), record_folder(run), sync_command(run), url)
