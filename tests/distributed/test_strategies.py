"""Two real processes train what one trains, and go on after anything: each strategy, with the real engines."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pldr_train.building import empty_model, fill_model, model_config, put_whole
from pldr_train.checkpoint.shards import OPTIMIZER, ShardReader, read_weights
from pldr_train.models.loading import load_model
from pldr_train.recipe import recipe_from_dict
from tests.distributed.cases import STEPS, STRATEGIES, cheap_values, figures, largest_difference, shared_values
from tests.distributed.fleet import Fleet, train
from tests.processes import run_cli
from tests.tiny import metric_lines

os.environ.setdefault("DS_ACCELERATOR", "cpu")
Straight = Callable[[str], Path]

GROUPS = [
    {"match": "generator", "lr_factor": 0.5, "weight_decay": 0.0, "betas": [0.8, 0.9]},
    {"match": "output_head", "weight_decay": 0.2, "eps": 1e-6},
    {"match": "decoder.layers.1.feed_forward.*", "freeze": True},
]


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
            # Some strategies' state is written in the background, and has to be what the others write.
            checkpoint = {"async_save": name in ("fsdp", "zero-2", "zero-3")}
            values = grouped_values(tiny_data, runs, name, size, parallel, checkpoint=checkpoint)
            train(values, size, runs / "logs" / name)
        return runs / name

    return run


def last_weights(run: Path) -> dict[str, torch.Tensor]:
    return read_weights(run / "checkpoints" / "last")


def assert_same_weights(run: Path, other: Path) -> None:
    weights, others = last_weights(run), last_weights(other)
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[name], others[name]) for name in weights)


def assert_same_records(run: Path, other: Path) -> None:
    """Samples and snapshots are of the same steps; those of the weights at initialisation have the same values."""
    for each in (run, other):
        lines = (each / "samples.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [10, 20]
    for name in ("step-00000000", "step-00000010", "step-00000020"):
        mine, theirs = (load_file(each / "snapshots" / f"{name}.safetensors") for each in (run, other))
        assert mine.keys() == theirs.keys()
        assert len(mine) == 8
        if name == "step-00000000":
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
    early = read_weights(run / "checkpoints" / "step-00000005")
    assert all(torch.equal(early[name], weights[name]) and torch.equal(weights[name], others[name]) for name in frozen)
    assert not any(torch.equal(early[name], weights[name]) for name in trained)


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_killed_run_resumes_exactly(name: str, straight: Straight, tiny_data: Path, tmp_path: Path) -> None:
    values = grouped_values(tiny_data, tmp_path, "killed", 2, STRATEGIES[name])
    run = tmp_path / "killed"
    fleet = Fleet(values, 2, tmp_path / "logs-1")
    fleet.wait_for(lambda: (run / "metrics.jsonl").exists() and len(metric_lines(run)) > 12)
    fleet.kill()
    assert not (run / "checkpoints" / f"step-{STEPS:08d}").exists()
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
    checkpoint = straight(before) / "checkpoints" / "step-00000010"
    size, parallel = (1, {}) if after == "single" else (2, STRATEGIES[after])
    values = grouped_values(tiny_data, tmp_path, "moved", size, parallel)
    train(values, size, tmp_path / "logs", resume=str(checkpoint))
    run = tmp_path / "moved"
    single = [line for line in metric_lines(straight("single")) if line["step"] > 10]
    moved = [line for line in metric_lines(run) if line["step"] > 10]
    assert [line["step"] for line in moved] == list(range(11, STEPS + 1))
    for exact in ("data/batch_digest", "train/lr", "tokens"):
        assert [line[exact] for line in moved] == [line[exact] for line in single], exact
    assert largest_difference(run, straight("single"), "train/loss", since=10) < 1e-5
    assert moved[-1]["val/loss"] == pytest.approx(single[-1]["val/loss"], rel=1e-5)


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "clipping by norm, ddp": ("ddp", {"optim": {"clip_value": None, "clip_norm": 0.3}}),
    "clipping by norm, fsdp": ("fsdp", {"optim": {"clip_value": None, "clip_norm": 0.3}}),
    "clipping by norm, zero-2": ("zero-2", {"optim": {"clip_value": None, "clip_norm": 0.3}}),
    "clipping by norm, zero-3": ("zero-3", {"optim": {"clip_value": None, "clip_norm": 0.3}}),
    "activation checkpointing, fsdp": ("fsdp", {"parallel": {"activation_checkpointing": "layers"}}),
    "activation checkpointing, zero-3": ("zero-3", {"parallel": {"activation_checkpointing": "layers"}}),
    "metric learners recomputed, fsdp": ("fsdp", {"parallel": {"activation_checkpointing": "metric_learner"}}),
    "metric learners recomputed, zero-3": ("zero-3", {"parallel": {"activation_checkpointing": "metric_learner"}}),
    "optimizer in host memory, zero-2": ("zero-2", {"parallel": {"offload_optimizer": "cpu"}}),
    "all in host memory, zero-3": (
        "zero-3", {"parallel": {"offload_optimizer": "cpu", "offload_parameters": "cpu"}},
    ),
    "small buckets, zero-2": ("zero-2", {"parallel": {"reduce_bucket_mib": 0.01, "allgather_bucket_mib": 0.01}}),
    "offload with groups, zero-2": (
        "zero-2", {"parallel": {"offload_optimizer": "cpu"}, "optim": {"groups": GROUPS}},
    ),
    "offload with groups, zero-3": (
        "zero-3",
        {"parallel": {"offload_optimizer": "cpu", "offload_parameters": "cpu"}, "optim": {"groups": GROUPS}},
    ),
    "a predefined G, zero-3": (
        "zero-3", {"model": {"custom_G_type": "random"}, "dag": {"A_LM": 0.0, "A_P": 0.0, "G_LM": 0.0}},
    ),
    "a predefined G, fsdp": (
        "fsdp", {"model": {"custom_G_type": "random"}, "dag": {"A_LM": 0.0, "A_P": 0.0, "G_LM": 0.0}},
    ),
    "the last target of a row, fsdp": ("fsdp", {"trainer": {"targets": "last"}}),
    "a random target of a row, ddp": ("ddp", {"trainer": {"targets": "random_one"}}),
    "a random target of a padded row, zero-3": (
        "zero-3",
        {
            "trainer": {"targets": "random_one"}, "data": {"packing": "pad"}, "model": {"custom_G_type": "identity"},
            "dag": {"A_LM": 0.0, "A_P": 0.0, "G_LM": 0.0},
        },
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_what_a_recipe_chooses_changes_nothing_but_the_way(variant: str, tiny_data: Path, tmp_path: Path) -> None:
    name, sections = VARIANTS[variant]
    sections = dict(sections)
    parallel = STRATEGIES[name] | sections.pop("parallel", {})
    sections["trainer"] = {"max_steps": 6, "validate_every_steps": 6} | sections.pop("trainer", {})
    train(shared_values(tiny_data, tmp_path, "one", 1, {}, **sections), 1, tmp_path / "logs-1")
    train(shared_values(tiny_data, tmp_path, "two", 2, parallel, **sections), 2, tmp_path / "logs-2")
    one, two = tmp_path / "one", tmp_path / "two"
    assert largest_difference(two, one, "train/loss") < 1e-5
    assert largest_difference(two, one, "val/loss") < 1e-5
    assert largest_difference(two, one, "train/grad_norm_clipped") < 1e-4
    if "clipping by norm" in variant:
        assert min(figures(one, "train/grad_norm")) > 0.3
        assert figures(two, "train/grad_norm_clipped") == pytest.approx([0.3] * 6, rel=1e-4)
    if "target" in variant:
        assert largest_difference(two, one, "train/cross_entropy") < 1e-5
        assert figures(two, "train/accuracy") == figures(one, "train/accuracy")
    if "predefined" in variant:
        assert torch.equal(
            last_weights(one)["decoder.predefined_outputs"], last_weights(two)["decoder.predefined_outputs"]
        )


def compile_without_code(_rank: int) -> None:
    """Trace and differentiate as Inductor's input is, but run that: its code takes a minute to make on a CPU."""
    from pldr_train.training import module

    module.compile_layers = functools.partial(module.compile_layers, backend="aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp", "fsdp", "zero-2"])
