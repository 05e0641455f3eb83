"""`pldr-train extract-g`: the G of a trained model on a text."""

from __future__ import annotations

import argparse
from pathlib import Path

from pldr_train.commands import EXIT_CODES
from pldr_train.commands.options import natural, readable_text
from pldr_train.errors import CheckpointError, DataError
from pldr_train.untrusted import read_text


def build_parser() -> argparse.ArgumentParser:
    """Return the command's options."""
    parser = argparse.ArgumentParser(
        prog="pldr-train extract-g",
        description="Run a trained model over a text and write its G (layers, heads, d, d) as safetensors, for "
        "model.custom_G_type=external.",
        epilog=EXIT_CODES,
    )
    parser.add_argument("source", metavar="MODEL", type=Path, help="a run, a checkpoint, or an exported folder")
    parser.add_argument("target", metavar="FILE", type=Path, help="the safetensors file to write")
    text = parser.add_mutually_exclusive_group(required=True)
    text.add_argument("--text", type=readable_text, help="the text to read")
    text.add_argument("--text-file", metavar="FILE", type=Path, help="a UTF-8 file with the text")
    text.add_argument("--ids", metavar="ID", type=natural, nargs="+", help="token ids instead of a text")
    parser.add_argument("--overwrite", action="store_true", help="replace a file that is there already")
    return parser


def run(options: argparse.Namespace) -> int:
    """Extract, and say how to use what was written."""
    if not options.source.exists():
        raise CheckpointError(f"{options.source}: no such folder; name a run, a checkpoint or an exported model")
    text = options.text
    if options.text_file is not None:
        try:
            text = read_text(options.text_file, regular=False)
        except (OSError, ValueError) as error:
            raise DataError(f"--text-file {options.text_file} cannot be read: {error}") from error
    # Imported here: torch takes seconds, which --help and a mistake in the command should not cost.
    from pldr_train.models.extract_g import extract_curvature  # noqa: PLC0415
    from pldr_train.training.quiet import quiet_libraries  # noqa: PLC0415

    quiet_libraries()
    shape, tokens = extract_curvature(options.source, options.target, text, options.ids, options.overwrite)
    print(f"G           {shape}: layers, heads, head width, head width; from {tokens:,} tokens")
    print(f"file        {options.target}")
    print(f"use         model.custom_G_type=external model.custom_G_path={options.target}")
    return 0
