"""Whether the processes of a run reach each other, and how fast: a real all-reduce among real processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pldr_train.doctor.finding import Finding, Level

_PROGRAM = Path(__file__).with_name("reducing.py")
_POLL_S = 0.02
_SLOW_NCCL_BYTES_PER_S = 5e9


@dataclass(frozen=True)
class Reduction:
    """What is to be measured."""

    backend: str
    """gloo or nccl; with nccl each process takes the GPU of its number."""
    processes: int
    needed: bool
    """Whether a run on this machine depends on it."""
    size_bytes: int
    rounds: int = 5
    limit_s: float = 90.0
    """From the start of the processes to the last one's end."""


@dataclass(frozen=True)
class Outcome:
    """What came of it: `seconds` of one all-reduce, or the problem in words."""

    seconds: float | None = None
    problem: str | None = None
    timed_out: bool = False
    wrong_sum: bool = False


def bus_bandwidth(processes: int, size_bytes: int, seconds: float) -> float:
    """Return the bytes a second that each process sends in an all-reduce: 2 (N - 1) / N * bytes / time.

    The formula of nccl-tests: it does not depend on N where the links are what limits.
    """
    return 2 * (processes - 1) / processes * size_bytes / seconds


# ---------------------------------------------------------------------------------------------------------- measurement


def measure(reduction: Reduction, environment: Mapping[str, str]) -> Outcome:
    """Start the processes, and wait for their end or the time limit; none is left behind."""
    # Here: a torch that cannot be imported spoils this check alone.
    import torch.distributed as dist  # noqa: PLC0415

    # The store lives here and takes a free port by itself, so no other program can take the port in between.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    values = [
        reduction.processes,
        reduction.backend,
        store.port,
        reduction.size_bytes,
        reduction.rounds,
        reduction.limit_s,
    ]
    started: list[subprocess.Popen[str]] = []
    with tempfile.TemporaryDirectory() as folder, ExitStack() as open_files:
        logs = [Path(folder) / str(rank) for rank in range(reduction.processes)]
        try:
            for rank, log in enumerate(logs):
                # -P: files beside the program must not hide modules of the same name.
                command = [sys.executable, "-P", str(_PROGRAM), str(rank), *map(str, values)]
                out = open_files.enter_context(log.with_suffix(".out").open("w"))
                err = open_files.enter_context(log.with_suffix(".err").open("w"))
                settings = {**environment, "OMP_NUM_THREADS": "1"}
                started.append(
                    subprocess.Popen(command, stdout=out, stderr=err, stdin=subprocess.DEVNULL, env=settings, text=True)
                )
            codes = _wait(started, reduction.limit_s)
        finally:
            for process in started:
                process.kill()
            for process in started:
                process.wait()
        reports = [_report(log) for log in logs]
        return _outcome(reduction, codes, reports)


def _wait(processes: Sequence[subprocess.Popen[str]], limit_s: float) -> list[int | None]:
    """Return the exit codes when all have ended, or one has failed, or time is up; None: still running."""
    deadline = time.monotonic() + limit_s
    while True:
        codes = [process.poll() for process in processes]
        if None not in codes or any(codes) or time.monotonic() > deadline:
            return codes
        time.sleep(_POLL_S)


def _report(log: Path) -> dict[str, Any]:
    """Return what a process printed; {"error": ...} where it died before it could."""
    lines = log.with_suffix(".out").read_text(errors="replace").splitlines()
    try:
        found: dict[str, Any] = json.loads(lines[-1])
    except (IndexError, ValueError):
        errors = log.with_suffix(".err").read_text(errors="replace").strip().splitlines()
        return {"died": errors[-1].strip()} if errors else {"died": ""}
    return found


def _outcome(reduction: Reduction, codes: Sequence[int | None], reports: Sequence[Mapping[str, Any]]) -> Outcome:
    """Judge by the codes of before the rest was ended: the process that failed first is the one to name."""
    for rank, (code, report) in enumerate(zip(codes, reports, strict=True)):
        if "error" in report:
            return Outcome(problem=f"process {rank}: {report['error']}")
        if code is not None and "died" in report:
            how = f"was killed by signal {-code}" if code < 0 else f"left with code {code}"
            return Outcome(problem=f"process {rank} {how}: {report['died']}".rstrip(": "))
    if None in codes:
        return Outcome(problem=f"no result within {reduction.limit_s:g} s", timed_out=True)
    if not all(report["right"] for report in reports):
        return Outcome(problem="the sum was wrong: data is damaged on the way", wrong_sum=True)
    return Outcome(seconds=max(float(report["seconds"]) for report in reports))


# ---------------------------------------------------------------------------------------------------------- the finding


def check_all_reduce(reduction: Reduction, environment: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    """Yield the bus bandwidth, or why there is none."""
    outcome = measure(reduction, environment)
    backend, processes = reduction.backend, reduction.processes
    figures: dict[str, Any] = {"backend": backend, "processes": processes, "size_bytes": reduction.size_bytes}
    if outcome.seconds is None:
        level: Level = "fail" if reduction.needed or outcome.wrong_sum else "warn"
        text = f"{backend}, {processes} processes: {outcome.problem}"
        yield Finding(level, "all-reduce", text, _advice(backend, outcome, environment), figures)
        return
    figures["seconds"] = outcome.seconds
    if processes == 1:
        yield Finding("ok", "all-reduce", f"{backend} starts; one process has nobody to send to", figures=figures)
        return
    speed = bus_bandwidth(processes, reduction.size_bytes, outcome.seconds)
    figures["bus_bytes_per_s"] = speed
    size = f"{reduction.size_bytes / 2**20:g} MiB in {outcome.seconds * 1e3:,.1f} ms"
    text = f"{backend}, {processes} processes: {speed / 1e9:,.2f} GB/s bus bandwidth ({size})"
    if backend == "nccl" and speed < _SLOW_NCCL_BYTES_PER_S:
        advice = "see `nvidia-smi topo -m` for the links between GPUs, and NCCL_DEBUG=INFO for those that NCCL takes"
        yield Finding("note", "all-reduce", text, advice, figures)
    else:
        yield Finding("ok", "all-reduce", text, figures=figures)


def _advice(backend: str, outcome: Outcome, environment: Mapping[str, str]) -> str:
    variable = f"{backend.upper()}_SOCKET_IFNAME"
    interface = environment.get(variable)
    if interface:
        network = f"{variable}={interface} is set: name an interface that `ip -br addr` lists, or unset it"
    else:
        network = f"set {variable} to an interface of `ip -br addr` (lo does on one machine)"
    if backend == "gloo":
        return f"{network}; the host name must resolve, too: getent hosts $(hostname)"
    direct = "NCCL_P2P_DISABLE=1, where GPUs do not reach each other directly (IOMMU, ACS)"
    if outcome.wrong_sum or outcome.timed_out:
        return f"try {direct}; {network}; NCCL_DEBUG=INFO says more"
    return f"{network}; try {direct}; NCCL_DEBUG=INFO says more"
