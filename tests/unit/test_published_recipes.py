"""The recipes of published runs against tables written from the papers, scripts and model cards, key by key."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from pldr_train.cli import main
from pldr_train.plan import describe
from pldr_train.published import PUBLISHED_RUNS, ZERO_SHOT_TASKS, published_as
from pldr_train.recipe import Recipe, load_recipe, recipe_from_dict, recipe_to_dict
from pldr_train.recipe.yaml_text import parse_yaml

ROOT = Path(__file__).parents[2]
FIRST, SECOND = ((0, 16_000_000), (16_000_000, 16_160_000)), ((16_000_000, 32_000_000), (32_000_000, 32_160_000))

# SOC table 1: name -> peak learning rate, warm-up. All: 5 layers x 14 heads x 64, A_dff 170, documents [16M, 32M),
# 250,000 steps of 32 x 1024, AdamW 0.9/0.95, eps 1e-5, decay 0.1, value clipping 1, cosine to a tenth, bf16, seed 1234.
SOC = {
    "soc-110m-1": (1.2e-3, 2000),
    "soc-110m-2": (1.0e-3, 1000),
    "soc-110m-3": (9e-4, 2000),
    "soc-110m-4": (8e-4, 4000),
    "soc-110m-5": (1.1e-3, 2000),
    "sub-110m-1": (6e-4, 6000),
    "sub-110m-2": (3e-4, 2000),
    "abl-110m-1": (1.0e-3, 2000),
    "abl-110m-2": (8e-4, 2000),
    "abl-110m-3": (6e-4, 2000),
}

COMMON: dict[str, Any] = {
    "run.seed": 1234,
    "model.num_hidden_layers": 5, "model.num_attention_heads": 14, "model.head_dim": 64, "model.hidden_size": 896,
    "model.intermediate_size": 2389, "model.vocab_size": 32_000, "model.num_reslayerA": 8, "model.num_denseA": 2,
    "model.A_dff": 170, "model.custom_G_type": "learned", "model.gram_chunk_size": None, "model.reference_rope": True,
    "model.rope_theta": 10_000.0, "model.layer_norm_eps": 1e-6, "model.init": "native", "model.init_from": None,
    "dag.A_LM": 0.0, "dag.A_P": 0.0, "dag.G_LM": 0.0, "dag.reduce": "mean", "dag.layer_factors": None,
    "data.text_column": "content", "data.context_length": 1024, "data.packing": "pack", "data.document_mask": False,
    "optim.name": "adamw", "optim.betas": [0.9, 0.95], "optim.eps": 1e-5, "optim.weight_decay": 0.1,
    "optim.clip_value": 1.0, "optim.clip_norm": None, "optim.schedule": "cosine", "optim.final_lr_fraction": 0.1,
    "optim.warmup_steps": 2000, "optim.groups": [],
    "trainer.max_steps": 250_000, "trainer.batch_size": 32, "trainer.micro_batch_size": 16, "trainer.precision": "bf16",
    "trainer.targets": "all", "trainer.validate_every_steps": 12_000, "trainer.validation_rows": 32_000,
    "logging.every_steps": 2000, "checkpoint.every_steps": 4000,
    "checkpoint.also_keep_steps": [4000, 12_000, 31_250, 62_500, 93_750, 125_000, 175_000, 225_000],
}  # fmt: skip


def documents(intervals: tuple[tuple[int, int], tuple[int, int]]) -> dict[str, Any]:
    return {"data.train_documents": list(intervals[0]), "data.validation_documents": list(intervals[1])}


V5 = {
    "model.init": "legacy", "optim.lr": 1e-3, "trainer.validation_rows": 64_000,
    **documents(((0, 79_936_000), (79_936_000, 80_000_000))),
}  # fmt: skip
G = {"optim.lr": 3e-4, **documents(SECOND)}

DIFFERENT: dict[str, dict[str, Any]] = {
    **{name: {"optim.lr": lr, "optim.warmup_steps": warmup, **documents(SECOND)} for name, (lr, warmup) in SOC.items()},
    "v51-110m": {"optim.lr": 1e-3, "model.A_dff": 180, **documents(FIRST)},
    "v51-dag-110m": {"optim.lr": 1.5e-3, "dag.A_LM": 0.05, "dag.A_P": 0.05, "dag.G_LM": 0.05, **documents(FIRST)},
    "v51g-identity": {"model.custom_G_type": "identity", **G},
    "v51g-random": {"model.custom_G_type": "random", "model.random_distribution": "normal", **G},
    "v51g-transferred": {"model.custom_G_type": "external", **G},
    "v52-110m-1": {"optim.lr": 1.2e-3, "model.reference_rope": False, "model.init": "hf_port", **documents(SECOND)},
    "v5-104m": {
        "model.num_hidden_layers": 7, "model.num_attention_heads": 12, "model.hidden_size": 768,
        "model.intermediate_size": 2048, **V5,
    },
    "v5-260m": {
        "model.num_hidden_layers": 1, "model.num_attention_heads": 42, "model.hidden_size": 2688,
        "model.intermediate_size": 7168, **V5,
    },
    "v5-dag-110m": {"dag.A_LM": 0.001, "dag.A_P": 0.005, "dag.G_LM": 0.005, **V5},
    # Training dynamics, vendor/row: 3 layers x 4 heads, context 256, fp32, 12,000 steps, warm-up 1,000.
    "row-study": {
        "model.num_hidden_layers": 3, "model.num_attention_heads": 4, "model.hidden_size": 256,
        "model.intermediate_size": 682, "data.context_length": 256, "optim.lr": 1e-3, "optim.warmup_steps": 1000,
        "trainer.max_steps": 12_000, "trainer.precision": "fp32", "trainer.micro_batch_size": 32,
        **documents(((0, 400_000), (400_000, 408_000))),
    },
    # Training dynamics, criticality.py: generator 3e-4 g, body 6e-4 / N at N = 8, g = 1.
    "controlled": {
        "model.num_attention_heads": 8, "model.hidden_size": 512, "model.intermediate_size": 1365,
        "model.init": "width_scaled", "data.context_length": 64, "optim.lr": 6e-4 / 8, "optim.schedule": "constant",
        "optim.warmup_steps": 0, "optim.eps": 1e-8, "optim.weight_decay": 0.01, "optim.clip_value": None,
        "optim.clip_norm": 1.0, "trainer.max_steps": 4096, "trainer.precision": "fp32", "trainer.targets": "last",
        "trainer.micro_batch_size": 32, **documents(((0, 100_000), (100_000, 104_000))),
    },
}  # fmt: skip
DIFFERENT["soc-110m-5"] |= {
    "trainer.max_steps": 1_250_000,
    "checkpoint.also_keep_steps": [5 * step for step in COMMON["checkpoint.also_keep_steps"]],
    "trainer.validate_every_steps": 60_000, "trainer.validation_rows": 160_000, "logging.every_steps": 10_000,
    "checkpoint.every_steps": 20_000, **documents(((0, 80_000_000), (80_000_000, 80_160_000))),
}  # fmt: skip
OF_SHORT_STUDIES = ("trainer.validat", "logging.", "checkpoint.", "optim.groups")
"""Keys of the studies whose values are the project's, or are looked at below."""

