"""Checkpoints that a thread writes while training goes on: those that a run which waits for them has."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pldr_train.checkpoint.manifest import describe_file
from pldr_train.checkpoint.shards import OPTIMIZER, WEIGHTS, Piece, ShardReader, copied_to_host, file_name, write_pieces
from pldr_train.checkpoint.state import load_state, state_bytes
from pldr_train.checkpoint.writing import CheckpointWrite
from pldr_train.errors import CheckpointError
from pldr_train.recipe import recipe_from_dict
from tests.messages import collected
from tests.processes import SERVER, as_a_fresh_process
from tests.tiny import metric_lines, tiny_values

STEPS, HELD = 20, 8
WAIT_S = 100.0


def values_of(data: Path, runs: Path, async_save: bool = True, **sections: dict[str, Any]) -> dict[str, Any]:
    checkpoint = {"every_steps": 4, "keep_last": 10, "async_save": async_save} | sections.pop("checkpoint", {})
    trainer = {"max_steps": STEPS, "validate_every_steps": 10} | sections.pop("trainer", {})
    return tiny_values(
        data, runs, model={"num_hidden_layers": 1}, checkpoint=checkpoint, trainer=trainer,
        monitor={"deductive": False}, **sections,
    )  # fmt: skip


def fit_holding(values: dict[str, Any], until: str, messages: str) -> None:
    """Train, and hold back the writing of the checkpoint of step 8 until something has happened."""
    as_a_fresh_process()
    from pldr_train.fit import fit
    from pldr_train.training import saving, step_boundary, step_line, stepping
    from pldr_train.training.nonfinite_policy import NonFinitePolicy

    happened = threading.Event()
    if until == "nothing":
        happened.set()
    write, warn, line = saving.write_pieces, saving.Saver._warn_once, step_line.StepLine.write
    leave, act, norm_of = step_boundary.StepBoundary._leave, NonFinitePolicy._act, stepping.whole_norm
    norms: list[Any] = []

    def write_held(path: Path, pieces: Any) -> Any:
        if path.parent.name.endswith(f"step-{HELD:08d}") and path.name.startswith(WEIGHTS):
            if until == "signal":
                os.kill(os.getpid(), signal.SIGTERM)
            assert happened.wait(WAIT_S), "training waits for the writing"
        return write(path, pieces)

    def then(original: Callable[..., Any], when: Callable[..., bool]) -> Any:
        def wrapped(*arguments: Any) -> Any:
            if when(*arguments):
                happened.set()
            return original(*arguments)

        return wrapped

    def line_or_error(self: Any, trainer: Any) -> None:
        line(self, trainer)
        if until == "steps" and trainer.global_step == HELD + 3:
            happened.set()
        if until == "error" and trainer.global_step == HELD + 2:
            happened.set()
            raise RuntimeError("a callback fails")

    def infinite_once(*arguments: Any) -> Any:
        norms.append(norm_of(*arguments))
        return norms[-1] * (float("inf") if until == "rollback" and len(norms) == HELD + 3 else 1.0)

    saving.write_pieces = write_held  # type: ignore[assignment]
    step_line.StepLine.write = line_or_error  # type: ignore[method-assign]
    stepping.whole_norm = infinite_once
    saving.Saver._warn_once = then(  # type: ignore[method-assign]
        warn, lambda _, text: until == "next save" and "still being written when the next is due" in text
    )
    step_boundary.StepBoundary._leave = then(leave, lambda *_: until == "signal")  # type: ignore[method-assign]
    NonFinitePolicy._act = then(act, lambda *_: until == "rollback")  # type: ignore[method-assign]
    with collected() as lines:
        try:
            outcome = fit(recipe_from_dict(values))
        except RuntimeError as error:
            lines.append(str(error))
            outcome = None
    Path(messages).write_text("\n".join(lines))
    if outcome is not None and outcome.stopped_by is not None:
        os._exit(128 + signal.Signals[outcome.stopped_by])


def train(values: dict[str, Any], until: str, folder: Path, exitcode: int = 0) -> str:
    child = SERVER.Process(target=fit_holding, args=(values, until, str(folder / "messages")))
    child.start()
    child.join(WAIT_S + 60)
    assert child.exitcode == exitcode
    return (folder / "messages").read_text()


def steps_of(run: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*"))


def tensors_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    readers = [ShardReader(checkpoint, kind) for kind in (WEIGHTS, OPTIMIZER)]
    return {name: reader.whole(name) for reader in readers for name in reader.names}


def assert_same_checkpoints(run: Path, other: Path) -> None:
    assert steps_of(run) == steps_of(other)
    for step in steps_of(run):
        mine, theirs = (each / "checkpoints" / f"step-{step:08d}" for each in (run, other))
        assert [path.name for path in sorted(mine.iterdir())] == [path.name for path in sorted(theirs.iterdir())]
        for kind in (WEIGHTS, OPTIMIZER):
            assert describe_file(mine / file_name(kind, 0, 1)) == describe_file(theirs / file_name(kind, 0, 1)), step
        names = ("lanes", "step", "optimizer_step", "validation_owed", "nonfinite", "random", "windows")
        states = [load_state(each / "state.pt")["pldr_train"] for each in (mine, theirs)]
        contents = [state_bytes([state[name] for name in names]) for state in states]
        assert contents[0] == contents[1], step


@pytest.fixture(scope="module")
def waiting(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that waits for each of its checkpoints."""
    folder = tmp_path_factory.mktemp("waiting")
    train(values_of(tiny_data, folder, async_save=False), "nothing", folder)
    return folder / "tiny"


