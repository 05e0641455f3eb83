"""Whether a run is shown on Weights & Biases: its own switches and keys, read without importing it."""

from __future__ import annotations

import configparser
import netrc
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlparse

MODES = ("online", "offline", "disabled")
_WORDS = {mode: mode for mode in MODES} | {"run": "online", "shared": "online", "dryrun": "offline"}
_FALSE = ("", "0", "false", "no", "off", "n", "f")


def resolve_mode(setting: str) -> str:
    """`online`, `offline` or `disabled` for the recipe's `logging.wandb`.

    `auto` is what W&B's own switches say (`wandb offline`, WANDB_MODE, ...), without any online if a key is known.
    """
    if setting != "auto":
        return setting
    switch = own_switch()
    if switch is not None:
        return switch.mode
    return "online" if key_is_set() else "offline"


def key_is_set() -> bool:
    """Return whether `wandb login` or the environment has set a key; nothing is asked of the network."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


class Switch(NamedTuple):
    """A mode and what asks for it, for the user."""

    mode: str
    source: str


def own_switch(environment: Mapping[str, str] = os.environ) -> Switch | None:
    """Return the mode that W&B itself would take, `None` where nothing says one.

    In the order in which they count: WANDB_MODE, WANDB_DISABLED, `wandb offline` or `wandb disabled` in the working
    directory, and the settings of the user.
    """
    if mode := mode_of(environment.get("WANDB_MODE", "")):
        return Switch(mode, f"WANDB_MODE={environment['WANDB_MODE']}")
    if environment.get("WANDB_DISABLED", "").strip().lower() not in _FALSE:
        return Switch("disabled", f"WANDB_DISABLED={environment['WANDB_DISABLED']}")
    own = Path(".wandb" if Path(".wandb").exists() else "wandb", "settings")
    users = Path(environment.get("WANDB_CONFIG_DIR") or "~/.config/wandb", "settings")
    for path in (own, users):
        if mode := mode_of(_mode_in(path)):
            return Switch(mode, f"mode = {mode} in {path}")
    return None


def mode_of(word: str) -> str | None:
    """Return the mode that one of W&B's words means, `None` for any other word."""
    return _WORDS.get(word.strip().lower())


def _mode_in(path: Path) -> str:
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read_string(path.expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError, configparser.Error):  # W&B takes a damaged file for an empty one, and says so
        return ""
    return parser.get("default", "mode", fallback="")
