"""`pldr-train checkpoint` as a user meets it; what `verify` finds is in test_checkpoint_verify.py."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from pldr_train.building import empty_model, model_config
from pldr_train.checkpoint.converting import consolidate
from pldr_train.checkpoint.listing import Leftover, Listed
from pldr_train.checkpoint.shards import OPTIMIZER, ShardReader, read_weights
from pldr_train.checkpoint.verifying import open_checkpoint
from pldr_train.checkpoint.whole_target import whole_target
from pldr_train.cli import main
from pldr_train.commands.checkpoint_actions import BytesProgress, list_as_table
from pldr_train.errors import CheckpointError
from pldr_train.fit import fit
from pldr_train.recipe import load_recipe, recipe_from_dict
from tests.cli.checkpoint_case import Call, spread, values
from tests.cli.test_cli import assert_user_error
from tests.processes import run_cli
from tests.terminal import terminal
from tests.tiny import metric_lines

# list


def test_the_list_says_what_a_run_has(run_folder: Path, call: Call) -> None:
    checkpoints = run_folder / "checkpoints"
    shutil.copytree(checkpoints / "step-00000006", checkpoints / ".building-step-00000008")
    shutil.copytree(checkpoints / "step-00000006", checkpoints / "superseded-step-00000007")
    with (checkpoints / "step-00000004" / "state.pt").open("ab") as file:
        file.write(b"x")
    result = call("list", run_folder)
    assert (result.code, result.err) == (0, "")
    header, *rows = result.out.splitlines()
    assert header.split() == ["step", "size", "written", "strategy", "processes", "val", "loss", "state"]
    assert [row.split()[0] for row in rows[:3]] == ["6", "4", "2"]
    states = ["whole by sizes, last", "DAMAGED: state.pt has ", "whole by sizes, kept for ever"]
    for row, state in zip(rows[:3], states, strict=True):
        assert " single " in row
        assert re.search(rf" {{9}}1  +(\d+\.\d{{4}})?  {re.escape(state)}", row), row
    assert rows[3:5] == ["", "beside them:"]
    assert ".building-step-00000008  " in rows[5]
    assert "removes it" in rows[5]
    assert "superseded-step-00000007  " in rows[6]
    assert call("list", checkpoints).out == result.out
    assert len(call("list", checkpoints / "last").out.splitlines()) == 2


def test_the_list_as_json(run_folder: Path, call: Call) -> None:
    found = json.loads(call("list", run_folder, "--json").out)
    newest = found["checkpoints"][0]
    assert [each["step"] for each in found["checkpoints"]] == [6, 4, 2]
    assert [each["kept_for_ever"] for each in found["checkpoints"]] == [False, False, True]
    assert [each["last"] for each in found["checkpoints"]] == [True, False, False]
    assert not any(each["best"] for each in found["checkpoints"])
    validated = {line["step"]: line["val/cross_entropy"] for line in metric_lines(run_folder) if "val/loss" in line}
    assert 6 in validated
    assert [each["val_cross_entropy"] for each in found["checkpoints"]] == [validated.get(step) for step in (6, 4, 2)]
    assert all(each["whole_by_sizes"] and each["problem"] is None for each in found["checkpoints"])
    assert newest["bytes"] == sum(path.stat().st_size for path in Path(newest["folder"]).iterdir())
    assert found["leftovers"] == []
    (run_folder / "checkpoints" / "step-00000006" / "manifest.json").unlink()
    shutil.rmtree(run_folder / "checkpoints" / "step-00000004")
    found = json.loads(call("list", run_folder, "--json").out)
    assert [each["whole_by_sizes"] for each in found["checkpoints"]] == [False, True]
    shutil.rmtree(run_folder / "checkpoints" / "step-00000006")
    assert "last names step-00000006, which is not there" in call("list", run_folder).out


def test_names_and_texts_of_files_do_not_reach_the_terminal_as_they_are(tmp_path: Path) -> None:
    red = "\x1b[31m"
    listed = Listed(
        tmp_path,
        4,
        10,
        None,
        f"{red}s",
        1,
        f"{red}damaged",
        is_last=False,
        is_kept=False,
        is_best=False,
        validation=None,
    )
    table = list_as_table([listed], [Leftover(tmp_path / f"{red}x", 10, f"{red}y")], f"{red}z")
    assert "\x1b" not in table
    assert table.count("?[31m") == 5


def test_a_run_without_a_checkpoint(run_folder: Path, call: Call) -> None:
    shutil.rmtree(run_folder / "checkpoints")
    (run_folder / "checkpoints").mkdir()
    assert call("list", run_folder).out == "no checkpoint yet\n"
    (run_folder / "checkpoints").rmdir()
    assert json.loads(call("list", run_folder, "--json").out)["checkpoints"] == []
    for arguments in (("verify", run_folder), ("consolidate", run_folder, run_folder / "x")):
        result = call(*arguments)
        assert (result.code, result.out) == (2, "")
        assert "has no checkpoint yet" in result.err


# consolidate


def test_a_consolidated_checkpoint_is_what_one_process_would_have_written(
    run_folder: Path, one: Path, tmp_path: Path, call: Call
) -> None:
    original = {path.name: path.read_bytes() for path in one.iterdir()}
    spread(one)
    target = tmp_path / "new" / "whole"
    result = call("consolidate", one, target)
    assert (result.code, result.err) == (0, "")
    assert f"--resume {target}" in result.out
    assert {path.name: path.read_bytes() for path in target.iterdir() if path.name != "manifest.json"} == {
        name: content for name, content in original.items() if name != "manifest.json"
    }
    manifest, before = (
        json.loads(text) for text in ((target / "manifest.json").read_text(), original["manifest.json"])
    )
    assert manifest == before
    assert list(target.parent.iterdir()) == [target]
    assert call("verify", target).out == "whole  ok\n"
    assert call("list", target).out.splitlines()[1].split()[0] == "4"


def test_a_run_resumes_exactly_from_a_consolidated_checkpoint(
    trained: Path, run_folder: Path, one: Path, tmp_path: Path, call: Call
) -> None:
    assert call("consolidate", spread(one), tmp_path / "whole").code == 0
    fit(recipe_from_dict(values(trained, tmp_path / "runs", "again")), str(tmp_path / "whole"))
    expected = [line for line in metric_lines(run_folder) if line["step"] > 4]
    assert metric_lines(tmp_path / "runs" / "again") == expected
    assert expected
    last = tmp_path / "runs" / "again" / "checkpoints" / "last"
    for name, tensor in read_weights(run_folder / "checkpoints" / "last").items():
        assert torch.equal(read_weights(last)[name], tensor), name


def test_the_command_that_consolidate_prints_works(
    run_folder: Path, one: Path, tmp_path: Path, call: Call, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a finished run as well, which trains on."""
    for source, step, end in ((one, 4, 6), (run_folder, 6, 12)):
        target = tmp_path / f"whole-{step}"
        (line,) = [each for each in call("consolidate", source, target).out.splitlines() if each.startswith("resume ")]
        program, *words = shlex.split(line.removeprefix("resume"))
        assert program == "pldr-train"
        assert words[-2:] == ["--resume", str(target)]
        assert os.path.samefile(words[1], run_folder / "recipe.yaml")
        assert main([*words, f"run.dir={tmp_path / f'again-{step}'}"]) == 0, capsys.readouterr().err
        assert metric_lines(tmp_path / f"again-{step}" / "tiny-2")[-1]["step"] == end
    # Without a higher number of steps it says that nothing is left to do.
    command = ["fit", str(run_folder / "recipe.yaml"), "run.name=done", f"run.dir={tmp_path}", "--resume", str(target)]
    assert main(command) == 0
    assert "is complete (step 6 of 6)" in capsys.readouterr().out


