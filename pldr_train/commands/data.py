"""`pldr-train data`: tokenise documents ahead, look at them, check files, fetch them."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from pldr_train.commands import EXIT_CODES
from pldr_train.commands.options import Action, TwoWordParser, document_number, natural, positive_int, whole_number

_SAMPLE_DOCUMENTS, _SHOWN_ROWS = 2000, 2
_MOST_WORKERS = 4096


def build_parser() -> argparse.ArgumentParser:
    """Return the command's options."""
    return TwoWordParser(
        "pldr-train data",
        "Tokenise a recipe's documents ahead, look at them, check their files, fetch them.",
        {
            "tokenize": Action(_tokenize_parser, "write documents as token ids, for data.source=tokens"),
            "inspect": Action(_inspect_parser, "say what documents are like, and how often a run sees them"),
            "verify": Action(_verify_parser, "look for damaged and missing files"),
            "download": Action(_download_parser, "fetch files of the Hub ahead, for data.source=hub"),
        },
    )


def run(options: argparse.Namespace) -> int:
    """Do what the second word says."""
    # Imported here: --help and a mistake in the command need none of what reads data.
    from pldr_train.commands.data_actions import ACTIONS  # noqa: PLC0415

    return ACTIONS[options.action](options)


def _parser(action: str, description: str, recipe: str = "RECIPE") -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"pldr-train data {action}", description=description, epilog=EXIT_CODES)
    parser.add_argument("recipe", metavar=recipe, help="YAML file, for instance recipes/soc-110m-2.yaml")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="recipe values to replace")
    return parser


def _add_documents(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument(
        "--documents",
        metavar=("START", "STOP"),
        nargs=2,
        type=document_number,
        help=f"document numbers, STOP excluded (default: {default})",
    )


def _tokenize_parser() -> argparse.ArgumentParser:
    # Imported here: what reads and writes tokens takes longer than the help of the other actions.
    from pldr_train.data.tokens.shards import DOCUMENTS_PER_SHARD  # noqa: PLC0415

    parser = _parser(
        "tokenize",
        "Tokenise the documents of a recipe into a folder that data.source=tokens reads. The rows of a run are the "
        "same as when it tokenises as it trains. Interrupted, the same command goes on.",
    )
    parser.add_argument("--output", metavar="FOLDER", type=Path, required=True, help="the folder to write")
    _add_documents(parser, "what the recipe trains and validates on")
    cores = os.cpu_count() or 1
    parser.add_argument(
        "--workers",
        metavar="N",
        type=whole_number(1, _MOST_WORKERS),
        default=cores,
        help=f"processes (default: {cores})",
    )
    parser.add_argument(
        "--documents-per-shard",
        metavar="N",
        type=positive_int,
        default=DOCUMENTS_PER_SHARD,
        help=f"documents of one file (default: {DOCUMENTS_PER_SHARD:,})",
    )
    return parser


def _inspect_parser() -> argparse.ArgumentParser:
    parser = _parser("inspect", "Tokenise a sample of a recipe's documents, and say what they are like.")
    _add_documents(parser, "the training interval")
    parser.add_argument(
        "--sample",
        metavar="N",
        type=positive_int,
        default=_SAMPLE_DOCUMENTS,
        help=f"documents to read, evenly spaced (default: {_SAMPLE_DOCUMENTS:,})",
    )
    parser.add_argument(
        "--rows", metavar="N", type=natural, default=_SHOWN_ROWS, help=f"rows to show (default: {_SHOWN_ROWS})"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _verify_parser() -> argparse.ArgumentParser:
    parser = _parser(
        "verify",
        "Check the files of a folder of tokens, or those that a recipe's intervals touch, and list every fault.",
        "RECIPE_OR_FOLDER",
    )
    parser.add_argument("--quick", action="store_true", help="sizes and headers only, not what is in the files")
    parser.add_argument("--all", action="store_true", help="of a recipe: all files, whatever its intervals touch")
    return parser


def _download_parser() -> argparse.ArgumentParser:
    parser = _parser("download", "Fetch the files of the Hub that a recipe's intervals touch into data.cache_dir.")
    parser.add_argument("--force", action="store_true", help="although the disk is too small for all of them")
    return parser
