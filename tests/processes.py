"""Real processes of the program without the seconds of a fresh start.

They are forked from a server that has imported everything but computed nothing, so they are processes of their own
with the state of a new one: they can be killed, and have their own output and exit code.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from typing import Any, NoReturn

import psutil

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["tests.preloaded"])

ROOT = Path(__file__).parents[1]

PUT = """
import os as _os

def put(path, text=""):
    # Whoever sees the file sees all of it.
    aside = f"{path}.{_os.getpid()}.aside"
    with open(aside, "w") as file:
        file.write(text)
    _os.replace(aside, path)
"""
"""For scripts that tests start: write a file that a test waits for."""

_SET_NAME, _SET_CHILD_SUBREAPER = 15, 36
_STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def adopt_orphans() -> None:
    """Become the parent of descendants whose own parent ends, so that `end_descendants` finds them (Linux)."""
    ctypes.CDLL(None, use_errno=True).prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def end_descendants() -> list[str]:
    """Kill every process that this one started and that still runs; returns their command lines.

    The server of processes, multiprocessing's tracker of resources and W&B's service are left, which last.
    """
    lasting = {forkserver._forkserver._forkserver_pid, resource_tracker._resource_tracker._pid}
    ended = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            command = " ".join(process.cmdline())[:200]
            lasts = process.pid in lasting or "wandb-core" in command or "gpu_stats" in command
            if not lasts and process.status() != psutil.STATUS_ZOMBIE:
                ended.append(command)
                process.kill()
    return ended


HOSTILE = 'raise SystemExit("a file of the working directory was run")\n'


def hostile_folder(path: Path) -> Path:
    """Make a working directory with files named like modules, and a plain folder named like the package."""
    (path / "pldr_train").mkdir(parents=True)
    for name in ("lightning", "torch", "types", "yaml", "wandb"):
        (path / f"{name}.py").write_text(HOSTILE)
    return path


def run_cli(
    *arguments: str | Path,
    cwd: Path = ROOT,
    file_size_limit: int | None = None,
    before: Callable[[], None] | None = None,
    variables: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run `pldr-train ARGUMENTS` to its end.

    `file_size_limit`: bytes that a file may grow to, so that writing a larger one fails as on a full disk.
    `before`: a function of a module, called in the new process before the command.
    `variables`: added to the environment.
    """
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        environment = None if variables is None else {**os.environ, **variables}
        child = start_cli(
            *arguments,
            cwd=cwd,
            out=out,
            err=err,
            environment=environment,
            before=before,
            file_size_limit=file_size_limit,
        )
        child.join(300)
        given = [str(argument) for argument in arguments]
        assert child.exitcode is not None, "the command did not end within five minutes"
        return subprocess.CompletedProcess(given, child.exitcode, out.read_text(), err.read_text())


def start_cli(
    *arguments: str | Path,
    cwd: Path,
    out: Path,
    err: Path,
    environment: Mapping[str, str] | None = None,
    before: Callable[[], None] | None = None,
    file_size_limit: int | None = None,
) -> Any:
    """Start `pldr-train ARGUMENTS` in a session of its own; what it prints goes to two files.

    The ranks that it launches are forked from it, see `ForkedRank`. `environment` replaces the server's.
    """
    given = [str(argument) for argument in arguments]
    variables = None if environment is None else dict(environment)
    child = SERVER.Process(
        target=_child, args=(given, str(cwd), str(out), str(err), variables, file_size_limit, before)
    )
    child.start()
    return child


def run_ranks(target: Callable[..., None], *arguments: str, size: int = 2) -> None:
    """Run `target(rank, *arguments)` in a process for each rank, to the end of all."""
    children = [SERVER.Process(target=target, args=(rank, *arguments)) for rank in range(size)]
    for child in children:
        child.start()
    for child in children:
        child.join(120)
        assert child.exitcode == 0


def as_a_fresh_process() -> None:
    """Undo what only a process forked from a server has: its own children would come from a server, too."""
    multiprocessing.set_start_method("fork", force=True)


class ForkedRank:
    """A rank that the launcher forks instead of starting an interpreter, with the methods of `Popen` that it uses.

    Like one that is started it has a process group of its own, an empty standard input, the signals' usual effects
    and the given environment. The kernel knows it by the name `rank N`.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self.returncode: int | None = None
        sys.stdout.flush()
        sys.stderr.flush()
        # What arrives before the process has put the launcher's handlers away waits until then.
        signal.pthread_sigmask(signal.SIG_BLOCK, _STOPPING)
        self.pid = os.fork()
        if self.pid == 0:
            _be_a_rank(command, environment)
        with contextlib.suppress(PermissionError, ProcessLookupError):
            os.setpgid(self.pid, self.pid)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPPING)

    def poll(self) -> int | None:
        return self._collect(os.WNOHANG)

    def wait(self) -> int | None:
        return self._collect(0)

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def _collect(self, options: int) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, options)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode


def rank_process(launcher: int, rank: int) -> psutil.Process | None:
    """The process of a rank that this launcher has forked."""
    return next((each for each in psutil.Process(launcher).children() if each.name() == f"rank {rank}"), None)


def _be_a_rank(command: Sequence[str], environment: Mapping[str, str]) -> NoReturn:
    os.setpgid(0, 0)
    ctypes.CDLL(None).prctl(_SET_NAME, f"rank {environment['RANK']}".encode())
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.clear()
    os.environ.update(environment)
    for number in _STOPPING:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPPING)
    python, *options = command
    assert (python, options[:2]) == (sys.executable, ["-m", "pldr_train"])
    _leave_with_main(options[2:])


def _child(
    given: Sequence[str],
    cwd: str,
    out: str,
    err: str,
    environment: Mapping[str, str] | None,
    file_size_limit: int | None,
    before: Callable[[], None] | None,
) -> Any:
    os.setsid()
    as_a_fresh_process()
    os.chdir(cwd)
    if environment is not None:
        os.environ.clear()
        os.environ.update(environment)
    os.environ.pop("WANDB_API_KEY", None)
    for descriptor, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    if file_size_limit is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size_limit, file_size_limit))
    from pldr_train import launching

    launching._start_process = ForkedRank  # type: ignore[assignment]
    if before is not None:
        before()
    _leave_with_main(given)


def _leave_with_main(given: Sequence[str]) -> NoReturn:
    """Run `pldr-train GIVEN`, and end the process with its exit code."""
    from pldr_train.cli import main

    try:
        code = main(list(given))
    except SystemExit as leave:
        code = leave.code if isinstance(leave.code, int) else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
