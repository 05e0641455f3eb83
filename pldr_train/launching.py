"""The processes of a run on this machine: starting them, watching them, ending them together.

`pldr-train fit` with trainer.devices > 1 starts itself that many times and stays beside as the launcher. It knows
nothing of training (no torch here): it passes signals on, ends the others when one dies, and starts all again where the
recipe allows it. On several machines torchrun or SLURM do this instead, see docs/launching.md.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from pldr_train.runs.layout import named_step

_log = logging.getLogger(__name__)

LAUNCHED = "PLDR_TRAIN_LAUNCHED"
_LAUNCHER_PID = "PLDR_TRAIN_LAUNCHER_PID"
_ADDRESS = "127.0.0.1"

EXIT_USER_ERROR = 2
_STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_EXIT_STOPPED = tuple(128 + number for number in _STOPPING)

_POLL_S = 0.05
# After a crash the others wait for the dead one: time to report what they see, not to save, which takes all of them.
_AFTER_CRASH_S = 2.0
# A second signal asks to leave at once, which a process that waits inside a collective does not notice.
_AFTER_SECOND_SIGNAL_S = 10.0


def is_launched() -> bool:
    """Return whether a launcher (ours, torchrun, launch/slurm.sbatch) has numbered this process among several."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def tied_to_this_process() -> dict[str, str]:
    """Return the variables of a process that is to end with this one, see `end_with_parent`."""
    return {LAUNCHED: "1", _LAUNCHER_PID: str(os.getpid())}


def end_with_parent() -> None:
    """Have this process killed when its launcher ends, however that ends; for those that `tied_to_this_process` names.

    Any other process is left alone. On Linux only: elsewhere a launcher killed with SIGKILL leaves its processes
    behind.
    """
    if sys.platform != "linux" or LAUNCHED not in os.environ:
        return
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, int(signal.SIGKILL), 0, 0, 0)
    # A launcher that died before the line above sends nothing any more.
    launcher = os.environ.get(_LAUNCHER_PID)
    if launcher is not None and os.getppid() != int(launcher):
        os.kill(os.getpid(), signal.SIGKILL)


def newest_step(checkpoints: Path) -> int:
    """Return the highest step that has a checkpoint folder, whole or not; 0 without any."""
    try:
        names = os.listdir(checkpoints)
    except OSError:
        return 0
    return max((step for step in map(named_step, names) if step is not None), default=0)


def launch(
    command: Sequence[str],
    num_processes: int,
    max_restarts: int = 0,
    grace_s: float = 60.0,
    progress: Callable[[], int] | None = None,
) -> int:
    """Run a command as `num_processes` processes of one distributed run, to the end of all of them.

    Args:
        command: what each process runs; it finds its number in RANK and LOCAL_RANK.
        num_processes: how many.
        max_restarts: how often in a row all are started again after one crashed or was killed. Never after exit code
            0, 2, 129, 130 or 143 (2 is a user error, the others were asked for), nor once a signal was passed on.
        grace_s: how long the others may go on after one has left with exit code 2 or was ended by a signal that was
            passed on. After 129, 130 and 143 they may finish saving: they have a deadline of their own.
        progress: the newest step that a restart would go on from; when it has grown, restarts are counted anew.

    Returns:
        0 if all ended so; 2 if one left with that; else what the first that failed left with (128 + the signal's
        number if a signal ended it), crashes before those that were asked to leave.

    Raises:
        OSError: a process cannot be started; those that were are ended.
    """
    restarts = 0
    with Signals() as signals:
        while True:
            step = progress() if progress else 0
            processes = _Processes(command, num_processes, signals, grace_s)
            code = processes.run()
            if not processes.crashed or code == EXIT_USER_ERROR or signals.any_arrived:
                return code
            if progress and progress() > step:
                restarts = 0
            if restarts >= max_restarts:
                if max_restarts:
                    _log.warning(f"not started again: {restarts} in a row brought no new checkpoint")
                return code
            restarts += 1
            _log.warning(f"starting all {num_processes} processes again (restart {restarts} of {max_restarts})")


class Signals:
    """Collects SIGTERM, Ctrl-C and SIGHUP for the processes; Python allows it in the main thread only.

    A second SIGHUP is none: a terminal that closes sends it twice. Where it is ignored (nohup), it stays so.
    """

    def __init__(self) -> None:
        self.passed_on: list[int] = []
        self._arrived: list[int] = []
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in _STOPPING:
                if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @property
    def any_arrived(self) -> bool:
        """Whether the run was asked to stop."""
        return bool(self.passed_on or self._arrived)

    def take(self) -> int | None:
        """Return the signal that came since the last call; several at almost the same time count once."""
        arrived, self._arrived = self._arrived, []
        self.passed_on += arrived[:1]
        return arrived[0] if arrived else None

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            signal.signal(number, signal.SIG_IGN)
        self._arrived.append(number)


