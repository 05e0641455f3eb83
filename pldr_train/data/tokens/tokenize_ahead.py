"""Tokenise a source's documents ahead of training, into a folder that `TokenStore` reads.

    unfinished.json             the work, until it is finished
    tokens-00000.safetensors    a shard, see `shards.py`
    tokens-00000.json           its description, until all is finished
    tokenizer.model
    manifest.json               appears last

A shard holds a fixed number of documents, and a file appears whole or not at all. So the finished folder is the same,
byte for byte, for any number of workers and of interruptions.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from pldr_train.data.documents import Unreadable
from pldr_train.data.files import write_file_atomically
from pldr_train.data.rows.split import Interval, needed_documents, split_documents
from pldr_train.data.sources.file_source import FileSource
from pldr_train.data.sources.manifest import Manifest
from pldr_train.data.sources.opening import open_source
from pldr_train.data.tokenizer.automatic import recipe_tokenizer
from pldr_train.data.tokenizer.training import check_vocabulary, load_tokenizer
from pldr_train.data.tokens.shards import (
    DOCUMENTS_PER_SHARD,
    MANIFEST_FILE,
    TOKENIZER_FILE,
    UNFINISHED_FILE,
    Shard,
    StoreManifest,
    merged,
    tokenizer_digest,
)
from pldr_train.data.tokens.workers import (
    BUILDING_PREFIX,
    DISK_FIX,
    Advance,
    Finished,
    Job,
    description_path,
    read_description,
    write_shards,
)
from pldr_train.errors import DataError
from pldr_train.file_locks import try_lock
from pldr_train.recipe import DataSection, Recipe

_log = logging.getLogger(__name__)

_LOCK_FILE = ".lock"
_SHOWN_DIFFERENCES = 3


class Progress(Protocol):
    """Shows how far the work is."""

    def begin(self, total_documents: int, documents: int) -> None:
        """Begin at `documents` of `total_documents`, which an earlier start has done."""

    def advance(self, documents: int, tokens: int) -> None:
        """Add documents and tokens that are done."""

    def end(self) -> None:
        """End, after success or an error."""


class Outcome(NamedTuple):
    """The finished folder."""

    manifest: StoreManifest
    written_shards: int
    """Shards written by this call; 0: the folder was finished before."""


def tokenize_ahead(
    recipe: Recipe,
    folder: Path,
    *,
    documents: Interval | None = None,
    documents_per_shard: int = DOCUMENTS_PER_SHARD,
    num_workers: int = 1,
    progress: Progress | None = None,
) -> Outcome:
    """Tokenise the documents of a recipe, or continue an interrupted call.

    Args:
        recipe: a resolved one.
        folder: is made, or holds what an interrupted call wrote.
        documents: [start, stop) in the source's numbering; None: what the recipe trains and validates on.
        documents_per_shard: fixed for a folder.
        num_workers: processes.
        progress: shows how far the work is.

    Raises:
        DataError: the source, the tokenizer, the interval or the folder is wrong, documents cannot be read, or the
            disk is full. Finished shards are kept.
    """
    if recipe.data.source == "tokens":
        raise DataError("data.source=tokens: these documents are tokenised already; give a recipe that reads texts")
    with _locked_folder(folder):
        begun = _earlier_manifest(folder)
        source, documents, tokenizer_path = _open(recipe, documents, begun)
        tokenizer = load_tokenizer(tokenizer_path)
        check_vocabulary(tokenizer, recipe.model.vocab_size)
        model = tokenizer_path.read_bytes()
        manifest = StoreManifest(
            documents, documents_per_shard, tokenizer_digest(model), tokenizer.get_piece_size(), source.manifest
        )
        if begun is None:
            _check_empty(folder)
        else:
            _check_same(folder, begun, manifest)
            manifest = replace(manifest, source=begun.source)
        _begin(folder, manifest, model)
        return _run(Job(folder, manifest, source, model), begun, num_workers, progress)


@contextmanager
def _locked_folder(folder: Path) -> Iterator[None]:
    """Make a folder and lock it against other processes. The lock ends with the process."""
    lock = folder / _LOCK_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise DataError(f"cannot write {folder}: {error.strerror or error}; name another --output") from error
    try:
        _lock(descriptor, folder)
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)
            with suppress(OSError):
                folder.rmdir()  # if nothing was begun
    finally:
        os.close(descriptor)


def _lock(descriptor: int, folder: Path) -> None:
    with suppress(OSError):  # a file system without locks
        if not try_lock(descriptor):
            raise DataError(f"{folder}: another process writes it; wait for it, or name another --output")


def _earlier_manifest(folder: Path) -> StoreManifest | None:
    """Return the manifest of the work that an earlier call began or finished in the folder."""
    for name in (MANIFEST_FILE, UNFINISHED_FILE):
        with suppress(FileNotFoundError):
            return StoreManifest.load(folder / name)
    return None


def _open(recipe: Recipe, documents: Interval | None, begun: StoreManifest | None) -> tuple[FileSource, Interval, Path]:
    """Return the source, counted as far as needed, the documents to tokenise, and the tokenizer's path."""
    data = recipe.data
    needed = needed_documents(data.train_documents, data.validation_documents)
    if documents is not None and data.tokenizer is not None:
        needed = documents[1]
    elif documents is not None and needed is not None:
        needed = max(needed, documents[1])
    source = open_source(data, needed, _kept_list(data, begun))
    train, spread = None, None
    if documents is None or data.tokenizer is None:
        train, validation, spread = split_documents(data, source.num_documents)
        documents = documents or (min(train[0], validation[0]), max(train[1], validation[1]))
    start, stop = documents
    if not 0 <= start < stop <= source.num_documents:
        raise DataError(
            f"--documents {start} {stop}: not an interval of the source's {source.num_documents:,} documents; give "
            "START and STOP with 0 <= START < STOP, at most that number"
        )
    return source, documents, recipe_tokenizer(recipe, source, train or documents, spread)


