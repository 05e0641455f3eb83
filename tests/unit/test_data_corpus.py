"""The quickstart corpus and tokenizer training."""

import itertools
import json
import os
import re
import subprocess
import sys
from pydoc_data.topics import topics

import datasets
import pyarrow.parquet as pq
import pytest
import sentencepiece

from pldr_train.data import files
from pldr_train.data.datamodule import PldrDataModule
from pldr_train.data.sources import quickstart
from pldr_train.data.sources.file_source import FileSource, count_rows
from pldr_train.data.sources.local_files import LocalFiles, local_manifest
from pldr_train.data.sources.quickstart import build_quickstart_corpus
from pldr_train.data.tokenizer import automatic
from pldr_train.data.tokenizer.automatic import quickstart_tokenizer
from pldr_train.data.tokenizer.training import check_vocabulary, load_tokenizer, train_tokenizer
from pldr_train.errors import DataError
from tests.tiny import data_recipe

TEXTS = [topics[name] for name in sorted(topics)[:25]]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    cache_dir = tmp_path_factory.mktemp("cache")
    build_quickstart_corpus(cache_dir)
    return cache_dir


@pytest.fixture(scope="module")
def documents(cache):
    source = open_corpus(build_quickstart_corpus(cache))
    return source.read(0, source.num_documents).texts()


def open_corpus(folder):
    manifest, root = local_manifest(str(folder), "content")
    return FileSource(count_rows(manifest, LocalFiles(root)), LocalFiles(root))


def test_corpus_is_a_megabyte_of_distinct_english_documents(documents):
    text = " ".join(documents)
    assert len(text) > 1_000_000
    assert len(set(documents)) == len(documents) > 2000
    assert min(map(len, documents)) >= 80
    words = re.findall(r"[a-z]+", text.lower())
    share = sum(word in {"the", "of", "a", "to", "is", "and", "in", "for", "if"} for word in words) / len(words)
    assert share > 0.15


