"""A sweep on Weights & Biases: its trials' group and tags, and the file for W&B's agents."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from pldr_train.cli import main
from pldr_train.commands import sweep_actions
from pldr_train.errors import UserError
from pldr_train.recipe import recipe_to_dict
from pldr_train.recipe.yaml_text import read_recipe_file
from pldr_train.sweeps import Sweep
from pldr_train.sweeps.wandb_sweep import planned_of_words, wandb_sweep_yaml
from pldr_train.wandb_runs.opening import group_of, tags_of
from tests.sweep_case import LR, NEEDING, changed_file, write_sweep


@pytest.fixture
def spec(tiny_data: Path, tmp_path: Path) -> Path:
    variants = {"plain": {}, "causal": {"model.gram_chunk_size": 8}}
    return write_sweep(tmp_path, tiny_data, axes={LR: [1e-3, 2e-3], "variant": variants, "optim.clip_norm": [None]})


def test_trials_are_grouped_under_the_sweep_with_their_axes_as_tags(spec: Path) -> None:
    values = recipe_to_dict(Sweep(spec).trials[2].recipe)
    assert group_of(values) == "small"
    assert tags_of(values)[:3] == ["lr=0.001", "variant=causal", "clip_norm=null"]


def test_the_exported_sweep_is_wandbs_and_runs_our_command(
    spec: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "wandb.yaml"
    assert main(["sweep", "export-wandb", str(spec), "--out", str(out)]) == 0
    assert f"wandb sweep {out}" in capsys.readouterr().out
    assert read_recipe_file(out) == {
        "name": "small",
        "project": "pldr_train",
        "method": "grid",
        "metric": {"name": "val/loss", "goal": "minimize"},
        "parameters": {
            LR: {"values": [1e-3, 2e-3]},
            "variant": {"values": ["plain", "causal"]},
            "optim.clip_norm": {"values": ["null"]},
            "run.seed": {"values": [1, 2]},
        },
        "command": ["pldr-train", "sweep", "trial", str(spec), "${args_no_hyphens}"],
    }


@pytest.mark.parametrize(
    ("span", "parameter"),
    [
        ({"low": 1e-4, "high": 0.1, "log": True}, {"distribution": "log_uniform_values", "min": 1e-4, "max": 0.1}),
        ({"low": 0.1, "high": 0.5}, {"distribution": "uniform", "min": 0.1, "max": 0.5}),
        ({"low": 0.25, "high": 0.5, "step": 0.25}, {"distribution": "q_uniform", "min": 0.25, "max": 0.5, "q": 0.25}),
    ],
)
def test_ranges_become_distributions(spec: Path, span: dict[str, Any], parameter: dict[str, Any]) -> None:
    search = {"method": "tpe", "trials": 3}
    changed_file(spec, lambda values: values.update(axes={LR: span}, sampler=search))
    text = wandb_sweep_yaml(Sweep(spec), str(spec))
    (spec.parent / "out.yaml").write_text(text)
    exported = read_recipe_file(spec.parent / "out.yaml")
    assert exported["parameters"][LR] == parameter
    assert (exported["method"], exported["run_cap"]) == ("bayes", 6)


def test_words_of_an_agent_name_a_trial(spec: Path) -> None:
    sweep = Sweep(spec)
    words = ["variant=causal", "optim.lr=0.002", "run.seed=2", "optim.clip_norm=null"]
    assert planned_of_words(sweep, words).name == sweep.trials[-1].name


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["optim.lr=0.002"], r"variant: missing; give variant=VALUE"),
        (["optim.lr=7"], r"optim\.lr=7: no value of that axis; choose one of 0\.001, 0\.002"),
        (["optim.eps=7"], r"optim\.eps=7: give each of optim\.lr, variant, optim\.clip_norm, run\.seed once"),
        (["run.seed=7"], r"run\.seed=7: no seed of the sweep; choose one of 1, 2"),
        (["optim.lr=0.001", "optim.lr=0.001"], r"optim\.lr=0\.001: give each of"),
    ],
)
def test_words_that_name_none_are_said(spec: Path, words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        planned_of_words(Sweep(spec), words)


def test_an_agents_trial_becomes_our_fit_in_the_sweeps_folder_and_the_agents_run(
    spec: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[list[str]] = []

    def become(program: str, command: list[str]) -> None:
        started.append([program, *command[1:]])

    monkeypatch.setattr(os, "execv", become)
    monkeypatch.setenv("WANDB_SWEEP_ID", "s1")
    monkeypatch.setenv("WANDB_RUN_ID", "r1")
    sweep_actions.run_one(_Options(spec, ["optim.lr=0.001", "variant=plain", "optim.clip_norm=null", "run.seed=1"]))
    trial = Sweep(spec).trials[0]
    assert started == [[sys.executable, "-m", "pldr_train", "fit", str(trial.folder / "trial.yaml")]]
    assert json.loads((trial.folder / "wandb.json").read_text()) == {"id": "r1"}
    assert trial.record.axes == {LR: 1e-3, "variant": "plain", "optim.clip_norm": None}


def test_trials_that_need_others_are_none_of_wandbs(spec: Path) -> None:
    changed_file(spec, lambda values: values.update(axes={"variant": NEEDING}))
    with pytest.raises(UserError, match=r"variant-given_seed-1 needs variant-learned_seed-1 first"):
        wandb_sweep_yaml(Sweep(spec), str(spec))


def test_conditions_are_none_of_wandbs(spec: Path) -> None:
    changed_file(spec, lambda values: values.update(conditions={"optim.clip_norm": {"only_if": {LR: [1e-3]}}}))
    with pytest.raises(UserError, match=r"conditions=optim\.clip_norm: W&B's sweeps know none"):
        wandb_sweep_yaml(Sweep(spec), str(spec))


class _Options:
    def __init__(self, spec: Path, values: list[str]) -> None:
        self.spec, self.values = spec, values
