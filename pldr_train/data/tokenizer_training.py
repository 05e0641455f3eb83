"""SentencePiece tokenizers with the papers' settings: training, loading with checks, the quickstart's own."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import sentencepiece

from pldr_train.data.corpus import build_quickstart_corpus, quickstart_corpus_name
from pldr_train.data.documents import DocumentSource
from pldr_train.data.files import write_file_atomically
from pldr_train.data.intervals import resolve_intervals
from pldr_train.data.local_files import local_manifest
from pldr_train.data.sources import FileSource, LocalFiles, count_rows
from pldr_train.errors import DataError

SPECIAL_PIECES = ("[PAD]", "[UNK]", "[START]", "[END]", "[SEP]", "[CLS]")
"""Published special pieces; the ids are their places. Byte pieces follow."""
PAD_ID, UNK_ID, START_ID, END_ID = range(4)
NUM_BYTE_PIECES = 256

_DEFAULT_VALIDATION_FRACTION = 0.01
_TOKENIZER_FORMAT_VERSION = 1
_READ_DOCUMENTS = 1024
_PAPER_SETTINGS: dict[str, Any] = {
    "model_type": "unigram",
    "normalization_rule_name": "nmt_nfkc",
    "split_digits": True,
    "byte_fallback": True,
    "hard_vocab_limit": False,
    "input_sentence_size": 5_000_000,
    "shuffle_input_sentence": True,
    "max_sentence_length": 125_760,
    "pad_id": PAD_ID,
    "unk_id": UNK_ID,
    "bos_id": START_ID,
    "eos_id": END_ID,
    "pad_piece": SPECIAL_PIECES[PAD_ID],
    "unk_piece": SPECIAL_PIECES[UNK_ID],
    "bos_piece": SPECIAL_PIECES[START_ID],
    "eos_piece": SPECIAL_PIECES[END_ID],
    "user_defined_symbols": list(SPECIAL_PIECES[END_ID + 1 :]),
}
# The expectation step adds its threads' sums in the order of threads: their number must not depend on the machine.
_NUM_THREADS = 16
_ONLY_ERRORS = 2


def train_tokenizer(texts: Iterable[str], output_path: str | Path, vocab_size: int) -> Path:
    """Train a unigram tokenizer of exactly `vocab_size` pieces with the papers' settings and write it atomically.

    A training sentence is a non-blank line of a text. The same texts give the same file. Raises DataError when the
    texts cannot yield `vocab_size` pieces, when that is too few for their characters, or when the file cannot be
    written; errors of the iterable itself come through unchanged.
    """
    fixed_pieces = len(SPECIAL_PIECES) + NUM_BYTE_PIECES
    if vocab_size <= fixed_pieces:
        raise DataError(
            f"model.vocab_size={vocab_size} leaves no room beside the {fixed_pieces} special and byte pieces; "
            f"set it to more than {fixed_pieces}"
        )
    lines = _Lines(texts)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            vocab_size=vocab_size,
            num_threads=_NUM_THREADS,
            minloglevel=_ONLY_ERRORS,
            **_PAPER_SETTINGS,
        )
    except (RuntimeError, OSError, ValueError) as error:
        if lines.error is not None:  # SentencePiece wraps what the iterable raised into its own error
            raise lines.error from None
        raise _training_failed(error, vocab_size, lines.count) from error
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).get_piece_size()
    if pieces < vocab_size:
        raise DataError(
            f"model.vocab_size={vocab_size} is more than this text allows: only {pieces} pieces are possible from its "
            f"{lines.count} lines; set model.vocab_size to {pieces} or less, or give more text"
        )
    write_file_atomically(Path(output_path), model.getvalue())
    return Path(output_path)


class _Lines:
    """Non-blank lines of texts, remembering their number and the error that ended them."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts = texts
        self.count = 0
        self.error: Exception | None = None

    def __iter__(self) -> Iterator[str]:
        try:
            for text in self._texts:
                for line in text.split("\n"):
                    if line.strip():
                        self.count += 1
                        yield line
        except Exception as error:
            self.error = error
            raise


def _training_failed(error: Exception, vocab_size: int, lines: int) -> DataError:
    if lines == 0:
        return DataError("the tokenizer's training text is empty: give documents that hold text")
    if needed := re.search(r"smaller than required_chars\. \d+ vs (\d+)", str(error)):
        return DataError(
            f"model.vocab_size={vocab_size} is too small: the characters of this text need {needed[1]} pieces; "
            f"set it to {needed[1]} or more"
        )
    return DataError(f"SentencePiece cannot train a tokenizer with model.vocab_size={vocab_size} on this text: {error}")


def load_tokenizer(path: str | Path) -> sentencepiece.SentencePieceProcessor:
    """Load a SentencePiece model whose special pieces are the published ones.

    Raises DataError when the file is missing, is not a SentencePiece model, or has other special pieces.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(
            f"data.tokenizer={path}: no such file; give a SentencePiece .model, or train one with the papers' settings"
        )
    try:
        tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError, ValueError) as error:
        raise DataError(f"data.tokenizer={path}: not a SentencePiece model ({error}); give a .model file") from error
    found = [tokenizer.id_to_piece(index) for index in range(min(len(SPECIAL_PIECES), tokenizer.get_piece_size()))]
    if found != list(SPECIAL_PIECES):
        raise DataError(
            f"data.tokenizer={path}: its pieces 0 to 5 are {' '.join(found)}, not {' '.join(SPECIAL_PIECES)}; "
            "train a tokenizer with the published special pieces"
        )
    return tokenizer


def check_vocabulary(tokenizer: sentencepiece.SentencePieceProcessor, vocab_size: int) -> None:
    """Raise DataError if the tokenizer knows more pieces than the model's embedding has rows."""
    pieces = tokenizer.get_piece_size()
    if pieces > vocab_size:
        raise DataError(
            f"model.vocab_size={vocab_size} is less than the tokenizer's {pieces} pieces; "
            f"set model.vocab_size to {pieces} or more, or give another data.tokenizer"
        )


def quickstart_tokenizer(cache_dir: str | Path, vocab_size: int, documents: tuple[int, int] | None = None) -> Path:
    """Path of the quickstart corpus' tokenizer, trained once for each corpus, size and interval (seconds).

    `documents` is the interval [start, stop) to train on; None leaves out the last hundredth of the corpus, the default
    validation part. Builds the corpus if need be. Raises DataError as `train_tokenizer` and `build_quickstart_corpus`.
    """
    manifest, root = local_manifest(str(build_quickstart_corpus(cache_dir)), "content")
    access = LocalFiles(root)
    source = FileSource(count_rows(manifest, access), access)
    default, _ = resolve_intervals(source.num_documents, None, None, _DEFAULT_VALIDATION_FRACTION)
    start, stop = documents or default
    name = f"unigram{vocab_size}-documents{start}-{stop}-v{_TOKENIZER_FORMAT_VERSION}.model"
    path = Path(cache_dir) / f"{quickstart_corpus_name()}-tokenizers" / name
    if not path.is_file():
        train_tokenizer(iterate_texts(source, start, stop), path, vocab_size)
    return path


def iterate_texts(source: DocumentSource, start: int, stop: int) -> Iterator[str]:
    """Texts of the documents [start, stop) one by one, read in moderate pieces."""
    for first in range(start, stop, _READ_DOCUMENTS):
        yield from source.read(first, min(first + _READ_DOCUMENTS, stop)).texts()
