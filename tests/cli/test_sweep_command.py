"""`pldr-train sweep` with real trials, really killed: what comes out is what an undisturbed sweep gives."""

from __future__ import annotations

import csv
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import psutil
import pytest
import torch
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from pldr_train.cli import main
from pldr_train.curvature.files import read_curvature
from pldr_train.metrics.catalog import TOKENS_PER_S
from pldr_train.metrics.throughput import count_parameters
from pldr_train.sweeps import Sweep
from pldr_train.sweeps.records import is_claimed
from pldr_train.sweeps.summary import Summary
from pldr_train.sweeps.tables import as_csv
from tests import postgresql
from tests.processes import ROOT
from tests.sweep_case import NEEDING, changed_file, finish_runner, lines_of_trials, start_runner, write_sweep
from tests.tiny import damage_row_group, metric_lines, write_corpus

STEPS = 40
SECTIONS: dict[str, Any] = {
    "model": {"num_hidden_layers": 1},
    "dag": {"A_LM": 0.0, "A_P": 0.0, "G_LM": 0.0, "every_steps": 10},
    "trainer": {"max_steps": STEPS, "validate_every_steps": 20},
    "checkpoint": {"every_steps": 10},
    "logging": {"every_steps": 10},  # the digests of batches make a line of every step
    "monitor": {"snapshots": 0, "targets": 0, "prompts": 0},
}
KILLS = 6
CONTINUED = {"continued": {"model.custom_G_type": "learned", "model.init_from": "trial:learned"}}
FOUR_TRIALS = {"optim.lr": [1e-3, 2e-3]}


