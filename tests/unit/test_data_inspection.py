"""What inspecting and verifying say of documents whose numbers are known."""

import numpy as np
import pytest

from pldr_train.data.inspection import (
    epochs,
    first_rows,
    histogram,
    length_statistics,
    open_data,
    rows_of,
    summary,
    take_sample,
)
from pldr_train.data.tokenizer.training import load_tokenizer
from pldr_train.data.tokens.store import TokenStore
from pldr_train.data.verification import verify_source, verify_tokens
from pldr_train.errors import DataError
from tests.tiny import changed, damage_row_group
from tests.unit.token_data import documents, settings, tokenize, write_corpus


@pytest.fixture
def base(tmp_path, tiny_data):
    return settings(write_corpus(tmp_path / "corpus"), tiny_data / "tokenizer.model")


def expected_tokens(base):
    """Tokens of every document without EOS, by SentencePiece itself."""
    model = load_tokenizer(base.data.tokenizer)
    return [len(model.encode((raw or b"").decode(errors="replace"))) for raw in documents()]


def test_a_whole_sample_counts_every_document_exactly(base):
    data = open_data(base)
    assert (data.documents, data.train, data.validation, data.files) == ((0, 60), (0, 54), (54, 60), 3)
    sample = take_sample(data, base.data, (0, 60), 1000)
    assert sample.is_whole
    assert sample.tokens.tolist() == expected_tokens(base)
    assert sample.bytes.tolist() == [len(raw or b"") for raw in documents()]
    assert sample.characters.tolist() == [len((raw or b"").decode(errors="replace")) for raw in documents()]
    found = summary(data, base, sample, [])
    assert {name: found["sample"][name] for name in ("null", "invalid_utf8", "unreadable")} == {
        "null": 1, "invalid_utf8": 1, "unreadable": 0,
    }  # fmt: skip
    assert found["sample"]["empty"] == sum(
        count == 0 and raw is not None for count, raw in zip(expected_tokens(base), documents(), strict=True)
    )
    assert found["estimate"]["tokens_with_eos"] == sum(expected_tokens(base)) + 60
    assert found["estimate"]["is_exact"]
    assert sum(each["documents"] for each in found["histogram"]) == 60


def test_tokens_made_ahead_are_counted_alike(base, tmp_path):
    tokenize(base, tmp_path / "tokens")
    ahead = changed(base, source="tokens", path=str(tmp_path / "tokens"), tokenizer=None)
    live, stored = (take_sample(open_data(each), each.data, (0, 60), 60) for each in (base, ahead))
    assert stored.tokens.tolist() == live.tokens.tolist()
    assert stored.flags.tolist() == live.flags.tolist()
    rows = [first_rows(open_data(each), each.data, (0, 60), 3) for each in (base, ahead)]
    assert rows[0] == rows[1]
    assert len(rows[0]) == 3


def test_a_sample_is_spread_evenly_and_scaled_to_the_interval(base):
    data = open_data(base)
    sample = take_sample(data, base.data, (0, 54), 6)
    assert sample.tokens.tolist() == [expected_tokens(base)[index] for index in range(0, 54, 9)]
    found = summary(data, base, sample, [])
    assert not found["estimate"]["is_exact"]
    assert found["estimate"]["tokens"] == round(int(sample.tokens.sum()) * 54 / 6)
    with pytest.raises(DataError, match=r"--documents 50 61: not an interval of the documents \[0, 60\]"):
        take_sample(data, base.data, (50, 61), 5)


