"""W&B's own process, which writes and uploads: ending it when it does not do so any more."""

from __future__ import annotations

import contextlib
from typing import Any

import wandb
from wandb.sdk import wandb_setup


def abandon_service() -> None:
    """End W&B's process, if there is one, with all that it has not done.

    Otherwise the end of this process would wait for one that does not answer, or complain of one that is dead.
    """
    connection = getattr(wandb_setup._singleton, "_connection", None)
    process: Any = getattr(getattr(connection, "_proc", None), "_process", None)
    if process is not None:
        process.kill()
    # Of a killed process it reports the exit code, in whatever way it takes; all that counts is that it is rid of it.
    with contextlib.suppress(Exception, SystemExit):
        wandb.teardown()
