"""What happens between two optimizer steps: metrics, validation, checkpoints, and leaving on a signal.

All of it hangs on one callback, because the order decides whether a run can be repeated exactly. After a step its
values are collected, its line is written and, if one is due, a checkpoint is taken. At a step that is validated the
checkpoint comes first, for a validation may take long, and remembers that validation and line are still owed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.io import CheckpointIO
from torch import Tensor

from pldr_train.data.datamodule import PldrDataModule
from pldr_train.data.documents import Unreadable
from pldr_train.data.loader import LaneState
from pldr_train.data.packing import batch_digest
from pldr_train.errors import CheckpointError, DataError
from pldr_train.recipe import Recipe, recipe_to_dict
from pldr_train.training.checkpoints import STATE_FILE, load_state, remove_old, save_state, write_checkpoint
from pldr_train.training.module import PldrllmModule, check_finite
from pldr_train.training.resume import random_state, restore_random_state, settle_loop_progress
from pldr_train.training.run_folder import RunFolder, environment
from pldr_train.training.step_timer import Starvation, StepTimer
from pldr_train.training.stop_signals import StopRequestedError, StopSignals

STATE_KEY = "pldr_train"
_STATE_FORMAT = 2


class PlainCheckpointIO(CheckpointIO):
    """Lightning's reading and writing of a state file, through `checkpoints.py`: plain types only, errors for users."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write and sync one state file."""
        save_state(Path(path), checkpoint)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read one state file; nothing in it is ever executed."""
        return load_state(Path(path), map_location or "cpu")

    def remove_checkpoint(self, path: Any) -> None:
        """Not used: `checkpoints.remove_old` deletes whole folders."""
        raise NotImplementedError("checkpoints are removed by folder")


class StepBoundary(pl.Callback):
    """Writes metrics, validates, saves and stops; see the module's text for the order.

    Args:
        recipe: the resolved recipe.
        folder: the run's folder, acquired.
        clock: seconds, monotonic.
        say: is told what a user should know while the run goes on.
    """

    def __init__(
        self,
        recipe: Recipe,
        folder: RunFolder,
        clock: Callable[[], float] = time.monotonic,
        say: Callable[[str], None] = print,
    ) -> None:
        self.recipe = recipe
        self.folder = folder
        self.clock = clock
        self.say = say
        self.stop = StopSignals()
        self._pending: dict[str, Any] = {}
        self._validation_owed = False
        self._random_to_restore: list[dict[str, Any]] | None = None
        self._last_save_at = clock()
        self._last_saved: tuple[int, bool] | None = None
        self._timer = StepTimer(clock)
        self._starvation = Starvation(recipe.data.num_workers)

    # The loop's hooks, in the order in which they run.

    def on_train_start(self, trainer: pl.Trainer, pl_module: PldrllmModule) -> None:
        """Take over the signals; validate the weights at initialisation, or what a checkpoint still owes."""
        self.stop.install()
        self._last_save_at = self.clock()
        if trainer.global_step == 0 or self._validation_owed:
            self._validate_now(trainer)
        self._timer.waiting_begins()

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """Note how long the batch was waited for; on the first one, put the random generators right."""
        if self._random_to_restore is not None:
            restore_random_state(self._random_to_restore[trainer.global_rank])
            self._random_to_restore = None
        self._timer.batch_arrived()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: PldrllmModule, _outputs: Any, batch: dict[str, Tensor], _idx: int
    ) -> None:
        """Collect the step's values, save if due, and write its line unless a validation comes first."""
        step, settings = trainer.global_step, self.recipe
        last = step >= settings.trainer.max_steps
        cursors, rows, unreadable = _gather_rows(trainer, batch)
        self._list_unreadable(trainer, datamodule_of(trainer).lane_state.update(cursors, unreadable))
        self._timer.step_done(self._tokens_per_step())
        if settings.logging.batch_digest:
            self._pending["data/batch_digest"] = batch_digest(rows)
        if step % settings.logging.every_steps == 0 or last:
            self._collect_training_values(trainer, pl_module, step)
        self._validation_owed = last or step % settings.trainer.validate_every_steps == 0
        if not self._validation_owed:
            # Before the save: a checkpoint that owes no validation must not owe its line either.
            self._write_line(trainer)
        # The end of the run is saved once it is validated: a finished run owes nothing.
        if self._save_is_due(step) and not last:
            self._save(trainer, pl_module)
        if last:
            trainer.should_stop = True  # Lightning validates once more, then leaves its loop.
        if not self._validation_owed:
            self._end_step(trainer, pl_module)

    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: PldrllmModule, *_: Any) -> None:
        """Leave in the midst of a validation if asked to; it is run as a whole after the resume."""
        if self.stop.received and 0 < trainer.global_step < self.recipe.trainer.max_steps:
            self._leave(trainer, pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: PldrllmModule) -> None:
        """Add the validation's values to the step's line and write it."""
        if trainer.state.fn != "fit":
            return
        self._pending |= pl_module.validation_values()
        self._validation_owed = False
        self._write_line(trainer)
        self._end_step(trainer, pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: PldrllmModule, exception: BaseException) -> None:
        """Save the steps done when the documents cannot be read on: the same command goes on once that is mended."""
        if isinstance(exception, DataError) and trainer.training and trainer.global_step > 0:
            self._save(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: PldrllmModule) -> None:
        """Save the end of the run."""
        self._save(trainer, pl_module)

    def teardown(self, trainer: pl.Trainer, pl_module: PldrllmModule, stage: str) -> None:
        """Give the signals back, whatever ended the run."""
        self.stop.restore()

    # The parts.

    def _validate_now(self, trainer: pl.Trainer) -> None:
        loop = trainer.fit_loop.epoch_loop.val_loop
        loop.restarting = False
        trainer.validating = True
        loop.run()
        trainer.training = True

    def _collect_training_values(self, trainer: pl.Trainer, module: PldrllmModule, step: int) -> None:
        values, timings = module.training_values(), self._timer.take()
        check_finite(values, step)
        counts = datamodule_of(trainer).lane_state.counts()
        passed = {f"data/{name}": count for name, count in counts.items()}
        self._pending |= values | {"tokens": step * self._tokens_per_step()} | timings | passed
        advice = self._starvation.advice(timings["data_wait_share"])
        if advice and trainer.is_global_zero:
            self.say(f"step {step:,}: {advice}")

    def _list_unreadable(self, trainer: pl.Trainer, new: list[Unreadable]) -> None:
        """Say what was skipped, and keep the whole list beside the metrics."""
        if not new or not trainer.is_global_zero:
            return
        for part in new:
            documents = f"documents [{part.start}, {part.stop})"
            self.say(f"step {trainer.global_step:,}: skipped {documents}, {part.place}: {part.reason}")
        self.folder.write_unreadable(datamodule_of(trainer).lane_state.unreadable)

    def _write_line(self, trainer: pl.Trainer) -> None:
        if not self._pending:
            return
        line = {"step": trainer.global_step} | self._pending
        self._pending = {}
        if trainer.is_global_zero:
            self.folder.append_metrics(line)
        for logger in trainer.loggers:
            numbers = {name: value for name, value in line.items() if isinstance(value, int | float)}
            logger.log_metrics(numbers, step=trainer.global_step)

    def _end_step(self, trainer: pl.Trainer, module: PldrllmModule) -> None:
        if self.stop.received and trainer.global_step < self.recipe.trainer.max_steps:
            self._leave(trainer, module)
        self._timer.waiting_begins()

    def _leave(self, trainer: pl.Trainer, module: PldrllmModule) -> None:
        assert self.stop.received is not None
        self._save(trainer, module)
        raise StopRequestedError(self.stop.received, trainer.global_step)

    def _save_is_due(self, step: int) -> bool:
        settings = self.recipe.checkpoint
        if step % settings.every_steps == 0 or step in settings.also_keep_steps:
            return True
        return settings.every_s is not None and self.clock() - self._last_save_at >= settings.every_s

    def _tokens_per_step(self) -> int:
        return self.recipe.trainer.batch_size * self.recipe.data.context_length

    # Checkpoints.

    def _save(self, trainer: pl.Trainer, module: PldrllmModule) -> None:
        """Write a checkpoint of the steps done so far, unless this very state is saved already."""
        state = (trainer.global_step, self._validation_owed)
        if state == self._last_saved:
            return
        check_finite(module.peek_training_values(), trainer.global_step)
        self.folder.sync_metrics()
        root = self.folder.checkpoints_path
        info = {"recipe": recipe_to_dict(self.recipe), "validation_owed": self._validation_owed}
        write_checkpoint(root, trainer.global_step, lambda folder: trainer.save_checkpoint(folder / STATE_FILE), info)
        remove_old(root, self.recipe.checkpoint.keep_last, self.recipe.checkpoint.also_keep_steps)
        self._last_saved = state
        self._last_save_at = self.clock()

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: PldrllmModule, checkpoint: dict[str, Any]) -> None:
        """Add all that Lightning does not save."""
        datamodule = datamodule_of(trainer)
        settle_loop_progress(checkpoint, trainer.global_step)
        checkpoint[STATE_KEY] = {
            "format": _STATE_FORMAT,
            "step": trainer.global_step,
            "recipe": recipe_to_dict(self.recipe),
            "environment": environment(),
            "lanes": datamodule.lane_state.state_dict(),
            "source": datamodule.train_source_fingerprint(),
            "random": _gather_objects(trainer, random_state()),
            "window": pl_module.training_window(),
            "pending": dict(self._pending),
            "validation_owed": self._validation_owed,
        }

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: PldrllmModule, checkpoint: dict[str, Any]) -> None:
        """Take back what `on_save_checkpoint` added."""
        state = checkpoint[STATE_KEY]
        if state["format"] != _STATE_FORMAT:
            raise CheckpointError(
                f"the checkpoint's state has format {state['format']}, this version reads {_STATE_FORMAT}; "
                "resume with the version that wrote it"
            )
        datamodule = datamodule_of(trainer)
        _check_same_source(state["source"], datamodule.train_source_fingerprint())
        datamodule.lane_state = LaneState.from_state_dict(state["lanes"])
        if trainer.is_global_zero:
            self.folder.write_unreadable(datamodule.lane_state.unreadable)
        pl_module.load_training_window(state["window"])
        self._pending, self._validation_owed = dict(state["pending"]), state["validation_owed"]
        self._random_to_restore = state["random"]


