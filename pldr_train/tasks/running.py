"""Tasks of lm-evaluation-harness on a PLDR-LLM, in block and sequential scoring. Imports `lm_eval`."""

from __future__ import annotations

import contextlib
import difflib
import io
import logging
import math
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
from jinja2 import TemplateError
from lm_eval import evaluator
from lm_eval.tasks import TaskManager

from pldr_train.errors import DataError, UserError, first_line
from pldr_train.metrics.intervals import half_width_95
from pldr_train.model import PldrllmForCausalLM
from pldr_train.printing import can_show_a_bar
from pldr_train.published import PAPER_METRICS, PUBLISHED_RUNS, ZERO_SHOT_TASKS
from pldr_train.tasks.harness import HarnessModel
from pldr_train.tasks.scoring import SCORINGS, Scoring, is_causal

_log = logging.getLogger(__name__)

PAPER_GROUPS = ("papers", "pldrllm_zeroshot")
"""Names of the papers' eight tasks together."""
_BOTH_METRICS = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")]
_OVERRIDES: Mapping[str, Mapping[str, Any]] = {
    "social_iqa": {"metric_list": _BOTH_METRICS},
    "winogrande": {"metric_list": _BOTH_METRICS},
}
"""The papers' scores of these are acc_norm, which the stock tasks do not have."""
_FEWSHOT_SEED = 1234
_DEFINITION_ERRORS = (AssertionError, AttributeError, ImportError, KeyError, TypeError, SyntaxError, TemplateError)


@dataclass(frozen=True)
class Scored:
    """What one scoring of a task gave."""

    values: dict[str, float]
    """By metric, as lm-evaluation-harness aggregates them: fractions, perplexities, ..."""
    items: dict[str, list[float]]
    """The value of each item, of metrics that are their mean."""
    choices: dict[str, list[Any]]
    """What was chosen of each item: the candidate's number, whether a continuation was the likeliest, or a text."""
    truncated: int
    """Requests that lost their beginning."""


@dataclass(frozen=True)
class TaskScores:
    """A task's scores."""

    task: str
    output_type: str
    shots: int
    items: int
    requests: int
    by_scoring: dict[Scoring, Scored] = field(default_factory=dict)

    def metrics(self) -> list[str]:
        """Return the names of the metrics."""
        return list(next(iter(self.by_scoring.values())).values)


# ------------------------------------------------------------------------------------------------------------ loading


class Asked(NamedTuple):
    """Where tasks were named, for messages: what stands before a task's name, and before the folder's."""

    tasks: str = "--tasks "
    folder: str = "--tasks-dir "


_BY_OPTION = Asked()


def load_tasks(names: Sequence[str], folder: Path | None = None, asked: Asked = _BY_OPTION) -> dict[str, Any]:
    """Return tasks of lm-evaluation-harness by name, with their data sets; groups and tags become their tasks.

    Args:
        names: of tasks, groups and tags; `papers` is the papers' eight tasks.
        folder: with task files of one's own, whose names go before the stock ones.
        asked: where they were named.

    Raises:
        DataError: no such folder, a name that is none, or a task whose definition or data cannot be read.
    """
    if folder is not None and not folder.is_dir():
        raise DataError(f"{asked.folder}{folder}: no such folder; name one that holds YAML files of tasks")
    if not can_show_a_bar(sys.stderr):
        datasets.disable_progress_bars()
    wanted = [task for name in names for task in (ZERO_SHOT_TASKS if name in PAPER_GROUPS else (name,))]
    manager = _manager(wanted, folder)
    unknown = [name for name in wanted if name not in manager.task_index]
    if unknown:
        raise DataError(f"{asked.tasks}{unknown[0]}: {_unknown_text(unknown[0], manager.all_tasks)}")
    tasks: dict[str, Any] = {}
    for name in dict.fromkeys(wanted):
        for task_name, task in _load(manager, name, asked).items():
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            tasks.setdefault(task_name, task)
    return tasks


def _manager(names: Sequence[str], folder: Path | None) -> Any:
    """Return an index of tasks. That of the stock ones takes some ten seconds and is made only where it is needed."""
    if folder is not None:
        own = TaskManager(include_path=str(folder), include_defaults=False)
        if set(names) <= set(own.all_subtasks):
            return own
    _log.info("reading the index of lm-evaluation-harness's tasks")
    return _stock_manager(folder)


def _stock_manager(folder: Path | None) -> Any:
    return TaskManager(include_path=None if folder is None else str(folder))


def _unknown_text(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, [*known, *PAPER_GROUPS], n=3, cutoff=0.6)
    hint = f"did you mean {' or '.join(near)}?" if near else "name one of lm-evaluation-harness, or papers"
    return f"no such task, group or tag; {hint}"


