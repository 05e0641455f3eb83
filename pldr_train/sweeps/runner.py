"""Runs a sweep's trials: each a `pldr-train fit` of its own, several at a time, beside other runners of the sweep."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from pldr_train.data.files import write_file_atomically
from pldr_train.errors import RecipeError
from pldr_train.launching import Signals
from pldr_train.recipe import Recipe
from pldr_train.runs.layout import METRICS_FILE
from pldr_train.sweeps import processes
from pldr_train.sweeps.axes import cell_name
from pldr_train.sweeps.budget import Budget
from pldr_train.sweeps.endings import Endings
from pldr_train.sweeps.processes import Process, Workers
from pldr_train.sweeps.progress import Progress
from pldr_train.sweeps.records import (
    DONE,
    FAILED,
    LOG_FILE,
    PRUNED,
    RUNNING,
    TRIAL_RECIPE,
    WAITING,
    Claim,
    hold_if_free,
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
EXIT_FAILED = 1


@dataclass
class _Running:
    """A trial that this runner runs."""

    planned: Planned
    claim: Claim
    process: Process
    slot: int
    seen_step: int
    """The last step in its metrics when they were looked at."""
    log_size: int
    """Of the bytes that were in its log before it began."""
    prepare: int | None
    """A descriptor: others that need the same data wait until this one trains."""
    since: float = field(default_factory=time.monotonic)
    noted: float = field(default_factory=time.monotonic)
    metrics_size: int = 0
    is_pruned: bool = False


class Runner:
    """Runs what is left of a sweep.

    Args:
        sweep: the sweep.
        study: its study.
        workers: how many trials run at a time, and what each has of the machine.
        waits: wait for trials that other runners run, to take over those that these leave.
        write_line: is called with a line for each event.
    """

    def __init__(
        self,
        sweep: Sweep,
        study: Study,
        workers: Workers,
        waits: bool = True,
        write_line: Callable[[str], None] = print,
    ) -> None:
        self.sweep, self._study, self._workers, self._waits = sweep, study, workers, waits
        self._write_line = write_line
        self._running: list[_Running] = []
        self._stopping: str | None = None
        self._exit_code = 0
        self._reported: set[str] = set()
        self._elsewhere = 0
        self._blocked: set[str] = set()
        """Trials that need others which ended without being done."""
        self._by_name = {planned.name: planned for planned in sweep.planned()}
        """The trials of a grid, in which alone some need others."""
        self._looked = 0.0
        self._fill_at = 0.0
        self._budget, self._progress, self._endings = Budget(sweep), Progress(sweep), Endings()
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
                        self._report_once(f"waits for {self._elsewhere} trials that other runners run")
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
                self._report("a second signal: trials are killed; they go on from their last checkpoints")
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
        self._report(f"{reason}{running}")
        for each in self._running:
            each.process.send_signal(signal.SIGTERM)

    def _leave_in_order(self) -> None:
        """Have the trials save; for a runner that cannot go on."""
        for each in self._running:
            with suppress(OSError):
                each.process.send_signal(signal.SIGTERM)
        while self._running:
            self._running[-1].process.wait()
            self._running.pop().claim.release()

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
            state = self.sweep.trial(planned).state
            if state == RUNNING:
                self._elsewhere += not self._is_mine(planned)
            if state != WAITING or not self._has_sources(planned):
                continue
            digest = self._data_digest(planned)
            if digest in unprepared:
                self._elsewhere += 1
            elif not self._is_beyond_budget(planned):
                begun = self._begin(planned)
                if begun:
                    return True
                if begun is None:
                    unprepared.add(digest)
                self._elsewhere += 1
        return self._draw() and self._begin_next()

    def _has_sources(self, planned: Planned) -> bool:
        """Return whether the trials that a trial needs are done."""
        self._blocked.discard(planned.name)
        for source in (self._by_name[name] for name in planned.sources.values()):
            state = self.sweep.trial(source).state
            if state in (FAILED, PRUNED):
                self._blocked.add(planned.name)
                self._report_once(f"{planned.name} cannot begin: {source.name}, which it needs, is {state}")
            if state != DONE:
                return False
        return True

    def _has_failed_too_often(self) -> bool:
        limit = self.sweep.spec.max_failures
        records = map(self.sweep.record, self.sweep.planned())
        failures = sum(record is not None and record.state == FAILED for record in records)
        if limit is None or failures < limit:
            return False
        self._report_once(f"{failures} trials have failed (max_failures={limit}): no more are begun")
        return True

    def _is_beyond_budget(self, planned: Planned | None) -> bool:
        problem = self._budget.problem(planned, self._hours_of_running())
        if problem is not None:
            self._report_once(f"{problem}; no more trials are begun")
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
        self._running.append(_Running(planned, claim, process, slot, trial.steps, log_size, prepare))
        words = f"goes on after step {trial.steps:,}" if trial.steps else "begins"
        self._report(f"{planned.name} {words}")

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
        drawn = self.sweep.num_drawn
        while drawn < (spec.sampler.trials or 0) and not self._is_beyond_budget(None):
            new = self._draw_cell(drawn)
            drawn += 1
            for each in new:
                (folder / each.name).mkdir(parents=True, exist_ok=True)
                write_record(folder / each.name, self.sweep.trial(each, is_running=False).record)
            write_sweep_file(folder, {**read_sweep_file(folder), "drawn": drawn})
            if new:
                return True
        return False

    def _draw_cell(self, number: int) -> list[Planned]:
        """Return the trials of the next cell; none if it was drawn before, or makes no recipe."""
        known = {planned.name for planned in self.sweep.planned()}
        new: list[Planned] = []

        def first_name(values: Mapping[str, Any]) -> str | None:
            try:
                planned = [self.sweep.plan(values, seed, number) for seed in self.sweep.seeds]
            except RecipeError as error:
                problem = str(error).splitlines()[-1].strip()
                self._report(f"cell {cell_name(self.sweep.axes, values)} was drawn and makes no recipe: {problem}")
                return None
            new.extend(each for each in planned if each.name not in known)
            return new[0].name if new else None

        self._study.draw(number, first_name)
        return new

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
        self._progress.trained(trial, each.seen_step)
        each.seen_step = trial.steps
        if each.is_pruned:
            return
        self._study.update([trial])
        if self._stopping or self.sweep.spec.pruning.method == "none":
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
                self._report(self._progress.end_text(trial, time.monotonic() - each.since))

    def _note_end(self, each: _Running, code: int) -> Trial:
        trial = self.sweep.trial(each.planned, is_running=False)
        if each.is_pruned and code != 0:
            state, error = PRUNED, None
        else:
            state, error = self._endings.judge(trial, code, each.log_size, asked=self._stopping is not None)
        self._progress.trained(trial, each.seen_step)
        record = trial.record.changed(
            state=state,
            error=error,
            ended_s=time.time(),
            ran_s=trial.record.ran_s + time.monotonic() - each.noted,
            steps=trial.max_steps if state == DONE and trial.recipe.trainer.early_stop is None else trial.steps,
        )
        write_record(trial.folder, record)
        trial = self.sweep.trial(each.planned, is_running=False)
        self._study.update([trial])
        return trial

    def _end(self) -> int:
        for line in self._progress.summary("stopped" if self._stopping else "over"):
            self._report(line)
        if self._stopping:
            return self._exit_code
        return EXIT_FAILED if self._blocked or any(trial.state == FAILED for trial in self.sweep.trials) else 0

    def _report_once(self, text: str) -> None:
        if text not in self._reported:
            self._reported.add(text)
            self._report(text)

    def _report(self, text: str) -> None:
        self._write_line(f"{time.strftime('%H:%M:%S')}  {text}")


def _data_digest(recipe: Recipe) -> str:
    """Return what stands for the corpus, the tokenizer and the cache that a recipe needs."""
    data = recipe.data.model_dump(mode="json", exclude={"context_length", "packing", "num_workers", "num_lanes"})
    text = json.dumps([data, recipe.model.vocab_size], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()
