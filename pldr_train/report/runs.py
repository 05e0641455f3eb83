"""Runs, read and read on."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from pldr_train.report.metrics_file import MetricsFile
from pldr_train.report.run_files import METRICS, RunFiles, is_run, read_run_files, why_no_run
from pldr_train.report.snapshots import SNAPSHOTS, Snapshots


class Run:
    """One run's records.

    Args:
        folder: the run's folder.
        name: what it is called among the others.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        self.metrics = MetricsFile(folder / METRICS)
        self.files = RunFiles()
        self.snapshots = Snapshots(folder / SNAPSHOTS)
        self._stamps: tuple[float, ...] = ()

    def read_on(self) -> bool:
        """Read what is new; returns whether anything is."""
        changed = self.metrics.read_on()
        changed = self.snapshots.read_on() or changed
        stamps = tuple(self._stamp_of(path) for path in (*self.folder.glob("*.*"), *self.folder.glob("checkpoints/*")))
        if stamps != self._stamps:
            self._stamps, changed = stamps, True
            self.files = read_run_files(self.folder)
        return changed

    @staticmethod
    def _stamp_of(path: Path) -> float:
        try:
            return 0.0 if path.name == METRICS else path.stat().st_mtime
        except OSError:
            return -1.0

    def notes(self) -> list[str]:
        """What is wrong or missing, a sentence each."""
        return [*self.metrics.notes(), *self.files.notes, *self.snapshots.notes]

    @property
    def is_finished(self) -> bool:
        """Whether the last step that the recipe asks for was done."""
        step, most = self.metrics.last_step, self.files.max_steps
        return step is not None and most is not None and step >= most

    @property
    def state(self) -> str:
        """finished, running (seen on this machine only) or unfinished."""
        if self.is_held():
            return "running"
        return "finished" if self.is_finished else "unfinished"

    def last_written_s(self) -> float | None:
        """When the metrics were last written, seconds since 1970."""
        try:
            return (self.folder / METRICS).stat().st_mtime
        except OSError:
            return None

    def is_held(self) -> bool:
        """Whether a process of this machine trains it: looked up, for trying the lock could disturb a start."""
        try:
            status = (self.folder / ".lock").stat()
            locks = Path("/proc/locks").read_text(encoding="ascii")
        except (OSError, UnicodeDecodeError):
            return False
        device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
        return any(device in line.split() for line in locks.splitlines())


def open_runs(folders: Sequence[Path]) -> tuple[list[Run], list[str]]:
    """The runs among the folders, each once and with a name of its own, and why the others are none."""
    found: dict[Path, Path] = {}
    problems = []
    for folder in folders:
        if folder.is_dir() and is_run(folder):
            found.setdefault(folder.resolve(), folder)
        else:
            problems.append(why_no_run(folder))
    names = [resolved.name for resolved in found]
    unique = len(set(names)) == len(names)
    runs = [Run(folder, resolved.name if unique else str(folder)) for resolved, folder in found.items()]
    return runs, problems
