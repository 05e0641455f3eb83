"""`pldr-train checkpoint average`: the mean of checkpoints' weights, as a model that loads like any export."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pldr_train.checkpoint.shards import WEIGHTS, Piece, file_name
from pldr_train.fit import fit
from pldr_train.models.loading import load_model
from pldr_train.recipe import recipe_from_dict
from tests.cli.checkpoint_case import Call, Result, rewrite, spread, values
from tests.tiny import tiny_values


@pytest.fixture(scope="module")
def trained_run(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the checkpoints of the steps 2, 4 and 6."""
    runs = tmp_path_factory.mktemp("average")
    fit(recipe_from_dict(values(tiny_data, runs)))
    return runs / "tiny"


@pytest.fixture
def run(trained_run: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    copy = tmp_path / "tiny"
    shutil.copytree(trained_run, copy, symlinks=True)
    return copy


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    from pldr_train.cli import main

    def average(*arguments: object) -> Result:
        capsys.readouterr()
        code = main(["checkpoint", "average", *map(str, arguments)])
        return Result(code, *capsys.readouterr())

    return average


def checkpoint(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def mean(run: Path, *steps: int) -> dict[str, torch.Tensor]:
    """Not through our own reader."""
    found = [load_file(checkpoint(run, step) / file_name(WEIGHTS, 0, 1)) for step in steps]
    return {name: torch.stack([each[name].double() for each in found]).mean(0).float() for name in found[0]}


def assert_model(folder: Path, expected: dict[str, torch.Tensor]) -> None:
    state: dict[str, Any] = load_model(folder).state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in state.items():
        assert torch.equal(tensor, expected[name]), name


def test_the_mean_of_the_newest_is_a_model_that_loads_and_says_what_it_is(run: Path, call: Call) -> None:
    result = call(run)
    assert (result.code, result.err) == (0, "")
    target = run / "average-of-3-to-6"
    assert f"averaged    3 checkpoints of run tiny, of the steps 2, 4, 6\nfolder      {target}\n" in result.out
    assert_model(target, mean(run, 2, 4, 6))
    card = (target / "README.md").read_text()
    assert "the mean of those of 3 checkpoints of run `tiny`, at the steps 2, 4, 6, added up in fp64" in card
    assert "## Measured" not in card  # of none of them
    assert (target / "tokenizer.model").read_bytes() == (run / "tokenizer.model").read_bytes()
    # It is no checkpoint, and the run goes on as before.
    assert fit(recipe_from_dict(values_of(run))).trained is False


def values_of(run: Path) -> dict[str, Any]:
    from pldr_train.recipe import load_recipe, recipe_to_dict

    found = recipe_to_dict(load_recipe(run / "recipe.yaml"))
    found["run"]["dir"] = str(run.parent)
    return found


@pytest.mark.parametrize(("option", "steps"), [(("--last", "2"), (4, 6)), (("--steps", "6,2"), (2, 6))])
def test_checkpoints_are_chosen_by_number_or_by_step(
    run: Path, tmp_path: Path, call: Call, option: tuple[str, str], steps: tuple[int, int]
) -> None:
    spread(checkpoint(run, 6))  # however many processes wrote them
    expected = mean_of_spread(run, steps)
    assert call(run, *option, "--output", tmp_path / "mean").code == 0
    assert_model(tmp_path / "mean", expected)


def mean_of_spread(run: Path, steps: tuple[int, int]) -> dict[str, torch.Tensor]:
    from pldr_train.checkpoint.shards import read_weights

    first, second = (read_weights(checkpoint(run, step)) for step in steps)
    return {name: ((first[name].double() + second[name].double()) / 2).float() for name in first}


def test_the_mean_of_equal_weights_is_those_weights(tiny_data: Path, tmp_path: Path, call: Call) -> None:
    """A predefined G is a buffer of every checkpoint, and stays as it is."""
    recipe = tiny_values(
        tiny_data,
        tmp_path,
        model={"custom_G_type": "random"},
        dag={"A_LM": 0.0, "A_P": 0.0, "G_LM": 0.0},
        trainer={"max_steps": 4},
        checkpoint={"every_steps": 2},
    )
    fit(recipe_from_dict(recipe))
    run = tmp_path / "tiny"
    assert "averaged    2 checkpoints of run tiny, of the steps 2, 4\n" in call(run).out
    expected = mean(run, 2, 4)
    assert_model(run / "average-of-2-to-4", expected)
    whole = load_file(checkpoint(run, 4) / file_name(WEIGHTS, 0, 1))
    names = [name for name in whole if "predefined" in name]
    assert names
    assert all(torch.equal(expected[name], whole[name]) for name in names)


def shortened(pieces: list[Piece]) -> list[Piece]:
    first, *rest = pieces
    tensor = first.read()[:1]
    return [Piece(first.name, tuple(tensor.shape), 0, tensor.numel(), first.dtype, lambda: tensor), *rest]


def test_what_has_no_mean_is_refused(run: Path, tmp_path: Path, call: Call) -> None:
    def refused(*arguments: object) -> str:
        result = call(*arguments, "--output", tmp_path / "mean")
        assert (result.code, result.out) == (2, "")
        assert not (tmp_path / "mean").exists()
        return result.err

    there = "those of the steps 2, 4, 6"
    assert f"--last 1: a mean needs two checkpoints at least; {run} has {there}" in refused(run, "--last", "1")
    assert "--steps 4: a mean needs two" in refused(run, "--steps", "4")
    assert "--steps 4,4: a mean needs two" in refused(run, "--steps", "4,4")
    assert "has no checkpoint of step 5; there are 2, 4, 6" in refused(run, "--steps", "4,5")
    assert "has 3 checkpoints, of the steps 2, 4, 6; lower it" in refused(run, "--last", "4")
    assert "is one checkpoint" in refused(checkpoint(run, 4))
    assert "no such folder" in refused(run / "gone")
    rewrite(checkpoint(run, 2), shortened)
    message = refused(run)
    assert f"{checkpoint(run, 2)}: " in message
    assert "checkpoints of different models have no mean. Leave it out with --steps" in message
    weights = checkpoint(run, 4) / file_name(WEIGHTS, 0, 1)
    weights.write_bytes(weights.read_bytes()[:-8])
    message = refused(run, "--steps", "4,6")
    assert f"{checkpoint(run, 4)} is damaged: {weights.name}" in message


def test_another_model_is_not_written_over(run: Path, tmp_path: Path, call: Call) -> None:
    target = tmp_path / "mean"
    assert call(run, "--output", target).code == 0
    assert "pass --overwrite to replace it" in call(run, "--output", target).err
    assert call(run, "--last", "2", "--output", target, "--overwrite").code == 0
    assert_model(target, mean(run, 4, 6))
    assert "belongs to the run in" in call(run, "--output", run / "checkpoints" / "mean").err
