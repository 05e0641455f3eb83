"""Keys are found where the libraries find them, and never shown."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import pytest
from huggingface_hub import constants

from pldr_train.doctor.accounts import check_hub, check_wandb, hub_token_file
from pldr_train.doctor.finding import Finding, as_json, as_table
from pldr_train.wandb_switch import resolve_mode

SECRET = "hf_s3cr3tS3cr3tS3cr3t"


def shown(findings: Iterable[Finding]) -> str:
    """All that a user could see of the findings; fails where a secret is in it."""
    found = list(findings)
    text = as_table(found) + as_json(found)
    assert SECRET not in text
    return text


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def write(path: Path, text: str, mode: int = 0o600) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(mode)
    return path


# ------------------------------------------------------------------------------------------------------------------ Hub


def test_the_token_file_is_the_librarys_own() -> None:
    assert hub_token_file(os.environ, Path.home()) == Path(constants.HF_TOKEN_PATH)


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, ".cache/huggingface/token"),
        ({"XDG_CACHE_HOME": "{home}/x"}, "x/huggingface/token"),
        ({"HF_HOME": "~/hf"}, "hf/token"),
        ({"HF_HOME": "~/hf", "HF_TOKEN_PATH": "{home}/t"}, "t"),
    ],
)
def test_a_token_in_a_file_is_found_and_not_shown(environment: dict[str, str], place: str, home: Path) -> None:
    environment = {name: value.format(home=home) for name, value in environment.items()}
    assert "no token" in shown(check_hub(environment, home, needed=False))
    write(home / place, SECRET)
    assert f"token in ~/{place}; online" in shown(check_hub(environment, home, needed=False))


def test_the_variable_goes_before_the_file_and_is_not_shown(home: Path) -> None:
    write(home / ".cache/huggingface/token", SECRET)
    (found,) = check_hub({"HF_TOKEN": SECRET}, home, needed=True)
    assert (found.level, found.figures["token_in"]) == ("ok", "HF_TOKEN")
    shown([found])
    (found,) = check_hub({"HF_TOKEN": " "}, home, needed=True)
    assert "~/.cache" in found.text


def test_a_token_that_others_can_read_is_warned_of(home: Path) -> None:
    write(home / ".cache/huggingface/token", SECRET, 0o644)
    (found,) = check_hub({}, home, needed=False)
    assert (found.level, found.advice) == ("warn", "chmod 600 ~/.cache/huggingface/token")
    shown([found])


def test_offline_is_reported_and_warned_of_when_the_hub_is_needed(home: Path) -> None:
    for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        (found,) = check_hub({variable: "1"}, home, needed=False)
        assert f"offline ({variable})" in found.text
        warning, _ = check_hub({variable: "yes"}, home, needed=True)
        assert (warning.level, f"unset {variable}" in str(warning.advice)) == ("warn", True)
    assert [each.level for each in check_hub({"HF_HUB_OFFLINE": "0"}, home, needed=True)] == ["note"]


# ------------------------------------------------------------------------------------------------------------------ W&B

NETRC = f"machine api.wandb.ai login user password {SECRET}\n"


@pytest.mark.parametrize("setting", ["auto", "online", "offline", "disabled"])
@pytest.mark.parametrize("mode", [None, "offline", "disabled", "dryrun", "nonsense"])
@pytest.mark.parametrize("key", [None, "variable", "netrc", "other host", "default"])
def test_the_mode_is_the_one_that_a_run_takes(
    setting: str, mode: str | None, key: str | None, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if mode is not None:
        monkeypatch.setenv("WANDB_MODE", mode)
    if key == "variable":
        monkeypatch.setenv("WANDB_API_KEY", SECRET)
    elif key is not None:
        write(home / ".netrc", NETRC if key == "netrc" else NETRC.replace("machine api.wandb.ai", "default"))
    if key == "other host":
        write(home / ".netrc", NETRC.replace("api.wandb.ai", "example.org"))
    found = list(check_wandb(os.environ, setting))
    shown(found)
    assert found[-1].figures["mode"] == resolve_mode(setting)
    assert (found[-1].figures["key_in"] is not None) == (key in ("variable", "netrc", "default"))
    assert (found[0].level == "warn") == (mode == "nonsense")


def test_online_without_a_key_fails(home: Path) -> None:
    (found,) = check_wandb({}, "online")
    assert (found.level, "wandb login" in str(found.advice)) == ("fail", True)
    assert [each.level for each in check_wandb({})] == ["note"]
    assert [each.level for each in check_wandb({"WANDB_API_KEY": SECRET}, "online")] == ["ok"]


@pytest.mark.parametrize(
    ("text", "mode", "words"),
    [
        (f"machine api.wandb.ai\n  login user\n  password a {SECRET}\n", 0o600, "cannot be understood"),
        (NETRC, 0o644, "other users can read it"),
    ],
)
def test_a_netrc_that_is_left_unread_is_said_without_its_content(text: str, mode: int, words: str, home: Path) -> None:
    write(home / ".netrc", text, mode)
    assert words in shown(check_wandb({}))


def test_an_address_with_a_password_is_not_shown(home: Path) -> None:
    text = shown(check_wandb({"WANDB_BASE_URL": f"https://user:{SECRET}@wandb.example.org"}))
    assert "wandb.example.org" in text
