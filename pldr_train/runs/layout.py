"""Where things lie in a run's folder: names, and what can be said of checkpoints by their names alone."""

from __future__ import annotations

import os
import re
from pathlib import Path

METRICS_FILE, SAMPLES_FILE = "metrics.jsonl", "samples.jsonl"
RECIPE_FILE, ENVIRONMENT_FILE = "recipe.yaml", "environment.json"
STOPPED_FILE = "stopped.json"
CHECKPOINTS_FOLDER, SNAPSHOTS_FOLDER = "checkpoints", "snapshots"
CSV_FOLDER, TENSORBOARD_FOLDER = "csv", "tensorboard"
MANIFEST_FILE, LAST_LINK = "manifest.json", "last"
LOCK_FILE = ".lock"
TOKENIZER_FILE, DATA_FILE = "tokenizer.model", "data.json"
UNREADABLE_FILE, NONFINITE_FILE = "unreadable.json", "nonfinite.json"
UNSAVED_FILE = ".unsaved"
WANDB_FILE = "wandb.json"
RUN_FILES = frozenset({
    METRICS_FILE, SAMPLES_FILE, RECIPE_FILE, ENVIRONMENT_FILE, LOCK_FILE, TOKENIZER_FILE, DATA_FILE, UNREADABLE_FILE,
    NONFINITE_FILE, UNSAVED_FILE, WANDB_FILE, STOPPED_FILE,
})  # fmt: skip
"""What a run writes into its folder; its page, report.html, can be made again."""
RUN_FOLDERS = frozenset({CHECKPOINTS_FOLDER, SNAPSHOTS_FOLDER, CSV_FOLDER, TENSORBOARD_FOLDER})
SIGNS_OF_A_RUN = (ENVIRONMENT_FILE, METRICS_FILE, CHECKPOINTS_FOLDER)
"""What a run's folder has beside its recipe, and a folder of recipes has not."""
_STEP_FOLDER = re.compile(r"step-(\d{8,})", re.ASCII)
SNAPSHOT_SUFFIX = ".safetensors"
_MOST_DIGITS = 18


def folder_name(step: int) -> str:
    """Return the name of the folder of a step's checkpoint; names sort as steps do."""
    return f"step-{step:08d}"


def named_step(name: str) -> int | None:
    """Return the step in the name of a checkpoint's folder; None for any other name."""
    match = _STEP_FOLDER.fullmatch(name)
    return int(match[1]) if match is not None and len(match[1]) <= _MOST_DIGITS else None


def snapshot_files(run: Path) -> list[tuple[int, Path]]:
    """Return a run's snapshots as (step, file), in the order of steps."""
    found = ((named_step(path.stem), path) for path in (run / SNAPSHOTS_FOLDER).glob(f"step-*{SNAPSHOT_SUFFIX}"))
    return sorted((step, path) for step, path in found if step is not None)


def snapshot_file(run: Path, step: int) -> Path:
    """Return where a run keeps the snapshot of a step."""
    return run / SNAPSHOTS_FOLDER / f"{folder_name(step)}{SNAPSHOT_SUFFIX}"


def checkpoint_folders(root: Path) -> list[Path]:
    """Return a run's checkpoints, newest step first; whether they are whole is not checked.

    Links count as what they name: a checkpoint may have been moved to another disk. Those that name nothing are among
    them, for the disk may only be missing.
    """
    try:
        names = os.listdir(root)
    except (FileNotFoundError, NotADirectoryError):
        return []
    found = [(step, root / name) for name in names if (step := named_step(name)) is not None]
    folders = [(step, path) for step, path in found if path.is_dir() or path.is_symlink()]
    return [path for _, path in sorted(folders, reverse=True)]


def linked_last(root: Path) -> Path | None:
    """Return the checkpoint that the link `last` names, under its name in `root`; None without such a link."""
    link = root / LAST_LINK
    if not link.is_symlink():
        return None
    named = Path(os.readlink(link))
    folder = root / named.name
    return folder if named_step(named.name) is not None and folder.is_dir() else None


def is_run(folder: Path) -> bool:
    """Return whether a run was, or is being, trained in a folder."""
    return any((folder / name).exists() for name in (METRICS_FILE, RECIPE_FILE, CHECKPOINTS_FOLDER))


def why_no_run(folder: Path) -> str:
    """Return why nothing can be shown of a path, and what to name instead."""
    if not folder.exists():
        return f"{folder}: no such folder; name a run's folder, like runs/NAME"
    if folder.is_file():
        return f"{folder}: a file; name the run's folder, like runs/NAME"
    try:
        inside = sorted(each.name for each in folder.iterdir())
        runs = [name for name in inside if (folder / name).is_dir() and is_run(folder / name)]
    except OSError as error:
        return f"{folder}: cannot be read ({error.strerror}); check its permissions"
    if runs:
        more = ", ..." if len(runs) > 3 else ""
        named = ", ".join(str(folder / name) for name in runs[:3])
        return f"{folder}: no run itself, but it holds {len(runs):,}; name {named}{more}, or all: {folder}/*"
    what = "holds no run" if inside else "an empty folder"
    return f"{folder}: {what} (neither {METRICS_FILE} nor {RECIPE_FILE}); name a run's folder, like runs/NAME"
