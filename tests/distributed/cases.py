"""The ways of sharing a run that the distributed tests go through, and their recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from pldr_train.checkpoint.shards import read_weights
from tests.tiny import MONITORED, metric_lines, tiny_values

STRATEGIES: dict[str, dict[str, Any]] = {
    "ddp": {"strategy": "ddp"},
    "fsdp": {"strategy": "fsdp"},
    "zero-1": {"strategy": "deepspeed", "zero_stage": 1},
    "zero-2": {"strategy": "deepspeed", "zero_stage": 2},
    "zero-3": {"strategy": "deepspeed", "zero_stage": 3},
}
GROUPS = [
    {"match": "generator", "lr_factor": 0.5, "weight_decay": 0.0, "betas": [0.8, 0.9]},
    {"match": "output_head", "weight_decay": 0.2, "eps": 1e-6},
    {"match": "decoder.layers.1.feed_forward.*", "freeze": True},
]
STEPS, EVERY = 12, 3
"""Optimizer steps of a run, and between its checkpoints."""
MIDDLE = STEPS // 2
"""The step of its checkpoint, validation, snapshot and samples in the middle."""


def shared_values(data: Path, runs: Path, name: str, size: int, parallel: dict[str, Any], /, **sections: Any) -> Any:
    """A tiny recipe for `size` processes, with gradient accumulation also on two of them.

    The seed and the learning rate keep the run from the power stage's chaos: with most others one process with other
    micro-batches is far off after 20 steps, too (sums in another order, amplified).
    """
    changes: dict[str, dict[str, Any]] = {
        "run": {"seed": 2},
        "data": {"num_lanes": 16},
        "optim": {"lr": 1e-4},
        "trainer": {
            "max_steps": STEPS,
            "validate_every_steps": MIDDLE,
            "batch_size": 8,
            "micro_batch_size": 2,
            "validation_rows": 4,
        },
        "checkpoint": {"every_steps": EVERY, "keep_last": 10},
        "sample": {"every_steps": MIDDLE},
        "monitor": MONITORED | {"prompts": 4},
    }
    changes["trainer"]["devices"] = size
    for section, values in sections.items():
        changes[section] = changes.get(section, {}) | values
    values = tiny_values(data, runs, name, **changes)
    values["parallel"] = parallel
    return values


def cheap_values(data: Path, runs: Path, name: str, size: int, parallel: dict[str, Any], **sections: Any) -> Any:
    """`shared_values` for tests of processes: one layer, and without the metrics that take a third of the time."""
    cheap = {"model": {"num_hidden_layers": 1}, "monitor": {"deductive": False}}
    return shared_values(data, runs, name, size, parallel, **(cheap | sections))


def figures(run: Path, name: str) -> list[float]:
    """The values of a metric, in order."""
    return [line[name] for line in metric_lines(run) if name in line]


def largest_difference(run: Path, other: Path, name: str, since: int = 0) -> float:
    """Relative, over the steps after `since` that both have."""
    values = [
        {line["step"]: line[name] for line in metric_lines(each) if name in line and line["step"] > since}
        for each in (run, other)
    ]
    assert values[0]
    assert values[0].keys() == values[1].keys()
    return max(abs(values[0][step] - values[1][step]) / abs(values[1][step]) for step in values[0])


def last_weights(run: Path) -> dict[str, torch.Tensor]:
    return read_weights(run / "checkpoints" / "last")


def assert_same_weights(run: Path, other: Path) -> None:
    weights, others = last_weights(run), last_weights(other)
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[name], others[name]) for name in weights)
