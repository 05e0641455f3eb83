"""Both tokenizers against SentencePiece itself, on lines of many scripts; saving, loading, flags, padding, errors."""

from __future__ import annotations

import copy
import itertools
import json
import pickle
import random
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
from tokenizers import Tokenizer
from transformers import AutoTokenizer, TextStreamer

from pldr_train.data.tokenizer.automatic import quickstart_tokenizer
from pldr_train.data.tokenizer.training import train_tokenizer
from pldr_train.model import PldrllmConfig, PldrllmTokenizer, PldrllmTokenizerFast
from pldr_train.model.sentencepiece_text import CharsMap, pieces_to_text
from tests.unit.tokenizer_lines import varied_lines

LINES = 20_000
BOTH = pytest.mark.parametrize("tokenizer_class", [PldrllmTokenizer, PldrllmTokenizerFast], ids=["slow", "fast"])
# Two segmentations of equal probability: SentencePiece adds scores in fp32, the tokenizers library in fp64, and so they
# may choose differently. Seen in repeated emoji and letters, "bb b" against "b bb".
TIED_FRACTION = 1e-4


@pytest.fixture(scope="module")
def model_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An English tokenizer of the quickstart's corpus, and one trained on lines like those tested."""
    folder = tmp_path_factory.mktemp("tokenizers")
    train_tokenizer(varied_lines(30_000, seed=5), folder / "varied.model", 16_000)
    return {"english": quickstart_tokenizer(folder, 2000), "varied": folder / "varied.model"}


@pytest.fixture(scope="module")
def english(model_files: dict[str, Path]) -> str:
    return str(model_files["english"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["english", "varied"])
def test_ids_and_texts_are_sentencepieces_own(model_files: dict[str, Path], name: str) -> None:
    path, lines = str(model_files[name]), varied_lines(LINES)
    reference = sentencepiece.SentencePieceProcessor(model_file=path)
    ids, texts = reference.encode(lines), reference.decode(reference.encode(lines))
    # Not everything falls to bytes where the tokenizer knows the scripts.
    in_bytes = sum(6 <= index < 262 for line in ids for index in line) / sum(map(len, ids))
    assert in_bytes < (0.2 if name == "varied" else 1)

    slow, fast = PldrllmTokenizer(path), PldrllmTokenizerFast(vocab_file=path)
    assert slow(lines)["input_ids"] == ids
    fast_ids = fast(lines)["input_ids"]
    differing = [place for place, (mine, theirs) in enumerate(zip(fast_ids, ids, strict=True)) if mine != theirs]
    assert len(differing) <= TIED_FRACTION * LINES
    for place in differing:
        scores = [sum(map(reference.get_score, line[place])) for line in (fast_ids, ids)]
        assert scores[0] == pytest.approx(scores[1], rel=1e-6)
    for place in range(0, LINES, 997):
        assert slow(lines[place])["input_ids"] == ids[place]
        assert fast(lines[place])["input_ids"] == fast_ids[place]
    for tokenizer in (slow, fast):
        assert [tokenizer.decode(line) for line in ids] == texts


@pytest.mark.parametrize("name", ["english", "varied"])
def test_any_pieces_decode_as_sentencepiece_decodes_them(model_files: dict[str, Path], name: str) -> None:
    path = str(model_files[name])
    reference, generator = sentencepiece.SentencePieceProcessor(model_file=path), random.Random(1)
    bytes_and_pieces = [(6, 261), (262, reference.get_piece_size() - 1)]
    sequences = [
        [generator.randint(*generator.choice(bytes_and_pieces)) for _ in range(generator.randint(0, 12))]
        for _ in range(3000)
    ]
    for tokenizer in (PldrllmTokenizer(path), PldrllmTokenizerFast(vocab_file=path)):
        assert [tokenizer.decode(ids) for ids in sequences] == reference.decode(sequences)
        assert tokenizer.batch_decode(sequences[:50]) == reference.decode(sequences[:50])


def test_the_table_of_replacements_is_applied_as_sentencepiece_applies_it(model_files: dict[str, Path]) -> None:
    from sentencepiece import sentencepiece_model_pb2

    reference = sentencepiece.SentencePieceProcessor(model_file=str(model_files["english"]))
    proto = sentencepiece_model_pb2.ModelProto.FromString(reference.serialized_model_proto())
    charsmap = CharsMap(proto.normalizer_spec.precompiled_charsmap)

    def apply(text: str) -> str:
        parts, end = [], 0
        for start, stop, replacement in charsmap.replacements(text):
            parts += [text[end:start], replacement]
            end = stop
        text = "".join([*parts, text[end:]])
        return "▁" + "▁".join(word for word in text.split(" ") if word) if text.strip(" ") else ""

    lines = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000 and code not in (0x20, 0x2581)]
    for text, expected in zip(lines, reference.normalize(lines), strict=True):
        assert apply(text) == expected, repr(text)
    with pytest.raises(ValueError, match="precompiled_charsmap is not whole"):
        CharsMap(proto.normalizer_spec.precompiled_charsmap[:1000])


