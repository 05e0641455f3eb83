"""The training objective: cross-entropy as a sum and a count, and what is measured beside it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# Padding; packed rows hold none, but a target of this id is never scored (as in the papers).
IGNORED_TOKEN_ID = 0


@dataclass(frozen=True)
class TokenLoss:
    """Sums over the scored positions of a batch, all scalars on the device."""

    cross_entropy_sum: Tensor
    """Nats, fp32, with its graph."""
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


def count_scored(targets: Tensor) -> Tensor:
    """Number of targets that are scored, a scalar on their device."""
    return (targets != IGNORED_TOKEN_ID).sum()
