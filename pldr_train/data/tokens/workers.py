"""Processes that write shards of tokens, each whole or not at all."""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import sentencepiece
from numpy.typing import NDArray

from pldr_train.data.documents import INVALID_UTF8, NULL, UNREADABLE, EncodedDocuments, LiveReader, Unreadable
from pldr_train.data.files import sync_path, write_file_atomically
from pldr_train.data.sources.file_source import FileSource
from pldr_train.data.tokens.shards import Shard, ShardLayout, StoreManifest, header
from pldr_train.errors import DataError, UserError
from pldr_train.printing import Terminal, log_as_parent, terminal_of_messages
from pldr_train.untrusted import read_json

BUILDING_PREFIX = ".building-"
DISK_FIX = "free some space, and run the same command again: what is finished is kept"
_READ_DOCUMENTS = 256
_PATIENCE_S = 0.5
"""Longest time that a worker outlives its killed parent."""


@dataclass(frozen=True)
class Job:
    """The work of the workers, and its folder."""

    folder: Path
    manifest: StoreManifest
    source: FileSource
    tokenizer_model: bytes


class Advance(NamedTuple):
    """Documents and tokens done since the last report."""

    documents: int
    tokens: int


@dataclass(frozen=True)
class Finished:
    """A finished shard. Its description on the disk holds the same."""

    index: int
    shard: Shard
    unreadable_parts: tuple[Unreadable, ...]


def description_path(folder: Path, name: str) -> Path:
    """Return the path of the small file beside a finished shard, which stays until the folder is finished."""
    return folder / f"{name.partition('.')[0]}.json"


def read_description(path: Path) -> tuple[Shard, tuple[Unreadable, ...]] | None:
    """Read the description that `write_shard` wrote; None if it is missing or damaged."""
    try:
        content = read_json(path)
        parts = tuple(Unreadable(**part) for part in content["unreadable_parts"])
        return Shard.from_plain(content["shard"]), parts
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_shard(job: Job, reader: LiveReader, index: int, advance: Callable[[int, int], None]) -> Finished:
    """Tokenise the documents of a shard, write it, and then its description.

    `advance` is called with numbers of documents and tokens. Raises DataError if the documents cannot be read or the
    shard cannot be written; nothing is left of it then.
    """
    first, stop = job.manifest.shard_documents(index)
    path = job.folder / job.manifest.shard_name(index)
    building = path.with_name(f"{BUILDING_PREFIX}{path.name}-{os.getpid()}")
    writing = _Writing(first, stop, job.manifest.dtype_name)
    try:
        with building.open("w+b") as file:
            writing.begin(file)
            for start in range(first, stop, _READ_DOCUMENTS):
                ordinals = np.arange(start, min(start + _READ_DOCUMENTS, stop))
                block = reader.open(ordinals)
                writing.unreadable(block.unreadable)
                for at in range(0, len(ordinals), reader.documents_at_once):
                    encoded = block.encode(at, min(at + reader.documents_at_once, len(ordinals)))
                    writing.append(file, encoded)
                    advance(len(encoded.lengths), len(encoded.tokens))
            shard = writing.end(file, path.name)
        building.replace(path)
        parts = tuple(writing.parts.values())
        description = {"shard": asdict(shard), "unreadable_parts": [asdict(part) for part in parts]}
        content = json.dumps(description, ensure_ascii=False).encode()
        write_file_atomically(description_path(job.folder, path.name), content, fix=DISK_FIX)
        sync_path(job.folder)
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror or error}; {DISK_FIX}") from error
    finally:
        with suppress(OSError):
            building.unlink(missing_ok=True)
    return Finished(index, shard, parts)


