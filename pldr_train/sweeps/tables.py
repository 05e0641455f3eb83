"""A sweep's table of cells as CSV, Markdown and LaTeX."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator

from pldr_train.metrics.figures import Column
from pldr_train.sweeps.records import DONE
from pldr_train.sweeps.summary import Spread, Summary
from pldr_train.sweeps.sweep import Cell

_DIGITS = 4


def as_csv(summary: Summary) -> str:
    """Return a row for each cell: axes, trials that are done, then mean, deviation and half width of each figure."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    axes = [axis.name for axis in summary.sweep.axes]
    names = [f"{column.metric} {what}" for column in summary.columns for what in ("mean", "sd", "ci95", "difference")]
    writer.writerow([*axes, "baseline", "trials", *names])
    for cell in summary.cells:
        row: list[object] = [cell.axes.get(axis, "") for axis in axes]
        row += [int(cell.is_baseline), sum(trial.state == DONE for trial in cell.trials)]
        for column in summary.columns:
            spread, paired = summary.of_cell(cell, column), summary.paired(cell, column)
            row += (
                ["", "", ""]
                if spread is None
                else [spread.mean, _or_empty(spread.deviation), _or_empty(spread.half_width)]
            )
            row.append("" if paired is None else paired.differences.mean)
        writer.writerow(row)
    return out.getvalue()


def as_markdown(summary: Summary) -> str:
    """Return the table of cells, and that of the differences from the baseline if there is one."""
    parts = [f"# {summary.spec.name}\n\n", _introduction(summary), "\n", *_markdown(summary, _cell_text)]
    if summary.baselines:
        parts += [
            "\n## Difference from the baseline\n\n",
            "Over the seeds that both have: mean, 95 % interval, and d, the mean over the differences' deviation.\n\n",
            *_markdown(summary, _paired_text),
        ]
    return "".join(parts)


def as_latex(summary: Summary) -> str:
    """Return the table of cells for the package booktabs."""
    axes = [axis.name for axis in summary.sweep.axes]
    head = [*axes, *(column.label for column in summary.columns)]
    lines = [
        f"% {summary.spec.name}: {_introduction(summary).strip()}",
        rf"\begin{{tabular}}{{{'l' * len(axes)}{'r' * len(summary.columns)}}}",
        r"\toprule",
        " & ".join(map(_latex, head)) + r" \\",
        r"\midrule",
    ]
    for cell in summary.cells:
        texts = [_latex(str(cell.axes.get(axis, ""))) for axis in axes]
        for column in summary.columns:
            spread = summary.of_cell(cell, column)
            texts.append("" if spread is None else f"${_spread_text(spread, chr(92) + 'pm')}$")
        lines.append(" & ".join(texts) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def _introduction(summary: Summary) -> str:
    counts = ", ".join(f"{count} {state}" for state, count in summary.counts().items())
    return (
        f"{summary.spec.recipe}, {summary.sweep.num_trials} trials ({counts}). Means over seeds of the trials that are "
        "done, with 95 % intervals.\n"
    )


def _markdown(summary: Summary, text: Callable[[Summary, Cell, Column], str]) -> Iterator[str]:
    axes = [axis.name for axis in summary.sweep.axes]
    head = [*axes, "trials", *(column.label for column in summary.columns)]
    yield f"| {' | '.join(head)} |\n| {' | '.join(['---'] * len(head))} |\n"
    for cell in summary.cells:
        done = sum(trial.state == DONE for trial in cell.trials)
        cells = [str(cell.axes.get(axis, "")) for axis in axes] + [f"{done} of {len(cell.trials)}"]
        if cell.is_baseline:
            cells[0] += " (baseline)"
        cells += [text(summary, cell, column) for column in summary.columns]
        yield "| " + " | ".join(each.replace("|", r"\|") for each in cells) + " |\n"


def _cell_text(summary: Summary, cell: Cell, column: Column) -> str:
    spread = summary.of_cell(cell, column)
    return "" if spread is None else _spread_text(spread, "±")


def _paired_text(summary: Summary, cell: Cell, column: Column) -> str:
    paired = summary.paired(cell, column)
    if paired is None:
        return ""
    effect = "" if paired.effect is None else f" (d {paired.effect:.2g})"
    return _spread_text(paired.differences, "±", sign="+") + effect


def _spread_text(spread: Spread, between: str, sign: str = "") -> str:
    mean = f"{spread.mean:{sign}.{_DIGITS}g}"
    return mean if spread.half_width is None else f"{mean} {between} {spread.half_width:.2g}"


def _or_empty(value: float | None) -> float | str:
    return "" if value is None else value


def _latex(text: str) -> str:
    for character in "&%$#_{}":
        text = text.replace(character, f"\\{character}")
    return text
