"""Training tokenizers: the sample of lines, the settings, the tokenizers built at first use, and the report on one."""

from __future__ import annotations

import io
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from ruamel.yaml import YAML

from pldr_train.data.sources import quickstart
from pldr_train.data.tokenizer import automatic
from pldr_train.data.tokenizer.automatic import automatic_tokenizer, quickstart_tokenizer
from pldr_train.data.tokenizer.line_sample import LineSample
from pldr_train.data.tokenizer.report import describe_vocabulary, measure, open_model
from pldr_train.data.tokenizer.settings import (
    PAPER_DOCUMENTS,
    PAPER_SETTINGS,
    TokenizerSettings,
    load_settings,
)
from pldr_train.data.tokenizer.training import load_tokenizer, train_model, train_tokenizer
from pldr_train.errors import DataError
from tests.processes import ROOT
from tests.tiny import WORDS
from tests.unit.token_data import block_of

NO_LIMIT = 10**9


def document(number: int) -> str:
    generator = random.Random(number)
    lines = [" ".join(generator.choices(WORDS, k=generator.randint(0, 8))) for _ in range(generator.randint(1, 6))]
    return "\n".join(lines)


DOCUMENTS = [document(number) for number in range(400)]
LINES = [line for text in DOCUMENTS for line in text.split("\n") if line.strip()]


def sample_of(texts, max_bytes=NO_LIMIT, max_lines=NO_LIMIT, at_once=50, first=0, **options) -> LineSample:
    sample = LineSample(max_bytes, max_lines, options.pop("max_line_bytes", NO_LIMIT), **options)
    for start in range(0, len(texts), at_once):
        sample.add(first + start, texts[start : start + at_once])
    sample.finish()
    return sample


def lines_of(sample: LineSample) -> list[str]:
    return [line.decode() for line in sample.drain()]


def test_a_sample_that_all_lines_fit_into_is_all_lines_in_order():
    sample = sample_of(DOCUMENTS)
    size = sum(map(len, LINES))
    assert (sample.num_lines, sample.num_bytes, sample.num_lines_seen) == (len(LINES), size, len(LINES))
    assert lines_of(sample) == LINES
    assert lines_of(sample_of(DOCUMENTS, max_bytes=size, max_lines=len(LINES))) == LINES


@pytest.mark.parametrize("limits", [{"max_lines": 100}, {"max_bytes": 5000}, {"max_lines": 300, "max_bytes": 4000}])
def test_a_sample_fills_its_limits_and_depends_on_nothing_but_lines_and_limits(limits):
    sample = sample_of(DOCUMENTS, **limits)
    assert sample.num_lines <= limits.get("max_lines", NO_LIMIT)
    assert sample.num_bytes <= limits.get("max_bytes", NO_LIMIT)
    longest = max(map(len, LINES))
    assert sample.num_lines == limits.get("max_lines") or sample.num_bytes > limits["max_bytes"] - longest
    kept = lines_of(sample)
    places = iter(LINES)
    assert all(line in places for line in kept)  # in order
    for at_once in (1, 7, 400):
        assert lines_of(sample_of(DOCUMENTS, at_once=at_once, **limits)) == kept
    assert lines_of(sample_of(DOCUMENTS, seed=1, **limits)) != kept
    assert lines_of(sample_of(DOCUMENTS, first=1, **limits)) != kept


def test_a_smaller_sample_is_part_of_a_larger_one():
    numbered = [f"line {index}" for index in range(2000)]
    small, large = (set(lines_of(sample_of(numbered, max_lines=size))) for size in (100, 500))
    assert (len(small), len(large)) == (100, 500)
    assert small < large


def test_every_line_stands_the_same_chance_wherever_it_is():
    texts = ["\n".join(f"{number} {line}" for line in range(10)) for number in range(2000)]
    kept = [tuple(map(int, line.split())) for line in lines_of(sample_of(texts, max_lines=4000))]
    by_document = np.histogram([number for number, _ in kept], bins=10, range=(0, 2000))[0]
    by_line = np.bincount([line for _, line in kept], minlength=10)
    for counts in (by_document, by_line):
        assert counts.sum() == 4000
        assert np.abs(counts - 400).max() < 4 * 400**0.5


