"""Checkpoints as artifacts of a W&B run, after the training or beside it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import wandb

from pldr_train.recipe.yaml_text import read_recipe_file
from pldr_train.runs.layout import RECIPE_FILE, named_step
from pldr_train.untrusted import read_json
from pldr_train.wandb_runs.opening import (
    Target,
    open_run,
    read_environment,
    record_folder,
    sync_command,
    told_to_the_user,
    value_of,
)

ARTIFACT_TYPE = "checkpoint"
_MOST_CHARACTERS = 128


def artifact_name(run_name: str) -> str:
    """Return what the artifact of a run's checkpoints is called; its versions are the checkpoints."""
    return f"checkpoint-{re.sub(r'[^A-Za-z0-9_.-]', '-', run_name)}"[:_MOST_CHARACTERS]


def log_checkpoint(run: Any, folder: Path, step: int, aliases: Sequence[str], run_name: str | None = None) -> Any:
    """Log a checkpoint as a version of the run's artifact; its files are read where they lie, not copied.

    Args:
        run: an open W&B run.
        folder: the checkpoint.
        step: of it.
        aliases: names of this version beside `step-N`, for instance `last`.
        run_name: that names the artifact; None: the W&B run's.

    Returns:
        The artifact; an online run uploads it in the background.

    Raises:
        OSError: a file cannot be read.
    """
    folder = folder.resolve()
    metadata: dict[str, Any] = {"step": step, "bytes": 0}
    try:
        files = read_json(folder / "manifest.json")["files"]
        metadata |= {"bytes": sum(each["bytes"] for each in files.values()), "files": sorted(files)}
    except (ValueError, KeyError, TypeError, AttributeError):
        metadata["bytes"] = sum(each.stat().st_size for each in folder.iterdir())
    artifact = wandb.Artifact(artifact_name(run_name or run.name), type=ARTIFACT_TYPE, metadata=metadata)
    for path in sorted(each for each in folder.rglob("*") if each.is_file()):  # add_dir writes to the terminal
        artifact.add_file(str(path), name=path.relative_to(folder).as_posix(), policy="immutable", skip_cache=True)
    return run.log_artifact(artifact, aliases=[f"step-{step}", *aliases])


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
