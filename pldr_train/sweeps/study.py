"""Optuna's part of a sweep: drawing cells, judging which trials to stop, and the study kept for its own tools.

The folders of the trials are the truth. The study in the storage is brought up to them (`Study.update`), so it can be
lost and made again.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages.journal import JournalFileBackend
from optuna.storages.journal._file import BaseJournalFileLock
from optuna.trial import FrozenTrial, TrialState

from pldr_train.errors import UserError, first_line
from pldr_train.file_locks import wait_for_lock
from pldr_train.sweeps.axes import Axis
from pldr_train.sweeps.records import DONE, FAILED, JOURNAL_FILE, PRUNED, RUNNING
from pldr_train.sweeps.spec import SweepSpec
from pldr_train.sweeps.sweep import Sweep, Trial

NAME, RETRIES, SEED = "name", "retries", "seed"
"""User attributes of a trial in the study."""
_STATES = {DONE: TrialState.COMPLETE, FAILED: TrialState.FAIL, PRUNED: TrialState.PRUNED, RUNNING: TrialState.RUNNING}

optuna.logging.set_verbosity(optuna.logging.ERROR)


def _draw(trial: optuna.Trial, axes: Iterable[Axis]) -> dict[str, Any]:
    """Return a cell's values as the trial's sampler draws them."""
    values: dict[str, Any] = {}
    for axis in axes:
        if not axis.is_active(values):
            continue
        span = axis.span
        if span is None:
            texts = [json.dumps(value) for value in axis.values]
            values[axis.name] = json.loads(trial.suggest_categorical(axis.name, texts))
        elif span.whole:
            step = 1 if span.step is None else int(span.step)
            low, high = int(span.low), int(span.high)
            values[axis.name] = trial.suggest_int(axis.name, low, high, step=step, log=span.log)
        else:
            values[axis.name] = trial.suggest_float(axis.name, span.low, span.high, step=span.step, log=span.log)
    return values


def _distribution(axis: Axis) -> BaseDistribution:
    span = axis.span
    if span is None:
        return CategoricalDistribution([json.dumps(value) for value in axis.values])
    if span.whole:
        step = 1 if span.step is None else int(span.step)
        return IntDistribution(int(span.low), int(span.high), log=span.log, step=step)
    return FloatDistribution(span.low, span.high, log=span.log, step=span.step)


def random_cells(spec: SweepSpec) -> list[dict[str, Any]]:
    """Return the cells of the sampler `random`, the same at each call; a cell that is drawn again counts once."""
    axes = spec.parsed_axes
    cells: list[dict[str, Any]] = []
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=spec.sampler.seed))
    for _ in range(spec.sampler.trials or 0):
        cell = _draw(study.ask(), axes)
        if cell not in cells:
            cells.append(cell)
    return cells


def _pruner(spec: SweepSpec, max_steps: int) -> optuna.pruners.BasePruner:
    pruning = spec.pruning
    if pruning.method == "median":
        return optuna.pruners.MedianPruner(
            n_startup_trials=pruning.startup_trials, n_warmup_steps=pruning.warmup_steps, n_min_trials=1
        )
    if pruning.method == "hyperband":
        return optuna.pruners.HyperbandPruner(min_resource=pruning.warmup_steps, max_resource=max_steps)
    return optuna.pruners.NopPruner()


def _sampler(spec: SweepSpec, draw: int) -> optuna.samplers.BaseSampler:
    """Return the sampler of one draw. Each has a seed of its own: a runner that starts again repeats no draw."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # constant_liar is marked as experimental
        return optuna.samplers.TPESampler(seed=(spec.sampler.seed + draw) % 2**32, constant_liar=True)


