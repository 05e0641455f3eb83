"""Check files of documents or tokens, and list every fault."""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pldr_train.data.documents import INVALID_UTF8, NULL, UNREADABLE
from pldr_train.data.rows.split import Interval, needed_documents
from pldr_train.data.sources.file_source import SKIP, FileSource, count_rows, read_texts, unreadable_file
from pldr_train.data.sources.manifest import Manifest, SourceFile
from pldr_train.data.sources.opening import resolve_files
from pldr_train.data.tokenizer.pieces import END_ID
from pldr_train.data.tokens.shards import (
    WRITE_AGAIN,
    Shard,
    ShardLayout,
    StoreManifest,
    open_shard,
)
from pldr_train.data.tokens.store import load_manifest, tokenizer_problem
from pldr_train.errors import DataError
from pldr_train.recipe import DataSection

_log = logging.getLogger(__name__)

_T = TypeVar("_T")

_LOG_EVERY_S = 5.0
_TOKENS_AT_ONCE = 4_000_000


@dataclass(frozen=True)
class Verified:
    """The result of a check."""

    files: int
    """Files that were checked."""
    bytes: int
    """Size of these files."""
    problems: tuple[str, ...]
    """A message for each fault, with the file and the fix."""
    notes: tuple[str, ...] = ()
    """What was not checked."""


def verify_tokens(folder: Path, *, quick: bool = False) -> Verified:
    """Check a folder of tokens: the tokenizer, and size and header of every shard.

    Unless `quick`, check also the SHA-256, that documents have no gaps and end with EOS, that ids are in the
    vocabulary, and the counts of the manifest. Raises DataError if it is no finished folder of tokens.
    """
    manifest = load_manifest(folder)
    tokenizer = tokenizer_problem(folder, manifest)
    problems = _search(manifest.shards, lambda shard: _shard_problems(folder, manifest, shard, quick), "shards")
    size = sum(shard.num_bytes for shard in manifest.shards)
    return Verified(len(manifest.shards), size, (*([tokenizer] if tokenizer else []), *problems))


def _shard_problems(folder: Path, manifest: StoreManifest, shard: Shard, quick: bool) -> list[str]:
    path, layout = folder / shard.name, manifest.layout(shard)
    try:
        with open_shard(path, layout):
            if quick:
                return []
        reasons = []
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != shard.sha256:
                reasons.append("has another SHA-256 than when it was written")
        reasons += _content_problems(path, manifest, shard, layout)
        return [f"{path}: {'; '.join(reasons)}; {WRITE_AGAIN}"] if reasons else []
    except DataError as error:
        return [str(error)]
    except OSError as error:
        return [f"{path}: cannot be read ({error.strerror}); repair the disk, or {WRITE_AGAIN}"]


def _content_problems(path: Path, manifest: StoreManifest, shard: Shard, layout: ShardLayout) -> list[str]:
    """Return the faults of the numbers in a shard of the right size."""
    with open_shard(path, layout) as file:
        flags = file.flags(0, shard.documents)
        try:
            ends = file.ends(0, shard.documents)
        except DataError:
            return ["its documents' ends do not ascend"]
        last_tokens, largest = np.full(shard.documents, END_ID), -1
        for first in range(0, layout.tokens, _TOKENS_AT_ONCE):
            tokens = np.empty(min(_TOKENS_AT_ONCE, layout.tokens - first), layout.dtype)
            file.tokens_into(tokens, first)
            largest = max(largest, int(tokens.max()))
            places = ends[1:] - 1 - first
            inside = (places >= 0) & (places < len(tokens)) & (ends[1:] > ends[:-1])
            last_tokens[inside] = tokens[places[inside]]
    problems = []
    if ends[-1] != layout.tokens:
        problems.append(f"its documents end after {ends[-1]:,} of {layout.tokens:,} tokens")
    if largest >= manifest.vocab_size:
        problems.append(f"holds the id {largest}, beyond the tokenizer's {manifest.vocab_size} pieces")
    without = shard.first + np.flatnonzero(last_tokens != END_ID)
    if len(without):
        problems.append(f"{len(without):,} documents do not end with EOS, the first of them {without[0]:,}")
    if (np.diff(ends) == 0).tolist() != ((flags & UNREADABLE) > 0).tolist():
        problems.append("documents without a token are not those flagged as unreadable")
    return problems + _count_problems(np.diff(ends), flags, shard)


def _count_problems(lengths: NDArray[np.int64], flags: NDArray[np.uint8], shard: Shard) -> list[str]:
    null = (flags & NULL) > 0
    found = {
        "null": int(null.sum()),
        "empty": int(((lengths == 1) & ~null).sum()),
        "invalid_utf8": int(((flags & INVALID_UTF8) > 0).sum()),
        "unreadable": int(((flags & UNREADABLE) > 0).sum()),
    }
    return [
        f"holds {number:,} {name} documents, not {getattr(shard, name):,} as in the manifest"
        for name, number in found.items()
        if number != getattr(shard, name)
    ]