def test_a_consolidated_checkpoint_exports(one: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "consolidate", str(spread(one)), str(tmp_path / "whole")]) == 0
    assert main(["export", str(tmp_path / "whole"), str(tmp_path / "exported")]) == 0
    assert "exported    step 4 of run tiny" in capsys.readouterr().out
    assert len(load_file(tmp_path / "exported" / "model.safetensors")) == len(read_weights(one))


def test_one_tensor_at_a_time_is_read(one: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is let go before the next one is read."""
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0
    read = ShardReader.read

    def watched(self: ShardReader, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        nonlocal most
        tensor = read(self, name, start, stop)
        if tensor.numel():
            most = max(most, 1 + sum(each() is not None for each in alive))
            alive.append(weakref.ref(tensor))
        return tensor

    opened = open_checkpoint(spread(one))
    monkeypatch.setattr(ShardReader, "read", watched)
    consolidate(opened, tmp_path / "whole", replace=False)
    assert len(alive) == 3 * len(opened.tensors.parameters) + len(opened.tensors.buffers)
    assert most <= 2  # the one before is held until the next one has come


# where to


def test_what_exists_is_replaced_only_if_asked_and_ours(one: Path, tmp_path: Path, call: Call) -> None:
    for arguments in (("consolidate", one), ("convert", one, "--to", "universal"), ("convert", one, "--to", "torch")):
        target = tmp_path / f"out-{arguments[-1]}"
        action, source, *rest = arguments
        assert call(action, source, target, *rest).code == 0
        first = (target if target.is_file() else next(target.iterdir())).stat().st_ino
        refused = call(action, source, target, *rest)
        assert refused.code == 2
        assert f"{target} exists" in refused.err
        assert "--force" in refused.err
        assert call(action, source, target, *rest, "--force").code == 0
        assert (target if target.is_file() else next(target.iterdir())).stat().st_ino != first
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "manifest.json").write_text("{}")
    (mine / "notes.txt").write_text("keep")
    for rest in (("consolidate", one), ("convert", one, "--to", "universal"), ("convert", one, "--to", "weights")):
        action, source, *options = rest
        refused = call(action, source, mine, *options, "--force")
        assert refused.code == 2
        assert "is not replaced" in refused.err
    assert (mine / "notes.txt").read_text() == "keep"
    assert not list(tmp_path.glob(".*"))


def test_places_that_would_harm_a_run_are_refused(run_folder: Path, one: Path, call: Call) -> None:
    before = sorted(run_folder.rglob("*"))
    for target, part in (
        (one.parent / "whole", "where a run keeps, counts and removes its own checkpoints"),
        (one.parent / "step-00000006", "where a run keeps"),
        (one / "whole", "lie in one another"),
        (one, "lie in one another"),
        (run_folder, "lie in one another"),
    ):
        for action in (("consolidate",), ("convert", "--to", "weights")):
            refused = call(action[0], one, target, *action[1:], "--force")
            assert (refused.code, refused.out) == (2, "")
            assert part in refused.err, refused.err
    assert sorted(run_folder.rglob("*")) == before


def test_names_that_lead_nowhere(tmp_path: Path, one: Path, call: Call) -> None:
    (tmp_path / "empty").mkdir()
    for action in (("list",), ("verify",), ("consolidate", "out"), ("convert", "out", "--to", "torch")):
        first, *rest = action
        for source, part in (
            (tmp_path / "nowhere", "no such folder"),
            (tmp_path / "empty", "holds no run and no checkpoint"),
            (one / "state.pt", "is a file"),
        ):
            result = call(first, source, *rest)
            assert (result.code, result.out) == (2, "")
            assert f"error: {source}" in result.err
            assert part in result.err
    assert not Path("out").exists()


def test_a_full_disk_changes_nothing(one: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    for action in (("consolidate",), *(("convert", "--to", form) for form in ("torch", "universal"))):
        result = run_cli("checkpoint", action[0], one, target, *action[1:], file_size_limit=12_000)
        assert_user_error(result, f"cannot write {target}", "File too large", "MB free there", "nothing was changed")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["runs"]


def test_a_disk_that_is_too_small_is_refused_before_the_work(tmp_path: Path) -> None:
    too_small = pytest.raises(CheckpointError, match=r"takes up to .* MB and .* MB are free there")
    with too_small, whole_target(tmp_path / "x", 1 << 60, replace=False) as new:
        new.write_text("never")
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_a_killed_process_go_and_those_of_a_living_one_stay(tmp_path: Path) -> None:
    (tmp_path / ".building-x" / "new").mkdir(parents=True)
    (tmp_path / ".building-x" / "replaced").write_text("the one before, taken away by a process that then died")
    with pytest.raises(CheckpointError, match="exists by now"), whole_target(tmp_path / "x", 0, replace=False) as new:
        new.write_text("new")
    assert (tmp_path / "x").read_text().startswith("the one before")
    with whole_target(tmp_path / "x", 0, replace=True) as new:
        new.write_text("new")
        busy = pytest.raises(CheckpointError, match="is being written by another process")
        with busy, whole_target(tmp_path / "x", 0, replace=True):
            pass
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x").read_text() == "new"


# convert


def test_weights_with_our_names_and_the_recipe(one: Path, tmp_path: Path, call: Call) -> None:
    expected = read_weights(one)
    target = tmp_path / "weights.safetensors"
    assert call("convert", spread(one), target, "--to", "weights").code == 0
    found = load_file(target)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    with safe_open(target, "pt") as file:
        metadata = file.metadata()
    assert metadata["step"] == "4"
    (tmp_path / "recipe.yaml").write_text(metadata["recipe"])
    recipe = load_recipe(tmp_path / "recipe.yaml")
    assert recipe == open_checkpoint(one).recipe
    model = empty_model(model_config(recipe))
    model.load_state_dict(found, strict=True, assign=True)


def test_a_file_of_torch_save(one: Path, tmp_path: Path, call: Call) -> None:
    weights, moments = read_weights(one), ShardReader(one, OPTIMIZER)
    target = tmp_path / "checkpoint.pt"
    assert call("convert", spread(one), target, "--to", "torch").code == 0
    found = torch.load(target, weights_only=True)
    assert found.keys() == {"model", "optimizer"}
    assert found["model"].keys() == weights.keys()
    assert all(torch.equal(found["model"][name], weights[name]) for name in weights)
    assert found["optimizer"].keys() == {"exp_avg", "exp_avg_sq", "step"}
    assert found["optimizer"]["step"] == 4
    for moment in ("exp_avg", "exp_avg_sq"):
        assert {f"{moment}/{name}" for name in found["optimizer"][moment]} <= set(moments.names)
        for name, tensor in found["optimizer"][moment].items():
            assert torch.equal(tensor, moments.whole(f"{moment}/{name}")), name
            assert tensor.untyped_storage().nbytes() == tensor.nbytes  # none is a view of all
    assert target.stat().st_size < 1.3 * sum(path.stat().st_size for path in one.iterdir())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.pt", "runs"]


def test_help_names_the_other_way_out(call: Call, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--help"], ["convert", "--help"]):
        with pytest.raises(SystemExit):
            main(["checkpoint", *arguments])
        assert "pldr-train export" in " ".join(capsys.readouterr().out.split())


def test_a_bar_moves_in_a_terminal_alone(tmp_path: Path) -> None:
    with terminal() as opened, BytesProgress("verify", 10**9, opened.stream) as progress:
        progress.advance(5 * 10**8)
    assert "verify" in opened.shown
    with (tmp_path / "log").open("w") as log, BytesProgress("verify", 10**9, log) as progress:
        progress.advance(5 * 10**8)
    assert (tmp_path / "log").read_text() == ""
