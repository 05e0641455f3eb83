"""Rows to batches: the cursors of all lanes, the loader of training batches and that of the validation rows.

A process takes every world_size-th micro-batch. Its data-loading worker w of n takes the process' micro-batches m with
m % n == w. If num_lanes is a multiple of n * world_size * micro_batch_size, all rows of a lane go to the same worker,
and no worker tokenises documents of another one.
"""

from __future__ import annotations

import atexit
import math
import signal
from collections.abc import Generator, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import count, islice
from typing import Any, TypedDict
from weakref import WeakSet

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from pldr_train.data.documents import TokenReader, Unreadable
from pldr_train.data.rows.lanes import Cursor, LaneLayout, micro_batch_rows
from pldr_train.data.rows.packing import COUNTERS, LaneStream, RowRules
from pldr_train.data.rows.reading_ahead import ReadingAhead
from pldr_train.errors import CheckpointError, DataError, UserError
from pldr_train.printing import Terminal, log_as_parent, terminal_of_messages

_PREFETCHED_MICRO_BATCHES = 4
_GRACE_S = 60
_COLUMNS = 4 + len(COUNTERS)


class TrainBatch(TypedDict):
    """One process' share of an optimizer step, rows in the order of their numbers."""

    input_ids: torch.Tensor
    """(rows, context_length + 1) int64"""
    cursors: torch.Tensor
    """(rows, 5 + len(COUNTERS)) int64: row number, its lane; epoch, document, offset where the lane's next row begins;
    and the counts of the documents that the lane has begun"""
    unreadable: list[Unreadable]
    """Documents that could not be read, and were skipped, before these rows."""