def test_blank_lines_are_no_lines_and_long_ones_are_counted():
    text = "a\n\n  \t\r\n\x1c\x1f\n\xa0\u3000\n\u3000x\n" + "é" * 5 + "\n" + "é" * 6
    sample = sample_of([text, "", "\n"], max_line_bytes=10)
    assert lines_of(sample) == ["a", "\u3000x", "é" * 5]
    assert (sample.num_lines_seen, sample.num_too_long) == (4, 1)
    assert [line for line in text.split("\n") if line.strip()] == ["a", "\u3000x", "é" * 5, "é" * 6]


def test_sentencepiece_leaves_out_the_same_long_lines():
    limit = 2000
    long = ["word " * (limit // 5), "word " * (limit // 5) + "x"]  # of 2,000 bytes, and of one more
    settings = dict(PAPER_SETTINGS) | {"max_sentence_length": limit}
    sample = sample_of([*LINES, *long], max_line_bytes=limit)
    assert sample.num_too_long == 1
    assert train_model(sample.drain(), 300, settings) == train_model([*LINES, *long], 300, settings)
    assert train_model([*LINES, long[0]], 300, settings) != train_model(LINES, 300, settings)


PAPERS: dict[str, Any] = {
    "model_type": "unigram", "normalization_rule_name": "nmt_nfkc", "split_digits": True, "byte_fallback": True,
    "hard_vocab_limit": False, "input_sentence_size": 5_000_000, "shuffle_input_sentence": True,
    "max_sentence_length": 125_760, "pad_id": 0, "unk_id": 1, "bos_id": 2, "eos_id": 3, "pad_piece": "[PAD]",
    "unk_piece": "[UNK]", "bos_piece": "[START]", "eos_piece": "[END]", "user_defined_symbols": ["[SEP]", "[CLS]"],
}  # fmt: skip


def by_sentencepiece_itself(texts, vocab_size: int, **changes) -> bytes:
    """The papers' tokenizer, with nothing of ours between."""
    model = io.BytesIO()
    lines = (line for text in texts for line in text.split("\n") if line.strip())
    settings = PAPERS | {"vocab_size": vocab_size, "num_threads": 16, "minloglevel": 2} | changes
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=lines, model_writer=model, **settings)
    return model.getvalue()


def test_texts_and_a_sample_of_all_their_lines_give_the_papers_tokenizer_on_any_number_of_cores(tmp_path):
    expected = by_sentencepiece_itself(DOCUMENTS, 320)
    assert train_tokenizer(DOCUMENTS, tmp_path / "t.model", 320).read_bytes() == expected
    assert train_model(sample_of(DOCUMENTS).drain(), 320) == expected
    cores = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(cores)})
        assert train_model(LINES, 320) == expected
    finally:
        os.sched_setaffinity(0, cores)


def test_the_quickstarts_tokenizer_is_the_papers_on_its_documents(tmp_path, monkeypatch):
    documents = [quickstart.Document(str(number), "topics", text) for number, text in enumerate(DOCUMENTS)]
    monkeypatch.setattr(quickstart, "collect_documents", lambda: documents)
    for interval, texts in ((None, DOCUMENTS[:396]), ((100, 300), DOCUMENTS[100:300])):
        path = quickstart_tokenizer(tmp_path, 310, interval)
        assert path.read_bytes() == by_sentencepiece_itself(texts, 310)


class ManyDocuments:
    """A source of any number of documents that notes what is read."""

    def __init__(self, num_documents, name="a"):
        self.num_documents, self._name, self.reads = num_documents, name, []

    def read(self, start, stop):
        self.reads.append((start, stop))
        return block_of(start, [DOCUMENTS[number % 400] for number in range(start, stop)])

    def fingerprint(self, start, stop):
        return {"files": [{"name": self._name, "rows": self.num_documents}]}