PARAMETERS = {
    **dict.fromkeys([*SOC, "v51-dag-110m", "v52-110m-1", "v5-dag-110m"], 109_689_362),
    "v51-110m": 109_844_562,
    **dict.fromkeys(["v51g-identity", "v51g-random", "v51g-transferred"], 105_606_482),
    "v5-104m": 104_237_120,
    "v5-260m": 260_202_048,
    "row-study": 20_620_604,
    "controlled": 52_032_274,
}


def shipped(name: str) -> Recipe:
    return load_recipe(ROOT / "recipes" / f"{name}.yaml").resolved()


def test_the_tables_have_every_published_recipe() -> None:
    assert DIFFERENT.keys() == PARAMETERS.keys() == PUBLISHED_RUNS.keys()


@pytest.mark.parametrize("name", DIFFERENT)
def test_every_key_is_the_published_one(name: str) -> None:
    values, expected = recipe_to_dict(shipped(name)), COMMON | DIFFERENT[name]
    for key, value in expected.items():
        section, leaf = key.split(".")
        if not (name in ("row-study", "controlled") and key.startswith(OF_SHORT_STUDIES)):
            assert values[section][leaf] == value, key


def test_the_controlled_study_trains_generator_and_body_at_its_rates() -> None:
    recipe = shipped("controlled")
    (group,) = recipe.optim.groups
    assert group.match == ("generator",)
    assert recipe.optim.lr * group.lr_factor == pytest.approx(3e-4)
    assert (group.weight_decay, group.betas, group.freeze) == (None, None, False)


