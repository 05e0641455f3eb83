"""What happens between two optimizer steps, in its order: metrics, validation, checkpoints, leaving on a signal.

All of it hangs on one callback, because the order decides whether a run can be repeated exactly. After a step:

1. its documents count as trained on;
2. all ranks agree on what any one of them saw: a signal, the clock, an unreadable document; a checkpoint whose files
   all have written in the background meanwhile is put in its place;
3. gradients that were not finite are acted on;
4. at a log step its values are collected;
5. its line is written, unless a validation is due, whose values belong to the same line;
6. a checkpoint is written, if one is due. Before a validation, which may take long, it records that the validation and
   the line are still to come;
7. Lightning runs the validation, if one is due; then tasks are scored, its values, the line, a snapshot and samples
   are written, and whether the run ends early is decided;
8. the run leaves if a signal came, else waits for the next batch.

The last step is validated first and saved then: a finished run has nothing left to do.
"""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import lightning.pytorch as pl

from pldr_train.data.documents import Unreadable
from pldr_train.distributed.watchdog import WAITING_FOR_DATA, Watchdog
from pldr_train.distributed.world import World
from pldr_train.errors import CheckpointError, DataError, LeakageError
from pldr_train.recipe import Recipe
from pldr_train.runs.folder import RunFolder
from pldr_train.runs.nonfinite import NonFiniteRecord, RollbackRequestedError, check_finite
from pldr_train.runs.validations import early_end
from pldr_train.training.module import PldrllmModule
from pldr_train.training.nonfinite_policy import NonFinitePolicy
from pldr_train.training.observing import Observer
from pldr_train.training.saving import Ledger, Saver, datamodule_of, merge_lanes
from pldr_train.training.step_line import StepLine
from pldr_train.training.stop_signals import SIGNAL_NAMES, StopRequestedError, StopSignals
from pldr_train.training.task_evaluation import TaskEvaluation

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Due:
    """What a recipe asks for after a step."""

    is_last: bool
    logs: bool
    saves: bool
    validates: bool

    @classmethod
    def after(cls, step: int, recipe: Recipe) -> Due:
        """Return what is due after `step` steps of a resolved recipe, the clock aside."""
        is_last, settings = step >= recipe.trainer.max_steps, recipe.checkpoint
        validates = is_last or step % recipe.trainer.validate_every_steps == 0
        return cls(
            is_last,
            logs=is_last or step % recipe.logging.every_steps == 0,
            saves=step % settings.every_steps == 0
            or step in settings.also_keep_steps
            or (validates and settings.keep_best is not None),
            validates=validates,
        )


