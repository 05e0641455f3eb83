"""A step's line of `metrics.jsonl`: its values are collected after the step and written when all of them are there."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl

from pldr_train.data.rows.packing import batch_digest
from pldr_train.distributed.world import World
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
from pldr_train.training.step_timer import Starvation, StepTimer

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
