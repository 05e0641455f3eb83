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
            checkpoints/       see `checkpoint/`
            .lock              held by the process that trains, see `lock.py`
            .unsaved           there until the run's first checkpoint is whole
"""

from __future__ import annotations

import json
import logging
import os
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

from pldr_train.data.documents import Unreadable
from pldr_train.data.files import write_file_atomically
from pldr_train.errors import CheckpointError
from pldr_train.runs.layout import (
    CHECKPOINTS_FOLDER,
    DATA_FILE,
    ENVIRONMENT_FILE,
    METRICS_FILE,
    NONFINITE_FILE,
    RECIPE_FILE,
    SAMPLES_FILE,
    SNAPSHOTS_FOLDER,
    STOPPED_FILE,
    TOKENIZER_FILE,
    UNREADABLE_FILE,
    UNSAVED_FILE,
)
from pldr_train.runs.lines import UNFINISHED, Line, read_file, read_lines, read_samples
from pldr_train.runs.lock import RunLock
from pldr_train.runs.snapshots import cut_snapshots
from pldr_train.untrusted import read_json

_log = logging.getLogger(__name__)

_WRITTEN = (
    RECIPE_FILE, ENVIRONMENT_FILE, METRICS_FILE, SAMPLES_FILE, UNREADABLE_FILE, NONFINITE_FILE, STOPPED_FILE,
    UNSAVED_FILE,
)  # fmt: skip
_COPIED = rf"{TOKENIZER_FILE}|{DATA_FILE}|step-\d+\.safetensors|(metrics|samples)\.before-[\d-]+\.jsonl"
_LITTER = re.compile(rf"\.({'|'.join(map(re.escape, _WRITTEN))})\.\d+\.tmp|\.building-({_COPIED})-\w+")
"""Names under which a run writes a file of its folder before it is renamed."""


class RunFolder:
    """The folder of one run, held by one process at a time.

    Args:
        path: the folder; it need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics_path = path / METRICS_FILE
        self.checkpoints_path = path / CHECKPOINTS_FOLDER
        self._lock = RunLock(path)
        self._metrics: BinaryIO | None = None
        self._metrics_bytes = 0
        self._told: set[str] = set()

    def acquire(self) -> None:
        """Create the folder and lock it; the lock ends with the process, however it ends.

        Raises:
            CheckpointError: another process holds the run, or the folder cannot be made or written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
        except OSError as error:
            raise CheckpointError(
                f"run.dir, run.name: the run's folder {self.path} cannot be made or written "
                f"({error.strerror or error}); set run.dir to a folder that can be written"
            ) from error
        if self._lock.works:
            self._remove_litter()

    def release(self) -> None:
        """Close the metrics and give up the lock."""
        self._close_metrics()
        self._lock.release()

    def check_held(self) -> None:
        """Check that this process still holds the folder at its path, before anything is saved there.

        Raises:
            CheckpointError: the folder was moved or deleted, or another process has it.
        """
        problem = self._lock.check()
        if problem is not None:
            raise CheckpointError(
                f"run folder {self.path}: {problem}; this process ends without saving, so that it writes into no other "
                "run. Put the folder back in its place and run the same command: it goes on from the newest checkpoint"
            )

    def _remove_litter(self) -> None:
        """Remove what a killed process has left under temporary names."""
        for folder in (self.path, self.path / SNAPSHOTS_FOLDER):
            with suppress(OSError):
                for path in list(folder.iterdir()):
                    if _LITTER.fullmatch(path.name) and path.is_file() and not path.is_symlink():
                        path.unlink()

    def holds_a_run(self) -> bool:
        """Return whether something was trained here before."""
        return os.path.lexists(self.checkpoints_path) or os.path.lexists(self.metrics_path)

    def move_aside(self) -> Path:
        """Rename the folder of an earlier run, so that nothing of it is lost; returns its new place."""
        self.release()
        aside = free_name(self.path.with_name(f"{self.path.name}.before-{_stamp()}"))
        try:
            self.path.rename(aside)
        except OSError as error:
            raise CheckpointError(
                f"{self.path} cannot be renamed to {aside.name} ({error.strerror}); move it yourself, or give this run "
                "another run.name"
            ) from error
        self.acquire()
        return aside

    # Whether a checkpoint was ever completed: an empty folder of checkpoints alone does not say.

    def begin_unsaved(self, began_from: Path | None) -> None:
        """Note that the run has no checkpoint of its own yet, and which other run's it began from."""
        self.write(UNSAVED_FILE, json.dumps({"began_from": None if began_from is None else str(began_from)}) + "\n")

    def is_unsaved(self) -> bool:
        """Return whether the run has never completed a checkpoint; False for runs of versions that noted nothing."""
        return (self.path / UNSAVED_FILE).is_file()

    def began_from(self) -> Path | None:
        """Return the other run's checkpoint that a run without checkpoints began from."""
        try:
            found = read_json(self.path / UNSAVED_FILE)["began_from"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return Path(found) if isinstance(found, str) else None

    def saved(self) -> None:
        """Note that a checkpoint is whole."""
        if self.is_unsaved():
            (self.path / UNSAVED_FILE).unlink(missing_ok=True)

    def last_metrics_step(self) -> int | None:
        """Return the highest step of the metrics, None without any."""
        if not os.path.lexists(self.metrics_path):
            return None
        return max((line.step for line in _read(self.metrics_path) if line.problem is None), default=None)

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
        if self._is_gone():
            return
        if entries:
            self.write(name, json.dumps(entries, indent=1, ensure_ascii=False) + "\n")
        else:
            (self.path / name).unlink(missing_ok=True)

    # Metrics.

    def append_metrics(self, values: Mapping[str, Any]) -> None:
        """Append one line to the metrics, visible at once even if the process dies right after.

        Where another program has replaced or removed the file meanwhile, what is missing in it is written again.
        """
        if not self._is_gone():
            self._follow_metrics()
        if self._metrics is not None:
            # A line is written at once; who reads meanwhile may still see a part of it, up to a page's end.
            self._write_metrics((json.dumps(values) + "\n").encode())

    def _write_metrics(self, content: bytes) -> None:
        assert self._metrics is not None
        left = memoryview(content)
        while left:  # a disk that fills up takes a part and refuses the rest
            left = left[self._metrics.write(left) :]
        self._metrics_bytes = os.fstat(self._metrics.fileno()).st_size

    def _is_gone(self) -> bool:
        """Return whether the folder has left its place, which is reported once; the next save ends the run."""
        problem = self._lock.check()
        if problem is not None:
            self._tell(
                f"run folder {self.path}: {problem}. Nothing can be saved: put the folder back in its place before the "
                "next checkpoint is due, or the run ends there"
            )
        return problem is not None

    def _follow_metrics(self) -> None:
        """Open the file at the path, and write into it what it lacks of the one that was written to so far."""
        if self._metrics is None:
            self._open_metrics()
            return
        mine = os.fstat(self._metrics.fileno())
        try:
            there = os.stat(self.metrics_path)
        except FileNotFoundError:
            there = None
        if there is not None and (there.st_dev, there.st_ino) == (mine.st_dev, mine.st_ino):
            if mine.st_size < self._metrics_bytes:
                self._tell(
                    f"{self.metrics_path} was cut by another program while the run writes it: what was written since "
                    "that program read it is lost"
                )
            if mine.st_size != self._metrics_bytes:
                self._end_last_line()
            return
        before = self._metrics
        self._open_metrics()
        added = self._add_missing(before)
        before.close()
        what = "removed" if there is None else "replaced"
        self._tell(
            f"{self.metrics_path} was {what} by another program while the run writes it; the run goes on in the file "
            f"that is there now, {added:,} lines that it lacked were added"
        )

    def _open_metrics(self) -> None:
        # Readable as well: should its name be taken away, what it holds is still at hand.
        self._metrics = self.metrics_path.open("a+b", buffering=0)
        self._end_last_line()

    def _end_last_line(self) -> None:
        """An editor may leave a last line without its end, which the next line would be written into."""
        assert self._metrics is not None
        size = os.fstat(self._metrics.fileno()).st_size
        if size and os.pread(self._metrics.fileno(), 1, size - 1) != b"\n":
            self._write_metrics(b"\n")
        self._metrics_bytes = os.fstat(self._metrics.fileno()).st_size

    def _add_missing(self, before: BinaryIO) -> int:
        assert self._metrics is not None
        last = max((line.step for line in _lines_of(self._metrics) if line.problem is None), default=-1)
        missing = [line for line in _lines_of(before) if line.problem is None and line.step > last]
        self._write_metrics(b"".join(line.raw for line in missing))
        return len(missing)

    def _tell(self, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            _log.warning(text)

    def sync_metrics(self) -> None:
        """Bring the metrics to the disk, so that a checkpoint is never newer than its metrics."""
        if self._metrics is not None:
            self._follow_metrics()
            os.fsync(self._metrics.fileno())

    def _close_metrics(self) -> None:
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None

    def cut_back(self, last_step: int, keep_copy: bool = False) -> int:
        """Drop what was written after `last_step` (-1: all); returns how many lines of metrics that was.

        Half-written last lines go, too. Of other lines that cannot be read a copy of the file is kept, with a
        warning.

        Args:
            last_step: the last one that stays.
            keep_copy: keep a copy of the metrics in any case, if lines go.
        """
        self._close_metrics()  # it would go on writing into a file that is replaced
        cut_lines(self.path / SAMPLES_FILE, last_step)
        cut_snapshots(self.path, last_step)
        return cut_lines(self.metrics_path, last_step, keep_copy)

    # Samples.

    def add_samples(self, step: int, prompts: Sequence[str], texts: Sequence[str]) -> None:
        """Add the texts of a step, instead of those that it may have already."""
        path = self.path / SAMPLES_FILE
        lines = read_file(path) if path.exists() else []
        # What cannot be read stays until a resume, which reports it.
        kept = [each.raw for each in lines if each.problem != UNFINISHED and each.values.get("step") != step]
        for prompt, text in zip(prompts, texts, strict=True):
            each = {"step": step, "prompt": prompt, "text": text}
            kept.append((json.dumps(each, ensure_ascii=False) + "\n").encode())
        write_atomically(path, b"".join(kept))

    def last_samples(self) -> tuple[int, tuple[str, ...]]:
        """Return the last step that has samples, and its texts; -1 if there is none."""
        path = self.path / SAMPLES_FILE
        found = read_samples(path)[0] if path.exists() else []
        last = max((each.step for each in found), default=-1)
        return last, tuple(each.text for each in found if each.step == last)


def cut_lines(path: Path, last_step: int, keep_copy: bool = False) -> int:
    """Drop the lines of a file after `last_step` (-1: all) and those that do not count; returns how many were dropped.

    A copy is kept of a file with lines that cannot be read, the last one aside, which a kill may have cut short.

    Raises:
        CheckpointError: the file cannot be read.
    """
    if not os.path.lexists(path):
        return 0
    lines = _read(path)
    kept = [line for line in lines if line.problem is None and line.step <= last_step]
    if len(kept) == len(lines):
        return 0
    bad = [line for line in lines if line.problem not in (None, UNFINISHED) and not line.is_blank]
    if bad or keep_copy:
        copy = free_name(path.with_name(f"{path.stem}.before-{_stamp()}{path.suffix}"))
        with path.open("rb") as source:
            write_file_atomically(copy, source.read(), fix="free some space")
        why = f", of which {len(bad):,} cannot be read (line {bad[0].number:,} {bad[0].problem})" if bad else ""
        gone = f"{len(lines) - len(kept):,} lines go{why}"
        (_log.warning if bad else _log.info)(f"{path}: {gone}; the file as it was is kept as {copy.name}")
    write_atomically(path, b"".join(line.raw for line in kept))
    return len(lines) - len(kept)


def _read(path: Path) -> list[Line]:
    try:
        return read_file(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); put it right, or move it away") from error


def _lines_of(handle: BinaryIO) -> list[Line]:
    with os.fdopen(os.dup(handle.fileno()), "rb") as beside:  # buffered; its position is shared, which appends ignore
        beside.seek(0)
        return list(read_lines(beside))


def _stamp() -> str:
    return time.strftime("%Y%m%d-%H%M%S")


def free_name(path: Path) -> Path:
    """Return a path that nothing has: this one, or with a number behind its name."""
    number, found = 1, path
    while os.path.lexists(found):
        number += 1
        found = path.with_name(f"{path.stem}-{number}{path.suffix}")
    return found


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace a file so that a reader, or a crash, sees the old one or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as handle:
            handle.write(content.encode() if isinstance(content, str) else content)
            handle.flush()
            os.fsync(handle.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
