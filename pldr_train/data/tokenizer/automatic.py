"""Tokenizers of recipes that name none, trained at their first use and kept in the cache."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path

import numpy as np

from pldr_train.data.documents import DocumentSource
from pldr_train.data.files import CACHE_FIX, write_file_atomically
from pldr_train.data.rows.split import Interval, Spread, resolve_intervals
from pldr_train.data.sources.file_source import FileSource, count_rows
from pldr_train.data.sources.hidden_class import CLASS_WORDS, FIXED_WORDS, HIDDEN_CLASS_CORPUS_NAME
from pldr_train.data.sources.local_files import LocalFiles, local_manifest
from pldr_train.data.sources.quickstart import build_quickstart_corpus, quickstart_corpus_name
from pldr_train.data.tokenizer.line_sample import LineSample
from pldr_train.data.tokenizer.pieces import NUM_FIXED_PIECES
from pldr_train.data.tokenizer.settings import PAPER_SETTINGS
from pldr_train.data.tokenizer.training import check_vocab_size, iterate_texts, train_model, train_tokenizer
from pldr_train.recipe import Recipe

_log = logging.getLogger(__name__)

AUTOMATIC_DOCUMENTS = 20_000
"""Largest number of documents that train an automatic tokenizer."""
_RUN_DOCUMENTS = 1000
"""Documents of a run, about a row group."""
_AUTOMATIC_SAMPLE_BYTES = 256 * 1024**2
_AUTOMATIC_VERSION = 1

_DEFAULT_VALIDATION_FRACTION = 0.01
_TOKENIZER_FORMAT_VERSION = 1

HIDDEN_CLASS_PIECES = NUM_FIXED_PIECES + len(FIXED_WORDS + CLASS_WORDS) + len({*"▁".join(FIXED_WORDS + CLASS_WORDS)})
"""Pieces of the hidden-class corpus' tokenizer: the words, and the characters that SentencePiece always keeps."""


def recipe_tokenizer(
    recipe: Recipe,
    source: DocumentSource,
    train: Interval,
    spread: Spread | None,
) -> Path:
    """Return the path of the SentencePiece model that a recipe names, or train one if it names none.

    It is trained on the documents of `train` that `spread` does not hold out. Not for data.source=tokens, which has its
    own. Raises DataError.
    """
    data = recipe.data
    if data.tokenizer is not None:
        return Path(data.tokenizer)
    if data.source == "quickstart":
        return quickstart_tokenizer(data.cache_dir, recipe.model.vocab_size, train, spread)
    if data.source == "hidden_class":
        return hidden_class_tokenizer(data.cache_dir)
    cache = Path(data.cache_dir)
    return automatic_tokenizer(source, train, recipe.model.vocab_size, cache, spread)


def quickstart_tokenizer(
    cache_dir: str | Path, vocab_size: int, documents: Interval | None = None, spread: Spread | None = None
) -> Path:
    """Return the path of the quickstart corpus' tokenizer. Train it once for each corpus, size and interval (seconds).

    `documents` is the interval [start, stop) to train on; None: all but the last hundredth, which validates by default.
    Documents that `spread` holds out are left out. The corpus is built if there is none.

    Raises DataError as `train_tokenizer` and `build_quickstart_corpus`.
    """
    manifest, root = local_manifest(str(build_quickstart_corpus(cache_dir)), "content")
    access = LocalFiles(root)
    source = FileSource(count_rows(manifest, access), access)
    default, _ = resolve_intervals(source.num_documents, None, None, _DEFAULT_VALIDATION_FRACTION)
    start, stop = documents or default
    held_out = "" if spread is None else f"-without{spread.held_out}"
    name = f"unigram{vocab_size}-documents{start}-{stop}{held_out}-v{_TOKENIZER_FORMAT_VERSION}.model"
    path = Path(cache_dir) / f"{quickstart_corpus_name()}-tokenizers" / name
    if not path.is_file():
        train_tokenizer(iterate_texts(source, start, stop, spread), path, vocab_size)
    return path


def hidden_class_tokenizer(cache_dir: str | Path) -> Path:
    """Return the path of the corpus' tokenizer, in which each word is a piece. Train it if there is none.

    Raises DataError if it cannot be written.
    """
    path = Path(cache_dir) / f"{HIDDEN_CLASS_CORPUS_NAME}-tokenizers" / f"unigram{HIDDEN_CLASS_PIECES}.model"
    if not path.is_file():
        # The corpus' own lines would not do: only what is followed by different texts becomes a piece, and the fixed
        # words always follow each other.
        lines = [f"{word} {word}" for word in FIXED_WORDS + CLASS_WORDS]
        write_file_atomically(path, train_model(lines, HIDDEN_CLASS_PIECES))
    return path


def automatic_tokenizer(
    source: DocumentSource,
    documents: Interval,
    vocab_size: int,
    cache_dir: str | Path,
    spread: Spread | None = None,
) -> Path:
    """Return the path of a tokenizer for these documents. Train it once, and keep it in the cache.

    It is trained on all documents, or on AUTOMATIC_DOCUMENTS of them in evenly spaced runs.

    Args:
        source: of the documents.
        documents: the interval [start, stop) that may be read.
        vocab_size: number of pieces.
        cache_dir: the file lies in its folder `tokenizers`; the name has the size and a digest of the documents' files.
        spread: documents that it holds out are left out; None: none.

    Raises:
        DataError: as `train_tokenizer`, or what the source raises.
    """
    start, stop = documents
    identity = [_AUTOMATIC_VERSION, source.fingerprint(start, stop), [start, stop]]
    identity += [] if spread is None else [spread.held_out]
    digest = hashlib.blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=16).hexdigest()
    path = Path(cache_dir) / "tokenizers" / f"unigram{vocab_size}-{digest}.model"
    if path.is_file():
        return path
    check_vocab_size(vocab_size)
    runs = _spread_runs(start, stop)
    held_out = 0 if spread is None else sum(int(spread.is_held_out(np.arange(*run)).sum()) for run in runs)
    number = sum(last - first for first, last in runs) - held_out
    of = f"{number:,} of {stop - start - (spread.held_out if spread else 0):,} documents"
    _log.info(
        f"data.tokenizer is null: training one of {vocab_size:,} pieces on {of}, once (pldr-train tokenizer train "
        "makes one of more)"
    )
    sample = LineSample(
        _AUTOMATIC_SAMPLE_BYTES, PAPER_SETTINGS["input_sentence_size"], PAPER_SETTINGS["max_sentence_length"]
    )
    for first, last in runs:
        sample.add(first, list(iterate_texts(source, first, last, spread)))
    sample.finish()
    write_file_atomically(path, train_model(sample.drain(), vocab_size), CACHE_FIX)
    _log.info(f"trained {path}")
    return path


def _spread_runs(start: int, stop: int) -> list[Interval]:
    """Return up to AUTOMATIC_DOCUMENTS documents of an interval in evenly spaced runs, from end to end."""
    if stop - start <= AUTOMATIC_DOCUMENTS:
        return [(first, min(first + _RUN_DOCUMENTS, stop)) for first in range(start, stop, _RUN_DOCUMENTS)]
    number = AUTOMATIC_DOCUMENTS // _RUN_DOCUMENTS
    last_first = stop - start - _RUN_DOCUMENTS
    firsts = [start + last_first * index // (number - 1) for index in range(number)]
    return [(first, first + _RUN_DOCUMENTS) for first in firsts]
