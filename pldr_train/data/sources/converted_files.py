"""Convert JSON lines and plain text to Parquet in the cache, each file once and its text alone.

A compressed file of lines cannot be read from the middle, and its number of documents is not known. The copy is read
like any Parquet file.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from typing_extensions import override

from pldr_train.data.files import build_folder_atomically
from pldr_train.data.sources.file_source import FileAccess
from pldr_train.data.sources.manifest import SourceFile
from pldr_train.data.sources.text_formats import PlainText, UnusableFileError, check_key_occurs, read_blocks, texts_of
from pldr_train.file_locks import try_lock, wait_for_lock

_log = logging.getLogger(__name__)

FORMAT_VERSION = 1
ROWS_PER_GROUP = 1000
MAX_GROUP_BYTES = 32 * 1024**2
"""Row groups of large documents hold fewer rows."""

_MOST_AT_ONCE = 4
_LOG_FROM_BYTES = 64 * 1024**2
_LOG_EVERY_S = 5.0
_MAX_NAME_CHARACTERS = 100


class ConvertedFiles(FileAccess):
    """Files of JSON lines or of text (plain, gzip or zstd), read through Parquet copies.

    A file is converted when it is first opened, up to four files at a time, with about 100 MB in memory. The copy lies
    in `cache_dir/jsonl` or `cache_dir/text`. Its name depends on the text column, the separator of documents and the
    content: the file's digest, or without one its path, size and time of change.

    Args:
        fetch: returns the path of a file on the disk; it may download it first.
        text_column: the key that holds the text.
        cache_dir: where copies are kept.
        describe: returns a file's place for messages; None: its name.
        plain_text: how to cut files of plain text; None: they are JSON lines.
    """

    def __init__(
        self,
        fetch: Callable[[SourceFile], Path],
        text_column: str,
        cache_dir: Path,
        *,
        describe: Callable[[SourceFile], str] | None = None,
        plain_text: PlainText | None = None,
    ) -> None:
        folder = "jsonl" if plain_text is None else "text"
        self._fetch, self._text_column, self._folder = fetch, text_column, Path(cache_dir).absolute() / folder
        self._describe, self._plain_text = describe, plain_text
        self._reset()

    def _reset(self) -> None:
        self._conversions = threading.BoundedSemaphore(min(_MOST_AT_ONCE, os.cpu_count() or 1))

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_conversions"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    @override
    def footer(self, file: SourceFile) -> pq.FileMetaData:
        """Raise UnusableFileError for a fault of the file, DataError for one of the cache."""
        with self.open(file) as opened:
            return opened.metadata

    @override
    def open(self, file: SourceFile) -> pq.ParquetFile:
        """Raise as `footer`."""
        copy = self._copy(file)
        try:
            return pq.ParquetFile(copy)
        except (pa.ArrowException, FileNotFoundError):
            # The copy is at fault, not the file: the disk is damaged, or the cache was cleared just now.
            shutil.rmtree(copy.parent, ignore_errors=True)
            return pq.ParquetFile(self._copy(file))

    @override
    def describe(self, file: SourceFile) -> str:
        return file.name if self._describe is None else self._describe(file)

    def _copy(self, file: SourceFile) -> Path:
        """Return the path of the file's copy. Make the copy if there is none."""
        original = None
        if file.digest is None:
            original = self._fetch(file)
            status = original.stat()
            if status.st_size != file.size_bytes:
                raise UnusableFileError(
                    f"it has {status.st_size:,} bytes, not {file.size_bytes:,} as at the run's start; put it back"
                )
            identity = [str(original.resolve()), status.st_size, status.st_mtime_ns]
        else:
            identity = [file.digest]
        if self._plain_text is not None:
            identity = ["separator", self._plain_text.separator, *identity]
        parts = repr([FORMAT_VERSION, self._text_column, *identity]).encode()
        folder = self._folder / hashlib.blake2b(parts, digest_size=16).hexdigest()
        copy = folder / f"{Path(file.name).name[:_MAX_NAME_CHARACTERS]}.parquet"
        if not copy.exists():
            with self._conversions, _exclusive(folder, lambda: _log.info(f"{file.name}: another process converts it")):
                if not copy.exists():
                    self._convert(original or self._fetch(file), copy)
        return copy

    def _convert(self, original: Path, copy: Path) -> None:
        progress = _Progress(original)

        def fill(temporary: Path) -> None:
            given = () if self._plain_text is None else (self._plain_text,)
            convert(original, temporary / copy.name, self._text_column, progress.advance, *given)

        build_folder_atomically(copy.parent, fill)
        progress.end()