class _Processes:
    """One start of all processes."""

    def __init__(
        self,
        command: Sequence[str],
        num_processes: int,
        signals: Signals,
        grace_s: float,
    ) -> None:
        self._command, self._num_processes = command, num_processes
        self._signals, self._grace_s = signals, grace_s
        self._running: dict[int, subprocess.Popen[bytes]] = {}
        self._failures: list[int] = []
        """Exit codes other than 0 in the order they came; negative: ended by that signal. Without those we killed."""
        self._kill_at = float("inf")
        self._kill_reason = ""
        self._killed = False

    @property
    def crashed(self) -> bool:
        """Whether one failed by itself: neither a user error nor asked to leave."""
        return any(self._is_crash(code) for code in self._failures)

    def run(self) -> int:
        """Start all and wait for all; returns the exit code, see `launch`."""
        with _hold_free_port() as held:
            try:
                self._start(held.getsockname()[1])
                while self._running:
                    self._pass_signals_on()
                    self._collect()
                    if self._running and time.monotonic() >= self._kill_at:
                        self._kill(self._kill_reason)
                    time.sleep(_POLL_S)
            finally:
                self._kill("the launcher failed")
        return self._exit_code()

    def _start(self, port: int) -> None:
        for rank in range(self._num_processes):
            environment = _environment(rank, self._num_processes, port, os.environ)
            self._running[rank] = _start_process(self._command, environment)

    def _pass_signals_on(self) -> None:
        number = self._signals.take()
        if number is None:
            return
        for process in self._running.values():
            process.send_signal(number)
        if len(self._signals.passed_on) > 1:
            self._kill_others_in(_AFTER_SECOND_SIGNAL_S, "a second signal")

    def _collect(self) -> None:
        ended = [(process.returncode, rank) for rank, process in self._running.items() if process.poll() is not None]
        # A process that a signal ended comes first: the others often fail on its silence a moment later.
        for code, rank in sorted(ended):
            del self._running[rank]
            if code != 0:
                self._failures.append(code)
                self._judge(rank, code)

    def _judge(self, rank: int, code: int) -> None:
        if self._is_crash(code):
            _log.warning(f"rank {rank} {_describe(code)}")
            self._kill_others_in(_AFTER_CRASH_S, f"rank {rank} had ended")
        elif code not in _EXIT_STOPPED:
            self._kill_others_in(self._grace_s, f"rank {rank} had ended")

    def _is_crash(self, code: int) -> bool:
        return code not in (EXIT_USER_ERROR, *_EXIT_STOPPED) and -code not in self._signals.passed_on

    def _kill_others_in(self, pause_s: float, reason: str) -> None:
        due = time.monotonic() + pause_s
        if due < self._kill_at:
            self._kill_at, self._kill_reason = due, f"still running {pause_s:g} s after {reason}"

    def _kill(self, reason: str) -> None:
        if not self._running:
            return
        ranks = ", ".join(map(str, self._running))
        for process in self._running.values():
            # The group: its loader workers go as well. It is there for as long as its leader has not been waited for.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        for process in self._running.values():
            process.wait()
        self._running.clear()
        self._killed = True
        _log.warning(f"killed rank {ranks}: {reason}")

    def _exit_code(self) -> int:
        if EXIT_USER_ERROR in self._failures:
            return EXIT_USER_ERROR
        first = next((code for code in self._failures if self._is_crash(code)), (self._failures or [0])[0])
        if first == 0 and self._killed and self._signals.passed_on:
            return 128 + self._signals.passed_on[-1]  # those that did not leave by themselves; the run is not done
        return first if first >= 0 else 128 - first


def _start_process(command: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start a rank in a process group of its own.

    Ctrl-C in a terminal reaches the whole group of the launcher, and would count twice with the one passed on. A
    process of another group may write to the terminal, but not read from it.
    """
    return subprocess.Popen(list(command), env=environment, stdin=subprocess.DEVNULL, process_group=0)


def _describe(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"  # real-time signals have no names


def _environment(rank: int, num_processes: int, port: int, inherited: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of torch's env:// convention, for a process among those of one machine."""
    threads = max(1, num_cores() // num_processes)
    return {
        "OMP_NUM_THREADS": str(threads),
        **inherited,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_processes),
        "LOCAL_WORLD_SIZE": str(num_processes),
        "NODE_RANK": "0",
        "MASTER_ADDR": _ADDRESS,
        "MASTER_PORT": str(port),
        "PYTHONSAFEPATH": "1",  # run nothing out of the working directory, such as a torch.py that lies there
        **tied_to_this_process(),
    }


def num_cores() -> int:
    """Return how many cores this process may use."""
    if sys.platform != "linux":
        return os.cpu_count() or 1
    return len(os.sched_getaffinity(0))  # what a container or a scheduler leaves of the machine


def _hold_free_port() -> socket.socket:
    """Return a socket that keeps a free port from others while rank 0 can listen on it.

    It is bound but does not listen, and says SO_REUSEADDR: the system gives the port to no one that asks for any free
    one, and lets a listener that says SO_REUSEADDR too (torch's store does) have it by its number.
    """
    held = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind((_ADDRESS, 0))
    return held
