"""Which documents train and which validate: two disjoint intervals, or a share of one interval, spread over it.

A spread choice is a pure function of the interval and of the number of documents held out. Runs of any seed, and of
any source with the same documents, validate on the same ones. The interval is cut into strata, `MAX_PLACES` at most.
In each a run of consecutive documents is held out, at a place that a hash names. A few hundred documents are chosen
one by one. Of millions the runs are longer, since each place costs a read (of a row group of a Parquet file) before
every start. Only the places are kept in memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pldr_train.data.rows.lanes import permutation, permutation_key
from pldr_train.errors import DataError
from pldr_train.recipe import DataSection

Interval = tuple[int, int]

MAX_PLACES = 256
FEW_DOCUMENTS = 10
"""Fewer validation documents cause a warning: their mean is that of a few texts, not of the corpus."""


@dataclass(frozen=True)
class Spread:
    """`held_out` of the documents [start, stop) validate, spread over all of them; the others train."""

    start: int
    stop: int
    held_out: int

    @property
    def num_places(self) -> int:
        """Number of runs of documents held out."""
        return min(self.held_out, MAX_PLACES)

    @property
    def num_training(self) -> int:
        """Number of documents that train."""
        return self.stop - self.start - self.held_out

    def is_held_out(self, numbers: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Tell which of these documents validate; all numbers must lie in [start, stop)."""
        places = np.searchsorted(self._strata, numbers, side="right") - 1
        inside = numbers - self._strata[places] - self._offsets[places]
        found: NDArray[np.bool_] = (inside >= 0) & (inside < self._lengths[places])
        return found

    def training_numbers(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the numbers of the training documents at these positions, in the corpus' order."""
        places = ((positions + 1) * self.num_places - 1) // self.num_training
        inside = positions - places * self.num_training // self.num_places
        after = inside >= self._offsets[places]
        found: NDArray[np.int64] = self._strata[places] + inside + np.where(after, self._lengths[places], 0)
        return found

    def validation_numbers(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the numbers of the validation documents at these positions: the places in an order of their own.

        So the first documents are spread too. A validation often takes no more than the first rows.
        """
        order = permutation(self.num_places, permutation_key(self._key, "order"))
        firsts = np.concatenate(([0], np.cumsum(self._lengths[order])))
        turns = np.searchsorted(firsts, positions, side="right") - 1
        places = order[turns]
        found: NDArray[np.int64] = self._strata[places] + self._offsets[places] + positions - firsts[turns]
        return found

    @property
    def _key(self) -> str:
        return f"validation/{self.start}/{self.stop}/{self.held_out}"

    @cached_property
    def _bounds(self) -> NDArray[np.int64]:
        return np.arange(self.num_places + 1, dtype=np.int64)

    @cached_property
    def _strata(self) -> NDArray[np.int64]:
        """(places,) number of the first document of each stratum."""
        before = self._bounds * self.num_training // self.num_places + self._bounds * self.held_out // self.num_places
        return self.start + before[:-1]

    @cached_property
    def _lengths(self) -> NDArray[np.int64]:
        """(places,) documents held out in each stratum."""
        return np.diff(self._bounds * self.held_out // self.num_places)

    @cached_property
    def _offsets(self) -> NDArray[np.int64]:
        """(places,) number of training documents in each stratum before those held out."""
        free = np.diff(self._bounds * self.num_training // self.num_places)
        keys = [permutation_key(self._key, place) for place in range(self.num_places)]
        return np.array([key % (int(room) + 1) for key, room in zip(keys, free, strict=True)], dtype=np.int64)


@dataclass(frozen=True)
class SpreadNumbering:
    """The training documents, or the validation documents, of a spread choice by position."""

    spread: Spread
    validates: bool

    @property
    def size(self) -> int:
        """Number of documents."""
        return self.spread.held_out if self.validates else self.spread.num_training

    def numbers(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the numbers of the documents at these positions."""
        spread = self.spread
        return spread.validation_numbers(positions) if self.validates else spread.training_numbers(positions)


class Split(NamedTuple):
    """What trains and what validates."""

    train: Interval
    """[start, stop) of the training documents; with a spread choice the validation documents are among them."""
    validation: Interval
    """[start, stop) of the validation documents; with a spread choice the same as `train`."""
    spread: Spread | None = None

    @property
    def training_part(self) -> SpreadNumbering | None:
        """The training documents by position; None if they are an interval."""
        return None if self.spread is None else SpreadNumbering(self.spread, validates=False)

    @property
    def validation_part(self) -> SpreadNumbering | None:
        """The validation documents by position; None if they are an interval."""
        return None if self.spread is None else SpreadNumbering(self.spread, validates=True)

    @property
    def num_training(self) -> int:
        """Number of training documents."""
        return self.train[1] - self.train[0] if self.spread is None else self.spread.num_training

    @property
    def num_validation(self) -> int:
        """Number of validation documents."""
        return self.validation[1] - self.validation[0] if self.spread is None else self.spread.held_out

    def validation_text(self) -> str:
        """Describe the validation documents."""
        start, stop = self.validation
        if self.spread is None:
            return f"[{start:,}, {stop:,}), {stop - start:,} documents"
        return f"{self.num_validation:,} documents, spread over [{start:,}, {stop:,})"

    def few_documents_warning(self) -> str | None:
        """Return a warning if very few documents validate."""
        if self.num_validation >= FEW_DOCUMENTS:
            return None
        number = "1 document" if self.num_validation == 1 else f"{self.num_validation} documents"
        return (
            f"validation has {number} only: its loss is that of so few texts, whatever the corpus is like; raise "
            "data.validation_fraction, or give data.validation_documents"
        )


def needed_documents(train: Interval | None, validation: Interval | None) -> int | None:
    """Return how many documents must be counted, from the first on, to resolve these intervals; None: all."""
    if train is None:
        return None
    return train[1] if validation is None else max(train[1], validation[1])


def held_out_size(documents: Interval, fraction: float) -> int:
    """Return the number of documents in a fraction of these; at least one."""
    return max(1, math.ceil((documents[1] - documents[0]) * fraction))


def resolve_intervals(
    num_documents: int,
    train: Interval | None,
    validation: Interval | None,
    validation_fraction: float,
    first: int = 0,
) -> tuple[Interval, Interval]:
    """Return the training and the validation documents, each as [start, stop).

    Without a validation interval, the last `validation_fraction` of the training documents (at least one) validates and
    does not train. Without a training interval, all documents outside the validation interval train; that interval must
    then be at the beginning or at the end. Raises DataError for intervals that are empty, overlap, or exceed the
    source's documents [first, num_documents).
    """
    if train is not None:
        _check("data.train_documents", train, first, num_documents)
    if validation is None:
        start, stop = train or (first, num_documents)
        held_out = held_out_size((start, stop), validation_fraction)
        if stop - start <= held_out:
            raise DataError(
                f"data.validation_fraction={validation_fraction} leaves no training documents of the {stop - start} in "
                f"[{start}, {stop}); give more documents or a smaller fraction"
            )
        return (start, stop - held_out), (stop - held_out, stop)
    _check("data.validation_documents", validation, first, num_documents)
    if train is None:
        train = _complement(validation, first, num_documents)
    elif max(train[0], validation[0]) < min(train[1], validation[1]):
        raise DataError(
            f"data.train_documents={list(train)} and data.validation_documents={list(validation)} overlap; "
            "make them disjoint, so that validation text is never trained on"
        )
    return train, validation


def _check(key: str, interval: Interval, first: int, num_documents: int) -> None:
    start, stop = interval
    if not 0 <= start < stop:
        raise DataError(f"{key}={list(interval)} is no interval; give [start, stop] with 0 <= start < stop")
    if stop > num_documents:
        raise DataError(
            f"{key}={list(interval)} exceeds the source's {num_documents} documents; "
            f"set its end to {num_documents} or less"
        )
    if start < first:
        raise DataError(
            f"{key}={list(interval)}: only the documents [{first}, {num_documents}) were tokenised ahead; set an "
            "interval within them, or tokenise the others too (pldr-train data tokenize)"
        )


def _complement(validation: Interval, first: int, num_documents: int) -> Interval:
    start, stop = validation
    if (start, stop) == (first, num_documents):
        raise DataError(
            f"data.validation_documents={list(validation)} takes all {num_documents - first} documents; "
            "leave some to train on"
        )
    if start == first:
        return (stop, num_documents)
    if stop == num_documents:
        return (first, start)
    raise DataError(
        f"data.validation_documents={list(validation)} lies in the midst of {num_documents - first} documents; "
        "set data.train_documents to say which of the others train"
    )


def split_documents(data: DataSection, num_documents: int, first: int = 0) -> Split:
    """Split the source's documents [first, num_documents) into training and validation. Raises DataError."""
    train, validation, fraction = data.train_documents, data.validation_documents, data.validation_fraction
    intervals = resolve_intervals(num_documents, train, validation, fraction, first)
    if data.validation_choice == "last" or validation is not None:
        return Split(*intervals)
    whole = (intervals[0][0], intervals[1][1])
    return Split(whole, whole, Spread(*whole, held_out_size(whole, fraction)))