def _load(manager: Any, name: str, asked: Asked) -> dict[str, Any]:
    overrides = _OVERRIDES.get(name)
    spec = name if overrides is None else {"group": f"{name}_of_the_papers", "task": [{"task": name, **overrides}]}
    try:
        found: dict[str, Any] = manager.load([spec])["tasks"]
    except _DEFINITION_ERRORS as error:
        raise DataError(
            f"{asked.tasks}{name}: its definition cannot be used ({first_line(error)}); correct it"
        ) from error
    except Exception as error:  # the libraries raise whatever their transports raise
        raise DataError(
            f"{asked.tasks}{name}: its data set cannot be read ({first_line(error)}); fetch it from the Hub while "
            "there is a network, or describe the task with files of your own in a folder for "
            f"{asked.folder.strip(' =')}"
        ) from error
    return found


# ------------------------------------------------------------------------------------------------------------ running


def run_task(
    model: PldrllmForCausalLM,
    tokenizer: Any,
    name: str,
    task: Any,
    scorings: Sequence[Scoring] = SCORINGS,
    limit: int | None = None,
    batch_size: int = 32,
    seed: int = 0,
    asked: Asked = _BY_OPTION,
    together: bool = False,
    quiet: bool = False,
) -> TaskScores:
    """Score a model on one task. With a G that reads no later token, one scoring gives both.

    Args:
        model: in eval mode.
        tokenizer: the model's, in transformers' form.
        name: of the task.
        task: from `load_tasks`.
        scorings: `block`, `sequential` or both.
        limit: items at most, the first ones; None: all.
        batch_size: sequences in a pass.
        seed: of tasks that draw.
        asked: where the task was named.
        together: all processes of a run score the same, and make equally many passes, as sharded weights need.
        quiet: log nothing.

    Raises:
        DataError: the task cannot be run on a text model, or a request does not fit it.
    """
    by_scoring: dict[Scoring, Scored] = {}
    items = requests = 0
    for scoring in scorings:
        if by_scoring and is_causal(model):
            by_scoring[scoring] = next(iter(by_scoring.values()))
            continue
        if not quiet:
            _log.info(f"{name}: {scoring} scoring")
        harness = HarnessModel(model, tokenizer, scoring, batch_size, together)
        found = _evaluate(harness, name, task, limit, seed, asked)
        samples = found["samples"][name]
        items, requests = len({each["doc_id"] for each in samples}), len(task.instances)
        by_scoring[scoring] = _scored(found["results"][name], samples, task, harness.truncated)
    shots = int(task.get_config("num_fewshot"))
    scores = TaskScores(name, str(task.OUTPUT_TYPE), shots, items, requests, by_scoring)
    truncated = truncation_text(scores, model)
    if truncated is not None and not quiet:
        _log.warning(truncated)
    return scores


def truncation_text(scores: TaskScores, model: PldrllmForCausalLM) -> str | None:
    """Return how many of a task's requests lost their beginning; None where all were whole."""
    truncated = max(each.truncated for each in scores.by_scoring.values())
    if not truncated:
        return None
    return (
        f"{scores.task}: {truncated:,} of {scores.requests:,} requests are longer than the model's context of "
        f"{model.config.max_position_embeddings} tokens and lost their beginning"
    )


def _evaluate(
    harness: HarnessModel, name: str, task: Any, limit: int | None, seed: int, asked: Asked
) -> dict[str, Any]:
    random.seed(seed)
    np.random.seed(seed % 2**32)  # the library draws from it
    torch.manual_seed(seed)
    task.set_fewshot_seed(seed=_FEWSHOT_SEED)
    try:
        # Its progress bars would hide the messages of this program.
        with contextlib.redirect_stderr(io.StringIO()):
            found: dict[str, Any] = evaluator.evaluate(
                harness, {"tasks": {name: task}}, limit=limit, bootstrap_iters=0, log_samples=True
            )
    except UserError as error:
        raise DataError(f"{asked.tasks}{name}: {error}") from error
    except (ValueError, KeyError, TemplateError) as error:
        raise DataError(
            f"{asked.tasks}{name}: it cannot be run ({first_line(error)}); leave it out or correct it"
        ) from error
    return found


def _scored(results: Mapping[str, Any], samples: Sequence[Mapping[str, Any]], task: Any, truncated: int) -> Scored:
    values: dict[str, float] = {}
    items: dict[str, list[float]] = {}
    choices: dict[str, list[Any]] = {}
    for key, value in results.items():
        metric, _, name_of_filter = key.partition(",")
        if not name_of_filter or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        shown = metric if name_of_filter == "none" else f"{metric}, {name_of_filter}"
        own = sorted((each for each in samples if each["filter"] == name_of_filter), key=lambda each: each["doc_id"])
        values[shown] = float(value)
        numbers = [float(each[metric]) for each in own if isinstance(each.get(metric), int | float | np.number)]
        if len(numbers) == len(own) and math.isclose(float(np.mean(numbers)), float(value), abs_tol=1e-9):
            items[shown] = numbers
        choices[shown] = [_choice(each, metric, task) for each in own]
    return Scored(values, items, choices, truncated)


