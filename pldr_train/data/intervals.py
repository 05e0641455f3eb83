"""Which documents train and which validate: two disjoint intervals of document numbers."""

from __future__ import annotations

import math

from pldr_train.errors import DataError

Interval = tuple[int, int]


def needed_documents(train: Interval | None, validation: Interval | None) -> int | None:
    """How many documents from the first on must be known to resolve these intervals; `None`: all that there are."""
    if train is None:
        return None
    return train[1] if validation is None else max(train[1], validation[1])


def held_out_size(documents: Interval, fraction: float) -> int:
    """How many of these documents a fraction of them is; one at least."""
    return max(1, math.ceil((documents[1] - documents[0]) * fraction))


def resolve_intervals(
    num_documents: int,
    train: Interval | None,
    validation: Interval | None,
    validation_fraction: float,
    first: int = 0,
) -> tuple[Interval, Interval]:
    """Training and validation documents, each as [start, stop).

    Without a validation interval, the last `validation_fraction` of the training documents validates (one document at
    least) and no longer trains. Without a training interval, all documents outside the validation interval train, which
    must then stand at the beginning or the end. Raises DataError for intervals that are empty, overlap, or exceed the
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
