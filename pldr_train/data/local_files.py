"""Which files of the disk a path means, as a manifest that is not counted yet."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from pathlib import Path

from pldr_train.data.manifest import Manifest, SourceFile
from pldr_train.errors import DataError

PARQUET_SUFFIXES = (".parquet",)
JSONL_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json.gz", ".json.zst", ".ndjson", ".ndjson.gz", ".ndjson.zst")


def local_manifest(
    path: str, text_column: str, suffixes: Sequence[str] = PARQUET_SUFFIXES, kind: str = "parquet"
) -> tuple[Manifest, Path]:
    """Files that `path` (a file, a folder with its subfolders, or a glob) means, sorted by name, and their folder.

    Raises DataError when there are none.
    """
    root, names = _resolve(path, tuple(suffixes))
    files = []
    for name in names:
        try:
            files.append(SourceFile(name, (root / name).stat().st_size))
        except OSError as error:
            raise DataError(f"{root / name}: cannot be read ({error.strerror}); mend or remove it") from error
    return Manifest({"kind": kind, "path": path}, text_column, tuple(files)), root


def _resolve(path: str, suffixes: tuple[str, ...]) -> tuple[Path, list[str]]:
    root = Path(path)
    kinds = " or ".join(suffixes[:3]) if len(suffixes) < 4 else ", ".join(suffixes)
    if root.is_file():
        return root.parent, [root.name]
    if root.is_dir():
        found = [Path(folder) / name for folder, _, names in os.walk(root) for name in names if name.endswith(suffixes)]
        if not found:
            raise DataError(
                f"data.path={path}: no {kinds} files in this folder; give a folder, file or glob that has some"
            )
    elif glob.has_magic(path):
        found = [Path(match) for match in glob.glob(path, recursive=True) if os.path.isfile(match)]
        if not found:
            raise DataError(f"data.path={path}: the glob matches no file; check the pattern (quote it in a shell)")
        root = Path(os.path.commonpath([match.parent for match in found]))
    else:
        raise DataError(f"data.path={path}: no such file or folder; give an existing file, folder or glob")
    return root, sorted(file.relative_to(root).as_posix() for file in found)
