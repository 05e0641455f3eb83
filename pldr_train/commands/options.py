"""Options of commands: numbers and devices with their bounds, as types for argparse, and commands of two words.

Every numeric option of every command has one of these types, so that nan, inf and numbers that nothing can hold are
answered in words before any work is done.

`TwoWordParser` parses commands of two words: `pldr-train tokenizer train`.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

MOST_COUNT = 10**6
"""Of rows, tokens to generate and the like; more is a slip of the keyboard."""
MOST_DOCUMENTS = 2**53
MOST_SEED = 2**63 - 1
MOST_TEMPERATURE = 1e6
"""All tokens are equally likely above."""
_DEVICE = re.compile(r"auto|cpu|mps|cuda(:\d{1,3})?", re.ASCII)
_WHOLE = re.compile(r"\d{1,20}", re.ASCII)


def whole_number(least: int, most: int = MOST_COUNT) -> Callable[[str], int]:
    """Return a whole number from `least` to `most`, written in digits."""

    def convert(text: str) -> int:
        value = int(text) if _WHOLE.fullmatch(text) else None
        if value is None or not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{_short(text)}: must be a whole number from {least} to {most:,}")
        return value

    return convert


def number(above: float, most: float) -> Callable[[str], float]:
    """Return a number above `above`, `most` at most."""

    def convert(text: str) -> float:
        value = _float(text)
        if value is None or not above < value <= most:
            raise argparse.ArgumentTypeError(f"{_short(text)}: must be above {above:g} and at most {most:,g}")
        return value

    return convert


positive_int = whole_number(1)
natural = whole_number(0)
document_number = whole_number(0, MOST_DOCUMENTS)
seed = whole_number(0, MOST_SEED)
share = number(0, 1)


def temperature(text: str) -> float:
    """0, or a number that logits can be divided by."""
    # Imported here: the schema of recipes takes longer than all of a command's help.
    from pldr_train.recipe import LEAST_TEMPERATURE  # noqa: PLC0415

    value = _float(text)
    if value is None or not (value == 0 or LEAST_TEMPERATURE <= value <= MOST_TEMPERATURE):
        raise argparse.ArgumentTypeError(
            f"{_short(text)}: must be 0 (greedy), or from {LEAST_TEMPERATURE:g} to {MOST_TEMPERATURE:,g}"
        )
    return value


def device(text: str) -> str:
    """Return a device that a model can compute on; whether it is there is seen later."""
    if not _DEVICE.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{_short(text)}: must be auto, cpu, cuda or cuda:N, N the GPU's number")
    return text


def _float(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _short(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:37]}..."


def readable_text(text: str) -> str:
    """Return a text for a model, without what stands for bytes that could not be decoded."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise argparse.ArgumentTypeError(
            f"{_short(text)!a}: character {error.start + 1} is not valid UTF-8; convert the text, for instance with "
            "`iconv -f latin1 -t utf-8`"
        ) from None
    return text


class Action(NamedTuple):
    """The second word of a command."""

    build_parser: Callable[[], argparse.ArgumentParser]
    help: str
    """One line for the list of actions."""


class TwoWordParser(argparse.ArgumentParser):
    """Parse the second word, which becomes the result's `action`, then the rest with that word's own parser.

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
