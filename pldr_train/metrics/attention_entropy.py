"""Entropy of attention weights, in nats and relative to what the row's visible positions allow."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from .deductive import named_values

_SUMS = ("rows", "finite_rows", "entropy", "comparable_rows", "relative_entropy")


def attention_entropy(weights: Tensor) -> Tensor:
    """-sum p ln p of each row, with 0 ln 0 = 0 for masked positions: (..., S, T) -> (..., S), nats."""
    full = weights if weights.dtype == torch.float64 else weights.float()
    entropy: Tensor = torch.special.entr(full).sum(-1, dtype=torch.float64)
    return entropy


def causal_visible_positions(weights: Tensor, token_mask: Tensor | None = None) -> Tensor:
    """How many positions each row of weights (B, H, S, T) sees: (1 or B, S), 0 for rows of padding.

    The S queries are the last of the T positions; `token_mask` (B, T) is nonzero for real tokens.
    """
    queries, keys = weights.shape[-2:]
    if token_mask is None:
        return torch.arange(keys - queries + 1, keys + 1, device=weights.device)[None]
    real = token_mask != 0
    return (real.cumsum(-1) * real)[:, keys - queries :]


class AttentionEntropy(Metric):  # type: ignore[misc]
    """Mean entropy of the attention rows for each layer and over all of them, kept as sums on the device.

    Rows that see no position (padding) do not count; the relative entropy is of the rows that see two or more.

    Args:
        num_layers: of the model.
        prefix: of the names, `<prefix>/attention/entropy` over all layers and `<prefix>/layer_3/attention/entropy`.
    """

    full_state_update = False
    sums: Tensor

    def __init__(self, num_layers: int, prefix: str = "deductive") -> None:
        super().__init__(compute_with_cache=False)
        self.num_layers, self.prefix = num_layers, prefix
        self.add_state("sums", torch.zeros(num_layers, len(_SUMS), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, layers: Sequence[Tensor], visible: Tensor | None = None) -> None:
        """Add the attention weights of a batch, (B, H, S, T) for each layer, without dropout.

        Args:
            layers: the weights.
            visible: (1 or B, S), how many positions each row sees; by default causal without padding.

        Raises:
            ValueError: another number of layers.
        """
        if len(layers) != self.num_layers:
            raise ValueError(f"attention weights of {len(layers)} layers, but num_layers={self.num_layers}")
        for index, weights in enumerate(layers):
            self.sums[index] += _sums(
                weights.detach(), causal_visible_positions(weights) if visible is None else visible
            )

    def compute(self) -> dict[str, float]:
        """All values that are defined, as Python numbers (one read from the device)."""
        total = torch.cat((self.sums, self.sums.sum(0, keepdim=True)))
        rows, finite_rows, entropy, comparable_rows, relative = total[:, None].unbind(-1)
        columns = {
            "entropy": entropy / finite_rows,
            "relative_entropy": relative / comparable_rows,
            "nonfinite_share": 1 - finite_rows / rows,
        }
        return named_values(self.prefix, ("attention",), columns)


def _sums(weights: Tensor, visible: Tensor) -> Tensor:
    """(5,), see `_SUMS`."""
    entropy = attention_entropy(weights)
    counts = visible[:, None].expand_as(entropy)
    seen = counts > 0
    finite = seen & entropy.isfinite()
    comparable = finite & (counts > 1)
    relative = entropy / counts.double().log()
    parts = (seen, finite, torch.where(finite, entropy, 0.0), comparable, torch.where(comparable, relative, 0.0))
    return torch.stack([part.sum(dtype=torch.float64) for part in parts])
