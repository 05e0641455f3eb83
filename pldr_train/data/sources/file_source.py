"""Read documents of Parquet files by number, wherever the files lie.

A `FileAccess` opens the files of a manifest: on the disk (`LocalFiles`), in a repository of the Hub (`HubFiles`), or
as Parquet copies of another format (`ConvertedFiles`). `count_rows` counts what a run's intervals need, `FileSource`
reads documents.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq
from typing_extensions import override

from pldr_train.data.documents import DocumentBlock, DocumentSource, Unreadable
from pldr_train.data.sources.manifest import Manifest, Place, SourceFile, run_lengths
from pldr_train.data.sources.text_formats import UnusableFileError
from pldr_train.errors import DataError, first_line

_log = logging.getLogger(__name__)

DEFAULT_CACHE_BYTES = 64 * 1024**2
RAISE, SKIP = "raise", "skip"
MAX_GROUP_BYTES = 4 * 1024**3
"""Largest size of a row group's texts, uncompressed, as its footer says. Arrow's writers make some 100 MB."""
_COUNTING_THREADS = 16
_MOST_AT_ONCE = 500
_LOG_EVERY_S = 5.0


class FileAccess(Protocol):
    """Opens the files of a manifest. Safe to copy into other processes and to call from threads."""

    def footer(self, file: SourceFile) -> pq.FileMetaData:
        """Return the Parquet footer of a file.

        Raises OSError or ArrowException if the file is missing or no Parquet, and DataError for what is no fault of the
        file (a network that stays down).
        """

    def open(self, file: SourceFile) -> AbstractContextManager[pq.ParquetFile]:
        """Open the file to read row groups. Raises as `footer`."""

    def describe(self, file: SourceFile) -> str:
        """Return the file's place for messages: a path or an address."""


def count_rows(
    manifest: Manifest,
    access: FileAccess,
    until: int | None = None,
    on_bad: str = RAISE,
    warn: bool = True,
    clock: Callable[[], float] = time.monotonic,
) -> Manifest:
    """Count rows of the manifest's files from the front, until `until` documents are reached (None: of all files).

    With `on_bad` "skip", a file whose footer cannot be read or has no text column is noted and holds no documents;
    `warn` logs a warning of each.
    Otherwise raises DataError naming the file. A DataError of the access passes through.
    """
    first = manifest.num_counted
    files, documents, logged_at = list(manifest.files), manifest.num_documents, clock()
    with ThreadPoolExecutor(_COUNTING_THREADS) as pool:
        while first < len(files) and (until is None or documents < until):
            batch = files[first : first + _batch_size(files[:first], documents, until)]
            counted = list(pool.map(lambda file: _counted(file, manifest.text_column, access, on_bad), batch))
            for file in counted:
                if file.problem is not None and warn:
                    _log.warning(f"skipped: {file.problem}")
            files[first : first + len(batch)] = counted
            documents += sum(file.rows for file in counted)
            first += len(batch)
            if clock() - logged_at > _LOG_EVERY_S:
                logged_at = clock()
                _log.info(f"counting documents: {documents:,} in {first:,} of {len(files):,} files")
    return replace(manifest, files=tuple(files))


def _batch_size(counted: Sequence[SourceFile], documents: int, until: int | None) -> int:
    """Return how many files to count next. Files of a data set are mostly alike, so few are opened in vain."""
    if until is None or not counted or not documents:
        return _MOST_AT_ONCE if until is None else 1
    per_file = documents / len(counted)
    return max(1, min(_MOST_AT_ONCE, int((until - documents) / per_file)))


def _counted(file: SourceFile, text_column: str, access: FileAccess, on_bad: str) -> SourceFile:
    place = access.describe(file)
    try:
        footer = access.footer(file)
        problem = _column_problem(footer.schema.to_arrow_schema(), text_column, place)
    except (OSError, pa.ArrowException) as error:
        footer, problem = None, unreadable_file(place, error)
    if problem is not None:
        if on_bad == SKIP:
            return replace(file, row_groups=(), problem=problem)
        raise DataError(f"{problem}; or set data.on_bad_shard=skip to leave the file out")
    rows = (footer.row_group(group).num_rows for group in range(footer.num_row_groups))
    return replace(file, row_groups=run_lengths(rows))


def _column_problem(schema: pa.Schema, text_column: str, place: str) -> str | None:
    if text_column not in schema.names:
        return (
            f"{place}: no column {text_column!r} (data.text_column); its columns are {', '.join(schema.names)}; "
            "set data.text_column to the one that holds the text"
        )
    column_type = schema.field(text_column).type
    if not _holds_text(column_type):
        return (
            f"{place}: column {text_column!r} (data.text_column) has type {column_type}, not string; "
            "set data.text_column to a text column"
        )
    return None


def _holds_text(column_type: pa.DataType) -> bool:
    """Tell whether a column holds texts. Categories of texts do, and a column without any value."""
    if pa.types.is_dictionary(column_type):
        return _holds_text(column_type.value_type)
    kinds = pa.types
    texts = kinds.is_string, kinds.is_large_string, kinds.is_string_view
    others = kinds.is_binary, kinds.is_large_binary, kinds.is_binary_view, kinds.is_null
    return any(is_kind(column_type) for is_kind in (*texts, *others))


