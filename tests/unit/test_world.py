"""The processes of a run: who this one is, and how two real ones decide together."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pldr_train.distributed.world import World
from pldr_train.errors import LostProcessError, RecipeError, UserError
from pldr_train.metrics.means import WeightedMeans
from tests.distributed.fleet import free_port
from tests.processes import SERVER


def variables(**changes: str | None) -> dict[str, str]:
    """Those of the second of two processes of this machine; None takes one away."""
    complete: dict[str, str | None] = {
        "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
    }  # fmt: skip
    return {name: value for name, value in (complete | changes).items() if value is not None}


@pytest.mark.parametrize("environment", [{}, {"RANK": "0"}, {"WORLD_SIZE": "8"}, variables(RANK=None)], ids=len)
def test_without_both_variables_the_run_has_one_process(environment: dict[str, str]) -> None:
    assert World.join(environment) == World()
    assert (World().rank, World().size, World().num_nodes, World().is_main) == (0, 1, 1, True)


def test_a_world_of_one_that_a_launcher_numbered_meets_nobody() -> None:
    one = World.join(variables(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1"))
    assert one == World(0, 1, 0, 1)


@pytest.mark.parametrize(
    "missing", [("LOCAL_RANK",), ("MASTER_ADDR",), ("MASTER_PORT",), ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")]
)
@pytest.mark.parametrize("value", [None, ""])
def test_incomplete_variables_are_named(missing: tuple[str, ...], value: str | None) -> None:
    with pytest.raises(RecipeError) as raised:
        World.join(variables(**dict.fromkeys(missing, value)))
    assert f"RANK and WORLD_SIZE are set, but {', '.join(missing)} not" in str(raised.value)
    assert "torchrun" in str(raised.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"RANK": "2"}, {"RANK": "-1"}, {"WORLD_SIZE": "0"}, {"LOCAL_RANK": "2"}, {"LOCAL_RANK": "-1"},
        {"WORLD_SIZE": "3"}, {"LOCAL_WORLD_SIZE": "0"}, {"LOCAL_WORLD_SIZE": "1"}, {"LOCAL_WORLD_SIZE": "4"},
    ],
    ids=str,
)  # fmt: skip
def test_contradicting_variables_are_reported_with_their_values(changes: dict[str, str]) -> None:
    given = variables(**changes)
    with pytest.raises(RecipeError, match="contradict each other") as raised:
        World.join(given)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        assert f"{name}={given[name]}" in str(raised.value)


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"])
def test_a_variable_that_is_no_number_is_reported(name: str) -> None:
    with pytest.raises(RecipeError, match="whole numbers are needed.*'two'"):
        World.join(variables(**{name: "two"}))


@pytest.mark.parametrize("agents_store", [False, True])
def test_a_port_that_takes_connections_and_stays_silent_is_given_up(
    agents_store: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pldr_train.distributed.world._LATE_S", 0.5)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        given = variables(MASTER_PORT=str(silent.getsockname()[1]))
        if agents_store:
            given |= {"RANK": "0", "LOCAL_RANK": "0", "TORCHELASTIC_USE_AGENT_STORE": "True"}
        with pytest.raises(LostProcessError, match=r"takes connections there and does not answer.* set MASTER_PORT"):
            World.join(given, timeout_s=0.5)
    # What it holds open ends with the service.
    for thread in threading.enumerate():
        if thread.name == "pldr_train asks for an answer":
            thread.join(60)
            assert not thread.is_alive()


def test_a_world_of_one_decides_by_itself() -> None:
    one = World()
    assert one.gather("mine") == ["mine"]
    assert one.broadcast({"a": 1}) == {"a": 1}
    assert one.broadcast(None) is None
    assert one.sum([1.5, -2]) == [1.5, -2]
    assert (one.any(True), one.any(False)) == (True, False)
    assert one.on_all(lambda: 3) == 3
    assert one.on_all(lambda: 3, here=False) is None
    assert one.on_main(lambda: [4]) == [4]
    one.barrier()
    error = UserError("correct it")
    for decide in (one.on_all, one.on_main):
        with pytest.raises(UserError) as raised:
            decide(lambda: fail(error))
        assert raised.value is error


def fail(error: Exception) -> Any:
    raise error


LOST = "[/pytorch/gloo/pair.cc:534] Connection closed by peer [127.0.0.1]:2143\nand more"


@pytest.mark.parametrize(
    "text",
    [
        LOST,
        "Application timeout caused pair closure",
        "NCCL error: remote process exited or there was a network error, ncclRemoteError",
        "Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7)",
    ],
    ids=len,
)
def test_signs_of_a_lost_process_become_its_error(text: str) -> None:
    with pytest.raises(LostProcessError) as raised, World(rank=1, size=2).noticing_loss():
        raise RuntimeError(text)
    message = str(raised.value)
    assert "rank 1: another process of the run has ended or does not answer" in message
    assert text.splitlines()[0] in message
    assert "and more" not in message
    assert "The same command resumes" in message


@pytest.mark.parametrize(
    ("world", "error"),
    [
        (World(size=2), RuntimeError("CUDA out of memory")),
        (World(size=2), RuntimeError("")),
        (World(size=2), KeyError("Connection closed by peer")),
        (World(size=2), UserError("Broken pipe")),
        (World(), RuntimeError(LOST)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_any_other_error_stays_what_it_is(world: World, error: Exception) -> None:
    with pytest.raises(type(error)) as raised, world.noticing_loss():
        raise error
    assert raised.value is error


# Two real processes. Each writes what it got to a file of its own.


def outcome(action: Callable[[], Any]) -> Any:
    """What an action returned, or which error it ended with."""
    try:
        return action()
    except (UserError, LostProcessError) as error:
        return [type(error).__name__, str(error)]


def in_order(rank: int, world: World, folder: Path) -> dict[str, Any]:
    def only(*failing: int) -> None:
        if rank in failing:
            raise UserError(f"of rank {rank}")

    ran = folder / f"ran-{rank}"
    return {
        "world": [world.rank, world.size, world.local_rank, world.local_size, world.num_nodes, world.is_main],
        "gather": world.gather({"rank": rank, "text": "x" * rank}),
        "broadcast": world.broadcast([rank, None]),
        "broadcast of None": world.broadcast(None if rank == 0 else "not this"),
        "sum": world.sum([rank + 1, 0.1, -rank]),
        "max": world.max([rank, -rank, 0.1]),
        "gather of tensors": torch.stack(world.gather_tensors(torch.tensor([[rank, 7]]).T)).tolist(),
        "means": means_over_processes(rank),
        "any of rank 1": world.any(rank == 1),
        "any of none": world.any(False),
        "together": world.on_all(lambda: rank * 10),
        "together on rank 1": world.on_all(ran.touch, here=rank == 1),
        "ran": ran.exists(),
        "rank 0 fails": outcome(lambda: world.on_all(lambda: only(0))),
        "rank 1 fails": outcome(lambda: world.on_all(lambda: only(1))),
        "both fail": outcome(lambda: world.on_all(lambda: only(0, 1))),
        "on main": world.on_main(lambda: f"done by {rank}"),
        "main fails": outcome(lambda: world.on_main(lambda: only(0, 1))),
        "after all that": world.sum([1])[0],
    }


def means_over_processes(rank: int) -> list[Any]:
    """Means of both processes, and that this one goes on with its own sums."""
    means = WeightedMeans(["a", "of rank 1"])
    means.update(
        {"a": (torch.tensor(1.0 + 6.0 * rank), 1.0 + rank)} | ({"of rank 1": (torch.tensor(5.0), 2.0)} if rank else {})
    )
    return [means.compute(), means.sums.tolist()]


def decide(rank: int, port: int, folder: str) -> None:
    environment = variables(RANK=str(rank), LOCAL_RANK=str(rank), MASTER_PORT=str(port))
    os.environ.update(environment)  # torch reads its own
    world = World.join(environment, timeout_s=60)
    results = in_order(rank, world, Path(folder))
    if rank == 1:
        write(results, folder, rank)
        os._exit(0)  # without a word, as a killed one
    results["the other is gone"] = outcome(lambda: world.any(False))
    write(results, folder, rank)
    os._exit(0)


def come_alone(rank: int, port: int, folder: str) -> None:
    environment = variables(RANK=str(rank), LOCAL_RANK=str(rank), MASTER_PORT=str(port))
    os.environ.update(environment)
    write(outcome(lambda: World.join(environment, timeout_s=1)), folder, rank)
    os._exit(0)


def write(result: Any, folder: str, rank: int) -> None:
    (Path(folder) / f"{rank}.json").write_text(json.dumps(result))


def run(target: Callable[..., None], ranks: tuple[int, ...], folder: Path) -> list[Any]:
    port = free_port()
    children = [SERVER.Process(target=target, args=(rank, port, str(folder))) for rank in ranks]
    for child in children:
        child.start()
    for child in children:
        child.join(120)
        if child.exitcode is None:
            child.kill()
    assert [child.exitcode for child in children] == [0] * len(ranks)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in ranks]


@pytest.fixture(scope="module")
def decided(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run(decide, (0, 1), tmp_path_factory.mktemp("world"))


def of(decided: list[dict[str, Any]], what: str) -> list[Any]:
    return [each[what] for each in decided]


def test_two_processes_exchange_what_they_have(decided: list[dict[str, Any]]) -> None:
    assert of(decided, "world") == [[0, 2, 0, 2, 1, True], [1, 2, 1, 2, 1, False]]
    assert of(decided, "gather") == [[{"rank": 0, "text": ""}, {"rank": 1, "text": "x"}]] * 2
    assert of(decided, "broadcast") == [[0, None]] * 2
    assert of(decided, "broadcast of None") == [None] * 2
    assert of(decided, "sum") == [[3, 0.2, -1]] * 2
    assert of(decided, "max") == [[1, 0, 0.1]] * 2
    assert of(decided, "gather of tensors") == [[[[0], [7]], [[1], [7]]]] * 2
    assert of(decided, "means") == [[{"a": 8 / 3, "of rank 1": 2.5}, own] for own in ([1.0, 0.0], [7.0, 5.0])]
    assert of(decided, "any of rank 1") == [True] * 2
    assert of(decided, "any of none") == [False] * 2


def test_what_is_done_together_is_done_where_it_should_be(decided: list[dict[str, Any]]) -> None:
    assert of(decided, "together") == [0, 10]
    assert of(decided, "together on rank 1") == [None] * 2
    assert of(decided, "ran") == [False, True]
    assert of(decided, "on main") == ["done by 0"] * 2


def test_an_error_is_reported_by_the_lowest_rank_that_has_it_and_ends_all(decided: list[dict[str, Any]]) -> None:
    first, second = ["UserError", "of rank 0"], ["UserError", "of rank 1"]
    assert of(decided, "rank 0 fails") == [first, ["ReportedElsewhereError", "rank 0 has an error"]]
    assert of(decided, "rank 1 fails") == [["ReportedElsewhereError", "rank 1 has an error"], second]
    assert of(decided, "both fail") == [first, ["ReportedElsewhereError", "rank 0 has an error"]]
    assert of(decided, "main fails") == [first, ["ReportedElsewhereError", "rank 0 has an error"]]
    # The processes are still in step.
    assert of(decided, "after all that") == [2] * 2


def test_a_process_that_is_gone_is_noticed_in_the_next_decision(decided: list[dict[str, Any]]) -> None:
    name, message = decided[0]["the other is gone"]
    assert name == "LostProcessError"
    assert "rank 0: another process of the run has ended" in message


@pytest.mark.parametrize("rank", [0, 1])
def test_processes_that_never_come_are_not_waited_for_longer_than_asked(rank: int, tmp_path: Path) -> None:
    (result,) = run(come_alone, (rank,), tmp_path)
    assert result[0] == "LostProcessError"
    assert f"rank {rank} on " in result[1]
    assert "did not meet the other 1 processes at 127.0.0.1:" in result[1]
