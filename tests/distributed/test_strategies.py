"""Two real processes train what one trains, and go on after anything: each strategy, with the real engines."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pldr_train.checkpoint.shards import OPTIMIZER, ShardReader, read_weights
from pldr_train.models.loading import load_model
from pldr_train.runs.layout import folder_name
from tests.distributed import mishaps
from tests.distributed.cases import (
    EVERY,
    GROUPS,
    MIDDLE,
    STEPS,
    STRATEGIES,
    assert_same_weights,
    figures,
    largest_difference,
    last_weights,
    shared_values,
)
from tests.distributed.fleet import Fleet, train
from tests.processes import run_cli
from tests.tiny import metric_lines

os.environ.setdefault("DS_ACCELERATOR", "cpu")
Straight = Callable[[str], Path]


def grouped_values(data: Path, runs: Path, name: str, size: int, parallel: dict[str, Any], **sections: Any) -> Any:
    """The shared recipe with groups of parameters: rates, decays and moments of their own, and frozen ones."""
    sections["optim"] = {"groups": GROUPS} | sections.get("optim", {})
    return shared_values(data, runs, name, size, parallel, **sections)


@pytest.fixture(scope="module")
def straight(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Straight:
    """The undisturbed run of each strategy, made when first asked for; "single" is one process."""
    runs = tmp_path_factory.mktemp("straight")

    def run(name: str) -> Path:
        if not (runs / name).exists():
            size, parallel = (1, {}) if name == "single" else (2, STRATEGIES[name])
            train(grouped_values(tiny_data, runs, name, size, parallel), size, runs / "logs" / name)
        return runs / name

    return run


def assert_same_records(run: Path, other: Path) -> None:
    """Samples and snapshots are of the same steps; those of the weights at initialisation have the same values."""
    for each in (run, other):
        lines = (each / "samples.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [MIDDLE, STEPS]
    for name in (folder_name(0), folder_name(MIDDLE), folder_name(STEPS)):
        mine, theirs = (load_file(each / "snapshots" / f"{name}.safetensors") for each in (run, other))
        assert mine.keys() == theirs.keys()
        assert len(mine) == 8
        if name == folder_name(0):
            assert all(torch.allclose(mine[key], theirs[key], rtol=1e-4, atol=1e-5) for key in mine)


@pytest.mark.parametrize("name", STRATEGIES)
def test_two_processes_train_what_one_trains(name: str, straight: Straight) -> None:
    run, single = straight(name), straight("single")
    lines, expected = metric_lines(run), metric_lines(single)
    assert [line["step"] for line in lines] == list(range(STEPS + 1))
    assert [line.keys() for line in lines] == [line.keys() for line in expected]
    for exact in ("data/batch_digest", "tokens", "train/lr", "data/documents"):
        assert figures(run, exact) == figures(single, exact), exact
    # The weights at initialisation are the same, and so is what they are validated on.
    assert lines[0]["val/loss"] == pytest.approx(expected[0]["val/loss"], rel=1e-7)
    # So is everything that is measured of them, and of the first step, on however many processes.
    for line, theirs in zip(lines[:2], expected[:2], strict=True):
        for metric, value in theirs.items():
            close = pytest.approx(value, rel=1e-4, abs=2e-6) if isinstance(value, float) else value
            assert line[metric] == close, metric
    for loss in ("train/loss", "train/cross_entropy", "val/loss", "val/cross_entropy"):
        assert largest_difference(run, single, loss) < 1e-5, loss
    for loss in ("train/dag/A_LM", "val/dag/A_LM"):
        assert largest_difference(run, single, loss) < 1e-5, loss
    assert_same_records(run, single)
    # The clipped gradient's norm counts each rank's share once; single elements of it feel the power stage's rounding.
    assert figures(run, "train/grad_norm")[0] == pytest.approx(figures(single, "train/grad_norm")[0], rel=1e-5)
    assert largest_difference(run, single, "train/grad_norm_clipped") < 1e-3
    # Each group's too.
    for label in ("default", "generator", "output_head"):
        assert figures(run, f"train/group/{label}/lr") == figures(single, f"train/group/{label}/lr")
        for what in ("grad_norm", "update_ratio"):
            assert largest_difference(run, single, f"train/group/{label}/{what}", since=1) < 1e-3, (label, what)
    weights, others = last_weights(run), last_weights(single)
    for tensor in weights:
        torch.testing.assert_close(weights[tensor], others[tensor], rtol=1e-4, atol=3e-6, msg=tensor)
    # What is frozen has no state, and stays as it was initialised.
    frozen = {name for name in weights if name.startswith("decoder.layers.1.feed_forward.")}
    assert len(frozen) == 6
    moments = set(ShardReader(run / "checkpoints" / "last", OPTIMIZER).names)
    trained = {name for name in weights if name not in frozen and "inv_freq" not in name}
    assert moments == {f"{moment}/{name}" for moment in ("exp_avg", "exp_avg_sq") for name in trained}
    early = read_weights(run / "checkpoints" / folder_name(EVERY))
    assert all(torch.equal(early[name], weights[name]) and torch.equal(weights[name], others[name]) for name in frozen)
    assert not any(torch.equal(early[name], weights[name]) for name in trained)


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_killed_run_resumes_exactly(name: str, straight: Straight, tiny_data: Path, tmp_path: Path) -> None:
    values = grouped_values(tiny_data, tmp_path, "killed", 2, STRATEGIES[name])
    run = tmp_path / "killed"
    fleet = Fleet(values, 2, tmp_path / "logs-1", mishaps.hold_step, (EVERY + 2, str(tmp_path / "never")))
    fleet.wait_for(lambda: (run / "metrics.jsonl").exists() and len(metric_lines(run)) > EVERY + 2)
    fleet.kill()
    assert not (run / "checkpoints" / folder_name(STEPS)).exists()
    train(values, 2, tmp_path / "logs-2")
    assert metric_lines(run) == metric_lines(straight(name))
    assert_same_weights(run, straight(name))


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_run_of_any_strategy_is_loaded_and_exported(name: str, straight: Straight, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    weights = last_weights(straight(name))
    loaded = load_model(straight(name))
    assert all(torch.equal(tensor, weights[key]) for key, tensor in loaded.state_dict().items())
    run_cli("export", straight(name), tmp_path / "exported")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    ids = torch.arange(6, 26)[None]
    assert torch.equal(exported(ids).logits, loaded(ids).logits)


MOVES = [
    *((name, "single") for name in STRATEGIES),
    ("single", "ddp"), ("single", "fsdp"), ("single", "zero-1"), ("single", "zero-3"), ("ddp", "zero-3"),
    ("zero-3", "zero-2"),
]  # fmt: skip


@pytest.mark.parametrize(("before", "after"), MOVES, ids=lambda name: name)
def test_a_run_goes_on_under_another_strategy_and_topology(
    before: str, after: str, straight: Straight, tiny_data: Path, tmp_path: Path
) -> None:
    checkpoint = straight(before) / "checkpoints" / folder_name(MIDDLE)
    size, parallel = (1, {}) if after == "single" else (2, STRATEGIES[after])
    values = grouped_values(tiny_data, tmp_path, "moved", size, parallel)
    train(values, size, tmp_path / "logs", resume=str(checkpoint))
    run = tmp_path / "moved"
    single = [line for line in metric_lines(straight("single")) if line["step"] > MIDDLE]
    moved = [line for line in metric_lines(run) if line["step"] > MIDDLE]
    assert [line["step"] for line in moved] == list(range(MIDDLE + 1, STEPS + 1))
    for exact in ("data/batch_digest", "train/lr", "tokens"):
        assert [line[exact] for line in moved] == [line[exact] for line in single], exact
    assert largest_difference(run, straight("single"), "train/loss", since=MIDDLE) < 1e-5
    assert moved[-1]["val/loss"] == pytest.approx(single[-1]["val/loss"], rel=1e-5)
