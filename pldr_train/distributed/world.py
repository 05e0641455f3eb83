"""The processes of a run: who this one is, and how all of them decide together.

Processes are numbered by what started them (pldr-train fit, torchrun, launch/slurm.sbatch) through torch's env://
variables. Decisions go over a gloo group of their own on the host, beside whatever reduces gradients: a flag that all
must agree on costs no synchronisation with the device.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from pldr_train.errors import LostProcessError, RecipeError, ReportedElsewhereError, UserError, first_line

T = TypeVar("T")
_SIGNS_OF_LOSS = (
    "Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting", "Application timeout",
    "NCCL communicator was aborted", "remote process exited", "ncclRemoteError", "Watchdog caught collective",
)  # fmt: skip
"""What gloo and NCCL say of a peer that is gone."""
_LATE_S = 10.0
"""So long after its time limit a connection that is made and gets no answer is given up; torch waits for ever."""
_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class World:
    """This process among those of the run. The default is a run of one process."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    group: Any = None
    """The group for decisions; None in a run of one process."""

    @classmethod
    def join(cls, environment: Mapping[str, str] = os.environ, timeout_s: float = 1800.0, cuda: bool = False) -> World:
        """Meet the other processes that `environment` speaks of; without WORLD_SIZE the run has this one only.

        Args:
            environment: torch's env:// variables: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT.
            timeout_s: how long to wait for another process, here and in every later collective.
            cuda: whether training happens on GPUs.

        Raises:
            RecipeError: the variables are incomplete or contradict each other.
            LostProcessError: the others did not come.
        """
        if "RANK" not in environment or "WORLD_SIZE" not in environment:
            return cls()
        rank, size, local_rank, local_size = _numbers(environment)
        if size == 1:
            return cls(0, 1, local_rank, local_size)
        limit = timedelta(seconds=timeout_s)
        if cuda and local_rank < torch.cuda.device_count():  # too few are reported when all have met
            torch.cuda.set_device(local_rank)
        try:
            if rank > 0 or environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
                _ask_for_an_answer(environment["MASTER_ADDR"], int(environment["MASTER_PORT"]), timeout_s)
            dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=limit)
            group = dist.new_group(backend="gloo", timeout=limit)
        except (RuntimeError, ValueError) as error:
            where = f"{environment['MASTER_ADDR']}:{environment['MASTER_PORT']}"
            raise LostProcessError(
                f"rank {rank} on {socket.gethostname()} did not meet the other {size - 1} processes at {where}: {error}"
            ) from error
        return cls(rank, size, local_rank, local_size, group)

    def leave(self) -> None:
        """Part from the others; without it a process would wait for them at its end."""
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()

    @property
    def is_main(self) -> bool:
        """Whether this is the process that speaks for all and writes the run's folder."""
        return self.rank == 0

    @property
    def num_nodes(self) -> int:
        """Machines, where each has equally many processes."""
        return self.size // self.local_size

    def gather(self, mine: T) -> list[T]:
        """Return one plain object of every process, in the order of ranks, on every process."""
        if self.group is None:
            return [mine]
        gathered: list[Any] = [None] * self.size
        self._call(lambda: dist.all_gather_object(gathered, mine, group=self.group))
        return gathered

    def gather_tensors(self, mine: Tensor) -> list[Tensor]:
        """Return one tensor of every process, in the order of ranks; on the host, and alike in shape and type."""
        if self.group is None:
            return [mine]
        gathered = [torch.empty_like(mine) for _ in range(self.size)]
        self._call(lambda: dist.all_gather(gathered, mine.contiguous(), group=self.group))
        return gathered

    def broadcast(self, mine: T | None) -> T:
        """Return rank 0's plain object on every process."""
        if self.group is None:
            assert mine is not None or self.size == 1
            return mine  # type: ignore[return-value]
        box = [mine]
        self._call(lambda: dist.broadcast_object_list(box, src=0, group=self.group))
        return box[0]  # type: ignore[return-value]

    def sum(self, numbers: Sequence[float]) -> list[float]:
        """Return the sums of some numbers over all processes."""
        return self._reduce(numbers, dist.ReduceOp.SUM)

    def max(self, numbers: Sequence[float]) -> list[float]:
        """Return the largest of each of some numbers over all processes."""
        return self._reduce(numbers, dist.ReduceOp.MAX)

    def any(self, flag: bool) -> bool:
        """Return whether any process says so."""
        return self.sum([float(flag)])[0] > 0

    def barrier(self) -> None:
        """Wait until all processes have come here."""
        self.sum([0.0])

    def on_all(self, action: Callable[[], T], here: bool = True) -> T | None:
        """Do something on the ranks where `here` is true; if it fails with a user error on one, it fails on all.

        Returns what `action` returned here, else None.

        Raises:
            UserError: `action` raised it here; ReportedElsewhereError where only others raised.
        """
        result, problem = None, None
        if here:
            try:
                result = action()
            except UserError as error:
                problem = error
        ranks = [rank for rank, failed in enumerate(self.gather(problem is not None)) if failed]
        if not ranks:
            return result
        # The lowest rank reports it: the others usually have the same to say.
        if problem is not None and self.rank == ranks[0]:
            raise problem
        raise ReportedElsewhereError(f"rank {ranks[0]} has an error")

    def on_main(self, action: Callable[[], T]) -> T:
        """Do something on rank 0 and give its plain result to all; errors as in `on_all`."""
        return self.broadcast(self.on_all(action, here=self.is_main))

    def raise_on_all(self, error: UserError) -> NoReturn:
        """End all ranks with an error that each of them has found; rank 0 reports it."""
        raise error if self.is_main else ReportedElsewhereError(str(error))

    @contextmanager
    def noticing_loss(self) -> Iterator[None]:
        """Where a collective fails inside an engine, say what that means.

        Raises:
            LostProcessError: it failed as it does when another process has ended or does not answer.
        """
        try:
            yield
        except RuntimeError as error:
            if self.size == 1 or not any(sign in str(error) for sign in _SIGNS_OF_LOSS):
                raise
            raise self._lost(error) from error

    def _reduce(self, numbers: Sequence[float], operation: Any) -> list[float]:
        if self.group is None:
            return list(numbers)
        tensor = torch.tensor(numbers, dtype=torch.float64)
        self._call(lambda: dist.all_reduce(tensor, operation, group=self.group))
        return tensor.tolist()

    def _call(self, collective: Callable[[], Any]) -> None:
        try:
            collective()
        except RuntimeError as error:
            raise self._lost(error) from error

    def _lost(self, error: Exception) -> LostProcessError:
        return LostProcessError(
            f"rank {self.rank}: another process of the run has ended or does not answer ({first_line(error)}); see its "
            "own message. The same command resumes from the newest checkpoint"
        )


