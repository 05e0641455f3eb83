"""Runs, read and read on; what is wrong in `metrics.jsonl` is noted and the rest is kept."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from pldr_train.metrics.catalog import TOKENS, TOKENS_PER_S
from pldr_train.report.run_files import RunFiles, read_run_files
from pldr_train.report.series import Series
from pldr_train.report.snapshots import Snapshots
from pldr_train.runs.layout import METRICS_FILE, SNAPSHOTS_FOLDER, is_run, why_no_run
from pldr_train.runs.lines import UNFINISHED, Line, read_lines
from pldr_train.runs.lock import is_held
from pldr_train.untrusted import open_regular


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
        """Whether the last step that the recipe asks for was done, or the run ended early."""
        step, most = self.metrics.last_step, self.files.max_steps
        if self.files.ended_early:
            return True
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


MOST_SERIES = 2000
_MOST_LINES_NAMED = 5


class MetricsFile:
    """The metrics of one run.

    Args:
        path: the file; it need not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._start_over()

    def _start_over(self) -> None:
        self.series: dict[str, Series] = {}
        self.hours = Series()
        """Of training since the run's beginning, without validations, saves and pauses: tokens by their rate."""
        self._tokens = self._hours = 0.0
        self.lines = 0
        self.last_step: int | None = None
        self.problem: str | None = None
        self._identity: tuple[int, int] | None = None
        self._offset = self._unfinished_bytes = 0
        self._bad: list[tuple[int, str]] = []
        self._bad_count = self._back_count = 0
        self._back = ""
        self._not_numbers: set[str] = set()
        self._left_out: set[str] = set()

    def read_on(self) -> bool:
        """Read what was written since the last call; returns whether anything has changed.

        A file that was replaced or cut back (a resumed run does that) is read from its beginning.
        """
        try:
            with open_regular(self.path) as handle:
                return self._read_from(handle)
        except FileNotFoundError:
            problem = "there is no metrics.jsonl (yet)"
        except OSError as error:
            problem = f"metrics.jsonl cannot be read ({error.strerror})"
        changed = problem != self.problem
        self._start_over()
        self.problem = problem
        return changed

    def _read_from(self, handle: BinaryIO) -> bool:
        status = os.fstat(handle.fileno())
        identity = (status.st_dev, status.st_ino)
        before = (self._offset, self._unfinished_bytes, self.problem)
        if self._identity is not None and (identity != self._identity or status.st_size < self._offset):
            self._start_over()
            before = (-1, 0, None)
        self._identity, self.problem, self._unfinished_bytes = identity, None, 0
        handle.seek(self._offset)
        for line in read_lines(handle, self.lines):
            if line.problem == UNFINISHED:
                self._unfinished_bytes = line.num_bytes
                break
            self._offset += line.num_bytes
            self.lines += 1
            self._take(line)
        return before != (self._offset, self._unfinished_bytes, self.problem)

    def _take(self, line: Line) -> None:
        if line.problem is not None:
            if not line.is_blank:
                self._note_bad(line.problem)
            return
        step = line.step
        if self.last_step is not None and step < self.last_step:
            self._back_count += 1
            self._back = f"line {self.lines:,} goes back from step {self.last_step:,} to {step:,}"
            for series in (*self.series.values(), self.hours):
                series.cut(step)
            self._tokens, self._hours = (_last_of(series) for series in (self.series.get(TOKENS), self.hours))
        self.last_step = step
        self._count_hours(line)
        known = self.series
        for name, value in line.values.items():
            if type(value) is float and name in known:
                known[name].add(step, value)
            elif name != "step":
                self._take_value(name, step, value)

    def _count_hours(self, line: Line) -> None:
        tokens, rate = line.values.get(TOKENS), line.values.get(TOKENS_PER_S)
        if isinstance(tokens, int | float) and isinstance(rate, int | float) and rate > 0 and tokens >= self._tokens:
            self._hours += (tokens - self._tokens) / rate / 3600
            self._tokens = tokens
            self.hours.add(line.step, self._hours)

    def _take_value(self, name: str, step: float, value: Any) -> None:
        series = self.series.get(name)
        if series is None:
            if isinstance(value, str) or len(self.series) >= MOST_SERIES:
                if not isinstance(value, str):
                    self._left_out.add(name)
                return
            series = self.series[name] = Series()
        if value is None:  # how writers of strict JSON put NaN
            series.add(step, float("nan"))
        elif isinstance(value, int | float):
            try:
                series.add(step, float(value))
            except OverflowError:
                series.add(step, float("inf"))
        else:
            self._not_numbers.add(name)

    def _note_bad(self, what: str) -> None:
        self._bad_count += 1
        if len(self._bad) < _MOST_LINES_NAMED:
            self._bad.append((self.lines, what))

    def notes(self) -> list[str]:
        """Return what is wrong, a sentence each."""
        found = [] if self.problem is None else [self.problem]
        if self.problem is None and not self.series:
            found.append("metrics.jsonl holds no values yet")
        if self._unfinished_bytes:
            found.append(
                f"metrics.jsonl: its last line is unfinished ({self._unfinished_bytes:,} bytes left out); it is being "
                "written, or the run was cut off there"
            )
        if self._bad:
            named = "; ".join(f"line {number:,} {what}" for number, what in self._bad)
            more = self._bad_count - len(self._bad)
            found.append(f"metrics.jsonl: {named}{f'; and {more:,} more lines' if more else ''}; left out")
        if self._back:
            found.append(
                f"metrics.jsonl: {self._back} ({self._back_count:,} such places in all); what stood there for these "
                "steps before is left out"
            )
        if self._not_numbers:
            found.append(f"metrics.jsonl: values that are no numbers were left out of {_names(self._not_numbers)}")
        if self._left_out:
            found.append(f"metrics.jsonl: more than {MOST_SERIES:,} metrics; left out are {_names(self._left_out)}")
        nonfinite = {name: each.nonfinite_count for name, each in self.series.items() if each.nonfinite_count}
        if nonfinite:
            counted = ", ".join(f"{name} {count:,}" for name, count in list(nonfinite.items())[:_MOST_LINES_NAMED])
            more = len(nonfinite) - _MOST_LINES_NAMED
            found.append(
                f"values that are NaN, infinite or null: {counted}{f' and {more:,} more metrics' if more > 0 else ''}"
            )
        return found


def _last_of(series: Series | None) -> float:
    return 0.0 if series is None or series.last is None else series.last[1]


def _names(names: set[str]) -> str:
    shown = sorted(names)[:_MOST_LINES_NAMED]
    return ", ".join(shown) + (f" and {len(names) - len(shown):,} more" if len(names) > len(shown) else "")
