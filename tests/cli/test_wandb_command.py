"""`pldr-train wandb` on the command line, offline."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from pldr_train.cli import main
from tests.unit.wandb_case import isolate_wandb, write_checkpoint, write_run, write_samples, write_snapshot
from tests.unit.wandb_records import only_record

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def _isolated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    isolate_wandb(monkeypatch, tmp_path)


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """Run `pldr-train wandb ARGUMENTS` in this process: exit code, output, errors."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(["wandb", *map(str, arguments)])
        return code, *capsys.readouterr()

    return run


def test_replay_writes_one_record_and_says_how_to_upload_it(call: Call, tmp_path: Path) -> None:
    run = write_run(tmp_path)
    write_snapshot(run, 3)
    write_samples(run, (6,))
    code, out, err = call("replay", run, "--name", "clean", "--project", "demo", "--entity", "team", "--id", "my-id")
    assert (code, err) == (0, "")
    found = only_record(run)
    assert "7 steps, 1 snapshots, 1 samples; W&B run my-id" in out
    assert f"wandb sync {found.folder}\n" in out
    assert (found.run.display_name, found.run.project, found.run.entity) == ("clean", "demo", "team")
    assert found.run.run_id == "my-id"


def test_replay_tells_on_the_error_output_what_it_left_out(call: Call, tmp_path: Path) -> None:
    run = write_run(tmp_path)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7')
    code, _, err = call("replay", run)
    assert code == 0
    assert err.startswith("note: 1 lines of metrics.jsonl")


@pytest.mark.parametrize(("which", "aliases"), [("last", {"latest", "last", "step-6"}), ("4", {"latest", "step-4"})])
def test_upload_logs_a_checkpoint_on_a_record_of_its_own(
    call: Call, tmp_path: Path, which: str, aliases: set[str]
) -> None:
    run = write_run(tmp_path)
    for step in (4, 6):
        write_checkpoint(run, step)
    code, out, err = call("upload", run, "--checkpoint", which)
    assert (code, err) == (0, "")
    found = only_record(run)
    (artifact,) = found.artifacts
    assert (artifact.name, artifact.type, set(artifact.aliases)) == ("checkpoint-tiny", "checkpoint", aliases)
    assert json.loads(artifact.metadata)["bytes"] == 1500
    # The files stay where they are; nothing is copied.
    step = 6 if which == "last" else 4
    places = {Path(each.local_path) for each in artifact.manifest.contents}
    assert places == set((run / "checkpoints" / f"step-{step:08d}").iterdir())
    assert (found.run.job_type, found.history) == ("upload", [])
    # A record of the run's own id could take the place of what the mirror has uploaded.
    assert not (run / "wandb.json").exists()
    assert f"step {step}" in out
    assert "wandb sync" in out


def test_workspace_is_printed_or_written(call: Call, tmp_path: Path) -> None:
    code, out, _ = call("workspace", "--project", "demo", "--layers", 2, "--runs", "a", "b", "--x", "tokens")
    assert code == 0
    assert json.loads(out)["project"] == "demo"
    file = tmp_path / "new" / "dashboard.json"
    code, out, _ = call("workspace", "--out", file)
    assert (code, out) == (0, f"workspace   {file}\n")
    assert "leakage/gap" in file.read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("replay", "nowhere"), "nowhere: no such folder"),
        (("replay", "RUN", "--mode", "online"), "wandb login"),
        (("replay", "RUN", "--id", "a b"), "--id a b"),
        (("upload", "RUN"), "--checkpoint last: there is no"),
        (("upload", "RUN", "--checkpoint", "newest"), "name a step"),
        (("workspace", "--save"), "--entity"),
        (("workspace", "--save", "--entity", "team"), "wandb login"),
        (("workspace", "--out", "RUN/recipe.yaml/x"), "belongs to the run in"),
    ],
)
def test_what_the_user_can_mend_is_one_message(
    call: Call, tmp_path: Path, arguments: tuple[str, ...], words: str
) -> None:
    run = str(write_run(tmp_path))
    code, _, err = call(*(each.replace("RUN", run) for each in arguments))
    assert code == 2
    assert err.startswith("error: ")
    assert words in err
    assert "Traceback" not in err
