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
from collections.abc import Callable, Sequence
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from typing import Any

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

_SET_CHILD_SUBREAPER = 36


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
) -> subprocess.CompletedProcess[str]:
    """Run `pldr-train ARGUMENTS` to its end.

    `file_size_limit`: bytes that a file may grow to, so that writing a larger one fails as on a full disk.
    `before`: a function of a module, called in the new process before the command.
    """
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        given = [str(argument) for argument in arguments]
        child = SERVER.Process(target=_child, args=(given, str(cwd), str(out), str(err), file_size_limit, before))
        child.start()
        child.join(300)
        assert child.exitcode is not None, "the command did not end within five minutes"
        return subprocess.CompletedProcess(given, child.exitcode, out.read_text(), err.read_text())


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


def _child(
    given: Sequence[str], cwd: str, out: str, err: str, file_size_limit: int | None, before: Callable[[], None] | None
) -> Any:
    as_a_fresh_process()
    os.chdir(cwd)
    os.environ.pop("WANDB_API_KEY", None)
    for descriptor, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    if file_size_limit is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size_limit, file_size_limit))
    from pldr_train.cli import main

    if before is not None:
        before()
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
