"""`pldr-train tokenizer` as a user meets it."""

from __future__ import annotations

import io
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pldr_train.commands.tokenizer_progress import ReadingProgress, with_heartbeat
from pldr_train.data.tokenizer.line_sample import LineSample
from pldr_train.data.tokenizer.training import load_tokenizer, train_tokenizer
from pldr_train.errors import DataError
from tests.cli.test_cli import assert_user_error, write_recipe
from tests.processes import SERVER, run_cli
from tests.tiny import VOCAB_SIZE, WORDS, tiny_values


@pytest.fixture
def recipe(tiny_data: Path, tmp_path: Path) -> Path:
    return write_recipe(tmp_path / "tiny.yaml", tiny_values(tiny_data, tmp_path / "runs"))


def documents(tiny_data: Path) -> list[str]:
    files = sorted((tiny_data / "corpus").glob("*.parquet"))
    return [text for file in files for text in pq.read_table(file)["content"].to_pylist()]


def test_a_recipes_documents_become_the_tokenizer_that_it_names(recipe: Path, tiny_data: Path, tmp_path: Path) -> None:
    target = tmp_path / "sub" / "tokenizer.model"
    result = run_cli("tokenizer", "train", recipe, f"data.tokenizer={target}")
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    expected = train_tokenizer(documents(tiny_data), tmp_path / "expected.model", VOCAB_SIZE)
    assert target.read_bytes() == expected.read_bytes()
    assert list(target.parent.iterdir()) == [target]
    for part in (
        "documents   [0, 120), all that there are of [0, 2,000,000)",
        "read        documents [0, 120)",
        "training    320 pieces on 120 lines (all)",
        "pieces      320 in",
        f"file        {target} ({target.stat().st_size:,} bytes)",
        f"use         data.tokenizer={target}",
    ):
        assert part in result.stdout, result.stdout


def test_options_stand_anywhere_and_choose_documents_output_and_sample(
    recipe: Path, tiny_data: Path, tmp_path: Path
) -> None:
    target = tmp_path / "part.model"
    given = ("--documents", "20", "70", recipe, "model.vocab_size=310", "--output", target)
    assert run_cli("tokenizer", "train", *given).returncode == 0
    expected = train_tokenizer(documents(tiny_data)[20:70], tmp_path / "expected.model", 310)
    assert target.read_bytes() == expected.read_bytes()
    assert_user_error(run_cli("tokenizer", "train", *given), str(target), "is there already", "--overwrite", "--output")

    sampled = run_cli("tokenizer", "train", *given, "--overwrite", "--sample-bytes", "4KB")
    assert sampled.returncode == 0, sampled.stderr
    assert "lines (of 50)" in sampled.stdout
    first = target.read_bytes()
    assert first != expected.read_bytes()
    assert run_cli("tokenizer", "train", *given, "--overwrite", "--sample-bytes", "4_000").returncode == 0
    assert target.read_bytes() == first


def test_a_settings_file_and_json_lines(recipe: Path, tiny_data: Path, tmp_path: Path) -> None:
    texts = documents(tiny_data)
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"content": text}) + "\n" for text in texts))
    settings = tmp_path / "settings.yaml"
    settings.write_text("documents: [0, 100]\nvocab_size: 320\nmax_sentence_length: 300\n")
    values = (recipe, "data.source=jsonl", f"data.path={tmp_path / 'texts.jsonl'}", f"data.cache_dir={tmp_path}")
    result = run_cli(
        "tokenizer", "train", *values, "--settings", settings, "--output", tmp_path / "t.model", "--verbose"
    )
    assert result.returncode == 0, result.stderr
    num_long = sum(len(text) > 300 for text in texts[:100])
    assert num_long > 0
    assert f"left out    {num_long} lines of more than 300 bytes" in result.stdout
    assert "trainer_interface.cc" in result.stderr
    assert load_tokenizer(tmp_path / "t.model").get_piece_size() == 320
    settings.write_text("vocab_size: 32000\n")
    assert_user_error(
        run_cli("tokenizer", "train", *values, "--settings", settings, "--output", tmp_path / "u.model"),
        "vocab_size=32000", "model.vocab_size=320", str(settings),
    )  # fmt: skip


