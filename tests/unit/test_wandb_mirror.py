"""The mirror of a run that trains: what it writes over a whole run and its resumes, and that no failure stops a run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pldr_train.errors import DataError
from pldr_train.fit import fit
from pldr_train.recipe import Recipe, load_recipe, recipe_from_dict
from pldr_train.training import wandb_mirror as mirror_module
from pldr_train.training.wandb_mirror import WandbMirror, finish_mirror, finishing_mirror, wandb_mirror
from pldr_train.wandb_runs import opening
from pldr_train.wandb_runs.opening import Target
from pldr_train.wandb_runs.replaying import replay
from tests.tiny import MONITORED, tiny_values
from tests.unit.wandb_case import TOKENS_PER_STEP, isolate_wandb, write_run, write_samples, write_snapshot
from tests.unit.wandb_records import only_record, read_record, record_folders, records


@pytest.fixture(autouse=True)
def _isolated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    isolate_wandb(monkeypatch, tmp_path)


def opened(folder: Path, **logging: Any) -> tuple[WandbMirror, Path]:
    """A mirror of a run made by hand, and the run's folder."""
    run = write_run(folder, logging={"wandb": "offline"} | logging)
    mirror = wandb_mirror(load_recipe(run / "recipe.yaml"), run)
    assert mirror is not None
    return mirror, run


# -------------------------------------------------------------------------------------------------------- a whole run


def recipe_of(tiny_data: Path, folder: Path, steps: int) -> Recipe:
    values = tiny_values(
        tiny_data,
        folder,
        trainer={"max_steps": steps, "validate_every_steps": 4},
        checkpoint={"also_keep_steps": [5], "async_save": True},
        logging={"wandb": "offline", "wandb_checkpoints": True},
        sample={"every_steps": 4},
        monitor=MONITORED,
    )
    return recipe_from_dict(values)


def test_a_run_and_its_resume_are_mirrored_with_all_they_leave(tiny_data: Path, tmp_path: Path) -> None:
    for steps in (6, 10):
        fit(recipe_of(tiny_data, tmp_path, steps))
    run = tmp_path / "tiny"
    first, second = records(run)
    run_id = json.loads((run / "wandb.json").read_text())["id"]
    assert {first.run.run_id, second.run.run_id} == {run_id}
    # What tells `wandb sync` to join them.
    assert first.run.resume
    assert second.run.resume
    assert [row["_step"] for row in first.history] == list(range(7))
    assert [row["_step"] for row in second.history] == [7, 8, 9, 10]
    for found in (first, second):
        assert all(
            (row["tokens"], row["step"]) == (row["_step"] * TOKENS_PER_STEP, row["_step"]) for row in found.history
        )
        assert found.exit_code == 0
    # What is mirrored is what the metrics hold, to the last bit.
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [(line["step"], line["train/loss"]) for line in lines if "train/loss" in line]
    assert first.column("train/loss") + second.column("train/loss") == losses
    assert [step for step, _ in first.column("heatmaps/A_LM/path")] == [0, 4, 6]
    assert [step for step, _ in second.column("heatmaps/A_LM/path")] == [8, 10]
    # The last samples are written when Lightning is done.
    assert first.column("samples/nrows") == [(4, 1), (6, 2)]
    assert second.column("samples/nrows") == [(8, 3), (10, 4)]
    checkpoints = [
        [*each.aliases] for found in (first, second) for each in found.artifacts if each.type == "checkpoint"
    ]
    assert [sorted(each) for each in checkpoints] == [
        sorted(each)
        for each in (["latest", "step-5", "kept"], ["latest", "step-6", "last"], ["latest", "step-10", "last"])
    ]
    assert (first.config["trainer"]["max_steps"], second.config["trainer"]["max_steps"]) == (6, 10)
    done = replay(run, Target("offline", "clean", "demo", resume=False))
    clean = read_record(done.record)
    assert clean.column("train/loss") == losses
    assert not clean.run.resume


