"""What a cluster does to a run: processes killed, stopped, hung, without a disk, with infinite losses."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from pldr_train.checkpoint.manifest import find_defect, read_info, step_of
from pldr_train.checkpoint.state import load_state
from pldr_train.runs.layout import checkpoint_folders
from tests.distributed import mishaps
from tests.distributed.cases import EVERY, MIDDLE, STEPS, STRATEGIES, assert_same_weights, cheap_values, figures
from tests.distributed.fleet import Fleet, train
from tests.tiny import metric_lines

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def straight(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("straight")
    train(cheap_values(tiny_data, runs, "ddp", 2, STRATEGIES["ddp"]), 2, runs / "logs")
    return runs / "ddp"


def assert_the_same(run: Path, straight: Path) -> None:
    assert metric_lines(run) == metric_lines(straight)
    assert_same_weights(run, straight)


def reach(fleet: Fleet, run: Path, step: int) -> None:
    fleet.wait_for(lambda: (run / "metrics.jsonl").exists() and len(metric_lines(run)) > step)


def held(values: dict[str, Any], folder: Path, step: int) -> Fleet:
    """Two processes that wait after a step until they are let go, so that a fault comes before the run is over."""
    return Fleet(values, 2, folder / "logs-1", mishaps.hold_step, (step, str(folder / "go")))


def let_go(folder: Path) -> None:
    (folder / "go").touch()


def saved_steps(run: Path) -> list[int]:
    """Steps of the checkpoints, newest first; all are whole."""
    folders = checkpoint_folders(run / "checkpoints")
    assert [find_defect(folder) for folder in folders] == [None] * len(folders)
    return [step_of(folder) for folder in folders]


def test_a_lost_process_ends_the_others_with_a_message(tiny_data: Path, tmp_path: Path, straight: Path) -> None:
    values, run = cheap_values(tiny_data, tmp_path, "run", 2, STRATEGIES["ddp"]), tmp_path / "run"
    fleet = held(values, tmp_path, EVERY + 1)
    reach(fleet, run, EVERY + 1)
    os.kill(fleet.children[1].pid, signal.SIGKILL)
    let_go(tmp_path)
    assert fleet.join() == [1, -signal.SIGKILL]
    assert "LostProcessError: rank 0: another process of the run has ended" in fleet.text(0)
    train(values, 2, tmp_path / "logs-2")
    assert_the_same(run, straight)


@pytest.mark.parametrize("signalled", [(0,), (1,), (0, 1)], ids=str)
def test_sigterm_to_any_process_saves_the_same_step_of_all(
    signalled: tuple[int, ...], tiny_data: Path, tmp_path: Path, straight: Path
) -> None:
    values, run = cheap_values(tiny_data, tmp_path, "run", 2, STRATEGIES["ddp"]), tmp_path / "run"
    fleet = held(values, tmp_path, EVERY + 1)
    reach(fleet, run, EVERY + 1)
    for rank in signalled:
        os.kill(fleet.children[rank].pid, signal.SIGTERM)
    let_go(tmp_path)
    assert fleet.join() == [143, 143], fleet.text()
    left_at = saved_steps(run)[0]
    # Left in the midst of a validation, the step's line is still owed.
    owed = read_info(checkpoint_folders(run / "checkpoints")[0])["validation_owed"]
    assert metric_lines(run)[-1]["step"] == left_at - owed
    assert left_at < STEPS
    train(values, 2, tmp_path / "logs-2")
    assert_the_same(run, straight)


@pytest.mark.parametrize(
    ("victim", "moment"),
    [
        (1, "before weights"), (1, "after weights"), (1, "after optimizer"), (0, "before weights"),
        (0, "after optimizer"), (0, "before _finish"), (0, "after _finish"),
    ],
)  # fmt: skip
def test_a_death_between_any_two_files_of_a_save_loses_nothing(
    victim: int, moment: str, tiny_data: Path, tmp_path: Path, straight: Path
) -> None:
    values, run = cheap_values(tiny_data, tmp_path, "run", 2, STRATEGIES["ddp"]), tmp_path / "run"
    fleet = Fleet(values, 2, tmp_path / "logs-1", mishaps.die_in_save, (victim, moment, MIDDLE))
    codes = fleet.join()
    assert (codes[victim], codes[1 - victim]) == (-signal.SIGKILL, 1), fleet.text()
    assert saved_steps(run)[0] == (MIDDLE if moment == "after _finish" else EVERY)
    train(values, 2, tmp_path / "logs-2")
    assert_the_same(run, straight)


@pytest.mark.parametrize("hung", [0, 1])
def test_a_hung_process_is_named_and_the_run_ends(hung: int, tiny_data: Path, tmp_path: Path, straight: Path) -> None:
    values, run = cheap_values(tiny_data, tmp_path, "run", 2, STRATEGIES["ddp"]), tmp_path / "run"
    values["parallel"] = values["parallel"] | {"timeout_s": 10.0}
    fleet = held(values, tmp_path, EVERY + 1)
    reach(fleet, run, EVERY + 1)
    os.kill(fleet.children[hung].pid, signal.SIGSTOP)
    let_go(tmp_path)
    other = 1 - hung
    fleet.children[other].join(240)
    assert fleet.children[other].exitcode == 1, fleet.text()
    fleet.kill()
    told = fleet.text(other)
    named = "rank 0, which keeps" if hung == 0 else "rank 1 is behind"
    # Stopped inside a collective both stand at the same count.
    assert f"no progress for parallel.timeout_s=10 s: {named}" in told or "all 2 processes stand still" in told, told
    assert "raise parallel.timeout_s" in told
    train(values, 2, tmp_path / "logs-2")
    assert_the_same(run, straight)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_full_disk_of_one_process_leaves_no_half_checkpoint(
    victim: int, tiny_data: Path, tmp_path: Path, straight: Path
) -> None:
    values, run = cheap_values(tiny_data, tmp_path, "run", 2, STRATEGIES["ddp"]), tmp_path / "run"
    fleet = Fleet(values, 2, tmp_path / "logs-1", mishaps.small_files, (victim, 40_000))
    assert fleet.join() == [2, 2], fleet.text()
    assert f"CheckpointError: the checkpoint of step {EVERY} could not be written" in fleet.text(victim)
    assert "ReportedElsewhereError" in fleet.text(1 - victim)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == []
    train(values, 2, tmp_path / "logs-2")
    assert_the_same(run, straight)


def test_documents_that_one_process_cannot_read_end_all_after_a_save(
    tiny_data: Path, tmp_path: Path, straight: Path
) -> None:
    values, run = cheap_values(tiny_data, tmp_path, "run", 2, STRATEGIES["ddp"]), tmp_path / "run"
    fleet = Fleet(values, 2, tmp_path / "logs-1", mishaps.unreadable_after, (1, EVERY + 1))
    assert fleet.join() == [2, 2], fleet.text()
    assert "DataError: part-1.parquet, row group 3: cannot be read" in fleet.text(0)
    assert f"The run was saved after step {EVERY + 1}" in fleet.text(0)
    assert saved_steps(run)[0] == EVERY + 1
    train(values, 2, tmp_path / "logs-2")
    assert_the_same(run, straight)


BAD_STEP = EVERY + 2
BAD_ROW = (BAD_STEP - 1) * 8 + 5
"""A row of rank 1 (of 8 rows in micro-batches of 2 on two processes), so that rank 0 has to learn of it."""
ROWS = [(BAD_STEP - 1) * 8, BAD_STEP * 8]


def nonfinite(run: Path) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = json.loads((run / "nonfinite.json").read_text())
    return events


def values_with(policy: str, data: Path, runs: Path, strategy: str, name: str = "run", **trainer: Any) -> Any:
    settings = {"on_nonfinite": policy, **trainer}
    values = cheap_values(data, runs, name, 2, STRATEGIES[strategy])
    values["trainer"] |= settings
    return values


@pytest.mark.parametrize("strategy", ["ddp", "zero-3"])
def test_an_infinite_loss_stops_all_and_names_its_rows(
    strategy: str, tiny_data: Path, tmp_path: Path, straight: Path
) -> None:
    values, run = values_with("raise", tiny_data, tmp_path, strategy), tmp_path / "run"
    fleet = Fleet(values, 2, tmp_path / "logs", mishaps.infinite_loss_with_row, (BAD_ROW,))
    assert fleet.join(120) == [2, 2], fleet.text()
    digest = figures(straight, "data/batch_digest")[BAD_STEP - 1]
    where = f"(rows [{ROWS[0]}, {ROWS[1]}), batch digest {digest})"
    assert f"step {BAD_STEP}: the loss or its gradient is NaN or infinite {where}" in fleet.text(0)
    assert nonfinite(run) == [
        {"step": BAD_STEP, "action": "raise", "rows": ROWS, "batch_digest": digest, "resumed_from": None}
    ]
    assert saved_steps(run)[0] == EVERY


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_step_with_an_infinite_loss_is_left_out(
    strategy: str, tiny_data: Path, tmp_path: Path, straight: Path
) -> None:
    values, run = values_with("skip", tiny_data, tmp_path, strategy), tmp_path / "run"
    fleet = Fleet(values, 2, tmp_path / "logs", mishaps.infinite_loss_with_row, (BAD_ROW,))
    assert fleet.join(120) == [0, 0], fleet.text()
    assert f"step {BAD_STEP}: the loss or its gradient is not finite; its update is left out" in fleet.text(0)
    assert [(event["step"], event["action"]) for event in nonfinite(run)] == [(BAD_STEP, "skip")]
    lines, expected = metric_lines(run), metric_lines(straight)
    assert [line["step"] for line in lines] == list(range(STEPS + 1))
    # The same batches; up to the bad step and one further (its weights are those of the bad step) the known losses.
    assert figures(run, "data/batch_digest") == figures(straight, "data/batch_digest")
    assert "train/loss" not in lines[BAD_STEP]
    assert lines[BAD_STEP - 1]["train/loss"] == pytest.approx(expected[BAD_STEP - 1]["train/loss"], rel=1e-5)
    assert figures(run, "train/nonfinite_steps") == [0] * (BAD_STEP - 1) + [1] * (STEPS - BAD_STEP + 1)
    state = load_state(run / "checkpoints" / "last" / "state.pt")["pldr_train"]
    assert (state["step"], state["optimizer_step"]) == (STEPS, STEPS - 1)


def test_a_run_that_left_a_step_out_resumes_exactly(tiny_data: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        values = values_with("skip", tiny_data, tmp_path, "ddp", name)
        fleet = Fleet(values, 2, tmp_path / f"logs-{name}", mishaps.infinite_loss_with_row, (BAD_ROW,))
        if name == "two":
            reach(fleet, tmp_path / name, BAD_STEP + 2)
            fleet.kill()
            fleet = Fleet(values, 2, tmp_path / "logs-again", mishaps.infinite_loss_with_row, (BAD_ROW,))
        assert fleet.join(120) == [0, 0], fleet.text()
    assert_the_same(tmp_path / "two", tmp_path / "one")
    assert nonfinite(tmp_path / "two") == nonfinite(tmp_path / "one")


@pytest.mark.parametrize("strategy", ["ddp", "zero-2", "fsdp"])
def test_a_rollback_goes_on_from_the_checkpoint_with_later_documents(
    strategy: str, tiny_data: Path, tmp_path: Path, straight: Path
) -> None:
    values, run = values_with("rollback", tiny_data, tmp_path, strategy), tmp_path / "run"
    fleet = Fleet(values, 2, tmp_path / "logs", mishaps.infinite_loss_with_row, (BAD_ROW,))
    assert fleet.join(180) == [0, 0], fleet.text()
    assert f"the run goes back to step {EVERY}" in fleet.text(0)
    assert [(event["step"], event["action"], event["resumed_from"]) for event in nonfinite(run)] == [
        (BAD_STEP, "rollback", EVERY)
    ]
    lines = metric_lines(run)
    assert [line["step"] for line in lines] == list(range(STEPS + 1))
    digests, expected = figures(run, "data/batch_digest"), figures(straight, "data/batch_digest")
    # Two steps of the first try are gone; the step after the checkpoint takes what would have come after the bad one.
    assert digests[:EVERY] == expected[:EVERY]
    assert digests[EVERY : STEPS - 2] == expected[BAD_STEP:]
    assert all("train/loss" in line for line in lines[1:])


def test_a_run_with_too_many_infinite_losses_in_a_row_gives_up(tiny_data: Path, tmp_path: Path) -> None:
    rows = tuple(range(BAD_ROW, BAD_ROW + 5 * 8, 8))
    for policy in ("skip", "rollback"):
        values = values_with(policy, tiny_data, tmp_path, "ddp", policy, max_nonfinite_steps=3)
        values["checkpoint"]["every_steps"] = BAD_STEP - 1  # at the next one too many have been bad
        fleet = Fleet(values, 2, tmp_path / f"logs-{policy}", mishaps.infinite_loss_with_row, rows)
        assert fleet.join(120) == [2, 2], fleet.text()
        assert "number 4 in a row, more than trainer.max_nonfinite_steps=3" in fleet.text(0)
        assert saved_steps(tmp_path / policy)[0] == BAD_STEP - 1


def test_a_stop_that_no_step_ends_in_time_leaves_without_saving(tiny_data: Path, tmp_path: Path) -> None:
    values = cheap_values(tiny_data, tmp_path, "run", 2, STRATEGIES["ddp"], checkpoint={"stop_deadline_s": 1.0})
    flag = tmp_path / "in-step"
    fleet = Fleet(values, 2, tmp_path / "logs", mishaps.slow_steps, (60.0, str(flag)))
    fleet.wait_for(flag.exists)
    for child in fleet.children:
        os.kill(child.pid, signal.SIGTERM)
    assert fleet.join() == [143, 143], fleet.text()
    assert "SIGTERM came 1 s ago (checkpoint.stop_deadline_s)" in fleet.text(0)
    assert not (tmp_path / "run" / "checkpoints").exists()
