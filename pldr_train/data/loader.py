"""Rows to batches: the cursors of all lanes, and a loader that yields one item per optimizer step.

A process takes every world_size-th micro-batch, and its data-loading worker w of n the micro-batches m of the process
with m % n == w. Where num_lanes is a multiple of n * world_size * micro_batch_size, a lane thus always meets the same
worker, and no worker has to tokenise what another one yields.
"""

from __future__ import annotations

import atexit
import signal
from collections.abc import Generator, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import count, islice
from typing import Any, TypedDict
from weakref import WeakSet

import numpy as np
import sentencepiece
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from pldr_train.data.lanes import Cursor, LaneLayout, micro_batch_rows
from pldr_train.data.packing import LaneStream
from pldr_train.data.sources import DocumentSource
from pldr_train.errors import CheckpointError, DataError, UserError

_PREFETCHED_MICRO_BATCHES = 4
_GRACE_S = 60


class TrainBatch(TypedDict):
    """One process' share of an optimizer step; rows stand in the order of their numbers."""

    input_ids: torch.Tensor
    """(rows, context_length + 1) int64"""
    cursors: torch.Tensor
    """(rows, 5) int64: row number, its lane, and epoch, document, offset where the lane's next row begins"""


class LaneState:
    """How far each lane was trained on: rows taken and the cursor of the next one.

    The trainer updates it with the cursors of a batch after training on it, so that a resume neither skips nor repeats
    what a loader read ahead. With several processes each may update its own copy; `merged` joins them.
    """

    def __init__(self, num_lanes: int) -> None:
        self._table = torch.zeros(num_lanes, 4, dtype=torch.int64)  # rows, epoch, document, offset

    @property
    def num_lanes(self) -> int:
        """Number of lanes."""
        return len(self._table)

    @property
    def rows_consumed(self) -> int:
        """Number of rows trained on over all lanes, which is the number of the run's next row."""
        return int(self._table[:, 0].sum())

    def cursor(self, lane: int) -> Cursor:
        """Where the lane's next row begins."""
        _, epoch, document, offset = self._table[lane].tolist()
        return Cursor(epoch, document, offset)

    def clone(self) -> LaneState:
        """A copy that later updates do not touch."""
        copy = LaneState(self.num_lanes)
        copy._table.copy_(self._table)
        return copy

    def update(self, cursors: torch.Tensor) -> None:
        """Record rows trained on; `cursors` as in TrainBatch, rows of a lane in ascending order and without a gap."""
        for row, lane, *position in cursors.tolist():
            taken = int(self._table[lane, 0])
            assert row == taken * self.num_lanes + lane, f"row {row} does not follow the {taken} rows of lane {lane}"
            self._table[lane] = torch.tensor([taken + 1, *position])

    def merged(self, others: list[LaneState]) -> LaneState:
        """The state after the rows of this copy and of other processes' copies: each lane's furthest."""
        result = self.clone()
        for other in others:
            further = other._table[:, 0] > result._table[:, 0]
            result._table[further] = other._table[further]
        return result

    def state_dict(self) -> dict[str, int | torch.Tensor]:
        """Plain types for a checkpoint; the state must be whole, that is, of all processes."""
        assert self._is_whole(), "a state of some processes' rows only: merge them first"
        return {"num_lanes": self.num_lanes, "rows_consumed": self.rows_consumed, "lanes": self._table.clone()}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any], num_lanes: int | None = None) -> LaneState:
        """Rebuild a state. Raises CheckpointError if it is malformed or, where given, not of `num_lanes` lanes."""
        table = state.get("lanes")
        if not isinstance(table, torch.Tensor) or table.ndim != 2 or table.shape[1] != 4 or len(table) == 0:
            raise CheckpointError("the checkpoint's data state has no table of lanes; resume from another checkpoint")
        if num_lanes is not None and len(table) != num_lanes:
            raise CheckpointError(
                f"the checkpoint's data state has {len(table)} lanes but data.num_lanes={num_lanes}; "
                f"set data.num_lanes to {len(table)}"
            )
        result = cls(len(table))
        result._table.copy_(table)
        if not result._is_whole() or state.get("rows_consumed") != result.rows_consumed:
            raise CheckpointError("the checkpoint's data state contradicts itself; resume from another checkpoint")
        return result

    def _is_whole(self) -> bool:
        taken, lanes = self._table[:, 0], torch.arange(self.num_lanes)
        return torch.equal(taken, (self.rows_consumed - lanes + self.num_lanes - 1) // self.num_lanes)


@dataclass(frozen=True)
class RowSpec:
    """What makes the rows: source, tokenizer, layout of the lanes, and tokens per row minus one."""

    source: DocumentSource
    tokenizer: sentencepiece.SentencePieceProcessor
    layout: LaneLayout
    context_length: int

    def stream(self, lane: int, cursor: Cursor | None = None) -> LaneStream:
        """Rows of a lane from a cursor on."""
        return LaneStream(self.source, self.tokenizer, self.layout, lane, self.context_length, cursor)


@dataclass(frozen=True)
class Topology:
    """Who takes which rows: this process among all, and the sizes of batch and micro-batch (rows)."""

    rank: int
    world_size: int
    batch_size: int
    micro_batch_size: int

    @property
    def micro_batches_per_step(self) -> int:
        """Number of micro-batches of one process in an optimizer step."""
        return self.batch_size // (self.world_size * self.micro_batch_size)


class _MicroBatches(IterableDataset[Any]):
    """Micro-batches of one process; in worker w of n, those with number m % n == w.

    A user's error is yielded as its message, since a DataLoader would wrap it into a worker's traceback.
    """

    def __init__(self, rows: RowSpec, topology: Topology, state: LaneState) -> None:
        self._rows, self._topology, self._state = rows, topology, state

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor] | str]:
        info = get_worker_info()
        worker, num_workers = (info.id, info.num_workers) if info else (0, 1)
        state, streams = self._state, dict[int, LaneStream]()
        try:
            for index in count(worker, num_workers):
                yield self._micro_batch(index, state, streams)
        except UserError as error:
            if info is None:
                raise
            yield str(error)

    def _micro_batch(
        self, index: int, state: LaneState, streams: dict[int, LaneStream]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        topology, num_lanes = self._topology, state.num_lanes
        numbers = micro_batch_rows(
            state.rows_consumed,
            index,
            rank=topology.rank,
            world_size=topology.world_size,
            micro_batch_size=topology.micro_batch_size,
        )
        input_ids = np.empty((len(numbers), self._rows.context_length + 1), dtype=np.int64)
        cursors = np.empty((len(numbers), 5), dtype=np.int64)
        for slot, row in enumerate(numbers):
            lane = row % num_lanes
            if lane not in streams:
                streams[lane] = self._rows.stream(lane, state.cursor(lane))
            input_ids[slot], cursor = streams[lane].next_row()
            cursors[slot] = (row, lane, *cursor)
        return torch.from_numpy(input_ids), torch.from_numpy(cursors)


class TrainLoader:
    """Endless TrainBatch items, one per optimizer step of this process.

    Every iteration begins at the row after those that `state` had recorded when the iteration began. The sequence of
    global batches depends on neither world size, nor micro-batch size, nor `num_workers` (0: in this process).
    Raises DataError if a file of the source can no longer be read.
    """

    def __init__(self, rows: RowSpec, topology: Topology, state: LaneState, num_workers: int) -> None:
        lanes = state.num_lanes
        owners = max(1, num_workers) * topology.world_size * topology.micro_batch_size
        if lanes % owners:
            raise DataError(
                f"data.num_lanes={lanes} is not a multiple of {owners}, the product of processes "
                f"({topology.world_size}), trainer.micro_batch_size={topology.micro_batch_size} and "
                f"data.num_workers={num_workers}; make it one, or lower one of these"
            )
        if topology.batch_size % (topology.world_size * topology.micro_batch_size):
            raise DataError(
                f"trainer.batch_size={topology.batch_size} is not a multiple of trainer.micro_batch_size="
                f"{topology.micro_batch_size} times {topology.world_size} processes; change one of them"
            )
        self._rows, self._topology, self._state, self._num_workers = rows, topology, state, num_workers

    def __iter__(self) -> Iterator[TrainBatch]:
        batches = self._batches()
        _running.add(batches)
        return batches

    def _batches(self) -> Generator[TrainBatch, None, None]:
        dataset = _MicroBatches(self._rows, self._topology, self._state.clone())
        # A generator of its own: a DataLoader draws a seed at its start, which must not move the run's random state.
        options: dict[str, Any] = {"generator": torch.Generator(), "num_workers": self._num_workers}
        if self._num_workers:
            options |= {"prefetch_factor": _PREFETCHED_MICRO_BATCHES, "worker_init_fn": _outlive_signals}
        micro_batches = iter(DataLoader(dataset, batch_size=None, **options))
        while True:
            parts = list(islice(micro_batches, self._topology.micro_batches_per_step))
            for part in parts:
                if isinstance(part, str):
                    raise DataError(part)
            input_ids, cursors = (
                torch.cat(tensors) if len(tensors) > 1 else tensors[0] for tensors in zip(*parts, strict=True)
            )
            yield TrainBatch(input_ids=input_ids, cursors=cursors)


def _outlive_signals(worker: int) -> None:
    """Let a worker go on for a while after a signal: schedulers signal every process, and the trainer must still save.

    A worker normally ends with its loader, or some seconds after its process; the delayed end is for one that is stuck.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_GRACE_S))


_running: WeakSet[Generator[TrainBatch, None, None]] = WeakSet()


@atexit.register
def _end_running_loaders() -> None:
    """End the workers before multiprocessing's own exit hook, which would wait out their grace period."""
    for batches in list(_running):
        with suppress(ValueError):  # still executing in another thread
            batches.close()
