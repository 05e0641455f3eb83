"""Documents tokenised ahead: the same tokens as live, whole files or none, and every fault by name."""

import os
import pickle
import signal
import time
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import psutil
import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from pldr_train.data.documents import INVALID_UTF8, NULL, UNREADABLE, Unreadable
from pldr_train.data.tokenizer.training import train_tokenizer
from pldr_train.data.tokens import shards, tokenize_ahead
from pldr_train.data.tokens import store as token_store
from pldr_train.data.tokens.shards import ShardLayout, StoreManifest, dtype_name, header
from pldr_train.data.tokens.store import TokenStore
from pldr_train.data.verification import verify_tokens
from pldr_train.errors import DataError
from tests.processes import SERVER
from tests.tiny import WORDS, changed, damage_row_group
from tests.unit.token_data import (
    contents,
    documents,
    live_reader,
    read,
    settings,
    tokenize,
    write_corpus,
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, tiny_data):
    return write_corpus(tmp_path_factory.mktemp("texts") / "corpus")


@pytest.fixture(scope="module")
def base(corpus, tiny_data):
    return settings(corpus, tiny_data / "tokenizer.model")


@pytest.fixture(scope="module")
def stored(base, tmp_path_factory):
    """A store of all 60 documents in shards of 13."""
    folder = tmp_path_factory.mktemp("store") / "tokens"
    tokenize(base, folder)
    return folder