@pytest.mark.parametrize("until", ["steps", "next save"])
def test_checkpoints_hold_the_step_at_which_they_were_begun(
    until: str, waiting: Path, tiny_data: Path, tmp_path: Path
) -> None:
    said = train(values_of(tiny_data, tmp_path), until, tmp_path)
    assert steps_of(waiting) == [4, 8, 12, 16, 20]
    assert_same_checkpoints(tmp_path / "tiny", waiting)
    assert metric_lines(tmp_path / "tiny") == metric_lines(waiting)
    assert not list((tmp_path / "tiny" / "checkpoints").glob(".*"))
    if until == "next save":
        assert said.count("still being written when the next is due, and training waits for it; save less often") == 1


def test_a_signal_while_a_checkpoint_is_written_leaves_with_both_saved(
    waiting: Path, tiny_data: Path, tmp_path: Path
) -> None:
    values = values_of(tiny_data, tmp_path, checkpoint={"stop_deadline_s": WAIT_S})
    train(values, "signal", tmp_path, 128 + signal.SIGTERM)
    saved = steps_of(tmp_path / "tiny")
    assert saved[:2] == [4, 8]
    assert saved[-1] >= 8
    train(values, "nothing", tmp_path)
    assert metric_lines(tmp_path / "tiny") == metric_lines(waiting)
    newest = [each / "checkpoints" / f"step-{STEPS:08d}" for each in (tmp_path / "tiny", waiting)]
    mine, theirs = map(tensors_of, newest)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_a_rollback_goes_to_the_checkpoint_that_is_still_being_written(tiny_data: Path, tmp_path: Path) -> None:
    train(values_of(tiny_data, tmp_path, trainer={"on_nonfinite": "rollback"}), "rollback", tmp_path)
    (event,) = json.loads((tmp_path / "tiny" / "nonfinite.json").read_text())
    assert (event["step"], event["resumed_from"]) == (HELD + 3, HELD)
    assert [line["step"] for line in metric_lines(tmp_path / "tiny")] == list(range(STEPS + 1))


def test_after_an_error_the_checkpoint_that_was_being_written_is_there(
    waiting: Path, tiny_data: Path, tmp_path: Path
) -> None:
    values = values_of(tiny_data, tmp_path)
    assert "a callback fails" in train(values, "error", tmp_path)
    assert steps_of(tmp_path / "tiny") == [4, 8]
    train(values, "nothing", tmp_path)
    assert_same_checkpoints(tmp_path / "tiny", waiting)


def pieces_of(tensor: torch.Tensor) -> list[Piece]:
    half = tensor.numel() // 2
    runs = ((0, half), (half, tensor.numel()))
    return [
        Piece("w", tuple(tensor.shape), a, b - a, torch.float32, lambda a=a, b=b: tensor.view(-1)[a:b]) for a, b in runs
    ]


def test_copies_hold_what_the_tensors_held(tmp_path: Path) -> None:
    tensor = torch.arange(12.0, dtype=torch.float64).view(3, 4)
    copies = copied_to_host(pieces_of(tensor))
    tensor.zero_()
    write_pieces(tmp_path / file_name(WEIGHTS, 0, 1), copies)
    assert torch.equal(ShardReader(tmp_path, WEIGHTS).whole("w"), torch.arange(12.0).view(3, 4))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_copies_of_a_gpus_tensors_are_whole_on_return() -> None:
    tensor = torch.arange(2.0**26, device="cuda")
    copies = copied_to_host(pieces_of(tensor))
    tensor.zero_()
    assert all(each.read().is_pinned() for each in copies)
    assert torch.equal(torch.cat([each.read() for each in copies]), torch.arange(2.0**26))


def test_a_write_is_not_in_its_place_before_it_is_published(tmp_path: Path) -> None:
    goes_on = threading.Event()

    def fill(into: Path) -> dict[str, dict[str, Any]]:
        assert goes_on.wait(WAIT_S)
        (into / "state.pt").write_bytes(b"state")
        return {"state.pt": describe_file(into / "state.pt")}

    write = CheckpointWrite(tmp_path, 3, fill, {}, in_background=True)
    assert not write.is_written
    assert not list(tmp_path.glob("step-*"))
    goes_on.set()
    assert write.publish() == tmp_path / "step-00000003"
    assert write.is_written
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last", "step-00000003"]


def test_a_full_disk_in_the_background_is_reported_when_it_is_published(tmp_path: Path) -> None:
    def fill(into: Path) -> dict[str, dict[str, Any]]:
        raise OSError(28, "No space left on device")

    write = CheckpointWrite(tmp_path, 3, fill, {}, in_background=True)
    with pytest.raises(CheckpointError, match="the checkpoint of step 3 could not be written .*: No space left"):
        write.publish()
    assert list(tmp_path.iterdir()) == []