def test_padding_limits_and_epochs_follow_from_the_lengths(base):
    data = open_data(base)
    sample = take_sample(data, base.data, (0, 60), 60)
    tokens = np.array(expected_tokens(base))
    limited = changed(base, min_document_tokens=5, max_document_tokens=100, context_length=16, max_steps=30)
    kept = tokens[(tokens >= 5) & (tokens <= 100)]
    rows = np.ceil(kept / 16)
    made = rows_of(sample, limited.data)
    assert made.documents_kept == pytest.approx(len(kept) / 60)
    assert made.padding == pytest.approx(1 - kept.sum() / (rows.sum() * 16))
    assert epochs(sample, limited, (0, 60)) == pytest.approx(30 * 4 * 16 / (kept + 1).sum())
    assert epochs(sample, changed(limited, packing="pad"), (0, 60)) == pytest.approx(30 * 4 / rows.sum())


@pytest.mark.parametrize("packing", ["pack", "pad"])
def test_the_rows_shown_leave_out_what_the_limits_leave_out(base, packing):
    tokens, model = expected_tokens(base), load_tokenizer(base.data.tokenizer)
    limited = changed(base, packing=packing, min_document_tokens=tokens[0] + 1)  # without the first document
    first = next(index for index, count in enumerate(tokens) if count > tokens[0])
    (row,) = first_rows(open_data(limited), limited.data, (0, 60), 1)
    assert row == model.decode(model.encode(documents()[first].decode())[:17]).strip()
    (unlimited,) = first_rows(open_data(base), base.data, (0, 60), 1)
    assert unlimited != row


def test_the_histogram_has_bins_that_double_and_leaves_none_out():
    assert histogram(np.array([0, 1, 1, 2, 3, 4, 7, 8, 40])) == [
        (0, 0, 1), (1, 1, 2), (2, 3, 2), (4, 7, 2), (8, 15, 1), (16, 31, 0), (32, 63, 1),
    ]  # fmt: skip
    assert histogram(np.array([5])) == [(4, 7, 1)]
    statistics = length_statistics(np.arange(101))
    assert (statistics["mean"], statistics["p50"], statistics["p95"], statistics["max"]) == (50, 50, 95, 100)


def test_verifying_a_source_lists_every_bad_file_and_row_group(base, tmp_path):
    whole = verify_source(base.data)
    assert (whole.files, whole.problems) == (3, ())
    corpus = tmp_path / "corpus"
    damage_row_group(corpus / "0.parquet", 0)
    damage_row_group(corpus / "0.parquet", 2)
    (corpus / "1.parquet").write_bytes(b"cut")
    found = verify_source(base.data).problems
    assert len(found) == 3
    for pattern in ("0.parquet, row group 0: ", "0.parquet, row group 2: ", "1.parquet: not a readable Parquet file"):
        assert sum(pattern in problem for problem in found) == 1, found
    quick = verify_source(base.data, quick=True).problems
    assert len(quick) == 1
    beyond = changed(base, train_documents=(20, 30), validation_documents=(30, 40))
    (corpus / "1.parquet").write_bytes((corpus / "2.parquet").read_bytes())
    assert verify_source(beyond.data).problems == ()  # the damage is outside the intervals
    assert len(verify_source(beyond.data, every_file=True).problems) == 2


@pytest.mark.parametrize("where", ["header", "ends", "tokens", "flags", "cut", "gone", "tokenizer"])
def test_verifying_tokens_finds_each_kind_of_damage_by_its_file(base, tmp_path, where):
    folder = tmp_path / "tokens"
    tokenize(base, folder)
    assert verify_tokens(folder).problems == ()
    manifest = TokenStore(folder).manifest
    shard = folder / manifest.shards[2].name
    layout, content = manifest.layout(manifest.shards[2]), bytearray(shard.read_bytes())
    if where == "gone":
        shard.unlink()
    elif where == "cut":
        shard.write_bytes(content[:-1])
    elif where == "tokenizer":
        shard = folder / "tokenizer.model"
        shard.write_bytes(b"another")
    else:
        place = {"header": 10, "ends": layout.ends_at, "tokens": layout.tokens_at, "flags": layout.flags_at}[where]
        content[place] ^= 0x01
        shard.write_bytes(content)
    problems = verify_tokens(folder).problems
    assert problems
    assert all(shard.name in problem for problem in problems)
