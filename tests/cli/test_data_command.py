"""`pldr-train data` from the command line, end to end."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pldr_train.cli import main
from tests.hub_server import HubServer
from tests.processes import SERVER, as_a_fresh_process, run_cli
from tests.tiny import metric_lines, tiny_values, write_corpus


@pytest.fixture
def recipe(tiny_data: Path, tmp_path: Path) -> Path:
    path = tmp_path / "recipe.json"  # JSON is YAML
    path.write_text(json.dumps(tiny_values(tiny_data, tmp_path / "runs", data={"cache_dir": str(tmp_path / "cache")})))
    return path


def succeeds(*arguments: str | Path, **options: Any) -> str:
    result = run_cli(*arguments, **options)
    assert result.returncode == 0, result.stderr
    return result.stdout


def fails(*arguments: str | Path) -> str:
    result = run_cli(*arguments)
    assert result.returncode == 2, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    return result.stdout + result.stderr


def test_tokens_made_ahead_train_as_the_command_says_and_give_the_same_batches(recipe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tokens"
    said = succeeds("data", "tokenize", recipe, "--output", folder, "--documents-per-shard", "50", "--workers", "2")
    assert "[0, 120), 120 in 3 files" in said
    assert f"data.source=tokens data.path={folder} data.tokenizer=null" in said
    assert "nothing was done" in succeeds("data", "tokenize", recipe, "--output", folder, "--documents-per-shard", "50")
    succeeds("fit", recipe, "run.name=live")
    succeeds("fit", recipe, "run.name=ahead", "data.source=tokens", f"data.path={folder}", "data.tokenizer=null")
    live, ahead = (metric_lines(tmp_path / "runs" / name) for name in ("live", "ahead"))
    assert live == ahead


def test_inspect_shows_a_table_or_json(recipe: Path) -> None:
    shown = succeeds("data", "inspect", recipe, "--rows", "1")
    for word in (
        "documents   [0, 120)",
        "train       [0, 108)",
        "validation  [108, 120)",
        "lengths",
        "epochs",
        "row 0",
    ):
        assert word in shown
    found: dict[str, Any] = json.loads(succeeds("data", "inspect", recipe, "--json", "--documents", "5", "25"))
    assert found["interval"] == [5, 25]
    assert found["sample"]["documents"] == 20
    assert found["estimate"]["is_exact"]


def test_verify_ends_with_2_and_names_what_is_bad(recipe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tokens"
    succeeds("data", "tokenize", recipe, "--output", folder)
    assert "whole       1 files" in succeeds("data", "verify", folder)
    assert "whole       2 files" in succeeds("data", "verify", recipe)
    shard = folder / "tokens-00000.safetensors"
    content = bytearray(shard.read_bytes())
    content[-200] ^= 0xFF
    shard.write_bytes(content)
    assert "tokens-00000.safetensors" in fails("data", "verify", folder)
    assert "whole" in succeeds("data", "verify", folder, "--quick")  # sizes and headers are right


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["tokenize", "RECIPE"], []),
        (["tokenize", "RECIPE", "--output", "OUT", "--documents", "50", "500"], ["500", "120"]),
        (["tokenize", "RECIPE", "--output", "OUT", "--workers", "0"], []),
        (["tokenize", "RECIPE", "--output", "OUT", "data.tokenizer=nowhere.model"], ["data.tokenizer=nowhere.model"]),
        (["inspect", "nowhere.yaml"], ["nowhere.yaml"]),
        (["inspect", "RECIPE", "--documents", "9", "3"], ["--documents 9 3"]),
        (["verify", "."], ["no folder of tokens"]),
        (["verify", "RECIPE", "data.path=nowhere"], ["data.path=nowhere"]),
        (["polish", "RECIPE"], []),
    ],
)
def test_what_cannot_be_done_is_said_with_the_key(
    recipe: Path, tmp_path: Path, arguments: list[str], parts: list[str]
) -> None:
    given = [{"RECIPE": str(recipe), "OUT": str(tmp_path / "out")}.get(argument, argument) for argument in arguments]
    said = fails("data", *given)
    assert all(part in said for part in parts), said


def test_local_sources_have_nothing_to_download(recipe: Path) -> None:
    assert "nothing to download: data.source=parquet" in succeeds("data", "download", recipe)


@pytest.mark.slow
def test_downloaded_shards_are_verified_and_trained_on_without_the_network(
    recipe: Path, tiny_data: Path, tmp_path: Path
) -> None:
    files = {f"data/{path.name}": path.read_bytes() for path in (tiny_data / "corpus").glob("*.parquet")}
    overrides = ["data.source=hub", "data.repository=owner/corpus", "data.train_documents=[0,50]"]
    with HubServer({"owner/corpus": files}) as hub:
        to_the_hub: dict[str, Any] = {"variables": hub.environment(tmp_path), "before": hub.client(tmp_path)}

        def run(*arguments: str) -> str:
            return succeeds(*arguments, recipe, *overrides, **to_the_hub)

        said = run("data", "download")
        assert "files       1 of 2" in said  # documents [0, 60) stand in the first file
        assert "fetched     1 files" in said
        assert hub.reads("data/part-1.parquet") == []
        fetched = len(hub.reads())
        assert "fetched     0 files" in run("data", "download")
        assert "whole       1 files" in run("data", "verify")
        run("fit")
        assert len(hub.reads("data/part-0.parquet")) == len(hub.reads()) == fetched


def tokenize_command(recipe: Path, folder: Path, workers: int) -> list[str]:
    return ["data", "tokenize", str(recipe), "--output", str(folder), "--workers", str(workers),
            "--documents-per-shard", "40"]  # fmt: skip


def run_in_background(arguments: list[str]) -> None:
    as_a_fresh_process()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os._exit(main(arguments))


def assert_gone(processes: list[psutil.Process]) -> None:
    """Wait until all have ended, whether or not the system's first process has noticed."""
    deadline = time.monotonic() + 30
    while not all(map(has_ended, processes)):
        assert time.monotonic() < deadline, processes
        time.sleep(0.01)


