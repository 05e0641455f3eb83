"""`pldr-train export`: the model of a run as a folder that loads anywhere."""

from __future__ import annotations

import argparse
from pathlib import Path

from pldr_train.commands import EXIT_CODES
from pldr_train.errors import CheckpointError


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
    return parser


def run(options: argparse.Namespace) -> int:
    """Export, and say how to load what was written."""
    if not options.source.exists():
        raise CheckpointError(
            f"{options.source}: no such folder; name one like runs/NAME or runs/NAME/checkpoints/last"
        )
    # Imported here: torch takes seconds, which --help and a mistake in the command should not cost.
    from pldr_train.models.exporting import export_run  # noqa: PLC0415
    from pldr_train.training.quiet import quiet_libraries  # noqa: PLC0415

    quiet_libraries()
    checkpoint = export_run(options.source, options.target, options.tokenizer, options.dtype, options.overwrite)
    print(f"exported    step {checkpoint.step:,} of run {checkpoint.recipe.run.name}")
    print(f"folder      {options.target}")
    print(f'load        AutoModelForCausalLM.from_pretrained("{options.target}", trust_remote_code=True)')
    print(f'try         pldr-train generate {options.target} "a prompt"')
    return 0
