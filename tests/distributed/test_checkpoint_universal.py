"""`pldr-train checkpoint` on what several processes wrote, and DeepSpeed's own engine on what it makes of that."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch

from pldr_train.building import model_config
from pldr_train.checkpoint.manifest import read_info
from pldr_train.checkpoint.shards import OPTIMIZER, ShardReader, read_weights
from pldr_train.checkpoint.verifying import open_checkpoint
from pldr_train.cli import main
from pldr_train.model import PldrllmForCausalLM
from pldr_train.recipe import recipe_from_dict
from pldr_train.training.strategies import import_deepspeed
from tests.distributed.fleet import Fleet, run_pair, train
from tests.tiny import metric_lines, tiny_values

STRATEGIES: dict[str, dict[str, Any]] = {
    "zero-3": {"strategy": "deepspeed", "zero_stage": 3},
    "fsdp": {"strategy": "fsdp"},
}
SAVED, STEPS = 2, 4


def values(data: Path, runs: Path, name: str, strategy: str) -> dict[str, Any]:
    trainer = {"max_steps": STEPS, "devices": 2, "validate_every_steps": 4}
    result = tiny_values(data, runs, name, trainer=trainer, checkpoint={"every_steps": SAVED})
    return result | {"parallel": STRATEGIES[strategy]}


@pytest.fixture(scope="module")
def runs(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of two processes for each strategy, named as it."""
    pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp("shared")
    fleets = [Fleet(values(tiny_data, folder, name, name), 2, folder / f"{name}-logs") for name in STRATEGIES]
    for fleet in fleets:
        assert fleet.join() == [0, 0], fleet.text()
    return folder


def checkpoint(*arguments: object) -> int:
    return main(["checkpoint", *map(str, arguments)])


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_two_processes_wrote_verifies_and_consolidates(strategy: str, runs: Path, tmp_path: Path) -> None:
    source = runs / strategy / "checkpoints" / "last"
    assert len(list(source.glob("*.safetensors"))) == 4
    assert checkpoint("verify", runs / strategy) == 0
    assert checkpoint("consolidate", source, tmp_path / "whole") == 0
    assert checkpoint("verify", tmp_path / "whole") == 0
    assert sorted(path.name for path in (tmp_path / "whole").iterdir()) == [
        "manifest.json",
        "optimizer-00000-of-00001.safetensors",
        "state.pt",
        "weights-00000-of-00001.safetensors",
    ]
    assert read_info(tmp_path / "whole") == read_info(source)
    before, after = read_weights(source), read_weights(tmp_path / "whole")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    moments = [ShardReader(each, OPTIMIZER) for each in (source, tmp_path / "whole")]
    assert moments[0].names == moments[1].names
    assert all(torch.equal(moments[0].whole(name), moments[1].whole(name)) for name in moments[0].names)


@pytest.mark.slow
def test_two_processes_resume_exactly_from_a_consolidated_checkpoint(
    runs: Path, tiny_data: Path, tmp_path: Path
) -> None:
    source = runs / "zero-3" / "checkpoints" / f"step-{SAVED:08d}"
    assert checkpoint("consolidate", source, tmp_path / "whole") == 0
    again = values(tiny_data, tmp_path, "again", "zero-3")
    train(again, 2, tmp_path / "logs", resume=str(tmp_path / "whole"))
    expected = [line for line in metric_lines(runs / "zero-3") if line["step"] > SAVED]
    assert metric_lines(tmp_path / "again") == expected
    assert expected


@pytest.mark.slow
def test_deepspeeds_engine_loads_a_universal_checkpoint_bit_for_bit(runs: Path, tmp_path: Path) -> None:
    source = runs / "fsdp" / "checkpoints" / "last"
    assert checkpoint("convert", source, tmp_path / "universal", "--to", "universal") == 0
    done = run_pair(_load, tmp_path, str(source), str(tmp_path))
    assert done == [{"1": True, "2": True, "3": True}] * 2


def _load(rank: int, source: str, folder: str) -> dict[int, bool]:
    deepspeed = import_deepspeed()
    deepspeed.init_distributed("gloo", verbose=False)
    done = {}
    for stage in (1, 2, 3):
        engine = _check_stage(deepspeed, stage, Path(source), f"{folder}/universal")
        if stage == 2:
            _check_against_deepspeeds_converter(engine, rank, Path(folder))
        _check_step(engine)
        engine.destroy()
        done[stage] = True
    deepspeed.comm.barrier()
    return done


