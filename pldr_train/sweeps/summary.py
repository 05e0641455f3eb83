"""What a sweep found: each cell's mean and interval over seeds, cells against the baseline, effects of the axes.

Free of torch and Optuna but for the importances, which are Optuna's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean, stdev
from typing import Any

from pldr_train.metrics.catalog import TRAIN_CROSS_ENTROPY
from pldr_train.metrics.figures import COLUMNS, Column
from pldr_train.metrics.intervals import half_width_95
from pldr_train.sweeps.records import DONE, PRUNED, RUNNING
from pldr_train.sweeps.sweep import Cell, Sweep, Trial

_MOST_POINTS = 120
"""Of a curve."""


@dataclass(frozen=True)
class Spread:
    """A mean over seeds with its 95 % interval (Student's); with one value there is no interval."""

    values: tuple[float, ...]

    @property
    def count(self) -> int:
        """How many values."""
        return len(self.values)

    @property
    def mean(self) -> float:
        """Their mean."""
        return fmean(self.values)

    @property
    def deviation(self) -> float | None:
        """The sample's standard deviation."""
        return stdev(self.values) if self.count > 1 else None

    @property
    def half_width(self) -> float | None:
        """Of the interval about the mean."""
        return half_width_95(self.values)

    def as_plain(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {"n": self.count, "mean": self.mean, "sd": self.deviation, "half": self.half_width}


@dataclass(frozen=True)
class Paired:
    """Differences of a cell's trials from those of the baseline with the same seeds."""

    differences: Spread

    @property
    def effect(self) -> float | None:
        """The mean difference over the standard deviation of the differences (Cohen's d of pairs)."""
        deviation = self.differences.deviation
        return self.differences.mean / deviation if deviation else None

    def as_plain(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return self.differences.as_plain() | {"effect": self.effect}


class Summary:
    """What the trials of a sweep have at the moment of making.

    Args:
        sweep: the sweep.
    """

    def __init__(self, sweep: Sweep) -> None:
        self.sweep, self.spec = sweep, sweep.spec
        self.cells: list[Cell] = sweep.cells
        self.trials: list[Trial] = [trial for cell in self.cells for trial in cell.trials]
        known = {column.metric for column in COLUMNS}
        own = (Column(self.spec.metric, self.spec.metric, best=self.spec.goal[:3]),)
        wanted = (*COLUMNS, *(column for column in own if column.metric not in known))
        self._figures: dict[tuple[str, str], float | None] = {}
        self.columns = [each for each in wanted if any(self.figure(trial, each) is not None for trial in self.trials)]

    def figure(self, trial: Trial, column: Column) -> float | None:
        """Return a trial's figure, of finite values; None without any."""
        key = trial.name, column.metric
        if key not in self._figures:
            self._figures[key] = column.of(_points(trial, column.metric))
        return self._figures[key]

    def of_cell(self, cell: Cell, column: Column) -> Spread | None:
        """Return the mean over the cell's trials that are done; None without any."""
        return _spread(self.figure(trial, column) for trial in cell.trials if trial.state == DONE)

    @cached_property
    def baselines(self) -> dict[str, Cell]:
        """Return by cell's name the baseline that it is compared with; the baselines themselves are left out."""
        found = {}
        named = self.spec.baseline
        for cell in self.cells:
            rest = _rest(cell, named)
            partner = next((each for each in self.cells if each.is_baseline and _rest(each, named) == rest), None)
            if partner is not None and not cell.is_baseline:
                found[cell.name] = partner
        return found

    def paired(self, cell: Cell, column: Column) -> Paired | None:
        """Return the comparison of a cell with its baseline, over the seeds that are done in both."""
        partner = self.baselines.get(cell.name)
        if partner is None:
            return None
        theirs = {trial.seed: self.figure(trial, column) for trial in partner.trials if trial.state == DONE}
        own = ((self.figure(trial, column), theirs.get(trial.seed)) for trial in cell.trials if trial.state == DONE)
        spread = _spread(None if a is None or b is None else a - b for a, b in own)
        return None if spread is None else Paired(spread)

    def effect(self, axis: str, column: Column) -> dict[Any, Spread]:
        """Return the mean over all trials that are done, for each value of an axis."""
        groups: dict[Any, list[float | None]] = {}
        for trial in self.trials:
            if axis in trial.axes and trial.state == DONE:
                groups.setdefault(trial.axes[axis], []).append(self.figure(trial, column))
        spreads = {value: _spread(figures) for value, figures in groups.items()}
        return {value: spread for value, spread in spreads.items() if spread is not None}

    def importances(self) -> dict[str, float] | None:
        """Return how much each axis matters for the objective (Optuna's PED-ANOVA); None where it cannot say."""
        from pldr_train.sweeps.study import importances_of  # noqa: PLC0415, Optuna takes a while to import

        return importances_of(self.sweep, self.trials)

    def counts(self) -> dict[str, int]:
        """Return how many trials are in each state."""
        counted: dict[str, int] = {}
        for trial in self.trials:
            counted[trial.state] = counted.get(trial.state, 0) + 1
        return counted

    def curve(self, trial: Trial, metric: str) -> list[tuple[int, float]]:
        """Return a metric over a trial's steps, thinned out to at most 120 points; the last is always there."""
        points = _points(trial, metric)
        every = -(-len(points) // _MOST_POINTS)
        return points[:: every or 1] + (points[-1:] if every > 1 and (len(points) - 1) % every else [])

    def as_plain(self) -> dict[str, Any]:
        """Return everything for the page, as plain values."""
        axes = [axis.name for axis in self.sweep.axes]
        curves = [TRAIN_CROSS_ENTROPY, *(column.metric for column in self.columns if column.take != "median")]
        best = self.sweep.best_of(self.trials)
        return {
            "name": self.spec.name,
            "recipe": self.spec.recipe,
            "metric": self.spec.metric,
            "goal": self.spec.goal,
            "axes": {axis: _values_of(axis, self.cells) for axis in axes},
            "seeds": list(self.sweep.seeds),
            "counts": self.counts(),
            "planned": self.sweep.num_trials,
            "best": None if best is None else {"trial": best.name, "value": best.objective},
            "columns": [
                {"metric": each.metric, "label": each.label, "unit": each.unit, "best": each.best}
                for each in self.columns
            ],
            "cells": [self._plain_cell(cell) for cell in self.cells],
            "trials": [
                self._plain_trial(trial, number, curves)
                for number, cell in enumerate(self.cells)
                for trial in cell.trials
            ],
            "curves": curves,
            "importances": self.importances(),
        }

    def _plain_cell(self, cell: Cell) -> dict[str, Any]:
        spreads = {each.metric: self.of_cell(cell, each) for each in self.columns}
        compared = {each.metric: self.paired(cell, each) for each in self.columns}
        partner = self.baselines.get(cell.name)
        return {
            "name": cell.name,
            "axes": {axis: _shown(value) for axis, value in cell.axes.items()},
            "baseline": cell.is_baseline,
            "against": None if partner is None else partner.name,
            "figures": {name: each.as_plain() for name, each in spreads.items() if each is not None},
            "paired": {name: each.as_plain() for name, each in compared.items() if each is not None},
        }

    def _plain_trial(self, trial: Trial, cell: int, curves: Sequence[str]) -> dict[str, Any]:
        return {
            "name": trial.name,
            "cell": cell,
            "seed": trial.seed,
            "state": trial.state,
            "steps": trial.steps,
            "max_steps": trial.max_steps,
            "error": trial.error,
            "folder": str(trial.folder),
            "figures": {each.metric: self.figure(trial, each) for each in self.columns},
            "curves": {metric: points for metric in curves if (points := self.curve(trial, metric))},
            "unfinished": trial.state in (RUNNING, PRUNED),
        }


def _points(trial: Trial, metric: str) -> list[tuple[int, float]]:
    if metric not in trial.metrics:
        return []
    steps, values = trial.metrics.points(metric)
    pairs = zip(steps.tolist(), values.tolist(), strict=True)
    return [(step, value) for step, value in pairs if isinstance(value, float) and math.isfinite(value)]


def _spread(figures: Iterable[float | None]) -> Spread | None:
    values = tuple(each for each in figures if each is not None)
    return Spread(values) if values else None


def _rest(cell: Cell, named: Mapping[str, Any]) -> dict[str, Any]:
    return {axis: value for axis, value in cell.axes.items() if axis not in named}


def _values_of(axis: str, cells: Sequence[Cell]) -> list[Any]:
    """Return the values that an axis takes in the cells: numbers ascending, others in their order."""
    values = list(dict.fromkeys(_shown(cell.axes[axis]) for cell in cells if axis in cell.axes))
    return sorted(values) if all(isinstance(each, int | float) for each in values) else values


def _shown(value: Any) -> Any:
    """Return a value as the page groups by it: numbers and texts as they are, others as text."""
    if isinstance(value, bool) or value is None:
        return str(value).lower() if value is not None else "null"
    return value if isinstance(value, int | float | str) else str(value)
