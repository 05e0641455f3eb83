"""Files on the disk: list those that a path means, and open them."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path, PurePath

import pyarrow.parquet as pq
from typing_extensions import override

from pldr_train.data.sources.file_source import FileAccess
from pldr_train.data.sources.manifest import Manifest, SourceFile
from pldr_train.errors import DataError

PARQUET_SUFFIXES = (".parquet",)
JSONL_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json.gz", ".json.zst", ".ndjson", ".ndjson.gz", ".ndjson.zst")
TEXT_SUFFIXES = (".txt", ".md", ".txt.gz", ".md.gz", ".txt.zst", ".md.zst")
SUFFIXES: Mapping[str, tuple[str, ...]] = {"parquet": PARQUET_SUFFIXES, "jsonl": JSONL_SUFFIXES, "text": TEXT_SUFFIXES}
"""data.source -> endings of its files' names."""

_LISTING = 2
"""Version of the listing: 2 follows links and leaves hidden files out; 1 (not written in manifests) did neither."""
_BESIDE_DATA = ("readme", "license", "licence", "notice", "changelog", "citation")
"""Texts whose names begin so accompany data sets and are no documents."""
_SHOWN_FILES = 3


class LocalFiles(FileAccess):
    """Files on the disk, below `root`. No file stays open, so copies in other processes share nothing."""

    def __init__(self, root: Path) -> None:
        self._root = root

    @override
    def footer(self, file: SourceFile) -> pq.FileMetaData:
        with pq.ParquetFile(self._root / file.name) as opened:
            return opened.metadata

    @override
    def open(self, file: SourceFile) -> AbstractContextManager[pq.ParquetFile]:
        opened: AbstractContextManager[pq.ParquetFile] = pq.ParquetFile(self._root / file.name)
        return opened

    @override
    def describe(self, file: SourceFile) -> str:
        return str(self._root / file.name)


def local_manifest(
    path: str,
    text_column: str,
    suffixes: Sequence[str] = PARQUET_SUFFIXES,
    kind: str = "parquet",
    like: Manifest | None = None,
) -> tuple[Manifest, Path]:
    """List the files that a path means, sorted by name, and return their folder as well. They are not counted.

    Linked subfolders are followed. Hidden files and folders, whose names begin with a dot, are left out.

    Args:
        path: a file, a folder with its subfolders, or a glob.
        text_column: for the manifest.
        suffixes: what the names of files in a folder must end with.
        kind: of the source, for the manifest.
        like: the list of files of the run that is resumed: the folder is listed in the same way.

    Raises:
        DataError: there are none, or the folder also holds files of another source.
    """
    root, names = _resolve(path, tuple(suffixes), kind, like)
    files = []
    for name in names:
        try:
            files.append(SourceFile(name, (root / name).stat().st_size))
        except OSError as error:
            raise DataError(f"{root / name}: cannot be read ({error.strerror}); repair or remove it") from error
    listing = _LISTING if like is None else like.origin.get("listing", 1)
    return Manifest({"kind": kind, "path": path, "listing": listing}, text_column, tuple(files)), root


def sources_at(path: Path) -> dict[str, int]:
    """Return the number of files of each data.source. Texts that accompany data sets do not count."""
    files = [path] if path.is_file() else list(_walk(path, as_before=False))
    found: dict[str, list[Path]] = {}
    for file in files:
        if (source := _source_of(file.name)) is not None:
            found.setdefault(source, []).append(file)
    if len(found) > 1:
        found = {
            source: [file for file in those if not _stands_beside(file, source)] for source, those in found.items()
        }
    return {source: len(those) for source, those in found.items() if those}


