"""Weighted means over a window of steps or a validation pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics import Metric


class WeightedMeans(Metric):
    """Means of several named quantities, kept as sums and weights on the device.

    Quantities are given as a sum and a weight (a cross-entropy summed over tokens and the number of tokens), so that
    steps of different size, and processes, combine exactly. Nothing is read back to the host before `compute`.

    Args:
        names: the quantities; each is a mean of its own.
    """

    full_state_update = False
    sums: Tensor
    weights: Tensor

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__(compute_with_cache=False)
        self.names = tuple(names)
        # fp64: a window of thousands of steps must not lose its last summands.
        for state in ("sums", "weights"):
            self.add_state(state, torch.zeros(len(self.names), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, values: Mapping[str, tuple[Tensor, Tensor | float]]) -> None:
        """Add `values[name] = (sum, weight)`; names that are absent are left as they are.

        Raises:
            KeyError: a name that was not declared.
        """
        unknown = set(values) - set(self.names)
        if unknown:
            raise KeyError(f"undeclared quantities: {sorted(unknown)}")
        zero = self.sums.new_zeros(())
        pairs = [values.get(name, (zero, zero)) for name in self.names]
        self.sums += torch.stack([_scalar(total, zero) for total, _ in pairs])
        self.weights += torch.stack([_scalar(weight, zero) for _, weight in pairs])

    def compute(self) -> dict[str, float]:
        """Return the means of all quantities that were given a weight, as Python numbers (one read from the device)."""
        table = torch.stack((self.sums, self.weights)).tolist()
        return {name: total / weight for name, total, weight in zip(self.names, *table, strict=True) if weight > 0}

    def _sync_dist(self, _gather: Any = None, process_group: Any = None) -> None:
        """Gather both states at once; torchmetrics takes three collectives for each."""
        mine = torch.stack((self.sums, self.weights))
        gathered = [torch.empty_like(mine) for _ in range(dist.get_world_size(process_group))]
        dist.all_gather(gathered, mine, group=process_group)
        self.sums, self.weights = torch.stack(gathered).sum(0)

    def window(self) -> tuple[Tensor, Tensor]:
        """Return a copy of sums and weights, both (len(names),), for `restore`."""
        return self.sums.clone(), self.weights.clone()

    def restore(self, sums: Tensor, weights: Tensor) -> None:
        """Go on with sums and weights that were saved, both (len(names),)."""
        self.sums.copy_(sums)
        self.weights.copy_(weights)
        # torchmetrics would warn of a compute before the first update.
        self._update_count = 1


def _scalar(value: Tensor | float, like: Tensor) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach().to(like)
    return torch.full_like(like, value)  # filled on the device; a copy from the host would wait for it
