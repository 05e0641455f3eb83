"""A run's folder as one clean W&B run, whatever it took to train it: metrics, heatmaps, histograms, samples, config."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pldr_train.errors import UserError
from pldr_train.metrics.catalog import STEP, TOKENS
from pldr_train.recipe.yaml_text import read_recipe_file
from pldr_train.runs.layout import METRICS_FILE, RECIPE_FILE, snapshot_files
from pldr_train.runs.metrics import MetricLines
from pldr_train.runs.snapshots import read_snapshot
from pldr_train.wandb_runs.media import log_matrices, log_samples, read_samples
from pldr_train.wandb_runs.opening import (
    Target,
    open_run,
    read_environment,
    record_folder,
    sync_command,
    tokens_per_step_of,
    told_to_the_user,
)


@dataclass(frozen=True)
class Replayed:
    """What a replay has written."""

    record: Path
    """The folder of W&B's files."""
    command: list[str]
    """Uploads them, if the run is offline."""
    url: str | None
    steps: int
    """Steps with metrics."""
    snapshots: int
    samples: int
    notes: list[str] = field(default_factory=list)
    """What was left out and why, a sentence each."""


def replay(folder: Path, target: Target) -> Replayed:
    """Write a W&B run out of a run's folder.

    Args:
        folder: the run's.
        target: where to.

    Raises:
        UserError: the folder holds no recipe or no metrics, or W&B refuses.
    """
    values = read_recipe_file(folder / RECIPE_FILE)
    try:
        lines = MetricLines(folder / METRICS_FILE)
    except OSError as error:
        raise UserError(f"{folder / 'metrics.jsonl'}: {error.strerror}; there is nothing to replay") from None
    samples, snapshots = read_samples(folder), snapshot_files(folder)
    notes: list[str] = []
    with told_to_the_user():
        run = open_run(target, folder, values, read_environment(folder))
        url = run.url if target.mode == "online" else None
        try:
            shown = _log_everything(run, lines, snapshots, samples, tokens_per_step_of(values), notes)
        except BaseException:
            run.finish(exit_code=1)
            raise
        run.finish()
    if lines.superseded:
        notes.append(f"{lines.superseded:,} steps stand twice, a resumed run wrote them again; the later lines count")
    if lines.left_out:
        notes.append(f"{lines.left_out:,} lines of metrics.jsonl are no whole JSON object with a step; left out")
    return Replayed(record_folder(run), sync_command(run), url, len(lines), shown, len(samples), notes)


def _log_everything(
    run: Any,
    lines: MetricLines,
    snapshots: Sequence[tuple[int, Path]],
    samples: Sequence[dict[str, Any]],
    tokens_per_step: int | None,
    notes: list[str],
) -> int:
    """Log all in the order of steps, for W&B takes no other; returns how many snapshots could be read."""
    metrics, pictures, texts = range(3)
    sources: tuple[Iterator[tuple[int, int, Any]], ...] = (
        ((step, metrics, numbers) for step, numbers in lines),
        ((step, pictures, path) for step, path in snapshots),
        ((step, texts, None) for step in sorted({each["step"] for each in samples})),
    )
    shown = 0
    for step, kind, content in heapq.merge(*sources, key=lambda each: each[:2]):
        if kind == metrics and content:
            axes = {STEP: step} | ({} if tokens_per_step is None else {TOKENS: step * tokens_per_step})
            run.log(axes | content, step=step)
        elif kind == pictures:
            try:
                matrices = read_snapshot(content)
            except (OSError, ValueError) as error:
                notes.append(f"{content.name} cannot be read ({error}); left out")
            else:
                log_matrices(run, matrices, step)
                shown += 1
        elif kind == texts:
            log_samples(run, samples, step)
    return shown
