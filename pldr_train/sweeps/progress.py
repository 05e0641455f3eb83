"""What a runner says of its trials' ends, of what is left and how long it takes."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator

from pldr_train.printing import duration_text
from pldr_train.sweeps.records import DONE, FAILED, PRUNED
from pldr_train.sweeps.sweep import Sweep, Trial

_OVER = (DONE, FAILED, PRUNED)


class Progress:
    """How far a sweep is, and how fast this runner is.

    Args:
        sweep: the sweep.
    """

    def __init__(self, sweep: Sweep) -> None:
        self._sweep = sweep
        self._began = time.monotonic()
        self._tokens = 0

    def trained(self, trial: Trial, since_step: int) -> None:
        """Note what a trial of this runner has trained since a step."""
        self._tokens += max(0, trial.steps - since_step) * trial.tokens_per_step

    def end_text(self, trial: Trial, took_s: float) -> str:
        """Return a line on a trial whose process has ended."""
        value = "" if trial.objective is None else f", {self._sweep.spec.metric} {trial.objective:.5g}"
        if trial.state == DONE:
            return f"{trial.name} is done in {duration_text(took_s)}{value}; {self._outlook()}"
        if trial.state == FAILED:
            last = "".join((trial.error or "").splitlines()[-1:])
            return f"{trial.name} failed after step {trial.steps:,}: {last} (all in {trial.log})"
        if trial.state == PRUNED:
            return f"{trial.name} is pruned after step {trial.steps:,}{value}; {self._outlook()}"
        return f"{trial.name} stopped after step {trial.steps:,}"

    def _outlook(self) -> str:
        trials = self._sweep.trials
        waiting = [trial for trial in trials if trial.state not in _OVER]
        words = f"{len(trials) - len(waiting)} of {self._sweep.num_trials} trials are over"
        left = sum((trial.max_steps - trial.steps) * trial.tokens_per_step for trial in waiting)
        if not left or not self._tokens:
            return words
        left_s = left * (time.monotonic() - self._began) / self._tokens
        return f"{words}, about {duration_text(left_s)} left at this runner's speed"

    def summary(self, word: str) -> Iterator[str]:
        """Yield how the sweep stands at the runner's end, and its best trial."""
        trials = self._sweep.trials
        counts = Counter(trial.state for trial in trials)
        listing = [f"{number} {state}" for state, number in counts.items()]
        if self._sweep.num_to_draw:
            listing.append(f"{self._sweep.num_to_draw} cells not drawn")
        yield f"{word}: {', '.join(listing)}"
        best = self._sweep.best
        if best is not None:
            yield f"best: {best.name}, {self._sweep.spec.metric} {best.objective:.5g}"
