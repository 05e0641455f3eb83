"""`pldr-train plan` as a user meets it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from pldr_train.commands.plan_text import strategy_name
from pldr_train.recipe import load_recipe
from tests.processes import ROOT, run_cli

PAPER = ROOT / "recipes" / "soc-110m-2.yaml"
GIB = 2**30


def plan(*arguments: str | Path) -> dict[str, Any]:
    result = run_cli("plan", PAPER, *arguments, "--json")
    assert result.returncode == 0, result.stderr
    values: dict[str, Any] = json.loads(result.stdout)
    return values


def text(*arguments: str | Path) -> str:
    result = run_cli("plan", PAPER, *arguments)
    assert result.returncode == 0, result.stderr
    return result.stdout


def table(shown: str) -> dict[str, list[str]]:
    """Rows of the table by strategy, a star before the recipe's own."""
    lines = shown.split("\n\n")[1].splitlines()
    return {
        " ".join(re.split(r"\s{2,}", line.strip())[:1]): re.split(r"\s{2,}", line.strip())[1:] for line in lines[1:]
    }


def assert_refused(arguments: list[str], *parts_of_message: str) -> None:
    result = run_cli("plan", PAPER, *arguments)
    assert result.returncode == 2, result.stdout
    assert result.stderr.count("error:") == 1
    assert "Traceback" not in result.stderr
    for part in parts_of_message:
        assert part in result.stderr, result.stderr


def test_the_papers_run_on_its_own_hardware() -> None:
    values = plan("--gpus", "2", "--gpu", "rtx4090")
    assert values["parameters"] == 109_689_362
    assert values["batch"]["rows_per_gpu"] == values["batch"]["micro_batch_size"] == 16
    assert values["batch"]["micro_batches"] == 1
    assert values["batch"]["tokens_per_step"] == 32 * 1024
    assert values["batch"]["lanes_per_worker"] == 32
    assert values["batch"]["fixes"] == {}
    assert values["steps"] * values["batch"]["tokens_per_step"] == pytest.approx(8.19e9, rel=1e-3)
    names = [(row["strategy"], row["weights"]) for row in values["strategies"]]
    zero = [(f"zero-{stage}", weights) for weights in ("fp32", "bf16") for stage in (1, 2, 3)]
    assert names == [("ddp", "fp32"), ("fsdp", "fp32"), *zero]
    ddp = values["strategies"][0]
    assert ddp["chosen"]
    assert ddp["memory_bytes"]["parameters"] == ddp["memory_bytes"]["gradients"] == 4 * 109_689_362
    assert ddp["network_bytes_per_step"] == 4 * 109_689_362
    assert ddp["fits"]
    assert values["advice"].startswith("ddp is the simplest that fits")


def test_the_time_follows_from_flops_peak_and_the_share_assumed() -> None:
    values = plan("--gpus", "2", "--nodes", "2", "--gpu", "h100", "--mfu", "0.5")
    step_s = values["flops_per_token"] * 32 * 1024 / (4 * 989.4e12 * 0.5)
    assert values["step_s"] == pytest.approx(step_s)
    assert values["days"] == pytest.approx(step_s * 250_000 / 86_400)
    fp32 = plan("trainer.precision=fp32", "--gpus", "4", "--gpu", "h100", "--mfu", "0.5")
    assert fp32["step_s"] == pytest.approx(step_s * 989.4 / 67)
    assert {row["weights"] for row in fp32["strategies"]} == {"fp32"}
    checkpointed = plan("parallel.activation_checkpointing=layers", "--gpus", "4", "--gpu", "h100", "--mfu", "0.5")
    extra = checkpointed["recomputed_flops_per_token"]
    assert 0 < extra < checkpointed["flops_per_token"] / 3
    assert checkpointed["step_s"] == pytest.approx(step_s * (1 + extra / values["flops_per_token"]))
    assert "assumption" in text("--gpus", "2")


def test_json_and_table_agree() -> None:
    arguments = [
        "--gpus",
        "8",
        "trainer.micro_batch_size=2",
        "parallel.strategy=deepspeed",
        "parallel.offload_optimizer=cpu",
    ]
    values, shown = plan(*arguments), text(*arguments)
    rows = table(shown)
    assert len(rows) == len(values["strategies"]) == 8
    parts = (
        "parameters",
        "gradients",
        "optimizer",
        "cast_copies",
        "gathered",
        "buckets",
        "activations",
        "logits",
        "total",
    )
    for row in values["strategies"]:
        name = row["strategy"] + (f" {row['weights']}" if row["strategy"].startswith("zero") else "")
        cells = rows[f"* {name}" if row["chosen"] else name]
        expected = [f"{row['memory_bytes'][part] / GIB:.2f}" for part in parts]
        expected += ["yes" if row["fits"] else "no", f"{row['network_bytes_per_step'] / GIB:.2f}"]
        assert cells == [*expected, f"{row['host_bytes_per_machine'] / GIB:.2f}"]
        assert row["host_bytes_per_machine"] == 8 * row["memory_bytes"]["host"]
        assert (row["memory_bytes"]["host"] > 0) == row["strategy"].startswith("zero")
    assert [row["strategy"] for row in values["strategies"] if row["chosen"]] == ["zero-2"]
    assert shown.rstrip().splitlines()[-1] == f"advice: {values['advice']}"


