"""A run's folder as an object: what it holds is read as it stands, also while the run goes on."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pldr_train.checkpoint.shards import read_weights
from pldr_train.errors import CheckpointError, UserError
from pldr_train.fit import fit
from pldr_train.recipe import recipe_from_dict
from pldr_train.run import Run
from pldr_train.runs.folder import RunFolder
from pldr_train.runs.metrics import Metrics, read_metrics
from tests.tiny import MONITORED, metric_lines, tiny_values


@pytest.fixture(scope="module")
def folder(tiny_data, tmp_path_factory):
    """A run of eight steps, validated at steps 0, 4 and 8."""
    runs = tmp_path_factory.mktemp("runs")
    values = tiny_values(
        tiny_data,
        runs,
        monitor=MONITORED,
        trainer={"max_steps": 8, "validate_every_steps": 4},
        checkpoint={"keep_last": 5},
    )
    fit(recipe_from_dict(values))
    return runs / "tiny"


def test_metrics_are_columns_of_what_was_written(folder):
    metrics, lines = Run(folder).metrics, metric_lines(folder)
    assert metrics.steps.tolist() == [line["step"] for line in lines] == list(range(9))
    assert set(metrics) >= {name for line in lines for name in line if name != "step"}
    losses = metrics["train/loss"]
    assert math.isnan(losses[0])
    assert losses[1:].tolist() == [line["train/loss"] for line in lines[1:]]
    steps, values = metrics.points("val/loss")
    assert steps.tolist() == [0, 4, 8]
    assert values.tolist() == [lines[step]["val/loss"] for step in (0, 4, 8)]
    assert metrics["data/batch_digest"].tolist() == [line.get("data/batch_digest") for line in lines]
    assert "train/loss" in metrics
    with pytest.raises(KeyError, match=r"train/los: no such metric; did you mean train/loss"):
        metrics["train/los"]


def test_metrics_become_a_frame(folder):
    pytest.importorskip("pandas")
    metrics = Run(folder).metrics
    frame = metrics.to_pandas()
    assert frame.index.name == "step"
    assert list(frame.columns) == list(metrics)
    assert frame.loc[4, "val/loss"] == metrics["val/loss"][4]


def test_validations_are_the_steps_that_were_validated(folder):
    validations = Run(folder).validations
    assert validations.steps.tolist() == [0, 4, 8]
    assert not np.isnan(validations["leakage/gap"]).any()


def test_the_rest_of_the_folder_is_there(folder):
    run = Run(str(folder))
    assert (run.name, run.recipe.trainer.max_steps, run.stopped, run.is_running) == ("tiny", 8, None, False)
    assert run.environment["packages"]["torch"] == torch.__version__
    assert [(sample.step, sample.prompt) for sample in run.samples] == [(8, "the metric")]
    assert [checkpoint.step for checkpoint in run.checkpoints] == [8, 5]
    assert run.tokenizer().decode(run.tokenizer()("the metric")["input_ids"]) == "the metric"


def test_snapshots_are_matrices_by_step_tensor_and_layer(folder):
    snapshots = Run(folder).snapshots
    assert list(snapshots) == [0, 4, 8]
    stored = load_file(folder / "snapshots" / "step-00000004.safetensors")
    assert {(layer, name) for name, layers in snapshots[4].items() for layer in layers} == {
        (layer, name) for layer in (0, 1) for name in ("A", "A_LM", "A_P", "G_LM")
    }
    assert snapshots[4]["G_LM"][1].tolist() == stored["layer_1/G_LM"].tolist()
    with pytest.raises(KeyError, match="no snapshot of step 5; there are 0, 4, 8"):
        snapshots[5]


def test_the_model_of_any_checkpoint_is_loaded(folder):
    run = Run(folder)
    for step, model in ((5, run.model(5)), (8, run.model())):
        weights = read_weights(folder / "checkpoints" / f"step-{step:08d}")
        assert not model.training
        assert all(torch.equal(model.state_dict()[name], weights[name]) for name in weights)
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 6; there are 8, 5"):
        run.model(6)


def test_a_run_is_read_while_it_goes_on(tmp_path):
    held = RunFolder(tmp_path / "run")
    held.acquire()
    try:
        held.append_metrics({"step": 0, "val/loss": 5.0})
        run = Run(tmp_path / "run")
        assert run.is_running
        assert (len(run.metrics), run.samples, len(run.snapshots), run.checkpoints) == (1, [], 0, [])
        held.append_metrics({"step": 1, "train/loss": 4.0})
        assert run.metrics["train/loss"][-1] == 4.0
        with pytest.raises(CheckpointError, match="no checkpoint"):
            run.model()
    finally:
        held.release()
    assert not run.is_running


def test_what_a_resumed_run_wrote_again_counts_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [
        {"step": 1, "a": 1.0}, {"step": 2, "a": 2.0}, {"step": 2, "b": 3}, {"step": 3, "a": None},
        {"step": 2, "a": 20.0, "text": "x"}, {"step": 4, "a": 10**400, "c": True},
    ]  # fmt: skip
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 5, "a"')
    metrics = read_metrics(path)
    assert metrics.steps.tolist() == [1, 2, 4]
    assert metrics["a"].tolist() == [1.0, 20.0, math.inf]
    assert list(metrics) == ["a", "text"]
    assert len(read_metrics(tmp_path / "none.jsonl")) == 0
    assert repr(Metrics([])) == "Metrics(0 metrics at 0 steps)"


def test_other_folders_are_refused_with_what_to_name(folder, tmp_path):
    with pytest.raises(UserError, match=rf"holds 1; name {folder}"):
        Run(folder.parent)
    with pytest.raises(UserError, match="no such folder"):
        Run(tmp_path / "nowhere")
