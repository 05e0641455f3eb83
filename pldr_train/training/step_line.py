"""A step's line of `metrics.jsonl`: its values are collected after the step and written when all of them are there.

`StepTimer` adds up the time of steps and of waiting for data between two log steps.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as pl

from pldr_train.data.rows.packing import batch_digest
from pldr_train.distributed.world import World
from pldr_train.metrics import catalog
from pldr_train.metrics.catalog import (
    BATCH_DIGEST,
    DATA_GROUP,
    DATA_WAIT_SHARE,
    NONFINITE_STEPS,
    STEP,
    TOKENS,
    TOKENS_PER_S,
)
from pldr_train.recipe import Recipe
from pldr_train.runs.folder import RunFolder
from pldr_train.runs.nonfinite import check_finite
from pldr_train.training.module import PldrllmModule
from pldr_train.training.nonfinite_policy import global_rows
from pldr_train.training.observing import Observer
from pldr_train.training.saving import Ledger, datamodule_of, merge_lanes

_log = logging.getLogger(__name__)


class StepLine:
    """Collect the values of a step and write them as one line; every method is called on all ranks.

    Args:
        recipe: resolved.
        folder: the run's; rank 0 writes.
        world: the processes.
        ledger: keeps values that are not written yet, for a checkpoint.
        observer: measures weights and machine.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        recipe: Recipe,
        folder: RunFolder,
        world: World,
        ledger: Ledger,
        observer: Observer,
        clock: Callable[[], float],
    ) -> None:
        self._recipe, self._folder, self._world = recipe, folder, world
        self._ledger, self._observer = ledger, observer
        self._timer, self._starvation = StepTimer(clock), Starvation(recipe.data.num_workers)
        self._tokens_per_step = recipe.trainer.batch_size * recipe.data.context_length

    def waiting_begins(self) -> None:
        """Start to count time as waiting for the next batch."""
        self._timer.waiting_begins()

    def batch_arrived(self) -> None:
        """Start to count time as the step's."""
        self._timer.batch_arrived()

    def step_done(self, batch: dict[str, Any]) -> None:
        """Count the step, and keep its batch's digest where the recipe logs it."""
        self._timer.step_done(self._tokens_per_step)
        if self._recipe.logging.batch_digest:
            self._ledger.pending[BATCH_DIGEST] = batch_digest(global_rows(batch, self._world)[1])

    def collect(self, trainer: pl.Trainer, module: PldrllmModule) -> None:
        """Add what a log step logs: means since the last one, weights, machine, data.

        Raises:
            RecipeError: a mean is NaN or infinite.
        """
        step = trainer.global_step
        values, trained_s, timings = module.training_values(), self._timer.total_s, self._timer.take()
        check_finite(values, step)
        timings |= self._observer.step_values(trainer, module, timings[TOKENS_PER_S], trained_s)
        datamodule = datamodule_of(trainer)
        merge_lanes(datamodule, self._world)
        passed = {f"{DATA_GROUP}/{name}": count for name, count in datamodule.lane_state.counts().items()}
        left_out = {NONFINITE_STEPS: len(self._ledger.nonfinite.events)}
        self._ledger.pending |= values | left_out | {TOKENS: step * self._tokens_per_step} | timings | passed
        advice = self._starvation.advice(timings[DATA_WAIT_SHARE])
        if advice and self._world.is_main:
            _log.warning(f"step {step:,}: {advice}")

    def write(self, trainer: pl.Trainer) -> None:
        """Write the values that are pending, if there are any, and hand the numbers to the loggers."""
        if not self._ledger.pending:
            return
        line = {STEP: trainer.global_step} | self._ledger.pending
        self._ledger.pending = {}
        if self._world.is_main:
            self._folder.append_metrics(line)
        for logger in trainer.loggers:
            numbers = {name: value for name, value in line.items() if isinstance(value, int | float)}
            logger.log_metrics(numbers, step=trainer.global_step)
            logger.save()


STARVED_SHARE = 0.1
"""Share of the time that training may wait for data before the user is warned."""


_WELL_FOR_WINDOWS = 10


class StepTimer:
    """Adds up the time of training steps and of waiting for data; validation and saving count as neither.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._mark = clock()
        self._tokens = 0
        self._step_s = 0.0
        self._wait_s = 0.0
        self._own_wait_s = 0.0
        self._each_s: list[float] = []

    def waiting_begins(self) -> None:
        """All that belongs to the previous step is over."""
        self._mark = self._clock()

    def batch_arrived(self) -> None:
        """The next batch is there; its step begins."""
        now = self._clock()
        self._own_wait_s = now - self._mark
        self._wait_s += self._own_wait_s
        self._mark = now

    def step_done(self, tokens: int) -> None:
        """The step is over; it trained on `tokens` tokens of all processes together."""
        now = self._clock()
        self._step_s += now - self._mark
        self._each_s.append(self._own_wait_s + now - self._mark)
        self._tokens += tokens
        self._mark, self._own_wait_s = now, 0.0

    @property
    def total_s(self) -> float:
        """Time of this window's steps, waiting for data included."""
        return self._step_s + self._wait_s

    def take(self) -> dict[str, float]:
        """Return the `system/...` metrics of the steps since the last call; begins a new window."""
        total_s = self.total_s
        values = {
            catalog.TOKENS_PER_S: self._tokens / total_s if total_s > 0 else 0.0,
            catalog.DATA_WAIT_S: self._wait_s,
            catalog.DATA_WAIT_SHARE: self._wait_s / total_s if total_s > 0 else 0.0,
        }
        if self._each_s:
            values |= {
                catalog.STEP_S_P50: nearest_rank(self._each_s, 0.5),
                catalog.STEP_S_P95: nearest_rank(self._each_s, 0.95),
                catalog.STEP_S_MAX: max(self._each_s),
            }
        self._tokens, self._step_s, self._wait_s, self._each_s = 0, 0.0, 0.0, []
        return values


def nearest_rank(values: Sequence[float], share: float) -> float:
    """Return the least of the values that at least `share` of them do not exceed."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


class Starvation:
    """Notices when the model waits for its data, and says what helps; again only after it was well for a while.

    Args:
        num_workers: loader processes of each device.
    """

    def __init__(self, num_workers: int) -> None:
        self._num_workers = num_workers
        self._windows = 0
        self._well_windows = _WELL_FOR_WINDOWS

    def advice(self, wait_share: float) -> str | None:
        """Return advice for the user after another window of steps, of which `wait_share` was spent waiting."""
        self._windows += 1
        if wait_share < STARVED_SHARE:
            self._well_windows += 1
            return None
        was_well, self._well_windows = self._well_windows >= _WELL_FOR_WINDOWS, 0
        if self._windows == 1:  # waits for the start of the loader
            self._well_windows = _WELL_FOR_WINDOWS
            return None
        if not was_well:
            return None
        workers = f"raise data.num_workers (now {self._num_workers})"
        return (
            f"training waits for data {wait_share:.0%} of its time; {workers}, tokenise ahead (pldr-train data "
            "tokenize, then data.source=tokens), or, with data.source=hub, fetch ahead (pldr-train data download)"
        )
