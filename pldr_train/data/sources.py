"""Where documents come from: an interface of random access by global ordinal, and local Parquet files."""

from __future__ import annotations

import glob
import os
import threading
from bisect import bisect_right
from collections import OrderedDict
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from pldr_train.errors import DataError

DEFAULT_CACHE_BYTES = 64 * 1024**2


class DocumentSource(Protocol):
    """Documents in a fixed order, numbered from 0; safe to copy into other processes and to call from threads."""

    @property
    def num_documents(self) -> int:
        """Number of documents."""

    def read(self, start: int, stop: int) -> list[str]:
        """Texts of the documents [start, stop), which must lie in [0, num_documents)."""

    def fingerprint(self) -> dict[str, Any]:
        """What identifies the documents, in plain types: a resumed run compares it for equality."""


@dataclass(frozen=True)
class _File:
    path: Path
    name: str
    size_bytes: int
    row_group_stops: tuple[int, ...]
    """Ordinal in the file after the last row of each row group; empty groups are kept."""

    @property
    def rows(self) -> int:
        return self.row_group_stops[-1] if self.row_group_stops else 0


class ParquetSource:
    """The text column of local Parquet files; documents are numbered through the files in order of their names.

    `path` is a file, a folder (its *.parquet files, subfolders included) or a glob pattern. Row counts come from the
    files' footers; a read decodes only the text column of the row groups it touches. No file stays open, so that
    copies in other processes share nothing. A null text reads as "".

    Raises DataError for a path without Parquet files, an unreadable file, a missing or non-text column, and when there
    is no document at all.
    """

    def __init__(self, path: str | Path, text_column: str = "content", cache_bytes: int = DEFAULT_CACHE_BYTES) -> None:
        self._text_column = text_column
        self._cache_bytes = cache_bytes
        self._files = [_open_footer(file, name, text_column) for file, name in _resolve_files(str(path))]
        self._file_stops = list(accumulate(file.rows for file in self._files))
        if self.num_documents == 0:
            raise DataError(
                f"data.path={path}: empty corpus, its {len(self._files)} Parquet file(s) hold no rows; "
                "give files with documents"
            )
        self._reset_cache()

    def _reset_cache(self) -> None:
        self._cache: OrderedDict[tuple[int, int], pa.ChunkedArray] = OrderedDict()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_cache", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset_cache()

    @property
    def num_documents(self) -> int:
        """Number of rows of all files."""
        return self._file_stops[-1]

    def fingerprint(self) -> dict[str, Any]:
        """Text column and each file's name (without its folder), size in bytes and number of rows."""
        files = [{"name": file.name, "size_bytes": file.size_bytes, "rows": file.rows} for file in self._files]
        return {"kind": "parquet", "text_column": self._text_column, "files": files}

    def read(self, start: int, stop: int) -> list[str]:
        """Texts of the documents [start, stop). Raises DataError if a file can no longer be read."""
        assert 0 <= start <= stop <= self.num_documents, (start, stop, self.num_documents)
        texts: list[str] = []
        while start < stop:
            file_index = bisect_right(self._file_stops, start)
            file = self._files[file_index]
            file_start = self._file_stops[file_index] - file.rows
            group = bisect_right(file.row_group_stops, start - file_start)
            group_start = file_start + (file.row_group_stops[group - 1] if group else 0)
            group_stop = min(stop, file_start + file.row_group_stops[group])
            column = self._row_group(file_index, group)
            texts += [text or "" for text in column.slice(start - group_start, group_stop - start).to_pylist()]
            start = group_stop
        return texts

    def _row_group(self, file_index: int, group: int) -> pa.ChunkedArray:
        key = (file_index, group)
        with self._lock:
            if key in self._cache:
                self._cache.move_to_end(key)
                return self._cache[key]
        path = self._files[file_index].path
        try:
            # Threads inside Arrow would outnumber the cores: each data-loading worker is one thread.
            with pq.ParquetFile(path) as file:
                column = file.read_row_group(group, columns=[self._text_column], use_threads=False).column(0)
        except (OSError, pa.ArrowException, IndexError) as error:
            raise _unreadable(path, error) from error
        with self._lock:
            self._cache[key] = column
            while len(self._cache) > 1 and sum(kept.nbytes for kept in self._cache.values()) > self._cache_bytes:
                self._cache.popitem(last=False)
        return column


def _resolve_files(path: str) -> list[tuple[Path, str]]:
    """(file, its name relative to what was given), sorted by that name."""
    root = Path(path)
    if root.is_file():
        return [(root, root.name)]
    if root.is_dir():
        found = [(file, file.relative_to(root).as_posix()) for file in root.rglob("*.parquet")]
        if not found:
            raise DataError(
                f"data.path={path}: no .parquet files in this folder; give a folder, file or glob that has some"
            )
    elif glob.has_magic(path):
        found = [(Path(match), os.path.basename(match)) for match in glob.glob(path, recursive=True)]
        found = [(file, name) for file, name in found if file.is_file()]
        if not found:
            raise DataError(f"data.path={path}: the glob matches no file; check the pattern (quote it in a shell)")
    else:
        raise DataError(f"data.path={path}: no such file or folder; give an existing Parquet file, folder or glob")
    return sorted(found, key=lambda item: (item[1], str(item[0])))


def _open_footer(path: Path, name: str, text_column: str) -> _File:
    try:
        size_bytes = path.stat().st_size
        with pq.ParquetFile(path) as file:
            metadata, schema = file.metadata, file.schema_arrow
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(path, error) from error
    if text_column not in schema.names:
        raise DataError(
            f"{path}: no column {text_column!r} (data.text_column); its columns are {', '.join(schema.names)}; "
            "set data.text_column to the one that holds the text"
        )
    column_type = schema.field(text_column).type
    if not (pa.types.is_string(column_type) or pa.types.is_large_string(column_type)):
        raise DataError(
            f"{path}: column {text_column!r} (data.text_column) has type {column_type}, not string; "
            "set data.text_column to a text column"
        )
    stops = accumulate(metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))
    return _File(path, name, size_bytes, tuple(stops))


def _unreadable(path: Path, error: Exception) -> DataError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return DataError(
        f"{path}: not a readable Parquet file ({reason}); it may be truncated: fetch it again or remove it"
    )
