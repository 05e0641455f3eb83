"""Kills before every file operation, flipped bits, and damaged states: a start always finds the way back."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pldr_train.checkpoint.finding import find_newest_whole
from pldr_train.checkpoint.manifest import find_defect
from pldr_train.checkpoint.places import remove_old
from pldr_train.checkpoint.state import load_state
from pldr_train.checkpoint.verifying import find_problems, state_defect
from pldr_train.checkpoint.writing import CheckpointWrite
from pldr_train.errors import CheckpointError
from pldr_train.runs.folder import RunFolder
from pldr_train.training.start import NEVER
from tests.resume.run_case import begin, change_state, every_kill, litter, seal, steps_of_metrics

FLIPS_IN_THE_MANIFEST, FLIPS_IN_A_FILE = 150, 25


def content(folder: Path) -> dict[str, bytes | str]:
    """Every file and link below a folder, the lock aside."""
    found: dict[str, bytes | str] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            found[name] = str(path.readlink())
        elif path.is_file() and path.name != ".lock":
            found[name] = path.read_bytes()
    return found


def own_validation(checkpoint: Path, owed: bool) -> None:
    change_state(checkpoint, lambda state: state["pldr_train"].update(validation_owed=owed))
    seal(checkpoint, validation_owed=owed)


def save_again(run: Path, source: Path) -> None:
    """What a run does when it saves step 6 once its validation is done; the files are those of `source`."""
    folder = RunFolder(run)
    folder.acquire()
    try:
        manifest = json.loads((source / "manifest.json").read_text())

        def fill(into: Path) -> dict[str, dict[str, Any]]:
            for name in manifest["files"]:
                shutil.copy(source / name, into / name)
            files: dict[str, dict[str, Any]] = manifest["files"]
            return files

        CheckpointWrite(run / "checkpoints", 6, fill, manifest["info"], warn=pytest.fail).publish()
        folder.saved()
        remove_old(run / "checkpoints", 1, (), 6, pytest.fail)
    finally:
        folder.release()


@pytest.mark.parametrize("linked", [False, True])
def test_a_kill_at_any_operation_of_saving_a_step_again_loses_nothing(run: Path, tmp_path: Path, linked: bool) -> None:
    source, before = tmp_path / "whole", tmp_path / "before"
    shutil.copytree(run / "checkpoints" / "step-00000006", source)
    for step in (2, 4):
        shutil.rmtree(run / "checkpoints" / f"step-{step:08d}")
    only = run / "checkpoints" / "step-00000006"
    own_validation(only, owed=True)
    run.rename(before)

    def prepare() -> None:
        shutil.rmtree(run, ignore_errors=True)
        shutil.rmtree(tmp_path / "disk", ignore_errors=True)
        shutil.copytree(before, run, symlinks=True)
        if linked:
            (tmp_path / "disk").mkdir()
            only.rename(tmp_path / "disk" / only.name)
            only.symlink_to(tmp_path / "disk" / only.name)

    owed, kills = set(), 0
    for _ in every_kill(prepare, lambda: save_again(run, source)):
        kills += 1
        start = begin(run)
        assert (start.checkpoint, start.step) == (only, 6)
        owed.add(json.loads((only / "manifest.json").read_text())["info"]["validation_owed"])
        assert find_defect(only) is None
        assert (only.parent / "last").resolve() == only.resolve()
        assert litter(run) == []
    assert kills > 10
    assert owed == {True, False}
    begin(run)
    assert find_problems(only) == []
    if linked:
        assert not only.is_symlink()
        assert list((tmp_path / "disk").iterdir()) == []


def test_a_kill_at_any_operation_of_a_resume_changes_nothing(run: Path, tmp_path: Path) -> None:
    shutil.rmtree(run / "checkpoints" / "step-00000006")
    (run / "checkpoints" / "last").unlink()
    (run / ".recipe.yaml.1234.tmp").write_text("half")
    (run / ".building-tokenizer.model-abcd").write_text("half")
    (run / "checkpoints" / ".building-step-00000006").mkdir()
    with (run / "metrics.jsonl").open("a") as metrics:
        metrics.write("# a note\n")
    before, expected = tmp_path / "before", tmp_path / "expected"
    shutil.copytree(run, before, symlinks=True)
    begin(run)
    assert steps_of_metrics(run) == [0, 1, 2, 3, 4]
    assert litter(run) == []
    shutil.copytree(run, expected, symlinks=True)
    kills = 0
    for _ in every_kill(lambda: renew(run, before), lambda: begin(run)):
        kills += 1
        assert begin(run).step == 4
        found = {name: each for name, each in content(run).items() if ".before-" not in name}
        assert found == {name: each for name, each in content(expected).items() if ".before-" not in name}
        copies = list(run.glob("metrics.before-*"))
        assert [each.read_bytes() for each in copies] == [(before / "metrics.jsonl").read_bytes()] * len(copies)
        assert copies
    assert kills > 20


def renew(run: Path, before: Path) -> None:
    shutil.rmtree(run, ignore_errors=True)
    for aside in run.parent.glob(f"{run.name}.before-*"):
        shutil.rmtree(aside)
    shutil.copytree(before, run, symlinks=True)


def test_a_kill_at_any_operation_of_starting_over_keeps_the_old_run(run: Path, tmp_path: Path) -> None:
    before = tmp_path / "earlier"
    shutil.copytree(run, before, symlinks=True)
    recipe = (run / "recipe.json").read_bytes()
    kills = 0
    for _ in every_kill(lambda: renew(run, before), lambda: begin(run, NEVER)):
        kills += 1
        run.mkdir(exist_ok=True)
        (run / "recipe.json").write_bytes(recipe)
        assert begin(run, NEVER).checkpoint is None
        kept = [content(each) for each in run.parent.glob("tiny.before-*")]
        assert any(each.items() >= content(before).items() for each in kept)
        assert not (run / "metrics.jsonl").exists()
    assert kills > 5


# --------------------------------------------------------------------------------------------------------------- damage


def newest_usable(run: Path) -> Path | None:
    return find_newest_whole(run / "checkpoints", state_defect)


def test_a_flipped_bit_anywhere_leads_to_the_checkpoint_before(run: Path) -> None:
    newest, earlier = (run / "checkpoints" / f"step-{step:08d}" for step in (6, 4))
    generator = random.Random(7)
    for path in sorted(newest.iterdir()):
        whole = path.read_bytes()
        is_manifest = path.name == "manifest.json"
        for _ in range(FLIPS_IN_THE_MANIFEST if is_manifest else FLIPS_IN_A_FILE):
            turned = bytearray(whole)
            place = generator.randrange(len(turned))
            turned[place] ^= 1 << generator.randrange(8)
            path.write_bytes(turned)
            found = newest_usable(run)
            same = is_manifest and found == newest and json.loads(turned) == json.loads(whole)
            assert found == earlier or same, (path.name, place)
        path.write_bytes(whole)
    assert newest_usable(run) == newest


def test_a_manifest_of_an_earlier_version_is_checked_against_the_state(run: Path) -> None:
    newest, earlier = (run / "checkpoints" / f"step-{step:08d}" for step in (6, 4))
    path = newest / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["sha256"]
    path.write_text(json.dumps(manifest, indent=1))
    assert newest_usable(run) == newest
    for change in (
        lambda info: info["recipe"]["optim"].update(lr=0.25),
        lambda info: info["recipe"].pop("optim"),
        lambda info: info.pop("recipe"),
        lambda info: info.update(validation_owed=True),
        lambda info: info.pop("validation_owed"),
    ):
        changed = json.loads(json.dumps(manifest))
        change(changed["info"])
        path.write_text(json.dumps(changed, indent=1))
        assert newest_usable(run) == earlier
        assert begin(run).step == 4
        assert find_problems(newest) != []


def test_a_renamed_checkpoint_is_not_believed(run: Path, said: list[str]) -> None:
    root = run / "checkpoints"
    (root / "step-00000006").rename(root / "step-00000900")
    assert begin(run).step == 4
    assert any("its folder's name says step 900, its manifest.json 6" in each for each in said)


STATE_ENTRIES = ("step", "optimizer_step", "recipe", "lanes", "source", "random", "windows", "pending", "nonfinite")
CHANGES: dict[str, Callable[[dict[str, Any]], object]] = {
    **{f"without {name}": lambda state, name=name: state["pldr_train"].pop(name) for name in STATE_ENTRIES},  # type: ignore[misc]
    **{
        f"text as {name}": lambda state, name=name: state["pldr_train"].update({name: "x"})  # type: ignore[misc]
        for name in STATE_ENTRIES
    },
    "no loops": lambda state: state.pop("loops"),
    "other loops": lambda state: state["loops"].update(fit_loop={}),
    "another global step": lambda state: state.update(global_step=5),
    "no schedule": lambda state: state.update(lr_schedulers=[]),
    "a schedule without rates": lambda state: state["lr_schedulers"][0].update(_last_lr=[]),
    "no format": lambda state: state["pldr_train"].pop("format"),
    "no mapping": lambda state: state.update(pldr_train=[]),
    "a short window": lambda state: state["pldr_train"]["windows"][0].update(sums=torch.zeros(2)),
    "a lane too few": lambda state: state["pldr_train"]["lanes"].update(lanes=torch.zeros(3, 11)),
    "random numbers": lambda state: state["pldr_train"]["random"][0]["python"].update(words=[1, 2]),
    "torch's random numbers": lambda state: state["pldr_train"]["random"][0].update(torch=torch.zeros(3)),
    "a list as value": lambda state: state["pldr_train"]["pending"].update(x=[1]),
    "events without rows": lambda state: state["pldr_train"]["nonfinite"].update(events=[{"step": 1}]),
    "a step before its time": lambda state: state["pldr_train"].update(optimizer_step=7),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_state_that_a_run_cannot_go_on_with_is_found_and_passed_over(run: Path, name: str, said: list[str]) -> None:
    newest = run / "checkpoints" / "step-00000006"
    change_state(newest, CHANGES[name])
    assert find_defect(newest) is None
    assert any("state.pt" in problem for problem in find_problems(newest))
    assert begin(run).step == 4
    assert any(each.startswith(f"skipped checkpoint {newest}: state.pt") for each in said), said
    with pytest.raises(CheckpointError, match=r"the checkpoint is damaged: state\.pt"):
        begin(run, str(newest))


def test_a_state_of_another_format_is_left_to_the_version_that_reads_it(run: Path) -> None:
    newest = run / "checkpoints" / "step-00000006"
    change_state(newest, lambda state: state["pldr_train"].update(format=2))
    assert newest_usable(run) == newest
    assert load_state(newest / "state.pt")["pldr_train"]["format"] == 2
