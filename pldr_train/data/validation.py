"""Validation rows: the first rows of the validation documents in their order, the same at every validation."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TypedDict

import numpy as np
import torch
from numpy.typing import NDArray

from pldr_train.data.loader import RowSpec
from pldr_train.errors import DataError


class ValidationBatch(TypedDict):
    """One process' micro-batch of validation rows."""

    input_ids: torch.Tensor
    """(rows, context_length + 1) int64"""
    row_mask: torch.Tensor
    """(rows,) bool: False for a repeated row that only fills up, so that all processes take equally many steps"""


class ValidationLoader:
    """A process' share of fixed validation rows, kept in memory: rows rank, rank + world_size, ..."""

    def __init__(self, rows: torch.Tensor, num_own: int, micro_batch_size: int) -> None:
        self._rows, self._num_own, self._micro_batch_size = rows, num_own, micro_batch_size

    def __len__(self) -> int:
        return math.ceil(len(self._rows) / self._micro_batch_size)

    def __iter__(self) -> Iterator[ValidationBatch]:
        mask = torch.arange(len(self._rows)) < self._num_own
        for start in range(0, len(self._rows), self._micro_batch_size):
            part = slice(start, start + self._micro_batch_size)
            yield ValidationBatch(input_ids=self._rows[part].long(), row_mask=mask[part])


def build_validation_loader(
    spec: RowSpec, *, max_rows: int, micro_batch_size: int, rank: int = 0, world_size: int = 1
) -> ValidationLoader:
    """Pack the first `max_rows` rows of the documents that `spec.layout` spans, in one pass; fewer if they end earlier.

    The layout must be a single lane without shuffle. Raises DataError if the documents do not fill one row.
    """
    assert spec.layout.num_lanes == 1
    assert not spec.layout.shuffle
    own: list[NDArray[np.int32]] = []
    total = 0
    for row in _rows_of_one_pass(spec, max_rows):
        if total % world_size == rank or total == 0:
            own.append(row)
        total += 1
    if total == 0:
        start, stop = spec.layout.start, spec.layout.stop
        which = f"data.validation_documents={[start, stop]}"
        if spec.layout.numbering is not None:
            which = f"the {spec.layout.num_documents:,} validation documents that were chosen of [{start}, {stop})"
        raise DataError(
            f"{which} do not fill one row of "
            f"data.context_length + 1 = {spec.rules.context_length + 1} tokens; give more documents or a larger "
            "data.validation_fraction, or shorten data.context_length"
        )
    first, own = own[0], own if rank == 0 else own[1:]
    num_own, num_steps = len(own), -(-total // world_size)
    rows = torch.from_numpy(np.stack([*own, *[first] * (num_steps - num_own)]))
    return ValidationLoader(rows, num_own, micro_batch_size)


def _rows_of_one_pass(spec: RowSpec, max_rows: int) -> Iterator[NDArray[np.int32]]:
    stream = spec.stream(0)
    for _ in range(max_rows):
        row = stream.next_row()
        if row.cursor.epoch > 0:  # packed, the cursor stands on the row's last token; padded, after its document
            return
        yield row.tokens
