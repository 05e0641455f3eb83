"""`pldr-train audit`: what a trained model's operator is like, and whether the model reads the future."""

from __future__ import annotations

import argparse
from pathlib import Path

from pldr_train.commands import EXIT_CODES
from pldr_train.commands.evaluate import STDOUT, add_numbers, add_source_and_rows, check_json_output, fetch_models
from pldr_train.commands.options import device, seed
from pldr_train.errors import DataError, UserError
from pldr_train.outputs import check_output
from pldr_train.published import PUBLISHED_AUDITS
from pldr_train.untrusted import read_json, read_text

MARK = "pldr_train audit"
"""What the HTML that this command writes begins with, in a comment."""
_MOST_HTML_BYTES = 2**24


def build_parser() -> argparse.ArgumentParser:
    """Return the command's options."""
    parser = argparse.ArgumentParser(
        prog="pldr-train audit",
        description="Look into a trained model on a few texts: rank of A, share of G outside of the rotations' "
        "commutant, Jacobian of the row map, DAG losses, what the G-cache and a replaced suffix change, and how scores "
        "in one pass over a block differ from those that generation can reach. docs/audit.md says what each means.",
        epilog=EXIT_CODES,
    )
    add_source_and_rows(parser)
    add_numbers(
        parser,
        (
            ("--rows", 1, 8, "rows at most; their first halves are the prompts"),
            ("--positions", 1, 16, "targets of each row that are scored both ways"),
            ("--context", 4, 64, "tokens of a row"),
            ("--new-tokens", 1, 16, "tokens of the greedy continuation of each prompt"),
            ("--jacobian-rows", 1, 16, "rows of the Gram, of each prompt and layer, for the row map's Jacobian"),
            ("--candidate-tokens", 1, 8, "tokens of a candidate that is scored after each prompt"),
            ("--batch-size", 1, 8, "rows in a pass"),
        ),
    )
    parser.add_argument("--seed", type=seed, default=0, help="of the targets (default 0)")
    parser.add_argument("--device", type=device, default="auto", help="auto (default), cpu, cuda, cuda:1, ...")
    parser.add_argument(
        "--published",
        metavar="NAME",
        choices=tuple(PUBLISHED_AUDITS),
        help=f"show the published audit of a model beside it: {', '.join(PUBLISHED_AUDITS)} (default: the one that "
        "SOURCE names)",
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the figures as JSON; -: print them instead")
    parser.add_argument("--html", metavar="FILE", type=Path, help="write the figures as a page, layer by layer")
    return parser


def run(options: argparse.Namespace) -> int:
    """Audit, print a table, and write JSON and a page."""
    check_json_output(options.json, _is_audit, "an audit that this command wrote")
    if options.html is not None:
        if not options.html.parent.is_dir():
            raise DataError(f"--html {options.html}: no folder {options.html.parent}; make it, or name another file")
        check_output(options.html, "--html", _is_page, "a page of an audit that this command wrote")
    if (
        options.html is not None
        and options.json not in (None, STDOUT)
        and options.html.resolve() == options.json.resolve()
    ):
        raise UserError(f"--html and --json both name {options.html}; name two files")
    fetch_models(options)
    # Imported here: torch takes seconds, which a mistake in the command should not cost.
    from pldr_train.commands.audit_actions import run_audit  # noqa: PLC0415
    from pldr_train.recipe import load_recipe  # noqa: PLC0415

    recipe = None if options.data is None else load_recipe(options.data).resolved()
    run_audit(options, recipe)
    return 0


def _is_audit(path: Path) -> bool:
    values = read_json(path)
    return isinstance(values, dict) and values.keys() >= {"source", "spreads", "decoding", "suffix"}


def _is_page(path: Path) -> bool:
    return MARK in read_text(path, _MOST_HTML_BYTES)[:200]