@pytest.fixture
def store(stored, tmp_path):
    """A copy to be damaged."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for name, content in contents(stored).items():
        (folder / name).write_bytes(content)
    return folder


# --- the same tokens


@given(
    ordinals=st.lists(st.integers(0, 59), min_size=1, max_size=80),
    piece=st.integers(1, 80),
    at_once=st.sampled_from([0, 500, 10**9]),
)
def test_any_documents_in_any_order_are_those_of_the_live_reader(base, stored, ordinals, piece, at_once):
    live, ahead = live_reader(base), TokenStore(stored)
    whole, token_store._MAX_TOKENS_AT_ONCE = token_store._MAX_TOKENS_AT_ONCE, at_once
    try:
        assert read(ahead, np.array(ordinals), piece) == read(live, np.array(ordinals), 32)
    finally:
        token_store._MAX_TOKENS_AT_ONCE = whole


def test_nulls_empties_and_bad_bytes_keep_their_flags_and_are_counted(base, stored):
    store = TokenStore(stored)
    _, flags, unreadable = read(store, np.arange(60), 60)
    assert [index for index, flag in enumerate(flags) if flag] == [3, 23]
    assert (flags[3], flags[23], unreadable) == (NULL, INVALID_UTF8, [])
    tokens, _, _ = read(store, np.array([3, 13]), 2)
    assert tokens == [[3], [3]]
    lengths = [len(each) for each in read(live_reader(base), np.arange(60), 60)[0]]
    assert store.manifest.totals == {
        "documents": 60, "tokens": sum(lengths), "null": 1, "empty": 2, "invalid_utf8": 1, "unreadable": 0,
    }  # fmt: skip


def test_an_interval_keeps_the_sources_numbers_and_its_fingerprint(base, stored, tmp_path):
    live = live_reader(base)
    tokenize(base, tmp_path / "part", documents=(17, 49))
    part = TokenStore(tmp_path / "part")
    assert (part.documents, part.num_documents) == ((17, 49), 49)
    ordinals = np.random.default_rng(0).permutation(np.arange(17, 49))
    assert read(part, ordinals, 5) == read(live, ordinals, 5)
    for start, stop in ((17, 49), (20, 21), (30, 45)):
        assert part.fingerprint(start, stop) == live.fingerprint(start, stop)
        assert TokenStore(stored).fingerprint(start, stop) == live.fingerprint(start, stop)


def test_the_default_is_what_the_recipe_trains_and_validates_on(base, tmp_path):
    def tokenised(name, **changes):
        return tokenize(changed(base, **changes), tmp_path / name).manifest.documents

    assert tokenised("all") == (0, 60)
    assert tokenised("train", train_documents=(20, 40)) == (20, 40)
    assert tokenised("both", train_documents=(20, 40), validation_documents=(10, 15)) == (10, 40)


def test_copies_in_other_processes_read_the_same(stored):
    store = TokenStore(stored)
    expected = read(store, np.arange(60), 7)
    assert read(pickle.loads(pickle.dumps(store)), np.arange(60), 7) == expected
    with ProcessPoolExecutor(2, mp_context=SERVER) as pool:
        parts = [pool.submit(read, store, np.arange(60), 7) for _ in range(4)]
        assert [part.result(60) for part in parts] == [expected] * 4


def test_shards_are_safetensors_of_ends_tokens_and_flags(base, stored):
    manifest = TokenStore(stored).manifest
    assert [shard.name for shard in manifest.shards] == [f"tokens-{index:05d}.safetensors" for index in range(5)]
    for shard in manifest.shards:
        tensors = load_file(stored / shard.name)
        expected, flags, _ = read(live_reader(base), np.arange(shard.first, shard.stop), 64)
        assert {name: tensor.dtype for name, tensor in tensors.items()} == {
            "ends": np.uint64, "tokens": np.uint16, "flags": np.uint8,
        }  # fmt: skip
        assert tensors["tokens"].tolist() == [token for tokens in expected for token in tokens]
        assert tensors["ends"].tolist() == np.cumsum([len(each) for each in expected]).tolist()
        assert tensors["flags"].tolist() == flags
    assert sorted(contents(stored)) == sorted(
        [*(shard.name for shard in manifest.shards), "manifest.json", "tokenizer.model"]
    )


def test_large_vocabularies_take_four_bytes_a_token(base, tmp_path, monkeypatch):
    assert (dtype_name(65_536), dtype_name(65_537)) == ("uint16", "uint32")
    monkeypatch.setattr(shards, "_MAX_UINT16_VOCABULARY", 300)
    tokenize(base, tmp_path / "wide")
    assert load_file(tmp_path / "wide" / "tokens-00000.safetensors")["tokens"].dtype == np.uint32
    wide = TokenStore(tmp_path / "wide")
    ordinals = np.random.default_rng(0).permutation(60)
    assert read(wide, ordinals, 9) == read(live_reader(base), ordinals, 9)
    monkeypatch.setattr(token_store, "_MAX_TOKENS_AT_ONCE", 0)
    assert read(wide, ordinals, 9) == read(live_reader(base), ordinals, 9)


def test_headers_have_one_length_for_any_size():
    for size in (0, 1, 10**6, 10**14):
        layout = ShardLayout(max(size // 1000, 1), size, "uint32")
        assert len(header(layout)) == layout.ends_at


def test_unreadable_parts_are_those_of_the_live_reader_and_cut_by_no_shard(base, corpus, tmp_path):
    damaged = write_corpus(tmp_path / "damaged")
    for path in damaged.iterdir():
        damage_row_group(path, 1)
    skipping = changed(base, path=str(damaged), on_bad_shard="skip")
    totals = tokenize(skipping, tmp_path / "tokens").manifest.totals
    assert totals["unreadable"] == 21  # the second row group of each file: 7 documents
    live, store = live_reader(skipping), TokenStore(tmp_path / "tokens")
    for ordinals in (np.arange(60), np.arange(12, 16), np.arange(5), np.array([30, 28, 33])):
        assert read(store, ordinals, 10) == read(live, ordinals, 10)
    assert verify_tokens(tmp_path / "tokens").problems == ()
    with pytest.raises(DataError, match=r"0\.parquet, row group 1: .*data\.on_bad_shard=skip"):
        tokenize(changed(base, path=str(damaged)), tmp_path / "raising")


def test_what_a_run_left_out_live_is_left_out_of_the_tokens_too(base, stored, monkeypatch):
    store, part = TokenStore(stored), Unreadable(10, 20, "a.parquet, row group 3", "damaged")
    store.leave_out([part])
    for at_once in (10**9, 0):
        monkeypatch.setattr(token_store, "_MAX_TOKENS_AT_ONCE", at_once)
        tokens, flags, unreadable = read(store, np.array([9, 25, 19, 10, 20]), 5)
        assert (tokens[2], tokens[3], flags[2:4], unreadable) == ([], [], [UNREADABLE] * 2, [part])
        assert [tokens[0], tokens[1], tokens[4]] == read(live_reader(base), np.array([9, 25, 20]), 3)[0]
    assert store.open(np.array([20])).unreadable == ()


# --- whole, or to be gone on with


def test_any_number_of_workers_gives_the_same_files(base, stored, tmp_path):
    for workers in (1, 2, 7):
        outcome = tokenize(base, tmp_path / str(workers), num_workers=workers)
        assert outcome.written_shards == 5
        assert contents(tmp_path / str(workers)) == contents(stored)


def test_a_finished_folder_is_left_alone_and_what_is_missing_in_it_is_written_again(base, stored, store):
    before = {path: path.stat().st_mtime_ns for path in store.iterdir()}
    assert tokenize(base, store).written_shards == 0
    assert {path: path.stat().st_mtime_ns for path in store.iterdir()} == before
    (store / "tokens-00001.safetensors").unlink()
    (store / "tokens-00003.safetensors").write_bytes(b"cut short")
    assert tokenize(base, store).written_shards == 2
    assert contents(store) == contents(stored)


def test_after_a_fault_only_what_is_missing_is_written(base, stored, tmp_path):
    broken = write_corpus(tmp_path / "corpus")
    whole = (broken / "2.parquet").read_bytes()
    damage_row_group(broken / "2.parquet", 0)  # documents from 40 on: the fourth shard
    with pytest.raises(DataError, match=r"2\.parquet, row group 0"):
        tokenize(changed(base, path=str(broken)), tmp_path / "tokens")
    names = sorted(contents(tmp_path / "tokens"))
    assert [name for name in names if name.startswith("tokens-")] == sorted(
        f"tokens-{index:05d}.{suffix}" for index in range(3) for suffix in ("json", "safetensors")
    )
    with pytest.raises(DataError, match="not finished; run the same `pldr-train data tokenize` again"):
        TokenStore(tmp_path / "tokens")
    (broken / "2.parquet").write_bytes(whole)
    (tmp_path / "tokens" / "tokens-00001.json").write_text("{")  # a description that is not whole counts for nothing
    (tmp_path / "tokens" / ".building-tokens-00004.safetensors-1").write_bytes(b"of a killed worker")
    outcome = tokenize(changed(base, path=str(broken)), tmp_path / "tokens")
    assert outcome.written_shards == 3
    assert {**contents(tmp_path / "tokens"), "manifest.json": b""} == {**contents(stored), "manifest.json": b""}


def test_something_else_is_refused_in_a_folder_that_was_begun_or_finished(base, stored, tmp_path):
    broken, begun = write_corpus(tmp_path / "broken"), tmp_path / "begun"
    damage_row_group(broken / "2.parquet", 0)
    with pytest.raises(DataError):
        tokenize(changed(base, path=str(broken)), begun)
    tokenizer = train_tokenizer([" ".join(WORDS)] * 50 + ["zebra"], tmp_path / "other.model", 310)
    corpus = write_corpus(tmp_path / "other", documents(60, seed=1))
    renamed = write_corpus(tmp_path / "renamed")
    (renamed / "1.parquet").rename(renamed / "1b.parquet")
    for target in (begun, stored):
        before = contents(target)
        for pattern, changes, options in (
            (r"--documents was \[0, 60\] and is \[0, 50\] now", {}, {"documents": (0, 50)}),
            ("--documents-per-shard was 13 and is 10 now", {}, {"documents_per_shard": 10}),
            (r"the tokenizer \(BLAKE2b\) was \w{32} and is \w{32} now", {"tokenizer": str(tokenizer)}, {}),
            (r"the source's file 0\.parquet had size_bytes \d+, now \d+", {"path": str(corpus)}, {}),
            (r"file 1\.parquet is gone; the source's file 1b\.parquet is new", {"path": str(renamed)}, {}),
        ):
            with pytest.raises(DataError, match=f"{target.name}: was begun with something else: .*{pattern}"):
                tokenize(changed(base, **changes), target, **options)
            assert contents(target) == before


def test_other_files_and_other_writers_are_not_touched(base, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match="mine: holds other files"):
        tokenize(base, tmp_path / "mine")
    assert contents(tmp_path / "mine") == {"notes.txt": b"mine"}
    with (
        tokenize_ahead._locked_folder(tmp_path / "used"),
        pytest.raises(DataError, match="used: another process writes it"),
    ):
        tokenize(base, tmp_path / "used")
    with pytest.raises(DataError, match="cannot write .*notes.txt.*name another --output"):
        tokenize(base, tmp_path / "mine" / "notes.txt" / "below")


def test_a_mistake_leaves_no_folder_behind(base, tmp_path):
    for pattern, changes, options in (
        ("nowhere.model: no such file", {"tokenizer": "nowhere.model"}, {}),
        ("nowhere: no such file or folder", {"path": "nowhere"}, {}),
        ("--documents 50 61: not an interval of the source's 60 documents", {}, {"documents": (50, 61)}),
        ("--documents 5 5: not an interval", {}, {"documents": (5, 5)}),
        ("data.train_documents=.0, 70. exceeds", {"train_documents": (0, 70)}, {}),
        ("model.vocab_size=319 is less", {"vocab_size": 319}, {}),
        ("data.source=tokens: these documents are tokenised already", {"source": "tokens"}, {}),
    ):
        with pytest.raises(DataError, match=pattern):
            tokenize(changed(base, **changes), tmp_path / "tokens", **options)
        assert not (tmp_path / "tokens").exists()


def test_progress_counts_what_is_there_and_every_document_and_token_once(base, stored, store):
    class Noted:
        def __init__(self):
            self.calls = []

        def begin(self, total, documents):
            self.calls.append((total, documents))

        def advance(self, documents, tokens):
            self.calls.append((documents, tokens))

        def end(self):
            self.calls.append("end")

    (store / "tokens-00002.safetensors").unlink()
    noted = Noted()
    tokenize(base, store, progress=noted)
    shard = TokenStore(stored).manifest.shards[2]
    first, *steps, last = noted.calls
    assert (first, last) == ((60, 47), "end")
    assert tuple(map(sum, zip(*steps, strict=True))) == (13, shard.tokens)


class Slow(sentencepiece.SentencePieceProcessor):
    def encode(self, *arguments, **options):
        time.sleep(0.05)
        return super().encode(*arguments, **options)


def test_a_worker_that_is_killed_ends_the_work_with_a_reason(base, tmp_path, monkeypatch):
    monkeypatch.setattr(sentencepiece, "SentencePieceProcessor", Slow)

    class Killer:
        def begin(self, *_):
            pass

        def advance(self, *_):
            for worker in psutil.Process().children():
                if any("tokens" in file.path for file in worker.open_files()):
                    os.kill(worker.pid, signal.SIGKILL)

        def end(self):
            pass

    with pytest.raises(DataError, match=r"ended from outside \(exit code -9\).*fewer --workers"):
        tokenize(base, tmp_path / "tokens", progress=Killer(), num_workers=2)
    assert not [name for name in contents(tmp_path / "tokens") if name.startswith(".")]


# --- faults of what is read


def fails(pattern, folder):
    with pytest.raises(DataError, match=pattern):
        TokenStore(folder)


def test_what_is_no_store_is_refused_by_name(stored, store, tmp_path):
    fails("nowhere: no such folder; name one", tmp_path / "nowhere")
    fails(r"no folder of tokens, for it has no manifest\.json", tmp_path)
    text = (store / "manifest.json").read_text()
    for bad in ("", "[]", "{}", text[: len(text) // 2], text.replace('"stop": 26', '"stop": 27'), text.replace(
        '"sha256"', '"sha512"', 1), text.replace('"documents": [0, 60]', '"documents": [0, 61]')):  # fmt: skip
        (store / "manifest.json").write_text(bad)
        fails(r"manifest\.json: not a whole manifest of tokens .*; copy it anew", store)
    (store / "manifest.json").write_text(text.replace('"format": 1', '"format": 2', 1))
    fails(r"manifest\.json: its format is 2, this version reads 1", store)
    (store / "manifest.json").write_text(text)
    (store / "tokenizer.model").write_bytes(b"another")
    fails(r"tokenizer\.model: not the tokenizer that the tokens were made with", store)
    (store / "tokenizer.model").unlink()
    fails(r"tokenizer\.model: cannot be read", store)


def test_a_missing_or_cut_shard_is_named_at_once_with_the_fix(store):
    shard = store / "tokens-00003.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    fails(r"tokens-00003\.safetensors: has [\d,]+ bytes, not the [\d,]+ of the manifest; remove it, and run", store)
    shard.unlink()
    fails(r"tokens-00003\.safetensors: missing; put it back, or run the same `pldr-train data tokenize` again", store)


@pytest.mark.parametrize("at_once", [0, 10**9])
def test_a_shard_that_goes_bad_while_it_is_read_is_named(store, monkeypatch, at_once):
    monkeypatch.setattr(token_store, "_MAX_TOKENS_AT_ONCE", at_once)
    reader, shard = TokenStore(store), store / "tokens-00001.safetensors"
    whole, layout = bytearray(shard.read_bytes()), reader.manifest.layout(reader.manifest.shards[1])

    def fails_with(pattern, content=None):
        if content is not None:
            shard.write_bytes(content)
        with pytest.raises(DataError, match=rf"tokens-00001\.safetensors.*: {pattern}"):
            reader.open(np.array([20, 14])).encode(0, 2)
        assert len(read(reader, np.arange(13), 13)[0]) == 13

    fails_with("has 100 bytes, not", whole[:100])
    fails_with("its header is not that of 13 documents", b"\0" + whole[1:])
    beyond = whole.copy()
    beyond[layout.tokens_at : layout.flags_at] = b"\xff" * (layout.flags_at - layout.tokens_at)
    fails_with("damaged, it holds ids beyond the tokenizer's 320 pieces", beyond)
    swapped = whole.copy()
    swapped[layout.ends_at : layout.tokens_at] = whole[layout.ends_at : layout.tokens_at][::-1]
    fails_with("damaged, its documents' ends do not ascend", swapped)
    shard.unlink()
    fails_with("missing; put it back")


def test_documents_outside_the_store_name_the_interval_and_the_fix(base, tmp_path):
    tokenize(base, tmp_path / "part", documents=(20, 40))
    store = TokenStore(tmp_path / "part")
    for ordinals in ([19], [40], [25, 41, 30]):
        with pytest.raises(DataError, match=r"part holds the documents \[20, 40\), not .*data\.train_documents"):
            store.open(np.array(ordinals))


# --- verification


def test_verification_finds_every_kind_of_damage_and_lists_all(store):
    assert verify_tokens(store).problems == ()
    assert verify_tokens(store).files == 5
    manifest = StoreManifest.load(store / "manifest.json")

    def damage(index, place, value):
        path = store / manifest.shard_name(index)
        content = bytearray(path.read_bytes())
        content[place : place + len(value)] = value
        path.write_bytes(content)

    layouts = [manifest.layout(shard) for shard in manifest.shards]
    damage(0, layouts[0].tokens_at, b"\x2a\x00")  # another token: only the digest tells
    damage(1, layouts[1].flags_at - 2, b"\x2a\x00")  # no EOS at the end
    damage(2, layouts[2].tokens_at + 2, b"\xff\xff")  # beyond the vocabulary
    damage(3, layouts[3].flags_at, b"\x01")  # a null that the manifest knows nothing of
    (store / manifest.shard_name(4)).unlink()
    problems = verify_tokens(store).problems
    assert len(problems) == 5
    for index, parts in enumerate((
        ["another SHA-256"],
        ["another SHA-256", "1 documents do not end with EOS, the first of them 25"],
        ["another SHA-256", "holds the id 65535, beyond the tokenizer's 320 pieces"],
        ["another SHA-256", "null documents, not"],
        ["missing"],
    )):  # fmt: skip
        assert manifest.shard_name(index) in problems[index]
        for part in [*parts, "run the same `pldr-train data tokenize` again"]:
            assert part in problems[index]
    assert [problem.split(":")[0][-24:] for problem in verify_tokens(store, quick=True).problems] == [
        "tokens-00004.safetensors"
    ]
    damage(0, layouts[0].ends_at, b"\xff" * 8)
    (store / manifest.shard_name(2)).write_bytes(b"short")
    (store / "tokenizer.model").write_bytes(b"another")
    problems = verify_tokens(store).problems
    assert "tokenizer.model: not the tokenizer" in problems[0]
    assert "its documents' ends do not ascend" in problems[1]
    assert "has 5 bytes, not" in problems[3]
    assert len(verify_tokens(store, quick=True).problems) == 3


def test_a_shard_of_unreadable_documents_alone_is_whole(base, tmp_path):
    damaged = write_corpus(tmp_path / "damaged")
    for group in range(3):
        damage_row_group(damaged / "0.parquet", group)
    skipping = changed(base, path=str(damaged), on_bad_shard="skip")
    tokenize(skipping, tmp_path / "tokens", documents_per_shard=5)
    assert verify_tokens(tmp_path / "tokens").problems == ()
    assert load_file(tmp_path / "tokens" / "tokens-00001.safetensors")["tokens"].shape == (0,)
    for reader in (TokenStore(tmp_path / "tokens"), live_reader(skipping)):
        tokens, flags, parts = read(reader, np.arange(4, 12), 3)
        assert (tokens, flags) == ([[]] * 8, [UNREADABLE] * 8)
        assert [(part.start, part.stop) for part in parts] == [(0, 7), (7, 14)]
