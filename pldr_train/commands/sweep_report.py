"""The work of `pldr-train sweep report`: the sweep's page and tables, written or served."""

from __future__ import annotations

import argparse
import sys
import webbrowser
from pathlib import Path

from pldr_train.commands.report import check_live_options, serve_page
from pldr_train.data.files import write_file_atomically
from pldr_train.errors import UserError
from pldr_train.outputs import begins_with, check_output
from pldr_train.printing import printable
from pldr_train.report.serving import Answer, page_answer
from pldr_train.runs.layout import METRICS_FILE
from pldr_train.sweeps.page import render_sweep
from pldr_train.sweeps.records import CLAIM_FILE, RECORD_FILE
from pldr_train.sweeps.summary import Summary
from pldr_train.sweeps.sweep import Sweep
from pldr_train.sweeps.tables import as_csv, as_latex, as_markdown

PAGE, CSV, MARKDOWN, LATEX = "report.html", "cells.csv", "cells.md", "cells.tex"


def report_sweep(options: argparse.Namespace) -> int:
    """Write the page and the tables, or serve the page."""
    check_live_options(options)
    sweep = Sweep(options.spec)
    if options.live:
        live = _Live(sweep)
        return serve_page({"/": live.page, "/tag": live.tag_answer}, options)
    folder = options.out or sweep.folder
    if not folder.is_dir():
        why = "no trial has been run yet; pldr-train sweep run begins" if options.out is None else "no such folder"
        raise UserError(f"{folder}: {why}")
    summary = Summary(sweep)
    page = folder / PAGE
    is_page = begins_with(b"<!DOCTYPE html>", b"pldr_train sweep</title>")
    check_output(page, "report", is_page, "a report that this command wrote")
    fix = "name another folder with --out"
    write_file_atomically(page, render_sweep(summary).encode(), fix=fix)
    for name, text in ((CSV, as_csv(summary)), (MARKDOWN, as_markdown(summary)), (LATEX, as_latex(summary))):
        write_file_atomically(folder / name, text.encode(), fix=fix)
    counts = ", ".join(f"{number} {state}" for state, number in summary.counts().items())
    print(f"report  {printable(str(page))}  ({counts})")
    print(f"tables  {printable(str(folder / CSV))}, {MARKDOWN}, {LATEX}")
    if options.open and not webbrowser.open(page.resolve().as_uri()):
        print("no browser could be started; open the file yourself", file=sys.stderr)
    return 0


class _Live:
    """The page, made anew when a trial's files have changed."""

    def __init__(self, sweep: Sweep) -> None:
        self._sweep = sweep

    def _tag(self) -> str:
        places = [self._sweep.folder / planned.name for planned in self._sweep.planned()]
        names = (METRICS_FILE, RECORD_FILE, CLAIM_FILE)
        return str(hash(tuple(_state(folder / name) for folder in places for name in names)))

    def page(self) -> Answer:
        """Return the page."""
        return page_answer(render_sweep(Summary(self._sweep), live=True, tag=self._tag()))

    def tag_answer(self) -> Answer:
        """Return what changes with the trials' files."""
        return Answer("text/plain", self._tag().encode())


def _state(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError:
        return 0, 0
    return status.st_mtime_ns, status.st_size
