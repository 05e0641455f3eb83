"""Another optimizer is one entry: checkpoints, resume, verification and conversion follow."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch

from pldr_train.checkpoint.converting import convert
from pldr_train.checkpoint.shards import OPTIMIZER, ShardReader, read_weights
from pldr_train.checkpoint.verifying import find_problems, open_checkpoint
from pldr_train.errors import RecipeError
from pldr_train.fit import fit
from pldr_train.optimizers import OPTIMIZERS, OptimizerKind, StateKind
from pldr_train.recipe import recipe_from_dict
from pldr_train.runs.layout import CHECKPOINTS_FOLDER, linked_last
from tests.tiny import metric_lines, tiny_values


def build_sgd(groups, settings):
    """SGD with momentum: other state than AdamW's, and no counter of steps."""
    own = [
        {
            "params": [parameter for _, parameter in members],
            "lr": settings.lr * group.lr_factor,
            "momentum": group.betas[0],
            "weight_decay": group.weight_decay,
        }
        for group, members in groups
    ]
    return torch.optim.SGD(own)


@pytest.fixture
def sgd(monkeypatch):
    kind = OptimizerKind(
        "torch.optim.sgd.SGD",
        builder=f"{__name__}:build_sgd",
        state=StateKind(("momentum_buffer",), counts_steps=False),
    )
    monkeypatch.setitem(OPTIMIZERS, "sgd", kind)


class StopAt(pl.Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, *_):
        trainer.should_stop = trainer.should_stop or trainer.global_step >= self.step


def train(tiny_data, runs, name, steps, **sections):
    values = tiny_values(
        tiny_data,
        runs,
        name,
        optim={"name": "sgd", "lr": 1e-2, "warmup_steps": 2},
        trainer={"max_steps": 8},
        **sections,
    )
    return fit(recipe_from_dict(values), callbacks=[StopAt(steps)])


def last(runs, name):
    return linked_last(runs / name / CHECKPOINTS_FOLDER)


def test_a_run_with_it_resumes_exactly(sgd, tiny_data, tmp_path):
    train(tiny_data, tmp_path, "straight", 8)
    assert train(tiny_data, tmp_path, "stopped", 5).step == 5
    assert train(tiny_data, tmp_path, "stopped", 8).step == 8
    one, two = (last(tmp_path, name) for name in ("straight", "stopped"))
    weights = read_weights(one)
    assert all(torch.equal(weights[name], value) for name, value in read_weights(two).items())
    moments = ShardReader(one, OPTIMIZER)
    assert set(moments.names) == {f"momentum_buffer/{name}" for name in weights if "inv_freq" not in name}
    others = ShardReader(two, OPTIMIZER)
    assert all(torch.equal(moments.whole(name), others.whole(name)) for name in moments.names)
    assert any(moments.whole(name).abs().sum() > 0 for name in moments.names)
    lines = metric_lines(tmp_path / "straight")
    assert lines[-1]["train/loss"] < lines[1]["train/loss"]
    assert not any(name.startswith("train/update_ratio") for line in lines for name in line)


def test_its_checkpoints_are_verified_and_converted(sgd, tiny_data, tmp_path):
    train(tiny_data, tmp_path, "run", 8)
    folder = last(tmp_path, "run")
    assert find_problems(folder) == []
    convert(open_checkpoint(folder), tmp_path / "one.pt", "torch", replace=False)
    optimizer = torch.load(tmp_path / "one.pt", weights_only=True)["optimizer"]
    assert optimizer.keys() == {"momentum_buffer", "step"}
    moments = ShardReader(folder, OPTIMIZER)
    for name, value in optimizer["momentum_buffer"].items():
        assert torch.equal(value, moments.whole(f"momentum_buffer/{name}"))


def test_an_optimizer_without_an_entry_is_refused(tiny_data, tmp_path):
    with pytest.raises(RecipeError, match=r"optim\.name=lion: no such optimizer; there are adamw, muon"):
        recipe_from_dict(tiny_values(tiny_data, tmp_path, optim={"name": "lion"}))
