"""Whole runs that read a data set of the Hub over HTTP: the same rows as from the disk, through faults and resumes."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.hub_server import HubServer
from tests.processes import ROOT, run_cli
from tests.resume.test_kill_and_resume import assert_same_run
from tests.tiny import metric_lines, tiny_values

REPOSITORY = "owner/corpus"
pytestmark = pytest.mark.slow


@pytest.fixture
def hub(tiny_data: Path) -> Iterator[HubServer]:
    files = {f"data/{path.name}": path.read_bytes() for path in (tiny_data / "corpus").glob("*.parquet")}
    card = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: data/part-*\n---\n"
    with HubServer({REPOSITORY: {"README.md": card.encode(), **files}}) as server:
        yield server


def fit(
    hub: HubServer,
    tmp_path: Path,
    name: str,
    data: Path,
    *overrides: str,
    trainer: Any = None,
    fresh: bool = False,
    **changes: Any,
) -> Any:
    """Run a recipe for local files; the overrides decide where the documents come from.

    `fresh`: in an interpreter that finds nothing of the Hub but the environment's variables.
    """
    recipe = tmp_path / f"{name}.json"
    changes |= {"cache_dir": str(tmp_path / "cache"), "repository": REPOSITORY}
    recipe.write_text(json.dumps(tiny_values(data, tmp_path / "runs", name, data=changes, trainer=trainer or {})))
    variables = hub.environment(tmp_path / "cache")
    if not fresh:
        return run_cli("fit", recipe, *overrides, variables=variables, before=hub.client(tmp_path / "cache"))
    command = [sys.executable, "-P", "-m", "pldr_train", "fit", str(recipe), *overrides]
    return subprocess.run(command, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True, check=False)


def test_a_recipe_streams_the_hub_by_its_source_alone_through_every_passing_fault(
    hub: HubServer, tiny_data: Path, tmp_path: Path
) -> None:
    assert fit(hub, tmp_path, "disk", tiny_data).returncode == 0
    hub.add_fault("*/resolve/*part-0*", status=503, times=2)
    hub.add_fault("*/resolve/*part-1*", status=429, headers={"Retry-After": "0"}, times=2)
    hub.add_fault("*/resolve/*part-0*", cut_after=100, times=2)
    hub.add_fault("*/api/*", status=500, times=1)
    result = fit(hub, tmp_path, "hub", tiny_data, "data.source=hub", fresh=True, num_workers=1)
    assert result.returncode == 0, result.stderr
    assert "HTTP 503; trying again in" in result.stdout + result.stderr
    digests = [line.get("data/batch_digest") for line in metric_lines(tmp_path / "runs" / "disk")]
    assert [line.get("data/batch_digest") for line in metric_lines(tmp_path / "runs" / "hub")] == digests
    kept = json.loads((tmp_path / "runs" / "hub" / "data.json").read_text())
    assert kept["origin"]["repository"] == REPOSITORY
    assert kept["identity"]["revision"] == hub.repositories[REPOSITORY].sha(0)
    assert [file["name"] for file in kept["files"]] == ["data/part-0.parquet", "data/part-1.parquet"]


LONG = {"max_steps": 60, "validate_every_steps": 30}
IN_ORDER = {"shuffle": False, "validation_documents": [0, 12], "train_documents": [12, 120]}
"""part-0 is read first, for validation too, and part-1 from the midst of a long run on."""


def test_a_hub_that_stays_down_stops_the_run_saved_and_it_goes_on_at_its_commit(
    hub: HubServer, tiny_data: Path, tmp_path: Path
) -> None:
    straight = fit(hub, tmp_path, "straight", tiny_data, "data.source=hub", trainer=LONG, **IN_ORDER)
    assert straight.returncode == 0, straight.stderr
    # The footers are in the cache by now: of part-1, only training in the midst of the run asks for anything.
    hub.add_fault("*/resolve/*part-1.parquet", status=503, times=math.inf)
    down = fit(hub, tmp_path, "down", tiny_data, "data.source=hub", "data.retries=2", trainer=LONG, **IN_ORDER)
    assert down.returncode == 2
    assert "Traceback" not in down.stderr
    assert "part-1.parquet: HTTP 503, at the last of 3 tries" in down.stderr
    saved = int(down.stderr.split("saved after step ")[1].split(";")[0])
    assert 3 < saved < 60
    commit = hub.repositories[REPOSITORY].sha(0)
    assert hub.commit(REPOSITORY, {"README.md": b"main has moved on, and has no files any more"}) != commit
    hub.mend()
    again = fit(hub, tmp_path, "down", tiny_data, "data.source=hub", trainer=LONG, **IN_ORDER)
    assert again.returncode == 0, again.stderr
    assert f"resuming after step {saved}" in again.stdout
    assert_same_run(tmp_path / "runs" / "straight", tmp_path / "runs" / "down")
