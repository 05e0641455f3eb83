"""`pldr-train checkpoint`: list and verify a run's checkpoints, write one in another form, or the mean of several."""

from __future__ import annotations

import argparse
from pathlib import Path

from pldr_train.commands import EXIT_CODES
from pldr_train.commands.options import Action, TwoWordParser, whole_number

_FORMATS = ("weights", "torch", "universal")


def build_parser() -> argparse.ArgumentParser:
    """Return the command's options."""
    return TwoWordParser(
        "pldr-train checkpoint",
        "List and verify the checkpoints of a run, or write one in another form, or the mean of several.\n"
        "For a folder that transformers loads, see `pldr-train export`.",
        {
            "list": Action(_list_parser, "say which checkpoints a run has"),
            "verify": Action(_verify_parser, "check files, state and every value in full"),
            "consolidate": Action(_consolidate_parser, "write one as a single process would have"),
            "convert": Action(_convert_parser, "write weights alone, for torch, or for DeepSpeed"),
            "average": Action(_average_parser, "write the mean of several as a model's folder"),
        },
    )


def run(options: argparse.Namespace) -> int:
    """Do what the second word says."""
    # Imported here: torch takes seconds, which --help and a mistake in the command should not cost.
    from pldr_train.commands.checkpoint_actions import ACTIONS  # noqa: PLC0415

    return ACTIONS[options.action](options)


def _parser(action: str, description: str, epilog: str = EXIT_CODES) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(prog=f"pldr-train checkpoint {action}", description=description, epilog=epilog)


def _list_parser() -> argparse.ArgumentParser:
    parser = _parser(
        "list",
        "Say which checkpoints a run has, newest first, by their manifests and the files' sizes; contents are not "
        "looked at, `verify` does that.",
    )
    parser.add_argument(
        "source", metavar="RUN", type=Path, help="a run's folder, its checkpoints folder, or one checkpoint"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _verify_parser() -> argparse.ArgumentParser:
    parser = _parser(
        "verify",
        "Check checkpoints in full: checksums, the state file, whether the weights and optimizer files hold every "
        "element of the model that the checkpoint's own recipe describes, and whether all values are finite.",
        "exit codes: 0 all are whole; 1 one is damaged; 2 wrong input, the message says what and how to correct it",
    )
    parser.add_argument("source", metavar="RUN_OR_CHECKPOINT", type=Path, help="a run (all of its checkpoints), or one")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _add_source_and_target(parser: argparse.ArgumentParser, target: str) -> None:
    parser.add_argument("source", metavar="CHECKPOINT", type=Path, help="a checkpoint's folder, or a run's: its newest")
    parser.add_argument("target", metavar="DEST", type=Path, help=target)
    parser.add_argument("--force", action="store_true", help="replace what such a command has written there before")


def _consolidate_parser() -> argparse.ArgumentParser:
    parser = _parser(
        "consolidate",
        "Write a checkpoint of any number of processes as one process would have written it: one file of weights, one "
        "of optimizer state. A run resumes from it with the command that is printed at the end.",
    )
    _add_source_and_target(parser, "the folder to write")
    return parser


def _convert_parser() -> argparse.ArgumentParser:
    parser = _parser(
        "convert",
        "Write a checkpoint for other programs. weights: one safetensors file with our code's names, the recipe in its "
        "metadata. torch: a file of torch.save with the weights and AdamW's moments. universal: DeepSpeed's universal "
        "checkpoint, a folder. For a folder that transformers loads, see `pldr-train export`.",
    )
    _add_source_and_target(parser, "the file to write, for universal the folder")
    parser.add_argument("--to", choices=_FORMATS, required=True, dest="form", help="what to write")
    return parser


def _average_parser() -> argparse.ArgumentParser:
    parser = _parser(
        "average",
        "Write the mean of the weights of several checkpoints of a run, added up in fp64, as a folder in transformers' "
        "format, like `pldr-train export` does of one. Its model card says what was averaged.",
    )
    parser.add_argument("source", metavar="RUN", type=Path, help="a run's folder, or its checkpoints folder")
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument(
        "--last", metavar="N", type=whole_number(1), help="the newest so many checkpoints (default 3, or 2 of two)"
    )
    chosen.add_argument("--steps", metavar="A,B,...", type=_steps, help="the checkpoints of these steps")
    parser.add_argument(
        "--output", metavar="DIR", type=Path, help="the folder to write (default RUN/average-of-N-to-STEP)"
    )
    parser.add_argument("--tokenizer", metavar="FILE", type=Path, help="SentencePiece .model (default: the run's)")
    parser.add_argument("--overwrite", action="store_true", help="replace a model that is there already")
    return parser


def _steps(text: str) -> list[int]:
    return [whole_number(0, 10**9)(part.strip()) for part in text.split(",")]
