"""Commands of two words: `pldr-train tokenizer train`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple


class Action(NamedTuple):
    """The second word of a command."""

    build_parser: Callable[[], argparse.ArgumentParser]
    run: Callable[[argparse.Namespace], int]
    help: str
    """One line for the list of actions."""


class TwoWordParser(argparse.ArgumentParser):
    """Parses the second word, then with that word's own parser; the result's `run` is what to call with it.

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
        """The options of the action that `args` name."""
        given = list(args or [])
        action = self.actions[self.parse_args(given[:1]).action]
        options = action.build_parser().parse_intermixed_args(given[1:], namespace)
        options.run = action.run
        return options
