"""Commands of two words: `pldr-train tokenizer train`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple


class Action(NamedTuple):
    """The second word of a command."""

    build_parser: Callable[[], argparse.ArgumentParser]
    help: str
    """One line for the list of actions."""


class TwoWordParser(argparse.ArgumentParser):
    """Parses the second word, which becomes the result's `action`, then the rest with that word's own parser.

    Argparse's subparsers do not let options stand between positional words such as key=value.
    """

    def __init__(self, prog: str, description: str, actions: Mapping[str, Action]) -> None:
        width = max(map(len, actions))
        lines = "\n".join(f"  {name:<{width}}  {action.help}" for name, action in actions.items())
        super().__init__(
            prog=prog,
            description=description,
            epilog=f"actions:\n{lines}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self.add_argument("action", choices=actions, help=f"what to do; `{prog} ACTION --help` says more")
        self.actions = actions

    def parse_intermixed_args(self, args: Iterable[str] | None = None, namespace: Any = None) -> Any:
        """Return the options of the action that `args` name, and its name."""
        given = list(args or [])
        action = self.parse_args(given[:1]).action
        options = self.actions[action].build_parser().parse_intermixed_args(given[1:], namespace)
        options.action = action
        return options
