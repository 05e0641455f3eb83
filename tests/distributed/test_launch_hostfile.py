"""launch/hostfile with an ssh that stays here and a torchrun that only notes what it is told."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.processes import ROOT

SSH = """#!/usr/bin/env bash
# Runs what it is given here, with a bare environment; the host is known by its name only.
printf '%s\\n' "$*" >>"$FOLDER/ssh-calls"
[[ "$1" != unreachable ]] || { echo "no route to host" >&2; exit 255; }
exec env -i PATH="$PATH" FOLDER="$FOLDER" HOST="$1" "${@:2}"
"""

# What each host does is in the file do-HOST: commands of bash; by default it ends at once.
TORCHRUN = """#!/usr/bin/env bash
printf '%s\\n' "$@" >"$FOLDER/arguments-$HOST"
env >"$FOLDER/environment-$HOST"
pwd >"$FOLDER/folder-$HOST"
leave_on() { trap "echo $1 >>'$FOLDER/signals-$HOST'; sleep 0.3; leaving=1" "$1"; }
ready() { touch "$FOLDER/ready-$HOST"; while [[ -z "${leaving:-}" ]]; do sleep 0.05; done; }
if [[ -e "$FOLDER/do-$HOST" ]]; then source "$FOLDER/do-$HOST"; fi
"""

# Bash cannot catch a signal that is ignored from the start, as SIGINT is where the tests run in a shell's background.
WITH_SIGINT = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.execv(sys.argv[1], sys.argv[1:])
"""