class _Writing:
    """A shard while it is written: its tokens are in the file, the rest in memory until its end."""

    def __init__(self, first: int, stop: int, dtype_name: str) -> None:
        self._first, self._stop = first, stop
        self._layout = ShardLayout(stop - first, 0, dtype_name)
        self._lengths: list[NDArray[np.int64]] = []
        self._flags: list[NDArray[np.uint8]] = []
        self.parts: dict[int, Unreadable] = {}

    def begin(self, file: io.BufferedRandom) -> None:
        file.seek(self._layout.tokens_at)

    def append(self, file: io.BufferedRandom, encoded: EncodedDocuments) -> None:
        file.write(encoded.tokens.astype(self._layout.dtype).tobytes())
        self._lengths.append(encoded.lengths)
        self._flags.append(encoded.flags)

    def unreadable(self, parts: Sequence[Unreadable]) -> None:
        """Note the unreadable parts that lie in this shard."""
        for part in parts:
            start, stop = max(part.start, self._first), min(part.stop, self._stop)
            self.parts[start] = Unreadable(start, stop, part.place, part.reason)

    def end(self, file: io.BufferedRandom, name: str) -> Shard:
        """Write header, ends and flags, sync, and describe the shard."""
        lengths, flags = np.concatenate(self._lengths), np.concatenate(self._flags)
        layout = ShardLayout(len(lengths), int(lengths.sum()), self._layout.dtype_name)
        file.write(flags.tobytes())
        file.seek(0)
        file.write(header(layout))
        file.write(lengths.cumsum().astype("<u8").tobytes())
        file.flush()
        os.fsync(file.fileno())
        file.seek(0)
        null, unreadable = (flags & NULL) > 0, (flags & UNREADABLE) > 0
        return Shard(
            name=name,
            first=self._first,
            stop=self._stop,
            tokens=layout.tokens,
            num_bytes=layout.num_bytes,
            sha256=hashlib.file_digest(file, "sha256").hexdigest(),
            null=int(null.sum()),
            empty=int(((lengths == 1) & ~null).sum()),
            invalid_utf8=int(((flags & INVALID_UTF8) > 0).sum()),
            unreadable=int(unreadable.sum()),
        )


def write_shards(job: Job, indices: Sequence[int], num_workers: int) -> Iterator[Advance | Finished]:
    """Write shards in several processes, and yield their reports.

    Raises DataError if a worker raises a user error or is killed. The other workers are ended then.
    """
    # On Linux the loader's workers are forked too. Spawned ones would import everything again.
    context: Any = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    waiting = list(reversed(indices))
    workers: dict[Connection, Any] = {}
    try:
        for _ in range(min(num_workers, len(waiting))):
            ours, theirs = context.Pipe()
            worker = context.Process(target=_work, args=(job, theirs, os.getpid(), terminal_of_messages()), daemon=True)
            workers[ours] = worker
            worker.start()
            theirs.close()
            ours.send(waiting.pop())
        busy = set(workers)
        while busy:
            for ready in wait(list(busy)):
                assert isinstance(ready, Connection)
                report = _received(ready, workers[ready])
                yield report
                if isinstance(report, Finished):
                    if waiting:
                        with suppress(ConnectionError):  # the next receive reports it
                            ready.send(waiting.pop())
                    else:
                        busy.discard(ready)
    finally:
        for connection, worker in workers.items():
            if worker.pid is not None:
                worker.kill()  # SIGTERM is lost in a worker that is just being forked, and `join` then never returns
                worker.join()
            connection.close()


def _received(connection: Connection, worker: Any) -> Advance | Finished:
    try:
        report = connection.recv()
    except (EOFError, ConnectionError):
        worker.join()
        raise DataError(
            f"a worker was ended from outside (exit code {worker.exitcode}), perhaps for want of memory; run the same "
            "command again, with fewer --workers: what is finished is kept"
        ) from None
    if isinstance(report, _Failure):
        if report.is_users:
            raise DataError(report.text)
        raise RuntimeError(f"a worker failed:\n{report.text}")
    assert isinstance(report, Advance | Finished)
    return report


class _Failure(NamedTuple):
    is_users: bool
    text: str


def _work(job: Job, connection: Connection, parent: int, terminal: Terminal | None) -> None:
    """Write the shards whose numbers the parent sends, until it ends."""
    log_as_parent(terminal)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets Ctrl-C too, and ends its workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    reported_at = time.monotonic()
    documents = tokens = 0

    def advance(more_documents: int, more_tokens: int) -> None:
        nonlocal reported_at, documents, tokens
        documents, tokens = documents + more_documents, tokens + more_tokens
        if time.monotonic() - reported_at > _PATIENCE_S / 2:
            _exit_without(parent)
            connection.send(Advance(documents, tokens))
            documents, tokens, reported_at = 0, 0, time.monotonic()

    try:
        reader = LiveReader(job.source, sentencepiece.SentencePieceProcessor(model_proto=job.tokenizer_model))
        while True:
            while not connection.poll(_PATIENCE_S):
                _exit_without(parent)
            finished = write_shard(job, reader, connection.recv(), advance)
            connection.send(Advance(documents, tokens))
            documents = tokens = 0
            connection.send(finished)
    except UserError as error:
        connection.send(_Failure(True, str(error)))
    except (EOFError, BrokenPipeError):
        return  # the parent is gone
    except Exception:
        connection.send(_Failure(False, traceback.format_exc()))


def _exit_without(parent: int) -> None:
    if os.getppid() != parent:
        os._exit(1)
