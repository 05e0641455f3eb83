"""Why a run's last training ended before its last step, kept in the run's folder for those who look later."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from pldr_train.errors import ReportedElsewhereError, UserError, first_line
from pldr_train.runs.folder import RunFolder
from pldr_train.runs.layout import STOPPED_FILE

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


def write_stop_reason(folder: RunFolder, text: str) -> None:
    """Write a reason; that it cannot be written must not hide what ended the run."""
    with suppress(OSError, UserError):
        folder.write(STOPPED_FILE, json.dumps({"text": text[:_MOST_CHARACTERS]}, ensure_ascii=False) + "\n")