def test_what_is_skipped_is_said(recipe: Path, tiny_data: Path, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    texts = documents(tiny_data)
    pq.write_table(pa.table({"content": texts}), shards / "a.parquet", row_group_size=40, use_dictionary=False)
    column = pq.read_metadata(shards / "a.parquet").row_group(1).column(0)
    content = bytearray((shards / "a.parquet").read_bytes())
    content[column.data_page_offset : column.data_page_offset + column.total_compressed_size] = bytes(
        column.total_compressed_size
    )
    (shards / "a.parquet").write_bytes(content)
    given = ("tokenizer", "train", recipe, f"data.path={shards}", "--output", tmp_path / "t.model")
    assert_user_error(run_cli(*given), "a.parquet, row group 1", "data.on_bad_shard=skip")
    result = run_cli(*given, "data.on_bad_shard=skip")
    assert result.returncode == 0, result.stderr
    assert "skipped     a.parquet, row group 1" in result.stdout
    expected = train_tokenizer(texts[:40] + texts[80:], tmp_path / "expected.model", VOCAB_SIZE)
    assert (tmp_path / "t.model").read_bytes() == expected.read_bytes()


TRAINING_MISTAKES = {
    "no recipe": (["nowhere.yaml"], ["nowhere.yaml"]),
    "no output": (["RECIPE", "data.tokenizer=null"], ["data.tokenizer", "--output"]),
    "output is a folder": (["RECIPE", "--output", "FOLDER"], ["is a folder"]),
    "output cannot be written": (
        ["RECIPE", "--output", "/proc/nothing/t.model"],
        ["cannot write /proc/nothing/t.model"],
    ),
    "documents beyond the source": (
        ["RECIPE", "--output", "NEW", "--documents", "100", "200"],
        ["--documents 100 200", "120 documents", "lower STOP"],
    ),
    "no interval": (["RECIPE", "--output", "NEW", "--documents", "5", "5"], ["--documents 5 5", "START < STOP"]),
    "negative": (["RECIPE", "--output", "NEW", "--documents", "5", "0"], ["--documents 5 0"]),
    "settings' documents beyond the source": (
        ["RECIPE", "--output", "NEW", "--settings", "FAR"],
        ["documents: 1000 2000", "120 documents"],
    ),
    "no settings": (["RECIPE", "--output", "NEW", "--settings", "nowhere.yaml"], ["--settings nowhere.yaml"]),
    "too many pieces": (["RECIPE", "--output", "NEW", "model.vocab_size=5000"], ["model.vocab_size=5000", "only"]),
    "too many pieces for a sample": (
        ["RECIPE", "--output", "NEW", "model.vocab_size=600", "--sample-bytes", "1000"],
        ["model.vocab_size=600", "raise --sample-bytes"],
    ),
    "nothing in the sample": (["RECIPE", "--output", "NEW", "--sample-bytes", "1"], ["training text is empty"]),
    "tokens": (["RECIPE", "--output", "NEW", "data.source=tokens"], ["data.source=tokens", "no text"]),
    "missing data": (["RECIPE", "--output", "NEW", "data.path=nowhere"], ["data.path=nowhere"]),
}


@pytest.mark.parametrize("case", TRAINING_MISTAKES)
def test_a_mistake_in_training_is_one_clear_message(case: str, recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "far.yaml").write_text("documents: [1000, 2000]")
    places = {"RECIPE": recipe, "FOLDER": tmp_path, "NEW": tmp_path / "new.model", "FAR": tmp_path / "far.yaml"}
    given, parts = TRAINING_MISTAKES[case]
    assert_user_error(run_cli("tokenizer", "train", *(places.get(word, word) for word in given)), *parts)
    assert not (tmp_path / "new.model").exists()


@pytest.mark.parametrize("size", ["0", "-1", "much", "3GB", "1TB", "_", ""])
def test_a_sample_size_that_is_none_is_refused(size: str, recipe: Path) -> None:
    result = run_cli("tokenizer", "train", recipe, f"--sample-bytes={size}")
    assert result.returncode == 2
    assert "--sample-bytes" in result.stderr
    assert "such as 500MB" in result.stderr


def train_in_a_process(recipe: Path, target: Path, output: Path) -> None:
    from pldr_train.cli import main

    os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT), 1)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main(["tokenizer", "train", str(recipe), "--output", str(target)]))


def test_an_interrupt_ends_the_training_at_once(recipe: Path, tmp_path: Path) -> None:
    generator = random.Random(0)
    texts = ["".join(generator.choices("abcdefghij ", k=2000)) for _ in range(3000)]  # some seconds of training
    (tmp_path / "corpus").mkdir()
    pq.write_table(pa.table({"content": texts}), tmp_path / "corpus" / "a.parquet")
    values = tiny_values(tmp_path, tmp_path / "runs", model={"vocab_size": 8000})
    recipe, target, output = write_recipe(tmp_path / "large.yaml", values), tmp_path / "t.model", tmp_path / "output"
    process = SERVER.Process(target=train_in_a_process, args=(recipe, target, output))
    process.start()
    while not output.exists() or "training" not in output.read_text():
        assert process.is_alive()
        time.sleep(0.01)
    time.sleep(0.3)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGINT)
    process.join(240)
    assert process.exitcode == 130
    assert not target.exists()


