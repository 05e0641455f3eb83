"""The command line: `pldr-train`."""

from __future__ import annotations

import argparse
import errno
import json
import sys
from collections.abc import Sequence

from pldr_train import __version__
from pldr_train.errors import UserError
from pldr_train.recipe import Recipe, dump_recipe, load_recipe, recipe_json_schema

EXIT_USER_ERROR = 2
# What a shell reports of a process that a signal ended: 128 + the signal's number.
_EXIT_BY_SIGNAL = {"SIGTERM": 143, "SIGINT": 130}
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 2 for what the user can mend, 130 or 143 when left on a signal."""
    options = _parser().parse_intermixed_args(arguments)
    try:
        code: int = options.run(options)
        return code
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
    except OSError as error:
        if error.errno not in _DISK_FULL:
            raise
        where = f" while writing {error.filename}" if error.filename else ""
        print(
            f"error: the disk is full{where} ({error.strerror}); free some space and run the same command again: "
            "it goes on from the last checkpoint",
            file=sys.stderr,
        )
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return _EXIT_BY_SIGNAL["SIGINT"]
    return EXIT_USER_ERROR


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pldr-train", description="Pretrain PLDR-LLMs and study the DAG loss of their deductive outputs."
    )
    parser.add_argument("--version", action="version", version=f"pldr-train {__version__}")
    parser.set_defaults(run=lambda _: _help(parser))
    return parser


def _help(parser: argparse.ArgumentParser) -> int:
    parser.print_help()
    return EXIT_USER_ERROR
