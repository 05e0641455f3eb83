"""Where the keys of the Hugging Face Hub and of W&B are, and whether a run would go online. No key is ever shown."""

from __future__ import annotations

import netrc
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal
from urllib.parse import urlparse

from pldr_train.doctor.finding import Finding
from pldr_train.wandb_switch import MODES, mode_of, own_switch

_HUB_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
_OFFLINE_VARIABLES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
_TRUE = ("1", "ON", "YES", "TRUE")


def _shown(path: Path, home: Path) -> str:
    return f"~/{path.relative_to(home)}" if path.is_relative_to(home) else str(path)


# ----------------------------------------------------------------------------------------------------- Hugging Face Hub


def hub_token_file(environment: Mapping[str, str], home: Path) -> Path:
    """Return the file that `hf auth login` writes the token to, by huggingface_hub's rules."""
    if path := environment.get("HF_TOKEN_PATH"):
        return _expanded(path, home)
    cache = environment.get("XDG_CACHE_HOME") or str(home / ".cache")
    return _expanded(environment.get("HF_HOME") or f"{cache}/huggingface", home) / "token"


def _expanded(path: str, home: Path) -> Path:
    return home / path[2:] if path.startswith("~/") else Path(os.path.expandvars(path))


def check_hub(environment: Mapping[str, str], home: Path, needed: bool) -> Iterator[Finding]:
    """Yield the token of the Hugging Face Hub, and whether the Hub may be asked at all.

    Args:
        environment: variables.
        home: the user's folder.
        needed: whether the run reads its data from the Hub.
    """
    offline = next((name for name in _OFFLINE_VARIABLES if environment.get(name, "").upper() in _TRUE), None)
    if offline and needed:
        text = f"{offline} is set, and data.source=hub reads from the Hub"
        yield Finding(
            "warn", "hugging face", text, f"unset {offline}, or fetch the files ahead: pldr-train data download"
        )
    state = f"offline ({offline})" if offline else "online"
    variable = next((name for name in _HUB_VARIABLES if environment.get(name, "").strip()), None)
    path = hub_token_file(environment, home)
    place = _shown(path, home)
    figures = {"mode": "offline" if offline else "online", "token_in": variable}
    if variable:
        yield Finding("ok", "hugging face", f"token in the variable {variable}; {state}", figures=figures)
        return
    try:
        held = bool(path.read_bytes().strip())
        readable_by_others = bool(stat.S_IMODE(path.stat().st_mode) & 0o077)
    except FileNotFoundError:
        held = readable_by_others = False
    except OSError as error:
        text = f"{place} cannot be read: {error.strerror}"
        yield Finding("warn", "hugging face", text, f"chmod 600 {place}, or set HF_TOKEN or HF_TOKEN_PATH", figures)
        return
    if not held:
        advice = "hf auth login, or set HF_TOKEN: with a token the Hub limits requests less" if needed else None
        text = f"no token (HF_TOKEN, {place}): public data only; {state}"
        yield Finding("note" if needed else "ok", "hugging face", text, advice, figures)
        return
    figures["token_in"] = str(path)
    if readable_by_others:
        text = f"token in {place}, which other users can read; {state}"
        yield Finding("warn", "hugging face", text, f"chmod 600 {place}", figures)
    else:
        yield Finding("ok", "hugging face", f"token in {place}; {state}", figures=figures)


# ------------------------------------------------------------------------------------------------------------------ W&B


def check_wandb(environment: Mapping[str, str], setting: str | None = None) -> Iterator[Finding]:
    """Yield the key of W&B and the mode that a run would take; `setting` is the recipe's logging.wandb, None: no
    recipe.
    """
    host = urlparse(environment.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
    key_in, problem = _wandb_key(environment, host)
    asked = environment.get("WANDB_MODE", "")
    if asked and mode_of(asked) is None:
        yield Finding("warn", "wandb", "WANDB_MODE is none of " + ", ".join(MODES), "set it to one, or unset it")
    switch = own_switch(environment)
    if problem:
        yield Finding("warn", "wandb", problem[0], problem[1])
    chosen = setting or "auto"
    if chosen != "auto":
        mode, why = chosen, f"logging.wandb={chosen}"
    elif switch is not None:
        mode, why = switch
    else:
        mode, why = ("online", f"key for {host}") if key_in else ("offline", "no key")
    key = f"key in {key_in}" if key_in else f"no key for {host} (WANDB_API_KEY, ~/.netrc)"
    yield _wandb_state(mode, f"{mode} ({why}); {key}", key_in)


def _wandb_state(mode: str, text: str, key_in: str | None) -> Finding:
    figures = {"mode": mode, "key_in": key_in}
    level: Literal["ok", "note", "fail"] = "ok"
    advice = None
    if mode == "online" and key_in is None:
        level, advice = "fail", "wandb login, or logging.wandb=offline"
    elif mode == "offline" and key_in is None:
        level, advice = "note", "wandb login, if the mirror should be online; metrics.jsonl holds everything either way"
    return Finding(level, "wandb", text, advice, figures)


def _wandb_key(environment: Mapping[str, str], host: str) -> tuple[str | None, tuple[str, str] | None]:
    """(what holds the key, (problem, advice) of the file that may hold one)."""
    if environment.get("WANDB_API_KEY"):
        return "the variable WANDB_API_KEY", None
    try:
        return ("~/.netrc" if netrc.netrc().authenticators(host) else None), None
    except FileNotFoundError:
        return None, None
    except netrc.NetrcParseError as error:
        # The error's own text may quote the line, and with it a password.
        if "permissive" in str(error):
            return None, ("~/.netrc is left unread, for other users can read it", "chmod 600 ~/.netrc")
        where = f" at line {error.lineno}" if error.lineno else ""
        return None, (f"~/.netrc cannot be understood{where}", "correct that line, or set WANDB_API_KEY")
    except Exception as error:
        return None, (f"~/.netrc cannot be read ({type(error).__name__})", "chmod 600 ~/.netrc, or set WANDB_API_KEY")
