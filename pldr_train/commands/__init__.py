"""The commands of `pldr-train`. Each is a module with `build_parser` and `run`, imported when it is named.

A module that needs torch imports it after the user's mistakes have been found, so its parser and its checks lie apart
from its work: `checkpoint.py` parses and checks, `checkpoint_actions.py` has ordinary imports and does the work.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, cast

EXIT_CODES = "exit codes: 0 done; 2 wrong input, the message says what and how to correct it"
EXIT_BY_SIGNAL = {name: 128 + signal.Signals[name] for name in ("SIGHUP", "SIGINT", "SIGPIPE", "SIGTERM")}
"""What a shell reports of a process that a signal ended: 128 + the signal's number."""


@contextlib.contextmanager
def importing_much() -> Iterator[None]:
    """Import torch and its like without looking for garbage, which takes a sixth of the time of such imports."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


class CommandModule(Protocol):
    """What a command's module has."""

    def build_parser(self) -> argparse.ArgumentParser:
        """Return the command's options.

        Each command has a parser of its own: argparse mixes options and key=value words only without subparsers.
        """

    def run(self, options: argparse.Namespace) -> int:
        """Run the command and return its exit code; raises UserError for what the user can correct."""


@dataclass(frozen=True)
class Command:
    """A command's module below this package, its line in `pldr-train --help`, and what to do where memory runs out."""

    module: str
    help: str
    less_memory: str = "end other programs, or take a machine with more memory"

    def load(self) -> CommandModule:
        """Import the module."""
        return cast(CommandModule, importlib.import_module(f"{__name__}.{self.module}"))


COMMANDS = {
    "init": Command("init", "write a recipe for texts of your own"),
    "recipes": Command("recipes", "list, show or copy the recipes that come with the package"),
    "fit": Command("fit", "train what a recipe says, or go on with it"),
    "sweep": Command("sweep", "run a recipe many times along axes: grids and searches, resumable"),
    "evaluate": Command(
        "evaluate",
        "measure a trained model: likelihood in a block and in generating, G",
        "lower --batch-size, or measure with --device cpu",
    ),
    "audit": Command(
        "audit",
        "look into a trained model: its operator layer by layer, its caches, what it reads of the future",
        "lower --rows and --context, or audit with --device cpu",
    ),
    "report": Command("report", "show runs on one HTML page: curves, events, recipes compared, samples"),
    "watch": Command("watch", "follow a run in the terminal"),
    "generate": Command(
        "generate",
        "continue prompts with a trained model",
        "lower --max-new-tokens or --num-beams, give a shorter prompt, or generate with --device cpu",
    ),
    "export": Command("export", "write a run's model as a folder that transformers loads"),
    "import": Command("import_", "turn checkpoints and predefined G of the original code into ours"),
    "extract-g": Command("extract_g", "write the G of a trained model on a text"),
    "plan": Command("plan", "say what a run takes on a cluster: memory, network, time"),
    "doctor": Command("doctor", "look at this machine before a run: GPUs, network, disk, accounts"),
    "data": Command("data", "tokenise documents ahead; inspect, verify or download them"),
    "tokenizer": Command("tokenizer", "train a tokenizer on a recipe's documents; say what one is"),
    "checkpoint": Command("checkpoint", "look over, verify, consolidate or convert a run's checkpoints"),
    "wandb": Command("wandb", "show a run on Weights & Biases: replay, checkpoints, a dashboard"),
    "explain": Command("explain", "say what a key of a recipe means"),
    "schema": Command("schema", "print the JSON Schema of recipes"),
    "completion": Command("completion", "print a script that completes commands and keys in the shell"),
}
"""All commands by name, in the order of the help."""