def _kept_list(data: DataSection, begun: StoreManifest | None) -> Manifest | None:
    """Return the list of files that the work began with, if the recipe names the same: `main` may have moved."""
    if begun is None or data.source != "hub":
        return None
    origin = begun.source.origin
    named = {"kind": "hub", "repository": data.repository, "revision": data.revision}
    if data.data_files is not None:
        named |= {"data_files": data.data_files}
    else:
        named |= {"split": data.split} | ({} if data.config is None else {"config": data.config})
    is_same = all(origin.get(key) == value for key, value in named.items())
    return begun.source if is_same and begun.source.text_column == data.text_column else None


def _check_empty(folder: Path) -> None:
    if any(path.name != _LOCK_FILE for path in folder.iterdir()):
        raise DataError(f"{folder}: holds other files, and is no folder of tokens; name an empty or a new --output")


def _check_same(folder: Path, begun: StoreManifest, wanted: StoreManifest) -> None:
    """Raise DataError if the folder was begun with other documents, another tokenizer or other shards."""
    differences = [
        f"{name} was {list(before) if isinstance(before, tuple) else before} and is "
        f"{list(now) if isinstance(now, tuple) else now} now"
        for name, before, now in (
            ("--documents", begun.documents, wanted.documents),
            ("--documents-per-shard", begun.documents_per_shard, wanted.documents_per_shard),
            ("the tokenizer (BLAKE2b)", begun.tokenizer_blake2b, wanted.tokenizer_blake2b),
        )
        if before != now
    ]
    if begun.documents == wanted.documents:
        differences += _source_differences(begun.fingerprint, wanted.fingerprint)
    if differences:
        more = len(differences) - _SHOWN_DIFFERENCES
        shown = "; ".join(differences[:_SHOWN_DIFFERENCES]) + (f"; and {more} more" if more > 0 else "")
        raise DataError(
            f"{folder}: was begun with something else: {shown}. Give what it was begun with, or name another --output"
        )


