"""Where commands may write: never over what a run keeps, and over a file only if such a command has written it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from stat import S_ISREG

from pldr_train.errors import DataError
from pldr_train.recipe.yaml_text import read_recipe_file
from pldr_train.runs.layout import RECIPE_FILE, RUN_FILES, RUN_FOLDERS, SIGNS_OF_A_RUN
from pldr_train.untrusted import open_regular, read_json

_HEAD_BYTES = 2**16


def check_output(path: Path, option: str, is_ours: Callable[[Path], bool], what: str) -> None:
    """Check that a command may write the file `path`, before the work is done.

    Args:
        path: what is to be written.
        option: that names it, for the message.
        is_ours: whether a file is what such a command writes; it may raise OSError and ValueError.
        what: that, in words, such as "a report of pldr_train".

    Raises:
        DataError: it is a folder or no regular file, belongs to a run, or is something else than `what`.
    """
    keep_off_runs(path, option)
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return  # a link that leads nowhere is replaced, not followed
    except OSError as error:
        raise DataError(f"{option} {path}: {error.strerror}; name another file") from error
    if path.is_dir():
        raise DataError(f"{option} {path} is a folder; name a file in it")
    if not S_ISREG(status.st_mode):
        raise DataError(f"{option} {path} is no regular file; name a file")
    try:
        is_known = status.st_size == 0 or is_ours(path)
    except (OSError, ValueError):
        is_known = False
    if not is_known:
        raise DataError(f"{option} {path} exists and is not {what}, so it is not replaced; name another, or remove it")


def is_recipe(path: Path) -> bool:
    """Return whether a file is a recipe."""
    return "run" in read_recipe_file(path)


def keep_off_runs(path: Path, option: str) -> None:
    """Refuse to write what a run's folder keeps: its records and all below its checkpoints and snapshots.

    Raises DataError.
    """
    # The name itself is not followed: it is replaced when it is a link.
    where = path.parent.resolve() / path.name
    for folder in where.parents:
        if (folder / RECIPE_FILE).is_file() and any((folder / sign).exists() for sign in SIGNS_OF_A_RUN):
            name = where.relative_to(folder).parts[0]
            if name in RUN_FOLDERS or name in RUN_FILES:
                raise DataError(f"{option} {path}: belongs to the run in {folder}; name another place")


def is_json_with(*keys: str) -> Callable[[Path], bool]:
    """Return whether a file is a JSON object with these keys among others."""

    def check(path: Path) -> bool:
        values = read_json(path)
        return isinstance(values, dict) and values.keys() >= set(keys)

    return check


def begins_with(start: bytes, mark: bytes = b"") -> Callable[[Path], bool]:
    """Return whether a file begins with some bytes, and has others near its beginning."""

    def check(path: Path) -> bool:
        with open_regular(path) as file:
            head = file.read(_HEAD_BYTES)
        return head.startswith(start) and mark in head

    return check


def is_safetensors(path: Path) -> bool:
    """Return whether a file has the header of safetensors: its length, then JSON."""
    with open_regular(path) as file:
        length, begin = int.from_bytes(file.read(8), "little"), file.read(1)
    return begin == b"{" and 2 <= length <= path.stat().st_size - 8
