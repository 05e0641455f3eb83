"""`pldr-train watch`: a run's curves in the terminal, while it trains or afterwards."""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

from pldr_train.commands import EXIT_CODES
from pldr_train.errors import UserError
from pldr_train.metrics import catalog
from pldr_train.printing import duration_text, printable
from pldr_train.report.health import NOT_MEASURED, criticality_verdict, leakage_verdict
from pldr_train.report.runs import Run
from pldr_train.report.series import Series
from pldr_train.runs.layout import is_run, why_no_run

_CURVES = (
    ("cross-entropy", catalog.TRAIN_CROSS_ENTROPY),
    ("val cross-entropy", catalog.VAL_CROSS_ENTROPY),
    ("loss with DAG", catalog.TRAIN_LOSS),
    ("val loss with DAG", catalog.VAL_LOSS),
    ("leakage gap", catalog.GAP),
    *((f"DAG loss {tensor}", f"{catalog.TRAIN}/{catalog.dag_name(tensor)}") for tensor in catalog.DAG_TENSORS),
    ("gradient norm", catalog.GRAD_NORM),
    ("tokens/s", catalog.TOKENS_PER_S),
)
_BLOCKS, _ASCII = "▁▂▃▄▅▆▇█", "_.-=+*#@"
_LEAST_INTERVAL_S = 0.1
_MOST_INTERVAL_S = 86_400.0
_RECENT_POINTS = 40
"""The median of so many of the last points is taken for the throughput to come."""


def build_parser() -> argparse.ArgumentParser:
    """Return the command's options."""
    parser = argparse.ArgumentParser(
        prog="pldr-train watch",
        description="Follow a run in the terminal until it is finished; Ctrl-C leaves, the run goes on. Where the "
        "output is no terminal, a line for each new line of metrics.",
        epilog=EXIT_CODES,
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="the run's folder, like runs/NAME")
    parser.add_argument("--once", action="store_true", help="show how it stands and leave")
    parser.add_argument(
        "--interval", metavar="S", type=_interval, default=2.0, help="seconds between looks (default 2)"
    )
    return parser


def _interval(text: str) -> float:
    value = float(text)
    if not _LEAST_INTERVAL_S <= value <= _MOST_INTERVAL_S:
        raise argparse.ArgumentTypeError(f"{text} must be from {_LEAST_INTERVAL_S} to {_MOST_INTERVAL_S:,.0f}")
    return value


def run(options: argparse.Namespace) -> int:
    """Show the run, and follow it."""
    if not is_run(options.run):
        raise UserError(why_no_run(options.run))
    watched = Run(options.run, options.run.resolve().name)
    try:
        watch(watched, sys.stdout, options.once, options.interval)
    except KeyboardInterrupt:
        print(file=sys.stdout)
    return 0


def watch(run: Run, stream: TextIO, once: bool, interval_s: float, sleep: Callable[[float], None] = time.sleep) -> None:
    """Show a run until it is finished; in a terminal the lines are drawn over, elsewhere new ones are added."""
    moving = stream.isatty() and not once
    drawn, shown = 0, None
    while True:
        changed = run.read_on()
        if moving:
            size = shutil.get_terminal_size()
            lines = [line[: size.columns - 1] for line in picture(run, stream, size.columns)][: size.lines - 1]
            stream.write(f"\x1b[{drawn}F" * bool(drawn) + "".join(f"{line}\x1b[K\n" for line in lines) + "\x1b[J")
            drawn = len(lines)
        elif once or shown is None:
            stream.write("".join(f"{line}\n" for line in picture(run, stream, 100)))
        elif changed and run.metrics.last_step != shown:
            stream.write(f"{summary(run)}\n")
        shown = run.metrics.last_step if run.metrics.last_step is not None else -1
        stream.flush()
        if once or (run.is_finished and not run.is_held()):
            return
        sleep(interval_s)


# -------------------------------------------------------------------------------------------------------------- lines


