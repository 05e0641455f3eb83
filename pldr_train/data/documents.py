"""Blocks of documents, and the interfaces on both sides of the tokenizer.

A *source* reads documents as they are stored, by number. A *token reader* reads them as token ids: `LiveReader`
tokenises a source during training, `TokenStore` reads what was tokenised ahead. Packing knows readers only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import sentencepiece
from numpy.typing import NDArray
from typing_extensions import override

from pldr_train.data.tokenizer.pieces import END_ID

NULL, INVALID_UTF8, UNREADABLE = 1, 2, 4
"""Flags of a document: it has no text, it has bytes that are no UTF-8 (replaced by U+FFFD), it cannot be read."""


@dataclass(frozen=True)
class Unreadable:
    """Documents [start, stop), by number, that cannot be read and are skipped (`data.on_bad_shard: skip`)."""

    start: int
    stop: int
    place: str
    """File, and row group if the file has some."""
    reason: str


@dataclass(frozen=True)
class DocumentBlock:
    """Consecutive documents as they are stored."""

    start: int
    """Number of the first one."""
    raw: pa.LargeBinaryArray
    """UTF-8 bytes, one document an entry; null where there is none or it is unreadable."""
    unreadable: tuple[Unreadable, ...] = ()

    def texts(self) -> list[str]:
        """Return the documents' texts; null and unreadable ones are empty, invalid bytes become U+FFFD."""
        return [decode(raw)[0] for raw in self.raw.to_pylist()]


def decode(raw: bytes | None) -> tuple[str, int]:
    """Return the text of a stored document, and its flags (NULL or INVALID_UTF8)."""
    if raw is None:
        return "", NULL
    try:
        return raw.decode("utf-8"), 0
    except UnicodeDecodeError:
        return raw.decode("utf-8", errors="replace"), INVALID_UTF8


class DocumentSource(Protocol):
    """Documents in a fixed order, numbered from 0; safe to copy into other processes and to call from threads."""

    @property
    def num_documents(self) -> int:
        """Number of documents whose place is known. Only these may be read."""

    def read(self, start: int, stop: int) -> DocumentBlock:
        """Return the documents [start, stop), which must lie in [0, num_documents).

        Raises DataError naming file and row group if they cannot be read and shall not be skipped.
        """

    def leave_out(self, unreadable: Sequence[Unreadable]) -> None:
        """Skip these documents from now on. A run that has skipped them keeps to it, even if they are repaired."""

    def fingerprint(self, start: int, stop: int) -> dict[str, Any]:
        """Return what identifies the documents [start, stop), in plain types. A resumed run compares it."""


class EncodedDocuments(NamedTuple):
    """Some documents of a block as token ids, in the order of the block's ordinals."""

    tokens: NDArray[np.int32]
    """(n,) ids of all of them end to end, each document followed by EOS; an unreadable one has no token at all."""
    lengths: NDArray[np.int64]
    """(documents,) number of tokens, EOS included; 0 for an unreadable one."""
    flags: NDArray[np.uint8]
    """(documents,) NULL, INVALID_UTF8, UNREADABLE, or'ed."""


class OpenBlock(Protocol):
    """A block whose documents are in memory, or can be read from the disk at once."""

    @property
    def unreadable(self) -> tuple[Unreadable, ...]:
        """Its documents that are skipped."""

    def encode(self, first: int, last: int) -> EncodedDocuments:
        """Return the tokens of the documents ordinals[first:last]; the block was opened with `ordinals`."""


_FAR_DOCUMENTS = 256
"""A document this far after the one before begins another read; those in between are not read."""


