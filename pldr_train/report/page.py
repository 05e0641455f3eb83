"""The page: its data, one plain object of bounded size, and the HTML file, which needs nothing else."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import time
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from pldr_train import __version__
from pldr_train.metrics.catalog import VAL_CROSS_ENTROPY
from pldr_train.metrics.figures import COLUMNS
from pldr_train.recipe import name_without_seed, without_seed
from pldr_train.report.charts import charts_of
from pldr_train.report.health import health_of
from pldr_train.report.runs import Run

MOST_POINTS = 300_000
"""Of all curves together: about 7 MB."""
MOST_PAGE_BYTES = 20_000_000
"""What curves and texts leave of this is for the snapshots of all runs together."""
LEAST_SNAPSHOT_BYTES = 4_000_000
LIVE_SNAPSHOT_BYTES = 12_000_000
"""Of a live page, which asks for them each time that there is a new one."""
_SCRIPTS_BYTES = 100_000
_SEED = "run.seed"
_MOST_POINTS_OF_A_SERIES, _FEWEST_POINTS_OF_A_SERIES = 2000, 40
_ABSENT = "(not there)"


def content_of(runs: Sequence[Run], problems: Sequence[str], live: bool) -> dict[str, Any]:
    """Return everything that the page shows.

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
        "columns": [{"metric": each.metric, "label": each.label} for each in COLUMNS if each.metric in names],
        "order": VAL_CROSS_ENTROPY,
        "folds": _folds(runs),
        "recipe": _comparison([run.files.recipe for run in runs]),
        "environment": _comparison([run.files.environment for run in runs]),
    }


def page_parts(runs: Sequence[Run], problems: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the content of a page that is written, and the snapshots that fit beside it."""
    content = content_of(runs, problems, live=False)
    room = MOST_PAGE_BYTES - _SCRIPTS_BYTES - len(data_text(content))
    snapshots = snapshots_of(runs, max(LEAST_SNAPSHOT_BYTES, room))
    for run, shown in zip(runs, content["runs"], strict=True):
        shown["notes"] = run.notes()  # damaged snapshots are found only when they are read
    return content, snapshots


def snapshots_of(runs: Sequence[Run], most_bytes: float = LIVE_SNAPSHOT_BYTES) -> dict[str, Any]:
    """Return the matrices for the heatmaps by the run's name, apart from the rest: they are large and change seldom."""
    having = [run for run in runs if run.snapshots.count]
    made = {run.name: run.snapshots.as_plain(most_bytes / len(having)) for run in having}
    return {name: plain for name, plain in made.items() if plain is not None}


def _run(run: Run, points: int, most_series: int) -> dict[str, Any]:
    series = list(run.metrics.series.items())[:most_series]
    files = run.files
    return {
        "name": run.name,
        "folder": str(run.folder),
        "state": run.state,
        "step": run.metrics.last_step,
        "max_steps": files.max_steps,
        "stopped": None if run.state == "running" else files.stopped,
        "written_s": run.last_written_s(),
        "notes": run.notes(),
        "health": health_of(run.metrics.series, files.recipe),
        "snapshots": run.snapshots.count,
        "hours": run.metrics.hours.as_plain(points),
        "series": {name: each.as_plain(points) for name, each in series},
        "events": files.events,
        "samples": files.samples,
        "checkpoints": files.checkpoints,
        "recipe_text": files.recipe_text,
    }


def _folds(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return the runs that differ in their seed alone: `name` and `runs`, two or more; of one seed the first run."""
    groups: dict[frozenset[tuple[str, str]], dict[str, Run]] = {}
    for run in runs:
        recipe = run.files.recipe
        if _SEED in recipe:
            groups.setdefault(frozenset(without_seed(recipe).items()), {}).setdefault(recipe[_SEED], run)
    return [
        {
            "name": name_without_seed(first.name, first.files.recipe[_SEED]) or first.name,
            "runs": [run.name for run in by_seed.values()],
        }
        for by_seed in groups.values()
        for first in list(by_seed.values())[:1]
        if len(by_seed) > 1
    ]


def _comparison(sides: Sequence[dict[str, str]]) -> list[dict[str, Any]]:
    """Return each key with its value in every run and whether they differ; runs that have no such file differ in
    nothing.
    """
    keys = list(dict.fromkeys(key for side in sides for key in side))
    return [
        {
            "key": key,
            "values": [side.get(key, _ABSENT if side else "") for side in sides],
            "differs": len({side.get(key, _ABSENT) for side in sides if side}) > 1,
        }
        for key in keys
    ]


# ------------------------------------------------------------------------------------------------------------- the file

_SCRIPTS = (
    "format.js", "curves.js", "chart.js", "tables.js", "health.js", "matrix.js", "heatmap.js", "page.js",
)  # fmt: skip
_STYLES = ("page.css", "heatmap.css")


def render_page(content: Mapping[str, Any], snapshots: Mapping[str, Any] | None = None) -> str:
    """Return the whole page with its data."""
    names = ", ".join(run["name"] for run in content["runs"][:3]) + (", ..." if len(content["runs"]) > 3 else "")
    data = {"DATA": content, "SNAPSHOTS": snapshots or {}}
    title = f"{names} - pldr_train report"
    return assemble_page("page.html", title, _SCRIPTS, _STYLES, data, connects=bool(content["live"]))


def assemble_page(
    template: str,
    title: str,
    scripts: Sequence[str],
    styles: Sequence[str],
    data: Mapping[str, Mapping[str, Any]],
    connects: bool,
) -> str:
    """Put a page together from files of this package.

    Args:
        template: the body, with @@NAME@@ where a part belongs; the head is that of every page.
        title: of the page.
        scripts: their files, one after the other a single script.
        styles: likewise.
        data: what stands in the page as JSON, by name.
        connects: whether the page may ask the server that it came from.
    """
    style, script = ("\n".join(map(_packaged, names)) for names in (styles, scripts))
    connect = "'self'" if connects else "'none'"
    # Only these two texts may act: whatever slipped into the page from a file would be refused by the browser.
    policy = (
        f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; img-src data:; "
        f"connect-src {connect}; base-uri 'none'; form-action 'none'"
    )
    parts = {
        "TITLE": html.escape(title),
        "POLICY": html.escape(policy, quote=True).replace("&#x27;", "'"),
        "STYLE": style,
        "SCRIPT": script,
        **{name: data_text(content) for name, content in data.items()},
    }
    page = []
    for number, piece in enumerate((_packaged("head.html") + _packaged(template)).split("@@")):
        page.append(parts[piece] if number % 2 else piece)
    return "".join(page).encode("utf-8", errors="replace").decode("utf-8")


def data_text(content: Mapping[str, Any]) -> str:
    """JSON that can neither end the script element it stands in nor begin another."""
    text = json.dumps(content, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _packaged(name: str) -> str:
    return resources.files("pldr_train.report").joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