def test_copies_for_saving_in_the_background_take_memory_of_the_machines() -> None:
    rows, with_copies = (
        {
            strategy_name(row): row["host_bytes_per_machine"]
            for row in plan("--gpus", "8", "--nodes", "2", *more)["strategies"]
        }
        for more in ((), ("checkpoint.async_save=true",))
    )
    copies = 12 * plan("--gpus", "8")["parameters"] // 2
    assert with_copies == {name: held + copies for name, held in rows.items()}


def test_a_micro_batch_that_does_not_divide_is_planned_with_one_that_does() -> None:
    values = plan("--gpus", "8")
    assert list(values["batch"]["fixes"]) == ["trainer.micro_batch_size=4"]
    assert "trainer.micro_batch_size=4: 16 does not divide the 4 rows of a GPU" in text("--gpus", "8")
    command = values["command"].split()
    assert command[:3] == ["pldr-train", "fit", str(PAPER)]
    recipe = load_recipe(PAPER, command[3:])  # the command that it prints is a recipe without problems
    assert (recipe.trainer.devices, recipe.trainer.micro_batch_size) == (8, 4)


def test_lanes_that_do_not_divide_get_a_number_that_does() -> None:
    values = plan("data.num_workers=3", "trainer.devices=1", "data.num_lanes=48", "--gpus", "2", "--nodes", "2")
    assert list(values["batch"]["fixes"]) == ["trainer.micro_batch_size=8", "data.num_lanes=96"]
    recipe = load_recipe(PAPER, values["command"].split()[3:])
    assert (recipe.trainer.devices, recipe.trainer.num_nodes, recipe.data.num_lanes) == (2, 2, 96)
    assert plan("--gpus", "1")["batch"]["lanes_per_worker"] == 64


def test_advice_names_the_keys_when_nothing_fits() -> None:
    small = plan("--gpus", "2", "--gpu-memory-gib", "7")
    assert not any(row["fits"] for row in small["strategies"])
    assert "add trainer.micro_batch_size=8, then ddp does" in small["advice"]
    assert any(
        row["fits"] for row in plan("trainer.micro_batch_size=8", "--gpus", "2", "--gpu-memory-gib", "7")["strategies"]
    )
    tiny = plan("--gpus", "2", "--gpu-memory-gib", "0.5")
    assert "nothing fits, not even" in tiny["advice"]


def test_a_large_model_is_advised_to_shard() -> None:
    large = ["model.num_hidden_layers=64", "model.num_attention_heads=64", "trainer.micro_batch_size=1"]
    values = plan(*large, "--gpus", "8", "--nodes", "4")
    assert values["parameters"] > 1e10
    fits = {row["strategy"]: row["fits"] for row in values["strategies"] if row["weights"] == "fp32"}
    assert not fits["ddp"]
    assert fits["fsdp"]
    assert values["advice"].startswith("fsdp is the simplest that fits (parallel.strategy=fsdp)")
    assert "the recipe's ddp does not fit" in values["advice"]


def test_one_process_is_marked_single_and_a_strategy_that_cannot_be_is_said() -> None:
    alone = plan("--gpus", "1")
    assert [row["strategy"] for row in alone["strategies"] if row["chosen"]] == ["single"]
    assert {row["network_bytes_per_step"] for row in alone["strategies"]} == {0}
    several = plan("parallel.strategy=single", "--gpus", "2")
    assert not any(row["chosen"] for row in several["strategies"])
    assert "parallel.strategy=single does not go with" in several["advice"]


def test_another_card_by_its_figures() -> None:
    values = plan("--gpus", "2", "--gpu-memory-gib", "32", "--peak-tflops", "200")
    assert values["gpu_memory_gib"] == 32
    assert values["step_s"] == pytest.approx(values["flops_per_token"] * 32 * 1024 / (2 * 200e12 * 0.4))


MISTAKES = {
    "unknown gpu": (["--gpus", "2", "--gpu", "h20"], ["--gpu h20", "did you mean h200", "rtx4090", "--peak-tflops"]),
    "no gpus": (["--gpus", "0"], ["--gpus", "0: must be a whole number from 1"]),
    "negative nodes": (["--gpus", "1", "--nodes", "-1"], ["--nodes", "-1"]),
    "no number of gpus": ([], ["--gpus"]),
    "share above 1": (["--gpus", "1", "--mfu", "40"], ["--mfu", "40: must be above 0 and at most 1"]),
    "memory below 0": (["--gpus", "1", "--gpu-memory-gib", "0"], ["--gpu-memory-gib", "above 0"]),
    "batch that does not divide": (["--gpus", "5"], ["trainer.batch_size=32", "30 or 35", "4 GPUs"]),
    "more gpus than rows": (["--gpus", "64"], ["trainer.batch_size=32", "set trainer.batch_size to 64", "32 GPUs"]),
    "typo in the recipe": (["trainer.batchsize=32", "--gpus", "2"], ["trainer.batchsize", "did you mean"]),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_clear_message(case: str) -> None:
    arguments, parts_of_message = MISTAKES[case]
    assert_refused(arguments, *parts_of_message)


def test_nothing_is_written(tmp_path: Path) -> None:
    assert run_cli("plan", PAPER, "--gpus", "2", cwd=tmp_path).returncode == 0
    assert list(tmp_path.iterdir()) == []


def test_the_page_shows_what_the_command_prints() -> None:
    page = (ROOT / "docs" / "plan.md").read_text()
    command, shown = re.findall(r"```\n\$ (pldr-train plan [^\n]*)\n(.*?)```", page, re.DOTALL)[0]
    assert run_cli(*command.split()[1:]).stdout == shown
    assert "plan" in run_cli("--help").stdout
    assert "--mfu" in run_cli("plan", "--help").stdout