def test_compiled_layers_train_as_others(name: str, tiny_data: Path, tmp_path: Path) -> None:
    sections = {"trainer": {"max_steps": 6, "validate_every_steps": 3}}
    compiled = {"trainer": sections["trainer"] | {"compile": "always"}}
    train(cheap_values(tiny_data, tmp_path, "one", 1, {}, **sections), 1, tmp_path / "logs-1")
    values = cheap_values(tiny_data, tmp_path, "two", 2, STRATEGIES[name], **compiled)
    train(values, 2, tmp_path / "logs-2", before=compile_without_code)
    assert largest_difference(tmp_path / "two", tmp_path / "one", "train/loss") < 1e-5
    assert largest_difference(tmp_path / "two", tmp_path / "one", "val/loss") < 1e-5


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_muon_trains_and_resumes_exactly(name: str, tiny_data: Path, tmp_path: Path) -> None:
    optim = {"name": "muon", "lr": 1e-4, "groups": [{"match": "generator", "lr_factor": 2.0}]}
    sections = {"trainer": {"max_steps": 8, "validate_every_steps": 4}, "optim": optim}
    train(shared_values(tiny_data, tmp_path, "one", 1, {}, **sections), 1, tmp_path / "logs-1")
    values = shared_values(tiny_data, tmp_path, "two", 2, STRATEGIES[name], **sections)
    train(values, 2, tmp_path / "logs-2")
    for loss in ("train/loss", "val/loss"):
        assert largest_difference(tmp_path / "two", tmp_path / "one", loss) < 1e-4, loss
    for moved, size, parallel in (("again", 2, STRATEGIES[name]), ("alone", 1, {})):
        again = shared_values(tiny_data, tmp_path, moved, size, parallel, **sections)
        checkpoint = tmp_path / "two" / "checkpoints" / "step-00000005"
        train(again, size, tmp_path / f"logs-{moved}", resume=str(checkpoint))
    assert metric_lines(tmp_path / "again")[-3:] == metric_lines(tmp_path / "two")[-3:]
    assert_same_weights(tmp_path / "again", tmp_path / "two")
    assert largest_difference(tmp_path / "alone", tmp_path / "one", "train/loss", since=5) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(("name", "law"), [("fsdp", "hf_port"), ("zero-3", "legacy"), ("ddp", "width_scaled")])
