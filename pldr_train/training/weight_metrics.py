"""Sizes of weights and of the last update, from what each process holds of them, whatever strategy spread them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

import torch
from torch import Tensor

from pldr_train.checkpoint.live_state import WEIGHT, LiveState, optimizer_step_of
from pldr_train.distributed.world import World
from pldr_train.metrics.catalog import UPDATE_RATIO, WEIGHT_GROUPS
from pldr_train.metrics.layer_metrics import DEDUCTIVE, PARAMETER_METRICS, PARAMETERS
from pldr_train.optimizers import OPTIMIZERS
from pldr_train.recipe import OptimSection

_LAYER = re.compile(r"\blayers\.(\d+)\.")
_GROUPS = (
    ("embed_tokens.", "embedding"),
    (".metric_learner.", "metric_learner"),
    (".power_law.", "power_law"),
    ("_norm.", "norms"),
    (".attention.", "attention"),
    (".feed_forward.", "feed_forward"),
    ("lm_head.", "output_head"),
)
"""Parts of a weight's name and its group, the first that fits."""


def group_of(name: str) -> str:
    """The group, of `WEIGHT_GROUPS`, that a weight belongs to."""
    return next(group for part, group in _GROUPS if part in name)


@torch.no_grad()
def update_ratios(live: LiveState, settings: OptimSection, lr: float, world: World) -> dict[str, float]:
    """2-norm of the optimizer's last update over the 2-norm of the weights before it, as `train/update_ratio/<group>`.

    The update is computed from the optimizer's state and the weights as they are after the step: with w before, w'
    after it and the optimizer's direction u (see `optim.adamw_update`),

        w' = w - lr (u + decay w)
        w = (w' + lr u) / (1 - lr decay)

    so the three inner products of u and w' give both norms. No copy of the weights before the step is needed, and
    shards give sums that add up. Groups without weights are left out, and so are all before the first step.

    Args:
        live: this process' share of weights and moments.
        settings: the recipe's.
        lr: the learning rate that the last step was taken with.
        world: the processes.
    """
    step, update = optimizer_step_of(live), OPTIMIZERS[settings.name].update_of()
    if update is None:
        return {}
    # A process may hold nothing of some groups; all add up the same list.
    products = {group: torch.zeros(3, dtype=torch.float64) for group in WEIGHT_GROUPS}
    for part in live.parts() if step else ():
        three = update(part.read, part.read(WEIGHT).float(), settings, step)
        products[group_of(part.name)] += torch.stack(three).double().cpu()
    totals = _over_processes([value for sums in products.values() for value in sums.tolist()], live, world)
    values = {}
    for group, uu, uw, ww in zip(WEIGHT_GROUPS, totals[::3], totals[1::3], totals[2::3], strict=True):
        kept = 1 - lr * settings.weight_decay
        before = (ww + 2 * lr * uw + lr**2 * uu) / kept**2
        with_before = (uw + lr * uu) / kept  # u times w
        decay = settings.weight_decay
        squared = lr**2 * (uu + 2 * decay * with_before + decay**2 * before)
        if before > 0 and math.isfinite(squared):
            values[f"{UPDATE_RATIO}/{group}"] = math.sqrt(max(squared, 0.0) / before)
    return values


@torch.no_grad()
def power_law_norms(live: LiveState, num_layers: int, world: World) -> dict[str, float]:
    """`PARAMETER_METRICS` of W, P and a of each layer and over all.

    Empty with a predefined G, which has none.
    """
    grid = {(layer, short): [0.0, 0.0] for layer in range(num_layers) for short in PARAMETERS}
    by_attribute = {attribute: short for short, attribute in PARAMETERS.items()}
    for part in live.parts():
        short, found = by_attribute.get(part.name.rpartition(".")[2]), _LAYER.search(part.name)
        if short is not None and found is not None:
            own = grid[int(found[1]), short]
            own[0] += float(_squares(part.read(WEIGHT)))
            own[1] += part.num_elements
    totals = _over_processes([value for pair in grid.values() for value in pair], live, world)
    sums = dict(zip(grid, zip(totals[::2], totals[1::2], strict=True), strict=True))
    values: dict[str, float] = {}
    for short in PARAMETERS:
        of_layers = [sums[layer, short] for layer in range(num_layers)]
        values |= _norms(f"{DEDUCTIVE}/{short}", of_layers)
        for layer, each in enumerate(of_layers):
            values |= _norms(f"{DEDUCTIVE}/layer_{layer}/{short}", [each])
    return values


def _norms(name: str, sums: Iterable[tuple[float, float]]) -> dict[str, float]:
    squares, count = (sum(column) for column in zip(*sums, strict=True))
    if count == 0 or not math.isfinite(squares):
        return {}
    return {f"{name}/{metric.name}": metric.value(squares, count) for metric in PARAMETER_METRICS}


def _squares(tensor: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(tensor)
    return norm.double().square()


def _over_processes(values: list[float], live: LiveState, world: World) -> list[float]:
    return values if live.replicated else world.sum(values)
