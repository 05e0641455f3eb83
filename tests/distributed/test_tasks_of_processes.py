"""Tasks that a run of several processes is scored on, under every strategy: the scores of one process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pldr_train.recipe.yaml_text import to_yaml
from tests.cli.test_evaluate_tasks import DEFINITIONS, DOCUMENTS, write_task
from tests.cli.test_fit_distributed import Command
from tests.tiny import metric_lines, tiny_values

TASKS = ("choice", "cloze", "generate")


@pytest.fixture(scope="module")
def recipe(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "items.json"
    data.write_text("\n".join(map(json.dumps, DOCUMENTS)))
    for name in TASKS:
        write_task(folder, name, DEFINITIONS[name], data, folder / "cache")
    trainer = {"max_steps": 2, "validate_every_steps": 2}
    values = tiny_values(tiny_data, folder / "runs", trainer=trainer, optim={"warmup_steps": 1})
    values["evaluate"] = {"tasks": list(TASKS), "limit": 4, "scoring": "both", "tasks_dir": str(folder)}
    path = folder / "recipe.yaml"
    path.write_text(to_yaml(values))
    return path


def scores(recipe: Path, name: str, *overrides: str) -> dict[int, dict[str, float]]:
    command = Command(recipe, f"run.name={name}", *overrides, logs=recipe.parent / f"logs-{name}")
    command.ended(0)
    lines = metric_lines(recipe.parent / "runs" / name)
    found = {line["step"]: {key: line[key] for key in line if key.startswith("eval/")} for line in lines}
    return {step: values for step, values in found.items() if values}


@pytest.fixture(scope="module")
def alone(recipe: Path) -> dict[int, dict[str, float]]:
    return scores(recipe, "alone")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "more"),
    [("ddp", ()), ("fsdp", ()), ("deepspeed", ("parallel.zero_stage=3",))],
    ids=["ddp", "fsdp", "zero-3"],
)
def test_every_strategy_scores_as_one_process(
    strategy: str, more: tuple[str, ...], recipe: Path, alone: dict[int, dict[str, float]]
) -> None:
    found = scores(recipe, strategy, "trainer.devices=2", f"parallel.strategy={strategy}", *more)
    assert list(found) == list(alone) == [0, 2]
    for step, values in alone.items():
        assert found[step] == pytest.approx(values, rel=1e-3)
