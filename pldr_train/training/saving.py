"""A run's checkpoints: what is collected for one, how all processes write it, and how it is taken back.

Lightning keeps its loops and callbacks in a small state file, to which the run's own state is added here. Weights and
AdamW's moments go into files beside it that know nothing of strategies (see `shards.py`); they are taken back when all
of the strategy's machinery stands, at the start of training.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.io import CheckpointIO

from pldr_train.checkpoint.live_state import optimizer_pieces, optimizer_step_of, restore_live_state, weight_pieces
from pldr_train.checkpoint.manifest import STATE_FILE, describe_file
from pldr_train.checkpoint.places import kept_steps, remove_old
from pldr_train.checkpoint.shards import OPTIMIZER, WEIGHTS, Piece, copied_to_host, file_name, write_pieces
from pldr_train.checkpoint.state import (
    STATE_FORMAT,
    STATE_KEY,
    load_state,
    random_state,
    restore_random_state,
    settle_loop_progress,
    state_bytes,
)
from pldr_train.checkpoint.writing import CheckpointWrite, write_synced
from pldr_train.data.datamodule import PldrDataModule
from pldr_train.data.rows.loader import LaneState
from pldr_train.distributed.world import World
from pldr_train.errors import CheckpointError
from pldr_train.recipe import Recipe, recipe_to_dict
from pldr_train.runs.folder import RunFolder
from pldr_train.runs.nonfinite import NonFiniteRecord
from pldr_train.runs.notes import environment
from pldr_train.runs.validations import Validations
from pldr_train.training.module import PldrllmModule
from pldr_train.training.strategies import SharedRun

_log = logging.getLogger(__name__)


class PlainCheckpointIO(CheckpointIO):
    """Take Lightning's state as the bytes of a state file, and read one: plain types only, see `checkpoint/state.py`.

    The saver writes the bytes with the checkpoint's other files.
    """

    def __init__(self) -> None:
        self._state: bytes | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Keep the state as it is now, for `take`."""
        self._state = state_bytes(checkpoint)

    def take(self) -> bytes | None:
        """Return the bytes that were saved last, once; None where there are none, as on all ranks but the first."""
        state, self._state = self._state, None
        return state

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read one state file; nothing in it is ever executed."""
        return load_state(Path(path), map_location or "cpu")

    def remove_checkpoint(self, path: Any) -> None:
        """Not used: `checkpoints.remove_old` deletes whole folders."""
        raise NotImplementedError("checkpoints are removed by folder")


@dataclass
class Ledger:
    """What a step may leave for later, saved with it."""

    nonfinite: NonFiniteRecord
    pending: dict[str, Any] = field(default_factory=dict)
    """Values of the step's line that is not written yet."""
    validation_owed: bool = False