def runs_of(ordinals: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Split the indices of the ordinals into runs, in the order of the corpus: a run's documents lie close together.

    Inside a run the indices keep their order.
    """
    order = np.argsort(ordinals, kind="stable")
    cuts = np.flatnonzero(np.diff(ordinals[order]) > _FAR_DOCUMENTS) + 1
    return [np.sort(run) for run in np.split(order, cuts)] if len(cuts) else [np.arange(len(ordinals))]


class JoinedBlock:
    """A block out of several, for documents that lie far apart.

    Args:
        runs: indices of the documents of each block among all.
        blocks: opened with them.
    """

    def __init__(self, runs: Sequence[NDArray[np.int64]], blocks: Sequence[OpenBlock]) -> None:
        self._blocks = blocks
        self._places = {int(index): (b, i) for b, run in enumerate(runs) for i, index in enumerate(run)}
        self.unreadable = tuple(part for block in blocks for part in block.unreadable)

    def encode(self, first: int, last: int) -> EncodedDocuments:
        """Concatenate what the blocks encode, in the order of the ordinals."""
        places = [self._places[index] for index in range(first, last)]
        encoded = [self._blocks[block].encode(index, index + 1) for block, index in places]
        empty = EncodedDocuments(np.empty(0, np.int32), np.empty(0, np.int64), np.empty(0, np.uint8))
        return EncodedDocuments(*(np.concatenate(each) for each in zip(*(encoded or [empty]), strict=True)))


def open_in_runs(ordinals: NDArray[np.int64], open_run: Callable[[NDArray[np.int64]], OpenBlock]) -> OpenBlock:
    """Open documents as one block: `open_run` gets those that lie close together."""
    runs = runs_of(ordinals)
    if len(runs) > 1:
        return JoinedBlock(runs, [open_run(ordinals[run]) for run in runs])
    return open_run(ordinals)


class TokenReader(Protocol):
    """Documents as token ids, by number; safe to copy into other processes and to call from threads."""

    @property
    def documents_at_once(self) -> int:
        """Best number of documents for one call of `encode`."""

    @property
    def reading_threads(self) -> int:
        """Best number of threads that open blocks before they are used; 0: opening is cheap."""

    def open(self, ordinals: NDArray[np.int64]) -> OpenBlock:
        """Fetch the documents of these numbers, in this order. This is the slow part of reading.

        Documents that lie far apart are read in the order of the corpus.

        Raises DataError as the source does.
        """

    def leave_out(self, unreadable: Sequence[Unreadable]) -> None:
        """Skip documents that the run has skipped before, as `DocumentSource.leave_out` does."""

    def fingerprint(self, start: int, stop: int) -> dict[str, Any]:
        """Return what the documents [start, stop) are, in plain types, however they are read."""


_EOS = np.array([END_ID], dtype=np.int32)


class LiveReader(TokenReader):
    """A reader that tokenises the documents of a source when they are read."""

    documents_at_once = 32
    """Few: the first row of a block waits for these."""
    reading_threads = 8
    """At the start every lane needs a block."""

    def __init__(self, source: DocumentSource, tokenizer: sentencepiece.SentencePieceProcessor) -> None:
        self.source, self.tokenizer = source, tokenizer

    @override
    def open(self, ordinals: NDArray[np.int64]) -> OpenBlock:
        return open_in_runs(ordinals, self._open)

    def _open(self, ordinals: NDArray[np.int64]) -> _LiveBlock:
        start = int(ordinals.min())
        block = self.source.read(start, int(ordinals.max()) + 1)
        # pa.array would import pandas, which takes a second and 60 MB in every process that reads.
        places = pa.Array.from_buffers(pa.int64(), len(ordinals), [None, pa.py_buffer(ordinals - start)])
        # Copy the documents: a slice would keep their whole row groups in memory.
        return _LiveBlock(self.tokenizer, ordinals, block.raw.take(places), block.unreadable)

    @override
    def leave_out(self, unreadable: Sequence[Unreadable]) -> None:
        self.source.leave_out(unreadable)

    @override
    def fingerprint(self, start: int, stop: int) -> dict[str, Any]:
        return self.source.fingerprint(start, stop)


class _LiveBlock:
    def __init__(
        self,
        tokenizer: sentencepiece.SentencePieceProcessor,
        ordinals: NDArray[np.int64],
        raw: pa.LargeBinaryArray,
        unreadable: tuple[Unreadable, ...],
    ) -> None:
        self._tokenizer, self._raw, self.unreadable = tokenizer, raw, unreadable
        self._skipped = np.zeros(len(ordinals), dtype=bool)
        for part in unreadable:
            self._skipped |= (ordinals >= part.start) & (ordinals < part.stop)

    def encode(self, first: int, last: int) -> EncodedDocuments:
        raws = self._raw.slice(first, last - first).to_pylist()
        tokens: list[NDArray[np.int32]] = []
        lengths, flags = np.zeros(len(raws), np.int64), np.zeros(len(raws), np.uint8)
        for index, raw in enumerate(raws):
            if self._skipped[first + index]:
                flags[index] = UNREADABLE
                continue
            text, flags[index] = decode(raw)
            # One text a call: a list would start threads at every call, which the data-loading workers must not.
            ids = np.asarray(self._tokenizer.encode(text, return_type="numpy", add_bos=False, add_eos=False), np.int32)
            lengths[index] = len(ids) + 1
            tokens += (ids, _EOS)
        return EncodedDocuments(np.concatenate(tokens) if tokens else np.empty(0, np.int32), lengths, flags)
