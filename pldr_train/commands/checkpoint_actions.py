"""The actions of `pldr-train checkpoint`, and what they show: tables, JSON, and how far they are."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from pldr_train.checkpoint.converting import (
    check_consolidated_target,
    check_converted_target,
    consolidate,
    convert,
)
from pldr_train.checkpoint.listing import (
    Leftover,
    Listed,
    dangling_last,
    find_one,
    find_place,
    folder_bytes,
    list_checkpoints,
    list_leftovers,
)
from pldr_train.checkpoint.manifest import step_of
from pldr_train.checkpoint.shards import WEIGHTS
from pldr_train.checkpoint.verifying import Checkpoint, bytes_to_read, find_problems, open_checkpoint
from pldr_train.errors import CheckpointError
from pldr_train.models.averaging import average_checkpoints, choose_checkpoints
from pldr_train.printing import can_show_a_bar, printable
from pldr_train.runs.layout import RECIPE_FILE
from pldr_train.training.quiet import quiet_libraries

EXIT_DAMAGED = 1
_SMALL_BYTES = 50_000_000
"""Of so little no bar is shown."""


def _list(options: argparse.Namespace) -> int:
    place = find_place(options.source)
    found = (list_checkpoints(place), list_leftovers(place), dangling_last(place))
    print(json.dumps(list_as_values(*found), indent=1) if options.json else list_as_table(*found))
    return 0


def _verify(options: argparse.Namespace) -> int:
    quiet_libraries()
    place = find_place(options.source)
    if not place.folders:
        raise CheckpointError(f"{options.source}: the run has no checkpoint yet; there is nothing to verify")
    problems: dict[Path, list[str]] = {}
    for folder in place.folders:
        with BytesProgress(folder.name, bytes_to_read(folder)) as progress:
            found = find_problems(folder, progress.advance)
        if found and not folder.exists():
            print(f"{printable(folder.name)}  removed meanwhile by its run", file=sys.stderr)
            continue
        problems[folder] = found
        if not options.json:
            print(f"{printable(folder.name)}  {'DAMAGED' if problems[folder] else 'ok'}", flush=True)
            for problem in problems[folder]:
                print(f"  {printable(problem)}", flush=True)
    if options.json:
        print(json.dumps(verified_as_values(problems), indent=1))
    return EXIT_DAMAGED if any(problems.values()) else 0


def _consolidate(options: argparse.Namespace) -> int:
    quiet_libraries()
    source = find_one(options.source)
    check_consolidated_target(options.target, source, options.force)
    with BytesProgress("consolidate", 2 * folder_bytes(source)) as progress:
        checkpoint = open_checkpoint(source, progress.advance)
        consolidate(checkpoint, options.target, options.force, progress.advance)
    recipe = checkpoint.recipe
    print(f"checkpoint  step {checkpoint.step:,} of run {recipe.run.name}, {size_text(folder_bytes(options.target))}")
    print(f"folder      {options.target}")
    print(f"resume      {shlex.join(_resume_command(checkpoint, options.target))}")
    return 0


def _resume_command(checkpoint: Checkpoint, target: Path) -> list[str]:
    """Return a command that goes on from a consolidated checkpoint; a complete run trains as long again."""
    recipe = checkpoint.recipe
    path = checkpoint.folder.parent.parent / RECIPE_FILE
    words = [
        "pldr-train",
        "fit",
        os.path.relpath(path) if path.is_file() else "RECIPE",
        f"run.name={recipe.run.name}-2",
    ]
    if checkpoint.step >= recipe.trainer.max_steps:
        words.append(f"trainer.max_steps={2 * checkpoint.step}")
    return [*words, "--resume", str(target)]


_USE = {
    "weights": 'safetensors.torch.load_file("{target}"); its metadata holds the recipe',
    "torch": 'torch.load("{target}", weights_only=True)["model"]',
    "universal": 'engine.load_checkpoint("{target}") with {{"checkpoint": {{"load_universal": true}}}}',
}


def _convert(options: argparse.Namespace) -> int:
    quiet_libraries()
    source = find_one(options.source)
    check_converted_target(options.target, source, options.form, options.force)
    with BytesProgress("convert", 2 * folder_bytes(source)) as progress:
        checkpoint = open_checkpoint(source, progress.advance)
        convert(checkpoint, options.target, options.form, options.force, progress.advance)
    print(f"converted   step {checkpoint.step:,} of run {checkpoint.recipe.run.name}")
    print(f"{'folder' if options.form == 'universal' else 'file':<12}{options.target}")
    print(f"load        {_USE[options.form].format(target=options.target)}")
    return 0


def _average(options: argparse.Namespace) -> int:
    quiet_libraries()
    folders = choose_checkpoints(options.source, options.last, options.steps)
    target = options.output
    if target is None:
        run = folders[-1].parent.parent
        target = run / f"average-of-{len(folders)}-to-{step_of(folders[-1])}"
    num_bytes = sum(path.stat().st_size for folder in folders for path in folder.glob(f"{WEIGHTS}-*"))
    with BytesProgress("average", num_bytes) as progress:
        newest = average_checkpoints(folders, target, options.tokenizer, options.overwrite, progress.advance)
    listing = ", ".join(f"{step_of(folder):,}" for folder in folders)
    print(f"averaged    {len(folders)} checkpoints of run {newest.recipe.run.name}, of the steps {listing}")
    print(f"folder      {target}")
    print(f'try         {shlex.join(["pldr-train", "generate", str(target)])} "a prompt"')
    return 0


ACTIONS = {
    "list": _list,
    "verify": _verify,
    "consolidate": _consolidate,
    "convert": _convert,
    "average": _average,
}
"""By the second word of the command."""


# -------------------------------------------------------------------------------------------------------------- shown


class BytesProgress:
    """A moving bar of bytes in a terminal, for what takes a while; nothing elsewhere.

    Args:
        verb: what is done.
        total_bytes: how many will be read and written.
        stream: where to.
    """

    def __init__(self, verb: str, total_bytes: int, stream: TextIO | None = None) -> None:
        stream = stream or sys.stderr
        self._bar: Any = None
        if total_bytes >= _SMALL_BYTES and can_show_a_bar(stream):
            self._bar = tqdm(
                total=total_bytes, desc=verb, file=stream, unit="B", unit_scale=True, dynamic_ncols=True, leave=False
            )

    def advance(self, num_bytes: int) -> None:
        """So many more are done."""
        if self._bar is not None:
            self._bar.update(num_bytes)

    def __enter__(self) -> BytesProgress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()


def size_text(num_bytes: int) -> str:
    """Return the bytes for people."""
    for unit, size in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6)):
        if num_bytes >= size:
            return f"{num_bytes / size:,.1f} {unit}"
    return f"{num_bytes / 1000:,.1f} kB"


def list_as_table(listed: Sequence[Listed], leftovers: Sequence[Leftover], dangling: str | None) -> str:
    """Checkpoints as a table, newest first, and what lies beside them."""
    lines = [f"{'step':>10}  {'size':>9}  {'written':<19}  {'strategy':<9}  {'processes':>9}  {'val loss':>8}  state"]
    lines += [_row(each) for each in listed]
    if not listed:
        lines = ["no checkpoint yet"]
    if dangling is not None:
        lines.append(f"last names {printable(dangling)}, which is not there")
    if leftovers:
        lines += ["", "beside them:"]
        lines += [printable(f"  {each.folder.name}  {size_text(each.num_bytes)}  {each.reason}") for each in leftovers]
    return "\n".join(lines)


def _row(listed: Listed) -> str:
    state = "whole by sizes" if listed.problem is None else f"DAMAGED: {printable(listed.problem)}"
    marks = (("last", listed.is_last), ("kept for ever", listed.is_kept), ("best", listed.is_best))
    written = "" if listed.written_s is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(listed.written_s))
    processes = "?" if listed.processes is None else f"{listed.processes:,}"
    validation = "" if listed.validation is None else f"{listed.validation:.4f}"
    return (
        f"{listed.step:>10,}  {size_text(listed.num_bytes):>9}  {written:<19}  {printable(listed.strategy or '?'):<9}  "
        f"{processes:>9}  {validation:>8}  {', '.join([state, *(word for word, is_so in marks if is_so)])}"
    )


def list_as_values(listed: Sequence[Listed], leftovers: Sequence[Leftover], dangling: str | None) -> dict[str, Any]:
    """Return the same for JSON."""
    return {
        "checkpoints": [
            {
                "folder": str(each.folder),
                "step": each.step,
                "bytes": each.num_bytes,
                "written": _time(each.written_s),
                "strategy": each.strategy,
                "processes": each.processes,
                "whole_by_sizes": each.problem is None,
                "problem": each.problem,
                "last": each.is_last,
                "kept_for_ever": each.is_kept,
                "best": each.is_best,
                "val_cross_entropy": each.validation,
            }
            for each in listed
        ],
        "leftovers": [
            {"folder": str(each.folder), "bytes": each.num_bytes, "reason": each.reason} for each in leftovers
        ],
        "last_names_what_is_not_there": dangling,
    }


def _time(seconds: float | None) -> str | None:
    return None if seconds is None else datetime.fromtimestamp(seconds).astimezone().isoformat(timespec="seconds")


def verified_as_values(problems: Mapping[Path, Sequence[str]]) -> list[dict[str, Any]]:
    """Return what was found of each checkpoint, for JSON."""
    return [{"folder": str(folder), "ok": not found, "problems": list(found)} for folder, found in problems.items()]
