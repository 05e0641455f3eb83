"""Download the files of the Hub that a recipe's run needs, so that it needs no network."""

from __future__ import annotations

import logging
import shutil
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from pldr_train.data.rows.split import needed_documents
from pldr_train.data.sources.file_source import count_rows
from pldr_train.data.sources.hub_files import HubFiles
from pldr_train.data.sources.hub_listing import HUB_JSONL_SUFFIXES
from pldr_train.data.sources.manifest import Manifest, SourceFile
from pldr_train.data.sources.opening import resolve_files
from pldr_train.data.verification import touched_files
from pldr_train.errors import DataError
from pldr_train.recipe import DataSection

_log = logging.getLogger(__name__)

_DOWNLOADS_AT_ONCE = 4


@dataclass(frozen=True)
class Wanted:
    """The files of a recipe's intervals, those to fetch, and the space for them."""

    manifest: Manifest
    files: tuple[SourceFile, ...]
    missing: tuple[SourceFile, ...]
    """Files that have no copy yet."""
    free_bytes: int
    """On the disk that holds the cache."""

    @property
    def missing_bytes(self) -> int:
        """Size of the files to fetch."""
        return sum(file.size_bytes for file in self.missing)


def wanted_files(data: DataSection) -> Wanted:
    """Find the files that hold the documents of a recipe's intervals.

    Of Parquet files this reads the footers alone. A file of JSON lines must be fetched to count its documents, so such
    files are fetched from the front until they cover the intervals; with an open interval all are wanted.

    Raises DataError.
    """
    assert data.source == "hub", data.source
    manifest, access = resolve_files(data)
    needed = needed_documents(data.train_documents, data.validation_documents)
    is_jsonl = any(file.name.endswith(HUB_JSONL_SUFFIXES) for file in manifest.files)
    if is_jsonl and needed is None:
        files = list(manifest.files)
    else:
        manifest = count_rows(manifest, access, needed, data.on_bad_shard)
        files = [file for file in touched_files(manifest, data) if file.problem is None]
    copies = HubFiles(manifest, Path(data.cache_dir), retries=data.retries)
    missing = [file for file in files if not copies.has_local_copy(file)]
    return Wanted(manifest, tuple(files), tuple(missing), free_bytes(Path(data.cache_dir)))


def fetch(data: DataSection, wanted: Wanted, *, force: bool = False) -> Downloads:
    """Fetch what is missing. Raises DataError if the disk is too small, unless `force`, and as `download`."""
    if wanted.missing_bytes > wanted.free_bytes and not force:
        raise DataError(
            f"data.cache_dir={data.cache_dir}: {wanted.missing_bytes / 1e9:,.2f} GB are to be fetched and "
            f"{wanted.free_bytes / 1e9:,.2f} GB are free; free some space, set another data.cache_dir or smaller "
            "intervals, or pass --force to fetch as much as fits"
        )
    return download(wanted.manifest, wanted.files, Path(data.cache_dir), retries=data.retries)


def free_bytes(folder: Path) -> int:
    """Return the free space on the disk where a folder is, or would be made."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


@dataclass(frozen=True)
class Downloads:
    """What `download` did."""

    fetched: int
    """Files fetched now."""
    kept: int
    """Files that had a copy."""
    fetched_bytes: int
    """Size of the files fetched now."""
    problems: tuple[str, ...]
    """Files that could not be fetched, and why."""


def download(
    manifest: Manifest,
    files: Sequence[SourceFile],
    cache_dir: Path,
    *,
    retries: int,
    at_once: int = _DOWNLOADS_AT_ONCE,
) -> Downloads:
    """Fetch whole files of a manifest into the cache, `at_once` at a time, so that reading them needs no network.

    A later call continues an interrupted one. Raises DataError as `HubFiles.local_copy`; a file that does not exist is
    noted in `problems` instead.
    """
    access = HubFiles(manifest, cache_dir, retries=retries)
    missing = [file for file in files if not access.has_local_copy(file)]
    total = sum(file.size_bytes for file in missing)
    done, done_bytes, problems, stop = 0, 0, [], threading.Event()
    with ThreadPoolExecutor(max(1, at_once)) as pool:
        try:
            running = {pool.submit(access.local_copy, file, stop): file for file in missing}
            for number, each in enumerate(as_completed(running), start=1):
                file = running[each]
                try:
                    each.result()
                except OSError as error:
                    problems.append(f"{access.describe(file)}: {error}")
                    _log.warning(f"cannot be fetched: {problems[-1]}")
                    continue
                done, done_bytes = done + 1, done_bytes + file.size_bytes
                _log.info(
                    f"{file.name}: fetched; {number:,} of {len(missing):,} files, {_gigabytes(done_bytes, total)}"
                )
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return Downloads(done, len(files) - len(missing), done_bytes, tuple(problems))


def _gigabytes(done: int, total: int) -> str:
    return f"{done / 1e9:,.2f} of {total / 1e9:,.2f} GB"