class StepBoundary(pl.Callback):
    """Do what the module's text says between two steps.

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
        self.nonfinite = NonFinitePolicy(recipe, folder, self.world, self.ledger.nonfinite, self._publish)
        self.observer = Observer(recipe, folder, self.world)
        self.tasks = TaskEvaluation(recipe, self.world)
        self.line = StepLine(recipe, folder, self.world, self.ledger, self.observer, clock)
        self._leaving: str | None = None
        """Name of the signal that any rank got."""
        self._ends_early = False
        self._last_save_at = clock()

    # The loop's hooks, in the order in which they run.

    def setup(self, trainer: pl.Trainer, pl_module: PldrllmModule, stage: str) -> None:
        """Read the tasks that the run is scored on."""
        self.tasks.load(datamodule_of(trainer).tokenizer_path)

    def on_train_start(self, trainer: pl.Trainer, pl_module: PldrllmModule) -> None:
        """Take over the signals, restore the weights; validate at the beginning, or where a checkpoint says so."""
        self.stop.install()
        signals = trainer._signal_connector
        if signals.received_sigterm:  # while the data was made ready: Lightning would raise in the first step
            signals.received_sigterm = False
            self.stop.note(signal.SIGTERM)
        self.watchdog.start()
        pl_module.bring_metrics_to_device()
        pl_module.monitor.beat = lambda: self.watchdog.beat(f"validation after step {trainer.global_step}, measuring")
        self.saver.restore_weights(trainer, pl_module)
        self.nonfinite.starts_at(trainer.global_step)
        self._last_save_at = self.clock()
        if self.saver.checkpoint is None or self.ledger.validation_owed:
            self._validate_now(trainer)
        self._wait_for_batch(trainer)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: PldrllmModule, batch: Any, _index: int) -> None:
        """Note how long the batch was waited for; before the first one, restore the random generators."""
        if self.world.any("error" in batch):
            self._end_without_data(trainer, pl_module, batch)
        self.watchdog.beat(f"step {trainer.global_step + 1}, computing")
        self.saver.restore_random()
        self.line.batch_arrived()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: PldrllmModule, _outputs: Any, batch: dict[str, Any], _idx: int
    ) -> None:
        """Do 1 to 6 of the module's text, and 8 where no validation is due."""
        due, datamodule = Due.after(trainer.global_step, self.recipe), datamodule_of(trainer)
        unreadable = datamodule.lane_state.update(batch["cursors"], batch["unreadable"])
        time_to_save, any_unreadable = self._agree(self._time_to_save(), bool(unreadable))
        if any_unreadable:
            self._list_unreadable(trainer, unreadable)
        saves = due.saves or time_to_save
        assert pl_module.control is not None
        assert pl_module.control.norm is not None
        self.nonfinite.note(trainer.global_step, pl_module.control.norm, batch)
        reads = due.logs or due.validates or saves or self._leaving is not None
        self.nonfinite.check(datamodule, at_once=reads)
        self.line.step_done(batch)  # after the check, where the host waits for what the device has still to do
        if due.logs:
            self.line.collect(trainer, pl_module)
        self.ledger.validation_owed = due.validates
        if not due.validates:
            self.line.write(trainer)
        if saves and not due.is_last:
            self._save(trainer, pl_module, in_background=self.recipe.checkpoint.async_save)
        if due.is_last:
            trainer.should_stop = True  # Lightning validates once more, then leaves its loop
        if not due.validates:
            self._end_step(trainer, pl_module)

    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: PldrllmModule, *_: Any) -> None:
        """Leave in the midst of a validation if a signal came; it is run as a whole after the resume."""
        self.watchdog.beat(f"validation after step {trainer.global_step}")
        self._agree()
        if self._leaving and 0 < trainer.global_step < self.recipe.trainer.max_steps:
            self._leave(trainer, pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: PldrllmModule) -> None:
        """Do 7 and 8 of the module's text."""
        if trainer.state.fn != "fit":
            return
        values = pl_module.validation_values() | self._task_values(trainer, pl_module)
        trained = self.ledger.pending | pl_module.peek_training_values()
        self.ledger.pending |= values
        self.ledger.validation_owed = False
        self.line.write(trainer)
        self.saver.validations.note(trainer.global_step, values)
        self._ends_early = self._judge_early_end(trainer)
        if self._ends_early:
            trainer.should_stop = True
        problem = self.observer.validated(trainer, pl_module, values, trained, self._is_last(trainer))
        if problem is not None:
            self._save(trainer, pl_module)
            self.world.raise_on_all(LeakageError(f"{problem}; or go on as it is with monitor.leakage=warn"))
        self._end_step(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: PldrllmModule) -> None:
        """Save the end of the run."""
        self._save(trainer, pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: PldrllmModule, exception: BaseException) -> None:
        """Watch no longer where this process goes on: a watch without progress would end it in the end.

        Lightning leaves out the teardown. Signals stay as they are, for a second one may come while the process leaves.
        A process that is alone puts the checkpoint that it is still writing in its place; several cannot, for the
        others may be gone.
        """
        if self.world.size == 1 or isinstance(exception, RollbackRequestedError):
            self.watchdog.stop()
        if self.world.size == 1 and isinstance(exception, Exception):
            try:
                self._publish()
            except CheckpointError as error:
                _log.warning(str(error))

    def teardown(self, trainer: pl.Trainer, pl_module: PldrllmModule, stage: str) -> None:
        """Give the signals back, whatever ended the run."""
        self.watchdog.stop()
        self.stop.restore()

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: PldrllmModule, checkpoint: dict[str, Any]) -> None:
        """Add all that Lightning does not save."""
        self.saver.collect(trainer, pl_module, checkpoint)

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: PldrllmModule, checkpoint: dict[str, Any]) -> None:
        """Restore what `on_save_checkpoint` added."""
        self.world.on_all(lambda: self.saver.restore(trainer, pl_module, checkpoint))
        if self.world.is_main:
            self.folder.write_unreadable(datamodule_of(trainer).lane_state.unreadable)

    # The parts.

    def _agree(self, *flags: bool) -> list[bool]:
        """Return whether any rank raises each flag; note a signal that any of them got.

        A checkpoint whose files all ranks have written is put in its place.
        """
        signals = [float(self.stop.received == name) for name in SIGNAL_NAMES]
        totals = self.world.sum([*signals, float(self.saver.is_writing), *map(float, flags)])
        got = [name for name, total in zip(SIGNAL_NAMES, totals, strict=False) if total]
        self._leaving = self._leaving or (got[0] if got else None)
        is_writing, *raised = (total > 0 for total in totals[len(signals) :])
        if not is_writing:
            self._publish()
        return raised

    def _time_to_save(self) -> bool:
        """Return whether `checkpoint.every_s` is over, by rank 0's clock."""
        every_s = self.recipe.checkpoint.every_s
        return self.world.is_main and every_s is not None and self.clock() - self._last_save_at >= every_s

    def _task_values(self, trainer: pl.Trainer, module: PldrllmModule) -> dict[str, float]:
        """Return the scores of the tasks, where they are due; the run may leave meanwhile, and validates anew then."""
        if not self.tasks.is_due(trainer.global_step):
            return {}

        def leaves() -> bool:
            self._agree()
            return self._leaving is not None and 0 < trainer.global_step < self.recipe.trainer.max_steps

        values = self.tasks.values(module, leaves)
        if values is None:
            self._leave(trainer, module)
        return values

    def _judge_early_end(self, trainer: pl.Trainer) -> bool:
        """Return whether the run ends with this validation, on every rank as rank 0's metrics have it."""
        settings = self.recipe.trainer.early_stop
        if settings is None or self._is_last(trainer):
            return False
        validations = self.saver.validations
        return self.world.on_main(lambda: early_end(settings, validations.of(settings.metric)) is not None)

    def _is_last(self, trainer: pl.Trainer) -> bool:
        return self._ends_early or trainer.global_step >= self.recipe.trainer.max_steps

    def _validate_now(self, trainer: pl.Trainer) -> None:
        loop = trainer.fit_loop.epoch_loop.val_loop
        loop.restarting = False
        trainer.validating = True
        loop.run()
        trainer.training = True

    def _list_unreadable(self, trainer: pl.Trainer, new: list[Unreadable]) -> None:
        """Log what any rank skipped, and keep the whole list beside the metrics."""
        datamodule = datamodule_of(trainer)
        everywhere = {part.start: part for parts in self.world.gather(new) for part in parts}
        merge_lanes(datamodule, self.world)
        if not self.world.is_main:
            return
        for part in sorted(everywhere.values(), key=lambda part: part.start):
            documents = f"documents [{part.start}, {part.stop})"
            _log.warning(f"step {trainer.global_step:,}: skipped {documents}, {part.place}: {part.reason}")
        self.folder.write_unreadable(datamodule.lane_state.unreadable)

    def _end_without_data(self, trainer: pl.Trainer, module: PldrllmModule, batch: dict[str, Any]) -> None:
        """Save the steps done when documents cannot be read; the same command goes on once that is corrected."""
        errors = [text for text in self.world.gather(batch.get("error")) if text is not None]
        if trainer.global_step > 0:
            self._save(trainer, module)
        self.world.raise_on_all(DataError(errors[0]))

    def _save(self, trainer: pl.Trainer, module: PldrllmModule, in_background: bool = False) -> None:
        """Save the steps done so far; in the background a thread writes, and `_publish` is still to be called."""
        # A signal, or the end of the documents, may come before the last step's gradient was looked at.
        self.nonfinite.check(datamodule_of(trainer), at_once=True)
        check_finite(module.peek_training_values(), trainer.global_step)
        self.watchdog.beat(f"saving after step {trainer.global_step}")
        with self.stop.saving(then_leaves=self._leaving is not None):
            if in_background:
                self.saver.report_slow_writing()
            self._publish()
            self.nonfinite.saves(trainer.global_step)
            begun = self.saver.begin(trainer, module, in_background)
            if not in_background:
                self._publish()
        if begun:
            self._last_save_at = self.clock()

    def _publish(self) -> None:
        step = self.saver.publish()
        if step is not None:
            self.nonfinite.saved(step)

    def _end_step(self, trainer: pl.Trainer, module: PldrllmModule) -> None:
        if self.world.size == 1:
            self._agree()  # alone, there is no need to wait for the next step's end
        if self._leaving and not self._is_last(trainer):
            self._leave(trainer, module)
        self._wait_for_batch(trainer)

    def _leave(self, trainer: pl.Trainer, module: PldrllmModule) -> NoReturn:
        assert self._leaving is not None
        self._save(trainer, module)
        raise StopRequestedError(self._leaving, trainer.global_step)

    def _wait_for_batch(self, trainer: pl.Trainer) -> None:
        self.watchdog.beat(f"step {trainer.global_step + 1}, {WAITING_FOR_DATA}")
        self.line.waiting_begins()
