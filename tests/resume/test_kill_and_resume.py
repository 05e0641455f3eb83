"""Real processes, really killed: whatever happens, the run that goes on is the run that was never disturbed."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from pldr_train.checkpoint.shards import OPTIMIZER, WEIGHTS, Piece, ShardReader, file_name
from pldr_train.recipe import recipe_from_dict
from tests.distributed.mishaps import hold_step
from tests.messages import collected
from tests.processes import SERVER, as_a_fresh_process
from tests.tiny import MONITORED, metric_lines, tiny_values

KILLS = 20
KILL_STEPS = 160


def run_fit(values: dict[str, Any], messages: str | None = None, hold: tuple[int, str] | None = None) -> None:
    from pldr_train.fit import fit

    as_a_fresh_process()
    if hold is not None:
        hold_step(0, *hold)
    with collected() as lines:
        try:
            outcome = fit(recipe_from_dict(values))
        finally:
            if messages is not None:
                Path(messages).write_text("\n".join(lines))
    if outcome.stopped_by is not None:
        os._exit(128 + signal.Signals[outcome.stopped_by])


def start(values: dict[str, Any], messages: Path | None = None, hold: tuple[int, Path] | None = None) -> Any:
    """Start a run; `hold` is a step after which it waits for a file."""
    held = None if hold is None else (hold[0], str(hold[1]))
    child = SERVER.Process(target=run_fit, args=(values, None if messages is None else str(messages), held))
    child.start()
    return child


def kill_after(step: int, values: dict[str, Any], run: Path) -> None:
    """Train, and be killed in the step that follows on `step`."""
    child = start(values, hold=(step, run.parent / "never"))
    wait_for_step(run, step, child)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert child.exitcode == -signal.SIGKILL


def finish(values: dict[str, Any], messages: Path | None = None) -> None:
    child = start(values, messages)
    child.join(120)
    assert child.exitcode == 0


def run_fit_and_stop_it_early(values: dict[str, Any]) -> None:
    """Get SIGTERM while the data is made ready, when Lightning listens for it and the run does not yet."""
    from pldr_train.data.datamodule import PldrDataModule

    make = PldrDataModule.train_dataloader

    def stop_and_make(self: PldrDataModule) -> Any:
        assert callable(signal.getsignal(signal.SIGTERM))
        os.kill(os.getpid(), signal.SIGTERM)
        return make(self)

    PldrDataModule.train_dataloader = stop_and_make  # type: ignore[method-assign]
    run_fit(values)


def last_tensors(run: Path) -> dict[str, torch.Tensor]:
    """Weights and moments of the newest checkpoint."""
    readers = [ShardReader(run / "checkpoints" / "last", kind) for kind in (WEIGHTS, OPTIMIZER)]
    return {name: reader.whole(name) for reader in readers for name in reader.names}


def wait_for_step(run: Path, step: int, child: Any) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if lines_of(run) > step:
            return
        assert child.is_alive(), "the run ended before the step"
        time.sleep(0.002)
    raise AssertionError(f"step {step} was not reached")


def assert_same_run(left: Path, right: Path) -> None:
    assert all((run / "metrics.jsonl").read_bytes().endswith(b"\n") for run in (left, right))
    assert metric_lines(left) == metric_lines(right)
    tensors, others = last_tensors(left), last_tensors(right)
    assert {"lm_head.weight", "exp_avg/lm_head.weight", "exp_avg_sq/lm_head.weight"} <= tensors.keys()
    assert tensors.keys() == others.keys()
    assert all(torch.equal(tensors[name], others[name]) for name in tensors)
    assert (left / "samples.jsonl").read_text() == (right / "samples.jsonl").read_text()
    snapshots = [sorted((each / "snapshots").glob("*")) for each in (left, right)]
    for mine, theirs in zip(*snapshots, strict=True):
        assert mine.name == theirs.name
        pairs = load_file(mine), load_file(theirs)  # the order of their metadata is by chance
        assert pairs[0].keys() == pairs[1].keys()
        assert all(torch.equal(pairs[0][name], pairs[1][name]) for name in pairs[0])


STEPS, MIDDLE, EVERY = 16, 8, 4
"""Steps of a run, between its validations, and between its checkpoints."""
LENGTHS = {
    "model": {"num_hidden_layers": 1},
    "trainer": {"max_steps": STEPS, "validate_every_steps": MIDDLE},
    "checkpoint": {"every_steps": EVERY, "every_s": 0.5},
    "monitor": MONITORED | {"snapshots": 12},
    "sample": {"every_steps": MIDDLE},
}


@pytest.fixture(scope="module")
def straight(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("straight")
    finish(tiny_values(tiny_data, runs, **LENGTHS))
    return runs / "tiny"


def test_the_straight_run_has_every_step_and_every_validation(straight: Path) -> None:
    lines = metric_lines(straight)
    assert [line["step"] for line in lines] == list(range(STEPS + 1))
    assert [line["step"] for line in lines if "val/loss" in line] == list(range(0, STEPS + 1, MIDDLE))
    assert len({line["data/batch_digest"] for line in lines[1:]}) == STEPS
    assert len(list((straight / "snapshots").iterdir())) == 3
    assert len((straight / "samples.jsonl").read_text().splitlines()) == 2


def test_a_signal_while_the_data_is_made_ready_stops_the_run_in_order(
    straight: Path, tiny_data: Path, tmp_path: Path
) -> None:
    values = tiny_values(tiny_data, tmp_path, **LENGTHS)
    child = SERVER.Process(target=run_fit_and_stop_it_early, args=(values,))
    child.start()
    child.join(120)
    assert child.exitcode == 128 + signal.SIGTERM
    assert (tmp_path / "tiny" / "checkpoints" / "last").exists()
    finish(values)
    assert_same_run(tmp_path / "tiny", straight)


@pytest.mark.slow
def test_twenty_kills_at_random_moments_change_nothing(tiny_data: Path, tmp_path: Path) -> None:
    # The deaths at chosen moments are of runs with all metrics; this long one has those that cost little.
    lengths = LENGTHS | {"trainer": {"max_steps": KILL_STEPS, "validate_every_steps": 12}, "monitor": {"snapshots": 12}}
    lengths["checkpoint"] = dict(LENGTHS["checkpoint"])
    values = tiny_values(tiny_data, tmp_path, **lengths)
    run = tmp_path / "tiny"
    generator = random.Random(2024)
    reached = [0]
    for number in range(KILLS):
        values["checkpoint"]["async_save"] = number % 2 == 1
        child = start(values)
        # Half of the kills come at a random step, half at a random moment of the start.
        if generator.random() < 0.5:
            wait_for_step(run, reached[-1] + generator.randint(1, 7), child)
            time.sleep(generator.uniform(0, 0.03))
        else:
            until = time.monotonic() + generator.uniform(0.02, 1.0)
            while time.monotonic() < until and lines_of(run) < reached[-1] + 6:
                time.sleep(0.002)
        assert child.is_alive(), "the run was over before the kill"
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        assert child.exitcode == -signal.SIGKILL
        reached.append(lines_of(run))
    finish(values)
    assert max(reached) > 40, reached
    finish(tiny_values(tiny_data, tmp_path, "straight", **lengths))
    assert_same_run(run, tmp_path / "straight")


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_writing(what: str, step: int, write: Callable[..., Any]) -> Callable[..., Any]:
    """`write_pieces`, but killed before, within or after one of a step's two files."""
    moment, kind = what.split()

    def write_or_die(path: Path, pieces: Sequence[Piece]) -> Any:
        chosen = path.name.startswith(kind) and path.parent.name.endswith(f"{step:08d}")
        if chosen and moment == "before":
            die()
        if chosen and moment == "within":
            middle = len(pieces) // 2
            pieces = [*pieces[:middle], replace(pieces[middle], read=die), *pieces[middle + 1 :]]
        written = write(path, pieces)
        if chosen:
            die()
        return written

    return write_or_die


