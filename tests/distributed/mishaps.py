"""What happens to processes of the fault tests, from inside them; each function is called before `fit`."""

from __future__ import annotations

import os
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_in_save(rank: int, victim: int, moment: str, step: int) -> None:
    """Be killed at a moment of the save of a step: before or after one of the files, or around the renaming."""
    if rank != victim:
        return
    from pldr_train.checkpoint import writing
    from pldr_train.training import saving

    when, what = moment.split()
    module: Any = writing if what == "_finish" else saving
    original: Callable[..., Any] = getattr(module, "write_pieces" if what in ("weights", "optimizer") else what)

    def dying(*arguments: Any) -> Any:
        path = next(argument for argument in arguments if isinstance(argument, Path) and f"{step:08d}" in str(argument))
        hit = what == "_finish" or path.name.startswith(what)
        if hit and when == "before":
            _die()
        result = original(*arguments)
        if hit:
            _die()
        return result

    def only_at_the_step(*arguments: Any) -> Any:
        named = any(isinstance(each, Path) and f"{step:08d}" in str(each) for each in arguments)
        return dying(*arguments) if named else original(*arguments)

    setattr(module, "write_pieces" if what in ("weights", "optimizer") else what, only_at_the_step)


def infinite_loss_with_row(rank: int, *rows: int) -> None:
    """Make the loss of the micro-batches of a step infinite where the step has one of these rows of the data."""
    from pldr_train.training.module import PldrllmModule

    step, micro_batch_loss = PldrllmModule.training_step, PldrllmModule._micro_batch_loss
    hit = [False]

    def training_step(self: Any, batch: dict[str, Any], batch_idx: int) -> None:
        hit[0] = any(row in batch["cursors"][:, 0].tolist() for row in rows)
        step(self, batch, batch_idx)

    def loss(self: Any, *arguments: Any) -> torch.Tensor:
        value = micro_batch_loss(self, *arguments)
        return value + float("inf") if hit[0] else value

    PldrllmModule.training_step = training_step  # type: ignore[method-assign]
    PldrllmModule._micro_batch_loss = loss  # type: ignore[method-assign]


def infinite_loss_and_hold(rank: int, row: int, step: int, go: str) -> None:
    """Both of `infinite_loss_with_row` and `hold_step`."""
    infinite_loss_with_row(rank, row)
    hold_step(rank, step, go)


def small_files(rank: int, victim: int, most_bytes: int) -> None:
    """Have writes fail beyond a file's size, as on a full disk, from the first checkpoint on."""
    from pldr_train.training import saving

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    original = saving.CheckpointWrite

    def failing_write(*arguments: Any) -> Any:
        if rank == victim:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, resource.RLIM_INFINITY))
        return original(*arguments)

    saving.CheckpointWrite = failing_write  # type: ignore[attr-defined, assignment, misc]


def unreadable_after(rank: int, victim: int, steps: int) -> None:
    """Let the documents of one process end in an error after some steps."""
    if rank != victim:
        return
    from pldr_train.data.rows import loader
    from pldr_train.errors import DataError

    original, given = loader._MicroBatches._micro_batch, [0]

    def micro_batch(self: Any, index: int, streams: Any) -> Any:
        given[0] += 1
        if given[0] > steps * self._topology.micro_batches_per_step:
            raise DataError("part-1.parquet, row group 3: cannot be read")
        return original(self, index, streams)

    loader._MicroBatches._micro_batch = micro_batch  # type: ignore[method-assign]


def slow_steps(rank: int, seconds: float, flag: str) -> None:
    """Let each step take long, and tell of the first one."""
    from pldr_train.training.module import PldrllmModule

    original = PldrllmModule.training_step

    def training_step(self: Any, batch: dict[str, Any], batch_idx: int) -> None:
        original(self, batch, batch_idx)
        Path(flag).touch()
        time.sleep(seconds)

    PldrllmModule.training_step = training_step  # type: ignore[method-assign]


def hold_step(rank: int, step: int, go: str) -> None:
    """Hold the step that follows on `step` until a file is there, so that a fault comes before the run is over."""
    from pldr_train.training.module import PldrllmModule

    original = PldrllmModule.training_step

    def training_step(self: Any, batch: dict[str, Any], batch_idx: int) -> None:
        while self.global_step == step and not Path(go).exists():
            time.sleep(0.005)
        original(self, batch, batch_idx)

    PldrllmModule.training_step = training_step  # type: ignore[method-assign]
