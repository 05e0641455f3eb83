"""What the end of a trial's process says of the trial."""

from __future__ import annotations

import signal
from pathlib import Path

from pldr_train.launching import newest_step
from pldr_train.runs.layout import CHECKPOINTS_FOLDER
from pldr_train.sweeps.records import DONE, FAILED, WAITING
from pldr_train.sweeps.sweep import Trial

_MOST_DEATHS = 3
"""A trial whose process was killed so often in a row, without a new checkpoint, has failed."""
_BY_SIGNAL = tuple(128 + number for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGKILL))
_MOST_LINES, _MOST_CHARACTERS = 12, 2000


class Endings:
    """Judges the ends of trials' processes, and remembers which were killed how often."""

    def __init__(self) -> None:
        self._deaths: dict[str, tuple[int, int]] = {}
        """Trial -> step of its newest checkpoint, and how often it was killed since there is that one."""

    def judge(self, trial: Trial, code: int, log_size: int, asked: bool) -> tuple[str, str | None]:
        """Return a trial's state, and the error of one that failed.

        Args:
            trial: whose process has ended.
            code: its exit code, negative after a signal.
            log_size: bytes of its log from before this process.
            asked: whether it was asked to stop.
        """
        if code == 0:
            return DONE, None
        if code > 0 and code not in _BY_SIGNAL:
            return FAILED, _last_lines(trial.log, log_size) or f"exit code {code}"
        if asked:
            return WAITING, None
        saved = newest_step(trial.folder / CHECKPOINTS_FOLDER)
        before, deaths = self._deaths.get(trial.name, (-1, 0))
        deaths = 1 if saved > before else deaths + 1
        self._deaths[trial.name] = (saved, deaths)
        if deaths < _MOST_DEATHS:
            return WAITING, None
        name = signal.Signals(abs(code) % 128).name
        text = f"was ended by {name} {deaths} times in a row without a new checkpoint (no memory left?)"
        return FAILED, "\n".join(filter(None, (_last_lines(trial.log, log_size), text)))


def _last_lines(log: Path, offset: int) -> str:
    """Return the last lines that a process printed after `offset` bytes of its log."""
    try:
        with log.open("rb") as file:
            file.seek(offset)
            text = file.read()[-_MOST_CHARACTERS:].decode(errors="replace")
    except OSError:
        return ""
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    return "\n".join(lines[-_MOST_LINES:])
