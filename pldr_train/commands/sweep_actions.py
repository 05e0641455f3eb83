"""What `pldr-train sweep` does: run, status, stop, retry, one trial, and the export to W&B."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pldr_train.errors import UserError
from pldr_train.launching import num_cores
from pldr_train.metrics.catalog import TOKENS_PER_S
from pldr_train.metrics.throughput import count_parameters, flops_per_token
from pldr_train.printing import duration_text, printable, printable_text
from pldr_train.runs.layout import WANDB_FILE
from pldr_train.sweeps.checks import check_before_run
from pldr_train.sweeps.processes import Workers, choose_workers
from pldr_train.sweeps.records import (
    FAILED,
    PRUNED,
    RUNNING,
    STATES,
    TRIAL_RECIPE,
    WAITING,
    ask_to_stop,
    locked,
    write_record,
)
from pldr_train.sweeps.sweep import Sweep, Trial, trial_recipe_text
from pldr_train.sweeps.wandb_sweep import planned_of_words, wandb_sweep_yaml

_MATRIX, _PRODUCTS = 512, 50
"""The fastest of so many products counts: other programs disturb the others."""
_SHARE_IN_TRAINING = 0.2
"""Measured with the shipped sweeps' model on two cores."""


def run_sweep(options: argparse.Namespace) -> int:
    """Run a sweep, or list its trials."""
    overrides = {} if options.devices_per_trial is None else {"trainer.devices": options.devices_per_trial}
    sweep = Sweep(options.spec, overrides)
    workers = choose_workers(sweep.base, options.workers, options.devices_per_trial or sweep.base.trainer.devices)
    if options.dry_run:
        print("\n".join(_dry_run(sweep, workers)))
        return 0
    check_before_run(sweep)
    if options.retry_failed:
        _set_back(sweep, [trial for trial in sweep.trials if trial.state == FAILED])
    # Imported here: Optuna takes a while.
    from pldr_train.sweeps.runner import Runner  # noqa: PLC0415
    from pldr_train.sweeps.study import Study  # noqa: PLC0415

    study = Study(sweep, options.storage)
    _say(f"sweep {sweep.spec.name}: {_counts(sweep)}, in {sweep.folder}; {workers.text}")
    for name in sweep.strangers:
        _say(f"note: {sweep.folder / name} is no trial of {sweep.path} any more; it is left as it is")
    code = Runner(sweep, study, workers, not options.no_wait, _say).run()
    failed = [trial for trial in sweep.trials if trial.state == FAILED]
    if failed:
        _say(f"{len(failed)} trials failed; try them again with: pldr-train sweep retry {options.spec}")
    return code


def _say(text: str) -> None:
    print(printable(text), flush=True)


def _counts(sweep: Sweep) -> str:
    counts = Counter(trial.state for trial in sweep.trials)
    counts[WAITING] += sweep.num_to_draw * len(sweep.seeds)
    listing = ", ".join(f"{counts[state]} {state}" for state in STATES if counts[state])
    return f"{sweep.num_trials} trials ({listing})"


# ------------------------------------------------------------------------------------------------------------ dry run


def _dry_run(sweep: Sweep, workers: Workers) -> Iterator[str]:
    trials = sweep.trials
    if not trials:
        yield f"{sweep.num_trials} trials, drawn one after the other by the results of those before them"
        yield from (f"axis {axis.name}: {_axis_text(sweep, axis.name)}" for axis in sweep.axes)
        return
    speed = _tokens_per_s(trials)
    flops_per_s = None if speed is not None or workers.gpus else _core_flops_per_s()
    rows = [("trial", "parameters", "tokens", "time")]
    total = 0.0
    for trial in trials:
        tokens = trial.max_steps * trial.tokens_per_step
        seconds = None
        if speed is not None:
            seconds = tokens / speed
        elif flops_per_s is not None:
            threads = (trial.recipe.trainer.threads or workers.threads) * workers.devices
            seconds = _flops(trial) / (flops_per_s * threads)
        total += seconds or 0.0
        words = "unknown" if seconds is None else duration_text(seconds)
        rows.append((trial.name, f"{count_parameters(trial.recipe.model):,}", f"{tokens:,}", words))
    yield from _table(rows)
    tokens = sum(trial.max_steps * trial.tokens_per_step for trial in trials)
    yield f"{len(trials)} trials, {tokens:,} tokens in all, {workers.text}; their folder: {sweep.folder}"
    if not total:
        yield "time: unknown before a trial has trained; then it follows from the trials' own speed"
        return
    by = (
        "the trials' speed so far"
        if speed is not None
        else "this machine's matrix products (rough; the trials' own speed will say it)"
    )
    yield f"time: about {duration_text(total / workers.number)}, by {by}"


def _flops(trial: Trial) -> float:
    recipe = trial.recipe
    per_token = flops_per_token(recipe.model, recipe.data.context_length, dag_tensors=len(recipe.dag.trained))
    return float(per_token.total) * trial.max_steps * trial.tokens_per_step


def _core_flops_per_s() -> float:
    """Return what a core makes of its speed in a small model's training: a share of that of its matrix products."""
    matrix = np.ones((_MATRIX, _MATRIX), dtype=np.float32)
    best = float("inf")
    for _ in range(_PRODUCTS):
        began = time.perf_counter()
        matrix @ matrix
        best = min(best, time.perf_counter() - began)
    return _SHARE_IN_TRAINING * 2 * _MATRIX**3 / best / num_cores()


def _axis_text(sweep: Sweep, name: str) -> str:
    return json.dumps(sweep.spec.axes[name])


