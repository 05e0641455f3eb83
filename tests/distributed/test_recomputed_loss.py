"""`train/loss` of real runs against what plain torch makes of the same batches and weights."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pldr_train.building import empty_model, fill_model, model_config, put_whole
from pldr_train.checkpoint.shards import read_weights
from pldr_train.data.datamodule import PldrDataModule
from pldr_train.model import PldrllmForCausalLM
from pldr_train.recipe import Recipe, recipe_from_dict
from tests.distributed.cases import STRATEGIES, shared_values
from tests.distributed.fleet import train
from tests.tiny import metric_lines

STEPS, EVERY = 8, 3
FIELDS = {"A_LM": "positive_metric", "A_P": "potential", "G_LM": "curvature"}
SCHEDULED = {
    "A_LM": 2.0, "A_LM_schedule": "warmup", "A_LM_steps": [1, 6],
    "A_P": 0.1, "A_P_schedule": "decay", "A_P_steps": [2, 7],
    "G_LM": 0.5, "G_LM_schedule": "window", "G_LM_steps": [2, 5],
    "schedule_shape": "cosine",
}  # fmt: skip


def half_cosine(share: float) -> float:
    return (1 - math.cos(math.pi * min(1.0, max(0.0, share)))) / 2


def coefficients(step: int) -> dict[str, float]:
    """Those of `SCHEDULED`, written out."""
    return {
        "A_LM": 2.0 * half_cosine((step - 1) / 5),
        "A_P": 0.1 * (1 - half_cosine((step - 2) / 5)),
        "G_LM": 0.5 if step in (2, 3, 4) else 0.0,
    }


def dag_loss_of(layer: Tensor, largest_head: bool) -> float:
    """ln(tr(exp(M o M)) / d) of one layer's matrices (B, H, d, d) in fp64, by eigenvalues: exponentials overflow."""
    eigenvalues = torch.linalg.eigvals(layer.double().square())
    largest = eigenvalues.real.amax(-1)
    trace = (eigenvalues - largest[..., None]).exp().sum(-1).real
    values = (trace / layer.shape[-1]).log() + largest
    return float((values.amax(1) if largest_head else values.mean(1)).mean())


@torch.no_grad()
def loss_of_step(model: PldrllmForCausalLM, ids: Tensor, step: int, dag: dict[str, Any]) -> tuple[float, float]:
    """Loss and cross-entropy of a whole global batch (B, S + 1) in one pass."""
    output = model(ids[:, :-1], use_cache=False, output_deductive_outputs=True)
    cross_entropy = float(F.cross_entropy(output.logits.flatten(0, 1), ids[:, 1:].flatten()))
    loss, factors = cross_entropy, dag.get("layer_factors", [1.0, 1.0])
    for name, coefficient in coefficients(step).items():
        layers = [getattr(layer, FIELDS[name]) for layer in output.deductive_outputs]
        assert len(layers) == len(factors)
        losses = [dag_loss_of(layer, dag.get("reduce") == "max") for layer in layers]
        loss += coefficient * sum(factor * each for factor, each in zip(factors, losses, strict=True)) / len(layers)
    return loss, cross_entropy


def batches(recipe: Recipe) -> list[Tensor]:
    """The global batches, made by one process."""
    module = PldrDataModule(recipe)
    module.prepare_data()
    module.setup()
    return [batch["input_ids"] for batch in itertools.islice(iter(module.train_dataloader()), STEPS)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "strategy", "changes"),
    [
        (1, "single", {}),
        (2, "ddp", {}),
        (2, "fsdp", {"reduce": "max", "layer_factors": [0.25, 1.5]}),
        (2, "zero-2", {"layer_factors": [0.0, 3.0]}),
    ],
)
def test_the_logged_loss_is_that_of_the_batches_weights_and_coefficients_of_its_steps(
    size: int, strategy: str, changes: dict[str, Any], tiny_data: Path, tmp_path: Path
) -> None:
    """Micro-batches of 2 rows: gradients are accumulated over 4 of them in one process, over 2 in each of two."""
    dag = SCHEDULED | changes
    sections: dict[str, Any] = {
        "dag": dag,
        "trainer": {"max_steps": STEPS, "validate_every_steps": STEPS},
        "logging": {"every_steps": EVERY, "batch_digest": False},
        "checkpoint": {"every_steps": 1, "keep_last": STEPS},
        "sample": {"prompts": []},
        "monitor": {"deductive": False, "targets": 0, "prompts": 0, "snapshots": 0},
    }
    parallel = {} if strategy == "single" else STRATEGIES[strategy]
    values = shared_values(tiny_data, tmp_path, "run", size, parallel, **sections)
    train(values, size, tmp_path / "logs")

    recipe = recipe_from_dict(shared_values(tiny_data, tmp_path, "run", 1, {}, **sections)).resolved()
    model = empty_model(model_config(recipe))
    fill_model(model, recipe.run.seed, put_whole)
    expected = []
    for step, ids in enumerate(batches(recipe)):
        assert ids.shape == (8, 33)
        if step:
            model.load_state_dict(read_weights(tmp_path / "run" / "checkpoints" / f"step-{step:08d}"))
        expected.append(loss_of_step(model.eval(), ids, step, dag))

    lines = {line["step"]: line for line in metric_lines(tmp_path / "run") if "train/loss" in line}
    assert sorted(lines) == [3, 6, 8]
    for last, window in ((3, expected[:3]), (6, expected[3:6]), (8, expected[6:8])):
        losses, entropies = (sum(each) / len(window) for each in zip(*window, strict=True))
        assert losses - entropies > 0.05
        assert lines[last]["train/loss"] == pytest.approx(losses, rel=2e-6)
        assert lines[last]["train/cross_entropy"] == pytest.approx(entropies, rel=2e-6)
        for name, coefficient in coefficients(last - 1).items():
            assert lines[last][f"train/dag/coefficient/{name}"] == pytest.approx(coefficient)
