"""Several real processes of one run, on this machine, each with a log of its own."""

from __future__ import annotations

import atexit
import errno
import json
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pldr_train.errors import UserError
from pldr_train.recipe import recipe_from_dict
from tests.processes import SERVER, as_a_fresh_process


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


_fleets: list[Fleet] = []


@atexit.register
def _kill_what_is_left() -> None:
    """Before multiprocessing waits for its children: a failed test may leave stopped ones."""
    for fleet in _fleets:
        for child in fleet.children:
            if child.is_alive():
                child.kill()


class Fleet:
    """Processes that call `fit` with the same recipe.

    Args:
        values: the recipe.
        size: how many.
        logs: folder for what they print.
        before: called with the rank and `arguments` in each process first; importable.
        resume: where to resume from.
    """

    def __init__(
        self,
        values: dict[str, Any],
        size: int,
        logs: Path,
        before: Callable[..., Any] | None = None,
        arguments: tuple[Any, ...] = (),
        resume: str = "auto",
    ) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        self.logs, self.size, port = logs, size, free_port()
        self.children = [
            SERVER.Process(target=_run, args=(rank, size, port, values, str(logs), before, arguments, resume))
            for rank in range(size)
        ]
        for child in self.children:
            child.start()
        _fleets.append(self)

    def join(self, timeout_s: float = 240) -> list[int | None]:
        """Exit codes of all; what still runs after the time is killed."""
        end = time.monotonic() + timeout_s
        for child in self.children:
            child.join(max(0.0, end - time.monotonic()))
        for child in self.children:
            if child.exitcode is None:
                child.kill()
                child.join()
        return [child.exitcode for child in self.children]

    def wait_for(self, condition: Callable[[], bool], timeout_s: float = 120) -> None:
        """Wait until something is the case, while all processes live."""
        end = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < end, f"it did not come to that\n{self.text()}"
            assert all(child.is_alive() for child in self.children), f"a process ended before that\n{self.text()}"
            time.sleep(0.005)

    def kill(self) -> None:
        """Kill all at once."""
        for child in self.children:
            child.kill()
        for child in self.children:
            child.join()

    def text(self, rank: int | None = None) -> str:
        """What the processes, or one of them, have printed."""
        ranks = range(self.size) if rank is None else [rank]
        return "\n".join(f"--- rank {each}\n{(self.logs / f'{each}.log').read_text()[-6000:]}" for each in ranks)


def run_pair(target: Callable[..., Any], folder: Path, *arguments: Any) -> list[Any]:
    """Run target(rank, *arguments) in two processes that DeepSpeed sees as one world; what each returns, by rank."""
    port = free_port()
    given = [(target, rank, port, str(folder), arguments) for rank in range(2)]
    children = [SERVER.Process(target=_one_of_a_pair, args=each) for each in given]
    for child in children:
        child.start()
    for child in children:
        child.join(300)
    logs = "\n".join(file.read_text()[-3000:] for file in folder.glob("*.log"))
    assert [child.exitcode for child in children] == [0, 0], logs
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def _one_of_a_pair(target: Callable[..., Any], rank: int, port: int, folder: str, arguments: tuple[Any, ...]) -> None:
    as_a_fresh_process()
    log = os.open(f"{folder}/{rank}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(
        DS_ACCELERATOR="cpu", RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )  # fmt: skip
    torch.set_num_threads(1)
    Path(folder, f"{rank}.json").write_text(json.dumps(target(rank, *arguments)))


def train(
    values: dict[str, Any], size: int, logs: Path, resume: str = "auto", before: Callable[..., Any] | None = None
) -> None:
    """Train to the end; `before` is called in each process first."""
    fleet = Fleet(values, size, logs, before=before, resume=resume)
    codes = fleet.join()
    assert codes == [0] * size, f"{codes}\n{fleet.text()}"


def _run(
    rank: int,
    size: int,
    port: int,
    values: dict[str, Any],
    logs: str,
    before: Callable[..., Any] | None,
    arguments: tuple[Any, ...],
    resume: str,
) -> None:
    as_a_fresh_process()
    log = os.open(f"{logs}/{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(1)
    if size > 1:
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size),
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        )  # fmt: skip
    from pldr_train.fit import fit

    code = 1
    try:
        if before is not None:
            before(rank, *arguments)
        outcome = fit(recipe_from_dict(values), resume)
        code = {None: 0, "SIGTERM": 143, "SIGINT": 130, "SIGHUP": 129}[outcome.stopped_by]
    except UserError as error:
        print(f"{type(error).__name__}: {error}")
        code = 2
    except OSError as error:
        traceback.print_exc()
        code = 2 if error.errno in (errno.EFBIG, errno.ENOSPC) else 1  # as the command line does
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
