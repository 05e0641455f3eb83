"""What of a sweep's budget is used."""

from __future__ import annotations

from collections.abc import Iterator

from pldr_train.sweeps.records import RUNNING, Record
from pldr_train.sweeps.sweep import Planned, Sweep


class Budget:
    """The budget of a sweep, over all its runners, as the trials' folders show it.

    Args:
        sweep: the sweep.
    """

    def __init__(self, sweep: Sweep) -> None:
        self._sweep, self._limits = sweep, sweep.spec.budget

    def problem(self, planned: Planned | None, more_hours: float = 0.0) -> str | None:
        """Return why a trial is not begun; None if it may be.

        Args:
            planned: the trial; None: one that is not drawn yet.
            more_hours: that trials ran, and that stand in no record yet.
        """
        return self._trials_problem(planned) or self._tokens_problem(planned) or self.hours_problem(more_hours)

    def hours_problem(self, more_hours: float = 0.0) -> str | None:
        """Return that the hours are used up; None if they are not."""
        limit = self._limits.hours
        if limit is None:
            return None
        used = sum(record.ran_s for record in self._records()) / 3600 + more_hours
        return f"budget.hours={limit:g} is used up" if used >= limit else None

    def _trials_problem(self, planned: Planned | None) -> str | None:
        limit = self._limits.trials
        record = None if planned is None else self._sweep.record(planned)
        if limit is None or (record is not None and record.starts):
            return None
        begun = sum(each.starts > 0 for each in self._records())
        return f"budget.trials={limit}: {begun} were begun" if begun >= limit else None

    def _tokens_problem(self, planned: Planned | None) -> str | None:
        limit = self._limits.tokens
        if limit is None or planned is None:
            return None
        used = sum(
            (trial.max_steps if trial.state == RUNNING else trial.steps) * trial.tokens_per_step
            for trial in self._sweep.trials
        )
        trial = self._sweep.trial(planned, is_running=False)
        more = (trial.max_steps - trial.steps) * trial.tokens_per_step
        if used + more <= limit:
            return None
        return f"budget.tokens={limit:,}: {used:,} are used, a trial takes {more:,} more"

    def _records(self) -> Iterator[Record]:
        found = map(self._sweep.record, self._sweep.planned())
        return (record for record in found if record is not None)
