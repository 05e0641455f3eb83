"""A small run that was trained once, to be copied and damaged, and what a start makes of such a copy."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pldr_train.checkpoint.manifest import describe_file, manifest_text
from pldr_train.checkpoint.state import load_state, save_state
from pldr_train.recipe import Recipe, recipe_from_dict
from pldr_train.runs.folder import RunFolder
from pldr_train.training.start import AUTO, Start, choose_start

_OPERATIONS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.symlink", "os.truncate", "shutil.rmtree"}


class KilledError(BaseException):
    """Stands for a SIGKILL; nothing handles it."""


_left: int | None = None


def _count(event: str, _: Any) -> None:
    global _left  # noqa: PLW0603, an audit hook has no other state
    if _left is not None and event in _OPERATIONS:
        _left -= 1
        if _left == 0:
            _left = None
            raise KilledError


sys.addaudithook(_count)


@contextmanager
def killed_at(operation: int) -> Iterator[None]:
    """Raise KilledError instead of the so-many-th file operation."""
    global _left  # noqa: PLW0603
    _left = operation
    try:
        yield
    finally:
        _left = None


def every_kill(prepare: Callable[[], object], act: Callable[[], object]) -> Iterator[int]:
    """Call `act` with a kill before its 1st, 2nd, ... file operation, until it comes to its end; yields after each."""
    operation = 0
    while True:
        operation += 1
        prepare()
        try:
            with killed_at(operation):
                act()
        except KilledError:
            yield operation
            continue
        return


def recipe_of(run: Path) -> Recipe:
    values = json.loads((run / "recipe.json").read_text())
    values["run"] |= {"dir": str(run.parent), "name": run.name}
    return recipe_from_dict(values)


def begin(run: Path, resume: str = AUTO) -> Start:
    """What a start of the run does to its folder, and where it begins."""
    folder = RunFolder(run)
    try:
        folder.acquire()
        return choose_start(folder, recipe_of(run), resume, False)
    finally:
        folder.release()


def change_state(checkpoint: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change what a checkpoint's state file holds; the manifest fits it."""
    state = load_state(checkpoint / "state.pt")
    change(state)
    save_state(checkpoint / "state.pt", state)
    seal(checkpoint)


def seal(checkpoint: Path, **info: Any) -> None:
    """Make the manifest fit the files."""
    path = checkpoint / "manifest.json"
    manifest = json.loads(path.read_text())
    files = {each.name: describe_file(each) for each in sorted(checkpoint.iterdir()) if each != path}
    path.write_text(manifest_text(manifest["step"], files, manifest["info"] | info))


def litter(run: Path) -> list[str]:
    """Hidden files and folders but the lock."""
    return sorted(each.name for each in run.rglob(".*") if each.name not in (".lock", ".unsaved"))


def steps_of_metrics(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
