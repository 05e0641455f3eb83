"""`pldr-train sweep`: many runs of one recipe that differ along axes."""

from __future__ import annotations

import argparse
from pathlib import Path

from pldr_train.commands.options import Action, TwoWordParser, positive_int
from pldr_train.commands.report import add_live_options

_SPEC_HELP = "YAML file of the sweep, or the name of one that comes along, such as phase-diagram"
EXIT_CODES = (
    "exit codes: 0 all trials are done or pruned, or the budget is used up; 1 trials have failed; 2 an error that the "
    "message explains; 129, 130 or 143 asked to stop, the trials have saved"
)


def build_parser() -> argparse.ArgumentParser:
    """Return the command's options."""
    return TwoWordParser(
        "pldr-train sweep",
        "Run a recipe many times along axes, resumable, on one machine or many; docs/sweeps.md says more.",
        ACTIONS,
    )


def run(options: argparse.Namespace) -> int:
    """Run the action."""
    # Imported here: recipes take longer to import than all of the help.
    from pldr_train.commands import sweep_actions, sweep_report  # noqa: PLC0415

    actions = {
        "run": sweep_actions.run_sweep,
        "status": sweep_actions.show_status,
        "report": sweep_report.report_sweep,
        "stop": sweep_actions.stop_sweep,
        "retry": sweep_actions.retry_trials,
        "trial": sweep_actions.run_one,
        "export-wandb": sweep_actions.export_wandb,
    }
    return actions[options.action](options)


def _parser(action: str, description: str, epilog: str | None = None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"pldr-train sweep {action}", description=description, epilog=epilog)
    parser.add_argument("spec", metavar="SPEC", help=_SPEC_HELP)
    return parser


def _run_parser() -> argparse.ArgumentParser:
    parser = _parser(
        "run",
        "Run what is left of a sweep; the same command goes on after any end. Several may run.",
        EXIT_CODES,
    )
    parser.add_argument(
        "--workers", type=positive_int, metavar="N", help="trials at a time (default: what GPUs or cores allow)"
    )
    parser.add_argument(
        "--devices-per-trial", type=positive_int, metavar="K", help="processes of each trial (default: the recipe's)"
    )
    parser.add_argument("--dry-run", action="store_true", help="list the trials with their size and leave")
    parser.add_argument("--retry-failed", action="store_true", help="begin trials that have failed again")
    parser.add_argument(
        "--no-wait", action="store_true", help="leave when all trials that are left run in other runners"
    )
    parser.add_argument("--storage", metavar="URL", help="Optuna's storage, instead of the spec's")
    return parser


def _status_parser() -> argparse.ArgumentParser:
    parser = _parser("status", "Say how each trial of a sweep stands.")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _report_parser() -> argparse.ArgumentParser:
    parser = _parser(
        "report", "Write what a sweep found so far as a page, and its cells as tables: CSV, Markdown and LaTeX."
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where to (default: the sweep's folder)")
    add_live_options(parser)
    return parser


def _stop_parser() -> argparse.ArgumentParser:
    return _parser("stop", "Ask all runners of a sweep to save their trials and leave, on whatever machine.")


def _retry_parser() -> argparse.ArgumentParser:
    parser = _parser("retry", "Set trials back to waiting, which the next runner begins again where they were.")
    parser.add_argument(
        "trials", metavar="TRIAL", nargs="*", help="trials that failed or were pruned (default: all that failed)"
    )
    return parser


def _trial_parser() -> argparse.ArgumentParser:
    parser = _parser("trial", "Run the one trial that has the given values of the axes; W&B's agents do this.")
    parser.add_argument("values", metavar="AXIS=VALUE", nargs="+", help="of every axis, and run.seed=N")
    return parser


def _export_parser() -> argparse.ArgumentParser:
    parser = _parser("export-wandb", "Write the sweep for Weights & Biases' agents.")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where to (default: standard output)")
    return parser


ACTIONS = {
    "run": Action(_run_parser, "run what is left of it, resumable"),
    "status": Action(_status_parser, "how each trial stands"),
    "report": Action(_report_parser, "what it found, as a page and tables"),
    "stop": Action(_stop_parser, "ask its runners to save and leave"),
    "retry": Action(_retry_parser, "begin failed or pruned trials again"),
    "trial": Action(_trial_parser, "run one trial, for W&B's agents"),
    "export-wandb": Action(_export_parser, "write it for W&B's agents"),
}
