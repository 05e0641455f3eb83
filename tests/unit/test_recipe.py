"""What a recipe accepts and refuses, and how it says so."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pldr_train.errors import RecipeError
from pldr_train.parameter_sets import SETS
from pldr_train.recipe import (
    FOLLOW_LENGTH,
    Recipe,
    compare_for_resume,
    dump_recipe,
    load_recipe,
    recipe_from_dict,
    recipe_keys,
    recipe_to_dict,
)
from pldr_train.recipe.checks import missing_data_files
from pldr_train.recipe.explaining import explain

SMALL: dict[str, Any] = {
    "run": {"name": "small"},
    "data": {"source": "quickstart", "num_lanes": 16},
    "optim": {"warmup_steps": 10},
    "trainer": {"max_steps": 100, "batch_size": 16},
}


def recipe_with(**changes: Any) -> Recipe:
    """SMALL with some keys set, written section__key=value."""
    values = copy.deepcopy(SMALL)
    for name, value in changes.items():
        section, _, key = name.partition("__")
        values.setdefault(section, {})[key] = value
    return recipe_from_dict(values)


def lines_refusing(**changes: Any) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        recipe_with(**changes)
    head, *lines = str(caught.value).splitlines()
    assert head.startswith("recipe: ")
    assert str(len(lines)) in head
    return [line.strip() for line in lines]


def test_defaults_are_the_papers_values() -> None:
    recipe = recipe_from_dict({"run": {"name": "x"}, "data": {"path": "p", "tokenizer": "t"}}).resolved()
    model, optim, trainer = recipe.model, recipe.optim, recipe.trainer
    assert (model.num_hidden_layers, model.num_attention_heads, model.head_dim) == (5, 14, 64)
    assert (model.hidden_size, model.intermediate_size, model.vocab_size) == (896, 2389, 32000)
    assert (model.num_reslayerA, model.num_denseA, model.A_dff, model.custom_G_type) == (8, 2, 170, "learned")
    assert (optim.betas, optim.eps, optim.weight_decay) == ((0.9, 0.95), 1e-5, 0.1)
    assert (optim.clip_value, optim.clip_norm, optim.final_lr_fraction) == (1.0, None, 0.1)
    assert (trainer.max_steps, trainer.batch_size, recipe.data.context_length) == (250_000, 32, 1024)
    assert trainer.precision == "bf16"
    assert trainer.max_steps * trainer.batch_size * recipe.data.context_length == 8_192_000_000
    assert (recipe.dag.A_LM, recipe.dag.A_P, recipe.dag.G_LM) == (0, 0, 0)


def test_resolving_fills_in_what_is_derived_and_is_stable() -> None:
    recipe = recipe_with(model__num_attention_heads=4, model__head_dim=32, trainer__devices=2)
    resolved = recipe.resolved()
    assert (resolved.model.hidden_size, resolved.model.intermediate_size) == (128, 341)
    assert resolved.trainer.micro_batch_size == 8
    assert resolved.resolved() == resolved
    given = recipe_with(model__intermediate_size=300, trainer__micro_batch_size=4).resolved()
    assert (given.model.intermediate_size, given.trainer.micro_batch_size) == (300, 4)


def test_null_operator_type_means_learned() -> None:
    assert recipe_with(model__custom_G_type=None).model.custom_G_type == "learned"


def test_a_single_name_is_a_list_of_one() -> None:
    single, listed = (recipe_with(model__init_from="runs/x", model__init_from_only=only) for only in ("body", ["body"]))
    assert single == listed
    assert single.model.init_from_only == ("body",)
    assert recipe_from_dict(recipe_to_dict(single)) == single
    assert set(re.findall(r"[a-z_]+", explain("model.init_from_only"))) >= SETS.keys()


def test_recipes_are_frozen_and_hashable() -> None:
    recipe = recipe_with()
    with pytest.raises(ValueError, match="frozen"):
        recipe.optim.lr = 1.0  # type: ignore[misc]
    assert hash(recipe) == hash(recipe_with())


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"trainer__max_steps": 400.0},
            "trainer.max_steps=400.0: must be a whole number, not a decimal number; write 400",
        ),
        ({"trainer__max_steps": True}, "trainer.max_steps=true: must be a whole number, not true or false"),
        ({"trainer__max_steps": "400"}, 'trainer.max_steps="400": must be a whole number, not text; write 400 without'),
        ({"trainer__max_steps": None}, "trainer.max_steps=null: must be a whole number, not null; give a value"),
        ({"trainer__max_steps": 0}, "trainer.max_steps=0: must be at least 1"),
        ({"optim__lr": "fast"}, "optim.lr=fast: must be a number, not text"),
        ({"optim__lr": True}, "optim.lr=true: must be a number"),
        ({"optim__lr": 0}, "optim.lr=0: must be greater than 0"),
        ({"optim__lr": float("nan")}, "optim.lr=NaN: must be a finite number"),
        ({"optim__lr": float("inf")}, "optim.lr=Infinity: must be a finite number"),
        ({"optim__lr": 10**400}, "optim.lr=1000"),
        ({"optim__betas": [0.9]}, "optim.betas=[0.9]: must be a list of two"),
        ({"optim__betas": [0.9, 0.95, 0.99]}, "optim.betas=[0.9, 0.95, 0.99]: must be a list of two"),
        ({"optim__betas": 0.9}, "optim.betas=0.9: must be a list, not a decimal number; write it as [0.9]"),
        ({"optim__betas": [0.9, 1]}, "optim.betas[1]=1: must be less than 1"),
        ({"data__train_documents": [0, 2.0]}, "data.train_documents[1]=2.0: must be a whole number"),
        ({"monitor__deductive": "yes"}, "monitor.deductive=yes: must be true or false, not text; write true"),
        ({"monitor__deductive": 0}, "monitor.deductive=0: must be true or false, not a whole number; write false"),
        ({"trainer__compile": "yes"}, "trainer.compile=yes: must be never, always or auto"),
        (
            {"trainer__compile": True, "parallel__strategy": "deepspeed", "parallel__zero_stage": 3},
            "trainer.compile=always: ZeRO-3 gathers weights inside the layers, which then are no graph; set never, or",
        ),
        (
            {"parallel__activation_checkpointing": 3},
            "parallel.activation_checkpointing=3: must be none, metric",
        ),
        ({"run__dir": 7}, "run.dir=7: must be text, not a whole number; put it in quotes"),
        ({"run__name": "../up"}, "run.name=../up: may hold only letters"),
        ({"run__name": ".."}, "run.name=..: may hold only letters"),
        ({"run__name": ""}, 'run.name="": may hold only letters'),
        ({"trainer__precision": "bf61"}, "trainer.precision=bf61: must be fp32 or bf16; did you mean bf16?"),
        ({"sample__prompts": "The"}, "sample.prompts=The: must be a list, not text; write it as [The]"),
        ({"sample__top_p": 1.5}, "sample.top_p=1.5: must be at most 1"),
    ],
)
def test_a_wrong_value_is_answered_with_key_value_and_fix(changes: dict[str, Any], line: str) -> None:
    (shown,) = lines_refusing(**changes)
    assert shown.startswith(line)
    assert ";" in shown


def test_a_whole_number_is_accepted_where_a_number_is_asked_for() -> None:
    optim = recipe_with(optim__lr=1, optim__clip_value=2).optim
    assert (optim.lr, optim.clip_value) == (1.0, 2.0)
    assert isinstance(optim.lr, float)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"optim__learning_rate": 1}, "optim.learning_rate=1: unknown key; did you mean optim.lr?"),
        ({"optim__warm_up_steps": 1}, "optim.warm_up_steps=1: unknown key; did you mean optim.warmup_steps?"),
        ({"trainer__lr": 1}, "trainer.lr=1: unknown key; did you mean optim.lr?"),
        ({"optimizer__lr": 1}, "optimizer: unknown section; did you mean optim?"),
        ({"dag__zzz": 1}, "dag.zzz=1: unknown key; dag has A_LM, A_P, G_LM, every_steps"),
        ({"qqqq__zzz": 1}, "qqqq: unknown section; a recipe has run, model, dag,"),
    ],
)
def test_an_unknown_key_is_answered_with_the_likely_one(changes: dict[str, Any], line: str) -> None:
    (shown,) = lines_refusing(**changes)
    assert shown.startswith(line)


def test_a_key_outside_every_section_is_placed() -> None:
    with pytest.raises(RecipeError, match=r"lr=0\.001: unknown key; did you mean optim\.lr\?"):
        recipe_from_dict({**SMALL, "lr": 0.001})


@pytest.mark.parametrize("content", [None, 3, "text", [1, 2]])
def test_a_section_that_is_no_mapping_is_refused(content: Any) -> None:
    with pytest.raises(RecipeError, match=r"  optim=.*: must be a section, .*; indent its keys below it"):
        recipe_from_dict({**SMALL, "optim": content})


def test_a_missing_required_key_is_named() -> None:
    with pytest.raises(RecipeError, match=r"  run\.name: missing; add it"):
        recipe_from_dict({**SMALL, "run": {}})
    with pytest.raises(RecipeError, match=r"  run: missing"):
        recipe_from_dict({"data": {"source": "quickstart"}})


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"model__hidden_size": 900},
            "model.hidden_size=900: not model.num_attention_heads * model.head_dim = 14 * 64 = 896; set it to 896",
        ),
        ({"model__head_dim": 63}, "model.head_dim=63: odd"),
        ({"model__vocab_size": 262}, "model.vocab_size=262: too small for the 262 special and byte pieces"),
        ({"model__custom_G_type": "external"}, "model.custom_G_type=external: needs model.custom_G_path"),
        ({"model__custom_G_path": "g.safetensors"}, "model.custom_G_path=g.safetensors: not used with model.custom_G"),
        (
            {"model__random_distribution": "normal", "model__custom_G_type": "identity"},
            "model.random_distribution=normal: not used with model.custom_G_type=identity; set custom_G_type=random",
        ),
        (
            {"model__gram_chunk_size": 64, "model__custom_G_type": "identity"},
            "model.gram_chunk_size=64: with model.custom_G_type=identity there is no Gram matrix; set it to null",
        ),
        (
            {"model__init_from_only": "generator"},
            'model.init_from_only=["generator"]: needs model.init_from, whose weights it takes; set it, or null',
        ),
        (
            {"model__init_from_only": [], "model__init_from": "runs/x"},
            "model.init_from_only=[]: names no parameter; set it to null",
        ),
        (
            {"model__init": "legacy", "model__init_from": "runs/x"},
            "model.init=legacy: not used with model.init_from, which gives all weights; set it to native, or",
        ),
        ({"dag__A_P_steps": [0, 9]}, "dag.A_P_steps=[0, 9]: not used with dag.A_P_schedule=constant; set a schedule"),
        ({"dag__A_P_schedule": "decay", "dag__A_P": 0.1}, "dag.A_P_schedule=decay: needs dag.A_P_steps, such as"),
        (
            {"dag__G_LM_schedule": "window", "dag__G_LM_steps": [7, 7], "dag__G_LM": 0.1},
            "dag.G_LM_steps=[7, 7]: holds no step; the second number must be larger than the first",
        ),
        (
            {"dag__A_LM_schedule": "warmup", "dag__A_LM_steps": [0, 9]},
            "dag.A_LM_schedule=warmup: there is nothing to schedule with dag.A_LM=0",
        ),
        (
            {"dag__A_LM_schedule": "window", "dag__A_LM_steps": [10**6, 10**6 + 1], "dag__A_LM": 0.1},
            "dag.A_LM_steps=[1000000, 1000001]: begins after trainer.max_steps=",
        ),
        (
            {"dag__layer_factors": [1, 2]},
            "dag.layer_factors=[1.0, 2.0]: 2 factors for model.num_hidden_layers=5; give one for each layer, or null",
        ),
        ({"dag__layer_factors": [0, 0, 0, 0, 0]}, "dag.layer_factors=[0.0, 0.0, 0.0, 0.0, 0.0]: no layer is left"),
        ({"dag__A_P": 0.1, "model__custom_G_type": "identity"}, "dag.A_P=0.1: with model.custom_G_type=identity G is"),
        ({"data__path": "x"}, "data.path=x: not used with data.source=quickstart"),
        ({"data__tokenizer": "x"}, "data.tokenizer=x: not used with data.source=quickstart"),
        (
            {"data__source": "tokens"},
            "data.path: missing with data.source=tokens; set it to a folder of pldr-train data",
        ),
        (
            {"data__document_mask": True, "data__packing": "pad"},
            "data.document_mask=true: with data.packing=pad a row holds one document already; set it to false",
        ),
        (
            {"data__min_document_tokens": 9, "data__max_document_tokens": 8},
            "data.min_document_tokens=9: exceeds data.max_document_tokens=8, so that no document is left; lower it",
        ),
        (
            {"data__source": "parquet", "data__tokenizer": "x"},
            "data.path: missing with data.source=parquet; set it to",
        ),
        ({"data__train_documents": [5, 5]}, "data.train_documents=[5, 5]: holds no document; write [start, stop)"),
        (
            {"data__train_documents": [0, 10], "data__validation_documents": [9, 12]},
            "data.validation_documents=[9, 12]: overlaps data.train_documents=[0, 10]; choose",
        ),
        ({"data__validation_documents": [9, 12]}, "data.validation_documents=[9, 12]: would be trained on too"),
        ({"optim__warmup_steps": 101}, "optim.warmup_steps=101: exceeds trainer.max_steps=100; lower it or"),
        ({"optim__clip_norm": 1.0}, "optim.clip_norm=1.0: optim.clip_value=1.0 is set too and only one"),
        ({"trainer__devices": 3}, "trainer.batch_size=16: not divisible by trainer.devices=3; use a multiple of 3, "),
        (
            {"trainer__micro_batch_size": 3},
            "trainer.batch_size=16: not divisible by trainer.devices=1 * trainer.micro_batch_size=3; set "
            "trainer.micro_batch_size=2, with which the training stays the same, or use a multiple of 3",
        ),
        (
            {"data__num_workers": 2},
            "data.num_lanes=16: not divisible by processes 1 * micro-batch 16 * loader workers 2 = 32; use a multiple",
        ),
        (
            {"trainer__devices": 2, "trainer__num_nodes": 4, "trainer__batch_size": 12},
            "trainer.batch_size=12: not divisible by trainer.devices=2 * trainer.num_nodes=4; use a multiple of 8,",
        ),
        (
            {"trainer__devices": 2, "parallel__strategy": "single", "data__num_workers": 0},
            "parallel.strategy=single: is for one process, but there are 2; use ddp, fsdp or deepspeed",
        ),
        (
            {"parallel__offload_optimizer": "cpu"},
            "parallel.offload_optimizer=cpu: only deepspeed has it; set parallel.",
        ),
        ({"parallel__deepspeed_config": "a.json"}, "parallel.deepspeed_config=a.json: only deepspeed has it; set"),
        (
            {"parallel__strategy": "fsdp", "parallel__weights": "bf16"},
            "parallel.weights=bf16: only deepspeed has it; set parallel.strategy=deepspeed or fp32",
        ),
        (
            {"parallel__strategy": "deepspeed", "parallel__weights": "bf16", "trainer__precision": "fp32"},
            "parallel.weights=bf16: with trainer.precision=fp32 weights are fp32; set it to fp32",
        ),
        (
            {"parallel__strategy": "deepspeed", "parallel__offload_parameters": "cpu"},
            "parallel.offload_parameters=cpu: with parallel.zero_stage=2 every process needs all weights; set",
        ),
        (
            {"parallel__strategy": "deepspeed", "parallel__zero_stage": 3, "parallel__offload_optimizer": "nvme"},
            "parallel.offload_path=null: nvme needs a folder on a fast disk; name one",
        ),
        (
            {"parallel__strategy": "deepspeed", "parallel__offload_path": "/fast"},
            "parallel.offload_path=/fast: nothing is offloaded to nvme; set it to null",
        ),
    ],
)
def test_keys_that_clash_are_answered_with_key_value_and_fix(changes: dict[str, Any], line: str) -> None:
    (shown,) = lines_refusing(**changes)
    assert shown.startswith(line)
    assert ";" in shown


@pytest.mark.parametrize(
    "changes",
    [
        {"optim__warmup_steps": 100},
        {"data__num_workers": 0},
        {"data__num_workers": 2, "trainer__micro_batch_size": 8},
        {"data__train_documents": [0, 10], "data__validation_documents": [10, 12]},
        {"data__train_documents": [10, 12], "data__validation_documents": [0, 10]},
        {"optim__clip_norm": 1.0, "optim__clip_value": None},
        {"optim__clip_value": None},
        {"model__vocab_size": 263},
        {"model__hidden_size": 896},
        {"model__custom_G_type": "external", "model__custom_G_path": "g.safetensors"},
        {"model__custom_G_type": "identity"},
        {"run__name": "v5.1_a-b"},
    ],
)
def test_borders_of_the_checks_are_accepted(changes: dict[str, Any]) -> None:
    recipe_with(**changes)


def test_all_problems_are_reported_at_once_and_none_twice() -> None:
    lines = lines_refusing(
        trainer__max_steps="many",  # hides the warm-up check, for its partner is wrong
        trainer__batch_sise=3,
        model__hidden_size=900,
        model__head_dim=62,
        optim__clip_norm=1.0,
        data__train_documents=[3, 1],
        dag__A_P=-1,
        model__custom_G_type="identity",
    )
    assert [line.split("=")[0] for line in lines] == [
        "dag.A_P",
        "trainer.max_steps",
        "trainer.batch_sise",
        "model.hidden_size",
        "data.train_documents",
        "optim.clip_norm",
    ]


def test_keys_that_are_no_text_are_unknown_keys() -> None:
    with pytest.raises(RecipeError, match=r"optim\.1: unknown key"):
        recipe_from_dict({**SMALL, "optim": {1: 2, "warmup_steps": 1}})


MAY_DIFFER = {
    "run__dir": "elsewhere",
    "run__notes": "why",
    "run__tags": ["a"],
    "run__group": "a",
    "model__attn_implementation": "eager",
    "data__cache_dir": "elsewhere",
    "data__num_workers": 0,
    "data__source": "parquet",
    "data__path": "elsewhere",
    "data__tokenizer": "elsewhere.model",
    "data__retries": 3,
    "data__on_bad_shard": "skip",
    "trainer__max_steps": 200,
    "trainer__validate_every_steps": 5,
    "trainer__validation_rows": 5,
    "trainer__devices": 2,
    "trainer__num_nodes": 2,
    "trainer__on_nonfinite": "skip",
    "trainer__max_nonfinite_steps": 3,
    "run__name": "other",
    "trainer__threads": 3,
    "trainer__compile": "always",
    "trainer__micro_batch_size": 4,
    "trainer__early_stop": {"patience": 2},
    "checkpoint__keep_last": 9,
    "logging__wandb": "offline",
    "monitor__rows": 4,
    "evaluate__tasks": ["cloze"],
    "sample__prompts": ["A"],
}


@pytest.mark.parametrize(
    ("saved", "new", "refused"),
    [
        (None, None, False),
        (None, "last", False),  # saved before there was the key
        (None, "spread", True),
        ("spread", None, False),
        ("last", None, False),
        ("last", "spread", True),
        ("spread", "last", True),
    ],
)
def test_a_resumed_run_keeps_its_choice_of_validation_documents(
    saved: str | None, new: str | None, refused: bool
) -> None:
    before, after = (recipe_with(data__validation_choice=choice) for choice in (saved, new))
    problems = compare_for_resume(before, after)
    assert [problem.partition(":")[0] for problem in problems] == [f"data.validation_choice={new}"] * refused
    assert after.going_on(before).data.validation_choice == (new or saved or "last")
    assert after.going_on(None).data.validation_choice == (new or "spread")
    intervals = {"data__train_documents": [0, 10], "data__validation_documents": [10, 12]}
    before = recipe_with(**intervals, data__validation_choice=saved)
    assert compare_for_resume(before, recipe_with(**intervals, data__validation_choice=new)) == []


def test_a_resumed_run_may_change_only_what_does_not_change_the_model_or_the_data_order() -> None:
    saved = recipe_with()
    assert compare_for_resume(saved, saved.resolved()) == []
    assert compare_for_resume(saved, recipe_with(**MAY_DIFFER)) == []
    new = recipe_with(optim__lr=3e-3, data__context_length=64, dag__A_P=0.5, run__seed=1)
    problems = compare_for_resume(saved, new)
    assert [problem.split(":")[0] for problem in problems] == [
        "run.seed=1",
        "dag.A_P=0.5",
        "data.context_length=64",
        "optim.lr=0.003",
    ]
    assert "the saved run has 0.001;" in problems[-1]


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")  # the one changed value fits no type
def test_every_key_outside_the_short_list_is_compared() -> None:
    free = {name.replace("__", ".") for name in MAY_DIFFER}
    sections = ("parallel.", "checkpoint.", "logging.", "monitor.", "evaluate.", "sample.")
    free |= {key for key in recipe_keys() if key.startswith(sections)}
    saved = recipe_with().resolved()
    for key in recipe_keys():
        section, _, name = key.partition(".")
        part = getattr(saved, section)
        changed = saved.model_copy(update={section: part.model_copy(update={name: 987_654})})
        assert bool(compare_for_resume(saved, changed)) == (key not in free), key


def test_reading_a_recipe_loads_no_torch() -> None:
    code = "import sys, pldr_train.recipe; print(sorted({'torch', 'lightning', 'transformers'} & sys.modules.keys()))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"


def derived(**changes: Any) -> dict[str, Any]:
    recipe = recipe_with(**changes).resolved()
    values = recipe_to_dict(recipe)
    return {key: values[section][leaf] for key in FOLLOW_LENGTH for section, leaf in [key.split(".")]}


def test_cadences_and_warmup_follow_the_length_of_the_run() -> None:
    open_keys: dict[str, Any] = {key.replace(".", "__"): None for key in FOLLOW_LENGTH}
    paper = derived(**open_keys, trainer__max_steps=250_000, trainer__batch_size=32)
    assert paper == {
        "optim.warmup_steps": 2000, "trainer.validate_every_steps": 12_000, "trainer.validation_rows": 32_000,
        "checkpoint.every_steps": 4000, "logging.every_steps": 2000,
        "checkpoint.also_keep_steps": [4000, 12_000, 31_250, 62_500, 93_750, 125_000, 175_000, 225_000],
    }  # fmt: skip
    assert derived(**open_keys, trainer__max_steps=3000, trainer__batch_size=32) == {
        "optim.warmup_steps": 300, "trainer.validate_every_steps": 144, "trainer.validation_rows": 384,
        "checkpoint.every_steps": 48, "logging.every_steps": 24, "checkpoint.also_keep_steps": [],
    }  # fmt: skip
    shortest = derived(**open_keys, trainer__max_steps=1, trainer__batch_size=1)
    assert shortest["optim.warmup_steps"] == 0
    assert [shortest[f"{section}.every_steps"] for section in ("checkpoint", "logging")] == [1, 1]
    # What is written stands.
    written = derived(**open_keys | {"logging__every_steps": 7, "optim__warmup_steps": 0}, trainer__max_steps=3000)
    assert (written["logging.every_steps"], written["optim.warmup_steps"]) == (7, 0)


def test_a_longer_run_that_goes_on_keeps_the_cadences_that_it_began_with() -> None:
    open_keys: dict[str, Any] = {key.replace(".", "__"): None for key in FOLLOW_LENGTH}
    saved = recipe_with(**open_keys, trainer__max_steps=3000).resolved()
    longer = recipe_with(**open_keys, trainer__max_steps=9000)
    assert compare_for_resume(saved, longer) == []
    going_on = longer.going_on(saved).resolved()
    assert (going_on.trainer.max_steps, going_on.optim.warmup_steps, going_on.logging.every_steps) == (9000, 300, 24)
    changed = recipe_with(**open_keys | {"optim__warmup_steps": 900}, trainer__max_steps=9000)
    assert compare_for_resume(saved, changed) == [
        "optim.warmup_steps=900: the saved run has 300; set it back, or start another run"
    ]


@pytest.mark.parametrize(("warmup", "unusual"), [(None, False), (600, False), (601, True), (3000, True)])
def test_a_warm_up_over_most_of_the_run_is_noticed(tmp_path: Path, warmup: int | None, unusual: bool) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(recipe_with(trainer__max_steps=3000, optim__warmup_steps=warmup)))
    said: list[str] = []
    load_recipe(path, notice=said.append)
    expected = f"optim.warmup_steps={warmup}: {(warmup or 0) / 3000:.0%} of trainer.max_steps=3000"
    assert [text.partition(",")[0] for text in said] == [expected] * unusual


def test_missing_data_files_are_found_by_their_names(tmp_path: Path) -> None:
    there = tmp_path / "x.parquet"
    there.write_text("")

    def missing(**data: Any) -> list[str]:
        section = {f"data__{key}": value for key, value in ({"source": "parquet"} | data).items()}
        return [problem.text for problem in missing_data_files(recipe_with(**section))]

    path, tokenizer = str(there), str(tmp_path / "t.model")
    assert missing(path=path) == missing(path=str(tmp_path)) == missing(path=f"{tmp_path}/*.parquet") == []
    (nowhere,) = missing(path=f"{tmp_path}/no")
    assert nowhere.endswith("/no: no such file or folder; give an existing file, folder or glob")
    assert "*.txt: the glob matches no file" in missing(path=f"{tmp_path}/*.txt", source="text")[0]
    assert "x.parquet: no such folder; name one that" in missing(path=path, source="tokens")[0]
    assert len(missing(path="/no/such", tokenizer=tokenizer)) == 2
    (without,) = missing(path=path, tokenizer=tokenizer)
    assert f"data.tokenizer={tokenizer}: no such file; give a SentencePiece" in without
    assert missing(source="hub") == []
