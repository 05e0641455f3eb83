"""Documents to rows: cut a lane's endless stream of documents into rows of context_length + 1 token ids.

`pack` (as in the papers) puts documents end to end, each followed by EOS, without BOS. A row begins at the last token
of the row before, so every token but the first of a stream is a target exactly once. Nothing is dropped between
documents or epochs.

`pad` puts tokens of one document into a row. A long document continues in the next row in the same way. The rest of its
last row is id 0, which is no target.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from pldr_train.data.documents import (
    INVALID_UTF8,
    NULL,
    UNREADABLE,
    EncodedDocuments,
    OpenBlock,
    TokenReader,
    Unreadable,
)
from pldr_train.data.rows.lanes import Cursor, LaneLayout
from pldr_train.data.rows.reading_ahead import Fetched, ReadingAhead
from pldr_train.data.tokenizer.pieces import PAD_ID
from pldr_train.errors import DataError

COUNTERS = ("documents", "null", "empty", "invalid_utf8", "too_short", "too_long", "unreadable")
"""Counts of the documents that a lane has begun: all of them, then those of each kind."""
_READ_AHEAD_FROM = 0.75
"""The lane's next block is fetched after this share of the block: late, since a waiting block takes memory."""


@dataclass(frozen=True)
class RowRules:
    """How rows are made; lengths in tokens, of documents without their EOS."""

    context_length: int
    packing: Literal["pack", "pad"] = "pack"
    min_document_tokens: int | None = None
    max_document_tokens: int | None = None


class Row(NamedTuple):
    """One training row, and where its lane stands after it."""

    tokens: NDArray[np.int32]
    """(context_length + 1,) ids."""
    position: NDArray[np.int64]
    """(3 + len(COUNTERS),): the cursor's epoch, document and offset, then the counts."""
    unreadable: tuple[Unreadable, ...] = ()
    """Documents that could not be read, and were skipped, before this row."""

    @property
    def cursor(self) -> Cursor:
        """Where the lane's next row begins."""
        return Cursor(*self.position[:3].tolist())

    @property
    def counts(self) -> NDArray[np.int64]:
        """(len(COUNTERS),) of the documents that the lane has begun since the run's beginning."""
        return self.position[3:]


class _Rows(NamedTuple):
    """Consecutive rows of a lane."""

    tokens: NDArray[np.int32]
    """(rows, context_length + 1)"""
    positions: NDArray[np.int64]
    """(rows, 3 + len(COUNTERS)): epoch, document, offset of the cursor after the row, and the counts."""


class _Documents(NamedTuple):
    """Consecutive documents of a lane, without those that have no tokens."""

    tokens: NDArray[np.int32]
    starts: NDArray[np.int64]
    """(documents,) index of each one's first token in `tokens`."""
    positions: NDArray[np.int64]
    """(documents, 3 + len(COUNTERS)): epoch, document, offset of that first token in its document, and the counts."""


