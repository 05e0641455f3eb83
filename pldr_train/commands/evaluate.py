"""`pldr-train evaluate`: block and sequential likelihood of a trained model, and how its G behaves."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable, Iterable
from pathlib import Path

from pldr_train.commands import EXIT_CODES, importing_much
from pldr_train.commands.options import device, seed, whole_number
from pldr_train.errors import DataError
from pldr_train.models import is_hub_name
from pldr_train.outputs import check_output
from pldr_train.printing import log_to_terminal
from pldr_train.untrusted import read_json

STDOUT = Path("-")
ROWS_IN_A_PASS, REQUESTS_IN_A_PASS = 8, 32
_LEAST_CONTEXT = 4
_FOR_ROWS = ("text", "data", "rows", "positions", "context", "prompts", "new_tokens", "order_parameter", "prompt_file")
_FOR_TASKS = ("scoring", "limit", "tasks_dir")
_NOT_COMPARED = ("prompts", "new_tokens", "order_parameter", "prompt_file")
_MOST_MODELS = 26
"""A letter of the table for each."""

MODEL_HELP = "a run, a checkpoint, an exported folder, or hub:OWNER/NAME[@REVISION]"


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
    _add_tasks(parser)
    parser.add_argument(
        "--compare",
        metavar="MODEL",
        type=Path,
        nargs="+",
        default=(),
        help="other models to measure on the same rows or tasks, and their differences from SOURCE with paired "
        "intervals; on rows all have the same tokenizer, and likelihoods alone are measured",
    )
    parser.add_argument("--seed", type=seed, default=0, help="of targets and continuations (default 0)")
    parser.add_argument("--device", type=device, default="auto", help="auto (default), cpu, cuda, cuda:1, ...")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the figures as JSON; -: print them instead")
    return parser


def add_source_and_rows(parser: argparse.ArgumentParser) -> None:
    """Add what names a model, and the rows that it is measured on."""
    parser.add_argument("source", metavar="SOURCE", type=Path, help=MODEL_HELP)
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
        ("--batch-size", 1, None, f"rows in a pass (default {ROWS_IN_A_PASS}; with --tasks {REQUESTS_IN_A_PASS})"),
    ))  # fmt: skip


def _add_tasks(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tasks",
        metavar="NAME,...",
        help="score tasks of lm-evaluation-harness instead of rows; papers: the papers' eight, 0-shot. Needs "
        "`pip install 'pldr_train[eval]'`",
    )
    parser.add_argument(
        "--scoring",
        choices=("block", "sequential", "both"),
        default="both",
        help="with --tasks: in one pass over context and candidate, which then enters G; from the tokens before each "
        "alone; or both and their difference (default both)",
    )
    parser.add_argument("--limit", metavar="N", type=whole_number(1), help="with --tasks: the first items of each task")
    parser.add_argument(
        "--tasks-dir", metavar="FOLDER", type=Path, help="with --tasks: YAML files of tasks of your own, which go first"
    )


def add_numbers(parser: argparse.ArgumentParser, options: Iterable[tuple[str, int, int | None, str]]) -> None:
    """Add options that take a whole number: name, least value, default, meaning."""
    for option, least, default, meaning in options:
        shown = meaning if default is None else f"{meaning} (default {default})"
        parser.add_argument(option, metavar="N", type=whole_number(least), default=default, help=shown)


def run(options: argparse.Namespace) -> int:
    """Measure, print a table, and write JSON."""
    _check_kind(options)
    check_json_output(options.json, _is_evaluation, "an evaluation that this command wrote")
    if options.prompt_file is not None and options.order_parameter != "published":
        raise DataError(
            f"--prompt-file {options.prompt_file} is for --order-parameter published; add that, or leave it out"
        )
    fetch_models(options)
    if options.tasks is not None:
        # Imported here: torch and lm_eval take seconds, which a mistake in the command should not cost.
        from pldr_train.commands.task_actions import score_tasks  # noqa: PLC0415

        score_tasks(options)
        return 0
    # Imported here: the schema of recipes takes longer than all of the help.
    from pldr_train.recipe import load_recipe  # noqa: PLC0415

    recipe = None if options.data is None else load_recipe(options.data).resolved()
    # Imported here: torch takes seconds, which a mistake in the command should not cost.
    if options.compare:
        from pldr_train.commands.comparison import compare_rows  # noqa: PLC0415

        compare_rows(options, recipe)
        return 0
    with importing_much():
        from pldr_train.commands.evaluation import measure  # noqa: PLC0415

    measure(options, recipe)
    return 0


def fetch_models(options: argparse.Namespace) -> None:
    """Replace the models of the Hub among --compare and the model itself by the folders that they are fetched to."""
    compared = getattr(options, "compare", ())
    if any(map(is_hub_name, (options.source, *compared))):
        # Imported here: it takes a while, and most models lie on this disk.
        from pldr_train.models.hub import local_model  # noqa: PLC0415

        log_to_terminal(stream="stderr")
        options.source = local_model(options.source)
        options.compare = [local_model(each) for each in compared]


def _check_kind(options: argparse.Namespace) -> None:
    """Check that rows or tasks are measured, by the options of one of them, and that tasks can be; raises DataError."""
    defaults = build_parser()
    of_tasks = options.tasks is not None
    for name in _FOR_ROWS if of_tasks else _FOR_TASKS:
        if getattr(options, name) != defaults.get_default(name):
            option = f"--{name.replace('_', '-')}"
            raise DataError(
                f"{option} is for rows, and --tasks names tasks; leave one of them out"
                if of_tasks
                else f"{option} is for tasks; name them with --tasks"
            )
    for name in _NOT_COMPARED if options.compare else ():
        if getattr(options, name) != defaults.get_default(name):
            raise DataError(
                f"--{name.replace('_', '-')} is for one model, and --compare measures likelihoods alone; leave one of "
                "them out"
            )
    if len(options.compare) >= _MOST_MODELS:
        raise DataError(f"--compare names {len(options.compare)} models; name {_MOST_MODELS - 1} at most")
    if of_tasks and not task_names(options):
        raise DataError("--tasks names no task; name some, or papers")
    if of_tasks and importlib.util.find_spec("lm_eval") is None:
        raise DataError(
            "--tasks needs lm-evaluation-harness, which is not installed; run `pip install 'lm-eval>=0.4.13,<0.5'` in "
            "this environment (it is the extra `eval` of pldr_train)"
        )


def task_names(options: argparse.Namespace) -> list[str]:
    """Return the names that --tasks lists."""
    return [name.strip() for name in options.tasks.split(",") if name.strip()]


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
