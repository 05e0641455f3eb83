"""A small corpus with every kind of document, and its settings, for tests of tokens written ahead."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pldr_train.data.documents import DocumentBlock, LiveReader, TokenReader
from pldr_train.data.sources.opening import open_source
from pldr_train.data.tokenizer.training import load_tokenizer
from pldr_train.data.tokens.tokenize_ahead import Outcome, tokenize_ahead
from pldr_train.recipe import Recipe
from tests.tiny import data_recipe

ODD: list[bytes | None] = [None, b"", b"\xff\xfe metric", "naïve ümlaut 🙂".encode(), b"   ", b"the\n\nmetric\x00"]
ROWS_PER_GROUP = 7


def documents(number: int = 60, seed: int = 0) -> list[bytes | None]:
    """Sentences of all lengths, and odd ones among them."""
    generator = np.random.default_rng(seed)
    words = "the metric tensor learns an operator from queries and keys of every head 12 345".split()
    found: list[bytes | None] = []
    for index in range(number):
        length = int(generator.integers(1, 80))
        found.append(" ".join(generator.choice(words, length)).encode())
        if index % 10 == 3:
            found[-1] = ODD[index // 10 % len(ODD)]
    return found


def write_corpus(folder: Path, texts: list[bytes | None] | None = None) -> Path:
    """Three Parquet files of these documents."""
    texts = documents() if texts is None else texts
    folder.mkdir(parents=True, exist_ok=True)
    third = len(texts) // 3
    for index, part in enumerate((texts[:third], texts[third : 2 * third], texts[2 * third :])):
        # Stored as strings although some are no UTF-8, as damaged files hold them.
        column = pa.array(part, pa.binary()).view(pa.string())
        pq.write_table(pa.table({"content": column}), folder / f"{index}.parquet", row_group_size=ROWS_PER_GROUP)
    return folder


def settings(corpus: Path, tokenizer: Path | None, **changes: Any) -> Recipe:
    values: dict[str, Any] = {
        "source": "parquet", "path": str(corpus), "text_column": "content", "train_documents": None,
        "validation_documents": None, "validation_fraction": 0.1,
        "tokenizer": None if tokenizer is None else str(tokenizer), "cache_dir": str(corpus.parent / "cache"),
        "context_length": 16, "num_lanes": 4, "shuffle": True, "shuffle_window_documents": 10, "num_workers": 0,
        "seed": 1, "vocab_size": 320, "batch_size": 4, "micro_batch_size": 4, "validation_rows": 4,
    }  # fmt: skip
    return data_recipe(**values | changes)


def block_of(start: int, texts: Iterable[str | bytes | None]) -> DocumentBlock:
    """A block of documents in memory."""
    encoded = [text.encode() if isinstance(text, str) else text for text in texts]
    return DocumentBlock(start, pa.array(encoded, pa.large_binary()))


def live_reader(of: Recipe) -> LiveReader:
    return LiveReader(open_source(of.data), load_tokenizer(of.data.tokenizer))


def tokenize(of: Recipe, folder: Path, **options: Any) -> Outcome:
    return tokenize_ahead(of, folder, **{"documents_per_shard": 13} | options)


def read(reader: TokenReader, ordinals: NDArray[np.int64], piece: int) -> tuple[list[list[int]], list[int], Any]:
    """Documents' tokens, their flags, and what is unreadable, read in pieces."""
    block = reader.open(ordinals)
    found: list[list[int]] = []
    flags: list[int] = []
    for first in range(0, len(ordinals), piece):
        tokens, lengths, some = block.encode(first, min(first + piece, len(ordinals)))
        assert tokens.dtype == np.int32
        assert (lengths.dtype, some.dtype) == (np.int64, np.uint8)
        found += [part.tolist() for part in np.split(tokens, lengths.cumsum()[:-1])]
        flags += some.tolist()
    return found, flags, sorted(block.unreadable, key=lambda part: part.start)


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a folder, hidden ones too."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}
