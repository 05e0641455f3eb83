"""A recipe for texts of one's own: from a folder to a run that trains."""

from __future__ import annotations

import gzip
import json
import random
import re
import shlex
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pldr_train.cli import main
from pldr_train.commands import COMMANDS
from pldr_train.data.tokenizer.training import train_tokenizer
from pldr_train.drafting import CPU_BUDGET_S, EPOCHS, SIZES, Machine, Texts, draft_recipe, look_at
from pldr_train.errors import DataError
from pldr_train.fit import fit
from pldr_train.models.generating import Generator, Settings
from pldr_train.recipe import load_recipe, recipe_from_dict
from pldr_train.recipe.yaml_text import parse_yaml
from tests.processes import ROOT
from tests.tiny import WORDS

CPU, GPU = Machine(2, has_gpu=False), Machine(16, has_gpu=True)


def texts_of(count: int) -> list[str]:
    return [" ".join(WORDS[(index + step) % len(WORDS)] for step in range(40)) + "." for index in range(count)]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("kind", ["txt", "md", "jsonl", "jsonl.gz", "parquet"])
def test_each_kind_of_file_gives_a_recipe_that_says_what_is_there(here: Path, kind: str) -> None:
    folder = here / "my texts"
    folder.mkdir()
    written = texts_of(60)
    if kind in ("txt", "md"):
        for index, text in enumerate(written):
            (folder / f"{index}.{kind}").write_text(text)
    elif kind == "parquet":
        pq.write_table(pa.table({"id": [str(i) for i in range(60)], "text": written}), folder / "a.parquet")
    else:
        lines = "".join(json.dumps({"body": text, "n": 1}) + "\n" for text in written)
        (folder / f"a.{kind}").write_bytes(gzip.compress(lines.encode()) if kind.endswith("gz") else lines.encode())
    # Neither is a document: what stands beside a data set, and what is hidden.
    (folder / (".hidden.txt" if kind in ("txt", "md") else "README.md")).write_text("not a document")
    assert main(["init", str(folder), "--out", "own.yaml"]) == 0
    recipe = load_recipe("own.yaml").resolved()
    expected = {"txt": "text", "md": "text", "jsonl": "jsonl", "jsonl.gz": "jsonl", "parquet": "parquet"}
    assert (recipe.data.source, recipe.data.path) == (expected[kind], str(folder))
    assert recipe.run.name == "my-texts"
    assert recipe.data.text_column == {"parquet": "text"}.get(kind, "body" if "jsonl" in kind else "content")
    assert recipe.optim.warmup_steps == recipe.trainer.max_steps // 10
    found = look_at(folder)
    assert (found.documents, round(found.mean_bytes)) == (60, round(sum(map(len, written)) / 60))


@pytest.mark.parametrize(
    ("alphabet", "least", "most"),
    [("abc d", 263, 511), ("".join(map(chr, range(0x4E00, 0x4E00 + 900))), 1000, 4000)],
    ids=["few characters", "many characters"],
)
def test_the_vocabulary_is_one_that_the_texts_allow(here: Path, alphabet: str, least: int, most: int) -> None:
    generator = random.Random(0)
    paragraphs = ["".join(generator.choices(alphabet, k=12 if least < 500 else 900)) for _ in range(30)]
    Path("a.txt").write_text("\n\n".join(paragraphs))
    texts = look_at(Path("a.txt"))
    assert least <= texts.vocab_size <= most
    train_tokenizer(paragraphs[:28], here / "t.model", texts.vocab_size)


