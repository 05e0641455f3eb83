"""Whatever a recipe or an override says, the command prints the recipe or what is wrong with it: 0 or 2."""

from __future__ import annotations

import contextlib
import io
import tempfile
from pathlib import Path

from hypothesis import example, given, settings
from hypothesis import strategies as st

from pldr_train.cli import main
from pldr_train.recipe import recipe_keys

BASE = "run: {name: a}\ndata: {source: quickstart}\n"
ODD = (
    "1e308", "-1e308", ".nan", "-.inf", "1e-320", str(2**63), "1" + "0" * 400, "-1", "0", "null", "~", "true", "''",
    '"a\\0b"', '"\\ud83d"', '"\\ud83d\\ude00"', "[1, 2, 3]", "[[1]]", "{a: 1}", "*a", "&a [*a]", "!!int x", "!!bool x",
    "2024-99-99", "[" * 2000, "a: b: c", "\udce9", "x" * 200_000,
)  # fmt: skip
VALUES = st.sampled_from(ODD) | st.integers().map(str) | st.floats().map(repr) | st.text(max_size=20)


def ends_in_words(content: bytes, *overrides: str) -> None:
    errors = io.StringIO()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_bytes(content)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
            code = main(["fit", str(path), "--print-recipe", *overrides])
    assert code in (0, 2)
    assert (code == 2) == ("error: " in errors.getvalue())
    assert len(errors.getvalue()) < 20_000


@settings(max_examples=300, derandomize=True, deadline=None)
@given(key=st.sampled_from(recipe_keys()), value=VALUES)
def test_any_value_of_any_key(key: str, value: str) -> None:
    ends_in_words(BASE.encode(), f"{key}={value}")


@settings(max_examples=150, derandomize=True, deadline=None)
@given(changes=st.lists(st.tuples(st.integers(0, len(BASE) - 1), st.binary(max_size=3)), max_size=4))
@example(changes=[(0, b"\xff")])
def test_a_recipe_with_other_bytes(changes: list[tuple[int, bytes]]) -> None:
    content = BASE.encode()
    for place, put in changes:
        content = content[:place] + put + content[place + len(put) :]
    ends_in_words(content)


@settings(max_examples=100, derandomize=True, deadline=None)
@given(text=st.text(max_size=200) | st.lists(st.sampled_from("[]{}:,-&*a!?|>'\"\n \t#%@"), max_size=60).map("".join))
def test_a_file_of_anything(text: str) -> None:
    ends_in_words(text.encode("utf-8", "surrogatepass"))
