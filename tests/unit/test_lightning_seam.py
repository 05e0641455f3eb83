"""Lightning's own Trainer, callbacks and loggers: what their users expect works."""

from __future__ import annotations

import csv
import json

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from pldr_train.checkpoint.shards import read_weights
from pldr_train.data.datamodule import PldrDataModule
from pldr_train.errors import CheckpointError, DataError, RecipeError
from pldr_train.fit import fit
from pldr_train.recipe import recipe_from_dict
from pldr_train.runs.layout import CHECKPOINTS_FOLDER, STOPPED_FILE, linked_last
from pldr_train.training.module import PldrllmModule
from tests.tiny import metric_lines, tiny_values


def recipe(tiny_data, runs, **sections):
    return recipe_from_dict(tiny_values(tiny_data, runs, optim={"warmup_steps": 1}, **sections))


def quiet_fit(recipe, **given):
    return fit(recipe, **given)


# A plain Trainer.


def stock_trainer(folder, steps, **options):
    return pl.Trainer(
        accelerator="cpu", devices=1, max_steps=steps, max_epochs=-1, val_check_interval=4,
        check_val_every_n_epoch=None, logger=CSVLogger(folder, name="csv", version=""), default_root_dir=folder,
        enable_progress_bar=False, enable_model_summary=False, **options,
    )  # fmt: skip


def stock_fit(recipe, folder, steps, checkpoint=None):
    saving = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=4, save_top_k=-1)
    trainer, module = stock_trainer(folder, steps, callbacks=[saving]), PldrllmModule(recipe)
    trainer.fit(module, datamodule=PldrDataModule(recipe), ckpt_path=checkpoint)
    return trainer, module


def test_a_plain_trainer_trains_as_fit_does_and_resumes_with_the_next_row(tiny_data, tmp_path):
    values = recipe(tiny_data, tmp_path / "runs", trainer={"max_steps": 8}, sample={"prompts": []})
    quiet_fit(values)
    ours = read_weights(linked_last(tmp_path / "runs" / "tiny" / CHECKPOINTS_FOLDER))
    trainer, module = stock_fit(values, tmp_path / "whole", 8)
    theirs = module.model.state_dict()
    assert ours.keys() <= theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)

    lines = {line["step"]: line for line in metric_lines(tmp_path / "runs" / "tiny")}
    with (tmp_path / "whole" / "csv" / "metrics.csv").open() as file:
        logged = {(int(row["step"]), bool(row["val/loss"])): row for row in csv.DictReader(file)}
    for step in range(1, 9):
        assert float(logged[step, False]["train/loss"]) == pytest.approx(lines[step]["train/loss"], rel=1e-12)
    assert float(logged[8, True]["val/loss"]) == pytest.approx(lines[8]["val/loss"], rel=1e-12)
    assert trainer.callback_metrics["val/loss"] == pytest.approx(lines[8]["val/loss"], rel=1e-6)

    stock_fit(values, tmp_path / "half", 4)
    _, resumed = stock_fit(values, tmp_path / "rest", 8, checkpoint=tmp_path / "half" / "step=4.ckpt")
    found = resumed.model.state_dict()
    assert all(torch.equal(theirs[name], found[name]) for name in theirs)


def test_a_plain_trainer_raises_what_is_wrong_with_the_data(tiny_data, tmp_path):
    values = recipe(tiny_data, tmp_path, data={"min_document_tokens": 10_000})
    with pytest.raises(DataError, match="min_document_tokens"):
        stock_fit(values, tmp_path, 2)


def test_a_plain_trainer_with_several_processes_is_refused(tiny_data, tmp_path):
    trainer, module = stock_trainer(tmp_path, 2), PldrllmModule(recipe(tiny_data, tmp_path))
    (support,) = module.configure_callbacks()
    trainer.strategy.__class__.world_size = property(lambda _: 2)
    try:
        with pytest.raises(RecipeError, match=r"2 processes.*pldr_train\.fit"):
            support.setup(trainer, module, "fit")
    finally:
        del trainer.strategy.__class__.world_size


# Callbacks and loggers given to fit.


class Recorder(Callback):
    def __init__(self):
        self.seen, self.restored = [], None

    def on_train_batch_end(self, trainer, *_):
        self.seen.append(trainer.global_step)

    def state_dict(self):
        return {"seen": list(self.seen)}

    def load_state_dict(self, state):
        self.restored = state


