"""The work of `pldr-train evaluate --tasks`: opens the model and the tasks, scores, prints and writes."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pldr_train.commands.comparison import model_lines, side_by_side
from pldr_train.commands.evaluate import REQUESTS_IN_A_PASS, task_names
from pldr_train.commands.evaluation import model_line, move_model, show, source_values
from pldr_train.models.evaluating import describe_model
from pldr_train.models.extract_g import load_tokenizer_of, load_with_tokenizer
from pldr_train.models.loading import find_checkpoint
from pldr_train.printing import log_to_terminal
from pldr_train.published import published_as
from pldr_train.tasks.running import TaskScores, averages, compare_tasks, load_tasks, run_task, task_table
from pldr_train.tasks.scoring import SCORINGS, Scoring
from pldr_train.training.quiet import quiet_libraries

_FRACTIONS = ("acc", "exact_match")
"""Metrics that are shown in per cent, by how their names begin."""
NOTES: Mapping[str, str] = {
    "truthfulqa_mc2": "a model near chance scores 48 to 50 % here, above better models' 43 to 45, so Avg2 flatters it",
    "winogrande": "the candidates are contexts, so acc_norm divides by the length of what is not predicted",
}
"""What to know of a task's figures."""


def score_tasks(options: argparse.Namespace) -> None:
    """Score the tasks that the options name, print a table, and write JSON."""
    quiet_libraries()
    log_to_terminal(stream="stderr")
    sources = [options.source, *options.compare]
    for source in sources:
        load_tokenizer_of(source)  # a mistake here should not cost the loading of data sets
    tasks = load_tasks(task_names(options), options.tasks_dir)
    scorings: Sequence[Scoring] = SCORINGS if options.scoring == "both" else (options.scoring,)
    # One after the other, so that memory holds one model.
    found = [_score_model(options, source, tasks, scorings) for source in sources]
    models = [values for values, _ in found]
    if not options.compare:
        show(models[0], task_text, options.json)
        return
    comparisons = [
        {"path": str(source), "differences": compare_tasks(found[0][1], scores)}
        for source, (_, scores) in zip(sources[1:], found[1:], strict=True)
    ]
    values = {"source": models[0]["source"], "models": models, "comparisons": comparisons}
    show(values, _comparison_text, options.json)


def _score_model(
    options: argparse.Namespace, source: Path, tasks: Mapping[str, Any], scorings: Sequence[Scoring]
) -> tuple[dict[str, Any], list[TaskScores]]:
    """Return all figures of a model, in plain types, and its scores."""
    checkpoint = find_checkpoint(source)
    model, tokenizer = load_with_tokenizer(source)
    device = move_model(model, options.device)
    batch_size = options.batch_size or REQUESTS_IN_A_PASS
    scores: list[TaskScores] = [
        run_task(model, tokenizer, name, task, scorings, options.limit, batch_size, options.seed)
        for name, task in tasks.items()
    ]
    published = published_as(str(source))
    table = task_table(scores, published)
    values = {
        "model": describe_model(model),
        "scorings": list(scorings),
        "limit": options.limit,
        "tasks": table,
        "averages": averages(table, published),
        "published": published,
        "notes": {name: note for name, note in NOTES.items() if name in tasks},
        "source": source_values(
            options, source, checkpoint, f"tasks of lm-evaluation-harness {version('lm_eval')}", device
        ),
    }
    return values, scores


# -------------------------------------------------------------------------------------------------------------- shown


def task_text(found: Mapping[str, Any]) -> str:
    """Return the scores of tasks as a table, for people, and what to know of them."""
    has_published = any(row["published"] is not None for row in found["tasks"])
    lines = [
        model_line(found),
        _tasks_line(found),
        "",
        *_table(found, has_published),
    ]
    if has_published:
        lines += ["", f"published: of {found['published']}, in block scoring, 0-shot"]
    if len(found["scorings"]) == 2 and found["model"]["is_causal"]:
        lines += ["", "G reads no later token, so block and sequential scores are the same by its making"]
    return "\n".join([*lines, *_notes(found)])


def _comparison_text(found: Mapping[str, Any]) -> str:
    """Return the scores of several models on tasks, for people."""
    models = found["models"]
    labels, figures, differences = ["task, metric, items, scoring"], [], []
    for number, row in enumerate(models[0]["tasks"]):
        for scoring in models[0]["scorings"]:
            labels.append(f"{row['task']}, {row['metric']}, {row['items']:,}, {scoring}")
            figures.append([_score(each["tasks"][number][scoring], _scale(row)) for each in models])
            differences.append(
                [_difference(each["differences"][number][scoring], _scale(row)) for each in found["comparisons"]]
            )
    for number, row in enumerate(models[0]["averages"]):
        for scoring in models[0]["scorings"]:
            labels.append(f"{row['average']}, of {row['tasks']} tasks, {scoring}")
            own = [each["averages"][number][scoring] for each in models]
            figures.append([_score(each, 100) for each in own])
            differences.append([f"{100 * (each - own[0]):+.2f}" for each in own[1:]])
    table = side_by_side(labels, figures, differences)
    paired = "intervals are paired over items"
    return "\n".join([*model_lines(models), _tasks_line(models[0]), "", *table, "", paired, *_notes(models[0])])


def _tasks_line(found: Mapping[str, Any]) -> str:
    limit = "" if found["limit"] is None else f"; at most the first {found['limit']:,} items of each"
    return f"tasks    {found['source']['rows_of']}{limit}"


def _notes(found: Mapping[str, Any]) -> list[str]:
    notes = [f"{name}: {note}" for name, note in found["notes"].items()]
    return ["", *notes] if notes else []


def _scale(row: Mapping[str, Any]) -> float:
    return 100 if row["metric"].startswith(_FRACTIONS) else 1


def _table(found: Mapping[str, Any], has_published: bool) -> list[str]:
    scorings, both = found["scorings"], len(found["scorings"]) == 2
    names = [row["task"] for row in found["tasks"]] + ["Avg0"]
    width = max(map(len, names))
    head = [f"{'task':<{width}} {'metric':<16} {'items':>7}", *(f"{each:>10}" for each in scorings)]
    if both:
        head += [f"{'difference, 95 % interval':>27}", f"{'changed':>8}"]
    if has_published:
        head.append(f"{'published':>10}")
    lines = [" ".join(head)]
    for row in found["tasks"]:
        scale = _scale(row)
        cells = [f"{row['task']:<{width}} {row['metric']:<16} {row['items']:>7,}"]
        cells += [_score(row[each], scale) for each in scorings]
        if both:
            changed = row["changed"]
            cells += [f"{_difference(row['difference'], scale):>27}", f"{'-' if changed is None else changed:>8}"]
        if has_published:
            cells.append(_score(row["published"], scale))
        lines.append(" ".join(cells))
    for row in found["averages"]:
        cells = [f"{row['average']:<{width}} {'of ' + str(row['tasks']):<16} {'':>7}"]
        cells += [_score(row[each], 100) for each in scorings]
        if both:
            cells += [f"{100 * (row['sequential'] - row['block']):>+27.2f}", f"{'':>8}"]
        if has_published:
            cells.append(_score(row["published"], 100))
        lines.append(" ".join(cells))
    return lines


def _score(value: float | None, scale: float) -> str:
    return f"{'-':>10}" if value is None else f"{scale * value:>10.2f}"


def _difference(found: Mapping[str, float | None], scale: float) -> str:
    values = [value for name in ("mean", "low", "high") if (value := found[name]) is not None]
    mean, *ends = (f"{scale * value:+.2f}" for value in values)
    return f"{mean} ({', '.join(ends) or 'no interval'})"
