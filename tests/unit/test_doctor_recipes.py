"""What a recipe asks of the machine: devices, files, room for checkpoints."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from pldr_train.commands import doctor
from pldr_train.commands.doctor import Subject
from pldr_train.dag import log_trace_exp
from pldr_train.doctor import recipes
from pldr_train.doctor.finding import Finding
from pldr_train.doctor.recipes import check_devices, check_files, check_kernels, check_room, kept_checkpoints
from pldr_train.errors import UserError
from pldr_train.recipe import Recipe, recipe_from_dict
from tests.tiny import tiny_values


def recipe(folder: Path, **sections: dict[str, Any]) -> Recipe:
    return recipe_from_dict(tiny_values(folder, folder / "runs", **sections))


# -------------------------------------------------------------------------------------------------------------- devices


@pytest.mark.parametrize(
    ("accelerator", "devices", "gpus", "level", "words"),
    [
        ("auto", 1, 0, "ok", "one process on the CPU"),
        ("cpu", 2, 8, "ok", "2 processes on the CPU"),
        ("cuda", 1, 0, "fail", "trainer.accelerator=cuda"),
        ("auto", 4, 2, "fail", "trainer.devices=4, but torch sees 2 GPUs"),
        ("cuda", 2, 2, "ok", "as many as there are"),
        ("auto", 1, 2, "note", "stay idle"),
    ],
)
def test_devices(accelerator: str, devices: int, gpus: int, level: str, words: str, tmp_path: Path) -> None:
    (found,) = check_devices(recipe(tmp_path, trainer={"accelerator": accelerator, "devices": devices}), gpus)
    assert (found.level, words in found.text) == (level, True), found.text
    assert (found.advice is None) == (level == "ok")


def test_several_machines_are_looked_at_one_by_one(tmp_path: Path) -> None:
    _, machines = check_devices(recipe(tmp_path, trainer={"num_nodes": 2}), 0)
    assert (machines.level, "on every machine" in str(machines.advice)) == ("note", True)


@pytest.mark.parametrize(
    ("devices", "accelerator", "gpus", "asked", "expected"),
    [
        (None, None, 0, None, ("gloo", 2, False)),
        (None, None, 4, None, ("nccl", 4, True)),
        (None, None, 4, 2, ("nccl", 2, True)),
        (None, None, 0, 3, ("gloo", 3, True)),
        (1, "auto", 0, None, ("gloo", 2, False)),
        (2, "cpu", 4, None, ("gloo", 2, True)),
        (2, "auto", 4, None, ("nccl", 2, True)),
        (4, "auto", 2, None, ("nccl", 2, True)),
    ],
)
def test_the_all_reduce_is_that_of_the_run(
    devices: int | None,
    accelerator: str | None,
    gpus: int,
    asked: int | None,
    expected: tuple[str, int, bool],
    tmp_path: Path,
) -> None:
    wanted = recipe(tmp_path, trainer={"devices": devices, "accelerator": accelerator}) if devices else None
    measured = Subject(wanted, tmp_path, asked, False, gpus, {}).reduction()
    assert (measured.backend, measured.processes, measured.needed) == expected


@pytest.mark.parametrize(
    ("sections", "gpus", "environment", "level", "words"),
    [
        ({}, 1, {}, "ok", "metric learner and DAG loss: built, and in agreement with torch's operations"),
        ({"trainer": {"precision": "fp32"}}, 1, {}, "note", "none for metric learner, which takes many more launches"),
        ({"trainer": {"precision": "fp32"}}, 1, {"SWITCH": "0"}, "note", "SWITCH=0 rules them out"),
        ({}, 0, {}, None, ""),
        ({"trainer": {"accelerator": "cpu"}}, 1, {}, None, ""),
        ({"model": {"custom_G_type": "identity"}, "dag": {"A_LM": 0.0, "A_P": 0.0, "G_LM": 0.0}}, 1, {}, None, ""),
    ],
)
def test_kernels(
    sections: dict[str, Any], gpus: int, environment: dict[str, str], level: str | None, words: str, tmp_path: Path
) -> None:
    given = {"trainer": {"accelerator": "auto", "precision": "bf16"} | sections.pop("trainer", {})} | sections
    chosen = recipe(tmp_path, **given)

    def find() -> tuple[dict[str, bool], str]:
        return {"metric learner": chosen.trainer.precision == "bf16", "DAG loss": True}, "SWITCH"

    found = list(check_kernels(chosen, gpus, environment, find))
    assert [each.level for each in found] == ([] if level is None else [level])
    assert all(words == each.text for each in found)


def test_the_kernels_that_are_looked_for_are_those_of_the_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pldr_train.model.refining.kernels_for", lambda *asked: None if asked[2].d == 16 else asked)
    monkeypatch.setitem(log_trace_exp.__globals__, "kernel_for", lambda *_: None)
    taken, switch = doctor._kernels(recipe(tmp_path, model={"head_dim": 16}))
    assert (taken, switch) == ({"metric learner": False, "DAG loss": False}, "PLDR_TRAIN_TRITON")
    assert doctor._kernels(recipe(tmp_path, model={"head_dim": 32}))[0]["metric learner"]


def test_more_processes_than_gpus_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--processes 3: each takes a GPU, and torch sees 2; ask for 2 at most"):
        Subject(None, tmp_path, 3, False, 2, {}).reduction()


# ---------------------------------------------------------------------------------------------------------------- files


def by_level(findings: list[Finding], level: str) -> list[str]:
    return [finding.text for finding in findings if finding.level == level]


def test_files_that_are_there(tiny_data: Path) -> None:
    found = list(check_files(recipe(tiny_data)))
    assert {each.level for each in found} == {"ok"}
    data, files = found
    assert data.figures["files"] == 2
    assert data.figures["size_bytes"] == sum(path.stat().st_size for path in (tiny_data / "corpus").iterdir())
    assert "data.tokenizer" in files.text


def test_every_missing_file_is_named_with_its_key(tmp_path: Path) -> None:
    changes = {"data": {"tokenizer": "no.model", "path": "no/*.parquet"}, "model": {"init_from": "no/model"}}
    failed = by_level(list(check_files(recipe(tmp_path, **changes))), "fail")
    assert [text.split(":")[0] for text in failed] == [
        "data.tokenizer=no.model",
        "model.init_from=no/model",
        "data.path=no/*.parquet",
    ]


def test_a_folder_to_offload_to_must_be_writable_and_need_not_exist(
    tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parallel = {"strategy": "deepspeed", "zero_stage": 3, "offload_optimizer": "nvme"}
    base = recipe(tiny_data)
    wanted = base.model_copy(
        update={"parallel": base.parallel.model_copy(update={**parallel, "offload_path": str(tiny_data / "swap")})}
    )
    assert by_level(list(check_files(wanted)), "fail") == []
    assert not (tiny_data / "swap").exists()
    monkeypatch.setattr(recipes.os, "access", lambda path, mode: not mode & os.W_OK)
    (text,) = by_level(list(check_files(wanted)), "fail")
    assert f"this user may not write in {tiny_data}" in text


@pytest.mark.parametrize(
    ("data", "level", "words"),
    [
        ({"source": "jsonl", "path": "{folder}/corpus"}, "fail", "no "),
        ({"source": "tokens", "path": "{folder}/tokens"}, "fail", "no such file or folder"),
        ({"source": "tokens", "path": "{folder}/corpus"}, "ok", "there"),
        ({"source": "hub", "path": None}, "ok", "tiiuae/falcon-refinedweb"),
        ({"source": "quickstart", "path": None}, "ok", "built at first use"),
    ],
)
def test_documents_of_every_source(data: dict[str, Any], level: str, words: str, tiny_data: Path) -> None:
    path = data["path"] and data["path"].format(folder=tiny_data)
    if data["source"] == "quickstart":
        data = {**data, "tokenizer": None}
    found = list(check_files(recipe(tiny_data, data={**data, "path": path})))
    (about_data,) = [each for each in found if each.name == "data"]
    assert (about_data.level, words in about_data.text) == (level, True), about_data.text


# ----------------------------------------------------------------------------------------------------------------- room


def test_room_for_the_kept_checkpoints_and_the_one_being_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = recipe(tmp_path, checkpoint={"keep_last": 2, "also_keep_steps": [10, 20, 1000]}, trainer={"max_steps": 24})
    assert kept_checkpoints(wanted) == 5
    best = recipe(tmp_path, checkpoint={"keep_last": 2, "also_keep_steps": [], "keep_best": {"n": 4}})
    assert kept_checkpoints(best) == 7
    runs, need = tmp_path / "runs", 5 * 12 * 1000

    def level(free: int) -> str:
        monkeypatch.setattr(recipes, "free_bytes", lambda _: free)
        (found,) = check_room(wanted, lambda: 1000, runs)
        assert found.figures["need_bytes"] == need
        return found.level

    assert [level(need - 1), level(need), level(2 * need)] == ["fail", "note", "ok"]
    saved = runs / "tiny" / "checkpoints" / "step-00000010"
    saved.mkdir(parents=True)
    (saved / "state.pt").write_bytes(bytes(12_000))
    (saved.parent / "last").symlink_to(saved.name)
    assert [level(need - 12_001), level(need - 12_000)] == ["fail", "note"]
