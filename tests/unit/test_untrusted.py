"""Files that anything may have happened to: an error that says what is wrong, soon and in little memory."""

from __future__ import annotations

import errno
import json
import os
import threading
import tracemalloc
from pathlib import Path

import pytest
from ruamel.yaml.error import YAMLError

from pldr_train.cli import main
from pldr_train.commands import schema
from pldr_train.errors import RecipeError
from pldr_train.recipe import load_recipe
from pldr_train.recipe.yaml_text import parse_yaml, read_recipe_file
from pldr_train.untrusted import MOST_DEPTH, parse_json, read_json, read_text


def test_json_that_is_none_is_a_value_error(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    deep = "[" * MOST_DEPTH + "]" * MOST_DEPTH
    assert json.dumps(parse_json(deep)) == deep
    for content in (b"[" * 100_000, b'{"a":' * 100_000, f"[{deep}]".encode(), b"\xff", b"", b"9" * 5000, b"{"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=".+"):
            read_json(path)
    path.write_bytes(b"\xef\xbb\xbf[1]")
    assert read_json(path) == [1]
    with pytest.raises(ValueError, match="more than 5 bytes"):
        read_json(path, most_bytes=5)


def test_pipes_and_devices_are_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        with pytest.raises(OSError, match="not a regular file|directory") as raised:
            read_text(path)
        assert raised.value.errno in (errno.EINVAL, errno.EISDIR)


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{new}: &{new} [{','.join(['*' + old] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize("text", [
    BOMB, "&a [*a]", "&a {b: *a}", "[" * 5000, "- " * 5000, "{a: " * 5000, '"\\ud83d"', '"\\ude00\\ud83d"', "!!int ''",
    "!!bool x", "!!python/object/apply:os.getpid []", "9" * 5000, "2024-99-99", "\x00", "!!binary é", "*nothing",
])  # fmt: skip
def test_hostile_yaml_is_refused_in_little_memory(text: str, tmp_path: Path) -> None:
    tracemalloc.start()
    try:
        with pytest.raises((YAMLError, ValueError)):
            parse_yaml(text)
        assert tracemalloc.get_traced_memory()[1] < 50e6
    finally:
        tracemalloc.stop()
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    with pytest.raises(RecipeError) as raised:
        read_recipe_file(path)
    assert "\n" not in str(raised.value)


def test_aliases_as_people_write_them_and_emoji_as_json_writes_them_are_read() -> None:
    assert parse_yaml("a: &x {b: 1}\nc: {<<: *x, d: [*x, *x]}") == {"a": {"b": 1}, "c": {"b": 1, "d": [{"b": 1}] * 2}}
    assert parse_yaml(json.dumps(["\U0001f600 \U0001d54f", "é"])) == ["\U0001f600 \U0001d54f", "é"]


def test_a_recipe_may_come_from_a_pipe_but_is_never_large(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(
        target=lambda: (tmp_path / "pipe").write_text("run: {name: a}\ndata: {source: quickstart}")
    )
    writer.start()
    assert load_recipe(tmp_path / "pipe").run.name == "a"
    writer.join()
    with pytest.raises(RecipeError, match="/dev/zero is no recipe: more than 1,048,576 bytes"):
        load_recipe("/dev/zero")


def test_what_the_system_refuses_is_one_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def raising(error: BaseException) -> None:
        def command(_: object) -> int:
            raise error

        monkeypatch.setattr(schema, "run", command)

    raising(PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/data/a"))
    assert main(["schema"]) == 2
    assert capsys.readouterr().err == "error: /data/a: permission denied; change its permissions, or name another\n"
    raising(OSError(errno.EIO, os.strerror(errno.EIO), "/data/a", None, "/data/b"))
    assert main(["schema"]) == 2
    assert capsys.readouterr().err.startswith("error: /data/a -> /data/b: input/output error; its disk")
    # What names no file, and every defect, keeps its traceback.
    for error in (OSError(errno.EBADF, "Bad file descriptor"), OSError("no number"), RecursionError(), KeyError("a")):
        raising(error)
        with pytest.raises(type(error)):
            main(["schema"])
