"""Which files of the Hub a recipe's run needs on the disk to do without the network."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from pldr_train.data.rows.split import needed_documents
from pldr_train.data.sources.file_source import count_rows
from pldr_train.data.sources.hub_files import HUB_JSONL_SUFFIXES, Downloads, HubFiles, download
from pldr_train.data.sources.manifest import Manifest, SourceFile
from pldr_train.data.sources.opening import resolve_files
from pldr_train.data.verification import touched_files
from pldr_train.errors import DataError
from pldr_train.recipe import DataSection


@dataclass(frozen=True)
class Wanted:
    """The files of a recipe's intervals, and what it takes to have them."""

    manifest: Manifest
    files: tuple[SourceFile, ...]
    missing: tuple[SourceFile, ...]
    """Those of which there is no copy yet."""
    free_bytes: int
    """Of the disk that the cache is on."""

    @property
    def missing_bytes(self) -> int:
        """What is to be fetched."""
        return sum(file.size_bytes for file in self.missing)


def wanted_files(data: DataSection) -> Wanted:
    """Find the files that hold the documents of a recipe's intervals; for Parquet this reads their footers alone.

    How many documents a file of JSON lines holds is known only when it is there: such files are fetched from the front
    until the intervals are covered; with an open interval all are wanted. Raises DataError.
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
    """Fetch what is missing. Raises DataError when the disk is too small, unless `force`, and as `hub.download`."""
    if wanted.missing_bytes > wanted.free_bytes and not force:
        raise DataError(
            f"data.cache_dir={data.cache_dir}: {wanted.missing_bytes / 1e9:,.2f} GB are to be fetched and "
            f"{wanted.free_bytes / 1e9:,.2f} GB are free; free some space, set another data.cache_dir or smaller "
            "intervals, or pass --force to fetch as much as fits"
        )
    return download(wanted.manifest, wanted.files, Path(data.cache_dir), retries=data.retries)


def free_bytes(folder: Path) -> int:
    """Free space where a folder is, or would be made."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
