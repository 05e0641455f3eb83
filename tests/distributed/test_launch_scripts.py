"""The scripts of launch/ with real processes: torchrun on loopback and between network namespaces."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pldr_train.launching import launch
from tests.distributed.fleet import free_port
from tests.processes import ROOT, hostile_folder

# Stands for pldr_train: sums over all processes and writes down what it got.
ALL_REDUCE = """
import json, os, sys
import torch
import torch.distributed as dist

dist.init_process_group("gloo")
total = torch.tensor([2.0 ** dist.get_rank()])
dist.all_reduce(total)
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "OMP_NUM_THREADS")
seen = {"sum": total.item(), "arguments": sys.argv[1:], **{name: os.environ.get(name) for name in names}}
with open(os.path.join(os.environ["WRITE_TO"], f"rank-{dist.get_rank()}.json"), "w") as file:
    json.dump(seen, file)
dist.destroy_process_group()
"""

# Stands for pldr_train where processes find each other as they do above: goes to the place where they meet, and no
# further. It imports no torch, for seconds each.
REACHES = """
import json, os, socket, sys

socket.create_connection((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])), timeout=60).close()
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "OMP_NUM_THREADS")
seen = {"arguments": sys.argv[1:], **{name: os.environ.get(name) for name in names}}
with open(os.path.join(os.environ["WRITE_TO"], "rank-" + os.environ["RANK"] + ".json"), "w") as file:
    json.dump(seen, file)
"""

# Fails on rank 1; the others wait.
FAILS = """
import os, sys, time
if os.environ["RANK"] == "1":
    sys.exit("rank 1 has a problem")
time.sleep(600)
"""

# Leaves a while after SIGTERM, and says that it did.
LEAVES_ON_SIGTERM = """
import os, signal, sys, time
from pathlib import Path
folder, rank, got = Path(os.environ["WRITE_TO"]), os.environ["RANK"], []
signal.signal(signal.SIGTERM, lambda *_: got.append(1))
(folder / f"ready-{rank}").touch()
while not got:
    time.sleep(0.01)
