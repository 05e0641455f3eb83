"""What a recipe may choose under a strategy trains as in one process: clipping, offloading, recomputing, compiling."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pldr_train.building import empty_model, fill_model, model_config, put_whole
from pldr_train.recipe import recipe_from_dict
from pldr_train.runs.layout import folder_name
from tests.distributed.cases import (
    EVERY,
    GROUPS,
    STRATEGIES,
    assert_same_weights,
    cheap_values,
    figures,
    largest_difference,
    last_weights,
    shared_values,
)
from tests.distributed.fleet import train
from tests.tiny import metric_lines

os.environ.setdefault("DS_ACCELERATOR", "cpu")
SHORT = 4
LENGTH = {"max_steps": 2 * EVERY, "validate_every_steps": EVERY}
"""Of a run that is resumed from its only checkpoint before the end."""
Alone = Callable[..., Path]


@pytest.fixture(scope="module")
def alone(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Alone:
    """Make `alone(values_of, **sections)`, the run of one process that several tests compare theirs with."""
    runs, made = tmp_path_factory.mktemp("alone"), dict[str, Path]()

    def run(values_of: Callable[..., Any], **sections: Any) -> Path:
        key = json.dumps([values_of.__name__, sections], sort_keys=True)
        if key not in made:
            name = f"one-{len(made)}"
            train(values_of(tiny_data, runs, name, 1, {}, **sections), 1, runs / f"logs-{name}")
            made[key] = runs / name
        return made[key]

    return run


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
def test_what_a_recipe_chooses_changes_nothing_but_the_way(
    variant: str, alone: Alone, tiny_data: Path, tmp_path: Path
) -> None:
    name, sections = VARIANTS[variant]
    sections = dict(sections)
    parallel = STRATEGIES[name] | sections.pop("parallel", {})
    sections["trainer"] = {"max_steps": SHORT, "validate_every_steps": SHORT} | sections.pop("trainer", {})
    train(shared_values(tiny_data, tmp_path, "two", 2, parallel, **sections), 2, tmp_path / "logs")
    one, two = alone(shared_values, **sections), tmp_path / "two"
    assert largest_difference(two, one, "train/loss") < 1e-5
    assert largest_difference(two, one, "val/loss") < 1e-5
    assert largest_difference(two, one, "train/grad_norm_clipped") < 1e-4
    if "clipping by norm" in variant:
        assert min(figures(one, "train/grad_norm")) > 0.3
        assert figures(two, "train/grad_norm_clipped") == pytest.approx([0.3] * SHORT, rel=1e-4)
    if "target" in variant:
        assert largest_difference(two, one, "train/cross_entropy") < 1e-5
        assert figures(two, "train/accuracy") == figures(one, "train/accuracy")
    if "predefined" in variant:
        assert torch.equal(
            last_weights(one)["decoder.predefined_outputs"], last_weights(two)["decoder.predefined_outputs"]
        )


def assert_same_end(again: Path, run: Path) -> None:
    """Resumed from the checkpoint of step EVERY it goes on exactly as the run did."""
    assert metric_lines(again)[-EVERY:] == metric_lines(run)[-EVERY:]
    assert_same_weights(again, run)


def compile_without_code(_rank: int) -> None:
    """Trace and differentiate as Inductor's input is, but run that: its code takes a minute to make on a CPU."""
    from pldr_train.training import module

    module.compile_layers = functools.partial(module.compile_layers, backend="aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp", "fsdp", "zero-2"])
def test_compiled_layers_train_as_others(name: str, alone: Alone, tiny_data: Path, tmp_path: Path) -> None:
    trainer = {"max_steps": SHORT, "validate_every_steps": SHORT // 2}
    values = cheap_values(tiny_data, tmp_path, "two", 2, STRATEGIES[name], trainer=trainer | {"compile": "always"})
    train(values, 2, tmp_path / "logs", before=compile_without_code)
    one = alone(cheap_values, trainer=trainer)
    assert largest_difference(tmp_path / "two", one, "train/loss") < 1e-5
    assert largest_difference(tmp_path / "two", one, "val/loss") < 1e-5


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_muon_trains_and_resumes_exactly(name: str, alone: Alone, tiny_data: Path, tmp_path: Path) -> None:
    optim = {"name": "muon", "lr": 1e-4, "groups": [{"match": "generator", "lr_factor": 2.0}]}
    sections = {"trainer": LENGTH, "optim": optim}
    one = alone(shared_values, **sections)
    values = shared_values(tiny_data, tmp_path, "two", 2, STRATEGIES[name], **sections)
    train(values, 2, tmp_path / "logs-2")
    for loss in ("train/loss", "val/loss"):
        assert largest_difference(tmp_path / "two", one, loss) < 1e-4, loss
    for moved, size, parallel in (("again", 2, STRATEGIES[name]), ("alone", 1, {})):
        again = shared_values(tiny_data, tmp_path, moved, size, parallel, **sections)
        checkpoint = tmp_path / "two" / "checkpoints" / folder_name(EVERY)
        train(again, size, tmp_path / f"logs-{moved}", resume=str(checkpoint))
    assert_same_end(tmp_path / "again", tmp_path / "two")
    assert largest_difference(tmp_path / "alone", one, "train/loss", since=EVERY) < 1e-4


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
    sections = {"trainer": LENGTH}
    train(shared_values(tiny_data, tmp_path, "one", 1, {}, **sections), 1, tmp_path / "logs-1")
    train(shared_values(tiny_data, tmp_path, "two", 2, parallel, **sections), 2, tmp_path / "logs-2")
    assert largest_difference(tmp_path / "two", tmp_path / "one", "train/loss") < 1e-5
    again = shared_values(tiny_data, tmp_path, "again", 2, parallel, **sections)
    train(again, 2, tmp_path / "logs-3", resume=str(tmp_path / "two" / "checkpoints" / folder_name(EVERY)))
    assert_same_end(tmp_path / "again", tmp_path / "two")


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_weights_train_and_resume_exactly(stage: int, alone: Alone, tiny_data: Path, tmp_path: Path) -> None:
    sections = {"trainer": LENGTH | {"precision": "bf16"}}
    parallel = {"strategy": "deepspeed", "zero_stage": stage, "weights": "bf16"}
    values = shared_values(tiny_data, tmp_path, "two", 2, parallel, **sections)
    train(values, 2, tmp_path / "logs-2")
    assert largest_difference(tmp_path / "two", alone(shared_values, **sections), "train/cross_entropy") < 0.01
    # The fp32 masters are what is saved: more than bf16 can hold.
    weight = last_weights(tmp_path / "two")["lm_head.weight"]
    assert not torch.equal(weight, weight.bfloat16().float())
    again = shared_values(tiny_data, tmp_path, "again", 2, parallel, **sections)
    checkpoint = tmp_path / "two" / "checkpoints" / folder_name(EVERY)
    train(again, 2, tmp_path / "logs-3", resume=str(checkpoint))
    assert_same_end(tmp_path / "again", tmp_path / "two")