def test_the_recipes_notes_and_tags_are_the_runs(tmp_path: Path) -> None:
    run = write_run(tmp_path, logging={"wandb": "offline"}, run={"notes": "Does wsd help?", "tags": ["study"]})
    assert wandb_mirror(load_recipe(run / "recipe.yaml"), run) is not None
    finish_mirror()
    written = only_record(run).run
    assert (written.notes, [*written.tags][:2]) == ("Does wsd help?", ["study", "2L-2H-8d"])


def test_without_media_and_checkpoints_there_are_none(tmp_path: Path, said: list[str]) -> None:
    mirror, run = opened(tmp_path, wandb_media=False)
    write_snapshot(run, 3)
    mirror.log_metrics({"train/loss": 1.0}, step=3)
    mirror.after_validation(3)
    finish_mirror()
    assert not [name for name in only_record(run).history[0] if name.startswith("h")]
    assert said == []


def test_disabled_is_no_mirror(tmp_path: Path) -> None:
    run = write_run(tmp_path, logging={"wandb": "disabled"})
    assert wandb_mirror(load_recipe(run / "recipe.yaml"), run) is None
    finish_mirror()
    assert not (run / "wandb").exists()


def test_what_comes_after_the_last_line_is_shown_at_the_end(tmp_path: Path) -> None:
    mirror, run = opened(tmp_path)
    mirror.log_metrics({"val/loss": 1.0}, step=3)
    write_snapshot(run, 3)
    write_samples(run, (3,))
    finish_mirror(exit_code=1)
    found = only_record(run)
    (row,) = found.history
    assert row["samples/nrows"] == 1
    assert "heatmaps/A/path" in row
    assert found.exit_code == 1


def test_an_error_and_a_signal_are_the_exit_code_of_the_mirrored_run(tmp_path: Path) -> None:
    for error in (DataError, KeyboardInterrupt):
        mirror, run = opened(tmp_path / error.__name__)
        mirror.log_metrics({"train/loss": 1.0}, step=1)
        with pytest.raises(error), finishing_mirror():
            raise error("the run's end")
        assert only_record(run).exit_code == 1


# ----------------------------------------------------------------------------------------------------------- failures


def test_wandbs_process_killed_is_reported_once_and_costs_nothing(tmp_path: Path, said: list[str]) -> None:
    mirror, run = opened(tmp_path)
    mirror.log_metrics({"train/loss": 1.0}, step=1)
    process = opening.wandb_setup._singleton._connection._proc._process  # type: ignore[union-attr]
    process.kill()
    process.wait()
    deadline = time.monotonic() + 30
    step = 2
    while not said and time.monotonic() < deadline:
        mirror.log_metrics({"train/loss": 1.0}, step=step)
        mirror.after_validation(step)
        step += 1
        time.sleep(0.01)
    finish_mirror()
    assert len(said) == 1
    assert f"pldr-train wandb replay {run}" in said[0]
    # The next one starts afresh, in the same process.
    again, other = opened(tmp_path / "other")
    again.log_metrics({"train/loss": 1.0}, step=1)
    finish_mirror()
    assert only_record(other).column("train/loss") == [(1, 1)]
    assert len(said) == 1


def test_wandbs_process_that_hangs_holds_nothing_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    mirror, _ = opened(tmp_path)
    process = opening.wandb_setup._singleton._connection._proc._process  # type: ignore[union-attr]
    process.send_signal(signal.SIGSTOP)
    monkeypatch.setattr(mirror_module, "_GRACE_S", 1.0)
    mirror._finish_s = 0.0
    begun = time.monotonic()
    for step in range(1000):
        mirror.log_metrics({f"train/{index}": 1.0 for index in range(50)}, step=step)
    assert time.monotonic() - begun < 5
    finish_mirror()
    assert time.monotonic() - begun < 20
    assert len(said) == 1
    assert "did not take everything" in said[0]
    process.wait(timeout=10)


def test_a_mirror_that_does_not_keep_up_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    monkeypatch.setattr(mirror_module, "_MOST_WAITING", 2)
    mirror, _ = opened(tmp_path)
    mirror._do("metrics", lambda: time.sleep(0.5))
    for step in range(10):
        mirror.log_metrics({"train/loss": 1.0}, step=step)
    finish_mirror()
    assert len(said) == 1
    assert "does not keep up" in said[0]