def die_at(moment: str, values: dict[str, Any]) -> None:
    """Train, and be killed at a chosen moment of a step that is saved (4), or saved and validated (8)."""
    from pldr_train.checkpoint import writing
    from pldr_train.training import saving, step_boundary, step_line

    def dying_from(step: int, original: Callable[..., Any], before: bool, step_of: Callable[..., int]) -> Any:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            now = step_of(*arguments) == step
            if now and before:
                die()
            result = original(*arguments, **options)
            if now:
                die()
            return result

        return wrapped

    what, step = moment.split(" at ")
    before = what.startswith("before")
    line = step_line.StepLine
    if what.endswith("line"):
        line.write = dying_from(  # type: ignore[method-assign]
            int(step), line.write, before, lambda self, trainer: trainer.global_step
        )
    elif what.endswith("save"):
        write = writing.CheckpointWrite
        write.publish = dying_from(int(step), write.publish, before, lambda self: self.step)  # type: ignore[method-assign]
    elif what.endswith((WEIGHTS, OPTIMIZER)):
        saving.write_pieces = die_writing(what, int(step), saving.write_pieces)  # type: ignore[attr-defined]
    else:
        boundary = step_boundary.StepBoundary
        boundary.on_validation_batch_end = dying_from(  # type: ignore[method-assign]
            int(step), boundary.on_validation_batch_end, before, lambda self, trainer, *_: trainer.global_step
        )
    run_fit(values)


