"""`pldr-train wandb`: a run's folder as a clean W&B run, its checkpoints as artifacts, and the dashboard as code."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pldr_train.commands.bounded_numbers import whole_number
from pldr_train.commands.export import EXIT_CODES
from pldr_train.commands.two_words import Action, TwoWordParser
from pldr_train.errors import CheckpointError, UserError
from pldr_train.outputs import check_output, is_json_with
from pldr_train.run_layout import CHECKPOINTS_FOLDER, RECIPE_FILE, checkpoint_folders, folder_name, named_step

if TYPE_CHECKING:
    from pldr_train.wandb_runs.opening import Target

_UPLOAD_TIMEOUT_S = 7 * 86_400.0
_MOST_LAYERS = 1000
"""Nothing else waits for these commands: they end when everything is uploaded."""


def build_parser() -> argparse.ArgumentParser:
    """The command's options."""
    return TwoWordParser(
        "pldr-train wandb",
        "Show runs on Weights & Biases, from their folders. While a run trains, logging.wandb mirrors it by itself; "
        "docs/wandb.md says more.",
        {
            "replay": Action(_replay_parser, _replay, "write one clean W&B run: metrics, heatmaps, samples, config"),
            "upload": Action(_upload_parser, _upload, "log a checkpoint as an artifact"),
            "workspace": Action(_workspace_parser, _workspace, "print the dashboard as JSON, or save it online"),
        },
    )


def run(options: argparse.Namespace) -> int:
    """Do what the second word says."""
    code: int = options.run(options)
    return code


def _parser(action: str, description: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(prog=f"pldr-train wandb {action}", description=description, epilog=EXIT_CODES)


def _add_target(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--project", metavar="P", help="(default: the recipe's logging.wandb_project)")
    parser.add_argument("--entity", metavar="E", help="user or team (default: the recipe's logging.wandb_entity)")
    parser.add_argument(
        "--mode",
        choices=("offline", "online"),
        help="offline: write files for `wandb sync`; online: upload (default: online where a key is set and W&B is not "
        "switched off, else offline)",
    )


def _replay_parser() -> argparse.ArgumentParser:
    parser = _parser(
        "replay",
        "Turn a run's folder into one W&B run of its own, without the seams of resumes: every line of metrics.jsonl, "
        "heatmaps and histograms of the snapshots, the samples, recipe and environment as config.",
    )
    parser.add_argument("source", metavar="RUN", type=Path, help="a run's folder, like runs/NAME")
    _add_target(parser)
    parser.add_argument("--name", metavar="N", help="of the W&B run (default: the recipe's run.name)")
    parser.add_argument("--id", metavar="ID", dest="run_id", help="of the W&B run (default: a new one)")
    return parser


def _upload_parser() -> argparse.ArgumentParser:
    parser = _parser(
        "upload",
        "Log a checkpoint as an artifact of the run's own W&B run; offline, and while the run trains, as that of a "
        "W&B run beside it.",
    )
    parser.add_argument("source", metavar="RUN", type=Path, help="a run's folder, like runs/NAME")
    parser.add_argument("--checkpoint", metavar="STEP|last", default="last", help="which one (default last)")
    _add_target(parser)
    return parser


def _workspace_parser() -> argparse.ArgumentParser:
    parser = _parser(
        "workspace",
        "Build the dashboard of runs as a W&B workspace: health, loss, DAG losses, deductive outputs, leakage, "
        "optimisation, system, data, media. It is printed as JSON, without any network, unless --save is given.",
    )
    parser.add_argument("--project", metavar="P", default="pldr_train", help="whose runs (default pldr_train)")
    parser.add_argument("--entity", metavar="E", default="", help="user or team; needed with --save")
    parser.add_argument("--runs", metavar="NAME", nargs="+", default=[], help="show these runs only (default: all)")
    parser.add_argument(
        "--layers", metavar="N", type=whole_number(1, _MOST_LAYERS), default=5, help="of the models (default 5)"
    )
    parser.add_argument(
        "--x", choices=("step", "tokens"), default="step", help="what the charts are drawn over (default step)"
    )
    parser.add_argument("--name", metavar="N", default="PLDR-LLM training", help="of the workspace")
    parser.add_argument("--out", metavar="FILE", type=Path, help="write the JSON there instead of printing it")
    parser.add_argument("--save", action="store_true", help="save it on W&B as a new view of the project")
    return parser


def _replay(options: argparse.Namespace) -> int:
    from pldr_train.wandb_runs.opening import new_run_id
    from pldr_train.wandb_runs.replaying import replay

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
    from pldr_train.report.runs import Run
    from pldr_train.wandb_runs.artifacts import upload
    from pldr_train.wandb_runs.opening import new_run_id, run_id_of

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
    from pldr_train.wandb_runs.workspace import View, save_workspace, workspace_values

    view = View(options.layers, options.project, options.entity, options.runs, options.x, options.name)
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
    from pldr_train.data.files import write_file_atomically

    write_file_atomically(options.out, text.encode(), fix="name another with --out")
    print(f"workspace   {options.out}")
    return 0


def _check_can_save(options: argparse.Namespace) -> None:
    from pldr_train.wandb_runs.opening import key_is_set

    if not options.entity:
        raise UserError("--save needs --entity: the user or team that the project belongs to on W&B")
    if not key_is_set():
        raise UserError("--save needs a key of W&B; run `wandb login`, set WANDB_API_KEY, or leave --save out")


# -------------------------------------------------------------------------------------------------------------- parts


def _values_of(folder: Path) -> dict[str, Any]:
    from pldr_train.recipe_io import read_recipe_file
    from pldr_train.report.run_files import is_run, why_no_run

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
    from pldr_train.wandb_runs.opening import Target, value_of

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
    from pldr_train.wandb_runs.opening import key_is_set, resolve_mode

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
        from pldr_train.training.checkpoints import find_newest_whole

        newest = find_newest_whole(root, lambda text: print(text, file=sys.stderr))
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
