"""How long the report of a large sweep takes to make, and to open in a real Chromium.

The sweep is made up: 200 trials (ten learning rates, five warm-ups, four seeds) of 400 steps with 50 metrics, logged
every two steps; trials and page are read and built by the package's own code. Opened means from the address to all
drawn that is in sight, in a browser that has just been started; scrolled, from there to the last part drawn.
Bar: opened within 3 s.

    python benchmarks/bench_sweep_report.py [--repeats 5] [--picture FILE]
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
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from pldr_train.metrics.catalog import GPU_ONLY, TRAIN_CROSS_ENTROPY, all_metrics
from pldr_train.metrics.figures import COLUMNS
from pldr_train.sweeps import Sweep
from pldr_train.sweeps.page import render_sweep
from pldr_train.sweeps.records import DONE, Record, write_record
from pldr_train.sweeps.summary import Summary
from tests.browser import find_browser, opened_tab

STEPS, EVERY, METRICS = 400, 2, 50
SPEC = """
name: large
recipe: quickstart
set: {{run.dir: {folder}, trainer.max_steps: 400, trainer.validate_every_steps: 40}}
axes:
  optim.lr: [1.0e-4, 2.0e-4, 3.0e-4, 5.0e-4, 7.0e-4, 1.0e-3, 2.0e-3, 3.0e-3, 5.0e-3, 7.0e-3]
  optim.warmup_steps: [0, 5, 10, 20, 40]
seeds: [1, 2, 3, 4]
baseline: {{optim.warmup_steps: 20}}
"""


def make_trial(folder: Path, record: Record, seed: int) -> None:
    """A trial's folder with metrics that wander."""
    folder.mkdir(parents=True)
    shown = [column.metric for column in COLUMNS]
    others = [info.name for info in all_metrics(1) if info.name not in {*shown, "step"} | GPU_ONLY]
    names = [TRAIN_CROSS_ENTROPY, *shown, *(name for name in others if name != TRAIN_CROSS_ENTROPY)][:METRICS]
    chance = random.Random(seed)
    values = {name: chance.uniform(0.5, 2) for name in names}
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(0, STEPS + 1, EVERY):
            values = {name: value * (1 + 0.01 * chance.gauss(0, 1)) for name, value in values.items()}
            file.write(json.dumps({"step": step, **values}) + "\n")
    write_record(folder, record)


def make_sweep(folder: Path) -> Path:
    """The spec's file, with all trials done."""
    spec = folder / "large.yaml"
    spec.write_text(SPEC.format(folder=folder / "runs"))
    sweep = Sweep(spec)
    for number, each in enumerate(sweep.planned()):
        record = Record(each.name, dict(each.axes), each.seed, each.cell, DONE, steps=STEPS)
        make_trial(sweep.folder / each.name, record, number)
    return spec


def opening(browser: str, page: Path, picture: Path | None) -> tuple[float, float]:
    """Seconds until what is in sight is drawn, and from there until all is."""
    # The browser's own processes may write into its profile a moment longer than it lives.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile, opened_tab(browser, Path(profile)) as tab:
        tab.size(1400, 1000)
        begun = time.perf_counter()
        tab.open(page.as_uri())
        tab.settle()
        opened = time.perf_counter() - begun
        if picture is not None:
            tab.picture(picture)
        begun = time.perf_counter()
        parts = int(tab.ask("document.querySelectorAll('section.block').length"))
        for part in range(parts):
            tab.ask(f"document.querySelectorAll('section.block')[{part}].scrollIntoView()")
            tab.settle()
        scrolled = time.perf_counter() - begun
        assert not tab.complaints, tab.complaints
    return opened, scrolled


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--picture", type=Path, help="write what the window shows")
    given = parser.parse_args()
    browser = find_browser()
    if browser is None:
        sys.exit("bench_sweep_report: no Chromium is installed")
    print(f"{platform.processor() or platform.machine()}, Python {platform.python_version()}, {browser}")
    with tempfile.TemporaryDirectory() as work:
        spec = make_sweep(Path(work))
        begun = time.perf_counter()
        summary = Summary(Sweep(spec))
        page = Path(work) / "report.html"
        page.write_text(render_sweep(summary))
        made = time.perf_counter() - begun
        times = [opening(browser, page, given.picture) for _ in range(given.repeats)]
        opened, scrolled = zip(*times, strict=True)
        print("| trials | page made in | page | opened in, median (lowest to highest) | all drawn after |")
        print("|---" * 5 + "|")
        print(
            f"| {len(summary.trials)} | {made:.1f} s | {page.stat().st_size / 1e6:.1f} MB "
            f"| {statistics.median(opened):.2f} s ({min(opened):.2f} to {max(opened):.2f}) "
            f"| {statistics.median(scrolled):.2f} s |"
        )


if __name__ == "__main__":
    main()