def picture(run: Run, stream: TextIO, columns: int) -> Iterator[str]:
    """Yield the lines that show how a run stands."""
    step, most = run.metrics.last_step, run.files.max_steps
    done = "no step yet" if step is None else f"step {step:,}"
    share = f" of {most:,} ({step / most:.1%})" if most and step is not None else ""
    written = run.last_written_s()
    age = "" if written is None else f", metrics written {duration_text(time.time() - written)} ago"
    yield f"{printable(run.name)}: {done}{share}, {run.state}{age}"
    width = max(10, min(60, columns - 67))
    for label, name in _CURVES:
        series = run.metrics.series.get(name)
        if series is not None and series.last is not None:
            interval = _interval_of(run) if name == catalog.GAP else ""
            yield f"  {label:<17} {sparkline(series, width, blocks_of(stream))} {_figures(series)}{interval}"
    for verdict in (
        leakage_verdict(run.metrics.series, run.files.recipe),
        criticality_verdict(run.metrics.series, run.files.recipe),
    ):
        if verdict.words != NOT_MEASURED:
            yield f"  {verdict.name.lower()}: {verdict.words}"
    if run.files.stopped is not None and run.state != "running":
        yield f"  stopped: {printable(run.files.stopped)}"
    yield f"  {_eta(run)}"
    yield f"  {_last_checkpoint(run)}"
    for note in run.notes()[:6]:
        yield f"  note: {printable(note)}"


def _interval_of(run: Run) -> str:
    gap, *ends = map(run.metrics.series.get, (catalog.GAP, catalog.GAP_LOW, catalog.GAP_HIGH))
    step = None if gap is None or gap.last is None else gap.last[0]
    values = [end.last[1] for end in ends if end is not None and end.last is not None and end.last[0] == step]
    return f"  [{_figure(values[0])}, {_figure(values[1])}]" if len(values) == 2 else ""


def summary(run: Run) -> str:
    """Return one line on the newest step."""
    words = [f"step {run.metrics.last_step:,}" if run.metrics.last_step is not None else "no step"]
    for label, name in _CURVES:
        series = run.metrics.series.get(name)
        if series is not None and series.last is not None and series.last[0] == run.metrics.last_step:
            words.append(f"{label} {_figure(series.last[1])}")
    return "  ".join(words)


def blocks_of(stream: TextIO) -> str:
    """Return the characters of a sparkline that a stream can write, the lowest first."""
    try:
        _BLOCKS.encode(stream.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return _ASCII
    return _BLOCKS


def sparkline(series: Series, width: int, blocks: str) -> str:
    """Return the means of `width` equal parts of a series' steps; a part without a value repeats the one before."""
    buckets = series.buckets()
    first, last = float(buckets.first_step[0]), float(buckets.first_step[-1])
    parts: list[list[float]] = [[0.0, 0.0] for _ in range(width)]
    for step, total, count in zip(buckets.first_step, buckets.value_sum, buckets.count, strict=True):
        place = min(width - 1, int((step - first) / (last - first or 1) * width))
        parts[place][0] += float(total)
        parts[place][1] += float(count)
    means, before = [], float(buckets.value_sum[0] / buckets.count[0])
    for total, count in parts:
        before = total / count if count else before
        means.append(before)
    low, high = min(means), max(means)
    span = high - low or 1.0
    top = len(blocks) - 1
    return "".join(blocks[min(top, int((mean - low) / span * top + 0.5))] for mean in means)


def _figures(series: Series) -> str:
    assert series.last is not None
    low = float(series.buckets().low.min())
    bad = f"  {series.nonfinite_count:,} not finite" if series.nonfinite_count else ""
    return f"{_figure(series.last[1]):>10}  lowest {_figure(low)}{bad}"


def _figure(value: float) -> str:
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e12 else f"{value:.5g}"


def _eta(run: Run) -> str:
    step, most = run.metrics.last_step, run.files.max_steps
    tokens, speed = map(run.metrics.series.get, (catalog.TOKENS, catalog.TOKENS_PER_S))
    trained = "" if tokens is None or tokens.last is None else f"{tokens.last[1]:,.0f} tokens; "
    if run.is_finished:
        return f"{trained}{'it ended early' if run.files.ended_early else 'all steps are done'}"
    if most is None or not step or tokens is None or tokens.last is None or speed is None or speed.last is None:
        return f"{trained}time left unknown yet"
    buckets = speed.buckets()
    recent = statistics.median((buckets.value_sum / buckets.count)[-_RECENT_POINTS:].tolist())
    if recent <= 0:
        return f"{trained}time left unknown yet"
    left_s = (most - step) * tokens.last[1] / tokens.last[0] / recent
    return f"{trained}about {duration_text(left_s)} left, validation and saving not counted"


def _last_checkpoint(run: Run) -> str:
    whole = [each for each in run.files.checkpoints if each["problem"] is None]
    if not whole:
        return "no checkpoint yet"
    age = duration_text(time.time() - whole[0]["written_s"])
    return f"last checkpoint: step {whole[0]['step']:,}, {age} ago"