def test_an_automatic_tokenizer_of_few_documents_is_trained_on_all_of_them_once(tmp_path, said):
    source = ManyDocuments(1500)
    path = automatic_tokenizer(source, (100, 1350), 320, tmp_path)
    assert source.reads == [(100, 1100), (1100, 1350)]
    assert path.read_bytes() == by_sentencepiece_itself([DOCUMENTS[number % 400] for number in range(100, 1350)], 320)
    assert (path.parent, path.suffix) == (tmp_path / "tokenizers", ".model")
    assert path.name.startswith("unigram320-")
    assert said[0] == (
        "data.tokenizer is null: training one of 320 pieces on 1,250 of 1,250 documents, once (pldr-train tokenizer "
        "train makes one of more)"
    )
    assert str(path) in said[1]
    assert automatic_tokenizer(ManyDocuments(1500), (100, 1350), 320, tmp_path) == path
    assert len(said) == 2


def test_an_automatic_tokenizer_of_many_documents_reads_evenly_spaced_runs(tmp_path, monkeypatch, said):
    monkeypatch.setattr(automatic, "AUTOMATIC_DOCUMENTS", 4000)
    source = ManyDocuments(10**7)
    automatic_tokenizer(source, (10**6, 4 * 10**6), 320, tmp_path)
    firsts = [start for start, _ in source.reads]
    assert all(stop - start == 1000 for start, stop in source.reads)
    assert firsts == [1_000_000, 1_999_666, 2_999_333, 3_999_000]
    assert "4,000 of 3,000,000 documents" in said[0]
    assert len(automatic._spread_runs(0, 20_001)) == 4


def test_other_documents_or_sizes_have_an_automatic_tokenizer_of_their_own(tmp_path):
    def path_of(name="a", interval=(0, 300), vocab_size=310):
        return automatic_tokenizer(ManyDocuments(1000, name), interval, vocab_size, tmp_path)

    paths = {path_of(), path_of("b"), path_of(interval=(1, 300)), path_of(vocab_size=311)}
    assert len(paths) == len(list((tmp_path / "tokenizers").iterdir())) == 4


def test_an_automatic_tokenizer_that_the_documents_do_not_allow_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"model\.vocab_size=32000 is more than this text allows: only \d+"):
        automatic_tokenizer(ManyDocuments(300), (0, 300), 32_000, tmp_path)
    with pytest.raises(DataError, match=r"model\.vocab_size=262 leaves no room"):
        automatic_tokenizer(ManyDocuments(300), (0, 300), 262, tmp_path)
    assert not (tmp_path / "tokenizers").exists()


def test_the_documented_settings_are_those_of_the_code():
    path = ROOT / "data" / "tokenizer.yaml"
    assert load_settings(path) == TokenizerSettings(PAPER_DOCUMENTS, 32_000, dict(PAPER_SETTINGS))
    written = YAML(typ="safe").load(path)
    assert written == dict(PAPER_SETTINGS) | {"documents": [0, 2_000_000], "vocab_size": 32_000}


def test_the_documented_settings_are_found_without_a_checkout(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = load_settings(Path("data/tokenizer.yaml"))
    assert settings == TokenizerSettings(PAPER_DOCUMENTS, 32_000, dict(PAPER_SETTINGS))
    with pytest.raises(DataError, match=r"no such file; give a YAML file like \S+/pldr_train/data/tokenizer\.yaml$"):
        load_settings(Path("nowhere.yaml"))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "tokenizer.yaml").write_text("split_digits: false\n")
    assert load_settings(Path("data/tokenizer.yaml")).trainer["split_digits"] is False


def settings_of(tmp_path: Path, text: str) -> TokenizerSettings:
    (tmp_path / "settings.yaml").write_text(text)
    return load_settings(tmp_path / "settings.yaml")