time.sleep(0.3)
(folder / f"left-{rank}").write_text(str(len(got)))
sys.exit(143)
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Where the scripts find the modules that stand for pldr_train, and those a place to write to."""
    modules = tmp_path / "modules"
    modules.mkdir()
    stand_ins = {"all_reduce": ALL_REDUCE, "reaches": REACHES, "fails": FAILS, "leaves": LEAVES_ON_SIGTERM}
    for name, text in stand_ins.items():
        (modules / f"{name}.py").write_text(text)
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "OMP_NUM_THREADS")}
    (tmp_path / "out").mkdir()
    hostile_folder(tmp_path / "hostile")
    return {**kept, "PYTHONPATH": str(modules), "PLDR_TRAIN_MODULE": "all_reduce", "WRITE_TO": str(tmp_path / "out")}


def results(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted((folder / "out").glob("rank-*.json"))]


def run(*command: str | Path, env: dict[str, str], cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    words = [str(each) for each in command]
    return subprocess.run(words, env=env, cwd=cwd, capture_output=True, text=True, timeout=240, check=False)


# ---------------------------------------------------------------------------------------------------------- torchrun


@pytest.mark.slow
def test_torchrun_on_one_machine(environment: dict[str, str], tmp_path: Path) -> None:
    ended = run(
        ROOT / "launch/torchrun", "--nproc", "2", "--", "fit", "a recipe.yaml", "data.train_documents=[0, 9]",
        env=environment, cwd=tmp_path / "hostile",
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    seen = results(tmp_path)
    assert [each["sum"] for each in seen] == [3.0, 3.0]
    assert [(each["RANK"], each["LOCAL_RANK"], each["WORLD_SIZE"]) for each in seen] == [
        ("0", "0", "2"),
        ("1", "1", "2"),
    ]
    assert all(each["arguments"] == ["fit", "a recipe.yaml", "data.train_documents=[0, 9]"] for each in seen)
    assert all(int(each["OMP_NUM_THREADS"]) == max(1, len(os.sched_getaffinity(0)) // 2) for each in seen)


@pytest.mark.slow
def test_processes_of_the_launcher_meet(
    environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PYTHONPATH", "WRITE_TO"):
        monkeypatch.setenv(name, environment[name])
    monkeypatch.chdir(tmp_path / "hostile")
    assert launch([sys.executable, "-m", "all_reduce", "fit"], 2) == 0
    assert [each["sum"] for each in results(tmp_path)] == [3.0, 3.0]


@pytest.mark.slow
def test_two_agents_meet_on_loopback(environment: dict[str, str], tmp_path: Path) -> None:
    options = ["--nproc", "1", "--nnodes", "2", "--rdzv", f"127.0.0.1:{free_port()}", "--addr", "127.0.0.1"]
    command = [str(ROOT / "launch/torchrun"), *options, "--", "fit", "x.yaml"]
    env = {**environment, "PLDR_TRAIN_MODULE": "reaches"}
    agents = [subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    messages = [agent.communicate(timeout=240)[1] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], messages
    seen = results(tmp_path)
    assert [(each["RANK"], each["LOCAL_RANK"], each["LOCAL_WORLD_SIZE"]) for each in seen] == [
        ("0", "0", "1"),
        ("1", "0", "1"),
    ]


@pytest.mark.slow
def test_torchrun_exits_with_1_when_a_process_fails(environment: dict[str, str]) -> None:
    ended = run(
        ROOT / "launch/torchrun", "--nproc", "2", "--", "fit", "x", env={**environment, "PLDR_TRAIN_MODULE": "fails"}
    )
    assert ended.returncode == 1
    assert "rank 1 has a problem" in ended.stderr


@pytest.mark.slow
def test_sigterm_goes_through_torchrun_once_and_leaves_time_to_save(
    environment: dict[str, str], tmp_path: Path
) -> None:
    command = [str(ROOT / "launch/torchrun"), "--nproc", "2", "--", "fit", "x"]
    agent = subprocess.Popen(
        command, env={**environment, "PLDR_TRAIN_MODULE": "leaves"}, stderr=subprocess.PIPE, text=True
    )
    while not all((tmp_path / f"out/ready-{rank}").exists() for rank in range(2)):
        assert agent.poll() is None
        time.sleep(0.02)
    agent.send_signal(signal.SIGTERM)
    agent.communicate(timeout=240)
    assert agent.returncode == 1
    assert [(tmp_path / f"out/left-{rank}").read_text() for rank in range(2)] == ["1", "1"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fit", "x.yaml"], "fit: no such option; see launch/torchrun --help (the command comes after --)"),
        (["--nproc"], "--nproc: needs a value"),
        (["--nproc", "--", "fit"], "--nproc: needs a value"),
        (["--nproc", "many", "--", "fit"], "--nproc many: a number of processes, gpu or auto"),
        (["--nproc", "2"], "nothing to run"),
        (["--nproc", "2", "--"], "nothing to run"),
        (["--nnodes", "2", "--", "fit"], "--nnodes 2: needs --rdzv"),
        (["--rdzv", "node0", "--", "fit"], "--rdzv node0: an address and a port"),
        (["--first", "maybe", "--", "fit"], "--first maybe: yes or no"),
        (["--max-restarts", "2", "--", "fit", "x", "--resume", "never"], "--max-restarts 2: a restart would begin"),
        (["--max-restarts", "2", "--", "fit", "x", "--resume=never"], "--max-restarts 2: a restart would begin"),
    ],
)
def test_torchruns_options_are_checked(arguments: list[str], message: str) -> None:
    ended = run(ROOT / "launch/torchrun", *arguments, env=dict(os.environ))
    assert ended.returncode == 2
    assert ended.stderr.startswith(f"error: {message}")


@pytest.mark.parametrize("script", ["torchrun", "hostfile", "slurm.sbatch"])
def test_every_script_explains_itself(script: str) -> None:
    path = ROOT / "launch" / script
    ended = run(path, "--help", env=dict(os.environ))
    assert ended.returncode == 0
    assert f"launch/{script}" in ended.stdout
    assert "exit codes:" in ended.stdout
    text = path.read_text()
    assert text.startswith("#!/usr/bin/env bash\n")
    assert "\nset -euo pipefail\n" in text
    if shutil.which("shellcheck"):
        assert run("shellcheck", path, env=dict(os.environ)).stdout == ""


# --------------------------------------------------------------------------------------------- two hosts, by namespaces


class Hosts:
    """Two network namespaces joined by a cable (veth), as two machines with an address each."""

    addresses = ("10.231.77.1", "10.231.77.2")

    def __init__(self) -> None:
        tag = uuid.uuid4().hex[:6]
        self.names = (f"pldr-{tag}-0", f"pldr-{tag}-1")
        self.devices = (f"pt{tag}0", f"pt{tag}1")

    def make(self) -> str | None:
        """Returns why that is not possible here, if so."""
        if shutil.which("ip") is None:
            return "no `ip` here (iproute2)"
        commands = [f"netns add {name}" for name in self.names]
        commands.append(
            f"link add {self.devices[0]} netns {self.names[0]} type veth "
            f"peer name {self.devices[1]} netns {self.names[1]}"
        )
        for name, device, address in zip(self.names, self.devices, self.addresses, strict=True):
            commands += [
                f"-n {name} addr add {address}/24 dev {device}",
                f"-n {name} link set {device} up",
                f"-n {name} link set lo up",
            ]
        for command in commands:
            ended = run("ip", *command.split(), env=dict(os.environ))
            if ended.returncode != 0:
                return f"ip {command}: {ended.stderr.strip()}"
        return None

    def remove(self) -> None:
        for name in self.names:
            run("ip", "netns", "del", name, env=dict(os.environ))


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    made = Hosts()
    try:
        problem = made.make()
        if problem:
            pytest.skip(f"no network namespaces here: {problem}")
        yield made
    finally:
        if shutil.which("ip"):
            made.remove()


@pytest.mark.slow
def test_two_hosts_train_over_their_network(hosts: Hosts, environment: dict[str, str], tmp_path: Path) -> None:
    agents = []
    for index, (name, device, address) in enumerate(zip(hosts.names, hosts.devices, hosts.addresses, strict=True)):
        command = [
            "ip", "netns", "exec", name, str(ROOT / "launch/torchrun"), "--nproc", "2", "--nnodes", "2",
            "--rdzv", f"{hosts.addresses[0]}:29400", "--first", "no" if index else "yes", "--addr", address,
            "--", "fit", "x.yaml",
        ]  # fmt: skip
        env = {**environment, "GLOO_SOCKET_IFNAME": device}
        agents.append(subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True))
    messages = [agent.communicate(timeout=240)[1] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], messages
    seen = results(tmp_path)
    assert [each["sum"] for each in seen] == [15.0] * 4
    assert [each["LOCAL_RANK"] for each in seen] == ["0", "1", "0", "1"]
    assert {each["MASTER_ADDR"] for each in seen} <= set(hosts.addresses)


@pytest.mark.slow
def test_a_hostfile_starts_the_run_on_its_hosts(hosts: Hosts, environment: dict[str, str], tmp_path: Path) -> None:
    ssh = tmp_path / "ssh"
    ssh.write_text(
        textwrap.dedent(f"""\
        #!/usr/bin/env bash
        # Goes to the namespace with that address, with a bare environment, as ssh does.
        case "$1" in
            {hosts.addresses[0]}) name={hosts.names[0]} device={hosts.devices[0]} ;;
            {hosts.addresses[1]}) name={hosts.names[1]} device={hosts.devices[1]} ;;
        esac
        exec env -i PATH="$PATH" HOME="$HOME" GLOO_SOCKET_IFNAME="$device" ip netns exec "$name" "${{@:2}}"
        """)
    )
    ssh.chmod(0o755)
    hostfile = tmp_path / "hosts"
    hostfile.write_text("".join(f"{address} slots=2\n" for address in hosts.addresses))
    ended = run(
        ROOT / "launch/hostfile", hostfile, "--export", "WRITE_TO", "--export", "PYTHONPATH", "--", "fit", "a b.yaml",
        env={**environment, "PLDR_TRAIN_SSH": str(ssh), "PLDR_TRAIN_MODULE": "reaches"},
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    seen = results(tmp_path)
    assert [each["RANK"] for each in seen] == ["0", "1", "2", "3"]
    assert {each["MASTER_ADDR"] for each in seen} <= set(hosts.addresses)
    assert all(each["arguments"] == ["fit", "a b.yaml"] for each in seen)