class Saver:
    """Saves a run and takes a checkpoint back.

    Args:
        recipe: resolved.
        folder: the run's.
        world: the processes.
        ledger: saved and taken back with everything else.
        checkpoint: what the run goes on from, or None.
        lanes: state of the lanes to go on with instead of the checkpoint's, after a rollback; then the ledger keeps its
            record of non-finite steps, too.
    """

    def __init__(
        self,
        recipe: Recipe,
        folder: RunFolder,
        world: World,
        ledger: Ledger,
        checkpoint: Path | None = None,
        lanes: dict[str, Any] | None = None,
    ) -> None:
        self.recipe, self.folder, self.world, self.ledger = recipe, folder, world, ledger
        self._told = set[str]()
        self.validations = Validations(folder.metrics_path)
        self.checkpoint, self._lanes = checkpoint, lanes
        self._state: dict[str, Any] | None = None
        self._last_begun: tuple[int, bool] | None = None
        self._write: CheckpointWrite | None = None
        self._random: dict[str, Any] | None = None

    def begin(self, trainer: pl.Trainer, module: PldrllmModule, in_background: bool = False) -> bool:
        """Begin a checkpoint of the steps done so far, for `publish`; False if there is one of this very state.

        Args:
            trainer: of the run.
            module: of the run.
            in_background: copy the state to the host's memory and let a thread write it, else `publish` writes it,
                which must then be called before the next step.

        Raises:
            CheckpointError: it could not be begun, or the run's folder is not held any more; earlier checkpoints are
                untouched.
        """
        state = (trainer.global_step, self.ledger.validation_owed)
        if state == self._last_begun:
            return False
        assert self._write is None, "the checkpoint before this one is not in its place"
        self.world.on_all(self._check_and_sync, here=self.world.is_main)
        info = {
            "recipe": recipe_to_dict(self.recipe),
            "validation_owed": self.ledger.validation_owed,
            "strategy": self.recipe.parallel.strategy,
            "processes": self.world.size,
        }
        fill = self._collected(trainer, module, copied_to_host if in_background else list)
        root, step = self.folder.checkpoints_path, trainer.global_step
        self._write = CheckpointWrite(root, step, fill, info, self.world, self._warn_once, in_background)
        self._last_begun = state
        return True

    @property
    def is_writing(self) -> bool:
        """Whether a checkpoint was begun whose files this process has not written yet."""
        return self._write is not None and not self._write.is_written

    def report_slow_writing(self) -> None:
        """Warn once where a save is due and the one before it is not written yet."""
        if self.is_writing:
            self._warn_once(
                "checkpoint.async_save: a checkpoint is still being written when the next is due, and training waits "
                "for it; save less often (checkpoint.every_steps, every_s), or to a faster disk"
            )

    def publish(self) -> int | None:
        """Put the checkpoint that was begun in its place, and remove old ones; wait for its files if need be.

        Returns:
            Its step; None where none was begun.

        Raises:
            CheckpointError: some process could not write, or the run's folder is not held any more; earlier
                checkpoints are untouched.
        """
        if self._write is None:
            return None
        write, self._write = self._write, None
        self.world.on_all(self.folder.check_held, here=self.world.is_main)
        write.publish()
        if self.world.is_main:
            self.folder.saved()
            keep_last, root = self.recipe.checkpoint.keep_last, self.folder.checkpoints_path
            remove_old(root, keep_last, self._kept_steps(), write.step, self._warn_once)
        return write.step

    def _kept_steps(self) -> set[int]:
        best = self.recipe.checkpoint.keep_best
        values = None if best is None else self.validations.of(best.metric)
        return kept_steps(self.folder.path, self.recipe.checkpoint, values)

    def _check_and_sync(self) -> None:
        self.folder.check_held()
        self.folder.sync_metrics()

    def _warn_once(self, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            _log.warning(text)

    def _collected(
        self, trainer: pl.Trainer, module: PldrllmModule, hold: Callable[[Sequence[Piece]], list[Piece]]
    ) -> Callable[[Path], dict[str, dict[str, Any]]]:
        """Collect what this process writes of the run's state, and return what writes it into a folder.

        Args:
            trainer: of the run.
            module: of the run.
            hold: makes of the pieces of live tensors those that are written.
        """
        self.world.on_all(lambda: trainer.save_checkpoint(STATE_FILE))
        state = _checkpoint_io(trainer).take()
        rank, size = self.world.rank, self.world.size
        live = _strategy(trainer).live_state()
        buffers = list(module.model.named_buffers())
        pieces = {
            file_name(WEIGHTS, rank, size): hold(weight_pieces(live, buffers, rank, size)),
            file_name(OPTIMIZER, rank, size): hold(optimizer_pieces(live, rank, size)),
        }

        def fill(into: Path) -> dict[str, dict[str, Any]]:
            written = {}
            if state is not None:
                write_synced(into / STATE_FILE, state)
                written[STATE_FILE] = describe_file(into / STATE_FILE)
            return written | {name: write_pieces(into / name, held) for name, held in pieces.items()}

        return fill

    def collect(self, trainer: pl.Trainer, module: PldrllmModule, checkpoint: dict[str, Any]) -> None:
        """Add the run's own state to Lightning's."""
        for name in ("state_dict", "optimizer_states"):
            checkpoint.pop(name, None)
        for name, state in checkpoint.get("callbacks", {}).items():
            if not _is_plain(state):
                raise CheckpointError(
                    f"callbacks: state_dict() of {name} holds more than numbers, texts, lists, dicts and tensors, and "
                    "would be refused when the run resumes; let it return plain types only"
                )
        settle_loop_progress(checkpoint, trainer.global_step)
        datamodule = datamodule_of(trainer)
        merge_lanes(datamodule, self.world)
        random, windows = self.world.gather(random_state()), self.world.gather(module.training_window())
        checkpoint[STATE_KEY] = {
            "format": STATE_FORMAT,
            "step": trainer.global_step,
            "optimizer_step": optimizer_step_of(_strategy(trainer).live_state()),
            "recipe": recipe_to_dict(self.recipe),
            "environment": environment(),
            "lanes": datamodule.lane_state.state_dict(),
            "source": datamodule.train_source_fingerprint(),
            "random": random,
            "windows": windows,
            "pending": dict(self.ledger.pending),
            "validation_owed": self.ledger.validation_owed,
            "nonfinite": self.ledger.nonfinite.state_dict(),
        }

    def restore(self, trainer: pl.Trainer, module: PldrllmModule, checkpoint: dict[str, Any]) -> None:
        """Restore all but weights and moments from a state file.

        Raises:
            CheckpointError: it has another format, or other documents were trained on.
        """
        state = checkpoint[STATE_KEY]
        if state["format"] != STATE_FORMAT:
            raise CheckpointError(
                f"the checkpoint's state has format {state['format']}, this version reads {STATE_FORMAT}; "
                "resume with the version that wrote it"
            )
        datamodule = datamodule_of(trainer)
        _check_same_source(state["source"], datamodule.train_source_fingerprint())
        if self._lanes is None:
            datamodule.lane_state = LaneState.from_state_dict(state["lanes"])
            self.ledger.nonfinite.load_state_dict(state["nonfinite"])
        module.load_training_window(_own_window(state["windows"], self.world))
        self.ledger.pending, self.ledger.validation_owed = dict(state["pending"]), state["validation_owed"]
        self._random = _own_random(state["random"], self.world)
        self._state = state

    def restore_weights(self, trainer: pl.Trainer, module: PldrllmModule) -> None:
        """Fill weights and moments from the checkpoint, and set the learning rate that its schedule stood at."""
        if self.checkpoint is None:
            return
        assert self._state is not None, "Lightning has not read the state file"
        # Stage 3 shows no whole shapes; a model without memory has them.
        shapes = [(name, _whole_shape(parameter)) for name, parameter in module.model.named_parameters()]
        live = _strategy(trainer).live_state()
        restore_live_state(live, module.model, self.checkpoint, self._state["optimizer_step"], shapes)
        scheduler: Any = module.lr_schedulers()
        for group, lr in zip(trainer.optimizers[0].param_groups, scheduler.get_last_lr(), strict=True):
            group["lr"] = lr
        self._state = None

    def restore_random(self) -> None:
        """Put the random generators right; to be called when nothing else draws any more before the next step."""
        if self._random is not None:
            restore_random_state(self._random)
            self._random = None


def datamodule_of(trainer: pl.Trainer) -> PldrDataModule:
    """Return the trainer's data module, typed."""
    datamodule = trainer.datamodule
    assert isinstance(datamodule, PldrDataModule)
    return datamodule


def merge_lanes(datamodule: PldrDataModule, world: World) -> None:
    """Let every process know how far the others' lanes are."""
    if world.size > 1:
        mine = datamodule.lane_state
        datamodule.lane_state = mine.merged([state for state in world.gather(mine) if state is not mine])


def _is_plain(value: Any) -> bool:
    """Return whether a state file may hold a value, and reading it back runs no code."""
    if isinstance(value, dict):
        return all(_is_plain(each) for pair in value.items() for each in pair)
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or type(value) in (bool, int, float, str, bytes, torch.Tensor)


def _strategy(trainer: pl.Trainer) -> SharedRun:
    strategy = trainer.strategy
    assert isinstance(strategy, SharedRun), type(strategy)
    return strategy


def _checkpoint_io(trainer: pl.Trainer) -> PlainCheckpointIO:
    io = trainer.strategy.checkpoint_io
    assert isinstance(io, PlainCheckpointIO), type(io)
    return io


def _whole_shape(parameter: Any) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _own_window(windows: Sequence[dict[str, Any]], world: World) -> dict[str, Any]:
    """Return this process' sums of the metrics' window; with other processes than saved rank 0 goes on with all of
    them.
    """
    if len(windows) == world.size:
        return windows[world.rank]
    totals = {name: sum(window[name] for window in windows) for name in windows[0]}
    return totals if world.is_main else {name: total * 0 for name, total in totals.items()}


def _own_random(states: Sequence[dict[str, Any]], world: World) -> dict[str, Any]:
    return states[world.rank % len(states)]


def _check_same_source(saved: dict[str, Any], found: dict[str, Any]) -> None:
    if saved == found:
        return
    differing = sorted(key for key in saved.keys() | found.keys() if saved.get(key) != found.get(key))
    raise CheckpointError(
        f"the training documents are not those that the checkpoint was trained on ({', '.join(differing)} differ); "
        "put data.source and data.path back to the same files, or start another run with model.init_from"
    )