def test_initial_weights_of_every_law_are_those_of_one_process(
    name: str, law: str, tiny_data: Path, tmp_path: Path
) -> None:
    """The first step of a warm-up has the learning rate 0, and leaves them as they are."""
    sections = {
        "model": {"init": law, "num_attention_heads": 4},
        "trainer": {"max_steps": 1},
        "optim": {"warmup_steps": 1},
    }
    values = shared_values(tiny_data, tmp_path, "run", 2, STRATEGIES[name], **sections)
    train(values, 2, tmp_path / "logs")
    recipe = recipe_from_dict(values).resolved()
    model = empty_model(model_config(recipe))
    fill_model(model, recipe.run.seed, put_whole, law=law)
    weights = last_weights(tmp_path / "run")
    assert all(torch.equal(weights[tensor], value) for tensor, value in model.state_dict().items())


@pytest.mark.slow
def test_an_optimizer_on_a_disk_trains_the_same_and_resumes_exactly(tiny_data: Path, tmp_path: Path) -> None:
    if not os.environ.get("PLDR_TRAIN_TEST_NVME"):
        pytest.skip("compiles DeepSpeed's async_io for minutes; needs libaio-dev and PLDR_TRAIN_TEST_NVME=1")
    (tmp_path / "disk").mkdir()
    parallel = STRATEGIES["zero-3"] | {"offload_optimizer": "nvme", "offload_path": str(tmp_path / "disk")}
    sections = {"trainer": {"max_steps": 8, "validate_every_steps": 4}}
    train(shared_values(tiny_data, tmp_path, "one", 1, {}, **sections), 1, tmp_path / "logs-1")
    train(shared_values(tiny_data, tmp_path, "two", 2, parallel, **sections), 2, tmp_path / "logs-2")
    assert largest_difference(tmp_path / "two", tmp_path / "one", "train/loss") < 1e-5
    again = shared_values(tiny_data, tmp_path, "again", 2, parallel, **sections)
    train(again, 2, tmp_path / "logs-3", resume=str(tmp_path / "two" / "checkpoints" / "step-00000005"))
    assert metric_lines(tmp_path / "again")[-3:] == metric_lines(tmp_path / "two")[-3:]
    assert_same_weights(tmp_path / "again", tmp_path / "two")


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_weights_train_and_resume_exactly(stage: int, tiny_data: Path, tmp_path: Path) -> None:
    sections = {"trainer": {"max_steps": 8, "validate_every_steps": 4, "precision": "bf16"}}
    parallel = {"strategy": "deepspeed", "zero_stage": stage, "weights": "bf16"}
    train(shared_values(tiny_data, tmp_path, "one", 1, {}, **sections), 1, tmp_path / "logs-1")
    values = shared_values(tiny_data, tmp_path, "two", 2, parallel, **sections)
    train(values, 2, tmp_path / "logs-2")
    assert largest_difference(tmp_path / "two", tmp_path / "one", "train/cross_entropy") < 0.01
    # The fp32 masters are what is saved: more than bf16 can hold.
    weight = last_weights(tmp_path / "two")["lm_head.weight"]
    assert not torch.equal(weight, weight.bfloat16().float())
    again = shared_values(tiny_data, tmp_path, "again", 2, parallel, **sections)
    checkpoint = tmp_path / "two" / "checkpoints" / "step-00000005"
    train(again, 2, tmp_path / "logs-3", resume=str(checkpoint))
    assert metric_lines(tmp_path / "again")[-3:] == metric_lines(tmp_path / "two")[-3:]
    assert_same_weights(tmp_path / "again", tmp_path / "two")