class LaneState:
    """How far each lane was trained on: rows taken, the cursor of the next row, and counts of its documents.

    The trainer updates it with the cursors of a batch after training on it, so that a resume neither skips nor repeats
    rows that a loader read ahead. Several processes update a copy each, and `merged` joins the copies.
    """

    def __init__(self, num_lanes: int) -> None:
        self._table = torch.zeros(num_lanes, _COLUMNS, dtype=torch.int64)  # rows; epoch, document, offset; counts
        self._unreadable: dict[int, Unreadable] = {}

    @property
    def num_lanes(self) -> int:
        """Number of lanes."""
        return len(self._table)

    @property
    def rows_consumed(self) -> int:
        """Number of rows trained on over all lanes. It is also the number of the run's next row."""
        return int(self._table[:, 0].sum())

    @property
    def unreadable(self) -> tuple[Unreadable, ...]:
        """Documents that were skipped because they could not be read, by number."""
        return tuple(self._unreadable[start] for start in sorted(self._unreadable))

    def cursor(self, lane: int) -> Cursor:
        """Return where the lane's next row begins."""
        epoch, document, offset = self._table[lane, 1:4].tolist()
        return Cursor(epoch, document, offset)

    def lane_counts(self, lane: int) -> NDArray[np.int64] | None:
        """Return (len(COUNTERS),) counts of the documents that a lane has begun; None before its first row."""
        if not self._table[lane, 0]:
            return None
        counts: NDArray[np.int64] = self._table[lane, 4:].numpy()
        return counts

    def counts(self) -> dict[str, int]:
        """Return the counts of the documents begun since the run's beginning, over all lanes and epochs."""
        return dict(zip(COUNTERS, self._table[:, 4:].sum(0).tolist(), strict=True))

    def clone(self) -> LaneState:
        """Return an independent copy."""
        copy = LaneState(self.num_lanes)
        copy._table.copy_(self._table)
        copy._unreadable = dict(self._unreadable)
        return copy

    def update(self, cursors: torch.Tensor, unreadable: Iterable[Unreadable] = ()) -> list[Unreadable]:
        """Record rows trained on, as in TrainBatch, rows of a lane in ascending order and without a gap.

        Returns the entries of `unreadable` that are new.
        """
        for row, lane, *position in cursors.tolist():
            taken = int(self._table[lane, 0])
            assert row == taken * self.num_lanes + lane, f"row {row} does not follow the {taken} rows of lane {lane}"
            self._table[lane] = torch.tensor([taken + 1, *position])
        new = [part for part in unreadable if part.start not in self._unreadable]
        self._unreadable.update({part.start: part for part in new})
        return sorted(set(new), key=lambda part: part.start)

    def merged(self, others: list[LaneState]) -> LaneState:
        """Return the state after the rows of this copy and of other processes' copies: the furthest of each lane."""
        result = self.clone()
        for other in others:
            further = other._table[:, 0] > result._table[:, 0]
            result._table[further] = other._table[further]
            result._unreadable |= other._unreadable
        return result

    def state_dict(self) -> dict[str, Any]:
        """Return plain types for a checkpoint. The state must be that of all processes, merged."""
        assert self._is_whole(), "a state of some processes' rows only: merge them first"
        return {
            "num_lanes": self.num_lanes,
            "rows_consumed": self.rows_consumed,
            "lanes": self._table.clone(),
            "unreadable": [[part.start, part.stop, part.place, part.reason] for part in self.unreadable],
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Any], num_lanes: int | None = None) -> LaneState:
        """Rebuild a state. Raises CheckpointError if it is malformed or, where given, not of `num_lanes` lanes."""
        table = state.get("lanes")
        if not isinstance(table, torch.Tensor) or table.ndim != 2 or table.shape[1] != _COLUMNS or len(table) == 0:
            raise CheckpointError("the checkpoint's data state has no table of lanes; resume from another checkpoint")
        if num_lanes is not None and len(table) != num_lanes:
            raise CheckpointError(
                f"the checkpoint's data state has {len(table)} lanes but data.num_lanes={num_lanes}; "
                f"set data.num_lanes to {len(table)}"
            )
        result = cls(len(table))
        result._table.copy_(table)
        result._unreadable = {part[0]: Unreadable(*part) for part in state.get("unreadable", ())}
        if not result._is_whole() or state.get("rows_consumed") != result.rows_consumed:
            raise CheckpointError("the checkpoint's data state contradicts itself; resume from another checkpoint")
        return result

    def _is_whole(self) -> bool:
        taken, lanes = self._table[:, 0], torch.arange(self.num_lanes)
        return torch.equal(taken, (self.rows_consumed - lanes + self.num_lanes - 1) // self.num_lanes)


@dataclass(frozen=True)
class RowSpec:
    """What makes the rows: the documents' tokens, the layout of the lanes, and how rows are cut."""

    reader: TokenReader
    layout: LaneLayout
    rules: RowRules

    def stream(
        self,
        lane: int,
        cursor: Cursor | None = None,
        counts: NDArray[np.int64] | None = None,
        ahead: ReadingAhead | None = None,
    ) -> LaneStream:
        """Return the rows of a lane from a cursor on."""
        return LaneStream(self.reader, self.layout, lane, self.rules, cursor, counts, ahead)


@dataclass(frozen=True)
class Topology:
    """What decides the rows of a process: its rank, the number of processes, batch and micro-batch size (rows)."""

    rank: int
    world_size: int
    batch_size: int
    micro_batch_size: int

    @property
    def micro_batches_per_step(self) -> int:
        """Number of micro-batches of one process in an optimizer step."""
        return self.batch_size // (self.world_size * self.micro_batch_size)


_MicroBatch = tuple[NDArray[np.int64], NDArray[np.int64], list[Unreadable]]
"""Token ids, cursors and unreadable documents, as in TrainBatch."""


class _MicroBatches(IterableDataset[Any]):
    """Micro-batches of one process; in worker w of n, those with number m % n == w.

    A user error is yielded as its message, since a DataLoader would wrap it into a worker's traceback. Rows are yielded
    as arrays, which workers send through a pipe. Tensors would go through shared memory: if that is too small, as in
    many containers, a worker drops them silently and the run waits for ever.
    """

    def __init__(self, rows: RowSpec, topology: Topology, state: LaneState) -> None:
        self._rows, self._topology, self._state = rows, topology, state

    def __iter__(self) -> Iterator[_MicroBatch | str]:
        info = get_worker_info()
        worker, num_workers = (info.id, info.num_workers) if info else (0, 1)
        # What the run has skipped stays skipped: its rows depend on it.
        self._rows.reader.leave_out(self._state.unreadable)
        try:
            streams = self._open_streams(worker, num_workers)
            for index in count(worker, num_workers):
                yield self._micro_batch(index, streams)
        except UserError as error:
            if info is None:
                raise
            yield str(error)

    def _row_numbers(self, index: int) -> range:
        topology = self._topology
        return micro_batch_rows(
            self._state.rows_consumed,
            index,
            rank=topology.rank,
            world_size=topology.world_size,
            micro_batch_size=topology.micro_batch_size,
        )

    def _open_streams(self, worker: int, num_workers: int) -> dict[int, LaneStream]:
        """Open this worker's lanes in the order of their first rows, and begin to read the first block of each."""
        state, streams = self._state, dict[int, LaneStream]()
        ahead = ReadingAhead(self._rows.reader.reading_threads)
        for index in count(worker, num_workers):
            lanes = [row % state.num_lanes for row in self._row_numbers(index)]
            if all(lane in streams for lane in lanes):
                return streams
            for lane in lanes:
                if lane not in streams:
                    streams[lane] = self._rows.stream(lane, state.cursor(lane), state.lane_counts(lane), ahead)
        raise AssertionError("unreachable")

    def _micro_batch(self, index: int, streams: dict[int, LaneStream]) -> _MicroBatch:
        numbers = self._row_numbers(index)
        input_ids = np.empty((len(numbers), self._rows.rules.context_length + 1), dtype=np.int64)
        cursors = np.empty((len(numbers), _COLUMNS + 1), dtype=np.int64)
        unreadable: list[Unreadable] = []
        for slot, number in enumerate(numbers):
            lane = number % self._state.num_lanes
            row = streams[lane].next_row()
            input_ids[slot] = row.tokens
            cursors[slot, 0], cursors[slot, 1], cursors[slot, 2:] = number, lane, row.position
            unreadable += row.unreadable
        return input_ids, cursors, unreadable


class TrainLoader:
    """Endless TrainBatch items, one per optimizer step of this process.

    An iteration begins at the row after those that `state` has recorded by then. The sequence of global batches depends
    neither on world size nor on micro-batch size nor on `num_workers` (0: in this process). Raises DataError if a file
    of the source can no longer be read.
    """

    def __init__(self, rows: RowSpec, topology: Topology, state: LaneState, num_workers: int) -> None:
        lanes, owners = state.num_lanes, max(1, num_workers) * topology.world_size
        share = owners * topology.micro_batch_size
        # One owner takes the lanes in any order. Several must never share a lane.
        if owners > 1 and lanes % share:
            raise DataError(
                f"data.num_lanes={lanes} is not a multiple of {share}, the product of processes "
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
            options |= {
                "prefetch_factor": _PREFETCHED_MICRO_BATCHES,
                "worker_init_fn": partial(_begin_worker, terminal_of_messages()),
            }
        loader = DataLoader(dataset, batch_size=None, collate_fn=_identity, **options)
        try:
            micro_batches = iter(loader)
        except OSError as error:
            raise DataError(
                f"data.num_workers={self._num_workers}: the loader processes cannot be started "
                f"({error.strerror or error}); is /dev/shm there, and is there room in it and for more processes? "
                "data.num_workers=0 does without them"
            ) from error
        while True:
            taken = list(islice(micro_batches, self._topology.micro_batches_per_step))
            for item in taken:
                if isinstance(item, str):
                    raise DataError(item)
            input_ids, cursors, unreadable = zip(*taken, strict=True)
            yield TrainBatch(
                input_ids=torch.from_numpy(np.concatenate(input_ids) if len(input_ids) > 1 else input_ids[0]),
                cursors=torch.from_numpy(np.concatenate(cursors) if len(cursors) > 1 else cursors[0]),
                unreadable=[part for found in unreadable for part in found],
            )


def _identity(item: Any) -> Any:
    return item


def _begin_worker(terminal: Terminal | None, _worker: int) -> None:
    _outlive_signals()
    log_as_parent(terminal)


def _outlive_signals() -> None:
    """Keep a worker alive for a while after a signal: schedulers signal every process, and the trainer must still save.

    A worker normally ends with its loader, or some seconds after its process. The alarm ends one that is stuck.
    """
    for number in (signal.SIGINT, signal.SIGHUP):  # sent by a terminal to all its processes
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_GRACE_S))


