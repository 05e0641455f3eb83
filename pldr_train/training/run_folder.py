"""A run's folder: its recipe, its environment and its metrics, the source of truth of what happened.

runs/<name>/recipe.yaml        the resolved recipe; runs again as it is
            environment.json   versions, git state and command of the last start
            tokenizer.model    the SentencePiece model that the run reads its documents with
            data.json          the list of the source's files: sizes, rows, revision
            unreadable.json    what was left out of the data because it could not be read, if anything was
            nonfinite.json     steps whose loss or gradient was not finite, if there were any
            metrics.jsonl      one JSON object a line: the step and what was logged at it
            samples.jsonl      text samples, one JSON object a line
            snapshots/         deductive outputs at validations, see `snapshots.py`
            checkpoints/       see `checkpoints.py`
"""

from __future__ import annotations

import fcntl
import functools
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TextIO
from weakref import WeakSet

from pldr_train.data.documents import Unreadable
from pldr_train.data.files import write_file_atomically
from pldr_train.errors import CheckpointError
from pldr_train.training.snapshots import cut_snapshots

METRICS_FILE = "metrics.jsonl"
TOKENIZER_FILE = "tokenizer.model"
DATA_FILE = "data.json"
UNREADABLE_FILE = "unreadable.json"
NONFINITE_FILE = "nonfinite.json"
SAMPLES_FILE = "samples.jsonl"


_MOST_LINE_BYTES = 2**22


class RunFolder:
    """The folder of one run, held by one process at a time.

    Args:
        path: the folder; it need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics_path = path / METRICS_FILE
        self.checkpoints_path = path / "checkpoints"
        self._lock: TextIO | None = None
        self._metrics: TextIO | None = None

    def acquire(self) -> None:
        """Create the folder and lock it; the lock ends with the process, however it ends.

        Raises:
            CheckpointError: another process holds the run.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        lock = (self.path / ".lock").open("a+")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.seek(0)
            holder = lock.read().strip() or "another process"
            lock.close()
            raise CheckpointError(
                f"run folder {self.path} is in use by {holder}; wait for it, or give this run another run.name"
            ) from error
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {platform.node()}")
        lock.flush()
        self._lock = lock
        _held.add(self)

    def release(self) -> None:
        """Close the metrics and give up the lock."""
        for handle in (self._metrics, self._lock):
            if handle is not None:
                handle.close()
        self._metrics = self._lock = None

    def holds_a_run(self) -> bool:
        """Whether something was trained here before."""
        return self.checkpoints_path.exists() or self.metrics_path.exists()

    def move_aside(self) -> Path:
        """Rename the folder of an earlier run, so that nothing of it is lost; returns its new place."""
        self.release()
        stamp = time.strftime("%Y%m%d-%H%M%S")
        aside = self.path.with_name(f"{self.path.name}.before-{stamp}")
        self.path.rename(aside)
        self.acquire()
        return aside

    def copy_in(self, name: str, source: Path, replace: bool) -> None:
        """Copy a file in, whole or not at all; what is there already is left unless it is to be replaced."""
        target = self.path / name
        if replace or not target.exists():
            write_file_atomically(target, source.read_bytes(), fix="free some space")

    def write(self, name: str, text: str) -> None:
        """Write a file whole or not at all."""
        write_atomically(self.path / name, text)

    def write_unreadable(self, parts: Sequence[Unreadable]) -> None:
        """Write the list of what was left out of the data; without any, there is no such file."""
        self._write_list(UNREADABLE_FILE, [asdict(part) for part in parts])

    def write_nonfinite(self, steps: Sequence[Mapping[str, Any]]) -> None:
        """Write the list of steps that were not finite; without any, there is no such file."""
        self._write_list(NONFINITE_FILE, steps)

    def _write_list(self, name: str, entries: Sequence[Mapping[str, Any]]) -> None:
        if entries:
            self.write(name, json.dumps(entries, indent=1, ensure_ascii=False) + "\n")
        else:
            (self.path / name).unlink(missing_ok=True)

    def append_metrics(self, values: Mapping[str, Any]) -> None:
        """Append one line to the metrics, visible at once even if the process dies right after."""
        if self._metrics is None:
            # A line is written at once; who reads meanwhile may still see a part of it, up to a page's end.
            self._metrics = self.metrics_path.open("a", encoding="utf-8", buffering=_MOST_LINE_BYTES)
        self._metrics.write(json.dumps(values) + "\n")
        self._metrics.flush()

    def sync_metrics(self) -> None:
        """Bring the metrics to the disk, so that a checkpoint is never newer than its metrics."""
        if self._metrics is not None:
            os.fsync(self._metrics.fileno())

    def cut_back(self, last_step: int) -> int:
        """Drop what was written after `last_step` (-1: all); returns how many lines of metrics that was.

        Half-written last lines go, too.
        """
        if self._metrics is not None:  # it would go on writing into a file that is replaced
            self._metrics.close()
            self._metrics = None
        cut_lines(self.path / SAMPLES_FILE, last_step)
        cut_snapshots(self.path, last_step)
        return cut_lines(self.metrics_path, last_step)

    def add_samples(self, step: int, prompts: Sequence[str], texts: Sequence[str]) -> None:
        """Add the texts of a step, instead of those that it may have already."""
        path = self.path / SAMPLES_FILE
        kept = _whole_lines(path) if path.exists() else []
        kept = [line for line in kept if _step_of(line) != step]
        for prompt, text in zip(prompts, texts, strict=True):
            kept.append(json.dumps({"step": step, "prompt": prompt, "text": text}, ensure_ascii=False) + "\n")
        write_atomically(path, "".join(kept))

    def last_samples(self) -> tuple[int, tuple[str, ...]]:
        """The last step that has samples, and its texts; -1 if there is none."""
        path = self.path / SAMPLES_FILE
        found = [json.loads(line) for line in _whole_lines(path)] if path.exists() else []
        last = max((each["step"] for each in found), default=-1)
        return last, tuple(each["text"] for each in found if each["step"] == last)


