"""Thirty faults over one run of two processes; what comes out is the run that was never disturbed, to the last bit."""

from __future__ import annotations

import os
import random
import resource
import signal
import time
from collections import Counter
from pathlib import Path

import pytest

from pldr_train.runs.layout import checkpoint_folders
from tests.distributed import mishaps
from tests.distributed.cases import STRATEGIES, assert_same_weights, cheap_values
from tests.distributed.fleet import Fleet
from tests.tiny import metric_lines

FAULTS = 30
STEPS = 120
KINDS = ("kill one", "kill all", "terminate one", "terminate all", "damage newest", "full disk")


def lines_of(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def strike(kind: str, early: bool, fleet: Fleet, run: Path, generator: random.Random) -> None:
    """Do it to the running processes, and see that they end as such a fault ends them."""
    victim = generator.randrange(2)
    if kind.startswith("terminate"):
        for rank in (victim,) if kind == "terminate one" else (0, 1):
            os.kill(fleet.children[rank].pid, signal.SIGTERM)
        assert fleet.join() == [143, 143], fleet.text()
    elif kind == "full disk":
        # From now on this process' writes of files this large fail; the next save finds out.
        unlimited = resource.RLIM_INFINITY
        resource.prlimit(fleet.children[victim].pid, resource.RLIMIT_FSIZE, (40_000, unlimited))
        codes = fleet.join()
        assert set(codes) <= {1, 2}, f"{codes}\n{fleet.text()}"
        assert 2 in codes, f"{codes}\n{fleet.text()}"
    elif kind == "kill one":
        os.kill(fleet.children[victim].pid, signal.SIGKILL)
        other = fleet.children[1 - victim]
        if early:
            other.join(30)
            if other.exitcode is None:  # the two had not met: it would wait for hours, and a launcher ends it
                fleet.kill()
                return
        assert sorted(fleet.join()) == [-signal.SIGKILL, 1], fleet.text()
    else:
        fleet.kill()
        folders = checkpoint_folders(run / "checkpoints")
        if kind == "damage newest" and len(folders) > 1:
            file = generator.choice(sorted(folders[0].iterdir()))
            content = bytearray(file.read_bytes())
            content[generator.randrange(len(content))] ^= 0x55
            file.write_bytes(content)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_thirty_faults_change_nothing(tiny_data: Path, tmp_path: Path) -> None:
    lengths = {
        "trainer": {"max_steps": STEPS, "validate_every_steps": 30},
        "checkpoint": {"every_steps": 5, "every_s": 0.3, "keep_last": 3},
    }
    values = cheap_values(tiny_data, tmp_path, "run", 2, STRATEGIES["ddp"], **lengths)
    run, generator = tmp_path / "run", random.Random(2025)
    done: Counter[str] = Counter()
    for number in range(FAULTS):
        kind = KINDS[number % len(KINDS)]
        values["checkpoint"]["async_save"] = number // len(KINDS) % 2 == 1
        fleet = Fleet(values, 2, tmp_path / "logs", mishaps.small_files, (-1, 0))
        begun = time.monotonic()
        goal = lines_of(run) + generator.randint(1, 3)
        early = kind.startswith("kill") and generator.random() < 0.3
        if early:  # while it starts
            time.sleep(generator.uniform(0.1, 1.5))
        else:
            # Lines are cut back at the start; wait for new ones.
            fleet.wait_for(lambda begun=begun: (run / "metrics.jsonl").exists() and _newest(run) > begun_at(begun))
            fleet.wait_for(lambda goal=goal: lines_of(run) >= min(goal, STEPS - 2))
        assert all(child.is_alive() for child in fleet.children), f"over before fault {number}\n{fleet.text()}"
        strike(kind, early, fleet, run, generator)
        done[kind] += 1
    assert sum(done.values()) == FAULTS
    assert len(done) == len(KINDS)
    fleet = Fleet(values, 2, tmp_path / "logs")
    assert fleet.join(300) == [0, 0], fleet.text()
    calm = cheap_values(tiny_data, tmp_path, "calm", 2, STRATEGIES["ddp"], **lengths)
    fleet = Fleet(calm, 2, tmp_path / "logs-calm")
    assert fleet.join(300) == [0, 0], fleet.text()
    assert [line["step"] for line in metric_lines(run)] == list(range(STEPS + 1))
    assert metric_lines(run) == metric_lines(tmp_path / "calm")
    assert_same_weights(run, tmp_path / "calm")


def _newest(run: Path) -> float:
    return (run / "metrics.jsonl").stat().st_mtime


def begun_at(monotonic: float) -> float:
    """A monotonic time as a file's time."""
    return time.time() - (time.monotonic() - monotonic)