_running: WeakSet[Generator[TrainBatch, None, None]] = WeakSet()


@atexit.register
def _end_running_loaders() -> None:
    """End the workers before multiprocessing's own exit hook, which would wait out their grace period."""
    for batches in list(_running):
        with suppress(ValueError):  # still executing in another thread
            batches.close()


class ValidationBatch(TypedDict):
    """One process' micro-batch of validation rows."""

    input_ids: torch.Tensor
    """(rows, context_length + 1) int64"""
    row_mask: torch.Tensor
    """(rows,) bool: False for a repeated row that only fills up, so that all processes take equally many steps"""


class ValidationLoader:
    """A process' share of fixed validation rows, kept in memory: rows rank, rank + world_size, ..."""

    def __init__(self, rows: torch.Tensor, num_own: int, micro_batch_size: int) -> None:
        self._rows, self._num_own, self._micro_batch_size = rows, num_own, micro_batch_size

    def __len__(self) -> int:
        return math.ceil(len(self._rows) / self._micro_batch_size)

    def __iter__(self) -> Iterator[ValidationBatch]:
        mask = torch.arange(len(self._rows)) < self._num_own
        for start in range(0, len(self._rows), self._micro_batch_size):
            part = slice(start, start + self._micro_batch_size)
            yield ValidationBatch(input_ids=self._rows[part].long(), row_mask=mask[part])