def test_any_interval_of_the_corpus_is_a_fair_sample(cache):
    table = pq.read_table(build_quickstart_corpus(cache), columns=["content", "segment"])
    assert set(table["segment"].unique().to_pylist()) == {"topics", "docstrings"}
    lengths = [len(text) for text in table["content"].to_pylist()]
    halves = sum(lengths[: len(lengths) // 2]), sum(lengths[len(lengths) // 2 :])
    assert 0.6 < halves[0] / halves[1] < 1.6
    segments = table["segment"].to_pylist()
    assert all("topics" in segments[start : start + len(segments) // 4] for start in (0, len(segments) // 2))


def test_corpus_has_refinedwebs_schema_and_small_row_groups(cache, tmp_path):
    shards = sorted(build_quickstart_corpus(cache).iterdir())
    assert len(shards) >= 2
    for shard in shards:
        with pq.ParquetFile(shard) as file:
            assert file.metadata.num_row_groups > 1
            urls = file.read(columns=["url"])["url"].to_pylist()
            assert len(set(urls)) == len(urls)
    text = datasets.Value("string")
    refinedweb = datasets.Features(
        content=text,
        url=text,
        timestamp=datasets.Value("timestamp[s]"),
        dump=text,
        segment=text,
        image_urls=datasets.List(datasets.List(text)),
    )
    assert refinedweb.arrow_schema.equals(quickstart.REFINEDWEB_SCHEMA)
    files = [str(shard) for shard in shards]
    loaded = datasets.Dataset.from_parquet(files, features=refinedweb, cache_dir=str(tmp_path))
    assert (loaded.column_names, loaded[0]["image_urls"]) == (list(refinedweb), [])


def test_a_finished_corpus_is_not_built_again(cache):
    folder = build_quickstart_corpus(cache)
    before = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert build_quickstart_corpus(cache) == folder
    assert {file.name: file.stat().st_mtime_ns for file in folder.iterdir()} == before


def fake_documents(count=40):
    return [quickstart.Document(f"docstrings/{i}", "docstrings", f"text number {i} " * 8) for i in range(count)]


def test_a_build_that_dies_midway_leaves_no_corpus_and_the_next_one_succeeds(tmp_path, monkeypatch):
    monkeypatch.setattr(quickstart, "collect_documents", fake_documents)
    write_table, calls = pq.write_table, itertools.count()

    def dies_at_third_shard(*args, **kwargs):
        if next(calls) == 2:
            raise KeyboardInterrupt
        write_table(*args, **kwargs)

    monkeypatch.setattr(pq, "write_table", dies_at_third_shard)
    with pytest.raises(KeyboardInterrupt):
        build_quickstart_corpus(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert open_corpus(build_quickstart_corpus(tmp_path)).num_documents == 40


def test_what_a_killed_build_left_is_never_taken_for_a_corpus_and_is_swept_up(tmp_path, monkeypatch):
    monkeypatch.setattr(quickstart, "collect_documents", fake_documents)
    name = quickstart.quickstart_corpus_name()
    killed, running = tmp_path / f".building-{name}-killed", tmp_path / f".building-{name}-running"
    for leftover in (killed, running):
        leftover.mkdir()
        (leftover / "quickstart-00000-of-00004.parquet").write_bytes(b"half")
    os.utime(killed, (0, 0))
    folder = build_quickstart_corpus(tmp_path)
    assert open_corpus(folder).num_documents == 40
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, running.name])


def test_of_two_builds_at_once_the_first_to_finish_stays(tmp_path):
    target = tmp_path / "folder"

    def slower(temporary):
        (temporary / "who").write_text("slower")
        files.build_folder_atomically(target, lambda inner: (inner / "who").write_text("faster"))

    files.build_folder_atomically(target, slower)
    assert (target / "who").read_text() == "faster"
    assert list(tmp_path.iterdir()) == [target]


def test_an_unwritable_cache_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot write .*file/quickstart-.*data\.cache_dir"):
        build_quickstart_corpus(tmp_path / "file")


def test_a_python_without_sources_is_reported_so(tmp_path, monkeypatch):
    monkeypatch.setattr(quickstart.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(DataError, match=r"data\.source=quickstart: .* complete Python"):
        build_quickstart_corpus(tmp_path / "cache")


def test_another_process_collects_the_same_documents_and_imports_no_module_for_them(documents):
    code = (
        "import json, sys; from pldr_train.data.sources import quickstart; before = set(sys.modules);"
        "contents = [document.content for document in quickstart.collect_documents()];"
        "print(json.dumps([contents, sorted(set(sys.modules) - before)]))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    contents, imported = json.loads(done.stdout)
    assert contents == documents
    sources = {name for name in imported if not name.startswith(("pydoc_data", "encodings", "_sysconfigdata"))}
    assert sources == set()


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory):
    return train_tokenizer(TEXTS, tmp_path_factory.mktemp("tokenizer") / "small.model", 500)


def test_special_and_byte_pieces_have_the_published_ids(tokenizer_path):
    tokenizer = load_tokenizer(tokenizer_path)
    assert tokenizer.get_piece_size() == 500
    assert [tokenizer.id_to_piece(i) for i in range(6)] == ["[PAD]", "[UNK]", "[START]", "[END]", "[SEP]", "[CLS]"]
    assert (tokenizer.pad_id(), tokenizer.unk_id(), tokenizer.bos_id(), tokenizer.eos_id()) == (0, 1, 2, 3)
    assert [tokenizer.id_to_piece(i) for i in (6, 7, 261)] == ["<0x00>", "<0x01>", "<0xFF>"]


def test_tokenizer_encodes_as_the_paper_asks(tokenizer_path):
    tokenizer = load_tokenizer(tokenizer_path)
    text = "The year 2024 cost 1,357 Euro."
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text  # cased
    assert all(len(piece.strip("▁")) <= 1 for piece in map(tokenizer.id_to_piece, ids) if re.search(r"\d", piece))
    assert tokenizer.encode("ﬁne　①") == tokenizer.encode("fine 1")  # NFKC
    assert tokenizer.unk_id() not in tokenizer.encode("漢字 🙂")  # byte fallback
    assert tokenizer.decode(tokenizer.encode("漢字 🙂")) == "漢字 🙂"
    assert not {2, 3} & set(ids)


def test_training_is_deterministic_quiet_and_atomic(tokenizer_path, tmp_path, capfd):
    again = train_tokenizer(iter(TEXTS), tmp_path / "sub" / "again.model", 500)
    assert again.read_bytes() == tokenizer_path.read_bytes()
    assert capfd.readouterr() == ("", "")
    assert [path.name for path in again.parent.iterdir()] == ["again.model"]


def test_vocabulary_errors_name_key_limits_and_fix(tmp_path):
    def fails(pattern, texts, vocab_size):
        with pytest.raises(DataError, match=pattern):
            train_tokenizer(texts, tmp_path / "no.model", vocab_size)
        assert list(tmp_path.iterdir()) == []

    fails(r"model\.vocab_size=30000 is more than this text allows: only \d+ pieces .* set", TEXTS[:3], 30000)
    fails(r"model\.vocab_size=270 is too small: .* need \d+ pieces", TEXTS, 270)
    fails(r"model\.vocab_size=262 leaves no room", TEXTS, 262)
    fails(r"training text is empty", ["", "\n \n"], 300)


def test_the_number_in_the_vocabulary_error_works(tmp_path):
    with pytest.raises(DataError) as caught:
        train_tokenizer(TEXTS[:3], tmp_path / "t.model", 30000)
    possible = int(re.search(r"only (\d+) pieces", str(caught.value))[1])
    path = train_tokenizer(TEXTS[:3], tmp_path / "t.model", possible)
    assert load_tokenizer(path).get_piece_size() == possible


def test_errors_of_the_texts_come_through_unchanged(tmp_path):
    def texts():
        yield "some text"
        raise DataError("x.parquet: not a readable Parquet file")

    with pytest.raises(DataError, match=r"^x\.parquet: not a readable Parquet file$"):
        train_tokenizer(texts(), tmp_path / "t.model", 300)


def test_loading_errors_name_the_file(tmp_path):
    with pytest.raises(DataError, match=r"data\.tokenizer=.*missing\.model: no such file"):
        load_tokenizer(tmp_path / "missing.model")
    for content in (b"", b"\x00garbage" * 50, b"plain text"):
        (tmp_path / "bad.model").write_bytes(content)
        with pytest.raises(DataError, match=r"bad\.model: not a SentencePiece model"):
            load_tokenizer(tmp_path / "bad.model")
    with open(tmp_path / "other.model", "wb") as model:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXTS[0].split("\n")),
            model_writer=model,
            vocab_size=100,
            hard_vocab_limit=False,
            minloglevel=2,
        )
    with pytest.raises(DataError, match=r"other\.model: its pieces 0 to 5 are <unk> <s> </s>"):
        load_tokenizer(tmp_path / "other.model")


def test_a_tokenizer_larger_than_the_model_is_refused(tokenizer_path):
    tokenizer = load_tokenizer(tokenizer_path)
    check_vocabulary(tokenizer, 500)
    with pytest.raises(DataError, match=r"model\.vocab_size=499 is less than the tokenizer's 500 pieces; set"):
        check_vocabulary(tokenizer, 499)


def test_quickstart_tokenizer_is_trained_once_and_without_the_validation_documents(cache, documents, monkeypatch):
    seen = []
    original = automatic.train_tokenizer
    monkeypatch.setattr(
        automatic,
        "train_tokenizer",
        lambda texts, *rest: (seen.extend(texts), original(seen[:300], *rest)),
    )
    path = quickstart_tokenizer(cache, 600)
    held_out = -(-len(documents) // 100)
    assert seen == documents[:-held_out]
    assert load_tokenizer(path).get_piece_size() == 600
    seen.clear()
    assert quickstart_tokenizer(cache, 600) == path
    assert seen == []
    assert quickstart_tokenizer(cache, 600, (0, 300)) != path
    assert seen == documents[:300]


def test_the_quickstarts_datamodule_trains_and_validates_on_it(cache):
    data = PldrDataModule(
        data_recipe(
            source="quickstart",
            path=None,
            text_column="content",
            train_documents=(0, 300),
            validation_documents=(300, 500),
            validation_fraction=0.01,
            tokenizer=None,
            cache_dir=str(cache),
            context_length=128,
            num_lanes=64,
            shuffle=True,
            shuffle_window_documents=1000,
            num_workers=0,
            seed=1234,
            vocab_size=600,
            batch_size=16,
            micro_batch_size=16,
            validation_rows=32,
        )
    )
    data.prepare_data()
    data.setup()
    assert next(iter(data.train_dataloader()))["input_ids"].shape == (16, 129)
    assert [len(batch["input_ids"]) for batch in data.val_dataloader()] == [16, 16]
