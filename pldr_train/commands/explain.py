"""`pldr-train explain`: what a recipe's keys mean."""

from __future__ import annotations

import argparse

from pldr_train.errors import RecipeError
from pldr_train.recipe.explaining import explain, keys_as_markdown


def build_parser() -> argparse.ArgumentParser:
    """Return the command's options."""
    parser = argparse.ArgumentParser(
        prog="pldr-train explain",
        description="Say what a key of a recipe means: its values, its default, and whether it may differ on resuming.",
    )
    parser.add_argument(
        "key", metavar="KEY", nargs="?", help="a key (optim.lr, or lr), or a section (optim); without one: all sections"
    )
    parser.add_argument("--markdown", action="store_true", help="print all keys as a page of Markdown")
    return parser


def run(options: argparse.Namespace) -> int:
    """Print the explanation."""
    if options.markdown and options.key is not None:
        raise RecipeError(f"--markdown prints all keys; leave out {options.key}")
    print(keys_as_markdown() if options.markdown else explain(options.key), end="" if options.markdown else "\n")
    return 0