BOUNDARY = ("before line", "after line", "before save", "after save", "in validation")
FILES = ("before weights", "within weights", "before optimizer", "within optimizer", "after optimizer")
DEATHS = [
    *(f"{what} at {step}" for what in BOUNDARY for step in (EVERY, MIDDLE, STEPS)),
    *(f"{what} at {step}" for what in FILES for step in (EVERY, STEPS)),
]
DEATHS.remove(f"in validation at {EVERY}")  # none is due there


@pytest.mark.parametrize(
    ("moment", "in_background"),
    [
        *((moment, False) for moment in DEATHS),
        *(
            (moment, True)
            for moment in (f"within weights at {EVERY}", f"before save at {MIDDLE}", f"after save at {EVERY}")
        ),
    ],
)
def test_a_death_at_any_moment_of_a_step_boundary_changes_nothing(
    moment: str, in_background: bool, tiny_data: Path, tmp_path: Path, straight: Path
) -> None:
    checkpoint = LENGTHS["checkpoint"] | {"async_save": in_background}
    values = tiny_values(tiny_data, tmp_path, **(LENGTHS | {"checkpoint": checkpoint}))
    child = SERVER.Process(target=die_at, args=(moment, values))
    child.start()
    child.join(120)
    assert child.exitcode == -signal.SIGKILL
    finish(values)
    assert_same_run(tmp_path / "tiny", straight)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves_the_step_and_leaves_cleanly(
    number: signal.Signals, tiny_data: Path, tmp_path: Path, straight: Path
) -> None:
    values = tiny_values(tiny_data, tmp_path, **(LENGTHS | {"checkpoint": {"every_steps": 1000}}))
    child = start(values, hold=(3, tmp_path / "go"))
    wait_for_step(tmp_path / "tiny", 3, child)
    os.kill(child.pid, number)
    (tmp_path / "go").touch()
    child.join(240)
    assert child.exitcode == 128 + number
    stopped = tmp_path / "tiny" / "stopped.json"
    assert re.fullmatch(rf"{number.name}: saved after step \d+ and left", json.loads(stopped.read_text())["text"])
    saved = list((tmp_path / "tiny" / "checkpoints").glob("step-*"))
    assert len(saved) == 1
    assert int(saved[0].name.removeprefix("step-")) in (3, 4)
    finish(values)
    assert not stopped.exists()
    assert_same_run(tmp_path / "tiny", straight)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_run_with_loader_processes_resumes_exactly(
    tiny_data: Path, tmp_path: Path, straight: Path, workers: int
) -> None:
    values = tiny_values(tiny_data, tmp_path, **LENGTHS, data={"num_workers": workers})
    child = start(values, hold=(5, tmp_path / "never"))
    wait_for_step(tmp_path / "tiny", 5, child)
    loaders = psutil.Process(child.pid).children(recursive=True)
    assert len(loaders) == workers
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    _, left_behind = psutil.wait_procs(loaders, timeout=30)
    assert left_behind == []
    finish(values)
    assert_same_run(tmp_path / "tiny", straight)


def damage_truncate(file: Path) -> None:
    """A file of which the end never reached the disk."""
    file.write_bytes(file.read_bytes()[:-100])


def damage_flip(file: Path) -> None:
    """A bit that turned."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))


@pytest.fixture(scope="module")
def killed(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed with two checkpoints and more; it is not to be changed."""
    runs = tmp_path_factory.mktemp("killed")
    kill_after(2 * EVERY + 1, tiny_values(tiny_data, runs, **LENGTHS), runs / "tiny")
    return runs / "tiny"


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("state.pt", damage_truncate),
        (file_name(WEIGHTS, 0, 1), damage_flip),
        (file_name(OPTIMIZER, 0, 1), Path.unlink),
        ("manifest.json", damage_truncate),
    ],
    ids=["state", "weights", "optimizer", "manifest"],
)
def test_a_damaged_newest_checkpoint_is_passed_over_with_a_message(
    tiny_data: Path, tmp_path: Path, straight: Path, killed: Path, name: str, damage: Callable[[Path], None]
) -> None:
    values = tiny_values(tiny_data, tmp_path, **LENGTHS)
    shutil.copytree(killed, tmp_path / "tiny", symlinks=True)
    newest, before = sorted((tmp_path / "tiny" / "checkpoints").glob("step-*"), reverse=True)[:2]
    damage(newest / name)
    finish(values, tmp_path / "messages")
    messages = (tmp_path / "messages").read_text()
    assert f"skipped checkpoint {newest}: {name} " in messages
    assert f"from {before}" in messages
    assert_same_run(tmp_path / "tiny", straight)


def lines_of(run: Path) -> int:
    metrics = run / "metrics.jsonl"
    return metrics.read_text().count("\n") if metrics.exists() else 0