def _check_stage(deepspeed: Any, stage: int, source: Path, universal: str) -> Any:
    """Load into an engine of other weights, and compare."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state, set_z3_leaf_modules

    from pldr_train.model.modeling_pldrllm import PldrllmDecoderLayer

    recipe = recipe_from_dict(read_info(source)["recipe"]).resolved()
    torch.manual_seed(stage)
    model = PldrllmForCausalLM(model_config(recipe))
    if stage == 3:
        set_z3_leaf_modules(model, [PldrllmDecoderLayer])
    settings = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 50_000},
        "zero_allow_untested_optimizer": True,
        "checkpoint": {"load_universal": True},
    }
    adamw = torch.optim.AdamW(model.parameters(), lr=1.0)
    engine, *_ = deepspeed.initialize(model=model, optimizer=adamw, config=settings)
    path, client = engine.load_checkpoint(universal)
    assert path is not None
    assert client["pldr_train"]["step"] == engine.global_steps == STEPS
    weights, moments = read_weights(source), ShardReader(source, OPTIMIZER)
    for name, parameter in engine.module.named_parameters():
        assert torch.equal(safe_get_full_fp32_param(parameter), weights[name]), name
        for moment in ("exp_avg", "exp_avg_sq"):
            found = safe_get_full_optimizer_state(parameter, moment)
            assert torch.equal(found, moments.whole(f"{moment}/{name}")), (moment, name)
        with deepspeed.zero.GatheredParameters(parameter, enabled=stage == 3):
            assert torch.equal(parameter.detach(), weights[name]), name  # what the model computes with
    state = open_checkpoint(source).state()
    (group,) = adamw.param_groups
    assert group["lr"] == state["lr_schedulers"][0]["_last_lr"][0]
    assert (group["betas"], group["eps"]) == (tuple(recipe.optim.betas), recipe.optim.eps)
    assert group["weight_decay"] == recipe.optim.weight_decay
    assert {float(each["step"]) for each in adamw.state.values()} == {STEPS}
    return engine


def _check_step(engine: Any) -> None:
    from deepspeed.utils import safe_get_full_fp32_param

    ids = torch.arange(32).view(2, 16)
    engine.backward(engine(input_ids=ids, use_cache=False).logits.float().square().mean())
    engine.step()
    assert {float(each["step"]) for each in engine.optimizer.optimizer.state.values()} == {STEPS + 1}
    moved = [safe_get_full_fp32_param(each) for each in engine.module.parameters()]
    assert all(bool(torch.isfinite(each).all()) for each in moved)


def _check_against_deepspeeds_converter(engine: Any, rank: int, folder: Path) -> None:
    """Save with the engine, convert with DeepSpeed's own tool: the same files with the same in them come out."""
    from deepspeed.checkpoint.ds_to_universal import main as ds_to_universal

    engine.save_checkpoint(str(folder / "saved"), tag="step")
    if rank != 0:
        return
    options = argparse.Namespace(
        input_folder=str(folder / "saved" / "step"), output_folder=str(folder / "saved" / "step_universal"),
        num_extract_workers=1, num_merge_workers=1, keep_temp_folder=False, strict=True, inject_missing_state=True,
    )  # fmt: skip
    ds_to_universal(options)
    assert (folder / "saved" / "latest_universal").read_text() == "step_universal"
    assert (folder / "universal" / "latest_universal").read_text() == f"global_step{STEPS}_universal"
    theirs, ours = folder / "saved" / "step_universal", folder / "universal" / f"global_step{STEPS}_universal"
    found = {path.relative_to(ours).as_posix() for path in ours.rglob("*") if path.is_file()}
    expected = {path.relative_to(theirs).as_posix() for path in theirs.rglob("*") if path.is_file()}
    assert found - expected == {"zero_pp_rank_0_mp_rank_00_model_states.pt"}  # for stage 3
    assert expected - found == set()
    for name in sorted(name for name in expected if name.startswith("zero/") and name != "zero/optimizer_state.pt"):
        mine, other = (torch.load(each / name, weights_only=True) for each in (ours, theirs))
        if isinstance(other, dict):
            assert mine.keys() == other.keys(), name
            assert mine["cat_dim"] == other["cat_dim"]
            mine, other = mine["param"], other["param"]
        assert (mine.dtype, mine.shape) == (other.dtype, other.shape), name
        assert torch.equal(mine, other), name
