"""`evaluate` in a recipe: tasks are scored inside a run, and leave its training as it is."""

from __future__ import annotations

import importlib.util
import os
import random
import signal
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard

from pldr_train.checkpoint.shards import OPTIMIZER, WEIGHTS, ShardReader
from pldr_train.errors import DataError, RecipeError
from pldr_train.fit import fit
from pldr_train.models.exporting import export_run
from pldr_train.models.extract_g import load_with_tokenizer
from pldr_train.recipe import recipe_from_dict
from pldr_train.report.charts import charts_of
from pldr_train.run import Run
from pldr_train.tasks.running import load_tasks, run_task
from tests.cli.test_evaluate_tasks import write_tasks
from tests.tiny import metric_lines, tiny_values

ITEMS = 4
METRICS = {"choice": ("acc", "acc_norm"), "cloze": ("acc", "perplexity"), "generate": ("exact_match",)}
TASKS = tuple(METRICS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tasks whose items fit into the context of a tiny run, but for one."""
    return write_tasks(tmp_path_factory, TASKS)[0]


def values_of(data: Path, runs: Path, evaluate: dict[str, Any] | None = None, **sections: Any) -> dict[str, Any]:
    lengths = {"max_steps": 10, "validate_every_steps": 2}
    values = tiny_values(data, runs, **({"trainer": lengths} | sections))
    return values if evaluate is None else values | {"evaluate": evaluate}


def scores_by_step(run: Path) -> dict[int, dict[str, float]]:
    lines = metric_lines(run)
    found = {line["step"]: {name: line[name] for name in line if name.startswith("eval/")} for line in lines}
    return {step: scores for step, scores in found.items() if scores}


def tensors_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    readers = [ShardReader(checkpoint, kind) for kind in (WEIGHTS, OPTIMIZER)]
    return {name: reader.whole(name) for reader in readers for name in reader.names}


class RandomStates(pl.Callback):
    """Keeps what the random generators would draw after each step."""

    def __init__(self) -> None:
        self.drawn: list[Any] = []

    def on_train_batch_start(self, *_: Any) -> None:
        state, numpy = random.getstate(), np.random.get_state(legacy=True)
        self.drawn.append((random.random(), np.random.rand(), torch.rand(1, generator=self._copy()).item()))
        random.setstate(state)
        np.random.set_state(numpy)

    @staticmethod
    def _copy() -> torch.Generator:
        return torch.Generator().set_state(torch.get_rng_state())


def test_tasks_are_scored_at_validations_and_the_training_stays_the_same(
    tiny_data: Path, tmp_path: Path, folder: Path
) -> None:
    evaluate = {
        "tasks": list(TASKS),
        "every_validations": 2,
        "limit": ITEMS,
        "scoring": "both",
        "tasks_dir": str(folder),
    }
    with_tasks, without = RandomStates(), RandomStates()
    fit(recipe_from_dict(values_of(tiny_data, tmp_path / "with", evaluate)), callbacks=[with_tasks])
    fit(recipe_from_dict(values_of(tiny_data, tmp_path / "without")), callbacks=[without])
    assert with_tasks.drawn == without.drawn
    run, other = tmp_path / "with" / "tiny", tmp_path / "without" / "tiny"

    scores = scores_by_step(run)
    assert list(scores) == [0, 4, 8, 10]
    names = {
        f"eval/{task}/{scoring}{metric}"
        for task, metrics in METRICS.items()
        for metric in metrics
        for scoring in ("", "block/")
    }
    assert all(found.keys() == names for found in scores.values())
    lines = [{name: line[name] for name in line if not name.startswith("eval/")} for line in metric_lines(run)]
    assert lines == metric_lines(other)
    mine, theirs = (tensors_of(each / "checkpoints" / "last") for each in (run, other))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)

    # They stand among the results of the run's card.
    export_run(run, tmp_path / "exported")
    results = ModelCard((tmp_path / "exported" / "README.md").read_text()).data.eval_results or ()
    shown = {each.metric_name: (each.dataset_name, each.metric_value) for each in results}
    assert all(shown[name] == (name.split("/")[1], scores[10][name]) for name in names)

    # The last ones are those that the command gives of the run's end.
    model, tokenizer = load_with_tokenizer(run)
    for name, task in load_tasks(TASKS, folder).items():
        for scoring, scored in run_task(model, tokenizer, name, task, limit=ITEMS).by_scoring.items():
            for metric, value in scored.values.items():
                named = f"eval/{name}/{'block/' if scoring == 'block' else ''}{metric}"
                assert scores[10][named] == pytest.approx(value, rel=1e-4)


def test_a_run_stopped_in_the_midst_of_a_task_goes_on_to_the_same_numbers(
    tiny_data: Path, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate = {"tasks": "choice", "limit": ITEMS, "tasks_dir": str(folder)}
    straight = recipe_from_dict(values_of(tiny_data, tmp_path / "straight", evaluate))
    fit(straight)
    from pldr_train.tasks import running

    calls, scored = [], running.run_task

    def stop_before_the_third(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return scored(*arguments, **options)

    monkeypatch.setattr(running, "run_task", stop_before_the_third)
    stopped = recipe_from_dict(values_of(tiny_data, tmp_path / "stopped", evaluate))
    outcome = fit(stopped)
    assert (outcome.step, outcome.stopped_by) == (4, "SIGTERM")
    assert list(scores_by_step(tmp_path / "stopped" / "tiny")) == [0, 2]
    assert fit(stopped).step == 10
    runs = [tmp_path / name / "tiny" for name in ("stopped", "straight")]
    assert metric_lines(runs[0]) == metric_lines(runs[1])
    mine, theirs = (tensors_of(run / "checkpoints" / "last") for run in runs)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_a_run_may_be_judged_by_a_task_where_it_is_scored(tiny_data: Path, tmp_path: Path, folder: Path) -> None:
    evaluate = {"tasks": ["cloze"], "every_validations": 2, "limit": ITEMS, "tasks_dir": str(folder)}
    metric = "eval/cloze/perplexity"
    # The perplexity falls, so that the largest is that of step 0.
    values = values_of(
        tiny_data,
        tmp_path,
        evaluate,
        trainer={
            "max_steps": 40,
            "validate_every_steps": 2,
            "early_stop": {"metric": metric, "mode": "max", "patience": 2},
        },
        checkpoint={"keep_best": {"metric": metric, "mode": "max"}, "keep_last": 1, "every_steps": 100},
    )
    outcome = fit(recipe_from_dict(values))
    perplexities = {step: scores[metric] for step, scores in scores_by_step(outcome.folder).items()}
    assert list(perplexities) == [0, 4, 8]
    assert outcome.step == 8
    assert outcome.ended_early is not None
    best = max((4, 8), key=lambda step: perplexities[step])
    assert {each.step for each in Run(outcome.folder).checkpoints} == {best, 8}


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"evaluate": {"tasks": ["chioce"]}}, r"evaluate\.tasks=chioce: no such task"),
        ({"evaluate": {"tasks": ["choice"], "tasks_dir": "/gone"}}, r"evaluate\.tasks_dir=/gone: no such folder"),
        (
            {"checkpoint": {"keep_best": {"metric": "eval/choice/f1"}}},
            r"checkpoint\.keep_best\.metric=eval/choice/f1: the tasks of evaluate\.tasks give eval/choice/acc, eval/c",
        ),
    ],
)
def test_what_cannot_be_scored_is_refused_before_the_first_step(
    tiny_data: Path,
    tmp_path: Path,
    folder: Path,
    sections: dict[str, Any],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from lm_eval.tasks import TaskManager

    from pldr_train.tasks import running

    own = TaskManager(include_path=str(folder), include_defaults=False)
    monkeypatch.setattr(running, "_stock_manager", lambda _: own)
    evaluate = {"tasks": ["choice"], "tasks_dir": str(folder)} | sections.pop("evaluate", {})
    with pytest.raises((DataError, RecipeError), match=message):
        fit(recipe_from_dict(values_of(tiny_data, tmp_path, evaluate, **sections)))
    assert not (tmp_path / "tiny" / "metrics.jsonl").exists()


def test_without_the_harness_a_run_with_tasks_does_not_begin(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lm_eval" else find_spec(name))
    recipe = recipe_from_dict(values_of(tiny_data, tmp_path, {"tasks": ["choice"]}))
    with pytest.raises(RecipeError, match=r"evaluate\.tasks=.*: needs lm-evaluation-harness.*pip install"):
        fit(recipe)
    assert not (tmp_path / "tiny" / "metrics.jsonl").exists()


def test_a_task_cannot_judge_a_run_that_is_not_scored_on_any() -> None:
    values = {"run": {"name": "a"}, "trainer": {"early_stop": {"metric": "eval/choice/acc", "mode": "max"}}}
    with pytest.raises(RecipeError, match=r"early_stop\.metric=eval/choice/acc: the score of a task, and evaluate\.ta"):
        recipe_from_dict(values | {"data": {"source": "quickstart"}})


def test_the_report_draws_the_tasks_of_a_metric_together() -> None:
    names = ("arc_easy/acc", "arc_easy/block/acc", "piqa/acc", "piqa/acc_norm")
    charts = charts_of(["val/loss", *(f"eval/{name}" for name in names)])
    found = {chart["title"]: (chart["section"], [line["label"] for line in chart["lines"]]) for chart in charts}
    assert found["acc of tasks"] == ("Tasks", ["arc_easy", "arc_easy, block", "piqa"])
    assert found["acc_norm of tasks"][0] == "Tasks"
