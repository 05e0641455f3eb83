"""The work of `pldr-train evaluate --tasks`: opens the model and the tasks, scores, prints and writes."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pldr_train.commands.evaluate import REQUESTS_IN_A_PASS, STDOUT, task_names
from pldr_train.commands.evaluation import move_model
from pldr_train.data.files import write_file_atomically
from pldr_train.models.evaluating import describe_model
from pldr_train.models.extract_g import load_tokenizer_of, load_with_tokenizer
from pldr_train.models.loading import find_checkpoint
from pldr_train.models.scoring import SCORINGS, Scoring
from pldr_train.models.tasks import TaskScores, averages, load_tasks, run_task, task_table
from pldr_train.printing import log_to_terminal
from pldr_train.published import published_as
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
    load_tokenizer_of(options.source)  # a mistake here should not cost the loading of data sets
    tasks = load_tasks(task_names(options), options.tasks_dir)
    scorings: Sequence[Scoring] = SCORINGS if options.scoring == "both" else (options.scoring,)
    values = _score_model(options, options.source, tasks, scorings)
    text = json.dumps(values, indent=1) + "\n"
    if options.json == STDOUT:
        print(text, end="")
        return
    print(task_text(values))
    if options.json is not None:
        write_file_atomically(options.json, text.encode(), fix="name another file")


def _score_model(
    options: argparse.Namespace, source: Path, tasks: Mapping[str, Any], scorings: Sequence[Scoring]
) -> dict[str, Any]:
    """Return all figures of a model, in plain types."""
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
    return {
        "model": describe_model(model),
        "scorings": list(scorings),
        "limit": options.limit,
        "tasks": table,
        "averages": averages(table, published),
        "published": published,
        "notes": {name: note for name, note in NOTES.items() if name in tasks},
        "source": {
            "path": str(source),
            "checkpoint": None if checkpoint is None else str(checkpoint.folder),
            "step": None if checkpoint is None else checkpoint.step,
            "rows_of": f"tasks of lm-evaluation-harness {version('lm_eval')}",
            "device": str(device),
            "seed": options.seed,
        },
    }


# -------------------------------------------------------------------------------------------------------------- shown


def task_text(found: Mapping[str, Any]) -> str:
    """Return the scores of tasks as a table, for people, and what to know of them."""
    source, model, table = found["source"], found["model"], found["tasks"]
    step = "" if source["step"] is None else f", step {source['step']:,}"
    gram = "" if model["gram_chunk_size"] is None else f", causal Gram of chunks of {model['gram_chunk_size']} tokens"
    limit = "" if found["limit"] is None else f"; at most the first {found['limit']:,} items of each"
    has_published = any(row["published"] is not None for row in table)
    lines = [
        f"model    {source['path']}{step}: {model['parameters']:,} parameters, G {model['G']}{gram}",
        f"tasks    {source['rows_of']}{limit}",
        "",
        *_table(found, has_published),
    ]
    if has_published:
        lines += ["", f"published: of {found['published']}, in block scoring, 0-shot"]
    if len(found["scorings"]) == 2 and model["is_causal"]:
        lines += ["", "G reads no later token, so block and sequential scores are the same by its making"]
    notes = [f"{name}: {note}" for name, note in found["notes"].items()]
    return "\n".join([*lines, *(["", *notes] if notes else [])])


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
        scale = 100 if row["metric"].startswith(_FRACTIONS) else 1
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
