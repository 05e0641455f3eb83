"""Read what `pldr-train data tokenize` wrote: documents as token ids, by their numbers in the source."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from pldr_train.data.documents import (
    UNREADABLE,
    EncodedDocuments,
    OpenBlock,
    TokenReader,
    Unreadable,
    open_in_runs,
)
from pldr_train.data.rows.split import Interval
from pldr_train.data.tokens.shards import (
    MANIFEST_FILE,
    TOKENIZER_FILE,
    UNFINISHED_FILE,
    WRITE_AGAIN,
    Shard,
    StoreManifest,
    open_shard,
    tokenizer_digest,
)
from pldr_train.errors import DataError

_CHECKING_THREADS = 16
_MAX_TOKENS_AT_ONCE = 8_000_000
"""Blocks up to this size are read whole, larger ones document by document when they are used."""


class TokenStore(TokenReader):
    """Reads a folder of tokens.

    No file stays open and nothing is mapped, so copies in other processes share nothing, and a file that vanishes gives
    an error with its name. Raises DataError if the folder is not of `pldr-train data tokenize`, is not finished, or
    lacks a file.
    """

    documents_at_once = 256
    """More are not faster, and a lane keeps as many in memory."""
    reading_threads = 0
    """Opening a block is so fast that threads cost more than they save."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.manifest = load_manifest(self.folder)
        check_files(self.folder, self.manifest)
        self._unreadable = {part.start: part for part in self.manifest.unreadable_parts}
        self._left_out: tuple[Unreadable, ...] = ()

    @property
    def documents(self) -> Interval:
        """Its documents [start, stop), in the source's numbering."""
        return self.manifest.documents

    @property
    def num_documents(self) -> int:
        """Number after its last document."""
        return self.manifest.documents[1]

    @property
    def tokenizer_path(self) -> Path:
        """The SentencePiece model that made the tokens."""
        return self.folder / TOKENIZER_FILE

    @override
    def fingerprint(self, start: int, stop: int) -> dict[str, Any]:
        """Return the source's own fingerprint."""
        return self.manifest.source.fingerprint(start, stop)

    @override
    def leave_out(self, unreadable: Sequence[Unreadable]) -> None:
        self._left_out = (*self._left_out, *unreadable)
        self._unreadable.update({part.start: part for part in unreadable})

    @override
    def open(self, ordinals: NDArray[np.int64]) -> OpenBlock:
        return open_in_runs(ordinals, self._open)

    def _open(self, ordinals: NDArray[np.int64]) -> _StoredBlock:
        start, stop = int(ordinals.min()), int(ordinals.max()) + 1
        self._check_inside(start, stop)
        unreadable = tuple(part for part in self._unreadable.values() if part.start < stop and part.stop > start)
        places, flags, tokens = self._read(start, stop)
        index = ordinals - start
        starts, lengths, flags = places[index], places[index + 1] - places[index], flags[index]
        for part in self._left_out:
            skipped = (ordinals >= part.start) & (ordinals < part.stop)
            lengths[skipped], flags[skipped] = 0, UNREADABLE
        return _StoredBlock(tokens, starts, lengths, flags, unreadable)

    def _check_inside(self, start: int, stop: int) -> None:
        first, last = self.documents
        if start < first or stop > last:
            raise DataError(
                f"data.path={self.folder} holds the documents [{first}, {last}), not [{start}, {stop}); set "
                "data.train_documents and data.validation_documents within them, or run `pldr-train data tokenize` "
                "with a larger --documents into another folder"
            )

    def _read(self, start: int, stop: int) -> tuple[NDArray[np.int64], NDArray[np.uint8], _Tokens]:
        """Return where each of the documents [start, stop) begins, their flags, and their tokens, end to end."""
        manifest = self.manifest
        places, flags = np.zeros(stop - start + 1, np.int64), np.empty(stop - start, np.uint8)
        slices: list[_ShardSlice] = []
        read: list[NDArray[Any]] = []
        for shard in manifest.shards_of(start, stop):
            first, last = max(start, shard.first), min(stop, shard.stop)
            layout = manifest.layout(shard)
            with open_shard(self.folder / shard.name, layout) as file:
                ends = file.ends(first - shard.first, last - shard.first)
                flags[first - start : last - start] = file.flags(first - shard.first, last - shard.first)
                slices.append(_ShardSlice(shard, int(places[first - start]), int(ends[0])))
                places[first - start : last - start + 1] = ends + (places[first - start] - ends[0])
                if places[last - start] <= _MAX_TOKENS_AT_ONCE:
                    read.append(np.empty(int(ends[-1] - ends[0]), layout.dtype))
                    file.tokens_into(read[-1], int(ends[0]))
        if places[-1] > _MAX_TOKENS_AT_ONCE:
            return places, flags, _OnDisk(self, slices)
        tokens = read[0] if len(read) == 1 else np.concatenate(read)
        self.check_ids(tokens, slices)
        return places, flags, _InMemory(tokens)

    def check_ids(self, tokens: NDArray[Any], slices: Sequence[_ShardSlice]) -> None:
        """Raise DataError for ids beyond the vocabulary. They would end a run inside a kernel."""
        if tokens.size and int(tokens.max()) >= self.manifest.vocab_size:
            names = " or ".join(str(self.folder / each.shard.name) for each in slices)
            raise DataError(
                f"{names}: damaged, it holds ids beyond the tokenizer's {self.manifest.vocab_size} pieces; "
                f"{WRITE_AGAIN} (pldr-train data verify {self.folder} tells which)"
            )


