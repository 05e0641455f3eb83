"""A run's folder as people move, link, copy, edit and delete it; nothing that was trained is lost without a word."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from pldr_train.checkpoint.finding import named_checkpoint
from pldr_train.checkpoint.listing import find_one, find_place, list_checkpoints
from pldr_train.checkpoint.manifest import read_info, step_of
from pldr_train.checkpoint.places import remove_old
from pldr_train.cli import main
from pldr_train.errors import CheckpointError, RecipeError
from pldr_train.fit import fit
from pldr_train.models.loading import find_checkpoint
from pldr_train.recipe import FOLLOW_LENGTH, recipe_from_dict
from pldr_train.report.runs import open_runs
from pldr_train.runs import folder as run_folder
from pldr_train.runs.folder import RunFolder
from pldr_train.runs.layout import checkpoint_folders
from pldr_train.training.start import NEVER, choose_start
from tests.resume.run_case import begin, change_state, litter, recipe_of, seal, steps_of_metrics
from tests.tiny import metric_lines, tiny_values

STEPS = (6, 4, 2)


def move_to_another_disk(run: Path, disk: Path, what: str) -> None:
    """Move checkpoints there and leave links in their place."""
    disk.mkdir()
    root = run / "checkpoints"
    for folder in [root] if what == "all" else checkpoint_folders(root):
        folder.rename(disk / folder.name)
        folder.symlink_to(disk / folder.name)


@pytest.mark.parametrize("what", ["all", "each"])
def test_linked_checkpoints_are_checkpoints_everywhere(
    run: Path, tmp_path: Path, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (run / "metrics.jsonl").read_bytes()
    move_to_another_disk(run, tmp_path / "disk", what)
    newest = run / "checkpoints" / "step-00000006"
    assert begin(run).checkpoint == newest
    assert (run / "metrics.jsonl").read_bytes() == before
    for path in (run, run / "checkpoints" / "last", newest):
        found = find_checkpoint(path)
        assert found is not None
        assert (found.folder, found.run, found.step) == (newest, run, 6)
        assert found.tokenizer_file == run / "tokenizer.model"
    listed = list_checkpoints(find_place(run))
    assert [(each.step, each.problem, each.is_last) for each in listed] == [
        (6, None, True), (4, None, False), (2, None, False)
    ]  # fmt: skip
    assert main(["checkpoint", "verify", str(run)]) == 0
    assert capsys.readouterr().out.count("  ok") == 3
    (shown,), _ = open_runs([run])
    shown.read_on()
    assert [(each["step"], each["is_last"]) for each in shown.files.checkpoints] == [(6, True), (4, False), (2, False)]


def test_keep_last_removes_a_link_and_what_was_moved_but_nothing_of_others(run: Path, tmp_path: Path) -> None:
    root, disk = run / "checkpoints", tmp_path / "disk"
    move_to_another_disk(run, disk, "each")
    (disk / "step-00000004" / "notes.txt").write_text("mine")  # no checkpoint alone
    remove_old(root, 1, (), 6, pytest.fail)
    assert [each.name for each in checkpoint_folders(root)] == ["step-00000006"]
    assert sorted(each.name for each in disk.iterdir()) == ["step-00000004", "step-00000006"]
    assert (disk / "step-00000004" / "notes.txt").read_text() == "mine"
    # A link into another run's checkpoints takes the link alone.
    other = tmp_path / "other"
    shutil.copytree(run, other, symlinks=False)
    shutil.rmtree(other / "checkpoints" / "last")
    change_step(other, 2)
    (root / "step-00000002").symlink_to(other / "checkpoints" / "step-00000002")
    remove_old(root, 1, (), 6, pytest.fail)
    assert not os.path.lexists(root / "step-00000002")
    assert (other / "checkpoints" / "step-00000002" / "manifest.json").is_file()


def change_step(run: Path, step: int) -> None:
    (run / "checkpoints" / "step-00000006").rename(run / "checkpoints" / f"step-{step:08d}")


def test_keep_last_counts_neither_links_to_nothing_nor_damaged_newer_ones(run: Path, said: list[str]) -> None:
    root = run / "checkpoints"
    shutil.rmtree(root / "step-00000006")
    (root / "step-00000006").symlink_to("/nowhere/step-00000006")
    shutil.rmtree(root / "step-00000002")
    (root / "step-00000002").symlink_to("/nowhere/step-00000002")
    assert begin(run).step == 4
    assert any("step-00000006: it is a link to /nowhere/step-00000006, which is not there" in each for each in said)
    remove_old(root, 1, (), 4, pytest.fail)
    assert [step_of(each) for each in checkpoint_folders(root)] == [6, 4, 2]
    assert (root / "step-00000004" / "manifest.json").is_file()


@pytest.mark.parametrize("how", ["deleted", "emptied", "link to nothing", "links to nothing"])
def test_metrics_of_a_run_that_was_saved_are_never_emptied(run: Path, how: str, tmp_path: Path) -> None:
    root = run / "checkpoints"
    if how == "links to nothing":
        move_to_another_disk(run, tmp_path / "disk", "each")
        shutil.rmtree(tmp_path / "disk")
    else:
        shutil.rmtree(root)
        if how == "emptied":
            root.mkdir()
        elif how == "link to nothing":
            root.symlink_to("/nowhere/checkpoints")
    before = {path: path.read_bytes() for path in run.glob("*.json*")}
    expected = {
        "link to nothing": "is a link to /nowhere/checkpoints, which is not there",
        "links to nothing": "all 3 checkpoints .* are damaged",
    }.get(how, "holds metrics up to step 6, and .* no checkpoint to go on from.*--resume never")
    with pytest.raises(CheckpointError, match=expected):
        begin(run)
    assert {path: path.read_bytes() for path in run.glob("*.json*")} == before
    # What the message advises works, and keeps the old run.
    recipe = recipe_of(run)
    with pytest.raises(CheckpointError):
        fit(recipe)
    assert fit(recipe, resume=NEVER).step == 6
    (aside,) = run.parent.glob("tiny.before-*")
    assert (aside / "metrics.jsonl").read_bytes() == before[run / "metrics.jsonl"]
    assert steps_of_metrics(run) == list(range(7))


def test_a_run_that_died_before_its_first_checkpoint_starts_again(run: Path, said: list[str]) -> None:
    """And keeps a copy of its lines, for nobody was asked."""
    shutil.rmtree(run / "checkpoints")
    lines = (run / "metrics.jsonl").read_bytes()
    (run / ".unsaved").write_text('{"began_from": null}\n')
    start = begin(run)
    assert (start.checkpoint, start.step) == (None, 0)
    assert any("has no checkpoint yet: starting again from step 0" in each for each in said)
    assert (run / "metrics.jsonl").read_bytes() == b""
    (copy,) = run.glob("metrics.before-*.jsonl")
    assert copy.read_bytes() == lines
    # Once it has saved, that is over.
    assert fit(recipe_of(run)).step == 6
    assert not (run / ".unsaved").exists()


def test_a_run_from_anothers_checkpoint_goes_on_from_there_before_its_first_own(run: Path, tmp_path: Path) -> None:
    theirs = run / "checkpoints" / "step-00000004"
    new = tmp_path / "new"
    new.mkdir()
    shutil.copy(run / "recipe.json", new)
    assert begin(new, str(theirs)).checkpoint == theirs
    (new / "metrics.jsonl").write_text('{"step": 5}\n')
    for resume in ("auto", str(theirs)):
        start = begin(new, resume)
        assert (start.checkpoint, start.step) == (theirs, 4)
    assert begin(new, NEVER).checkpoint is None


def test_a_named_earlier_checkpoint_keeps_a_copy_of_the_later_lines(run: Path) -> None:
    lines = (run / "metrics.jsonl").read_bytes()
    assert begin(run, str(run / "checkpoints" / "step-00000002")).step == 2
    assert steps_of_metrics(run) == [0, 1, 2]
    (copy,) = run.glob("metrics.before-*.jsonl")
    assert copy.read_bytes() == lines


def test_going_back_twice_keeps_what_was_set_aside_before(run: Path) -> None:
    root = run / "checkpoints"
    for _ in range(2):
        shutil.copytree(root / "step-00000002", root / "step-00000006", dirs_exist_ok=True)
        assert begin(run, str(root / "step-00000002")).step == 2
    assert sorted(each.name for each in root.glob("superseded-*")) == [
        "superseded-step-00000004", "superseded-step-00000006", "superseded-step-00000006-2"
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ the link


def test_last_as_a_folder_is_left_alone_and_believed_by_nothing(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], said: list[str]
) -> None:
    root = run / "checkpoints"
    (root / "last").unlink()
    shutil.copytree(root / "step-00000002", root / "last")
    newest = root / "step-00000006"
    assert named_checkpoint(root / "last") == newest
    assert not any("skipped" in each for each in said)
    assert find_one(root / "last") == newest
    found = find_checkpoint(root / "last")
    assert found is not None
    assert found.folder == newest
    (shown,), _ = open_runs([run])
    shown.read_on()
    assert [each["name"] for each in shown.files.checkpoints if each["is_last"]] == [newest.name]
    # A run goes on and saves, warns once, and removes what is old.
    values = json.loads((run / "recipe.json").read_text())
    values["trainer"]["max_steps"], values["checkpoint"]["keep_last"] = 10, 1
    (run / "recipe.json").write_text(json.dumps(values))
    assert fit(recipe_of(run)).step == 10
    assert [each.name for each in checkpoint_folders(root)] == ["step-00000010"]
    assert json.loads((root / "last" / "manifest.json").read_text())["step"] == 2
    (warning,) = [each for each in said if "cannot be made a link" in each]
    assert "a folder is there (a copy that followed the link?), which is left alone" in warning


def test_a_file_system_without_links_costs_a_warning(
    run: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    root = run / "checkpoints"
    (root / "last").unlink()

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "symlink", refuse)
    assert begin(run).step == 6
    assert any("this file system may have no links" in each for each in said)
    assert named_checkpoint(root / "last") == root / "step-00000006"
    assert not any("skipped" in each for each in said)
    assert litter(run) == []


def test_a_start_of_a_complete_run_puts_the_link_and_old_checkpoints_right(run: Path) -> None:
    root = run / "checkpoints"
    (root / "last").unlink()
    (root / "last").symlink_to("step-00000002")
    values = json.loads((run / "recipe.json").read_text())
    values["checkpoint"]["keep_last"] = 2
    (run / "recipe.json").write_text(json.dumps(values))
    assert not fit(recipe_of(run)).trained
    assert os.readlink(root / "last") == "step-00000006"
    assert [each.name for each in checkpoint_folders(root)] == ["step-00000006", "step-00000004"]


# --------------------------------------------------------------------------------------------------------------- locks


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL])
def test_a_file_system_without_locks_is_reported_and_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, said: list[str]
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", refuse)
    folder = RunFolder(tmp_path / "run")
    folder.acquire()
    assert said == [
        f"{tmp_path / 'run'}: files cannot be locked there ({os.strerror(number)}), so nothing keeps a second process "
        "out of this run: start it once only"
    ]
    folder.check_held()
    folder.release()


@pytest.mark.parametrize("number", [errno.EWOULDBLOCK, errno.EACCES])
def test_a_lock_that_is_held_is_reported_as_such(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, said: list[str]
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.raises(CheckpointError, match="is in use by another process"):
        RunFolder(tmp_path / "run").acquire()
    assert said == []


@pytest.fixture
def held(tmp_path: Path, said: list[str]) -> Any:
    """A folder that is trained in, with two lines of metrics, and what was said of it."""
    folder = RunFolder(tmp_path / "run")
    folder.acquire()
    for step in (1, 2):
        folder.append_metrics({"step": step})
    yield folder, said
    folder.release()


def test_a_lock_file_that_was_removed_is_made_again(held: Any) -> None:
    folder, said = held
    (folder.path / ".lock").unlink()
    folder.check_held()
    with pytest.raises(CheckpointError, match="is in use by process"):
        RunFolder(folder.path).acquire()
    assert said == []


def test_a_folder_that_was_copied_and_put_in_its_place_is_held_again(held: Any) -> None:
    folder, _ = held
    shutil.copytree(folder.path, folder.path.with_name("copy"))
    shutil.rmtree(folder.path)
    folder.path.with_name("copy").rename(folder.path)
    folder.check_held()
    folder.append_metrics({"step": 3})
    assert steps_of_metrics(folder.path) == [1, 2, 3]
    with pytest.raises(CheckpointError, match="is in use by process"):
        RunFolder(folder.path).acquire()


@pytest.mark.parametrize("how", ["deleted", "renamed", "another run there"])
def test_a_folder_that_is_gone_ends_the_run_at_its_next_save(held: Any, how: str) -> None:
    folder, said = held
    moved = folder.path.with_name("moved")
    if how == "deleted":
        shutil.rmtree(folder.path)
    else:
        folder.path.rename(moved)
    other = RunFolder(folder.path)
    if how == "another run there":
        other.acquire()
        other.append_metrics({"step": 0})
    folder.append_metrics({"step": 3})
    folder.append_metrics({"step": 4})
    folder.write_nonfinite([{"step": 4}])
    assert len(said) == 1
    reason = (
        "it is in use by|another folder is in its place" if how == "another run there" else "it was moved or deleted"
    )
    with pytest.raises(CheckpointError, match=reason):
        folder.check_held()
    assert (folder.path / "metrics.jsonl").exists() == (how == "another run there")
    if how == "another run there":
        assert steps_of_metrics(folder.path) == [0]
        other.release()
    if how == "renamed":
        assert steps_of_metrics(moved) == [1, 2, 3, 4]
        moved.rename(folder.path)
        folder.check_held()
        folder.append_metrics({"step": 5})
        assert steps_of_metrics(folder.path) == [1, 2, 3, 4, 5]


def test_a_run_whose_folder_is_renamed_ends_without_making_another(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    values = tiny_values(tiny_data, tmp_path, checkpoint={"every_steps": 4})
    append = RunFolder.append_metrics

    def renamed_at_three(self: RunFolder, line: Any) -> None:
        if line["step"] == 3:
            self.path.rename(tmp_path / "moved")
        append(self, line)

    monkeypatch.setattr(RunFolder, "append_metrics", renamed_at_three)
    with pytest.raises(CheckpointError, match=r"tiny: it was moved or deleted; this process ends without saving"):
        fit(recipe_from_dict(values))
    assert any("put the folder back in its place before the next checkpoint is due" in each for each in said)
    assert not (tmp_path / "tiny").exists()
    assert steps_of_metrics(tmp_path / "moved") == [0, 1, 2, 3, 4]


# ------------------------------------------------------------------------------------------------------------- metrics


def test_metrics_that_an_editor_replaces_go_on_in_the_new_file(held: Any) -> None:
    folder, said = held
    path = folder.path / "metrics.jsonl"
    edited = path.read_bytes().splitlines(keepends=True)[0].rstrip(b"\n")  # no end of line, as some editors leave it
    folder.append_metrics({"step": 3})
    path.with_name("new").write_bytes(edited)
    path.with_name("new").replace(path)
    folder.append_metrics({"step": 4})
    folder.append_metrics({"step": 5})
    assert steps_of_metrics(folder.path) == [1, 2, 3, 4, 5]
    assert len(said) == 1
    assert "was replaced by another program" in said[0]
    assert "2 lines that it lacked were added" in said[0]


def test_metrics_that_are_removed_are_written_again(held: Any) -> None:
    folder, said = held
    (folder.path / "metrics.jsonl").unlink()
    folder.append_metrics({"step": 3})
    assert steps_of_metrics(folder.path) == [1, 2, 3]
    assert "was removed by another program" in said[0]
    (folder.path / "metrics.jsonl").unlink()
    folder.sync_metrics()
    assert steps_of_metrics(folder.path) == [1, 2, 3]


def test_metrics_that_are_cut_in_place_are_reported(held: Any) -> None:
    folder, said = held
    (folder.path / "metrics.jsonl").write_bytes(b'{"step": 1}')
    folder.append_metrics({"step": 3})
    assert steps_of_metrics(folder.path) == [1, 3]
    assert "was cut by another program" in said[0]


def test_a_full_disk_leaves_whole_lines(held: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = held

    class Full:
        def __init__(self, handle: Any) -> None:
            self.handle, self.fileno, self.close = handle, handle.fileno, handle.close

        def write(self, content: Any) -> int:
            return int(self.handle.write(content[:5]))

    monkeypatch.setattr(folder, "_metrics", Full(folder._metrics))
    folder.append_metrics({"step": 3})
    assert steps_of_metrics(folder.path) == [1, 2, 3]


# ------------------------------------------------------------------------------------------------------ where it cannot


@pytest.mark.parametrize("kind", ["below a file", "too long", "read-only"])
def test_a_folder_that_cannot_be_made_is_reported_by_its_key(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    path = {"below a file": tmp_path / "file" / "runs" / "x", "too long": tmp_path / ("n" * 300)}.get(
        kind, tmp_path / "x"
    )
    if kind == "read-only":

        def refuse(*_: Any, **__: Any) -> None:
            raise OSError(errno.EROFS, "Read-only file system")

        monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(CheckpointError, match=r"run\.dir, run\.name: the run's folder .* cannot be made or written"):
        RunFolder(path).acquire()


def test_litter_of_killed_processes_goes_and_nothing_else(run: Path) -> None:
    ours = (".metrics.jsonl.12.tmp", ".recipe.yaml.9.tmp", ".building-data.json-a_b1", ".building-tokenizer.model-x")
    others = (".notes.12.tmp", ".metrics.jsonl.swp", ".building-mine", "a.tmp")
    for name in (*ours, *others):
        (run / name).write_text("")
    (run / "snapshots").mkdir(exist_ok=True)
    (run / "snapshots" / ".building-step-00000006.safetensors-q").write_text("")
    begin(run)
    assert [name for name in ours if (run / name).exists()] == []
    assert [name for name in others if not (run / name).exists()] == []
    assert list((run / "snapshots").glob(".*")) == []


def test_an_owed_validation_cuts_its_own_step(run: Path) -> None:
    newest = run / "checkpoints" / "step-00000006"
    change_state(newest, lambda state: state["pldr_train"].update(validation_owed=True))
    seal(newest, validation_owed=True)
    assert begin(run).step == 6
    assert steps_of_metrics(run) == [0, 1, 2, 3, 4, 5]
    assert run_folder.RunFolder(run).last_metrics_step() == 5


def test_a_run_that_leaves_its_cadences_open_goes_on_with_those_it_began_with(tiny_data: Path, tmp_path: Path) -> None:
    values = tiny_values(tiny_data, tmp_path, monitor={"targets": 0, "prompts": 0}, trainer={"max_steps": 20})
    for key in FOLLOW_LENGTH:
        section, leaf = key.split(".")
        values[section].pop(leaf, None)
    assert fit(recipe_from_dict(values)).step == 20
    values["trainer"]["max_steps"] = 400
    longer = recipe_from_dict(values)
    assert longer.resolved().optim.warmup_steps == 40
    folder = RunFolder(tmp_path / "tiny")
    folder.acquire()
    try:
        start = choose_start(folder, longer, "auto", False)
    finally:
        folder.release()
    assert start.step == 20
    saved = recipe_from_dict(read_info(start.checkpoint)["recipe"])
    assert longer.going_on(saved).resolved().optim.warmup_steps == saved.optim.warmup_steps == 2
    values["trainer"]["max_steps"] = 22
    assert fit(recipe_from_dict(values)).step == 22


def test_the_best_checkpoints_stay_however_old_also_of_a_run_that_goes_on(tiny_data: Path, tmp_path: Path) -> None:
    # The worst losses are those of the first validations: only keep_best can have them stay.
    best = {"metric": "val/cross_entropy", "mode": "max", "n": 2}
    values = tiny_values(
        tiny_data,
        tmp_path,
        trainer={"max_steps": 8, "validate_every_steps": 2},
        checkpoint={"every_steps": 100, "keep_last": 1, "also_keep_steps": [], "keep_best": best},
        monitor={"deductive": False},
    )
    fit(recipe_from_dict(values))
    run = tmp_path / "tiny"
    losses = {line["step"]: line["val/cross_entropy"] for line in metric_lines(run) if "val/loss" in line}
    assert list(losses) == [0, 2, 4, 6, 8]

    def steps() -> list[int]:
        return sorted(step_of(folder) for folder in checkpoint_folders(run / "checkpoints"))

    highest = sorted((2, 4, 6, 8), key=lambda step: -losses[step])[:2]
    assert steps() == sorted({*highest, 8})
    assert highest == [2, 4]
    listed = list_checkpoints(find_place(run))
    assert {each.step: (each.validation, each.is_best) for each in listed} == {
        step: (losses[step], step in highest) for step in steps()
    }
    values["trainer"]["max_steps"] = 12
    fit(recipe_from_dict(values))
    assert steps() == [2, 4, 12]


def test_an_unknown_metric_of_the_best_is_refused(tiny_data: Path, tmp_path: Path) -> None:
    values = tiny_values(tiny_data, tmp_path, checkpoint={"keep_best": {"metric": "val/cross_entrpy"}})
    with pytest.raises(
        RecipeError, match=r"keep_best\.metric=val/cross_entrpy: no such metric; did you mean val/cross"
    ):
        fit(recipe_from_dict(values))
