"""launch/slurm.sbatch with a srun and a scontrol that stay here and note what they are asked."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.processes import PUT, ROOT, hostile_folder
from tests.unit.launched_processes import is_gone, wait_until

# Starts as many tasks as the job has and passes SIGTERM on to them. --kill-on-bad-exit as in SLURM's sources: SIGTERM
# to the others (with proctrack/cgroup to a task's first process), KillWait seconds later SIGKILL to all there is of
# them. A signal that ended a task counts more than an exit code, of either the highest.
SRUN = """
import json, os, signal, subprocess, sys, time
from pathlib import Path

folder = Path(os.environ["FOLDER"])
options = sys.argv[1 : sys.argv.index("bash")]
put(folder / "srun.json", json.dumps(options))
num, nodes = int(os.environ["SLURM_NTASKS"]), int(os.environ["SLURM_NNODES"])
tasks = []
for index in range(num):
    node, local = divmod(index, num // nodes)
    numbers = {"SLURM_PROCID": index, "SLURM_LOCALID": local, "SLURM_NODEID": node}
    env = {**os.environ, **{name: str(value) for name, value in numbers.items()}}
    tasks.append(subprocess.Popen(sys.argv[1 + len(options) :], env=env, start_new_session=True))
put(folder / "tasks", " ".join(str(task.pid) for task in tasks))
signal.signal(signal.SIGTERM, lambda *_: [task.send_signal(signal.SIGTERM) for task in tasks])
told_at = None
while running := [task for task in tasks if task.poll() is None]:
    if told_at is None and "--kill-on-bad-exit=1" in options and any(task.poll() for task in tasks):
        told_at = time.monotonic()
        (folder / "told").touch()
        for task in running:
            task.send_signal(signal.SIGTERM)
    elif told_at is not None and time.monotonic() > told_at + float(os.environ.get("KILL_WAIT", "30")):
        for task in running:
            os.killpg(task.pid, signal.SIGKILL)
    time.sleep(0.01)
signals, codes = [-task.returncode for task in tasks if task.returncode < 0], [task.returncode for task in tasks]
sys.exit(128 + max(signals) if signals else max(codes))
"""

SCONTROL = """#!/usr/bin/env bash
echo "$*" >>"$FOLDER/scontrol-calls"
case "$1" in
    show) printf 'localhost\\nnode1\\nnode2\\n' ;;
    requeue) exit "${REQUEUE_CODE:-0}" ;;
esac
"""

# Notes how long a task wants to wait, and lets it for as long as there is `hold`.
SLEEP = """#!/usr/bin/env bash
echo "$1" >"$FOLDER/.waits-$RANK" && mv "$FOLDER/.waits-$RANK" "$FOLDER/waits-$RANK"
while [[ -e "$FOLDER/hold" ]]; do command -p sleep 0.02; done
"""

# Stands for pldr_train: notes its environment and does what DO says.
RUN = """
import json, os, signal, sys, time
from pathlib import Path

folder, rank, got = Path(os.environ["FOLDER"]), os.environ["RANK"], []
signal.signal(signal.SIGTERM, lambda *_: got.append(1))
put(folder / f"seen-{rank}.json", json.dumps({"arguments": sys.argv[1:], "pid": os.getpid(), **os.environ}))

def wait_for_others():
    while any(not (folder / f"seen-{other}.json").exists() for other in range(int(os.environ["WORLD_SIZE"]))):
        time.sleep(0.01)

def save_and_leave(wait_for=None):
    while not got or (wait_for and not (folder / wait_for).exists()):
        time.sleep(0.01)
    time.sleep(0.3 + int(rank) / 10)  # long enough for one too many to arrive; not all at the same time
    put(folder / f"saved-{rank}", str(len(got)))
    sys.exit(143)

exec(os.environ.get("DO", ""))
"""

ALL_REDUCE = """
import os
import torch
import torch.distributed as dist

dist.init_process_group("gloo")
total = torch.tensor([2.0 ** dist.get_rank()])
dist.all_reduce(total)
with open(os.path.join(os.environ["FOLDER"], f"sum-{dist.get_rank()}"), "w") as file:
    file.write(str(total.item()))