def _source_differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Describe the differences of two fingerprints of a source, file by file."""
    differences = [
        f"the source's {key} was {before.get(key)} and is {now.get(key)} now"
        for key in sorted({*before, *now} - {"files"})
        if before.get(key) != now.get(key)
    ]
    old, new = ({file["name"]: file for file in each["files"]} for each in (before, now))
    for name in dict.fromkeys([*old, *new]):
        if name not in new or name not in old:
            differences.append(f"the source's file {name} is {'new' if name in new else 'gone'}")
        elif old[name] != new[name]:
            keys = [key for key in ("size_bytes", "rows", "first_document") if old[name].get(key) != new[name].get(key)]
            values = (f"{key} {old[name].get(key)}, now {new[name].get(key)}" for key in keys)
            differences.append(f"the source's file {name} had {' and '.join(values)}")
    return differences


def _begin(folder: Path, manifest: StoreManifest, model: bytes) -> None:
    _remove_leftovers(folder)
    tokenizer_path = folder / TOKENIZER_FILE
    if not tokenizer_path.exists() or tokenizer_path.read_bytes() != model:
        write_file_atomically(tokenizer_path, model, fix=DISK_FIX)
    if not (folder / MANIFEST_FILE).exists() and not (folder / UNFINISHED_FILE).exists():
        write_file_atomically(folder / UNFINISHED_FILE, manifest.to_json().encode(), fix=DISK_FIX)


def _run(job: Job, begun: StoreManifest | None, num_workers: int, progress: Progress | None) -> Outcome:
    folder, manifest = job.folder, job.manifest
    done = _finished_shards(folder, manifest, begun)
    missing = [index for index in range(manifest.num_shards) if index not in done]
    start, stop = manifest.documents
    if missing:
        kept = f", {len(done):,} of which are there already" if done else ""
        _log.info(f"tokenising documents [{start:,}, {stop:,}) into {manifest.num_shards:,} files{kept}, in {folder}")
    if progress is not None:
        progress.begin(stop - start, sum(shard.documents for shard, _ in done.values()))
    try:
        for report in write_shards(job, missing, num_workers) if missing else ():
            if isinstance(report, Finished):
                done[report.index] = report.shard, report.unreadable_parts
            elif progress is not None:
                assert isinstance(report, Advance)
                progress.advance(report.documents, report.tokens)
    finally:
        if progress is not None:
            progress.end()
        _remove_leftovers(folder)
    shards = tuple(done[index][0] for index in range(manifest.num_shards))
    parts = merged([part for _, parts in done.values() for part in parts])
    manifest = replace(manifest, shards=shards, unreadable_parts=parts)
    if missing or not (folder / MANIFEST_FILE).exists():
        write_file_atomically(folder / MANIFEST_FILE, manifest.to_json().encode(), fix=DISK_FIX)
    for shard in shards:
        description_path(folder, shard.name).unlink(missing_ok=True)
    (folder / UNFINISHED_FILE).unlink(missing_ok=True)
    return Outcome(manifest, len(missing))


def _finished_shards(
    folder: Path, manifest: StoreManifest, begun: StoreManifest | None
) -> dict[int, tuple[Shard, tuple[Unreadable, ...]]]:
    """Return the finished shards with their unreadable parts, by index."""
    found: dict[int, tuple[Shard, tuple[Unreadable, ...]]] = {}
    for index in range(manifest.num_shards):
        path = folder / manifest.shard_name(index)
        if begun is not None and begun.shards:
            shard = begun.shards[index]
            parts = begun.unreadable_parts
            described = shard, tuple(_cut(part, shard) for part in parts if _touches(part, shard))
        else:
            read = read_description(description_path(folder, path.name))
            if read is None:
                continue
            described = read
        with suppress(ValueError, OSError):
            manifest.check_shard(index, described[0])
            if path.stat().st_size == described[0].num_bytes:
                found[index] = described
    return found


def _touches(part: Unreadable, shard: Shard) -> bool:
    return part.start < shard.stop and part.stop > shard.first


def _cut(part: Unreadable, shard: Shard) -> Unreadable:
    return replace(part, start=max(part.start, shard.first), stop=min(part.stop, shard.stop))


def _remove_leftovers(folder: Path) -> None:
    """Remove unfinished files of killed workers."""
    for leftover in folder.glob(f"{BUILDING_PREFIX}*"):
        leftover.unlink(missing_ok=True)
