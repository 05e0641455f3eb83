"""What a run notes of itself: with what it was started, and why its last training ended before its last step."""

from __future__ import annotations

import functools
import json
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pldr_train.errors import ReportedElsewhereError, UserError, first_line
from pldr_train.runs.folder import RunFolder
from pldr_train.runs.layout import STOPPED_FILE


@functools.cache
def environment() -> dict[str, Any]:
    """Return the versions, machine, git state and command, as plain types."""
    packages = {}
    for name in ("pldr_train", "torch", "lightning", "deepspeed", "transformers", "datasets", "sentencepiece", "numpy"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = "not installed"
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages,
        "git": _git_state(),
        "command": sys.argv,
    }


def _git_state() -> dict[str, Any] | None:
    """Return the commit of the code that runs and whether it was changed; `None` outside a git checkout."""
    root = Path(__file__).resolve().parent
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True, timeout=10
        )
        status = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"],
            cwd=root, capture_output=True, text=True, check=True, timeout=10,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit.stdout.strip(), "changed": bool(status.stdout.strip())}


_MOST_CHARACTERS = 2000


@contextmanager
def keeping_stop_reason(folder: RunFolder, passing: tuple[type[BaseException], ...] = ()) -> Iterator[None]:
    """Write down what ends the training inside; at its beginning the reason of the training before is removed.

    The process that has the error writes it, unless it is one of `passing`, after which the training goes on. A process
    that is killed leaves no reason.
    """
    with suppress(OSError):
        (folder.path / STOPPED_FILE).unlink(missing_ok=True)
    try:
        yield
    except ReportedElsewhereError:
        raise
    except UserError as error:
        write_stop_reason(folder, str(error))
        raise
    except BaseException as error:
        if isinstance(error, passing):
            raise
        text = first_line(error)
        name = type(error).__name__
        write_stop_reason(folder, text if text == name else f"{name}: {text}")
        raise


def write_stop_reason(folder: RunFolder, text: str, is_finished: bool = False) -> None:
    """Write a reason; that it cannot be written must not hide what ended the run.

    Args:
        folder: of the run, held.
        text: the reason.
        is_finished: whether the run came to its end by it, as an early end is one.
    """
    values = {"text": text[:_MOST_CHARACTERS]} | ({"finished": True} if is_finished else {})
    with suppress(OSError, UserError):
        folder.write(STOPPED_FILE, json.dumps(values, ensure_ascii=False) + "\n")
