"""A small sweep: its files, processes that play its trials, and a runner whose trials are forked from it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pldr_train.recipe.yaml_text import read_recipe_file, to_yaml
from pldr_train.sweeps import Sweep
from tests.processes import SERVER, as_a_fresh_process
from tests.tiny import metric_lines, tiny_values

LR, SEEDS = "optim.lr", [1, 2]
NEEDING: dict[str, Any] = {
    "given": {
        "model.custom_G_type": "external", "model.custom_G_path": "trial:learned",
        "dag.A_LM": 0.0, "dag.A_P": 0.0, "dag.G_LM": 0.0,
    },
    "learned": {"model.custom_G_type": "learned"},
}  # fmt: skip
"""Labels of an axis; the trials of the first need those of the second."""
GRID: dict[str, Any] = {LR: [1e-3, 2e-3, 4e-3]}


def write_sweep(folder: Path, data: Path, sections: Mapping[str, Mapping[str, Any]] | None = None, **keys: Any) -> Path:
    """Write a recipe and a sweep of it below `folder`, with its runs in `folder`/runs; returns the sweep's file."""
    folder.mkdir(parents=True, exist_ok=True)
    recipe = tiny_values(data, folder / "runs", **(sections or {}))
    (folder / "recipe.yaml").write_text(to_yaml(recipe))
    spec = {"name": "small", "recipe": str(folder / "recipe.yaml"), "axes": GRID, "seeds": SEEDS, "metric": "val/loss"}
    (folder / "sweep.yaml").write_text(to_yaml(spec | keys))
    return folder / "sweep.yaml"


def lines_of_trials(spec: Path) -> dict[str, list[dict[str, Any]]]:
    """The metrics of every trial, without timings."""
    return {trial.name: metric_lines(trial.folder) for trial in Sweep(spec).trials}


# ---------------------------------------------------------------------------------------------------- played processes


class Played:
    """A process that does what a test says: `values` are the objective's at steps 8, 16, 24, ...; then it ends.

    Args:
        folder: of the trial.
        values: what it measures.
        code: what it ends with; None: it does not end before it gets a signal.
    """

    def __init__(self, folder: Path, values: Sequence[float], code: int | None = 0) -> None:
        self.folder, self.signals = folder, list[int]()
        self.code = code
        lines = [{"step": 8 * (place + 1), "val/loss": value} for place, value in enumerate(values)]
        with (folder / "metrics.jsonl").open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)

    def poll(self) -> int | None:
        return self.code

    def send_signal(self, number: int, /) -> None:
        self.signals.append(number)
        self.code = 128 + number

    def wait(self) -> int:
        assert self.code is not None
        return self.code

    def kill(self) -> None:
        self.code = -9


# ---------------------------------------------------------------------------------------------------- real processes


class Forked:
    """A trial's process that was forked from its runner."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._code: int | None = None

    def poll(self) -> int | None:
        if self._code is None:
            found, status = os.waitpid(self.pid, os.WNOHANG)
            if found:
                self._code = os.waitstatus_to_exitcode(status)
        return self._code

    def send_signal(self, number: int, /) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def wait(self) -> int:
        if self._code is None:
            self._code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self._code

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)
        self.wait()


def fork_trial(command: Sequence[str], environment: Mapping[str, str], log: Path, keep: int) -> Forked:
    """Start a trial as `pldr_train.sweeps.processes.start_process` does, without the seconds of a fresh start."""
    pid = os.fork()
    if pid:
        return Forked(pid)
    code = 1
    with contextlib.suppress(BaseException):
        code = _trial(list(command), dict(environment), log, keep)
    os._exit(code)


def _trial(command: Sequence[str], environment: Mapping[str, str], log: Path, keep: int) -> int:
    os.setpgid(0, 0)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(environment)
    output = os.open(log, os.O_WRONLY | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    # A start of a program keeps no descriptors but those that it is to have.
    os.closerange(3, keep)
    os.closerange(keep + 1, 4096)
    from pldr_train.cli import main

    assert command[1:4] == ["-m", "pldr_train", "fit"]
    try:
        code = main(command[3:])
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def _runner(arguments: Sequence[str], out: str) -> None:
    as_a_fresh_process()
    output = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    from pldr_train.cli import main
    from pldr_train.sweeps import processes

    processes.start_process = fork_trial
    code = main(["sweep", "run", *arguments])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def start_runner(spec: Path, out: Path, *options: str) -> Any:
    """Start `pldr-train sweep run` in a process of its own, whose output goes to a file."""
    child = SERVER.Process(target=_runner, args=([str(spec), *options], str(out)))
    child.start()
    return child


def finish_runner(child: Any, out: Path, code: int = 0) -> str:
    """Wait for a runner's end; returns what it printed."""
    child.join(300)
    text = out.read_text()
    assert child.exitcode == code, text
    return text


def changed_file(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the values of a YAML file in place."""
    values = read_recipe_file(path)
    change(values)
    path.write_text(to_yaml(values))
