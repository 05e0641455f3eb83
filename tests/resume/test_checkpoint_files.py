"""The checkpoint folder by itself: whole or absent at every moment, checked, and never executed."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pldr_train.checkpoint.finding import find_newest_whole
from pldr_train.checkpoint.manifest import describe_file, find_defect, read_info, step_of
from pldr_train.checkpoint.places import remove_old
from pldr_train.checkpoint.shards import (
    OPTIMIZER,
    WEIGHTS,
    Piece,
    ShardReader,
    file_name,
    read_weights,
    write_pieces,
)
from pldr_train.checkpoint.state import load_state, save_state
from pldr_train.checkpoint.writing import CheckpointWrite
from pldr_train.errors import CheckpointError
from pldr_train.runs.layout import checkpoint_folders

FORK = multiprocessing.get_context("fork")


STORED = ("state.pt", file_name(WEIGHTS, 0, 1), file_name(OPTIMIZER, 0, 1))


def part(name: str, tensor: Tensor, start: int = 0, stop: int | None = None) -> Piece:
    """Elements [start, stop) of a tensor, to be written."""
    flat = tensor.reshape(-1)[start:stop]
    return Piece(name, tuple(tensor.shape), start, len(flat), tensor.dtype, lambda: flat)


def state(step: int) -> dict[str, Any]:
    return {"pldr_train": {"step": step}, "random": torch.full((50,), float(step))}


def write(root: Path, step: int) -> Path:
    """A checkpoint of one process, with a weight of 2,400 bytes."""

    def fill(folder: Path) -> dict[str, dict[str, Any]]:
        save_state(folder / "state.pt", state(step))
        weight = torch.full((600,), float(step))
        written = {"state.pt": describe_file(folder / "state.pt")}
        for name, tensor in (("weight", weight), ("exp_avg/weight", -weight)):
            file = file_name(OPTIMIZER if "/" in name else WEIGHTS, 0, 1)
            written[file] = write_pieces(folder / file, [part(name, tensor)])
        return written

    return CheckpointWrite(root, step, fill, {"validation_owed": False}).publish()


def test_a_checkpoint_reads_back_what_was_written(tmp_path: Path) -> None:
    folder = write(tmp_path, 12)
    assert find_defect(folder) is None
    assert step_of(folder) == 12
    assert read_info(folder) == {"validation_owed": False}
    assert torch.equal(load_state(folder / "state.pt")["random"], torch.full((50,), 12.0))
    assert torch.equal(read_weights(folder)["weight"], torch.full((600,), 12.0))
    assert torch.equal(ShardReader(folder, OPTIMIZER).whole("exp_avg/weight"), torch.full((600,), -12.0))
    assert sorted(path.name for path in folder.iterdir()) == sorted((*STORED, "manifest.json"))
    assert (tmp_path / "last").resolve() == folder.resolve()


def die_at_file_operation(root: Path, moment: int) -> None:
    """Write a checkpoint over an earlier one, and be killed at the `moment`-th file operation."""
    operations = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.symlink", "shutil.rmtree"}
    left = moment

    def kill_at(event: str, _arguments: Any) -> None:
        nonlocal left
        if event in operations:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(kill_at)
    write(root, 8)
    remove_old(root, keep_last=1, keep_steps=())
    os._exit(0)


def test_a_death_at_any_file_operation_leaves_a_whole_checkpoint(tmp_path: Path, said: list[str]) -> None:
    moment, survivors = 0, set()
    while True:
        moment += 1
        root = tmp_path / str(moment)
        write(root, 4)
        child = FORK.Process(target=die_at_file_operation, args=(root, moment))
        child.start()
        child.join(240)
        if child.exitcode == 0:
            break
        assert child.exitcode == -signal.SIGKILL
        newest = find_newest_whole(root)
        assert said == []
        assert newest is not None
        survivors.add(step_of(newest))
        # The next save finds its way through whatever was left behind.
        write(root, 16)
        remove_old(root, keep_last=1, keep_steps=())
        assert [path.name for path in root.iterdir() if path.name.startswith(".")] == []
        assert (root / "last").resolve().name == "step-00000016"
    assert moment > 12
    assert survivors == {4, 8}


@contextmanager
def a_disk_with(num_bytes: int) -> Iterator[None]:
    """No file can grow beyond so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)


