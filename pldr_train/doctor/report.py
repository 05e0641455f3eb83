"""The findings as a table with numbered advice, or as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

from pldr_train.doctor.finding import LEVELS, Finding, worst_first

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
