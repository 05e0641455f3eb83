"""`pldr-train checkpoint`: list and verify a run's checkpoints, write one in another form."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pldr_train.commands.two_words import Action, TwoWordParser
from pldr_train.errors import CheckpointError
from pldr_train.printing import printable
from pldr_train.runs.layout import RECIPE_FILE

if TYPE_CHECKING:
    from pldr_train.training.checkpoint_check import Checkpoint

EXIT_DAMAGED = 1
_EXIT_CODES = "exit codes: 0 done; 2 something to mend, the message says what"
_FORMATS = ("weights", "torch", "universal")


def build_parser() -> argparse.ArgumentParser:
    """The command's options."""
    return TwoWordParser(
        "pldr-train checkpoint",
        "List and verify the checkpoints of a run, or write one in another form.\n"
        "For a folder that transformers loads, see `pldr-train export`.",
        {
            "list": Action(_list_parser, _list, "say which checkpoints a run has"),
            "verify": Action(_verify_parser, _verify, "check files, state and every value in full"),
            "consolidate": Action(_consolidate_parser, _consolidate, "write one as a single process would have"),
            "convert": Action(_convert_parser, _convert, "write weights alone, for torch, or for DeepSpeed"),
        },
    )


def run(options: argparse.Namespace) -> int:
    """Do what the second word says."""
    code: int = options.run(options)
    return code


def _parser(action: str, description: str, epilog: str = _EXIT_CODES) -> argparse.ArgumentParser:
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
        "exit codes: 0 all are whole; 1 one is damaged; 2 something to mend, the message says what",
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


def _list(options: argparse.Namespace) -> int:
    from pldr_train.commands.checkpoint_display import list_as_table, list_as_values
    from pldr_train.training.checkpoint_list import dangling_last, find_place, list_checkpoints, list_leftovers

    place = find_place(options.source)
    found = (list_checkpoints(place), list_leftovers(place), dangling_last(place))
    print(json.dumps(list_as_values(*found), indent=1) if options.json else list_as_table(*found))
    return 0


def _verify(options: argparse.Namespace) -> int:
    from pldr_train.commands.checkpoint_display import BytesProgress, verified_as_values
    from pldr_train.training.checkpoint_check import bytes_to_read, find_problems
    from pldr_train.training.checkpoint_list import find_place
    from pldr_train.training.quiet import quiet_libraries

    quiet_libraries()
    place = find_place(options.source)
    if not place.folders:
        raise CheckpointError(f"{options.source}: the run has no checkpoint yet; there is nothing to verify")
    problems: dict[Path, list[str]] = {}
    for folder in place.folders:
        with BytesProgress(folder.name, bytes_to_read(folder)) as progress:
            found = find_problems(folder, progress.advance)
        if found and not folder.exists():
            print(f"{printable(folder.name)}  removed meanwhile by its run", file=sys.stderr)
            continue
        problems[folder] = found
        if not options.json:
            print(f"{printable(folder.name)}  {'DAMAGED' if problems[folder] else 'ok'}", flush=True)
            for problem in problems[folder]:
                print(f"  {printable(problem)}", flush=True)
    if options.json:
        print(json.dumps(verified_as_values(problems), indent=1))
    return EXIT_DAMAGED if any(problems.values()) else 0


def _consolidate(options: argparse.Namespace) -> int:
    from pldr_train.commands.checkpoint_display import BytesProgress, size_text
    from pldr_train.training.checkpoint_check import open_checkpoint
    from pldr_train.training.checkpoint_convert import check_consolidated_target, consolidate
    from pldr_train.training.checkpoint_list import find_one, folder_bytes
    from pldr_train.training.quiet import quiet_libraries

    quiet_libraries()
    source = find_one(options.source)
    check_consolidated_target(options.target, source, options.force)
    with BytesProgress("consolidate", 2 * folder_bytes(source)) as progress:
        checkpoint = open_checkpoint(source, progress.advance)
        consolidate(checkpoint, options.target, options.force, progress.advance)
    recipe = checkpoint.recipe
    print(f"checkpoint  step {checkpoint.step:,} of run {recipe.run.name}, {size_text(folder_bytes(options.target))}")
    print(f"folder      {options.target}")
    print(f"resume      {shlex.join(_resume_command(checkpoint, options.target))}")
    return 0


def _resume_command(checkpoint: Checkpoint, target: Path) -> list[str]:
    """A command that goes on from a consolidated checkpoint; of a run that was complete it trains as long again."""
    recipe = checkpoint.recipe
    path = checkpoint.folder.parent.parent / RECIPE_FILE
    words = [
        "pldr-train",
        "fit",
        os.path.relpath(path) if path.is_file() else "RECIPE",
        f"run.name={recipe.run.name}-2",
    ]
    if checkpoint.step >= recipe.trainer.max_steps:
        words.append(f"trainer.max_steps={2 * checkpoint.step}")
    return [*words, "--resume", str(target)]


_USE = {
    "weights": 'safetensors.torch.load_file("{target}"); its metadata holds the recipe',
    "torch": 'torch.load("{target}", weights_only=True)["model"]',
    "universal": 'engine.load_checkpoint("{target}") with {{"checkpoint": {{"load_universal": true}}}}',
}


def _convert(options: argparse.Namespace) -> int:
    from pldr_train.commands.checkpoint_display import BytesProgress
    from pldr_train.training.checkpoint_check import open_checkpoint
    from pldr_train.training.checkpoint_convert import check_converted_target, convert
    from pldr_train.training.checkpoint_list import find_one, folder_bytes
    from pldr_train.training.quiet import quiet_libraries

    quiet_libraries()
    source = find_one(options.source)
    check_converted_target(options.target, source, options.form, options.force)
    with BytesProgress("convert", 2 * folder_bytes(source)) as progress:
        checkpoint = open_checkpoint(source, progress.advance)
        convert(checkpoint, options.target, options.form, options.force, progress.advance)
    print(f"converted   step {checkpoint.step:,} of run {checkpoint.recipe.run.name}")
    print(f"{'folder' if options.form == 'universal' else 'file':<12}{options.target}")
    print(f"load        {_USE[options.form].format(target=options.target)}")
    return 0
