"""Options of all commands: whatever is written for a number, there is an answer in words and exit code 2."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pldr_train.cli import main
from pldr_train.commands import COMMANDS, options
from pldr_train.commands.options import TwoWordParser

WRONG = ("nan", "inf", "-inf", "-1", "1e999", str(2**64), "9" * 5000, "9" * 400, "", "x", "\udce9", "0x10", "1e-400x")
TEXTS = (options.readable_text, Path)


def parsers() -> Iterator[argparse.ArgumentParser]:
    for command in COMMANDS.values():
        parser = command.load().build_parser()
        if isinstance(parser, TwoWordParser):
            yield from (action.build_parser() for action in parser.actions.values())
        else:
            yield parser


def numbers() -> dict[str, argparse.Action]:
    return {
        f"{parser.prog} {action.dest}": action
        for parser in parsers()
        for action in parser._actions
        if action.type is not None and action.type not in (*TEXTS, options.device)
    }


def test_every_number_of_every_command_is_bounded() -> None:
    found = numbers()
    assert len(found) >= 25
    for name, action in found.items():
        assert action.type not in (int, float), f"{name} has no bounds"
        for text in WRONG:
            # What argparse turns into a message and exit code 2; anything else would be a traceback.
            with pytest.raises((argparse.ArgumentTypeError, ValueError)):
                action.type(text)  # type: ignore[operator]


@pytest.mark.parametrize("words", [
    ("--top-k", "-1"), ("--seed", str(2**64)), ("--temperature", "1e-40"), ("--temperature", "nan"),
    ("--device", "meta"), ("--device", "cuda:-1"), ("--max-new-tokens", "0"), ("--num-beams", "2000000000"),
    ("--top-p", "1.5"),
])  # fmt: skip
def test_what_generation_cannot_use_names_the_option(
    words: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        main(["generate", "model", "a", *words])
    assert left.value.code == 2
    assert f"argument {words[0]}: {words[1]}: must be" in capsys.readouterr().err


def test_numbers_that_are_in_use_are_taken() -> None:
    assert options.temperature("0") == 0
    assert options.temperature("0.7") == 0.7
    assert options.share("1") == 1
    assert options.seed(str(2**63 - 1)) == 2**63 - 1
    assert [options.device(each) for each in ("auto", "cpu", "cuda", "cuda:7")][-1] == "cuda:7"


def test_bytes_that_are_no_utf8_are_answered_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    argument = b"caf\xe9".decode("utf-8", "surrogateescape")
    for words in (["generate", "model", argument], ["extract-g", "model", "G.safetensors", "--text", argument]):
        with pytest.raises(SystemExit) as left:
            main(words)
        assert left.value.code == 2
        assert "character 4 is not valid UTF-8; convert the text" in capsys.readouterr().err


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_standard_input_that_is_no_utf8_is_one_message(errors: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from pldr_train.commands.generate import _next_line
    from pldr_train.errors import DataError

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8", errors=errors))
    with pytest.raises(DataError, match="standard input: no text in utf-8"):
        _next_line()
