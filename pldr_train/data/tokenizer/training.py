"""Train SentencePiece tokenizers with the papers' settings, and load them with checks."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from pldr_train.data.documents import DocumentSource
from pldr_train.data.files import write_file_atomically
from pldr_train.data.rows.split import Spread
from pldr_train.data.tokenizer.pieces import NUM_FIXED_PIECES, SPECIAL_PIECES
from pldr_train.data.tokenizer.settings import PAPER_SETTINGS
from pldr_train.errors import DataError

_READ_DOCUMENTS = 1024
# The expectation step adds sums in the order of threads, so their number must not depend on the machine.
_NUM_THREADS = 16
_ALL_MESSAGES, _ONLY_ERRORS = 0, 2


def train_tokenizer(texts: Iterable[str], output_path: str | Path, vocab_size: int) -> Path:
    """Train a unigram tokenizer of exactly `vocab_size` pieces with the papers' settings and write it atomically.

    A training sentence is a non-blank line of a text. The same texts give the same file. Raises DataError if the texts
    cannot yield `vocab_size` pieces, if that is too few for their characters, or if the file cannot be written. Errors
    of the iterable pass through.
    """
    lines = (line for text in texts for line in text.split("\n") if line.strip())
    write_file_atomically(Path(output_path), train_model(lines, vocab_size))
    return Path(output_path)


def train_model(
    lines: Iterable[str | bytes], vocab_size: int, settings: Mapping[str, Any] = PAPER_SETTINGS, quiet: bool = True
) -> bytes:
    """Train a SentencePiece model of exactly `vocab_size` pieces on the lines. The same lines give the same bytes.

    This takes about 20 bytes of memory for each character of the lines. `quiet` suppresses SentencePiece's log. Raises
    as `train_tokenizer`.
    """
    model, lines_read = _train(lines, vocab_size, settings, quiet)
    pieces = _count_pieces(model)
    if pieces < vocab_size:
        raise DataError(
            f"model.vocab_size={vocab_size} is more than this text allows: only {pieces} pieces are possible from its "
            f"{lines_read} lines; set model.vocab_size to {pieces} or less, or give more text"
        )
    return model


def fitting_vocab_size(lines: Iterable[str | bytes], wanted: int) -> int:
    """Return the number of pieces nearest to `wanted` that texts like these surely allow.

    If a text yields fewer pieces, it is nine tenths of them, since a part of the text yields fewer still. If its
    characters need more pieces, it is at most twice as many as they need.

    Raises:
        DataError: the lines hold no text.
    """
    lines = list(lines)
    try:
        pieces = _count_pieces(_train(lines, wanted, PAPER_SETTINGS, quiet=True)[0])
    except _MorePiecesNeededError as error:
        return fitting_vocab_size(lines, 2 * error.needed)
    if pieces >= wanted:
        return wanted
    fewer = max(NUM_FIXED_PIECES + 1, pieces * 9 // 10 // 8 * 8)
    try:
        _train(lines, fewer, PAPER_SETTINGS, quiet=True)
    except _MorePiecesNeededError as error:
        return (error.needed + pieces + 1) // 2
    return fewer


def _count_pieces(model: bytes) -> int:
    return int(sentencepiece.SentencePieceProcessor(model_proto=model).get_piece_size())


def _train(
    lines: Iterable[str | bytes], vocab_size: int, settings: Mapping[str, Any], quiet: bool
) -> tuple[bytes, int]:
    """Return the model, of at most `vocab_size` pieces, and the number of lines."""
    check_vocab_size(vocab_size)
    given = _Lines(lines)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(given),
            model_writer=model,
            vocab_size=vocab_size,
            num_threads=_NUM_THREADS,
            minloglevel=_ONLY_ERRORS if quiet else _ALL_MESSAGES,
            **settings,
        )
    except (RuntimeError, OSError, ValueError) as error:
        if given.error is not None:  # SentencePiece wraps an error of the iterable into its own
            raise given.error from None
        raise _training_failed(error, vocab_size, given.count) from error
    return model.getvalue(), given.count


def check_vocab_size(vocab_size: int) -> None:
    """Raise DataError unless there is room for more than the special and byte pieces."""
    if vocab_size <= NUM_FIXED_PIECES:
        raise DataError(
            f"model.vocab_size={vocab_size} leaves no room beside the {NUM_FIXED_PIECES} special and byte pieces; "
            f"set it to more than {NUM_FIXED_PIECES}"
        )


class _MorePiecesNeededError(DataError):
    """The characters of a text need more pieces."""

    def __init__(self, message: str, needed: int) -> None:
        super().__init__(message)
        self.needed = needed


class _Lines:
    """Yields lines, and keeps their number and the error that ended them."""

    def __init__(self, lines: Iterable[str | bytes]) -> None:
        self._lines = lines
        self.count = 0
        self.error: Exception | None = None

    def __iter__(self) -> Iterator[str | bytes]:
        try:
            for line in self._lines:
                self.count += 1
                yield line
        except Exception as error:
            self.error = error
            raise


def _training_failed(error: Exception, vocab_size: int, lines: int) -> DataError:
    if lines == 0:
        return DataError("the tokenizer's training text is empty: give documents that hold text")
    if needed := re.search(r"smaller than required_chars\. \d+ vs (\d+)", str(error)):
        return _MorePiecesNeededError(
            f"model.vocab_size={vocab_size} is too small: the characters of this text need {needed[1]} pieces; "
            f"set it to {needed[1]} or more",
            int(needed[1]),
        )
    return DataError(f"SentencePiece cannot train a tokenizer with model.vocab_size={vocab_size} on this text: {error}")


def load_tokenizer(path: str | Path) -> sentencepiece.SentencePieceProcessor:
    """Load a SentencePiece model whose special pieces are the published ones.

    Raises DataError if the file is missing, is no SentencePiece model, or has other special pieces.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(
            f"data.tokenizer={path}: no such file; give a SentencePiece .model, or train one with the papers' settings "
            "(pldr-train tokenizer train)"
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
    """Raise DataError if the tokenizer has more pieces than the model's embedding has rows."""
    pieces = tokenizer.get_piece_size()
    if pieces > vocab_size:
        raise DataError(
            f"model.vocab_size={vocab_size} is less than the tokenizer's {pieces} pieces; "
            f"set model.vocab_size to {pieces} or more, or give another data.tokenizer"
        )


def iterate_texts(source: DocumentSource, start: int, stop: int, spread: Spread | None = None) -> Iterator[str]:
    """Yield the texts of the documents [start, stop), without those that `spread` holds out."""
    for first in range(start, stop, _READ_DOCUMENTS):
        last = min(first + _READ_DOCUMENTS, stop)
        texts = source.read(first, last).texts()
        if spread is None:
            yield from texts
        else:
            held_out = spread.is_held_out(np.arange(first, last))
            yield from (text for text, left_out in zip(texts, held_out, strict=True) if not left_out)
