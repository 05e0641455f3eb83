"""`pldr-train report`: runs as one HTML page, written or served."""

from __future__ import annotations

import argparse
import errno
import sys
import webbrowser
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from pldr_train.commands import EXIT_CODES
from pldr_train.data.files import write_file_atomically
from pldr_train.errors import UserError
from pldr_train.outputs import begins_with, check_output
from pldr_train.printing import printable
from pldr_train.report.page import page_parts, render_page
from pldr_train.report.runs import Run, open_runs
from pldr_train.report.serving import ADDRESS, Answer, LiveReport, serve

_DEFAULT_PORT = 8765


def build_parser() -> argparse.ArgumentParser:
    """Return the command's options."""
    parser = argparse.ArgumentParser(
        prog="pldr-train report",
        description="Show runs, finished or not, on one HTML page that needs no network: health, curves, heatmaps, "
        "events, recipes and their differences, samples, checkpoints. docs/report.md says more.",
        epilog=EXIT_CODES,
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="a run's folder, like runs/NAME")
    parser.add_argument(
        "--out", metavar="FILE", type=Path, help="the page (default: report.html in the run's folder; of several: here)"
    )
    add_live_options(parser)
    return parser


def add_live_options(parser: argparse.ArgumentParser) -> None:
    """Add --live, --port and --open."""
    parser.add_argument(
        "--live", action="store_true", help="serve the page on 127.0.0.1 and keep it up to date; Ctrl-C ends it"
    )
    parser.add_argument(
        "--port", metavar="P", type=_port, help=f"of --live (default {_DEFAULT_PORT}, or a free one if it is taken)"
    )
    parser.add_argument("--open", action="store_true", help="open the page in the browser")


def _port(text: str) -> int:
    port = int(text)
    if not 0 <= port < 65536:
        raise argparse.ArgumentTypeError(f"{text} must be from 0 (any free one) to 65535")
    return port


def run(options: argparse.Namespace) -> int:
    """Write the page, or serve it."""
    check_live_options(options)
    runs, problems = open_runs(options.runs)
    if not runs:
        raise UserError("\n".join(problems))
    for problem in problems:
        print(printable(f"left out: {problem}"), file=sys.stderr)
    return (
        serve_page(LiveReport(runs, problems).answers(), options) if options.live else _write(options, runs, problems)
    )


def check_live_options(options: argparse.Namespace) -> None:
    """Check that --out, --live and --port go together; raises UserError."""
    if options.live and options.out is not None:
        raise UserError(f"--out {options.out} does not go with --live, which writes nothing; leave one out")
    if options.port is not None and not options.live:
        raise UserError(f"--port {options.port} goes with --live only; add --live")


def _write(options: argparse.Namespace, runs: Sequence[Run], problems: Sequence[str]) -> int:
    target = options.out or (runs[0].folder if len(options.runs) == 1 else Path()) / "report.html"
    if target.is_dir():
        raise UserError(f"--out {target} is a folder; name a file, like {target / 'report.html'}")
    size_bytes = write_page(runs, problems, target, "name another with --out")
    count = f"{len(runs)} {'run' if len(runs) == 1 else 'runs'}"
    print(f"report  {printable(str(target))}  ({size_bytes / 1e6:.1f} MB, {count})")
    if options.open and not webbrowser.open(target.resolve().as_uri()):
        print("no browser could be started; open the file yourself", file=sys.stderr)
    return 0


def write_page(runs: Sequence[Run], problems: Sequence[str], target: Path, fix: str) -> int:
    """Write the page of some runs, whole or not at all; returns its size in bytes.

    Raises:
        UserError: the file cannot be written; `fix` says what to do.
    """
    is_ours = begins_with(b"<!DOCTYPE html>", b"pldr_train report</title>")
    check_output(target, "--out", is_ours, "a report that this command wrote")
    for each in runs:
        each.read_on()
    content, snapshots = page_parts(runs, problems)
    for each in runs:
        for note in each.notes():
            print(printable(f"{each.name}: {note}"), file=sys.stderr)
    page = render_page(content, snapshots).encode()
    write_file_atomically(target, page, fix=fix)
    return len(page)


def serve_page(answers: Mapping[str, Callable[[], Answer]], options: argparse.Namespace) -> int:
    """Serve a page until Ctrl-C, as the options --port and --open say."""
    try:
        server = serve(answers, _DEFAULT_PORT if options.port is None else options.port)
    except OSError as error:
        if error.errno not in (errno.EADDRINUSE, errno.EACCES):
            raise
        if options.port is not None:
            raise UserError(f"--port {options.port}: {error.strerror}; name another, or 0 for any free one") from None
        server = serve(answers, 0)
    address = f"http://{ADDRESS}:{server.server_port}/"
    print(f"report  {address}  (Ctrl-C ends it)", flush=True)
    if options.open and not webbrowser.open(address):
        print("no browser could be started; open the address yourself", file=sys.stderr)
    try:
        server.serve_forever(poll_interval=0.2)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
    finally:
        server.server_close()
    return 0
