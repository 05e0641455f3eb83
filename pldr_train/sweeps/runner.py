"""Runs a sweep's trials: each a `pldr-train fit` of its own, several at a time, beside other runners of the sweep."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pldr_train.data.files import write_file_atomically
from pldr_train.launching import Signals, newest_step
from pldr_train.printing import duration_text
from pldr_train.recipe import Recipe
from pldr_train.runs.layout import CHECKPOINTS_FOLDER, METRICS_FILE
from pldr_train.sweeps import processes
from pldr_train.sweeps.budget import Budget
from pldr_train.sweeps.processes import Process, Workers
from pldr_train.sweeps.records import (
    DONE,
    FAILED,
    LOG_FILE,
    PRUNED,
    TRIAL_RECIPE,
    WAITING,
    Claim,
    hold_if_free,
    is_claimed,
    last_stop,
    locked,
    read_sweep_file,
    write_record,
    write_sweep_file,
)
from pldr_train.sweeps.study import Study
from pldr_train.sweeps.sweep import Planned, Sweep, Trial, trial_recipe_text

LOCK = ".lock"
_POLL_S, _LOOK_S, _NOTE_S = 0.1, 0.5, 30.0
_MOST_DEATHS = 3
"""A trial whose process was killed so often in a row, without a new checkpoint, has failed."""
_LEFT_ON_SIGNAL = (128 + signal.SIGHUP, 128 + signal.SIGINT, 128 + signal.SIGTERM)
_MOST_ERROR_LINES, _MOST_ERROR_CHARACTERS = 12, 2000
EXIT_FAILED = 1


@dataclass
class _Running:
    """A trial that this runner runs."""

    planned: Planned
    claim: Claim
    process: Process
    slot: int
    first_step: int
    log_size: int
    since: float = field(default_factory=time.monotonic)
    noted: float = field(default_factory=time.monotonic)
    metrics_size: int = 0
    steps: int = 0
    prepare: int | None = None
    """A descriptor: others that need the same data wait until this one trains."""
    is_pruned: bool = False


class Runner:
    """Runs what is left of a sweep.

    Args:
        sweep: the sweep.
        study: its study.
        workers: how many trials run at a time, and what each has of the machine.
        waits: wait for trials that other runners run, to take over those that these leave.
        say: is given one line for each event.
    """

    def __init__(
        self,
        sweep: Sweep,
        study: Study,
        workers: Workers,
        waits: bool = True,
        say: Callable[[str], None] = print,
    ) -> None:
        self.sweep, self._study, self._workers, self._waits = sweep, study, workers, waits
        self._say_line = say
        self._running: list[_Running] = []
        self._deaths: dict[str, tuple[int, int]] = {}
        self._stopping: str | None = None
        self._exit_code = 0
        self._said: set[str] = set()
        self._began = time.monotonic()
        self._tokens = 0
        self._elsewhere = 0
        self._looked = 0.0
        self._fill_at = 0.0
        self._budget = Budget(sweep)
        self._digests: dict[str, str] = {}

    # The loop.

    def run(self) -> int:
        """Run trials until none is left, or the runner is asked to stop; returns the exit code.

        0: all is done, or the budget is used up; 1: trials have failed; 129, 130, 143: asked to stop.

        Raises:
            UserError: the storage or the sweep's folder fails; the trials have saved and stopped.
        """
        with locked(self.sweep.folder / LOCK):
            self._study.update(self.sweep.trials)
        before = last_stop(self.sweep.folder)
        try:
            with Signals() as signals:
                while True:
                    self._listen(signals, before)
                    self._collect()
                    self._look()
                    self._fill()
                    if not self._running:
                        if self._stopping or not self._waits or not self._elsewhere:
                            break
                        self._say_once(f"waits for {self._elsewhere} trials that other runners run")
                    time.sleep(_POLL_S)
        except BaseException:
            self._leave_in_order()
            raise
        finally:
            for each in self._running:
                each.process.kill()
        return self._end()

    def _listen(self, signals: Signals, before: str | None) -> None:
        number = signals.take()
        if number is not None:
            if self._stopping and len(signals.passed_on) > 1:
                self._say("a second signal: trials are killed; they go on from their last checkpoints")
                for each in self._running:
                    each.process.kill()
            self._stop(signal.Signals(number).name, 128 + number)
        elif self._stopping is None and last_stop(self.sweep.folder) != before:
            self._stop("sweep stop", 128 + signal.SIGINT)

    def _stop(self, reason: str, code: int) -> None:
        if self._stopping is not None:
            return
        self._stopping, self._exit_code = reason, code
        running = f": {len(self._running)} trials save and stop" if self._running else ""
        self._say(f"{reason}{running}")
        for each in self._running:
            each.process.send_signal(signal.SIGTERM)

    def _leave_in_order(self) -> None:
        """Have the trials save; for a runner that cannot go on."""
        for each in self._running:
            with suppress(OSError):
                each.process.send_signal(signal.SIGTERM)
        for each in self._running:
            each.process.wait()

    # Starting.

    def _fill(self) -> None:
        while self._stopping is None and len(self._running) < self._workers.number:
            if time.monotonic() < self._fill_at:
                return
            with locked(self.sweep.folder / LOCK):
                begun = self._begin_next()
            if not begun:
                self._fill_at = time.monotonic() + _LOOK_S
                return

    def _begin_next(self) -> bool:
        """Begin the next trial; False if there is none at the moment."""
        self._elsewhere = 0
        if self._has_failed_too_often():
            return False
        unprepared: set[str] = set()
        for planned in self.sweep.planned():
            if self.sweep.trial(planned, is_running=False).state != WAITING:
                continue
            digest = self._data_digest(planned)
            if is_claimed(self.sweep.folder / planned.name):
                self._elsewhere += not self._is_mine(planned)
            elif digest in unprepared:
                self._elsewhere += 1
            elif not self._is_beyond_budget(planned):
                begun = self._begin(planned)
                if begun:
                    return True
                if begun is None:
                    unprepared.add(digest)
                self._elsewhere += 1
        return self._draw() and self._begin_next()

    def _has_failed_too_often(self) -> bool:
        limit = self.sweep.spec.max_failures
        records = map(self.sweep.record, self.sweep.planned())
        failures = sum(record is not None and record.state == FAILED for record in records)
        if limit is None or failures < limit:
            return False
        self._say_once(f"{failures} trials have failed (max_failures={limit}): no more are begun")
        return True

    def _is_beyond_budget(self, planned: Planned | None) -> bool:
        problem = self._budget.problem(planned, self._hours_of_running())
        if problem is not None:
            self._say_once(f"{problem}; no more trials are begun")
        return problem is not None

    def _hours_of_running(self) -> float:
        """Return the hours of running trials that stand in no record yet."""
        now = time.monotonic()
        return sum(now - each.noted for each in self._running) / 3600

    def _is_mine(self, planned: Planned) -> bool:
        return any(each.planned.name == planned.name for each in self._running)

    def _begin(self, planned: Planned) -> bool | None:
        """Claim a trial and start its process.

        Returns:
            False if another runner has it or has ended it; None if its data is being prepared for another trial.
        """
        folder = self.sweep.folder / planned.name
        prepare = None
        if not self._is_prepared(planned):
            prepare = hold_if_free(self.sweep.folder / f".prepare-{self._data_digest(planned)}")
            if prepare is None:
                return None
        claim = Claim.take(folder)
        trial = self.sweep.trial(planned, is_running=False)
        if claim is None or trial.state != WAITING:  # it may have ended since it was looked at
            if prepare is not None:
                os.close(prepare)
            if claim is not None:
                claim.release()
            return False
        self._start(planned, claim, prepare)
        return True

    def _start(self, planned: Planned, claim: Claim, prepare: int | None) -> None:
        trial = self.sweep.trial(planned, is_running=False)
        folder = trial.folder
        record = trial.record.changed(
            starts=trial.record.starts + 1, started_s=trial.record.started_s or time.time(), state=WAITING
        )
        write_file_atomically(folder / TRIAL_RECIPE, trial_recipe_text(planned).encode())
        write_record(folder, record)
        self._study.update([self.sweep.trial(planned, is_running=True)])
        slot = self._workers.free_slot({each.slot for each in self._running})
        log = folder / LOG_FILE
        with log.open("a", encoding="utf-8") as file:
            file.write(f"--- start {record.starts}, {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        log_size = log.stat().st_size
        process = processes.start_process(
            self._workers.command(folder / TRIAL_RECIPE, planned.recipe),
            self._workers.environment(slot),
            log,
            claim.descriptor,
        )
        running = _Running(planned, claim, process, slot, trial.steps, log_size, prepare=prepare)
        running.steps = trial.steps
        self._running.append(running)
        words = f"goes on after step {trial.steps:,}" if trial.steps else "begins"
        self._say(f"{planned.name} {words}")

    def _is_prepared(self, planned: Planned) -> bool:
        """Return whether a trial with the same data has trained, so that corpus and tokenizer are there."""
        digest = self._data_digest(planned)
        return any(
            (self.sweep.folder / each.name / METRICS_FILE).exists()
            for each in self.sweep.planned()
            if self._data_digest(each) == digest
        )

    def _data_digest(self, planned: Planned) -> str:
        if planned.name not in self._digests:
            self._digests[planned.name] = _data_digest(planned.recipe)
        return self._digests[planned.name]

    def _draw(self) -> bool:
        """Draw a cell; True if there are new trials. The sweep's lock is held."""
        spec, folder = self.sweep.spec, self.sweep.folder
        if spec.sampler.method != "tpe":
            return False
        known = {planned.name for planned in self.sweep.planned()}
        cells = len({planned.cell for planned in self.sweep.planned()})
        noted = read_sweep_file(folder)
        drawn = max(cells, int(noted.get("drawn", 0)))
        while drawn < (spec.sampler.trials or 0):
            if self._is_beyond_budget(None):
                return False

            def name_of(values: Mapping[str, Any], number: int = drawn) -> str | None:
                name = self.sweep.plan(values, self.sweep.seeds[0], number).name
                return None if name in known else name

            values = self._study.draw(drawn, name_of)
            planned = [self.sweep.plan(values, seed, drawn) for seed in self.sweep.seeds]
            drawn += 1
            new = [each for each in planned if each.name not in known]
            for each in new:
                trial_folder = folder / each.name
                trial_folder.mkdir(parents=True, exist_ok=True)
                write_record(trial_folder, self.sweep.trial(each, is_running=False).record)
            write_sweep_file(folder, {**noted, "drawn": drawn})
            if new:
                return True
        return False

    # Watching.

    def _look(self) -> None:
        """Look at what the running trials have written since the last look."""
        now = time.monotonic()
        if now - self._looked < _LOOK_S:
            return
        self._looked = now
        for each in self._running:
            self._look_at(each)
            if now - each.noted > _NOTE_S:
                self._note_time(each)
        problem = self._budget.hours_problem(self._hours_of_running())
        if problem is not None and self._running and self._stopping is None:
            self._stop(problem, 0)

    def _look_at(self, each: _Running) -> None:
        path = self.sweep.folder / each.planned.name / METRICS_FILE
        try:
            size = path.stat().st_size
        except OSError:
            return
        if size == each.metrics_size:
            return
        each.metrics_size = size
        self._release_prepare(each)
        trial = self.sweep.trial(each.planned, is_running=True)
        each.steps = trial.steps
        self._study.update([trial])
        if self._stopping or each.is_pruned or self.sweep.spec.pruning.method == "none":
            return
        if trial.steps < trial.max_steps and self._study.should_prune(trial):
            # Noted first: should this process be killed now, the trial is not resumed.
            write_record(trial.folder, trial.record.changed(state=PRUNED, steps=trial.steps))
            each.is_pruned = True
            each.process.send_signal(signal.SIGTERM)

    def _release_prepare(self, each: _Running) -> None:
        if each.prepare is not None:
            os.close(each.prepare)
            each.prepare = None

    def _note_time(self, each: _Running) -> None:
        now = time.monotonic()
        trial = self.sweep.trial(each.planned, is_running=True)
        write_record(trial.folder, trial.record.changed(ran_s=trial.record.ran_s + now - each.noted))
        each.noted = now

    def _collect(self) -> None:
        for each in list(self._running):
            code = each.process.poll()
            if code is not None:
                self._running.remove(each)
                self._fill_at = 0.0
                self._release_prepare(each)
                try:
                    trial = self._note_end(each, code)
                finally:
                    each.claim.release()
                self._say(f"{trial.name} {self._how_it_ended(trial, each)}")

    def _note_end(self, each: _Running, code: int) -> Trial:
        trial = self.sweep.trial(each.planned, is_running=False)
        state, error = self._judge(each, trial, code)
        self._tokens += max(0, trial.steps - each.first_step) * trial.tokens_per_step
        record = trial.record.changed(
            state=state,
            error=error,
            ended_s=time.time(),
            ran_s=trial.record.ran_s + time.monotonic() - each.noted,
            steps=trial.max_steps if state == DONE else trial.steps,
        )
        write_record(trial.folder, record)
        trial = self.sweep.trial(each.planned, is_running=False)
        self._study.update([trial])
        return trial

    def _judge(self, each: _Running, trial: Trial, code: int) -> tuple[str, str | None]:
        """Return the state of a trial whose process has ended, and the error of one that failed."""
        if code == 0:
            return DONE, None
        if each.is_pruned:
            return PRUNED, None
        was_killed = code < 0 or code in (*_LEFT_ON_SIGNAL, 128 + signal.SIGKILL)
        if not was_killed:
            return FAILED, _last_lines(trial.log, each.log_size) or f"exit code {code}"
        if self._stopping:
            return WAITING, None
        saved = newest_step(trial.folder / CHECKPOINTS_FOLDER)
        before, deaths = self._deaths.get(trial.name, (-1, 0))
        deaths = 1 if saved > before else deaths + 1
        self._deaths[trial.name] = (saved, deaths)
        if deaths < _MOST_DEATHS:
            return WAITING, None
        name = signal.Signals(-code).name if code < 0 else f"a signal (exit code {code})"
        text = f"was ended by {name} {deaths} times in a row without a new checkpoint (no memory left?)"
        return FAILED, "\n".join(filter(None, (_last_lines(trial.log, each.log_size), text)))

    def _how_it_ended(self, trial: Trial, each: _Running) -> str:
        took = duration_text(time.monotonic() - each.since)
        value = "" if trial.objective is None else f", {self.sweep.spec.metric} {trial.objective:.5g}"
        if trial.state == DONE:
            return f"is done in {took}{value}{self._outlook()}"
        if trial.state == FAILED:
            last = (trial.error or "").strip().splitlines()[-1:]
            return f"failed after step {trial.steps:,}: {''.join(last)} (all in {trial.log})"
        if trial.state == PRUNED:
            return f"is pruned after step {trial.steps:,}{value}{self._outlook()}"
        return f"stopped after step {trial.steps:,}"

    def _outlook(self) -> str:
        """Return how many trials are done, and how long the others take at this runner's speed so far."""
        trials = self.sweep.trials
        done = sum(trial.state in (DONE, FAILED, PRUNED) for trial in trials)
        left = sum(
            (trial.max_steps - trial.steps) * trial.tokens_per_step
            for trial in trials
            if trial.state not in (DONE, FAILED, PRUNED)
        )
        words = f"; {done} of {self.sweep.num_trials} trials are over"
        trained = self._tokens + sum(
            max(0, each.steps - each.first_step) * each.planned.recipe.trainer.batch_size
            * each.planned.recipe.data.context_length
            for each in self._running
        )  # fmt: skip
        elapsed = time.monotonic() - self._began
        if left and trained:
            words += f", about {duration_text(left * elapsed / trained)} left at this runner's speed"
        return words

    def _end(self) -> int:
        trials = self.sweep.trials
        counts = Counter(trial.state for trial in trials)
        listing = ", ".join(f"{number} {state}" for state, number in counts.items()) or "no trials"
        left = self.sweep.num_trials - len(trials)
        more = f", {left} not drawn yet" if left > 0 and self.sweep.spec.sampler.method == "tpe" else ""
        self._say(f"{'stopped' if self._stopping else 'over'}: {listing}{more}")
        best = self.sweep.best
        if best is not None:
            self._say(f"best: {best.name}, {self.sweep.spec.metric} {best.objective:.5g}")
        if self._stopping:
            return self._exit_code
        return EXIT_FAILED if counts.get(FAILED) else 0

    def _say_once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            self._say(text)

    def _say(self, text: str) -> None:
        self._say_line(f"{time.strftime('%H:%M:%S')}  {text}")


def _data_digest(recipe: Recipe) -> str:
    """Return what stands for the corpus, the tokenizer and the cache that a recipe needs."""
    data = recipe.data.model_dump(mode="json", exclude={"context_length", "packing", "num_workers", "num_lanes"})
    text = json.dumps([data, recipe.model.vocab_size], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


def _last_lines(log: Path, offset: int) -> str:
    """Return the last lines that a process printed after `offset` bytes of its log."""
    try:
        with log.open("rb") as file:
            file.seek(offset)
            text = file.read()[-_MOST_ERROR_CHARACTERS:].decode(errors="replace")
    except OSError:
        return ""
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    return "\n".join(lines[-_MOST_ERROR_LINES:])
