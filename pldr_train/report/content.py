"""What the page is given: one plain object, of bounded size."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from pldr_train import __version__
from pldr_train.report.charts import charts_of
from pldr_train.report.runs import Run

MOST_POINTS = 300_000
"""Of all curves together: about 7 MB."""
_MOST_POINTS_OF_A_SERIES, _FEWEST_POINTS_OF_A_SERIES = 2000, 40
_ABSENT = "(not there)"


def content_of(runs: Sequence[Run], problems: Sequence[str], live: bool) -> dict[str, Any]:
    """Everything that the page shows.

    Args:
        runs: as read so far.
        problems: what cannot be shown, a sentence each.
        live: whether the page is to ask for news.
    """
    count = sum(len(run.metrics.series) for run in runs)
    points = max(_FEWEST_POINTS_OF_A_SERIES, min(_MOST_POINTS_OF_A_SERIES, MOST_POINTS // max(1, count)))
    most_series = MOST_POINTS // _FEWEST_POINTS_OF_A_SERIES
    problems = list(problems)
    if count > most_series:
        problems.append(f"{count:,} curves; the first {most_series:,} are shown, name fewer runs to see the others")
    shown = []
    for run in runs:
        shown.append(_run(run, points, most_series))
        most_series -= len(shown[-1]["series"])
    names = list(dict.fromkeys(name for run in shown for name in run["series"]))
    return {
        "format": 1,
        "version": __version__,
        "made_s": time.time(),
        "live": live,
        "problems": problems,
        "runs": shown,
        "charts": charts_of(names),
        "recipe": _comparison([run.files.recipe for run in runs]),
        "environment": _comparison([run.files.environment for run in runs]),
    }


def _run(run: Run, points: int, most_series: int) -> dict[str, Any]:
    series = list(run.metrics.series.items())[:most_series]
    files = run.files
    return {
        "name": run.name,
        "folder": str(run.folder),
        "state": run.state,
        "step": run.metrics.last_step,
        "max_steps": files.max_steps,
        "written_s": run.last_written_s(),
        "notes": run.notes(),
        "series": {name: each.as_plain(points) for name, each in series},
        "events": files.events,
        "samples": files.samples,
        "checkpoints": files.checkpoints,
        "recipe_text": files.recipe_text,
    }


def _comparison(sides: Sequence[dict[str, str]]) -> list[dict[str, Any]]:
    """Each key with its value in every run and whether they differ; runs that have no such file differ in nothing."""
    keys = list(dict.fromkeys(key for side in sides for key in side))
    return [
        {
            "key": key,
            "values": [side.get(key, _ABSENT if side else "") for side in sides],
            "differs": len({side.get(key, _ABSENT) for side in sides if side}) > 1,
        }
        for key in keys
    ]
