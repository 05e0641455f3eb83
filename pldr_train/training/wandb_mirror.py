"""The one place that knows wandb: it mirrors a run's metrics there, offline where no key is set."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

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
    return "online" if os.environ.get("WANDB_API_KEY") or wandb.api.api_key else "offline"


def wandb_mirror(recipe: Recipe, folder: Path) -> WandbLogger | None:
    """A logger whose W&B run keeps its id over resumes, or `None` if W&B is disabled."""
    mode = resolve_mode(recipe.logging.wandb)
    if mode == "disabled":
        return None
    return WandbLogger(
        name=recipe.run.name,
        id=_run_id(folder),
        project=recipe.logging.wandb_project,
        entity=recipe.logging.wandb_entity,
        save_dir=str(folder),
        offline=mode == "offline",
        config=recipe_to_dict(recipe),
        settings=wandb.Settings(silent=True, console="off"),
        # An offline run cannot be resumed; a later session of it is a directory of its own.
        **({} if mode == "offline" else {"resume": "allow"}),
    )


def _run_id(folder: Path) -> str:
    path = folder / ID_FILE
    if path.exists():
        known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return str(known["id"])
    run_id = str(wandb.util.generate_id())
    path.write_text(json.dumps({"id": run_id}) + "\n", encoding="utf-8")
    return run_id