@pytest.fixture(scope="module")
def undisturbed(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of six trials that two workers have run; it is not to be changed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    spec = write_sweep(folder, tiny_data, SECTIONS)
    text = finish_runner(start_runner(spec, folder / "out", "--workers", "2"), folder / "out")
    assert "over: 6 done" in text
    return spec


def total_lines(spec: Path) -> int:
    runs = [trial.folder / "metrics.jsonl" for trial in Sweep(spec).trials]
    return sum(path.read_bytes().count(b"\n") for path in runs if path.exists())


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come"
        time.sleep(0.01)


def trial_processes(spec: Path) -> list[psutil.Process]:
    """Processes that hold a trial's claim."""
    found = []
    folder = str(Sweep(spec).folder)
    for process in psutil.process_iter():
        try:
            names = [os.readlink(path) for path in Path(f"/proc/{process.pid}/fd").iterdir()]
        except OSError:
            continue
        if any(name.startswith(folder) and name.endswith(".claim") for name in names):
            found.append(process)
    return found


def assert_as_undisturbed(spec: Path, undisturbed: Path, kills: int = 0) -> None:
    """Compare two sweeps.

    A start is counted before its line is in the log: for each kill of the runner, one line may be missing.
    """
    lines, others = lines_of_trials(spec), lines_of_trials(undisturbed)
    assert lines == {name: others[name] for name in lines}
    for trial in Sweep(spec).trials:
        text = trial.log.read_text()
        logged = [int(number) for number in re.findall(r"^--- start (\d+), ", text, re.MULTILINE)]
        starts = range(1, trial.record.starts + 1)
        assert trial.state == "done"
        assert "is in use by" not in text
        assert logged == [number for number in starts if number in logged]
        assert logged[-1] == starts[-1]
        assert len(logged) >= len(starts) - kills


def test_the_trials_of_a_sweep_are_the_runs_that_fit_makes(undisturbed: Path, tmp_path: Path) -> None:
    trials = Sweep(undisturbed).trials
    names = [f"lr-{lr}_seed-{seed}" for lr in ("0.001", "0.002", "0.004") for seed in (1, 2)]
    assert [trial.name for trial in trials] == names
    assert all(trial.record.starts == 1 for trial in trials)
    assert [line["step"] for line in metric_lines(trials[0].folder)] == list(range(STEPS + 1))
    assert len({trial.objective for trial in trials}) == 6
    recipe = trials[3].folder / "trial.yaml"
    assert main(["fit", str(recipe), f"run.dir={tmp_path}"]) == 0
    assert metric_lines(tmp_path / trials[3].name) == metric_lines(trials[3].folder)


def test_kills_of_runner_and_trials_change_nothing(undisturbed: Path, tiny_data: Path, tmp_path: Path) -> None:
    spec, out = write_sweep(tmp_path, tiny_data, SECTIONS), tmp_path / "out"
    generator = random.Random(7)
    for number in range(KILLS):
        child = start_runner(spec, out, "--workers", "2")
        aim = total_lines(spec) + generator.randint(1, 30)
        wait_until(lambda: total_lines(spec) >= aim or not child.is_alive(), "progress")  # noqa: B023
        victims = [each for each in trial_processes(spec) if each.pid != child.pid]
        if number % 3 == 2 and victims:
            generator.choice(victims).kill()  # the runner starts it again
            wait_until(lambda: total_lines(spec) >= aim + 3 or not child.is_alive(), "progress")  # noqa: B023
        child.kill()
        child.join()
        # What it ran ends with it, without anybody's doing.
        wait_until(lambda: not any(is_claimed(trial.folder) for trial in Sweep(spec).trials), "the trials' end")
    done = {trial.name: trial.record.starts for trial in Sweep(spec).trials if trial.state == "done"}
    finish_runner(start_runner(spec, out, "--workers", "2"), out)
    assert_as_undisturbed(spec, undisturbed, KILLS)
    assert {trial.name: trial.record.starts for trial in Sweep(spec).trials if trial.name in done} == done
    assert final_table(spec) == final_table(undisturbed)


def final_table(spec: Path) -> list[dict[str, str]]:
    """The report's rows, without timings."""
    rows = csv.DictReader(io.StringIO(as_csv(Summary(Sweep(spec)))))
    return [{name: text for name, text in row.items() if not name.startswith(TOKENS_PER_S)} for row in rows]


def test_trials_that_take_anothers_g_or_weights_run_after_it_with_them(tiny_data: Path, tmp_path: Path) -> None:
    sections = SECTIONS | {"monitor": {"deductive": True, "rows": 1, "snapshots": 1, "targets": 0, "prompts": 0}}
    spec = write_sweep(tmp_path, tiny_data, sections, axes={"variant": NEEDING | CONTINUED}, seeds=[1])
    text = finish_runner(start_runner(spec, tmp_path / "out", "--workers", "2"), tmp_path / "out")
    begun = [line.split()[1] for line in text.splitlines() if line.endswith(" begins")]
    assert begun == ["variant-learned_seed-1", "variant-given_seed-1", "variant-continued_seed-1"]
    given, learned, continued = Sweep(spec).trials
    assert [each.state for each in (given, learned, continued)] == ["done"] * 3
    assert torch.equal(given.run.model().decoder.predefined_curvature, read_curvature(learned.folder)["G"])
    validated = [
        [line["val/loss"] for line in metric_lines(each.folder) if "val/loss" in line] for each in (learned, continued)
    ]
    assert validated[1][0] == validated[0][-1]


@pytest.fixture(params=["journal", "postgresql"])
def storage(request: pytest.FixtureRequest) -> Iterator[str | None]:
    """The URL of a study's storage; None: the journal in the sweep's folder."""
    if request.param == "journal":
        yield None
        return
    why = postgresql.why_not()
    if why is not None:
        pytest.skip(why)
    with postgresql.server() as url:
        yield url


def test_two_runners_share_a_sweep_and_run_no_trial_twice(
    undisturbed: Path, tiny_data: Path, tmp_path: Path, storage: str | None
) -> None:
    spec = write_sweep(tmp_path, tiny_data, SECTIONS, axes=FOUR_TRIALS)
    outs = [tmp_path / "first", tmp_path / "second"]
    where = () if storage is None else ("--storage", storage)
    children = [start_runner(spec, out, "--workers", "1", *where) for out in outs]
    texts = [finish_runner(child, out) for child, out in zip(children, outs, strict=True)]
    begun = [[line.split()[1] for line in text.splitlines() if line.endswith(" begins")] for text in texts]
    assert sorted([*begun[0], *begun[1]]) == sorted(trial.name for trial in Sweep(spec).trials)
    assert all("over: 4 done" in text for text in texts), texts
    assert_as_undisturbed(spec, undisturbed)
    trials = Sweep(spec).trials
    assert all(trial.record.starts == 1 for trial in trials)
    journal = Sweep(spec).folder / "study.journal"
    assert journal.exists() == (storage is None)
    kept = optuna.load_study(study_name="small", storage=storage or JournalStorage(JournalFileBackend(str(journal))))
    values = [(each.user_attrs["name"], each.value) for each in kept.trials]
    assert sorted(values) == sorted((trial.name, trial.objective) for trial in trials)


def test_sweep_stop_saves_and_the_same_command_goes_on(undisturbed: Path, tiny_data: Path, tmp_path: Path) -> None:
    spec, out = write_sweep(tmp_path, tiny_data, SECTIONS, axes=FOUR_TRIALS), tmp_path / "out"
    child = start_runner(spec, out, "--workers", "2")
    wait_until(lambda: total_lines(spec) > 5, "a step")
    assert main(["sweep", "stop", str(spec)]) == 0
    text = finish_runner(child, out, 130)
    assert "sweep stop: " in text
    assert "stopped: " in text
    assert not trial_processes(spec)
    child = start_runner(spec, out, "--workers", "2")
    wait_until(lambda: total_lines(spec) > 60, "progress")
    child.terminate()
    finish_runner(child, out, 143)
    finish_runner(start_runner(spec, out, "--workers", "2"), out)
    assert_as_undisturbed(spec, undisturbed)


def test_a_failed_trial_is_kept_and_retried(
    tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = write_corpus(tmp_path / "bad")
    for path in bad.glob("*.parquet"):
        for group in range(4):
            damage_row_group(path, group)
    good = str(tiny_data / "corpus")
    axes = {"corpus": {"good": {"data.path": good}, "bad": {"data.path": str(bad)}}}
    spec, out = write_sweep(tmp_path, tiny_data, SECTIONS, axes=axes, seeds=[1]), tmp_path / "out"
    text = finish_runner(start_runner(spec, out), out, 1)
    assert "corpus-bad_seed-1 failed after step 0: " in text
    assert "pldr-train sweep retry" in text.splitlines()[-1]
    failed = Sweep(spec).trials[1]
    assert failed.error is not None
    assert str(bad) in failed.error
    assert main(["sweep", "status", str(spec)]) == 0
    assert f"failed ({failed.log}):" in capsys.readouterr().out
    finish_runner(start_runner(spec, out), out, 1)
    assert Sweep(spec).trials[1].record.starts == 1
    shutil.rmtree(bad)
    shutil.copytree(good, bad)
    finish_runner(start_runner(spec, out, "--retry-failed"), out)
    first, second = Sweep(spec).trials
    assert (first.state, second.state, first.record.starts, second.record.starts) == ("done", "done", 1, 2)
    assert second.error is None
    assert metric_lines(first.folder) == metric_lines(second.folder)


def test_a_journal_that_is_lost_costs_nothing(undisturbed: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(undisturbed.parent, copy, symlinks=True)
    changed_file(copy / "recipe.yaml", lambda values: values["run"].update(dir=str(copy / "runs")))
    changed_file(copy / "sweep.yaml", lambda values: values.update(recipe=str(copy / "recipe.yaml")))
    sweep = Sweep(copy / "sweep.yaml")
    (sweep.folder / "study.journal").unlink()
    assert main(["sweep", "run", str(copy / "sweep.yaml")]) == 0
    assert (sweep.folder / "study.journal").exists()
    assert all((trial.state, trial.record.starts) == ("done", 1) for trial in sweep.trials)


def test_trials_whose_records_are_lost_too_are_known_as_done(undisturbed: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(undisturbed.parent, copy, symlinks=True)
    changed_file(copy / "recipe.yaml", lambda values: values["run"].update(dir=str(copy / "runs")))
    changed_file(copy / "sweep.yaml", lambda values: values.update(recipe=str(copy / "recipe.yaml")))
    sweep = Sweep(copy / "sweep.yaml")
    for trial in sweep.trials:
        (trial.folder / "trial.json").unlink()
    assert [trial.state for trial in sweep.trials] == ["done"] * 6


def test_status_in_json_says_all_of_each_trial(undisturbed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", "status", str(undisturbed), "--json"]) == 0
    status = json.loads(capsys.readouterr().out)
    assert status["counts"] == {"waiting": 0, "running": 0, "done": 6, "failed": 0, "pruned": 0}
    sweep = Sweep(undisturbed)
    assert status["best"] == min(sweep.trials, key=lambda trial: trial.objective or 9).name
    first = status["trials"][0]
    assert (first["name"], first["axes"], first["seed"]) == ("lr-0.001_seed-1", {"optim.lr": 0.001}, 1)
    assert (first["state"], first["steps"], first["max_steps"]) == ("done", STEPS, STEPS)
    assert first["objective"] == sweep.trials[0].objective == sweep.trials[0].intermediate[-1][1]
    assert first["started_s"] < first["ended_s"]


def test_a_dry_run_lists_the_trials_with_their_size_and_time(
    undisturbed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sweep", "run", str(undisturbed), "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["trial", "parameters", "tokens", "time"]
    name, parameters, tokens, *_ = lines[1].split()
    assert (name, tokens) == ("lr-0.001_seed-1", f"{STEPS * 4 * 32:,}")
    assert parameters == f"{count_parameters(Sweep(undisturbed).base.model):,}"
    assert lines[7].startswith(f"6 trials, {6 * STEPS * 4 * 32:,} tokens in all")
    assert lines[8].startswith("time: about ")


def test_a_spec_that_changed_under_its_trials_is_refused(
    undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = tmp_path / "changed.yaml"
    shutil.copy(undisturbed, spec)
    changed_file(spec, lambda values: values.update(set={"optim.weight_decay": 0.5}))
    assert main(["sweep", "run", str(spec)]) == 2
    said = capsys.readouterr().err
    assert "was changed since trials in" in said
    assert "optim.weight_decay=0.5: the saved run has 0.1 (lr-0.001_seed-1 and 5 more)" in said
    assert "give the sweep a new name" in said


def test_more_values_of_an_axis_are_more_trials(undisturbed: Path, tmp_path: Path) -> None:
    spec = tmp_path / "more.yaml"
    shutil.copy(undisturbed, spec)
    changed_file(spec, lambda values: values["axes"].update({"optim.lr": [1e-3, 8e-3]}))
    sweep = Sweep(spec)
    assert [trial.state for trial in sweep.trials] == ["done", "done", "waiting", "waiting"]
    assert sweep.strangers == ["lr-0.002_seed-1", "lr-0.002_seed-2", "lr-0.004_seed-1", "lr-0.004_seed-2"]


def test_retry_names_what_cannot_be_retried(undisturbed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", "retry", str(undisturbed), "lr-0.001_seed-1", "nothing"]) == 2
    said = capsys.readouterr().err
    assert "lr-0.001_seed-1: is done; only failed and pruned trials are retried" in said
    assert "nothing: no such trial of" in said


@pytest.mark.slow
def test_the_command_runs_its_trials_as_commands(tiny_data: Path, tmp_path: Path) -> None:
    sections = SECTIONS | {"trainer": {"max_steps": 4, "validate_every_steps": 2}}
    spec = write_sweep(tmp_path, tiny_data, sections, axes={"optim.lr": [1e-3]}, seeds=[1])
    command = [sys.executable, "-m", "pldr_train", "sweep", "run", str(spec)]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (trial,) = Sweep(spec).trials
    assert trial.state == "done"
    command = json.loads((trial.folder / "environment.json").read_text())["command"]
    assert command[1:] == ["fit", str(trial.folder / "trial.yaml")]