def datamodule_of(trainer: pl.Trainer) -> PldrDataModule:
    """The trainer's data module, typed."""
    datamodule = trainer.datamodule
    assert isinstance(datamodule, PldrDataModule)
    return datamodule


def _check_same_source(saved: dict[str, Any], found: dict[str, Any]) -> None:
    if saved == found:
        return
    differing = sorted(key for key in saved.keys() | found.keys() if saved.get(key) != found.get(key))
    raise CheckpointError(
        f"the training documents are not those that the checkpoint was trained on ({', '.join(differing)} differ); "
        "put data.source and data.path back to the same files, or start another run with model.init_from"
    )


def _gather_rows(trainer: pl.Trainer, batch: dict[str, Any]) -> tuple[Tensor, Tensor, list[Unreadable]]:
    """Cursors and token rows of the global batch, in the order of the global rows, and what was skipped for them."""
    cursors, rows, unreadable = batch["cursors"], batch["input_ids"], list(batch["unreadable"])
    if trainer.world_size > 1:
        parts = _gather_objects(trainer, (cursors, rows.cpu(), unreadable))
        cursors, rows = (torch.cat(tensors) for tensors in list(zip(*parts, strict=True))[:2])
        unreadable = [each for part in parts for each in part[2]]
        order = cursors[:, 0].argsort()
        cursors, rows = cursors[order], rows[order]
    return cursors, rows, unreadable


def _gather_objects(trainer: pl.Trainer, mine: Any) -> list[Any]:
    """One object of every process, on every process."""
    if trainer.world_size == 1:
        return [mine]
    gathered: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(gathered, mine)
    return gathered
