"""Hostile and damaged pickles and torch files are refused in words, in little memory, and never end a process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HARMLESS = {"inert: a DAG of lists", "inert: a list in itself", *(f"whole {each}" for each in (
    "state", "legacy state", "tensors", "inert",
))}  # fmt: skip
"""What is read: nothing of an inert pickle is walked through."""


@pytest.mark.slow
def test_no_pickle_or_torch_file_ends_in_anything_but_a_refusal(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.models.attacks", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert len(found) > 60
    mutated = {name: end for name, end in found.items() if name.startswith("mutated ")}
    assert all(end == [] for end in mutated.values()), mutated
    ends = {name: end for name, end in found.items() if name not in mutated}
    assert {name for name, end in ends.items() if end == "read"} == HARMLESS
    assert {end for name, end in ends.items() if name not in HARMLESS} == {"refused"}, ends