class Study:
    """The study in the sweep's storage.

    Args:
        sweep: the sweep.
        storage: URL of Optuna's storage; None: the spec's, or the journal in the sweep's folder.

    Raises:
        UserError: the storage cannot be opened, or holds another study of this name.
    """

    def __init__(self, sweep: Sweep, storage: str | None = None) -> None:
        self._sweep, self._spec = sweep, sweep.spec
        self._url = storage or self._spec.storage
        max_steps = max((planned.recipe.trainer.max_steps for planned in sweep.planned()), default=1)
        with self._worded():
            self._study = optuna.create_study(
                storage=self._open(),
                study_name=self._spec.name,
                direction=self._spec.goal,
                load_if_exists=True,
                pruner=_pruner(self._spec, max_steps),
            )
            if self._study.direction.name.lower() != self._spec.goal:
                raise UserError(
                    f"goal={self._spec.goal}: the study {self._spec.name} in {self.place} has "
                    f"{self._study.direction.name.lower()}; put it back, or give the sweep a new name"
                )

    @property
    def place(self) -> str:
        """Where the study is kept, for messages; passwords are left out."""
        if self._url is None:
            return str(self._sweep.folder / JOURNAL_FILE)
        scheme, _, rest = self._url.rpartition("://")
        return f"{scheme}://{rest.rpartition('@')[2]}"

    def _open(self) -> Any:
        if self._url is not None:
            return optuna.storages.RDBStorage(self._url)
        path = self._sweep.folder / JOURNAL_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = _JournalLock(path)
        with contextlib.suppress(FileNotFoundError), lock:
            pass  # repairs what a killed process has left
        return optuna.storages.JournalStorage(JournalFileBackend(str(path), lock))

    @contextmanager
    def _worded(self) -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"storage {self.place}: {type(error).__name__}: {first_line(error)}; check that it can be reached and "
                "written, or name another with --storage. The trials are in their folders: nothing of them is lost"
            ) from error

    def update(self, trials: Iterable[Trial]) -> None:
        """Bring the study up to trials' folders: those that are new, their values, their ends.

        Only the runner that holds the sweep's lock, or a trial's claim, may do so.
        """
        with self._worded():
            known = self._known()
            for trial in trials:
                if trial.state in _STATES:
                    self._update(trial, known.get(_identity(trial)))

    def should_prune(self, trial: Trial) -> bool:
        """Return whether a running trial of the study is to be stopped, by the values that it has."""
        with self._worded():
            frozen = self._known().get(_identity(trial))
            if frozen is None or frozen.state != TrialState.RUNNING:
                return False
            return optuna.Trial(self._study, frozen._trial_id).should_prune()

    def draw(self, number: int, name_of: Callable[[Mapping[str, Any]], str | None]) -> None:
        """Draw the values of the next cell, by the values of the trials in the study.

        Args:
            number: how many cells were drawn before.
            name_of: is given the values, and returns the name of the cell's first trial; None if it has none.
        """
        with self._worded():
            self._study.sampler = _sampler(self._spec, number)
            asked = self._study.ask()
            name = name_of(_draw(asked, self._sweep.axes))
            if name is None:
                self._study.tell(asked, state=TrialState.FAIL)
            else:
                asked.set_user_attr(NAME, name)

    def _known(self) -> dict[tuple[str, int], FrozenTrial]:
        trials = self._study.get_trials(deepcopy=False)
        return {
            (each.user_attrs[NAME], each.user_attrs.get(RETRIES, 0)): each for each in trials if NAME in each.user_attrs
        }

    def _update(self, trial: Trial, frozen: FrozenTrial | None) -> None:
        state = _STATES[trial.state]
        if frozen is None:
            self._study.add_trial(frozen_trial(self._sweep, trial, TrialState.RUNNING))
            frozen = self._known()[_identity(trial)]
        if frozen.state.is_finished():
            return
        entry = optuna.Trial(self._study, frozen._trial_id)
        for step, value in trial.intermediate:
            if step not in frozen.intermediate_values:
                entry.report(value, step)
        if state.is_finished():
            # A trial that is done and never measured the objective has failed for Optuna.
            is_measured = trial.objective is not None
            if state == TrialState.COMPLETE and is_measured:
                self._study.tell(frozen.number, trial.objective)
            else:
                self._study.tell(frozen.number, state=TrialState.FAIL if state == TrialState.COMPLETE else state)