class LaneStream:
    """The rows of one lane from a cursor on. The first row costs reading one block, not all blocks before it.

    Args:
        reader: the documents' tokens.
        layout: which documents are the lane's, in which order.
        lane: number of the lane.
        rules: how rows are made of them.
        cursor: where the first row begins; None: at the lane's beginning.
        counts: (len(COUNTERS),) of the documents begun before; None: the lane has given no row yet.
        ahead: fetches the lane's first block at once and later ones in time; None: each when it is needed.
    """

    def __init__(
        self,
        reader: TokenReader,
        layout: LaneLayout,
        lane: int,
        rules: RowRules,
        cursor: Cursor | None = None,
        counts: NDArray[np.int64] | None = None,
        ahead: ReadingAhead | None = None,
    ) -> None:
        self._reader, self._layout, self._lane, self._rules = reader, layout, lane, rules
        self._ahead = ahead or ReadingAhead(0)
        self._counts = np.zeros(len(COUNTERS), np.int64) if counts is None else counts.copy()
        begun = counts is not None
        cursor = cursor or Cursor(0, 0, 0)
        # The cursor's document was counted with the row before the cursor, unless that row ended before the document.
        self._first_is_counted = begun and (rules.packing == "pack" or cursor.offset > 0)
        self._first_offset = cursor.offset
        self._unreadable: list[Unreadable] = []
        blocks = layout.blocks_from(lane, cursor)
        documents = self._documents(blocks, self._fetch(next(blocks)), cursor)
        self._chunks = _pack(documents, rules.context_length) if rules.packing == "pack" else self._pad(documents)
        self._rows = _Rows(
            np.empty((0, rules.context_length + 1), np.int32), np.empty((0, 3 + len(COUNTERS)), np.int64)
        )
        self._next = 0

    def next_row(self) -> Row:
        """Return the lane's next row. Its tokens are a view that stays valid. Raises DataError as the reader does."""
        while self._next == len(self._rows.tokens):
            self._rows, self._next = next(self._chunks), 0
        index = self._next
        self._next += 1
        unreadable: tuple[Unreadable, ...] = ()
        if self._unreadable:
            unreadable, self._unreadable = tuple(self._unreadable), []
        return Row(self._rows.tokens[index], self._rows.positions[index], unreadable)

    def _fetch(self, block: tuple[int, int, NDArray[np.int64]]) -> _ComingBlock:
        epoch, first_place, ordinals = block
        return _ComingBlock(epoch, first_place, len(ordinals), self._ahead.fetch(lambda: self._reader.open(ordinals)))

    def _documents(
        self, blocks: Iterator[tuple[int, int, NDArray[np.int64]]], coming: _ComingBlock, cursor: Cursor
    ) -> Iterator[_Documents]:
        """Yield the lane's documents from the cursor's on, some at a time. The first begins at the cursor's offset."""
        skip = cursor.document % self._layout.window
        watch = _EmptyEpochs(self._layout, self._lane, self._rules, cursor.epoch, whole=cursor.document == 0)
        while True:
            opened = coming.opened.result()
            self._unreadable += opened.unreadable
            following: _ComingBlock | None = None
            for first in range(skip, coming.size, self._reader.documents_at_once):
                last = min(coming.size, first + self._reader.documents_at_once)
                if following is None and last >= _READ_AHEAD_FROM * coming.size:
                    following = self._fetch(next(blocks))
                documents = self._kept(opened.encode(first, last), coming.epoch, coming.first_place + first)
                watch.see(coming.epoch, len(documents.tokens) - len(documents.starts) * (self._rules.packing == "pad"))
                yield documents
            skip = 0
            coming = following or self._fetch(next(blocks))
            del opened

    def _kept(self, encoded: EncodedDocuments, epoch: int, first_place: int) -> _Documents:
        """Drop the documents that the rules drop, count all, and cut the first one at the cursor."""
        tokens, lengths = encoded.tokens, encoded.lengths
        found = _counted(encoded, self._rules)
        dropped = (found[:, COUNTERS.index("too_short")] | found[:, COUNTERS.index("too_long")]) > 0
        if dropped.any():
            tokens = tokens[~np.repeat(dropped, lengths)]
            lengths = np.where(dropped, 0, lengths)
        if self._first_is_counted:
            found[0], self._first_is_counted = 0, False
        counts = self._counts + found.cumsum(0)
        self._counts = counts[-1]
        positions = np.empty((len(lengths), 3 + len(COUNTERS)), np.int64)
        positions[:, 0], positions[:, 1], positions[:, 2] = epoch, np.arange(first_place, first_place + len(lengths)), 0
        positions[:, 3:] = counts
        starts = np.cumsum(lengths) - lengths
        kept = lengths > 0
        starts, positions = starts[kept], positions[kept]
        if self._first_offset and lengths[0]:  # it may have become unreadable since then
            tokens, starts = tokens[self._first_offset :], np.maximum(starts - self._first_offset, 0)
            positions[0, 2] = self._first_offset
        self._first_offset = 0
        return _Documents(tokens, starts, positions)

    def _pad(self, chunks: Iterator[_Documents]) -> Iterator[_Rows]:
        """Yield rows of one document each."""
        length = self._rules.context_length
        for documents in chunks:
            stops = np.append(documents.starts, len(documents.tokens))[1:]
            for start, stop, position in zip(documents.starts, stops, documents.positions, strict=True):
                num_rows = -(-(stop - start - 1) // length)
                if num_rows < 1:
                    continue  # a lone EOS predicts nothing
                padded = np.full(num_rows * length + 1, PAD_ID, np.int32)
                padded[: stop - start] = documents.tokens[start:stop]
                positions = np.tile(position, (num_rows, 1))
                positions[:, 2] += length * np.arange(1, num_rows + 1)
                positions[-1, 1:3] = position[1] + 1, 0
                yield _Rows(sliding_window_view(padded, length + 1)[::length], positions)


class _ComingBlock(NamedTuple):
    epoch: int
    first_place: int
    size: int
    opened: Fetched[OpenBlock]


class _EmptyEpochs:
    """Raise DataError for a lane whose documents give no row. It would be read for ever."""

    def __init__(self, layout: LaneLayout, lane: int, rules: RowRules, epoch: int, whole: bool) -> None:
        self._layout, self._lane, self._rules, self._epoch = layout, lane, rules, epoch
        self._tokens = 0 if whole else 1  # an epoch that begins in the middle proves nothing

    def see(self, epoch: int, tokens: int) -> None:
        if epoch != self._epoch:
            if self._tokens == 0:
                limits = {
                    "data.min_document_tokens": self._rules.min_document_tokens,
                    "data.max_document_tokens": self._rules.max_document_tokens,
                }
                causes = [f"{key}={value}" for key, value in limits.items() if value is not None]
                raise DataError(
                    f"lane {self._lane} of {self._layout.num_lanes} (data.num_lanes) finds no usable document in "
                    f"[{self._layout.start}, {self._layout.stop}): its documents are all empty, unreadable or left out"
                    f"{' by ' + ' and '.join(causes) if causes else ''}; give more documents, fewer lanes or "
                    "wider limits"
                )
            self._epoch, self._tokens = epoch, 0
        self._tokens += tokens


def _counted(encoded: EncodedDocuments, rules: RowRules) -> NDArray[np.int64]:
    """Return (documents, len(COUNTERS)) 0 or 1: the counts that each document adds to."""
    found = np.zeros((len(encoded.lengths), len(COUNTERS)), np.int64)
    columns = dict(zip(COUNTERS, found.T, strict=True))
    lengths = encoded.lengths - 1  # without EOS
    readable = (encoded.flags & UNREADABLE) == 0
    columns["documents"][:] = 1
    columns["null"][:] = (encoded.flags & NULL) > 0
    columns["empty"][:] = readable & (lengths == 0) & (columns["null"] == 0)
    columns["invalid_utf8"][:] = (encoded.flags & INVALID_UTF8) > 0
    if rules.min_document_tokens is not None:
        columns["too_short"][:] = readable & (lengths < rules.min_document_tokens)
    if rules.max_document_tokens is not None:
        columns["too_long"][:] = readable & (lengths > rules.max_document_tokens)
    columns["unreadable"][:] = ~readable
    return found


def _pack(documents: Iterator[_Documents], context_length: int) -> Iterator[_Rows]:
    """Yield rows across documents. Tokens that do not fill a row wait for the next documents."""
    rest = next(documents)
    while True:
        num_rows = (len(rest.tokens) - 1) // context_length
        if num_rows > 0:
            # The cursor after a row is the place of its last token.
            ends = context_length * np.arange(1, num_rows + 1)
            holders = np.searchsorted(rest.starts, ends, side="right") - 1
            positions = rest.positions[holders]
            positions[:, 2] += ends - rest.starts[holders]
            yield _Rows(sliding_window_view(rest.tokens, context_length + 1)[::context_length][:num_rows], positions)
            first, cut = holders[-1], ends[-1]
            remaining = rest.positions[first:].copy()
            remaining[0, 2] += cut - rest.starts[first]
            rest = _Documents(rest.tokens[cut:], np.maximum(rest.starts[first:] - cut, 0), remaining)
        more = next(documents)
        rest = _Documents(
            np.concatenate((rest.tokens, more.tokens)),
            np.concatenate((rest.starts, more.starts + len(rest.tokens))),
            np.concatenate((rest.positions, more.positions)),
        )


def batch_digest(input_ids: torch.Tensor) -> str:
    """Return the hex digest (BLAKE2b, 16 bytes) of an integer tensor as little-endian int32 in row-major order."""
    ids = np.ascontiguousarray(input_ids.detach().cpu().numpy().astype("<i4"))
    return hashlib.blake2b(ids.tobytes(), digest_size=16).hexdigest()
