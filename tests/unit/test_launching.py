"""Real processes: what they are told, which exit code remains, when all start again."""

from __future__ import annotations

import datetime
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from pldr_train import launching
from pldr_train.launching import is_launched, launch, newest_step
from tests.unit.launched_processes import is_gone, run, script, wait_for_files, wait_until

__all__ = ["script"]  # a fixture

# ------------------------------------------------------------------------------------------------------- environment


def test_each_process_finds_its_number_and_the_others(
    script: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(9)))
    code, said = run(script('note("environment", json.dumps(dict(os.environ)))'), num_processes=4)
    assert (code, said) == (0, [])
    seen = [json.loads((tmp_path / f"environment-{rank}").read_text()) for rank in range(4)]
    for rank, values in enumerate(seen):
        assert (values["RANK"], values["LOCAL_RANK"]) == (str(rank), str(rank))
        assert (values["WORLD_SIZE"], values["LOCAL_WORLD_SIZE"], values["NODE_RANK"]) == ("4", "4", "0")
        assert values["MASTER_ADDR"] == "127.0.0.1"
        assert values["PLDR_TRAIN_LAUNCHED"] == "1"
        assert values["OMP_NUM_THREADS"] == "2"
        assert values["PATH"] == os.environ["PATH"]
    (port,) = {values["MASTER_PORT"] for values in seen}
    assert 1024 < int(port) < 65536