dist.destroy_process_group()
"""


class Job:
    """A job of two tasks, as sbatch would start it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        programs, modules = folder / "bin", folder / "modules"
        programs.mkdir()
        modules.mkdir()
        self.working_directory = hostile_folder(folder / "hostile")
        for name, text in (("srun", f"#!{sys.executable}\n{PUT}{SRUN}"), ("scontrol", SCONTROL), ("sleep", SLEEP)):
            (programs / name).write_text(text)
            (programs / name).chmod(0o755)
        (modules / "stand_in.py").write_text(PUT + RUN)
        (modules / "all_reduce.py").write_text(ALL_REDUCE)
        # As SLURM does: the script runs as a copy elsewhere.
        self.script = folder / "slurm_script"
        self.script.write_bytes((ROOT / "launch/slurm.sbatch").read_bytes())
        kept = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
        self.environment = {
            **kept, "PATH": f"{programs}:{os.environ['PATH']}", "FOLDER": str(folder), "PYTHONPATH": str(modules),
            "PLDR_TRAIN_MODULE": "stand_in", "SLURM_JOB_ID": "1234567", "SLURM_JOB_NODELIST": "node[0-2]",
            "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_NTASKS": "2", "SLURM_NNODES": "2",
        }  # fmt: skip

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", str(self.script), *(arguments or ("fit", "x.yaml"))],
            env={**self.environment, **environment},
            cwd=self.working_directory,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def finish(self, *arguments: str, **environment: str) -> tuple[int, str]:
        process = self.start(*arguments, **environment)
        output, _ = process.communicate(timeout=200)
        return process.returncode, output

    def wait_for_tasks(self, *, file: str = "seen-{rank}.json") -> None:
        deadline = time.monotonic() + 120
        names = [file.format(rank=rank) for rank in range(int(self.environment["SLURM_NTASKS"]))]
        while not all((self.folder / name).exists() for name in names):
            assert time.monotonic() < deadline
            time.sleep(0.01)

    @property
    def requeued(self) -> bool:
        return "requeue 1234567" in (self.folder / "scontrol-calls").read_text().splitlines()

    def saved(self) -> list[str]:
        return [path.read_text() for path in sorted(self.folder.glob("saved-*"))]


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


