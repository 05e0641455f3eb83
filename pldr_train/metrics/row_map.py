"""The row map of a metric learner: its residual units, one after the other, on a row of the normed Gram matrix.

Where its Jacobian is small everywhere, all rows of A become alike and A no longer depends on the input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pldr_train.model.power_law_attention import MetricLearner, ResidualMetricUnit

COLLAPSED = 0.1
"""Below this, the layers' smallest median spectral norm of the row map's Jacobian says that the row map has collapsed:
the criterion of the author's row study, which takes the mean over the last quarter of a run."""


@dataclass
class RowMap:
    """What passes of a model have given of one layer's row map."""

    units: list[ResidualMetricUnit]
    """The residual units in fp64, with the weights that the first pass computed with."""
    rows: list[Tensor] = field(default_factory=list)
    """What was picked of the normed Gram matrices of each pass."""


@contextmanager
def captured_row_maps(model: Any, pick: Callable[[Tensor], Tensor]) -> Iterator[list[RowMap]]:
    """Collect the row maps of a PLDR-LLM's layers while it runs; there are none with a predefined G.

    Weights are copied while their own module computes: sharded ones are whole at no other time.

    Args:
        model: a model with its head.
        pick: is given the normed Gram matrices (B, ..., H, d, d) of a pass and returns the rows to keep of them.
    """
    found: list[RowMap] = []
    hooks = []
    for learner in (module for module in model.modules() if isinstance(module, MetricLearner)):
        with torch.device("meta"):
            row_map = RowMap([ResidualMetricUnit(model.config) for _ in learner.residual_units])
        found.append(row_map)
        hooks.append(learner.gram_norm.register_forward_hook(partial(_keep_rows, row_map, pick)))
        for unit, copied in zip(learner.residual_units, row_map.units, strict=True):
            for module, target in zip(unit.modules(), copied.modules(), strict=True):
                # Before the hooks of a strategy, which may give the weights back.
                hooks.append(module.register_forward_hook(partial(_keep_weights, target), prepend=True))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def spread_rows(gram: Tensor, count: int) -> Tensor:
    """Return `count` rows (n, d) of normed Gram matrices (..., d, d), evenly spread over all; fewer if there are."""
    rows = gram.flatten(0, -2)
    return rows[torch.linspace(0, len(rows) - 1, min(count, len(rows)), device=rows.device).long()]


def jacobian_norms(units: Sequence[nn.Module], rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the spectral norms of the Jacobians of the row map and of its single units, at rows of the normed Gram.

    Args:
        units: the residual units in fp64, one after the other the row map.
        rows: (n, d), what the first unit is given.

    Returns:
        (n,) of the whole map, and (units, n) of each unit where the ones before it lead, fp64; NaN where a Jacobian is
        not finite.
    """
    identity = torch.eye(rows.shape[-1], dtype=torch.float64, device=rows.device).expand(len(rows), -1, -1)
    whole, singles, at = identity, [], rows.double()
    for unit in units:
        with torch.enable_grad():
            # Of d copies of each row, each gives the gradient of one output.
            copies = at[:, None].expand_as(identity).clone().requires_grad_()
            outputs = unit(copies)
            (own,) = torch.autograd.grad(outputs, copies, identity)
        singles.append(_spectral_norms(own))
        whole, at = own @ whole, outputs[:, 0].detach()
    return _spectral_norms(whole), torch.stack(singles)


def _spectral_norms(matrices: Tensor) -> Tensor:
    """(n, d, d) -> (n,); a decomposition of NaN would raise."""
    whole = matrices.isfinite().flatten(-2).all(-1)
    clean = matrices.where(whole[:, None, None], 0.0)
    norms: Tensor = torch.linalg.matrix_norm(clean, 2)
    return norms.where(whole, torch.nan)


def _keep_rows(
    row_map: RowMap, pick: Callable[[Tensor], Tensor], _module: nn.Module, _inputs: Any, output: Tensor
) -> None:
    row_map.rows.append(pick(output.detach()))


def _keep_weights(target: nn.Module, module: nn.Module, _inputs: Any, _output: Any) -> None:
    for name, kept in target.named_parameters(recurse=False):
        if kept.is_meta:
            weight = getattr(module, name).detach().to(torch.float64, copy=True)
            setattr(target, name, nn.Parameter(weight, requires_grad=False))
