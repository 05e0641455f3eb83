"""The actions of `pldr-train wandb`."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pldr_train.checkpoint.finding import find_newest_whole
from pldr_train.data.files import write_file_atomically
from pldr_train.errors import CheckpointError, UserError
from pldr_train.outputs import check_output, is_json_with
from pldr_train.printing import log_to_terminal
from pldr_train.recipe.yaml_text import read_recipe_file
from pldr_train.report.runs import Run
from pldr_train.runs.layout import (
    CHECKPOINTS_FOLDER,
    RECIPE_FILE,
    checkpoint_folders,
    folder_name,
    is_run,
    named_step,
    why_no_run,
)
from pldr_train.wandb_runs.artifacts import upload
from pldr_train.wandb_runs.opening import Target, new_run_id, run_id_of, value_of
from pldr_train.wandb_runs.replaying import replay
from pldr_train.wandb_runs.workspace import View, save_workspace, workspace_values
from pldr_train.wandb_switch import key_is_set, resolve_mode

_UPLOAD_TIMEOUT_S = 7 * 86_400.0
"""Nothing else waits for these commands: they end when everything is uploaded."""


def _replay(options: argparse.Namespace) -> int:
    values = _values_of(options.source)
    run_id = _checked_id(options.run_id) if options.run_id else new_run_id()
    # An id that is named may be one that W&B has; a replay starts over, it does not go on.
    target = _target(options, values, run_id, "replay", name=options.name, resume=False)
    done = replay(options.source, target)
    for note in done.notes:
        print(f"note: {note}", file=sys.stderr)
    print(f"replayed    {done.steps:,} steps, {done.snapshots:,} snapshots, {done.samples:,} samples; W&B run {run_id}")
    _say_where(target.mode, done.record, done.command, done.url)
    return 0


def _upload(options: argparse.Namespace) -> int:
    values = _values_of(options.source)
    folder = _checkpoint(options.source, options.checkpoint)
    # Two processes must not write one W&B run at once, and an offline record may replace the run of its id.
    beside = _mode(options) == "offline" or Run(options.source, options.source.name).is_held()
    run_id = new_run_id() if beside else run_id_of(options.source)
    target = _target(options, values, run_id, "upload" if beside else "train")
    aliases = ("last",) if options.checkpoint == "last" else ()
    done = upload(options.source, folder, aliases, target)
    print(f"artifact    {done.artifact}, step {done.step:,}, {done.bytes / 1e6:,.1f} MB; W&B run {run_id}")
    if target.mode == "offline":
        print(f"keep        {folder}: `wandb sync` reads the files there")
    _say_where(target.mode, done.record, done.command, done.url)
    return 0


def _workspace(options: argparse.Namespace) -> int:
    view = View(options.layers, options.project, options.entity, options.runs, options.x, options.name, options.groups)
    if options.out is not None:
        check_output(options.out, "--out", is_json_with("displayName", "spec"), "a workspace that this command wrote")
    if options.save:
        _check_can_save(options)
        print(f"workspace   {save_workspace(view)}")
        if options.out is None:
            return 0
    text = json.dumps(workspace_values(view), indent=1) + "\n"
    if options.out is None:
        print(text, end="")
        return 0
    write_file_atomically(options.out, text.encode(), fix="name another with --out")
    print(f"workspace   {options.out}")
    return 0


def _check_can_save(options: argparse.Namespace) -> None:
    if not options.entity:
        raise UserError("--save needs --entity: the user or team that the project belongs to on W&B")
    if not key_is_set():
        raise UserError("--save needs a key of W&B; run `wandb login`, set WANDB_API_KEY, or leave --save out")


# -------------------------------------------------------------------------------------------------------------- parts


def _values_of(folder: Path) -> dict[str, Any]:
    if not (folder.is_dir() and is_run(folder)):
        raise UserError(why_no_run(folder))
    if (folder / RECIPE_FILE).exists() and not (folder / RECIPE_FILE).is_file():
        raise UserError(f"{folder / RECIPE_FILE} is no regular file; put the run's recipe there")
    return read_recipe_file(folder / RECIPE_FILE)


def _target(
    options: argparse.Namespace,
    values: Mapping[str, Any],
    run_id: str,
    job_type: str,
    name: str | None = None,
    resume: bool = True,
) -> Target:
    return Target(
        mode=_mode(options),
        run_id=run_id,
        project=options.project or value_of(values, "logging.wandb_project", "pldr_train"),
        entity=options.entity or value_of(values, "logging.wandb_entity"),
        name=name or value_of(values, "run.name"),
        job_type=job_type,
        resume=resume,
        finish_timeout_s=_UPLOAD_TIMEOUT_S,
        system_metrics=False,
    )


def _mode(options: argparse.Namespace) -> str:
    mode: str = options.mode or ("online" if resolve_mode("auto") == "online" else "offline")
    if mode == "online" and not key_is_set():
        raise UserError("--mode online needs a key of W&B; run `wandb login`, set WANDB_API_KEY, or use --mode offline")
    return mode


def _checked_id(run_id: str) -> str:
    if not all(each.isascii() and (each.isalnum() or each in "-_") for each in run_id) or len(run_id) > 64:
        raise UserError(f"--id {run_id}: W&B takes up to 64 letters, digits, - and _; name another, or leave it out")
    return run_id


def _checkpoint(run_folder: Path, which: str) -> Path:
    root = run_folder / CHECKPOINTS_FOLDER
    if which != "last" and not (which.isascii() and which.isdecimal()):
        raise UserError(f"--checkpoint {which}: name a step, like 4000, or last")
    if which == "last":
        log_to_terminal(stream="stderr")
        newest = find_newest_whole(root)
        if newest is None:
            raise CheckpointError(f"--checkpoint last: there is none in {root}; the run has no checkpoint yet")
        return newest
    folder = root / folder_name(int(which))
    if folder.is_dir():
        return folder
    steps = sorted(named_step(each.name) or 0 for each in checkpoint_folders(root))
    there = f"there are {', '.join(map(str, steps))}" if steps else "the run has no checkpoint yet"
    raise CheckpointError(f"--checkpoint {which}: there is no {folder}; {there}")


def _say_where(mode: str, record: Path, command: list[str], url: str | None) -> None:
    if mode == "online":
        print(f"address     {url}")
    else:
        print(f"record      {record}")
        print(f"upload      {shlex.join(command)}")


ACTIONS = {"replay": _replay, "upload": _upload, "workspace": _workspace}
"""By the second word of the command."""