def test_a_settings_file_changes_what_it_names(tmp_path):
    text = "documents: [10, 20]\ninput_sentence_size: 1000\nsplit_digits: false\nshrinking_factor: 0.5\npad_id: 0\n"
    settings = settings_of(tmp_path, text)
    changed = {"input_sentence_size": 1000, "split_digits": False, "shrinking_factor": 0.5}
    assert settings == TokenizerSettings((10, 20), None, dict(PAPER_SETTINGS) | changed)
    assert train_model(LINES, 320, settings.trainer) != train_model(LINES, 320)


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("split_digit: true", r"settings\.yaml: split_digit=true: unknown key; did you mean split_digits\?"),
        ("colour: red", r"colour=red: unknown key; there are documents, vocab_size"),
        ("split_digits: 1", r"split_digits=1: must be true or false"),
        ("vocab_size: many", r"vocab_size=many: must be a whole number"),
        ("vocab_size: 3.5", r"vocab_size=3.5: must be a whole number"),
        ("input_sentence_size: 0", r"input_sentence_size=0: must be a whole number, 1 or more"),
        ("max_sentence_length: true", r"max_sentence_length=true: must be a whole number"),
        ("character_coverage: 1.5", r"character_coverage=1.5: must be a number above 0"),
        ("normalization_rule_name: nfc", r"normalization_rule_name=nfc: must be one of nmt_nfkc"),
        ("documents: 5", r"documents=5: must be an interval"),
        ("documents: [5, 5]", r"documents=\[5, 5\]: must be an interval"),
        ("documents: [-1, 5]", r"documents=\[-1, 5\]: must be an interval"),
        ("documents: [0, 1, 2]", r"must be an interval"),
        ("documents: [0, 1.5]", r"must be an interval"),
        ("pad_id: 5", r"pad_id=5: cannot be changed from 0: the ids .* remove the line"),
        ("pad_id: false", r"pad_id=false: cannot be changed"),
        ("eos_piece: </s>", r"eos_piece=</s>: cannot be changed from \"?\[END\]"),
        ("user_defined_symbols: []", r"user_defined_symbols=\[\]: cannot be changed"),
        ("byte_fallback: false", r"byte_fallback=false: cannot be changed"),
        ("model_type: bpe", r"model_type=bpe: cannot be changed from unigram: PLDR-LLM's tokenizers read no other"),
        ("shuffle_input_sentence: false", r"shuffle_input_sentence=false: cannot be changed"),
        ("a: [", r"settings\.yaml: line \d+: not valid YAML"),
        ("a: 1\na: 2", r"not valid YAML"),
        ("- 1", r"no mapping of keys to values"),
        ("", r"no mapping of keys to values"),
    ],
)
def test_a_wrong_settings_file_is_one_message(text, pattern, tmp_path):
    with pytest.raises(DataError, match=pattern):
        settings_of(tmp_path, text)