def _tokens_per_s(trials: Sequence[Trial]) -> float | None:
    """Return the median speed of trials that have trained."""
    speeds = [
        statistics.median(values)
        for trial in trials
        if TOKENS_PER_S in trial.metrics and (values := trial.metrics.points(TOKENS_PER_S)[1].tolist())
    ]
    return statistics.median(speeds) if speeds else None


def _table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        first, *others = zip(row, widths, strict=True)
        yield "  ".join([f"{first[0]:<{first[1]}}", *(f"{text:>{width}}" for text, width in others)]).rstrip()


# ------------------------------------------------------------------------------------------------------------- status


def show_status(options: argparse.Namespace) -> int:
    """Print how the trials stand."""
    sweep = Sweep(options.spec)
    if options.json:
        print(json.dumps(_status(sweep), indent=1))
        return 0
    trials = sweep.trials
    rows = [("trial", "state", "steps", sweep.spec.metric)]
    for trial in trials:
        value = "" if trial.objective is None else f"{trial.objective:.5g}"
        rows.append((trial.name, trial.state, f"{trial.steps:,} of {trial.max_steps:,}", value))
    print("\n".join(_table(rows)))
    for trial in trials:
        if trial.error:
            print(f"\n{trial.name} failed ({trial.log}):\n  " + printable_text(trial.error.replace("\n", "\n  ")))
    print(f"\n{sweep.spec.name}: {_counts(sweep)}, in {sweep.folder}")
    best = sweep.best
    if best is not None:
        print(f"best: {best.name}, {sweep.spec.metric} {best.objective:.5g}")
    if sweep.strangers:
        print(f"no trials of this spec any more: {', '.join(sweep.strangers)}")
    return 0


def _status(sweep: Sweep) -> dict[str, Any]:
    trials = sweep.trials
    best = sweep.best
    return {
        "name": sweep.spec.name,
        "folder": str(sweep.folder),
        "metric": sweep.spec.metric,
        "goal": sweep.spec.goal,
        "num_trials": sweep.num_trials,
        "counts": {state: sum(trial.state == state for trial in trials) for state in STATES},
        "best": None if best is None else best.name,
        "trials": [
            {
                "name": trial.name,
                "axes": dict(trial.axes),
                "seed": trial.seed,
                "state": trial.state,
                "steps": trial.steps,
                "max_steps": trial.max_steps,
                "objective": trial.objective,
                "error": trial.error,
                "started_s": trial.started_s,
                "ended_s": trial.ended_s,
                "starts": trial.record.starts,
                "folder": str(trial.folder),
            }
            for trial in trials
        ],
    }


# --------------------------------------------------------------------------------------------------- stop, retry, one


def stop_sweep(options: argparse.Namespace) -> int:
    """Ask all runners to stop."""
    sweep = Sweep(options.spec)
    running = [trial for trial in sweep.trials if trial.state == RUNNING]
    if not sweep.folder.is_dir():
        raise UserError(f"{sweep.folder}: no such folder; the sweep has not begun, there is nothing to stop")
    ask_to_stop(sweep.folder)
    what = f"{len(running)} trials run; their runners save them and leave" if running else "no trial runs at the moment"
    print(f"asked all runners of {sweep.spec.name} to stop: {what}")
    print(f"go on with: pldr-train sweep run {options.spec}")
    return 0


def retry_trials(options: argparse.Namespace) -> int:
    """Set failed or pruned trials back to waiting."""
    sweep = Sweep(options.spec)
    trials = {trial.name: trial for trial in sweep.trials}
    problems = []
    for name in options.trials:
        if name not in trials:
            problems.append(f"{name}: no such trial of {options.spec}; `pldr-train sweep status` lists them")
        elif trials[name].state not in (FAILED, PRUNED):
            problems.append(f"{name}: is {trials[name].state}; only failed and pruned trials are retried")
    if problems:
        raise UserError("\n".join(problems))
    chosen = [trials[name] for name in options.trials] or [each for each in trials.values() if each.state == FAILED]
    _set_back(sweep, chosen)
    print(f"{len(chosen)} trials wait again; run them with: pldr-train sweep run {options.spec}")
    return 0


def _set_back(sweep: Sweep, trials: Sequence[Trial]) -> None:
    with locked(sweep.folder / ".lock"):
        for trial in trials:
            record = trial.record.changed(state=WAITING, error=None, retries=trial.record.retries + 1)
            write_record(trial.folder, record)


def run_one(options: argparse.Namespace) -> int:
    """Become the `fit` of one trial."""
    sweep = Sweep(options.spec)
    planned = planned_of_words(sweep, options.values)
    folder = sweep.folder / planned.name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / TRIAL_RECIPE).write_text(trial_recipe_text(planned), encoding="utf-8")
    if sweep.record(planned) is None:
        write_record(folder, sweep.trial(planned, is_running=False).record)
    _take_over_wandb_run(folder)
    command = [sys.executable, "-m", "pldr_train", "fit", str(folder / TRIAL_RECIPE)]
    os.execv(sys.executable, command)


def _take_over_wandb_run(folder: Path) -> None:
    """Let the trial be the run that W&B's agent has opened for it."""
    run_id = os.environ.get("WANDB_RUN_ID")
    if os.environ.get("WANDB_SWEEP_ID") and run_id and not (folder / WANDB_FILE).exists():
        (folder / WANDB_FILE).write_text(json.dumps({"id": run_id}) + "\n", encoding="utf-8")


def export_wandb(options: argparse.Namespace) -> int:
    """Write the sweep for W&B's agents."""
    sweep = Sweep(options.spec)
    text = wandb_sweep_yaml(sweep, options.spec)
    if options.out is None:
        print(text, end="")
        return 0
    options.out.write_text(text, encoding="utf-8")
    print(f"wrote {options.out}; begin it with: wandb sweep {options.out}")
    return 0