@pytest.mark.parametrize("name", DIFFERENT)
def test_a_dry_run_gives_parameters_tokens_and_days(name: str, tmp_path: Path) -> None:
    recipe = shipped(name)
    if name == "v51g-transferred":
        save_file({"G": torch.zeros(5, 14, 64, 64)}, tmp_path / "g.safetensors")
        recipe = recipe.replaced({"model.custom_G_path": str(tmp_path / "g.safetensors")})
    text = describe(recipe).text
    assert re.search(rf"^parameters +{PARAMETERS[name]:,}$", text, re.MULTILINE)
    assert "B tokens)" in text
    assert "on one H200 at an assumed 40% of its peak" in text


def test_the_averages_are_the_papers() -> None:
    averages = {name: run.results for name, run in PUBLISHED_RUNS.items() if run.results is not None}
    published = {
        "soc-110m-1": 40.95, "soc-110m-2": 41.57, "soc-110m-3": 41.21, "soc-110m-4": 41.46, "soc-110m-5": 42.62,
        "sub-110m-1": 35.49, "sub-110m-2": 35.47, "abl-110m-1": 39.18, "abl-110m-2": 36.03, "abl-110m-3": 36.32,
    }  # fmt: skip
    for name, average in published.items():
        assert averages[name].average(0) == pytest.approx(average, abs=0.0051), name
    assert averages["soc-110m-5"].average(1) == pytest.approx(39.81, abs=0.0051)
    assert averages["soc-110m-5"].average(2) == pytest.approx(40.21, abs=0.0051)
    assert all(len(results.zero_shot) == len(ZERO_SHOT_TASKS) for results in averages.values())


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("models/PLDR-LLM-SOC-110M-5", "soc-110m-5"), ("runs/sub-110m-2", "sub-110m-2"), ("x/SUB-1/last", "sub-110m-1"),
        ("soc-110m-50", None), ("runs/quickstart", None), ("runs/v51-dag-110m-again", "v51-dag-110m"),
    ],
)  # fmt: skip
def test_a_published_run_is_recognised_by_whole_names(name: str, recipe: str | None) -> None:
    assert published_as(name) == recipe


# ------------------------------------------------------------------------------------------------------- the command


def test_list_has_all_and_its_page_is_the_one_in_the_docs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]][: len(PUBLISHED_RUNS)] == list(PUBLISHED_RUNS)
    assert any(line.startswith("quickstart ") and "1,759,252" in line for line in lines)
    assert main(["recipes", "list", "--markdown"]) == 0
    assert capsys.readouterr().out == (ROOT / "docs" / "recipes.md").read_text()


def test_show_prints_a_recipe_with_its_published_results(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "show", "sub-110m-2"]) == 0
    text = capsys.readouterr().out
    assert "# published: block loss 0.2 nat/token, accuracy 0.946, order parameter of G_LM 46.9" in text
    assert recipe_from_dict(parse_yaml(text)) == load_recipe(ROOT / "recipes" / "sub-110m-2.yaml")


def test_copy_writes_a_recipe_once(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["recipes", "copy", "row-study-cpu"]) == 0
    copied = tmp_path / "row-study-cpu.yaml"
    assert copied.read_bytes() == (ROOT / "recipes" / "row-study-cpu.yaml").read_bytes()
    assert main(["recipes", "copy", "quickstart", str(copied)]) == 2
    assert "row-study-cpu.yaml exists; name another file, or replace it with --overwrite" in capsys.readouterr().err
    assert main(["recipes", "copy", "quickstart", str(copied), "--overwrite"]) == 0
    assert copied.read_bytes() == (ROOT / "recipes" / "quickstart.yaml").read_bytes()
    (tmp_path / "letter.txt").write_text("Dear")
    assert main(["recipes", "copy", "quickstart", "letter.txt", "--overwrite"]) == 2
    assert "letter.txt exists and is not a recipe" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["show"], "recipes show: name a recipe"),
        (["show", "soc-110m-6"], "soc-110m-6: no such recipe; did you mean soc-110m-"),
        (["list", "quickstart"], "recipes list lists all"),
        (["show", "quickstart", "x.yaml"], "recipes show writes no file"),
        (["show", "quickstart", "--overwrite"], "--overwrite is for copy"),
        (["copy", "quickstart", "--markdown"], "--markdown is for list"),
    ],
)
def test_what_does_not_fit_is_refused(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", *words]) == 2
    assert message in capsys.readouterr().err