def has_ended(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def kill_once(arguments: list[str], folder: Path, more_shards: int) -> None:
    """Start the command, and kill it with SIGKILL when it has finished some more shards; its workers must follow."""
    before = len(list(folder.glob("tokens-*.json")))
    child = SERVER.Process(target=run_in_background, args=(arguments,))
    child.start()
    process = psutil.Process(child.pid)
    while len(list(folder.glob("tokens-*.json"))) < before + more_shards:
        assert child.is_alive(), "it ended before it could be killed"
        time.sleep(0.001)
    workers = process.children()
    process.kill()
    child.join()
    assert_gone(workers)


def test_killed_at_any_moment_it_goes_on_to_the_same_files(tiny_data: Path, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus", documents=2000)
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(tiny_values(tiny_data, tmp_path / "runs", data={"path": str(corpus)})))
    succeeds(*tokenize_command(recipe, tmp_path / "straight", workers=1))
    folder = tmp_path / "killed"
    for more_shards in (1, 18):
        kill_once(tokenize_command(recipe, folder, workers=2), folder, more_shards)
        assert "not finished" in fails("data", "verify", folder)
    kept = {path: path.stat().st_mtime_ns for path in folder.glob("tokens-*.safetensors")}
    assert 19 <= len(kept) < 50
    assert "of which are there already" in succeeds(*tokenize_command(recipe, folder, workers=2))
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    straight, resumed = ({path.name: path.read_bytes() for path in tmp_path.joinpath(name).iterdir()}
                         for name in ("straight", "killed"))  # fmt: skip
    assert straight == resumed


def test_a_full_disk_keeps_what_is_finished_and_says_so(tiny_data: Path, tmp_path: Path) -> None:
    texts = ["short"] * 10 + ["the metric tensor learns " * 8000] * 10
    pq.write_table(pa.table({"content": texts}), tmp_path / "corpus.parquet")
    recipe, folder = tmp_path / "recipe.json", tmp_path / "tokens"
    values = tiny_values(tiny_data, tmp_path / "runs", data={"path": str(tmp_path / "corpus.parquet")})
    recipe.write_text(json.dumps(values))
    command = ["data", "tokenize", recipe, "--output", folder, "--documents-per-shard", "10", "--workers", "1"]
    result = run_cli(*command, file_size_limit=300_000)  # the tokenizer's file is smaller, the second shard larger
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert f"cannot write {folder / 'tokens-00001.safetensors'}: File too large; free some space" in result.stderr
    assert sorted(path.name for path in folder.iterdir()) == [
        "tokenizer.model", "tokens-00000.json", "tokens-00000.safetensors", "unfinished.json",
    ]  # fmt: skip
    assert "2 files, 1 of which are there already" in succeeds(*command)
    assert "whole       2 files" in succeeds("data", "verify", folder)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_ends_it_with_its_workers_and_nothing_half_written(tiny_data: Path, tmp_path: Path, name: str) -> None:
    corpus = write_corpus(tmp_path / "corpus", documents=4000)
    recipe, folder = tmp_path / "recipe.json", tmp_path / "tokens"
    recipe.write_text(json.dumps(tiny_values(tiny_data, tmp_path / "runs", data={"path": str(corpus)})))
    child = SERVER.Process(target=run_in_background, args=(tokenize_command(recipe, folder, workers=2),))
    child.start()
    workers: list[psutil.Process] = []
    # The first worker may have written a shard before the second is forked.
    while len(workers) < 2 or not list(folder.glob("tokens-*.json")):
        assert child.is_alive()
        time.sleep(0.001)
        workers = psutil.Process(child.pid).children()
    assert len(workers) == 2
    os.kill(child.pid or 0, getattr(signal, name))
    child.join()
    assert_gone(workers)
    assert child.exitcode == {"SIGINT": 130, "SIGTERM": 143}[name]
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]


def test_a_run_that_has_begun_has_its_files_compared_with_its_list(
    recipe: Path, tiny_data: Path, tmp_path: Path
) -> None:
    corpus = tmp_path / "corpus"
    shutil.copytree(tiny_data / "corpus", corpus)
    given = [recipe, f"data.path={corpus}"]
    succeeds("fit", *given, "trainer.max_steps=5")
    assert "whole       2 files" in succeeds("data", "verify", *given)
    (corpus / "part-0.parquet").rename(corpus / "part-00.parquet")
    write_corpus(tmp_path / "other", documents=60)
    shutil.copy(tmp_path / "other" / "part-0.parquet", corpus / "part-1.parquet")
    said = fails("data", "verify", *given)
    assert "part-0.parquet: missing, the run began with it; put it back" in said
    assert "part-00.parquet: new since the run began" in said
    assert "part-1.parquet: has" in said
    assert "3 faults in 2 files" in said