@BOTH
def test_special_pieces_have_the_published_ids(english: str, tokenizer_class: type) -> None:
    tokenizer = tokenizer_class(vocab_file=english)
    names = ("pad", "unk", "bos", "eos", "sep", "cls")
    assert [getattr(tokenizer, f"{name}_token") for name in names] == "[PAD] [UNK] [START] [END] [SEP] [CLS]".split()
    assert [getattr(tokenizer, f"{name}_token_id") for name in names] == list(range(6))
    assert len(tokenizer) == tokenizer.vocab_size == 2000
    assert tokenizer.get_vocab()["[CLS]"] == 5
    assert tokenizer.model_input_names == ["input_ids", "attention_mask"]
    # Written out in a text they are special, and the text around them begins anew.
    ids = tokenizer("the[SEP]the[END]")["input_ids"]
    the = tokenizer("the")["input_ids"]
    assert ids == [*the, 4, *the, 3]
    assert tokenizer.decode(ids) == "the[SEP] the[END]"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "the the"


@BOTH
def test_start_and_end_are_added_on_request(english: str, tokenizer_class: type, tmp_path: Path) -> None:
    plain = tokenizer_class(vocab_file=english)
    a, b = plain("metric")["input_ids"], plain("tensor")["input_ids"]
    assert plain("metric", "tensor")["input_ids"] == a + b
    for bos, eos in ((True, False), (False, True), (True, True)):
        tokenizer = tokenizer_class(vocab_file=english, add_bos_token=bos, add_eos_token=eos)
        folder = tmp_path / f"{bos}{eos}"
        tokenizer.save_pretrained(folder)
        for each in (tokenizer, tokenizer_class.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)):
            assert (each.add_bos_token, each.add_eos_token) == (bos, eos)
            assert each("metric")["input_ids"] == [2] * bos + a + [3] * eos
            assert each("metric", add_special_tokens=False)["input_ids"] == a
            mask = each("metric", return_special_tokens_mask=True)["special_tokens_mask"]
            assert mask == [1] * bos + [0] * len(a) + [1] * eos
        changed = tokenizer_class.from_pretrained(folder, add_bos_token=False, add_eos_token=False, Legacy=False)
        assert changed("metric")["input_ids"] == a
    plain.add_eos_token = True
    assert plain("metric")["input_ids"] == [*a, 3]


@BOTH
def test_padding_is_on_the_left_and_truncation_on_the_right(english: str, tokenizer_class: type) -> None:
    tokenizer = tokenizer_class(vocab_file=english)
    long, short = tokenizer("the metric tensor learns")["input_ids"], tokenizer("the")["input_ids"]
    batch = tokenizer(["the metric tensor learns", "the"], padding=True, return_tensors="pt")
    assert batch["input_ids"].tolist() == [long, [0] * (len(long) - len(short)) + short]
    assert batch["attention_mask"][1].tolist() == [0] * (len(long) - len(short)) + [1] * len(short)
    assert tokenizer("the metric tensor learns", truncation=True, max_length=2)["input_ids"] == long[:2]


def test_offsets_point_into_the_text_as_it_was_written(model_files: dict[str, Path]) -> None:
    tokenizer = PldrllmTokenizerFast(vocab_file=str(model_files["varied"]))
    text = "  the   ﬁrst e\u0301 ① ｔｅｎｓｏｒ"  # a ligature, a composed letter, a number in a circle, wide letters
    encoded = tokenizer(text, return_offsets_mapping=True)
    covered = {place for start, stop in encoded["offset_mapping"] for place in range(start, stop)}
    assert {place for place, char in enumerate(text) if char != " "} <= covered
    place = text.index("ﬁ")
    token = encoded.char_to_token(place)
    assert encoded.token_to_chars(token).start <= place
    # Whatever the text, no offset leaves it and none goes back.
    for line in varied_lines(2000, seed=3):
        offsets = tokenizer(line, return_offsets_mapping=True)["offset_mapping"]
        assert all(0 <= start <= stop <= len(line) for start, stop in offsets)
        assert all(a[0] <= b[0] for a, b in itertools.pairwise(offsets))


def test_a_folder_loads_with_either_class_and_with_auto(english: str, tmp_path: Path) -> None:
    lines = varied_lines(1000, seed=2)
    slow, fast = PldrllmTokenizer(english), PldrllmTokenizerFast(vocab_file=english)
    expected = slow(lines)["input_ids"]
    assert {path.name for path in map(Path, slow.save_pretrained(tmp_path / "slow"))} >= {
        "tokenizer.model",
        "tokenizer_config.json",
    }
    fast.save_pretrained(tmp_path / "fast")
    assert (tmp_path / "fast" / "tokenizer.model").read_bytes() == Path(english).read_bytes()
    for name in ("slow", "fast"):
        PldrllmConfig().save_pretrained(tmp_path / name)
        for tokenizer_class in (PldrllmTokenizer, PldrllmTokenizerFast, AutoTokenizer):
            tokenizer = tokenizer_class.from_pretrained(tmp_path / name)
            assert isinstance(tokenizer, PldrllmTokenizer | PldrllmTokenizerFast)
            assert tokenizer(lines)["input_ids"] == expected
            assert tokenizer.padding_side == "left"
    # tokenizer.json alone is enough for the fast one, and copies of it work too.
    (tmp_path / "fast" / "tokenizer.model").unlink()
    alone = PldrllmTokenizerFast.from_pretrained(tmp_path / "fast")
    for each in (alone, pickle.loads(pickle.dumps(alone)), copy.deepcopy(alone)):
        assert each(lines)["input_ids"] == expected
    alone.save_pretrained(tmp_path / "again")
    assert PldrllmTokenizerFast.from_pretrained(tmp_path / "again")(lines)["input_ids"] == expected


