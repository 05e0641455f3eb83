"""`pldr-train tokenizer`: train a tokenizer on a recipe's documents; say what one is and how it does."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from pldr_train.commands import EXIT_CODES
from pldr_train.commands.options import Action, TwoWordParser, document_number

DEFAULT_SAMPLE_BYTES = 2_000_000_000
"""Nearly what SentencePiece's suffix array can hold: 2**31 characters."""
BYTES_PER_SAMPLE_BYTE = 20
INSPECTED_DOCUMENTS = 1000
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}


def build_parser() -> argparse.ArgumentParser:
    """Return the command's options."""
    return TwoWordParser(
        "pldr-train tokenizer",
        "Train a SentencePiece tokenizer on the documents of a recipe, or say what one is.",
        {
            "train": Action(_train_parser, "train one on a recipe's documents"),
            "inspect": Action(_inspect_parser, "say what one is, and how it does on documents"),
        },
    )


def run(options: argparse.Namespace) -> int:
    """Do what the second word says."""
    # Imported here: --help and a mistake in the command need none of what reads data.
    from pldr_train.commands.tokenizer_actions import ACTIONS  # noqa: PLC0415

    return ACTIONS[options.action](options)


def _train_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pldr-train tokenizer train",
        description="Train a SentencePiece unigram tokenizer of model.vocab_size pieces on the documents that a "
        "recipe's data section names, with the papers' settings (data/tokenizer.yaml lists them). The same arguments "
        "give the same file.",
        epilog=f"memory: training takes about {BYTES_PER_SAMPLE_BYTE} bytes for each byte of text, so 20 GB for "
        f"--sample-bytes 1GB. {EXIT_CODES}",
    )
    parser.add_argument("recipe", metavar="RECIPE", help="YAML file, for instance recipes/soc-110m-2.yaml")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="recipe values to replace")
    parser.add_argument(
        "--documents",
        metavar=("START", "STOP"),
        nargs=2,
        type=document_number,
        help="document numbers to train on, STOP excluded (default: as the settings say, 0 to 2,000,000 or as many as "
        "there are)",
    )
    parser.add_argument("--settings", metavar="FILE", type=Path, help="other settings, a file like data/tokenizer.yaml")
    parser.add_argument(
        "--output", metavar="FILE", type=Path, help="the .model file to write (default: the recipe's data.tokenizer)"
    )
    parser.add_argument(
        "--sample-bytes",
        metavar="N",
        type=_sample_bytes,
        default=DEFAULT_SAMPLE_BYTES,
        help="train on at most so much text, such as 500MB; of more, lines are sampled evenly (default and most: "
        f"{DEFAULT_SAMPLE_BYTES / 1e9:.0f}GB)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a file that is there already")
    parser.add_argument("--verbose", action="store_true", help="show SentencePiece's own log")
    return parser


def _inspect_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pldr-train tokenizer inspect",
        description="Compare a SentencePiece model with the published layout and, given documents, say how long they "
        "become and which pieces they use.",
        epilog=EXIT_CODES,
    )
    parser.add_argument(
        "model", metavar="MODEL", type=Path, help="a .model file, or a run's or exported model's folder"
    )
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="values to replace in --recipe's recipe")
    text = parser.add_mutually_exclusive_group()
    text.add_argument("--recipe", metavar="RECIPE", help="YAML file that names documents to tokenise")
    text.add_argument("--text-file", metavar="FILE", type=Path, help="a UTF-8 file to tokenise instead")
    parser.add_argument(
        "--documents",
        metavar=("START", "STOP"),
        nargs=2,
        type=document_number,
        help=f"with --recipe: document numbers, STOP excluded (default: the first {INSPECTED_DOCUMENTS:,} of its "
        "data.validation_documents or, where it has none, of its training documents)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _sample_bytes(text: str) -> int:
    found = re.fullmatch(r"([\d_]+(?:\.\d+)?)([KMG]?)B?", text.strip().upper())
    value = float(found[1].replace("_", "")) * _UNITS[found[2]] if found and found[1].strip("_") else 0
    if not 1 <= value <= DEFAULT_SAMPLE_BYTES:
        raise argparse.ArgumentTypeError(
            f"{text}: must be a number of bytes from 1 to {DEFAULT_SAMPLE_BYTES:,}, such as 500MB or 1_000_000_000"
        )
    return int(value)
