"""What a run is judged by: the values that a metric took at its validations."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pldr_train.recipe import EarlyStopSection, JudgedSection, Recipe
from pldr_train.runs.layout import METRICS_FILE
from pldr_train.runs.metrics import finite_values


class Validations:
    """The finite values of metrics at a run's validations: read from its metrics once, then noted.

    Args:
        path: of the run's metrics; the file need not exist.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._values: dict[str, dict[int, float]] = {}

    def of(self, metric: str) -> dict[int, float]:
        """Return a metric's values by step. Raises OSError if the file cannot be read."""
        if metric not in self._values:
            self._values[metric] = finite_values(self._path, metric)
        return self._values[metric]

    def note(self, step: int, values: Mapping[str, Any]) -> None:
        """Add what a validation measured; its line stands in the file already."""
        for metric, known in self._values.items():
            if math.isfinite(values.get(metric, math.nan)):
                known[step] = values[metric]


def best_first(values: Mapping[int, float], judged: JudgedSection) -> list[int]:
    """Return the steps from that of the best value to that of the worst; of equal ones the later comes first."""
    return sorted(values, key=lambda step: (judged.sign * values[step], -step))


def early_end(settings: EarlyStopSection, values: Mapping[int, float]) -> str | None:
    """Return why a run ends after these validations; None if it goes on.

    Args:
        settings: the recipe's.
        values: of `settings.metric`, finite, by step.
    """
    best, since = None, 0
    for step in sorted(values):
        if best is None or settings.sign * (values[best] - values[step]) > settings.min_delta:
            best, since = step, 0
        else:
            since += 1
    if best is None or since < settings.patience:
        return None
    by = f" by more than {settings.min_delta:g}" if settings.min_delta else ""
    validations = "validation" if since == 1 else f"{since:,} validations"
    return (
        f"ended early: {settings.metric} has not improved{by} in the last {validations}, its best value is "
        f"{values[best]:.6g} at step {best:,}"
    )


def early_end_of(run: Path, recipe: Recipe, step: int) -> str | None:
    """Return why a run that was saved at a step ended before its last one; None if it goes on from there.

    Args:
        run: its folder.
        recipe: of its next start.
        step: of the newest checkpoint; later validations do not count.

    Raises:
        OSError: the metrics cannot be read.
    """
    settings = recipe.trainer.early_stop
    if settings is None or step >= recipe.trainer.max_steps:
        return None
    values = finite_values(run / METRICS_FILE, settings.metric)
    return early_end(settings, {validated: value for validated, value in values.items() if validated <= step})