def verify_source(
    data: DataSection,
    *,
    kept: Manifest | None = None,
    every_file: bool = False,
    quick: bool = False,
) -> Verified:
    """Check that each file of a recipe's source exists, and has its size, a whole footer and the text column.

    Unless `quick`, decode every row group of the text column, and compare copies of the Hub's files with the digests
    that the Hub lists. A file of the Hub without a copy is not read.

    Args:
        data: section of the recipe.
        kept: the list of files that the recipe's run began with; the sizes must be the same.
        every_file: check all files, not only those of the recipe's intervals.
        quick: see above.

    Raises:
        DataError: the files cannot be listed, or the cache cannot be written.
    """
    until = None if every_file else needed_documents(data.train_documents, data.validation_documents)
    same = kept is not None and kept.origin.get("kind") == data.source
    manifest, access = resolve_files(data, like=kept if same else None)
    manifest = count_rows(manifest, access, until, SKIP, warn=False)
    source = FileSource(manifest, access)
    files = source.manifest.files if every_file else touched_files(source.manifest, data)
    problems = [file.problem for file in files if file.problem is not None]
    if kept is not None and same and data.source != "hub":
        problems += _changes(kept, source.manifest)
    notes: tuple[str, ...] = ()
    whole = [file for file in files if file.problem is None]
    if data.source == "hub":
        whole, notes, found = _verify_copies(data, source, whole, quick)
        problems += found
    if not quick:
        problems += _search(whole, lambda file: row_group_problems(source, file), "files")
    return Verified(len(files), sum(file.size_bytes for file in files), tuple(problems), notes)


def touched_files(manifest: Manifest, data: DataSection) -> list[SourceFile]:
    """Return the counted files that hold documents of a recipe's intervals, and unreadable ones in between."""
    wanted: list[Interval] = [each for each in (data.train_documents, data.validation_documents) if each]
    if data.train_documents is None:
        wanted = [(0, manifest.num_documents + 1)]  # with the unreadable files after the last document
    found = []
    for file, stop in zip(manifest.files, manifest.stops, strict=False):
        first = stop - file.rows
        is_touched = any(first < end and stop > start for start, end in wanted)
        # An unreadable file has no documents. Its place shows whether they would be needed.
        if is_touched if file.problem is None else any(start <= first < end for start, end in wanted):
            found.append(file)
    return found


def _changes(kept: Manifest, now: Manifest) -> list[str]:
    sizes = {file.name: file.size_bytes for file in now.files}
    problems = []
    for file in kept.files:
        if file.name not in sizes:
            problems.append(f"{file.name}: missing, the run began with it; put it back")
        elif sizes[file.name] != file.size_bytes:
            problems.append(
                f"{file.name}: has {sizes[file.name]:,} bytes, not the {file.size_bytes:,} that the run began with; "
                "put that file back"
            )
    known = {file.name for file in kept.files}
    return problems + [f"{name}: new since the run began; remove it" for name in sizes if name not in known]


def _verify_copies(
    data: DataSection, source: FileSource, files: list[SourceFile], quick: bool
) -> tuple[list[SourceFile], tuple[str, ...], list[str]]:
    """Return the files of the Hub that have copies, a note on the others, and the copies' faults."""
    from pldr_train.data.sources.hub_files import HubFiles  # noqa: PLC0415 - see `opening`

    access = HubFiles(source.manifest, Path(data.cache_dir), retries=data.retries)
    copied = [file for file in files if access.has_local_copy(file)]
    notes = () if len(copied) == len(files) else (
        f"{len(files) - len(copied):,} of {len(files):,} files have no copy in {data.cache_dir} and were not read "
        "(pldr-train data download makes them)",
    )  # fmt: skip

    def digest_problems(file: SourceFile) -> list[str]:
        path = access.local_copy(file)
        with path.open("rb") as content:
            found = hashlib.file_digest(content, "sha256").hexdigest()
        if found == file.digest:
            return []
        return [f"{path}: has SHA-256 {found}, not {file.digest}; remove it, and fetch it again"]

    problems = []
    if not quick:
        problems = _search([file for file in copied if file.digest is not None], digest_problems, "digests")
    return copied, notes, problems


def row_group_problems(source: FileSource, file: SourceFile) -> list[str]:
    """Return the row groups of a file's text column that cannot be read."""
    problems, place = [], source.access.describe(file)
    column = source.manifest.text_column
    assert file.row_groups is not None
    expected = [rows for rows, times in file.row_groups for _ in range(times)]
    try:
        with source.access.open(file) as opened:
            for group, rows in enumerate(expected):
                try:
                    found = read_texts(opened, group, column)
                    if len(found) != rows:
                        raise OSError(f"holds {len(found)} rows, not {rows} as its footer says")
                except (OSError, pa.ArrowException, IndexError) as error:
                    problems.append(unreadable_file(f"{place}, row group {group}", error))
    except (OSError, pa.ArrowException) as error:
        problems.append(unreadable_file(place, error))
    return problems


def _search(items: Iterable[_T], find: Callable[[_T], list[str]], what: str) -> list[str]:
    """Return the problems of all items in order. A thread for each core looks for them."""
    items = list(items)
    logged_at = time.monotonic()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        running = [pool.submit(find, item) for item in items]
        for number, _ in enumerate(as_completed(running), start=1):
            if time.monotonic() - logged_at > _LOG_EVERY_S:
                logged_at = time.monotonic()
                _log.info(f"verified {number:,} of {len(items):,} {what}")
    return [problem for each in running for problem in each.result()]
