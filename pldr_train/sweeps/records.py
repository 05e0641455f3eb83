"""What a sweep keeps beside the files of its trials' runs: records, claims, locks and the wish to stop.

<run.dir>/<sweep>/study.journal     Optuna's study, unless the spec names another storage; can be made again
                  sweep.json        what was asked of the sampler so far
                  stop.json         the last `pldr-train sweep stop`
                  .lock             held for moments, by the runner that chooses its next trial
                  <trial>/trial.yaml   the trial's recipe, as `fit` is given it
                          trial.json   its record
                          trial.log    what `fit` printed, of all its starts
                          .claim       held by the runner of the trial and by the trial's process
                          recipe.yaml, metrics.jsonl, ...   the run's own, see `pldr_train.runs.folder`
"""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from pldr_train.data.files import write_file_atomically
from pldr_train.errors import UserError, os_error_text
from pldr_train.file_locks import try_lock, wait_for_lock
from pldr_train.runs.layout import LOCK_FILE
from pldr_train.runs.lock import is_held
from pldr_train.untrusted import read_json

JOURNAL_FILE, SWEEP_FILE, STOP_FILE = "study.journal", "sweep.json", "stop.json"
TRIAL_RECIPE, RECORD_FILE, LOG_FILE, CLAIM_FILE = "trial.yaml", "trial.json", "trial.log", ".claim"
WAITING, RUNNING, DONE, FAILED, PRUNED = STATES = ("waiting", "running", "done", "failed", "pruned")

_FIX = "free some space, and run the same command again"
_TRIES, _BETWEEN_TRIES_S = 3, 0.01


@dataclass(frozen=True)
class Record:
    """What runners note of a trial. That it runs is not noted: its claim says so."""

    name: str
    axes: Mapping[str, Any]
    seed: int
    cell: int = 0
    """Number of its cell in the order of the sweep."""
    state: str = WAITING
    """How it stands when nobody runs it: waiting, done, failed or pruned."""
    error: str | None = None
    """Of a failed trial: the last lines that it printed."""
    starts: int = 0
    started_s: float | None = None
    """Unix time of its first start."""
    ended_s: float | None = None
    """Unix time of its last end."""
    ran_s: float = 0.0
    """How long its processes ran, all starts together."""
    retries: int = 0
    """How often it was set back after it had failed or was pruned."""
    steps: int = 0
    """Of its last end."""

    def changed(self, **values: Any) -> Record:
        """Return the record with other values."""
        return replace(self, **values)


@dataclass
class RecordFile:
    """The record of a trial, read again when its file has changed.

    Args:
        folder: the trial's.
    """

    folder: Path
    _seen: tuple[int, int, int] | None = field(default=None, init=False)
    _record: Record | None = field(default=None, init=False)

    def read(self) -> Record | None:
        """Return the record; None where there is none, or none that can be read."""
        path = self.folder / RECORD_FILE
        try:
            status = path.stat()
        except OSError:
            self._seen = None
            return None
        seen = (status.st_ino, status.st_mtime_ns, status.st_size)
        if seen != self._seen:
            self._seen, self._record = seen, _read_record(path)
        return self._record


def _read_record(path: Path) -> Record | None:
    try:
        values = read_json(path)
    except (OSError, ValueError):
        return None
    known = {each.name for each in fields(Record)}
    try:
        record = Record(**{key: value for key, value in values.items() if key in known})
    except (TypeError, AttributeError):
        return None
    is_whole = isinstance(record.axes, dict) and isinstance(record.seed, int) and record.state in STATES
    return record if is_whole and isinstance(record.name, str) else None


def write_record(folder: Path, record: Record) -> None:
    """Write a trial's record whole or not at all; raises DataError."""
    text = json.dumps(asdict(record), indent=1, ensure_ascii=False) + "\n"
    write_file_atomically(folder / RECORD_FILE, text.encode(), _FIX)


class Claim:
    """The right to run a trial: a lock that the trial's process inherits, so that it lasts until both have ended.

    Args:
        descriptor: of the locked file.
    """

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        os.set_inheritable(descriptor, True)

    @classmethod
    def take(cls, folder: Path) -> Claim | None:
        """Make the trial's folder and claim it; None if someone runs it, also if that is a `fit` of its own.

        Raises:
            UserError: the folder cannot be made, or files cannot be locked there.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = _lock(folder / CLAIM_FILE)
            if descriptor is None:
                return None
            of_run = _lock(folder / LOCK_FILE)
        except OSError as error:
            raise UserError(
                f"{folder}: {os_error_text(error) or f'cannot be locked ({error.strerror})'}; a sweep needs a folder "
                "that can be written, on a file system with locks: set run.dir to one"
            ) from error
        if of_run is None:
            os.close(descriptor)
            return None
        os.close(of_run)
        return cls(descriptor)

    def release(self) -> None:
        """Give it up; the trial's process must have ended."""
        os.close(self.descriptor)


def _lock(path: Path) -> int | None:
    """Open and lock a file; None if another process has it. Who only looks holds it for a moment."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    for _ in range(_TRIES):
        if try_lock(descriptor):
            return descriptor
        time.sleep(_BETWEEN_TRIES_S)
    os.close(descriptor)
    return None


def is_claimed(folder: Path) -> bool:
    """Return whether someone runs the trial, on whatever machine; a `fit` of its own is seen on this one."""
    if is_held(folder):
        return True
    try:
        descriptor = os.open(folder / CLAIM_FILE, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return not try_lock(descriptor)
    except OSError:
        return False
    finally:
        os.close(descriptor)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock file, waiting for it; it ends with the process. Raises UserError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise UserError(f"{os_error_text(error) or error}; set run.dir to a folder that can be written") from error
    try:
        wait_for_lock(descriptor)
        yield
    finally:
        os.close(descriptor)


def hold_if_free(path: Path) -> int | None:
    """Lock a file and return its descriptor, to be closed; None if another process holds it."""
    return _lock(path)


def read_sweep_file(folder: Path) -> dict[str, Any]:
    """Return what a sweep's folder notes of the search; empty where it notes nothing that can be read."""
    with suppress(OSError, ValueError):
        values = read_json(folder / SWEEP_FILE)
        if isinstance(values, dict):
            return values
    return {}


def write_sweep_file(folder: Path, values: Mapping[str, Any]) -> None:
    """Write it; raises DataError."""
    write_file_atomically(folder / SWEEP_FILE, (json.dumps(dict(values), indent=1) + "\n").encode(), _FIX)


def ask_to_stop(folder: Path) -> None:
    """Ask all runners of the sweep to stop; raises DataError."""
    wish = {"id": secrets.token_hex(8), "asked_s": time.time()}
    write_file_atomically(folder / STOP_FILE, (json.dumps(wish) + "\n").encode(), _FIX)


def last_stop(folder: Path) -> str | None:
    """Return what tells the last wish to stop from others; None without any."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        return str(read_json(folder / STOP_FILE)["id"])
    return None
