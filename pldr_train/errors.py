"""Errors that a user can mend.

Anything a user can cause (a wrong recipe, a missing file, a damaged checkpoint) is raised as a `UserError` whose
message names the key or file, the value and the fix. The command line prints the message alone and exits with code 2;
every other exception is a defect of the program and keeps its traceback.
"""

from __future__ import annotations


class UserError(ValueError):
    """Base of all errors that the user can mend; the message is complete by itself."""


class RecipeError(UserError):
    """One or more problems in a recipe; the message lists them all."""


class DataError(UserError):
    """A corpus, tokenizer or data file that cannot be used as the recipe asks."""


class CheckpointError(UserError):
    """A checkpoint that cannot be written, or is damaged, unsafe or does not fit the run."""


class LeakageError(UserError):
    """The model reads the future, and the recipe says that the run ends on it; it was saved."""


class ToldElsewhereError(UserError):
    """Another process of the run has the error that ends it, and tells the user."""


class LostProcessError(Exception):
    """Another process of the run has ended or does not answer: nothing to mend here, and no defect either."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the error's type where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
