"""`pldr-train init`: a commented recipe for texts of one's own."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path

from pldr_train.data.files import write_file_atomically
from pldr_train.errors import DataError
from pldr_train.outputs import check_output, is_recipe


def build_parser() -> argparse.ArgumentParser:
    """Return the command's options."""
    parser = argparse.ArgumentParser(
        prog="pldr-train init",
        description="Write a commented recipe for the texts in a folder (txt, md, jsonl, parquet), with sizes chosen "
        "for the amount of text and for this machine.",
        epilog="exit codes: 0 done; 2 an error that the message explains",
    )
    parser.add_argument("path", metavar="FOLDER", type=Path, help="the folder with the texts, or one file")
    parser.add_argument("--out", metavar="FILE", type=Path, help="the recipe to write (default: NAME.yaml here)")
    parser.add_argument("--name", help="of the run (default: the folder's)")
    parser.add_argument(
        "--source", choices=("text", "jsonl", "parquet"), help="which files, where there are several kinds"
    )
    parser.add_argument("--text-column", metavar="NAME", help="column or key that holds the text")
    parser.add_argument(
        "--separator", metavar="TEXT", help="what stands between two documents of a text file; \\n is a line's end"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the recipe if there is one")
    return parser


def run(options: argparse.Namespace) -> int:
    """Look at the texts, write the recipe, and say what comes next."""
    name = options.name or re.sub(r"[^A-Za-z0-9._-]+", "-", options.path.resolve().stem).strip("-.") or "own-texts"
    target = options.out or Path(f"{name}.yaml")
    if target.exists() and not options.overwrite:
        raise DataError(f"{target} exists; name another file with --out, or replace it with --overwrite")
    check_output(target, "--out", is_recipe, "a recipe")
    if not target.parent.is_dir():
        raise DataError(f"--out {target}: no folder {target.parent}; make it, or name another file")
    # Imported here: torch takes seconds, which --help and a mistake in the command should not cost.
    import torch  # noqa: PLC0415

    from pldr_train.drafting import Machine, draft_recipe, look_at  # noqa: PLC0415

    separator = None if options.separator is None else options.separator.replace("\\n", "\n")
    texts = look_at(options.path, options.source, options.text_column, separator)
    machine = Machine(len(os.sched_getaffinity(0)), bool(torch.cuda.is_available()))
    draft = draft_recipe(options.path, name, machine, texts)
    write_file_atomically(target, draft.text.encode(), fix="name another file with --out")
    print(f"texts       {texts.documents:,} documents of {texts.mean_bytes:,.0f} bytes, some {texts.tokens:,} tokens")
    minutes = round(draft.minutes)
    duration = {0: "less than a minute", 1: "about a minute"}.get(minutes, f"about {minutes:,} minutes")
    print(f"model       {draft.parameters:,} parameters, {draft.steps:,} steps, {duration} here")
    print(f"recipe      {target}")
    print(f"next        pldr-train fit {target}")
    return 0
