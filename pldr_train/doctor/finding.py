"""What a check found, how checks run so that one never spoils the others, and their table, advice and JSON."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Level = Literal["ok", "note", "warn", "fail"]
LEVELS: tuple[Level, ...] = ("fail", "warn", "note", "ok")
"""The worst first."""


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's report.

    A fail stops a run, a warn slows or endangers one, a note is worth knowing.
    """

    level: Level
    name: str
    """What was looked at, one or two words."""
    text: str
    """What was found, one line."""
    advice: str | None = None
    """What to do about it, one line; None: nothing."""
    figures: Mapping[str, Any] = field(default_factory=dict)
    """The measurements as plain values, units in their names."""


@dataclass(frozen=True)
class Check:
    """A function that looks at one thing.

    `limit_s`: seconds after which it is given up (a dead network file system may never answer); None: it keeps to a
    limit of its own, and runs in the calling thread.
    """

    name: str
    function: Callable[[], Iterable[Finding]]
    limit_s: float | None = 60.0


def run_checks(checks: Sequence[Check]) -> list[Finding]:
    """Run all checks; one that raises, or does not end in its time, becomes a warn that says so."""
    return [finding for check in checks for finding in _run(check)]


def _run(check: Check) -> list[Finding]:
    found: list[Finding] = []
    ended = threading.Event()

    def call() -> None:
        try:
            for finding in check.function():
                found.append(finding)
        except Exception as error:
            found.append(_crashed(check.name, error))
        ended.set()

    if check.limit_s is None:
        call()
    else:
        # A daemon: what hangs for good must not keep the program from ending.
        thread = threading.Thread(target=call, daemon=True, name=f"doctor {check.name}")
        thread.start()
        thread.join(check.limit_s)
    if not ended.is_set():
        text = f"this check did not end within {check.limit_s:g} s"
        advice = "look for a disk or network file system that does not answer (df)"
        return [*found, Finding("warn", check.name, text, advice)]
    return found


def _crashed(name: str, error: Exception) -> Finding:
    lines = str(error).strip().splitlines()
    what = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return Finding("warn", name, f"this check broke ({what})", "the other checks hold; report this as a defect")


def worst_first(findings: Iterable[Finding]) -> list[Finding]:
    """By level, and in the given order within one."""
    return sorted(findings, key=lambda finding: LEVELS.index(finding.level))


_MARKS = {"fail": "FAIL", "warn": "warn", "note": "note", "ok": "ok"}
_MARK_WIDTH = max(map(len, _MARKS.values()))


def counts(findings: Sequence[Finding]) -> dict[str, int]:
    """Return how many findings each level has, the worst first."""
    return {level: sum(finding.level == level for finding in findings) for level in LEVELS}


def as_table(findings: Sequence[Finding]) -> str:
    """Return a line for each finding, the worst first, then what to do, in the same order."""
    ordered = worst_first(findings)
    width = max(len(finding.name) for finding in ordered)
    lines = [f"{_MARKS[each.level]:<{_MARK_WIDTH}}  {each.name:<{width}}  {each.text}" for each in ordered]
    advised = [finding for finding in ordered if finding.advice is not None]
    if advised:
        lines += ["", "what to do:"]
        lines += [f"{number:>2}. {each.name}: {each.advice}" for number, each in enumerate(advised, start=1)]
    summary = ", ".join(f"{number} {level}" for level, number in counts(findings).items() if number)
    return "\n".join([*lines, "", summary])


def as_json(findings: Sequence[Finding]) -> str:
    """Return one object: `failed`, `counts` by level, and `findings` in the table's order."""
    content = {
        "failed": any(finding.level == "fail" for finding in findings),
        "counts": counts(findings),
        "findings": [asdict(finding) for finding in worst_first(findings)],
    }
    return json.dumps(content, indent=1, ensure_ascii=False)