def test_a_snapshot_that_cannot_be_shown_leaves_the_metrics_alone(tmp_path: Path, said: list[str]) -> None:
    mirror, run = opened(tmp_path)
    for step in (1, 2):
        write_snapshot(run, step).write_bytes(b"no snapshot")
        mirror.log_metrics({"train/loss": 1.0}, step=step)
        mirror.after_validation(step)
    finish_mirror()
    assert only_record(run).column("train/loss") == [(1, 1), (2, 1)]
    assert len(said) == 1
    assert "heatmaps and histograms on Weights & Biases" in said[0]


def test_without_a_network_the_run_is_recorded_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    monkeypatch.setattr(opening, "INIT_TIMEOUT_S", 2.0)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    mirror, run = opened(tmp_path, wandb="online")
    mirror.log_metrics({"train/loss": 1.0}, step=1)
    finish_mirror()
    assert only_record(run).column("train/loss") == [(1, 1)]
    assert ["recorded offline" in each for each in said] == [True, False]
    assert f"pldr-train wandb replay {run} --mode online" in said[1]


def test_without_a_key_online_is_offline_and_asks_nobody(tmp_path: Path, said: list[str]) -> None:
    mirror, run = opened(tmp_path, wandb="online")
    mirror.log_metrics({"train/loss": 1.0}, step=1)
    finish_mirror()
    assert only_record(run).column("train/loss") == [(1, 1)]
    assert "wandb login" in said[0]


def test_online_in_the_recipe_against_wandb_switched_off_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    monkeypatch.setenv("WANDB_MODE", "dryrun")
    opened(tmp_path, wandb="online")
    finish_mirror()
    assert said[0].startswith(
        "Weights & Biases: WANDB_MODE=dryrun says offline, but logging.wandb=online in the recipe"
    )


def test_where_nothing_can_be_written_the_run_goes_on_without(tmp_path: Path, said: list[str]) -> None:
    run = write_run(tmp_path, logging={"wandb": "offline"})
    (run / "wandb.json").write_text("no JSON")
    assert wandb_mirror(load_recipe(run / "recipe.yaml"), run) is None
    assert len(said) == 1
    assert "not mirrored" in said[0]


_KILLED = """
import os, signal, sys, time
from pathlib import Path
from pldr_train.recipe import load_recipe
from pldr_train.training.wandb_mirror import wandb_mirror
run = Path(sys.argv[1])
mirror = wandb_mirror(load_recipe(run / "recipe.yaml"), run)
for step in range(1, 501):
    mirror.log_metrics({f"train/{index}": 0.1 for index in range(20)} | {"train/loss": float(step)}, step=step)
end = time.monotonic() + 60  # W&B's own process writes when it comes to it
while time.monotonic() < end:
    if sum(each.stat().st_size for each in run.glob("wandb/offline-run-*/*.wandb")) > 150_000:
        break
    time.sleep(0.05)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_a_killed_run_leaves_what_it_had_and_its_resume_goes_on(tmp_path: Path) -> None:
    run = write_run(tmp_path, logging={"wandb": "offline"})
    environment = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
    killed = subprocess.run([sys.executable, "-c", _KILLED, run], env=environment, timeout=120, check=False)
    assert killed.returncode == -signal.SIGKILL
    (folder,) = record_folders(run)
    # W&B writes in blocks, and every few seconds: the last of it is lost with its process, a replay has it.
    before = read_record(folder, finished=False)
    assert len(before.history) > 100
    assert before.column("train/loss") == [(step, step) for step in range(1, len(before.history) + 1)]
    mirror = wandb_mirror(load_recipe(run / "recipe.yaml"), run)
    assert mirror is not None
    mirror.log_metrics({"train/loss": 5.0}, step=501)
    finish_mirror()
    (after,) = (read_record(each) for each in record_folders(run) if each != folder)
    assert before.run.run_id == after.run.run_id
    assert after.column("train/loss") == [(501, 5)]