def _ask_for_an_answer(address: str, port: int, timeout_s: float) -> None:
    """Connect to the store where the processes meet, and come back in time also if what listens there is silent.

    Raises:
        RuntimeError: torch's, if nothing listens there; or there is no answer.
    """
    failures: list[RuntimeError] = []

    def ask() -> None:
        try:
            TCPStore(address, port, is_master=False, timeout=timedelta(seconds=timeout_s), wait_for_workers=False)
        except RuntimeError as error:
            failures.append(error)

    asking = threading.Thread(target=ask, daemon=True, name="pldr_train asks for an answer")
    asking.start()
    asking.join(timeout_s + _LATE_S)
    if failures:
        raise failures[0]
    if asking.is_alive():
        raise RuntimeError(
            "something takes connections there and does not answer; if another program has the port, set MASTER_PORT "
            "to a free one"
        )


def _numbers(environment: Mapping[str, str]) -> tuple[int, int, int, int]:
    missing = [name for name in _VARIABLES if not environment.get(name)]
    if missing:
        raise RecipeError(
            f"RANK and WORLD_SIZE are set, but {', '.join(missing)} not; unset the two for a run of one command, or "
            "start the processes with torchrun, which sets all (see docs/launching.md)"
        )
    try:
        rank, size, local_rank = (int(environment[name]) for name in _VARIABLES[:3])
        local_size = int(environment.get("LOCAL_WORLD_SIZE") or size)
    except ValueError as error:
        raise RecipeError(
            f"RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE: whole numbers are needed ({error})"
        ) from None
    if not (0 <= rank < size and 0 <= local_rank < local_size and size % local_size == 0):
        raise RecipeError(
            f"RANK={rank}, WORLD_SIZE={size}, LOCAL_RANK={local_rank}, LOCAL_WORLD_SIZE={local_size} contradict each "
            "other; every machine needs equally many processes, numbered from 0"
        )
    return rank, size, local_rank, local_size