def test_the_fast_tokenizer_needs_no_sentencepiece_where_there_is_a_tokenizer_json(
    english: str, tmp_path: Path
) -> None:
    PldrllmTokenizerFast(vocab_file=english).save_pretrained(tmp_path)
    code = """
import sys
for name in ("sentencepiece", "google.protobuf"):
    sys.modules[name] = None
from pldr_train.model.tokenization_pldrllm_fast import PldrllmTokenizerFast
tokenizer = PldrllmTokenizerFast.from_pretrained(sys.argv[1])
print(tokenizer("the ﬁrst tensor")["input_ids"])
try:
    PldrllmTokenizerFast(vocab_file=sys.argv[1] + "/tokenizer.model")
except ImportError as error:
    print(error)
"""
    shown = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    ids, message = shown.stdout.strip().splitlines()
    assert json.loads(ids) == PldrllmTokenizer(english)("the ﬁrst tensor")["input_ids"]
    assert "pip install sentencepiece" in message


@BOTH
def test_streamed_text_is_the_decoded_text(english: str, tokenizer_class: type, capsys: pytest.CaptureFixture) -> None:
    import torch

    tokenizer = tokenizer_class(vocab_file=english)
    text = "the metric tensor learns an operator, é ☕️ 12 times"
    streamer = TextStreamer(tokenizer)
    for index in tokenizer(text)["input_ids"]:
        streamer.put(torch.tensor([index]))
    streamer.end()
    assert capsys.readouterr().out == text + "\n"


@BOTH
def test_files_that_are_no_tokenizer_are_one_clear_error(tokenizer_class: type, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"vocab_file=.*none\.model: no such file"):
        tokenizer_class(vocab_file=str(tmp_path / "none.model"))
    (tmp_path / "junk.model").write_bytes(b"not a model" * 100)
    with pytest.raises(ValueError, match=r"vocab_file=.*junk\.model is no SentencePiece model"):
        tokenizer_class(vocab_file=str(tmp_path / "junk.model"))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b c d e f"] * 20),
        model_prefix=str(tmp_path / "other"),
        vocab_size=10,
        minloglevel=2,
    )
    with pytest.raises(ValueError, match=r"its pieces 0 to 5 are <unk> .*, not \[PAD\] \[UNK\]"):
        tokenizer_class(vocab_file=str(tmp_path / "other.model"))


def test_pieces_between_bytes_and_special_ones() -> None:
    assert pieces_to_text(["▁", "▁a", "<0xE2>", "<0x82>", "<0xAC>", "▁b"]) == "a€ b"
    assert pieces_to_text(["<0xE2>", "<0x82>", "x"]) == "\ufffd\ufffdx"
    assert pieces_to_text(["[START]", "▁a"], special={"[START]"}) == "[START] a"
    assert pieces_to_text([]) == ""


def test_a_byte_piece_written_out_is_text(model_files: dict[str, Path], tmp_path: Path) -> None:
    lines = [
        "<0x0A>", "a <0x0A> b", "x<0xFF><0x00>y", "<0xff> <0x0G> <0x0A <<0x41>>", "zwölf € 漢字 \n<0xE2>é<0x41>",
        "[SEP]<0x0A>[SEP]",
    ]  # fmt: skip
    for path in map(str, model_files.values()):
        slow, fast = PldrllmTokenizer(path), PldrllmTokenizerFast(vocab_file=path)
        assert slow(lines[:4])["input_ids"] == sentencepiece.SentencePieceProcessor(model_file=path).encode(lines[:4])
        expected = slow(lines)["input_ids"]
        assert fast(lines)["input_ids"] == expected
        fast.save_pretrained(tmp_path)
        kept = json.loads((tmp_path / "tokenizer.json").read_text())
        assert PldrllmTokenizerFast.from_pretrained(tmp_path)(lines)["input_ids"] == expected
        assert Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode(lines[1]).ids == expected[1]
        # One that was saved by an earlier version.
        (tmp_path / "tokenizer.json").write_text(json.dumps(kept | {"pre_tokenizer": None}))
        assert PldrllmTokenizerFast.from_pretrained(tmp_path)(lines)["input_ids"] == expected
        assert pickle.loads(pickle.dumps(fast))(lines)["input_ids"] == expected
