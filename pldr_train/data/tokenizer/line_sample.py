"""Take a fair sample of the lines of any number of documents, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import compress

import numpy as np
from numpy.typing import NDArray

from pldr_train.data.rows.lanes import permutation_key

_SLACK = 1.25
"""The sample may grow by this factor before it is cut, so that cuts are rare."""
_SPACE, _PERHAPS, _TEXT = 0, 1, 2
_KINDS = np.full(256, _TEXT, np.uint8)
"""Kind of each byte of UTF-8: whitespace, part of a character that may be whitespace, or neither."""
_KINDS[0x80:] = _PERHAPS
_KINDS[list(b" \t\n\r\x0b\x0c\x1c\x1d\x1e\x1f")] = _SPACE


class LineSample:
    """Keeps non-blank lines of documents, in order, up to a number of lines and bytes.

    If not all fit, each line has the same chance. A line's rank is a hash of the seed, its document's number and its
    own number, and the lines of lowest rank are kept. The result depends on lines, numbers, seed and limits alone.

    Args:
        max_bytes: of UTF-8, of all lines kept; a quarter more while documents are added.
        max_lines: lines kept.
        max_line_bytes: longer lines are left out and counted.
        seed: of the ranks.
    """

    def __init__(self, max_bytes: int, max_lines: int, max_line_bytes: int, seed: int = 0) -> None:
        self._max_bytes, self._max_lines, self._max_line_bytes = max_bytes, max_lines, max_line_bytes
        self._key = np.uint64(permutation_key("lines of a tokenizer's training", seed))
        self._lines: list[bytes | None] = []
        self._ranks: list[NDArray[np.uint64]] = []
        self._sizes: list[NDArray[np.int64]] = []
        self._rank_limit: np.uint64 | None = None
        self.num_bytes = 0
        """UTF-8 bytes of the lines kept."""
        self.num_lines_seen = 0
        """Non-blank lines of all documents, those too long included."""
        self.num_bytes_seen = 0
        """UTF-8 bytes of all lines."""
        self.num_too_long = 0

    @property
    def num_lines(self) -> int:
        """Number of lines kept."""
        return len(self._lines)

    def add(self, start: int, texts: Sequence[str]) -> None:
        """Add consecutive documents, each once. `start` is the first one's number."""
        if not texts:
            return
        whole = "\n".join([*texts, ""]).encode()
        content = np.frombuffer(whole, np.uint8)
        ends = np.flatnonzero(content == ord("\n"))
        starts = np.concatenate([[0], ends[:-1] + 1])
        sizes = ends - starts
        wanted = _not_blank(whole, content, starts, ends)
        self.num_lines_seen += int(wanted.sum())
        self.num_bytes_seen += int(sizes.sum())
        self.num_too_long += int((wanted & (sizes > self._max_line_bytes)).sum())
        wanted &= sizes <= self._max_line_bytes
        ranks = self._ranks_of(start, [text.count("\n") + 1 for text in texts])
        if self._rank_limit is not None:
            wanted &= ranks < self._rank_limit
        kept = np.flatnonzero(wanted)
        # Plain integers index several times as fast as numpy's.
        places = zip(starts[kept].tolist(), ends[kept].tolist(), strict=True)
        self._lines += [whole[first:last] for first, last in places]
        self._sizes.append(sizes[kept])
        self._ranks.append(ranks[kept])
        self.num_bytes += int(sizes[kept].sum())
        if self.num_bytes > _SLACK * self._max_bytes or self.num_lines > _SLACK * self._max_lines:
            self._cut()

    def _ranks_of(self, start: int, num_lines: Sequence[int]) -> NDArray[np.uint64]:
        """Return the ranks of all lines of consecutive documents with `num_lines` lines each."""
        counts = np.array(num_lines)
        documents = np.repeat(np.arange(start, start + len(counts), dtype=np.uint64), counts)
        numbers = np.arange(len(documents)) - np.repeat(np.cumsum(counts) - counts, counts)
        return _hashed(_hashed(self._key, documents), numbers.astype(np.uint64))

    def _cut(self) -> None:
        """Keep as many lines of lowest rank as the limits allow."""
        ranks, sizes = np.concatenate(self._ranks), np.concatenate(self._sizes)
        by_rank = np.argsort(ranks)
        fitting = int(np.searchsorted(np.cumsum(sizes[by_rank]), self._max_bytes, side="right"))
        num_kept = min(fitting, self._max_lines)
        if num_kept == len(by_rank):
            return
        # Neither this line nor one of a higher rank will fit later.
        self._rank_limit = limit = ranks[by_rank[num_kept]]
        kept = ranks < limit
        self._lines = list(compress(self._lines, kept.tolist()))
        self._ranks, self._sizes, self.num_bytes = [ranks[kept]], [sizes[kept]], int(sizes[kept].sum())

    def finish(self) -> None:
        """Cut the sample to its limits. Nothing can be added afterwards."""
        if self.num_bytes > self._max_bytes or self.num_lines > self._max_lines:
            self._cut()
        self._ranks, self._sizes = [], []

    def drain(self) -> Iterator[bytes]:
        """Yield the lines in order, once. Drop each from memory: the caller makes copies."""
        for index, line in enumerate(self._lines):
            self._lines[index] = None
            assert line is not None, "drained already"
            yield line


def _not_blank(
    whole: bytes, content: NDArray[np.uint8], starts: NDArray[np.int64], ends: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Tell which lines are not blank, as `str.strip` sees it."""
    kinds = np.maximum.reduceat(_KINDS[content], starts)
    result: NDArray[np.bool_] = kinds == _TEXT
    for index in np.flatnonzero(kinds == _PERHAPS):
        result[index] = bool(whole[starts[index] : ends[index]].decode("utf-8").strip())
    return result


def _hashed(keys: NDArray[np.uint64] | np.uint64, values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return 64-bit hashes of numbers, each with its key (the finaliser of SplitMix64)."""
    mixed = keys + np.uint64(0x9E3779B97F4A7C15) * (values + np.uint64(1))
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
