"""Documents to rows: a lane's endless token stream, cut into overlapping rows.

A lane's stream is its documents' tokens, each document followed by EOS, with no BOS (PLDR-LLM pretraining). A row has
context_length + 1 tokens and the next one begins context_length tokens later, at the row's last token: every token but
the very first of a stream is a target exactly once. Nothing is dropped between documents or epochs.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import sentencepiece
import torch
from numpy.typing import NDArray

from pldr_train.data.lanes import Cursor, LaneLayout
from pldr_train.data.sources import DocumentSource
from pldr_train.data.tokenizer_training import END_ID


def encode_document(tokenizer: sentencepiece.SentencePieceProcessor, text: str) -> NDArray[np.int32]:
    """Token ids of a whole text followed by EOS; an empty text is a lone EOS."""
    # One text a call: a list would start threads at every call, which the data-loading workers must not.
    ids = tokenizer.encode(text, out_type=int, add_bos=False, add_eos=False)
    return np.array([*ids, END_ID], dtype=np.int32)


class _Segment(NamedTuple):
    epoch: int
    document: int
    tokens: NDArray[np.int32]


class LaneStream:
    """The rows of one lane from a cursor on; reaching the first costs reading one block, not the lane's past."""

    def __init__(
        self,
        source: DocumentSource,
        tokenizer: sentencepiece.SentencePieceProcessor,
        layout: LaneLayout,
        lane: int,
        context_length: int,
        cursor: Cursor | None = None,
    ) -> None:
        self._source, self._tokenizer, self._layout = source, tokenizer, layout
        self._lane, self._context_length = lane, context_length
        cursor = cursor or Cursor(0, 0, 0)
        self._segments = self._read_segments(cursor)
        self._ahead: deque[_Segment] = deque()
        self._ahead_tokens = -cursor.offset
        self._offset = cursor.offset

    def _read_segments(self, cursor: Cursor) -> Iterator[_Segment]:
        skip = cursor.document % self._layout.window
        for epoch, first_place, ordinals in self._layout.blocks_from(self._lane, cursor):
            start = int(ordinals.min())
            texts = self._source.read(start, int(ordinals.max()) + 1)
            ordered = [texts[ordinal - start] for ordinal in ordinals]
            for place in range(skip, len(ordered)):
                yield _Segment(epoch, first_place + place, encode_document(self._tokenizer, ordered[place]))
            skip = 0

    def next_row(self) -> tuple[NDArray[np.int32], Cursor]:
        """The next row, (context_length + 1,) token ids, and the cursor of the row after it."""
        needed = self._context_length + 1
        while self._ahead_tokens < needed:
            segment = next(self._segments)
            self._ahead.append(segment)
            self._ahead_tokens += len(segment.tokens)
        row = np.empty(needed, dtype=np.int32)
        filled, offset = 0, self._offset
        while True:
            tokens = self._ahead[0].tokens[offset : offset + needed - filled]
            row[filled : filled + len(tokens)] = tokens
            filled, offset = filled + len(tokens), offset + len(tokens)
            if filled == needed:
                break
            self._ahead.popleft()
            offset = 0
        self._offset = offset - 1  # the row's last token is the next row's first
        self._ahead_tokens -= self._context_length
        return row, Cursor(self._ahead[0].epoch, self._ahead[0].document, self._offset)


def batch_digest(input_ids: torch.Tensor) -> str:
    """Hex digest (BLAKE2b, 16 bytes) of token ids as little-endian int32, in row-major order; any integer tensor."""
    ids = np.ascontiguousarray(input_ids.detach().cpu().numpy().astype("<i4"))
    return hashlib.blake2b(ids.tobytes(), digest_size=16).hexdigest()
