"""What the model must know of a row beside its ids: where padding is, and where documents begin."""

from __future__ import annotations

import torch
from torch import Tensor

from pldr_train.data.settings import PAD
from pldr_train.data.special_pieces import END_ID, PAD_ID
from pldr_train.recipe import DataSection


def row_inputs(input_ids: Tensor, data: DataSection) -> dict[str, Tensor | None]:
    """What a model is given beside the ids (B, S) of rows made as `data` says, by the names of its arguments."""
    return {
        "attention_mask": padding_mask(input_ids) if data.packing == PAD else None,
        "position_ids": document_positions(input_ids) if data.document_mask else None,
    }


def padding_mask(input_ids: Tensor) -> Tensor:
    """(B, S) ids -> (B, S) int64, 1 for tokens and 0 for padding: it enters neither attention nor the Gram matrix."""
    return (input_ids != PAD_ID).long()


def document_positions(input_ids: Tensor) -> Tensor:
    """(B, S) packed ids -> (B, S) positions that begin with 0 in each document.

    A document begins at the row's start and after each EOS. transformers makes a causal mask within documents of
    positions that do not go up by one; so attention and positions of a document are those it has alone, while the Gram
    of learned G still sums over the whole row. The papers do not keep documents apart.
    """
    index = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    begins = torch.zeros_like(input_ids, dtype=torch.bool)
    begins[:, 1:] = input_ids[:, :-1] == END_ID
    first = torch.where(begins, index, 0).cummax(-1).values
    return index - first
