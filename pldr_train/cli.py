"""The command line: `pldr-train`. Parses, runs a command of `pldr_train.commands`, and makes exit codes of errors."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from pldr_train import __version__
from pldr_train.commands import COMMANDS, EXIT_BY_SIGNAL
from pldr_train.errors import LostProcessError, RecipeError, ReportedElsewhereError, UserError, os_error_text
from pldr_train.memory_errors import worded_out_of_memory
from pldr_train.printing import log_to_terminal, prepare_standard_streams

EXIT_USER_ERROR = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code.

    0; 2 for a user's error; 129, 130 or 143 when left on a signal; 1 when another process of the run was lost.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    prepare_standard_streams()
    log_to_terminal()
    try:
        return _run(given)
    except ReportedElsewhereError:
        pass
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
    except LostProcessError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # What reads the output has left (`| head`): no error, and nothing more is to be written at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BY_SIGNAL["SIGPIPE"]
    except OSError as error:
        words = os_error_text(error)
        if words is None:
            raise
        print(f"error: {words}", file=sys.stderr)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return EXIT_BY_SIGNAL["SIGINT"]
    return EXIT_USER_ERROR


def _run(given: list[str]) -> int:
    listing = "\n".join(f"  {name:<10} {command.help}" for name, command in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="pldr-train",
        description="Pretrain PLDR-LLMs and study the DAG loss of their deductive outputs.",
        epilog=f"commands:\n{listing}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"pldr-train {__version__}")
    parser.add_argument("command", choices=COMMANDS, help="what to do; `pldr-train COMMAND --help` says more")
    if not given:
        parser.print_help()
        return 0
    command = COMMANDS[parser.parse_args(given[:1]).command]
    module = command.load()
    parser = module.build_parser()
    _refuse_keys_as_options(parser, given[1:])
    options = parser.parse_intermixed_args(given[1:], argparse.Namespace(given=given))
    for name, value in vars(options).items():  # shells leave --out=~/x alone
        if isinstance(value, Path):
            setattr(options, name, Path(os.path.expanduser(value)))
    with worded_out_of_memory(command.less_memory):
        return module.run(options)


def _refuse_keys_as_options(parser: argparse.ArgumentParser, given: Sequence[str]) -> None:
    """Say how a recipe's key is set to those who write `--lr 1e-3`. Raises RecipeError."""
    if not any(action.dest == "overrides" for action in parser._actions):
        return
    for place, word in enumerate(given):
        name, equals, value = word.removeprefix("--").partition("=")
        known = any(option.startswith(f"--{name}") for option in parser._option_string_actions)
        if not word.startswith("--") or not name or known:
            continue
        # Imported here: it takes longer than all of a command's help, and only a mistake needs it.
        from pldr_train.recipe import recipe_keys  # noqa: PLC0415
        from pldr_train.recipe.yaml_text import suggest_key  # noqa: PLC0415

        key = suggest_key(name.replace("-", "_"), recipe_keys())
        if key is not None:
            following = given[place + 1] if place + 1 < len(given) else ""
            value = value if equals else "..." if not following or following.startswith("-") else following
            raise RecipeError(f"{word}: no such option; a recipe's keys are set without dashes: {key}={value}")
