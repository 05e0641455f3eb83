"""The one place that knows wandb: it mirrors a run's metrics there, offline where no key is set."""

from __future__ import annotations

import json
import netrc
import os
import secrets
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import wandb
from lightning.pytorch.loggers import WandbLogger

from pldr_train.recipe import Recipe, recipe_to_dict

ID_FILE = "wandb.json"


def resolve_mode(setting: str) -> str:
    """`online`, `offline` or `disabled` for the recipe's `logging.wandb`; `auto` is online if a key is known."""
    if setting != "auto":
        return setting
    mode = os.environ.get("WANDB_MODE", "")
    if mode in ("online", "offline", "disabled"):
        return mode
    return "online" if _key_is_set() else "offline"


def _key_is_set() -> bool:
    """Whether `wandb login` or the environment has set a key; nothing is asked of the network."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def wandb_mirror(recipe: Recipe, folder: Path) -> WandbLogger | None:
    """A logger whose W&B run keeps its id over resumes, or `None` if W&B is disabled."""
    mode = resolve_mode(recipe.logging.wandb)
    if mode == "disabled":
        return None
    # Started here rather than by the logger, which sets options that wandb warns about.
    run = wandb.init(
        mode=mode,  # type: ignore[arg-type]
        name=recipe.run.name,
        id=_run_id(folder),
        project=recipe.logging.wandb_project,
        entity=recipe.logging.wandb_entity,
        dir=str(folder),
        config=recipe_to_dict(recipe),
        # An offline run cannot be resumed; a later session of it is a directory of its own.
        resume="allow" if mode == "online" else None,
        settings=wandb.Settings(silent=True, console="off"),
    )
    return WandbLogger(experiment=run)


def finish_mirror() -> None:
    """Close the W&B run, if there is one, without its summary on the terminal."""
    if wandb.run is not None:
        wandb.finish()


def _run_id(folder: Path) -> str:
    path = folder / ID_FILE
    if path.exists():
        known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return str(known["id"])
    run_id = secrets.token_hex(4)
    path.write_text(json.dumps({"id": run_id}) + "\n", encoding="utf-8")
    return run_id