class _ShardSlice(NamedTuple):
    """The tokens of a block that lie in one shard."""

    shard: Shard
    start: int
    """Place of its first token in the block."""
    shard_start: int
    """Place of that token in the shard."""


class _Tokens(Protocol):
    """The tokens of a block, end to end in the order of document numbers."""

    def take(self, starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[Any]:
        """Return the tokens of documents that begin at these places, end to end, in the stored type."""


class _InMemory:
    def __init__(self, tokens: NDArray[Any]) -> None:
        self._tokens = tokens

    def take(self, starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[Any]:
        tokens = self._tokens
        found = [tokens[a:b] for a, b in zip(starts.tolist(), (starts + lengths).tolist(), strict=True)]
        return np.concatenate(found) if found else tokens[:0]


class _OnDisk:
    def __init__(self, store: TokenStore, slices: Sequence[_ShardSlice]) -> None:
        self._store, self._slices = store, slices

    def take(self, starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[Any]:
        store = self._store
        dtype = store.manifest.layout(self._slices[0].shard).dtype
        found = np.empty(int(lengths.sum()), dtype)
        targets = np.cumsum(lengths) - lengths
        holders = np.searchsorted([each.start for each in self._slices], starts, side="right") - 1
        for number in np.unique(holders):
            held, inside = self._slices[number], holders == number
            places = starts[inside] - held.start + held.shard_start
            with open_shard(store.folder / held.shard.name, store.manifest.layout(held.shard)) as file:
                file.documents_into(found, targets[inside], lengths[inside], places)
        store.check_ids(found, self._slices)
        return found


class _StoredBlock:
    def __init__(
        self,
        tokens: _Tokens,
        starts: NDArray[np.int64],
        lengths: NDArray[np.int64],
        flags: NDArray[np.uint8],
        unreadable: tuple[Unreadable, ...],
    ) -> None:
        self._tokens, self._starts, self._lengths, self._flags = tokens, starts, lengths, flags
        self.unreadable = unreadable

    def encode(self, first: int, last: int) -> EncodedDocuments:
        lengths = self._lengths[first:last]
        found = self._tokens.take(self._starts[first:last], lengths)
        return EncodedDocuments(found.astype(np.int32), lengths, self._flags[first:last])


def load_manifest(folder: Path) -> StoreManifest:
    """Return the manifest of a finished folder of tokens. Raises DataError as `TokenStore`; checks no other file."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; name one that `pldr-train data tokenize` wrote (data.path)")
    try:
        manifest = StoreManifest.load(folder / MANIFEST_FILE)
    except FileNotFoundError as error:
        if (folder / UNFINISHED_FILE).exists():
            raise DataError(
                f"{folder}: not finished; run the same `pldr-train data tokenize` again: it goes on where it stopped"
            ) from error
        raise DataError(
            f"{folder}: no folder of tokens, for it has no {MANIFEST_FILE}; name one that `pldr-train data tokenize` "
            "wrote (data.path)"
        ) from error
    if not manifest.shards:
        raise DataError(f"{folder / MANIFEST_FILE}: lists no shards; run the same `pldr-train data tokenize` again")
    return manifest


def check_files(folder: Path, manifest: StoreManifest) -> None:
    """Raise DataError for the first file of a folder of tokens that is missing or wrong.

    Of the shards only the sizes are checked.
    """
    problem = tokenizer_problem(folder, manifest)
    if problem is None:
        with ThreadPoolExecutor(_CHECKING_THREADS) as pool:
            sizes = pool.map(lambda shard: _size(folder / shard.name), manifest.shards)
            for shard, size in zip(manifest.shards, sizes, strict=True):
                if size != shard.num_bytes:
                    with open_shard(folder / shard.name, manifest.layout(shard)):
                        pass  # raises the error
    else:
        raise DataError(problem)


def tokenizer_problem(folder: Path, manifest: StoreManifest) -> str | None:
    """Return what is wrong with the tokenizer in a folder of tokens, or None."""
    path = folder / TOKENIZER_FILE
    try:
        found = tokenizer_digest(path.read_bytes())
    except OSError as error:
        return f"{path}: cannot be read ({error.strerror}); put the tokenizer back that the tokens were made with"
    if found != manifest.tokenizer_blake2b:
        return f"{path}: not the tokenizer that the tokens were made with; put that one back"
    return None


def _size(path: Path) -> int | None:
    try:
        return os.stat(path).st_size
    except OSError:
        return None
