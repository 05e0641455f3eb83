"""`pldr-train wandb`: a run's folder as a clean W&B run, its checkpoints as artifacts, and the dashboard as code."""

from __future__ import annotations

import argparse
from pathlib import Path

from pldr_train.commands import EXIT_CODES
from pldr_train.commands.options import Action, TwoWordParser, whole_number

_MOST_LAYERS = 1000


def build_parser() -> argparse.ArgumentParser:
    """Return the command's options."""
    return TwoWordParser(
        "pldr-train wandb",
        "Show runs on Weights & Biases, from their folders. While a run trains, logging.wandb mirrors it by itself; "
        "docs/wandb.md says more.",
        {
            "replay": Action(_replay_parser, "write one clean W&B run: metrics, heatmaps, samples, config"),
            "upload": Action(_upload_parser, "log a checkpoint as an artifact"),
            "workspace": Action(_workspace_parser, "print the dashboard as JSON, or save it online"),
        },
    )


def run(options: argparse.Namespace) -> int:
    """Do what the second word says."""
    # Imported here: W&B takes a second, which --help and a mistake in the command should not cost.
    from pldr_train.commands.wandb_actions import ACTIONS  # noqa: PLC0415

    return ACTIONS[options.action](options)


def _parser(action: str, description: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(prog=f"pldr-train wandb {action}", description=description, epilog=EXIT_CODES)


def _add_target(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--project", metavar="P", help="(default: the recipe's logging.wandb_project)")
    parser.add_argument("--entity", metavar="E", help="user or team (default: the recipe's logging.wandb_entity)")
    parser.add_argument(
        "--mode",
        choices=("offline", "online"),
        help="offline: write files for `wandb sync`; online: upload (default: online where a key is set and W&B is not "
        "switched off, else offline)",
    )


def _replay_parser() -> argparse.ArgumentParser:
    parser = _parser(
        "replay",
        "Turn a run's folder into one W&B run of its own, without the seams of resumes: every line of metrics.jsonl, "
        "heatmaps and histograms of the snapshots, the samples, recipe and environment as config.",
    )
    parser.add_argument("source", metavar="RUN", type=Path, help="a run's folder, like runs/NAME")
    _add_target(parser)
    parser.add_argument("--name", metavar="N", help="of the W&B run (default: the recipe's run.name)")
    parser.add_argument("--id", metavar="ID", dest="run_id", help="of the W&B run (default: a new one)")
    return parser


def _upload_parser() -> argparse.ArgumentParser:
    parser = _parser(
        "upload",
        "Log a checkpoint as an artifact of the run's own W&B run; offline, and while the run trains, as that of a "
        "W&B run beside it.",
    )
    parser.add_argument("source", metavar="RUN", type=Path, help="a run's folder, like runs/NAME")
    parser.add_argument("--checkpoint", metavar="STEP|last", default="last", help="which one (default last)")
    _add_target(parser)
    return parser


def _workspace_parser() -> argparse.ArgumentParser:
    parser = _parser(
        "workspace",
        "Build the dashboard of runs as a W&B workspace: health, loss, DAG losses, deductive outputs, leakage, "
        "optimisation, system, data, media. It is printed as JSON, without any network, unless --save is given.",
    )
    parser.add_argument("--project", metavar="P", default="pldr_train", help="whose runs (default pldr_train)")
    parser.add_argument("--entity", metavar="E", default="", help="user or team; needed with --save")
    parser.add_argument("--runs", metavar="NAME", nargs="+", default=[], help="show these runs only (default: all)")
    parser.add_argument(
        "--layers", metavar="N", type=whole_number(1, _MOST_LAYERS), default=5, help="of the models (default 5)"
    )
    parser.add_argument(
        "--x", choices=("step", "tokens"), default="step", help="what the charts are drawn over (default step)"
    )
    parser.add_argument("--name", metavar="N", default="PLDR-LLM training", help="of the workspace")
    parser.add_argument(
        "--groups", metavar="GROUP", nargs="+", default=[], help="groups of parameters (optim.groups) to draw"
    )
    parser.add_argument("--out", metavar="FILE", type=Path, help="write the JSON there instead of printing it")
    parser.add_argument("--save", action="store_true", help="save it on W&B as a new view of the project")
    return parser
