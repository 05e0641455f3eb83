"""Where the package's messages go: the terminal's handler, and the user's own logging."""

from __future__ import annotations

import io
import logging
import multiprocessing
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pldr_train.printing import (
    log_as_parent,
    log_to_terminal,
    log_to_terminal_by_default,
    outlive_standard_streams,
    terminal_of_messages,
)
from tests.messages import LOGGER

_log = logging.getLogger("pldr_train.data.somewhere")


@contextmanager
def root_handlers(*handlers: logging.Handler) -> Iterator[None]:
    """These alone, as in a program; pytest has some of its own there, and other ones while it sets a test up."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logging.getLogger(), "handlers", list(handlers))
        yield


def test_bare_messages_go_to_the_standard_output_of_the_moment(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    log_to_terminal()
    _log.info("100 % of {these}\n  stand as they are")
    _log.debug("left out")
    _log.warning("a warning")
    assert capsys.readouterr() == ("100 % of {these}\n  stand as they are\na warning\n", "")
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    _log.info("elsewhere")
    assert sys.stdout.getvalue() == "elsewhere\n"
    assert capsys.readouterr().out == ""


def test_a_further_call_changes_stream_and_rank_and_prints_nothing_twice(capsys: Any) -> None:
    log_to_terminal()
    log_to_terminal(stream="stderr")
    _log.info("once")
    assert capsys.readouterr() == ("", "once\n")
    assert len(LOGGER.handlers) == 1
    log_to_terminal(rank=1)
    _log.warning("every rank finds this")
    assert capsys.readouterr() == ("", "")
    log_to_terminal()
    _log.info("back")
    assert capsys.readouterr() == ("back\n", "")


class _Gone(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError


@pytest.mark.parametrize("gone", [_Gone(), None, "closed"])
def test_an_output_that_is_gone_ends_nothing(monkeypatch: pytest.MonkeyPatch, capsys: Any, gone: Any) -> None:
    if gone == "closed":
        gone = io.StringIO()
        gone.close()
    log_to_terminal()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", gone)
        _log.info("lost")
    _log.info("seen")
    assert capsys.readouterr() == ("seen\n", "")


def test_messages_take_part_in_outliving_the_standard_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(sys, "stderr", io.StringIO())
        log_to_terminal()
        outlive_standard_streams()
        _log.info("the reader has left")
        assert os.path.samestat(os.fstat(writer), os.stat(os.devnull))


def test_without_any_logging_set_up_a_run_prints(capsys: Any) -> None:
    with root_handlers():
        log_to_terminal_by_default(0)
        _log.info("begun")
        assert capsys.readouterr() == ("begun\n", "")
        log_to_terminal_by_default(2)  # the command line attaches the handler before it knows the rank
        _log.warning("of rank 2")
        assert capsys.readouterr() == ("", "")


def test_with_logging_of_the_users_own_that_alone_decides(capsys: Any) -> None:
    written = io.StringIO()
    users = logging.StreamHandler(written)
    users.setFormatter(logging.Formatter("%(levelname)s %(name)s %(message)s"))
    with root_handlers(users):
        log_to_terminal_by_default(0)
        _log.info("too much by default")
        _log.warning("of all ranks")
        LOGGER.setLevel(logging.INFO)
        _log.info("wanted")
    assert written.getvalue() == f"WARNING {_log.name} of all ranks\nINFO {_log.name} wanted\n"
    assert capsys.readouterr() == ("", "")


def test_a_handler_of_the_packages_logger_counts_as_the_users_own(capsys: Any) -> None:
    handler = logging.NullHandler()
    LOGGER.addHandler(handler)
    with root_handlers():
        log_to_terminal_by_default(0)
        _log.warning("thrown away as wished")
    assert LOGGER.handlers == [handler]
    assert capsys.readouterr() == ("", "")


def test_a_level_that_the_user_has_set_stays(capsys: Any) -> None:
    LOGGER.setLevel(logging.WARNING)
    log_to_terminal()
    _log.info("not wanted")
    _log.warning("wanted")
    assert capsys.readouterr().out == "wanted\n"


def _say_in_child(path: str, terminal: Any) -> None:
    log_as_parent(terminal)
    with open(path, "w", encoding="utf-8") as stream:
        sys.stderr = stream
        logging.getLogger("pldr_train.data").info("trying again")


@pytest.mark.parametrize(("rank", "expected"), [(0, "trying again\n"), (1, "")])
def test_a_process_that_is_spawned_prints_as_its_parent(tmp_path: Path, rank: int, expected: str) -> None:
    log_to_terminal(rank, "stderr")
    said = tmp_path / "said"
    child = multiprocessing.get_context("spawn").Process(target=_say_in_child, args=(str(said), terminal_of_messages()))
    child.start()
    child.join()
    assert child.exitcode == 0
    assert said.read_text() == expected