def test_callbacks_follow_every_step_and_keep_their_state_over_a_resume(tiny_data, tmp_path):
    first, second = Recorder(), Recorder()
    quiet_fit(recipe(tiny_data, tmp_path, trainer={"max_steps": 3}), callbacks=[first])
    quiet_fit(recipe(tiny_data, tmp_path, trainer={"max_steps": 5}), callbacks=[second])
    assert first.seen == [1, 2, 3]
    assert second.restored == {"seen": [1, 2, 3]}
    assert second.seen == [4, 5]


def test_early_stopping_ends_the_run_with_a_checkpoint_and_the_same_call_goes_on(tiny_data, tmp_path):
    values = recipe(tiny_data, tmp_path, trainer={"max_steps": 24, "validate_every_steps": 4})
    never_better = EarlyStopping("val/cross_entropy", patience=1, min_delta=100.0)
    outcome = quiet_fit(values, callbacks=[never_better])
    assert (outcome.step, outcome.trained, outcome.stopped_by) == (4, True, None)
    assert outcome.samples
    run = tmp_path / "tiny"
    assert linked_last(run / CHECKPOINTS_FOLDER).name == "step-00000004"
    assert json.loads((run / STOPPED_FILE).read_text())["text"].startswith(
        "a callback set trainer.should_stop: saved after"
    )
    assert quiet_fit(values).step == 24
    assert [line["step"] for line in metric_lines(run)] == list(range(25))


class Odd(Callback):
    def state_dict(self):
        return {"where": object}


def test_what_would_save_the_run_otherwise_or_not_come_back_is_refused(tiny_data, tmp_path):
    with pytest.raises(RecipeError, match=r"ModelCheckpoint: a run saves its own checkpoints.*checkpoint\.keep_last"):
        quiet_fit(recipe(tiny_data, tmp_path), callbacks=[ModelCheckpoint(tmp_path)])
    with pytest.raises(CheckpointError, match=r"callbacks: state_dict\(\) of Odd"):
        quiet_fit(recipe(tiny_data, tmp_path, trainer={"max_steps": 2}), callbacks=[Odd()])


def test_loggers_get_every_line_and_the_recipe(tiny_data, tmp_path):
    values = recipe(tiny_data, tmp_path / "runs", trainer={"max_steps": 3}, logging={"also": ["csv"]})
    given = CSVLogger(tmp_path / "mine", name="", version="")
    quiet_fit(values, loggers=[given])
    run = tmp_path / "runs" / "tiny"
    for folder in (tmp_path / "mine", run / "csv" / "version_0"):
        with (folder / "metrics.csv").open() as file:
            rows = {int(row["step"]): row for row in csv.DictReader(file)}
        lines = metric_lines(run)
        assert [rows[line["step"]]["val/loss"] for line in (lines[0], lines[-1])] == [
            str(lines[0]["val/loss"]), str(lines[-1]["val/loss"])
        ]  # fmt: skip
        assert [float(rows[step]["train/loss"]) for step in (1, 2, 3)] == [line["train/loss"] for line in lines[1:]]
        assert "max_steps: 3" in (folder / "hparams.yaml").read_text()


def test_tensorboard_shows_a_resumed_run_as_one(tiny_data, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    also = {"also": ["tensorboard"]}
    quiet_fit(recipe(tiny_data, tmp_path, trainer={"max_steps": 3}, logging=also))
    quiet_fit(recipe(tiny_data, tmp_path, trainer={"max_steps": 5}, logging=also))
    shown = accumulator.EventAccumulator(str(tmp_path / "tiny" / "tensorboard")).Reload()
    expected = [(line["step"], line["train/loss"]) for line in metric_lines(tmp_path / "tiny") if "train/loss" in line]
    assert [(each.step, each.value) for each in shown.Scalars("train/loss")] == [
        (step, pytest.approx(value, rel=1e-6)) for step, value in expected
    ]


def test_a_missing_tensorboard_is_named(tiny_data, tmp_path, monkeypatch):
    def missing(*_, **__):
        raise ModuleNotFoundError("Neither `tensorboard` nor `tensorboardX` is available")

    monkeypatch.setattr("pldr_train.training.loggers.TensorBoardLogger", missing)
    with pytest.raises(RecipeError, match=r"logging\.also: tensorboard is not installed; pip install"):
        quiet_fit(recipe(tiny_data, tmp_path, logging={"also": ["tensorboard"]}))