def test_inspect_says_what_a_tokenizer_is_and_does(recipe: Path, tiny_data: Path, tmp_path: Path) -> None:
    model = tiny_data / "tokenizer.model"
    plain = run_cli("tokenizer", "inspect", model)
    assert plain.returncode == 0, plain.stderr
    for line in ("pieces                320, of which 256 bytes", "layout                as published"):
        assert line in plain.stdout
    assert "tokens per word" not in plain.stdout

    result = run_cli("tokenizer", "inspect", tiny_data, "--recipe", recipe, "--json")  # a folder with tokenizer.model
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    texts = documents(tiny_data)
    tokenizer = load_tokenizer(model)
    tokens = sum(len(tokenizer.encode(text)) for text in texts)
    assert report["file"] == str(model)
    assert report["vocabulary"]["differences"] == []
    assert (report["text"]["documents"], report["text"]["tokens"]) == (120, tokens)
    assert report["text"]["tokens_per_word"] == tokens / sum(len(text.split()) for text in texts)
    assert report["text"]["round_trip_share"] == 1

    given = ("tokenizer", "inspect", model, "--recipe", recipe, "data.train_documents=[0,60]")
    some = json.loads(run_cli(*given, "data.validation_documents=[60,90]", "--json").stdout)
    assert some["text"]["documents"] == 30
    some = json.loads(run_cli(*given, "--documents", "10", "15", "--json").stdout)
    assert some["text"]["documents"] == 5
    table = run_cli(*given).stdout
    for name in (
        "tokens per word",
        "bytes per token",
        "byte tokens",
        "vocabulary used",
        "most frequent",
        "60 documents",
    ):
        assert name in table


def test_inspect_reads_a_text_file_in_any_number_of_parts(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pldr_train.commands import tokenizer_actions as command

    text = "".join(f"{word} 漢 12  \n\n {word}s\r\n" for word in WORDS)
    file = tmp_path / "text.txt"
    file.write_bytes(b"\xef\xbb\xbf" + text.encode())
    result = run_cli("tokenizer", "inspect", tiny_data, "--text-file", file, "--json")
    report = json.loads(result.stdout)["text"]
    assert report["tokens"] == len(load_tokenizer(tiny_data / "tokenizer.model").encode(text))
    assert report["bytes"] == len(text.encode())
    monkeypatch.setattr(command, "_TEXT_CHUNK_CHARACTERS", 20)
    parts = list(command._texts_of_file(file))
    assert len(parts) > 10
    tokenizer = load_tokenizer(tiny_data / "tokenizer.model")
    assert sum(len(tokenizer.encode(part)) for part in parts) == report["tokens"]


INSPECTION_MISTAKES = {
    "no model": (["nowhere.model"], ["nowhere.model: no such file"]),
    "no model in a folder": (["FOLDER"], ["tokenizer.model: no such file"]),
    "not a model": (["RECIPE"], ["not a SentencePiece model"]),
    "values without a recipe": (["MODEL", "data.path=x"], ["data.path=x", "--recipe"]),
    "documents without a recipe": (["MODEL", "--documents", "0", "5"], ["--documents 0 5", "--recipe"]),
    "documents beyond the source": (
        ["MODEL", "--recipe", "RECIPE", "--documents", "0", "500"],
        ["--documents 0 500", "120 documents"],
    ),
    "no text file": (["MODEL", "--text-file", "nowhere.txt"], ["--text-file nowhere.txt cannot be read"]),
    "text file of bytes": (["MODEL", "--text-file", "MODEL"], ["cannot be read"]),
}


@pytest.mark.parametrize("case", INSPECTION_MISTAKES)
def test_a_mistake_in_inspecting_is_one_clear_message(case: str, recipe: Path, tiny_data: Path, tmp_path: Path) -> None:
    places = {"RECIPE": recipe, "FOLDER": tmp_path, "MODEL": tiny_data / "tokenizer.model"}
    given, parts = INSPECTION_MISTAKES[case]
    assert_user_error(run_cli("tokenizer", "inspect", *(places.get(word, word) for word in given)), *parts)


def test_help_names_both_actions_and_the_memory() -> None:
    assert "inspect  say what one is" in run_cli("tokenizer", "--help").stdout
    assert "20 GB" in " ".join(run_cli("tokenizer", "train", "--help").stdout.split())
    assert "--json" in run_cli("tokenizer", "inspect", "--help").stdout
    assert run_cli("tokenizer").returncode == run_cli("tokenizer", "fly").returncode == 2


def test_reading_is_shown_every_few_seconds_in_a_log_file() -> None:
    stream, now = io.StringIO(), [0.0]
    progress = ReadingProgress(1000, stream, clock=lambda: now[0])
    sample = LineSample(1000, 1000, 1000)
    sample.add(0, ["a line", "another\nand one"])
    for seconds, read in ((1.0, 100), (6.0, 400), (7.0, 500), (12.0, 1000)):
        now[0] = seconds
        progress.advance(read, sample)
    progress.end()
    assert stream.getvalue().splitlines() == [
        "reading     400 of 1,000 documents, 0 MB read, 3 lines kept, 9s left",
        "reading     1,000 of 1,000 documents, 0 MB read, 3 lines kept, 0s left",
    ]


def test_the_heartbeat_shows_time_and_memory_and_hands_on_value_and_error() -> None:
    stream, now = io.StringIO(), [0.0]

    def clock() -> float:
        now[0] += 20.0
        return now[0]

    def work() -> int:
        time.sleep(0.01)
        return 7

    assert with_heartbeat(work, stream, clock) == 7
    assert stream.getvalue().startswith("training    20s, ")
    assert "GB of memory at most so far\n" in stream.getvalue()

    def fail() -> None:
        raise DataError("x")

    with pytest.raises(DataError, match="^x$"):
        with_heartbeat(fail, stream, clock)