def _identity(trial: Trial) -> tuple[str, int]:
    return trial.name, trial.record.retries


def frozen_trial(sweep: Sweep, trial: Trial, state: TrialState) -> FrozenTrial:
    """Return a trial of the sweep as Optuna has it."""
    axes = [axis for axis in sweep.axes if axis.name in trial.axes]
    params = {
        axis.name: json.dumps(trial.axes[axis.name]) if axis.span is None else trial.axes[axis.name] for axis in axes
    }
    is_complete = state == TrialState.COMPLETE
    frozen = optuna.trial.create_trial(
        state=state,
        value=trial.objective if is_complete else None,
        params=params,
        distributions={axis.name: _distribution(axis) for axis in axes},
        user_attrs={NAME: trial.name, RETRIES: trial.record.retries, SEED: trial.seed},
        intermediate_values=dict(trial.intermediate),
    )
    if trial.started_s is not None:
        frozen.datetime_start = datetime.datetime.fromtimestamp(trial.started_s)
    if state.is_finished() and trial.record.ended_s is not None:
        frozen.datetime_complete = datetime.datetime.fromtimestamp(trial.record.ended_s)
    return frozen


def study_of_folders(sweep: Sweep, trials: Iterable[Trial]) -> optuna.Study:
    """Return a study in memory with those of a sweep's trials that are done, failed or pruned.

    Of trials that are done only those that have an objective are complete.
    """
    study = optuna.create_study(direction=sweep.spec.goal, study_name=sweep.spec.name)
    for trial in trials:
        state = _STATES.get(trial.state)
        if state is None or not state.is_finished():
            continue
        if state == TrialState.COMPLETE and trial.objective is None:
            state = TrialState.FAIL
        study.add_trial(frozen_trial(sweep, trial, state))
    return study


class _JournalLock(BaseJournalFileLock):
    """A lock of the journal that ends with the process that holds it; Optuna's own outlive it by 30 s.

    Whoever gets it removes a last line that a killed process has not finished.
    """

    def __init__(self, journal: Path) -> None:
        self._journal = journal
        self._path = journal.with_name(f".{journal.name}.lock")
        self._descriptor: int | None = None

    def acquire(self) -> bool:
        """Wait for the lock."""
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            wait_for_lock(descriptor)
            self._repair()
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor = descriptor
        return True

    def release(self) -> None:
        """Give it up."""
        if self._descriptor is not None:
            os.close(self._descriptor)
        self._descriptor = None

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()

    def _repair(self) -> None:
        with contextlib.suppress(FileNotFoundError), self._journal.open("r+b") as file:
            size = file.seek(0, os.SEEK_END)
            whole, step = size, 4096
            tail = b""
            while whole > 0 and b"\n" not in tail:
                start = max(0, size - len(tail) - step)
                file.seek(start)
                tail = file.read(size - start)
                whole = start + tail.rfind(b"\n") + 1 if b"\n" in tail else start
            if whole < size:
                file.truncate(whole)


def importances_of(sweep: Sweep, trials: Iterable[Trial]) -> dict[str, float] | None:
    """Return how much each axis matters for the objective (PED-ANOVA); None where too few trials are done."""
    study = study_of_folders(sweep, trials)
    complete = [each for each in study.trials if each.state == TrialState.COMPLETE]
    if len(complete) < _FEWEST_FOR_IMPORTANCES or len({each.value for each in complete}) < 2:
        return None
    try:
        found = optuna.importance.get_param_importances(
            study, evaluator=optuna.importance.PedAnovaImportanceEvaluator()
        )
    except (ValueError, RuntimeError):  # axes without a choice
        return None
    return {name: float(value) for name, value in found.items() if math.isfinite(value)} or None


_FEWEST_FOR_IMPORTANCES = 4
