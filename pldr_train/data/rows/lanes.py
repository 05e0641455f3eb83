"""The order of the training data as pure functions: no files, no state, and the seed as the only randomness.

The documents of an interval are cut into blocks of `window` consecutive documents. In every epoch the blocks are
permuted by (seed, epoch) and dealt to the lanes like cards; inside a block the documents are permuted by (seed, epoch,
block). A lane is therefore an endless sequence of documents that can be entered anywhere at the cost of one block.

Row r of the run is the (r // num_lanes)-th row of lane r % num_lanes. The numbers of processes and of data-loading
workers and the micro-batch size decide which process takes a row, never which row comes next.

Permutations are made of integer hashes. So the order depends on no library's random generator, and a corpus of any size
needs no table of its blocks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from pldr_train.errors import DataError

_FEISTEL_ROUNDS = 8
_FEISTEL_STRIDE = 0x9E3779B97F4A7C15
_WORD = (1 << 64) - 1
_MIN_BLOCKS_PER_LANE = 16
"""A lane takes whole blocks. With at least this many, the lanes' shares of an epoch differ by 1/16 at most."""


class Cursor(NamedTuple):
    """The token at which a lane's next row begins. The token exists, so the triple is unique.

    `document` counts the places of the lane's epoch, `window` places for each of its blocks (the corpus' last block may
    leave places empty); `offset` counts tokens in that document, its EOS being the last.
    """

    epoch: int
    document: int
    offset: int


class Numbering(Protocol):
    """Documents that are no interval, by position. Two numberings of the same documents are equal."""

    @property
    def size(self) -> int:
        """Number of documents."""

    def numbers(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the numbers of the documents at these positions. Positions close together have rising numbers."""


def permutation_key(*parts: int | str) -> int:
    """Return a 64-bit key that depends on every part and on their order."""
    text = "/".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def permutation(size: int, key: int) -> NDArray[np.int64]:
    """Return the permutation of range(size) that `key` names: the order of the numbers' 64-bit hashes (SplitMix64)."""
    golden_gamma = np.uint64(0x9E3779B97F4A7C15)
    values = np.uint64(key) + golden_gamma * np.arange(1, size + 1, dtype=np.uint64)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.argsort(values ^ (values >> np.uint64(31)), kind="stable").astype(np.int64)


def permuted(index: int, size: int, key: int) -> int:
    """Return the image of `index` under another permutation of range(size) that `key` names, in O(1) memory and time.

    A Feistel network permutes the smallest domain 4**k that holds `size`; an image outside range(size) is sent through
    again until it falls inside (cycle walking), which keeps it a permutation.
    """
    assert 0 <= index < size
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half_bits) - 1
    while True:
        left, right = index >> half_bits, index & mask
        for feistel_round in range(_FEISTEL_ROUNDS):
            left, right = right, left ^ (_mixed_bits(right ^ (key + feistel_round * _FEISTEL_STRIDE)) & mask)
        index = (left << half_bits) | right
        if index < size:
            return index


def _mixed_bits(value: int) -> int:
    value &= _WORD
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _WORD
    return value ^ (value >> 31)


@dataclass(frozen=True)
class LaneLayout:
    """How the documents [start, stop) are dealt to lanes, epoch by epoch. Build it with `lane_layout`."""

    start: int
    stop: int
    num_lanes: int
    window: int
    seed: int
    shuffle: bool
    numbering: Numbering | None = None
    """The documents of [start, stop) that are used; None: all."""

    @property
    def num_documents(self) -> int:
        """Number of documents of an epoch."""
        return self.stop - self.start if self.numbering is None else self.numbering.size

    @property
    def num_blocks(self) -> int:
        """Number of blocks of an epoch. The last one may be short."""
        return -(-self.num_documents // self.window)

    def block(self, lane: int, epoch: int, turn: int) -> NDArray[np.int64] | None:
        """Return the numbers of the documents of a lane's `turn`-th block in `epoch`, in order; None past the epoch."""
        place = turn * self.num_lanes + lane
        if place >= self.num_blocks:
            return None
        block = place
        if self.shuffle:
            key = permutation_key("blocks", self.seed, epoch)
            block = permuted(place, self.num_blocks, key)
        first = block * self.window
        size = min(self.window, self.num_documents - first)
        if self.shuffle:
            positions = first + permutation(size, permutation_key("documents", self.seed, epoch, block))
        else:
            positions = np.arange(first, first + size, dtype=np.int64)
        return self.start + positions if self.numbering is None else self.numbering.numbers(positions)

    def blocks_from(self, lane: int, cursor: Cursor) -> Iterator[tuple[int, int, NDArray[np.int64]]]:
        """Yield the lane's blocks from the cursor's on, endlessly: (epoch, place of the first document, ordinals)."""
        epoch, turn = cursor.epoch, cursor.document // self.window
        while True:
            ordinals = self.block(lane, epoch, turn)
            if ordinals is None:
                epoch, turn = epoch + 1, 0
                continue
            yield epoch, turn * self.window, ordinals
            turn += 1


def lane_layout(
    start: int,
    stop: int,
    *,
    num_lanes: int,
    window: int,
    seed: int,
    shuffle: bool,
    numbering: Numbering | None = None,
) -> LaneLayout:
    """Lay out the documents [start, stop) in `num_lanes` lanes with blocks of at most `window` documents.

    With a `numbering` only its documents are laid out. Few documents make smaller blocks, so that each lane gets its
    fair share. The layout depends on the recipe's values and the number of documents alone.

    Raises DataError if there are fewer documents than lanes.
    """
    assert num_lanes >= 1
    assert window >= 1
    documents = stop - start if numbering is None else numbering.size
    if documents < num_lanes:
        raise DataError(
            f"data.num_lanes={num_lanes} exceeds the {documents} training documents [{start}, {stop}): every lane "
            f"needs one at least; lower data.num_lanes to {max(documents, 1)} or less, or give more documents"
        )
    fair_window = max(1, documents // (num_lanes * _MIN_BLOCKS_PER_LANE))
    return LaneLayout(start, stop, num_lanes, min(window, fair_window), seed, shuffle, numbering)


def micro_batch_rows(first_row: int, index: int, *, rank: int, world_size: int, micro_batch_size: int) -> range:
    """Return the row numbers of the `index`-th micro-batch of process `rank`, counted from row `first_row` of the run.

    Each block of world_size * micro_batch_size rows is cut into equal slices, one per rank.
    """
    start = first_row + (index * world_size + rank) * micro_batch_size
    return range(start, start + micro_batch_size)