def build_validation_loader(
    spec: RowSpec, *, max_rows: int, micro_batch_size: int, rank: int = 0, world_size: int = 1
) -> ValidationLoader:
    """Pack the first `max_rows` rows of the documents that `spec.layout` spans, in one pass; fewer if they end earlier.

    The layout must have one lane and no shuffle. Raises DataError if the documents do not fill one row.
    """
    assert spec.layout.num_lanes == 1
    assert not spec.layout.shuffle
    own: list[NDArray[np.int32]] = []
    total = 0
    for row in _rows_of_one_pass(spec, max_rows):
        if total % world_size == rank or total == 0:
            own.append(row)
        total += 1
    if total == 0:
        start, stop = spec.layout.start, spec.layout.stop
        which = f"data.validation_documents={[start, stop]}"
        if spec.layout.numbering is not None:
            which = f"the {spec.layout.num_documents:,} validation documents that were chosen of [{start}, {stop})"
        raise DataError(
            f"{which} do not fill one row of "
            f"data.context_length + 1 = {spec.rules.context_length + 1} tokens; give more documents or a larger "
            "data.validation_fraction, or shorten data.context_length"
        )
    first, own = own[0], own if rank == 0 else own[1:]
    num_own, num_steps = len(own), -(-total // world_size)
    rows = torch.from_numpy(np.stack([*own, *[first] * (num_steps - num_own)]))
    return ValidationLoader(rows, num_own, micro_batch_size)


def _rows_of_one_pass(spec: RowSpec, max_rows: int) -> Iterator[NDArray[np.int32]]:
    stream = spec.stream(0)
    for _ in range(max_rows):
        row = stream.next_row()
        if row.cursor.epoch > 0:  # the cursor is at the row's last token (pack), or after its document (pad)
            return
        yield row.tokens
