"""The training objective: cross-entropy as a sum and a count, and what is measured beside it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pldr_train.data.rows.lanes import permutation_key
from pldr_train.data.tokenizer.pieces import END_ID, PAD_ID
from pldr_train.model.output_head import UNSCORED
from pldr_train.recipe import DataSection

# Padding; packed rows hold none, but a target of this id is never scored (as in the papers).
IGNORED_TOKEN_ID = 0


@dataclass(frozen=True)
class TokenLoss:
    """Sums over the scored positions of a batch, all scalars on the device."""

    cross_entropy_sum: Tensor
    """Nats, fp32."""
    correct: Tensor
    """Positions whose most likely token is the target."""
    tokens: Tensor
    """Positions scored."""


def token_loss(logits: Tensor, targets: Tensor) -> TokenLoss:
    """Cross-entropy and accuracy of next-token logits.

    Args:
        logits: (B, S, V) in any floating dtype; the loss is computed in fp32.
        targets: (B, S) token ids; `IGNORED_TOKEN_ID` is not scored.
    """
    flat_logits = logits.flatten(0, -2)
    flat_targets = targets.flatten()
    cross_entropy_sum = F.cross_entropy(
        flat_logits.float(), flat_targets, ignore_index=IGNORED_TOKEN_ID, reduction="sum"
    )
    with torch.no_grad():
        scored = flat_targets != IGNORED_TOKEN_ID
        correct = ((flat_logits.argmax(-1) == flat_targets) & scored).sum()
    return TokenLoss(cross_entropy_sum, correct, scored.sum())


def mark_unscored(targets: Tensor) -> Tensor:
    """Return targets (B, S) with `UNSCORED`, which the model knows, for `IGNORED_TOKEN_ID`."""
    return torch.where(targets == IGNORED_TOKEN_ID, UNSCORED, targets)


def count_scored(targets: Tensor) -> Tensor:
    """Return the number of targets that are scored, a scalar on their device."""
    return (targets != IGNORED_TOKEN_ID).sum()


_DRAW_BITS = 31


def draw_targets(seed: int, row_numbers: Tensor) -> Tensor:
    """Return (R,) int64 in [0, 2**31), a draw for each row that depends on the seed and its number in the run alone."""
    draws = [permutation_key(seed, "target", number) >> (64 - _DRAW_BITS) for number in row_numbers.tolist()]
    return torch.tensor(draws, dtype=torch.int64)


def choose_targets(targets: Tensor, which: str, draws: Tensor | None = None) -> Tensor:
    """Replace the targets that the loss leaves out by `IGNORED_TOKEN_ID`; padding is never chosen.

    Args:
        targets: (R, S) token ids.
        which: `all`, `last` (the last one of each row), or `random_one` (one of each row).
        draws: (R,) of `draw_targets`, on the targets' device; for `random_one`.

    Returns:
        (R, S). A row of padding alone has no target.
    """
    if which == "all":
        return targets
    rank = (targets != IGNORED_TOKEN_ID).cumsum(-1)  # from 1; padding has the rank of the target before it
    count = rank[:, -1:]
    if which == "random_one":
        assert draws is not None
        chosen = 1 + (draws[:, None] * count >> _DRAW_BITS)
    else:
        chosen = count
    return torch.where(rank == chosen, targets, IGNORED_TOKEN_ID)


def row_inputs(input_ids: Tensor, data: DataSection) -> dict[str, Tensor | None]:
    """Return what a model is given beside the ids (B, S) of rows made as `data` says, by the names of its arguments."""
    return {
        "attention_mask": padding_mask(input_ids) if data.packing == "pad" else None,
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