def test_a_missing_or_binary_settings_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"--settings .*nowhere\.yaml: no such file"):
        load_settings(tmp_path / "nowhere.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"--settings .*binary\.yaml cannot be read"):
        load_settings(tmp_path / "binary.yaml")


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    return train_tokenizer(DOCUMENTS, tmp_path_factory.mktemp("model") / "tokenizer.model", 320)


def test_the_report_finds_a_tokenizer_of_the_papers_settings_as_published(model_file):
    report = describe_vocabulary(open_model(model_file))
    assert report.differences == ()
    assert (report.num_pieces, report.num_byte_pieces) == (320, 256)
    assert (report.model_type, report.normalization) == ("unigram", "nmt_nfkc")
    assert (report.pad_id, report.unk_id, report.bos_id, report.eos_id) == (0, 1, 2, 3)
    assert report.special_pieces == ("[PAD]", "[UNK]", "[START]", "[END]", "[SEP]", "[CLS]")
    tokenizer = load_tokenizer(model_file)
    learned = [tokenizer.id_to_piece(index) for index in range(262, 320)]
    assert len(report.longest_pieces) == 10
    assert set(report.longest_pieces) <= set(learned)
    lengths = [len(piece) for piece in report.longest_pieces]
    assert lengths == sorted(map(len, learned), reverse=True)[:10]


@pytest.mark.parametrize(
    ("changes", "differences"),
    [
        ({"split_digits": False}, ["split_digits is False, published True"]),
        ({"normalization_rule_name": "nfkc"}, ["normalization is nfkc, published nmt_nfkc"]),
        ({"add_dummy_prefix": False}, ["add_dummy_prefix is false, published true"]),
        ({"model_type": "bpe"}, ["model_type is bpe, published unigram"]),
        (
            {"user_defined_symbols": ["[CLS]", "[SEP]"]},
            ["piece 4 is [CLS], published [SEP]", "piece 5 is [SEP], published [CLS]"],
        ),
        (
            {"user_defined_symbols": [], "control_symbols": ["[SEP]", "[CLS]"]},
            [
                "piece 4, [SEP], is of kind control, published user_defined",
                "piece 5, [CLS], is of kind control, published user_defined",
            ],
        ),
        (
            {"bos_id": 3, "eos_id": 2},
            [
                "bos_id is 3, published 2", "eos_id is 2, published 3", "piece 2 is [END], published [START]",
                "piece 3 is [START], published [END]",
            ],
        ),
        (
            {"byte_fallback": False},
            ["byte_fallback is False, published True", "pieces 6 to 261 are not the bytes 00 to FF in order"],
        ),
    ],
)  # fmt: skip
def test_the_report_says_what_differs_from_the_published(changes, differences):
    model = by_sentencepiece_itself(DOCUMENTS, 320 if changes.get("byte_fallback", True) else 64, **changes)
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=model)
    assert list(describe_vocabulary(tokenizer).differences) == differences


def test_the_report_counts_what_documents_become(model_file):
    tokenizer = load_tokenizer(model_file)
    texts = ["the metric tensor\n\nof the  ﬁrst 漢", "", "[SEP] heads"]
    report = measure(tokenizer, texts)
    ids = [token for text in texts for token in tokenizer.encode(text)]
    assert (report.documents, report.lines, report.words) == (3, 3, 9)
    assert (report.characters, report.bytes) == (sum(map(len, texts)), sum(len(text.encode()) for text in texts))
    assert report.tokens == len(ids)
    assert report.byte_tokens == sum(tokenizer.is_byte(token) for token in ids) >= 3
    assert report.unknown_tokens == 0
    assert report.tokens_per_word == len(ids) / 9
    assert report.bytes_per_token == report.bytes / len(ids)
    assert report.learned_pieces == 320 - 262
    assert report.learned_pieces_used == len({token for token in ids if token >= 262})
    assert report.round_trip_share == 1.0
    piece, count = report.frequent_pieces[0]
    assert count == max(ids.count(token) for token in set(ids)) == ids.count(tokenizer.piece_to_id(piece))
    assert report.frequent_pieces[0][1] >= report.frequent_pieces[-1][1] > 0


def test_the_report_finds_lines_that_do_not_come_back():
    model = by_sentencepiece_itself(DOCUMENTS, 64, byte_fallback=False)
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=model)
    report = measure(tokenizer, ["the metric\n漢 heads"])
    assert (report.unknown_tokens, report.byte_tokens) == (1, 0)
    assert (report.lines, report.round_trip_lines, report.round_trip_share) == (2, 1, 0.5)


def test_a_report_on_nothing_divides_by_nothing(model_file):
    report = measure(load_tokenizer(model_file), [])
    assert (report.tokens_per_word, report.byte_token_share, report.vocabulary_used) == (0, 0, 0)
    assert report.round_trip_share == 1


def test_only_models_are_opened(tmp_path):
    with pytest.raises(DataError, match=r"x\.model: no such file; give"):
        open_model(tmp_path / "x.model")
    (tmp_path / "x.model").write_text("text")
    with pytest.raises(DataError, match=r"x\.model: not a SentencePiece model"):
        open_model(tmp_path / "x.model")
