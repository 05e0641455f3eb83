"""Count a sample of a recipe's documents, and estimate the whole interval and the run from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import sentencepiece
from numpy.typing import NDArray

from pldr_train.data.documents import INVALID_UTF8, NULL, UNREADABLE, LiveReader, TokenReader, decode
from pldr_train.data.rows.split import Interval, Split, needed_documents, split_documents
from pldr_train.data.sources.opening import open_source
from pldr_train.data.tokenizer.automatic import recipe_tokenizer
from pldr_train.data.tokenizer.pieces import END_ID, SPECIAL_PIECES
from pldr_train.data.tokenizer.training import load_tokenizer
from pldr_train.data.tokens.store import TokenStore
from pldr_train.errors import DataError
from pldr_train.recipe import DataSection, Recipe

PERCENTILES = (1, 5, 25, 50, 75, 95, 99)
_RUN_DOCUMENTS = 50
"""On the Hub a sample is of runs of so many consecutive documents: each read fetches a whole row group."""
_ROWS_READ_DOCUMENTS = 64


@dataclass(frozen=True)
class OpenData:
    """What a recipe reads."""

    reader: TokenReader
    tokenizer: sentencepiece.SentencePieceProcessor
    files: int
    counted_files: int
    """Files whose documents are counted. The files after them are not needed."""
    documents: Interval
    """All documents whose place is known."""
    split: Split

    @property
    def train(self) -> Interval:
        """Interval of the training documents; see `Split.train`."""
        return self.split.train

    @property
    def validation(self) -> Interval:
        """Interval of the validation documents; see `Split.validation`."""
        return self.split.validation


@dataclass(frozen=True)
class Sample:
    """Documents of an interval, as arrays of one entry each."""

    interval: Interval
    tokens: NDArray[np.int64]
    """EOS not counted."""
    characters: NDArray[np.int64]
    bytes: NDArray[np.int64]
    """Of the text in UTF-8 as it is stored; of tokens: of the text that they decode to."""
    flags: NDArray[np.uint8]

    @property
    def is_whole(self) -> bool:
        """Whether the sample has all documents of the interval."""
        return len(self.tokens) == self.interval[1] - self.interval[0]

    @property
    def readable(self) -> NDArray[np.bool_]:
        """(documents,) which documents can be read."""
        readable: NDArray[np.bool_] = (self.flags & UNREADABLE) == 0
        return readable


class Rows(NamedTuple):
    """What a document gives to train on, on average, with the recipe's packing and limits."""

    documents_kept: float
    """Share of documents that are not left out by the limits of length."""
    packed_tokens: float
    """Tokens with EOS: targets in an epoch of packed rows."""
    padded_rows: float
    """Rows of one document each."""
    padding: float
    """Share of the padded rows' tokens that is padding."""


def open_data(recipe: Recipe, documents: Interval | None = None) -> OpenData:
    """Open what a recipe reads, and count it up to the end of its intervals and of `documents`. Raises DataError."""
    data = recipe.data
    if data.source == "tokens":
        if data.path is None:
            raise DataError("data.path is not set; data.source=tokens needs a folder of `pldr-train data tokenize`")
        store = TokenStore(data.path)
        split = split_documents(data, store.num_documents, store.documents[0])
        shards = store.manifest.num_shards
        return OpenData(store, load_tokenizer(store.tokenizer_path), shards, shards, store.documents, split)
    needed = needed_documents(data.train_documents, data.validation_documents)
    if needed is not None and documents is not None:
        needed = max(needed, documents[1])
    source = open_source(data, needed)
    split = split_documents(data, source.num_documents)
    tokenizer = load_tokenizer(recipe_tokenizer(recipe, source, split.train, split.spread))
    files, counted = len(source.manifest.files), source.manifest.num_counted
    return OpenData(LiveReader(source, tokenizer), tokenizer, files, counted, (0, source.num_documents), split)


