"""The doctor's frame: how checks are run and shown; versions of packages."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pldr_train.doctor.finding import Check, Finding, as_json, as_table, run_checks
from pldr_train.doctor.packages import check_packages, check_python, installed_version, read_declared


def levels(findings: Iterator[Finding]) -> list[str]:
    return [finding.level for finding in findings]


# ----------------------------------------------------------------------------------------------------- running, showing


def test_a_check_that_breaks_is_a_warning_and_spoils_no_other() -> None:
    def breaks() -> Iterator[Finding]:
        yield Finding("ok", "first", "seen")
        raise KeyError("MemAvailable")

    found = run_checks([Check("memory", breaks), Check("disk", lambda: [Finding("ok", "disk", "fine")])])
    assert [(each.level, each.name) for each in found] == [("ok", "first"), ("warn", "memory"), ("ok", "disk")]
    assert "KeyError: 'MemAvailable'" in found[1].text


@pytest.mark.parametrize("limit_s", [None, 60.0])
def test_a_check_that_breaks_without_words_is_a_warning_too(limit_s: float | None) -> None:
    def breaks() -> Iterator[Finding]:
        raise ValueError

    (found,) = run_checks([Check("odd", breaks, limit_s)])
    assert (found.level, "ValueError" in found.text) == ("warn", True)


def test_a_check_that_hangs_is_given_up() -> None:
    for_ever = threading.Event()

    def hangs() -> Iterator[Finding]:
        yield Finding("ok", "disk space", "seen")
        for_ever.wait()

    found = run_checks([Check("disk", hangs, limit_s=0.2), Check("next", lambda: [Finding("ok", "next", "fine")])])
    for_ever.set()
    assert [(each.level, each.name) for each in found] == [("ok", "disk space"), ("warn", "disk"), ("ok", "next")]
    assert "0.2 s" in found[1].text


FINDINGS = [
    Finding("ok", "python", "3.11", figures={"version": "3.11"}),
    Finding("note", "gpus", "none"),
    Finding("fail", "disk", "full", "free some"),
    Finding("warn", "threads", "too many", "fewer"),
]


def test_the_worst_is_shown_first_with_what_to_do() -> None:
    lines = as_table(FINDINGS).splitlines()
    assert [line.split()[0] for line in lines[:4]] == ["FAIL", "warn", "note", "ok"]
    assert lines[5:8] == ["what to do:", " 1. disk: free some", " 2. threads: fewer"]
    assert lines[-1] == "1 fail, 1 warn, 1 note, 1 ok"
    assert "what to do" not in as_table(FINDINGS[:2])


def test_json_holds_the_same_and_the_figures() -> None:
    values = json.loads(as_json(FINDINGS))
    assert values["failed"] is True
    assert values["counts"] == {"fail": 1, "warn": 1, "note": 1, "ok": 1}
    assert [each["level"] for each in values["findings"]] == ["fail", "warn", "note", "ok"]
    assert values["findings"][3]["figures"] == {"version": "3.11"}
    assert json.loads(as_json(FINDINGS[:2]))["failed"] is False


# ------------------------------------------------------------------------------------------------------------ packages


def test_the_ranges_are_those_of_the_checkout() -> None:
    declared = read_declared()
    assert declared.python == ">=3.11"
    assert {"torch", "lightning", "deepspeed"} <= {each.split(">")[0] for each in declared.requirements}


def test_without_a_checkout_the_installed_ranges_hold(tmp_path: Path) -> None:
    declared = read_declared(tmp_path)
    assert any(each.startswith("torch") for each in declared.requirements)
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "another"\ndependencies = ["left-pad>=1"]\n')
    assert read_declared(tmp_path) == declared


def test_this_environment_is_in_order() -> None:
    declared = read_declared()
    found = [*check_python(declared.python), *check_packages(declared.requirements)]
    assert {each.level for each in found} == {"ok"}
    assert found[-1].figures["torch"] == installed_version("torch")


@pytest.mark.parametrize(
    ("version", "level", "words"),
    [
        ("0.19.3", "ok", "deepspeed 0.19.3"),
        ("0.19.0rc1", "ok", ""),
        ("0.17", "fail", "deepspeed 0.17, but"),
        ("0.20.1", "warn", "is tested"),
        (None, "fail", "deepspeed is not installed"),
    ],
)
def test_missing_and_too_old_fail_and_newer_warns(version: str | None, level: str, words: str) -> None:
    required = ["deepspeed>=0.18.2,<0.20", 'pytest>=8.4; extra == "dev"']
    found = list(check_packages(required, lambda name: version if name == "deepspeed" else None))
    assert [each.level for each in found] == ([level, "ok"] if level != "ok" else ["ok"])
    assert words in found[0].text
    if level != "ok":
        assert found[0].advice is not None
        assert "deepspeed" in found[0].advice


def test_an_old_python_fails() -> None:
    assert levels(check_python(">=3.11", "3.10.4")) == ["fail"]
    assert levels(check_python(">=3.11", "3.13.0rc1")) == ["ok"]
    assert levels(check_python("", "3.9")) == ["ok"]