def convert(
    original: Path,
    target: Path,
    text_column: str,
    advance: Callable[[int, int], None],
    plain_text: PlainText | None = None,
) -> None:
    """Write the texts of a file as a Parquet file of one column. Each JSON line is a document.

    Args:
        original: the file, plain or compressed.
        target: the file to write; not atomically.
        text_column: the key, and the column's name.
        advance: is called now and then with the numbers of bytes read and of documents found.
        plain_text: how to cut a plain text; None: the file is of JSON lines.

    Raises:
        UnusableFileError: the file has a fault.
        OSError: the target cannot be written.
    """
    schema = pa.schema([(text_column, pa.large_string())])
    documents = nulls = 0
    options: dict[str, Any] = {"compression": "zstd", "use_dictionary": False, "write_statistics": False}
    with pq.ParquetWriter(target, schema, **options) as writer, ThreadPoolExecutor(1) as pool:
        written: Future[None] | None = None
        blocks = _texts_of_lines(original, text_column) if plain_text is None else plain_text.read(original)
        for read_bytes, texts in _whole_row_groups(blocks):
            if written is not None:
                written.result()
            # The column of strings may hold bytes that are no UTF-8. The reader replaces them.
            table = pa.table([texts.view(pa.large_string())], schema)
            written = pool.submit(writer.write_table, table, ROWS_PER_GROUP)
            documents, nulls = documents + len(texts), nulls + texts.null_count
            advance(read_bytes, documents)
        if written is not None:
            written.result()
    if nulls == documents and plain_text is None:
        check_key_occurs(original, text_column)


def _texts_of_lines(original: Path, text_column: str) -> Iterator[tuple[int, pa.LargeBinaryArray]]:
    for block in read_blocks(original):
        yield block.read_bytes, texts_of(block, text_column)


def _whole_row_groups(
    blocks: Iterator[tuple[int, pa.LargeBinaryArray]],
) -> Iterator[tuple[int, pa.LargeBinaryArray]]:
    """Yield the bytes read and the next documents: whole row groups, or a smaller one of large documents."""
    pending: list[pa.LargeBinaryArray] = []
    read_bytes = 0
    for read_bytes, found in blocks:
        pending.append(found)
        whole = sum(map(len, pending)) // ROWS_PER_GROUP * ROWS_PER_GROUP
        if whole:
            texts = pa.concat_arrays(pending)
            yield read_bytes, texts.slice(0, whole)
            pending = [texts.slice(whole)]
        if sum(texts.nbytes for texts in pending) >= MAX_GROUP_BYTES:
            yield read_bytes, pa.concat_arrays(pending)
            pending = []
    if any(map(len, pending)):
        yield read_bytes, pa.concat_arrays(pending)


@contextmanager
def _exclusive(folder: Path, waits: Callable[[], None]) -> Iterator[None]:
    """Let one thread of one process build a folder at a time. `waits` is called before waiting for another.

    On a file system without locks several may build it. That costs time only: a folder appears whole or not at all.
    """
    lock = folder.parent / f".{folder.name}.lock"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError:
        yield  # building reports the fault of the cache
        return
    try:
        if _locked(descriptor, waits):
            for leftover in folder.parent.glob(f".building-{folder.name}-*"):
                shutil.rmtree(leftover, ignore_errors=True)  # of a killed process: no other one runs
        yield
        with suppress(OSError):  # not after an error: a waiting process would hold another lock than a later one
            lock.unlink()
    finally:
        os.close(descriptor)


def _locked(descriptor: int, waits: Callable[[], None]) -> bool:
    try:
        if not try_lock(descriptor):
            waits()
            wait_for_lock(descriptor)
    except OSError:
        return False
    return True


class _Progress:
    """Log how far the conversion of a large file is."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._path, self._clock = path, clock
        self._size = path.stat().st_size
        self._begun_at = self._logged_at = clock()
        self._documents = 0
        if self._size >= _LOG_FROM_BYTES:
            _log.info(f"converting {path} ({self._size / 1e6:,.0f} MB) to Parquet, once")

    def advance(self, read_bytes: int, documents: int) -> None:
        self._documents, now = documents, self._clock()
        if now - self._logged_at >= _LOG_EVERY_S:
            self._logged_at = now
            share, speed = read_bytes / self._size, read_bytes / 1e6 / (now - self._begun_at)
            _log.info(f"converting {self._path.name}: {share:.0%}, {documents:,} documents, {speed:,.0f} MB/s")

    def end(self) -> None:
        if self._size >= _LOG_FROM_BYTES or self._logged_at > self._begun_at:
            _log.info(f"converted {self._path.name}: {self._documents:,} documents")
