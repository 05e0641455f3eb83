"""Runs, read and read on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pldr_train.report.metrics_file import MetricsFile
from pldr_train.report.run_files import RunFiles, read_run_files
from pldr_train.report.snapshots import Snapshots
from pldr_train.runs.layout import METRICS_FILE, SNAPSHOTS_FOLDER, is_run, why_no_run
from pldr_train.runs.lock import is_held


class Run:
    """One run's records.

    Args:
        folder: the run's folder.
        name: what it is called among the others.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        self.metrics = MetricsFile(folder / METRICS_FILE)
        self.files = RunFiles()
        self.snapshots = Snapshots(folder / SNAPSHOTS_FOLDER)
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
            return 0.0 if path.name == METRICS_FILE else path.stat().st_mtime
        except OSError:
            return -1.0

    def notes(self) -> list[str]:
        """Return what is wrong or missing, a sentence each."""
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
            return (self.folder / METRICS_FILE).stat().st_mtime
        except OSError:
            return None

    def is_held(self) -> bool:
        """Return whether a process of this machine trains it."""
        return is_held(self.folder)


def open_runs(folders: Sequence[Path]) -> tuple[list[Run], list[str]]:
    """Return the runs among the folders, each once and with a name of its own, and why the others are none."""
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
