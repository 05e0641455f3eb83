"""What happens between two optimizer steps: metrics, validation, checkpoints, and leaving on a signal.

All of it hangs on one callback, because the order decides whether a run can be repeated exactly. After a step its
values are collected, its line is written and, if one is due, a checkpoint is taken. At a step that is validated the
checkpoint comes first, for a validation may take long, and remembers that validation and line are still owed. Whatever
a process decides by what it alone sees (a signal, a clock, an unreadable file) is agreed on by all of them first.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from pldr_train.data.documents import Unreadable
from pldr_train.data.rows.packing import batch_digest
from pldr_train.distributed.watchdog import WAITING_FOR_DATA, Watchdog
from pldr_train.distributed.world import World
from pldr_train.errors import DataError, LeakageError, RecipeError, ToldElsewhereError, UserError
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
from pldr_train.runs.nonfinite import (
    RAISE,
    ROLLBACK,
    NonFiniteRecord,
    NonFiniteStep,
    RollbackRequestedError,
    check_finite,
)
from pldr_train.training.module import PldrllmModule
from pldr_train.training.observing import Observer
from pldr_train.training.saving import Ledger, Saver, datamodule_of, merge_lanes
from pldr_train.training.step_timer import Starvation, StepTimer
from pldr_train.training.stop_signals import SIGNAL_NAMES, StopRequestedError, StopSignals

_log = logging.getLogger(__name__)


class StepBoundary(pl.Callback):
    """Writes metrics, validates, saves and stops; see the module's text for the order.

    Args:
        recipe: the resolved recipe.
        folder: the run's folder, acquired.
        clock: seconds, monotonic.
        world: the processes of the run.
        checkpoint: what the run goes on from; None: its beginning.
        rolled_back: what a rollback left for this start.
    """

    def __init__(
        self,
        recipe: Recipe,
        folder: RunFolder,
        clock: Callable[[], float] = time.monotonic,
        world: World | None = None,
        checkpoint: Path | None = None,
        rolled_back: RollbackRequestedError | None = None,
    ) -> None:
        self.recipe, self.folder, self.clock = recipe, folder, clock
        self.world = world or World()
        self.stop = StopSignals(recipe.checkpoint.stop_deadline_s)
        self.watchdog = Watchdog(self.world, recipe.parallel.timeout_s)
        fresh = NonFiniteRecord(recipe.trainer.max_nonfinite_steps)
        self.ledger = Ledger(fresh if rolled_back is None else rolled_back.record)
        lanes = None if rolled_back is None else rolled_back.lanes
        self.saver = Saver(recipe, folder, self.world, self.ledger, checkpoint, lanes)
        self._unjudged: list[tuple[int, Tensor, dict[str, Any]]] = []
        """Steps whose gradient nobody has looked at yet: (step, its norm, its batch)."""
        self._leaving: str | None = None
        self._last_save_at = clock()
        self._newest_saved = 0
        self._timer = StepTimer(clock)
        self.observer = Observer(recipe, folder, self.world)
        self._starvation = Starvation(recipe.data.num_workers)

    # The loop's hooks, in the order in which they run.

    def on_train_start(self, trainer: pl.Trainer, pl_module: PldrllmModule) -> None:
        """Take over the signals; validate the weights at initialisation, or what a checkpoint still owes."""
        self.stop.install()
        self.watchdog.start()
        pl_module.bring_metrics_to_device()
        pl_module.monitor.beat = lambda: self.watchdog.beat(f"validation after step {trainer.global_step}, measuring")
        self.saver.take_back_weights(trainer, pl_module)
        self._newest_saved = trainer.global_step
        self._write_nonfinite()
        self._last_save_at = self.clock()
        if trainer.global_step == 0 or self.ledger.validation_owed:
            self._validate_now(trainer)
        self._waiting_begins(trainer)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: PldrllmModule, batch: Any, _index: int) -> None:
        """Note how long the batch was waited for; on the first one, put the random generators right."""
        if self.world.any("error" in batch):
            self._end_without_data(trainer, pl_module, batch)
        self.watchdog.beat(f"step {trainer.global_step + 1}, computing")
        self.saver.take_back_random()
        self._timer.batch_arrived()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: PldrllmModule, _outputs: Any, batch: dict[str, Any], _idx: int
    ) -> None:
        """Collect the step's values, save if due, and write its line unless a validation comes first."""
        step, settings = trainer.global_step, self.recipe
        last = step >= settings.trainer.max_steps
        new = datamodule_of(trainer).lane_state.update(batch["cursors"], batch["unreadable"])
        save_by_time, anything_unreadable = self._agree(self._time_to_save(), bool(new))
        if anything_unreadable:
            self._list_unreadable(trainer, new)
        logs = step % settings.logging.every_steps == 0 or last
        saves = (
            save_by_time or step % settings.checkpoint.every_steps == 0 or step in settings.checkpoint.also_keep_steps
        )
        self._judge(trainer, pl_module, batch, at_once=logs or saves or self._leaving is not None)
        # After it, for there the host waits for what the device has still to do of the step.
        self._timer.step_done(self._tokens_per_step())
        if settings.logging.batch_digest:
            self.ledger.pending[BATCH_DIGEST] = batch_digest(self._global_rows(batch)[1])
        if logs:
            self._collect_training_values(trainer, pl_module, step)
        self.ledger.validation_owed = last or step % settings.trainer.validate_every_steps == 0
        if not self.ledger.validation_owed:
            # Before the save: a checkpoint that owes no validation must not owe its line either.
            self._write_line(trainer)
        # The end of the run is saved once it is validated: a finished run owes nothing.
        if saves and not last:
            self._save(trainer, pl_module)
        if last:
            trainer.should_stop = True  # Lightning validates once more, then leaves its loop.
        if not self.ledger.validation_owed:
            self._end_step(trainer, pl_module)

    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: PldrllmModule, *_: Any) -> None:
        """Leave in the midst of a validation if asked to; it is run as a whole after the resume."""
        self.watchdog.beat(f"validation after step {trainer.global_step}")
        self._agree()
        if self._leaving and 0 < trainer.global_step < self.recipe.trainer.max_steps:
            self._leave(trainer, pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: PldrllmModule) -> None:
        """Add the validation's values to the step's line and write it."""
        if trainer.state.fn != "fit":
            return
        values = pl_module.validation_values()
        trained = self.ledger.pending | pl_module.peek_training_values()
        self.ledger.pending |= values
        self.ledger.validation_owed = False
        self._write_line(trainer)
        problem = self.observer.validated(trainer, pl_module, values, trained)
        if problem is not None:
            self._save(trainer, pl_module)
            self._raise_together(LeakageError(f"{problem}; or go on as it is with monitor.leakage=warn"))
        self._end_step(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: PldrllmModule) -> None:
        """Save the end of the run."""
        self._save(trainer, pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: PldrllmModule, exception: BaseException) -> None:
        """Watch no longer where this process goes on: a watch without progress would end it in the end.

        Lightning leaves out the teardown. Signals stay as they are, for a second one may come while the process leaves.
        """
        if self.world.size == 1 or isinstance(exception, RollbackRequestedError):
            self.watchdog.stop()

    def teardown(self, trainer: pl.Trainer, pl_module: PldrllmModule, stage: str) -> None:
        """Give the signals back, whatever ended the run."""
        self.watchdog.stop()
        self.stop.restore()

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: PldrllmModule, checkpoint: dict[str, Any]) -> None:
        """Add all that Lightning does not save."""
        self.saver.collect(trainer, pl_module, checkpoint)

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: PldrllmModule, checkpoint: dict[str, Any]) -> None:
        """Take back what `on_save_checkpoint` added."""
        self.world.together(lambda: self.saver.take_back(trainer, pl_module, checkpoint))
        if self.world.is_main:
            self.folder.write_unreadable(datamodule_of(trainer).lane_state.unreadable)

    # The parts.

    def _agree(self, *flags: bool) -> list[bool]:
        """Whether any process raises each flag; notes a signal that any of them got."""
        signals = [float(self.stop.received == name) for name in SIGNAL_NAMES]
        totals = self.world.sum([*signals, *map(float, flags)])
        got = [name for name, total in zip(SIGNAL_NAMES, totals, strict=False) if total]
        self._leaving = self._leaving or (got[0] if got else None)
        return [total > 0 for total in totals[len(signals) :]]

    def _validate_now(self, trainer: pl.Trainer) -> None:
        loop = trainer.fit_loop.epoch_loop.val_loop
        loop.restarting = False
        trainer.validating = True
        loop.run()
        trainer.training = True

    def _end_without_data(self, trainer: pl.Trainer, module: PldrllmModule, batch: dict[str, Any]) -> None:
        """Save the steps done when the documents cannot be read on: the same command goes on once that is corrected."""
        told = [text for text in self.world.gather(batch.get("error")) if text is not None]
        if trainer.global_step > 0:
            self._save(trainer, module)
        self._raise_together(DataError(told[0]))

    def _raise_together(self, error: UserError) -> None:
        """End all processes with an error that all of them know of; rank 0 tells it."""
        raise error if self.world.is_main else ToldElsewhereError(str(error))

    def _judge(self, trainer: pl.Trainer, module: PldrllmModule, batch: dict[str, Any], at_once: bool) -> None:
        """Find steps whose gradient was not finite and do about them what the recipe says; all processes alike.

        To see a norm the host waits for the device. With `raise` it looks one step back, which is done by then, or
        `at_once`; the other ways cannot wait.
        """
        assert module.control is not None
        assert module.control.norm is not None
        self._unjudged.append((trainer.global_step, module.control.norm, batch))
        self._judge_all_but(0 if at_once or self.recipe.trainer.on_nonfinite != RAISE else 1, trainer)

    def _judge_all_but(self, keep: int, trainer: pl.Trainer) -> None:
        policy, record = self.recipe.trainer.on_nonfinite, self.ledger.nonfinite
        while len(self._unjudged) > keep:
            step, norm, its_batch = self._unjudged.pop(0)
            if bool(torch.isfinite(norm)):
                if policy != ROLLBACK:  # going back to the same checkpoint again and again is no progress
                    record.good_step()
                continue
            self._act_on(trainer, step, its_batch)

    def _act_on(self, trainer: pl.Trainer, step: int, batch: dict[str, Any]) -> None:
        policy, record = self.recipe.trainer.on_nonfinite, self.ledger.nonfinite
        numbers, rows = self._global_rows(batch)
        back_to = self._newest_saved if policy == ROLLBACK else None
        event = NonFiniteStep(step, policy, (int(numbers[0]), int(numbers[-1]) + 1), batch_digest(rows), back_to)
        try:
            record.add(event)
        except RecipeError as error:
            self._write_nonfinite()
            self._raise_together(error)
        self._write_nonfinite()
        what = "its update is left out" if policy != ROLLBACK else f"the run goes back to step {back_to:,}"
        if self.world.is_main:
            _log.warning(f"step {step:,}: the loss or its gradient is not finite; {what}")
        if policy == ROLLBACK:
            datamodule = datamodule_of(trainer)
            merge_lanes(datamodule, self.world)
            raise RollbackRequestedError(record, datamodule.lane_state.state_dict())

    def _write_nonfinite(self) -> None:
        if self.world.is_main:
            self.folder.write_nonfinite(self.ledger.nonfinite.as_plain())

    def _global_rows(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Numbers and tokens of the global batch's rows, in their order."""
        parts = self.world.gather((batch["cursors"][:, 0], batch["input_ids"].cpu()))
        numbers, rows = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        order = numbers.argsort()
        return numbers[order], rows[order]

    def _collect_training_values(self, trainer: pl.Trainer, module: PldrllmModule, step: int) -> None:
        values, trained_s, timings = module.training_values(), self._timer.total_s, self._timer.take()
        check_finite(values, step)
        timings |= self.observer.step_values(trainer, module, timings[TOKENS_PER_S], trained_s)
        datamodule = datamodule_of(trainer)
        merge_lanes(datamodule, self.world)
        passed = {f"{DATA_GROUP}/{name}": count for name, count in datamodule.lane_state.counts().items()}
        left_out = {NONFINITE_STEPS: len(self.ledger.nonfinite.events)}
        self.ledger.pending |= values | left_out | {TOKENS: step * self._tokens_per_step()} | timings | passed
        advice = self._starvation.advice(timings[DATA_WAIT_SHARE])
        if advice and self.world.is_main:
            _log.warning(f"step {step:,}: {advice}")

    def _list_unreadable(self, trainer: pl.Trainer, new: list[Unreadable]) -> None:
        """Say what was skipped, by any process, and keep the whole list beside the metrics."""
        datamodule = datamodule_of(trainer)
        everywhere = {part.start: part for parts in self.world.gather(new) for part in parts}
        merge_lanes(datamodule, self.world)
        if not self.world.is_main:
            return
        for part in sorted(everywhere.values(), key=lambda part: part.start):
            documents = f"documents [{part.start}, {part.stop})"
            _log.warning(f"step {trainer.global_step:,}: skipped {documents}, {part.place}: {part.reason}")
        self.folder.write_unreadable(datamodule.lane_state.unreadable)

    def _write_line(self, trainer: pl.Trainer) -> None:
        if not self.ledger.pending:
            return
        line = {STEP: trainer.global_step} | self.ledger.pending
        self.ledger.pending = {}
        if self.world.is_main:
            self.folder.append_metrics(line)
        for logger in trainer.loggers:
            numbers = {name: value for name, value in line.items() if isinstance(value, int | float)}
            logger.log_metrics(numbers, step=trainer.global_step)
            logger.save()

    def _end_step(self, trainer: pl.Trainer, module: PldrllmModule) -> None:
        if self.world.size == 1:
            self._agree()  # alone, there is no need to wait for the next step's end
        if self._leaving and trainer.global_step < self.recipe.trainer.max_steps:
            self._leave(trainer, module)
        self._waiting_begins(trainer)

    def _waiting_begins(self, trainer: pl.Trainer) -> None:
        self.watchdog.beat(f"step {trainer.global_step + 1}, {WAITING_FOR_DATA}")
        self._timer.waiting_begins()

    def _leave(self, trainer: pl.Trainer, module: PldrllmModule) -> None:
        assert self._leaving is not None
        self._save(trainer, module)
        raise StopRequestedError(self._leaving, trainer.global_step)

    def _time_to_save(self) -> bool:
        """By rank 0's clock."""
        every_s = self.recipe.checkpoint.every_s
        return self.world.is_main and every_s is not None and self.clock() - self._last_save_at >= every_s

    def _tokens_per_step(self) -> int:
        return self.recipe.trainer.batch_size * self.recipe.data.context_length

    def _save(self, trainer: pl.Trainer, module: PldrllmModule) -> None:
        self._judge_all_but(0, trainer)  # a signal, or the end of the documents, may come before a step is judged
        check_finite(module.peek_training_values(), trainer.global_step)
        self.watchdog.beat(f"saving after step {trainer.global_step}")
        if trainer.global_step > self._newest_saved:
            self.ledger.nonfinite.good_step()
        with self.stop.saving(then_leaves=self._leaving is not None):
            saved = self.saver.save(trainer, module)
        if saved:
            self._last_save_at, self._newest_saved = self.clock(), trainer.global_step