def test_each_task_finds_its_number_and_the_first_machine(job: Job) -> None:
    job.environment |= {"SLURM_NTASKS": "4", "SLURM_CPUS_PER_TASK": "6", "SRUN_OPTIONS": "--cpu-bind=cores --label"}
    odd = ("fit", "a b.yaml", "data.train_documents=[0, 9]", "run.name=it's $HOME")
    assert job.finish(*odd) == (0, "")
    assert json.loads((job.folder / "srun.json").read_text()) == [
        "--kill-on-bad-exit=1",
        "--cpu-bind=cores",
        "--label",
    ]
    for rank in range(4):
        seen = json.loads((job.folder / f"seen-{rank}.json").read_text())
        assert (seen["RANK"], seen["LOCAL_RANK"], seen["NODE_RANK"]) == (str(rank), str(rank % 2), str(rank // 2))
        assert (seen["WORLD_SIZE"], seen["LOCAL_WORLD_SIZE"]) == ("4", "2")
        assert (seen["MASTER_ADDR"], seen["MASTER_PORT"]) == ("localhost", str(10000 + 1234567 % 20000))
        assert (seen["OMP_NUM_THREADS"], seen["SRUN_CPUS_PER_TASK"]) == ("6", "6")
        assert seen["arguments"] == list(odd)
    assert (job.folder / "scontrol-calls").read_text() == "show hostnames node[0-2]\n"


@pytest.mark.slow
def test_the_tasks_meet(job: Job) -> None:
    port = 20000 + os.getpid() % 10000
    code, output = job.finish(PLDR_TRAIN_MODULE="all_reduce", MASTER_PORT=str(port))
    assert code == 0, output
    assert [(job.folder / f"sum-{rank}").read_text() for rank in range(2)] == ["3.0", "3.0"]


def test_before_the_time_limit_all_tasks_save_and_the_job_is_requeued(job: Job) -> None:
    process = job.start(DO="save_and_leave()")
    job.wait_for_tasks()
    process.send_signal(signal.SIGTERM)  # --signal=B:TERM: to the batch script alone
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 143, output
    assert job.saved() == ["1", "1"]
    assert job.requeued


def test_at_preemption_all_tasks_save_and_the_job_is_requeued(job: Job) -> None:
    process = job.start(DO="save_and_leave()")
    job.wait_for_tasks()
    for pid in (job.folder / "tasks").read_text().split():
        os.kill(int(pid), signal.SIGTERM)  # to the tasks alone
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 143, output
    assert job.saved() == ["1", "1"]
    assert job.requeued


def test_a_signal_to_everyone_counts_once(job: Job) -> None:
    process = job.start(DO="save_and_leave('sent')")
    job.wait_for_tasks()
    process.send_signal(signal.SIGTERM)
    time.sleep(0.1)
    for pid in (job.folder / "tasks").read_text().split():
        os.kill(int(pid), signal.SIGTERM)
    (job.folder / "sent").touch()
    process.communicate(timeout=120)
    assert job.saved() == ["1", "1"]
    assert job.requeued


ENDINGS = [("sys.exit(2)", 2), ("sys.exit(1)", 1), ("sys.exit(130)", 130), ("os.kill(os.getpid(), 9)", 137)]


@pytest.mark.parametrize(("ending", "expected"), [("sys.exit(0)", 0), *ENDINGS, ("sys.exit(71)", 71)])
def test_what_did_not_stop_on_sigterm_is_not_requeued(ending: str, expected: int, job: Job) -> None:
    # Not before all run, as where they meet: srun's SIGTERM may end a task that has only begun to start.
    code, output = job.finish(DO=f"wait_for_others(); {ending}")
    assert code == expected, output
    assert not job.requeued
    assert (f"ended with exit code {expected}\n" in output) is (expected != 0)


@pytest.mark.parametrize(("ending", "expected"), ENDINGS)
def test_a_failure_counts_though_the_others_then_leave_on_sigterm(ending: str, expected: int, job: Job) -> None:
    code, output = job.finish(DO=f"wait_for_others(); save_and_leave() if rank == '0' else {ending}")
    assert code == expected, output
    assert output.endswith(f"rank 1 ended with exit code {expected}\n")
    assert job.saved() == ["1"]
    assert not job.requeued


@pytest.mark.parametrize(("code", "waits"), [("2", True), ("130", True), ("143", True), ("0", False)])
def test_a_task_that_leaves_in_order_stays_while_others_leave(code: str, waits: bool, job: Job) -> None:
    (job.folder / "hold").touch()
    process = job.start(DO=f"wait_for_others(); sys.exit({code})")
    if waits:
        job.wait_for_tasks(file="waits-{rank}")
        assert (job.folder / "waits-0").read_text() == "10\n"
        assert not (job.folder / "told").exists()
        (job.folder / "hold").unlink()
    process.communicate(timeout=120)
    assert process.returncode == int(code)


def test_after_a_crash_srun_ends_the_others(job: Job) -> None:
    do = "wait_for_others(); os.kill(os.getpid(), 9) if rank == '1' else time.sleep(600)"
    (job.folder / "hold").touch()  # would keep the task
    code, _ = job.finish(DO=do, KILL_WAIT="0.2")
    assert code == 137
    assert not job.requeued
    waiting = int(json.loads((job.folder / "seen-0.json").read_text())["pid"])
    wait_until(lambda: is_gone(waiting), "rank 0 lives on")


@pytest.mark.parametrize("option", [("--resume", "never"), ("--resume=never",)])
def test_a_run_that_would_begin_afresh_each_time_is_not_requeued(option: tuple[str, ...], job: Job) -> None:
    process = job.start("fit", "x.yaml", *option, DO="save_and_leave()")
    job.wait_for_tasks()
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 143
    assert not job.requeued
    assert "not requeued, for --resume" in output


def test_a_requeue_that_slurm_refuses_is_said(job: Job) -> None:
    process = job.start(DO="save_and_leave()", REQUEUE_CODE="1")
    job.wait_for_tasks()
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 143
    assert "job 1234567 is not requeued; submit it again" in output


def test_outside_of_a_job_it_says_how_to_submit_it(job: Job) -> None:
    del job.environment["SLURM_JOB_ID"]
    code, output = job.finish()
    assert code == 2
    assert output == "error: not inside a SLURM job; submit it: sbatch launch/slurm.sbatch fit x.yaml\n"


def test_sbatch_is_reported_to_requeue_and_to_signal_ahead() -> None:
    lines = (ROOT / "launch/slurm.sbatch").read_text().splitlines()
    directives = [line for line in lines if line.startswith("#SBATCH")]
    assert lines[1 : 1 + len(directives)] == directives  # sbatch reads no further than the first command
    for each in ("--requeue", "--signal=B:TERM@180", "--open-mode=append"):
        assert f"#SBATCH {each}" in directives