def test_threads_that_are_set_stay(
    script: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    run(script('note("threads", os.environ["OMP_NUM_THREADS"])'))
    assert (tmp_path / "threads-1").read_text() == "7\n"


def test_more_processes_than_cores_have_a_thread_each(
    script: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    run(script('note("threads", os.environ["OMP_NUM_THREADS"])'))
    assert (tmp_path / "threads-0").read_text() == "1\n"


@pytest.mark.parametrize("use_libuv", [True, False])
def test_rank_0_can_listen_on_the_port_that_is_kept_for_it(use_libuv: bool) -> None:
    from torch.distributed import TCPStore

    with launching._hold_free_port() as held:
        port, wait = held.getsockname()[1], datetime.timedelta(seconds=30)
        server = TCPStore("127.0.0.1", port, 1, is_master=True, timeout=wait, use_libuv=use_libuv)
        server.set("key", "value")
        assert TCPStore("127.0.0.1", port, 1, is_master=False, timeout=wait).get("key") == b"value"


def test_no_one_else_is_given_the_port_meanwhile() -> None:
    with launching._hold_free_port() as held:
        others = [launching._hold_free_port() for _ in range(500)]
        ports = [other.getsockname()[1] for other in others]
        for other in others:
            other.close()
        assert len({held.getsockname()[1], *ports}) == 501


@pytest.mark.parametrize(
    ("names", "expected"), [((), False), (("RANK",), False), (("WORLD_SIZE",), False), (("RANK", "WORLD_SIZE"), True)]
)
def test_a_process_is_launched_if_it_has_number_and_count(
    names: tuple[str, ...], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name in names:
        monkeypatch.setenv(name, "0")
    assert is_launched() is expected


# -------------------------------------------------------------------------------------------------------- exit codes


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ([0, 0, 0], 0),
        ([0, 2, 0], 2),
        ([143, 143, 143], 143),
        ([130, 0, 130], 130),
        ([0, 0, 5], 5),
        ([143, 5, 143], 5),
        ([5, 2, 143], 2),
        ([2, 2, 2], 2),
    ],
)
def test_one_exit_code_for_all(codes: list[int], expected: int, script: Callable[[str], Path]) -> None:
    code, said = run(script(f"sys.exit({codes}[rank])"), num_processes=3)
    assert code == expected
    assert said == [f"rank {rank} ended with exit code 5" for rank in range(3) if codes[rank] == 5]


def test_a_killed_rank_is_named_and_the_others_are_ended_with_their_workers(
    script: Callable[[str], Path], tmp_path: Path
) -> None:
    code, said = run(
        script("""
if rank == 1:
    wait_for("worker-0")
    os.kill(os.getpid(), signal.SIGKILL)
signal.signal(signal.SIGTERM, lambda *_: note("terminated"))
note("worker", str(subprocess.Popen(["sleep", "600"]).pid))
time.sleep(600)""")
    )
    assert code == 137
    assert said == ["rank 1 was killed by SIGKILL", "killed rank 0: still running 2 s after rank 1 had ended"]
    assert not (tmp_path / "terminated-0").exists()
    worker = int((tmp_path / "worker-0").read_text())
    wait_until(lambda: is_gone(worker), "the worker lives on")


def test_after_a_crash_the_others_may_report_and_leave_by_themselves(
    script: Callable[[str], Path], tmp_path: Path
) -> None:
    code, said = run(
        script("""
if rank == 1:
    wait_for("ready-0")
    os.abort()
note("ready")
time.sleep(0.3)
note("report")
sys.exit(9)""")
    )
    assert code == 134
    assert said == ["rank 1 was killed by SIGABRT", "rank 0 ended with exit code 9"]
    assert (tmp_path / "report-0").exists()


def test_of_what_is_noticed_at_once_the_killed_rank_is_the_cause(
    script: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def until_both_have_ended(_: float) -> None:
        (tmp_path / "go").touch()
        wait_until(lambda: all(map(is_gone, pids())), "a process lives on")

    def pids() -> list[int]:
        wait_for_files(tmp_path, "ready-0", "ready-1")
        return [int((tmp_path / f"pid-{rank}").read_text()) for rank in range(2)]

    # Between two looks of the launcher.
    monkeypatch.setattr(launching, "time", SimpleNamespace(sleep=until_both_have_ended, monotonic=time.monotonic))
    body = "os.kill(os.getpid(), signal.SIGKILL) if rank == 1 else sys.exit(9)"
    code, said = run(script(f'note("pid", str(os.getpid())); note("ready"); wait_for("go")\n{body}'))
    assert code == 137
    assert said == ["rank 1 was killed by SIGKILL", "rank 0 ended with exit code 9"]


def test_after_a_user_error_the_others_have_the_grace_time(script: Callable[[str], Path]) -> None:
    code, said = run(script("sys.exit(2) if rank == 0 else time.sleep(600)"), grace_s=0.5, max_restarts=3)
    assert code == 2
    assert said == ["killed rank 1: still running 0.5 s after rank 0 had ended"]


def test_a_rank_that_still_saves_is_not_ended(script: Callable[[str], Path], tmp_path: Path) -> None:
    code, said = run(script('if rank == 0: time.sleep(0.5); note("saved")\nsys.exit(143)'), grace_s=0.1)
    assert (code, said) == (143, [])
    assert (tmp_path / "saved-0").exists()


def test_a_rank_that_finishes_later_is_not_ended(script: Callable[[str], Path], tmp_path: Path) -> None:
    code, said = run(script('if rank == 0: time.sleep(0.5); note("sampled")'), grace_s=0.1)
    assert (code, said) == (0, [])
    assert (tmp_path / "sampled-0").exists()


def test_a_command_that_cannot_start_is_an_error() -> None:
    with pytest.raises(FileNotFoundError):
        launch(["/no/such/program"], 2)


# ---------------------------------------------------------------------------------------------------------- restarts

FAILS_TWICE = """
note("starts")
failures = (here / f"starts-{rank}").read_text().count("x") < 3
sys.exit(7 if failures and rank == 1 else 0)
"""


def starts(folder: Path) -> int:
    return (folder / "starts-0").read_text().count("x")


def test_all_start_again_after_a_crash(script: Callable[[str], Path], tmp_path: Path) -> None:
    code, said = run(script(FAILS_TWICE), max_restarts=2)
    assert (code, starts(tmp_path)) == (0, 3)
    assert said == [
        "rank 1 ended with exit code 7",
        "starting all 2 processes again (restart 1 of 2)",
        "rank 1 ended with exit code 7",
        "starting all 2 processes again (restart 2 of 2)",
    ]


def test_restarts_end_when_nothing_moves(script: Callable[[str], Path], tmp_path: Path) -> None:
    code, said = run(script(FAILS_TWICE), max_restarts=1, progress=lambda: 40)
    assert (code, starts(tmp_path)) == (7, 2)
    assert said[-1] == "not started again: 1 in a row brought no new checkpoint"


def test_restarts_are_counted_anew_after_a_new_checkpoint(script: Callable[[str], Path], tmp_path: Path) -> None:
    checkpoints = tmp_path / "checkpoints"
    body = f"""
(here / "checkpoints" / f"step-{{len((here / 'starts-1').read_text()):08d}}").mkdir() if rank == 1 else None
{FAILS_TWICE}"""
    checkpoints.mkdir()
    for rank in range(2):
        (tmp_path / f"starts-{rank}").write_text("y\n")
    code, _ = run(script(body), max_restarts=1, progress=lambda: newest_step(checkpoints))
    assert (code, starts(tmp_path)) == (0, 3)


@pytest.mark.parametrize("code", [2, 130, 143])
def test_what_was_asked_for_is_not_started_again(code: int, script: Callable[[str], Path], tmp_path: Path) -> None:
    assert run(script(f'note("starts"); sys.exit({code})'), max_restarts=5) == (code, [])
    assert starts(tmp_path) == 1


def test_without_restarts_a_crash_is_the_end(script: Callable[[str], Path], tmp_path: Path) -> None:
    assert run(script(FAILS_TWICE)) == (7, ["rank 1 ended with exit code 7"])
    assert starts(tmp_path) == 1


def test_the_newest_step_is_that_of_a_checkpoint_folder(tmp_path: Path) -> None:
    assert newest_step(tmp_path / "none") == 0
    assert newest_step(tmp_path) == 0
    for name in ("step-00000900", "step-00001000", "step-123456789", ".building-step-99999999999", "step-1", "last"):
        (tmp_path / name).mkdir()
    assert newest_step(tmp_path) == 123456789