@pytest.mark.parametrize(("num_bytes", "first_too_large"), [(600, "state.pt"), (2_000, file_name(WEIGHTS, 0, 1))])
def test_a_save_on_a_full_disk_names_the_fix_and_loses_nothing(
    tmp_path: Path, num_bytes: int, first_too_large: str, said: list[str]
) -> None:
    first = write(tmp_path, 4)
    sizes = {name: (first / name).stat().st_size for name in STORED}
    assert next(name for name in STORED if sizes[name] > num_bytes) == first_too_large, sizes
    with (
        a_disk_with(num_bytes),
        pytest.raises(CheckpointError, match=r"step 8 could not be written.*step-00000004, is untouched.*Free some"),
    ):
        write(tmp_path, 8)
    assert find_newest_whole(tmp_path) == first
    assert said == []
    assert checkpoint_folders(tmp_path) == [first]
    assert not list(tmp_path.glob(".building-*"))


def test_old_checkpoints_go_and_chosen_steps_stay(tmp_path: Path) -> None:
    for step in range(1, 8):
        write(tmp_path, step)
        remove_old(tmp_path, keep_last=2, keep_steps={3})
    assert [step_of(folder) for folder in checkpoint_folders(tmp_path)] == [7, 6, 3]


def test_the_newest_whole_checkpoint_is_found_and_the_others_reported(tmp_path: Path, said: list[str]) -> None:
    for step in (1, 2, 3, 4):
        write(tmp_path, step)
    (tmp_path / "step-00000004" / "state.pt").unlink()
    manifest = tmp_path / "step-00000003" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format": 99}))
    newest = find_newest_whole(tmp_path)
    assert newest == tmp_path / "step-00000002"
    assert "step-00000004: state.pt is missing" in said[0]
    assert "step-00000003: its format is 99" in said[1]


@pytest.mark.parametrize("name", STORED)
def test_every_file_is_checked_by_its_size_and_its_sum(tmp_path: Path, name: str) -> None:
    file = write(tmp_path, 1) / name
    whole = file.read_bytes()
    middle = len(whole) // 2
    turned = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    for content, reason in ((whole[:-1], "bytes instead of"), (turned, "does not match its checksum")):
        file.write_bytes(content)
        defect = find_defect(file.parent)
        assert defect is not None
        assert name in defect.reason
        assert reason in defect.reason
    file.unlink()
    defect = find_defect(file.parent)
    assert defect is not None
    assert f"{name} is missing" in defect.reason


def test_only_damaged_checkpoints_is_an_error_not_a_new_start(tmp_path: Path) -> None:
    write(tmp_path, 1)
    (tmp_path / "step-00000001" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"all 1 checkpoints .* damaged.*--resume never"):
        find_newest_whole(tmp_path)


class Malicious:
    def __reduce__(self) -> Any:
        return (os.system, ("touch " + os.environ["PLDR_TEST_PROOF"],))


def test_a_malicious_state_is_refused_and_not_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    proof = tmp_path / "executed"
    monkeypatch.setenv("PLDR_TEST_PROOF", str(proof))
    file = tmp_path / "state.pt"
    torch.save({"pldr_train": Malicious()}, file)
    with pytest.raises(CheckpointError, match="is refused.*Nothing in it was executed"):
        load_state(file)
    assert not proof.exists()
    # The file is a working attack: an unrestricted load does execute it.
    torch.load(file, weights_only=False)
    assert proof.exists()


def test_a_foreign_or_broken_state_is_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "state.pt"
    torch.save({"model_state_dict": {}}, file)
    with pytest.raises(CheckpointError, match=r"state\.pt is no training checkpoint"):
        load_state(file)
    file.write_bytes(b"nothing of the kind")
    with pytest.raises(CheckpointError, match=r"state\.pt"):
        load_state(file)