def take_sample(
    opened: OpenData,
    data: DataSection,
    interval: Interval,
    size: int,
    advance: Callable[[int, int], None] | None = None,
) -> Sample:
    """Read and tokenise up to `size` evenly spaced documents of an interval.

    `advance` is called with the numbers of documents and tokens done. Raises DataError.
    """
    start, stop = interval
    if not opened.documents[0] <= start < stop <= opened.documents[1]:
        raise DataError(
            f"--documents {start} {stop}: not an interval of the documents {list(opened.documents)}; give START and "
            "STOP within them, START below STOP"
        )
    parts: list[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.uint8]]] = []
    for ordinals in _runs(start, stop, size, _RUN_DOCUMENTS if data.source == "hub" else 1):
        encoded = opened.reader.open(ordinals).encode(0, len(ordinals))
        bytes_, characters = _text_sizes(opened, ordinals, encoded.tokens, encoded.lengths)
        parts.append((np.maximum(encoded.lengths - 1, 0), characters, bytes_, encoded.flags))
        if advance is not None:
            advance(len(ordinals), len(encoded.tokens))
    tokens, characters, bytes_, flags = (np.concatenate(each) for each in zip(*parts, strict=True))
    return Sample(interval, tokens, characters, bytes_, flags)


def _runs(start: int, stop: int, size: int, run: int) -> Iterator[NDArray[np.int64]]:
    """Yield the numbers of up to `size` documents of [start, stop), in evenly spaced runs of `run` documents."""
    documents = stop - start
    if size >= documents:
        run = _ROWS_READ_DOCUMENTS
        yield from (np.arange(first, min(first + run, stop)) for first in range(start, stop, run))
        return
    num_runs = -(-size // run)
    for index in range(num_runs):
        first, following = (start + each * documents // num_runs for each in (index, index + 1))
        length = (index + 1) * size // num_runs - index * size // num_runs
        yield np.arange(first, min(first + length, following))


def _text_sizes(
    opened: OpenData, ordinals: NDArray[np.int64], tokens: NDArray[np.int32], lengths: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the bytes and the characters of consecutive documents."""
    if isinstance(opened.reader, LiveReader):
        raws = opened.reader.source.read(int(ordinals[0]), int(ordinals[-1]) + 1).raw.to_pylist()
        sizes = [(len(raw or b""), len(decode(raw)[0])) for raw in raws]
    else:
        stops = lengths.cumsum()
        ids = [tokens[b - n : max(b - 1, b - n)] for b, n in zip(stops.tolist(), lengths.tolist(), strict=True)]
        texts = [opened.tokenizer.decode(each.tolist()) for each in ids]
        sizes = [(len(text.encode()), len(text)) for text in texts]
    return np.array([size for size, _ in sizes], np.int64), np.array([size for _, size in sizes], np.int64)


def rows_of(sample: Sample, data: DataSection) -> Rows:
    """Return what the sample's documents give, on average over all of them."""
    tokens, length = sample.tokens, data.context_length
    kept = sample.readable.copy()
    if data.min_document_tokens is not None:
        kept &= tokens >= data.min_document_tokens
    if data.max_document_tokens is not None:
        kept &= tokens <= data.max_document_tokens
    rows = -(-tokens[kept] // length)  # a document of n tokens and its EOS has n targets in rows of its own
    targets = int(rows.sum()) * length
    padding = 1 - int(tokens[kept].sum()) / targets if targets else 0.0
    documents = len(tokens)
    return Rows(
        int(kept.sum()) / documents, int((tokens[kept] + 1).sum()) / documents, int(rows.sum()) / documents, padding
    )


def epochs(sample: Sample, recipe: Recipe, train: Interval) -> float:
    """Return how often a run goes through its training documents; infinity if they are empty."""
    data, trainer = recipe.data, recipe.trainer
    rows, documents = rows_of(sample, data), train[1] - train[0]
    if data.packing == "pad":
        available = rows.padded_rows * documents
    else:
        available = rows.packed_tokens * documents / data.context_length
    return trainer.max_steps * trainer.batch_size / available if available else math.inf


def histogram(tokens: NDArray[np.int64]) -> list[tuple[int, int, int]]:
    """Return (first, last, documents) of bins of lengths 0, 1, 2-3, 4-7 and so on, without empty ones at the ends."""
    bins = np.zeros(len(tokens), np.int64)
    positive = tokens > 0
    bins[positive] = np.frexp(tokens[positive].astype(np.float64))[1]  # 2**(bin - 1) <= tokens < 2**bin
    counts = np.bincount(bins)
    found = [(1 << index >> 1, max((1 << index) - 1, 0), int(count)) for index, count in enumerate(counts)]
    while found and not found[0][2]:
        del found[0]
    return found


def length_statistics(tokens: NDArray[np.int64]) -> dict[str, float]:
    """Return mean, smallest, largest and percentiles of document lengths."""
    values = {f"p{each}": float(np.percentile(tokens, each)) for each in PERCENTILES}
    return {"mean": float(tokens.mean()), "min": float(tokens.min()), **values, "max": float(tokens.max())}


def counts(sample: Sample) -> dict[str, int]:
    """Count the sample's documents of each kind that training counts."""
    null = (sample.flags & NULL) > 0
    return {
        "null": int(null.sum()),
        "empty": int(((sample.tokens == 0) & ~null & sample.readable).sum()),
        "invalid_utf8": int(((sample.flags & INVALID_UTF8) > 0).sum()),
        "unreadable": int((~sample.readable).sum()),
    }


def first_rows(opened: OpenData, data: DataSection, interval: Interval, count: int) -> list[str]:
    """Return the texts of the first rows of an interval's documents in order, with [END] after each document."""
    rows: list[NDArray[np.int32]] = []
    rest = np.empty(0, np.int32)
    length, (start, stop) = data.context_length, interval
    for first in range(start, stop, _ROWS_READ_DOCUMENTS):
        if len(rows) >= count:
            break
        ordinals = np.arange(first, min(first + _ROWS_READ_DOCUMENTS, stop))
        encoded = opened.reader.open(ordinals).encode(0, len(ordinals))
        documents = np.split(encoded.tokens, encoded.lengths.cumsum()[:-1])
        documents = [each for each in documents if len(each) and _is_within_limits(len(each) - 1, data)]
        if data.packing == "pad":
            rows += [each[at : at + length + 1] for each in documents for at in range(0, len(each) - 1, length)]
        else:
            rest = np.concatenate((rest, *documents))
            whole = max(0, len(rest) - 1) // length
            rows += [rest[at * length : (at + 1) * length + 1] for at in range(whole)]
            rest = rest[whole * length :]
    return [_decoded(opened.tokenizer, row, length + 1) for row in rows[:count]]


def _is_within_limits(tokens: int, data: DataSection) -> bool:
    shortest, longest = data.min_document_tokens, data.max_document_tokens
    return (shortest is None or tokens >= shortest) and (longest is None or tokens <= longest)


def _decoded(tokenizer: sentencepiece.SentencePieceProcessor, row: NDArray[np.int32], length: int) -> str:
    ends = np.flatnonzero(row == END_ID)
    parts = np.split(row, ends + 1)
    texts = [tokenizer.decode(part[part != END_ID].tolist()) for part in parts]
    text = f" {SPECIAL_PIECES[END_ID]} ".join(texts).strip()
    return text + (f" ({length - len(row)} x {SPECIAL_PIECES[0]})" if len(row) < length else "")


def summary(opened: OpenData, recipe: Recipe, sample: Sample, rows: list[str]) -> dict[str, Any]:
    """Return all results in plain types, for JSON."""
    data = recipe.data
    documents, size = sample.interval[1] - sample.interval[0], len(sample.tokens)
    tokens, bytes_ = int(sample.tokens.sum()), int(sample.bytes.sum())
    characters, scale = int(sample.characters.sum()), documents / size
    made = rows_of(sample, data)
    readable = sample.tokens[sample.readable]
    return {
        "source": data.source,
        "files": opened.files,
        "counted_files": opened.counted_files,
        "documents": list(opened.documents),
        "train_documents": list(opened.train),
        "validation_documents": list(opened.validation),
        "validation_choice": None if data.validation_documents else data.validation_choice or "spread",
        "num_train_documents": opened.split.num_training,
        "num_validation_documents": opened.split.num_validation,
        "interval": list(sample.interval),
        "sample": {"documents": size, "bytes": bytes_, "characters": characters, "tokens": tokens, **counts(sample)},
        "estimate": {
            "is_exact": sample.is_whole,
            "documents": documents,
            "bytes": round(bytes_ * scale),
            "characters": round(characters * scale),
            "tokens": round(tokens * scale),
            "tokens_with_eos": round((tokens + len(readable)) * scale),
        },
        "document_tokens": length_statistics(readable) if len(readable) else {},
        "histogram": [{"first": a, "last": b, "documents": n} for a, b, n in histogram(readable)],
        "bytes_per_token": bytes_ / tokens if tokens else None,
        "characters_per_token": characters / tokens if tokens else None,
        "documents_kept": made.documents_kept,
        "padding_with_pad": made.padding,
        "rows_per_document_with_pad": made.padded_rows,
        "epochs": epochs(sample, recipe, (0, opened.split.num_training)),
        "rows": rows,
    }
