"""Files of a data set on the Hugging Face Hub: Parquet read over the network, and copies of whole files.

Of a file without a copy, only the footer and the column chunks that are read cross the network. The cache holds
`hub/<owner>--<name>/<commit>/<file>` for a whole file, the same with `.footer` for a footer, and with `.incomplete`
for an interrupted copy.
"""

from __future__ import annotations

import hashlib
import io
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub.utils import WeakFileLock
from typing_extensions import override

from pldr_train.data.files import CACHE_FIX, sync_path, write_file_atomically
from pldr_train.data.sources.file_source import FileAccess
from pldr_train.data.sources.hub_http import (
    HTTP_ERRORS,
    TransientError,
    file_url,
    read_range,
    refusal,
    stream,
    with_retries,
)
from pldr_train.data.sources.manifest import Manifest, SourceFile
from pldr_train.errors import DataError

_T = TypeVar("_T")

_MAGIC = b"PAR1"
_TRAILER_BYTES = 8
"""The footer's length as four bytes, and the magic."""
_TAIL_BYTES = 256 * 1024


class HubFiles(FileAccess):
    """Files of one commit of a data set on the Hub, and copies of them on the disk.

    A file with a copy is read without a request.

    Args:
        manifest: of `hub_manifest`.
        cache_dir: the recipe's `data.cache_dir`.
        retries: further tries of a request that fails for a reason that may pass.
    """

    def __init__(self, manifest: Manifest, cache_dir: Path, *, retries: int) -> None:
        self._repository, self._commit = str(manifest.identity["repository"]), str(manifest.identity["revision"])
        self._root = cache_dir / "hub" / self._repository.replace("/", "--") / self._commit
        self._retries = retries

    @override
    def footer(self, file: SourceFile) -> pq.FileMetaData:
        if self.has_local_copy(file):
            return pq.read_metadata(self._path(file))
        kept = self._path(file, ".footer")
        with suppress(OSError, pa.ArrowException):  # missing, or damaged on this disk
            return pq.read_metadata(kept)
        raw = self._read_footer(file)
        footer = pq.read_metadata(pa.BufferReader(raw))  # raises for what is no footer, before it is kept
        write_file_atomically(kept, raw)
        return footer

    @override
    def open(self, file: SourceFile) -> AbstractContextManager[pq.ParquetFile]:
        """Open the file to read row groups. A read of a column of a row group is one request."""
        opened: AbstractContextManager[pq.ParquetFile]
        if self.has_local_copy(file):
            opened = pq.ParquetFile(self._path(file))
        else:
            # Without pre-buffering this thread makes the request. A thread of Arrow's would return the answer's memory
            # to Python at any later time, and abort a process that is about to end.
            opened = pq.ParquetFile(_RemoteFile(self, file), metadata=self.footer(file), pre_buffer=False)
        return opened

    @override
    def describe(self, file: SourceFile) -> str:
        """Return the file's address."""
        return file_url(self._repository, self._commit, file.name)

    def read(self, file: SourceFile, start: int, stop: int) -> bytes:
        """Return the bytes [start, stop) of a file.

        Raises OSError (FileNotFoundError) for a fault of the file, DataError for anything else.
        """
        if start == stop:
            return b""
        return self._ask(lambda url: read_range(url, start, stop, file.size_bytes), file)

    def has_local_copy(self, file: SourceFile) -> bool:
        """Tell whether the whole file is on the disk."""
        try:
            return self._path(file).stat().st_size == file.size_bytes
        except OSError:
            return False

    def local_copy(self, file: SourceFile, stop: threading.Event | None = None) -> Path:
        """Return the path of the whole file on the disk. Fetch it if it is not there; continue an interrupted fetch.

        Args:
            file: of the manifest.
            stop: makes the fetch end with DataError as soon as it is set.

        Raises:
            OSError: the file does not exist (FileNotFoundError), or has another size than listed.
            DataError: for anything else, such as another digest.
        """
        path = self._path(file)
        if self.has_local_copy(file):
            return path
        with _locked(path):
            if not self.has_local_copy(file):
                partial = self._path(file, ".incomplete")
                self._ask(lambda url: _fetch_rest(url, file, partial, stop), file, stop)
                with _writing(path):
                    sync_path(partial)
                    os.replace(partial, path)
        return path

    def _path(self, file: SourceFile, suffix: str = "") -> Path:
        return self._root / (file.name + suffix)

    def _ask(self, request: Callable[[str], _T], file: SourceFile, stop: threading.Event | None = None) -> _T:
        url, what = self.describe(file), f"{self._repository}: {file.name}"

        def pause(seconds: float) -> None:
            if stop is None:
                time.sleep(seconds)
            elif stop.wait(seconds):
                raise DataError(f"{what}: interrupted; run the same command again: it goes on from here")

        try:
            return with_retries(lambda: request(url), what, url, self._retries, sleep=pause)
        except HTTP_ERRORS as error:
            raise refusal(error, what, url) from error

    def _read_footer(self, file: SourceFile) -> bytes:
        """Return the footer as `pq.FileMetaData.write_metadata_file` writes it: between two magics."""
        size = file.size_bytes
        tail = self.read(file, max(0, size - _TAIL_BYTES), size)
        if len(tail) < _TRAILER_BYTES + len(_MAGIC) or not tail.endswith(_MAGIC):
            raise OSError(f"the last of its {size:,} bytes are not those of a Parquet file")
        length = int.from_bytes(tail[-_TRAILER_BYTES : -len(_MAGIC)], "little") + _TRAILER_BYTES
        if length > size:
            raise OSError(f"its footer would have {length:,} bytes of the file's {size:,}")
        if length > len(tail):
            tail = self.read(file, size - length, size - len(tail)) + tail
        return _MAGIC + tail[-length:]


