"""`pldr-train evaluate`: block and sequential likelihood of a trained model, and how its G behaves."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path

from pldr_train.commands import EXIT_CODES
from pldr_train.commands.options import device, seed, whole_number
from pldr_train.errors import DataError
from pldr_train.outputs import check_output
from pldr_train.untrusted import read_json

STDOUT = Path("-")
_LEAST_CONTEXT = 4


def build_parser() -> argparse.ArgumentParser:
    """Return the command's options."""
    parser = argparse.ArgumentParser(
        prog="pldr-train evaluate",
        description="Measure a trained model on held-out rows: likelihood in one pass over a block and of generating "
        "the same tokens, the gap between the two (a model with a learned G may read the future in a block), and how "
        "much its G depends on the input, on caches and on padding. docs/evaluation.md says what each figure means.",
        epilog=EXIT_CODES,
    )
    add_source_and_rows(parser)
    _add_sizes(parser)
    parser.add_argument(
        "--order-parameter",
        choices=("own", "published"),
        default="own",
        help="published: by the SOC paper's protocol, of 100 prompts of 200 words, continued to their end or by 256 "
        "tokens; for GPUs (default own: of the rows, see --prompts)",
    )
    parser.add_argument(
        "--prompt-file",
        metavar="FILE",
        type=Path,
        help="with --order-parameter published: a text file with a prompt on each line, instead of IMDB's test reviews "
        "from the Hub",
    )
    parser.add_argument("--seed", type=seed, default=0, help="of targets and continuations (default 0)")
    parser.add_argument("--device", type=device, default="auto", help="auto (default), cpu, cuda, cuda:1, ...")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the figures as JSON; -: print them instead")
    return parser


def add_source_and_rows(parser: argparse.ArgumentParser) -> None:
    """Add what names a model, and the rows that it is measured on."""
    parser.add_argument("source", metavar="SOURCE", type=Path, help="a run, a checkpoint, or an exported folder")
    data = parser.add_mutually_exclusive_group()
    data.add_argument("--text", metavar="FILE", type=Path, nargs="+", help="text files to measure on, each a document")
    data.add_argument(
        "--data",
        metavar="RECIPE",
        help="a recipe whose validation rows to measure on (default: those of the run's own recipe)",
    )


def _add_sizes(parser: argparse.ArgumentParser) -> None:
    add_numbers(parser, (
        ("--rows", 1, 32, "rows at most"),
        ("--positions", 1, 16, "targets of each row that are predicted from the tokens before them alone"),
        ("--context", _LEAST_CONTEXT, None, "tokens of a row (default: the recipe's; for --text the model's context)"),
        ("--prompts", 0, 4, "beginnings of rows to continue; 0: likelihoods only"),
        ("--new-tokens", 1, 32, "tokens of a continuation"),
        ("--batch-size", 1, 8, "rows in a pass"),
    ))  # fmt: skip


def add_numbers(parser: argparse.ArgumentParser, options: Iterable[tuple[str, int, int | None, str]]) -> None:
    """Add options that take a whole number: name, least value, default, meaning."""
    for option, least, default, meaning in options:
        shown = meaning if default is None else f"{meaning} (default {default})"
        parser.add_argument(option, metavar="N", type=whole_number(least), default=default, help=shown)


def run(options: argparse.Namespace) -> int:
    """Measure, print a table, and write JSON."""
    check_json_output(options.json, _is_evaluation, "an evaluation that this command wrote")
    if options.prompt_file is not None and options.order_parameter != "published":
        raise DataError(
            f"--prompt-file {options.prompt_file} is for --order-parameter published; add that, or leave it out"
        )
    # Imported here: the schema of recipes takes longer than all of the help.
    from pldr_train.recipe import load_recipe  # noqa: PLC0415

    recipe = None if options.data is None else load_recipe(options.data).resolved()
    # Imported here: torch takes seconds, which a mistake in the command should not cost.
    from pldr_train.commands.evaluation import measure  # noqa: PLC0415

    measure(options, recipe)
    return 0


def check_json_output(path: Path | None, is_ours: Callable[[Path], bool], what: str) -> None:
    """Check that --json may write there; raises DataError."""
    if path in (None, STDOUT):
        return
    assert path is not None
    if not path.parent.is_dir():
        raise DataError(f"--json {path}: no folder {path.parent}; make it, or name another file")
    check_output(path, "--json", is_ours, what)


def _is_evaluation(path: Path) -> bool:
    values = read_json(path)
    source = values.get("source") if isinstance(values, dict) else None
    return isinstance(source, dict) and source.keys() >= {"path", "checkpoint", "rows_of", "device"}
