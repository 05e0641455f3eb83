"""`pldr-train fit` with several processes, as a user runs it: real commands, what they print and their exit codes.

Most are forked from the server, launcher and ranks. Those that a fresh interpreter may change are started afresh: an
engine that prints when it is imported, and ranks that something else has numbered.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from ruamel.yaml import YAML

from pldr_train.checkpoint.manifest import find_defect, read_info, step_of
from pldr_train.distributed.world import World
from pldr_train.errors import RecipeError
from pldr_train.fit import for_world
from pldr_train.launching import LAUNCHED
from pldr_train.recipe import recipe_from_dict
from pldr_train.runs.layout import checkpoint_folders
from tests.distributed.cases import assert_same_weights
from tests.distributed.fleet import free_port
from tests.processes import hostile_folder, rank_process, start_cli
from tests.tiny import metric_lines, tiny_values

STEPS = 24
NUMBERING = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", LAUNCHED)


class Command:
    """A running `pldr-train fit RECIPE OVERRIDES`: forked with its ranks, or started afresh as a user's is."""

    def __init__(
        self, recipe: Path, *overrides: str, logs: Path, variables: dict[str, str] | None = None, fresh: bool = False
    ) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        self.out, self.err = logs / "out", logs / "err"
        inherited = {name: value for name, value in os.environ.items() if name not in (*NUMBERING, "WANDB_API_KEY")}
        environment = inherited | {"OMP_NUM_THREADS": "1"} | (variables or {})
        cwd = logs / "cwd"  # a run takes nothing out of its working directory
        if not cwd.exists():
            hostile_folder(cwd)
        self._started: subprocess.Popen[bytes] | None = None
        if not fresh:
            self._child = start_cli(
                "fit", recipe, *overrides, cwd=cwd, out=self.out, err=self.err, environment=environment
            )
            self.pid: int = self._child.pid
            return
        with self.out.open("w") as out, self.err.open("w") as err:
            self._started = subprocess.Popen(
                [sys.executable, "-P", "-m", "pldr_train", "fit", str(recipe), *overrides],
                stdout=out, stderr=err, cwd=cwd, env=environment, start_new_session=True,
            )  # fmt: skip
        self.pid = self._started.pid

    @property
    def exit_code(self) -> int | None:
        code: int | None = self._child.exitcode if self._started is None else self._started.poll()
        return code

    def wait(self, timeout_s: float) -> None:
        if self._started is None:
            self._child.join(timeout_s)
        else:
            self._started.wait(timeout_s)

    def ended(self, code: int) -> tuple[str, str]:
        """What it printed on stdout and stderr, once it has ended with that code, without any traceback."""
        self.wait(300)
        out, err = self.text()
        assert self.exit_code == code, f"exit code {self.exit_code}\n{out}\n{err}"
        assert "Traceback" not in out + err
        return out, err

    def launched(self, rank: int) -> psutil.Process:
        """The process of a rank that it has started."""
        found = rank_process(self.pid, rank)
        assert found is not None, f"no rank {rank}\n{self.text()}"
        return found

    def wait_for(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + 240
        while not condition():
            assert time.monotonic() < end
            assert self.exit_code is None, f"it ended before\n{self.text()}"
            time.sleep(0.005)

    def text(self) -> tuple[str, str]:
        return self.out.read_text(), self.err.read_text()


@pytest.fixture
def fit(tmp_path: Path) -> Iterator[Callable[..., Command]]:
    """Start a command; what still runs at the end is killed, and what it has launched goes with it."""
    started: list[Command] = []

    def start(recipe: Path, *overrides: str, **options: Any) -> Command:
        started.append(Command(recipe, *overrides, logs=tmp_path / f"logs-{len(started)}", **options))
        return started[-1]

    yield start
    for each in started:
        if each.exit_code is None:
            os.kill(each.pid, signal.SIGKILL)
            each.wait(60)


def write_recipe(folder: Path, data: Path) -> Path:
    path = folder / "tiny.yaml"
    values = tiny_values(data, folder / "runs", trainer={"max_steps": STEPS}, model={"num_hidden_layers": 1})
    with path.open("w") as handle:
        YAML(typ="safe").dump(values, handle)
    return path


@pytest.fixture
def recipe(tiny_data: Path, tmp_path: Path) -> Path:
    return write_recipe(tmp_path, tiny_data)


@pytest.fixture(scope="module")
def straight(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of two processes that nothing disturbs, with what it printed in `logs`."""
    folder = tmp_path_factory.mktemp("straight")
    path = write_recipe(folder, tiny_data)
    Command(path, "trainer.devices=2", logs=folder / "runs" / "tiny" / "logs").ended(0)
    return folder / "runs" / "tiny"


def without_advice(out: str) -> list[str]:
    """The lines, but for what a slow machine adds: that training waits for data."""
    return [line for line in out.splitlines() if "training waits for data" not in line]


def reports_of(run: Path, command: str, out: str, steps: int = STEPS) -> None:
    """It began and reported once, in one voice, and said nothing else."""
    lines = without_advice(out)
    assert lines[0].startswith(f"run tiny: {steps} steps of 128 tokens")
    assert lines[1] == ""
    assert lines[2].startswith("sample: the metric")
    tail = lines[lines.index("", 2) + 1 :]
    assert tail[:4] == [
        f"run         {run}",
        f"checkpoint  {run}/checkpoints/last",
        f"metrics     {run}/metrics.jsonl",
        f"report      {run}/report.html",
    ]
    assert command in tail[6]
    assert len(tail) == 7


@pytest.mark.slow
def test_two_processes_train_and_report_once(straight: Path) -> None:
    assert (straight / "logs" / "err").read_text() == ""
    command = f"pldr-train fit {straight.parents[1]}/tiny.yaml trainer.devices=2 run.name=tiny-no-dag"
    reports_of(straight, command, (straight / "logs" / "out").read_text())
    assert [line["step"] for line in metric_lines(straight)] == list(range(STEPS + 1))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("parallel", "fresh"),
    [({"strategy": "fsdp"}, False), ({"strategy": "deepspeed", "zero_stage": "3"}, True)],
    ids=["fsdp", "deepspeed"],
)
def test_engines_add_no_noise(parallel: dict[str, str], fresh: bool, recipe: Path, fit: Callable[..., Command]) -> None:
    keys = [
        "trainer.max_steps=8",
        "optim.warmup_steps=1",
        *(f"parallel.{name}={value}" for name, value in parallel.items()),
    ]
    out, err = fit(recipe, "trainer.devices=2", *keys, fresh=fresh).ended(0)
    assert err == ""
    reports_of(recipe.parent / "runs" / "tiny", " ".join(keys), out, steps=8)


@pytest.mark.slow
def test_processes_end_early_together(recipe: Path, fit: Callable[..., Command]) -> None:
    # Losses fall, so that the largest is that of step 0.
    early = "trainer.early_stop={metric: val/cross_entropy, mode: max, patience: 2}"
    words = ("trainer.devices=2", "trainer.validate_every_steps=2", early)
    out, _ = fit(recipe, *words).ended(0)
    run = recipe.parent / "runs" / "tiny"
    assert out.splitlines()[-1].startswith(f"step 4 of {STEPS}, ended early: val/cross_entropy has not improved in ")
    assert metric_lines(run)[-1]["step"] == step_of(run / "checkpoints" / "last") == 4
    again, _ = fit(recipe, *words).ended(0)
    assert f"run tiny is complete (step 4 of {STEPS}, ended early: " in again


def reach(command: Command, run: Path, step: int) -> None:
    command.wait_for(lambda: (run / "metrics.jsonl").exists() and len(metric_lines(run)) > step)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_is_started_again_and_nothing_is_lost(
    rank: int, recipe: Path, straight: Path, fit: Callable[..., Command]
) -> None:
    run = recipe.parent / "runs" / "tiny"
    command = fit(recipe, "trainer.devices=2", "parallel.max_restarts=1")
    reach(command, run, 6)
    command.launched(rank).kill()
    out, err = command.ended(0)
    lines = without_advice(out)
    assert lines.count(f"rank {rank} was killed by SIGKILL") == 1
    assert lines.count("starting all 2 processes again (restart 1 of 1)") == 1
    (resuming,) = [line for line in lines if "resuming after step" in line]
    assert lines.index(resuming) > lines.index("starting all 2 processes again (restart 1 of 1)")
    assert out.count("sample: ") == 1
    # The other one tells of it, unless it is ended before it has noticed.
    assert err.count("\n") == err.count(f"error: rank {1 - rank}: another process of the run has ended") <= 1
    assert metric_lines(run) == metric_lines(straight)
    assert_same_weights(run, straight)


@pytest.mark.slow
def test_sigterm_to_the_launcher_saves_and_the_same_command_goes_on(
    recipe: Path, straight: Path, fit: Callable[..., Command]
) -> None:
    run = recipe.parent / "runs" / "tiny"
    command = fit(recipe, "trainer.devices=2", "parallel.max_restarts=1")
    reach(command, run, 6)
    os.kill(command.pid, signal.SIGTERM)
    out, err = command.ended(143)
    newest = checkpoint_folders(run / "checkpoints")[0]
    left_at = step_of(newest)
    # Left in the midst of a validation, the step's line is still owed.
    assert metric_lines(run)[-1]["step"] == left_at - read_info(newest)["validation_owed"]
    assert left_at < STEPS
    again = f"pldr-train fit {recipe} trainer.devices=2 parallel.max_restarts=1"
    assert without_advice(out)[1:] == [f"SIGTERM: saved after step {left_at} and left; go on with: {again}"]
    assert err == ""
    out, err = fit(recipe, "trainer.devices=2", "parallel.max_restarts=1").ended(0)
    assert f"resuming after step {left_at} from" in out
    assert metric_lines(run) == metric_lines(straight)
    assert_same_weights(run, straight)


@pytest.mark.slow
def test_a_damaged_newest_checkpoint_is_passed_over_and_told_once(
    recipe: Path, straight: Path, fit: Callable[..., Command]
) -> None:
    run = recipe.parent / "runs" / "tiny"
    shutil.copytree(straight, run, symlinks=True)
    newest, before = checkpoint_folders(run / "checkpoints")[:2]
    weights = next(newest.glob("weights*00002*"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert find_defect(newest) is not None
    out, err = fit(recipe, "trainer.devices=2").ended(0)
    told = [line for line in out.splitlines() if newest.name in line and weights.name in line]
    assert len(told) == 1, out
    assert out.count(f"resuming after step {step_of(before)} from") == 1
    assert err == ""
    assert metric_lines(run) == metric_lines(straight)
    assert_same_weights(run, straight)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["data.path=/no/where"], "data.path=/no/where: no such file or folder"),
        (["model.init_from=/no/where"], "model.init_from=/no/where: no such folder"),
        (
            ["parallel.strategy=deepspeed", "parallel.deepspeed_config=/no/where.json"],
            "parallel.deepspeed_config=/no/where.json: cannot be read",
        ),
    ],
    ids=["data", "init_from", "deepspeed_config"],
)
def test_what_the_processes_find_wrong_is_reported_once(
    overrides: list[str], told: str, recipe: Path, fit: Callable[..., Command]
) -> None:
    out, err = fit(recipe, "trainer.devices=2", "parallel.max_restarts=3", *overrides).ended(2)
    assert err.startswith(f"error: {told}")
    assert err.count("\n") == 1
    assert len(out.splitlines()) <= 1  # some are found before the run is announced


def test_a_strategy_for_one_process_is_refused_before_any_is_started(recipe: Path, fit: Callable[..., Command]) -> None:
    out, err = fit(recipe, "trainer.devices=2", "parallel.strategy=single").ended(2)
    assert out == ""
    assert err.count("error:") == 1
    assert "parallel.strategy=single: is for one process, but there are 2; use ddp, fsdp or deepspeed" in err
    assert not (recipe.parent / "runs").exists()


@pytest.mark.slow
def test_processes_that_something_else_has_numbered_are_taken_as_they_are(
    recipe: Path, straight: Path, fit: Callable[..., Command]
) -> None:
    port = str(free_port())
    commands = [
        fit(
            recipe,
            variables={
                "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
            },
            fresh=True,
        )
        for rank in ("0", "1")
    ]  # fmt: skip
    (out, err), silent = (command.ended(0) for command in commands)
    said = "1 x 2 processes were started: trainer.num_nodes=1, trainer.devices=2"
    assert out.splitlines()[0] == said
    assert out.count(said) == 1
    assert err == ""
    assert silent == ("", "")
    run = recipe.parent / "runs" / "tiny"
    assert metric_lines(run) == metric_lines(straight)
    assert_same_weights(run, straight)


def tiny(devices: int, **sections: Any) -> Any:
    return recipe_from_dict(tiny_values(Path("data"), Path("runs"), trainer={"devices": devices, **sections}))


def test_a_recipe_takes_on_the_number_of_processes_that_there_is(said: list[str]) -> None:
    found = for_world(tiny(1), World(rank=3, size=4, local_rank=1, local_size=2)).resolved()
    assert (found.trainer.num_nodes, found.trainer.devices, found.trainer.micro_batch_size) == (2, 2, 1)
    assert said == ["2 x 2 processes were started: trainer.num_nodes=2, trainer.devices=2"]


def test_nothing_is_said_of_a_number_that_the_recipe_names(said: list[str]) -> None:
    assert for_world(tiny(2), World(size=2, local_size=2)) == tiny(2)
    assert for_world(tiny(1), World()) == tiny(1)
    assert said == []


def test_a_recipe_that_does_not_fit_the_number_of_processes_is_refused() -> None:
    with pytest.raises(RecipeError, match="the recipe for this number of processes"):
        for_world(tiny(1), World(size=3, local_size=3))
    with pytest.raises(RecipeError, match=r"trainer\.devices=2, trainer\.num_nodes=1: this is one process"):
        for_world(tiny(2), World())