def read_texts(file: pq.ParquetFile, group: int, text_column: str) -> pa.LargeBinaryArray:
    """Return the bytes of a row group's texts; null for a missing one.

    Raises OSError for a row group that is too large to be read at once, and what Arrow raises.
    """
    schema, footer = file.schema_arrow, file.metadata.row_group(group)
    if text_column in schema.names:
        # The columns of a footer are leaves. A text column has one, of its own name.
        sizes = (footer.column(index) for index in range(footer.num_columns))
        size = sum(each.total_uncompressed_size for each in sizes if each.path_in_schema == text_column)
        if size > MAX_GROUP_BYTES:
            raise OSError(f"its texts take {size:,} bytes, more than {MAX_GROUP_BYTES:,} can be read at once")
    # Threads inside Arrow would outnumber the cores: each data-loading worker is one thread.
    column = file.read_row_group(group, columns=[text_column], use_threads=False).column(0)
    if pa.types.is_dictionary(column.type):
        column = pa.chunked_array([chunk.dictionary_decode() for chunk in column.chunks], column.type.value_type)
    if pa.types.is_string_view(column.type):
        column = column.cast(pa.large_string())
    # Bytes, since the reader corrects text that is no UTF-8. Large, since a row group may exceed 2 GiB.
    return column.cast(pa.large_binary()).combine_chunks()


def unreadable_file(place: str, error: Exception) -> str:
    """Return the message that a file, or a part of it, cannot be read."""
    if isinstance(error, UnusableFileError):
        return f"{place}: {error}"
    if isinstance(error, FileNotFoundError):
        return f"{place}: not a readable Parquet file (no such file); it has vanished: put it back"
    return (
        f"{place}: not a readable Parquet file ({first_line(error)}); it may be truncated or damaged: fetch it again "
        "or remove it"
    )


class FileSource(DocumentSource):
    """The text column of a manifest's Parquet files. Documents are numbered through the files in order.

    A read decodes only the text column of the row groups it touches.

    Args:
        manifest: the files, counted as far as documents are read.
        access: opens them.
        on_bad: "raise" a DataError for a row group that cannot be read, or "skip" its documents and list them.
        cache_bytes: decoded row groups kept in memory, at least one.
    """

    def __init__(
        self, manifest: Manifest, access: FileAccess, on_bad: str = RAISE, cache_bytes: int = DEFAULT_CACHE_BYTES
    ) -> None:
        self.manifest, self.access = manifest, access
        self._on_bad, self._cache_bytes = on_bad, cache_bytes
        self._left_out: dict[int, Unreadable] = {}
        self._reset_cache()

    def _reset_cache(self) -> None:
        self._cache: OrderedDict[tuple[int, int], pa.LargeBinaryArray] = OrderedDict()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_cache", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset_cache()

    @property
    def num_documents(self) -> int:
        """Number of documents of the counted files."""
        return self.manifest.num_documents

    @override
    def fingerprint(self, start: int, stop: int) -> dict[str, Any]:
        """Return names (without their folder), sizes and rows of the files."""
        return self.manifest.fingerprint(start, stop)

    @override
    def leave_out(self, unreadable: Sequence[Unreadable]) -> None:
        self._left_out.update({part.start: part for part in unreadable})

    @override
    def read(self, start: int, stop: int) -> DocumentBlock:
        assert 0 <= start <= stop <= self.num_documents, (start, stop, self.num_documents)
        first, parts = start, []
        unreadable: list[Unreadable] = []
        while start < stop:
            place = self.manifest.locate(start)
            end = min(stop, place.group_stop)
            column = self._row_group_or_none(place, unreadable)
            if column is None:
                parts.append(pa.nulls(end - start, pa.large_binary()))
            else:
                parts.append(column.slice(start - place.group_start, end - start))
            start = end
        raw = parts[0] if len(parts) == 1 else pa.concat_arrays(parts or [pa.nulls(0, pa.large_binary())])
        return DocumentBlock(first, raw, tuple(unreadable))

    def _row_group_or_none(self, place: Place, unreadable: list[Unreadable]) -> pa.LargeBinaryArray | None:
        known = self._left_out.get(place.group_start)
        if known is not None:
            unreadable.append(known)
            return None
        try:
            return self._row_group(place)
        except (OSError, pa.ArrowException, IndexError) as error:
            file = self.manifest.files[place.file]
            problem = unreadable_file(f"{self.access.describe(file)}, row group {place.group}", error)
            if self._on_bad != SKIP:
                raise DataError(f"{problem}, or set data.on_bad_shard=skip to leave out what cannot be read") from error
            where = f"{file.name}, row group {place.group}"
            unreadable.append(Unreadable(place.group_start, place.group_stop, where, first_line(error)))
            return None

    def _row_group(self, place: Place) -> pa.LargeBinaryArray:
        key = (place.file, place.group)
        with self._lock:
            if key in self._cache:
                self._cache.move_to_end(key)
                return self._cache[key]
        with self.access.open(self.manifest.files[place.file]) as file:
            column = read_texts(file, place.group, self.manifest.text_column)
        if len(column) != place.group_stop - place.group_start:
            raise OSError(f"holds {len(column)} rows, not {place.group_stop - place.group_start} as at the run's start")
        with self._lock:
            self._cache[key] = column
            while len(self._cache) > 1 and sum(kept.nbytes for kept in self._cache.values()) > self._cache_bytes:
                self._cache.popitem(last=False)
        return column
