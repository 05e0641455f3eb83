"""DeepSpeed's configuration: all that the recipe decides, and what a file of the user may add to it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pldr_train.errors import RecipeError
from pldr_train.recipe import recipe_from_dict
from pldr_train.training.deepspeed_config import OURS, deepspeed_config

NUM_PARAMETERS = 1_000_001


def config(
    num_parameters: int = NUM_PARAMETERS, pin_memory: bool = False, **sections: dict[str, Any]
) -> dict[str, Any]:
    values: dict[str, Any] = {
        "run": {"name": "unit"},
        "data": {"source": "quickstart", "num_lanes": 64},
        "trainer": {"batch_size": 32, "micro_batch_size": 4, "precision": "bf16", "devices": 2},
    }
    for section, changes in sections.items():
        values[section] = values.get(section, {}) | changes
    values["parallel"] = {"strategy": "deepspeed"} | sections.get("parallel", {})
    return deepspeed_config(recipe_from_dict(values).resolved(), num_parameters, pin_memory)


def with_file(path: Path, content: Any, **sections: dict[str, Any]) -> dict[str, Any]:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return config(parallel={"deepspeed_config": str(path)} | sections.pop("parallel", {}), **sections)


def test_the_engine_neither_clips_nor_casts_nor_prints_unless_asked() -> None:
    found = config()
    assert found["train_micro_batch_size_per_gpu"] == 4
    assert found["gradient_accumulation_steps"] == 1  # accumulation is the module's
    assert found["gradient_clipping"] == 0.0  # the papers clip by value, which the engine cannot
    assert "bf16" not in found
    assert "fp16" not in found
    assert found["steps_per_print"] > 10**12
    assert found["wall_clock_breakdown"] is False
    assert found["zero_allow_untested_optimizer"] is True
    assert found["zero_force_ds_cpu_optimizer"] is False
    assert "offload_optimizer" not in found["zero_optimization"]
    assert "offload_param" not in found["zero_optimization"]
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_stage_is_the_recipes(stage: int) -> None:
    assert config(parallel={"zero_stage": stage})["zero_optimization"]["stage"] == stage


def test_clipping_by_norm_is_the_engines() -> None:
    assert config(optim={"clip_value": None, "clip_norm": 0.3})["gradient_clipping"] == 0.3


def test_bf16_weights_are_the_engines_bf16_mode() -> None:
    assert config(parallel={"weights": "bf16"})["bf16"] == {"enabled": True, "check_grad_overflow": True}


@pytest.mark.parametrize("pinned", [False, True])
def test_offload_says_where_to(pinned: bool) -> None:
    both = {"zero_stage": 3, "offload_optimizer": "cpu", "offload_parameters": "cpu"}
    zero = config(parallel=both, pin_memory=pinned)["zero_optimization"]
    for key in ("offload_optimizer", "offload_param"):
        assert zero[key] == {"device": "cpu", "pin_memory": pinned}
    disk = {"zero_stage": 3, "offload_optimizer": "nvme", "offload_path": "/fast"}
    zero = config(parallel=disk, pin_memory=pinned)["zero_optimization"]
    assert zero["offload_optimizer"] == {"device": "nvme", "pin_memory": True, "nvme_path": "/fast"}
    assert "offload_param" not in zero


def buckets(num_parameters: int = NUM_PARAMETERS, **parallel: Any) -> tuple[int, int]:
    zero = config(num_parameters, parallel=parallel)["zero_optimization"]
    return zero["reduce_bucket_size"], zero["allgather_bucket_size"]


@pytest.mark.parametrize(
    ("num_parameters", "expected"),
    [(1, 2), (2, 2), (1_000_000, 1_000_000), (1_000_001, 1_000_002), (7_000_000_000, 500_000_000)],
)
def test_buckets_are_even_and_no_larger_than_the_model_or_the_engines_own(num_parameters: int, expected: int) -> None:
    assert buckets(num_parameters) == (expected, expected)


def test_bucket_sizes_in_mib_are_turned_into_elements_of_their_type() -> None:
    assert buckets(reduce_bucket_mib=1.0, allgather_bucket_mib=3.0) == (262_144, 786_432)
    assert buckets(reduce_bucket_mib=1.0, allgather_bucket_mib=3.0, weights="bf16") == (524_288, 1_572_864)
    assert buckets(reduce_bucket_mib=1e-9, allgather_bucket_mib=0.00002) == (2, 6)


def test_a_users_file_is_merged_key_by_key(tmp_path: Path) -> None:
    added = {
        "zero_optimization": {"overlap_comm": True, "sub_group_size": 7, "offload_optimizer": {"buffer_count": 9}},
        "comms_logger": {"enabled": True},
        "steps_per_print": 10,
    }
    given = {"zero_stage": 3, "offload_optimizer": "cpu"}
    found, plain = with_file(tmp_path / "ds.json", added, parallel=given), config(parallel=given)
    expected = json.loads(json.dumps(plain))
    expected["zero_optimization"] |= {"overlap_comm": True, "sub_group_size": 7}
    expected["zero_optimization"]["offload_optimizer"]["buffer_count"] = 9
    assert found == expected | {"comms_logger": {"enabled": True}, "steps_per_print": 10}


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    assert with_file(tmp_path / "ds.json", {}) == config()


@pytest.mark.parametrize("key", OURS)
def test_keys_that_the_recipe_decides_are_refused(key: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as raised:
        with_file(tmp_path / "ds.json", {"steps_per_print": 10, key: {"enabled": True}})
    assert f"parallel.deepspeed_config={tmp_path / 'ds.json'}: sets {key}, " in str(raised.value)
    assert "remove it there" in str(raised.value)


@pytest.mark.parametrize(("key", "on"), [("wall_clock_breakdown", True), ("flops_profiler", {"enabled": True})])
def test_what_the_engine_fails_with_is_refused_if_it_is_turned_on(key: str, on: Any, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=f"turns on {key}, which fails"):
        with_file(tmp_path / "ds.json", {key: on})
    off = {"enabled": False} if isinstance(on, dict) else False
    assert with_file(tmp_path / "ds.json", {key: off})[key] == off


def test_all_refused_keys_are_reported_at_once_the_stage_too(tmp_path: Path) -> None:
    content = {"zero_optimization": {"stage": 3}, "optimizer": {}, "fp16": {}}
    with pytest.raises(RecipeError, match=r"sets fp16, optimizer, zero_optimization\.stage, which"):
        with_file(tmp_path / "ds.json", content)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{'stage': 3}", "is no JSON"),
        ("", "is no JSON"),
        ("[1]", "holds no JSON object"),
        ("null", "holds no JSON object"),
        ('{"zero_optimization": 2}', "zero_optimization"),
        ('{"zero_optimization": null}', "zero_optimization"),
        ('{"zero_optimization": ["stage"]}', "zero_optimization"),
    ],
)
def test_a_file_that_holds_something_else_is_reported(content: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as raised:
        with_file(tmp_path / "ds.json", content)
    assert f"parallel.deepspeed_config={tmp_path / 'ds.json'}: " in str(raised.value)
    assert told in str(raised.value)


def test_a_file_that_cannot_be_read_is_reported(tmp_path: Path) -> None:
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(RecipeError, match="cannot be read .*; name a JSON file"):
            config(parallel={"deepspeed_config": str(path)})
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(RecipeError, match="is no JSON"):
        config(parallel={"deepspeed_config": str(tmp_path / "binary.json")})