def test_the_drafted_recipe_trains_and_its_model_answers(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("book.txt").write_text("\n\n".join(texts_of(300)))
    assert main(["init", "book.txt"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"texts +300 documents of \d+ bytes, some [\d,]+ tokens", out)
    assert "next        pldr-train fit book.yaml\n" in out
    recipe = load_recipe("book.yaml", ["trainer.max_steps=3", "logging.wandb=disabled", "data.num_workers=0"])
    assert recipe.data.document_separator == "\n\n"
    outcome = fit(recipe)
    assert outcome.step == 3
    answer = Generator(outcome.folder).continue_prompt("the metric", Settings(max_new_tokens=3))
    assert answer.texts[0].startswith("the metric")


@pytest.mark.parametrize(
    ("megabytes", "machine", "size", "vocab_size"),
    [(0.3, CPU, 0, 1024), (2, CPU, 0, 4096), (2000, CPU, 1, 16_384), (1000, GPU, 2, 16_384), (10_000, GPU, 3, 32_000)],
)
def test_sizes_follow_the_text_and_the_machine(megabytes: float, machine: Machine, size: int, vocab_size: int) -> None:
    texts = Texts("text", "content", None, round(megabytes * 1000), 1000.0, vocab_size)
    draft = draft_recipe(Path("texts"), "own", machine, texts)
    recipe = recipe_from_dict(parse_yaml(draft.text)).resolved()
    model = recipe.model
    chosen = SIZES[size]
    assert (model.num_hidden_layers, model.num_attention_heads, model.head_dim) == (
        chosen.layers, chosen.heads, chosen.head_dim,
    )  # fmt: skip
    assert model.vocab_size == vocab_size
    assert (recipe.trainer.accelerator, recipe.trainer.precision) == (
        ("auto", "bf16") if machine.has_gpu else ("cpu", "fp32")
    )
    tokens = recipe.trainer.max_steps * recipe.trainer.batch_size * recipe.data.context_length
    assert recipe.trainer.max_steps == 100 or tokens <= EPOCHS * texts.tokens
    assert machine.has_gpu or draft.minutes * 60 <= CPU_BUDGET_S


def test_what_cannot_be_drafted_says_what_to_give(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*arguments: str) -> str:
        assert main(["init", *arguments]) == 2
        return capsys.readouterr().err

    assert "nowhere: no such file or folder" in refused("nowhere")
    folder = here / "texts"
    folder.mkdir()
    assert "holds no text files; give txt, md, jsonl or parquet files" in refused("texts")
    (folder / "a.txt").write_text("short")
    assert "are too little to train on" in refused("texts")
    pq.write_table(pa.table({"a": texts_of(60), "b": texts_of(60)}), folder / "b.parquet")
    assert "holds 1 parquet files and 1 text files; choose one with --source parquet or text" in refused("texts")
    assert "2 columns of text (a, b); name the one to train on with --text-column" in refused("texts/b.parquet")
    (folder / "c.jsonl").write_text("[1]\n")
    assert "its first line is no JSON object" in refused("texts/c.jsonl")
    (folder / "d.parquet").write_text("x")
    assert "no Parquet file" in refused("texts/d.parquet")
    assert "no folder none" in refused("texts/b.parquet", "--out", "none/x.yaml")
    Path("b.yaml").write_text("kept")
    assert "b.yaml exists" in refused("texts/b.parquet", "--text-column", "a")
    assert Path("b.yaml").read_text() == "kept"
    assert "run.name" in refused("texts/b.parquet", "--text-column", "a", "--name", "a/b", "--out", "new.yaml")
    assert not Path("new.yaml").exists()
    with pytest.raises(DataError, match="too little"):
        draft_recipe(folder, "x", CPU, Texts("text", "content", None, 0, 0.0, 512))


def test_the_tutorials_commands_are_understood_as_written(monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs" / "own-text.md").read_text()
    lines = re.findall(r"^pldr-train (.+)$", page, re.MULTILINE) + re.findall(r"`pldr-train ([^`]+)`", page)
    assert {"init", "fit", "generate", "evaluate", "export", "explain"} <= {line.split()[0] for line in lines}
    ran = []
    for command in COMMANDS.values():
        monkeypatch.setattr(command.load(), "run", lambda options: ran.append(options.given) or 0)
    for line in lines:
        assert main(shlex.split(line, comments=True)) == 0, line
    assert len(ran) == len(lines)
