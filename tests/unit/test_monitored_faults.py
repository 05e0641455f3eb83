"""What the monitor measures never ends a run: steps that are left out, and models whose outputs are not finite."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from pldr_train.fit import fit
from pldr_train.recipe import recipe_from_dict
from pldr_train.training.module import PldrllmModule
from pldr_train.training.monitor import ModelMonitor
from tests.tiny import MONITORED, metric_lines, tiny_values


@contextmanager
def broken(module: torch.nn.Module) -> Iterator[None]:
    """All outputs of a module are NaN."""
    handle = module.register_forward_hook(lambda _module, _inputs, output: output * float("nan"))
    try:
        yield
    finally:
        handle.remove()


def test_a_step_that_is_left_out_at_a_log_step_is_in_no_metric(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = PldrllmModule.forward

    def poisoned(self: PldrllmModule, *arguments: Any, **options: Any) -> Any:
        if not self.model.training or self.global_step != 5:
            return forward(self, *arguments, **options)
        with broken(self.model.decoder.embed_tokens):
            return forward(self, *arguments, **options)

    monkeypatch.setattr(PldrllmModule, "forward", poisoned)
    trainer = {"max_steps": 8, "on_nonfinite": "skip"}
    outcome = fit(recipe_from_dict(tiny_values(tiny_data, tmp_path, trainer=trainer, monitor=MONITORED)))
    lines = {line["step"]: line for line in metric_lines(outcome.folder)}
    assert sorted(lines) == list(range(9))
    assert lines[6]["train/nonfinite_steps"] == 1
    assert not [name for name in lines[6] if "update_ratio" in name or "/dag/" in name or name == "train/loss"]
    assert [name for name in lines[7] if "update_ratio" in name]
    assert "train/dag/layer_0/A_LM" in lines[7]


def test_a_model_that_is_not_finite_at_a_validation_leaves_values_out(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = ModelMonitor.measure

    def poisoned(self: ModelMonitor, model: Any, *arguments: Any) -> Any:
        with broken(model.decoder.embed_tokens):
            return measure(self, model, *arguments)

    monkeypatch.setattr(ModelMonitor, "measure", poisoned)
    sample = {"every_steps": 8}
    outcome = fit(recipe_from_dict(tiny_values(tiny_data, tmp_path, sample=sample, monitor=MONITORED)))
    assert outcome.step == 24
    last = metric_lines(outcome.folder)[-1]
    assert last["deductive/attention/nonfinite_share"] == 1
    assert not [name for name in last if "order_parameter" in name or name.endswith("/rank")]
    json.dumps(last, allow_nan=False)


def test_dag_losses_of_layers_are_written_where_they_are_measured_now_and_then(tiny_data: Path, tmp_path: Path) -> None:
    dag = {"A_LM": 0.0, "A_P": 0.0, "G_LM": 0.0, "every_steps": 4}
    chosen = tiny_values(tiny_data, tmp_path, dag=dag, logging={"every_steps": 8, "batch_digest": False})
    lines = metric_lines(fit(recipe_from_dict(chosen)).folder)
    logged = [line for line in lines if "train/loss" in line]
    assert [line["step"] for line in logged] == [8, 16, 24]
    assert all("train/dag/layer_1/A_P" in line and "train/dag/A_P" in line for line in logged)