def _choice(sample: Mapping[str, Any], metric: str, task: Any) -> Any:
    """Return what was chosen: by the metric's own measure of the candidates, where it has one."""
    responses = sample["filtered_resps"]
    if task.OUTPUT_TYPE == "multiple_choice":
        texts = task.doc_to_choice(sample["doc"])
        scores = np.array([log_likelihood for log_likelihood, _ in responses])
        if metric == "acc_mutual_info" and len(scores) == 2 * len(texts):
            scores = scores[: len(texts)] - scores[len(texts) :]
        return int(np.argmax(scores[: len(texts)] / _lengths(texts, metric)))
    if task.OUTPUT_TYPE == "loglikelihood":
        return bool(responses[0][1])
    return responses[0] if task.OUTPUT_TYPE == "generate_until" else None


def _lengths(texts: Sequence[str], metric: str) -> Any:
    measures: Mapping[str, Callable[[str], int]] = {"acc_norm": len, "acc_bytes": lambda text: len(text.encode())}
    return np.array([float(measures[metric](text)) for text in texts]) if metric in measures else 1.0


# ------------------------------------------------------------------------------------------------------------ results


def paired_difference(first: Sequence[float], second: Sequence[float]) -> dict[str, float | None]:
    """Return the mean of second - first over items, and its 95 % interval (Student's); no interval of one item."""
    differences = [theirs - ours for ours, theirs in zip(first, second, strict=True)]
    mean, half = fmean(differences), half_width_95(differences)
    return {"mean": mean, "low": None if half is None else mean - half, "high": None if half is None else mean + half}


def compare_tasks(first: Sequence[TaskScores], second: Sequence[TaskScores]) -> list[dict[str, Any]]:
    """Return second - first of each task, metric and scoring, in the order of `task_table`.

    Intervals are paired over items; a metric that is no mean over items, such as a perplexity, has none.

    Args:
        first: scores of a model.
        second: those of another one on the same items, in the same scorings.
    """
    rows = []
    for ours, theirs in zip(second, first, strict=True):
        for metric in ours.metrics():
            row: dict[str, Any] = {"task": ours.task, "metric": metric}
            row |= {name: _compare(theirs.by_scoring[name], own, metric) for name, own in ours.by_scoring.items()}
            rows.append(row)
    return rows


def _compare(first: Scored, second: Scored, metric: str) -> dict[str, float | None]:
    if metric in first.items and metric in second.items:
        return paired_difference(first.items[metric], second.items[metric])
    return {"mean": second.values[metric] - first.values[metric], "low": None, "high": None}


def task_table(scores: Sequence[TaskScores], published: str | None) -> list[dict[str, Any]]:
    """Return a row for each task and metric, in plain types.

    Args:
        scores: of the tasks.
        published: the recipe of a published run, whose figures stand beside; None: there are none.
    """
    return [_table_row(each, metric, published) for each in scores for metric in each.metrics()]


def _table_row(scores: TaskScores, metric: str, published: str | None) -> dict[str, Any]:
    row: dict[str, Any] = {"task": scores.task, "metric": metric, "items": scores.items, "shots": scores.shots}
    row |= {scoring: found.values[metric] for scoring, found in scores.by_scoring.items()}
    if len(scores.by_scoring) == 2:
        block, sequential = (scores.by_scoring[scoring] for scoring in SCORINGS)
        row["difference"] = _compare(block, sequential, metric)
        pairs = list(zip(block.choices[metric], sequential.choices[metric], strict=True))
        row["changed"] = None if scores.output_type == "loglikelihood_rolling" else sum(a != b for a, b in pairs)
    row["truncated_requests"] = max(each.truncated for each in scores.by_scoring.values())
    row["published"] = _published_figure(scores.task, metric, published)
    return row


def _published_figure(task: str, metric: str, published: str | None) -> float | None:
    results = None if published is None else PUBLISHED_RUNS[published].results
    if results is None or task not in ZERO_SHOT_TASKS or metric != PAPER_METRICS[task]:
        return None
    return results.zero_shot[ZERO_SHOT_TASKS.index(task)] / 100


def averages(table: Sequence[Mapping[str, Any]], published: str | None) -> list[dict[str, Any]]:
    """Return Avg0, Avg1 and Avg2, of which all tasks were scored: plain means of the papers' metrics."""
    found = {row["task"]: row for row in table if row["metric"] == PAPER_METRICS.get(row["task"])}
    results = None if published is None else PUBLISHED_RUNS[published].results
    rows = []
    for number in range(3):
        tasks = ZERO_SHOT_TASKS[: 6 + number]
        if all(task in found for task in tasks):
            scorings = [scoring for scoring in SCORINGS if scoring in found[tasks[0]]]
            row: dict[str, Any] = {"average": f"Avg{number}", "tasks": len(tasks)}
            row |= {scoring: sum(found[task][scoring] for task in tasks) / len(tasks) for scoring in scorings}
            row["published"] = None if results is None else results.average(number) / 100
            rows.append(row)
    return rows
