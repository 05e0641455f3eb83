"""How long the report of a long run takes to write, and to open in a real Chromium.

The run is made up: 250,000 steps of a model with ten layers of 14 heads, every metric that such a run writes at each
validation (every 5,000 steps), 50 snapshots of A, A_LM, A_P and G_LM; its metrics are logged every 2,000 steps, and
once more every 10 steps, then without those of single layers' deductive outputs. Opened means from the address to all
drawn that is in sight, in a browser that has just been started. Bar: 3 s.

    python benchmarks/bench_report.py [--repeats 5] [--folder DIR] [--picture FILE]
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from pldr_train.commands.report import write_page
from pldr_train.metrics.catalog import GPU_ONLY, all_metrics
from pldr_train.metrics.declaration import AT_LOG_STEPS, AT_VALIDATIONS
from pldr_train.metrics.layer_metrics import DEDUCTIVE
from pldr_train.report.runs import open_runs
from tests.browser import find_browser, opened_tab
from tests.report_runs import write_snapshots

STEPS, LAYERS, HEADS, SIDE, SNAPSHOTS = 250_000, 10, 14, 64, 50
VALIDATED_EVERY = 5_000


def metric_texts(every: int, layers_deductive: bool) -> Iterator[str]:
    """The lines of metrics.jsonl, curves that wander."""
    infos = [info for info in all_metrics(LAYERS) if info.name not in GPU_ONLY | {"step"}]
    logged = [
        info.name for info in infos
        if info.cadence == AT_LOG_STEPS and (layers_deductive or not info.name.startswith(f"{DEDUCTIVE}/layer_"))
    ]  # fmt: skip
    at_validations = [*logged, *(info.name for info in infos if info.cadence == AT_VALIDATIONS)]
    chance = random.Random(1)
    values = {name: chance.uniform(0.5, 2) for name in at_validations}
    for step in sorted({*range(0, STEPS + 1, every), *range(0, STEPS + 1, VALIDATED_EVERY)}):
        names = logged if step % VALIDATED_EVERY else at_validations
        for name in names:
            values[name] *= 1 + 0.01 * chance.gauss(0, 1)
        yield json.dumps({"step": step, **{name: values[name] for name in names}}) + "\n"


def make_run(folder: Path, every: int, layers_deductive: bool) -> None:
    """A run's folder; the snapshots of another are taken if there is one beside it."""
    folder.mkdir(parents=True)
    with (folder / "metrics.jsonl").open("w") as file:
        file.writelines(metric_texts(every, layers_deductive))
    (folder / "recipe.yaml").write_text(f"trainer: {{max_steps: {STEPS}}}\n")
    (folder / "environment.json").write_text("{}")
    other = next(folder.parent.glob("*/snapshots"), None)
    if other is not None:
        (folder / "snapshots").symlink_to(other)
    else:
        write_snapshots(folder, range(0, STEPS, STEPS // SNAPSHOTS), LAYERS, HEADS, SIDE)


def seconds(action: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    action()
    return time.perf_counter() - begun


def opening(browser: str, page: Path, picture: Path | None) -> tuple[float, float, float, int]:
    """Seconds until the page is drawn, until the heatmaps are, until another step of them is; how many steps it has."""
    # The browser's own processes may write into its profile a moment longer than it lives.
    profiles = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    with profiles as profile, opened_tab(browser, Path(profile)) as tab:
        tab.size(1400, 1000)

        def show() -> None:
            tab.open(page.as_uri())
            tab.settle()

        opened = seconds(show)
        if picture is not None:
            tab.picture(picture)
        heatmaps = seconds(lambda: tab.place("#heatmaps canvas.matrix"))
        tab.ask("document.getElementById('heat-step').focus()")
        stepped = seconds(lambda: tab.press("ArrowLeft"))
        kept = 1 + int(tab.ask("document.getElementById('heat-step').max"))
        assert not tab.complaints, tab.complaints
    return opened, heatmaps, stepped, kept


def measure(browser: str, folder: Path, repeats: int, picture: Path | None) -> str:
    """A row of the table."""
    page = folder / "report.html"
    written = []
    for _ in range(min(repeats, 3)):
        runs, problems = open_runs([folder])
        written.append(seconds(lambda runs=runs, problems=problems: write_page(runs, problems, page, "")))
    times = [opening(browser, page, picture) for _ in range(repeats)]
    opened, heatmaps, stepped, kept = zip(*times, strict=True)
    metrics, size = (folder / "metrics.jsonl").stat().st_size, page.stat().st_size
    return (
        f"| {folder.name} | {metrics / 1e6:.0f} MB | {statistics.median(written):.1f} s | {size / 1e6:.1f} MB "
        f"| {kept[0]} of {SNAPSHOTS} "
        f"| {statistics.median(opened):.2f} s | {min(opened):.2f} to {max(opened):.2f} s "
        f"| {statistics.median(heatmaps):.2f} s | {statistics.median(stepped):.2f} s |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to make the runs, 0.7 GB (default: a temporary folder)")
    parser.add_argument("--picture", type=Path, help="write what the window shows")
    given = parser.parse_args()
    browser = find_browser()
    if browser is None:
        sys.exit("bench_report: no Chromium is installed")
    print(f"{platform.processor() or platform.machine()}, Python {platform.python_version()}, {browser}")
    print(
        "| logged | metrics.jsonl | page written in | page | snapshots in it | opened in | lowest to highest "
        "| heatmaps | next step |"
    )
    print("|---" * 9 + "|")
    with tempfile.TemporaryDirectory(dir=given.folder) as work:
        for every, layers_deductive in ((2_000, True), (10, False)):
            folder = Path(work) / f"every {every:,} steps"
            make_run(folder, every, layers_deductive)
            print(measure(browser, folder, given.repeats, given.picture), flush=True)


if __name__ == "__main__":
    main()