def _resolve(path: str, suffixes: tuple[str, ...], kind: str, like: Manifest | None) -> tuple[Path, list[str]]:
    root = Path(path)
    kinds = " or ".join(suffixes[:3]) if len(suffixes) < 4 else ", ".join(suffixes)
    if root.is_file():
        if like is None:
            _check_kind_of_file(path, kind)
        return root.parent, [root.name]
    if root.is_dir():
        everything = list(_walk(root, as_before=like is not None and "listing" not in like.origin))
        found = [file for file in everything if file.name.endswith(suffixes)]
        if like is None:
            _check_one_kind(path, root, kind, found, everything)
        if not found:
            raise DataError(
                f"data.path={path}: no {kinds} files in this folder; give a folder, file or glob that has some"
            )
    elif glob.has_magic(path):
        matches = (Path(match) for match in glob.glob(path, recursive=True) if os.path.isfile(match))
        found = [match for match in matches if not match.name.startswith("._")]
        if not found:
            raise DataError(f"data.path={path}: the glob matches no file; check the pattern (quote it in a shell)")
        root = Path(os.path.commonpath([match.parent for match in found]))
    else:
        raise DataError(f"data.path={path}: no such file or folder; give an existing file, folder or glob")
    return root, sorted(file.relative_to(root).as_posix() for file in found)


def _walk(root: Path, as_before: bool) -> Iterator[Path]:
    """Yield all files below a folder. Each folder is entered once, links last, so links make no cycle."""
    if as_before:
        yield from (Path(folder) / name for folder, _, names in os.walk(root) for name in names)
        return
    entered: set[str] = set()
    waiting = [os.fspath(root)]
    while waiting:
        links: list[str] = []
        for way in waiting:
            yield from _walk_without_links(way, entered, links)
        waiting = links


def _walk_without_links(way: str, entered: set[str], links: list[str]) -> Iterator[Path]:
    """Yield the files below a folder that are not hidden. Add linked folders to `links`, others to `entered`."""
    if os.path.realpath(way) in entered:
        return
    for folder, folders, names in os.walk(way):
        entered.add(os.path.realpath(folder))
        visible = sorted(os.path.join(folder, name) for name in folders if not name.startswith("."))
        links += [path for path in visible if os.path.islink(path)]
        folders[:] = [os.path.basename(path) for path in visible if os.path.realpath(path) not in entered]
        yield from (Path(folder) / name for name in names if not name.startswith("."))


def _source_of(name: str) -> str | None:
    """Return the data.source that reads files of this name."""
    return next((source for source, suffixes in SUFFIXES.items() if name.endswith(suffixes)), None)


def _check_kind_of_file(path: str, kind: str) -> None:
    other = _source_of(path)
    if other not in (None, kind) and not path.endswith(SUFFIXES[kind]):
        raise DataError(f"data.path={path}: data.source={kind} does not read such files; set data.source={other}")


def _check_one_kind(path: str, root: Path, kind: str, found: list[Path], everything: list[Path]) -> None:
    """Refuse a folder with files of another source: only the user knows whether they are documents too."""
    others: dict[str, list[str]] = {}
    for file in sorted(everything):
        other = _source_of(file.name)
        if other not in (None, kind) and file not in found and not _stands_beside(file, other):
            others.setdefault(str(other), []).append(file.relative_to(root).as_posix())
    if not others:
        return
    parts = []
    for other, names in others.items():
        more = f" and {len(names) - _SHOWN_FILES:,} more" if len(names) > _SHOWN_FILES else ""
        files = "1 file" if len(names) == 1 else f"{len(names):,} files"
        parts.append(f"{files} of data.source={other} ({', '.join(names[:_SHOWN_FILES])}{more})")
    if not found:
        raise DataError(
            f"data.path={path}: no files of data.source={kind} in this folder, but {' and '.join(parts)}; set "
            f"data.source={next(iter(others))}"
        )
    suffix = PARQUET_SUFFIXES[0] if kind == "parquet" else "".join(found[0].suffixes[-2:])
    pattern = f"{root.as_posix()}/**/*{suffix}"
    raise DataError(
        f"data.path={path}: beside {len(found):,} files of data.source={kind} this folder holds {' and '.join(parts)}, "
        f"which would not be read; name the files that are meant with a glob, such as data.path='{pattern}', or move "
        "the others away"
    )


def _stands_beside(file: PurePath, source: str) -> bool:
    return source == "text" and file.name.lower().startswith(_BESIDE_DATA)