class Cluster:
    """A checkout's launch folder whose torchrun is a stand-in, and hosts that are this machine."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "launch").mkdir()
        shutil.copy(ROOT / "launch/hostfile", folder / "launch")
        for path, text in ((folder / "launch/torchrun", TORCHRUN), (folder / "ssh", SSH)):
            path.write_text(text)
            path.chmod(0o755)
        self.environment = {**os.environ, "FOLDER": str(folder), "PLDR_TRAIN_SSH": str(folder / "ssh")}

    def hosts(self, text: str, **what_they_do: str) -> None:
        (self.folder / "hosts").write_text(text)
        for host, commands in what_they_do.items():
            (self.folder / f"do-{host}").write_text(commands)

    def start(self, *options: str, command: tuple[str, ...] = ("fit", "x.yaml")) -> subprocess.Popen[str]:
        script = [str(self.folder / "launch/hostfile"), str(self.folder / "hosts")]
        return subprocess.Popen(
            [sys.executable, "-SIc", WITH_SIGINT, *script, *options, "--", *command],
            env=self.environment,
            stderr=subprocess.PIPE,
            text=True,
            cwd=self.folder,
        )

    def finish(self, *options: str, command: tuple[str, ...] = ("fit", "x.yaml")) -> tuple[int, str]:
        process = self.start(*options, command=command)
        _, messages = process.communicate(timeout=120)
        return process.returncode, messages

    def read(self, name: str) -> list[str]:
        return (self.folder / name).read_text().splitlines()

    def wait_for(self, *names: str) -> None:
        deadline = time.monotonic() + 60
        while not all((self.folder / name).exists() for name in names):
            assert time.monotonic() < deadline, names
            time.sleep(0.01)


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path)


STAYS = "leave_on TERM; ready; exit 1"  # torchrun's code after a signal


def test_each_host_runs_torchrun_with_one_place_to_meet(cluster: Cluster) -> None:
    cluster.hosts("# two machines\n\nnode0 slots=8 max_slots=9  # first\nme@node1   slots=8")
    assert cluster.finish("--port", "29500", "--max-restarts", "3") == (0, "")
    assert sorted(cluster.read("ssh-calls")) == ["me@node1 bash -s", "node0 bash -s"]
    first, second = cluster.read("arguments-node0"), cluster.read("arguments-me@node1")
    run_id = first[first.index("--rdzv-id") + 1]
    for found, is_first, address in ((first, "yes", "node0"), (second, "no", "node1")):
        assert found == [
            "--nproc", "8", "--nnodes", "2", "--rdzv", "node0:29500", "--rdzv-id", run_id, "--first", is_first,
            "--addr", address, "--max-restarts", "3", "--", "fit", "x.yaml",
        ]  # fmt: skip
    assert cluster.read("folder-node0") == [str(cluster.folder)]


def test_arguments_arrive_as_they_are(cluster: Cluster) -> None:
    cluster.hosts("node0 slots=1\n")
    odd = ("fit", "a b.yaml", "data.train_documents=[0, 9]", 'run.name=it\'s $HOME `id` "x"\nline', "")
    assert cluster.finish(command=odd) == (0, "")
    assert (cluster.folder / "arguments-node0").read_text().endswith("\n--\n" + "\n".join(odd) + "\n")


def test_what_a_run_needs_of_the_environment_is_taken_along_and_no_more(cluster: Cluster) -> None:
    cluster.hosts("node0 slots=1\n")
    cluster.environment |= {
        "NCCL_SOCKET_IFNAME": "ib 0", "WANDB_API_KEY": "it's secret", "OMP_NUM_THREADS": "3",
        "MINE": "a\nb", "OTHER": "x",
    }  # fmt: skip
    assert cluster.finish("--export", "MINE", "--export", "NOT_SET") == (0, "")
    seen = (cluster.folder / "environment-node0").read_text()
    for text in ("NCCL_SOCKET_IFNAME=ib 0\n", "WANDB_API_KEY=it's secret\n", "MINE=a\nb\n", "OMP_NUM_THREADS=3\n"):
        assert text in seen
    assert "OTHER=" not in seen
    assert "NOT_SET" not in seen


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_reaches_torchrun_on_every_host_once_as_sigterm(
    number: signal.Signals, code: int, cluster: Cluster
) -> None:
    cluster.hosts("node0 slots=1\nnode1 slots=1\n", node0=STAYS, node1=STAYS)
    process = cluster.start()
    cluster.wait_for("ready-node0", "ready-node1")
    process.send_signal(number)
    process.communicate(timeout=120)
    assert process.returncode == code
    for host in ("node0", "node1"):
        assert cluster.read(f"signals-{host}") == ["TERM"]


def test_a_run_that_is_done_before_the_signal_counts_is_done(cluster: Cluster) -> None:
    cluster.hosts("node0 slots=1\n", node0="leave_on TERM; ready; exit 0")
    process = cluster.start()
    cluster.wait_for("ready-node0")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert process.returncode == 0


def test_when_one_host_fails_the_others_are_ended_and_its_code_remains(cluster: Cluster) -> None:
    cluster.hosts("node0 slots=1\nnode1 slots=1\n", node0="leave_on TERM; ready; exit 9", node1="sleep 0.5; exit 7")
    assert cluster.finish() == (7, "node1 ended with exit code 7\n")
    assert cluster.read("signals-node0") == ["TERM"]


def test_a_host_out_of_reach_ends_the_others(cluster: Cluster) -> None:
    cluster.hosts("node0 slots=1\nunreachable slots=1\n", node0="leave_on TERM; ready; exit 1")
    code, messages = cluster.finish()
    assert code == 255
    assert messages == "no route to host\nunreachable ended with exit code 255\n"


def test_each_host_is_reported_at_once_when_the_script_is_killed(cluster: Cluster) -> None:
    body = "leave_on TERM; ready; touch $FOLDER/left-$HOST"
    waits = body.replace("ready;", "ready; while [[ ! -e $FOLDER/left-node0 ]]; do sleep 0.1; done;")
    cluster.hosts("node0 slots=1\nnode1 slots=1\nnode2 slots=1\n", node0=body, node1=waits, node2=waits)
    process = cluster.start()
    cluster.wait_for("ready-node0", "ready-node1", "ready-node2")
    process.kill()
    cluster.wait_for("left-node0", "left-node1", "left-node2")
    process.communicate()


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("node0\n", [], "line 1: no slots=N for node0; add it or give --nproc N"),
        ("node0 slots=2\n\nnode1 slots=4", [], "line 3: slots=4, others have 2; trainer.devices is one number"),
        ("# none\n", [], "names no host"),
        ("node0 slots=2\n-oProxyCommand=id slots=2\n", [], "hosts, line 2: -oProxyCommand=id begins with -"),
        ("me@-node0 slots=2\n", [], "hosts, line 1: me@-node0 begins with -"),
        ("node0 slots=2\n", ["--port"], "--port: needs a value"),
        ("node0 slots=2\n", ["--export", "A=1"], "--export A=1: no name of a variable"),
        ("node0 slots=2\n", ["--slots", "1"], "--slots: no such option"),
        ("node0 slots=2\n", ["other"], "other: one hostfile only; the command comes after --"),
    ],
)
def test_mistakes_are_named(text: str, options: list[str], message: str, cluster: Cluster) -> None:
    cluster.hosts(text)
    code, messages = cluster.finish(*options)
    assert code == 2
    assert messages.startswith("error: ")
    assert message in messages
    assert not (cluster.folder / "ssh-calls").exists()


def test_nproc_replaces_slots(cluster: Cluster) -> None:
    cluster.hosts("node0\nnode1 slots=4\n")
    assert cluster.finish("--nproc", "3") == (0, "")
    assert cluster.read("arguments-node1")[:2] == ["--nproc", "3"]
