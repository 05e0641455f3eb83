"""The processes of trials: what each has of the machine, its command and its start."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pldr_train.errors import UserError
from pldr_train.launching import num_cores, tied_to_this_process
from pldr_train.recipe import Recipe

_NUMBERING = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT",
)  # fmt: skip
"""A runner may be one of several numbered tasks, for instance of SLURM; its trials are runs of their own."""
_GPU = re.compile(r"nvidia(\d+)")


class Process(Protocol):
    """A trial's process."""

    def poll(self) -> int | None:
        """Return its exit code, negative after a signal; None while it runs."""

    def send_signal(self, number: int, /) -> None:
        """Send it a signal."""

    def wait(self) -> int:
        """Wait for its end and return its exit code."""

    def kill(self) -> None:
        """Kill it with all that it started, and wait for its end."""


class _FitProcess:
    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    def poll(self) -> int | None:
        return self._process.poll()

    def send_signal(self, number: int, /) -> None:
        self._process.send_signal(number)

    def wait(self) -> int:
        return self._process.wait()

    def kill(self) -> None:
        # The group: loader workers go as well. It is there until its leader has been waited for.
        if self._process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def start_process(command: Sequence[str], environment: Mapping[str, str], log: Path, keep: int) -> Process:
    """Start a trial's process, which ends when this one does.

    Args:
        command: what it runs.
        environment: its variables.
        log: what it prints is appended there.
        keep: a descriptor that it inherits.
    """
    with log.open("ab") as output:
        # A group of its own: Ctrl-C in a terminal would reach it beside the signal that the runner sends.
        process = subprocess.Popen(
            list(command), env=dict(environment), stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            process_group=0, pass_fds=(keep,),
        )  # fmt: skip
    return _FitProcess(process)


@dataclass(frozen=True)
class Workers:
    """How many trials run at a time on this machine, and what each has of it.

    Args:
        number: of trials.
        devices: processes of each trial.
        gpus: the GPUs that are dealt out to them; none on the CPU.
    """

    number: int
    devices: int
    gpus: tuple[str, ...] = ()

    @property
    def threads(self) -> int:
        """CPU threads of each process."""
        return max(1, num_cores() // (self.number * self.devices))

    def free_slot(self, taken: Set[int]) -> int:
        """Return the first place that no running trial has."""
        return next(slot for slot in range(self.number) if slot not in taken)

    def command(self, recipe_file: Path, recipe: Recipe) -> list[str]:
        """Return a trial's command. Threads are no part of its recipe, which is the same on every machine."""
        command = [sys.executable, "-m", "pldr_train", "fit", str(recipe_file)]
        return command if recipe.trainer.threads is not None else [*command, f"trainer.threads={self.threads}"]

    def environment(self, slot: int) -> dict[str, str]:
        """Return a trial's variables."""
        variables = {name: value for name, value in os.environ.items() if name not in _NUMBERING}
        variables.setdefault("OMP_NUM_THREADS", str(self.threads))
        if self.gpus:
            mine = self.gpus[slot * self.devices : (slot + 1) * self.devices]
            variables["CUDA_VISIBLE_DEVICES"] = ",".join(mine)
        return {**variables, "PYTHONSAFEPATH": "1", **tied_to_this_process()}

    @property
    def text(self) -> str:
        """How many at a time, for people."""
        each = f"{self.devices} GPUs each" if self.gpus and self.devices > 1 else "a GPU each" if self.gpus else ""
        each = each or f"{self.threads} CPU threads each"
        return f"{self.number} trials at a time, {each}"


def visible_gpus() -> tuple[str, ...]:
    """Return the names of the GPUs that this process may use, as CUDA_VISIBLE_DEVICES has them; nothing is imported."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return tuple(word.strip() for word in named.split(",") if word.strip() not in ("", "-1"))
    with suppress(OSError):
        found = (_GPU.fullmatch(name) for name in os.listdir("/dev"))
        return tuple(str(number) for number in sorted(int(match[1]) for match in found if match))
    return ()


def choose_workers(recipe: Recipe, number: int | None, devices: int) -> Workers:
    """Return what fits this machine, or what was asked for.

    Args:
        recipe: of a trial.
        number: of trials at a time; None: as many as there are GPUs or cores for.
        devices: processes of each.

    Raises:
        UserError: there are not so many GPUs, or a trial wants several machines.
    """
    if recipe.trainer.num_nodes > 1:
        raise UserError(
            f"trainer.num_nodes={recipe.trainer.num_nodes}: a trial runs on one machine; set trainer.num_nodes: 1 "
            "under `set`, and start a runner on each machine"
        )
    gpus = () if recipe.trainer.accelerator == "cpu" else visible_gpus()
    if gpus:
        number = number or max(1, len(gpus) // devices)
        if number * devices > len(gpus):
            raise UserError(
                f"--workers {number} with {devices} devices each: there are {len(gpus)} GPUs; lower --workers or "
                "--devices-per-trial"
            )
        return Workers(number, devices, gpus)
    threads = recipe.trainer.threads or num_cores()
    return Workers(number or max(1, num_cores() // (threads * devices)), devices)
