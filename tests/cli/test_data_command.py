"""`pldr-train data` from the command line, end to end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.hub_server import HubServer
from tests.processes import ROOT, run_cli
from tests.tiny import metric_lines, tiny_values


@pytest.fixture
def recipe(tiny_data: Path, tmp_path: Path) -> Path:
    path = tmp_path / "recipe.json"  # JSON is YAML
    path.write_text(json.dumps(tiny_values(tiny_data, tmp_path / "runs", data={"cache_dir": str(tmp_path / "cache")})))
    return path


def succeeds(*arguments: str | Path) -> str:
    result = run_cli(*arguments)
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
        environment = os.environ | hub.environment(tmp_path)

        def run(*arguments: str) -> str:
            command = [sys.executable, "-m", "pldr_train", *arguments, str(recipe), *overrides]
            result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
            assert result.returncode == 0, result.stderr
            return result.stdout

        said = run("data", "download")
        assert "files       1 of 2" in said  # documents [0, 60) stand in the first file
        assert "fetched     1 files" in said
        assert hub.reads("data/part-1.parquet") == []
        fetched = len(hub.reads())
        assert "fetched     0 files" in run("data", "download")
        assert "whole       1 files" in run("data", "verify")
        run("fit")
        assert len(hub.reads("data/part-0.parquet")) == len(hub.reads()) == fetched
