"""What `PldrllmModule` and `PldrDataModule` need under a plain `lightning.Trainer`, where nothing of `fit` is there.

The trainer's own callbacks, loggers and checkpoints are used. A checkpoint of its `ModelCheckpoint` also holds how far
the data was read, so `trainer.fit(..., ckpt_path=...)` goes on with the next row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn

from pldr_train.data.datamodule import PldrDataModule
from pldr_train.data.rows.loader import LaneState
from pldr_train.errors import DataError, RecipeError
from pldr_train.metrics.catalog import TRAIN_CROSS_ENTROPY, TRAIN_LOSS
from pldr_train.runs.nonfinite import check_finite

if TYPE_CHECKING:
    from pldr_train.training.module import PldrllmModule

_KEY = "pldr_train"


class StockTrainerSupport(pl.Callback):
    """Tracks the data's position, logs the recipe's metrics and stops on errors; the module adds it by itself."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check what the trainer can do.

        Raises:
            RecipeError: several processes, which need the strategies of `pldr_train.fit`.
        """
        if trainer.world_size > 1:
            raise RecipeError(
                f"lightning.Trainer with {trainer.world_size} processes: PldrllmModule shares a run over processes "
                "only under pldr_train.fit (trainer.devices, parallel.strategy in the recipe); use that, or devices=1"
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: PldrllmModule) -> None:
        """Put the sums of the metrics on the model's device."""
        pl_module.bring_metrics_to_device()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: PldrllmModule) -> None:
        """Put the sums of the metrics on the model's device; the sanity check comes before the training."""
        pl_module.bring_metrics_to_device()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: PldrllmModule, batch: Any, batch_idx: int) -> None:
        """Raise what the loader found wrong with the data."""
        if "error" in batch:
            raise DataError(batch["error"])

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: PldrllmModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Record the rows as trained on; at the recipe's log steps, log its metrics."""
        datamodule, step = _datamodule(trainer), trainer.global_step
        if datamodule is not None and "cursors" in batch:
            for part in datamodule.lane_state.update(batch["cursors"], batch["unreadable"]):
                rank_zero_warn(f"step {step}: skipped documents [{part.start}, {part.stop}), {part.place}")
        if step % pl_module.recipe.logging.every_steps:
            return
        values = pl_module.training_values()
        check_finite(values, step)
        shown = values.keys() & {TRAIN_LOSS, TRAIN_CROSS_ENTROPY}  # none where another callback took them before
        for name in sorted(shown):  # for callbacks and the progress bar
            pl_module.log(name, values[name], prog_bar=name == TRAIN_CROSS_ENTROPY, logger=False)
        _send(trainer, values)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: PldrllmModule) -> None:
        """Log what the validation measured."""
        if not trainer.sanity_checking:
            _send(trainer, pl_module.validation_values())

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: PldrllmModule, checkpoint: dict[str, Any]) -> None:
        """Add the position in the data and the window of the metrics."""
        datamodule = _datamodule(trainer)
        checkpoint[_KEY] = {
            "lanes": None if datamodule is None else datamodule.lane_state.state_dict(),
            "window": pl_module.training_window(),
        }

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: PldrllmModule, checkpoint: dict[str, Any]) -> None:
        """Go on with the next row."""
        state, datamodule = checkpoint.get(_KEY), _datamodule(trainer)
        if state is None:
            return
        if datamodule is not None and state["lanes"] is not None:
            datamodule.lane_state = LaneState.from_state_dict(state["lanes"], datamodule.recipe.data.num_lanes)
        pl_module.load_training_window(state["window"])


def _datamodule(trainer: pl.Trainer) -> PldrDataModule | None:
    datamodule = trainer.datamodule
    return datamodule if isinstance(datamodule, PldrDataModule) else None


def _send(trainer: pl.Trainer, values: dict[str, float]) -> None:
    for logger in trainer.loggers:
        logger.log_metrics(values, step=trainer.global_step)
        logger.save()
