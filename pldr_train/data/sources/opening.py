"""Open the source of documents that a recipe's data section names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from pldr_train.data.sources.converted_files import ConvertedFiles
from pldr_train.data.sources.file_source import SKIP, FileAccess, FileSource, count_rows
from pldr_train.data.sources.hidden_class import build_hidden_class_corpus
from pldr_train.data.sources.local_files import SUFFIXES, LocalFiles, local_manifest
from pldr_train.data.sources.manifest import Manifest, SourceFile
from pldr_train.data.sources.quickstart import build_quickstart_corpus
from pldr_train.data.sources.text_formats import PlainText
from pldr_train.errors import CheckpointError, DataError
from pldr_train.recipe import DataSection

_SHOWN_CHANGES = 5
_BUILDERS: Mapping[str, Callable[[Path], Path]] = {
    "quickstart": build_quickstart_corpus,
    "hidden_class": build_hidden_class_corpus,
}
"""data.source -> builds its corpus below data.cache_dir and returns the folder."""


def open_source(
    data: DataSection,
    until: int | None = None,
    manifest: Manifest | None = None,
) -> FileSource:
    """Open the documents that a recipe's data section names (any source but "tokens").

    Args:
        data: section of the recipe.
        until: the documents [0, until) are counted; None: all, which opens every file once.
        manifest: the list of files of an earlier start; None: they are listed now.

    Raises:
        DataError: the files cannot be found, listed or read.
        CheckpointError: the files on the disk are not those of `manifest` any more.
    """
    manifest, access = resolve_files(data, manifest)
    manifest = count_rows(manifest, access, until, data.on_bad_shard)
    if manifest.num_documents == 0:
        raise DataError(
            f"{_key(data)}: empty corpus, its {len(manifest.files)} file(s) hold no rows; give files with documents"
        )
    return FileSource(manifest, access, data.on_bad_shard)


def resolve_files(
    data: DataSection,
    manifest: Manifest | None = None,
    like: Manifest | None = None,
) -> tuple[Manifest, FileAccess]:
    """Return the list of files, counted no further than `manifest` is, and their access.

    Without a `manifest` the files are listed, in the same way as those of `like` if given.

    Raises DataError, and CheckpointError if the files on the disk are not those of `manifest` any more.
    """
    cache = Path(data.cache_dir)
    if data.source == "hub":
        return _resolve_hub_files(data, manifest)
    build = _BUILDERS.get(data.source)
    path = data.path if build is None else str(build(cache))
    if path is None:
        raise DataError(f"data.path is not set; data.source={data.source} needs a file, a folder or a glob")
    assert build is not None or data.source in ("parquet", "jsonl", "text"), data.source
    suffixes = SUFFIXES["parquet" if build is not None else data.source]
    found, root = local_manifest(path, data.text_column, suffixes, data.source, manifest or like)
    if manifest is not None:
        _check_unchanged(data, manifest, found)
    if data.source in ("jsonl", "text"):
        below, place = partial(_below, root), partial(_place, root)
        cut = PlainText(data.document_separator) if data.source == "text" else None
        column = data.text_column
        return manifest or found, ConvertedFiles(below, column, cache, describe=place, plain_text=cut)
    return manifest or found, LocalFiles(root)


def _resolve_hub_files(data: DataSection, manifest: Manifest | None) -> tuple[Manifest, FileAccess]:
    # The Hub's client takes long to import, and other sources do not need it.
    from pldr_train.data.sources.hub_files import HubFiles  # noqa: PLC0415
    from pldr_train.data.sources.hub_listing import HUB_JSONL_SUFFIXES, hub_manifest  # noqa: PLC0415

    manifest = manifest or hub_manifest(data)
    cache = Path(data.cache_dir)
    files = HubFiles(manifest, cache, retries=data.retries)
    if any(file.name.endswith(HUB_JSONL_SUFFIXES) for file in manifest.files):
        return manifest, ConvertedFiles(files.local_copy, data.text_column, cache, describe=files.describe)
    return manifest, files


def _check_unchanged(data: DataSection, kept: Manifest, found: Manifest) -> None:
    """Raise CheckpointError if the files on the disk are not those of the list `kept` any more.

    Only sizes are compared, since thousands of files must not be opened at every start. A commit of the Hub cannot
    change.
    """
    # A file that was left out as a whole holds no document of the run. It may change.
    before = {file.name: file.size_bytes for file in kept.files if file.problem is None}
    left_out = {file.name for file in kept.files if file.problem is not None}
    now = {file.name: file.size_bytes for file in found.files if file.name not in left_out}
    changes = [f"{name} is new" for name in now if name not in before]
    for name, size in before.items():
        # A missing or truncated file is unreadable, and may be skipped.
        if now.get(name, 0) != size and not (data.on_bad_shard == SKIP and now.get(name, 0) < size):
            changes.append(f"{name} has {now[name]:,} bytes, not {size:,}" if name in now else f"{name} is gone")
    if changes:
        shown = "; ".join(changes[:_SHOWN_CHANGES])
        more = f"; and {len(changes) - _SHOWN_CHANGES} more" if len(changes) > _SHOWN_CHANGES else ""
        raise CheckpointError(
            f"{_key(data)}: the files are not those that the run began with: {shown}{more}. Put them back, or "
            "start another run with model.init_from"
        )


def _below(root: Path, file: SourceFile) -> Path:
    return root / file.name


def _place(root: Path, file: SourceFile) -> str:
    return str(root / file.name)


def _key(data: DataSection) -> str:
    return f"data.repository={data.repository}" if data.source == "hub" else f"data.path={data.path}"