def cut_lines(path: Path, last_step: int) -> int:
    """Drop the lines of a file after `last_step` (-1: all) and a half-written one; returns how many were dropped."""
    if not path.exists():
        return 0
    lines = _lines(path)
    kept = [line for line in lines if (step := _step_of(line)) is not None and step <= last_step]
    if len(kept) != len(lines):
        write_atomically(path, "".join(kept))
    return len(lines) - len(kept)


def _whole_lines(path: Path) -> list[str]:
    return [line for line in _lines(path) if _step_of(line) is not None]


def _lines(path: Path) -> list[str]:
    """Lines with their ends, the last maybe without; texts may hold other signs that Python takes for a line's end."""
    *whole, rest = path.read_text(encoding="utf-8").split("\n")
    return [line + "\n" for line in whole] + ([rest] if rest else [])


_held: WeakSet[RunFolder] = WeakSet()


def _let_go_in_child() -> None:
    """Close the locks that a forked process inherits: a loader worker that outlives a killed run must not hold it."""
    for folder in list(_held):
        if folder._lock is not None:
            folder._lock.close()
            folder._lock = None


os.register_at_fork(after_in_child=_let_go_in_child)


def _step_of(line: str) -> int | None:
    """The step of a line of metrics, or `None` for one that was not written whole."""
    if not line.endswith("\n"):
        return None
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return None


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a metrics file, in order."""
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            if line.endswith("\n"):
                yield json.loads(line)


def write_atomically(path: Path, text: str) -> None:
    """Replace a file so that a reader, or a crash, sees the old one or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as handle:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


@functools.cache
def environment() -> dict[str, Any]:
    """Versions, machine, git state and command, as plain types."""
    packages = {}
    for name in ("pldr_train", "torch", "lightning", "deepspeed", "transformers", "datasets", "sentencepiece", "numpy"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = "not installed"
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages,
        "git": _git_state(),
        "command": sys.argv,
    }


def _git_state() -> dict[str, Any] | None:
    """Commit of the code that runs and whether it was changed; `None` outside a git checkout."""
    root = Path(__file__).resolve().parent
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True, timeout=10
        )
        status = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"],
            cwd=root, capture_output=True, text=True, check=True, timeout=10,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit.stdout.strip(), "changed": bool(status.stdout.strip())}
