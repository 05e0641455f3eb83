"""`pldr-train fit` on several devices: when it starts processes, and which."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pldr_train import cli
from pldr_train.commands import fit as command
from tests.processes import ROOT


class Launched(list[tuple[list[str], int, int]]):
    """Stands for `launch` and keeps what it was called with."""

    def __call__(self, command: list[str], num_processes: int, max_restarts: int, progress: Callable[[], int]) -> int:
        self.append((command, num_processes, max_restarts))
        self.progress = progress
        return 77


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Launched:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    calls = Launched()
    monkeypatch.setattr(command, "launch", calls)
    return calls


RECIPE = str(ROOT / "recipes/quickstart.yaml")


def test_fit_on_several_devices_starts_itself_that_many_times(launched: Launched, tmp_path: Path) -> None:
    given = ["fit", RECIPE, "trainer.devices=2", f"run.dir={tmp_path}", "--force", "parallel.max_restarts=3"]
    (tmp_path / "quickstart/checkpoints/step-00000040").mkdir(parents=True)
    assert cli.main(given) == 77
    assert launched == [([sys.executable, "-m", "pldr_train", *given], 2, 3)]
    assert launched.progress() == 40


def test_with_resume_given_there_are_no_restarts(launched: Launched, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["fit", RECIPE, "trainer.devices=2", "parallel.max_restarts=3", "--resume", "never"]) == 77
    assert launched[0][2] == 0
    assert "parallel.max_restarts=3: no restarts with --resume never" in capsys.readouterr().out


def test_fit_does_not_start_other_machines(launched: Launched, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["fit", RECIPE, "trainer.num_nodes=2"]) == 2
    assert launched == []
    message = capsys.readouterr().err
    assert "trainer.num_nodes=2: " in message
    assert "launch/torchrun on every machine" in message


def test_a_launched_process_trains(launched: Launched, monkeypatch: pytest.MonkeyPatch) -> None:
    from pldr_train import fit as fit_module

    class ReachedError(Exception):
        pass

    def reach(*_: Any) -> None:
        raise ReachedError

    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(fit_module, "fit", reach)
    with pytest.raises(ReachedError):
        cli.main(["fit", RECIPE, "trainer.devices=2"])
    assert launched == []


@pytest.mark.parametrize("option", ["--print-recipe", "--dry-run"])
def test_questions_start_no_processes(option: str, launched: Launched, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["fit", RECIPE, "trainer.devices=2", option]) == 0
    assert launched == []
    assert capsys.readouterr().out
