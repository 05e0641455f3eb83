"""What the package says on its way, collected from its logger."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

LOGGER = logging.getLogger("pldr_train")


class _Collector(logging.Handler):
    def __init__(self, said: list[str]) -> None:
        super().__init__()
        self._said = said

    def emit(self, record: logging.LogRecord) -> None:
        self._said.append(record.getMessage())


@contextmanager
def collected() -> Iterator[list[str]]:
    """The messages from now on; caplog would begin anew with a test's fixtures and its body."""
    said: list[str] = []
    handler, level = _Collector(said), LOGGER.level
    LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.INFO)
    try:
        yield said
    finally:
        LOGGER.removeHandler(handler)
        LOGGER.setLevel(level)
