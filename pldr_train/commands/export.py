"""`pldr-train export`: the model of a run as a folder that loads anywhere."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pldr_train.commands import EXIT_CODES
from pldr_train.errors import CheckpointError, DataError

if TYPE_CHECKING:
    from pldr_train.models.loading import RunCheckpoint

_UNKNOWN_LICENSE = "unknown"
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.-]{1,40}", re.ASCII)


def build_parser() -> argparse.ArgumentParser:
    """Return the command's options."""
    parser = argparse.ArgumentParser(
        prog="pldr-train export",
        description="Write the model of a run as a folder in transformers' format: weights with the published names, "
        "tokenizer, model card, and the model's code, so that it loads where pldr_train is not installed.",
        epilog=EXIT_CODES,
    )
    parser.add_argument("source", metavar="RUN_OR_CHECKPOINT", type=Path, help="a run's folder, or one checkpoint's")
    parser.add_argument("target", metavar="FOLDER", type=Path, help="the folder to write")
    parser.add_argument("--tokenizer", metavar="FILE", type=Path, help="SentencePiece .model (default: the run's)")
    parser.add_argument(
        "--dtype", choices=("fp32", "bf16", "fp16"), default="fp32", help="of the weights (default fp32)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a model that is there already")
    parser.add_argument(
        "--push", metavar="OWNER/NAME", help="then upload the folder to this repository on the Hugging Face Hub"
    )
    parser.add_argument("--public", action="store_true", help="with --push: for all to see (default: private)")
    parser.add_argument("--yes", action="store_true", help="with --public: do not ask")
    parser.add_argument(
        "--license",
        metavar="NAME",
        help="with --push: of the weights, by the Hub's short names, such as apache-2.0 (default unknown)",
    )
    return parser


def run(options: argparse.Namespace) -> int:
    """Export, and say how to load what was written."""
    if not options.source.exists():
        raise CheckpointError(
            f"{options.source}: no such folder; name one like runs/NAME or runs/NAME/checkpoints/last"
        )
    _check_push_options(options)
    # Imported here: torch takes seconds, which --help and a mistake in the command should not cost.
    from pldr_train.models.card import Publication  # noqa: PLC0415
    from pldr_train.models.exporting import check_target, export_run  # noqa: PLC0415
    from pldr_train.training.quiet import quiet_libraries  # noqa: PLC0415

    quiet_libraries()
    publication = None
    if options.push is not None:
        from pldr_train.models.pushing import check_push  # noqa: PLC0415, as above

        check_target(options.target, options.overwrite)
        check_push(options.push, options.public)
        publication = Publication(options.push, options.license or _UNKNOWN_LICENSE)
    checkpoint = export_run(
        options.source, options.target, options.tokenizer, options.dtype, options.overwrite, publication
    )
    print(f"exported    step {checkpoint.step:,} of run {checkpoint.recipe.run.name}")
    print(f"folder      {options.target}")
    print(f'load        AutoModelForCausalLM.from_pretrained("{options.target}", trust_remote_code=True)')
    print(f'try         pldr-train generate {options.target} "a prompt"')
    if options.push is not None:
        _push(options, checkpoint)
    return 0


def _check_push_options(options: argparse.Namespace) -> None:
    """Check that the options fit together, and ask whether a model shall be public. Raises DataError."""
    for name in ("public", "yes", "license"):
        if getattr(options, name) and options.push is None:
            raise DataError(f"--{name} is for --push OWNER/NAME; add that, or leave it out")
    if options.license is not None and not _LICENSE.fullmatch(options.license):
        raise DataError(f"--license {options.license}: no short name of a license; write one such as apache-2.0")
    if not options.public or options.yes:
        return
    if not sys.stdin.isatty():
        raise DataError(
            f"--public: {options.push} would be there for all to see, and there is no terminal to ask in; pass --yes"
        )
    answer = input(f"{options.push} will be there for all to see on the Hub. Go on? [y/N] ")
    if answer.strip().lower() not in ("y", "yes"):
        raise DataError("--public: not confirmed; nothing was exported. Leave it out for a private repository")


def _push(options: argparse.Namespace, checkpoint: RunCheckpoint) -> None:
    from pldr_train.models.pushing import push  # noqa: PLC0415, as above

    try:
        url = push(options.target, checkpoint, options.push, options.public)
    except DataError as error:
        raise DataError(f"{error}\n{options.target} is written; once this is corrected, add --overwrite") from error
    print(f"pushed      {url} ({'public' if options.public else 'private'})")
    if options.license is None:
        print("license     unknown, by the card; name one with --license")