class _RemoteFile(io.RawIOBase):
    """A file of the Hub as Arrow reads it: each read is one request."""

    def __init__(self, files: HubFiles, file: SourceFile) -> None:
        self._files, self._file, self._position = files, file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._file.size_bytes}[whence]
        self._position = base + offset
        return self._position

    def read(self, size: int = -1) -> bytes:
        end = self._file.size_bytes
        stop = end if size is None or size < 0 else min(self._position + size, end)
        content = self._files.read(self._file, min(self._position, stop), stop)
        self._position = max(self._position, stop)
        return content


def _fetch_rest(url: str, file: SourceFile, partial: Path, stop: threading.Event | None) -> None:
    """Fetch the rest of a file that `partial` holds the beginning of, and check the whole."""
    with _writing(partial):
        partial.parent.mkdir(parents=True, exist_ok=True)
        partial.touch()
        resumed = partial.stat().st_size
        if resumed > file.size_bytes:
            os.truncate(partial, 0)
            resumed = 0
    if resumed < file.size_bytes:
        with stream(url, resumed, file.size_bytes, file.size_bytes) as chunks:
            _append(chunks, partial, stop)
    with _writing(partial):
        problem = _problem(file, partial)
        if problem is not None:
            partial.unlink()
            if resumed:
                raise TransientError(problem)  # the part that was there may be wrong
            raise DataError(f"{url}: {problem}; run the same command again, and look for a proxy that changes files")


def _append(chunks: Iterator[bytes], partial: Path, stop: threading.Event | None) -> None:
    with _writing(partial), partial.open("ab") as content:
        for chunk in chunks:
            content.write(chunk)
            if stop is not None and stop.is_set():
                raise DataError(f"{partial}: interrupted; run the same command again: it goes on from here")


def _problem(file: SourceFile, partial: Path) -> str | None:
    """Return what is wrong with a fetched file. Raise TransientError if its end is missing."""
    size = partial.stat().st_size
    if size < file.size_bytes:
        raise TransientError(f"{size:,} of {file.size_bytes:,} bytes arrived")
    if size > file.size_bytes:
        return f"has {size:,} bytes, not the {file.size_bytes:,} that the repository lists"
    if file.digest is None:
        return None
    with partial.open("rb") as content:
        found = hashlib.file_digest(content, "sha256").hexdigest()
    return None if found == file.digest else f"arrived with SHA-256 {found}, not {file.digest}"


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn an OSError of the disk into a DataError."""
    try:
        yield
    except HTTP_ERRORS:
        raise  # some are OSErrors
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror or error}; {CACHE_FIX}") from error


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Keep other processes and threads from fetching the same file."""
    lock = path.with_name(f".{path.name}.lock")
    with ExitStack() as held:
        with _writing(lock):
            lock.parent.mkdir(parents=True, exist_ok=True)
            held.enter_context(WeakFileLock(lock))
        yield
